"""`make reproduce`: from shards to a verdict in a copy of the project with a tiny record; kills; what stops it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import reproduce
from tests.conftest import ROOT, TINY, losses, train_here

STEPS = 32
CURVE = {"source": "made up for a test", "hardware": "none", "torch": "none", "presets": ["tiny"], "result_step": STEPS,
         "steps": list(range(0, STEPS + 1, 4)), "val_loss": [4.1589] + [3.0] * (STEPS // 4)}


@pytest.fixture
def project(corpus, tmp_path) -> Path:
    """A copy of the project with a record `tiny` and its curve, and an environment that `make` finds set up."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("train.py", "Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, copy)
    for name in ("model", "optim", "data", "harness", "scripts", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.bin"))
    records = copy / "configs" / "records"
    (records / "tiny.yaml").write_text(TINY.format(data=corpus, runs="runs").replace("steps: 12", f"steps: {STEPS}"))
    (records / "curves" / "tiny.json").write_text(json.dumps(CURVE))
    (copy / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".run"):
        (copy / ".venv" / name).touch()
    return copy


@pytest.fixture
def record(corpus, tmp_path, monkeypatch):
    """The name of a tiny record, in this process."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(data=corpus, runs=tmp_path / "runs"))
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield "tiny"
    os.environ.pop("WORLD_SIZE", None)


@pytest.fixture
def called(monkeypatch):
    """The programs that would be called, in place of calling them."""
    commands = []
    monkeypatch.setattr(reproduce, "call", lambda *command, failed: commands.append(command))
    return commands


def make(project, *variables) -> subprocess.Popen:
    return subprocess.Popen(["make", "reproduce", "RECORD=tiny", f"RUN={sys.executable}", *variables], cwd=project,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def descendants(pid: int) -> list[int]:
    """Process `pid` and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(each for child in children.read_text().split() for each in descendants(int(child)))]


def kill_at(process: subprocess.Popen, project: Path, step: int) -> None:
    """SIGKILL to everything that `process` started, once the run has logged `step`."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        logs = list(project.glob("runs/reproduce/tiny/*/*/log.jsonl"))
        if logs and f'"step": {step},' in logs[0].read_text():
            for pid in descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.002)
    raise AssertionError(f"the run never came to step {step}: {process.communicate()}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes to kill in /proc")
def test_two_processes_killed_and_repeated_end_with_a_report_and_a_verdict(project):
    wanted = ["GPUS=2", "SEEDS=2", "ARGS=target_val_loss=3.5"]
    kill_at(make(project, *wanted), project, 11)
    cut_off, = project.glob("runs/reproduce/tiny/2x-*/*/")
    assert (cut_off / "checkpoints" / "step_000009.pt").exists() and not (cut_off / "summary.json").exists()

    process = make(project, *wanted)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    stages = [line for line in out.splitlines() if line.startswith("[")]
    assert [line.split()[1] for line in stages] == list(reproduce.STAGES)
    assert "32 steps of 256 tokens on 2 processes, 2 seeds" in stages[0] and "nothing: " in stages[1]
    assert "resumed at step 9 from" in out and "ready: nothing is missing" in out
    runs = sorted(project.glob("runs/reproduce/tiny/2x-*/tiny-*"))
    assert len(runs) == 2 and cut_off in runs
    for run in runs:
        assert json.loads((run / "summary.json").read_text())["world_size"] == 2 and len(losses(run)) == STEPS + 9
        assert f"{run.relative_to(project)}: the end point " in out                        # the report
    assert (cut_off.parent / "report.png").stat().st_size > 10_000
    assert "tiny: 2 runs of 32 steps (ours), seeds 0 1" in out and "mean below 3.5: p = " in out


def test_finished_seeds_are_not_trained_again_but_reported_and_judged(record, called, tmp_path, capsys):
    cfg, gpus = reproduce.check(tmp_path / "tiny.yaml", [], 1, 1)
    place = reproduce.place_of(cfg, gpus)
    assert train_here("--config", tmp_path / "tiny.yaml", f"runs_dir={place}") == 0
    assert reproduce.main([record, "--gpus", "1"]) == 0
    run, = place.glob("tiny-0-*")
    assert called == [("-m", "scripts.verdict", str(run))]                      # no curve was published for it
    out = capsys.readouterr().out
    assert "finished already" in out and "left out: no curve was published for tiny" in out

    called.clear()
    assert reproduce.main([record, "--gpus", "1", "--seeds", "2", "optim.rest.lr=0.01", "seed=0"]) == 2
    assert "1 of 2 seeds are finished in " in capsys.readouterr().err                   # nothing was really called
    training = next(command for command in called if "trials=2" in command)
    assert training[:4] == ("train.py", "--config", str(tmp_path / "tiny.yaml"), "--resume")
    assert {f"runs_dir={place}", "optim.rest.lr=0.01", "checkpoint_every=1"} <= set(training)
    assert ("train.py", "--config", str(tmp_path / "tiny.yaml"), "--dry-run", "optim.rest.lr=0.01", "seed=0") in called

    other, _ = reproduce.check(tmp_path / "tiny.yaml", ["optim.rest.lr=0.02"], 1, 1)
    assert reproduce.finished(place, cfg, 1) == [run] and reproduce.finished(place, other, 1) == []


def test_another_code_or_number_of_processes_has_another_place(record, tmp_path, monkeypatch):
    cfg, _ = reproduce.check(tmp_path / "tiny.yaml", [], 1, 1)
    before = reproduce.place_of(cfg, 1)
    assert before.parent == tmp_path / "runs" / "reproduce" / "tiny" and before != reproduce.place_of(cfg, 2)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "optim", other / "optim")
    monkeypatch.setattr(reproduce, "ROOT", other)
    alone = reproduce.place_of(cfg, 1)
    with open(other / "optim" / "muon.py", "a") as file:
        file.write("\n")
    assert len({before, alone, reproduce.place_of(cfg, 1)}) == 3


def test_missing_shards_without_a_network_end_with_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    data = tmp_path / "fineweb10B"
    where = [f"data.{split}={data}/fineweb_{split}_*.bin" for split in ("train", "val")]
    assert reproduce.main(["track3/muon", "--gpus", "1", f"runs_dir={tmp_path / 'runs'}", *where]) == 2
    os.environ.pop("WORLD_SIZE")
    out, err = capfd.readouterr()
    assert "[2/5] fetch     data.train: no file matches" in out and "[3/5]" not in out
    assert "read 18 of fineweb10B's 103 shards" in out
    assert "error: http://127.0.0.1:9 cannot be reached" in err and f"put the files into {data} " in err
    assert err.endswith("error: fetch: when that is mended, the same command goes on from here\n")
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_fails_ends_it_with_its_exit_code(record, monkeypatch, capfd):
    really = reproduce.call
    monkeypatch.setattr(reproduce, "call", lambda *command, failed: "--dry-run" in command
                        or really(*command, failed=failed))
    assert reproduce.main([record, "optim.rest.lr=1e30", "grad_clip=null", "steps=12"]) == 3
    out, err = capfd.readouterr()
    assert "[3/5] run" in out and "[4/5]" not in out
    assert err.endswith("error: run: a loss or gradient was not finite, as said above; the same command begins anew "
                        "(exit code 3)\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on_so_that_a_run_can_save(number):
    child = ("import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
             f"os.kill(os.getppid(), {int(number)})\ntime.sleep(30)")
    before = signal.getsignal(number)
    with pytest.raises(reproduce.Stopped, match="again") as stopped:
        reproduce.call("-c", child, failed="again")
    assert stopped.value.code == 75 and signal.getsignal(number) == before


@pytest.mark.parametrize("status, code, said", [("stopped", 75, "goes on from here"), ("not_finite", 3, "begins anew"),
                                                ("finished", 1, "goes on from here")])
def test_how_a_run_under_torchrun_ended_is_read_from_its_summary(record, tmp_path, monkeypatch, status, code, said):
    cfg, _ = reproduce.check(tmp_path / "tiny.yaml", [], 1, 1)

    def torchrun(*command, failed):
        for name, ended in (("a", "finished"), ("b", status)):
            (tmp_path / "place" / name).mkdir(parents=True)
            (tmp_path / "place" / name / "summary.json").write_text(json.dumps({"status": ended}))
            (tmp_path / "place" / name / "log.jsonl").touch()
            os.utime(tmp_path / "place" / name / "log.jsonl", (0, ord(name)))
        raise reproduce.Stopped(failed, 1)

    monkeypatch.setattr(reproduce, "call", torchrun)
    with pytest.raises(reproduce.Stopped, match=said) as stopped:
        reproduce.train(tmp_path / "tiny.yaml", cfg, [], 2, 1, tmp_path / "place")
    assert stopped.value.code == code


@pytest.mark.parametrize("arguments, said", [
    ([""], "RECORD is missing; one of "), (["05-muon"], "no record '05-muon'; RECORD is one of 01-llmc, "),
    (["track3/muon", "--gpus", "0"], "GPUS=0, SEEDS=1: both begin at 1"),
    (["track3/muon", "--seeds", "0"], "SEEDS=0: both begin at 1"),
    (["track3/muon", "trials=3"], "give the number of seeds as SEEDS=3"),
    (["track3/muon", "--gpu", "8"], "gpu"), (["track3/muon", "stepps=8"], "stepps"),
    (["track3/muon", "--gpus", "1", "val_tokens=1000"], "val_tokens 1000 is not a multiple")])
def test_bad_arguments_are_told_before_anything_starts(arguments, said, called, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert reproduce.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: preflight: ") and said in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not called


def test_more_processes_than_gpus_are_refused(called, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert reproduce.main(["track3/muon", "--gpus", "8"]) == 2
    assert "GPUS=8, but this machine has 2" in capsys.readouterr().err


def test_a_run_that_another_process_continues_is_not_run_twice(record, called, tmp_path, capsys):
    from harness.rundir import hold
    cfg, _ = reproduce.check(tmp_path / "tiny.yaml", [], 1, 1)
    run = reproduce.place_of(cfg, 1) / "tiny-0-now"
    run.mkdir(parents=True)
    (run / "env.json").write_text("{}")
    lock = hold(run)
    assert reproduce.main([record, "--gpus", "1"]) == 2
    lock.close()
    assert f"another process is running {run}" in capsys.readouterr().err
    assert all("--dry-run" in command for command in called)


@pytest.mark.parametrize("name, track", [("04-muon", ["--rule", "track1"]), ("track3/muon", ["--rule", "track3"]),
                                         ("2024-10-29/muon", []), ("2024-11-06/0-baseline", [])])
def test_each_track_has_its_rule(name, track):
    assert reproduce.preset(name).is_file() and reproduce.rule_of(name) == track


def test_a_run_of_another_length_is_said_to_be_no_repetition():
    cfg, _ = reproduce.check(reproduce.preset("track3/normuon"), ["steps=20"], 1, 1)
    assert "a run of 20 steps is no repetition of track3-normuon, which has 3,250" in reproduce.why_no_report(cfg)
    cfg, _ = reproduce.check(reproduce.preset("track3/normuon"), [], 1, 1)
    assert reproduce.why_no_report(cfg) == ""
    os.environ.pop("WORLD_SIZE")
