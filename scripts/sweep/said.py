"""What a sweep file says and where: its keys, the lines where they stand, and that wandb reads the same."""
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.yaml_tree import ConfigError, Tree, at, origin_of, plain, read_text

OURS = ("base", "seeds", "budget", "baseline", "spaces", "tuning_seeds", "changes", "rungs")
READ = ("method", "metric", "parameters", "run_cap", "controller", "early_terminate")
WANDBS = ("program", "command", "name", "description", "project", "entity", "apiVersion", "kind")   # nothing to us
REFUSED = {
    "scheduler": "the sweep schedules its own trials; remove it",
    "metrics": "one metric ranks a sweep; write metric",
    "job": "wandb's Launch is not here; remove it", "image_uri": "wandb's Launch is not here; remove it"}
NEEDS = "a sweep file needs method, base and parameters, like configs/sweeps/demo_muon_lr.yaml (docs/sweeps.md)"


class Said(NamedTuple):
    """What a file says, and where."""

    path: Path
    tree: Tree
    plain: dict[str, Any]

    def at(self, key: str) -> tuple[str, ...]:
        """The path to a key; ours may stand under `controller`."""
        beside = self.plain.get("controller", {})
        return ("controller", key) if key in OURS and key not in self.plain and key in beside else (key,)

    def __contains__(self, key: str) -> bool:
        return self.at(key) != (key,) or key in self.plain

    def get(self, key: str, default: Any = None) -> Any:
        at = self.at(key)
        return self.plain[at[0]][key] if len(at) > 1 else self.plain.get(key, default)

    def place(self, *path: str) -> str:
        return getattr(origin_of(self.tree, path), "place", str(self.path))

    @property
    def is_preset(self) -> bool:
        """Whether it is a run's configuration, in place of a sweep file."""
        return not self.plain.keys() & {"method", "parameters"} \
            and bool(self.plain.keys() & {"extends", "model", "optim", "steps"})

    def places(self) -> dict[str, str]:
        """Dotted key, or preset -> where the file names it first."""
        found = {}

        def note(*path: str, above: str = "") -> None:
            mapping = at(self.tree, path)
            for name, item in mapping.items() if isinstance(mapping, dict) else ():
                if isinstance(item, dict) and item.keys() == {"parameters"}:
                    note(*path, name, "parameters", above=f"{above}{name}.")
                else:
                    found.setdefault(f"{above}{name}", self.place(*path, name))
        note("parameters")
        for key in ("baseline", "changes", "spaces"):
            note(*self.at(key))
            if key != "baseline" and isinstance(self.get(key), dict):
                for name in self.get(key):
                    note(*self.at(key), name)
        if self.get("base"):
            found[self.get("base")] = self.place(*self.at("base"))
        return found

    def refusal(self, problem: str, *path: str) -> ConfigError:
        return ConfigError(f"{self.place(*path)}: {'.'.join(path)}: {problem}")


def read_said(path: Path) -> Said:
    """What a file says.

    Raises:
        ConfigError: it cannot be read, is no YAML, has other keys than a sweep file, or wandb would take it otherwise.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}; {NEEDS}") from None
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; {NEEDS}")
    tree = read_text(text, str(path))
    said = Said(path, tree, plain(tree))
    if not said.is_preset:
        _same_for_wandb(text, tree)
        _check_keys(said)
    return said


def _check_keys(said: Said) -> None:
    for key in said.plain:
        if key in REFUSED:
            raise said.refusal(REFUSED[key], key)
        if key not in (*OURS, *READ, *WANDBS):
            raise said.refusal(f"no such key; there are {', '.join((*READ, *OURS))}, and of wandb's alone "
                               f"{', '.join(WANDBS)}", key)
    beside = said.plain.get("controller", {})
    if not isinstance(beside, dict) or beside.keys() - {"type", *OURS}:
        raise said.refusal(f"expected a mapping of type, {', '.join(OURS)}", "controller")
    if twice := [key for key in OURS if key in said.plain and key in beside]:
        raise said.refusal("is there twice, at the top and under controller; remove one", twice[0])
    if empty := [key for key in (*READ, *OURS) if key in said and said.get(key) is None]:
        raise said.refusal("nothing stands behind it; write what it should be, or remove it", *said.at(empty[0]))


def _same_for_wandb(text: str, tree: Tree) -> None:
    """Refuse what wandb's reader, which follows YAML 1.1, takes for something else: 3e-4 for text, off for False."""
    def differ(ours: Any, theirs: Any, path: tuple) -> None:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key, value in ours.items():
                if key not in theirs:                                   # 5, on
                    place = getattr(origin_of(tree, (*path, key)), "place", "")
                    raise ConfigError(f"{place}: {'.'.join(map(str, (*path, key)))}: the key {key} is no text to "
                                      "wandb; put it in quotes")
                differ(value, theirs[key], (*path, key))
        elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            for position, value in enumerate(ours):
                differ(value, theirs[position], (*path, position))
        elif type(ours) is not type(theirs) or ours != theirs and ours == ours:         # nan is not what it is
            place = getattr(origin_of(tree, path), "place", "")
            hint = "; write 3.0e-4 for 3e-4" if isinstance(ours, float) else "; put it in quotes"
            raise ConfigError(f"{place}: {'.'.join(map(str, path))}: {ours!r} is {theirs!r} to wandb{hint}")
    try:
        theirs = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    differ(plain(tree), theirs, ())
