"""A run's directory: everything that produced a result beside the result.

    runs/<name>-<seed>-<time>/
        config.yaml      the resolved configuration: `train.py --config` takes it again
        env.json         versions, devices, git revision, command
        source/          the project's own: `python RUN/source/train.py --config RUN/config.yaml` repeats the run
        log.jsonl        an object a step (train_loss, train_s, ...) and one a validation (val_loss, ...)
        summary.json     the result and the clock's ledger, with `status`
        checkpoints/     step_*.pt
        curve.png
"""
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
SOURCE = ("train.py", "model/**/*.py", "optim/**/*.py", "data/**/*.py", "harness/**/*.py", "scripts/**/*.py",
          "configs/**/*.yaml", "configs/*.json", "requirements*.txt")


def create(runs_dir: str, name: str, seed: int, config_yaml: str, facts: dict) -> Path:
    """Make a new run directory with everything that is known before the first step."""
    stem = f"{name}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        path = Path(runs_dir) / (f"{stem}-{attempt}" if attempt else stem)
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    write_text(path / "config.yaml", config_yaml)
    write_text(path / "env.json", json.dumps({**environment(), **facts}, indent=1) + "\n")
    for pattern in SOURCE:
        for file in PROJECT.glob(pattern):
            target = path / "source" / file.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return path


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go: a reader sees the old text or the new, never half."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def environment() -> dict:
    """What the numbers depend on besides the configuration and the source."""
    import importlib.metadata as metadata
    versions = {}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"versions": {"python": platform.python_version(), **versions, "cuda": torch.version.cuda},
            "platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpus, **git_state(),
            "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def git_state() -> dict:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    try:
        revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except OSError:                                                     # no git on this machine
        revision = status = None
    return {"git_revision": revision, "git_dirty": None if status is None else bool(status)}


class Log:
    """log.jsonl, one JSON object a line, handed to the system line by line."""

    def __init__(self, path: Path, upto_step: int | None = None):
        """Open for appending; with `upto_step`, first drop what a resumed run will write again.

        The checkpoint of a step is saved before that step's validation, so lines of later steps go, and so do
        validations at `upto_step` itself, and a last line cut short by a kill.
        """
        if upto_step is not None and path.exists():
            kept = [line for line in _whole_lines(path)
                    if line["step"] < upto_step or (line["step"] == upto_step and "val_loss" not in line)]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a", buffering=1)

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_log(path: Path) -> tuple[list[dict], list[dict]]:
    """(training lines, validation lines) of a run directory's log.jsonl."""
    lines = _whole_lines(Path(path) / "log.jsonl")
    return [x for x in lines if "train_loss" in x], [x for x in lines if "val_loss" in x]


def where_to_run(resume: str | None, runs_dir: str, identity: str, several: bool) -> tuple[str | None, bool]:
    """(directory to continue in, or "" for a new one, or None where nothing is left to do; whether it continues one).

    Args:
        resume: None, "auto" or a run directory.
        several: one of several trials, of which `auto` skips the finished ones.
    Raises:
        ResumeError: the named directory is no run of this configuration.
    """
    if resume is None:
        return "", False
    if resume == "auto":
        if found := find(runs_dir, identity, ("running", "stopped")):
            return str(found), True
        return (None, False) if several and find(runs_dir, identity, ("finished",)) else ("", False)
    try:
        recorded = json.loads((Path(resume) / "env.json").read_text())["identity"]
    except (OSError, KeyError, json.JSONDecodeError):
        raise ResumeError(f"--resume {resume}: no run directory (its env.json cannot be read)") from None
    if recorded != identity:
        raise ResumeError(f"--resume {resume}: that run has another configuration (see its config.yaml); "
                          f"start a new run, or leave out what differs")
    if is_held(Path(resume)):
        raise ResumeError(f"--resume {resume}: another process is running this run")
    return resume, True


class ResumeError(ValueError):
    """--resume names something that cannot be continued."""


def hold(directory: Path):
    """Lock the run for as long as the returned file is open; the system gives it back however the process ends."""
    file = open(directory / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResumeError(f"{directory}: another process is running this run") from None
    return file


def is_held(directory: Path) -> bool:
    try:
        hold(directory).close()
    except ResumeError:
        return True
    return False


def find(runs_dir: str, identity: str, status: tuple[str, ...]) -> Path | None:
    """The newest run directory of this configuration identity whose status is one of `status`.

    A run without summary.json was cut off and counts as "running"; one that another process is running is left out.
    """
    candidates = []
    for env in Path(runs_dir).glob("*/env.json"):
        try:
            if json.loads(env.read_text()).get("identity") == identity \
                    and state_of(env.parent) in status and not is_held(env.parent):
                candidates.append((env.stat().st_mtime_ns, env.parent))
        except (OSError, json.JSONDecodeError):
            continue
    return max(candidates)[1] if candidates else None


def state_of(path: Path) -> str:
    try:
        return json.loads((path / "summary.json").read_text())["status"]
    except (OSError, KeyError, json.JSONDecodeError):
        return "running"
