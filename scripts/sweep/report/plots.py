"""The page's interactive figures as plotly reads them; of curves what page.js puts them together from."""
import math
from collections.abc import Sequence
from html import escape

from scripts.judge import spread
from scripts.sweep.report.folder import Folder
from scripts.sweep.report.groups import GREY, LOSSES, Band, Group, Line, band, chosen, final, line, rate_key
from scripts.sweep.report.pictures import NAMES, colour_of, effects, limits

DIGITS = 6                              # significant, of what the page holds


def curves(found: Sequence[Group]) -> dict:
    """What page.js draws curves from: losses, and of every group a band and its seeds' lines for each."""
    losses = [loss for loss in LOSSES if any(line(trial, loss).steps for group in found for trial in group.trials)]
    return {"losses": [[loss, LOSSES[loss][1]] for loss in losses], "groups": [
        {"label": group.label, "words": group.words, "key": group.key, "tuning": group.tuning, "colour": group.colour,
         "dash": group.dash, "band": {loss: _band(band(group, loss)) for loss in losses},
         "seeds": [{"seed": trial.row["seed"], "trial": trial.row["trial"], "status": trial.row["status"],
                    **{loss: _line(line(trial, loss)) for loss in losses}} for trial in group.trials]}
        for group in found]}


def _band(found: Band | None) -> dict | None:
    return found and {"step": _short(found.steps), "seconds": _short(found.seconds), "loss": _short(found.mean),
                      "low": found.low and _short(found.low), "high": found.high and _short(found.high), "n": found.n}


def _line(found: Line) -> dict:
    return {"step": _short(found.steps), "seconds": _short(found.seconds), "loss": _short(found.losses)}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def figures(folder: Folder, found: Sequence[Group]) -> list[dict]:
    """Those beside the curves that the sweep has something for: id, title, note, data, layout."""
    return [figure for figure in (_draws(folder, found), _final(folder, found), *_effects(folder)) if figure]


def _draws(folder: Folder, found: Sequence[Group]) -> dict | None:
    metric, best = folder.sweep.metric, chosen(found)
    tuning = [(group, key, final(group, metric)) for group in found if group.tuning
              if (key := rate_key(folder, group.base)) in group.parameters]
    if not any(reached for _, _, reached in tuning):
        return None
    low, edge = limits([value for _, _, reached in tuning for value in reached.values()])
    data = []
    for number, base in enumerate(folder.sweep.bases):
        mine = [(group, key, reached) for group, key, reached in tuning if group.base == base and reached]
        mine.sort(key=lambda each: each[0].parameters[each[1]])
        if not mine:
            continue
        name = mine[0][0].label.partition(":")[0]
        means = [spread(list(reached.values())).mean for _, _, reached in mine]
        ringed = [group.key in best for group, _, _ in mine]
        data.append({
            "type": "scatter", "mode": "markers", "name": escape(name), "x": [g.parameters[k] for g, k, _ in mine],
            "y": _short(means), "hovertemplate": "%{text}<extra></extra>", "marker": {
                "opacity": 1, "color": mine[0][0].colour, "symbol": number % 8,
                "size": [14 if ring else 9 for ring in ringed],
                "line": {"width": [3 if ring else 0 for ring in ringed], "color": "#1a1a1a"}},
            "text": [_hover(name + (" (chosen)" if ring else ""), *group.words, f"{NAMES[metric]}: {mean:.4f}",
                            f"{len(reached)} tuning seed{'s' * (len(reached) > 1)}")
                     for (group, _, reached), mean, ring in zip(mine, means, ringed)]})
    rates = [group.parameters[key] for group, key, _ in tuning]
    keys = " or ".join(dict.fromkeys(key for _, key, _ in tuning))
    lost = sum(not reached for _, _, reached in tuning)
    note = ("Every draw of the search; a black ring marks the one that runs with the reporting seeds. Double-click for "
            "all values." + (f" Not shown: {lost} draw{'s' * (lost > 1)} without a result." if lost else ""))
    return {"id": "learning-rates", "title": "Tuning: loss against learning rate", "note": note, "data": data,
            "layout": {"xaxis": {"title": {"text": escape(keys)}, **(_log_axis(rates) if min(rates) > 0 else {})},
                       "yaxis": {"title": {"text": NAMES[metric]},
                                 "range": [low - .08 * (edge - low), edge + .03 * (edge - low)]}}}


def _log_axis(values: Sequence[float]) -> dict:
    """With 1, 2 and 5 of every decade as plain numbers."""
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    ticks = [digit * 10.**decade for decade in decades for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _final(folder: Folder, found: Sequence[Group]) -> dict | None:
    metric = folder.sweep.metric
    reached = [(group, final(group, metric)) for group in found if not group.tuning]
    reached = [(group, values, spread(list(values.values()))) for group, values in reached if values]
    if len(reached) < 2:
        return None
    means = {"type": "scatter", "mode": "markers", "name": "mean, 95% interval",
             "x": _short([s.mean for _, _, s in reached]), "y": [escape(g.label) for g, _, _ in reached],
             "marker": {"size": 11, "color": [g.colour for g, _, _ in reached],      # hollow: left out of all
                        "symbol": ["circle-open" if g.dash == "dash" else "circle" for g, _, _ in reached],
                        "line": {"width": [2.5 if g.dash == "dash" else 0 for g, _, _ in reached]}},
             "error_x": {"type": "data", "color": "#666666", "thickness": 1.6, "width": 5,
                         "array": _short([s.high - s.mean if s.high is not None else 0 for _, _, s in reached])},
             "hovertemplate": "%{text}<extra></extra>",
             "text": [_hover(g.label, *g.words, f"mean {s.mean:.5g}, n = {s.n}",
                             f"95%: {s.low:.5g} to {s.high:.5g}" if s.low is not None else "one seed, no interval")
                      for g, _, s in reached]}
    seeds = [(group, seed, value) for group, values, _ in reached for seed, value in values.items()]
    dots = {"type": "scatter", "mode": "markers", "name": "seeds", "y": [escape(g.label) for g, _, _ in seeds],
            "x": _short([value for _, _, value in seeds]), "hovertemplate": "%{text}<extra></extra>",
            "marker": {"size": 6, "symbol": "line-ns-open", "color": [g.colour for g, _, _ in seeds]},
            "text": [_hover(g.label, *g.words, f"seed {seed}: {value:.6g}") for g, seed, value in seeds]}
    return {"id": "final", "title": "What each reached",
            "note": "Mean and 95% interval (Student's t) over the reported seeds; a stroke is a seed.",
            "data": [dots, means], "height": 130 + 30 * len(reached),
            "layout": {"showlegend": False, "xaxis": {"title": {"text": NAMES[metric]}},
                       "yaxis": {"autorange": "reversed", "automargin": True}}}


def _effects(folder: Folder) -> list[dict]:
    measured, figures = effects(folder), []
    every = [each.effect for several in measured.values() for each in several]
    ends = [0, *(each.difference for each in every), *(end for each in every if each.test
                                                       for end in (each.test.low, each.test.high))]
    room = .04 * (max(ends) - min(ends)) or 1
    for title, several in measured.items():
        family = several[0].asked.family
        tested = [(each, each.effect, each.effect.test) for each in several]
        trace = {"type": "scatter", "mode": "markers", "x": _short([effect.difference for _, effect, _ in tested]),
                 "y": [escape(each.name) for each in several], "hovertemplate": "%{text}<extra></extra>",
                 "showlegend": False, "marker": {"size": 11, "color": [colour_of(each) for each in several]},
                 "error_x": {"type": "data", "color": GREY, "thickness": 1.6, "width": 5, "array": _short(
                     [test.high - effect.difference if test else 0 for _, effect, test in tested])},
                 "text": [_hover(each.name, family, f"{effect.difference:+.5f}, {effect.n} seeds",
                                 f"95%: {test.low:+.5f} to {test.high:+.5f}" if test else "no interval")
                          for each, effect, test in tested]}
        figures.append({
            "id": f"effects-{family.replace(' ', '-')}", "title": title, "data": [trace],
            "note": f"Differences in {NAMES[folder.sweep.metric]} over equal seeds; the intervals of all comparisons "
                    "together hold with 95%; grey where no effect was detected.",
            "height": 130 + 34 * len(several),
            "layout": {"xaxis": {"title": {"text": f"difference in {NAMES[folder.sweep.metric]}"}, "zeroline": True,
                                 "range": [min(ends) - room, max(ends) + room],
                                 "zerolinecolor": "#1a1a1a", "zerolinewidth": 1.5},
                       "yaxis": {"autorange": "reversed", "automargin": True}}})
    return figures


def _hover(title: str, *lines: str) -> str:
    return "<br>".join([f"<b>{escape(title)}</b>", *map(escape, lines)])
