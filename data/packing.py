"""`order: documents`: rows that begin with a document.

A row is seq_len + 1 tokens (the last is a target only) of whole documents that follow each other in a shard; the one
in which it is full is cut there, and the next row begins with the next document. With `max_document_tokens` longer
documents are cut to that, and the next follows at once. This is how the records from 2025-09 on (#29) fill the row
of each of their 8 ranks; without a maximum a row is a plain span that begins at a document, as in 2025-07 (#26,
where a row that ends with its document may begin one document earlier).

What is discarded, and read in no epoch: of each row's last document what lies beyond the row; of each document what
lies beyond the maximum; a shard's tokens before its first document, which belong to the last one of the shard
before; and the documents at its end that fill no row. (The scripts leave a shard when no whole batch is left. Here
the next row comes from the next shard, so that rows do not depend on the size of a batch.)
"""
import numpy as np

from data.shards import Tokens


class Packing:
    """The rows of all shards, in order, from the index of their documents. 10 million documents take a second."""

    def __init__(self, tokens: Tokens, starts: list[np.ndarray], seq_len: int, max_document: int | None):
        self.tokens, self.seq_len, self.max_document = tokens, seq_len, max_document
        self.edges = [np.append(begin, np.uint32(count)) for begin, count in zip(starts, tokens.counts)]
        self.bounds, self.longest = [], 0       # bounds of each shard (rows, 2): a row's first document, the next row's
        for shard, begin in enumerate(starts):
            lengths = self.lengths(shard, 0, begin.size)
            ends = np.concatenate([[0], np.cumsum(lengths)])                    # of the documents, had a row no end
            after = np.searchsorted(ends, ends[:-1] + seq_len + 1).tolist()     # the document after a row from each
            first, bounds = 0, []
            while first < len(after) and after[first] <= len(after):            # beyond: the documents fill no row
                bounds.append((first, after[first]))
                first = after[first]
            self.bounds.append(np.array(bounds, np.int64).reshape(-1, 2))
            self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.ends = np.cumsum([len(bounds) for bounds in self.bounds])
        self.documents, self.rows = sum(begin.size for begin in starts), int(self.ends[-1])

    def lengths(self, shard: int, first: int, last: int) -> np.ndarray:
        """Tokens of documents first..last-1 of a shard after the cut to the maximum, int64."""
        lengths = np.diff(self.edges[shard][first:last + 1].astype(np.int64))
        return lengths if self.max_document is None else np.minimum(lengths, self.max_document)

    def row(self, number: int) -> np.ndarray:
        """Row `number` (0 <= number < rows), uint16 (seq_len + 1,)."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        first, last = self.bounds[shard][number - (int(self.ends[shard - 1]) if shard else 0)]
        if self.max_document is None:
            return self.tokens.read(shard, int(self.edges[shard][first]), self.seq_len + 1)
        row, filled = np.empty(self.seq_len + 1, np.uint16), 0
        for start, length in zip(self.edges[shard][first:last].tolist(), self.lengths(shard, first, last).tolist()):
            length = min(length, row.size - filled)
            row[filled:filled + length] = self.tokens.read(shard, start, length)
            filled += length
        return row

    def documents_in_rows(self) -> np.ndarray:
        """At most so many documents are in each row, int64 (rows,): the last may give it no more than the target."""
        return np.concatenate([bounds[:, 1] - bounds[:, 0] for bounds in self.bounds])
