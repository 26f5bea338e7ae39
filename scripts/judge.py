"""What the losses of several runs say, by the speedrun's rules and against other runs: functions of numbers only.

    track 1, 2   one-sided one-sample t-test of the losses against the target: p < 0.01
    track 3      a z-test with sigma = 0.0013 for p < 0.001, stated as (3.28 - mean)·sqrt(n) >= 0.004
    pairwise     of track 3: (loss gained + steps gained at 0.0045 a hundred) / sqrt(1/n1 + 1/n2) >= 0.004
    comparison   Welch's t-test of two sets of runs, and a paired one where seeds match, both two-sided
    many         Holm's correction of p-values, intervals by Bonferroni's, and the effect that n pairs would detect

The distributions are scipy's. Standard deviations are of samples (n - 1), intervals hold 95%.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

LEVEL = 0.01                        # of the t-tests
SIGMA, SCORE = 0.0013, 0.004        # track 3's between seeds, and what it asks
LOSS_PER_STEP = 0.0045 / 100        # track 3's exchange rate near 3,300 steps
POWER = 0.8                         # with which a smallest detectable effect is detected
MOST = 100_000                      # further runs than these are none
ROUNDING = 1e-9                     # 3.28 - 3.276 is a little less than 0.004 in binary


class Spread(NamedTuple):
    n: int
    mean: float
    sd: float | None                # None for a single value, as the interval
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """Of one set of values from another; negative where the first has less."""

    n: tuple[int, int]
    mean: float
    low: float
    high: float
    p: float                        # two-sided


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and the 95% interval of the mean, by Student's t."""
    from scipy import stats
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Spread(n, mean, None, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def p_below(losses: Sequence[float], target: float) -> float | None:
    """P-value of the one-sided t-test that the mean is below `target`; None where there is no spread to judge by."""
    from scipy import stats
    if len(set(losses)) < 2:
        return None
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def score(losses: Sequence[float], target: float) -> float:
    """Track 3's (target - mean)·sqrt(n)."""
    return (target - spread(losses).mean) * math.sqrt(len(losses))


def p_of_score(value: float) -> float:
    """P-value of the z-test that a score is."""
    from scipy import stats
    return float(stats.norm.sf(value / SIGMA))


def pairwise(losses: Sequence[float], steps: int, other_losses: Sequence[float], other_steps: int) -> float:
    """Track 3's score for the claim that the first result is better than the other."""
    loss_gained = spread(other_losses).mean - spread(losses).mean
    return ((loss_gained + (other_steps - steps) * LOSS_PER_STEP)
            / math.sqrt(1 / len(losses) + 1 / len(other_losses)))


def reaches(value: float) -> bool:
    """Whether a score is what track 3 asks."""
    return value >= SCORE - ROUNDING


def welch(values: Sequence[float], others: Sequence[float]) -> Difference | None:
    """Of independent values whose variances may differ; None where either set has no spread or one value."""
    from scipy import stats
    if len(set(values)) < 2 or len(set(others)) < 2:
        return None
    found = stats.ttest_ind(values, others, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return Difference((len(values), len(others)), spread(values).mean - spread(others).mean, float(low), float(high),
                      float(found.pvalue))


def gaps(values: dict[int, float], others: dict[int, float]) -> list[float]:
    """The differences of the seeds that both sets have."""
    return [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]


def paired(values: dict[int, float], others: dict[int, float], level: float = 0.95) -> Difference | None:
    """Of the values of seeds that both sets have; None where these are fewer than two, or all differ by the same.

    The interval holds `level`. Of m comparisons all intervals together hold 95% at level 1 - 0.05/m (Bonferroni).
    """
    from scipy import stats
    found = gaps(values, others)
    if len(found) < 2 or max(found) - min(found) <= ROUNDING:
        return None
    test = stats.ttest_1samp(found, 0.0)
    low, high = test.confidence_interval(level)
    return Difference((len(found), len(found)), spread(found).mean, float(low), float(high), float(test.pvalue))


# ---- many comparisons at once, and what they would have seen

def holm(ps: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in their order: rejecting those below a level errs in any with that chance.

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def power_paired(n: int, effect: float, alpha: float) -> float:
    """Chance that a paired t-test of n pairs has p < alpha, two-sided, in the direction of the effect.

    Exact for normal differences: the noncentral t distribution. The other direction adds less than 1e-6 at 80%.

    Args:
        effect: the true mean of the differences in their standard deviations, 0 or above.
    """
    from scipy import stats
    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, effect * math.sqrt(n)))


def detectable(n: int, sd: float, alpha: float) -> float:
    """The mean difference that a paired t-test of n >= 2 pairs would detect with a power of 0.8 at level alpha."""
    from scipy import optimize
    high = 1.0
    while power_paired(n, high, alpha) < POWER:
        high *= 2
    return sd * float(optimize.brentq(lambda effect: power_paired(n, effect, alpha) - POWER, 0.0, high, xtol=1e-9))


# ---- how many more runs would decide it, were mean and standard deviation to stay

def more_below(losses: Sequence[float], target: float) -> int | None:
    """Further runs until the t-test passes; None: not at this mean, or there is no spread to judge by."""
    from scipy import stats
    n, mean, sd = spread(losses)[:3]
    if not sd or mean >= target:
        return None
    return _first(lambda more: stats.t.cdf((mean - target) * math.sqrt(n + more) / sd, n + more - 1) < LEVEL)


def more_score(losses: Sequence[float], target: float) -> int | None:
    """Further runs until track 3's rule passes; None: not at this mean."""
    n, mean = spread(losses)[:2]
    return _first(lambda more: reaches((target - mean) * math.sqrt(n + more))) if mean < target else None


def more_welch(values: Sequence[float], others: Sequence[float]) -> int | None:
    """Further runs of each set until Welch's test has p < 0.01; None: not at these means, or without a spread."""
    from scipy import stats
    a, b = spread(values), spread(others)
    if not a.sd or not b.sd or a.mean == b.mean:
        return None
    return _first(lambda more: stats.ttest_ind_from_stats(
        a.mean, a.sd, a.n + more, b.mean, b.sd, b.n + more, equal_var=False).pvalue < LEVEL)


def more_paired(n: int, sd: float, effect: float, alpha: float) -> int | None:
    """Further pairs of seeds until a mean difference of `effect` is detected with a power of 0.8; None: never."""
    if not sd or not effect:
        return None
    return _first(lambda more: power_paired(n + more, abs(effect) / sd, alpha) >= POWER)


def _first(passes: Callable[[int], bool]) -> int | None:
    """The least number from 0 to MOST that passes, where all above it do; None if there is none."""
    if not passes(MOST):
        return None
    fails, more = -1, MOST
    while more - fails > 1:
        middle = (fails + more) // 2
        fails, more = (fails, middle) if passes(middle) else (middle, more)
    return more
