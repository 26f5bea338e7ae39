"""NorMuon: orthogonalised momentum with every neuron's step made as long as the others' (arXiv:2510.05491).

    M ← μM + (1-μ)G,  U = (1-μ)G + μM,  O = NS(U)       as in muon.py, with the same switches
    v ← β₂v + (1-β₂) mean(O²)                           a number a row, or a column: `statistic`
    Ô = O / √max(v, ε)
    W ← W - ηs ‖O‖_F Ô/‖Ô‖_F - δW                       or √min(m, n) instead of ‖O‖_F: `restore`

v starts at zero and needs no correction, for a factor on all of it cancels in Ô/‖Ô‖. With scale rms, √min(m, n) makes
the paper's step of RMS 0.2:  η 0.2 √(mn) Ô/‖Ô‖_F. `variant` names the settings of publications: paper, record41,
track3 (variants.py). The authors' code (zichongli5/NorMuon) is `statistic: rows` with the other defaults.
From record 43 on the speedrun adds cautious decay of η²sλ, λ 1.2: that is `lr2` where s is 1; record 78 has β₂ .9.
Deviations:
- ε keeps v from being too small, as in the speedrun; the paper adds its ε to √v. It only matters where v ≤ ε.
- v is that of O; track 3's result #10 takes it of sO, to the same step unless v ≤ ε.
- A zero O makes no step; in the paper's formula it is 0/0, as it was in microsoft/dion until its #24.
- Momentum and v are float32 or better, and so is all after the orthogonalisation.
"""
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.muon import Decay, MomentumForm, Scale, Share, advance, decay_rate, shape_factor
from optim.orthogonalise import (DtypeName, Form, Preset, iteration_dtype, newton_schulz_flops, orthogonalise,
                                 refuse_bfloat16_gram)
from optim.rule import Rule
from optim.variants import VARIANTS, with_variant

Variant = Literal["paper", "record41", "track3"]


@dataclass(frozen=True, config={"extra": "forbid"})
class NorMuon(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 0.02             # learning rate η: a step's RMS singular value, × scale
    momentum: Share = 0.95                               # μ, the share of the momentum kept each step
    momentum_form: MomentumForm = "ema"                  # ema: μM + (1-μ)G; sgd: μM + G
    nesterov: bool = True                                # look ahead: mix the gradient in once more
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    ns_form: Form = "standard"                           # gram: on the small Gram matrix, from 2:1 on, in float16
    beta2: Share = 0.95                                  # β₂, decay of the mean squares v
    eps: Annotated[float, Field(gt=0)] = 1e-10           # ε, the least v
    statistic: Literal["rows", "longer"] = "longer"      # v has a number a row, or a line of the longer side
    restore: Literal["update", "orthogonal"] = "update"  # the step's norm: O's own, or that of an orthogonal O
    scale: Scale = "spectral"                            # shape factor s on lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times what `decay` says
    decay: Decay = "lr"                                  # weight decay per step: ηλ, η²λ or ηsλ
    variant: Variant | None = None                       # a publication's settings, below what is written here

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    VARIANTS: ClassVar[dict[str, dict]] = VARIANTS["normuon"]

    @model_validator(mode="before")
    @classmethod
    def _take_variant(cls, given):
        return with_variant(cls, given)

    def __post_init__(self):
        refuse_bfloat16_gram(self.ns_form, self.ns_dtype)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum and v (n, rows, 1) or (n, 1, cols), zero: float32, or float64 for float64 weights."""
        n, rows, cols = W.shape
        dtype = torch.promote_types(W.dtype, torch.float32)
        lines = (n, rows, 1) if self._per_row(rows, cols) else (n, 1, cols)
        return {"momentum": torch.zeros_like(W, dtype=dtype), "v": torch.zeros(lines, dtype=dtype, device=W.device)}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; `h` holds VARYING as 0-d float64 tensors."""
        M, shape = state["momentum"], W.shape[-2:]
        U = advance(M, G.to(M.dtype), h["momentum"], self.momentum_form, self.nesterov)
        dtype = iteration_dtype(self.ns_dtype, W.device, self.ns_form)
        O = orthogonalise(U, self.ns_coefficients, self.ns_steps, dtype, self.ns_form).to(M.dtype)
        D = self._equalise(O, state["v"])
        W.sub_(h["lr"] * self.lr_multiplier(*shape) * D + self.shrinkage(h, *shape) * W.to(M.dtype))

    def _equalise(self, O: Tensor, v: Tensor) -> Tensor:
        """Advance v in place; ‖O‖ Ô/‖Ô‖, or with an orthogonal matrix's norm."""
        rows, cols = O.shape[-2:]
        v.lerp_(O.square().mean(-1 if self._per_row(rows, cols) else -2, keepdim=True), 1 - self.beta2)
        O_hat = O / v.clamp(min=self.eps).sqrt()
        unit = O_hat / torch.linalg.matrix_norm(O_hat, keepdim=True).clamp(min=torch.finfo(O.dtype).tiny)
        return unit * (torch.linalg.matrix_norm(O, keepdim=True) if self.restore == "update"
                       else min(rows, cols) ** 0.5)

    def _per_row(self, rows: int, cols: int) -> bool:
        return self.statistic == "rows" or rows >= cols

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return shape_factor(self.scale, rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        """s times the RMS of an entry of an orthogonal matrix, whose norm Ô is given."""
        return self.lr_multiplier(rows, cols) / max(rows, cols) ** 0.5

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return decay_rate(self.decay, h["lr"], self.lr_multiplier(rows, cols)) * h["weight_decay"]

    def flops(self, rows: int, cols: int) -> float:
        steps = newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps, self.ns_form)
        return 2 * super().flops(rows, cols) + steps

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols + (rows if self._per_row(rows, cols) else cols)
