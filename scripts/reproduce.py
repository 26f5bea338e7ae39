"""Repeat a published record from nothing: preflight, fetch, run, report, verdict.

    make reproduce RECORD=04-muon [GPUS=8] [SEEDS=4] [ARGS="key=value ..."]
    python -m scripts.reproduce track3/normuon --gpus 8 --seeds 4 key=value ...

RECORD is the name of a preset in configs/records/. Every stage says what it does and with which command; the first
that fails ends it with its exit code. The same command again goes on where it stopped: shards that are there are not
fetched, an interrupted run continues from its last checkpoint, finished seeds are not trained again.

Runs lie in <runs_dir>/reproduce/<preset>/<machine>-<code>/, <code> a digest of the sources, the device and torch's
version, so that after a change to the code or on another machine all seeds are run anew.
"""
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from data.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "configs" / "records"
STAGES = ("preflight", "fetch", "run", "report", "verdict")
CHECKPOINTS = 10                    # a run, where neither preset nor ARGS say; they are off the clock
GO_ON = "the same command goes on from here"


class Stopped(Exception):
    """A stage failed: what to do about it, and the exit code."""

    def __init__(self, remedy: str, code: int = 2):
        super().__init__(remedy)
        self.code = code


def announce(stage: str, text: str) -> None:
    print(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage:<9} {text}", flush=True)


def call(*command: str, failed: str) -> None:
    """Run a Python program and show the command; Stopped with its exit code and the words `failed`.

    Ctrl-C reaches it by itself; SIGTERM and SIGUSR1 are passed on, so that a run can save before it ends.
    """
    print("$ python", *command, flush=True)
    child = subprocess.Popen([sys.executable, *command])
    forward = {signal.SIGTERM: child.terminate, signal.SIGUSR1: child.terminate, signal.SIGINT: lambda: None}
    before = {number: signal.signal(number, lambda number, _: forward[number]()) for number in forward}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        raise Stopped(failed, code if code > 0 else 128 - code)


def preset(record: str) -> Path:
    """The file of a record's preset; Stopped if there is none."""
    path = RECORDS / f"{record.removesuffix('.yaml')}.yaml"
    if not record or not path.is_file():
        names = sorted(str(file.relative_to(RECORDS).with_suffix("")) for file in RECORDS.rglob("*.yaml"))
        raise Stopped(f"no record {record!r}; RECORD is one of {', '.join(names)}" if record else
                      f"RECORD is missing; one of {', '.join(names)}")
    return path


# ---- 1. preflight

def check(path: Path, overrides: list[str], gpus: int | None, seeds: int):
    """(configuration, number of processes); Stopped with what is wrong before anything is fetched or trained."""
    import torch
    if not torch.cuda.is_available() and gpus is None:
        gpus = 1
    there = torch.cuda.device_count() if torch.cuda.is_available() else None
    gpus = there if gpus is None else gpus
    if gpus < 1 or seeds < 1:
        raise Stopped(f"GPUS={gpus}, SEEDS={seeds}: both begin at 1")
    if there is not None and gpus > there:
        raise Stopped(f"GPUS={gpus}, but this machine has {there}; a smaller number trains the same, slower")

    from harness import preflight
    from harness.load import ConfigError, load
    from model.gpt import GPT
    from optim.groups import GroupError
    os.environ["WORLD_SIZE"] = str(gpus)             # preflight counts ranks by it; torchrun sets its own
    try:
        cfg = load(str(path), overrides).config
        with torch.device("meta"):
            sketch = GPT(cfg.model, cfg.seq_len)
        preflight.check(cfg, sketch)
    except (ConfigError, GroupError) as error:
        raise Stopped(str(error)) from None
    if cfg.trials > 1:
        raise Stopped(f"trials={cfg.trials}: give the number of seeds as SEEDS={cfg.trials}")
    return cfg, gpus


def place_of(cfg, gpus: int) -> Path:
    """Where the runs of this configuration, code and machine lie."""
    import hashlib

    import torch
    from harness.processes import device_name
    from harness.rundir import SOURCE
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    digest = hashlib.sha256(f"{device} {torch.__version__}".encode())
    for pattern in SOURCE:
        if pattern.endswith(".py") and not pattern.startswith("scripts"):          # what training reads
            for file in sorted(ROOT.glob(pattern)):
                digest.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    machine = re.sub(r"[^A-Za-z0-9]+", "-", f"{gpus}x {device}").strip("-")
    return Path(cfg.runs_dir) / "reproduce" / cfg.name / f"{machine}-{digest.hexdigest()[:8]}"


def missing_data(cfg) -> str:
    """Which shards training would miss, in the loader's words; "" where all are there."""
    from data.loader import open_data
    from data.shards import ShardError
    batches = [cfg.batch_tokens] * cfg.steps
    try:
        train, _ = open_data(cfg.data, cfg.seq_len, cfg.val_tokens, cfg.model.vocab_size, batches)
        train.check_enough(cfg.steps, cfg.batch_tokens)
    except ShardError as error:
        return str(error)
    return ""


# ---- 3. run

def finished(place: Path, cfg, seeds: int) -> list[Path]:
    """The newest finished run of each seed that has one."""
    from harness.config import config_identity
    from harness.rundir import find
    found = [find(str(place), config_identity(replace(cfg, seed=cfg.seed + i, trials=1)), ("finished",))
             for i in range(seeds)]
    return [run for run in found if run is not None]


def train(path: Path, cfg, overrides: list[str], gpus: int, seeds: int, place: Path) -> list[Path]:
    """Train the seeds that are missing; the run directories of all."""
    from harness.processes import EXIT_NOT_FINITE, EXIT_REQUEUE
    from harness.rundir import is_held, state_of
    done = finished(place, cfg, seeds)
    if len(done) == seeds:
        announce("run", f"finished already, {place}")
        return done
    if held := [env.parent for env in place.glob("*/env.json") if is_held(env.parent)]:
        raise Stopped(f"another process is running {held[0]}; wait for it, or end it first")
    announce("run", f"{seeds - len(done)} of {seeds} seeds to train, in {place}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    saving = [f"checkpoint_every={max(1, cfg.steps // CHECKPOINTS)}"] if cfg.checkpoint_every is None else []
    try:
        call(*launcher, "train.py", "--config", str(path), "--resume", "auto", *overrides, f"runs_dir={place}",
             f"trials={seeds}", *saving, failed=GO_ON)
    except Stopped as stopped:                       # torchrun ends with 1 whatever its workers ended with
        newest = max(place.glob("*/log.jsonl"), key=lambda log: log.stat().st_mtime, default=None)
        state = newest and state_of(newest.parent)
        if state == "stopped":
            raise Stopped(f"stopped by a signal and saved; {GO_ON}", EXIT_REQUEUE) from None
        if state == "not_finite":
            raise Stopped("a loss or gradient was not finite, as said above; the same command begins anew",
                          EXIT_NOT_FINITE) from None
        raise stopped
    done = finished(place, cfg, seeds)
    if len(done) < seeds:
        raise Stopped(f"{len(done)} of {seeds} seeds are finished in {place}; see above")
    return done


# ---- 4. and 5. report and verdict

def why_no_report(cfg) -> str:
    """Why the published curve says nothing of such a run; "" where it does."""
    from scripts.report import ReportError, record_of
    try:
        record = record_of(cfg.name)
    except ReportError:
        return f"no curve was published for {cfg.name}"
    lengths = (record["result_step"], record["steps"][-1])
    return "" if cfg.steps in lengths else (
        f"a run of {cfg.steps:,} steps is no repetition of {record['name']}, which has {lengths[0]:,}")


def rule_of(record: str) -> list[str]:
    """The option that names the track of a record; the ladders of 2024 have no rule but their target."""
    track = "track3" if record.startswith("track3/") else "track1" if re.match(r"\d\d-", record) else ""
    return ["--rule", track] if track else []


def reproduce(record: str, gpus: int | None, seeds: int, overrides: list[str]) -> None:
    stage = "preflight"
    try:
        path = preset(record)
        cfg, gpus = check(path, overrides, gpus, seeds)
        no_report, place = why_no_report(cfg), place_of(cfg, gpus)
        announce(stage, f"{cfg.name}: {cfg.steps:,} steps of {cfg.batch_tokens:,} tokens on {gpus} "
                 f"process{'es' * (gpus > 1)}, {seeds} seed{'s' * (seeds > 1)}" + f"; {no_report}" * bool(no_report))

        stage = "fetch"
        if missing := missing_data(cfg):
            announce(stage, missing)
            call("-m", "data.download", "--for", str(path), *overrides, failed=f"when that is mended, {GO_ON}")
            if missing := missing_data(cfg):
                raise Stopped(missing)
        else:
            announce(stage, f"nothing: {cfg.data.train} and {cfg.data.val} have what it reads")

        stage = "run"
        if len(finished(place, cfg, seeds)) < seeds:
            call("train.py", "--config", str(path), "--dry-run", *overrides, failed="this machine cannot run it so")
        runs = train(path, cfg, overrides, gpus, seeds, place)

        stage = "report"
        announce(stage, f"left out: {no_report}" if no_report else "the runs over the published curve")
        names = [str(run) for run in runs]
        if not no_report:
            call("-m", "scripts.report", *names, "--out", str(place / "report.png"), failed="")

        stage = "verdict"
        announce(stage, "")
        call("-m", "scripts.verdict", *names, *rule_of(record), failed="")
        print(f"\nruns in {place}\nfor a submission: python -m scripts.speedrun_log {names[0]}")
    except Stopped as stopped:
        told = str(stopped) or "see above"
        print("\n".join(f"error: {stage}: {line}" for line in told.splitlines())
              + f" (exit code {stopped.code})" * (stopped.code != 2), file=sys.stderr)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m scripts.reproduce", __doc__)
    parser.add_argument("record", metavar="RECORD", help="e.g. 04-muon or track3/normuon")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes (default: a GPU each; without GPUs one)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs, with seeds 0, 1, ... (default: 1)")
    args, overrides = parser.parse_known_args(argv)
    try:
        reproduce(args.record, args.gpus, args.seeds, overrides)
    except Stopped as stopped:
        return stopped.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
