"""SPlus: sign descent in a slowly refreshed eigenbasis (Frans, Levine, Abbeel, arXiv:2506.07254).

For a matrix W (m×n), at update t = 1, 2, ...:

    M ← β₁M + (1-β₁)G
    U = Q_L sign(Q_Lᵀ M Q_R) Q_Rᵀ                       with the bases as they are, Q = I at first
    L ← β₂L + (1-β₂)GGᵀ,   R ← β₂R + (1-β₂)GᵀG
    W ← W - sU,  then  W ← (1 - sλ) W                   s = η·2/(m+n)
    Q_L, Q_R ← new bases                                after some updates: `refresh`

With `preconditioned: false`, for embeddings, the head and 1-D parameters:  U = sign(M),  s = η·0.001.

    basis      new bases                                     after updates t
    eigh       eigenvectors of L + 1e-30 I, R + 1e-30 I      1, 100, 200, ...              the reference
    eigh_late  the same                                      8, 16, 32, 64, 100, 200, ...  U = sign(M) until then
    qr_shift   qr((L + δ‖L‖I) Q_L), the same for R; δ = .01  1, 10, 20, ...                a step from the basis before

U does not depend on the signs and the order of eigenvectors, but it does on which of them span a null space, and the
longer side of any matrix that is not square has one after its first gradient. So `eigh` is not reproducible over
solvers: float32's and float64's displacements of a 32×128 matrix differ by .43 after 20 steps, with `eigh_late`, which
waits until the sides can have full rank, by 2e-5 on iid gradients and .2 on those of a power-law spectrum, with
`qr_shift` by 1e-6 and 3e-6 (bases.py; test_splus.py). What that does to the loss is unmeasured.

`stagger` spreads the matrices' refreshes over the steps between two of the times above, the first included. That is
its one deviation: a matrix has its first basis up to one interval later and steps by sign(M) till then. On several
ranks it costs time on the whole (`bases.is_due`).

Follows kvfrans/splus torch/splus.py in the order of operations and the defaults, with `lr` from its README, which
says 0.2, or else AdamW's learning rate times twice the width. Deviations:
- The average of weights that SPlus is evaluated with is the trainer's business (`average`), which sees W after the
  decay; the reference averages W before it.
- What goes without a basis is chosen by role, as in the paper; the reference's code goes by size alone.
- A side of exactly `max_dim` gets a basis; in the reference it gets none, although s counts it as having one.
- For L and R a gradient with entries beyond 1e15 is scaled down, since float32 could not hold its square.
- A decomposition that fails is retried and then given up for that refresh, with a warning and a count (bases.py).
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.bases import (advance_sides, bounded, eigenbases, eigh_flops, identities, is_due, new_sides, qr_flops,
                         rotate, rotate_back, shifted_qr, sides_within)
from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]
Basis = Literal["eigh", "eigh_late", "qr_shift"]


@dataclass(frozen=True, config={"extra": "forbid"})
class SPlus(Rule):
    """For stacks of equal matrices (n, rows, cols), or elementwise with `preconditioned: false`."""
    lr: Annotated[float, Field(ge=0)] = 0.2              # learning rate η, × 2/(rows + cols)
    betas: tuple[Beta, Beta] = (0.9, 0.999)              # β₁ of the momentum, β₂ of the sides L and R
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2   # λ, times η and the shape's factor
    preconditioned: bool = True                          # false: plain sign of the momentum
    basis: Basis = "eigh"                                # how bases are renewed
    inverse_every: Annotated[int, Field(gt=0)] | None = None    # updates between refreshes; null: 100, qr_shift 10
    stagger: bool = True                                 # refresh different matrices at different steps
    max_dim: Annotated[int, Field(gt=0)] = 10000         # a side longer than this gets no basis
    nonstandard_constant: Annotated[float, Field(gt=0)] = 1e-3  # factor on lr unless both sides have a basis

    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        key: {"preconditioned": (True,)} for key in ("basis", "inverse_every", "stagger", "max_dim")}

    @property
    def elementwise(self) -> bool:
        return not self.preconditioned

    @property
    def interval(self) -> int:
        """Updates between two refreshes of a matrix, once the first ones are over."""
        return self.inverse_every or (10 if self.basis == "qr_shift" else 100)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, sides L (n, rows, rows) and R (n, cols, cols), and their bases; float32, or W's float64.

        Raises:
            ValueError: both sides are longer than `max_dim`.
        """
        momentum = {"momentum": torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))}
        if not self.preconditioned:
            return momentum
        sides = new_sides(W, self.max_dim)
        if not sides:
            raise ValueError(f"no side of a {W.shape[-2]}×{W.shape[-1]} matrix is within max_dim {self.max_dim}: "
                             "put it in a group with 'preconditioned: false', or raise 'max_dim'")
        return {**momentum, **sides, **{"q_" + side: identities(S) for side, S in sides.items()}}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        M, shape = state["momentum"], (*W.shape, 1, 1)[1:3]
        G = G.to(M.dtype)
        M.lerp_(G, 1 - self.betas[0])
        bases = state.get("q_left"), state.get("q_right")
        U = rotate_back(rotate(M, *bases).sign(), *bases)
        if self.preconditioned:
            advance_sides(bounded(G), state, self.betas[1])
        stepped = W.to(M.dtype) - h["lr"] * self.lr_multiplier(*shape) * U
        W.copy_(stepped - self.shrinkage(h, *shape) * stepped)

    def refresh_due(self, step: int, index: int, count: int) -> bool:
        last, following = self._refreshes_around(step + 1)
        return self.preconditioned and is_due(step + 1, last, following, index, count, self.stagger)

    def _refreshes_around(self, t: int) -> tuple[int, int]:
        """The last update up to t and the first one after it that have a refresh; (0, 0) before the first."""
        first, every = 8 if self.basis == "eigh_late" else 1, self.interval
        if t < first:
            return 0, 0
        if t >= every:
            return t - t % every, t - t % every + every
        while self.basis == "eigh_late" and 2 * first <= t:
            first *= 2                                   # 8, 16, 32, ... below `every`
        return first, min(2 * first, every) if self.basis == "eigh_late" else every

    def refresh(self, state: dict[str, Tensor], step: int) -> None:
        """New bases from the sides."""
        renewed = shifted_qr if self.basis == "qr_shift" else eigenbases
        for side in [side for side in ("left", "right") if side in state]:
            state["q_" + side].copy_(renewed(state[side], state["q_" + side]))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        both = self.preconditioned and max(rows, cols) <= self.max_dim
        return 2 / (rows + cols) if both else self.nonstandard_constant

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return h["lr"] * self.lr_multiplier(rows, cols) * h["weight_decay"]

    def flops(self, rows: int, cols: int) -> float:
        """Rotations 4mnd and the side 2mnd for each side of length d, and refreshes."""
        renewal = qr_flops if self.basis == "qr_shift" else eigh_flops
        return super().flops(rows, cols) + sum(6.0 * rows * cols * d + renewal(d) / self.interval
                                               for d in self._sides(rows, cols))

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols + sum(2 * d * d for d in self._sides(rows, cols))

    def _sides(self, rows: int, cols: int) -> list[int]:
        return list(sides_within(rows, cols, self.max_dim).values()) if self.preconditioned else []
