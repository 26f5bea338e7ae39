"""The results table says what the run directories say."""
import json
import subprocess
import sys

from scripts.results import COLUMNS, row, table
from tests.conftest import ROOT, the_run, train_here


def test_a_row_is_what_the_run_recorded(tiny):
    train_here("--config", tiny, "target_val_loss=4.0")
    run = the_run(tiny)
    cells, summary = row(run), json.loads((run / "summary.json").read_text())
    assert (cells["preset"], cells["seed"], cells["steps"], cells["target"]) == ("tiny", "0", "12", "4")
    assert cells["first val loss"] == "4.1589" and cells["last val loss"] == f"{summary['val_loss']:.4f}"
    assert cells["reached"] == f"step {summary['target_step']}, {summary['target_train_s']:.1f} s"
    assert cells["bits per byte"] == f"{summary['val_bits_per_byte']:.4f}"
    assert cells["tokens/s"] == f"{summary['tokens_per_s']:,.0f}" and cells["device"].endswith("float32")
    assert run.name.split("-")[2] == cells["date"].replace("-", "")


def test_a_run_that_was_cut_off_shows_its_log(tiny):
    train_here("--config", tiny)
    run = the_run(tiny)
    (run / "summary.json").unlink()
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(lines[:11]) + '\n{"step": 9, "tra')         # killed while it wrote
    cells = row(run)
    assert cells["steps"] == "8 of 12" and cells["last val loss"] == f"{json.loads(lines[10])['val_loss']:.4f}"
    assert cells["tokens/s"] == cells["reached"] == cells["target"] == ""


def test_the_average_is_shown_where_the_target_is_asked_of_it(tiny):
    train_here("--config", tiny, "average=0.5", "target_on=average", "target_val_loss=0.001")
    cells, summary = row(the_run(tiny)), json.loads((the_run(tiny) / "summary.json").read_text())
    assert cells["last val loss"] == f"{summary['val_loss_avg']:.4f}" != f"{summary['val_loss']:.4f}"
    assert cells["reached"] == "no"


def test_the_table_is_markdown_without_the_columns_that_nobody_fills():
    first = dict.fromkeys(COLUMNS, "") | {"preset": "a", "steps": "3"}
    assert table([first, first | {"preset": "b"}]) == "| preset | steps |\n| - | -: |\n| a | 3 |\n| b | 3 |"


def test_what_is_no_run_directory_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.results", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} is no run directory (")
    assert done.stderr.count("\n") == 1 and not done.stdout
