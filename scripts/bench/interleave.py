"""Two or more things to measure, in turns, and what their ratio can be said to be."""
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

NOISY = 0.05            # standard deviation of the log ratios above which the rounds are called noisy


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean seconds of one of `times` calls, with the device done before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def interleave(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each side measured, a list over rounds each, after one round that does not count.

    The sides take turns, A B B A A B ..., so that a machine that slows down slows all of them alike.
    """
    measured: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for i in range(rounds):
        order = range(len(sides))
        for place in order if i % 2 == 0 else reversed(order):
            measured[place].append(sides[place]())
    return measured


class Ratio(NamedTuple):
    """a / b over paired rounds."""
    mean: float             # geometric
    low: float              # of its 95 % confidence interval
    high: float
    spread: float           # standard deviation of the rounds' log ratios

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1 <= self.high


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """The ratio a / b of paired measurements, two at least, with Student's t interval for the mean of the logs."""
    from scipy import stats                                           # half a second to load
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean, spread = statistics.fmean(logs), statistics.stdev(logs)
    half = stats.t.ppf(0.975, len(logs) - 1).item() * spread / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), spread)


def verdict(found: Ratio) -> list[str]:
    """What may be said of the speeds of A and B, where `found` is A's over B's."""
    lines = [f"{'A faster than B by' if found.mean >= 1 else 'A slower than B by':<30}"
             f"{100 * abs(found.mean - 1):8.2f} %" if found.differs else
             "no difference shown: the interval contains 1 (more --rounds narrow it)"]
    if found.spread > NOISY:
        lines.append(f"warning: the rounds' ratios scatter by {100 * found.spread:.0f} %: a busy machine; "
                     "measure again on a quiet one")
    return lines
