"""The table of rules and the sweep behind its losses."""
import json

import pytest
import torch

from optim import RULES
from scripts import optimizers
from scripts.sweep import file
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


def test_the_sweep_behind_the_losses_runs_every_preset_as_it_is():
    sweep = file.read(ROOT / "configs" / "sweeps" / "demo_rules.yaml")
    assert sorted(sweep.bases) == sorted(f"demo/{name}.yaml" for name in PRESETS)
    assert not sweep.parameters and sweep.kind == "sweep" and sweep.search_seeds == (None,)


def test_a_loss_is_that_of_the_preset_as_it_is_over_finished_trials(tmp_path):
    rows = [("muon", "finished", {}, 1.0), ("muon", "finished", {}, 2.0), ("muon", "finished", {"steps": 5}, 9.0),
            ("muon", "stopped", {}, 7.0), ("adamw", "crashed", {}, None), ("sgd", "finished", {}, 3.0)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(dict(
        base=f"demo/{name}.yaml", status=status, parameters=parameters, val_loss=loss)) + "\n"
        for name, status, parameters, loss in rows))
    assert optimizers.losses(tmp_path) == {"muon": 1.5, "sgd": 3.0}
    assert optimizers.losses(tmp_path / "none") == {}


def test_the_table_is_markdown_with_a_row_a_rule(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["optimizers", "--losses", str(tmp_path), "lion"])
    monkeypatch.setattr(optimizers, "DEMO", ((2, 8, 8),))
    assert optimizers.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1 and lines[2].startswith("| `lion` | hidden | 4.0 (4.0) |")
