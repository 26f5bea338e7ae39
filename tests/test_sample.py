"""Sampling takes the weights that a run's result is of, and draws as it is told."""
import json
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch

from data.loader import open_data
from model.generate import continuation
from scripts.sample import load_run, main, sample
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
    model = load_run(the_run(tiny))[1]
    drawn = [list(islice(continuation(model, [3], temperature, top_k, top_p, torch.Generator().manual_seed(seed)), 10))
             for temperature, top_k, top_p, seed in ((0, None, None, 0), (0.9, 1, None, 1), (0.9, None, 1e-3, 1),
                                                     (0.9, None, None, 2), (0.9, None, None, 2), (0.9, None, None, 3))]
    assert drawn[0] == drawn[1] == drawn[2] and drawn[3] == drawn[4] != drawn[5]


def test_the_prompt_comes_first(tiny):
    train_here("--config", tiny, "model.vocab_size=257")
    text, tokens_per_s = sample(the_run(tiny), "\t\n", 40, 0.0, None, 0)               # more than its context holds
    assert text.startswith("\t\n") and len(text) > 30 and tokens_per_s > 0


def test_the_prompt_may_come_from_a_file_or_standard_input(tiny, tmp_path, capsys, monkeypatch):
    train_here("--config", tiny, "model.vocab_size=257", "steps=4")
    (tmp_path / "prompt.txt").write_text("a line\n")
    capsys.readouterr()
    texts = []
    for arguments in (["--prompt", "a line\n"], ["--prompt-file", str(tmp_path / "prompt.txt")]):
        monkeypatch.setattr(sys, "argv", ["sample", str(the_run(tiny)), "--tokens", "9", *arguments])
        assert main() == 0
        out, err = capsys.readouterr()
        assert out.startswith("a line\n") and err.endswith(" tokens/s\n")
        texts.append(out)
    assert texts[0] == texts[1]
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    assert main() == 2 and "prompt.txt: not UTF-8 text (byte 2)\n" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_one_line(tiny):
    train_here("--config", tiny, "steps=1")
    config = the_run(tiny) / "config.yaml"
    config.write_text(re.sub(r"(?m)^  layers: \d+", "  layers: 6", config.read_text()))
    with pytest.raises(ValueError, match="the checkpoint is of another model than config.yaml says"):
        load_run(the_run(tiny))


def test_what_is_no_run_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.sample", tmp_path / "none"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "0"], "--tokens: '0' is not a whole number from 1 on"),
    (["--top-p", "1.5"], "--top-p must be above 0, at most 1"),
    (["--temperature", "-1"], "--temperature must be a number from 0 on"), (["--temperature", "nan"], "from 0 on"),
    (["--top-k", "0"], "--top-k: '0' is not a whole number from 1 on"), (["--seed", "-1"], "--seed: '-1'"),
    (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
])
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample", "runs/none", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and message in (told := capsys.readouterr().err) and told.count("\n") == 1
