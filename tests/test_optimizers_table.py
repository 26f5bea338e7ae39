"""The README's table of rules and the race behind its losses."""
import json
import os

import pytest
import torch

from optim import RULES
from scripts import optimizers, race
from tests.conftest import ROOT

PRESETS = {path.stem for path in (ROOT / "configs" / "demo").glob("*.yaml")}


def test_every_rule_has_a_preset_on_the_demo_a_scale_and_a_source():
    assert PRESETS == set(RULES) == set(optimizers.SCALES)
    for name in RULES:
        source = optimizers.source_of(name)
        assert ("arXiv" in source or " 20" in source) and "|" not in source, name
        assert optimizers.applied_to(name) in ("hidden", "all"), name


@pytest.mark.parametrize("name", RULES)
def test_the_table_s_state_is_the_formula_s(name):
    measured, formula = optimizers.state_bytes(optimizers.hidden_rule(name), optimizers.DEMO)
    assert measured == formula


@pytest.mark.parametrize("name", ["muon", "soap", "lion"])
def test_a_time_is_that_of_an_update_and_its_share_of_refreshes(name):
    rule = optimizers.hidden_rule(name)
    assert 0 < optimizers.milliseconds(rule, 2, 12, 8, torch.device("cpu"), 2) < 1000


def test_the_newest_finished_run_of_a_rule_counts(tmp_path):
    for time, (name, status, loss) in enumerate((("muon-0-a", "finished", 2.0), ("muon-0-b", "finished", 1.0),
                                                 ("muon-0-c", "stopped", 0.5), ("adamw-0-a", "finished", 3.0))):
        path = tmp_path / name / "summary.json"
        path.parent.mkdir()
        path.write_text(json.dumps(dict(status=status, val_loss=loss)))
        os.utime(path, (time, time))
    assert {name: s["val_loss"] for name, s in optimizers.raced(tmp_path).items()} == {"muon": 1.0, "adamw": 3.0}


def test_the_table_is_markdown_with_a_row_a_rule(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["optimizers", "--race", str(tmp_path), "lion"])
    monkeypatch.setattr(optimizers, "DEMO", ((2, 8, 8),))
    assert optimizers.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1 and lines[2].startswith("| `lion` | hidden | 4.0 (4.0) |")


def test_a_race_without_such_a_preset_is_one_line(capsys):
    assert race.main(["moun"]) == 2
    assert capsys.readouterr().err == "error: no preset configs/demo/moun.yaml\n"
