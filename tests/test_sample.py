"""Sampling takes the weights that a run's result is of, and draws as it is told."""
import json
import subprocess
import sys

import pytest
import torch

from data.loader import open_data
from scripts.sample import continue_tokens, load_run, sample
from tests.conftest import ROOT, the_run, train_here


@pytest.mark.parametrize("overrides, key", [((), "val_loss"),
                                            (("average=0.8", "target_on=average", "target_val_loss=1"), "val_loss_avg"),
                                            (("average=0.8",), "val_loss")])
def test_the_loaded_model_has_the_loss_that_the_run_reports(tiny, overrides, key):
    train_here("--config", tiny, *overrides)
    run = the_run(tiny)
    config, model = load_run(run)
    val = open_data(config.data, config.seq_len, config.val_tokens, config.model.vocab_size)[1]
    with torch.no_grad():
        loss = model(*map(torch.from_numpy, val.rows(0, val.row_count))).item() / config.val_tokens
    assert loss == pytest.approx(json.loads((run / "summary.json").read_text())[key], rel=1e-5)


def test_temperature_zero_takes_the_likeliest_and_top_1_too(tiny):
    train_here("--config", tiny)
    config, model = load_run(the_run(tiny))
    drawn = [continue_tokens(model, [3], 10, config.seq_len, temperature, top_k, torch.Generator().manual_seed(seed))
             for temperature, top_k, seed in ((0, None, 0), (0.9, 1, 1), (0.9, None, 2), (0.9, None, 2), (0.9, None, 3))]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] != drawn[4]
    assert all(tokens[0] == 3 and len(tokens) == 11 for tokens in drawn)


def test_more_tokens_than_the_context_can_be_drawn(tiny):
    train_here("--config", tiny, "model.positions=learned", "model.qk_norm=none")
    config, model = load_run(the_run(tiny))
    assert len(continue_tokens(model, [3], 40, config.seq_len, 1.0, None, torch.Generator().manual_seed(0))) == 41


def test_the_prompt_comes_first(tiny):
    train_here("--config", tiny, "model.vocab_size=257")
    text = sample(the_run(tiny), "\t\n", 5, 0.0, None, 0)
    assert text.startswith("\t\n") and len(text) >= 3


def test_what_is_no_run_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.sample", tmp_path / "none"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
