"""What a run measures on request at validation steps, and that measuring changes nothing."""
import json

import pytest
import torch

from optim.diagnostics import largest_singular_value, movement, spread
from tests.conftest import losses, the_run, train_elsewhere, train_here

ALL = "diagnostics=[updates,logits,smoothness]"


def measured(run) -> dict:
    """{step: line} of the diagnostics in a run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "diagnostics" in line}


def test_singular_values_and_their_spread_are_those_of_an_svd():
    X = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(X)
    assert torch.allclose(largest_singular_value(X), S[:, 0], rtol=1e-2)
    variance = S.square() / S.square().mean(1, keepdim=True)
    assert torch.allclose(spread(X), (variance - 1).square().mean(1).sqrt(), rtol=1e-4)
    assert torch.allclose(spread(X.mT), spread(X), rtol=1e-4)
    Q = torch.linalg.qr(X)[0]
    assert spread(3 * Q).max() < 1e-3 and torch.allclose(largest_singular_value(3 * Q), torch.full((3,), 3.), rtol=1e-4)


def test_a_weight_that_did_not_move_has_moved_by_nothing():
    found = movement(torch.ones(1, 4, 3), torch.ones(1, 4, 3))
    assert found["update_rms"] == found["update_norm"] == found["orthogonality"] == 0 and found["weight_rms"] == 1


def test_measuring_changes_no_number_and_is_off_the_clock(tiny):
    train_here("--config", tiny)
    train_here("--config", tiny, ALL, f"runs_dir={tiny.parent / 'measured'}")
    run = the_run(tiny, "measured")
    assert losses(run) == losses(the_run(tiny))
    ledger = json.loads((run / "summary.json").read_text())["ledger_s"]
    assert ledger["diagnostics"] > 0 and list(measured(run)) == [1, 5, 9]


def test_a_step_is_measured_as_the_rule_means_it(tiny):
    train_here("--config", tiny, ALL, "optim.hidden.ns_coefficients=exact12", "schedule.cooldown_frac=null")
    line = measured(the_run(tiny))[5]
    up = line["diagnostics"]["blocks.1.mlp.up.weight"]                             # 128 x 32, lr .02, scale 2
    assert up["update_rms"] == pytest.approx(.04 / 128 ** .5, rel=1e-2)
    assert up["update_norm"] == pytest.approx(.04, rel=2e-2) and up["orthogonality"] < .1
    head = line["diagnostics"]["head.weight"]
    assert .003 < head["update_rms"] < .02 and {"weight_norm", "orthogonality"} <= head.keys()
    assert line["diagnostics"]["head_norm.gain"].keys() == {"update_rms", "weight_rms", "update_norm", "weight_norm"}
    assert up["smoothness"] > 0 and up["gradient_dual_norm"] > 0
    assert {"l0", "l1"} <= measured(the_run(tiny))[9]["diagnostics"]["blocks.1.mlp.up.weight"].keys()
    assert list(line["max_logits"]) == ["blocks.0.attn", "blocks.1.attn"]
    # Queries and keys are normalised to length sqrt(d): no logit is above d / sqrt(d) = 4.
    assert all(0 < logit <= 4.01 for heads in line["max_logits"].values() for logit in heads)


def test_the_step_before_the_last_and_trials_are_measured_for_themselves(tiny):
    """A validation right before the last step, whose batch is measured twice; a second trial starts its own fit."""
    assert train_here("--config", tiny, "steps=5", "val_every=1", ALL, "trials=2") == 0
    for run in (tiny.parent / "runs").iterdir():
        lines = measured(run)
        assert list(lines) == [1, 2, 3, 4, 5]
        assert "l0" not in lines[1]["diagnostics"]["blocks.1.mlp.up.weight"]
        assert "l0" in lines[5]["diagnostics"]["blocks.1.mlp.up.weight"]


def test_a_step_that_did_not_count_is_not_measured(tiny, monkeypatch):
    from optim.driver import Optimizer
    plain = Optimizer.step

    def step(self, step, *arguments):
        if step == 4 and self.averaged_steps == 4:                    # not in the warm-up
            self.params["blocks.0.attn.q.weight"].grad.fill_(torch.nan)
        return plain(self, step, *arguments)
    monkeypatch.setattr(Optimizer, "step", step)
    assert train_here("--config", tiny, ALL) == 3
    log = (the_run(tiny) / "log.jsonl").read_text()
    assert list(measured(the_run(tiny))) == [1] and "NaN" not in log


def test_two_ranks_measure_what_one_does(tiny):
    train_here("--config", tiny, ALL)
    done = train_elsewhere("--config", tiny, ALL, f"runs_dir={tiny.parent / 'two'}", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = measured(the_run(tiny)), measured(the_run(tiny, "two"))
    for step in one:
        assert two[step]["diagnostics"].keys() == one[step]["diagnostics"].keys()
        for name, values in one[step]["diagnostics"].items():
            for what in values.keys() - {"l0", "l1"}:
                assert two[step]["diagnostics"][name][what] == pytest.approx(values[what], rel=1e-2, abs=1e-6), (name, what)
        for attn, heads in one[step]["max_logits"].items():
            assert two[step]["max_logits"][attn] == pytest.approx(heads, rel=1e-4)
