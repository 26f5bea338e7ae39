"""Causal self-attention.

Letters of the shapes: b batch, t time, h heads, d head width, c width of the residual stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import Sight, first_seen, mask, row_bounds
from model.layers import RMS_EPS, Linear
from model.rotary import rotate

Rotation = tuple[Tensor, Tensor] | None     # cosines and sines (t, 1, d/2); None: no rotary positions
Past = tuple[Tensor, Tensor, int] | None    # a layer's keys and values (b, capacity, h, d), and how many are written
CHUNK = 128                                 # queries whose logits with all keys are in memory at once


class Attention(nn.Module):
    """softmax(s·q kᵀ + mask) v per head, between the projections q, k, v and out; the mask is causal or a Sight's.

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

    def forward(self, x: Tensor, v0: Tensor | None, rotation: Rotation, sight: Sight | None = None,
                past: Past = None) -> tuple[Tensor, Tensor]:
        """The input x (b, t, c) and the first layer's values v0 (b, t, h, d; None there)
        -> what to add to the stream (b, t, c), and this layer's own values (b, t, h, d).

        With `past` the keys and values of x are written behind those already there, and x sees them all."""
        b, t, _ = x.shape
        q, k, v = (linear(x).view(b, t, self.config.heads, -1) for linear in (self.q, self.k, self.v))
        q, k = self.place(q, rotation), self.place(k, rotation)
        if past is None:
            seen = self.max_logit if torch.is_grad_enabled() else None
            y = attend(q, k, self.mix(v, v0), self.config.attn_scale, self.config.attention, seen, sight)
        else:
            keys, values, written = past
            keys[:, written:written + t], values[:, written:written + t] = k, self.mix(v, v0)
            y = attend_past(q, keys[:, :written + t], values[:, :written + t], self.config.attn_scale,
                            self.config.window)
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


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, form: str, seen: Tensor | None = None,
           sight: Sight | None = None) -> Tensor:
    """Causal attention of q, k, v (b, t, h, d) -> (b, t, h, d), of what `sight` shows where given; the scale
    defaults to d^-½.

    `seen` (h,), where given, is raised in place to the largest logit of each head; no gradient knows of it.
    """
    form = "varlen" if sight is not None and sight.mask is None else form_on(q.device, form)
    if seen is not None and form != "matmul":
        largest = largest_logits(q.transpose(1, 2), k.transpose(1, 2), scale or q.shape[-1] ** -0.5, sight)
        raise_to(seen, largest)
    if form == "varlen":
        return attend_varlen(q, k, v, scale, sight)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))        # (b, h, t, d)
    if form == "sdpa":
        shown = {"is_causal": True} if sight is None else {"attn_mask": sight.mask}
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **shown).transpose(1, 2)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.mT
    # Added, not masked_fill: the backward pass of a sum needs no mask, which is a fifth of the step on a CPU.
    scores = scores + (causal_mask(q.shape[2], q.device).to(q.dtype) if sight is None else sight.mask)
    if seen is not None:
        raise_to(seen, scores.detach().amax((0, 2, 3)))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, sight: Sight) -> Tensor:
    """The same over documents with FlashAttention, which reads no mask and computes nothing that it would hide.

    q, k, v (b, t, h, d) in half precision on a GPU. FlashAttention's window (W, 0) is a query and W before it.
    """
    from torch.nn.attention.varlen import varlen_attn       # takes a second, and loads Triton where there is one
    b, t = q.shape[:2]
    bounds = row_bounds(b, t, q.device) if sight.bounds is None else sight.bounds
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))          # (b·t, h, d)
    window = (-1, 0) if sight.window is None else (sight.window - 1, 0)
    y = varlen_attn(q, k, v, bounds, bounds, sight.longest, sight.longest, scale=scale, window_size=window)
    return y.unflatten(0, (b, t))


def attend_past(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attention of the last n positions q (b, n, h, d) to all m so far, k and v (b, m, h, d) -> (b, n, h, d)."""
    n, m = q.shape[1], k.shape[1]
    first = 0 if window is None else max(0, m - n - (window - 1))       # no query sees a key before it
    q, k, v = q.transpose(1, 2), k[:, first:].transpose(1, 2), v[:, first:].transpose(1, 2)
    back = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(first, m, device=q.device)
    shown = (back >= 0) & (back < (window or m))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=scale).transpose(1, 2)


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, scale: float, sight: Sight | None = None) -> Tensor:
    """(h,): the largest s·q·k that the causal mask lets q and k (b, h, t, d) see, where the scores exist nowhere;
    with `sight`, of the pairs that it shows.

    A second q kᵀ, half of it by causality: b·h·t·(t+CHUNK)·d operations, and b·h·CHUNK·t numbers in memory. Of a step
    of 4 layers, 128 wide, on a CPU: 5 % at t = 256, 9 % at 1024. (From the scores of the matmul form: 1 to 3 %.)
    """
    largest, (b, t) = [], (q.shape[0], q.shape[2])
    start = None if sight is None else first_seen(sight, b, t, q.device)
    for first in range(0, t, CHUNK):
        queries = q[:, :, first:first + CHUNK]
        scores = queries @ k[:, :, :first + CHUNK].mT       # no key after the chunk's last query
        if start is None:
            scores[..., first:] += causal_mask(queries.shape[2], q.device).to(q.dtype)
        else:
            scores += mask(start, first, first + queries.shape[2], scores.shape[-1]).to(q.dtype)
        largest.append(scores.amax((0, 2, 3)))
    return torch.stack(largest).amax(0).float() * scale


@torch.no_grad()
def raise_to(seen: Tensor, values: Tensor) -> None:
    seen.copy_(torch.maximum(seen, values))


def causal_mask(t: int, device) -> Tensor:
    """(t, t): 0 where the key is not after the query, -∞ elsewhere."""
    position = torch.arange(t, device=device, dtype=torch.float32)  # float: a CPU compares integers slowly
    return torch.where(position[:, None] < position, -torch.inf, 0.0)


def form_on(device: torch.device, form: str, varlen: bool = False) -> str:
    """The form of attention that `auto` stands for on this device; `varlen` where that suits and has a use."""
    if form != "auto":
        return form
    return "matmul" if device.type == "cpu" else "varlen" if varlen else "sdpa"


def flash_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether torch's variable-length FlashAttention does: a GPU from Ampere on, half precision, heads up to 256."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (device.type == "cuda" and half and head_width % 8 == 0 and head_width <= 256
            and torch.cuda.get_device_capability(device) >= (8, 0))


# To torch.compile a constant. What torch.compiler.assume_constant_result does, which loads the compiler: a second.
flash_takes._dynamo_marked_constant = True
