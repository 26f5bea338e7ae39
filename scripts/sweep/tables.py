"""What the rows of results.jsonl say, as tables for a terminal, a report and a paper.

    sweep     the ranking: a row a configuration
    compare   the presets at the best of their tuning, and what tuning tried
    ladder    what each change does, alone and left out of all, and the configurations' own losses
"""
from typing import NamedTuple

from scripts.judge import paired, spread
from scripts.sweep.file import Sweep

DIGITS = {"val_loss": 4, "val_loss_avg": 4, "target_step": 0, "target_train_s": 1, "train_s": 1, "tokens_per_s": 0}


class Cell(NamedTuple):
    text: str
    value: float | str | None = None    # what a column is sorted by; None sorts last


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    notes: list[str]


def tables(rows: list[dict], sweep: Sweep, costs: dict | None = None) -> list[Table]:
    """Those of a sweep of any kind.

    Args:
        rows: of results.jsonl.
        costs: of costs.json, by configuration.
    """
    return [ranking(rows, sweep)]


def markdown(table: Table) -> str:
    body = [table.columns, ["-" if all(not isinstance(row[i].value, (int, float)) for row in table.rows) else "-:"
                            for i in range(len(table.columns))], *([cell.text for cell in row] for row in table.rows)]
    lines = "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in body)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return "\n\n".join(part for part in (f"**{table.title}**", lines, notes) if part)


# ---- a plain sweep

def ranking(rows: list[dict], sweep: Sweep) -> Table:
    """A row a configuration, best first, mean ± standard deviation over its finished seeds.

    Differences from the baseline are of seeds that both have finished, with 95% intervals.
    """
    groups = {}
    for each in rows:
        groups.setdefault(each["configuration"], []).append(each)
    done = {key: _finished(group) for key, group in groups.items()}
    varying = _varying([group[0] for group in groups.values()])
    base = next((key for key, group in groups.items() if group[0]["baseline"]), None)
    measured = _measured(rows, sweep)
    lines = []
    for key in sorted(groups, key=lambda key: _rank(done[key], len(groups[key]), sweep)):
        line = [_value(groups[key][0], column) for column in varying]
        line += [Cell(f"{len(done[key])} of {len(groups[key])}", len(done[key]))]
        line += [_mean(done[key], column) for column in measured]
        if base:
            line.append(Cell("baseline") if key == base else _less(done[key], done[base], sweep.metric))
        lines.append([*line, _unfinished(groups[key])])
    less = [f"{sweep.metric} less baseline's"] if base else []
    notes = [f"Mean ± standard deviation over seeds, ranked by {sweep.metric}."]
    if base:
        notes.append("Differences are of the seeds that both have, each with its own 95% interval.")
    return _used("Ranking", [*varying, "seeds", *measured, *less, "not finished"], lines, notes, varying)


def _used(title: str, columns: list[str], lines: list[list[Cell]], notes: list[str], kept=()) -> Table:
    """Without the columns that no row has anything in."""
    used = [i for i, column in enumerate(columns) if column in kept or any(line[i].text for line in lines)]
    return Table(title, tuple(columns[i] for i in used), [[line[i] for i in used] for line in lines], notes)


def _finished(group: list[dict]) -> list[dict]:
    return [each for each in group if each["status"] == "finished"]


def _unfinished(group: list[dict]) -> Cell:
    states = [each["status"] for each in group if each["status"] != "finished"]
    return Cell(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), ", ".join(states) or None)


def _varying(firsts: list[dict]) -> list[str]:
    """`config`, and the keys that differ between configurations."""
    keys = ["config", *dict.fromkeys(key for each in firsts for key in each["parameters"])]
    return [key for key in keys if len({_value(each, key) for each in firsts}) > 1] or keys[:1]


def _value(each: dict, key: str) -> Cell:
    value = each["base"] if key == "config" else each["parameters"].get(key, "")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(str(value), value if number else str(value))


def _measured(rows: list[dict], sweep: Sweep) -> list[str]:
    keys = ("val_loss", "val_loss_avg", "target_step", "target_train_s", "train_s", "tokens_per_s")
    return sorted((key for key in keys if any(each[key] is not None for each in rows)), key=lambda k: k != sweep.metric)


def _rank(done: list[dict], planned: int, sweep: Sweep) -> tuple:
    """Those of which every seed has the metric first: the mean of a few seeds is no rank."""
    values = [each[sweep.metric] for each in done if each[sweep.metric] is not None]
    mean = spread(values).mean if values else 0.0
    return not values, len(values) < planned, -mean if sweep.maximize else mean


def _mean(done: list[dict], key: str) -> Cell:
    values = [each[key] for each in done if each[key] is not None]
    if not values:
        return Cell("")
    found, digits = spread(values), DIGITS[key]
    said = f"{found.mean:,.{digits}f}" + ("" if found.sd is None else f" ± {found.sd:,.{digits}f}")
    return Cell(said if len(values) == len(done) else f"{said} ({len(values)} of {len(done)})", found.mean)


def _less(done: list[dict], base: list[dict], key: str) -> Cell:
    values, others = ({each["seed"]: each[key] for each in side if each[key] is not None} for side in (done, base))
    both = sorted(values.keys() & others.keys())
    if not both:
        return Cell("")
    digits, found = DIGITS[key], paired(values, others)
    if found is None:
        mean = spread([values[seed] - others[seed] for seed in both]).mean
        return Cell(f"{mean:+,.{digits}f}", mean)
    return Cell(f"{found.mean:+,.{digits}f} ({found.low:+,.{digits}f} to {found.high:+,.{digits}f})", found.mean)
