"""A sweep file: the YAML that `wandb sweep` takes, and keys of our own.

    method: grid                        # random, bayes; everything but said.OURS is wandb's
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

A ladder: changes to the baseline, all together, each alone and each left out of all; `rungs: true` adds them up in
their order, too.

    changes: {softcap: {model.softcap: {form: tanh, cap: 30}}, value residual: {model.value_residual: fixed}}

At the top wandb warns of our keys and goes on; under `controller`, beside its `type`, its schema lets them pass. A
preset in place of a sweep file is a sweep of one trial.
"""
from pathlib import Path
from typing import Any, NamedTuple

from harness.yaml_tree import ConfigError, at, plain
from scripts.sweep import brackets
from scripts.sweep.parameter import Parameter, different, grid, in_yaml, is_whole, parameter
from scripts.sweep.said import NEEDS, OURS, Said, read_said

OF_TRIALS = ("trials", "runs_dir", "name")      # keys that the sweep itself sets

# What wandb calls it, or our summary does -> the key of a result.
METRICS = {"val/loss": "val_loss", "val/loss_avg": "val_loss_avg"} | {key: key for key in (
    "val_loss", "val_loss_avg", "target_step", "target_train_s", "train_s", "tokens_per_s")}


class Configuration(NamedTuple):
    base: str                           # a preset
    parameters: dict[str, Any]          # dotted key -> value, laid over it


class Sweep(NamedTuple):
    path: Path
    method: str = "grid"                                # or random, bayes
    parameters: tuple[Parameter, ...] = ()              # without config and seed
    bases: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()                         # () for the one that the preset has
    budget: int | None = None                           # configurations to draw for each preset
    run_cap: int | None = None                          # trials
    baseline: Configuration | None = None
    metric: str = "val_loss"                            # key of a result
    maximize: bool = False
    early_terminate: dict[str, int] | None = None       # brackets.rule
    spaces: dict[str, tuple[Parameter, ...]] = {}       # preset -> parameters of its own
    tuning_seeds: tuple[int, ...] = ()                  # () unless it is a comparison
    changes: dict[str, dict[str, Any]] = {}             # name -> dotted key -> value; {} unless it is a ladder
    rungs: bool = False
    places: dict[str, str] = {}                         # dotted key, or preset -> where the file names it first

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

    def place(self, name: str) -> str:
        return self.places.get(name, str(self.path))


def read(path: Path) -> Sweep:
    """The sweep that a file describes.

    Raises:
        ConfigError: one line: file and line, which key, what is wrong, what to do.
    """
    said = read_said(path)
    if said.is_preset:
        return Sweep(path, bases=(str(path),))
    method = said.get("method")
    if method not in ("grid", "random", "bayes"):
        raise said.refusal(f"expected grid, random or bayes{f', got {method!r}' if method else '; ' + NEEDS}", "method")
    parameters = {} if "parameters" not in said and ("changes" in said or "spaces" in said) \
        else _parameters(said, ("parameters",))
    if twice := [key for key in OF_TRIALS if key in parameters]:
        raise said.refusal("the sweep itself sets it for its trials; remove it", "parameters", twice[0])
    spaces = _spaces(said) if "spaces" in said else {}
    bases = _presets(said, _fixed(said, parameters, "config"), spaces)
    seeds, tuning_seeds = _seeds(said, _fixed(said, parameters, "seed"))
    metric, maximize = _metric(said)
    sweep = Sweep(path, method, tuple(parameters.values()), bases, seeds, run_cap=said.get("run_cap"), metric=metric,
                  maximize=maximize, spaces=spaces, tuning_seeds=tuning_seeds, changes=said.get("changes", {}),
                  rungs=said.get("rungs", False), places=said.places())
    sweep = sweep._replace(budget=_budget(said, sweep), baseline=_baseline(said, sweep))
    if "early_terminate" in said:
        sweep = sweep._replace(early_terminate=_early_terminate(said, sweep))
    if "changes" in said or "rungs" in said:
        _check_ladder(said, sweep)
    if tuning_seeds:
        _check_comparison(said, sweep)
    return sweep


def _parameters(said: Said, path: tuple[str, ...], above: str = "") -> dict[str, Parameter]:
    """Dotted key -> parameter, of a mapping that may nest."""
    mapping = plain(at(said.tree, path) or {})
    if not isinstance(mapping, dict) or not mapping:
        raise said.refusal(f"expected a mapping of parameters; {NEEDS}", *path)
    found = {}
    for name, item in mapping.items():
        here, key = (*path, name), f"{above}{name}"
        if not isinstance(item, dict):
            raise said.refusal(f"expected a mapping like {{value: {in_yaml(item)}}}", *here)
        if item.keys() == {"parameters"}:
            below = _parameters(said, (*here, "parameters"), f"{key}.")
        else:
            try:
                below = {key: parameter(key, item)}
            except ValueError as error:
                raise said.refusal(str(error), *here) from None
        if twice := below.keys() & found.keys():
            raise said.refusal(f"{min(twice)} is there twice, dotted and nested; remove one", *here)
        found |= below
    return found


def _fixed(said: Said, parameters: dict[str, Parameter], key: str) -> list:
    """The values of `key`, which is taken out: the sweep runs through them, it draws none."""
    taken = parameters.pop(key, None)
    if taken is not None and taken.distribution not in ("constant", "categorical"):
        raise said.refusal("expected value or values", "parameters", key)
    return grid(taken) if taken else []


def _spaces(said: Said) -> dict[str, tuple[Parameter, ...]]:
    at = said.at("spaces")
    if not isinstance(said.get("spaces"), dict):
        raise said.refusal("expected a mapping of presets to their parameters", *at)
    spaces = {}
    for preset, space in said.get("spaces").items():
        own = _parameters(said, (*at, preset)) if space else {}
        if not_its_own := own.keys() & {"config", "seed", *OF_TRIALS}:
            raise said.refusal("no parameter of a preset's own; remove it", *at, preset, min(not_its_own))
        spaces[preset] = tuple(own.values())
    return spaces


def _presets(said: Said, in_parameters: list, spaces: dict) -> tuple[str, ...]:
    named = {"parameters.config": in_parameters, "spaces": list(spaces),
             "base": [said.get("base")] if "base" in said else []}
    said_in = [key for key, presets in named.items() if presets]
    if not said_in:
        raise ConfigError(f"{said.path}: no preset; write base: demo/muon.yaml, or parameters: {{config: {{value: "
                          "...}}")
    at = [said.at(key) if key in OURS else ("parameters", "config") for key in said_in]
    if len(said_in) > 1:
        raise said.refusal(f"presets are there twice, in {' and in '.join(said_in)}; remove one", *at[1])
    for base in named[said_in[0]]:
        if not is_preset(base):
            raise said.refusal(f"expected the name of a preset, got {base!r}", *at[0])
    return tuple(named[said_in[0]])


def is_preset(name: Any) -> bool:
    """Whether it can name a file."""
    return isinstance(name, str) and bool(Path(name).name)


def _seeds(said: Said, in_parameters: list) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that are reported and those of the search."""
    if "seeds" in said and in_parameters:
        raise said.refusal("there twice, in seeds and in parameters.seed; remove one", *said.at("seeds"))
    found = []
    for key, otherwise in (("seeds", in_parameters), ("tuning_seeds", [])):
        seeds, at = said.get(key, otherwise), said.at(key) if key in said else ("parameters", "seed")
        if not isinstance(seeds, list) or not all(is_whole(seed) and seed >= 0 for seed in seeds) \
                or key in said and not seeds:
            raise said.refusal("expected a list of whole numbers, like [0, 1, 2]; without it a trial has the preset's "
                               "seed" if key == "seeds" else "expected a list of whole numbers, like [100]", *at)
        if len(set(seeds)) < len(seeds):
            raise said.refusal("names one twice: equal seeds give equal runs, not a second sample", *at)
        found.append(tuple(seeds))
    seeds, tuning_seeds = found
    if tuning_seeds and (not seeds or set(seeds) & set(tuning_seeds)):
        raise said.refusal("the best of a search is lucky at its own seeds; write other seeds, to report with",
                           *said.at("tuning_seeds"))
    return seeds, tuning_seeds


def _budget(said: Said, sweep: Sweep) -> int | None:
    """Configurations to draw for each preset."""
    run_cap, budget = said.get("run_cap"), said.get("budget")
    for key in ("run_cap", "budget"):
        if (value := said.get(key)) is not None and not (is_whole(value) and value >= 1):
            raise said.refusal(f"expected a whole number from 1 on, got {value!r}", *said.at(key))
    if sweep.method == "grid":
        if budget is not None:
            raise said.refusal("a grid runs all that it holds; remove it, or take method: random", *said.at("budget"))
        return None
    if budget is None and run_cap is None:
        raise said.refusal(f"{sweep.method} goes on for ever; write budget (configurations) or run_cap (trials)",
                           "method")
    if run_cap is None:
        return budget
    each = len(sweep.search_seeds) * len(sweep.bases)                       # trials of a draw
    spare = run_cap - ("baseline" in said) * max(1, len(sweep.seeds))
    if spare < each:
        raise said.refusal(f"{run_cap} trials, but one draw is {each}: every preset with every seed"
                           + ", after the baseline" * ("baseline" in said), "run_cap")
    return min(budget or spare, spare // each)


def _baseline(said: Said, sweep: Sweep) -> Configuration | None:
    if "baseline" not in said and "changes" not in said:
        return None
    given, at = said.get("baseline", {}), said.at("baseline")
    if not isinstance(given, dict) or given.keys() & {"seed", "seeds", *OF_TRIALS}:
        raise said.refusal("expected a mapping of dotted keys to values, without a seed; {} is the preset", *at)
    base, keys = given.get("config", sweep.bases[0]), {key: value for key, value in given.items() if key != "config"}
    if not is_preset(base):
        raise said.refusal(f"expected the name of a preset, got {base!r}", *at, "config")
    if sweep.tuning_seeds and (keys or base not in sweep.bases):
        raise said.refusal("a comparison is with one of its presets, tuned like the others; write {config: PRESET}",
                           *at)
    constant = {p.key: p.spec["value"] for p in sweep.parameters if p.distribution == "constant"}
    return Configuration(base, constant | keys)


def _metric(said: Said) -> tuple[str, bool]:
    metric = said.get("metric", {"name": "val_loss"})
    if not isinstance(metric, dict) or "name" not in metric:
        raise said.refusal("expected {name: val/loss, goal: minimize}", "metric")
    if unknown := metric.keys() - {"name", "goal", "impute", "impute_while_running"}:
        key = min(unknown)
        raise said.refusal("a sweep does not stop at a target; remove it" if key == "target" else "no such key",
                           "metric", key)
    if not isinstance(metric["name"], str) or metric["name"] not in METRICS:
        raise said.refusal(f"no {metric['name']!r}; there are {', '.join(METRICS)}", "metric", "name")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise said.refusal(f"expected minimize or maximize, got {goal!r}", "metric", "goal")
    return METRICS[metric["name"]], goal == "maximize"


def _early_terminate(said: Said, sweep: Sweep) -> dict[str, int]:
    try:
        found = brackets.rule(said.get("early_terminate"))
    except ValueError as error:
        raise said.refusal(str(error), "early_terminate") from None
    if sweep.kind == "ladder" or sweep.kind == "sweep" and sweep.baseline:
        raise said.refusal("differences from a baseline are of trials that ran to their end; remove one of them",
                           "early_terminate")
    if sweep.metric not in ("val_loss", "val_loss_avg"):
        raise said.refusal(f"follows validation losses, and metric is {sweep.metric}; remove it, or take val/loss",
                           "early_terminate")
    return found


def _check_ladder(said: Said, sweep: Sweep) -> None:
    at = said.at("changes")
    if not isinstance(sweep.changes, dict) or not sweep.changes \
            or not all(isinstance(change, dict) and change for change in sweep.changes.values()):
        raise said.refusal("expected changes: {NAME: {dotted key: value, ...}, ...}", *at)
    for name, change in sweep.changes.items():
        if not_its_own := change.keys() & {"config", "seed", "seeds", *OF_TRIALS}:
            raise said.refusal("no change of a ladder: the sweep itself sets it for its trials; remove it", *at, name,
                               min(not_its_own))
    if sweep.tuning_seeds or sweep.spaces or len(sweep.bases) > 1:
        raise said.refusal("a ladder changes one preset; remove changes, or spaces, tuning_seeds and further presets",
                           *at)
    if sweep.method != "grid" or any(p.distribution != "constant" for p in sweep.parameters):
        raise said.refusal("a ladder has method: grid, and of every parameter one value", *at)
    if sweep.run_cap is not None:
        raise said.refusal("a ladder gives its verdicts when all planned seeds ended; remove it, write fewer seeds",
                           "run_cap")
    if not isinstance(sweep.rungs, bool):
        raise said.refusal("expected true or false", *said.at("rungs"))


def _check_comparison(said: Said, sweep: Sweep) -> None:
    if sweep.run_cap is not None:
        raise said.refusal("trials cut off would leave presets with different budgets; write budget", "run_cap")
    for base in sweep.bases:
        for p in sweep.parameters_of(base):
            if p.key.split(".")[0] != "optim" and different([p]) > 1:
                raise ConfigError(f"{sweep.place(p.key)}: {p.key}: what is compared differs in optim alone; give it "
                                  "one value")
