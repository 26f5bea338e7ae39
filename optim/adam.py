"""Adam with weight decay through the gradient (Kingma & Ba, arXiv:1412.6980, Algorithm 1; torch.optim.Adam).

    g ← g + λ w                    the L2 penalty's gradient: "coupled" decay
    m ← β₁ m + (1-β₁) g            v ← β₂ v + (1-β₂) g²
    w ← w - η m̂ / (√v̂ + ε)         m̂ = m / (1-β₁ᵗ),  v̂ = v / (1-β₂ᵗ)

At λ = 0 this is AdamW (adamw.py), whose deviations from torch hold here too. At λ > 0 the decay is divided by √v̂
with the rest, so that no fixed share of the weight goes in an update, and the rule cannot be made cautious: use
AdamW for that.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.adamw import Beta, adam_step, zero_moments
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class Adam(Rule):
    """Elementwise: `w` is any tensor, usually a whole group's parameters end to end."""
    lr: Annotated[float, Field(ge=0)] = 1e-3             # learning rate η: roughly, change per step
    betas: tuple[Beta, Beta] = (0.9, 0.999)              # β₁, β₂: decay of the first and second moment
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √v̂
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ of the L2 penalty λ/2 ‖w‖²

    elementwise: ClassVar[bool] = True
    coupled_decay: ClassVar[bool] = True

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """First and second moment, zero."""
        return zero_moments(w)

    def update(self, w: Tensor, g: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        dtype = state["m"].dtype
        penalised = g.to(dtype) + h["weight_decay"] * w.to(dtype)
        w.sub_(adam_step(penalised, state, h["lr"], h["t"], self.betas, self.eps))

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        """Zero: the decay has no share of its own in a step."""
        return torch.zeros_like(h["lr"])

    def flops(self, rows: int, cols: int) -> float:
        return 16.0 * rows * cols

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols
