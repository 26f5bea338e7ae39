"""MuonClip: Muon, and attention logits held near a bound by scaling weights (Kimi K2, arXiv:2507.20534, Algorithm 1).

    M ← μM + G
    O = NS(M) · .2 √max(m, n)                            for W (m×n); ns_*: see orthogonalise.py
    W ← W - η (O + λW)
    then, for every head h of an attention with queries and keys in this rule's care (QK-clip):
    γ = min(1, τ/S)                                      S: the head's largest logit s·q·k in the step's forward passes
    W_q^h ← √γ W_q^h,   W_k^h ← √γ W_k^h                 so the same input gives γ times the logits: at most τ

The update is here, and so are the factors √γ and their use on one parameter. What needs the model or all ranks, the
logits (model/attention.py), their maximum over ranks, which rows belong to which head, is the driver's business.
S is from before the update and the weights from after it, so a logit may pass τ by what one step adds.

With QK-norm, logits do not depend on the size of weights, and clipping them does nothing but shrink weights: use
this rule on models without. Deviations:
- Biases of queries and keys are scaled too, since the logits would not shrink by γ otherwise; K2 has none.
- A head whose largest logit is not finite is left alone: nothing is written from such a step anyway.
- Momentum is float32 whatever the weights are. It is not scaled by γ, as in the paper.
- What the paper does for multi-head latent attention, with its key shared among heads, is not here.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class MuonClip(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in."""
    lr: Annotated[float, Field(ge=0)] = 2e-4             # learning rate η: a step's RMS is .2η
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95  # μ, the share of the momentum kept each step
    weight_decay: Annotated[float, Field(ge=0)] = 0.1    # λ, times the learning rate
    tau: Annotated[float, Field(gt=0)] = 100.0           # τ, the bound on attention logits
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    clips_heads: ClassVar[bool] = True

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Momentum, zero: float32, or float64 for float64 weights."""
        return {"momentum": torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` (n, rows, cols) and `state`; clipping comes after it, by the driver."""
        M = state["momentum"]
        M.mul_(h["momentum"]).add_(G.to(M.dtype))
        dtype = iteration_dtype(self.ns_dtype, W.device)
        O = orthogonalise(M, self.ns_coefficients, self.ns_steps, dtype).to(M.dtype)
        W.sub_(h["lr"] * (self.lr_multiplier(*W.shape[-2:]) * O + h["weight_decay"] * W.to(M.dtype)))

    def clip_factors(self, max_logit: Tensor) -> Tensor:
        """√γ of each head, from its largest logit (heads,); 1 for a head that was not seen, whose S is -∞."""
        factors = (self.tau / max_logit.clamp(min=self.tau)).sqrt()      # τ/τ is 1 to the bit
        return torch.where(max_logit.isfinite(), factors, 1.0)

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """.2 √max(rows, cols), which makes the RMS of a step .2η, as AdamW's about is (arXiv:2502.16982)."""
        return 0.2 * max(rows, cols) ** 0.5

    def step_rms(self, rows: int, cols: int) -> float:
        return 0.2                                       # an orthogonal matrix has RMS 1/√max(rows, cols)

    def flops(self, rows: int, cols: int) -> float:
        return super().flops(rows, cols) + newton_schulz_flops(rows, cols, self.ns_coefficients, self.ns_steps)

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols
