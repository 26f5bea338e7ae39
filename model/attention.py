"""Causal self-attention.

Letters of the shapes: b batch, t time, h heads, d head width, c width of the residual stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import RMS_EPS, Linear
from model.rotary import rotate

Rotation = tuple[Tensor, Tensor] | None     # cosines and sines (t, 1, d/2); None: no rotary positions
CHUNK = 128                                 # queries whose logits with all keys are in memory at once


class Attention(nn.Module):
    """softmax(s·q kᵀ + causal mask) v per head, between the projections q, k, v and out.

    Where `max_logit` (h,) is a tensor, forward passes that record gradients raise it to each head's largest logit.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        inner = config.heads * config.head_width
        self.q = Linear(config.width, inner, config.biases)
        self.k = Linear(config.width, inner, config.biases)
        self.v = Linear(config.width, inner, config.biases)
        self.out = Linear(inner, config.width, config.biases)
        learned = config.value_residual == "learned" and layer > 0
        self.value_mix = nn.Parameter(torch.empty(1)) if learned else None
        self.register_buffer("max_logit", None, persistent=False)

    def forward(self, x: Tensor, v0: Tensor | None, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The input x (b, t, c) and the first layer's values v0 (b, t, h, d; None there)
        -> what to add to the stream (b, t, c), and this layer's own values (b, t, h, d)."""
        b, t, _ = x.shape
        q, k, v = (linear(x).view(b, t, self.config.heads, -1) for linear in (self.q, self.k, self.v))
        q, k = self.place(q, rotation), self.place(k, rotation)
        seen = self.max_logit if torch.is_grad_enabled() else None
        y = attend(q, k, self.mix(v, v0), self.config.attn_scale, self.config.attention, seen)
        return self.out(y.reshape(b, t, -1)), v

    def place(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Normalise and rotate queries or keys (b, t, h, d)."""
        if self.config.qk_norm == "before_rotary":
            x = F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)
        if rotation is not None:
            x = rotate(x, *rotation)
        if self.config.qk_norm == "after_rotary":
            x = F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)
        return x

    def mix(self, v: Tensor, v0: Tensor | None) -> Tensor:
        """Value residual, (1-λ)·v + λ·v0 (Zhou et al., arXiv:2410.17897)."""
        if v0 is None or self.config.value_residual == "none":
            return v
        return torch.lerp(v, v0, 0.5 if self.value_mix is None else self.value_mix.to(v.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, form: str, seen: Tensor | None = None) -> Tensor:
    """Causal attention of q, k, v (b, t, h, d) -> (b, t, h, d); the scale defaults to d^-½.

    `seen` (h,), where given, is raised in place to the largest logit of each head; no gradient knows of it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))        # (b, h, t, d)
    if form_on(q.device, form) == "sdpa":
        if seen is not None:
            raise_to(seen, largest_logits(q, k, scale or q.shape[-1] ** -0.5))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.mT
    # Added, not masked_fill: the backward pass of a sum needs no mask, which is a fifth of the step on a CPU.
    scores = scores + causal_mask(q.shape[2], q.device).to(q.dtype)
    if seen is not None:
        raise_to(seen, scores.detach().amax((0, 2, 3)))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(h,): the largest s·q·k that the causal mask lets q and k (b, h, t, d) see, where the scores exist nowhere.

    A second q kᵀ, half of it by causality: b·h·t·(t+CHUNK)·d operations, and b·h·CHUNK·t numbers in memory. Of a step
    of 4 layers, 128 wide, on a CPU: 5 % at t = 256, 9 % at 1024. (From the scores of the matmul form: 1 to 3 %.)
    """
    largest = []
    for first in range(0, q.shape[2], CHUNK):
        queries = q[:, :, first:first + CHUNK]
        scores = queries @ k[:, :, :first + CHUNK].mT       # no key after the chunk's last query
        scores[..., first:] += causal_mask(queries.shape[2], q.device).to(q.dtype)
        largest.append(scores.amax((0, 2, 3)))
    return torch.stack(largest).amax(0).float() * scale


@torch.no_grad()
def raise_to(seen: Tensor, values: Tensor) -> None:
    seen.copy_(torch.maximum(seen, values))


def causal_mask(t: int, device) -> Tensor:
    """(t, t): 0 where the key is not after the query, -∞ elsewhere."""
    position = torch.arange(t, device=device, dtype=torch.float32)  # float: a CPU compares integers slowly
    return torch.where(position[:, None] < position, -torch.inf, 0.0)


def form_on(device: torch.device, form: str) -> str:
    """The form of attention that `auto` stands for on this device."""
    if form != "auto":
        return form
    return "matmul" if device.type == "cpu" else "sdpa"
