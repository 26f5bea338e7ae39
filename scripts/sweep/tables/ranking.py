"""The table of a plain sweep."""
from collections.abc import Sequence

from scripts.judge import gaps, paired, spread
from scripts.sweep.file import Sweep
from scripts.sweep.tables.cells import (Cell, Table, about_seconds, finished, given, grouped, mean_cell, measured,
                                        range_cell, rank, rounded, seeds_cell, titled, value_cell, varying,
                                        without_empty_columns)


def ranking(rows: Sequence[dict], sweep: Sweep) -> Table:
    """A row a configuration, best first, mean ± standard deviation over its finished seeds.

    Differences from the baseline are of seeds that both have finished, with 95% intervals.
    """
    groups = grouped(rows)
    differing = varying([group[0] for group in groups.values()]) or ["config"]
    base = next((key for key, group in groups.items() if group[0]["baseline"]), None)
    columns, lines = measured(rows, sweep), []
    for key in sorted(groups, key=lambda key: rank(finished(groups[key]), len(groups[key]), sweep)):
        group, done = groups[key], finished(groups[key])
        line = [value_cell(given(group[0], column)) for column in differing]
        line += [seeds_cell(group, len(group)), *(mean_cell(done, column) for column in columns)]
        if base:
            line.append(Cell("baseline") if key == base else _less(done, finished(groups[base]), sweep.metric))
        states = [row["status"] for row in group if row["status"] != "finished"]
        line.append(Cell(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))))
        lines.append(line)
    metric, = titled([sweep.metric])
    notes = [f"Mean ± standard deviation over seeds, ranked by {metric}; where seeds are missing, last."]
    if base:
        notes.append("Differences are of the seeds that both have. Each 95% interval stands alone: where nothing "
                     "differs, about one in twenty excludes 0.")
    notes += about_seconds(rows)
    less = [f"{metric} less baseline's"] if base else []
    return without_empty_columns("Ranking", [*differing, "seeds", *titled(columns), *less, "not finished"], lines,
                                 notes, differing)


def _less(done: Sequence[dict], base: Sequence[dict], key: str) -> Cell:
    values, others = ({row["seed"]: row[key] for row in side if row[key] is not None} for side in (done, base))
    found = gaps(values, others)
    if not found:
        return Cell("")
    gap, test = spread(found).mean, paired(values, others)
    return Cell(rounded(gap, key, "+") + (f" ({range_cell(test.low, test.high, key, '+').text})" if test else ""), gap)
