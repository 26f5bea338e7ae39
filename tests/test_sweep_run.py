"""Sweeps with real trials: packed, interrupted, killed, crashed, continued."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.shards import write_shard
from harness.rundir import hold, is_held, read_log
from scripts.sweep.__main__ import entry
from scripts.sweep.file import read
from scripts.sweep.plan import plan
from scripts.sweep.results import run_of, status_of
from tests.conftest import ROOT, losses, train_here

WAIT_S = 120
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return str(path), tmp_path / "out"


def start(path, out, *more, program=("-m", "scripts.sweep"), **environment):
    return subprocess.Popen([sys.executable, *program, path, "--out", str(out), *more], cwd=ROOT, text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def until(happened, sweep=None):
    end = time.monotonic() + WAIT_S
    while not happened():
        assert sweep is None or sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def the_run(out):
    """The one run directory of the one trial, once it has one."""
    runs = list(out.glob("trials/*/*/env.json"))
    assert len(runs) <= 1
    return runs[0].parent if runs else None


def steps_done(out):
    run = the_run(out)
    return max((line["step"] for line in read_log(run)[0]), default=0) if run and (run / "log.jsonl").exists() else 0


def trial_process(sweep):
    """The id of the one child of a sweep."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == sweep.pid:
            return int(stat.parent.name)


def test_a_crash_is_retried_once_and_reported_and_stops_no_other_trial(tiny, tmp_path, capsys):
    """A model of a petabyte fits no machine; a rate of 1e30 ends with losses that are not finite, which is a result."""
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nbaseline: {{optim.rest.lr: 1.0e+30}}\n"
                                "parameters: {model.vocab_size: {values: [64, 10000000000000]}}")
    cores = sorted(os.sched_getaffinity(0))[:2] if sys.platform == "linux" else []
    jobs = ["--jobs", str(max(1, len(cores)))]
    assert entry([path, "--out", str(out), *jobs]) == 1
    said = capsys.readouterr()
    wild, good, bad = rows_of(out)
    assert [wild["status"], good["status"], bad["status"]] == ["not_finite", "finished", "crashed"]
    assert (out / "trials" / wild["trial"] / "output.txt").read_text().count("error:") == 1     # not tried again
    assert f"error: trial {bad['trial']}: crashed; exit code 1: " in said.err and "memory" in bad["error"], said.err
    assert (out / "trials" / bad["trial"] / "output.txt").read_text().count("Traceback") == 2
    summary = json.loads((out / good["run"] / "summary.json").read_text())
    assert good["val_loss"] == summary["val_loss"] and good["tokens_per_s"] == summary["tokens_per_s"]
    assert good["steps"] == good["of_steps"] == 12 and good["seed"] == summary["seed"] == 0
    table = said.out[said.out.index("**Ranking**"):]
    assert f"| 64 | 1 of 1 | {good['val_loss']:.4f} | " in table and "1 not_finite" in table
    assert entry([path, "--out", str(out), "--table"]) == 0 and capsys.readouterr().out == table
    train_here("--config", tiny)
    alone = losses(next((tmp_path / "runs").iterdir()))
    assert losses(out / good["run"]) == alone                                   # the same run as without a sweep

    path, _ = write(tmp_path, (tmp_path / "sweep.yaml").read_text().replace("[64, 10000000000000]", "[64]"))
    assert entry([path, "--out", str(out), *jobs]) == 0
    said = capsys.readouterr()
    assert "2 trials of 2 configurations, 2 done already" in said.out and "started" not in said.out
    assert [each["run"] for each in rows_of(out)] == [wild["run"], good["run"]]

    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (tmp_path / "other.yaml").write_text(Path(path).read_text() + "\n# edited meanwhile\n")
        assert entry([str(tmp_path / "other.yaml"), "--out", str(out), *jobs]) == 2
    assert (out / "sweep.yaml").read_text() == Path(path).read_text()               # that of who runs it
    assert capsys.readouterr().err == f"error: {out}: another process is running this sweep\n"


@linux
def test_a_sweep_that_is_stopped_or_killed_continues_its_trial_where_it_was(tiny, tmp_path):
    steps, batch_tokens = 500, 64
    write_shard(tmp_path / "long.bin", (np.arange(batch_tokens * steps + 1) * 7 % 64).astype(np.uint16))
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nparameters: {{steps: {{value: {steps}}}, "
                                f"data.train: {{value: {tmp_path / 'long.bin'}}}, "
                                f"batch_tokens: {{value: {batch_tokens}}}, val_every: {{value: 250}}, "
                                "checkpoint_every: {value: 20}}")
    sweep = start(path, out)
    until(lambda: steps_done(out) >= 3, sweep)
    named = str(the_run(out).relative_to(out))
    until(lambda: (rows_of(out)[0]["status"], rows_of(out)[0]["run"]) == ("running", named), sweep)
    sweep.send_signal(signal.SIGINT)
    said, _ = sweep.communicate(timeout=WAIT_S)
    assert sweep.returncode == 75 and "stopped by a signal; the same command continues it" in said, said
    summary = json.loads((the_run(out) / "summary.json").read_text())
    assert summary["status"] == rows_of(out)[0]["status"] == "stopped" and 3 <= summary["steps"] < steps
    before = losses(the_run(out))

    sweep = start(path, out)                                                    # its trial is killed, then itself
    until(lambda: steps_done(out) > summary["steps"] + 25, sweep)
    os.kill(trial_process(sweep), signal.SIGKILL)
    for line in sweep.stdout:
        if "crashed, exit code -9" in line:
            break
    reached = steps_done(out)
    until(lambda: steps_done(out) > reached, sweep)
    child = trial_process(sweep)
    sweep.kill()
    sweep.communicate()
    until(lambda: not Path(f"/proc/{child}").exists())
    summary = json.loads((the_run(out) / "summary.json").read_text())
    assert summary["status"] == "stopped" and reached < summary["steps"] < steps    # saved when its sweep died

    sweep = start(path, out)
    said, _ = sweep.communicate(timeout=WAIT_S)
    assert sweep.returncode == 0, said
    train, val = read_log(the_run(out))
    assert [line["step"] for line in train] == list(range(1, steps + 1))
    assert [line["step"] for line in val] == [0, 250, 500]
    assert rows_of(out)[0]["status"] == "finished" and rows_of(out)[0]["steps"] == steps
    assert before.items() <= losses(the_run(out)).items()                       # nothing was trained anew


TWO_RANKS = "import sys; from scripts.sweep import pack, __main__ as s; " \
            "pack.slots = lambda *_: [pack.Slot(0, ('0', '1'), (), 1)]; sys.exit(s.entry(sys.argv[1:]))"


@linux
def test_ranks_under_torchrun_are_asked_to_save_and_are_ended_by_a_second_signal(tiny, tmp_path):
    """A trial of two GPUs, which are gloo's here: torchrun itself would pass a signal on as its workers' death."""
    steps = 1500
    write_shard(tmp_path / "long.bin", (np.arange(64 * steps + 1) * 7 % 64).astype(np.uint16))
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nparameters: {{steps: {{value: {steps}}}, "
                                f"data.train: {{value: {tmp_path / 'long.bin'}}}, batch_tokens: {{value: 64}}}}")

    def workers():
        found = subprocess.run(["pgrep", "-f", f"train.py --config {out}"], capture_output=True, text=True)
        return found.stdout.split()

    for signals in (1, 2):
        before = steps_done(out)
        sweep = start(path, out, program=("-c", TWO_RANKS))
        until(lambda: steps_done(out) >= before + 3, sweep)
        assert len(workers()) == 3                                              # torchrun and its two
        if signals == 2:
            for pid in workers():                                               # they do not listen
                os.kill(int(pid), signal.SIGSTOP)
            sweep.send_signal(signal.SIGTERM)
            time.sleep(1)
        sweep.send_signal(signal.SIGTERM)
        said, _ = sweep.communicate(timeout=WAIT_S)
        assert sweep.returncode == 75, said
        until(lambda: not workers())
        if signals == 1:
            summary = json.loads((the_run(out) / "summary.json").read_text())
            assert (summary["status"], summary["world_size"]) == ("stopped", 2) and 3 <= summary["steps"] < steps


SLOW = """
import os, pathlib, signal, sys, time
if "train.py" in " ".join(sys.orig_argv) and "torch.distributed.run" not in sys.orig_argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(__file__).with_name(f"up-{os.getpid()}").touch()
    while pathlib.Path(__file__).with_name("wait").exists():
        time.sleep(0.05)
"""


@linux
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_whose_sweep_was_killed_while_it_imports_is_seen_and_not_started_again(tiny, tmp_path, ranks):
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nparameters: {{steps: {{value: 12}}}}")
    (trial,) = plan(read(Path(path)), out)
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)                                # before Python imports anything
    (slow / "wait").touch()
    program = ("-m", "scripts.sweep") if ranks == 1 else ("-c", TWO_RANKS)
    sweep = start(path, out, program=program, PYTHONPATH=str(slow))
    until(lambda: len(list(slow.glob("up-*"))) == ranks, sweep)
    torchrun = trial_process(sweep)
    assert rows_of(out)[0]["status"] == "running" and rows_of(out)[0]["run"] is None
    sweep.kill()
    sweep.communicate()
    if ranks == 2:
        os.kill(torchrun, signal.SIGKILL)                                       # by the kernel, for memory
        until(lambda: not Path(f"/proc/{torchrun}").exists())
    assert status_of(trial) == "running"
    if ranks == 1:
        sweep = start(path, out, PYTHONPATH=str(slow))
        said = ""
        while "still running, left over" not in said:
            said = sweep.stdout.readline()
            assert said, "it ended"
        (slow / "wait").unlink()
        said, _ = sweep.communicate(timeout=WAIT_S)
        assert sweep.returncode == 0 and len(list(slow.glob("up-*"))) == 1, said
        assert the_run(out) and rows_of(out)[0]["status"] == "finished"
    else:
        for up in slow.glob("up-*"):
            os.kill(int(up.name.removeprefix("up-")), signal.SIGKILL)
        until(lambda: status_of(trial) == "waiting")


def test_what_a_trial_leaves_behind_does_not_hold_its_lock(tmp_path):
    """As wandb's service may, which still uploads."""
    code = "import subprocess; from harness.processes import keep_lock; keep_lock(); " \
           "print(subprocess.Popen(['sleep', '60']).pid, flush=True); " \
           "import time; time.sleep(60)"
    with hold(tmp_path) as lock:
        trial = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=lock, stdout=subprocess.PIPE, text=True)
    service = int(trial.stdout.readline())
    try:
        assert is_held(tmp_path)
        trial.kill()
        trial.wait()
        assert Path(f"/proc/{service}").exists() and not is_held(tmp_path)
    finally:
        os.kill(service, signal.SIGKILL)


def test_a_run_with_a_final_result_is_not_hidden_by_a_newer_one(tiny, tmp_path):
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nparameters: {{steps: {{value: 12}}}}")
    (trial,) = plan(read(Path(path)), out)
    for name, status in (("a", "stopped"), ("b", "finished"), ("c", "stopped")):
        (trial.folder / name).mkdir(parents=True)
        (trial.folder / name / "env.json").write_text("{}")
        (trial.folder / name / "summary.json").write_text(json.dumps(dict(status=status)))
        time.sleep(0.01)
        assert run_of(trial).name == dict(a="a", b="b", c="b")[name]
