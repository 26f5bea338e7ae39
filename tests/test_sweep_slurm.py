"""Sweeps as jobs of a real Slurm: two nodes, which are two daemons on this host (tests/slurm_here.py)."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data.shards import write_shard
from harness.rundir import read_log
from scripts.sweep import slurm as sweep_slurm
from scripts.sweep.__main__ import entry
from tests.conftest import ROOT, losses, the_run, train_elsewhere, train_here
from tests.slurm_here import asked, slurm  # noqa: F401

WAIT_S = 240
STARTED = []                            # controllers, which a test that fails leaves behind
QUICK = "import sys, scripts.sweep.slurm as s; s.ASK_EVERY_S = s.LOOK_EVERY_S = 0.2; from scripts.sweep.__main__ import entry; "


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sweep_slurm, "ASK_EVERY_S", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    while STARTED:
        STARTED.pop().kill()


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return str(path), tmp_path / tmp_path.name                         # as its jobs are called


def long_run(tiny, tmp_path, steps=400, batch_tokens=64):
    """A sweep of one trial of many steps, and the same as a configuration."""
    write_shard(tmp_path / "long.bin", (np.arange(batch_tokens * steps + 1) * 7 % 64).astype(np.uint16))
    keys = {"steps": steps, "data.train": str(tmp_path / "long.bin"), "batch_tokens": batch_tokens, "val_every": 200,
            "checkpoint_every": 100}
    path, out = write(tmp_path, json.dumps(dict(method="grid", base=str(tiny), parameters={
        key: {"value": value} for key, value in keys.items()})))
    return path, out, [f"{key}={value}" for key, value in keys.items()]


def start(path, out, *slurm_keys):
    words = [path, "--out", str(out), "--slurm", *slurm_keys]
    STARTED.append(subprocess.Popen([sys.executable, "-c", f"{QUICK}sys.exit(entry({words!r}))"], cwd=ROOT,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return STARTED[-1]


def until(happened, what, controller=None):
    end = time.monotonic() + WAIT_S
    while not happened():
        assert controller is None or controller.poll() is None, controller.communicate()[0]
        assert time.monotonic() < end, f"waited in vain: {what}\n{asked('squeue', '--states=all')}"
        time.sleep(0.1)


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def run_in(out):
    runs = list(out.glob("trials/*/*/env.json"))
    assert len(runs) <= 1, runs
    return runs[0].parent if runs else None


def steps_done(out):
    run = run_in(out)
    return max((line["step"] for line in read_log(run)[0]), default=0) if run and (run / "log.jsonl").exists() else 0


def start_again(job):
    """Sooner than Slurm's two minutes, but not within the second in which slurmd killed it: a launch in that second
    is refused ("Job credential revoked") and the job has failed."""
    time.sleep(1.1)
    asked("scontrol", "update", f"JobId={job}", "StartTime=now")


def jobs(out):
    """Job -> state, of all that were ever submitted."""
    lines = asked("squeue", "--me", "--states=all", "--noheader", "--array", "--format=%i %T %j").splitlines()
    return {job: state for job, state, name in map(str.split, lines) if name == sweep_slurm.job_name(out)}


def test_what_cannot_be_submitted_is_refused_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nparameters: {{steps: {{value: 8}}}}")
    for name in sweep_slurm.PROGRAMS:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)

    def refused(*words):
        assert entry([path, "--out", str(out), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "--slurm color=red: expected KEY=VALUE with a key of partition, account" in refused("--slurm", "color=red")
    assert "--slurm nodes=two: expected a whole number" in refused("--slurm", "nodes=two")
    assert "leave one out" in refused("--jobs", "2", "--slurm", "parallel=3")
    assert "cpus_per_task=N" in refused("--cores-per-trial", "1", "--slurm")
    assert "squeue does not answer" in refused("--slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert refused("--slurm") == "error: --slurm needs submitit: python -m pip install submitit"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch in PATH" in refused("--slurm")
    assert not list(out.glob("trials/*"))


def test_trials_are_one_array_and_reach_what_they_reach_here_and_a_crash_is_retried_once(slurm, tiny, tmp_path, capsys):
    crash = tmp_path / "crash.yaml"                                   # a model of a petabyte fits no machine
    crash.write_text(f"extends: {tiny}\nmodel: {{vocab_size: 10000000000000}}\n")
    path, out = write(tmp_path, f"method: grid\nparameters: {{config: {{values: ['{crash}', '{tiny}']}}}}")
    assert entry([path, "--out", str(out), "--slurm", "time=5"]) == 1
    said, (bad, good) = capsys.readouterr(), rows_of(out)
    assert [bad["status"], good["status"]] == ["crashed", "finished"] and "memory" in bad["error"]
    array = re.search(r"submitted, job (\d+)_0", said.out)[1]
    assert jobs(out).keys() > {f"{array}_0", f"{array}_1"} and len(jobs(out)) == 3             # the retry is the third
    assert said.out.count("submitted, job") == 3 and said.out.count(", once more") == 1, said.out
    assert (out / "trials" / bad["trial"] / "output.txt").read_text().count("Traceback") == 2
    train_here("--config", tiny)
    assert losses(out / good["run"]) == losses(the_run(tiny))
    assert entry([path, "--out", str(out), "--slurm", "partition=none-such"]) == 2
    assert "sbatch refuses: " in capsys.readouterr().err and len(jobs(out)) == 3


def test_a_job_that_is_preempted_in_any_way_saves_is_requeued_and_goes_on_though_nobody_follows(slurm, tiny, tmp_path):
    steps = 1500                        # seconds enough for all that follows, on a fast machine too
    path, out, keys = long_run(tiny, tmp_path, steps)
    controller = start(path, out, "time=30")
    until(lambda: steps_done(out) >= 3, "its first steps", controller)
    controller.send_signal(signal.SIGINT)
    said, _ = controller.communicate(timeout=WAIT_S)
    (job, state), = jobs(out).items()
    assert controller.returncode == 75 and f"scancel {job}" in said and state == "RUNNING", said

    controller, reached = start(path, out, "time=30"), 0              # begins to follow during what comes now
    trainer = lambda: asked("pgrep", "-f", f"^{sys.executable} {ROOT}/train.py --config {out}").split()
    for preempt in (lambda: asked("scancel", "--signal=USR2", job),                            # the time limit is near
                    lambda: asked("scontrol", "requeue", job),                                 # a preemption
                    lambda: [os.kill(int(pid), signal.SIGUSR1) for pid in trainer()]):         # somebody else
        until(lambda: steps_done(out) > reached + 2, "further steps", controller)
        preempt()
        until(lambda: jobs(out) == {job: "PENDING"}, "the queue", controller)
        summary = json.loads((run_in(out) / "summary.json").read_text())
        assert summary["status"] == "stopped" and reached < summary["steps"] < steps
        reached = summary["steps"]
        start_again(job)
    said, _ = controller.communicate(timeout=WAIT_S)
    assert controller.returncode == 0 and "in the queue already" in said and "submitted" not in said, said
    assert jobs(out).keys() == {job} and rows_of(out)[0]["status"] == "finished"
    train_here("--config", tiny, *keys)
    assert losses(run_in(out)) == losses(the_run(tiny))


@pytest.mark.parametrize("shape", [("nodes=1", "gpus_per_node=2"), ("nodes=2", "gpus_per_node=1")])
def test_a_run_of_several_processes_meets_by_c10d_and_survives_preemption(slurm, tiny, tmp_path, shape):
    path, out, keys = long_run(tiny, tmp_path, steps=150, batch_tokens=128)
    controller = start(path, out, *shape)
    until(lambda: steps_done(out) >= 3, "its first steps", controller)
    (job, _), = jobs(out).items()
    asked("scancel", "--signal=USR2", job)
    until(lambda: jobs(out) == {job: "PENDING"}, "the queue", controller)
    assert json.loads((run_in(out) / "summary.json").read_text())["status"] == "stopped"
    start_again(job)
    said, _ = controller.communicate(timeout=WAIT_S)
    assert controller.returncode == 0, said
    assert json.loads((run_in(out) / "env.json").read_text())["world_size"] == 2
    assert train_elsewhere("--config", tiny, *keys, ranks=2).returncode == 0
    assert losses(run_in(out)) == losses(the_run(tiny))
