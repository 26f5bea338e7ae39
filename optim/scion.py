"""Scion: steps to the border of a norm ball, layer by layer (Pethick et al., arXiv:2502.07529; LIONS-EPFL/scion).

    D ← (1-α) D + α G
    W ← W + ηρ lmo(D)               unconstrained
    W ← (1-η) W + ηρ lmo(D)         constrained: W stays in the ball ‖W‖ ≤ ρ once it is there

The norm and its lmo are the layer's `geometry` (geometry.py), and every layer has one: there is no Adam beside it.

    role                    geometry   radius
    hidden matrices         spectral   50
    head, tied embedding    sign       3000
    embedding, untied       colnorm    to be swept: the example's is tied
    biases                  bias_rms   to be swept
    gains, scalars          max        small, with init_on_ball false: the paper has no geometry for them

Radii, lr and α are those of the reference's nanoGPT example. It needs no warm-up, starts every matrix on its ball,
‖W‖ = ρ, and scales activations by √2: relu² becomes (√2 relu)². Gains and scalars keep their ordinary initial value.

Deviations:
- The momentum is float32 whatever the weights are; the reference's has the weights' dtype.
- ε: see geometry.py. The norm before Newton-Schulz has none: see orthogonalise.py.
- ScionLight, which keeps D in the gradient's memory, does not exist here: with α = 1 there is no state at all.
- ScionC's decay (arXiv:2512.08217) does not exist here.
"""
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor

from optim import geometry as geometries
from optim.geometry import DIVIDED, GEOMETRIES, ORTHOGONALISED, NewtonSchulz, Norm, direction
from optim.orthogonalise import DtypeName, Preset
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class Scion(Rule):
    """For stacks of equal matrices (n, rows, cols), rows = fan out, cols = fan in; elementwise in `max` alone."""
    lr: Annotated[float, Field(ge=0)] = 3.6e-4           # learning rate η: a step's length, in radii
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1  # α, the share of the new gradient; 1: no momentum, no state
    geometry: Norm = "spectral"                          # norm of the layer
    radius: Annotated[float, Field(gt=0)] = 50.0         # ρ, the ball's radius in that norm
    constrained: bool = False                            # shrink the weight by η, which confines it to the ball
    init_on_ball: bool = True                            # start from a random matrix with ‖W‖ = ρ
    ns_coefficients: Preset = "kj5"                      # polynomials of the Newton-Schulz steps
    ns_steps: Annotated[int, Field(gt=0)] | None = None  # Newton-Schulz steps; null: the preset's own number
    ns_dtype: DtypeName = "auto"                         # of its products; auto: bfloat16 where fast
    eps: Annotated[float, Field(ge=0)] = 0.0             # ε, added to norms that divide; the reference's is 1e-8

    VARYING: ClassVar[tuple[str, ...]] = ("lr", "momentum")
    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        **{key: {"geometry": ORTHOGONALISED} for key in ("ns_coefficients", "ns_steps", "ns_dtype")},
        "eps": {"geometry": DIVIDED},
        "init_on_ball": {"geometry": tuple(name for name in GEOMETRIES if name != "max")},
    }

    @property
    def elementwise(self) -> bool:
        return self.geometry == "max"

    @property
    def takes_vectors(self) -> bool:
        return self.geometry in ("bias_rms", "frobenius")

    @property
    def confines(self) -> bool:
        return self.constrained

    @property
    def orthogonalises(self) -> bool:
        return self.geometry in ORTHOGONALISED

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """D, zero: float32, or float64 for float64 weights; nothing without momentum.

        Raises:
            ValueError: `bias_rms` is given a matrix.
        """
        if self.geometry == "bias_rms" and W.shape[-1] != 1:
            raise ValueError(f"bias_rms is a norm of vectors, not of {W.shape[-2]}×{W.shape[-1]} matrices: "
                             "put these in a group with geometry spectral, sign, colnorm, rownorm or frobenius")
        dtype = torch.promote_types(W.dtype, torch.float32)
        return {"momentum": torch.zeros_like(W, dtype=dtype)} if self.momentum < 1 else {}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        dtype = torch.promote_types(W.dtype, torch.float32)
        D = G.to(dtype)
        if self.momentum < 1:
            D = state["momentum"].mul_(1 - h["momentum"]).add_(h["momentum"] * D)
        step = self.radius * direction(D, self.geometry, self._newton_schulz(), self.eps)
        W.sub_(h["lr"] * (W.to(dtype) + step if self.constrained else step))

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """ρ s: the plain norm of a step at lr 1."""
        return self.radius * GEOMETRIES[self.geometry].scale(rows, cols)

    def step_rms(self, rows: int, cols: int) -> float:
        return self.lr_multiplier(rows, cols) * GEOMETRIES[self.geometry].rms(rows, cols)

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return h["lr"] if self.constrained else torch.zeros_like(h["lr"])

    def flops(self, rows: int, cols: int) -> float:
        return geometries.flops(self.geometry, rows, cols, self._newton_schulz()) + 6.0 * rows * cols

    def state_numbers(self, rows: int, cols: int) -> int:
        return rows * cols if self.momentum < 1 else 0

    def initial_weights(self, rows: int, cols: int, generator: Generator) -> Tensor | None:
        if not self.init_on_ball:
            return None
        return self.radius * geometries.initial_weights(self.geometry, rows, cols, generator)

    def _newton_schulz(self) -> NewtonSchulz:
        return NewtonSchulz(self.ns_coefficients, self.ns_steps, self.ns_dtype)
