"""Comparisons of tuned presets, ladders of changes, and a preset as a sweep of one trial."""
import json

import pytest

from harness.yaml_tree import ConfigError
from scripts.sweep.__main__ import entry
from scripts.sweep.candidates import comparisons, configurations, label
from scripts.sweep.file import read
from scripts.sweep.plan import chosen, configuration_id, plan, reporting
from scripts.sweep.results import ENDED, FINAL

LADDER = """
method: grid
base: demo/muon.yaml
seeds: [0, 1]
parameters: {steps: {value: 5}}
changes:
  value residual: {model.value_residual: fixed}
  learned: {model.value_residual: learned, optim: [{name: scalars, params: [scalar], rule: adamw, lr: 0.02}]}
  shortcut: {model.embed_shortcut: true, optim: [{name: scalars, params: [scalar], rule: adamw, lr: 0.02}]}
"""
COMPARE = """
method: random
budget: 2
tuning_seeds: [7]
seeds: [0, 1]
spaces:
  {muon}: {{optim.hidden.lr: {{distribution: log_uniform_values, min: 0.001, max: 0.1}}}}
  {adam}: {{optim.hidden.lr: {{distribution: log_uniform_values, min: 0.0001, max: 0.01}}}}
parameters: {{steps: {{value: 4}}}}
"""


def sweep(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read(path)


@pytest.fixture
def presets(tiny, tmp_path):
    """Two files that differ in the hidden rule alone."""
    adam = tmp_path / "adam.yaml"
    adam.write_text(f"extends: {tiny.name}\noptim: [{{name: hidden, rule: adamw, lr: 0.001}}]\n")
    return {"muon": tiny, "adam": adam}


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_ladder_has_each_change_alone_and_left_out_with_what_is_built_on_it(tmp_path):
    found = comparisons(sweep(tmp_path, LADDER))
    base, every = found[0].against, found[0].of
    assert base.parameters == {"steps": 5}
    assert every.parameters["model.value_residual"] == "learned" and every.parameters["model.embed_shortcut"] is True
    assert [(each.change, each.family) for each in found] == [
        ("all", "all together"),
        ("value residual", "added alone"), ("learned", "added alone"), ("shortcut", "added alone"),
        ("value residual and learned", "left out of all"), ("learned", "left out of all"),
        ("shortcut", "left out of all")]
    without = {each.change: each.of.parameters for each in found if each.family == "left out of all"}
    assert "model.value_residual" not in without["value residual and learned"]
    assert without["learned"]["model.value_residual"] == "fixed"            # what it was built on stays
    assert all((each.with_it, each.without) == ((every, each.of) if each.family == "left out of all" else
                                                (each.of, base)) for each in found)
    one = LADDER[:LADDER.index("  learned:")]
    assert [each.family for each in comparisons(sweep(tmp_path, one))] == ["added alone"]       # all is that one
    assert without["shortcut"] == {key: value for key, value in every.parameters.items()
                                   if key != "model.embed_shortcut"}


def changed(tmp_path, changes):
    found = sweep(tmp_path, LADDER[:LADDER.index("  value residual:")] + "".join(f"  {line}\n" for line in changes))
    left = {each.change: each.of.parameters for each in comparisons(found) if each.family == "left out of all"}
    return comparisons(found)[0].of.parameters, left


def test_what_is_built_on_what_is_built_on_a_change_leaves_with_it(tmp_path):
    every, left = changed(tmp_path, ["a: {model.value_residual: fixed}",
                                     "b: {model.value_residual: learned, grad_clip: 1.0}", "c: {grad_clip: 2.0}",
                                     "d: {batch_tokens: 64}"])
    assert every == {"steps": 5, "model.value_residual": "learned", "grad_clip": 2.0, "batch_tokens": 64}
    assert left == {"a and b and c": {"steps": 5, "batch_tokens": 64},
                    "b and c": {"steps": 5, "model.value_residual": "fixed", "batch_tokens": 64},
                    "c": {**every, "grad_clip": 1.0},
                    "d": {key: value for key, value in every.items() if key != "batch_tokens"}}
    every, left = changed(tmp_path, ["cap: {model.softcap: {form: tanh, cap: 30}}", "none: {model.softcap: null}"])
    assert left.keys() == {"cap and none", "none"} and every["model.softcap"] is None


def test_changes_of_the_same_mapping_or_list_of_groups_merge_as_overrides_do(tmp_path):
    every, left = changed(tmp_path, ["hidden: {optim: [{name: hidden, lr: 0.03}]}",
                                     "rest: {optim: [{name: rest, lr: 0.02}, {name: hidden, momentum: 0.9}]}",
                                     "cap: {model.softcap: {form: tanh, cap: 30}}",
                                     "lower: {model.softcap: {cap: 15}}"])
    hidden, rest = {"name": "hidden", "lr": 0.03}, {"name": "rest", "lr": 0.02}
    assert every["optim"] == [hidden | {"momentum": 0.9}, rest]
    assert every["model.softcap"] == {"form": "tanh", "cap": 15}
    assert left["rest"]["optim"] == [hidden] and left["hidden"]["optim"] == [rest, {"name": "hidden", "momentum": 0.9}]
    assert left.keys() == {"hidden", "rest", "cap and lower", "lower"}
    assert left["lower"]["model.softcap"] == {"form": "tanh", "cap": 30}


def test_rungs_add_the_changes_up_and_share_trials_with_the_other_families(tiny, tmp_path):
    with_rungs = sweep(tmp_path, LADDER.replace("demo/muon.yaml", str(tiny)) + "rungs: true\n")
    rungs = [each for each in comparisons(with_rungs) if each.family == "rung"]
    assert [each.against for each in rungs[1:]] == [each.of for each in rungs[:-1]]
    tried = configurations(with_rungs)
    assert [label(each, with_rungs) for each in tried] == [                 # all but shortcut is what `+ learned` is
        "baseline", "all", "+ value residual", "+ learned", "+ shortcut", "all but learned"]
    trials = plan(with_rungs, tmp_path)
    assert len(trials) == 2 * 6 and [trial.is_baseline for trial in trials].count(True) == 2


@pytest.mark.parametrize("old, new, said", [
    ("changes:", "changes: {}\nignored:", "ignored: no such key"),
    ("  value residual: {model.value_residual: fixed}", "  value residual: {}", "changes: expected changes: {NAME:"),
    ("method: grid", "method: random\nbudget: 3", "changes: a ladder has method: grid, and of every parameter one"),
    ("{value: 5}", "{values: [5, 6]}", "changes: a ladder has method: grid, and of every parameter one value"),
    ("seeds: [0, 1]", "seeds: [0, 1]\ntuning_seeds: [2]", "changes: a ladder changes one preset"),
    ("seeds: [0, 1]", "seeds: [0, 1]\nrungs: 3", "rungs: expected true or false"),
    ("seeds: [0, 1]", "seeds: [0, 1]\nrun_cap: 6", "run_cap: a ladder gives its verdicts when all planned seeds ended"),
    ("{model.value_residual: fixed}", "{seed: 5}", ":7: changes.value residual.seed: no change of a ladder"),
    ("{model.embed_shortcut: true,", "{optim.scalars.lr: 0.03, model.embed_shortcut: true,",
     ":9: changes.shortcut: optim.scalars.lr says otherwise what optim says in learned; write both the same way"),
    ("{model.embed_shortcut: true", "{model: {value_residual: null}, model.embed_shortcut: true",
     "changes.shortcut: model says otherwise what model.value_residual says in value residual"),
    ("embed_shortcut", "embed_shortcuts", ":9: model.embed_shortcuts=true: unknown key"),
    ("name: scalars, params: [scalar], rule: adamw, lr: 0.02}", "name: [a], lr: 0.02}", "expected a group with a name"),
])
def test_what_is_wrong_with_a_ladder_is_said(tmp_path, old, new, said):
    assert old in LADDER
    with pytest.raises(ConfigError) as error:
        plan(sweep(tmp_path, LADDER.replace(old, new)), tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("old, new, said", [
    ("tuning_seeds: [7]", "tuning_seeds: [1]", "tuning_seeds: the best of a search is lucky at its own seeds"),
    ("seeds: [0, 1]", "", "tuning_seeds: the best of a search is lucky at its own seeds"),
    ("seeds: [0, 1]", "seeds: []", "seeds: expected a list of whole numbers, like [0, 1, 2]; without it"),
    ("{value: 4}", "{values: [4, 12], probabilities: [0.95, 0.05]}",            # rare: no draw of the first has it
     ":9: steps: what is compared differs in optim alone; give it one value"),
    ("tuning_seeds: [7]", "tuning_seeds: [7, 7]", "tuning_seeds: names one twice"),
    ("budget: 2", "run_cap: 4", "run_cap: trials cut off would leave presets with different budgets"),
    ("budget: 2", "budget: 2\nbaseline: {config: demo/sgd.yaml}", "baseline: a comparison is with one of its presets"),
    ("budget: 2", "budget: 2\nbase: demo/sgd.yaml", "base: presets are there twice, in spaces and in base"),
    ("{optim.hidden.lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}}", "{seed: {values: [3]}}",
     "seed: no parameter of a preset's own"),
    ("method: random\nbudget: 2", "method: grid", "a grid has no log_uniform_values"),
])
def test_what_is_wrong_with_a_comparison_is_said(presets, tmp_path, old, new, said):
    text = COMPARE.format(**presets)
    assert old in text
    with pytest.raises(ConfigError) as error:
        plan(sweep(tmp_path, text.replace(old, new)), tmp_path)
    assert said in str(error.value)


def test_unequal_grids_are_unequal_budgets(presets, tmp_path):
    text = COMPARE.format(**presets).replace("method: random\nbudget: 2", "method: grid")
    for low, high, values in (("0.001", "0.1", "[0.01]"), ("0.0001", "0.01", "[0.01, 0.001]")):
        text = text.replace(f"{{distribution: log_uniform_values, min: {low}, max: {high}}}", f"{{values: {values}}}")
    with pytest.raises(ConfigError, match="grids of different sizes are different tuning budgets: 1 of .*, 2 of "):
        plan(sweep(tmp_path, text), tmp_path)


def test_presets_that_differ_in_more_than_the_optimizer_are_not_compared(presets, tmp_path):
    text = COMPARE.format(**presets)
    presets["adam"].write_text(presets["adam"].read_text() + "grad_clip: 1.0\n")
    with pytest.raises(ConfigError, match="adam.yaml: grad_clip is 1.0, but None in .*; set grad_clip in parameters"):
        plan(sweep(tmp_path, text), tmp_path)
    equal = text.replace("steps: {value: 4}", "steps: {value: 4}, grad_clip: {value: 2.0}")
    assert len(plan(sweep(tmp_path, equal), tmp_path)) == 4


def test_a_group_has_a_schedule_of_its_own_only_where_the_comparison_says_so(presets, tmp_path):
    text, adam = COMPARE.format(**presets), presets["adam"].read_text()
    presets["adam"].write_text(adam.replace("0.001}", "0.001, schedule: {shape: cosine}}"))
    with pytest.raises(ConfigError, match="adam.yaml: optim.hidden.schedule is not that of the run, nor that of all "
                                          "presets; write it in the preset's space, .*, or set it to null in param"):
        plan(sweep(tmp_path, text), tmp_path)
    for said in ("optim.hidden.schedule: {value: {shape: cosine}}", "optim.hidden.schedule.shape: {value: cosine}"):
        shown = text.replace("min: 0.0001, max: 0.01}", f"min: 0.0001, max: 0.01}}, {said}")
        assert {trial.config.optim[0].schedule and "own" for trial in plan(sweep(tmp_path, shown), tmp_path)} == \
            {None, "own"}
    muon = presets["muon"].read_text()
    presets["muon"].write_text(muon.replace("ns_dtype: float32}", "ns_dtype: float32, schedule: {shape: cosine}}"))
    assert all(trial.config.optim[0].schedule for trial in plan(sweep(tmp_path, text), tmp_path))   # all have it
    none = text.replace("{steps: {value: 4}}", "{steps: {value: 4}, optim.hidden.schedule: {value: null}}")
    assert {trial.config.optim[0].schedule for trial in plan(sweep(tmp_path, none), tmp_path)} == {None}


def test_every_preset_is_tuned_alike_and_its_best_runs_with_other_seeds(presets, tmp_path, capsys):
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(COMPARE.format(**presets) + f"baseline: {{config: {presets['adam']}}}\n")
    assert entry([str(path), "--out", str(out), "--jobs", "1"]) == 0
    rows = rows_of(out)
    for preset in map(str, presets.values()):
        tuning = [row for row in rows if row["base"] == preset and row["seed"] == 7]
        reported = [row for row in rows if row["base"] == preset and row["seed"] != 7]
        best = min(tuning, key=lambda row: row["val_loss"])
        assert len(tuning) == 2 and tuning[0]["val_loss"] != tuning[1]["val_loss"]
        assert [(row["seed"], row["parameters"]) for row in reported] == [(seed, best["parameters"]) for seed in (0, 1)]
        assert all(row["status"] == "finished" for row in tuning + reported)
    assert not list(out.glob("trials/*/*/checkpoints"))
    assert (out / "sweep.yaml").read_text() == path.read_text()
    capsys.readouterr()
    assert entry([str(path), "--out", str(out), "--jobs", "1", "--dry-run"]) == 0       # now all eight are known
    assert "8 trials of 4 configurations, 8 done already" in capsys.readouterr().out


def test_a_tuning_trial_that_did_not_finish_is_never_the_best_and_may_still_come(presets, tmp_path):
    found = sweep(tmp_path, COMPARE.format(**presets).replace("tuning_seeds: [7]", "tuning_seeds: [7, 8]"))
    one, two = (each for each in configurations(found) if each.base == str(presets["muon"]))

    def row(each, seed, status, loss):
        return dict(configuration=configuration_id(each), base=each.base, parameters=each.parameters, seed=seed,
                    status=status, val_loss=loss)
    rows = [row(one, 7, "finished", 1.0), row(one, 8, "crashed", 1.0),
            row(two, 7, "finished", 2.0), row(two, 8, "finished", 3.0)]
    assert chosen(rows, found) == configuration_id(two)
    only = found._replace(bases=(one.base,))
    assert reporting(only, rows, tmp_path, FINAL) == []                     # the crashed one might come again
    assert [(trial.configuration, trial.config.seed) for trial in reporting(only, rows, tmp_path, ENDED)] == [
        (two, 0), (two, 1)]
    assert chosen(rows[:2], found) is None and reporting(only, rows[:2], tmp_path, ENDED) == []
    assert chosen([{**each, "status": "finished"} for each in rows], found._replace(maximize=True)) \
        == configuration_id(two)


def test_a_preset_is_a_sweep_of_one_trial(tiny, tmp_path):
    assert entry([str(tiny), "--out", str(tmp_path / "out")]) == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["status"] == "finished" and row["steps"] == 12 and row["base"] == str(tiny)
    assert list((tmp_path / "out" / row["run"] / "checkpoints").glob("*.pt"))       # it was run for its weights


def test_a_change_that_changes_nothing_is_refused(tiny, tmp_path):
    text = LADDER.replace("demo/muon.yaml", str(tiny)) + "  nothing: {model.softcap: null}\n"
    with pytest.raises(ConfigError, match=f"model.softcap=null: describes the same run as {tiny} steps=5"):
        plan(sweep(tmp_path, text), tmp_path)
