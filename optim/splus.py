"""SPlus: sign descent in a slowly refreshed eigenbasis (Frans, Levine, Abbeel, arXiv:2506.07254).

For a matrix W (m×n), at update t = 1, 2, ...:

    M ← β₁M + (1-β₁)G
    U = Q_L sign(Q_Lᵀ M Q_R) Q_Rᵀ                       with the bases as they are, Q = I at first
    L ← β₂L + (1-β₂)GGᵀ,   R ← β₂R + (1-β₂)GᵀG
    W ← W - sU,  then  W ← (1 - sλ) W                   s = η·2/(m+n)
    Q_L, Q_R ← eigenvectors of L + 1e-30 I, R + 1e-30 I  if t = 1 or t mod 100 = 0   (`refresh`)

With `preconditioned: false`, for embeddings, the head and 1-D parameters:  U = sign(M),  s = η·0.001.

Follows kvfrans/splus torch/splus.py in the order of operations and the defaults, with `lr` from its README,
which says 0.2, or else AdamW's learning rate times twice the width. Deviations:
- The average of weights that SPlus is evaluated with is the trainer's business (`average`), which sees W
  after the decay; the reference averages W before it.
- What goes without a basis is chosen by role, as in the paper; the reference's code goes by size alone.
- A side of exactly `max_dim` gets a basis; in the reference it gets none, although s counts it as having one.
- For L and R a gradient with entries beyond 1e16 is scaled down, since float32 could not hold its square.
- An eigendecomposition that fails is retried in float64 and then given up for that refresh, with a warning.
L, R and the bases want IEEE float32 products: leave TF32 off. The bases of rank-deficient sides (the larger
side of any rectangular matrix after its first step) differ between LAPACK and cuSOLVER, and so do runs.
"""
import warnings
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST = 1e16                                           # sums of its squares are float32 numbers
RIDGE = 1e-30                                            # on the diagonal of L and R, as the reference has it


@dataclass(frozen=True, config={"extra": "forbid"})
class SPlus:
    """For stacks of equal matrices (n, rows, cols), or elementwise with `preconditioned: false`."""
    lr: Annotated[float, Field(ge=0)] = 0.2              # learning rate η, × 2/(rows + cols)
    betas: tuple[Beta, Beta] = (0.9, 0.999)              # β₁ of the momentum, β₂ of the sides L and R
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2   # λ, times η and the shape's factor
    preconditioned: bool = True                          # false: plain sign of the momentum
    inverse_every: Annotated[int, Field(gt=0)] = 100     # updates between refreshes of the eigenbases
    max_dim: Annotated[int, Field(gt=0)] = 10000         # a side longer than this gets no basis
    nonstandard_constant: Annotated[float, Field(gt=0)] = 1e-3  # factor on lr unless both sides have a basis

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        "inverse_every": {"preconditioned": (True,)},
        "max_dim": {"preconditioned": (True,)},
    }

    @property
    def elementwise(self) -> bool:
        return not self.preconditioned

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, sides L (n, rows, rows) and R (n, cols, cols), and their bases; float32, or W's float64.

        Raises:
            ValueError: both sides are longer than `max_dim`.
        """
        dtype = torch.promote_types(W.dtype, torch.float32)
        state = {"momentum": torch.zeros_like(W, dtype=dtype)}
        if not self.preconditioned:
            return state
        n, rows, cols = W.shape
        for side, d in (("left", rows), ("right", cols)):
            if d <= self.max_dim:
                state[side] = torch.zeros(n, d, d, dtype=dtype, device=W.device)
                state["q_" + side] = torch.eye(d, dtype=dtype, device=W.device).repeat(n, 1, 1)
        if len(state) == 1:
            raise ValueError(f"no side of a {rows}×{cols} matrix is within max_dim {self.max_dim}: "
                             "put it in a group with 'preconditioned: false', or raise 'max_dim'")
        return state

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` and `state`; `h` holds lr and weight_decay as 0-d float64 tensors."""
        M = state["momentum"]
        G = G.to(M.dtype)
        M.lerp_(G, 1 - self.betas[0])
        if self.preconditioned:
            U = _sign_in_basis(M, state.get("q_left"), state.get("q_right"))
            self._advance_sides(G, state)
            s = h["lr"] * self.lr_multiplier(*W.shape[-2:])
        else:
            U, s = M.sign(), h["lr"] * self.nonstandard_constant
        stepped = W.to(M.dtype) - s * U
        W.copy_(stepped - s * h["weight_decay"] * stepped)

    def _advance_sides(self, G: Tensor, state: dict[str, Tensor]) -> None:
        largest = torch.linalg.vector_norm(G, float("inf"), (-2, -1), keepdim=True)
        G = G / (largest / LARGEST).clamp(min=1)         # exactly G for any ordinary gradient
        if "left" in state:
            state["left"].lerp_(G @ G.mT, 1 - self.betas[1])
        if "right" in state:
            state["right"].lerp_(G.mT @ G, 1 - self.betas[1])

    def refresh_due(self, step: int) -> bool:
        """Whether new eigenbases are due after the update that follows `step` completed ones."""
        t = step + 1
        return self.preconditioned and (t == 1 or t % self.inverse_every == 0)

    def refresh(self, state: dict[str, Tensor]) -> None:
        """New eigenbases from the sides; on the host, after the update."""
        for side in ("left", "right"):
            if side in state:
                state["q_" + side].copy_(eigenbases(state[side], state["q_" + side]))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """The factor on `lr` for matrices of this shape."""
        both = self.preconditioned and max(rows, cols) <= self.max_dim
        return 2 / (rows + cols) if both else self.nonstandard_constant


def _sign_in_basis(M: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Q_L sign(Q_Lᵀ M Q_R) Q_Rᵀ, a missing basis being the identity."""
    rotated = M if Q_L is None else Q_L.mT @ M
    signs = (rotated if Q_R is None else rotated @ Q_R).sign()
    signs = signs if Q_L is None else Q_L @ signs
    return signs if Q_R is None else signs @ Q_R.mT


def eigenbases(S: Tensor, previous: Tensor) -> Tensor:
    """Orthonormal eigenvectors, as columns, of each symmetric matrix in S (n, d, d).

    Where the solver fails, float64 is tried; where that fails too, the matrix keeps its `previous` basis,
    with a warning. One matrix's failure leaves the others' results alone, so that stacks may be cut anywhere.
    """
    Q = _eigenvectors(S)
    if Q is None and len(S) > 1:
        return torch.cat([eigenbases(one, old) for one, old in zip(S.split(1), previous.split(1))])
    if Q is None:
        Q = _eigenvectors(S.double())
    if Q is None:
        d = S.shape[-1]
        warnings.warn(f"no eigenbasis was found for a {d}×{d} side: SPlus keeps its old one")
        Q = previous
    return Q.to(S.dtype)


def _eigenvectors(S: Tensor) -> Tensor | None:
    try:
        Q = torch.linalg.eigh(S + RIDGE * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)).eigenvectors
    except torch.linalg.LinAlgError:
        return None
    return Q if Q.isfinite().all() else None
