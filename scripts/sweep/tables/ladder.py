"""The tables of a ladder: what its changes do, and what every configuration reached."""
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scripts.sweep.candidates import Comparison, comparisons, label
from scripts.sweep.file import Sweep
from scripts.sweep.parameter import in_yaml
from scripts.sweep.plan import configuration_id
from scripts.sweep.tables import effects
from scripts.sweep.tables.cells import (Cell, Table, about_seconds, finished, grouped, interval_cell, mean_cell,
                                        measured, rank, rounded, seeds_cell, titled, unfinished, value_cell,
                                        without_empty_columns)

LONGEST_VALUE = 30                      # of a key that a change sets, in the table

TITLES = {"all together": "All together: every change at once, against the baseline",
          "added alone": "Added alone: each change to the baseline, without the others",
          "left out of all": "Left out of all: every change but one, against all of them",
          "rung": "Rungs: each change on top of those before it, in their order"}


class Answer(NamedTuple):
    """Of one comparison; a rung may ask again what a change alone did: one comparison, one p."""

    asked: Comparison
    effect: effects.Effect
    p: float | None                     # by Holm, over all different comparisons

    @property
    def name(self) -> str:
        return f"without {self.asked.change}" if self.is_left_out else self.asked.change

    @property
    def is_left_out(self) -> bool:
        return self.asked.with_it != self.asked.of

    @property
    def is_detected(self) -> bool:
        return effects.is_detected(self.p)


def answers(rows: Sequence[dict], sweep: Sweep) -> tuple[list[Answer], int]:
    """(Those of a ladder, in the order of its file; the number of different comparisons.)"""
    groups, asked = grouped(rows), comparisons(sweep)
    pairs = [frozenset(map(configuration_id, (each.of, each.against))) for each in asked]
    number, found = len(set(pairs)), []
    for each in asked:
        of, against = (groups.get(configuration_id(side), []) for side in (each.of, each.against))
        names = tuple("with it" if side == each.with_it else "without it" for side in (each.of, each.against))
        found.append(effects.effect(of, against, sweep.metric, number, names))
    once = dict(zip(pairs, found))
    ps = dict(zip(once, effects.adjusted(list(once.values()))))
    return [Answer(each, effect, ps[pair]) for each, effect, pair in zip(asked, found, pairs)], number


def families(found: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Title -> its answers by the size of the effect, without one last; rungs stay in their order."""
    of = {}
    for each in found:
        of.setdefault(each.asked.family, []).append(each)
    for family, several in of.items():
        if family != "rung":
            several.sort(key=lambda each: (each.effect.difference is None, -abs(each.effect.difference or 0.0)))
    return {TITLES[family]: several for family, several in of.items()}


def ladder(rows: Sequence[dict], sweep: Sweep) -> list[Table]:
    """A table a family of comparisons, and one of the configurations."""
    groups, (found, number) = grouped(rows), answers(rows, sweep)
    made = [_family(title, several, number, sweep) for title, several in families(found).items()]
    made[0].notes.extend(effects.notes(number, [each.effect for each in found], [each.p for each in found])
                         + _unfinished(found, groups, sweep))
    return [*made, _configurations(found, groups, sweep)]


def _family(title: str, several: Sequence[Answer], number: int, sweep: Sweep) -> Table:
    metric, = titled([sweep.metric])
    noun = "the loss" if sweep.metric in ("val_loss", "val_loss_avg") else metric
    lines = []
    for each in several:
        asked, effect, p = each
        means = (effect.mean_against, effect.mean_of) if each.is_left_out else (effect.mean_of, effect.mean_against)
        lines.append([value_cell(each.name), value_cell(_sets(asked)),
                      Cell(f"{effect.n} of {len(sweep.seeds) or 1}", effect.n),
                      *(Cell("") if mean is None else Cell(rounded(mean, sweep.metric), mean) for mean in means),
                      *effects.cells(effect, p, number, sweep.metric, (f"lowers {noun}", f"raises {noun}", "effect"))])
    less = "without less with" if several[0].is_left_out else "with less without"
    columns = ("change", "sets", "pairs", f"{metric} with it", "without it", less, *effects.COLUMNS)
    return without_empty_columns(title, columns, lines, [], columns[:3])


def _sets(asked: Comparison) -> str:
    """The keys in which the two differ, with values where they are short."""
    less = asked.without.parameters
    said = [(key, in_yaml(value)) for key, value in asked.with_it.parameters.items()
            if key not in less or less[key] != value]
    return ", ".join(f"{key}={value}" if len(value) <= LONGEST_VALUE else key for key, value in said)


def _sides(found: Iterable[Answer]) -> dict:
    """Configuration id -> configuration, each once."""
    return {configuration_id(side): side for each in found for side in (each.asked.against, each.asked.of)}


def _unfinished(found: Sequence[Answer], groups: dict, sweep: Sweep) -> list[str]:
    said = {label(side, sweep): unfinished(groups.get(key, []), sweep.seeds) or ("" if key in groups else "no trial")
            for key, side in _sides(found).items()}
    lines = [f"{name}: {what}" for name, what in said.items() if what]
    return [f"Not finished, so without a pair: {'; '.join(lines)}."] if lines else []


def _configurations(found: Sequence[Answer], groups: dict, sweep: Sweep) -> Table:
    sides, planned = _sides(found), len(sweep.seeds) or 1
    rows = [row for group in groups.values() for row in group]
    columns, lines = measured(rows, sweep), []
    for key in sorted(sides, key=lambda key: rank(finished(groups.get(key, [])), planned, sweep)):
        group = groups.get(key, [])
        done = finished(group)
        results = [mean_cell(done, column) for column in columns]
        lines.append([value_cell(label(sides[key], sweep)), seeds_cell(group, planned), *results[:1],
                      interval_cell(done, sweep.metric), *results[1:], Cell(unfinished(group, sweep.seeds))])
    columns = titled(columns)
    head = ["configuration", "seeds", *columns[:1], "95% interval", *columns[1:], "not finished"]
    notes = ["Mean ± standard deviation over seeds. An interval is of one mean alone; the differences above are "
             "paired by seed.", *about_seconds(rows)]
    return without_empty_columns("Configurations", head, lines, notes, head[:2])
