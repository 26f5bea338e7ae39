"""Batches as pure functions of the step: the same tokens at any number of ranks, micro-batch size or restart.

A global batch is batch_tokens / seq_len rows; inputs and targets are int64 (rows, seq_len), and the targets
are the inputs shifted by one token, so the last target of a row is the first input of the next, where that follows.
A rank asks for its own rows (`row_range`) and only these are read. A row may begin and end inside a document.

`order: continuous` takes the shards in sorted order as one stream and loses nothing between them. `order: spread`
cuts that stream into rows and takes them from places spread evenly over it, each row once: for small batches, of
which a continuous one would lie within a single document. `order: documents` begins every row with a document
(data/packing.py). The others are the orders of the published scripts (data/orders.py): a batch is what their 8 ranks
read, in rank order.

With `documents: separate` a micro-batch has a third part, the boundaries of documents in it (data/documents.py).
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from data import orders
from data.documents import END_OF_TEXT, Boundaries, count_in_rows, index
from data.packing import Packing
from data.shards import ShardError, Tokens, find_shards

Batch = tuple[np.ndarray, ...]      # inputs, targets, and with documents: separate the boundaries, int32 (k,)
Order = Literal["continuous", "spread", "documents", "2024-06", "2024-10", "2024-11", "2024-12", "2025-01"]


@dataclass(frozen=True, config={"extra": "forbid"})
class DataConfig:
    train: str                  # shards to train on, a pattern with * and ?, taken in sorted order
    val: str                    # shards to validate on, a pattern with * and ?
    order: Order = "continuous"  # one stream; its rows spread; rows that begin with documents; a month's on 8 ranks
    repeat: bool = False        # whether training may begin again with the first shard after the last
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # what made the tokens: GPT-2's vocabulary, or bytes
    documents: Literal["ignore", "separate"] = "ignore"  # separate: no token attends to another document, in val too
    max_document_tokens: Annotated[int, Field(ge=2)] | None = None  # cut longer documents to this; null = no cut

    READ_WHEN: ClassVar = {"max_document_tokens": {"order": ("documents",)}}

    @property
    def end_of_text(self) -> int | None:
        """The id with which documents begin; None where no key asks for documents."""
        asked = self.documents == "separate" or self.order == "documents"
        return END_OF_TEXT[self.tokenizer] if asked else None


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """(first, last): rows first..last-1 of `rows` are `rank`'s, contiguous; counts differ by one at most."""
    return rows * rank // world, rows * (rank + 1) // world


def tokens_needed(steps: int, batch_tokens: int) -> int:
    """The tokens of one stream that `steps` batches take: the last target is one more."""
    return steps * batch_tokens + 1


def steps_in(order: Order, counts: np.ndarray, batch_tokens: int, seq_len: int) -> int:
    """The number of steps that shards of `counts` tokens last for in `order`, before they begin again.

    In order "documents" that depends on the documents; without them this is a guess, half of the tokens.
    """
    if order == "documents":
        return (int(counts.sum()) - 1) // 2 // batch_tokens
    if order in ("continuous", "spread"):
        return (int(counts.sum()) - 1) // seq_len * seq_len // batch_tokens
    return orders.steps_before_repeat(order, counts, batch_tokens)


class _Rows:
    """What training and validation share: tokens, the length of rows, and the boundaries of documents if asked for."""

    def __init__(self, tokens: Tokens, seq_len: int):
        self.tokens, self.seq_len = tokens, seq_len
        self.boundaries: Boundaries | None = None

    @property
    def longest_document(self) -> int | None:
        """No document in a row has more tokens; None where documents are not separate."""
        return None if self.boundaries is None else self.boundaries.longest

    def dummy(self, rows: int) -> Batch:
        """A micro-batch of the shapes that one of `rows` rows has, of no text: each row is a document."""
        inputs = np.arange(rows * self.seq_len).reshape(rows, self.seq_len) % self.tokens.vocab_size
        begins = np.arange(rows) * self.seq_len
        bounds = () if self.boundaries is None else (self.boundaries.padded(begins, rows),)
        return inputs, inputs.copy(), *bounds

    def _index(self, end_of_text: int, key: str) -> list[np.ndarray]:
        """The first tokens of the documents in every shard."""
        starts = index(self.tokens.paths, end_of_text)
        if not any(found.size for found in starts):
            raise ShardError(f"{key}: no document begins in {self.tokens.paths[0]} or any other of its shards (no "
                             f"token is {end_of_text}); correct data.tokenizer, or use data.documents: ignore and "
                             "another order")
        return starts

    def _separate(self, end_of_text: int, starts: list[np.ndarray], rows: np.ndarray | None) -> None:
        """Give batches boundaries. rows: where in the stream the run's rows begin, int64 (n,); None: not known."""
        total, firsts = self.tokens.total, self.tokens.ends - self.tokens.counts
        whole = np.concatenate([found + first for found, first in zip(starts, firsts)])
        longest = int(np.diff(whole, append=whole[0] + total).max())
        per_row = None if rows is None else count_in_rows(whole, total, rows, self.seq_len)
        self.boundaries = Boundaries(end_of_text, self.seq_len, per_row, min(longest, self.seq_len))

    def _stream(self, places: np.ndarray) -> list[np.ndarray]:
        """Rows that begin at these tokens of the stream, uint16 (seq_len + 1,) each."""
        for place in places.tolist():                # of a cold page cache: all at once instead of one by one
            self.tokens.expect(place, self.seq_len + 1)
        return [self.tokens.stream(place, self.seq_len + 1) for place in places.tolist()]

    def _batch(self, rows: list[np.ndarray]) -> Batch:
        spans = np.stack(rows) if rows else np.empty((0, self.seq_len + 1), np.uint16)
        inputs, targets = spans[:, :-1].astype(np.int64), spans[:, 1:].astype(np.int64)
        return (inputs, targets) if self.boundaries is None else (inputs, targets, self.boundaries.of(inputs))


class TrainLoader(_Rows):
    """The training batches. ShardError, one line, for shards that do not suit the run.

    end_of_text: the id with which documents begin, for order "documents" and for `separate`, which gives batches
    their boundaries. run: the batch_tokens of every step, from which these get a length that suffices; None: not known.
    """

    def __init__(self, paths: list[Path], order: Order, seq_len: int, vocab_size: int, repeat: bool = False,
                 end_of_text: int | None = None, separate: bool = False, max_document: int | None = None,
                 run: Sequence[int] | None = None):
        super().__init__(Tokens(paths, vocab_size), seq_len)
        self.order, self.repeat, self.packing = order, repeat, None
        starts = self._index(end_of_text, "data.train") if separate or order == "documents" else []
        if order == "documents":
            self.packing = Packing(self.tokens, starts, seq_len, max_document)
            if not self.packing.rows:
                raise ShardError(f"data.order documents: no shard has documents that fill a row of seq_len {seq_len:,} "
                                 "and a target; lower seq_len, or take order: continuous")
        if separate and self.packing is not None:
            longest = min(self.packing.longest, seq_len)
            self.boundaries = Boundaries(end_of_text, seq_len, self.packing.documents_in_rows(), longest)
        elif separate:
            self._separate(end_of_text, starts, None if run is None else self._all_places(run))

    def rows(self, step: int, position: int, batch_tokens: int, first_row: int, last_row: int) -> Batch:
        """Rows first_row..last_row-1 of the global batch of `step`.

        step counts from 0; position is the sum of batch_tokens over the steps before. The published orders
        have one batch size, so that for them position says nothing new, and begin again after the last shard:
        `check_enough` is what refuses a run as long as that.
        """
        self._check_batch(batch_tokens)
        assert 0 <= first_row <= last_row <= batch_tokens // self.seq_len, (first_row, last_row)
        if self.packing is not None:
            first = position // self.seq_len
            if not self.repeat and first + batch_tokens // self.seq_len > self.packing.rows:
                raise ShardError(f"the batch at row {first:,} needs {batch_tokens // self.seq_len:,} rows, but the "
                                 f"documents fill {self.packing.rows:,}; add shards or set data.repeat=true")
            return self._batch([self.packing.row((first + row) % self.packing.rows)
                                for row in range(first_row, last_row)])
        if self.order == "continuous" and not self.repeat and position + batch_tokens >= self.tokens.total:
            raise ShardError(f"the batch at token {position:,} needs {batch_tokens + 1:,} tokens, but the "
                             f"shards end at {self.tokens.total:,}; add some or set data.repeat=true")
        return self._batch(self._stream(self._places(step, position, batch_tokens)[first_row:last_row]))

    def steps_before_repeat(self, batch_tokens: int) -> int:
        """The number of steps that can be taken before the shards begin again."""
        self._check_batch(batch_tokens)
        if self.packing is not None:
            return self.packing.rows * self.seq_len // batch_tokens
        return steps_in(self.order, self.tokens.counts, batch_tokens, self.seq_len)

    def check_enough(self, steps: int, batch_tokens: int) -> None:
        """Refuse a run that is longer than its data, before it starts; data.repeat allows it."""
        enough_for = self.steps_before_repeat(batch_tokens)
        if steps > enough_for and not self.repeat:
            used = "" if self.packing is None else f" ({self.packing.rows * self.seq_len:,} in rows of documents)"
            raise ShardError(f"{steps:,} steps of {batch_tokens:,} tokens need "
                             f"{tokens_needed(steps, batch_tokens):,} tokens, but the "
                             f"{len(self.tokens.paths)} training shards hold {self.tokens.total:,}{used}, enough "
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

    def _all_places(self, run: Sequence[int]) -> np.ndarray:
        """Where in the stream every row of the run begins, step after step."""
        parts, position = [np.empty(0, np.int64)], 0
        for step, batch_tokens in enumerate(run):
            self._check_batch(batch_tokens)
            parts.append(self._places(step, position, batch_tokens))
            position += batch_tokens
        return np.concatenate(parts)

    def _places(self, step: int, position: int, batch_tokens: int) -> np.ndarray:
        """Where in the stream the rows of a batch begin, int64 (batch_tokens / seq_len,)."""
        rows = np.arange(batch_tokens // self.seq_len)
        if self.order == "continuous":
            return position + rows * self.seq_len
        if self.order == "spread":
            there = (self.tokens.total - 1) // self.seq_len
            return (position // self.seq_len + rows) * orders.spread_stride(there) % there * self.seq_len
        if position != step * batch_tokens:
            raise ShardError(f"data.order {self.order}: step {step} begins at token {position:,} instead "
                             f"of {step} x {batch_tokens:,}; for other batches use order: continuous")
        firsts, places = self.tokens.ends - self.tokens.counts, []
        for rank, of_rank in enumerate(np.split(rows * self.seq_len, orders.RANKS)):
            shard, start = orders.locate(self.order, self.tokens.counts, batch_tokens, rank, step)
            places.append(firsts[shard] + start + of_rank - of_rank[0])
        return np.concatenate(places)


class ValLoader(_Rows):
    """The first `val_tokens` validation tokens (and one, the last target) in rows of `seq_len`.

    end_of_text: the id with which documents begin, which gives batches their boundaries; None: no boundaries.
    """

    def __init__(self, paths: list[Path], val_tokens: int, seq_len: int, vocab_size: int,
                 end_of_text: int | None = None):
        if val_tokens < 1 or val_tokens % seq_len:
            raise ShardError(f"val_tokens {val_tokens:,} must be a multiple of seq_len {seq_len:,}")
        super().__init__(Tokens(paths, vocab_size), seq_len)
        self.row_count = val_tokens // seq_len
        if self.tokens.total < val_tokens + 1:
            raise ShardError(f"val_tokens {val_tokens:,} needs {val_tokens + 1:,} tokens, but the "
                             f"{len(paths)} validation shards hold {self.tokens.total:,}; lower val_tokens "
                             "or add shards")
        if end_of_text is not None:
            self._separate(end_of_text, self._index(end_of_text, "data.val"), np.arange(self.row_count) * seq_len)

    def rows(self, first_row: int, last_row: int) -> Batch:
        """Rows first_row..last_row-1 of the `row_count` rows."""
        assert 0 <= first_row <= last_row <= self.row_count, (first_row, last_row)
        return self._batch(self._stream(np.arange(first_row, last_row) * self.seq_len))


def open_data(config: DataConfig, seq_len: int, val_tokens: int, vocab_size: int,
              run: Sequence[int] | None = None) -> tuple[TrainLoader, ValLoader]:
    """Both loaders of a run, whose steps have `run` tokens each; a file that is in both patterns is an error."""
    train, val = find_shards(config.train, "data.train"), find_shards(config.val, "data.val")
    if shared := {path.resolve() for path in train} & {path.resolve() for path in val}:
        raise ShardError(f"{min(shared)} is matched by data.train ({config.train}) and by data.val "
                         f"({config.val}); validate on files that are not trained on")
    separate = config.documents == "separate"
    return (TrainLoader(train, config.order, seq_len, vocab_size, config.repeat, config.end_of_text, separate,
                        config.max_document_tokens, run),
            ValLoader(val, val_tokens, seq_len, vocab_size, config.end_of_text if separate else None))
