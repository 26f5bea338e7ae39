"""What a sweep tries: the points of a grid, draws of a random search, the changes of a ladder."""
from itertools import product
from typing import NamedTuple

from harness.yaml_tree import ConfigError
from scripts.sweep.parameter import drawn, grid, in_yaml
from scripts.sweep.file import Configuration, Sweep

STARTUP = 10                            # configurations of a Bayesian search that are drawn at random
TRIES_A_DRAW = 100                      # before a random search says that it has no more configurations


class Comparison(NamedTuple):
    """Of a ladder: what a change does."""

    change: str                         # in words
    family: str                         # "all together", "added alone", "left out of all" or "rung"
    of: Configuration
    against: Configuration

    @property
    def with_it(self) -> Configuration:
        return self.against if self.family == "left out of all" else self.of

    @property
    def without(self) -> Configuration:
        return self.of if self.family == "left out of all" else self.against


def configurations(sweep: Sweep) -> list[Configuration]:
    """All that the sweep tries, the baseline first; a larger budget only adds to them. Of bayes, those drawn at random.

    Raises:
        ConfigError: a parameter has no grid, or the budget is larger than what there is to draw.
    """
    if sweep.kind == "ladder":
        found = [each for comparison in comparisons(sweep) for each in (comparison.against, comparison.of)]
        return [each for position, each in enumerate(found) if each not in found[:position]]
    found = [sweep.baseline] if sweep.baseline and sweep.kind == "sweep" else []
    of = {base: _gridded(sweep, base) if sweep.method == "grid" else [each for _, each in draws(sweep, base)]
          for base in sweep.bases}
    if sweep.kind == "compare" and len({len(tried) for tried in of.values()}) > 1:
        sizes = ", ".join(f"{len(tried)} of {base}" for base, tried in of.items())
        raise ConfigError(f"{sweep.path}: grids of different sizes are different tuning budgets: {sizes}; make them "
                          "equal, or take method: random with a budget")
    found += [each for tried in of.values() for each in tried]
    return [each for position, each in enumerate(found) if each not in found[:position]]


def _gridded(sweep: Sweep, base: str) -> list[Configuration]:
    values = []
    for each in sweep.parameters_of(base):
        try:
            values.append(grid(each))
        except ValueError as error:
            raise ConfigError(f"{sweep.path}: parameters.{each.key}: {error}") from None
    keys = [each.key for each in sweep.parameters_of(base)]
    return [Configuration(base, dict(zip(keys, point))) for point in product(*values)]


def draws(sweep: Sweep, base: str) -> list[tuple[int, Configuration]]:
    """Different configurations with the numbers of their draws: what was drawn before is drawn again."""
    found, wanted = [], min(sweep.budget, STARTUP) if sweep.method == "bayes" else sweep.budget
    for number in range(wanted * TRIES_A_DRAW):
        point = Configuration(base, drawn(sweep.parameters_of(base), number))
        if point not in [each for _, each in found]:
            found.append((number, point))
        if len(found) == wanted:
            return found
    raise ConfigError(f"{sweep.path}: {wanted * TRIES_A_DRAW} draws have only {len(found)} different configurations, "
                      f"budget is {sweep.budget}; lower it, or take method: grid")


def comparisons(sweep: Sweep) -> list[Comparison]:
    """Those of a ladder. What sets a key otherwise than an earlier change did is built on it, and leaves with it."""
    base, changes = sweep.baseline, sweep.changes

    def having(names) -> Configuration:
        merged = dict(base.parameters)
        for name in names:
            merged |= changes[name]
        return Configuration(base.base, merged)

    def built_on(name: str) -> list[str]:
        later = list(changes)[list(changes).index(name) + 1:]
        return [other for other in later
                if any(changes[other].get(key, value) != value for key, value in changes[name].items())]

    several = len(changes) > 1
    found = [Comparison("all", "all together", having(changes), base)] if several else []
    found += [Comparison(name, "added alone", having([name]), base) for name in changes]
    for name in changes if several else ():
        gone = [name, *built_on(name)]
        found.append(Comparison(" and ".join(gone), "left out of all",
                                having(other for other in changes if other not in gone), having(changes)))
    for position, name in enumerate(changes if sweep.rungs else ()):
        below = list(changes)[:position]
        found.append(Comparison(name, "rung", having([*below, name]), having(below)))
    return found


def label(each: Configuration, sweep: Sweep) -> str:
    """A short name: of a ladder its changes, else the preset and what is not the same in all of the sweep."""
    if sweep.kind == "ladder":
        known, rungs = {"baseline": sweep.baseline}, 0
        for change, family, of, against in comparisons(sweep):
            if family == "all together":
                known["all"] = of
            elif family == "added alone":
                known[f"+ {change}"] = of
            elif family == "left out of all":
                known[f"all but {change}"] = of
            else:
                rungs += 1
                known[f"first {rungs} of {len(sweep.changes)}"] = of
        return next((name for name, other in known.items() if other == each), in_words(each))
    constant = {p.key for p in sweep.parameters_of(each.base) if p.distribution == "constant"}
    return in_words(Configuration(each.base, {k: v for k, v in each.parameters.items() if k not in constant}))


def in_words(each: Configuration) -> str:
    """`demo/muon.yaml optim.hidden.lr=0.02`"""
    return " ".join([each.base, *(f"{key}={value}" for key, value in each.parameters.items())])
