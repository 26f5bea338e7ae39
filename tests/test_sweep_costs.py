"""What the optimizers of a comparison cost: bytes counted another way, turns, and a process like a trial's."""
import json

import pytest
import torch

from data.arguments import or_refused
from harness.load import load
from model.gpt import GPT
from scripts.sweep import costs, file, pack, plan
from scripts.sweep.results import row, write_results

COMPARE = """
method: grid
tuning_seeds: [7]
seeds: [0, 1]
spaces:
  {muon}: {{optim.hidden.lr: {{values: [0.01, 0.02]}}}}
  {soap}: {{optim.hidden.lr: {{values: [0.01, 0.02]}}}}
parameters: {{steps: {{value: 4}}}}
"""


@pytest.fixture
def presets(tiny, tmp_path):
    """Two files that differ in the hidden rule alone."""
    soap = tmp_path / "soap.yaml"
    soap.write_text(f"extends: {tiny.name}\noptim: [{{name: hidden, rule: soap, lr: 0.01, ns_dtype: null}}]\n")
    return {"muon": tiny, "soap": soap}


@pytest.fixture
def ended(presets, tmp_path):
    """The folder of a comparison whose trials are said to have finished, 0.02 as the best of both."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.yaml").write_text(COMPARE.format(**presets))
    sweep = file.read(out / "sweep.yaml")

    def finished(trials):
        for trial in trials:
            plan.write(trial)
        return [row(trial, out) | dict(status="finished", val_loss=1 - trial.config.optim[0].hyper.lr)
                for trial in trials]
    tuning = finished(plan.plan(sweep, out))
    write_results(tuning + finished(plan.reporting(sweep, tuning, out, ["finished"])), out)
    return out


def rewritten(out, change):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for each in rows:
        change(each)
    write_results(rows, out)


def test_only_configurations_whose_reporting_trials_finished_are_measured(ended):
    def rates():
        return sorted((path.parent.name, load(str(path)).config) for path in costs.reported(ended).values())
    found = [config for _, config in rates()]
    assert sorted(config.optim[0].rule for config in found) == ["muon", "soap"]
    assert all(config.optim[0].hyper.lr == 0.02 and config.seed in (0, 1) for config in found)
    rewritten(ended, lambda each: each.update(status="crashed") if each["seed"] == 0 and "soap" in each["base"] else 0)
    assert {config.optim[0].rule: config.seed for _, config in rates()} == {"muon": 0, "soap": 1}
    rewritten(ended, lambda each: each.update(status="crashed") if each["seed"] == 1 else None)
    assert [config.optim[0].rule for _, config in rates()] == ["muon"]


def test_costs_are_due_when_missing_damaged_or_of_other_configurations(ended):
    ids = list(costs.reported(ended))
    assert len(ids) == 2 and costs.is_due(ended)
    for text, due in ((json.dumps({key: {} for key in ids} | {"machine": "a"}), False),
                      (json.dumps({ids[0]: {}, "machine": "a"}), True),
                      (json.dumps({key: {} for key in [*ids, "0" * 8]}), True), ('{"', True), ("5", True)):
        (ended / "costs.json").write_text(text)
        assert costs.is_due(ended) == due, text
    rewritten(ended, lambda each: each.update(status="waiting") if each["seed"] != 7 else None)
    (ended / "costs.json").unlink()
    assert not costs.is_due(ended)                                    # there is nothing to measure yet


def test_state_is_that_of_all_groups_and_a_step_is_longer_than_its_optimizer(presets):
    """Muon keeps one number of 4 bytes a weight, AdamW two, SOAP Adam's two and momenta and bases of both sides."""
    found = costs.measure({name: load(str(path)).config for name, path in presets.items()}, 1, 2)
    config = load(str(presets["muon"])).config
    with torch.device("meta"):
        model = GPT(config.model, config.seq_len)
    roles = model.roles()
    hidden = [p.shape for name, p in model.named_parameters() if roles[name] in config.optim[0].params]
    rest = sum(p.numel() for p in model.parameters()) - sum(shape.numel() for shape in hidden)
    assert found["muon"]["state_bytes"] == 4 * sum(shape.numel() for shape in hidden) + 8 * rest
    assert found["soap"]["state_bytes"] == sum(4 * (2 * m * n + 2 * m * m + 2 * n * n) for m, n in hidden) + 8 * rest
    for name in presets:
        assert 0 < found[name]["optimizer_ms"] < found[name]["step_ms"] and found[name]["peak_bytes"] is None
    assert found["threads"] == torch.get_num_threads() and found["torch"] in found["machine"]


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_one_configuration_s_alone(presets):
    configs = {name: load(str(path)).config for name, path in presets.items()}
    together = costs.measure(configs, 1, 2)
    alone = costs.measure({"muon": configs["muon"]}, 1, 2)
    assert together["muon"]["peak_bytes"] == alone["muon"]["peak_bytes"] < together["soap"]["peak_bytes"]


def test_a_cost_is_the_median_of_turns_that_go_back_and_forth(monkeypatch):
    asked = []

    def turn(config, device, steps):
        asked.append(config)
        return costs.Turn({"a": 0, "b": 1}[config] + len(asked) / 1000, 5, 6, None)
    monkeypatch.setattr(costs, "_turn", turn)
    found = costs.measure({"x": "a", "y": "b"}, rounds=3)
    assert "".join(asked) == "ab" + "abbaab"                          # the first turns compile and do not count
    assert found["x"]["optimizer_ms"] == 6 and found["y"]["optimizer_ms"] == 1005 and found["x"]["rounds"] == 3


def test_a_sweep_measures_in_a_process_with_a_trial_s_share_of_the_machine(ended, monkeypatch):
    """Whatever OMP_NUM_THREADS is here. A failure is one line and leaves what was measured before."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    slot = pack.slots(1, 1, None, [], pack.cores_here())[0]
    assert costs.measure_in(slot, ended) is None and not costs.is_due(ended)
    found = json.loads((ended / "costs.json").read_text())
    assert found["threads"] == 1 and found["command"] == f"python -m scripts.sweep.costs {ended}"
    assert {"optimizer_ms", "step_ms", "state_bytes", "peak_bytes", "rounds"} == found[next(iter(found))].keys()
    path = next(iter(costs.reported(ended).values()))
    path.write_text("steps: many\n")
    said = costs.measure_in(slot, ended)
    assert said.startswith("costs not measured: exit code 2: error: ") and "\n" not in said
    assert json.loads((ended / "costs.json").read_text()) == found


def test_a_folder_that_is_no_comparison_s_is_one_line(ended, capsys):
    assert or_refused(costs.main, [str(ended / "trials")]) == 2
    (ended / "sweep.yaml").write_text("method: grid\nbase: demo/muon.yaml\nparameters: {steps: {value: 3}}\n")
    assert or_refused(costs.main, [str(ended)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no sweep.yaml in it, so no sweep's folder" in first and "this sweep has no tuning_seeds" in second
