"""The orders in which the published speedrun scripts read their shards, as arithmetic.

Eight ranks read slices of B = batch_tokens / 8 tokens, and one more as last target; G = 8 B is the batch.
On a shard of N tokens rank r reads at r B, r B + G, r B + 2 G, ... and leaves the rest of the shard unread:

    to 2024-11   after a read the position grows by G; where position + G + 1 > N the next shard begins
    2024-12      after a read the position grows by G; where position + G + 1 >= N the next shard begins
    2025-01      one position for all ranks; where position + G + 1 >= N before a read the next shard begins

2024-11 writes its test as position + G >= N, which over the integers is the first line. To 2024-12 every rank
tests its own position, so that the higher ranks may read a shard once less and the ranks drift apart: of 10^8
tokens at G = 524,288, ranks 0 to 5 make 190 reads and ranks 6 and 7 make 189. After the last shard comes
the first. The scripts of 2024-10 read a batch, rewind, and read again: steps 0 and 1 have the same batch.

Source: the programs in the logs of KellerJordan/modded-nanogpt, records of 2024-06-06 to 2025-01-04.
"""
import math

import numpy as np

RANKS = 8
ORDERS = ("2024-06", "2024-10", "2024-11", "2024-12", "2025-01")


def reads_per_shard(order: str, counts: np.ndarray, batch_tokens: int, rank: int) -> np.ndarray:
    """How many times rank `rank` of eight reads from each shard of `counts` tokens, int64 (shards,)."""
    start = 0 if order == "2025-01" else rank * (batch_tokens // RANKS)   # the position that is tested
    spare = 1 if order in ("2024-12", "2025-01") else 0                   # >= instead of >
    return np.maximum(1, (counts - 1 - spare - start) // batch_tokens)    # a fresh shard is always read once


def smallest_shard(order: str, batch_tokens: int) -> int:
    """The fewest tokens a shard may have, so that every rank can make its first read of it."""
    return batch_tokens + (2 if order == "2025-01" else 1)


def locate(order: str, counts: np.ndarray, batch_tokens: int, rank: int, step: int) -> tuple[int, int]:
    """The shard, and the position in it, where rank `rank` of eight reads at `step` (counted from 0)."""
    read = max(0, step - 1) if order == "2024-10" else step
    ends = np.cumsum(reads_per_shard(order, counts, batch_tokens, rank))
    read %= int(ends[-1])
    shard = int(np.searchsorted(ends, read, side="right"))
    reads_before = int(ends[shard - 1]) if shard else 0
    return shard, (read - reads_before) * batch_tokens + rank * (batch_tokens // RANKS)


def steps_before_repeat(order: str, counts: np.ndarray, batch_tokens: int) -> int:
    """The number of steps until some rank begins again with the first shard."""
    reads = min(int(reads_per_shard(order, counts, batch_tokens, rank).sum()) for rank in range(RANKS))
    return reads + 1 if order == "2024-10" else reads


def spread_stride(rows: int) -> int:
    """The step between places that follow each other in order `spread`: about rows / golden ratio, coprime to rows.

    Multiples of the golden ratio's fraction fill a circle as evenly as any (Weyl 1916), and a stride that is coprime to
    the number of rows meets each of them once before the first comes again.
    """
    stride = max(1, round(rows * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, rows) != 1:
        stride += 1
    return stride
