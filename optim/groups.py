r"""Which rule updates which parameter: the `optim` groups of a configuration against the roles of a model.

A group's `params` are any of

    a role             embed, q, mlp_in, ...: every parameter of that role
    rest               every parameter that no other pattern takes
    anything else      a regular expression that must match the whole parameter name: blocks\.0\..*

and every parameter must fall in exactly one group, so that none is optimized, or left alone, by accident.
"""
import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from optim.blocks import Blocks
from optim.schedules import Schedule

REST = "rest"
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
Shapes = dict[str, tuple[int, ...]]


class GroupError(ValueError):
    """The groups do not divide the parameters among themselves; one line a problem."""


@dataclass(frozen=True, config={"extra": "forbid"})
class Group:
    name: Name                              # how overrides, tables and presets that extend this one call it
    params: Patterns                        # roles, `rest`, or regular expressions that match whole names
    rule: str                               # update rule
    hyper: Any                              # the rule with its hyperparameters; in YAML beside these keys
    schedule: Schedule | None = None        # multiplies lr over the run; null = the run's own `schedule`
    scheduled: dict[str, Schedule] = Field(default_factory=dict)  # values over the run, by hyperparameter
    blocks: Blocks = "whole"                # what of a weight is one matrix: all, one head, or two
    cautious: bool = False                  # weight decay only where the step shrinks the weight too
    hyperball: bool = False                 # every matrix keeps its norm; lr is a step's length relative to it

    def __post_init__(self):
        for pattern in self.params:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"params: {pattern!r} is not a regular expression ({error})") from None
        for name, schedule in self.scheduled.items():
            if name == "lr":
                raise ValueError("scheduled.lr: lr follows `schedule`, a factor on it; write it there")
            if schedule.shape != "piecewise":
                raise ValueError(f"scheduled.{name} has shape {schedule.shape!r}, which is a factor on lr; "
                                 "give its values with shape: piecewise")

    @property
    def stacked(self) -> bool:
        """Whether the rule is given matrices rather than elements."""
        return not self.hyper.elementwise or self.hyperball

    def clashes(self) -> Iterator[str]:
        """Options that this rule, as it is set, cannot take or would not read."""
        rule, decays = self.hyper, getattr(self.hyper, "weight_decay", 0.0) > 0 or "weight_decay" in self.scheduled
        if self.cautious and not decays:
            yield ("nothing reads cautious without weight decay: remove cautious, or set weight_decay where the rule "
                   "has it")
        if self.cautious and rule.coupled_decay:
            yield f"{self.rule} adds its decay to the gradient, where it cannot be cautious: remove cautious"
        if self.hyperball and decays:
            yield "nothing reads weight_decay, for hyperball keeps every norm: set weight_decay: 0"
        if self.cautious and self.hyperball:
            yield "hyperball has no weight decay that could be cautious: remove one of the two"
        if (self.cautious or self.hyperball) and rule.confines:
            yield (f"{self.rule} as it is set shrinks the weight in every step, so that cautious and hyperball find "
                   "no step of its own: remove them")
        if self.blocks != "whole" and not self.stacked:
            yield f"nothing reads blocks, for {self.rule} works on elements: remove it"


def assign(groups: tuple[Group, ...], roles: dict[str, str], shapes: Shapes) -> dict[str, list[str]]:
    """The names of each group's parameters, in model order; `roles` and `shapes` have every parameter.

    Raises:
        GroupError: a parameter is in no group or in two, a pattern matches nothing, or a rule for matrices is
            given something else. Every such problem is listed, one a line.
    """
    takers = {name: [group.name for group in groups
                     if any(_matches(pattern, name, role) for pattern in group.params)]
              for name, role in roles.items()}
    orphans = [name for name, names in takers.items() if not names]
    problems = list(_idle_patterns(groups, roles, orphans))
    takes_rest = [group.name for group in groups if REST in group.params]
    takers |= {name: takes_rest for name in orphans}
    if orphans and not takes_rest:
        problems.append(f"in no group: {_listed(orphans, roles)}; name their roles in a group's params, "
                        "or add `rest`")
    for name, names in takers.items():
        if len(names) > 1:
            problems.append(f"parameter {name} (role {roles[name]}) is in two groups, {' and '.join(names)}; "
                            "take it out of one")
    assignment = {group.name: [name for name in roles if group.name in takers[name]] for group in groups}
    for group in groups:
        problems += [f"optim.{group.name}: {clash}" for clash in group.clashes()]
        problems += _not_matrices(group, assignment[group.name], shapes)
    if problems:
        raise GroupError("\n".join(problems))
    return assignment


def _matches(pattern: str, name: str, role: str) -> bool:
    return pattern != REST and (pattern == role or re.fullmatch(pattern, name) is not None)


def _idle_patterns(groups: tuple[Group, ...], roles: dict[str, str], orphans: list[str]) -> Iterator[str]:
    """Patterns that match nothing: a hyperparameter that somebody sets and no parameter feels."""
    known = sorted(set(roles.values()))
    for group in groups:
        for pattern in group.params:
            if pattern == REST and not orphans:
                yield (f"optim.{group.name}: params `rest` is empty, for other groups take every parameter; "
                       "remove it")
            elif pattern != REST and not any(_matches(pattern, name, role) for name, role in roles.items()):
                near = difflib.get_close_matches(pattern, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                yield (f"optim.{group.name}: params {pattern!r} matches no parameter; {hint}"
                       f"roles in this model: {', '.join(known)}")


def _not_matrices(group: Group, names: list[str], shapes: Shapes) -> Iterator[str]:
    for name in names if group.stacked and not group.hyper.takes_vectors else ():
        if len(shapes[name]) != 2 and group.hyper.elementwise:
            yield (f"optim.{group.name}: hyperball is for matrices, but {name} has shape {list(shapes[name])}; "
                   "move it to a group without hyperball")
        elif len(shapes[name]) != 2:
            yield (f"optim.{group.name}: {group.rule} updates matrices, but {name} has shape "
                   f"{list(shapes[name])}; move it to a group whose rule is elementwise, like adamw")


def _listed(names: list[str], roles: dict[str, str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name} (role {roles[name]})" for name in names[:most]) + more
