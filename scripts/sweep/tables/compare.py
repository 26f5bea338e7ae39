"""The tables of a comparison: every preset at the best that its tuning found, and all that tuning tried."""
from collections.abc import Callable, Sequence
from typing import Any

from scripts.sweep.parameter import Parameter, is_number, quantile
from scripts.sweep.file import Sweep
from scripts.sweep.plan import chosen
from scripts.sweep.results import ENDED, FINAL
from scripts.sweep.tables import effects
from scripts.sweep.tables.cells import (Cell, Table, about_seconds, finished, grouped, interval_cell, listed,
                                        mean_cell, measured, rank, seeds_cell, titled, unfinished, value_cell,
                                        without_empty_columns)

EDGE = 0.1                              # of a range, at either end
# Column -> key of costs.json, divisor, digits.
COSTS = {"optimizer ms": ("optimizer_ms", 1, 2), "step ms": ("step_ms", 1, 1),
         "state MiB": ("state_bytes", 2**20, 1), "peak MiB": ("peak_bytes", 2**20, 0)}


def compare(rows: Sequence[dict], sweep: Sweep, costs: dict | None) -> list[Table]:
    """The presets with their reported seeds, best first, and every configuration of their tuning."""
    tuning = {base: [row for row in rows if row["base"] == base and sweep.is_tuning(row)]
              for base in sweep.bases}
    reported = {base: [row for row in rows if row["base"] == base and not sweep.is_tuning(row)]
                for base in sweep.bases}
    best = {base: _best(tuning[base], reported[base], sweep) for base in sweep.bases}
    tuned = list(dict.fromkeys(p.key for base in sweep.bases for p in sweep.parameters_of(base) if _is_tuned(p)))
    return [_results(tuning, reported, best, tuned, sweep, costs or {}), _tuning(tuning, best, tuned, sweep)]


def _best(tuning: Sequence[dict], reported: Sequence[dict], sweep: Sweep) -> dict | None:
    """A row of the chosen configuration; None while tuning goes on, or where nothing finished with all seeds."""
    if reported:
        return reported[0]
    over = sum(row["status"] in ENDED for row in tuning) >= _planned(tuning, sweep)
    key = chosen(tuning, sweep) if over else None
    return next((row for row in tuning if row["configuration"] == key), None)


def _planned(tuning: Sequence[dict], sweep: Sweep) -> int:
    """Tuning trials of a preset, those that a search has yet to propose too."""
    return len(tuning) if sweep.method == "grid" else sweep.budget * len(sweep.tuning_seeds)


def _is_tuned(p: Parameter) -> bool:
    return p.distribution != "constant" and len(p.spec.get("values", (1, 2))) > 1


def _results(tuning: dict, reported: dict, best: dict, tuned: list[str], sweep: Sweep, costs: dict) -> Table:
    planned, metric = len(sweep.seeds), sweep.metric
    every = [row for group in reported.values() for row in group]
    columns = [key for key in measured(every, sweep) if key != "tokens_per_s" or key == metric] or [metric]
    base = sweep.baseline.base if sweep.baseline else None
    others = [preset for preset in sweep.bases if preset != base] if base else []
    found = {preset: effects.effect(reported[preset], reported[base], metric, len(others), ("", "the baseline"))
             for preset in others}
    ps = dict(zip(found, effects.adjusted(list(found.values()))))
    words = ("worse", "better", "difference") if sweep.maximize else ("better", "worse", "difference")
    lines = []
    for preset in sorted(sweep.bases, key=lambda preset: rank(finished(reported[preset]), planned, sweep)):
        group, done, row = reported[preset], finished(reported[preset]), best[preset]
        results = [_of_target(done, column) if column.startswith("target") else mean_cell(done, column)
                   for column in columns]
        line = [value_cell(preset), *(value_cell(row["parameters"].get(key, "")) if row else Cell("") for key in tuned),
                seeds_cell(group, planned), results[0], interval_cell(done, metric), *results[1:],
                *_costs(costs.get(row["configuration"]) if row else None)]
        if others:
            line += (effects.cells(found[preset], ps[preset], len(others), metric, words) if preset in found
                     else [Cell(""), Cell(""), Cell(""), value_cell("baseline"), Cell("")])
        said = unfinished(group, sweep.seeds if group else ())
        lines.append([*line, Cell(said or ("" if group else _why_none(tuning[preset], row, sweep)))])
    columns = titled(columns)
    head = ["preset", *tuned, "seeds", *columns[:1], "95% interval", *columns[1:], *COSTS,
            *((f"{titled([metric])[0]} less baseline's", *effects.COLUMNS) if others else ()), "not finished"]
    notes = [*_about_tuning(tuning, sweep), *_edges(tuning, best, sweep)]
    if others:
        notes += effects.notes(len(others), list(found.values()), list(ps.values()))
    notes += about_seconds(every)
    if costs:
        where = ", ".join(str(costs[key]) for key in ("machine", "date") if costs.get(key))
        notes.append(f"Optimizer and step milliseconds and memory: measured one by one{f' on {where}' * bool(where)}.")
    return without_empty_columns(f"Results: {planned} seeds of the best that tuning found for each preset", head, lines,
                                 notes, head[:1])


def _of_target(done: Sequence[dict], key: str) -> Cell:
    """Where no seed reached it, that."""
    return mean_cell(done, key) if any(row[key] is not None for row in done) or not done else Cell(f"0 of {len(done)}")


def _costs(cost: dict | None) -> list[Cell]:
    found = [((cost or {}).get(key), by, digits) for key, by, digits in COSTS.values()]
    return [Cell("") if x is None else Cell(f"{x / by:,.{digits}f}", x / by) for x, by, digits in found]


def _why_none(tuning: Sequence[dict], best: dict | None, sweep: Sweep) -> str:
    ended, planned = sum(row["status"] in ENDED for row in tuning), _planned(tuning, sweep)
    if ended < planned:
        return f"tuning: {ended} of {planned} trials ended"
    return "waiting" if best else f"no configuration has a {titled([sweep.metric])[0]} at all tuning seeds"


def _tuning(tuning: dict, best: dict, tuned: list[str], sweep: Sweep) -> Table:
    lines, planned = [], len(sweep.tuning_seeds)
    for base, rows in tuning.items():
        groups = grouped(rows)
        for key in sorted(groups, key=lambda key: rank(finished(groups[key]), planned, sweep)):
            group, taken = groups[key], best[base] is not None and best[base]["configuration"] == key
            lines.append([value_cell(base), *(value_cell(group[0]["parameters"].get(each, "")) for each in tuned),
                          seeds_cell(group, planned), mean_cell(finished(group), sweep.metric),
                          Cell(unfinished(group)), value_cell("chosen") if taken else Cell("")])
    metric, = titled([sweep.metric])
    head = ["preset", *tuned, "seeds", metric, "not finished", "chosen"]
    notes = [f"Ranked by {metric} over the tuning seed{'s' * (planned > 1)} {listed(sweep.tuning_seeds)}. The "
             "best of several is lucky there: compare presets by their results."]
    return without_empty_columns("Tuning", head, lines, notes, head[:1])


# ---- notes

def _about_tuning(tuning: dict, sweep: Sweep) -> list[str]:
    """The budget, what each preset had of it, and the seeds."""
    each = len(sweep.tuning_seeds)
    what = {"grid": "the grid of each", "random": f"{sweep.budget} draws each of a random search",
            "bayes": f"{sweep.budget} configurations each by Bayesian search"}[sweep.method]
    notes = [f"Tuning: {what}, with seed{'s' * (each > 1)} {listed(sweep.tuning_seeds)}; reported: "
             f"seed{'s' * (len(sweep.seeds) > 1)} {listed(sweep.seeds)}, which tuning did not see."]
    ended = {base: sum(row["status"] in FINAL for row in rows) for base, rows in tuning.items()}
    planned = {base: _planned(rows, sweep) for base, rows in tuning.items()}
    if len(set(ended.values())) > 1:
        notes.append("Unequal tuning budgets, so the comparison is not fair: trials with a result are "
                     f"{', '.join(f'{base} {ended[base]} of {planned[base]}' for base in tuning)}.")
    elif ended == planned:
        notes.append(f"Every preset had its {max(planned.values())} tuning trials.")
    else:
        notes.append(f"Every preset had {max(ended.values())} of its {max(planned.values())} tuning trials.")
    if pruned := sum(row["status"] == "pruned" for rows in tuning.values() for row in rows):
        notes.append(f"Successive halving ended {pruned} of {sum(map(len, tuning.values()))} tuning trials early; "
                     "reported trials run to their end.")
    return notes


def _edges(tuning: dict, best: dict, sweep: Sweep) -> list[str]:
    """Chosen values with little or nothing tried beyond them."""
    said = []
    for base in filter(best.get, sweep.bases):
        values, found = best[base]["parameters"], []
        for p in sweep.parameters_of(base):
            tried = [row["parameters"][p.key] for row in tuning[base] if row["status"] in FINAL]
            if where := at_edge(p, values[p.key], tried):
                found.append(f"{p.key} = {values[p.key]} is {where}")
        said += [f"{base}: {', '.join(found)}"] if found else []
    return [f"Chosen at an edge, beyond which little or nothing was tried, so a better value may lie there: "
            f"{'; '.join(said)}."] if said else []


def at_edge(p: Parameter, best: Any, tried: Sequence[Any]) -> str:
    """Where a chosen value lies, if at an end of its range, in quantiles of its distribution, or of what was tried.

    Of two values one is always an end, and of what is no number there are none.
    """
    if p.distribution.startswith("categorical"):
        options = sorted(set(filter(is_number, p.spec["values"])))
        if len(options) < max(3, len(p.spec["values"])) or best not in (options[0], options[-1]):
            return ""
        return f"the {'smallest' if best == options[0] else 'largest'} of {len(options)} values"
    if p.distribution == "constant" or not is_number(best):
        return ""
    if _share(p, lambda x: x < best) <= EDGE:
        return f"in the lowest {EDGE:.0%} of its range"
    if _share(p, lambda x: x <= best) >= 1 - EDGE:
        return f"in the highest {EDGE:.0%} of its range"
    tried = sorted(set(tried))
    if len(tried) < 3 or best not in (tried[0], tried[-1]):
        return ""
    return f"the {'smallest' if best == tried[0] else 'largest'} of {len(tried)} tried"


def _share(p: Parameter, below: Callable[[float], bool]) -> float:
    """Of the draws, those that are below: quantiles rise, so by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if below(quantile(p, middle)) else (low, middle)
    return low
