"""Sweeps as jobs of a real Slurm: two nodes, which are two daemons on this host (tests/slurm_here.py)."""
import json
import os
import re
import shutil
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
SBATCH = """#!/bin/sh
late() { echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1; }
[ $(cat MOOD) = busy ] && late
REAL "$@"
[ $(cat MOOD) = late ] && late
[ $(cat MOOD) = killed ] && kill -9 $PPID
exit 0
"""
SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && rm MOOD 2>/dev/null && exit 1
exec REAL "$@"
"""
QUICK = ("import sys, scripts.sweep.slurm as s; s.ASK_EVERY_S = s.LOOK_EVERY_S = 0.2; "
         "from scripts.sweep.__main__ import entry; ")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sweep_slurm, "ASK_EVERY_S", 0.5)
    monkeypatch.setattr(sweep_slurm, "LOOK_EVERY_S", 0.2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    while STARTED:
        STARTED.pop().kill()


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return str(path), tmp_path / tmp_path.name                         # as its jobs are called


def long_run(tiny, tmp_path, steps=400, batch_tokens=64, seeds=(0,)):
    """A sweep of one trial of many steps with each seed, and the same as a configuration."""
    write_shard(tmp_path / "long.bin", (np.arange(batch_tokens * steps + 1) * 7 % 64).astype(np.uint16))
    keys = {"steps": steps, "data.train": str(tmp_path / "long.bin"), "batch_tokens": batch_tokens, "val_every": 200,
            "checkpoint_every": 100}
    path, out = write(tmp_path, json.dumps(dict(method="grid", base=str(tiny), seeds=seeds, parameters={
        key: {"value": value} for key, value in keys.items()})))
    return path, out, [f"{key}={value}" for key, value in keys.items()]


def in_a_mood(name, script, tmp_path, monkeypatch):
    """Put `script` before Slurm's own program of this name, also on the nodes; the file that it looks at."""
    mood, program = tmp_path / "mood", tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(script.replace("MOOD", str(mood)).replace("REAL", shutil.which(name)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return mood


def start(path, out, *slurm_keys):
    words = [path, "--out", str(out), "--slurm", *slurm_keys]
    with open(out.parent / f"said-{len(STARTED)}.txt", "w") as said:
        STARTED.append(subprocess.Popen([sys.executable, "-c", f"{QUICK}sys.exit(entry({words!r}))"], cwd=ROOT,
                                        stdout=said, stderr=subprocess.STDOUT))
    STARTED[-1].said = out.parent / said.name
    return STARTED[-1]


def end_of(controller):
    """(Its exit code, what it said.)"""
    return controller.wait(timeout=WAIT_S), controller.said.read_text()


def until(happened, what, controller=None):
    end = time.monotonic() + WAIT_S
    while not happened():
        assert controller is None or controller.poll() is None, controller.said.read_text()
        assert time.monotonic() < end, f"waited in vain: {what}\n{asked('squeue', '--states=all')}"
        time.sleep(0.1)


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def run_in(out, seed):
    runs = list(out.glob(f"trials/*/*-{seed}-*-*/env.json"))
    assert len(runs) <= 1, runs
    return runs[0].parent if runs else None


def steps_done(out, seed=0):
    run = run_in(out, seed)
    return max((line["step"] for line in read_log(run)[0]), default=0) if run and (run / "log.jsonl").exists() else 0


def start_again(job):
    """Sooner than Slurm's two minutes, but not within the second in which slurmd killed it: a launch in that second
    is refused ("Job credential revoked") and the job has failed."""
    time.sleep(1.1)
    asked("scontrol", "update", f"JobId={job}", "StartTime=now")


def jobs(out):
    """Job -> state, of all that were ever submitted."""
    lines = asked("squeue", "--me", "--states=all", "--noheader", "--array", "--format=%i %T %j").splitlines()
    return {job: state for job, state, name in map(str.split, lines) if name.startswith(f"sweep-{out.name}-")}


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
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sbatch refuses: ") and len(jobs(out)) == 3


def test_a_job_preempted_in_any_way_saves_and_is_requeued_though_nobody_follows(slurm, tiny, tmp_path, monkeypatch):
    steps = 1500                        # seconds enough for all that follows, on a fast machine too
    path, out, keys = long_run(tiny, tmp_path, steps, seeds=(0, 1))
    away = in_a_mood("scontrol", SCONTROL, tmp_path, monkeypatch)
    away.touch()                                                      # when the job asks for the first time
    controller = start(path, out, "time=30", "partition=down")
    until(lambda: len(jobs(out)) == 2, "the jobs", controller)
    first, last = sorted(jobs(out))
    asked("scontrol", "hold", first)                                  # which leaves the array's own number to the last
    asked("scontrol", "update", f"JobId={last}", "Partition=main")
    until(lambda: steps_done(out, seed=1) >= 3, "its first steps", controller)
    controller.send_signal(signal.SIGINT)
    code, said = end_of(controller)
    number = asked("squeue", "--noheader", f"--jobs={last}", "--format=%A").strip()
    assert code == 75 and number == last.partition("_")[0] and f"scancel {number}" in said, said
    assert jobs(out) == {first: "PENDING", last: "RUNNING"}

    controller, reached = start(path, out, "time=30"), 0              # begins to follow during what comes now
    trainer = lambda: asked("pgrep", "-f", f"^{sys.executable} {ROOT}/train.py --config {out}").split()
    for preempt in (lambda: asked("scancel", "--signal=USR2", last),                           # the time limit is near
                    lambda: asked("scontrol", "requeue", last),                                # a preemption
                    lambda: [os.kill(int(pid), signal.SIGUSR1) for pid in trainer()]):         # somebody else
        until(lambda: steps_done(out, seed=1) > reached + 2, "further steps", controller)
        preempt()
        until(lambda: jobs(out) == {first: "PENDING", last: "PENDING"}, "the queue", controller)
        summary = json.loads((run_in(out, seed=1) / "summary.json").read_text())
        assert summary["status"] == "stopped" and reached < summary["steps"] < steps
        reached = summary["steps"]
        start_again(last)
    asked("scancel", first)
    code, said = end_of(controller)
    assert code == 1 and said.count("in the queue already") == 2 and "submitted" not in said, said
    assert said.count(f"cancelled, job {first}") == 1 and jobs(out).keys() == {first, last}, said
    assert not away.exists()
    assert [row["status"] for row in rows_of(out)] == ["waiting", "finished"]
    train_here("--config", tiny, *keys, "seed=1")
    assert losses(run_in(out, seed=1)) == losses(the_run(tiny))


def test_submissions_that_fail_are_told_and_repeated_and_no_trial_has_two_jobs(slurm, tiny, tmp_path, monkeypatch):
    path, out = write(tmp_path, f"method: grid\nbase: {tiny}\nseeds: [0, 1, 2]\nparameters: {{steps: {{value: 8}}}}")
    mood = in_a_mood("sbatch", SBATCH, tmp_path, monkeypatch)
    waiting = lambda: sorted(job for job, state in jobs(out).items() if state == "PENDING")

    mood.write_text("killed")                                         # between sbatch and the note of what it said
    assert end_of(start(path, out, "partition=down"))[0] == -signal.SIGKILL
    first, second = waiting()                                         # an array holds two here
    mood.write_text("busy")
    controller = start(path, out, "partition=down")
    said = lambda words: until(lambda: words in controller.said.read_text(), words, controller)
    said("sbatch refuses: sbatch: error: Socket timed out on send/recv operation; jobs go on")
    assert waiting() == [first, second]
    mood.write_text("late")                                           # there is a job in spite of what sbatch says
    until(lambda: len(jobs(out)) >= 4, "late jobs", controller)
    mood.write_text("well")
    said("Slurm answers again")
    *_, third = sorted(jobs(out), key=lambda job: int(job.partition("_")[0]))
    until(lambda: waiting() == sorted([first, second, third]), "the late jobs' end", controller)
    asked("scontrol", "hold", second)
    said(f"held in the queue (JobHeldAdmin); to let it go on: scontrol release {second}")
    asked("scontrol", "release", second)
    said(f"in the queue again, job {second}")
    controller.send_signal(signal.SIGINT)
    code, text = end_of(controller)
    assert code == 75 and f"scancel {first.partition('_')[0]} {third}" in text, text
    counts = [text.count(words) for words in ("in the queue already", "submitted, job", "sbatch refuses")]
    assert counts == [2, 1, 1], text
    asked("scancel", *waiting())


@pytest.mark.parametrize("shape", [("nodes=1", "gpus_per_node=2"), ("nodes=2", "gpus_per_node=1")])
def test_a_run_of_several_processes_meets_by_c10d_and_survives_preemption(slurm, tiny, tmp_path, shape):
    path, out, keys = long_run(tiny, tmp_path, steps=150, batch_tokens=128)
    controller = start(path, out, *shape)
    until(lambda: steps_done(out) >= 3, "its first steps", controller)
    (job, _), = jobs(out).items()
    asked("scancel", "--signal=USR2", job)
    until(lambda: jobs(out) == {job: "PENDING"}, "the queue", controller)
    assert json.loads((run_in(out, seed=0) / "summary.json").read_text())["status"] == "stopped"
    start_again(job)
    code, said = end_of(controller)
    assert code == 0, said
    assert json.loads((run_in(out, seed=0) / "env.json").read_text())["world_size"] == 2
    assert train_elsewhere("--config", tiny, *keys, ranks=2).returncode == 0
    assert losses(run_in(out, seed=0)) == losses(the_run(tiny))
