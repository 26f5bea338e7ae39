"""A sweep file: the YAML that `wandb sweep` takes, and keys of our own.

    method: grid                        # random, bayes; everything but OURS is wandb's
    base: demo/muon.yaml                # the preset; in wandb's own words: parameters: {config: {value: ...}}
    seeds: [0, 1, 2]                    # every configuration runs with each; wandb's: parameters: {seed: {values: ...}}
    budget: 20                          # random, bayes: configurations to try for each preset; run_cap counts trials
    baseline: {optim.hidden.lr: 0.02}   # what the table compares to: these over the preset and every `value` below
    metric: {name: val/loss, goal: minimize}
    parameters:
      optim.hidden.lr: {distribution: log_uniform_values, min: 0.005, max: 0.08}
      model: {parameters: {layers: {values: [2, 4]}}}               # nested or dotted, as one likes

A comparison of optimizers: every preset is tuned alike in a space of its own, then its best runs with other seeds.

    spaces: {demo/adamw.yaml: {optim.hidden.lr: {min: ..., max: ...}}, demo/muon.yaml: {...}}      # over parameters
    tuning_seeds: [100]                 # those of the search; `seeds` are those that are reported
    baseline: {config: demo/adamw.yaml} # the preset that the others are compared with

A ladder: changes to the baseline, each alone and each left out of all; `rungs: true` adds them up in their order, too.

    changes: {softcap: {model.softcap: {form: tanh, cap: 30}}, value residual: {model.value_residual: fixed}}

At the top wandb warns of our keys and goes on; under `controller`, beside its `type`, its schema lets them pass. A
preset in place of a sweep file is a sweep of one trial.
"""
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.yaml_tree import ConfigError, Tree, origin_of, plain, read_text
from scripts.sweep import brackets
from scripts.sweep.parameter import Parameter, grid, is_whole, parameter

OURS = ("base", "seeds", "budget", "baseline", "spaces", "tuning_seeds", "changes", "rungs")
READ = ("method", "metric", "parameters", "run_cap", "controller", "early_terminate")
WANDBS = ("program", "command", "name", "description", "project", "entity", "apiVersion", "kind")   # nothing to us
REFUSED = {
    "scheduler": "only grid and random search are here; remove it, and use method: grid or random",
    "metrics": "one metric ranks a sweep; write metric",
    "job": "wandb's Launch is not here; remove it", "image_uri": "wandb's Launch is not here; remove it"}

# What wandb calls it, or our summary does -> the key of a result.
METRICS = {"val/loss": "val_loss", "val/loss_avg": "val_loss_avg"} | {key: key for key in (
    "val_loss", "val_loss_avg", "target_step", "target_train_s", "train_s", "tokens_per_s")}


class Configuration(NamedTuple):
    base: str                           # a preset
    parameters: dict[str, Any]          # dotted key -> value, laid over it


class Sweep(NamedTuple):
    path: Path
    method: str                         # grid, random or bayes
    parameters: tuple[Parameter, ...]   # without config and seed
    bases: tuple[str, ...]
    seeds: tuple[int, ...]              # () for the one that the preset has
    budget: int | None                  # configurations to draw for each preset
    run_cap: int | None                 # trials
    baseline: Configuration | None
    metric: str                         # key of a result
    maximize: bool
    early_terminate: dict[str, int] | None = None       # brackets.rule
    spaces: dict[str, tuple[Parameter, ...]] = {}       # preset -> parameters of its own
    tuning_seeds: tuple[int, ...] = ()                  # () unless it is a comparison
    changes: dict[str, dict[str, Any]] = {}             # name -> dotted key -> value; {} unless it is a ladder
    rungs: bool = False

    @property
    def kind(self) -> str:
        return "compare" if self.tuning_seeds else "ladder" if self.changes else "sweep"

    @property
    def search_seeds(self) -> tuple[int | None, ...]:
        """Those that configurations are tried with; None is the preset's own."""
        return self.tuning_seeds or self.seeds or (None,)

    def is_tuning(self, row: dict) -> bool:
        """Whether a row of results.jsonl is of a comparison's search, whose losses are not reported."""
        return row["seed"] in self.tuning_seeds

    def parameters_of(self, base: str) -> tuple[Parameter, ...]:
        """Those of a preset: its own over the common ones."""
        return tuple({p.key: p for p in (*self.parameters, *self.spaces.get(base, ()))}.values())


def read(path: Path) -> Sweep:
    """The sweep that a file describes.

    Raises:
        ConfigError: one line: file and line, which key, what is wrong, what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    tree = read_text(text, str(path))

    if not tree.keys() & {"method", "parameters"} and tree.keys() & {"extends", "model", "optim", "steps"}:
        return Sweep(path, "grid", (), (str(path),), (), None, None, None, "val_loss", False)

    def refuse(problem: str, *keys: str) -> ConfigError:
        return ConfigError(f"{getattr(origin_of(tree, keys), 'place', path)}: {'.'.join(keys)}: {problem}")

    _same_for_wandb(text, tree, refuse)
    for key in tree:
        if key in REFUSED:
            raise refuse(REFUSED[key], key)
        if key not in (*OURS, *READ, *WANDBS):
            raise refuse(f"no such key; there are {', '.join((*READ, *OURS))}, and of wandb's alone "
                         f"{', '.join(WANDBS)}", key)
    said = plain(tree)
    beside = said.get("controller", {})
    if not isinstance(beside, dict) or beside.keys() - {"type", *OURS}:
        raise refuse(f"expected a mapping of type, {', '.join(OURS)}", "controller")
    if twice := [key for key in OURS if key in said and key in beside]:
        raise refuse("is there twice, at the top and under controller; remove one", twice[0])
    own = {key: value for key, value in {**beside, **said}.items() if key in OURS}
    where = {key: (key,) if key in said else ("controller", key) for key in own}

    method = said.get("method")
    if method not in ("grid", "random", "bayes"):
        raise refuse(f"expected grid, random or bayes, got {method!r}", "method")
    parameters = _parameters(said.get("parameters"), ("parameters",), refuse)
    if twice := [key for key in parameters if key in ("trials", "runs_dir", "name")]:
        raise refuse("the sweep itself sets it for its trials; remove it", "parameters", twice[0])
    spaces = _spaces(own.get("spaces", {}), where.get("spaces", ()), refuse)
    bases = {"parameters.config": _fixed(parameters, "config", refuse), "spaces": list(spaces),
             "base": [own["base"]] if "base" in own else []}
    said_in = [key for key, named in bases.items() if named]
    if not said_in:
        raise ConfigError(f"{path}: no preset; write base: demo/muon.yaml, or parameters: {{config: {{value: ...}}}}")
    if len(said_in) > 1:
        raise refuse(f"presets are there twice, in {' and in '.join(said_in)}; remove one", *where[said_in[1]])
    bases = bases[said_in[0]]
    if not all(isinstance(base, str) for base in bases):
        raise refuse("expected the name of a preset", *where.get("base", ("parameters", "config")))
    seeds = _fixed(parameters, "seed", refuse)
    if "seeds" in own and seeds:
        raise refuse("there twice, in seeds and in parameters.seed; remove one", *where["seeds"])
    seeds, tuning_seeds = own.get("seeds", seeds), own.get("tuning_seeds", [])
    for value, at in ((seeds, where.get("seeds", ("parameters", "seed"))), (tuning_seeds, where.get("tuning_seeds"))):
        if not isinstance(value, list) or not all(is_whole(seed) and seed >= 0 for seed in value):
            raise refuse("expected a list of whole numbers, like [0, 1, 2]", *at)
        if len(set(value)) < len(value):
            raise refuse("names one twice: equal seeds give equal runs, not a second sample", *at)
    if tuning_seeds and (not seeds or set(seeds) & set(tuning_seeds)):
        raise refuse("the best of a search is lucky at its own seeds; write other seeds, to report with",
                     *where["tuning_seeds"])
    run_cap, budget = said.get("run_cap"), own.get("budget")
    for value, at in ((run_cap, ("run_cap",)), (budget, where.get("budget", ()))):
        if value is not None and not (is_whole(value) and value >= 1):
            raise refuse(f"expected a whole number from 1 on, got {value!r}", *at)
    if method == "grid" and budget is not None:
        raise refuse("a grid runs all that it holds; remove it, or take method: random", *where["budget"])
    if method != "grid":
        each = max(1, len(tuning_seeds or seeds)) * len(bases)                  # trials of a draw
        if budget is None and run_cap is None:
            raise refuse(f"{method} goes on for ever; write budget (configurations) or run_cap (trials)", "method")
        if run_cap is not None:
            spare = run_cap - ("baseline" in own) * max(1, len(seeds))
            if spare < each:
                raise refuse(f"{run_cap} trials, but one draw is {each}: every preset with every seed" +
                             ", after the baseline" * ("baseline" in own), "run_cap")
            budget = min(budget or spare, spare // each)
    metric, maximize = _metric(said.get("metric"), refuse)
    baseline = own.get("baseline", {} if "changes" in own else None)
    if baseline is not None:
        if not isinstance(baseline, dict) or baseline.keys() & {"seed", "seeds"}:
            raise refuse("expected a mapping of dotted keys to values, without a seed; {} is the preset",
                         *where["baseline"])
        constant = {key: each.spec["value"] for key, each in parameters.items() if each.distribution == "constant"}
        keys = {key: value for key, value in baseline.items() if key != "config"}
        baseline = Configuration(baseline.get("config", bases[0]), constant | keys)
        if tuning_seeds and (keys or baseline.base not in bases):
            raise refuse("a comparison is with one of its presets, tuned like the others; write {config: PRESET}",
                         *where["baseline"])
    sweep = Sweep(path, method, tuple(parameters.values()), tuple(bases), tuple(seeds), budget, run_cap, baseline,
                  metric, maximize, None, spaces, tuple(tuning_seeds), own.get("changes", {}),
                  own.get("rungs", False))
    if "early_terminate" in said:
        sweep = sweep._replace(early_terminate=_early_terminate(said["early_terminate"], sweep, refuse))
    if {"changes", "rungs"} & own.keys():
        _check_ladder(sweep, where, refuse)
    if tuning_seeds and run_cap is not None:
        raise refuse("trials cut off would leave presets with different budgets; write budget", "run_cap")
    return sweep


def _spaces(said: Any, at: tuple, refuse) -> dict[str, tuple[Parameter, ...]]:
    if not isinstance(said, dict):
        raise refuse("expected a mapping of presets to their parameters", *at)
    spaces = {}
    for preset, space in said.items():
        own = _parameters(space, (*at, preset), refuse) if space else {}
        if not_its_own := own.keys() & {"config", "seed", "trials", "runs_dir", "name"}:
            raise refuse("no parameter of a preset's own; remove it", *at, preset, min(not_its_own))
        spaces[preset] = tuple(own.values())
    return spaces


def _early_terminate(said: Any, sweep: Sweep, refuse) -> dict[str, int]:
    try:
        found = brackets.rule(said)
    except ValueError as error:
        raise refuse(str(error), "early_terminate") from None
    if sweep.kind == "ladder" or sweep.kind == "sweep" and sweep.baseline:
        raise refuse("differences from a baseline are of trials that ran to their end; remove one of them",
                     "early_terminate")
    if sweep.metric not in ("val_loss", "val_loss_avg"):
        raise refuse(f"follows validation losses, and metric is {sweep.metric}; remove it, or take val/loss",
                     "early_terminate")
    return found


def _check_ladder(sweep: Sweep, where: dict, refuse) -> None:
    at = where.get("changes", ("changes",))
    if not isinstance(sweep.changes, dict) or not sweep.changes \
            or not all(isinstance(change, dict) and change for change in sweep.changes.values()):
        raise refuse("expected changes: {NAME: {dotted key: value, ...}, ...}", *at)
    if sweep.tuning_seeds or sweep.spaces or len(sweep.bases) > 1:
        raise refuse("a ladder changes one preset; remove changes, or spaces, tuning_seeds and further presets", *at)
    if sweep.method != "grid" or any(p.distribution != "constant" for p in sweep.parameters):
        raise refuse("a ladder has method: grid, and of every parameter one value", *at)
    if not isinstance(sweep.rungs, bool):
        raise refuse("expected true or false", *where["rungs"])


def _same_for_wandb(text: str, tree: Tree, refuse) -> None:
    """Refuse what wandb's reader, which follows YAML 1.1, takes for something else: 3e-4 for text, off for False."""
    def differ(ours, theirs, path):
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key, value in ours.items():
                differ(value, theirs.get(key), (*path, key))
        elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            for position, value in enumerate(ours):
                differ(value, theirs[position], (*path, position))
        elif type(ours) is not type(theirs) or ours != theirs:
            hint = "; write 3.0e-4 for 3e-4" if isinstance(ours, float) else "; put it in quotes"
            place = getattr(origin_of(tree, path), "place", "")
            raise ConfigError(f"{place}: {'.'.join(map(str, path))}: {ours!r} is {theirs!r} to wandb{hint}")
    try:
        theirs = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    differ(plain(tree), theirs, ())


def _parameters(said: Any, path: tuple, refuse, above: str = "") -> dict[str, Parameter]:
    """Dotted key -> parameter, of a mapping that may nest."""
    if not isinstance(said, dict) or not said:
        raise refuse("expected a mapping of parameters", *path)
    found = {}
    for name, item in said.items():
        here, key = (*path, name), f"{above}{name}"
        if not isinstance(item, dict):
            raise refuse(f"expected a mapping like {{value: {item!r}}}", *here)
        if item.keys() == {"parameters"}:
            below = _parameters(item["parameters"], (*here, "parameters"), refuse, f"{key}.")
        else:
            try:
                below = {key: parameter(key, item)}
            except ValueError as error:
                raise refuse(str(error), *here) from None
        if twice := below.keys() & found.keys():
            raise refuse(f"{min(twice)} is there twice, dotted and nested; remove one", *here)
        found |= below
    return found


def _fixed(parameters: dict[str, Parameter], key: str, refuse) -> list:
    """The values of `key`, which is taken out: the sweep runs through them, it draws none."""
    taken = parameters.pop(key, None)
    if taken is None:
        return []
    if taken.distribution not in ("constant", "categorical"):
        raise refuse("expected value or values", "parameters", key)
    return grid(taken)


def _metric(said: Any, refuse) -> tuple[str, bool]:
    said = {"name": "val_loss"} if said is None else said
    if not isinstance(said, dict) or "name" not in said:
        raise refuse("expected {name: val/loss, goal: minimize}", "metric")
    if said.keys() - {"name", "goal", "impute", "impute_while_running"}:
        key = min(said.keys() - {"name", "goal", "impute", "impute_while_running"})
        raise refuse("every trial runs, whatever others reach; remove it" if key == "target" else "no such key",
                     "metric", key)
    if said["name"] not in METRICS:
        raise refuse(f"no {said['name']!r}; there are {', '.join(METRICS)}", "metric", "name")
    goal = said.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise refuse(f"expected minimize or maximize, got {goal!r}", "metric", "goal")
    return METRICS[said["name"]], goal == "maximize"
