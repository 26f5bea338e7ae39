"""The keys of a configuration, read off its dataclasses: which exist, which are switches, which was meant."""
import dataclasses
import difflib
import functools
import types
import typing

from harness.config import Config
from optim import RULES
from optim.groups import Group

GROUP_KEYS = tuple(field.name for field in dataclasses.fields(Group) if field.name != "hyper")


def unwrapped(hint) -> list:
    """The alternatives of a type: `Annotated[A, ...] | tuple[B, ...] | None` -> [A, tuple[B, ...]]."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return unwrapped(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [part for arg in typing.get_args(hint) for part in unwrapped(arg)]
    return [] if hint is type(None) else [hint]


@functools.cache
def fields(cls) -> dict[str, typing.Any]:
    """Key -> type of a configuration dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def group_fields(rule: str | None) -> dict[str, typing.Any]:
    """Key -> type of an optim group: the common keys and those of `rule` (None: of every rule)."""
    keys = {key: fields(Group)[key] for key in GROUP_KEYS}
    for each in [RULES[rule]] if rule else RULES.values():
        keys |= fields(each)
    return keys


def known_below(path: tuple, rule: str | None = None) -> dict[str, typing.Any]:
    """Key -> type of what a mapping at `path` may hold; empty where any key is allowed or none."""
    hint = Config
    for depth, key in enumerate(path):
        if depth == 1 and path[0] == "optim":
            hint = Group
            continue
        known = _keys_of(hint, rule)
        if key in known:
            hint = known[key]
        elif not isinstance(key, int) and not _is_dict(hint):
            return {}                           # neither a position in a list nor a key that the user chooses
    return _keys_of(hint, rule)


def _is_dict(hint) -> bool:
    return any(typing.get_origin(part) is dict for part in unwrapped(hint))


def _keys_of(hint, rule: str | None) -> dict[str, typing.Any]:
    """The keys of the dataclasses in a type, also of those in its lists and mappings."""
    found = {}
    for part in unwrapped(hint):
        if part is Group:
            found |= group_fields(rule)
        elif dataclasses.is_dataclass(part):
            found |= fields(part)
        for arg in typing.get_args(part) if typing.get_origin(part) in (tuple, dict) else ():
            found |= _keys_of(arg, rule) if arg is not Ellipsis else {}
    return found


def dataclasses_in(hint) -> list[type]:
    """The configuration dataclasses that a type is made of, itself first, each once."""
    found = []
    queue = [hint]
    while queue:
        for part in unwrapped(queue.pop(0)):
            if dataclasses.is_dataclass(part) and part not in found:
                found.append(part)
                queue += fields(part).values()
            queue += typing.get_args(part) if typing.get_origin(part) in (tuple, dict) else ()
    return found


def is_switch(path: tuple) -> bool:
    """Whether the key at `path` is a boolean, which `--key` and `--no-key` set."""
    return bool in unwrapped(known_below(path[:-1]).get(path[-1]))


@functools.cache
def _everywhere() -> dict[str, str]:
    """Last component -> dotted key, of every key of a configuration."""
    found = {}
    queue = [(Config, ())]                              # breadth first: the key nearest the top wins
    while queue:
        hint, above = queue.pop(0)
        for key, below in _keys_of(hint, None).items():
            found.setdefault(key, dotted((*above, key)))
            queue.append((below, (*above, key, "<group>") if key == "optim" else (*above, key)))
    return found


def meant(path: tuple, rule: str | None = None) -> str:
    """What to write instead of the unknown key at `path`, to end an error line; `rule` is its group's."""
    *above, key = path
    known, everywhere = known_below(tuple(above), rule), _everywhere()
    if rule:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {dotted((*above, near[0]))!r}? " if near else ""
        return f"{hint}{rule} knows {', '.join(fields(RULES[rule]))}"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):       # step, where steps is known
        return f"did you mean {dotted((*above, near[0]))!r}?"
    if key in everywhere and key not in known:
        return f"did you mean {everywhere[key]!r}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {dotted((*above, near[0]))!r}?"
    if near := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75):
        return f"did you mean {everywhere[near[0]]!r}?"
    return f"known here: {', '.join(known)}"


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))
