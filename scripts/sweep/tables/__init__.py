"""What the rows of results.jsonl say, as tables for a terminal, a report and a paper.

    sweep     the ranking: a row a configuration
    compare   the presets at the best of their tuning, and what tuning tried
    ladder    what all changes do, what each does added alone and left out of all, and what every configuration reached
"""
from collections.abc import Sequence

from scripts.sweep.file import Sweep
from scripts.sweep.tables.cells import Cell, Table, markdown, mixed_data
from scripts.sweep.tables.compare import compare
from scripts.sweep.tables.ladder import ladder
from scripts.sweep.tables.ranking import ranking

__all__ = ["Cell", "Table", "markdown", "tables"]


def tables(rows: Sequence[dict], sweep: Sweep, costs: dict | None = None) -> list[Table]:
    """Those of a sweep of any kind.

    Args:
        rows: of results.jsonl.
        costs: of costs.json, by configuration; a comparison shows them.
    """
    if sweep.kind == "compare":
        found = compare(rows, sweep, costs)
    else:
        found = ladder(rows, sweep) if sweep.kind == "ladder" else [ranking(rows, sweep)]
    first, *others = found
    return [first._replace(notes=[*mixed_data(rows), *first.notes]), *others]
