"""From `--config muon.yaml key=value ...` to a validated Config and where each of its values came from."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.config import Config
from harness.emit import lines_of
from harness.merge import find, read, shown
from harness.overrides import apply, parse
from harness.validate import validate
from harness.yaml_tree import ConfigError as ConfigError
from harness.yaml_tree import Leaf, Origin, sources_of

DEFAULT = "default"


class Loaded(NamedTuple):
    config: Config
    origins: dict[str, str]                 # dotted key, groups by their names -> file, override, variant or default
    path: Path                              # of the file
    text: str                               # of the file, as it was read


def load(config: str, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration that a command line asks for.

    Args:
        config: path of a YAML file, or name of one in configs/, with or without `.yaml`.
        overrides: the rest of the command line, see harness/overrides.py.
    Raises:
        ConfigError: one line for each problem: where, which key, what is wrong, what to do.
    """
    path = find(config)
    tree = read(path)
    for override in parse(overrides):
        tree = apply(tree, override)
    tree.setdefault("name", Leaf(path.stem, Origin("file name", shown(path))))
    config = validate(tree, shown(path))
    variants = _set_by_variants(config)
    origins = {key: _source(tree, key) or variants.get(key, DEFAULT) for key, _ in lines_of(config) if key}
    return Loaded(config, origins, path, path.read_text(encoding="utf-8"))


def _source(tree, key: str) -> str:
    """Where the value at `key` was written, or nothing."""
    sources = sources_of(tree, tuple(int(part) if part.isdecimal() else part for part in key.split(".")))
    return ", ".join(sources)


def _set_by_variants(config: Config) -> dict[str, str]:
    """Dotted key -> `variant NAME` of the hyperparameters that a rule's variant sets (optim/variants.py)."""
    return {f"optim.{group.name}.{key}": f"variant {group.hyper.variant}" for group in config.optim
            for key in getattr(group.hyper, "VARIANTS", {}).get(getattr(group.hyper, "variant", None), ())}


def format_resolved(loaded: Loaded) -> str:
    """The resolved configuration in the order of its fields, with the origin of every value in a comment."""
    lines = lines_of(loaded.config)
    width = min(72, max(len(line) for _, line in lines))
    return "\n".join(f"{line:<{width}}  # {loaded.origins[key]}" if key else line for key, line in lines)
