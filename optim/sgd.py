"""Stochastic gradient descent with momentum (Sutskever et al. 2013, in the form of torch.optim.SGD, dampening 0).

    g ← g + λ w                    "coupled" decay: the L2 penalty's gradient goes into the momentum
    b ← μ b + g
    w ← w - η (g + μ b)            with nesterov;  without:  w ← w - η b

A step is proportional to the gradient, so that η depends on how the loss is summed, and a step's size on the
gradient's: `step_rms` is for a gradient of root mean square 1. Decay takes ηλ of a weight in the update itself and,
through the momentum, ηλ/(1-μ) in all, so that it cannot be made cautious. Deviations:
- The momentum is float32 whatever the weights are; torch's has the weights' dtype.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class SGD(Rule):
    """Elementwise: `w` is any tensor, usually a whole group's parameters end to end."""
    lr: Annotated[float, Field(ge=0)] = 1e-3             # learning rate η
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # μ, the share of b kept each step; 0: no state
    nesterov: bool = False                               # look ahead: add the gradient once more
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ of the L2 penalty λ/2 ‖w‖²

    elementwise: ClassVar[bool] = True
    coupled_decay: ClassVar[bool] = True
    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def __post_init__(self):
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """b, zero: float32, or float64 for float64 weights; nothing without momentum."""
        dtype = torch.promote_types(w.dtype, torch.float32)
        return {"momentum": torch.zeros_like(w, dtype=dtype)} if self.momentum else {}

    def update(self, w: Tensor, g: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        dtype = torch.promote_types(w.dtype, torch.float32)
        g = g.to(dtype) + h["weight_decay"] * w.to(dtype)
        if self.momentum:
            b = state["momentum"].mul_(h["momentum"]).add_(g)
            g = g + h["momentum"] * b if self.nesterov else b
        w.sub_(h["lr"] * g)

    def flops(self, rows: int, cols: int) -> float:
        return 8.0 * rows * cols

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols if self.momentum else 0
