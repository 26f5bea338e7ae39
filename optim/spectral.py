"""Spectral descent: steepest by the spectral norm, without state (Carlson, Cevher, Carin 2015; track 3, result #22).

    W ← W(1 - ηλ) - ηs NS(G)        s: the shape's factor (scale, see muon.py)

Muon with momentum 0, less its buffer: result #22 of modded-nanogpt's track 3 (lr .03, weight_decay .015, the defaults
here, orthogonalised as in the track's baseline; 8,225 steps to Muon's 3,250), and, with its own scale, SpectralDescent
in facebookresearch/optimizers. Deviations from the references:
- The norm before the iteration has no ε, and its rounding is float32's (orthogonalise.py).
"""
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.muon import Scale, shape_factor
from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class SpectralDescent(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 0.03             # learning rate η: a step's spectral norm, × scale
    ns_coefficients: Preset = "exact12"                  # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    scale: Scale = "spectral"                            # shape factor s on lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.015  # λ, times the learning rate

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols); `h` holds lr and weight_decay as 0-d float64 tensors."""
        wide, shape = torch.promote_types(W.dtype, torch.float32), W.shape[-2:]
        O = orthogonalise(G, self.ns_coefficients, self.ns_steps, iteration_dtype(self.ns_dtype, W.device)).to(wide)
        W.sub_(h["lr"] * self.lr_multiplier(*shape) * O + self.shrinkage(h, *shape) * W.to(wide))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return shape_factor(self.scale, rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        """s times the RMS of an entry of an orthogonal matrix."""
        return self.lr_multiplier(rows, cols) / max(rows, cols) ** 0.5

    def flops(self, rows: int, cols: int) -> float:
        return super().flops(rows, cols) + newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps)
