"""Where a run's numbers go beside its own log."""
import sys
import types

import pytest

from harness.load import ConfigError, load
from harness.mirrors import SpeedrunLines, WeightsAndBiases
from tests.conftest import train_here


def test_weights_and_biases_gets_the_names_that_the_ecosystem_uses(tiny, tmp_path, monkeypatch):
    logged, run = [], types.SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda: None)
    run.log = logged.append
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    sink = WeightsAndBiases(tmp_path, load(str(tiny)).config)
    sink.write(step=1, train_s=0.5, train_loss=3.0, grad_norm=2.0, lr=0.1)
    sink.write(step=1, train_s=0.5, val_loss=3.5, val_loss_avg=3.25)
    assert logged == [{"step": 1, "time/training_time_ms": 500.0, "train/loss": 3.0, "train/grad_norm": 2.0,
                       "train/lr": 0.1},
                      {"step": 1, "time/training_time_ms": 500.0, "val/loss": 3.5, "val/loss_avg": 3.25}]


def test_weights_and_biases_that_is_not_installed_is_one_line_before_anything_starts(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed; .*pip install wandb"):
        train_here("--config", tiny, "log=[wandb]")
    assert not (tiny.parent / "runs").exists()


def test_a_speedrun_line_has_the_mean_step_since_the_last_validation(tmp_path):
    said = []
    sink = SpeedrunLines(tmp_path / "speedrun.txt", 3250, said.append, None, 0.0)
    for step, train_s, val_loss in ((0, 0.0, 10.8258), (125, 21.243, 4.586241), (250, 46.243, 4.0)):
        sink.write(step=step, train_s=train_s, val_loss=val_loss)
    sink.close()
    assert said == ["step:0/3250 val_loss:10.82580 train_time:0.000s step_avg:nanms",
                    "step:125/3250 val_loss:4.58624 train_time:21.243s step_avg:169.94ms",
                    "step:250/3250 val_loss:4.00000 train_time:46.243s step_avg:200.00ms"]
    assert (tmp_path / "speedrun.txt").read_text().splitlines() == said
