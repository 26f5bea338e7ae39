"""KL-SOAP: SOAP with the sides that minimise a Kullback-Leibler divergence (arXiv:2509.03378).

For a matrix W (m×n), at update t = 2, 3, ..., with the bases Q and the eigenvalues λ as they are:

    P = Q_Lᵀ G Q_R
    M ← β₁M + (1-β₁)P,   V ← β₂V + (1-β₂)P²
    U = Q_L (M / (√V + ε)) Q_Rᵀ
    W ← W - ηU,  then  W ← (1 - ηλ) W                   λ here: weight_decay
    L ← βL + (1-β) XXᵀ/n                                X = G Q_R Λ_R^(-1/2)
    R ← βR + (1-β) YᵀY/m                                Y = Λ_L^(-1/2) Q_Lᵀ G
    λ_L ← βλ_L + (1-β) mean of each row of P² Λ_R⁻¹     λ_R: of each column of Λ_L⁻¹ P²
    Q_L, Q_R ← qr(L Q_L), qr(R Q_R)                     and M is taken over into the new bases

So each side's gradients are whitened by the other side before they are averaged, where Shampoo's and SOAP's are not.
Update 1 only makes L = GGᵀ/n, R = GᵀG/m, their eigenvectors by falling eigenvalue, and λ = .1. No bias is corrected.

This is modded-nanogpt's track 3, #19 (KL-SOAP-H), with `hyperball`, lr .018 and the defaults; its λ^(-1/2) is bounded
by 4000, too. `stagger` and max_precond_dim are soap.py's, as are its deviations. A side without a basis counts as
Q = I, Λ = I. Entries beyond 1e15 of X, Y and P Λ^(-1/2) scale these down.
The first bases of a matrix that is not square hold an arbitrary null space, which rounding decides: other numbers of
ranks or micro-batches then take other paths, equally right. (iid 128×32 gradients, frequency 1, all disturbed by 1e-7:
the displacement differs by 70 % after update 2 and by 20 % after 30.)
"""
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.bases import (bounded, eigenbases, identities, is_due, new_sides, power_qr, qr_flops, rotate, rotate_back,
                         sides_within)
from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]
FIRST = 0.1                                              # λ after the first gradient
LARGEST_ROOT = 4000.0                                    # bound of λ^(-1/2)


@dataclass(frozen=True, config={"extra": "forbid"})
class KLSOAP(Rule):
    """For stacks of equal matrices (n, rows, cols)."""
    lr: Annotated[float, Field(ge=0)] = 3e-3             # learning rate η: roughly, change per step
    betas: tuple[Beta, Beta] = (0.95, 0.9)               # β₁, β₂: decay of the first and second moment
    shampoo_beta: Beta = 0.9                             # β of the sides L and R and of λ
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √V
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # times the learning rate
    precondition_frequency: Annotated[int, Field(gt=0)] = 1     # updates between changes of the bases
    max_precond_dim: Annotated[int, Field(gt=0)] = 10000 # a side longer than this gets no basis
    stagger: bool = True                                 # change different matrices' bases at different steps

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Both moments, sides L (n, rows, rows) and R (n, cols, cols), their bases and eigenvalues; float32, or
        W's float64.

        Raises:
            ValueError: both sides are longer than `max_precond_dim`.
        """
        sides = new_sides(W, self.max_precond_dim)
        if not sides:
            raise ValueError(f"no side of a {W.shape[-2]}×{W.shape[-1]} matrix is within max_precond_dim "
                             f"{self.max_precond_dim}: put it in a group with rule adamw, or raise 'max_precond_dim'")
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"m": torch.zeros_like(W, dtype=dtype), "v": torch.zeros_like(W, dtype=dtype), **sides,
                **{"q_" + side: identities(S) for side, S in sides.items()},
                **{"values_" + side: torch.ones_like(S[:, 0]) for side, S in sides.items()}}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        M, V, (b1, b2) = state["m"], state["v"], self.betas
        Q_L, Q_R = state.get("q_left"), state.get("q_right")
        G, moving = bounded(G.to(M.dtype)), (h["t"] > 1).to(M.dtype)
        P = rotate(G, Q_L, Q_R)
        M.lerp_(P, moving * (1 - b1))
        V.lerp_(P * P, moving * (1 - b2))
        U = rotate_back(M / (V.sqrt() + self.eps), Q_L, Q_R)                 # 0 while M is
        self._advance_sides(G, P, state, moving)
        stepped = W.to(M.dtype) - h["lr"] * U
        W.copy_(stepped - self.shrinkage(h, *W.shape[-2:]) * stepped)

    def _advance_sides(self, G: Tensor, P: Tensor, state: dict[str, Tensor], moving: Tensor) -> None:
        rows, cols = G.shape[-2:]
        left, right = _inverse_root(state.get("values_left")), _inverse_root(state.get("values_right"))
        weight = 1 - moving * self.shampoo_beta          # 1 at first, when Q = I and λ = 1 still
        if "left" in state:
            root = right[:, None, :] if "right" in state else 1.0
            X = bounded(rotate(G, None, state.get("q_right")) * root)
            state["left"].lerp_(X @ X.mT / cols, weight)
            state["values_left"].lerp_(bounded(P * root).square().mean(-1), moving * (1 - self.shampoo_beta))
        if "right" in state:
            root = left[:, :, None] if "left" in state else 1.0
            Y = bounded(rotate(G, state.get("q_left"), None) * root)
            state["right"].lerp_(Y.mT @ Y / rows, weight)
            state["values_right"].lerp_(bounded(P * root).square().mean(-2), moving * (1 - self.shampoo_beta))

    def refresh_due(self, step: int, index: int, count: int) -> bool:
        every = self.precondition_frequency
        last = 1 + step - step % every
        return step == 0 or is_due(step + 1, last, last + every, index, count, self.stagger)

    def refresh(self, state: dict[str, Tensor], step: int) -> None:
        """Eigenvectors after the first update, later a QR each."""
        M = rotate_back(state["m"], state.get("q_left"), state.get("q_right"))
        for side in [side for side in ("left", "right") if side in state]:
            S, Q = state[side], state["q_" + side]
            Q.copy_(eigenbases(S, Q.flip(-1)).flip(-1) if step == 0 else power_qr(S, Q, sort=False)[0])
            if step == 0:
                state["values_" + side].fill_(FIRST)
        state["m"].copy_(rotate(M, state.get("q_left"), state.get("q_right")))

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return h["lr"] * h["weight_decay"] * (h["t"] > 1).double()

    def flops(self, rows: int, cols: int) -> float:
        """Two rotations 4mnd, one more product 2mnd for the other side, and the side 2mnd, for each side of length
        d; M's own rotations 4mnd and the QR at a change of bases."""
        every = self.precondition_frequency
        return 30.0 * rows * cols + sum((8.0 + 4.0 / every) * rows * cols * d + qr_flops(d) / every
                                        for d in sides_within(rows, cols, self.max_precond_dim).values())

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols + sum(2 * d * d + d for d in sides_within(rows, cols, self.max_precond_dim).values())


def _inverse_root(values: Tensor | None) -> Tensor | None:
    """λ^(-1/2), bounded."""
    return None if values is None else values.clamp(min=LARGEST_ROOT ** -2).rsqrt()
