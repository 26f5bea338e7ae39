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

Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST = 1e18                                           # its square is a float32 number


@dataclass(frozen=True, config={"extra": "forbid"})
class AdamW:
    """Elementwise: `w` is any tensor, usually a whole group's parameters end to end."""
    lr: Annotated[float, Field(ge=0)] = 1e-3             # learning rate η: roughly, change per step
    betas: tuple[Beta, Beta] = (0.9, 0.95)               # β₁, β₂: decay of the first and second moment
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √v̂
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times the learning rate

    elementwise: ClassVar[bool] = True
    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """First and second moment, zero: float32, or float64 for float64 weights."""
        dtype = torch.promote_types(w.dtype, torch.float32)
        return {"m": torch.zeros_like(w, dtype=dtype), "v": torch.zeros_like(w, dtype=dtype)}

    def update(self, w: Tensor, g: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `w` and `state`; `h` holds lr, weight_decay and t (from 1) as 0-d float64."""
        m, v, t = state["m"], state["v"], h["t"]
        b1, b2 = self.betas
        g = g.to(m.dtype).clamp(-LARGEST, LARGEST)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = v.sqrt() / (1 - b2 ** t).sqrt()           # √v̂
        shrinkage = h["lr"] * h["weight_decay"] * w.to(m.dtype)
        w.sub_(h["lr"] / (1 - b1 ** t) * (m / (root + self.eps)) + shrinkage)

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """The factor on `lr` for a matrix of this shape: none."""
        return 1.0
