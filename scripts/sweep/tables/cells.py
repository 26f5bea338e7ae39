"""What a table is made of: cells that know what they are sorted by, means over seeds, Markdown."""
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scripts.judge import spread
from scripts.sweep.file import Sweep
from scripts.sweep.parameter import in_yaml, is_number

# Results that a mean is taken of -> digits after the point.
DIGITS = {"val_loss": 4, "val_loss_avg": 4, "target_step": 0, "target_train_s": 1, "train_s": 1, "tokens_per_s": 0}
TITLES = {"target_step": "steps to target", "target_train_s": "seconds to target", "train_s": "train s",
          "tokens_per_s": "tokens/s"}   # of columns that are not called by their key


class Cell(NamedTuple):
    text: str
    value: float | str | None = None    # what its column is sorted by; None comes last


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    notes: list[str]


def without_empty_columns(title: str, columns: Sequence[str], rows: list[list[Cell]], notes: list[str],
                          kept: Sequence[str] = ()) -> Table:
    """Without the columns that no row has anything in, but for `kept`."""
    used = [i for i, column in enumerate(columns) if column in kept or any(row[i].text for row in rows)]
    return Table(title, tuple(columns[i] for i in used), [[row[i] for i in used] for row in rows], notes)


def markdown(table: Table) -> str:
    """The title in bold, the table with numbers to the right, the notes as a list."""
    values = [[row[i].value for row in table.rows] for i in range(len(table.columns))]
    marks = ["-:" if any(isinstance(value, (int, float)) for value in column) else "-" for column in values]
    lines = [table.columns, marks, *([cell.text for cell in row] for row in table.rows)]
    body = "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines)
    return "\n\n".join(part for part in (f"**{table.title}**", body, "\n".join(f"- {note}" for note in table.notes))
                       if part)


# ---- the rows of results.jsonl

def grouped(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """By configuration."""
    groups = {}
    for row in rows:
        groups.setdefault(row["configuration"], []).append(row)
    return groups


def finished(group: Sequence[dict]) -> list[dict]:
    return [row for row in group if row["status"] == "finished"]


def measured(rows: Sequence[dict], sweep: Sweep) -> list[str]:
    """The results that any row has, the sweep's metric first."""
    keys = [key for key in DIGITS if any(row[key] is not None for row in rows)]
    return sorted(keys, key=lambda key: key != sweep.metric)


def rank(done: Sequence[dict], planned: int, sweep: Sweep) -> tuple:
    """Those of which every seed has the metric first: the mean of a few seeds is no rank."""
    values = [row[sweep.metric] for row in done if row[sweep.metric] is not None]
    mean = spread(values).mean if values else 0.0
    return not values, len(values) < planned, -mean if sweep.maximize else mean


def unfinished(group: Sequence[dict], planned: Iterable[int] = ()) -> str:
    """`seed 3 crashed, seeds 4 and 5 waiting`: what has not finished, or has no trial."""
    states = {}
    for row in group:
        if row["status"] != "finished":
            states.setdefault(row["status"], []).append(row["seed"])
    if absent := [seed for seed in planned if seed not in {row["seed"] for row in group}]:
        states["not planned"] = absent
    return ", ".join(f"seed{'s' * (len(seeds) > 1)} {listed(seeds)} {state}" for state, seeds in states.items())


def varying(firsts: Sequence[dict]) -> list[str]:
    """`config`, and the parameters, that differ between configurations, of which these are the first rows."""
    keys = ["config", *dict.fromkeys(key for row in firsts for key in row["parameters"])]
    return [key for key in keys if len({in_yaml(given(row, key)) for row in firsts}) > 1]


def given(row: dict, key: str) -> Any:
    """What a trial has of one of `varying`; "" for nothing."""
    return row["base"] if key == "config" else row["parameters"].get(key, "")


def mixed_data(rows: Iterable[dict]) -> list[str]:
    """A note for each kind of data that is not the same in all trials; rows of old have none."""
    notes = []
    for key in ("train_data", "val_data"):
        if len(found := Counter(row[key] for row in rows if row.get(key))) > 1:
            said = ", ".join(f"{data} ({count} trial{'s' * (count > 1)})" for data, count in found.most_common())
            notes.append(f"Warning: mixed {key.replace('_', ' ')}, so losses do not compare: {said}.")
    return notes


def about_seconds(rows: Iterable[dict]) -> list[str]:
    return ["Seconds compare only where trials were packed alike and the machine did nothing else; losses and steps "
            "always do."] if any(row["train_s"] is not None for row in rows) else []


def listed(words: Iterable[Any]) -> str:
    """`a, b and c`"""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


# ---- cells and columns

def titled(keys: Iterable[str]) -> list[str]:
    """The columns of results."""
    return [TITLES.get(key, key) for key in keys]


def value_cell(said: Any) -> Cell:
    return Cell(in_yaml(said), said if is_number(said) else in_yaml(said))


def seeds_cell(group: Sequence[dict], planned: int) -> Cell:
    return Cell(f"{len(finished(group))} of {planned}", len(finished(group)))


def mean_cell(done: Sequence[dict], key: str) -> Cell:
    """`1.2345 ± 0.0012`, and of how many seeds where not of all."""
    values = [row[key] for row in done if row[key] is not None]
    if not values:
        return Cell("")
    found = spread(values)
    said = rounded(found.mean, key) + ("" if found.sd is None else f" ± {rounded(found.sd, key)}")
    return Cell(said if len(values) == len(done) else f"{said} ({len(values)} of {len(done)})", found.mean)


def interval_cell(done: Sequence[dict], key: str) -> Cell:
    """The 95% interval of the mean, where there is a spread."""
    values = [row[key] for row in done if row[key] is not None]
    found = spread(values) if values else None
    return range_cell(found.low, found.high, key) if found and found.sd is not None else Cell("")


def range_cell(low: float, high: float, key: str, sign: str = "") -> Cell:
    return Cell(f"{rounded(low, key, sign)} to {rounded(high, key, sign)}", low)


def rounded(x: float, key: str, sign: str = "") -> str:
    return f"{x:{sign},.{DIGITS[key]}f}"
