"""Presets that extend others, and overrides: how several trees become one.

Mappings merge key by key; `optim` merges group by group, by name; any other list replaces the one below it.
`null` goes back to the default. While merging, `optim` is a dict from group name to group, in order.
"""
from difflib import get_close_matches
from pathlib import Path

from harness.keys import group_fields
from harness.yaml_tree import OVERRIDE, ConfigError, Leaf, Tree, describe, origin_of, plain, read_text
from optim import RULES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find(name: str, beside: Path | None = None) -> Path:
    """The file that `name` means, with or without `.yaml`: a path from the folder `beside`, or in configs/.

    Raises:
        ConfigError: there is no such file.
    """
    tries = [(beside or Path()) / name, CONFIGS / name]
    for path in [*tries, *(path.with_name(path.name + ".yaml") for path in tries)]:
        if path.is_file():
            return path
    presets = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")
                     if "sweeps" not in path.parts)
    near = get_close_matches(str(name).removesuffix(".yaml"), presets, n=3)
    top = ", ".join(preset for preset in presets if "/" not in preset)
    raise ConfigError(f"no configuration {name!r}: neither a file nor a preset; "
                      + (f"did you mean {' or '.join(near)}?" if near else f"presets: {top or 'none'}"))


def shown(path: Path) -> str:
    """A path as errors show it: relative to the working directory where it lies in it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Tree]:
    """The tree of a file, merged over what it extends; `children` are the files that extend this one."""
    label = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror}") from None
    tree = read_text(text, label)
    parent = tree.pop("extends", None)
    base = {} if parent is None else _read_parent(parent, path, (*children, path))
    base.pop("name", None)                              # a name is a file's own
    return overlay(base, with_named_groups(tree, label))


def _read_parent(parent: Tree, path: Path, below: tuple[Path, ...]) -> dict[str, Tree]:
    if not isinstance(parent, Leaf) or not isinstance(parent.value, str):
        raise ConfigError(f"{shown(path)}: extends: expected the name of one file, got {describe(parent)}")
    try:
        found = find(parent.value, beside=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{parent.origin.place}: extends: {error}") from None
    if found.resolve() in [file.resolve() for file in below]:
        cycle = " -> ".join(shown(file) for file in (*below, found))
        raise ConfigError(f"{parent.origin.place}: extends goes round in a circle: {cycle}")
    return read(found, below)


def with_named_groups(tree: dict[str, Tree], label: str) -> dict[str, Tree]:
    """The tree with its `optim` list as a dict by name."""
    groups = tree.get("optim")
    if groups is None or is_null(groups):
        return tree
    if not isinstance(groups, list):
        raise ConfigError(f"{label}: optim: expected a list of groups, got {describe(groups)}")
    named = {}
    for position, group in enumerate(groups):
        name = group.get("name") if isinstance(group, dict) else None
        if not isinstance(name, Leaf) or not isinstance(name.value, str):
            place = getattr(origin_of(groups, (position,)), "place", label)
            raise ConfigError(f"{place}: optim.{position}: expected a group with a name, like "
                              "- {name: hidden, params: [q, k], rule: muon, lr: 0.02}")
        if name.value in named:
            raise ConfigError(f"{name.origin.place}: optim: two groups have the name {name.value!r}; "
                              "rename one")
        named[name.value] = group
    return {**tree, "optim": named}


def is_null(tree: Tree) -> bool:
    return isinstance(tree, Leaf) and tree.value is None


def overlay(base: Tree, top: dict[str, Tree], path: tuple = ()) -> dict[str, Tree]:
    """`top` merged over `base`; what is null in `top` is left out."""
    merged = dict(base) if isinstance(base, dict) else {}
    for key, item in top.items():
        if path == ("optim",) and isinstance(item, dict):
            item = _over_group(merged, key, item)
        elif isinstance(item, dict):
            item = overlay(merged.get(key), item, (*path, key))
        elif isinstance(item, list):
            item = [overlay(None, each, (*path, key)) if isinstance(each, dict) else each for each in item]
        if item is None or is_null(item):
            merged.pop(key, None)
        else:
            merged[key] = item
    return merged


def _over_group(groups: dict[str, Tree], name: str, top: dict[str, Tree]) -> dict[str, Tree] | None:
    """The group `name` with `top` merged over it; None where `top` removes it."""
    base, own_name, remove = groups.get(name, {}), top.get("name"), top.get("remove")
    place = getattr(origin_of(top, ()), "place", "")
    if own_name is not None and not is_null(own_name) and plain(own_name) != name:
        raise ConfigError(f"{place}: optim.{name}.name: a group keeps its name; remove it and add another")
    if remove is not None:
        if not isinstance(plain(remove), bool):
            raise ConfigError(f"{place}: optim.{name}.remove: expected true or false, got {describe(remove)}")
        if plain(remove) and not base:
            raise ConfigError(f"{place}: optim.{name}: no such group to remove; "
                              f"groups: {', '.join(groups) or 'none'}")
        if plain(remove):
            return None
        top = {key: item for key, item in top.items() if key != "remove"}
    if isinstance(base, dict) and "rule" in base and "rule" in top:
        base = _without_old_rule(base, plain(top["rule"]))
    return overlay(base, top, ("optim", name))


def _without_old_rule(base: dict[str, Tree], new) -> dict[str, Tree]:
    """A group without the keys of its rule that `new` does not know; overrides stay, to be refused."""
    old = plain(base["rule"])
    if not all(isinstance(rule, str) and rule in RULES for rule in (old, new)):
        return base                                     # refused later
    dropped = group_fields(old).keys() - group_fields(new).keys()
    kept = {key: item for key, item in base.items() if key not in dropped or written_as_override(item)}
    if isinstance(kept.get("scheduled"), dict):
        dropped = set(RULES[old].VARYING) - set(RULES[new].VARYING)
        kept["scheduled"] = {key: item for key, item in kept["scheduled"].items()
                             if key not in dropped or written_as_override(item)}
    return kept


def written_as_override(tree: Tree) -> bool:
    origin = origin_of(tree, ())
    return origin is not None and origin.source == OVERRIDE
