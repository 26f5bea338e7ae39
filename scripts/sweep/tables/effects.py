"""What one set of runs does to another, paired by seed, where several such questions are asked at once."""
from collections.abc import Sequence
from typing import NamedTuple

from scripts.judge import POWER, Difference, detectable, gaps, holm, more_paired, paired, spread
from scripts.sweep.results import ENDED
from scripts.sweep.tables.cells import Cell, between, finished, number
from scripts.verdict_text import p_text

ALPHA = 0.05                            # the chance that any comparison of a sweep sees an effect where there is none


class Effect(NamedTuple):
    """Of the runs of one configuration against those of another; None where a verdict has nothing to stand on."""

    n: int                              # pairs of seeds
    of: float | None                    # means over these pairs
    against: float | None
    mean: float | None                  # of - against
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
    means = [spread([side[seed] for seed in seeds]).mean for side in (values, others)]
    test = paired(values, others, 1 - ALPHA / comparisons)
    if any(row["status"] not in ENDED for row in (*of, *against)):    # a look at a time would see effects too often
        return Effect(len(found), *means, spread(found).mean, spread(found).sd, None,
                      "no verdict before all seeds ended")
    why = "" if test else "one pair of seeds: no test" if len(found) == 1 else \
        "the same difference at every seed: no test" if any(found) else "equal at every seed"
    return Effect(len(found), *means, spread(found).mean, spread(found).sd, test, why)


def _lost(group: Sequence[dict], key: str) -> str:
    """`diverged at 1 of 5 seeds`"""
    diverged = sum(row["status"] == "not_finite" for row in group)
    unreached = sum(row[key] is None for row in finished(group))
    return " and ".join(f"{said} at {count} of {len(group)} seeds"
                        for said, count in (("diverged", diverged), (f"no {key}", unreached)) if count)


def adjusted(effects: Sequence[Effect]) -> list[float | None]:
    """Holm's p-values. What has no test counts as one with p = 1: the number of comparisons is that of the plan."""
    ps = holm([each.test.p if each.test else 1.0 for each in effects])
    return [p if each.test else None for p, each in zip(ps, effects)]


def cells(found: Effect, p: float | None, comparisons: int, key: str, words: tuple[str, str, str]) -> list[Cell]:
    """Difference, interval, p, verdict, further seeds: `COLUMNS`.

    Args:
        words: of a verdict where the difference is negative, where it is positive, and what was not detected.
    """
    if found.mean is None:
        return [Cell(""), Cell(""), Cell(""), Cell(found.why_none, found.why_none), Cell("")]
    gap = Cell(number(found.mean, key, "+"), found.mean)
    if found.test is None:
        return [gap, Cell(""), Cell(""), Cell(found.why_none, found.why_none), Cell("")]
    shown = [gap, between(found.test.low, found.test.high, key, "+"), Cell(p_text(p), p)]
    if p < ALPHA:
        said = words[found.mean > 0]
        return [*shown, Cell(said, said), Cell("")]
    least = number(detectable(found.n, found.sd, ALPHA / comparisons), key)
    said = f"no {words[2]} detected; the smallest detectable at n = {found.n} is {least}"
    more = more_paired(found.n, found.sd, found.mean, ALPHA / comparisons)
    return [*shown, Cell(said, said), Cell("" if more is None else f"{more:,}", more)]


COLUMNS = ("simultaneous 95% interval", "p (Holm)", "verdict", "more seeds")         # after the difference's


def notes(comparisons: int, effects: Sequence[Effect]) -> list[str]:
    """What the numbers of `cells` are."""
    if not any(each.test for each in effects):
        return ["Differences are paired by seed; a test needs two seeds or more that both sides finished."]
    level, power = f"{1 - ALPHA / comparisons:.2%}", f"{POWER:.0%}"
    many = comparisons > 1
    said = ["Differences are paired by seed: means over the seeds that both sides finished, n of them.",
            f"p: two-sided paired t-test of n differences{f', by Holm for {comparisons} comparisons' if many else ''}; "
            f"a verdict needs p < {ALPHA}" + (f", so the chance of any false one is at most {ALPHA:.0%}." if many
                                              else ".")]
    if many:
        said.append(f"Intervals: each holds {level}, so that all {comparisons} hold together with 95% (Bonferroni). "
                    "They are a little wider than Holm's test needs: one may hold 0 where p is below 0.05.")
    said.append(f"Smallest detectable: the true mean difference that n pairs find with a power of {power}, at level "
                f"{ALPHA}{f'/{comparisons}' if many else ''}, if differences have the standard deviation seen. More "
                f"seeds: further pairs with which the mean seen would be found so, were it the true one.")
    return said
