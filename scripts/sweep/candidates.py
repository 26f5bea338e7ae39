"""What a sweep tries: the points of a grid, draws of a random search, the changes of a ladder."""
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

from harness.yaml_tree import ConfigError
from scripts.sweep.file import Configuration, Sweep
from scripts.sweep.parameter import different, drawn, grid, in_yaml

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
        ConfigError: a parameter has no grid, the budget is larger than what there is to draw, or changes say the same
            key in two ways.
    """
    if sweep.kind == "ladder":
        _check_alike(sweep)
        return _each_once(each for asked in comparisons(sweep) for each in (asked.against, asked.of))
    found = [sweep.baseline] if sweep.baseline and sweep.kind == "sweep" else []
    of = {base: _gridded(sweep, base) if sweep.method == "grid" else [each for _, each in draws(sweep, base)]
          for base in sweep.bases}
    if sweep.kind == "compare" and len({len(tried) for tried in of.values()}) > 1:
        sizes = ", ".join(f"{len(tried)} of {base}" for base, tried in of.items())
        raise ConfigError(f"{sweep.path}: grids of different sizes are different tuning budgets: {sizes}; make them "
                          "equal, or take method: random with a budget")
    return _each_once([*found, *(each for tried in of.values() for each in tried)])


def _each_once(found: Iterable[Configuration]) -> list[Configuration]:
    once = {}
    for each in found:
        once.setdefault(_frozen(each), each)
    return list(once.values())


def _frozen(value: Any) -> Any:
    """Equal, and with equal hashes, for what is equal."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(item)) for key, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


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
    parameters, found = sweep.parameters_of(base), {}
    wanted = min(sweep.budget, STARTUP) if sweep.method == "bayes" else sweep.budget
    for number in range(wanted * TRIES_A_DRAW if different(parameters) >= wanted else 0):
        point = Configuration(base, drawn(parameters, number))
        found.setdefault(_frozen(point), (number, point))
        if len(found) == wanted:
            return list(found.values())
    there = f"{wanted * TRIES_A_DRAW} draws have only {len(found)}" if found else \
        f"{base} has only {different(parameters)}"
    raise ConfigError(f"{sweep.path}: {there} different configurations, budget is {sweep.budget}; lower it, or take "
                      "method: grid")


def comparisons(sweep: Sweep) -> list[Comparison]:
    """Those of a ladder. What sets a key otherwise than an earlier change did is built on it, and leaves with it, as
    does what is built on that."""
    base, changes = sweep.baseline, sweep.changes

    def having(names: Iterable[str]) -> Configuration:
        merged = dict(base.parameters)
        for name in names:
            for key, value in changes[name].items():
                merged[key] = _over(merged.get(key), value)
        return Configuration(base.base, merged)

    def with_what_is_built_on(name: str) -> list[str]:
        found = [name]
        for other in list(changes)[list(changes).index(name) + 1:]:
            if any(_differ(changes[each], changes[other]) for each in found):
                found.append(other)
        return found

    several = len(changes) > 1
    found = [Comparison("all", "all together", having(changes), base)] if several else []
    found += [Comparison(name, "added alone", having([name]), base) for name in changes]
    for name in changes if several else ():
        gone = with_what_is_built_on(name)
        found.append(Comparison(" and ".join(gone), "left out of all",
                                having(other for other in changes if other not in gone), having(changes)))
    for position, name in enumerate(changes if sweep.rungs else ()):
        below = list(changes)[:position]
        found.append(Comparison(name, "rung", having([*below, name]), having(below)))
    return found


def _over(below: Any, above: Any) -> Any:
    """What two overrides of one key say one after the other: mappings merge, groups of `optim` by name."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _over(below.get(key), value) for key, value in above.items()}
    if _is_groups(below) and _is_groups(above):
        return list(_over(*({group["name"]: group for group in groups} for groups in (below, above))).values())
    return above


def _is_groups(value: Any) -> bool:
    names = [each.get("name") for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    return bool(names) and len(names) == len(value) and all(isinstance(name, str) for name in names) \
        and len(set(names)) == len(names)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that an override says; groups of `optim` by name."""
    if _is_groups(value):
        value = {group["name"]: group for group in value}
    if isinstance(value, dict) and value and value.get("remove") is not True:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value


def _differ(change: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether they set one key to different values, or one sets a part of what the other sets as a whole."""
    said, said_later = ([leaf for item in each.items() for leaf in _leaves(*item)] for each in (change, later))
    return any(key == other and value != item or key.startswith(f"{other}.") or other.startswith(f"{key}.")
               for key, value in said for other, item in said_later)


def _check_alike(sweep: Sweep) -> None:
    """Which of two changes has the last word follows from their order only where they write a key the same way."""
    for (one, change), (two, later) in combinations(sweep.changes.items(), 2):
        for key, other in product(change, later):
            if key != other and _differ({key: change[key]}, {other: later[other]}):
                raise ConfigError(f"{sweep.place(other)}: changes.{two}: {other} says otherwise what {key} says in "
                                  f"{one}; write both the same way")


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
    return " ".join([each.base, *(f"{key}={in_yaml(value)}" for key, value in each.parameters.items())])
