"""From a merged tree to a Config, or to one line for everything that is wrong with it."""
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator

from pydantic import TypeAdapter, ValidationError

from harness.config import Config
from harness.keys import GROUP_KEYS, dotted, meant
from harness.unread import unread
from harness.yaml_tree import OVERRIDE, ConfigError, Leaf, Origin, Tree, at, describe, leaves, plain
from optim import RULES

EXPECTED = {                                            # pydantic's types of error in words
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "text", "tuple_type": "a list", "list_type": "a list",
    "dict_type": "a mapping", "dataclass_type": "a mapping",
}


def validate(tree: dict[str, Tree], label: str) -> Config:
    """The Config that `tree` describes; `label` is the file that errors name where no line is to blame.

    Raises:
        ConfigError: one line a problem: where, which key, what is wrong, what to do.
    """
    problems = list(_not_finite(tree, ()))
    _raise_any(problems, tree, label)                   # pydantic reads JSON, which has no infinities
    groups = tree.get("optim", {})
    hypers = [_parse_hyper(tree, name, problems) for name in groups]
    config = _parse(Config, _as_dataclasses(plain(tree)), tree, (), problems)
    _raise_any(problems, tree, label)
    config = dataclasses.replace(config, optim=tuple(
        dataclasses.replace(group, hyper=hyper) for group, hyper in zip(config.optim, hypers)))
    _raise_any([*unread(config, tree), *_beyond_bounds(config)], tree, label)
    return config


def _beyond_bounds(config: Config) -> Iterator[tuple[tuple, str]]:
    """Scheduled values that the rule would refuse as its own."""
    for group in config.optim:
        for name in group.scheduled.keys() & set(group.hyper.VARYING):
            for value in dict.fromkeys(point.value for point in group.scheduled[name].points):
                try:
                    dataclasses.replace(group.hyper, **{name: value})
                except ValidationError as failure:
                    path = ("optim", group.name, "scheduled", name)
                    said = failure.errors()[0]["msg"].replace("Input should", "must")
                    yield path, f"{dotted(path)}: a value of {value:g}, but it {said}"


def _raise_any(problems: list[tuple[tuple, str]], tree: Tree, label: str) -> None:
    """Raise the problems, each a path and a text that may have several lines."""
    lines = []
    for path, text in problems:
        lines += [f"{_place(tree, path, line) or label}: {line}" for line in text.splitlines()]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def _place(tree: Tree, path: tuple, line: str) -> str | None:
    """Where the cause of a problem at `path` was written; None where that cannot be told.

    For a line about a mapping it is the place of a key that the line names, of an override before all others.
    """
    while at(tree, path) is None:                       # a missing key: the mapping that it belongs in
        path = path[:-1]
    here = at(tree, path)
    named = [_only_origin(at(here, tuple(word.split(".")))) for word in re.findall(r"\w+(?:\.\w+)*", line)]
    known = [origin for origin in named if origin] if isinstance(here, dict) else []
    if not known and path:
        known = [origin for origin in [_only_origin(here)] if origin]
    return min(known, key=lambda origin: origin.source != OVERRIDE).place if known else None


def _only_origin(tree: Tree | None) -> Origin | None:
    """The first origin in a tree that comes from one source; None if it comes from several."""
    origins = [leaf.origin for leaf in leaves(tree)]
    return origins[0] if len({origin.source for origin in origins}) == 1 else None


def _not_finite(tree: Tree, path: tuple) -> Iterator[tuple[tuple, str]]:
    if not isinstance(tree, Leaf):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _not_finite(item, (*path, key))
    elif isinstance(tree.value, float) and not math.isfinite(tree.value):
        yield path, f"{dotted(path)}: expected a finite number, got {tree.value}"


def _as_dataclasses(raw: dict) -> dict:
    """The configuration in the shape of its dataclasses: groups in a list, their hyperparameters left out."""
    if not isinstance(raw.get("optim"), dict):
        return raw
    groups = [{"hyper": None, **{key: value for key, value in group.items() if key in GROUP_KEYS}}
              if isinstance(group, dict) else group for group in raw["optim"].values()]
    return {**raw, "optim": groups}


def _parse_hyper(tree: Tree, name: str, problems: list):
    """The rule of a group with its hyperparameters; None, and more `problems`, if they are wrong."""
    group = plain(tree["optim"][name])
    rule = group.get("rule") if isinstance(group, dict) else None
    if not isinstance(rule, str):
        return None                                     # Config's own validation says so
    if rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        problems.append((("optim", name, "rule"),
                         f"optim.{name}.rule: unknown rule {rule!r}; {hint}rules: {', '.join(RULES)}"))
        return None
    hyper = {key: value for key, value in group.items() if key not in GROUP_KEYS}
    return _parse(RULES[rule], hyper, tree, ("optim", name), problems)


def _parse(cls, raw: dict, tree: Tree, above: tuple, problems: list):
    """`raw`, which stands at `above` in the tree, as a `cls`; None, and more `problems`, if it is not one."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(raw), strict=True)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
    by_path: dict[tuple, list] = {}
    for error in errors:
        path = (*above, *_path_in(raw, error))
        if path[:1] == ("optim",) and len(path) > 1 and isinstance(path[1], int):
            path = ("optim", list(tree["optim"])[path[1]], *path[2:])
        by_path.setdefault(path, []).append(error)
    for path, errors in sorted(by_path.items(), key=lambda item: item[1][0]["type"] == "missing"):
        goes_deeper = any(other[:len(path)] == path and other != path for other in by_path)
        if not (goes_deeper and all(map(_expected, errors))):       # a union's other alternatives
            problems.append((path, _words(errors, path, tree)))
    return None


def _path_in(raw, error: dict) -> tuple:
    """Where in `raw` an error of pydantic's is; its location also names the alternatives of unions."""
    path = ()
    for key in error["loc"]:
        if isinstance(raw, dict) and key in raw or isinstance(raw, list) and key in range(len(raw)):
            path, raw = (*path, key), raw[key]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


def _words(errors: list[dict], path: tuple, tree: Tree) -> str:
    """One text for all that pydantic says about the value at `path`."""
    key = dotted(path)
    if all(map(_expected, errors)):
        expected, value = " or ".join(dict.fromkeys(map(_expected, errors))), at(tree, path)
        return f"{key}: expected {expected}, got {describe(value)}{_hint(expected, value)}"
    error = next(error for error in errors if not _expected(error))
    if error["type"] == "value_error":
        lines = str(error["ctx"]["error"]).splitlines()
        return "\n".join(f"{key}: {line}" if key else line for line in lines)
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}; {meant(path, _rule_of(path, tree))}"
    if error["type"] == "too_short":
        return f"{key}: expected {error['ctx']['min_length']} or more, got {error['ctx']['actual_length']}"
    return f"{key}: {error['msg'].replace('Input should', 'must')}, got {describe(at(tree, path))}"


def _expected(error: dict) -> str | None:
    """What would have been right, for an error that says that a value is of the wrong kind."""
    return error["ctx"]["expected"] if error["type"] == "literal_error" else EXPECTED.get(error["type"])


def _hint(expected: str, value: Tree) -> str:
    if expected == "text" and isinstance(value, Leaf):
        return "; put it in quotes"
    whole = isinstance(value, Leaf) and isinstance(value.value, float) and value.value.is_integer()
    return f"; write {int(value.value)}" if expected.startswith("a whole number") and whole else ""


def _rule_of(path: tuple, tree: Tree) -> str | None:
    """The rule of the group that holds the key at `path`, if it is a key of a group's own."""
    if len(path) != 3 or path[0] != "optim":
        return None
    rule = plain(tree["optim"][path[1]].get("rule", Leaf(None, None)))
    return rule if isinstance(rule, str) and rule in RULES else None
