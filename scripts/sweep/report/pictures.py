"""The report's pictures for papers, by matplotlib: PNGs that stay readable at 800 pixels."""
import textwrap
from collections.abc import Sequence
from pathlib import Path

from scripts.judge import spread
from scripts.sweep.report.folder import Folder, finite
from scripts.sweep.report.groups import GREY, Group, band, chosen, final, rate_key
from scripts.sweep.tables.ladder import Answer, answers, families

WIDTH, DPI = 7.2, 160                   # inches; 1,152 pixels
MOST_CURVES = 8                         # with a colour and a name each; the others are grey
MOST_ROWS = 40                          # of the picture of what was reached
LONGEST_LABEL = 30                      # of a row; more goes on a second line
RUNS_OUT = 1.5                          # times as long as the second longest curve: there the longest is cut off
LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
NAMES = {"val_loss": "validation loss (nats per token)", "val_loss_avg": "validation loss of averaged weights",
         "target_step": "steps to the target", "target_train_s": "seconds to the target", "train_s": "seconds",
         "tokens_per_s": "tokens per second"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
         "axes.labelcolor": "#333333", "text.color": "#1a1a1a", "xtick.color": "#444444", "ytick.color": "#444444",
         "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#ebebeb",
         "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9,
         "lines.linewidth": 1.6, "figure.dpi": DPI, "savefig.dpi": DPI}


def draw(folder: Folder, found: Sequence[Group], out: Path) -> dict[Path, str]:
    """Write those that the sweep has something for; file -> what it shows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context(STYLE):
        drawn, ladder = {}, folder.sweep.kind == "ladder"             # whose curves lie on one another
        for name, what, picture in (
                ("curves", "Validation loss over steps", lambda: None if ladder else _curves(plt, found, False)),
                ("curves_seconds", "Validation loss over seconds on the clock",
                 lambda: None if ladder else _curves(plt, found, True)),
                ("final", "What each configuration reached, mean and 95% interval over seeds, a dot a seed"
                 + "; hollow where something is left out of all" * ladder,
                 lambda: _final(plt, folder, found)),
                ("learning_rates", "The search: each preset's draws, the chosen one ringed",
                 lambda: _draws(plt, folder, found)),
                ("effects", "The effect of each change, paired by seed, with simultaneous 95% intervals, grey where "
                            "none was detected",
                 lambda: _effects(plt, folder))):
            figure = picture()
            if figure is not None:
                path = out / f"{name}.png"
                part = out / f".{name}.part.png"
                try:
                    figure.savefig(part, metadata={"Software": None})   # equal input gives equal bytes
                    part.replace(path)
                finally:
                    plt.close(figure)
                    part.unlink(missing_ok=True)
                drawn[path] = what
    return drawn


def _curves(plt, found: Sequence[Group], seconds: bool):
    shown = [(group, drawn) for group in found if not group.tuning and (drawn := band(group, "val"))]
    shown = shown or [(group, drawn) for group in found if (drawn := band(group, "val"))]     # nothing reported yet
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.3), layout="constrained")
    *_, second, longest = [0.0, *sorted(drawn.seconds[-1] for _, drawn in shown)]
    end = RUNS_OUT * second if seconds and 0 < RUNS_OUT * second < longest else None
    names = {}
    for position, (group, drawn) in reversed(list(enumerate(shown))):
        x = drawn.seconds if seconds else drawn.steps
        names[group.key] = f"{group.label} (to {x[-1]:,.0f} s)" if end and x[-1] > end else group.label
        if position >= MOST_CURVES and len(shown) > MOST_CURVES + 1:
            axes.plot(x, drawn.mean, color="#d0d0d0", lw=1, zorder=1)
            continue
        axes.plot(x, drawn.mean, LINES[group.dash], color=group.colour, label=names[group.key], zorder=3,
                  marker="o" if len(x) <= 15 else None, ms=3)
        if drawn.low:
            axes.fill_between(x, drawn.low, drawn.high, color=group.colour, alpha=.15, lw=0, zorder=2)
    low = min(min(drawn.low or drawn.mean) for _, drawn in shown[:MOST_CURVES])
    high = max(value for _, drawn in shown for step, value in zip(drawn.steps, drawn.high or drawn.mean)
               if step >= .2 * drawn.steps[-1])                  # not the first steps, from which all fall
    axes.set(xlabel="seconds on the clock" if seconds else "step", ylabel="validation loss (nats per token)",
             ylim=(low - .06 * (high - low), high + .06 * (high - low)) if high > low else None)
    axes.set_xlim(0, end)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    order = [names[group.key] for group, _ in shown if names[group.key] in handles]
    columns = 1 if max(map(len, order)) > 34 else 2 if len(order) > 5 else 1
    axes.legend([handles[name] for name in order], order, loc="best", ncols=columns,
                title=f"best {MOST_CURVES} of {len(shown)}" if len(order) < len(shown) else None)
    return figure


def _final(plt, folder: Folder, found: Sequence[Group]):
    metric = folder.sweep.metric
    shown = [(group, list(values.values())) for group in found if not group.tuning
             if (values := final(group, metric))][:MOST_ROWS]
    if len(shown) < 2:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 1 + .34 * len(shown)), layout="constrained")
    for row, (group, values) in enumerate(shown):
        reached = spread(values)
        if reached.low is not None:
            axes.plot([reached.low, reached.high], [row, row], color=group.colour, lw=2.2, solid_capstyle="butt")
        axes.plot(values, [row + .28] * len(values), "o", color=group.colour, ms=3.5, alpha=.7, mew=0)
        hollow = group.dash == "dash"                                 # what leaves something out of all
        axes.plot([reached.mean], [row], "o", mfc="white" if hollow else group.colour, ms=6.5, zorder=4,
                  mec=group.colour if hollow else "white", mew=1.6 if hollow else .8)
        axes.annotate(_number(reached.mean), (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
                      textcoords="offset points", va="center", size=9, color="#444444")
    axes.set_yticks(range(len(shown)), [_wrapped(group.label) for group, _ in shown])
    axes.set(ylim=(len(shown) - .5, -.5), xlabel=NAMES[metric])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def _draws(plt, folder: Folder, found: Sequence[Group]):
    """A panel a preset, rates on a logarithmic axis; losses far above the others' at the upper edge."""
    metric = folder.sweep.metric
    panels = [(base, key, [each for each in found if each.tuning and each.base == base and key in each.parameters])
              for base in folder.sweep.bases if (key := rate_key(folder, base))]
    panels = [panel for panel in panels if panel[2]]
    values = [value for _, _, tried in panels for group in tried for value in final(group, metric).values()]
    if folder.sweep.kind != "compare" or not values:
        return None
    best, columns = chosen(found), min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, .5 + 2 * rows), sharey=True, squeeze=False,
                                layout="constrained")
    low, edge = limits(values)
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    for place, (axes, (base, key, tried)) in enumerate(zip(grid.flat, panels)):
        for group in tried:
            rate, reached = group.parameters[key], final(group, metric).values()
            if not reached:
                axes.plot([rate], [edge], marker="x", color=GREY, ms=6, mew=1.5, clip_on=False)
                continue
            mean = spread(list(reached)).mean
            axes.plot([rate], [min(mean, edge)], marker="^" if mean > edge else "o", color=group.colour, ms=5.5,
                      mec="white", mew=.6, zorder=3, clip_on=False)
            if group.key in best:
                axes.plot([rate], [min(mean, edge)], marker="o", ms=11, mfc="none", mec="#1a1a1a", mew=1.3, zorder=4)
        axes.set(title=next((g.label for g in found if g.base == base and not g.tuning), base.rpartition("/")[2]
                            .removesuffix(".yaml")), ylim=(low - .08 * (edge - low), edge + .03 * (edge - low)))
        axes.tick_params(axis="y", length=0)
        if [below for _, below, _ in panels[place + columns:place + columns + 1]] != [key]:
            axes.set_xlabel(key, size=9)
        rates = [group.parameters[key] for group in tried]
        if min(rates) > 0:
            axes.set_xscale("log")
            axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
            _few_ticks(axes)
    figure.supylabel(NAMES[metric], size=10, color="#333333")
    return figure


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis ends that diverged draws do not set: above the least, at most twice as far as three quarters of them are."""
    ordered = sorted(finite(values))
    low, most = ordered[0], ordered[3 * (len(ordered) - 1) // 4]
    high = min(ordered[-1], low + 2 * (most - low)) if most > low else ordered[-1]
    return low, high if high > low else low + 1e-3


def _few_ticks(axes) -> None:
    """As plain numbers, as many of a decade as have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high / low < 12 else (1, 3) if high / low < 200 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _effects(plt, folder: Folder):
    """A panel a family of comparisons; better is left of zero where less is better."""
    measured = effects(folder)
    if not measured:
        return None
    heights = [len(several) + 1.2 for several in measured.values()]
    figure, grid = plt.subplots(len(measured), 1, figsize=(WIDTH, .6 + .3 * sum(heights)), sharex=True, squeeze=False,
                                height_ratios=heights, layout="constrained")
    for axes, (title, several) in zip(grid.flat, measured.items()):
        axes.axvline(0, color="#1a1a1a", lw=1, zorder=1)
        for row, each in enumerate(several):
            colour, test = colour_of(each), each.effect.test
            if test is not None:
                axes.plot([test.low, test.high], [row, row], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([each.effect.difference], [row], "o", color=colour, ms=6.5, mec="white", mew=.8, zorder=4)
            axes.annotate(f"{each.effect.difference:+.4f}", (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
                          textcoords="offset points", va="center", size=9, color="#444444")
        axes.set_yticks(range(len(several)), [_wrapped(each.name) for each in several])
        axes.set(ylim=(len(several) - .5, -.5), title=title)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    better = "higher" if folder.sweep.maximize else "lower"
    axes.set_xlabel(f"difference in {NAMES[folder.sweep.metric]}; {better} is better")
    return figure


def effects(folder: Folder) -> dict[str, list[Answer]]:
    """Title of a family of a ladder's comparisons -> those that have a difference, as its table has them."""
    found = answers(folder.rows, folder.sweep)[0] if folder.sweep.kind == "ladder" else []
    return families(each for each in found if each.effect.difference is not None)


def colour_of(each: Answer) -> str:
    """Blue for less, orange for more, grey where no effect was detected."""
    return GREY if not each.is_detected else "#0072B2" if each.effect.difference < 0 else "#D55E00"


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, LONGEST_LABEL, max_lines=2, placeholder=" ..."))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
