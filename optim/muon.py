"""Muon: orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    M ← μM + (1-μ)G            momentum_form "ema";     "sgd":  M ← μM + G
    U = (1-μ)G + μM            with nesterov ("sgd":  U = G + μM); without:  U = M
    O = NS(U)                  ns_coefficients, ns_steps, ns_dtype, ns_form: see orthogonalise.py
    W ← W - ηs O - δW          s: the shape's factor (scale); δ: ηλ, η²λ or ηsλ (decay)

Five things on which references differ are five independent switches: momentum_form, nesterov, ns_coefficients, scale
and decay. `variant` sets them, with lr and weight_decay, as one of the references has them: kj (the defaults),
moonlight, torch, dion, record4, record8, track3 (variants.py, with sources). The momentum warm-up of the speedrun
from record 9 on, .85 to .95, is a schedule and in no variant.

Both momentum forms point the same way while μ is constant, and differ while a schedule moves it. Deviations:
- Momentum is float32 whatever the weights are; the references' has the weights' dtype.
- The norm before the iteration has no ε, and its rounding is float32's (orthogonalise.py).
- G is only read; KellerJordan/Muon writes U into it.

Where Triton's kernels are in use the same step is made by `fused_update`: a few passes over memory (kernels/passes.py).
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim import backend
from optim.orthogonalise import (COEFFICIENTS, DtypeName, Form, Preset, iterate, iteration_dtype, newton_schulz_flops,
                                 orthogonalise, refuse_bfloat16_gram)
from optim.rule import Rule
from optim.variants import VARIANTS, with_variant

Share = Annotated[float, Field(ge=0, lt=1)]
MomentumForm = Literal["ema", "sgd"]
Scale = Literal["spectral", "unclamped", "rms", "rms1", "none"]
Decay = Literal["lr", "lr2", "scaled"]
Variant = Literal["kj", "moonlight", "torch", "dion", "record4", "record8", "track3"]


@dataclass(frozen=True, config={"extra": "forbid"})
class Muon(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 0.02             # learning rate η: a step's spectral norm, × scale
    momentum: Share = 0.95                               # μ, the share of the momentum kept each step
    momentum_form: MomentumForm = "ema"                  # ema: μM + (1-μ)G; sgd: μM + G
    nesterov: bool = True                                # look ahead: mix the gradient in once more
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    ns_form: Form = "standard"                           # gram: on the small Gram matrix, from 2:1 on, in float16
    scale: Scale = "spectral"                            # shape factor s on lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times what `decay` says
    decay: Decay = "lr"                                  # weight decay per step: ηλ, η²λ or ηsλ
    variant: Variant | None = None                       # a publication's settings, below what is written here

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    VARIANTS: ClassVar[dict[str, dict]] = VARIANTS["muon"]

    @model_validator(mode="before")
    @classmethod
    def _take_variant(cls, given):
        return with_variant(cls, given)

    def __post_init__(self):
        refuse_bfloat16_gram(self.ns_form, self.ns_dtype)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, zero: float32, or float64 for float64 weights."""
        return {"momentum": torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; `h` holds VARYING as 0-d float64 tensors."""
        M, shape = state["momentum"], W.shape[-2:]
        U = advance(M, G.to(M.dtype), h["momentum"], self.momentum_form, self.nesterov)
        dtype = iteration_dtype(self.ns_dtype, W.device, self.ns_form)
        O = orthogonalise(U, self.ns_coefficients, self.ns_steps, dtype, self.ns_form).to(M.dtype)
        W.sub_(h["lr"] * self.lr_multiplier(*shape) * O + self.shrinkage(h, *shape) * W.to(M.dtype))

    def fuses(self, W: Tensor) -> bool:
        dtype = iteration_dtype(self.ns_dtype, W.device, self.ns_form)
        return backend.takes(W.device, dtype) and W.dtype != torch.float64 and W[:1].is_contiguous()

    def fused_update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor], clip: Tensor | None,
                     keep: Tensor) -> None:
        from optim.kernels.passes import momentum_and_norm, step_and_decay
        shape, safety = W.shape[-2:], COEFFICIENTS[self.ns_coefficients].safety
        dtype = iteration_dtype(self.ns_dtype, W.device, self.ns_form)
        X = momentum_and_norm(G, state["momentum"], h["momentum"], self.momentum_form == "ema", self.nesterov, safety,
                              dtype, clip, keep)
        O = iterate(X, self.ns_coefficients, self.ns_steps, self.ns_form)
        step_and_decay(W, O, h["lr"], self.lr_multiplier(*shape), self.shrinkage(h, *shape), keep)

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return shape_factor(self.scale, rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        """s times the RMS of an entry of an orthogonal matrix."""
        return self.lr_multiplier(rows, cols) / max(rows, cols) ** 0.5

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return decay_rate(self.decay, h["lr"], self.lr_multiplier(rows, cols)) * h["weight_decay"]

    def flops(self, rows: int, cols: int) -> float:
        steps = newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps, self.ns_form)
        return super().flops(rows, cols) + steps

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols


# ---- what other rules with orthogonalised steps share

def advance(M: Tensor, G: Tensor, mu: Tensor, form: MomentumForm, nesterov: bool) -> Tensor:
    """Advance the momentum M in place; what to make the step from (M itself without nesterov)."""
    fresh = G * (1 - mu) if form == "ema" else G
    M.mul_(mu).add_(fresh)
    return fresh + mu * M if nesterov else M


def shape_factor(scale: Scale, rows: int, cols: int) -> float:
    """s, the factor on `lr` for matrices of this shape.

    spectral    √max(1, r/c)     KellerJordan/Muon; torch's "original"; speedrun from record 8 on
    unclamped   √(r/c)           Bernstein's spectral norm; torch's "spectral_unclamped", dion
    rms         0.2 √max(r, c)   RMS of a step ≈ 0.2, as AdamW's; Moonlight, torch's "match_rms_adamw"
    rms1        √max(r, c)       RMS of a step ≈ 1; speedrun records 4-7
    """
    return {"spectral": max(1.0, rows / cols) ** 0.5, "unclamped": (rows / cols) ** 0.5,
            "rms": 0.2 * max(rows, cols) ** 0.5, "rms1": max(rows, cols) ** 0.5, "none": 1.0}[scale]


def decay_rate(decay: Decay, lr: Tensor, s: float) -> Tensor:
    """What weight decay is multiplied by in one step: η, η² or ηs."""
    return {"lr": lr, "lr2": lr.square(), "scaled": lr * s}[decay]
