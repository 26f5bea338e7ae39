"""Our runs and four published logs, read into one form."""
import json
import shutil

import pytest

from scripts.logs import LogError, Validation, read
from tests.conftest import ROOT, the_run, train_here

LOGS = ROOT / "tests" / "data" / "logs"
TRACK1, TRACK1_NEW = LOGS / "track1_2024-11-10_UNetDoubleLr.txt", LOGS / "track1_2026-07-17_FP8DownProjection.txt"
TRACK3, LLMC = LOGS / "track3_36_tuned_baseline.txt", LOGS / "llmc_main.log"


@pytest.mark.parametrize("path, form, planned, first, last, count", [
    (LLMC, "llm.c", None, Validation(0, 11.0092, None), Validation(19560, 3.2722, None), 4),
    (TRACK1, "track 1", 3000, Validation(0, 10.8258, 0.411), Validation(3000, 3.2753, 433.57), 6),
    (TRACK1_NEW, "track 1", 1390, Validation(0, 10.8311, 0.0), Validation(1390, 3.2775, 79.532), 4),
    (TRACK3, "track 3", 3250, Validation(0, 10.82584, 0.0), Validation(3250, 3.27722, 503.169), 5),
], ids=lambda value: getattr(value, "stem", ""))
def test_a_published_log_is_read_in_its_own_units(path, form, planned, first, last, count):
    run = read(path)
    assert (run.form, run.planned_steps, run.status, run.seed) == (form, planned, "finished", None)
    assert run.validations[0] == first and run.validations[-1] == last and len(run.validations) == count


@pytest.mark.parametrize("path, torch, cuda", [(TRACK1, "2.5.1+cu124", "12.4"), (TRACK1_NEW, "2.10.0+cu128", "12.8"),
                                               (TRACK3, "2.10.0+cu128", "12.8")], ids=lambda v: getattr(v, "stem", v))
def test_its_machine_is_the_one_above_the_steps(path, torch, cuda):
    assert read(path).machine == {"device": "NVIDIA H100 80GB HBM3", "world_size": 8, "torch": torch, "cuda": cuda}
    assert read(LLMC).machine == {}


def test_the_source_in_a_log_is_what_its_configuration_is_known_by(tmp_path):
    """With the script in it, as complete logs have: before the first line of = or between two."""
    sources = {}
    for name, path, old in (("new", TRACK3, "(source code of the run stood here)"),
                            ("old", TRACK1, "(source code of the run stood here, lines 2 to 569)")):
        for lr in ("0.02", "0.04"):
            script = f"lr = {lr}\nprint0(f\"step:{{step}}/{{steps}} val_loss:{{loss:.4f}}\")"
            (tmp_path / "log.txt").write_text(path.read_text().replace(old, script))
            run = read(tmp_path / "log.txt")
            sources[name, lr] = run.settings["source"]
            assert run.validations == read(path).validations and run.machine == read(path).machine
    assert sources["new", "0.02"] == sources["old", "0.02"] != sources["new", "0.04"] == sources["old", "0.04"]


@pytest.mark.parametrize("path", [TRACK1, TRACK3], ids=lambda p: p.stem)
def test_a_log_that_was_cut_off_is_not_finished(path, tmp_path):
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "log.txt").write_text("".join(lines[:-1]))
    run = read(tmp_path / "log.txt")
    last = run.validations[-1].step
    assert run.status == f"cut off: its last validation is at step {last:,} of {run.planned_steps:,}"
    assert run.validations == read(path).validations[:-1]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    from tests.conftest import TINY
    folder = tmp_path_factory.mktemp("logs")
    (folder / "tiny.yaml").write_text(TINY.format(data=corpus, runs=folder / "runs"))
    assert train_here("--config", folder / "tiny.yaml", "steps=8", "average=0.5", "log=[speedrun]", "seed=3") == 0
    return the_run(folder / "tiny.yaml")


def test_a_run_of_ours_is_read_from_its_directory(trained):
    run, summary = read(trained), json.loads((trained / "summary.json").read_text())
    assert (run.form, run.name, run.seed, run.planned_steps, run.status) == ("ours", "tiny", 3, 8, "finished")
    assert [v.step for v in run.validations] == [0, 4, 8]
    assert run.validations[-1].loss == summary["val_loss"] and run.ledger_s == summary["ledger_s"]
    assert run.validations[-1].train_s == pytest.approx(summary["train_s"], abs=0.02)
    assert run.settings["optim.hidden.lr"] == 0.02 and run.settings["model.layers"] == 2
    assert len(run.settings["val_data.sha256"]) == 64 and len(run.settings["source.model/gpt.py"]) == 12
    assert not {"seed", "steps", "name", "runs_dir", "data.train", "source.scripts/logs.py"} & run.settings.keys()
    assert run.machine["world_size"] == 1 and {"device", "torch", "platform", "compiled"} <= run.machine.keys()


def test_its_losses_are_of_the_weights_that_the_target_is_asked_of(trained, tmp_path):
    raw, copy = read(trained), tmp_path / "copy"
    shutil.copytree(trained, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("target_on: raw", "target_on: average"))
    averaged = read(copy)
    assert averaged.validations[-1].loss == json.loads((trained / "summary.json").read_text())["val_loss_avg"]
    assert averaged.validations[-1].loss != raw.validations[-1].loss


def test_the_lines_that_a_run_writes_for_the_speedrun_read_as_track_3_s(trained):
    ours, theirs = read(trained), read(trained / "speedrun.txt")
    assert theirs.form == "track 3" and theirs.planned_steps == 8 and theirs.status == "finished"
    for a, b in zip(ours.validations, theirs.validations, strict=True):
        assert (b.step, b.loss) == (a.step, pytest.approx(a.loss, abs=5e-6)) and abs(b.train_s - a.train_s) < 6e-4


@pytest.mark.parametrize("file, text, message", [
    ("config.yaml", None, "config.yaml: No such file or directory"), ("env.json", "{", "damaged one (JSONDecodeError"),
    ("config.yaml", "a: [", "damaged one (ParserError"), ("env.json", "{}", "damaged one (KeyError: 'train_data')"),
    ("log.jsonl", '{"step": 1, "val_loss": 2.0}\n', "damaged one (KeyError: 'train_s')"),
    ("log.jsonl", None, "log.jsonl: No such file or directory"),
])
def test_a_damaged_run_is_one_line_that_names_it(trained, tmp_path, file, text, message):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / file).unlink() if text is None else (copy / file).write_text(text)
    with pytest.raises(LogError) as error:
        read(copy)
    assert str(copy) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_log_is_one_line(tmp_path):
    with pytest.raises(LogError, match="none.txt: No such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe step 12\n")
    with pytest.raises(LogError, match="notes.txt: no validation in it; a log has lines like"):
        read(tmp_path / "notes.txt")
