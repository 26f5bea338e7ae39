"""The trials of a sweep: each a complete configuration with one seed, all checked before the first one starts.

A trial's name is the identity of its configuration (harness/config.py): equal for what describes the same run, whatever
the sweep file is called and however the values are written. It has the folder trials/<name>/ of the sweep's:

    trial.yaml       the resolved configuration
    output.txt       what it printed; output.N.txt: what node N of several did
    failure.json     status, exit code and last line of an attempt that failed; gone when another begins
    pruned.json      seed, step and metric where successive halving ended its configuration
    job.json         of Slurm, the job that has it
    <run directory>  made by train.py
"""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from data.loader import open_data
from data.shards import ShardError
from harness import preflight
from harness.config import Config, config_identity, to_yaml
from harness.load import load
from harness.merge import find
from harness.rundir import write_text
from harness.yaml_tree import ConfigError
from model.gpt import GPT
from optim.groups import GroupError
from scripts.judge import spread
from scripts.logs import flat
from scripts.sweep.brackets import brackets
from scripts.sweep.candidates import configurations, in_words, label
from scripts.sweep.file import Configuration, Sweep

REFUSALS = (ConfigError, GroupError, ShardError)
MOST_PROBLEMS = 10                      # lines of a refusal
MAY_DIFFER = ("optim", "name", "seed", "runs_dir")          # between presets that are compared


class Trial(NamedTuple):
    name: str                           # 16 hex digits
    folder: Path
    configuration: Configuration
    is_baseline: bool
    config: Config                      # its seed and runs_dir too
    label: str                          # of the configuration, short
    may_be_pruned: bool                 # by successive halving: never where its result is reported


def plan(sweep: Sweep, out: Path, further: Sequence[Configuration] = ()) -> list[Trial]:
    """Every trial, all configurations, and `further` ones, with the first seed before any with the second.

    Raises:
        ConfigError: a line for each problem, with where the file says it, or the parameters that have it.
    """
    _check_presets(sweep)
    found, problems, checked = {}, {}, set()
    for seed in sweep.search_seeds:
        for each in [*configurations(sweep), *further]:
            try:
                trial = trial_of(each, seed, sweep, out, checked)
            except REFUSALS as error:
                for line in str(error).splitlines():
                    at, problem = _blamed(line, each, sweep)
                    problems.setdefault(problem, {})[at] = None
                continue
            twin = found.setdefault(trial.name, trial)
            if twin is not trial and twin.is_baseline and sweep.kind == "sweep":    # with the words that say more
                found[trial.name] = twin._replace(configuration=each)
            elif twin is not trial:
                problems.setdefault(f"describes the same run as {in_words(twin.configuration)}: what differs does not "
                                    "change a result (for speed: python -m scripts.bench compare)",
                                    {})[f"{sweep.path}: {in_words(each)}"] = None
    if problems:
        lines = [f"{next(iter(having))}: {problem}" + (f" (and {len(having) - 1} more)" if len(having) > 1 else "")
                 for problem, having in problems.items()]
        more = [f"{sweep.path}: and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
        raise ConfigError("\n".join(lines[:MOST_PROBLEMS] + more))
    if sweep.kind == "compare":
        _check_fair(sweep, list(found.values()))
    return list(found.values())[:sweep.run_cap]


def _check_presets(sweep: Sweep) -> None:
    for base in dict.fromkeys([*sweep.bases, *([sweep.baseline.base] if sweep.baseline else ())]):
        try:
            find(base)
        except ConfigError as error:
            raise ConfigError(f"{sweep.places.get(base) or sweep.place('config')}: {error}") from None


def _blamed(line: str, each: Configuration, sweep: Sweep) -> tuple[str, str]:
    """(Where the sweep's file says what a problem of a configuration is about, the problem)."""
    for key, word in zip(each.parameters, _words(each)):
        if line.startswith((f"override {word}: ", f"{key}: ")):
            return f"{sweep.place(key)}: {word}", line.removeprefix(f"override {word}: ")
    return f"{sweep.path}: {in_words(each)}", line


def _check_fair(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """All trials of a comparison differ in `optim` alone: same model, data, schedule, steps, averaging.

    Proposals that come later are as these are: what is not constant is in `optim` (file.py). There, a group's own
    schedule of the learning rate is one that the sweep file says.
    """
    of = [(trial.configuration.base, {key: value for key, value in flat(asdict(trial.config)) if key not in MAY_DIFFER})
          for trial in trials]
    (first, one), *others = of
    for base, other in others:
        if differing := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            key = differing[0]
            raise ConfigError(f"{sweep.path}: {base}: {key} is {other.get(key)}, but {one.get(key)} in {first}: what "
                              f"is compared differs in optim alone; set {key} in parameters, to one value")
    own = [{f"optim.{group.name}.schedule": group.schedule for group in trial.config.optim
            if group.schedule not in (None, trial.config.schedule)} for trial in trials]
    for (base, _), schedules in zip(of, own):
        said = [p.key for p in sweep.parameters_of(base)]
        for key, schedule in schedules.items():
            if any(other.get(key) != schedule for other in own) \
                    and not any(each == key or each.startswith(f"{key}.") for each in said):
                raise ConfigError(f"{sweep.path}: {base}: {key} is not that of the run, nor that of all presets; write "
                                  "it in the preset's space, so that the comparison says it, or set it to null in "
                                  "parameters")


def reporting(sweep: Sweep, rows: Sequence[dict], out: Path, ended: Sequence[str]) -> list[Trial]:
    """The reported seeds of every preset whose tuning trials all ended, at the best that its search found.

    Args:
        rows: of results.jsonl; presets whose reported seeds are among them are left out.
        ended: the statuses of trials that nothing more is awaited of.
    """
    trials, there = [], {row["base"] for row in rows if row["seed"] in sweep.seeds}
    for base in sweep.bases if sweep.kind == "compare" else ():
        if base in there:
            continue
        tuning = [row for row in rows if row["base"] == base and row["seed"] in sweep.tuning_seeds]
        best = chosen(tuning, sweep) if all(row["status"] in ended for row in tuning) else None
        if best is not None:
            each = Configuration(base, next(r["parameters"] for r in tuning if r["configuration"] == best))
            trials += [trial_of(each, seed, sweep, out, set()) for seed in sweep.seeds]
    return sorted(trials, key=lambda trial: sweep.seeds.index(trial.config.seed))    # presets in turns: machines drift


def chosen(tuning: Sequence[dict], sweep: Sweep) -> str | None:
    """The configuration id with the best mean metric over the tuning seeds, of those that finished with all of them."""
    means = {}
    for key in {row["configuration"] for row in tuning}:
        values = [row[sweep.metric] for row in tuning if row["configuration"] == key and row["status"] == "finished"]
        if len(values) == len(sweep.tuning_seeds) and None not in values:
            means[key] = spread(values).mean * (-1 if sweep.maximize else 1)
    return min(means, key=lambda key: (means[key], key), default=None)


def trial_of(each: Configuration, seed: int | None, sweep: Sweep, out: Path, checked: set[str]) -> Trial:
    """One of them, checked; `checked` holds the data that was. Raises REFUSALS."""
    config = load(each.base, [*_words(each), *([] if seed is None else [f"seed={seed}"]), "trials=1"]).config
    _check(config, sweep, checked)
    name = config_identity(config)
    folder = out / "trials" / name
    return Trial(name, folder, each, each == sweep.baseline, replace(config, runs_dir=str(folder)),
                 label(each, sweep), sweep.early_terminate is not None and seed in sweep.search_seeds)


def _words(each: Configuration) -> list[str]:
    """Its parameters as overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in each.parameters.items()]


def _check(config: Config, sweep: Sweep, checked: set[str]) -> None:
    """What train.py would refuse in the end: the metric, the model, the data."""
    if sweep.metric == "val_loss_avg" and config.average is None:
        raise ConfigError("metric val_loss_avg, but there is no average; set average, or rank by val/loss")
    if sweep.metric.startswith("target") and config.target_val_loss is None:
        raise ConfigError(f"metric {sweep.metric}, but there is no target_val_loss; set it, or rank by val/loss")
    validations = len(config.validation_steps() - {0})
    if sweep.early_terminate and not brackets(sweep.early_terminate, validations):
        raise ConfigError(f"early_terminate: no bracket is before the last of {validations} validations; lower "
                          "min_iter or max_iter, validate more often (val_every), or remove it")
    with torch.device("meta"):
        sketch = GPT(config.model, config.seq_len)
    preflight.check(config, sketch)
    data = repr((config.data, config.seq_len, config.val_tokens, config.model.vocab_size, config.steps,
                 config.batch_tokens))
    if data not in checked:
        train, _ = open_data(config.data, config.seq_len, config.val_tokens, config.model.vocab_size,
                             [config.batch_tokens] * config.steps)
        train.check_enough(config.steps, config.batch_tokens)
        checked.add(data)


def configuration_id(configuration: Configuration) -> str:
    """8 hex digits that the seeds of a configuration share."""
    said = json.dumps([configuration.base, configuration.parameters], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def write(trial: Trial) -> Path:
    """Its trial.yaml, for train.py."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    path = trial.folder / "trial.yaml"
    write_text(path, to_yaml(trial.config))
    return path
