"""SOAP: Adam in the eigenbases of Shampoo's sides (Vyas et al., arXiv:2409.11321).

For a matrix W (m×n), at update t = 1, 2, ...; the first only makes the bases, so that none is used on the gradient
that it was made from (first_step: skip):

    P = Q_Lᵀ G Q_R                                      the gradient, rotated
    M ← β₁M + (1-β₁)P,   V ← β₂V + (1-β₂)P²
    U = Q_L (M / (√V + ε)) Q_Rᵀ
    W ← W - η √(1-β₂ᵗ⁻¹)/(1-β₁ᵗ⁻¹) U,  then  W ← (1 - ηλ) W
    L ← βL + (1-β)GGᵀ,   R ← βR + (1-β)GᵀG              β: shampoo_beta, or β₂
    Q_L, Q_R ← eigenvectors of L and R, by falling eigenvalue       after update 1
    Q_L, Q_R ← qr(L Q_L), qr(R Q_R)                     after updates 11, 21, ...; first, `sort` reorders the columns
                                                        by diag(QᵀLQ), falling, and V with them

At a change of bases M is taken over into the new ones and V is left as it is. Follows nikhilvyas/SOAP (a1e5535) in
all this. In other words of the references:

    first_step: take             update 1 is a step too, and t counts it (modded-nanogpt's track 3, SOAP-H, #27)
    bias_correction: false       a step of η U (#27); reference: correct_bias
    momentum_basis: unrotated    M averages G and is rotated at each step (#27). The same step but for rounding; cheaper
                                 where bases change at most steps, as one more rotation a step replaces two a change
    sort: false                  columns stay in place (#27)
    then: muon                   W ← W - ηs O - ηλW, O = NS(U), s = √max(1, m/n): U orthogonalised, as in Muon

    SOAP 2024-10-09   lr .0018, weight_decay 0          SOAP of the 2024-10-29 comparison   lr .0018
    #27 SOAP-H        lr .018, betas [.95, .9], weight_decay 0, precondition_frequency 1, hyperball, and the first
                      four of the switches above
    #44-#46           then: muon, betas [.95, .9], precondition_frequency 1; what is known of SOAP-Muon is its name
                      and these numbers, so that this is a reading of it and not its reproduction

`stagger` spreads the matrices' QRs over the steps of an interval; none then waits longer for its next than without.
On several ranks it costs time on the whole (`bases.is_due`). Deviations:
- #27 rotates the first gradient by the bases made of it, where all but m entries of P are rounding errors that Adam
  makes as large as the rest. Here its first step is taken unrotated; M and V come out of it as #27's.
- Columns of Q point where diag(R) > 0, which no step depends on.
- A gradient with entries beyond 1e15 is scaled down, since float32 could not hold V.
- The state is float32 whatever the weights are. A side of zeros keeps its basis.
- A decomposition that fails is retried and then given up for that refresh, with a warning and a count (bases.py).
As the equations have it, a gradient far below ε moves its weight by far less than η.
The first bases of a matrix that is not square hold an arbitrary null space, which rounding decides: other numbers of
ranks or micro-batches then take other paths, equally right. (iid 128×32 gradients, frequency 1, all disturbed by 1e-7:
the displacement differs by 70 % after update 2 and by 20 % after 30.)
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.bases import (advance_sides, bounded, eigenbases, identities, is_due, new_sides, power_qr, qr_flops,
                         rotate, rotate_back, sides_within)
from optim.muon import shape_factor
from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class SOAP(Rule):
    """For stacks of equal matrices (n, rows, cols)."""
    lr: Annotated[float, Field(ge=0)] = 3e-3             # learning rate η: roughly, change per step
    betas: tuple[Beta, Beta] = (0.95, 0.95)              # β₁, β₂: decay of the first and second moment
    shampoo_beta: Beta | None = None                     # β of the sides L and R; null: β₂
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √V
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2   # λ, times the learning rate
    precondition_frequency: Annotated[int, Field(gt=0)] = 10    # updates between changes of the bases
    max_precond_dim: Annotated[int, Field(gt=0)] = 10000 # a side longer than this gets no basis
    bias_correction: bool = True                         # of both moments, in the step's size
    first_step: Literal["skip", "take"] = "skip"         # whether update 1 moves weights and moments
    momentum_basis: Literal["rotated", "unrotated"] = "rotated"  # how M is kept
    sort: bool = True                                    # reorder the bases, and V, at each change
    stagger: bool = True                                 # change different matrices' bases at different steps
    then: Literal["none", "muon"] = "none"               # muon: orthogonalise the step
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast

    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        "bias_correction": {"then": ("none",)},
        "ns_coefficients": {"then": ("muon",)},
        "ns_steps": {"then": ("muon",)},
        "ns_dtype": {"then": ("muon",)},
    }

    @property
    def orthogonalises(self) -> bool:
        return self.then == "muon"

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Both moments, sides L (n, rows, rows) and R (n, cols, cols), and their bases; float32, or W's float64.

        Raises:
            ValueError: both sides are longer than `max_precond_dim`.
        """
        sides = new_sides(W, self.max_precond_dim)
        if not sides:
            raise ValueError(f"no side of a {W.shape[-2]}×{W.shape[-1]} matrix is within max_precond_dim "
                             f"{self.max_precond_dim}: put it in a group with rule adamw, or raise 'max_precond_dim'")
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"m": torch.zeros_like(W, dtype=dtype), "v": torch.zeros_like(W, dtype=dtype), **sides,
                **{"q_" + side: identities(S) for side, S in sides.items()}}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        M, V, (b1, b2), shape = state["m"], state["v"], self.betas, W.shape[-2:]
        bases = state.get("q_left"), state.get("q_right")
        G = bounded(G.to(M.dtype))
        P, moving = rotate(G, *bases), self._moving(h).to(M.dtype)
        M.lerp_(P if self.momentum_basis == "rotated" else G, moving * (1 - b1))
        V.lerp_(P * P, moving * (1 - b2))
        rotated = M if self.momentum_basis == "rotated" else rotate(M, *bases)
        U = rotate_back(rotated / (V.sqrt() + self.eps), *bases)             # 0 while M is
        if self.then == "muon":
            dtype = iteration_dtype(self.ns_dtype, W.device)
            U = self.lr_multiplier(*shape) * orthogonalise(U, self.ns_coefficients, self.ns_steps, dtype).to(M.dtype)
        advance_sides(G, state, b2 if self.shampoo_beta is None else self.shampoo_beta)
        stepped = W.to(M.dtype) - h["lr"] * self._correction(h) * U
        W.copy_(stepped - self.shrinkage(h, *shape) * stepped)

    def _moving(self, h: dict[str, Tensor]) -> Tensor:
        """0 at an update that only initialises, else 1."""
        return (h["t"] > (1 if self.first_step == "skip" else 0)).double()

    def _correction(self, h: dict[str, Tensor]) -> Tensor | float:
        if not self.bias_correction or self.then == "muon":
            return 1.0
        t = (h["t"] - 1).clamp(min=1) if self.first_step == "skip" else h["t"]
        return (1 - self.betas[1] ** t).sqrt() / (1 - self.betas[0] ** t)

    def refresh_due(self, step: int, index: int, count: int) -> bool:
        every = self.precondition_frequency
        last = 1 + step - step % every
        return step == 0 or is_due(step + 1, last, last + every, index, count, self.stagger)

    def refresh(self, state: dict[str, Tensor], step: int) -> None:
        """Eigenvectors after the first update, later a QR each."""
        rotated = self.momentum_basis == "rotated"
        M = rotate_back(state["m"], state.get("q_left"), state.get("q_right")) if rotated else state["m"]
        for side in [side for side in ("left", "right") if side in state]:
            S, Q = state[side], state["q_" + side]
            if step == 0:
                Q.copy_(eigenbases(S, Q.flip(-1)).flip(-1))
                continue
            fresh, order = power_qr(S, Q, self.sort)
            Q.copy_(fresh)
            if self.sort:
                state["v"].copy_(_in_order(state["v"], order, side))
        N = rotate(M, state.get("q_left"), state.get("q_right"))
        if rotated:
            state["m"].copy_(N)
        if step == 0 and self.first_step == "take":      # V in the bases just made, M being (1-β₁)G
            state["v"].copy_((1 - self.betas[1]) * (N / (1 - self.betas[0])).square())

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return shape_factor("spectral", rows, cols) if self.then == "muon" else 1.0

    def step_rms(self, rows: int, cols: int) -> float:
        return self.lr_multiplier(rows, cols) / max(rows, cols) ** 0.5 if self.then == "muon" else 1.0

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return h["lr"] * h["weight_decay"] * self._moving(h)

    def flops(self, rows: int, cols: int) -> float:
        """Two rotations 4mnd and the side 2mnd for each side of length d, M's own rotations, and the QR."""
        every = self.precondition_frequency
        of_M = 4.0 / every if self.momentum_basis == "rotated" else 2.0
        total = 16.0 * rows * cols + sum((6.0 + of_M) * rows * cols * d + qr_flops(d) / every
                                         for d in sides_within(rows, cols, self.max_precond_dim).values())
        return total + (newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps)
                        if self.then == "muon" else 0.0)

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols + sum(2 * d * d for d in sides_within(rows, cols, self.max_precond_dim).values())


def _in_order(V: Tensor, order: Tensor, side: str) -> Tensor:
    """Rows (left) or columns (right) of V in `order` (n, d)."""
    if side == "left":
        return V.gather(-2, order[:, :, None].expand_as(V))
    return V.gather(-1, order[:, None, :].expand_as(V))
