"""Successive halving: brackets as wandb has them, which trials fall behind, and that no reported one is ever ended."""
import json

import numpy as np
import pytest

from data.shards import write_shard
from scripts.sweep.__main__ import entry
from scripts.sweep.brackets import brackets, rule
from scripts.sweep.file import read
from scripts.sweep.halving import Halving
from scripts.sweep.plan import plan, reporting
from scripts.sweep.results import ENDED, row, status_of
from tests.conftest import losses

RATES = "optim.rest.lr: {values: [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]}"
EARLY = "early_terminate: {type: hyperband, min_iter: 1}\n"


def trials_of(tmp_path, tiny, more="", config=None):
    """Six configurations that validate after 2, 4, ..., 20 steps: brackets are at 2 and 6 and 18."""
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: grid\n{EARLY}{more}parameters: {{config: {config or f'{{value: {tiny}}}'}, "
                    f"steps: {{value: 20}}, val_every: {{value: 2}}, {RATES}}}\n")
    return read(path), plan(read(path), tmp_path / "out")


def log(trial, *reached, whole=True):
    """What a trial's log holds after so many validations; a last line may be cut short."""
    run = trial.folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    (run / "env.json").write_text("{}")
    lines = [dict(step=0, val_loss=9.0)] + [dict(step=2 * i + 2, val_loss=loss) for i, loss in enumerate(reached)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text if whole else text[:-3])


@pytest.mark.parametrize("said, validations, expected", [
    (dict(min_iter=3), 100, [3, 9, 27, 81]), (dict(min_iter=3, eta=4), 48, [3, 12]), (dict(min_iter=5), 5, []),
    (dict(max_iter=27, s=2), 100, [3, 9]), (dict(max_iter=27, s=2, eta=2), 100, [6, 13]),
    (dict(max_iter=27, s=9), 9, [1, 3])], ids=str)
def test_brackets_are_those_that_wandb_documents_and_come_before_the_end(said, validations, expected):
    assert brackets(rule(dict(type="hyperband", **said)), validations) == expected


def test_the_best_third_of_those_that_came_so_far_goes_on(tiny, tmp_path):
    sweep, trials = trials_of(tmp_path, tiny)
    early, came, ended = Halving(sweep, tmp_path / "out", trials), [], []
    for trial, loss in zip(trials, (3.0, 4.0, 2.0, 2.5, 3.5, 2.1)):
        log(trial, loss, whole=False)
        assert early.hopeless([trial]) == []                                    # not there yet
        log(trial, loss)
        came.append(loss)
        behind = loss > sorted(came)[max(1, len(came) // 3) - 1]
        assert early.hopeless([trial]) == ([trial] if behind else [])
        assert early.hopeless([trial]) == []                                    # said once
        ended += [trial] if behind else []
    assert [trials.index(trial) for trial in ended] == [1, 3, 4]                # 2.1, second best of six, may go on
    assert {status_of(trial) for trial in ended} == {"pruned"} and status_of(trials[0]) == "stopped"
    pruned = row(ended[0], tmp_path / "out")
    assert (pruned["status"], pruned["val_loss"], pruned["error"]) == ("pruned", 4.0, None)
    assert json.loads((ended[0].folder / "pruned.json").read_text()) == dict(seed=0, step=2, val_loss=4.0)
    log(trials[0], 3.0, 2.0, 1.5)                                               # the first at the second bracket
    log(trials[2], 2.0, 1.9, 1.6)
    assert early.hopeless([trials[0], trials[2]]) == [trials[2]]


def test_a_sweep_that_continues_compares_with_all_that_its_logs_hold_and_decides_nothing_again(tiny, tmp_path):
    sweep, trials = trials_of(tmp_path, tiny)
    first = Halving(sweep, tmp_path / "out", trials)
    for trial, loss in zip(trials, (3.0, 2.0, 2.5)):
        log(trial, loss)
        first.hopeless([trial])
    log(trials[2], 2.5, 2.4, 0.1)                                               # it came far before it was gone
    again = Halving(sweep, tmp_path / "out", trials)
    assert again.hopeless([trials[1], trials[0]]) == []                         # 3.0 was the best when it came
    log(trials[3], 2.2)
    log(trials[1], 2.0, 1.9, 1.8)
    assert again.hopeless([trials[3], trials[1]]) == [trials[3]]


def test_larger_is_better_where_the_file_says_so(tiny, tmp_path):
    sweep, trials = trials_of(tmp_path, tiny, "metric: {name: val/loss, goal: maximize}\n")
    log(trials[0], 2.0)
    early = Halving(sweep, tmp_path / "out", trials)
    log(trials[1], 1.0)
    log(trials[2], 3.0)
    assert early.hopeless(trials[:3]) == [trials[1]]


def test_presets_do_not_compete_and_what_the_first_seed_ends_no_other_seed_runs(tiny, tmp_path):
    other = tiny.with_name("other.yaml")
    other.write_text(tiny.read_text().replace("rule: muon, lr: 0.02", "rule: muon, lr: 0.01"))
    sweep, trials = trials_of(tmp_path, tiny, "seeds: [4, 5]\n", f"{{values: [{tiny}, {other}]}}")
    early = Halving(sweep, tmp_path / "out", trials)
    of = {(t.configuration.base, t.configuration.parameters["optim.rest.lr"], t.config.seed): t for t in trials}
    good, bad, worse, bad_again = (of[key] for key in ((str(tiny), 0.01, 4), (str(tiny), 0.02, 4),
                                                       (str(other), 0.01, 4), (str(tiny), 0.02, 5)))
    for trial, loss in ((good, 1.0), (worse, 3.0), (bad_again, 1.5), (bad, 2.0)):
        log(trial, loss)
    assert early.hopeless([good, worse, bad_again]) == []
    assert early.hopeless([bad_again, bad]) == [bad_again, bad]
    assert sorted(t.name for t in trials if status_of(t) == "pruned") == sorted([bad.name, bad_again.name])


@pytest.mark.parametrize("more, said", [
    ("early_terminate: {type: hyperband}", "early_terminate: write either min_iter, or max_iter and s"),
    ("early_terminate: {type: hyperband, max_iter: 9}", "write either min_iter, or max_iter and s"),
    ("early_terminate: {type: median}", "expected {type: hyperband, min_iter: 3, eta: 3}"),
    ("early_terminate: {type: hyperband, min_iter: 3, eta: 1.5}", "eta: expected a whole number from 2 on, got 1.5"),
    ("early_terminate: {type: hyperband, min_iter: 3, strict: false}", "strict is true"),
    ("early_terminate: {type: hyperband, min_itr: 3}", "no key 'min_itr'; there are type, min_iter"),
    ("early_terminate: {type: hyperband, min_iter: 3}", "no bracket is before the last of 3 validations"),
    (EARLY + "baseline: {}", "differences from a baseline are of trials that ran to their end"),
    (EARLY + "changes: {none: {grad_clip: 1.0}}", "differences from a baseline"),
    (EARLY + "metric: {name: train_s}", "follows validation losses, and metric is train_s"),
], ids=lambda text: text if "early" not in text else "")
def test_what_cannot_be_ended_early_is_refused_in_one_line(tiny, tmp_path, capsys, more, said):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: grid\nbase: {tiny}\n{more}\nparameters: {{steps: {{value: 12}}}}\n")
    assert entry([str(path), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}") and said in lines[0], lines


def test_a_comparison_never_ends_a_trial_that_it_reports(tiny, tmp_path):
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(f"method: grid\n{EARLY}controller: {{type: cloud, tuning_seeds: [7], seeds: [0, 1], "
                    f"spaces: {{{tiny}: {{{RATES}}}}}}}\n"
                    "parameters: {steps: {value: 20}, val_every: {value: 2}}\n")
    sweep = read(path)
    tuning = plan(sweep, out)
    rows = [dict(row(t, out), status="finished", val_loss=t.configuration.parameters["optim.rest.lr"]) for t in tuning]
    reported = reporting(sweep, rows, out, ENDED)
    early = Halving(sweep, out, tuning)
    for trial, loss in zip([*tuning[:2], *reported], (1.0, 2.0, 5.0, 6.0)):
        log(trial, loss, loss, loss)
    assert len(reported) == 2 and early.hopeless([*reported, *tuning[:2]]) == [tuning[1]]
    for trial in reported:                                                      # seeds that were tuned with, one day
        (trial.folder / "pruned.json").write_text((tuning[1].folder / "pruned.json").read_text())
        assert status_of(trial) == "stopped"


def test_a_hopeless_rate_is_ended_early_and_stays_so_while_others_run_to_their_end(tiny, tmp_path, capsys):
    steps, batch_tokens = 300, 64
    rng, count = np.random.default_rng(0), batch_tokens * steps + 1
    tokens = np.where(rng.random(count) < 0.8, np.arange(count) * 7 % 64, rng.integers(0, 64, count))
    write_shard(tmp_path / "long.bin", tokens.astype(np.uint16))
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(
        f"method: grid\nearly_terminate: {{type: hyperband, min_iter: 2}}\ncontroller: {{type: cloud, "
        f"tuning_seeds: [7], seeds: [0], spaces: {{{tiny}: {{optim.hidden.lr: {{values: [0.02, 20.0]}}}}}}}}\n"
        f"parameters: {{steps: {{value: {steps}}}, batch_tokens: {{value: {batch_tokens}}}, val_every: {{value: 10}}, "
        f"data.train: {{value: {tmp_path / 'long.bin'}}}}}\n")
    assert entry([str(path), "--out", str(out), "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    good, bad, reported = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [each["status"] for each in (good, bad, reported)] == ["finished", "pruned", "finished"], said
    assert good["steps"] == reported["steps"] == steps and 20 <= bad["steps"] < steps
    assert reported["seed"] == 0 and reported["parameters"] == good["parameters"]
    pruned = json.loads((out / "trials" / bad["trial"] / "pruned.json").read_text())
    assert pruned["step"] == 20 and pruned["val_loss"] > losses(out / good["run"])["val", 20]
    assert json.loads((out / bad["run"] / "summary.json").read_text())["status"] == "stopped"   # it saved
    assert said.count(": pruned") == 1

    assert entry([str(path), "--out", str(out), "--jobs", "1"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "3 trials of 2 configurations, 3 done already" in said and "started" not in said

    path.write_text(path.read_text().replace("early_terminate: {type: hyperband, min_iter: 2}\n", ""))
    assert entry([str(path), "--out", str(out), "--dry-run"]) == 0
    assert f"{bad['trial']}  stopped" in capsys.readouterr().out                # then it goes on from there
