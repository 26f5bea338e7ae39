"""The program around a sweep: its folder, what it refuses, what it removes and writes. Nothing is trained."""
import json
import os
from pathlib import Path

import pytest
import torch

from harness.rundir import Log, is_held
from harness.yaml_tree import ConfigError
from scripts.sweep import bayes, pack
from scripts.sweep.__main__ import entry
from scripts.sweep.file import read
from scripts.sweep.plan import plan
from scripts.sweep.results import row
from scripts.sweep.show import Show


def write(tmp_path, tiny, more="parameters: {steps: {values: [12, 13]}}", method="grid"):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: {method}\nbase: {tiny}\n{more}\n")
    return path, tmp_path / "out"


def finished(trial, **env):
    """What a trial leaves that finished; its run directory."""
    run = trial.folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_000012.pt").touch()
    (run / "env.json").write_text(json.dumps(env))
    (run / "summary.json").write_text(json.dumps(dict(status="finished")))
    (run / "log.jsonl").write_text(json.dumps(dict(step=12, train_s=1.0, val_loss=3.5)) + "\n")
    return run


def refused(capsys, *arguments):
    """The one line that is said."""
    try:
        code = entry(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.count("\n") == 1, (code, said)
    return said.err


@pytest.mark.parametrize("option", [[], ["--dry-run"], ["--table"]], ids=str)
@pytest.mark.parametrize("place", ["a file", "a file/below", "a file/below/it"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(tiny, tmp_path, capsys, option, place):
    path, _ = write(tmp_path, tiny)
    (tmp_path / "a file").write_text("precious")
    said = refused(capsys, path, "--out", tmp_path / place, *option)
    assert "a file" in said and said.endswith("; give --out another folder\n")
    assert (tmp_path / "a file").read_text() == "precious"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=str)
def test_a_folder_that_the_system_does_not_make_is_refused_in_one_line(tiny, tmp_path, capsys, option):
    assert refused(capsys, write(tmp_path, tiny)[0], "--out", "/proc/x", *option).startswith("error: /proc/x: No such")


@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=str)
def test_a_sweep_that_is_refused_leaves_nothing_behind(tiny, tmp_path, capsys, option):
    path, out = write(tmp_path, tiny, "parameters: {steps: {values: [12, -1]}}")
    assert "steps" in refused(capsys, path, "--out", out / "below", *option)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    refused(capsys, path, "--out", out, *option)
    assert (out / "mine").exists() and not (out / "trials").exists()


@pytest.mark.parametrize("options, said", [
    ("--table --jobs 9", "--table runs nothing; leave out --jobs"), ("--table --slurm foo", "leave out --slurm"),
    ("--table --slurm", "leave out --slurm"), ("--table --gpus-per-trial 2", "leave out --gpus-per-trial"),
    ("--table --dry-run", "leave out --dry-run"), ("--slurm --cores-per-trial 2", "divide this machine")])
def test_options_that_do_nothing_are_refused(tiny, tmp_path, capsys, options, said):
    path, out = write(tmp_path, tiny)
    assert said in refused(capsys, path, "--out", out, *options.split())


@pytest.mark.parametrize("option, held", [([], True), (["--dry-run"], False), (["--table"], False)], ids=str)
def test_nobody_else_can_write_to_the_memory_of_a_search_after_it_was_read(tiny, tmp_path, monkeypatch, option, held):
    """Else a call that starts while another ends would go on without what that one proposed last."""
    pytest.importorskip("optuna")
    path, out = write(tmp_path, tiny, "budget: 3\nparameters: {optim.hidden.lr: {min: 0.01, max: 0.1}}", "bayes")
    out.mkdir()
    seen = []

    def look(search, sweep, folder):
        seen.append(is_held(folder))
        raise ConfigError("enough")
    monkeypatch.setattr(bayes.Search, "__init__", look)
    assert entry([str(path), "--out", str(out), *option]) == 2 and seen == [held]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("place", ["results.jsonl", "trial.yaml"])
def test_a_full_disk_is_one_line_and_the_same_command_continues(tiny, tmp_path, capsys, place):
    path, out = write(tmp_path, tiny)
    trial, _ = plan(read(path), out)
    folder = out if place == "results.jsonl" else trial.folder
    folder.mkdir(parents=True)
    (folder / f".{place}.part").symlink_to("/dev/full")
    assert entry([str(path), "--out", str(out), "--jobs", "1"]) == 75
    said = capsys.readouterr().err
    assert said == f"error: {out}: No space left on device; mend that, and the same command continues the sweep\n"
    assert not list(folder.glob(".*.part")) and not (folder / place).exists()


def test_checkpoints_go_and_data_are_named_of_trials_that_finished_while_nobody_looked(tiny, tmp_path, capsys):
    path, out = write(tmp_path, tiny)
    runs = [finished(trial, train_data=dict(sha256=f"{i}23456789abcdef"), val_data=dict(sha256="0" * 64))
            for i, trial in enumerate(plan(read(path), out))]
    assert entry([str(path), "--out", str(out), "--table"]) == 0 and all((run / "checkpoints").exists() for run in runs)
    assert entry([str(path), "--out", str(out)]) == 0 and "2 done already" in capsys.readouterr().out
    assert not any((run / "checkpoints").exists() for run in runs)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [each["train_data"] for each in rows] == ["023456789abc", "123456789abc"]
    assert {each["val_data"] for each in rows} == {12 * "0"}


def test_the_sweep_file_that_is_kept_of_a_preset_runs_it_again_and_its_weights_stay(tiny, tmp_path, capsys):
    preset, out = tmp_path / "mine.yaml", tmp_path / "out"
    preset.write_text("extends: tiny.yaml\nsteps: 11\n")                        # beside it, and not beside a copy
    (trial,) = plan(read(preset), out)
    run, rows = finished(trial), []
    assert row(trial, out)["train_data"] is None
    for path in (preset, out / "sweep.yaml", out / "sweep.yaml"):
        assert entry([str(path), "--out", str(out)]) == 0
        assert "1 trials of 1 configurations, 1 done already" in capsys.readouterr().out
        rows.append((out / "results.jsonl").read_text())
        assert (run / "checkpoints" / "step_000012.pt").exists()
    assert rows[0] == rows[1] == rows[2]


def test_the_live_table_follows_a_log_that_was_cut_back_and_outgrew_itself_between_two_looks(tiny, tmp_path):
    path, out = write(tmp_path, tiny)
    trial, _ = plan(read(path), out)
    log = finished(trial) / "log.jsonl"
    line = json.dumps(dict(step=1, train_s=1.1234, train_loss=3.5)) + "\n"
    log.write_text(109 * line + '{"step": 101, "val_loss": 3.9}\n')              # a validation that comes again, later
    show = Show(1)
    assert show.follow(trial)["val_loss"] == 3.9
    again = Log(log, 100)                                                       # as train.py does
    for step in range(2, 140):
        again.write(step=step, train_s=12.12, train_loss=3.25)
    assert show.follow(trial) == dict(step=139, train_s=12.12, train_loss=3.25)
    again.file.write('{"step": 140, "tra\n[5]\n{"step": 141}\n')                # damaged
    assert show.follow(trial)["step"] == 141


@pytest.mark.parametrize("named, count, found", [
    ("MIG-a,MIG-b,MIG-c", 1, ["MIG-a", "MIG-b", "MIG-c"]), ("3,5,9", 2, ["3", "5"]), (None, 2, ["0", "1"])])
def test_parts_of_a_gpu_are_places_of_their_own_though_a_process_sees_one(monkeypatch, named, count, found):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": named} if named else {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert pack.gpus_here() == found
