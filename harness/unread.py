"""Keys that a configuration sets and that nothing reads: an experiment that was not made, so an error.

A dataclass says when a key of its own is read: READ_WHEN = {"rotary_base": {"positions": ("rotary",)}} means
that `rotary_base` is read only while `positions` is one of these values. What is at its default is no claim.
"""
import dataclasses
from collections.abc import Iterator

from harness.config import Config
from harness.keys import dotted
from harness.yaml_tree import Tree

REMEDY = "remove it, or set it to null where it is inherited"


def unread(config: Config, tree: dict[str, Tree]) -> Iterator[tuple[tuple, str]]:
    """Path and text of every key that is set in `tree`, to something else than its default, and not read."""
    yield from _unread_in(config, tree, ())
    for group in config.optim:
        path = ("optim", group.name)
        below = tree["optim"][group.name]
        yield from _unread_in(group.hyper, below, path)
        yield from _unread_in(group, below, path)
        yield from _unread_beside_schedules(group, below, path)
    if _is_set(config, tree, "schedule") and all(group.schedule for group in config.optim):
        yield ("schedule",), f"schedule is not read, for every optim group has its own; {REMEDY}"


def _unread_in(value, tree: Tree, path: tuple) -> Iterator[tuple[tuple, str]]:
    """What is unread in a dataclass and in those it holds (but not in optim groups)."""
    if isinstance(value, tuple) and isinstance(tree, list):
        for position, (item, below) in enumerate(zip(value, tree)):
            yield from _unread_in(item, below, (*path, position))
    if isinstance(value, dict) and isinstance(tree, dict):
        for key in value.keys() & tree.keys():
            yield from _unread_in(value[key], tree[key], (*path, key))
    if not dataclasses.is_dataclass(value) or not isinstance(tree, dict):
        return
    for key, conditions in getattr(type(value), "READ_WHEN", {}).items():
        for other, values in conditions.items():
            if _is_set(value, tree, key) and getattr(value, other) not in values:
                yield (*path, key), (f"{dotted((*path, key))} is not read while {other} is "
                                     f"{_text(getattr(value, other))}, only while it is "
                                     f"{' or '.join(map(_text, values))}; {REMEDY}")
    for key in [field.name for field in dataclasses.fields(value) if field.name in tree]:
        yield from _unread_in(getattr(value, key), tree[key], (*path, key))


def _unread_beside_schedules(group, tree: dict[str, Tree], path: tuple) -> Iterator[tuple[tuple, str]]:
    varying = [name for name in group.hyper.VARYING if name != "lr"]
    for name in group.scheduled:
        here = (*path, "scheduled", name)
        if name not in varying:
            yield here, (f"{dotted(here)} is not read, for {group.rule} varies "
                         f"{', '.join(varying) or 'nothing but lr'}; remove it")
        elif idle := [other for other, values in getattr(group.hyper, "READ_WHEN", {}).get(name, {}).items()
                      if getattr(group.hyper, other) not in values]:
            yield here, (f"{dotted(here)} is not read while {idle[0]} is {_text(getattr(group.hyper, idle[0]))}; "
                         "remove it")
        elif _is_set(group.hyper, tree, name):
            here = (*path, name)
            yield here, f"{dotted(here)} is not read, for scheduled.{name} gives its values; {REMEDY}"


def _is_set(value, tree: dict[str, Tree], key: str) -> bool:
    """Whether `key` of a dataclass is written down and is not its default (one without a default is read)."""
    field = type(value).__pydantic_fields__[key]
    default = field.get_default(call_default_factory=True)
    return key in tree and not field.is_required() and getattr(value, key) != default


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
