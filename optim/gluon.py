"""Gluon: every layer steps to the border of a ball of its own around the weight (Riabinin et al., arXiv:2505.13416).

    M ← βM + (1-β)G
    W ← argmin over ‖X - W‖ ≤ t of ⟨M, X⟩  =  W + t lmo(M)         the norm: the layer's `geometry` (geometry.py)
    t = η                                                           or, with `adaptive`,
    t = η ‖M‖* / (L⁰ + L¹‖M‖*)

Gluon is a framework for analysis and has no official code: no optimizer that is to be beaten, but the common form of
several. At β, t and geometry alike these are equal to machine precision:

    Muon without Nesterov, scale unclamped (spectral)        geometry spectral (spectral_clamped), t = Muon's lr
    unconstrained Scion                                      the same geometry, t = its lr × radius, β = 1 - its α
    normalised SGD with momentum, a layer at a time          geometry frobenius
    signSGD, Signum                                          geometry max

The adaptive radius is the paper's best one under ‖∇f(X) - ∇f(Y)‖* ≤ (L⁰ + L¹‖∇f(X)‖*) ‖X - Y‖, layer by layer, with M
for the gradient; η is then a factor on it, to be set to 1. On NanoGPT the paper measured L⁰ ≈ 0, L¹ ≈ 70 for hidden
matrices (spectral) and L¹ ≈ 1.3 for the embedding and head (sign): t ≈ 1/L¹ is then a constant, .014 and .77, near
the .018 and 1.08 of Scion's example. It fitted them to a finished run; smoothness.py measures them in yours. For its
stochastic theorem β = 1 - t^(-1/2) and η t^(-3/4) at update t: `schedule_theory`, on top of the run's schedule.

There is no weight decay in the paper, and none here. Deviations from the mathematics: ‖M‖* is ⟨M, -lmo(M)⟩, which is
as exact as Newton-Schulz is where that gives the lmo (kj5 is off by up to a third, exact12 by next to nothing).
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from optim import geometry as geometries
from optim.geometry import ALL, DIVIDED, GEOMETRIES, ORTHOGONALISED, NewtonSchulz, Norm, direction
from optim.orthogonalise import DtypeName, Preset
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class Gluon(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in; elementwise in `max` alone."""
    lr: Annotated[float, Field(ge=0)] = 0.018            # η: the radius t in the layer's norm; a factor if adaptive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # β, the share of M kept each step; 0: no state
    geometry: Norm = "spectral"                          # norm of the layer
    adaptive: bool = False                               # radius from the momentum's dual norm, by l0 and l1
    l0: Annotated[float, Field(ge=0)] = 0.0              # L⁰, smoothness at a gradient of zero
    l1: Annotated[float, Field(ge=0)] = 70.0             # L¹, growth of smoothness with the gradient's norm
    schedule_theory: bool = False                        # β and the factor on lr of the stochastic theorem
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    eps: Annotated[float, Field(ge=0)] = 0.0             # ε, added to norms that divide

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "momentum")
    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        **{key: {"adaptive": (True,)} for key in ("l0", "l1")},
        "momentum": {"schedule_theory": (False,)},
        **{key: {"geometry": ORTHOGONALISED} for key in ("ns_coefficients", "ns_steps", "ns_dtype")},
        "eps": {"geometry": DIVIDED},
    }

    def __post_init__(self):
        if self.adaptive and not self.l0 and not self.l1:
            raise ValueError("an adaptive radius needs l0 or l1 above 0")

    @property
    def elementwise(self) -> bool:
        return self.geometry == "max" and not self.adaptive              # a radius needs the whole of a layer

    @property
    def takes_vectors(self) -> bool:
        return self.geometry in ("bias_rms", "frobenius", "max")

    @property
    def _remembers(self) -> bool:
        return self.momentum > 0 or self.schedule_theory

    @property
    def orthogonalises(self) -> bool:
        return self.geometry in ORTHOGONALISED

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """M, zero: float32, or float64 for float64 weights; nothing without momentum.

        Raises:
            ValueError: `bias_rms` is given a matrix.
        """
        if self.geometry == "bias_rms" and W.shape[-1] != 1:
            raise ValueError(f"bias_rms is a norm of vectors, not of {W.shape[-2]}×{W.shape[-1]} matrices: "
                             "put these in a group with geometry spectral, sign, colnorm, rownorm or frobenius")
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"momentum": torch.zeros_like(W, dtype=dtype)} if self._remembers else {}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        beta, radius = h["momentum"], h["lr"]
        if self.schedule_theory:
            beta, radius = 1 - h["t"] ** -0.5, radius * h["t"] ** -0.75
        M = G.to(torch.promote_types(W.dtype, torch.float32))
        if self._remembers:
            M = state["momentum"].mul_(beta).add_((1 - beta) * M)
        D = direction(M, self.geometry, self._newton_schulz(), self.eps)
        if self.adaptive:
            D = self._smooth_radius((M * D).sum(ALL, keepdim=True)) * D
        W.sub_(radius * D)

    def _smooth_radius(self, dual: Tensor) -> Tensor:
        """‖M‖* / (L⁰ + L¹‖M‖*), which is 0 for M = 0; written so that an infinite sum does no harm."""
        return 1 / (self.l0 / dual.clamp(min=torch.finfo(dual.dtype).tiny) + self.l1)

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """s: the plain norm of a step of radius 1."""
        return GEOMETRIES[self.geometry].scale(rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        """At the adaptive radius of a large gradient, 1/L¹."""
        radius = 1 / self.l1 if self.adaptive and self.l1 else 1.0
        return radius * self.lr_multiplier(rows, cols) * GEOMETRIES[self.geometry].rms(rows, cols)

    def flops(self, rows: int, cols: int) -> float:
        return geometries.flops(self.geometry, rows, cols, self._newton_schulz()) + 8.0 * rows * cols

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols if self._remembers else 0

    def _newton_schulz(self) -> NewtonSchulz:
        return NewtonSchulz(self.ns_coefficients, self.ns_steps, self.ns_dtype)
