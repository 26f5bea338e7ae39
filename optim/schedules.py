"""A value over the run, as a pure function of the step: learning-rate shapes and piecewise-linear curves.

`step` counts completed updates, so the first update of a run asks for at(0). N is the length in steps.

    warm-up     (s+1)/w                         the first update already moves (llm.c: lr(0) = 6e-4/700)
    wsd         1, then x·1 + (1-x)·floor with x = ((N-s)/c)^power over the last c steps ("warm-up, stable, decay",
                Hägele et al., arXiv:2405.18392; the speedrun's form, with its floor)
    cosine      floor + (1-floor)·(1 + cos πp)/2 with p = (s-w)/(N-w)  (Loshchilov & Hutter, arXiv:1608.03983,
                in llm.c's form)
    piecewise   straight lines between points, constant before the first and after the last

A learning rate's schedule is a factor on `lr`. Any other hyperparameter's is the value itself: `piecewise`.
"""
import math
from bisect import bisect_right
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

Steps = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class Point:
    """One corner of a piecewise-linear curve."""
    value: float                                         # value at this point
    step: Steps | None = None                            # where, in steps
    frac: Fraction | None = None                         # where, as a fraction of the schedule's length

    def __post_init__(self):
        if (self.step is None) == (self.frac is None):
            raise ValueError("a point needs exactly one of 'step' and 'frac'")


@dataclass(frozen=True, config={"extra": "forbid"})
class Schedule:
    """How a hyperparameter changes over the run; constant 1 by default."""
    shape: Literal["wsd", "cosine", "piecewise"] = "wsd"  # wsd: warm-up, stable, linear decay
    length: Annotated[int, Field(gt=0)] | None = None    # steps the shape spans; null: the run's steps
    warmup_steps: Steps = 0                              # steps of linear warm-up
    cooldown_steps: Steps | None = None                  # steps of linear decay at the end
    cooldown_frac: Fraction | None = None                # the same as a fraction of the length
    floor: Fraction = 0.0                                # final value, as a fraction of the peak
    power: Annotated[float, Field(gt=0)] = 1.0           # of wsd's x over its cool-down; 1: a straight line
    points: tuple[Point, ...] = ()                       # corners of the piecewise curve, in order

    READ_WHEN: ClassVar[dict[str, dict[str, tuple]]] = {
        "warmup_steps": {"shape": ("wsd", "cosine")},
        "cooldown_steps": {"shape": ("wsd",)},
        "cooldown_frac": {"shape": ("wsd",)},
        "floor": {"shape": ("wsd", "cosine")},
        "power": {"shape": ("wsd",)},
        "points": {"shape": ("piecewise",)},
    }

    def __post_init__(self):
        if self.cooldown_steps is not None and self.cooldown_frac is not None:
            raise ValueError("'cooldown_steps' and 'cooldown_frac' say the same thing: give one of them")
        if self.shape == "piecewise" and not self.points:
            raise ValueError("shape 'piecewise' needs 'points', for example [{step: 0, value: 0.85}, ...]")
        if self.shape == "piecewise" and self.length and all(p.frac is None for p in self.points):
            raise ValueError("nothing reads 'length', since every point has a 'step': remove it")

    def at(self, step: int, run_steps: int) -> float:
        """The value that the update after `step` completed ones uses.

        Raises:
            ValueError: piecewise points are out of order for this length.
        """
        length = self.length or run_steps
        if self.shape == "piecewise":
            return self._piecewise(step, length)
        if step < self.warmup_steps and self.shape == "cosine":
            return (step + 1) / self.warmup_steps
        if self.shape == "cosine":
            return self._cosine(step, length)
        # Where a shortened run makes warm-up and cool-down overlap, the lower of the two counts.
        warmup = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return min(warmup, self._cooldown(step, length))

    def _cooldown(self, step: int, length: int) -> float:
        steps = self.cooldown_frac * length if self.cooldown_frac is not None else self.cooldown_steps
        if not steps:
            return 1.0
        x = min(1.0, max(0.0, (length - step) / steps)) ** self.power
        return x + (1 - x) * self.floor

    def _cosine(self, step: int, length: int) -> float:
        decaying = length - self.warmup_steps
        p = min(1.0, (step - self.warmup_steps) / decaying) if decaying > 0 else 1.0
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * p))

    def _piecewise(self, step: int, length: int) -> float:
        places = [p.step if p.step is not None else p.frac * length for p in self.points]
        if any(later < earlier for earlier, later in zip(places, places[1:])):
            raise ValueError(f"'points' must come in order, but lie at steps {places} of {length}")
        after = bisect_right(places, step)               # two points at one place make a jump, to the second
        if after in (0, len(places)):
            return self.points[max(0, after - 1)].value
        (s0, s1), (y0, y1) = places[after - 1:after + 1], (p.value for p in self.points[after - 1:after + 1])
        return y0 + (y1 - y0) * (step - s0) / (s1 - s0)
