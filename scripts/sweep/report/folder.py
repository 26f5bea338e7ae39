"""What a sweep's folder says: its file, the results of its trials, their logs, configurations and machines."""
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.rundir import mixed, read_log
from scripts.logs import flat
from scripts.sweep.file import Sweep, read
from scripts.sweep.parameter import in_yaml, is_number

ABSENT = "absent"                       # a key that a configuration does not have
OF_THE_MACHINE = ("device", "git_revision", "git_dirty", "versions.torch", "versions.python", "versions.triton",
                  "versions.cuda", "platform", "cores", "world_size", "activation_dtype", "compiled", "attention")


class ReportError(ValueError):
    """One line: what is wrong, where, what to do."""


class Trial(NamedTuple):
    row: dict                           # its line of results.jsonl
    config: dict[str, Any]              # dotted key -> value, without seed and runs_dir; {} before it started
    env: dict[str, Any]                 # dotted key -> value of its run's env.json; {} without a run
    train: list[dict]                   # lines of its log
    val: list[dict]


class Folder(NamedTuple):
    path: Path
    sweep: Sweep
    text: str                           # of sweep.yaml
    costs: dict | None
    trials: list[Trial]

    @property
    def rows(self) -> list[dict]:
        return [trial.row for trial in self.trials]


def read_folder(path: Path) -> Folder:
    """All of a sweep's folder. A trial's files that are missing or cut short are taken for not there yet.

    Raises:
        ReportError, ConfigError: no sweep is there, or its own files are damaged.
    """
    for name in ("sweep.yaml", "results.jsonl"):
        if not (path / name).is_file():
            raise ReportError(f"{path}: no {name} in it, so no sweep's folder; give that of a sweep that has started")
    sweep = read(path / "sweep.yaml")
    rows = []
    for number, line in enumerate((path / "results.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ReportError(f"{path / 'results.jsonl'}:{number}: no JSON; the sweep's command writes it anew"
                              ) from None
    if not rows:
        raise ReportError(f"{path / 'results.jsonl'}: no trials in it; the sweep's command writes it anew")
    costs = _json(path / "costs.json") or None
    return Folder(path, sweep, (path / "sweep.yaml").read_text(encoding="utf-8"), costs,
                  [_trial(row, path) for row in rows])


def _trial(row: dict, folder: Path) -> Trial:
    run = folder / row["run"] if row["run"] else None
    train, val, env = [], [], {}
    if run and (run / "log.jsonl").is_file():
        train, val = read_log(run)
    if run and (env := dict(flat(_json(run / "env.json")))):
        env |= mixed(run)                                             # `A, then B` where a resume changed it
    config = _yaml(folder / "trials" / row["trial"] / "trial.yaml") or (_yaml(run / "config.yaml") if run else {})
    if isinstance(config.get("optim"), list):                         # groups by name, not by their place
        config["optim"] = {group.get("name", position): group for position, group in enumerate(config["optim"])}
    config = {key: value for key, value in config.items() if key not in ("seed", "runs_dir", "trials")}
    return Trial(row, dict(flat(config)), env, train, val)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- what it says together

def is_tuning(row: dict, sweep: Sweep) -> bool:
    return row["seed"] in sweep.tuning_seeds


def missing(folder: Folder) -> list[str]:
    """What a finished sweep would have and this one has not, a line each."""
    states = Counter(row["status"] for row in folder.rows)
    said = [f"{count} of {len(folder.rows)} trials {'is' if count == 1 else 'are'} {state}"
            for state, count in states.items() if state in ("waiting", "running", "stopped")]
    said += [f"{count} of {len(folder.rows)} trials ended without a result: {state.replace('_', ' ')}"
             for state, count in states.items() if state in ("crashed", "refused", "not_finite")]
    sweep = folder.sweep
    tried = {base: {row["configuration"] for row in folder.rows if row["base"] == base and not row["baseline"]}
             for base in sweep.bases}
    if sweep.budget is not None:
        said += [f"{base}: {len(found)} of {sweep.budget} configurations tried" for base, found in tried.items()
                 if len(found) < sweep.budget]
    if sweep.kind == "compare":
        reported = {row["base"] for row in folder.rows if not is_tuning(row, sweep)}
        said += [f"{base}: no configuration chosen yet, so no run with a reporting seed"
                 for base in sweep.bases if base not in reported]
    if without := [row for row in folder.rows if row["status"] == "finished" and not row["run"]]:
        said.append(f"{len(without)} finished trials without their run directory: no curves of them")
    elif without := [trial for trial in folder.trials if trial.row["status"] == "finished" and not trial.val]:
        said.append(f"no log of {len(without)} finished trials: no curves of them")
    return said


def machine(folder: Folder) -> dict[str, list[str]]:
    """What the numbers depend on besides the configurations -> its values, the most frequent first."""
    found = {}
    for key in OF_THE_MACHINE:
        short = key.removeprefix("versions.")
        values = Counter(in_yaml(trial.env[key]) for trial in folder.trials if trial.env.get(key) is not None)
        if values:
            found[short] = [value for value, _ in values.most_common()]
    return found


def warnings(folder: Folder) -> list[str]:
    """Why numbers of this sweep may not compare, or may not be repeated."""
    said = [f"mixed {key.replace('_', ' ')}: {', '.join(values)}"
            + ("; seconds do not compare" if key in ("device", "cores", "platform", "world_size") else "")
            for key, values in machine(folder).items() if len(values) > 1]
    if dirty := sum(bool(row["git_dirty"]) for row in folder.rows):
        said.append(f"{dirty} of {len(folder.rows)} trials ran with uncommitted changes: the revision alone does not "
                    "repeat them, the source/ in their run directories does")
    return said


def started(folder: Folder) -> tuple[str, str] | None:
    """When the first and the last run started."""
    times = sorted(trial.env["started"] for trial in folder.trials if trial.env.get("started"))
    return (times[0], times[-1]) if times else None


# ---- configurations

def reference(folder: Folder) -> tuple[str, dict[str, Any]]:
    """(In words, configuration) that trials are told by: the baseline's, or the most frequent value of every key."""
    known = [trial for trial in folder.trials if trial.config]
    for trial in known:
        if trial.row["baseline"]:
            return "the baseline", trial.config
    keys = dict.fromkeys(key for trial in known for key in trial.config)
    most = {}
    for key in keys:
        values = [trial.config.get(key, ABSENT) for trial in known]
        common = Counter(map(in_yaml, values)).most_common(1)[0][0]
        most[key] = next(value for value in values if in_yaml(value) == common)
    return "the most frequent value of every key", {k: value for k, value in most.items() if value != ABSENT}


def difference(config: dict, common: dict) -> list[tuple[str, str, str]]:
    """(key, value here, value there) of every key that is not equal."""
    keys = [key for key in {**common, **config} if config.get(key, ABSENT) != common.get(key, ABSENT)]
    return [(key, in_yaml(config.get(key, ABSENT)), in_yaml(common.get(key, ABSENT))) for key in keys]


def finite(values: Iterable) -> list[float]:
    return [value for value in values if is_number(value)]
