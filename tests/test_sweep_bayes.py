"""Bayesian search: what is proposed, from which results, and what a sweep that continues remembers."""
import json
import math
import statistics
import subprocess
import sys

import pytest

from scripts.sweep import bayes
from scripts.sweep.__main__ import entry
from scripts.sweep.bayes import Search
from scripts.sweep.candidates import STARTUP
from scripts.sweep.file import read
from scripts.sweep.plan import configuration_id
from tests.conftest import ROOT

SPACE = "optim.hidden.lr: {distribution: log_uniform_values, min: 0.0001, max: 1.0}, " \
        "optim.rest.lr: {values: [0.1, 0.2, 0.3]}"


def write(tmp_path, tiny, more, parameters=SPACE):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: bayes\nbase: {tiny}\n{more}parameters: {{steps: {{value: 3}}, {parameters}}}\n")
    return path


def loss(each):
    """Least, 0, at 0.01 and 0.2."""
    return math.log10(each["optim.hidden.lr"] / 0.01) ** 2 + 20 * abs(each["optim.rest.lr"] - 0.2)


def fill(search, rows, result=loss):
    """Rows as trials that ended leave them, for all that was proposed."""
    for each in search.proposed:
        for seed in search.sweep.search_seeds:
            ended = dict(configuration=configuration_id(each), base=each.base, seed=seed, steps=3, status="finished",
                         val_loss=result(each.parameters))
            rows.setdefault(f"{configuration_id(each)} {seed}", ended)


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_proposals_gather_where_results_are_good(tiny, tmp_path, goal):
    sign = 1 if goal == "minimize" else -1
    path = write(tmp_path, tiny, f"budget: 30\nmetric: {{name: val/loss, goal: {goal}}}\n")
    search, rows = Search(read(path), tmp_path), {}
    fill(search, rows, lambda each: sign * loss(each))
    while search.next_trials(rows):
        fill(search, rows, lambda each: sign * loss(each))
    assert len(search.proposed) == len(rows) == 30                              # all different, and then an end
    found = [loss(each.parameters) for each in search.proposed]
    assert statistics.median(found[STARTUP:]) < 0.5 * statistics.median(found[:STARTUP])


def test_a_search_that_continues_remembers_what_it_proposed_unless_the_file_means_something_else(tiny, tmp_path):
    path = write(tmp_path, tiny, "budget: 13\nseeds: [0, 1]\n")
    search, rows = Search(read(path), tmp_path), {}
    fill(search, rows)
    trials = search.next_trials(rows)
    assert [trial.config.seed for trial in trials] == [0, 1]
    again = Search(read(path), tmp_path)
    assert again.remembered == [trials[0].configuration] == search.proposed[STARTUP:]
    assert again.known == search.known
    same = again.next_trials(rows)
    assert [trial.name for trial in same] == [trial.name for trial in search.next_trials(rows)]
    write(tmp_path, tiny, "budget: 13\nseeds: [0, 1]\n", SPACE.replace("0.0001", "0.0002"))
    assert Search(read(path), tmp_path).remembered == []
    write(tmp_path, tiny, "budget: 11\n")
    assert len(Search(read(path), tmp_path).proposed) == 11


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_what_does_not_end_well_counts_as_the_worst(tiny, tmp_path, goal):
    """Ten ended, good or bad from left to right; ten without a result lie further right, in places nobody knows."""
    rate = "optim.hidden.lr: {distribution: log_uniform_values, min: 0.0001, max: 1.0}"
    sweep = read(write(tmp_path, tiny, f"budget: 30\nmetric: {{name: val/loss, goal: {goal}}}\n", rate))
    p = sweep.parameters_of(str(tiny))[-1]
    ended = [bayes.Told({p.key: (i + 0.5) / 20}, "ended", (i + 1.0) * (1 if goal == "minimize" else -1))
             for i in range(10)]
    lost = [bayes.Told({p.key: (i + 0.5) / 20}, "ended", None) for i in range(10, 20)]

    def proposed(told):
        return [bayes.propose(sweep, [p], told, attempt) for attempt in range(8)]
    for end, same in ((ended[-1].value, True), (ended[0].value, False)):        # the worst, and the best
        alike = [each._replace(value=end) for each in lost]
        assert (proposed(ended + lost) == proposed(ended + alike)) is same


def test_what_runs_is_not_proposed_again(tiny, tmp_path):
    search, rows = Search(read(write(tmp_path, tiny, "budget: 30\n")), tmp_path), {}
    fill(search, rows)
    for row in rows.values():
        if row["val_loss"] > 1:
            row.update(status="not_finite", val_loss=None)
    running = [search.next_trials(rows)[0].configuration for _ in range(8)]     # none of them in rows yet
    assert len({configuration_id(each) for each in running}) == 8
    told = [bayes._told(places, each, search.sweep, rows)[1:] for places, each in search.known]
    assert told.count(("running", None)) == 8 and ("ended", None) in told


def test_every_configuration_of_a_small_space_is_proposed_once(tiny, tmp_path):
    path = write(tmp_path, tiny, "budget: 14\n", "optim.hidden.lr: {min: 1, max: 12}")
    search, rows = Search(read(path), tmp_path), {}
    fill(search, rows, lambda each: each["optim.hidden.lr"])
    while search.next_trials(rows):
        fill(search, rows, lambda each: each["optim.hidden.lr"])
    assert sorted(each.parameters["optim.hidden.lr"] for each in search.proposed) == list(range(1, 13))


def test_presets_have_equal_budgets_and_the_same_first_configurations(tiny, tmp_path):
    path, other = tmp_path / "sweep.yaml", tiny.with_name("other.yaml")
    other.write_text(tiny.read_text().replace("name: tiny", "name: other"))
    path.write_text(f"method: bayes\nrun_cap: 24\nparameters: {{config: {{values: [{tiny}, {other}]}}, "
                    "steps: {value: 3}, grad_clip: {min: 0.1, max: 1.0}}\n")
    search, rows = Search(read(path), tmp_path), {}
    fill(search, rows, lambda each: each["grad_clip"])
    while search.next_trials(rows):
        fill(search, rows, lambda each: each["grad_clip"])
    first, second = ([each.parameters for each in search.proposed if each.base == base]
                     for base in (str(tiny), str(other)))
    assert len(first) == len(second) == 12 and first[:STARTUP] == second[:STARTUP]


def test_pruned_configurations_attract_no_proposals_however_low_their_loss_was(tiny, tmp_path):
    rate = "optim.hidden.lr: {distribution: log_uniform_values, min: 0.0001, max: 1.0}"
    sweep = read(write(tmp_path, tiny, "budget: 30\n", rate))
    p = sweep.parameters_of(str(tiny))[-1]
    told = [bayes.Told({p.key: (i + 0.5) / 20}, "pruned" if i >= 10 else "ended", 9.0 - i / 10) for i in range(20)]
    found = [bayes.propose(sweep, [p], told, attempt)[p.key] for attempt in range(12)]
    alike = [bayes.propose(sweep, [p], [each._replace(status="ended") for each in told], attempt)[p.key]
             for attempt in range(12)]
    assert statistics.median(found) < 0.5 < statistics.median(alike)


def test_a_comparison_searches_each_preset_in_its_own_space_with_the_tuning_seeds(tiny, tmp_path):
    path, other = tmp_path / "sweep.yaml", tiny.with_name("other.yaml")
    other.write_text(tiny.read_text().replace("rule: muon, lr: 0.02, ns_dtype: float32", "rule: adamw, lr: 0.01"))
    path.write_text(f"method: bayes\nbudget: 12\ntuning_seeds: [7, 8]\nseeds: [0]\nspaces:\n"
                    f"  {tiny}: {{optim.hidden.lr: {{min: 0.1, max: 0.2}}}}\n"
                    f"  {other}: {{optim.hidden.betas: {{values: [[0.8, 0.9], [0.9, 0.95], [0.9, 0.99]]}}}}\n"
                    "parameters: {steps: {value: 3}, optim.rest.lr: {min: 0.1, max: 1.0}}\n")
    search, rows = Search(read(path), tmp_path), {}
    fill(search, rows, lambda each: each["optim.rest.lr"])
    assert not search.is_over(rows) and search.remembered == [] and not (tmp_path / "search.jsonl").exists()
    while trials := search.next_trials(rows):
        assert [trial.config.seed for trial in trials] == [7, 8]
        fill(search, rows, lambda each: each["optim.rest.lr"])
    assert search.is_over(rows)
    keys = {str(tiny): "optim.hidden.lr", str(other): "optim.hidden.betas"}
    assert all(each.parameters.keys() == {"steps", "optim.rest.lr", keys[each.base]} for each in search.proposed)
    assert len(search.proposed) == 24
    assert Search(read(path), tmp_path).known == search.known
    best = search.proposed[0]
    rows["reported"] = dict(rows[f"{configuration_id(best)} 7"], seed=0, status="running")
    assert bayes._told({}, best, search.sweep, rows) == bayes.Told({}, "ended", best.parameters["optim.rest.lr"])


def test_a_bayesian_sweep_runs_its_proposals_and_ends(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.sweep.candidates.STARTUP", 1)
    path = write(tmp_path, tiny, "budget: 2\n")
    assert entry([str(path), "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["finished", "finished"] and len({row["trial"] for row in rows}) == 2
    assert len((tmp_path / "out" / "search.jsonl").read_text().splitlines()) == 2


def test_without_optuna_one_line_says_how_to_get_it(tiny, tmp_path):
    path = write(tmp_path, tiny, "budget: 4\n")
    code = "import sys; sys.modules['optuna'] = None\n" \
           "import scripts.sweep.__main__ as m; sys.exit(m.entry(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == \
        "error: method: bayes and early_terminate need Optuna: python -m pip install optuna; or take method: random " \
        "without early_terminate\n"
