"""The table of a plain sweep."""
from collections.abc import Sequence

from scripts.judge import gaps, paired, spread
from scripts.sweep.file import Sweep
from scripts.sweep.tables.cells import Cell, Table, between, finished, grouped, made, mean, measured, number, rank, \
    seeds, value


def ranking(rows: Sequence[dict], sweep: Sweep) -> Table:
    """A row a configuration, best first, mean ± standard deviation over its finished seeds.

    Differences from the baseline are of seeds that both have finished, with 95% intervals.
    """
    groups = grouped(rows)
    varying = _varying([group[0] for group in groups.values()])
    base = next((key for key, group in groups.items() if group[0]["baseline"]), None)
    columns, lines = measured(rows, sweep), []
    for key in sorted(groups, key=lambda key: rank(finished(groups[key]), len(groups[key]), sweep)):
        group, done = groups[key], finished(groups[key])
        line = [value(_said(group[0], column)) for column in varying]
        line += [seeds(group, len(group)), *(mean(done, column) for column in columns)]
        if base:
            line.append(Cell("baseline") if key == base else _less(done, finished(groups[base]), sweep.metric))
        states = [row["status"] for row in group if row["status"] != "finished"]
        line.append(Cell(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))))
        lines.append(line)
    notes = [f"Mean ± standard deviation over seeds, ranked by {sweep.metric}; where seeds are missing, last."]
    if base:
        notes.append("Differences are of the seeds that both have. Each has a 95% interval of its own: of twenty that "
                     "hold no difference one is expected to show one.")
    less = [f"{sweep.metric} less baseline's"] if base else []
    return made("Ranking", [*varying, "seeds", *columns, *less, "not finished"], lines, notes, varying)


def _varying(firsts: Sequence[dict]) -> list[str]:
    """`config`, and the keys that differ between configurations."""
    keys = ["config", *dict.fromkeys(key for row in firsts for key in row["parameters"])]
    return [key for key in keys if len({str(_said(row, key)) for row in firsts}) > 1] or keys[:1]


def _said(row: dict, key: str):
    return row["base"] if key == "config" else row["parameters"].get(key, "")


def _less(done: Sequence[dict], base: Sequence[dict], key: str) -> Cell:
    values, others = ({row["seed"]: row[key] for row in side if row[key] is not None} for side in (done, base))
    found = gaps(values, others)
    if not found:
        return Cell("")
    gap, test = spread(found).mean, paired(values, others)
    return Cell(number(gap, key, "+") + (f" ({between(test.low, test.high, key, '+').text})" if test else ""), gap)
