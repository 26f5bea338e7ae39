"""YAML text as a tree whose leaves remember where they were written.

A tree is a dict of trees, a list of trees, or a `Leaf`. Scalars follow YAML 1.2's core schema, because PyYAML
follows 1.1, reads 3e-4 as text, off as False, 010 as 8, 1:30 as 90, and lets a repeated key win silently.
Here 3e-4 is a number, only true and false are booleans, keys are text, and a repeated key is an error. There
are neither merge keys (<<) nor tags (!!). Source: YAML 1.2.2, section 10.3.2 (https://yaml.org/spec/1.2.2/).
"""
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

import yaml


OVERRIDE = "override"                                   # the source of what the command line says


class ConfigError(ValueError):
    """What is wrong with a configuration, one line a problem."""


class Origin(NamedTuple):
    """Where a value was written."""
    source: str                     # in tables: muon.yaml, override
    place: str                      # in errors: configs/muon.yaml:12, override steps=10


class Leaf(NamedTuple):
    value: Any                      # None, bool, int, float, str, or an empty list
    origin: Origin


Tree = Union[dict, list, Leaf]


class Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""
    yaml_implicit_resolvers = {}


def _to_int(loader, node) -> int:
    return int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10)


def _to_bool(loader, node) -> bool:
    return node.value.lower() == "true"


for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
         "-+.0123456789")):
    whole = re.compile(rf"^(?:{pattern})$")
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, list(first))
Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _to_int)
Yaml12Loader.add_constructor("tag:yaml.org,2002:bool", _to_bool)


def read_text(text: str, path: str) -> dict[str, Tree]:
    """The mapping that a file's text holds; `path` is what errors call the file.

    Raises:
        ConfigError: no YAML, a repeated key, or no mapping; one line with file and line.
    """
    tree = _compose(text, lambda line: Origin(path.rsplit("/", 1)[-1], f"{path}:{line}"))
    if tree is None:
        raise ConfigError(f"{path}: the file is empty; write at least `extends: <preset>.yaml`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected a mapping (key: value), got {describe(tree)}")
    return tree


def read_value(text: str, origin: Origin) -> Tree:
    """The value of an override."""
    tree = _compose(text, lambda line: origin)
    if tree is None:
        raise ConfigError(f"{origin.place}: the value is empty; write null to go back to the default")
    return tree


def _compose(text: str, origin_at) -> Tree | None:
    try:
        loader = Yaml12Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, origin_at, ())
    except yaml.reader.ReaderError as error:
        line = text[:error.position].count("\n") + 1
        character = f"#x{error.character:04x}"
        raise ConfigError(f"{origin_at(line).place}: not YAML: {error.reason} ({character})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{origin_at(mark.line + 1).place}: not YAML: {error.problem}{hint}") from None


def _build(loader, node, origin_at, above: tuple) -> Tree:
    """The tree of one YAML node; `above` are the nodes it lies in, for an alias must not hold itself."""
    origin = origin_at(node.start_mark.line + 1)
    if node in above:
        raise ConfigError(f"{origin.place}: an alias (*) holds itself")
    is_plain = not (isinstance(node, yaml.ScalarNode) and node.style)
    if node.tag != loader.resolve(type(node), node.value, (is_plain, not is_plain)):
        raise ConfigError(f"{origin.place}: tags (!!) are not understood; remove it")
    if isinstance(node, yaml.ScalarNode):
        return Leaf(loader.construct_object(node), origin)
    if isinstance(node, yaml.SequenceNode) and not node.value:
        return Leaf([], origin)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, origin_at, (*above, node)) for item in node.value]
    tree = {}
    for key_node, value_node in node.value:
        key, place = key_node.value, origin_at(key_node.start_mark.line + 1).place
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be text")
        if key in tree:
            raise ConfigError(f"{place}: the key {key!r} is there twice; remove one")
        tree[key] = _build(loader, value_node, origin_at, (*above, node))
    return tree


def plain(tree: Tree) -> Any:
    """The tree without origins: dicts, lists and scalars."""
    if isinstance(tree, dict):
        return {key: plain(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    return tree.value


def at(tree: Tree, path: tuple) -> Tree | None:
    """The tree at `path` (keys and list positions); None where nothing was written."""
    for key in path:
        there = isinstance(tree, dict) and key in tree or isinstance(tree, list) and key in range(len(tree))
        if not there:
            return None
        tree = tree[key]
    return tree


def leaves(tree: Tree | None) -> Iterator[Leaf]:
    """The leaves of a tree, in the order in which they were written."""
    if isinstance(tree, Leaf):
        yield tree
    elif tree is not None:
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(item)


def origin_of(tree: Tree, path: tuple) -> Origin | None:
    """The origin of the first leaf at `path`; None where nothing was written."""
    first = next(leaves(at(tree, path)), None)
    return first and first.origin


def sources_of(tree: Tree, path: tuple) -> list[str]:
    """Every file, and `override`, that the value at `path` has a part from."""
    return list(dict.fromkeys(leaf.origin.source for leaf in leaves(at(tree, path))))


def describe(tree: Tree) -> str:
    """A value as errors quote it."""
    if isinstance(tree, Leaf):
        return "null" if tree.value is None else repr(tree.value).lower() if isinstance(tree.value, bool) \
            else repr(tree.value)
    return "a mapping" if isinstance(tree, dict) else "a list"
