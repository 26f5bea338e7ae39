"""A Config as lines of YAML."""
import dataclasses
import json
import re
from collections.abc import Iterator

import yaml

from harness.yaml_tree import Origin, plain, read_value

PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./*+-]*")       # needs no quotes, if readers take it for text


def lines_of(config) -> list[tuple[str, str]]:
    """(dotted key, line) for each line of YAML; no key ("") where a line only opens a mapping or a list."""
    return list(_lines(dataclasses.asdict(config), "", ""))


def _lines(mapping: dict, above: str, indent: str) -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        here = f"{above}{key}"
        if here == "optim":
            yield "", f"{indent}optim:"
            for group in value:
                yield from _group_lines(group, indent)
        elif isinstance(value, dict) and value:
            yield "", f"{indent}{key}:"
            yield from _lines(value, f"{here}.", f"{indent}  ")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            yield "", f"{indent}{key}:"
            for position, item in enumerate(value):
                yield f"{here}.{position}", f"{indent}  - {_flow(item)}"
        else:
            yield here, f"{indent}{key}: {_flow(value)}"


def _group_lines(group: dict, indent: str) -> Iterator[tuple[str, str]]:
    """A group's keys with its hyperparameters beside them, as the item of a list."""
    flat = {}
    for key, value in group.items():
        flat |= value if key == "hyper" else {key: value}
    mark = "- "
    for key, line in _lines(flat, f"optim.{group['name']}.", f"{indent}    "):
        yield key, f"{indent}  {mark}{line.removeprefix(indent + '    ')}"
        mark = "  "


def _flow(value) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        written = [f"{key}: {_flow(item)}" for key, item in value.items() if item is not None]
        return "{" + ", ".join(written) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        digits = repr(value)                            # 1e-10 would be text to readers of YAML 1.1
        return digits if "." in digits else digits.replace("e", ".0e")
    if isinstance(value, str) and PLAIN_TEXT.fullmatch(value):
        if plain(read_value(value, Origin("", ""))) == value == yaml.safe_load(value):
            return value
    return json.dumps(value, ensure_ascii=False)
