"""Which keys a query sees: those of its own document, not after itself, and with a window only the nearest.

Documents come as `cu_seqlens`, the form that variable-length attention takes: int32 (k,), places among the b·t
tokens of the micro-batch in one line, 0 first, rising, and b·t at the end as often as it takes to fill k. Document
n is tokens bounds[n] to bounds[n+1]-1; equal neighbours are an empty document. Every row begins a document.

A window of N is a query and the N-1 tokens before it: q - k < N. That is FlexAttention's mask of the records from
2024-11-19 (N = 1024 there); what a record from 2025-09 on gives FlashAttention as window_size (W, 0) is N = W + 1.

Letters of the shapes: b batch, t time, k places.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sight(NamedTuple):
    """What every query of a micro-batch sees, in the form that the attention in use reads."""

    bounds: Tensor | None   # cu_seqlens; None: every row is one document
    window: int | None      # None: all that came before
    longest: int            # no document has more tokens
    mask: Tensor | None     # (b or 1, 1, t, t), 0 or -∞, to add to scores; None where no scores exist (varlen)


def first_seen(sight: Sight, b: int, t: int, device) -> Tensor:
    """(b or 1, t) float32: the place in its row of the first key that each query sees."""
    place = torch.arange(t, device=device, dtype=torch.float32)[None]       # float: a CPU compares integers slowly
    first = torch.zeros_like(place)
    if sight.bounds is not None:
        tokens = torch.arange(b * t, device=device, dtype=sight.bounds.dtype)
        document = torch.searchsorted(sight.bounds, tokens, right=True) - 1
        first = (sight.bounds[document].view(b, t) - tokens.view(b, t)[:, :1]).float()
    return first if sight.window is None else torch.maximum(first, place - (sight.window - 1))


def mask(first: Tensor, start: int, stop: int, keys: int) -> Tensor:
    """(b or 1, 1, stop-start, keys): 0 where queries start..stop-1 of a row see keys 0..keys-1, -∞ elsewhere."""
    key = torch.arange(keys, device=first.device, dtype=torch.float32)
    query = torch.arange(start, stop, device=first.device, dtype=torch.float32)[:, None]
    hidden = (key > query) | (key < first[:, start:stop, None])
    return torch.where(hidden, -torch.inf, 0.0)[:, None]


def row_bounds(b: int, t: int, device) -> Tensor:
    """The cu_seqlens of b rows that are one document each."""
    return torch.arange(0, b * t + 1, t, device=device, dtype=torch.int32)
