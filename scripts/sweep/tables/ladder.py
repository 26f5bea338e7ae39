"""The tables of a ladder: what each change does, and what every configuration reached."""
from collections.abc import Sequence
from typing import NamedTuple

from scripts.sweep.candidates import Comparison, comparisons, label
from scripts.sweep.file import Sweep
from scripts.sweep.parameter import in_yaml
from scripts.sweep.plan import configuration_id
from scripts.sweep.tables import effects
from scripts.sweep.tables.cells import Cell, Table, finished, grouped, interval, made, mean, measured, missing, \
    number, rank, seeds

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


def answers(rows: Sequence[dict], sweep: Sweep) -> tuple[list[Answer], int]:
    """(Those of a ladder, in the order of its file; the number of different comparisons.)"""
    groups, found = grouped(rows), comparisons(sweep)
    pairs = [frozenset(map(configuration_id, (each.of, each.against))) for each in found]
    m, measured_of = len(set(pairs)), []
    for each in found:
        names = ("with it", "without it") if each.family != "left out of all" else ("without it", "with it")
        measured_of.append(effects.effect(groups.get(configuration_id(each.of), []),
                                          groups.get(configuration_id(each.against), []), sweep.metric, m, names))
    once = dict(zip(pairs, measured_of))
    ps = dict(zip(once, effects.adjusted(list(once.values()))))
    return [Answer(each, of, ps[pair]) for each, of, pair in zip(found, measured_of, pairs)], m


def ladder(rows: Sequence[dict], sweep: Sweep) -> list[Table]:
    """A table a family of comparisons, by size of the effect (rungs in their order), and one of the configurations."""
    groups, (found, m) = grouped(rows), answers(rows, sweep)
    noun = "loss" if sweep.metric in ("val_loss", "val_loss_avg") else sweep.metric
    planned, made_so_far = sweep.seeds or (None,), []
    for family in dict.fromkeys(each.asked.family for each in found):
        of_family = [each for each in found if each.asked.family == family]
        if family != "rung":
            of_family.sort(key=lambda each: (each.effect.mean is None, -abs(each.effect.mean or 0.0)))
        lines = []
        for each, of, p in of_family:
            with_it, without = (of.of, of.against) if family != "left out of all" else (of.against, of.of)
            name = f"without {each.change}" if family == "left out of all" else each.change
            lines.append([Cell(name, name), Cell(said := _sets(each), said), Cell(f"{of.n} of {len(planned)}", of.n),
                          *(Cell("") if x is None else Cell(number(x, sweep.metric), x) for x in (with_it, without)),
                          *effects.cells(of, p, m, sweep.metric, (f"lowers {_the(noun)}", f"raises {_the(noun)}",
                                                                  "effect"))])
        less = "without less with" if family == "left out of all" else "with less without"
        columns = ("change", "sets", "pairs", f"{sweep.metric} with it", "without it", less, *effects.COLUMNS)
        made_so_far.append(made(TITLES[family], columns, lines, [], columns[:3]))
    made_so_far[0].notes.extend(effects.notes(m, [each.effect for each in found])
                                + _missing([each.asked for each in found], groups, sweep))
    return [*made_so_far, _configurations([each.asked for each in found], groups, sweep)]


def _the(noun: str) -> str:
    return f"the {noun}" if noun == "loss" else noun


def _sets(each: Comparison) -> str:
    """The keys in which the two differ, with values where they are short."""
    more, less = (each.against, each.of) if each.family == "left out of all" else (each.of, each.against)
    said = [(key, in_yaml(value)) for key, value in more.parameters.items()
            if key not in less.parameters or less.parameters[key] != value]
    return ", ".join(f"{key}={value}" if len(value) <= LONGEST_VALUE else key for key, value in said)


def _missing(found: Sequence[Comparison], groups: dict, sweep: Sweep) -> list[str]:
    names = {configuration_id(each): label(each, sweep) for pair in found for each in (pair.against, pair.of)}
    said = {name: missing(groups.get(key, []), sweep.seeds) or ("" if key in groups else "no trial")
            for key, name in names.items()}
    lines = [f"{name}: {what}" for name, what in said.items() if what]
    return [f"Not finished, so without a pair: {'; '.join(lines)}."] if lines else []


def _configurations(found: Sequence[Comparison], groups: dict, sweep: Sweep) -> Table:
    each_once = {configuration_id(each): each for pair in found for each in (pair.against, pair.of)}
    planned = len(sweep.seeds) or 1
    columns = measured([row for group in groups.values() for row in group], sweep)
    order = sorted(each_once, key=lambda key: rank(finished(groups.get(key, [])), planned, sweep))
    lines = []
    for key in order:
        group = groups.get(key, [])
        done, name = finished(group), label(each_once[key], sweep)
        results = [mean(done, column) for column in columns]
        lines.append([Cell(name, name), seeds(group, planned), *results[:1], interval(done, sweep.metric), *results[1:],
                      Cell(missing(group, sweep.seeds))])
    head = ["configuration", "seeds", *columns[:1], "95% interval", *columns[1:], "not finished"]
    notes = ["Mean ± standard deviation over seeds. An interval is of one mean alone; the differences above are "
             "paired by seed."]
    return made("Configurations", head, lines, notes, head[:2])
