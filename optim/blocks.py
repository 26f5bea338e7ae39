"""Logical blocks: what of a stored weight is one matrix (fan out × fan in) to an update rule.

    stored                         one logical matrix
    any weight (out, in)           the whole
    q, k, v (heads·d, c)           the whole, or with `blocks: heads` a head (d, c), with head_pairs two (2d, c)
    attn_out (c, heads·d)          the whole, or a head's columns (c, d), or a pair's (c, 2d)
    embedding (tokens, c)          its transpose (c, tokens), for the input is one-hot; a tied one counts as a head
    vector (c,), scalar ()         one column (c, 1), for the few rules that take vectors

Geometry and learning-rate scale follow the logical matrix, never the storage. Orthogonalising whole q, k and v is
what the speedrun does; a head pair at a time is its record 80.
"""
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Blocks = Literal["whole", "heads", "head_pairs"]


class Cut(NamedTuple):
    """How every matrix of a stored stack (k, ...) becomes logical ones."""
    rows: int = 1                               # blocks along the rows
    cols: int = 1                               # blocks along the columns
    transposed: bool = False

    @property
    def blocks(self) -> int:
        """How many logical matrices one stored weight holds."""
        return self.rows * self.cols

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(fan out, fan in) of one block of a weight of this shape."""
        rows, cols = (*stored, 1, 1)[:2]
        return (cols, rows) if self.transposed else (rows // self.rows, cols // self.cols)

    def take(self, stack: Tensor) -> Tensor:
        """The blocks (k·blocks, r, c) of a stack (k, rows, cols): a view, but a copy of one cut along columns."""
        k, rows, cols = (*stack.shape, 1, 1)[:3]                     # vectors and scalars are one column
        if self.cols > 1:
            width = cols // self.cols
            return stack.view(k, rows, self.cols, width).transpose(1, 2).reshape(k * self.cols, rows, width)
        stack = stack.view(k, rows, cols)
        return stack.mT if self.transposed else stack.view(k * self.rows, rows // self.rows, cols)

    def put(self, stack: Tensor, blocks: Tensor) -> None:
        """Write into the stack what was done to a copy that `take` made."""
        if self.cols > 1:
            k, rows, cols = stack.shape
            stack.copy_(blocks.view(k, self.cols, rows, cols // self.cols).transpose(1, 2).reshape(k, rows, cols))


def cut_for(blocks: Blocks, role: str, heads: int, tied: bool) -> Cut:
    """How a weight of this role is cut.

    Raises:
        ValueError: the role has no heads, or their number is odd for pairs.
    """
    if blocks != "whole":
        if role not in ("q", "k", "v", "attn_out"):
            raise ValueError(f"blocks: {blocks} is for q, k, v and attn_out, not for {role}")
        if blocks == "head_pairs" and heads % 2:
            raise ValueError(f"blocks: head_pairs needs an even number of heads, not {heads}")
        count = heads if blocks == "heads" else heads // 2
        return Cut(cols=count) if role == "attn_out" else Cut(rows=count)
    return Cut(transposed=role == "pos" or (role == "embed" and not tied))


@torch.no_grad()
def rescale_heads(parameter: Tensor, factors: Tensor) -> None:
    """Multiply each head's rows of a weight (heads·d, cols) or bias (heads·d,) by its factor (heads,), in place.

    A factor of 1 leaves the rows as they are, to the bit. Rounded once where the parameter is bfloat16.
    """
    parameter.view(len(factors), -1).mul_(factors[:, None])
