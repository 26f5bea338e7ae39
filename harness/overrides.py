"""Command-line overrides: `key=value`, `--key=value`, `--key value`, and `--key`, `--no-key` for switches.

Keys are dotted: `model.layers=6`, `optim.hidden.lr=0.02`, `optim.0.lr=0.02`, `val_every.1.every=25`; after
`--` a hyphen may stand for an underscore. Values are YAML, as in the files. The last one wins.
"""
import difflib
from collections.abc import Sequence
from typing import NamedTuple

from harness.keys import dotted, is_switch
from harness.merge import overlay, with_named_groups
from harness.yaml_tree import OVERRIDE, ConfigError, Origin, Tree, read_value


class Override(NamedTuple):
    path: tuple[str, ...]
    value: Tree
    origin: Origin


def parse(words: Sequence[str]) -> list[Override]:
    """The overrides on a command line.

    Raises:
        ConfigError: a word that is no override, or a value that is not YAML.
    """
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if "=" in word and not word.startswith("="):
            key, value = word.split("=", 1)
            found.append(_override(key, value, word))
        elif not word.startswith("--") or word == "--":
            raise ConfigError(f"override {word}: expected key=value or --key value")
        elif is_switch(_path(word)) and not (rest and rest[0].lower() in ("true", "false", "null")):
            found.append(_override(word, "true", word))
        elif word.startswith("--no-") and is_switch(_path(word.replace("--no-", "--", 1))):
            found.append(_override(word.replace("--no-", "--", 1), "false", word))
        elif not rest or rest[0].startswith("--"):
            raise ConfigError(f"override {word}: expected a value behind it")
        else:
            value = rest.pop(0)
            found.append(_override(word, value, f"{word} {value}"))
    return found


def _path(key: str) -> tuple[str, ...]:
    return tuple((key.removeprefix("--").replace("-", "_") if key.startswith("--") else key).split("."))


def _override(key: str, value: str, written: str) -> Override:
    origin = Origin(OVERRIDE, f"override {written}")
    if not all(_path(key)):
        raise ConfigError(f"{origin.place}: {key!r} is not a key")
    return Override(_path(key), read_value(value, origin), origin)


def apply(tree: dict[str, Tree], override: Override) -> dict[str, Tree]:
    """The tree with one override laid over it."""
    path, value, origin = override
    if path == ("optim",):
        return overlay(tree, with_named_groups({"optim": value}, origin.place))
    if path[0] == "optim":
        path = ("optim", _group_name(tree, path[1], origin), *path[2:])
    return overlay(tree, _nested(tree, path, 0, value, origin))


def _group_name(tree: dict[str, Tree], key: str, origin: Origin) -> str:
    """The name of the group that an override calls by name or position."""
    names = list(tree.get("optim", {}))
    if key.isdecimal() and int(key) < len(names):
        return names[int(key)]
    if key in names:
        return key
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(f"{position} {name}" for position, name in enumerate(names)) or "none"
    raise ConfigError(f"{origin.place}: optim has no group {key!r}; {hint}groups: {listed}")


def _nested(tree: Tree | None, path: tuple, depth: int, value: Tree, origin: Origin) -> Tree:
    """`value` under the mappings and in the lists that path[depth:] names; `tree` is what stands there."""
    if depth == len(path):
        return value
    key = path[depth]
    if not isinstance(tree, list):
        below = tree.get(key) if isinstance(tree, dict) else None
        return {key: _nested(below, path, depth + 1, value, origin)}
    if not key.isdecimal() or int(key) >= len(tree):
        raise ConfigError(f"{origin.place}: {dotted(path[:depth])} is a list of {len(tree)}; "
                          f"there is no {key!r} in it")
    position = int(key)
    item = _nested(tree[position], path, depth + 1, value, origin)
    item = overlay(tree[position], item) if isinstance(item, dict) else item
    return [*tree[:position], item, *tree[position + 1:]]
