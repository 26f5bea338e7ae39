"""Shampoo, as DistributedShampoo has it (Gupta et al., arXiv:1802.09568; Shi et al., arXiv:2309.06497).

For a matrix W (m×n), at update t = 1, 2, ...:

    M ← β₁M + (1-β₁)G                                   M̂ = M/(1-β₁ᵗ)
    L ← β₂L + (1-β₂)GGᵀ,   R ← β₂R + (1-β₂)GᵀG
    U = A M̂ B                                           roots A and B as they are, 0 at first
    D = U ‖T‖/‖U‖, or T where U = 0                     graft: Adam's step T = M̂/(√V̂ + ε_g), V ← β₂V + (1-β₂)G²
    W ← W - η(D + λW)
    A, B ← (L/(1-β₂ᵗ) + εI)^-p, the same of R           after updates 10, 20, ...: `refresh`; p = 1/4, 1/2 with one side

    graft: adam                  D is as long as Adam's step, and is Adam's step before the first roots
    graft: sgd                   T = M̂
    graft: none                  D = U: a matrix stays where it is until its first roots
    sides: smaller               the shorter side alone, the left one of a square: one-sided Shampoo
    eps: 0                       pseudo-inverse roots

What modded-nanogpt published, beside the schedules; DistributedShampoo's max_preconditioner_dim is max_dim here, and
nothing in those models is longer:

    2024-10-29 comparison        the defaults
    track 3, #21                 lr .0015, betas [.9, .95], weight_decay .2, precondition_frequency 5, graft_eps 1e-10
    track 3, #35, one-sided      lr .01, β₂ .9, weight_decay .1, precondition_frequency 1, sides: smaller, eps 0,
                                 graft_eps 1e-15; which side is its one side, and β₁, are not known here

Deviations from DistributedShampoo, as far as its papers say:
- Roots are renewed after an update and serve from the next one on, so that they hold the gradients before.
- A side beyond `max_dim` gets no root, while it cuts matrices into blocks.
- Adam's second moment has the sides' β₂, as in all the settings above; it has a key of its own.
- `stagger` spreads the roots of different matrices over the steps of an interval; a matrix gets its first up to one
  interval later. On several ranks it costs time on the whole (`bases.is_due`).
- A gradient with entries beyond 1e15 is scaled down, since float32 could not hold its square.
- The state is float32 whatever the weights are. A root that fails is tried again and then given up for that
  refresh, with a warning and a count (bases.py).
Gradients far below ε_g, or whose squares are far below ε, move their weights by far less than η. Roots of age go bad:
intervals beyond 25 diverge (arXiv:2506.07254).
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.adamw import adam_step
from optim.bases import advance_sides, bounded, eigh_flops, inverse_roots, is_due, new_sides, sides_within
from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class Shampoo(Rule):
    """For stacks of equal matrices (n, rows, cols)."""
    lr: Annotated[float, Field(ge=0)] = 1.8e-3           # learning rate η, in Adam's units with `graft: adam`
    betas: tuple[Beta, Beta] = (0.95, 0.95)              # β₁ of the momentum, β₂ of L, R and V
    eps: Annotated[float, Field(ge=0)] = 1e-12           # ε, added to the sides' eigenvalues
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times the learning rate
    graft: Literal["adam", "sgd", "none"] = "adam"       # whose length a step has
    graft_eps: Annotated[float, Field(gt=0)] = 1e-8      # ε_g, added to √V̂
    sides: Literal["both", "smaller"] = "both"           # which sides have roots
    exponent: Annotated[float, Field(gt=0)] | None = None       # p; null: 1/4 for both sides, 1/2 for the smaller
    precondition_frequency: Annotated[int, Field(gt=0)] = 10    # updates between refreshes of the roots
    stagger: bool = True                                 # refresh different matrices at different steps
    max_dim: Annotated[int, Field(gt=0)] = 8192          # a side longer than this gets no root

    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {"graft_eps": {"graft": ("adam",)}}

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, Adam's second moment if grafted to it, sides and their roots; float32, or W's float64.

        Raises:
            ValueError: no side that has a root is within `max_dim`.
        """
        lengths = self._sides(*W.shape[-2:])
        if not lengths:
            raise ValueError(f"no side of a {W.shape[-2]}×{W.shape[-1]} matrix is within max_dim {self.max_dim}: "
                             "put it in a group with rule adamw, or raise 'max_dim'")
        sides = new_sides(W, self.max_dim, tuple(lengths))
        moments = ("m", "v") if self.graft == "adam" else ("m",)
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {**{key: torch.zeros_like(W, dtype=dtype) for key in moments}, **sides,
                **{"root_" + side: torch.zeros_like(S) for side, S in sides.items()}}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        M, (b1, b2) = state["m"], self.betas
        G = bounded(G.to(M.dtype))
        if self.graft == "adam":
            T = adam_step(G, state, torch.ones_like(h["lr"]), h["t"], self.betas, self.graft_eps)
        else:
            T = M.lerp_(G, 1 - b1) / (1 - b1 ** h["t"])
        U = M / (1 - b1 ** h["t"])
        U = U if "left" not in state else state["root_left"] @ U
        U = U if "right" not in state else U @ state["root_right"]
        advance_sides(G, state, b2)
        D = U if self.graft == "none" else _grafted(U, T)
        W.sub_(h["lr"] * D + self.shrinkage(h, *W.shape[-2:]) * W.to(M.dtype))

    def refresh_due(self, step: int, index: int, count: int) -> bool:
        t, every = step + 1, self.precondition_frequency
        return t >= every and is_due(t, t - t % every, t - t % every + every, index, count, self.stagger)

    def refresh(self, state: dict[str, Tensor], step: int) -> None:
        """New roots of the sides, whose averages began at zero."""
        for side in [side for side in ("left", "right") if side in state]:
            S, root = state[side] / (1 - self.betas[1] ** (step + 1)), state["root_" + side]
            root.copy_(inverse_roots(S, root, self._exponent, self.eps))

    def step_rms(self, rows: int, cols: int) -> float:
        """Adam's ±1; ungrafted that of an orthogonal matrix, which the step from one gradient is; sgd: the
        gradient's own, here for entries of ±1."""
        return 1 / max(rows, cols) ** 0.5 if self.graft == "none" else 1.0

    def flops(self, rows: int, cols: int) -> float:
        """The side 2mnd and the root's product 2mnd for each side of length d, and a refresh: its decomposition
        and a product 2d³."""
        each = (4.0 * rows * cols * d + (eigh_flops(d) + 2.0 * d ** 3) / self.precondition_frequency
                for d in self._sides(rows, cols).values())
        return 22.0 * rows * cols + sum(each)

    def state_numbers(self, rows: int, cols: int) -> int:
        moments = 2 if self.graft == "adam" else 1
        return moments * rows * cols + sum(2 * d * d for d in self._sides(rows, cols).values())

    @property
    def _exponent(self) -> float:
        return self.exponent or (0.25 if self.sides == "both" else 0.5)

    def _sides(self, rows: int, cols: int) -> dict[str, int]:
        """The sides that have roots, with their lengths."""
        within = sides_within(rows, cols, self.max_dim)
        smaller = "left" if rows <= cols else "right"
        return within if self.sides == "both" else {side: d for side, d in within.items() if side == smaller}


def _grafted(U: Tensor, T: Tensor) -> Tensor:
    """U at T's length; T itself where U is zero."""
    largest, tiny = torch.linalg.vector_norm(U, float("inf"), (-2, -1), keepdim=True), torch.finfo(U.dtype).tiny
    U = U / largest.clamp(min=tiny)                      # its squares neither overflow nor vanish then
    # Stacked, because torch 2.13 fails to compile the two norms apart for a CPU (KeyError in its outer loop fusion).
    of_U, of_T = torch.linalg.matrix_norm(torch.stack([U, T]), keepdim=True)
    return torch.where(largest > 0, U * (of_T / of_U.clamp(min=tiny)), T)
