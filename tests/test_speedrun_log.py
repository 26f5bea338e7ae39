"""A run as the speedrun's text log: it reads back to the run's numbers, and its source repeats the run."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from scripts.logs import read
from scripts.speedrun_log import RULE, main
from tests.conftest import ROOT, TINY, losses, the_run, train_here

TRACK1 = r"step:\d+/12( val_loss:\d\.\d{4})? train_time:\d+ms step_avg:\d+\.\d\dms"
TRACK3 = r"step:\d+/12 val_loss:\d\.\d{5} train_time:\d+\.\d{3}s step_avg:(\d+\.\d\d|nan)ms"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    (folder / "tiny.yaml").write_text(TINY.format(data=corpus, runs=folder / "runs"))
    assert train_here("--config", folder / "tiny.yaml", "seed=3", "average=0.5", "target_on=average",
                      "target_val_loss=3.5") == 0
    return the_run(folder / "tiny.yaml")


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / trained.name)


def refused(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


@pytest.mark.parametrize("form, line, digits", [("track1", TRACK1, 4), ("track3", TRACK3, 5)])
def test_a_log_reads_back_to_the_numbers_of_its_run(run, tmp_path, form, line, digits):
    out = tmp_path / "log.txt"
    assert main([str(run), "--form", form, "--out", str(out)]) == 0
    ours, back = read(run), read(out)
    assert (back.form, back.status, back.planned_steps) == (form.replace("track", "track "), "finished", 12)
    assert [v.step for v in back.validations] == [v.step for v in ours.validations] == [0, 4, 8, 12]
    assert [v.loss for v in back.validations] == [round(v.loss, digits) for v in ours.validations]
    assert [v.train_s for v in back.validations] == pytest.approx([v.train_s for v in ours.validations], abs=6e-4)
    averaged = [json.loads(each)["val_loss_avg"] for each in (run / "log.jsonl").open() if "val_loss_avg" in each]
    assert [v.loss for v in back.validations] == [round(loss, digits) for loss in averaged]
    source, versions, steps = re.split(f"^{RULE}\n", out.read_text(), flags=re.M)
    assert all(re.fullmatch(line, each) for each in steps.splitlines()), steps
    assert len(steps.splitlines()) == (16 if form == "track1" else 4)
    env = json.loads((run / "env.json").read_text())
    assert f"Running PyTorch {env['versions']['torch']} " in versions and " with world_size 1" in versions


def test_a_log_of_gpus_names_them_where_readers_look(run, tmp_path):
    env = json.loads((run / "env.json").read_text())
    env |= {"device": "NVIDIA H100 80GB HBM3", "world_size": 8, "gpus": ["NVIDIA H100 80GB HBM3"] * 8}
    env["versions"] |= {"torch": "2.13.0+cu130", "cuda": "13.0"}
    (run / "env.json").write_text(json.dumps(env))
    assert main([str(run)]) == 0
    assert read(run / f"{run.name}.txt").machine == {"device": "NVIDIA H100 80GB HBM3", "world_size": 8,
                                                     "torch": "2.13.0+cu130", "cuda": "13.0"}


def test_the_first_part_of_a_log_repeats_the_run(run, trained, tmp_path):
    assert main([str(run), "--out", str(tmp_path / "log.txt")]) == 0
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(r"sed '/^=\{100\}$/,$d' ../log.txt | sh", shell=True, check=True, cwd=there)
    source, copied = run / "source", there / run.name
    for file in filter(os.path.isfile, copied.rglob("*")):
        name = file.relative_to(copied)
        assert file.read_bytes() == (run if str(name) == "config.yaml" else source).joinpath(name).read_bytes(), name
    for package in ("train.py", "model", "optim", "data", "harness"):
        assert subprocess.run(["diff", "-rq", source / package, copied / package]).returncode == 0
    done = subprocess.run([sys.executable, "train.py", "--config", "config.yaml", f"runs_dir={tmp_path / 'again'}"],
                          cwd=copied, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    again, = (tmp_path / "again").iterdir()
    assert losses(again) == losses(trained)


@pytest.mark.parametrize("status, said", [(None, "its status is running"), ("stopped", "its status is stopped")])
def test_an_unfinished_run_is_refused(run, capsys, status, said):
    summary = json.loads((run / "summary.json").read_text()) | {"status": status}
    (run / "summary.json").write_text(json.dumps(summary)) if status else (run / "summary.json").unlink()
    told = refused(capsys, run)
    assert said in told and f"train.py --resume {run}" in told
    assert not list(run.glob("*.txt")) and not list(run.glob(".*.part"))


@pytest.mark.parametrize("line", [RULE, "step:3/12 val_loss:1.0 train_time:1.0s step_avg:1ms"])
def test_a_source_that_would_be_read_as_something_else_is_refused_and_nothing_is_written(run, capsys, line):
    with open(run / "source" / "train.py", "a") as file:
        file.write(f'"""\n{line}\n"""\n')
    refused(capsys, run)
    assert not list(run.glob("*.txt")) and not list(run.glob(".*.part"))


def test_a_run_without_its_source_or_its_last_line_or_a_published_log_is_refused(run, capsys, tmp_path):
    published = tmp_path / "log.txt"
    assert main([str(run), "--out", str(published)]) == 0
    capsys.readouterr()
    assert "a published log already" in refused(capsys, published)
    assert "No such file" in refused(capsys, run, "--out", tmp_path / "nowhere" / "log.txt")
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:-1]))
    assert "no validation at its last step 12" in refused(capsys, run)
    (run / "log.jsonl").write_text("".join(log))
    env = json.loads((run / "env.json").read_text())
    elsewhere = env | {"resumes": [{"step": 4, "changed": {"device": "NVIDIA B200"}}]}
    (run / "env.json").write_text(json.dumps(elsewhere))
    assert "resumed with other code or on another machine (device)" in refused(capsys, run)
    (run / "env.json").write_text(json.dumps(env))
    shutil.rmtree(run / "source")
    assert "no source/train.py" in refused(capsys, run)


def test_help_loads_nothing_slow():
    code = ("import runpy, sys\nsys.argv = ['x', '--help']\n"
            "for name in ('speedrun_log', 'leaderboard', 'reproduce'):\n"
            "    try: runpy.run_module('scripts.' + name, run_name='__main__')\n"
            "    except SystemExit: pass\n"
            "print('loaded:', *{'torch', 'scipy', 'matplotlib', 'yaml'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("usage:") == 3 and done.stdout.strip().endswith("loaded:"), done.stdout + done.stderr
