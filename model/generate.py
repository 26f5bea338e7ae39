"""Tokens from a model, one at a time: the keys and values of what was read are kept, not computed again.

A context holds at most `seq_len` tokens, the rows that the model was trained on. When it is full, its older half is
dropped and the newer half is read again as a context of its own (keys and values of the deeper layers hold something
of the dropped tokens, and positions begin again). So a token is drawn from the model's distribution given the last
seq_len/2 to seq_len tokens, or all where there are fewer, and no token is read more than twice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.gpt import GPT


class Context:
    """What a model has read: the keys and values (b, seq_len, h, d) of every layer, in the activations' type."""

    def __init__(self, model: GPT, rows: int = 1):
        config, like = model.config, model.embed.weight
        shape = (2, config.layers, rows, model.seq_len, config.heads, config.head_width)
        self.model, self.length = model, 0
        self.keys, self.values = torch.empty(shape, dtype=model.activation_dtype, device=like.device)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens (b, t) after what is there: the logits (b, vocab_size) of what follows the last one."""
        start, self.length = self.length, self.length + tokens.shape[1]
        if self.length > self.model.seq_len:
            raise ValueError(f"a context of {self.length} tokens, but this model has {self.model.seq_len}")
        pasts = [(keys, values, start) for keys, values in zip(self.keys, self.values)]
        return self.model.read_out(self.model.trunk(tokens, pasts=pasts, start=start)[:, -1])


def context_start(length: int, seq_len: int) -> int:
    """Where the context of the next token starts after `length` tokens: a multiple of half a row."""
    half = max(1, seq_len // 2)
    return -(-max(0, length - seq_len) // half) * half


def continuation(model: GPT, prompt: list[int], temperature: float, top_k: int | None, top_p: float | None,
                 generator: torch.Generator) -> Iterator[int]:
    """Tokens that continue `prompt` (at least one token), without end."""
    tokens, context, start = list(prompt), Context(model), 0
    while True:
        if start != context_start(len(tokens), model.seq_len):
            context.length, start = 0, context_start(len(tokens), model.seq_len)
        unread = tokens[start + context.length:]
        logits = context.read(torch.tensor([unread], device=model.embed.weight.device))[0]
        tokens.append(draw(logits.cpu(), temperature, top_k, top_p, generator))
        yield tokens[-1]


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
         generator: torch.Generator) -> int:
    """A token from softmax(logits / temperature), of the top_k likeliest, and of the fewest likeliest of these whose
    probabilities sum to top_p or more (Holtzman et al., arXiv:1904.09751). Temperature 0 is the likeliest token."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    order = logits.argsort(descending=True, stable=True)
    kept = len(order) if top_k is None else min(top_k, len(order))
    if top_p is not None:
        probabilities = logits[order[:kept]].softmax(-1)
        kept = max(1, int((probabilities.cumsum(-1) - probabilities < top_p).sum()))
    logits[order[kept:]] = -torch.inf
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
