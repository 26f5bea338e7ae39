"""How smooth the loss is along a run, layer by layer: the constants of Gluon's analysis (arXiv:2505.13416).

    L̂ = ‖g₂ - g₁‖* / ‖ΔX‖             g₁, g₂: a layer's gradients of one batch before and after the weights moved by ΔX
    L̂ ≈ L⁰ + L¹ ‖g₁‖*,  L⁰, L¹ ≥ 0    least squares over several such pairs

The batch must be the same both times: between batches gradients differ by noise, which has nothing to do with ΔX.
One pair cannot tell L⁰ from L¹; pairs at different gradient norms can.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from optim.geometry import NewtonSchulz, Norm, dual_norm, norm


def smoothness(g1: Tensor, g2: Tensor, moved: Tensor, geometry: Norm, ns: NewtonSchulz = NewtonSchulz()) -> Tensor:
    """L̂ of every matrix of a stack (n, rows, cols): (n,); infinite or nan where nothing moved."""
    dtype = torch.promote_types(g1.dtype, torch.float32)
    return dual_norm(g2.to(dtype) - g1.to(dtype), geometry, ns) / norm(moved, geometry)


def fit(ratios: Sequence[float] | Tensor, norms: Sequence[float] | Tensor) -> tuple[float, float]:
    """(L⁰, L¹) from several L̂ and the ‖g₁‖* that go with them; pairs that are not finite do not count.

    (nan, nan) unless two of the norms differ: no line goes through one point alone.
    """
    y, x = (torch.as_tensor(values, dtype=torch.float64) for values in (ratios, norms))
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    if x.unique().numel() < 2:
        return float("nan"), float("nan")
    away = x - x.mean()
    slope = (away @ y) / (away @ away)
    best = (y.mean() - slope * x.mean(), slope)
    if min(best) < 0:                                    # the problem is convex: the best is then on an edge
        edges = ((y.mean().clamp(min=0), 0 * slope), (0 * slope, ((x @ y) / (x @ x)).clamp(min=0)))
        best = min(edges, key=lambda edge: (edge[0] + edge[1] * x - y).square().sum())
    return float(best[0]), float(best[1])
