"""Where the published scripts' eight ranks read, as their loaders did: read by read, each rank for itself.

A rank's read is B·T tokens and one more, the last target; a batch is 8·B·T tokens, and shards follow each other in
the order of their names. Record 1 shuffled and has no place here.
"""

RANKS = 8


def places_by_rank(order: str, counts: list[int], batch_tokens: int, steps: int) -> list[list[tuple[int, int]]]:
    """[step][rank] -> (shard, first token in it) of the runs whose loader is of the month `order`."""
    readers = [reads(order, counts, batch_tokens, rank) for rank in range(RANKS)]
    return [[next(reader) for reader in readers] for _ in range(steps)]


def reads(order: str, counts: list[int], batch_tokens: int, rank: int):
    """The places of one rank's training steps, without end."""
    own = rank * (batch_tokens // RANKS)
    if order == "2024-10":                       # primed with one batch, then reset: the first batch comes twice
        yield 0, own
    shard, position = 0, own
    while True:
        yield shard, position
        position += batch_tokens
        if position + batch_tokens + 1 > counts[shard]:      # its own position: higher ranks turn the page sooner
            shard, position = (shard + 1) % len(counts), own
