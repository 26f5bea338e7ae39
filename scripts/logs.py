"""Finished runs, ours or published, in one form for verdicts and curves.

    ours        a run directory
    track 1, 3  `step:1390/1390 val_loss:3.2775 train_time:79532ms step_avg:57.22ms` (track 3: seconds), below the
                script's source and a list of versions and GPUs, each ended by a line of 100 `=`
    llm.c       `s:19560 tel:3.2722`, without times

Published logs have no seed, and up to 2025-01 their clock starts after the tenth step.
"""
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from harness.config import NOT_IDENTITY
from harness.rundir import mixed, read_log, sources, state_of

RULE = re.compile(r"^={100}$", re.M)                    # between the parts of a published log
STEP = re.compile(r"^step:(\d+)/(\d+) val_loss:(\S+) train_time:([\d.]+)(ms|s)\b", re.M)
LLMC = re.compile(r"^s:(\d+) tel:(\S+)$", re.M)
GPU = re.compile(r"^\|\s+\d+\s+((?:NVIDIA|Tesla) [^|]+?)\s+(?:On|Off)\s+\|", re.M)         # of nvidia-smi
ALL_GPUS = re.compile(r" on ((?:NVIDIA|Tesla) .+) with world_size (\d+)")                 # of track 3
TORCH = re.compile(r"^Running pytorch (\S+) compiled for CUDA ([\d.]+)", re.M | re.I)
MACHINE = ("platform", "cores", "device", "world_size", "activation_dtype", "attention", "compiled",
           "micro_batch_rows")


class LogError(ValueError):
    """What is no finished run, or cannot be read; the message names it."""


class Validation(NamedTuple):
    step: int
    loss: float                     # nats a token, of the weights that the run's target is asked of
    train_s: float | None           # on the clock


@dataclass(frozen=True)
class Run:
    path: Path
    form: str                       # ours, track 1, track 3, llm.c
    name: str                       # the preset's; of a published log its folder
    validations: tuple[Validation, ...]
    planned_steps: int | None       # None: the log does not say
    status: str                     # finished, or what else
    seed: int | None                # None: the log does not say
    target: float | None            # the loss that it was to reach
    ledger_s: dict | None           # where every second went
    settings: dict[str, object]     # what makes it the same run but for the seed, steps apart; flat
    machine: dict[str, object]      # what the seconds depend on besides; flat
    changed: dict[str, str] = field(default_factory=dict)          # of both, what was otherwise after a resume


def read(path: Path) -> Run:
    """One run; LogError if there is none."""
    try:
        return read_ours(path) if path.is_dir() else read_published(path)
    except OSError as error:
        raise LogError(f"{error.filename or path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, LogError):
            raise
        raise LogError(f"{path}: not a run directory, or a damaged one ({type(error).__name__}: "
                       f"{str(error).splitlines()[0]})") from error


def read_ours(path: Path) -> Run:
    config = yaml.safe_load((path / "config.yaml").read_text())
    env = json.loads((path / "env.json").read_text())
    status = state_of(path)
    summary = {} if status == "running" else json.loads((path / "summary.json").read_text())
    judged = "val_loss_avg" if config["target_on"] == "average" else "val_loss"
    settings = {key: value for key, value in config.items() if key not in NOT_IDENTITY | {"seed", "steps"}}
    settings["optim"] = {group["name"]: group for group in config["optim"]}
    settings["data"] = {key: value for key, value in config["data"].items() if key not in ("train", "val")}
    settings |= {"train_data": env["train_data"], "val_data": env["val_data"], "source": sources(path / "source")}
    machine = {key: env.get(key) for key in MACHINE} | {"gpus": len(env["gpus"])}
    machine |= {key: env["versions"][key] for key in ("torch", "cuda", "triton", "python")}
    machine |= {key: config[key] for key in ("deterministic",) if key in config}
    changed = {key.removeprefix("versions."): values for key, values in mixed(path).items()}
    machine |= {key: values for key, values in changed.items() if key in machine}
    return Run(path, "ours", config["name"],
               tuple(Validation(line["step"], line[judged], line["train_s"]) for line in read_log(path)[1]),
               config["steps"], status, config["seed"], config["target_val_loss"], summary.get("ledger_s"),
               dict(flat(settings)), machine, {key: values for key, values in changed.items() if key in machine
                                               or key.startswith("source.")})


def flat(tree: dict, above: str = ""):
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def read_published(path: Path) -> Run:
    text = path.read_text(errors="replace")
    if found := STEP.findall(text):
        form = "track 1" if found[-1][4] == "ms" else "track 3"
        validations = [Validation(int(step), float(loss), float(time) / (1000 if unit == "ms" else 1))
                       for step, _, loss, time, unit in found]
        planned, status = int(found[-1][1]), "finished"
        if validations[-1].step != planned:
            status = f"cut off: its last validation is at step {validations[-1].step:,} of {planned:,}"
    elif found := LLMC.findall(text):
        form, planned, status = "llm.c", None, "finished"
        validations = [Validation(int(step), float(loss), None) for step, loss in found]
    else:
        raise LogError(f"{path}: no validation in it; a log has lines like `step:125/3250 val_loss:4.5862 "
                       "train_time:21.243s ...` or `s:250 tel:6.5069`, and a run of ours is given by its directory")
    parts = [part for part in RULE.split(text) if part.strip()]
    source = hashlib.sha256(parts[0].strip().encode()).hexdigest()[:12] if len(parts) > 1 else None
    return Run(path, form, path.resolve().parent.name, tuple(validations), planned, status, None, None, None,
               {"form": form, "source": source}, machine_of("".join(parts[1:])))


def machine_of(text: str) -> dict[str, object]:
    """What a published log says of the machine, under the names that our runs use."""
    machine: dict[str, object] = {}
    if all_gpus := ALL_GPUS.search(text):
        machine |= {"device": all_gpus[1], "world_size": int(all_gpus[2])}
    elif gpus := GPU.findall(text):
        machine |= {"device": gpus[0], "world_size": len(gpus)}
    if torch := TORCH.search(text):
        machine |= {"torch": torch[1], "cuda": torch[2]}
    return machine
