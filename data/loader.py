"""Batches as pure functions of the step: the same tokens at any number of ranks, micro-batch size or restart.

A global batch is batch_tokens / seq_len rows; inputs and targets are int64 (rows, seq_len), and the targets
are the inputs shifted by one token, so the last target of a batch is the first input of the next. A rank asks
for its own rows (`row_range`) and only these are read. A row may begin and end inside a document.

`order: continuous` takes the shards in sorted order as one stream and loses nothing between them. `order: spread`
cuts that stream into rows and takes them from places spread evenly over it, each row once: for small batches, of
which a continuous one would lie within a single document. The others are the orders of the published scripts
(data/orders.py): a batch is what their 8 ranks read, in rank order.
"""
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from data import orders
from data.shards import ShardError, Tokens, find_shards

Batch = tuple[np.ndarray, np.ndarray]
Order = Literal["continuous", "spread", "2024-06", "2024-10", "2024-11", "2024-12", "2025-01"]


@dataclass(frozen=True, config={"extra": "forbid"})
class DataConfig:
    train: str                  # shards to train on, a pattern with * and ?, taken in sorted order
    val: str                    # shards to validate on, a pattern with * and ?
    order: Order = "continuous"  # one stream of all shards; its rows spread out; what 8 ranks read in a month's scripts
    repeat: bool = False        # whether training may begin again with the first shard after the last
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # what made the tokens: GPT-2's vocabulary, or bytes


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """(first, last): rows first..last-1 of `rows` are `rank`'s, contiguous; counts differ by one at most."""
    return rows * rank // world, rows * (rank + 1) // world


def tokens_needed(steps: int, batch_tokens: int) -> int:
    """The tokens of one stream that `steps` batches take: the last target is one more."""
    return steps * batch_tokens + 1


def steps_in(order: Order, counts: np.ndarray, batch_tokens: int, seq_len: int) -> int:
    """The number of steps that shards of `counts` tokens last for in `order`, before they begin again."""
    if order in ("continuous", "spread"):
        return (int(counts.sum()) - 1) // seq_len * seq_len // batch_tokens
    return orders.steps_before_repeat(order, counts, batch_tokens)


def as_rows(span: np.ndarray, seq_len: int) -> Batch:
    """n * seq_len + 1 tokens as inputs and targets, int64 (n, seq_len) each."""
    return span[:-1].astype(np.int64).reshape(-1, seq_len), span[1:].astype(np.int64).reshape(-1, seq_len)


class TrainLoader:
    """The training batches. ShardError, one line, for shards that do not suit the run."""

    def __init__(self, paths: list[Path], order: Order, seq_len: int, vocab_size: int, repeat: bool = False):
        self.tokens = Tokens(paths, vocab_size)
        self.order, self.seq_len, self.repeat = order, seq_len, repeat

    def rows(self, step: int, position: int, batch_tokens: int, first_row: int, last_row: int) -> Batch:
        """Rows first_row..last_row-1 of the global batch of `step`.

        step counts from 0; position is the sum of batch_tokens over the steps before. The published orders
        have one batch size, so that for them position says nothing new, and begin again after the last shard:
        `check_enough` is what refuses a run as long as that.
        """
        self._check_batch(batch_tokens)
        assert 0 <= first_row <= last_row <= batch_tokens // self.seq_len, (first_row, last_row)
        if self.order == "spread":
            return self._spread_rows(position // self.seq_len + first_row, last_row - first_row)
        if self.order != "continuous":
            if position != step * batch_tokens:
                raise ShardError(f"data.order {self.order}: step {step} begins at token {position:,} instead "
                                 f"of {step} x {batch_tokens:,}; for other batches use order: continuous")
            return self._published_rows(step, batch_tokens, first_row, last_row)
        if not self.repeat and position + batch_tokens >= self.tokens.total:
            raise ShardError(f"the batch at token {position:,} needs {batch_tokens + 1:,} tokens, but the "
                             f"shards end at {self.tokens.total:,}; add some or set data.repeat=true")
        first, count = position + first_row * self.seq_len, (last_row - first_row) * self.seq_len + 1
        return as_rows(self.tokens.stream(first, count), self.seq_len)

    def steps_before_repeat(self, batch_tokens: int) -> int:
        """The number of steps that can be taken before the shards begin again."""
        self._check_batch(batch_tokens)
        return steps_in(self.order, self.tokens.counts, batch_tokens, self.seq_len)

    def check_enough(self, steps: int, batch_tokens: int) -> None:
        """Refuse a run that is longer than its data, before it starts; data.repeat allows it."""
        enough_for = self.steps_before_repeat(batch_tokens)
        if steps > enough_for and not self.repeat:
            raise ShardError(f"{steps:,} steps of {batch_tokens:,} tokens need "
                             f"{tokens_needed(steps, batch_tokens):,} tokens, but the "
                             f"{len(self.tokens.paths)} training shards hold {self.tokens.total:,}, enough "
                             f"for {enough_for:,} steps in data.order {self.order}; take fewer steps, "
                             "add shards, or set data.repeat=true")

    def _check_batch(self, batch_tokens: int) -> None:
        published = self.order in orders.ORDERS
        unit = orders.RANKS * self.seq_len if published else self.seq_len
        if batch_tokens < 1 or batch_tokens % unit:
            raise ShardError(f"batch_tokens {batch_tokens:,} must be a multiple of {unit:,}, in data.order "
                             f"{self.order} {'8 ranks x ' * published}seq_len {self.seq_len:,}")
        least = orders.smallest_shard(self.order, batch_tokens) if published else 1
        if self.tokens.counts.min() < least:
            shard = int(np.argmin(self.tokens.counts))
            raise ShardError(f"{self.tokens.paths[shard]}: {self.tokens.counts[shard]:,} tokens, but "
                             f"data.order {self.order} needs {least:,} in every shard at batch_tokens "
                             f"{batch_tokens:,}; remove the shard or use order: continuous")

    def _spread_rows(self, first: int, count: int) -> Batch:
        """The run's rows first..first+count-1, counted over all its steps."""
        rows = (self.tokens.total - 1) // self.seq_len
        stride = orders.spread_stride(rows)
        parts = [as_rows(np.zeros(1), self.seq_len)]     # no rows, for a rank that has none
        for row in range(first, first + count):
            place = row * stride % rows * self.seq_len
            parts.append(as_rows(self.tokens.stream(place, self.seq_len + 1), self.seq_len))
        inputs, targets = zip(*parts)
        return np.concatenate(inputs), np.concatenate(targets)

    def _published_rows(self, step: int, batch_tokens: int, first_row: int, last_row: int) -> Batch:
        rank_rows = batch_tokens // orders.RANKS // self.seq_len
        parts = [as_rows(np.zeros(1), self.seq_len)]     # no rows, for a rank that has none
        for rank in range(orders.RANKS):
            first = max(first_row - rank * rank_rows, 0)
            last = min(last_row - rank * rank_rows, rank_rows)
            if first < last:
                shard, start = orders.locate(self.order, self.tokens.counts, batch_tokens, rank, step)
                start, count = start + first * self.seq_len, (last - first) * self.seq_len + 1
                parts.append(as_rows(self.tokens.read(shard, start, count), self.seq_len))
        inputs, targets = zip(*parts)
        return np.concatenate(inputs), np.concatenate(targets)


class ValLoader:
    """The first `val_tokens` validation tokens (and one, the last target) in rows of `seq_len`."""

    def __init__(self, paths: list[Path], val_tokens: int, seq_len: int, vocab_size: int):
        if val_tokens < 1 or val_tokens % seq_len:
            raise ShardError(f"val_tokens {val_tokens:,} must be a multiple of seq_len {seq_len:,}")
        self.tokens, self.seq_len = Tokens(paths, vocab_size), seq_len
        self.row_count = val_tokens // seq_len
        if self.tokens.total < val_tokens + 1:
            raise ShardError(f"val_tokens {val_tokens:,} needs {val_tokens + 1:,} tokens, but the "
                             f"{len(paths)} validation shards hold {self.tokens.total:,}; lower val_tokens "
                             "or add shards")

    def rows(self, first_row: int, last_row: int) -> Batch:
        """Rows first_row..last_row-1 of the `row_count` rows."""
        assert 0 <= first_row <= last_row <= self.row_count, (first_row, last_row)
        first, count = first_row * self.seq_len, (last_row - first_row) * self.seq_len + 1
        return as_rows(self.tokens.stream(first, count), self.seq_len)


def open_data(config: DataConfig, seq_len: int, val_tokens: int,
              vocab_size: int) -> tuple[TrainLoader, ValLoader]:
    """Both loaders of a run; a file that is in both patterns is an error."""
    train, val = find_shards(config.train, "data.train"), find_shards(config.val, "data.val")
    if shared := {path.resolve() for path in train} & {path.resolve() for path in val}:
        raise ShardError(f"{min(shared)} is matched by data.train ({config.train}) and by data.val "
                         f"({config.val}); validate on files that are not trained on")
    return (TrainLoader(train, config.order, seq_len, vocab_size, config.repeat),
            ValLoader(val, val_tokens, seq_len, vocab_size))
