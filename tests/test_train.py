"""The whole program at a tiny size: what it writes, what it refuses, and that the surroundings change no numbers."""
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, losses, the_run, train_elsewhere, train_here


def test_a_run_learns_and_leaves_a_complete_directory(tiny):
    assert train_here("--config", tiny, "target_val_loss=4.0", "checkpoint_every=5") == 0
    run = the_run(tiny)
    assert {p.name for p in run.iterdir()} == {"config.yaml", "env.json", "source", "log.jsonl", "summary.json",
                                               "checkpoints", "curve.png", ".lock"}
    recorded = losses(run)
    assert [s for kind, s in recorded if kind == "train"] == list(range(1, 13))
    assert [s for kind, s in recorded if kind == "val"] == [0, 4, 8, 12]
    assert recorded["val", 0] == pytest.approx(4.1589, abs=1e-3)                # ln 64: the head starts at zero
    assert recorded["val", 12] < 3.9
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 12 and summary["world_size"] == 1
    assert summary["val_loss"] == recorded["val", 12]
    reached = min(s for (kind, s), loss in recorded.items() if kind == "val" and loss <= 4.0)
    assert summary["target_step"] == reached and 0 < summary["target_train_s"] <= summary["train_s"]
    assert summary["tokens_per_s"] == pytest.approx(12 * 256 / summary["train_s"])
    assert summary["on_the_clock"] == ["training"] and summary["ledger_s"]["training"] == summary["train_s"]
    assert {"warm-up", "validation", "checkpoint"} <= set(summary["ledger_s"])
    assert sorted(p.name for p in (run / "checkpoints").glob("*.pt")) == ["step_000010.pt", "step_000012.pt"]
    assert (run / "source" / "train.py").read_bytes() == open("train.py", "rb").read()
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 12
    assert {"versions", "git_revision", "git_dirty", "world_size", "command"} <= set(json.loads(
        (run / "env.json").read_text()))


def test_a_recorded_configuration_repeats_its_run(tiny):
    train_here("--config", tiny)
    first = the_run(tiny)
    train_here("--config", first / "config.yaml", f"runs_dir={tiny.parent / 'again'}")
    assert losses(the_run(tiny, "again")) == losses(first)


def test_the_seed_decides_the_weights(tiny):
    train_here("--config", tiny)
    train_here("--config", tiny, "seed=1", f"runs_dir={tiny.parent / 'other'}")
    assert losses(the_run(tiny, "other"))["train", 3] != losses(the_run(tiny))["train", 3]


def test_two_ranks_equal_one_process_bit_for_bit(tiny):
    """Each rank takes one micro-batch, as the single process does twice: the same two terms in every sum."""
    train_here("--config", tiny, "micro_batch_tokens=128")
    done = train_elsewhere("--config", tiny, "micro_batch_tokens=128", f"runs_dir={tiny.parent / 'two'}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(the_run(tiny, "two")) == losses(the_run(tiny))


def test_three_ranks_equal_one_process_up_to_the_order_of_sums(tiny):
    """8 rows over 3 ranks is 2, 3 and 3: no count has to divide another."""
    train_here("--config", tiny)
    done = train_elsewhere("--config", tiny, f"runs_dir={tiny.parent / 'three'}", ranks=3)
    assert done.returncode == 0, done.stderr
    one, three = losses(the_run(tiny)), losses(the_run(tiny, "three"))
    assert one.keys() == three.keys()
    for key in one:
        assert three[key] == pytest.approx(one[key], rel=2e-5), key


@pytest.mark.parametrize("micro", [32, 96])
def test_the_micro_batch_changes_only_rounding(tiny, micro):
    train_here("--config", tiny)
    train_here("--config", tiny, f"micro_batch_tokens={micro}", f"runs_dir={tiny.parent / 'small'}")
    one, small = losses(the_run(tiny)), losses(the_run(tiny, "small"))
    for key in one:
        assert small[key] == pytest.approx(one[key], rel=2e-5), key


def test_compilation_changes_only_rounding(tiny):
    train_here("--config", tiny)
    train_here("--config", tiny, "compile=true", f"runs_dir={tiny.parent / 'compiled'}")
    eager, compiled = losses(the_run(tiny)), losses(the_run(tiny, "compiled"))
    for key in eager:
        assert compiled[key] == pytest.approx(eager[key], rel=2e-5), key


def test_nothing_is_compiled_on_the_clock(tiny, monkeypatch):
    """The warm-up has met every shape: graphs are counted when the run directory is made and at the end."""
    import torch._dynamo
    from harness import rundir
    counts, create = [], rundir.create
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(rundir, "create", lambda *a: counts.append(graphs["unique_graphs"]) or create(*a))
    train_here("--config", tiny, "compile=true", "average=0.9", "micro_batch_tokens=96", "val_tokens=480", "steps=3")
    assert counts[0] > 0 and graphs["unique_graphs"] == counts[0]


def test_bfloat16_activations_with_a_bfloat16_embedding_follow_the_float32_run(tiny):
    train_here("--config", tiny)
    train_here("--config", tiny, "precision=bfloat16", "model.bf16_roles=[embed]", f"runs_dir={tiny.parent / 'half'}")
    full, half = losses(the_run(tiny)), losses(the_run(tiny, "half"))
    for key in full:
        assert half[key] == pytest.approx(full[key], rel=2e-2), key
    from harness.checkpoint import newest_intact
    saved = newest_intact(the_run(tiny, "half") / "checkpoints")[1]
    assert saved["model"]["embed.weight"].dtype == torch.bfloat16
    assert saved["model"]["head.weight"].dtype == torch.float32
    assert saved["optimizer"]["embed.weight"]["v"].dtype == torch.float32


def test_summed_and_averaged_losses_train_alike_where_the_rule_ignores_scale(tiny):
    """Muon and Adam with a tiny epsilon do not see a factor in the gradient."""
    train_here("--config", tiny, "optim.rest.eps=1e-30")
    train_here("--config", tiny, "optim.rest.eps=1e-30", "loss_reduction=sum", f"runs_dir={tiny.parent / 'sum'}")
    mean, total = losses(the_run(tiny)), losses(the_run(tiny, "sum"))
    assert total["val", 12] == pytest.approx(mean["val", 12], rel=1e-4)


def test_clipping_logs_the_norm_from_before_it(tiny):
    train_here("--config", tiny, "grad_clip=0.001", "optim.hidden.rule=adamw", "optim.hidden.betas=[0.9, 0.95]")
    from harness.rundir import read_log
    norms = [x["grad_norm"] for x in read_log(the_run(tiny))[0]]
    assert min(norms) > 0.001


def test_out_of_memory_halves_the_micro_batch_and_says_so(tiny, monkeypatch, capsys):
    from model.gpt import GPT
    forward = GPT.forward

    def small_only(self, tokens, targets, **options):
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("not enough")
        return forward(self, tokens, targets, **options)

    train_here("--config", tiny, "micro_batch_tokens=64")
    monkeypatch.setattr(GPT, "forward", small_only)
    assert train_here("--config", tiny, f"runs_dir={tiny.parent / 'tight'}") == 0
    assert capsys.readouterr().out.count("micro-batch halved") == 2                  # 8 rows, 4, 2
    assert losses(the_run(tiny, "tight")) == losses(the_run(tiny))


def test_trials_reuse_the_model_and_equal_runs_of_their_seeds(tiny):
    train_here("--config", tiny, "trials=2", "seed=5")
    trials = sorted((tiny.parent / "runs").iterdir())
    assert [p.name.split("-")[1] for p in trials] == ["5", "6"]
    train_here("--config", tiny, "seed=6", f"runs_dir={tiny.parent / 'alone'}")
    assert losses(trials[1]) == losses(the_run(tiny, "alone"))
    assert json.loads((trials[1] / "summary.json").read_text())["seed"] == 6


def test_the_average_is_logged_beside_the_raw_loss_and_can_be_the_target(tiny):
    train_here("--config", tiny, "average=0.5", "target_on=average", "target_val_loss=4.1")
    run = the_run(tiny)
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]
    assert last["val_loss_avg"] != last["val_loss"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_loss_avg"] == last["val_loss_avg"] and summary["target_on"] == "average"


def test_averaging_does_not_touch_training(tiny):
    train_here("--config", tiny)
    train_here("--config", tiny, "average=0.9", f"runs_dir={tiny.parent / 'averaged'}")
    assert losses(the_run(tiny, "averaged")) == losses(the_run(tiny))


def test_a_non_finite_gradient_stops_the_run_and_leaves_the_state_from_before(tiny, capsys):
    """The learning rate leaps at step 6, so the weights of step 7 overflow and its gradient is not finite."""
    points = "[{step: 5, value: 1}, {step: 6, value: 1e30}]"
    assert train_here("--config", tiny, "schedule.shape=piecewise", "schedule.cooldown_frac=null",
                      f"schedule.points={points}", "checkpoint_every=2") == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step 8: ") and "is not finite" in error and "step_000007.pt" in error
    run = the_run(tiny)
    assert max(step for kind, step in losses(run) if kind == "train") == 7
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "not_finite" and summary["steps"] == 7
    from harness.checkpoint import load
    saved = load(run / "checkpoints" / "step_000007.pt")
    assert all(t.isfinite().all() for state in saved["optimizer"].values() for t in state.values())


def test_speedrun_lines_have_the_published_form(tiny):
    import re
    train_here("--config", tiny, "log=[speedrun]")
    lines = (the_run(tiny) / "speedrun.txt").read_text().splitlines()
    form = r"step:\d+/12 val_loss:\d\.\d{5} train_time:\d+\.\d{3}s step_avg:(nan|\d+\.\d\d)ms"
    assert len(lines) == 4 and all(re.fullmatch(form, line) for line in lines), lines


def test_weights_and_biases_gets_the_log_offline(tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train_here("--config", tiny, "log=[wandb]", "steps=4") == 0
    assert list(the_run(tiny).glob("wandb/offline-run-*/*.wandb"))


def test_a_dry_run_trains_nothing_and_says_what_is_missing(tiny, capsys):
    assert train_here("--config", tiny, "--dry-run") == 0
    assert "ready" in capsys.readouterr().out
    done = train_elsewhere("--config", tiny, "--dry-run", "steps=1000")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "256,001" in done.stderr and "9,000" in done.stderr
    assert not (tiny.parent / "runs").exists()


def test_print_config_names_the_source_of_every_value_and_what_a_step_does_to_every_parameter(tiny, capsys):
    assert train_here("--config", tiny, "--print-config", "optim.hidden.lr=0.5", "optim.hidden.weight_decay=0.1") == 0
    out = capsys.readouterr().out
    assert "tiny.yaml" in out and "default" in out and "override" in out
    row = next(line for line in out.splitlines() if "blocks.1.mlp.up.weight" in line).split()
    # Muon's step of lr .5 x sqrt(128/32) is orthogonal: an entry's root mean square is that over sqrt(128).
    assert row[2:] == ["mlp_in", "whole", "128", "32", "muon", "0.5", "0.0884", "0.05", "16,384", "0"]
    with torch.device("meta"):
        from harness.load import load
        from model.gpt import GPT
        names = dict(GPT(load(str(tiny)).config.model, 32).named_parameters())
    assert all(f"# {name} " in out for name in names)
    per_parameter = next(line for line in out.splitlines() if line.startswith("# hidden "))
    assert per_parameter.split()[-2:] == ["4.000", "4.000"]                     # one float32 momentum, as the formula says
    assert not (tiny.parent / "runs").exists()


@pytest.mark.parametrize("argument, message", [
    ("stepz=3", "stepz"), ("optim.hidden.lr=fast", "optim.hidden.lr"), ("model.vocab_size=32", "vocabulary"),
    ("data.train=nothing_*.bin", "nothing_"), ("optim.rest.params=[head]", "in no group"), ("--resume=/nowhere", "/nowhere")])
def test_bad_input_is_one_clear_line_and_exit_code_2(tiny, argument, message):
    done = train_elsewhere("--config", tiny, argument)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tiny.parent / "runs").exists()


def test_more_ranks_than_rows_are_refused_before_anything_starts(tiny):
    done = train_elsewhere("--config", tiny, "seq_len=128", "val_tokens=512", ranks=3)
    assert done.returncode != 0 and "3 ranks, but a batch of 256 tokens has 2 rows" in done.stderr
    assert not (tiny.parent / "runs").exists()


def test_a_last_update_that_ruins_the_weights_is_no_finished_run(tiny, capsys):
    """The gradient of the last step is good, the weights it leads to are not: the validation shows it."""
    points = "[{step: 10, value: 1}, {step: 11, value: 1e38}]"
    assert train_here("--config", tiny, "schedule.shape=piecewise", "schedule.cooldown_frac=null",
                      f"schedule.points={points}") == 3
    assert json.loads((the_run(tiny) / "summary.json").read_text())["status"] == "not_finite"
    assert "is not finite" in capsys.readouterr().err
    assert "NaN" not in (the_run(tiny) / "log.jsonl").read_text()


def test_qk_clip_holds_the_logits_of_a_whole_run_on_any_number_of_ranks(tiny):
    """Without QK-norm; the clip acts on the largest logits of all micro-batches and ranks."""
    keys = ("model.qk_norm=none", "optim.hidden.rule=muonclip", "optim.hidden.lr=0.3", "optim.hidden.weight_decay=0",
            "schedule.cooldown_frac=null", "diagnostics=[logits]", "val_every=3", "micro_batch_tokens=64")
    largest = {}
    for name, tau, ranks in (("free", 1e6, 0), ("clipped", 2.0, 0), ("two", 2.0, 2)):
        done = train_elsewhere("--config", tiny, *keys, f"optim.hidden.tau={tau}",
                               f"runs_dir={tiny.parent / name}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (the_run(tiny, name) / "log.jsonl").read_text().splitlines())
        largest[name] = [max(map(max, line["max_logits"].values())) for line in lines if "max_logits" in line]
    # Every step is clipped by its own logits: an old maximum would shrink the weights again and again.
    from harness.checkpoint import newest_intact
    norms = {name: newest_intact(the_run(tiny, name) / "checkpoints")[1]["model"]["blocks.1.attn.q.weight"].norm()
             for name in largest}
    assert 0.4 * norms["free"] < norms["clipped"] < norms["free"]
    # A logit is measured before the clip of its step, so that one step's growth shows.
    assert max(largest["free"]) > 2 * max(largest["clipped"])
    assert largest["two"] == pytest.approx(largest["clipped"], rel=1e-3)


def test_print_config_under_torchrun_prints_once_and_names_owners(tiny):
    done = train_elsewhere("--config", tiny, "--print-config", ranks=2)
    assert done.returncode == 0 and done.stdout.count("# blocks.0.attn.q.weight") == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("# blocks.")]
    assert {row[-1] for row in rows} == {"0", "1", "all"}


@pytest.mark.parametrize("keys, words", [
    (["optim.hidden.rule=muonclip"], "model.qk_norm: none"),
    (["model.qk_norm=none", "optim.hidden.rule=muonclip", "optim.hidden.params=[mlp_in]"], "has neither q nor k"),
    (["model.qk_norm=none", "optim.hidden.rule=muonclip", "optim.hidden.params=[q, v]"], "must have both"),
    (["optim.hidden.hyperball=true", "optim.hidden.params=[q, attn_out]"], "hyperball keeps attn_out at zero"),
    (["optim.hidden.scheduled.momentum.shape=piecewise",
      "optim.hidden.scheduled.momentum.points=[{value: 1.5, step: 0}]"], "a value of 1.5, but it must be less than 1"),
    (["optim.hidden.rule=gluon", "optim.hidden.schedule_theory=true", "optim.hidden.scheduled.momentum.shape=piecewise",
      "optim.hidden.scheduled.momentum.points=[{value: 0.5, step: 0}]"], "not read while schedule_theory is true")])
def test_optimizer_keys_that_would_do_nothing_are_refused_in_one_line(tiny, keys, words):
    done = train_elsewhere("--config", tiny, *keys, "--print-config")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_kernels_that_the_device_cannot_run_are_refused_before_anything_starts(tiny):
    for more in ([], ["--dry-run"]):
        done = train_elsewhere("--config", tiny, "kernels=triton", "model.loss=triton", *more)
        assert done.returncode == 2 and done.stderr.splitlines() == [
            "error: model.loss: triton cannot be had here: the kernel needs a GPU, and this is a cpu; set model.loss=torch",
            "error: kernels: triton cannot be had here: the kernels need a GPU; set kernels: auto or kernels: torch"]
    assert not (tiny.parent / "runs").exists()


def test_a_run_keeps_every_file_of_the_packages_that_made_it(tiny):
    train_here("--config", tiny, "steps=1")
    kept = {path.relative_to(the_run(tiny) / "source") for path in (the_run(tiny) / "source").rglob("*.py")}
    ours = {path.relative_to(ROOT) for package in ("model", "optim", "data", "harness", "scripts")
            for path in (ROOT / package).rglob("*.py")}
    assert kept == {Path("train.py"), *ours} and Path("optim/kernels/symmetric.py") in kept
