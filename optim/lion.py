"""Lion: the sign of a momentum that looks further than what is kept (Chen et al., arXiv:2302.06675, Algorithm 2).

    u = sign(β₁ m + (1-β₁) g)
    w ← w - η (u + λ w)
    m ← β₂ m + (1-β₂) g

Every entry moves by η, so that η is to be three to ten times below AdamW's and λ as much above it (the paper,
section 5). Deviation: m is float32 whatever the weights are.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class Lion(Rule):
    """Elementwise: `w` is any tensor, usually a whole group's parameters end to end."""
    lr: Annotated[float, Field(ge=0)] = 1e-4             # learning rate η: change of every entry in a step
    betas: tuple[Beta, Beta] = (0.9, 0.99)               # β₁ of the step's sign, β₂ of the momentum that is kept
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times the learning rate

    elementwise: ClassVar[bool] = True

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """Momentum, zero: float32, or float64 for float64 weights."""
        return {"momentum": torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))}

    def update(self, w: Tensor, g: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        m, (b1, b2) = state["momentum"], self.betas
        g = g.to(m.dtype)
        u = m.lerp(g, 1 - b1).sign()
        w.sub_(h["lr"] * (u + h["weight_decay"] * w.to(m.dtype)))
        m.lerp_(g, 1 - b2)

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols
