"""AdaMuon: Adam's second moment on orthogonalised signs of the momentum (arXiv:2507.11005, from version 2 on).

    M ← μM + (1-μ)G,  U = (1-μ)G + μM       as in muon.py: momentum_form, nesterov
    O = NS(sign U)
    V ← μV + (1-μ)O²                        elementwise, with the same μ
    Ô = O / (√V + ε)
    W ← W - η 0.2 √(mn) Ô/‖Ô‖_F - ηλW

so a step's RMS is 0.2 η, as AdamW's is, and η is one for AdamW. V starts at zero and needs no correction, for a factor
on all of it cancels in Ô/‖Ô‖. A scheduled μ moves the decay of V with it. Version 1 of the paper, and ports made after
it, orthogonalise U itself: pytorch_optimizer 4.1.0 does, with a β₂ of its own and without `nesterov`. Deviations:
- A zero O makes no step; the formula has 0/0.
- Momentum and V are float32 or better, and so is all after the orthogonalisation.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.muon import MomentumForm, Share, advance
from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from optim.rule import Rule

RMS = 0.2                                                # of a step at learning rate 1


@dataclass(frozen=True, config={"extra": "forbid"})
class AdaMuon(Rule):
    """For stacks of equal matrices (n, rows, cols)."""
    lr: Annotated[float, Field(ge=0)] = 1e-3             # learning rate η: a step's RMS, × 0.2
    momentum: Share = 0.95                               # μ, decay of the momentum and of the second moment
    momentum_form: MomentumForm = "ema"                  # ema: μM + (1-μ)G; sgd: μM + G
    nesterov: bool = True                                # look ahead: mix the gradient in once more
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    eps: Annotated[float, Field(gt=0)] = 1e-8            # ε, added to √V
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # λ, times the learning rate

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum and second moment, zero: float32, or float64 for float64 weights."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"momentum": torch.zeros_like(W, dtype=dtype), "v": torch.zeros_like(W, dtype=dtype)}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; `h` holds VARYING as 0-d float64 tensors."""
        M, V, mu, (rows, cols) = state["momentum"], state["v"], h["momentum"], W.shape[-2:]
        U = advance(M, G.to(M.dtype), mu, self.momentum_form, self.nesterov)
        dtype = iteration_dtype(self.ns_dtype, W.device)
        O = orthogonalise(U.sign(), self.ns_coefficients, self.ns_steps, dtype).to(M.dtype)
        V.mul_(mu).add_((1 - mu) * O.square())
        O_hat = O / (V.sqrt() + self.eps)
        unit = O_hat / torch.linalg.matrix_norm(O_hat, keepdim=True).clamp(min=torch.finfo(O.dtype).tiny)
        W.sub_(h["lr"] * RMS * (rows * cols) ** 0.5 * unit + self.shrinkage(h, rows, cols) * W.to(M.dtype))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        return RMS

    def flops(self, rows: int, cols: int) -> float:
        return 2 * super().flops(rows, cols) + newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps)

    def state_numbers(self, rows: int, cols: int) -> int:
        return 2 * rows * cols
