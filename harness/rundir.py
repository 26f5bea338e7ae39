"""A run's directory: everything that produced a result beside the result.

    runs/<name>-<seed>-<time>/
        config.yaml      the resolved configuration: `train.py --config` takes it again
        env.json         versions, devices, git revision, command; `resumes`: where it went on, what was not as before
        source/          the project's own: `python RUN/source/train.py --config RUN/config.yaml` repeats the run
        source-000120/   files that were not as in source/ when it went on from step 120
        log.jsonl        an object a step (train_loss, train_s, ...) and one a validation (val_loss, ...)
        summary.json     the result and the clock's ledger, with `status`
        checkpoints/     step_*.pt
        curve.png
"""
import fcntl
import hashlib
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
LOOK_S = 0.5                            # a lock that is_held has for a moment is free by then
COMPARED = ("device", "world_size", "cores", "platform", "versions", "activation_dtype", "compiled", "attention",
            "micro_batch_rows", "git_revision", "git_dirty", "train_data", "val_data")


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
    _write_origin(path, facts)
    return path


def _write_origin(directory: Path, facts: dict) -> None:
    write_text(directory / "env.json", json.dumps({**environment(), **facts}, indent=1) + "\n")
    for pattern in SOURCE if directory.resolve() / "source" != PROJECT else ():
        for file in PROJECT.glob(pattern):
            _copy(str(file.relative_to(PROJECT)), directory / "source")


def _copy(name: str, target: Path) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PROJECT / name, target / name)


def note_resume(directory: Path, step: int, checkpoint: Path | None, facts: dict) -> str:
    """Add to env.json that the run goes on from `step`, and what is not as it was before; that in words.

    Compared are machine, versions, revision and the files that train. From step 0 nothing is left of what ran before,
    and env.json and source/ are written anew.

    Raises:
        ResumeError: its data are not those that it began with.
    """
    where = f"at step {step} from {checkpoint}" if checkpoint else f"at step 0: {directory} has no intact checkpoint"
    if step == 0:
        for old in directory.resolve().glob("source*"):
            if old != PROJECT:                                        # that run's own code runs
                shutil.rmtree(old)
        _write_origin(directory, facts)
        return where
    env, now = json.loads((directory / "env.json").read_text()), json.loads(json.dumps({**environment(), **facts}))
    env["resumes"] = [each for each in env.get("resumes", []) if each["step"] < step]           # steps run once more
    before = _compared(env, sources(directory / "source"))
    for each in env["resumes"]:
        before |= each["changed"]
    after = _compared(now, sources(PROJECT))
    for key in ("train_data", "val_data"):
        if (was := before.get(f"{key}.sha256")) != (found := after.get(f"{key}.sha256")):
            raise ResumeError(f"{directory}: other {key} than it began with (sha256 {found}, was {was}); bring those "
                              "files back, or start a new run, without --resume")
    changed = {key: after.get(key) for key in {**before, **after} if after.get(key) != before.get(key)}
    env["resumes"].append(dict(step=step, started=now["started"], command=now["command"], changed=changed))
    for key, digest in changed.items():
        if key.startswith("source.") and digest is not None:
            _copy(key.removeprefix("source."), directory / f"source-{step:06d}")
    write_text(directory / "env.json", json.dumps(env, indent=1) + "\n")
    otherwise = [f"{key} {after.get(key)}, was {before.get(key)}" for key in changed]
    return "\n".join([where, *(["not as before it was interrupted: " + "; ".join(otherwise)] if changed else [])])


def mixed(directory: Path) -> dict[str, str]:
    """Dotted key -> `A, then B`, of what env.json says and a resume changed; {} for most runs."""
    env = json.loads((directory / "env.json").read_text())
    if not (resumes := env.get("resumes")):
        return {}
    found, first = {}, _compared(env, sources(directory / "source"))
    for each in resumes:
        for key, value in each["changed"].items():
            found[key] = f"{found.get(key, first.get(key))}, then {value}"
    return found


def _compared(env: dict, digests: dict[str, str]) -> dict[str, object]:
    """Dotted key -> value."""
    found = {f"source.{name}": digest for name, digest in digests.items()}
    for key in COMPARED:
        value = env.get(key)
        found |= {f"{key}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def sources(project: Path) -> dict[str, str]:
    """Digest of every file that training reads of a project, or of a run's source/."""
    files = sorted(file for pattern in SOURCE for file in project.glob(pattern))
    return {str(file.relative_to(project)): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files
            if file.suffix == ".py" and file.relative_to(project).parts[0] != "scripts"}


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go: a reader sees the old text or the new, never half."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError:                                                   # the disk is full, say
        part.unlink(missing_ok=True)
        raise


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
    file = open(directory / ".lock", "a+")                            # a sweep's trials have it as standard input
    end = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise ResumeError(f"{directory}: another process is running this run") from None
            time.sleep(0.01)


def is_held(directory: Path) -> bool:
    """Whether a process runs this run. To look takes a share of the lock for a moment."""
    try:
        with open(directory / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
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
