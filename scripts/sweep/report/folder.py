"""What a sweep's folder says: its file, the results of its trials, their logs, configurations and machines."""
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.rundir import mixed, read_log
from harness.yaml_tree import ConfigError, plain, read_text
from scripts.logs import flat
from scripts.sweep import costs
from scripts.sweep.file import Sweep, read
from scripts.sweep.parameter import in_yaml, is_number
from scripts.sweep.tables.cells import DIGITS

ROW = {"trial", "configuration", "base", "parameters", "baseline", "seed", "status", "steps", *DIGITS, "run", "device",
       "git_revision", "git_dirty", "error"}                          # of results.jsonl: what is needed here
ABSENT = "absent"                       # a key that a configuration does not have
OF_THE_MACHINE = ("device", "git_revision", "git_dirty", "versions.torch", "versions.python", "versions.triton",
                  "versions.cuda", "platform", "cores", "world_size", "activation_dtype", "compiled", "attention",
                  "train_data.sha256", "val_data.sha256")
NOT_COMPARED = {"losses": ("train_data.sha256", "val_data.sha256"),   # what does not compare where these are mixed
                "seconds": ("device", "cores", "platform", "world_size")}


class LoggedTrial(NamedTuple):
    row: dict                           # its line of results.jsonl
    config: dict[str, Any]              # dotted key -> value, without seed and runs_dir; {} before it started
    env: dict[str, Any]                 # dotted key -> value of its run's env.json; {} without a run
    train: list[dict]                   # lines of its log
    val: list[dict]


class Folder(NamedTuple):
    path: Path
    file: Path                          # the sweep's: sweep.yaml in it, or the one that it was asked for by
    sweep: Sweep
    text: str                           # of sweep.yaml
    costs: dict | None
    trials: list[LoggedTrial]

    @property
    def rows(self) -> list[dict]:
        return [trial.row for trial in self.trials]


def read_folder(path: Path, file: Path | None = None) -> Folder:
    """All of a sweep's folder. A trial's files that are missing or damaged are taken for not there yet.

    Args:
        file: a sweep file that stands for sweep.yaml in the report, where it says the same.

    Raises:
        ConfigError: no sweep is there, or its own files are damaged.
    """
    sweep, rows = sweep_and_rows(path)
    own = path / "sweep.yaml"
    if file is None or not file.is_file() or _said(file) != _said(own):
        file = own
    return Folder(path, file, sweep, own.read_text(encoding="utf-8"), costs.read(path) or None,
                  [_trial(row, path) for row in rows])


def _said(file: Path) -> dict:
    return plain(read_text(file.read_text(encoding="utf-8", errors="replace"), str(file)))


def sweep_and_rows(path: Path) -> tuple[Sweep, list[dict]]:
    """(sweep.yaml, results.jsonl) of a sweep's folder; ConfigError as above."""
    for name in ("sweep.yaml", "results.jsonl"):
        if not (path / name).is_file():
            raise ConfigError(f"{path}: no {name} in it, so no sweep's folder; give that of a sweep that has started")
    sweep, results, rows = read(path / "sweep.yaml"), path / "results.jsonl", []
    anew = "the sweep's command writes it anew"
    try:
        lines = results.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{results}: cannot be read: {getattr(error, 'strerror', error)}; {anew}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ConfigError(f"{results}:{number}: no JSON; {anew}") from None
        if not isinstance(row, dict) or ROW - row.keys():
            raise ConfigError(f"{results}:{number}: not what a sweep says of a trial; {anew}")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{results}: no trials in it; {anew}")
    return sweep, rows


def _trial(row: dict, folder: Path) -> LoggedTrial:
    run = folder / row["run"] if row["run"] else None
    train, val, env = [], [], {}
    try:
        train, val = read_log(run) if run else ([], [])
        env = dict(flat(_json(run / "env.json"))) | mixed(run) if run else {}    # `A, then B` where a resume changed it
    except (OSError, ValueError, TypeError, KeyError):
        pass
    config = _yaml(folder / "trials" / row["trial"] / "trial.yaml") or (_yaml(run / "config.yaml") if run else {})
    if isinstance(config.get("optim"), list):                         # groups by name, not by their place
        config["optim"] = {group.get("name", position): group for position, group in enumerate(config["optim"])}
    config = {key: value for key, value in config.items() if key not in ("seed", "runs_dir", "trials")}
    return LoggedTrial(row, dict(flat(config)), env, train, val)


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
        reported = {row["base"] for row in folder.rows if not sweep.is_tuning(row)}
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
        values = Counter(_shown(key, trial.env[key]) for trial in folder.trials if trial.env.get(key) is not None)
        if values:
            found[key] = [value for value, _ in values.most_common()]
    return found


def _shown(key: str, value: Any) -> str:
    return str(value)[:12] if key.endswith(".sha256") else in_yaml(value)


def in_words(key: str) -> str:
    """One of OF_THE_MACHINE."""
    return key.removeprefix("versions.").removesuffix(".sha256").replace("_", " ")


def warnings(folder: Folder) -> list[str]:
    """Why numbers of this sweep may not compare, or may not be repeated."""
    said = []
    for key, values in machine(folder).items():
        if len(values) > 1:
            spoilt = [f"; {what} do not compare" for what, keys in NOT_COMPARED.items() if key in keys]
            said.append("".join([f"mixed {in_words(key)}: {', '.join(values)}", *spoilt]))
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
