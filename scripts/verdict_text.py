"""A verdict (scripts/verdict.py) in words, and as Markdown for a pull request."""
from scripts.judge import LEVEL, SCORE, Spread

COLUMNS = "Runs | Steps | Time μ | Time σ | Time +/- | Time p | Loss μ | Loss σ | Loss +/- | Loss p".split(" | ")


def text(found: dict) -> str:
    rule, runs = found["rule"], found["runs"]
    lines = set_lines(runs, rule)
    for other in found["baselines"]:
        lines += ["", *set_lines(other, rule), "", f"{runs['name']} against {other['name']}",
                  *comparison_lines(other["comparison"])]
    return "\n".join(lines)


def set_lines(found: dict, rule: dict | None) -> list[str]:
    """One set of runs."""
    n, loss, time = found["loss"]["n"], Spread(**found["loss"]), found["time"]
    seeds = "" if None in found["seeds"] else f", seed{'s' * (n > 1)} {' '.join(map(str, sorted(found['seeds'])))}"
    lines = [f"{found['name']}: {n} run{'s' * (n > 1)} of {found['steps']:,} steps ({found['form']}){seeds}",
             f"  loss       {spread_text(loss, '.4f')}",
             *(rule_lines(found, rule) if rule else ["  rule       none: the runs have no target; give --rule"])]
    if time:
        spread = Spread(*(time[key] for key in Spread._fields))
        between = f", median {time['median']:.3f}, {time['min']:.3f} to {time['max']:.3f}" if n > 1 else ""
        lines.append(f"  seconds    {spread_text(spread, '.3f')}{between}")
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None)
    return [*lines, f"  machine    {machine or 'not known'}"]


def spread_text(spread: Spread, form: str) -> str:
    if spread.sd is None:
        return f"{spread.mean:{form}}"
    return f"mean {spread.mean:{form}}, sd {spread.sd:{form}}, 95% interval {spread.low:{form}} to {spread.high:{form}}"


def rule_lines(found: dict, rule: dict) -> list[str]:
    said, target = "passes" if found["passes"] else "does not pass", f"{rule['target']:g}"
    if rule["scored"]:
        test = f"({target} - mean)·sqrt(n) = {found['score']:.5f}, asked {SCORE} or more"
    elif found["p"] is None:
        test = f"no t-test of {'one run' if found['loss']['n'] == 1 else 'equal losses'}"
    else:
        test = f"mean below {target}: p = {p_text(found['p'])}, asked below {LEVEL}"
    lines = [f"  {rule['name']:<10} {test}: {said}", *(f"  outside    {why}" for why in found["outside_the_rule"])]
    if not found["statistic_passes"]:
        lines.append(f"  more runs  {more_text(found['more_runs'], found['loss']['mean'] < rule['target'])}")
    return lines


def more_text(more: int | None, possible: bool) -> str:
    if not possible:
        return "none decide it at this mean"
    return "not known without a spread" if more is None else f"{more:,}, if mean and standard deviation stay"


def comparison_lines(found: dict) -> list[str]:
    loss, by_seed, time = found["loss"], found["loss_by_seed"], found["time"]
    lines = []
    if found["changed"] is not None:
        lines.append(f"  changed    {shown(found['changed']) or 'nothing in configuration and code'}")
    if loss is None:
        lines.append(f"  loss       {found['loss_mean']:+.4f}, no test of one run or of equal losses")
    else:
        lines.append(f"  loss       {difference_text(loss, '.4f', 'lower', 'higher')} (Welch)")
    if by_seed:
        lines.append(f"  by seed    {difference_text(by_seed, '.4f', 'lower', 'higher')} ({by_seed['n'][0]} pairs)")
    if loss and loss["p"] >= LEVEL:
        lines.append(f"  more runs  {more_text(found['more_runs_each'], loss['mean'] != 0)}, of each set (Welch)")
    if found["pairwise_score"] is not None:
        said = "better" if found["pairwise_better"] else "not shown to be better"
        lines.append(f"  pairwise   {found['pairwise_score']:.5f}, asked {SCORE} or more: {said} (steps count as "
                     "loss, at the rate near 3,300)")
    if found["times_not_compared"]:
        return [*lines, f"  seconds    not compared: {found['times_not_compared']}"]
    if time is None:
        return [*lines, "  seconds    no test of one run or of equal times"]
    return [*lines, f"  seconds    {difference_text(time, '.3f', 'faster', 'slower')} (Welch)"]


def difference_text(found: dict, form: str, less: str, more: str) -> str:
    said = "undecided" if found["p"] >= LEVEL else less if found["mean"] < 0 else more
    return (f"{found['mean']:+{form}} (95% interval {found['low']:+{form}} to {found['high']:+{form}}), "
            f"p = {p_text(found['p'])}: {said}")


def shown(unlike: list[tuple[str, object, object]]) -> str:
    """`key (a and b)` of the first three (key, a, b), and how many more there are."""
    named = ", ".join(f"{key} ({a} and {b})" for key, a, b in unlike[:3])
    return named + (f" and {len(unlike) - 3} more" if len(unlike) > 3 else "")


def p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"


# ---- Markdown

def markdown(found: dict) -> str:
    """The speedrun's table, and below it each set's statistics with the numbers that they are made of."""
    rule, first = found["rule"], next(iter(found["baselines"]), None)
    rows = [COLUMNS, ["-", *["-:"] * (len(COLUMNS) - 1)], *(row(other, None) for other in found["baselines"]),
            row(found["runs"], first and first["comparison"])]
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in rows)]
    if first:
        parts.append(f"+/- and Time p (Welch, two-sided) are against {first['name']}.")
    for each in (found["runs"], *found["baselines"]):
        said = set_lines(each, rule)
        if "comparison" in each:
            said += [f"{found['runs']['name']} against it", *comparison_lines(each["comparison"])]
        parts += ["\n".join(("```", *said, "```")), "\n".join(("```python", *numbers(each, rule), "```"))]
    return "\n\n".join(parts)


def numbers(found: dict, rule: dict | None) -> list[str]:
    """A script that computes the rule's statistic again."""
    lines = [f"losses = {[round(loss, 5) for loss in found['losses']]}"]
    if found["train_s"]:
        lines.append(f"times = {[round(time, 3) for time in found['train_s']]}")
    if rule and rule["scored"]:
        lines.append(f"print(({rule['target']} - sum(losses) / len(losses)) * len(losses) ** 0.5)    # {SCORE} or more")
    elif rule:
        lines += ["import scipy.stats",
                  f"print(scipy.stats.ttest_1samp(losses, {rule['target']}, alternative='less').pvalue)"]
    return lines


def row(found: dict, compared: dict | None) -> list[str]:
    loss, time, moved = found["loss"], found["time"] or {}, (compared or {}).get("time") or {}
    return [f"{found['name']} ({loss['n']})", f"{found['steps']:,}", number(time.get("mean"), ".3f"),
            number(time.get("sd"), ".3f"), number(moved.get("mean"), "+.3f"), p_cell(moved.get("p")),
            number(loss["mean"], ".4f"), number(loss["sd"], ".4f"), number(compared and compared["loss_mean"], "+.4f"),
            p_cell(found.get("p"))]


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def p_cell(p: float | None) -> str:
    return "" if p is None else p_text(p)
