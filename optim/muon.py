"""Muon: orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    M ← μM + (1-μ)G            momentum_form "ema";     "sgd":  M ← μM + G
    U = (1-μ)G + μM            with nesterov ("sgd":  U = G + μM); without:  U = M
    O = NS(U)                  ns_coefficients, ns_steps, ns_dtype: see orthogonalise.py
    W ← W - ηs O - δ mask ⊙ W  s: the shape's factor (scale); δ: ηλ, η²λ or ηsλ (decay);
                               mask: 1, or with `cautious` 1 only where O ⊙ W ≥ 0

Five things on which references differ are five independent switches. What to set for each reference:

    KellerJordan/Muon                  the defaults
    torch.optim.Muon                   lr .001, weight_decay .1
    Moonlight (arXiv:2502.16982)       momentum_form sgd, scale rms, weight_decay .1, lr as AdamW's
    speedrun record 4 (2024-10-10)     momentum_form sgd, scale rms1, lr .00036
    speedrun records 8-10              momentum_form sgd; from record 9 on momentum scheduled from .85 to .95
    track 3 baseline (2026-06)         ns_coefficients exact12, lr .025, weight_decay .05
    cautious decay (arXiv:2510.12402)  cautious true; speedrun from record 43 on: decay lr2, weight_decay 1.2

Both momentum forms point the same way while μ is constant, and differ while a schedule moves it. Deviations:
- Momentum is float32 whatever the weights are; the references' has the weights' dtype.
- The norm before the iteration has no ε, and its rounding is float32's (orthogonalise.py).
- G is only read; KellerJordan/Muon writes U into it.
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.orthogonalise import Preset, iteration_dtype, orthogonalise


@dataclass(frozen=True, config={"extra": "forbid"})
class Muon:
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 0.02             # learning rate η: a step's spectral norm, × scale
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95  # μ, the share of the momentum kept each step
    momentum_form: Literal["ema", "sgd"] = "ema"         # ema: μM + (1-μ)G; sgd: μM + G
    nesterov: bool = True                                # look ahead: mix the gradient in once more
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of its products; auto: bfloat16 where fast
    scale: Literal["spectral", "unclamped", "rms", "rms1", "none"] = "spectral"  # shape factor s on lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times what `decay` says
    decay: Literal["lr", "lr2", "scaled"] = "lr"         # weight decay per step: ηλ, η²λ or ηsλ
    cautious: bool = False                               # decay only where the update shrinks the weight too

    elementwise: ClassVar[bool] = False
    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, zero: float32, or float64 for float64 weights."""
        return {"momentum": torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; `h` holds VARYING as 0-d float64 tensors."""
        M = state["momentum"]
        U = self._momentum(M, G.to(M.dtype), h["momentum"])
        dtype = iteration_dtype(self.ns_dtype, W.device)
        O = orthogonalise(U, self.ns_coefficients, self.ns_steps, dtype).to(M.dtype)
        s = self.lr_multiplier(*W.shape[-2:])
        per_step = {"lr": h["lr"], "lr2": h["lr"].square(), "scaled": h["lr"] * s}[self.decay]
        shrinkage = per_step * h["weight_decay"] * W.to(M.dtype)
        if self.cautious:
            shrinkage = shrinkage * (O * W >= 0)
        W.sub_(h["lr"] * s * O + shrinkage)

    def _momentum(self, M: Tensor, G: Tensor, mu: Tensor) -> Tensor:
        """Advance M in place; what to orthogonalise (M itself without nesterov)."""
        fresh = G * (1 - mu) if self.momentum_form == "ema" else G
        M.mul_(mu).add_(fresh)
        return fresh + mu * M if self.nesterov else M

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """s, the factor on `lr` for matrices of this shape.

        spectral    √max(1, r/c)     KellerJordan/Muon; torch's "original"; speedrun from record 8 on
        unclamped   √(r/c)           Bernstein's spectral norm; torch's "spectral_unclamped", dion
        rms         0.2 √max(r, c)   RMS of a step ≈ 0.2, as AdamW's; Moonlight, torch's "match_rms_adamw"
        rms1        √max(r, c)       RMS of a step ≈ 1; speedrun records 4-7
        """
        return {"spectral": max(1.0, rows / cols) ** 0.5, "unclamped": (rows / cols) ** 0.5,
                "rms": 0.2 * max(rows, cols) ** 0.5, "rms1": max(rows, cols) ** 0.5, "none": 1.0}[self.scale]
