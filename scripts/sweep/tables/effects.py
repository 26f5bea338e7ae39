"""What one set of runs does to another, paired by seed, where several such questions are asked at once."""
from collections.abc import Sequence
from typing import NamedTuple

from scripts.judge import POWER, Difference, detectable, gaps, holm, more_paired, paired, spread
from scripts.sweep.results import ENDED
from scripts.sweep.tables.cells import Cell, finished, range_cell, rounded, titled, value_cell
from scripts.verdict_text import p_text

ALPHA = 0.05                            # the chance that any comparison of a sweep sees an effect where there is none
NO_TEST_OF_ONE = "one pair of seeds: no test"


class Effect(NamedTuple):
    """Of the runs of one configuration against those of another; None where a verdict has nothing to stand on."""

    n: int                              # pairs of seeds
    mean_of: float | None               # over these pairs
    mean_against: float | None
    difference: float | None            # mean_of - mean_against
    sd: float | None                    # of the differences
    test: Difference | None
    why_none: str                       # why there is no test


def effect(of: Sequence[dict], against: Sequence[dict], key: str, comparisons: int, names: tuple[str, str]) -> Effect:
    """Over the seeds that both finished; what diverged, or never reached its target, is a finding and has no mean.

    Args:
        of, against: rows of results.jsonl, of every status.
        comparisons: how many there are, for the interval.
        names: of the two, as a reason without a test has them.
    """
    values, others = ({row["seed"]: row[key] for row in finished(side) if row[key] is not None}
                      for side in (of, against))
    found, seeds = gaps(values, others), values.keys() & others.keys()
    if lost := [f"{name} {said}".strip() for name, side in zip(names, (of, against)) if (said := _lost(side, key))]:
        return Effect(len(found), None, None, None, None, None, "; ".join(lost))
    if not found:
        return Effect(0, None, None, None, None, None, "no seed that both finished")
    mean_of, mean_against = [spread([side[seed] for seed in seeds]).mean for side in (values, others)]
    test, why_none = paired(values, others, 1 - ALPHA / comparisons), ""
    if any(row["status"] not in ENDED for row in (*of, *against)):    # a look at a time would see effects too often
        test, why_none = None, "no verdict before all seeds ended"
    elif len(found) == 1:
        why_none = NO_TEST_OF_ONE
    elif test is None:
        why_none = "the same difference at every seed: no test" if any(found) else "equal at every seed"
    return Effect(len(found), mean_of, mean_against, spread(found).mean, spread(found).sd, test, why_none)


def _lost(group: Sequence[dict], key: str) -> str:
    """`diverged at 1 of 5 seeds`"""
    diverged = sum(row["status"] == "not_finite" for row in group)
    unreached = sum(row[key] is None for row in finished(group))
    none = "target not reached" if key.startswith("target") else f"no {titled([key])[0]}"
    return " and ".join(f"{said} at {count} of {len(group)} seeds"
                        for said, count in (("diverged", diverged), (none, unreached)) if count)


def adjusted(effects: Sequence[Effect]) -> list[float | None]:
    """Holm's p-values. What has no test counts as one with p = 1: the number of comparisons is that of the plan."""
    ps = holm([each.test.p if each.test else 1.0 for each in effects])
    return [p if each.test else None for p, each in zip(ps, effects)]


def is_detected(p: float | None) -> bool:
    """By Holm's p-value, None where there is no test."""
    return p is not None and p < ALPHA


def cells(found: Effect, p: float | None, comparisons: int, key: str, words: tuple[str, str, str]) -> list[Cell]:
    """Difference, interval, p, verdict, further seeds: `COLUMNS`.

    Args:
        words: of a verdict where the difference is negative, where it is positive, and what was not detected.
    """
    if found.difference is None:
        return [Cell(""), Cell(""), Cell(""), value_cell(found.why_none), Cell("")]
    gap = Cell(rounded(found.difference, key, "+"), found.difference)
    if found.test is None:
        return [gap, Cell(""), Cell(""), value_cell(found.why_none), Cell("")]
    shown = [gap, range_cell(found.test.low, found.test.high, key, "+"), Cell(p_text(p), p)]
    if is_detected(p):
        return [*shown, value_cell(words[found.difference > 0]), Cell("")]
    least = rounded(detectable(found.n, found.sd, ALPHA / comparisons), key)
    said = f"no {words[2]} detected; the smallest detectable at n = {found.n} is {least}"
    more = more_paired(found.n, found.sd, found.difference, ALPHA / comparisons)
    return [*shown, value_cell(said), Cell("" if more is None else f"{more:,}", more)]


COLUMNS = ("simultaneous 95% interval", "p (Holm)", "verdict", "more seeds")         # after the difference's


def notes(comparisons: int, effects: Sequence[Effect], ps: Sequence[float | None]) -> list[str]:
    """What the numbers of `cells` are."""
    said = ["Differences are paired by seed: means over the seeds that both sides finished, n of them."]
    if any(each.why_none == NO_TEST_OF_ONE for each in effects):
        said.append("A test needs two seeds or more that both sides finished.")
    if not any(each.test for each in effects):
        return said
    level, power = f"{1 - ALPHA / comparisons:.2%}", f"{POWER:.0%}"
    many = comparisons > 1
    by_holm = f", by Holm for {comparisons} comparisons" if many else ""
    said.append(f"p: two-sided paired t-test of n differences{by_holm}; a verdict needs p < {ALPHA}"
                + (f", so the chance of any false one is at most {ALPHA:.0%}." if many else "."))
    if many:
        said.append(f"Intervals: each holds {level}, so that all {comparisons} hold together with 95% (Bonferroni). "
                    "They are a little wider than Holm's test needs: one may hold 0 where p is below 0.05.")
    if any(each.test and not is_detected(p) for each, p in zip(effects, ps)):
        said.append(f"Smallest detectable: the true mean difference that n pairs find with a power of {power}, at "
                    f"level {ALPHA}{f'/{comparisons}' if many else ''}, if differences have the standard deviation "
                    "seen. More seeds: further pairs with which the mean seen would be found so, were it the true one.")
    return said
