"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2).

    m ← β₁ m + (1-β₁) g            v ← β₂ v + (1-β₂) g²
    w ← w - η λ w - η m̂ / (√v̂ + ε)        m̂ = m / (1-β₁ᵗ),  v̂ = v / (1-β₂ᵗ)

Follows torch.optim.AdamW: λ is multiplied by the learning rate, ε is added after the bias correction.
Deviations:
- The moments are float32 whatever the weights are; torch's have the weights' dtype.
- An entry of g beyond ±1e18 counts as ±1e18, so that v stays finite. Torch's becomes infinite there, and the
  weight never moves again.
As the equations have it, a gradient far below ε moves its weight by far less than η.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.rule import Rule

Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST = 1e18                                           # its square is a float32 number


@dataclass(frozen=True, config={"extra": "forbid"})
class AdamW(Rule):
    """Elementwise: `w` is any tensor, usually a whole group's parameters end to end."""
    lr: Annotated[float, Field(ge=0)] = 1e-3             # learning rate η: roughly, change per step
    betas: tuple[Beta, Beta] = (0.9, 0.95)               # β₁, β₂: decay of the first and second moment
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √v̂
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times the learning rate

    elementwise: ClassVar[bool] = True

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """First and second moment, zero."""
        return zero_moments(w)

    def update(self, w: Tensor, g: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        shrinkage = h["lr"] * h["weight_decay"] * w.to(state["m"].dtype)
        w.sub_(adam_step(g, state, h["lr"], h["t"], self.betas, self.eps) + shrinkage)

    def flops(self, rows: int, cols: int) -> float:
        return 16.0 * rows * cols                        # both moments 7, the step 5, decay and the rest 4

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols


def zero_moments(w: Tensor) -> dict[str, Tensor]:
    """m and v before the first update: float32, or float64 for float64 weights."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    return {"m": torch.zeros_like(w, dtype=dtype), "v": torch.zeros_like(w, dtype=dtype)}


def adam_step(g: Tensor, state: dict[str, Tensor], lr: Tensor, t: Tensor, betas: tuple[float, float],
              eps: float) -> Tensor:
    """η m̂ / (√v̂ + ε), having advanced `state`'s m and v with g; update number t counts from 1."""
    m, v, (b1, b2) = state["m"], state["v"], betas
    g = g.to(m.dtype).clamp(-LARGEST, LARGEST)
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    root = v.sqrt() / (1 - b2 ** t).sqrt()               # √v̂
    return lr / (1 - b1 ** t) * (m / (root + eps))
