"""Rotary positions, half-split (Su et al., arXiv:2104.09864): dimensions i and i + d/2 make a pair.

    y1 =  x1·cos θ + x2·sin θ            θ = position · frequency
    y2 = -x1·sin θ + x2·cos θ

`full` turns every pair, frequencies base^(-2i/d). `half` spreads d/4 frequencies from 1 down to 1/base, both
included, and leaves the other d/4 pairs still, so that half of a head sees content without position.
"""

import torch
from torch import Tensor


def tables(positions: int, head_dim: int, base: float, form: str, device) -> tuple[Tensor, Tensor]:
    """The cosines and sines of all angles, each (t, 1, d/2) float32."""
    if form == "full":
        frequencies = base ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    else:
        moving = (1 / base) ** torch.linspace(0, 1, head_dim // 4, device=device)
        frequencies = torch.cat([moving, torch.zeros_like(moving)])
    angles = torch.arange(positions, device=device)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x (b, t, h, d) by the angles of their positions; computed in float32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)
