"""Muon²: Muon on a momentum that Adam's second moment has evened out (arXiv:2604.09967).

    M ← μM + (1-μ)G,  U = (1-μ)G + μM      as in muon.py: momentum_form, nesterov
    V ← β₂V + (1-β₂)G²                     elementwise
    O = NS(U / (√V + ε))
    W ← W - ηs O - ηλW                     s: the shape's factor (scale, see muon.py)

The defaults are result #7 of modded-nanogpt's track 3 (3,325 steps, one run), where ε refers to a loss summed over
524,288 tokens; what is known of that run beside them is the formula, so that polynomials and scale are those of the
track's baseline. V starts at zero and needs no correction, for NS takes no notice of a factor. Deviations:
- An entry of G beyond ±1e18 counts as ±1e18, so that V stays finite.
- Momentum and V are float32 or better; the norm before the iteration has no ε (orthogonalise.py).
As the formula has it, for gradients far below ε the step is Muon's.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.muon import MomentumForm, Scale, Share, advance, shape_factor
from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from optim.rule import Rule

LARGEST = 1e18                                           # its square is a float32 number


@dataclass(frozen=True, config={"extra": "forbid"})
class Muon2(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 0.1              # learning rate η: a step's spectral norm, × scale
    momentum: Share = 0.95                               # μ, the share of the momentum kept each step
    momentum_form: MomentumForm = "ema"                  # ema: μM + (1-μ)G; sgd: μM + G
    nesterov: bool = True                                # look ahead: mix the gradient in once more
    beta2: Share = 0.95                                  # β₂, decay of the second moment V
    eps: Annotated[float, Field(gt=0)] = 1e-10           # ε, added to √V
    ns_coefficients: Preset = "exact12"                  # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    scale: Scale = "spectral"                            # shape factor s on lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0125  # λ, times the learning rate

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum and second moment, zero: float32, or float64 for float64 weights."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"momentum": torch.zeros_like(W, dtype=dtype), "v": torch.zeros_like(W, dtype=dtype)}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; `h` holds VARYING as 0-d float64 tensors."""
        M, V, shape = state["momentum"], state["v"], W.shape[-2:]
        G = G.to(M.dtype).clamp(-LARGEST, LARGEST)
        U = advance(M, G, h["momentum"], self.momentum_form, self.nesterov)
        V.mul_(self.beta2).addcmul_(G, G, value=1 - self.beta2)
        dtype = iteration_dtype(self.ns_dtype, W.device)
        O = orthogonalise(U / (V.sqrt() + self.eps), self.ns_coefficients, self.ns_steps, dtype).to(M.dtype)
        W.sub_(h["lr"] * self.lr_multiplier(*shape) * O + self.shrinkage(h, *shape) * W.to(M.dtype))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return shape_factor(self.scale, rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        """s times the RMS of an entry of an orthogonal matrix."""
        return self.lr_multiplier(rows, cols) / max(rows, cols) ** 0.5

    def flops(self, rows: int, cols: int) -> float:
        return 2 * super().flops(rows, cols) + newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps)

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols
