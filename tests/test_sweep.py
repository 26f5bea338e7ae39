"""Sweep files: what is understood, drawn and refused; how trials are named, packed and ranked. Nothing is trained."""
import io
import json
import math
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
import yaml

from harness.config import config_identity, to_yaml
from harness.load import load
from harness.yaml_tree import ConfigError
from scripts.sweep import pack
from scripts.sweep.__main__ import entry
from scripts.sweep.candidates import configurations
from scripts.sweep.parameter import drawn, grid, parameter, quantile
from scripts.sweep.file import read
from scripts.sweep.plan import plan
from scripts.sweep.run import Going
from scripts.sweep.show import Show
from tests.conftest import ROOT

SCHEMA = json.loads((ROOT / "tests" / "data" / "wandb_sweep_schema.json").read_text())
FILES = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
MUON = "base: demo/muon.yaml\n"


def sweep(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read(path)


def points(tmp_path, text):
    return [each.parameters for each in configurations(sweep(tmp_path, text))]


# ---- distributions

@pytest.mark.parametrize("spec, u, value", [
    (dict(min=1, max=4), 0.0, 1), (dict(min=1, max=4), 0.999, 4),
    (dict(min=1.0, max=4), 0.5, 2.5),
    (dict(distribution="q_uniform", min=0, max=1, q=0.25), 0.4, 0.5),
    (dict(distribution="q_uniform", min=0, max=100, q=10), 0.44, 40),
    (dict(distribution="log_uniform", min=-2, max=0), 0.5, 0.367879),
    (dict(distribution="log_uniform_values", min=0.001, max=0.1), 0.5, 0.01),
    (dict(distribution="q_log_uniform_values", min=1, max=256, q=4), 0.75, 64),
    (dict(distribution="inv_log_uniform", min=0, max=2), 0.25, 0.22313),
    (dict(distribution="normal", mu=3, sigma=2), 0.5, 3.0),
    (dict(distribution="normal", mu=0, sigma=1), 0.975, 1.95996),
    (dict(distribution="log_normal", mu=1, sigma=2), 0.5, 2.71828),
    (dict(distribution="beta", a=1, b=1), 0.3, 0.3),
    (dict(values=["a", "b", "c"]), 0.34, "b"),
    (dict(values=["a", "b", "c"], probabilities=[0.2, 0.0, 0.8]), 0.19, "a"),
    (dict(values=["a", "b", "c"], probabilities=[0.2, 0.0, 0.8]), 0.21, "c"),
    (dict(value=[0.9, 0.95]), 0.7, [0.9, 0.95])], ids=str)
def test_a_quantile_is_that_of_the_distribution_by_wandbs_definition(spec, u, value):
    found = quantile(parameter("lr", spec), u)
    assert found == pytest.approx(value, rel=1e-5) if isinstance(value, float) else found == value
    assert type(found) is type(value)


def test_few_draws_fill_every_range_evenly_and_together():
    """Halton's bases are 2, 3, 5: of 2^a or 3^b draws one lies in each equal part of a range."""
    spec = dict(distribution="log_uniform_values", min=1e-4, max=1.0)
    three = [parameter(key, spec) for key in ("lr", "decay", "eps")]
    for base, key in ((2, "lr"), (3, "decay"), (5, "eps")):
        logs = sorted(math.log10(drawn(three, number)[key]) for number in range(base**2))
        assert [int(base**2 * (x + 4) / 4) for x in logs] == list(range(base**2))
    many = np.array([[math.log10(x) for x in drawn(three, number).values()] for number in range(400)])
    assert np.abs(np.corrcoef(many.T) - np.eye(3)).max() < 0.02
    quarters = {(int(a + 4) // 2, int(b + 4) // 2) for a, b, _ in many[:8]}
    assert len(quarters) == 4                                                   # low and high of one with both of the other


@pytest.mark.parametrize("spec, values", [
    (dict(values=[3, 1]), [3, 1]), (dict(value=None), [None]), (dict(min=2, max=4), [2, 3, 4]),
    (dict(distribution="q_uniform", min=0.1, max=0.4, q=0.1), [0.1, 0.2, 0.3])], ids=str)
def test_a_grid_has_the_values_that_wandbs_has(spec, values):
    assert grid(parameter("x", spec)) == values


# ---- files

def test_nested_and_dotted_parameters_give_the_same_keys(tmp_path):
    nested = MUON + "method: grid\n" \
                    "parameters: {optim: {parameters: {hidden: {parameters: {lr: {values: [0.1, 0.2]}}}}}}"
    dotted = MUON + "method: grid\nparameters: {optim.hidden.lr: {values: [0.1, 0.2]}}"
    assert points(tmp_path, nested) == points(tmp_path, dotted) == [{"optim.hidden.lr": 0.1}, {"optim.hidden.lr": 0.2}]


def test_our_keys_may_stand_under_controller_where_wandbs_schema_lets_them_pass(tmp_path):
    text = "method: grid\ncontroller: {type: cloud, base: demo/muon.yaml, seeds: [4], baseline: {}}\n" \
           "parameters: {steps: {values: [5]}}"
    jsonschema.validate(yaml.safe_load(text), SCHEMA)
    found = sweep(tmp_path, text)
    assert found.bases == ("demo/muon.yaml",) and found.seeds == (4,)
    assert [each.parameters for each in configurations(found)] == [{}, {"steps": 5}]


def test_a_random_search_is_the_same_again_and_grows_with_its_budget_and_its_parameters(tmp_path):
    text = MUON + "method: random\nbudget: %d\nparameters: {steps: {min: 1, max: 900}, grad_clip: {min: 0.1, max: 2.0}}"
    four = points(tmp_path, text % 4)
    assert points(tmp_path, text % 4) == four == points(tmp_path, text % 9)[:4]
    assert len({each["steps"] for each in four}) == 4
    more = points(tmp_path, (text % 4).replace("max: 2.0}}", "max: 2.0}, seq_len: {values: [64, 128]}}"))
    assert [{**each, "seq_len": None} for each in more] == [{**each, "seq_len": None} for each in four]


def test_draws_are_these_whatever_library_makes_them(tmp_path):
    """Trials of sweeps that were begun are found again by their values."""
    text = MUON + "method: random\nbudget: 5\nparameters: {optim.hidden.lr: {distribution: log_uniform_values, " \
                  "min: 0.001, max: 0.1}, grad_clip: {values: [1.0, 2.0]}, steps: {min: 3, max: 9}}"
    assert [tuple(each.values()) for each in points(tmp_path, text)] == [
        (0.0015785, 1.0, 5), (0.015785, 2.0, 7), (0.00499164, 1.0, 3), (0.0499164, 1.0, 6), (0.00280701, 2.0, 9)]
    thousand = points(tmp_path, text.replace("budget: 5", "budget: 1000"))
    assert len(thousand) == 1000 and thousand[:5] == points(tmp_path, text)


def test_run_cap_counts_every_preset_with_every_seed(tmp_path):
    text = "method: random\nrun_cap: 13\nseeds: [0, 1]\n" \
           "parameters: {config: {values: [demo/muon.yaml, demo/sgd.yaml]}, steps: {min: 1, max: 900}}"
    found = configurations(sweep(tmp_path, text))
    assert [each.base for each in found] == 3 * ["demo/muon.yaml"] + 3 * ["demo/sgd.yaml"]
    assert [each.parameters for each in found[:3]] == [each.parameters for each in found[3:]]     # equal draws for each


@pytest.mark.parametrize("text, said", [
    ("method: baies\nparameters: {steps: {value: 1}}", "method: expected grid, random or bayes, got 'baies'"),
    ("method: grid\nbudgets: 3\nparameters: {steps: {value: 1}}", ":3: budgets: no such key; there are"),
    ("method: grid\nparameters: {steps: {values: [3e-4]}}", "0.0003 is '3e-4' to wandb; write 3.0e-4"),
    ("method: grid\nparameters: {steps: {valeus: [3]}}", "parameters.steps: expected value, values, min and max"),
    ("method: grid\nparameters: {steps: {values: [3], max: 3}}", "categorical has no 'max'"),
    ("method: grid\nparameters: {steps: {distribution: uniforn, min: 1, max: 3}}", "no distribution 'uniforn'"),
    ("method: grid\nparameters: {steps: {min: 1.5, max: 3}}", "parameters.steps: a grid has no uniform"),
    ("method: grid\nparameters: {steps: {min: 5, max: 3}}", "min 5 is above max 3"),
    ("method: grid\nparameters: {steps: {distribution: log_uniform_values, min: 0, max: 3}}", "min must be above 0"),
    ("method: random\nparameters: {steps: {min: 1, max: 3}}", "write budget (configurations) or run_cap"),
    ("method: random\nbudget: 4\nparameters: {steps: {min: 1, max: 3}}", "only 3 different configurations"),
    ("method: grid\nbudget: 4\nparameters: {steps: {value: 1}}", "budget: a grid runs all that it holds"),
    ("method: random\nbudget: 1000\nparameters: {steps: {value: 9}, grad_clip: {values: [1.0, 2.0]}}",
     "has only 2 different configurations, budget is 1000; lower it"),
    ("method: random\nbudget: 3\nparameters: {grad_clip: {values: [1.0, 2.0, 3.0], probabilities: [0.5, 0.5, 0.0]}}",
     "has only 2 different configurations"),
    ("method: grid\nparameters: {optim.hiden.lr: {values: [0.1, 0.2, 0.3]}, steps: {values: [4, 5]}}",
     ":3: optim.hiden.lr=0.1: optim has no group 'hiden'; did you mean 'hidden'? groups: 0 hidden, 1 rest (and 2 "
     "more)"),
    ("method: grid\nseeds: [0, 1]\nparameters: {steps: {values: [9, 0]}}", ":4: steps=0: steps: must be greater"),
    ("method: grid\nseeds: [0, 1]\nbaseline: {grad_clip: -1.0}\nparameters: {steps: {value: 5}}",
     ":4: grad_clip=-1.0: grad_clip: must be greater"),
    ("method: grid\nparameters: {model: {parameters: {layer: {value: 3}}}}", ":3: model.layer=3: unknown key"),
    ("method: grid\nmetric: {name: [val/loss]}\nparameters: {steps: {value: 1}}", "metric.name: no ['val/loss']"),
    ("method: grid\nmetric: {name: val/loss, target: 3.0}\nparameters: {steps: {value: 1}}",
     ":3: metric.target: a sweep does not stop at a target; remove it"),
    ("method: grid\nscheduler: {a: 1}\nparameters: {steps: {value: 1}}", "the sweep schedules its own trials; remove"),
    ("method: grid\nparameters: {steps: {distribution: [uniform], min: 1, max: 3}}", "no distribution ['uniform']"),
    ("method: grid\nparameters: {steps: {distribution: {a: 1}, value: 1}}", "no distribution {'a': 1}"),
    ("method: grid\nbaseline: {config: 5}\nparameters: {steps: {value: 1}}",
     ":3: baseline.config: expected the name of a preset, got 5"),
    ("method: grid\nbaseline:\nparameters: {steps: {value: 1}}", ":3: baseline: nothing stands behind it; write what"),
    ("method: grid\nbaseline: {name: a}\nparameters: {steps: {value: 1}}", ":3: baseline: expected a mapping of"),
    ("method: grid\ncontroller: {run_cap: 3}\nparameters: {steps: {value: 1}}", "controller: expected a mapping of"),
    ("method: grid\ncontroller: {seeds: null}\nparameters: {steps: {value: 1}}", ":3: controller.seeds: nothing"),
    ("method: grid\nseeds: []\nparameters: {steps: {value: 1}}", ":3: seeds: expected a list of whole numbers, like"),
    ("method: grid\nparameters: {5: {value: 4}}", ":3: parameters.5: the key 5 is no text to wandb; put it in quotes"),
    ("method: grid\nparameters: {steps: {values: [.nan]}}", ":3: parameters.steps: expected finite numbers, got nan"),
    ("method: grid\nseeds: [1]", "parameters: expected a mapping of parameters; a sweep file needs method, base and"),
    ("seeds: [1]", "method: expected grid, random or bayes; a sweep file needs method, base and parameters, like"),
    ("method: grid\nearly_terminate: {type: hyperband}\nparameters: {steps: {value: 1}}", "early_terminate: write either"),
    ("method: grid\nseeds: [1, 1]\nparameters: {steps: {value: 1}}", "equal seeds give equal runs"),
    ("method: grid\nseeds: [1]\nparameters: {steps: {value: 1}, seed: {value: 2}}", "there twice, in seeds"),
    ("method: grid\nparameters: {steps: {value: 1}, config: {value: a}}", "there twice, in parameters.config and in base"),
    ("method: grid\nmetric: {name: val/los}\nparameters: {steps: {value: 1}}", "metric.name: no 'val/los'"),
    ("method: grid\nmetric: {name: val/loss_avg}\nparameters: {steps: {value: 1}}", "there is no average"),
    ("method: grid\nparameters: {optim.hiden.lr: {value: 1}}", "optim has no group 'hiden'; did you mean 'hidden'?"),
    ("method: grid\nparameters: {compile: {values: [true, false]}}", "describes the same run as"),
    ("method: grid\nparameters: {steps: {values: [10, 500000]}}", "500000"),
    ("method: grid\nparameters: {data.train: {value: 'none/*.bin'}}", ":3: data.train=\"none/*.bin\": data.train: no"),
    ("method: grid\nparameters: {runs_dir: {value: here}}", "parameters.runs_dir: the sweep itself sets it"),
], ids=lambda text: "" if text.startswith(("method", "seeds")) else text)
def test_what_is_wrong_is_said_in_one_line_before_anything_starts(tiny, tmp_path, capsys, text, said):
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(f"base: {tiny}\n{text}")
    assert entry([str(path), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}") and said in lines[0], lines
    assert not out.exists()


@pytest.mark.parametrize("text, said", [
    (None, "cannot be read: No such file or directory; a sweep file needs method, base and parameters"),
    ("\n", "the file is empty; a sweep file needs method, base and parameters, like configs/sweeps/"),
    ("base: ''\nmethod: grid\nparameters: {steps: {value: 1}}", ":1: base: expected the name of a preset, got ''"),
    ("base: /\nmethod: grid\nparameters: {steps: {value: 1}}", ":1: base: expected the name of a preset, got '/'"),
    ("method: grid\nparameters: {config: {value: ''}}", ":2: parameters.config: expected the name of a preset, got ''"),
    ("method: grid\nparameters:\n  steps: {value: 1}\n  config: {values: [demo/muon.yaml, demo/muom.yaml]}",
     ":4: no configuration 'demo/muom.yaml'"),
    ("base: demo/muom.yaml\nmethod: grid\nparameters: {steps: {values: [1, 2]}}", ":1: no configuration 'demo/muom"),
    ("method: random\nbudget: 2\ntuning_seeds: [1]\nseeds: [2]\nspaces:\n  demo/muon.yaml: {steps: {value: 1}}\n"
     "  demo/muom.yaml: {steps: {value: 1}}", ":7: no configuration 'demo/muom.yaml'"),
], ids=str)
def test_a_file_that_is_none_or_names_no_preset_is_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    assert entry([str(path), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}") and said in lines[0], lines


def test_a_ladder_and_a_comparison_need_no_common_parameters(tmp_path):
    ladder = sweep(tmp_path, MUON + "method: grid\nchanges: {a: {steps: 5}}")
    assert ladder.parameters == () and len(configurations(ladder)) == 2
    race = sweep(tmp_path, "method: random\nbudget: 2\ntuning_seeds: [1]\nseeds: [2]\n"
                           "spaces: {demo/muon.yaml: {optim.hidden.lr: {min: 0.1, max: 0.2}}}")
    assert len(configurations(race)) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_sweep_is_one_of_wandbs_and_its_presets_take_its_keys(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA)
    found = read(path)
    for each in configurations(found):
        load(each.base, [f"{key}={json.dumps(value)}" for key, value in each.parameters.items()])


def test_wandb_agent_would_start_the_same_runs(tiny, tmp_path):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
    text = f"method: grid\nparameters: {{config: {{value: {tiny}}}, seed: {{values: [3]}}, steps: {{value: 8}}, " \
           "optim.hidden.lr: {values: [0.02, 5.0e-05]}, optim.hidden.nesterov: {value: false}, " \
           "optim.rest.betas: {values: [[0.9, 0.99]]}}"
    jsonschema.validate(yaml.safe_load(text), SCHEMA)
    trials = plan(sweep(tmp_path, text), tmp_path / "out")
    assert len(trials) == 2
    for trial in trials:
        said = {"config": trial.configuration.base, "seed": trial.config.seed, **trial.configuration.parameters}
        words = create_sweep_command_args({"args": {key: {"value": value} for key, value in said.items()}})["args"]
        config = load(words[0].removeprefix("--config="), words[1:]).config
        assert config_identity(config) == trial.name


# ---- trials

def test_a_trial_is_named_by_what_it_runs_however_that_is_written(tiny, tmp_path):
    text = f"base: {tiny}\nmethod: grid\nparameters: "
    names = [trial.name for trial in plan(sweep(tmp_path, text + "{steps: {values: [9, 12]}}"), tmp_path)]
    assert names[1] == config_identity(load(str(tiny)).config)                  # 12 is what the preset says itself
    again = "{optim: {parameters: {hidden: {parameters: {lr: {value: 0.02}}}}}, steps: {values: [12]}}"
    assert [trial.name for trial in plan(sweep(tmp_path, text + again), tmp_path)] == names[1:]
    others = plan(sweep(tmp_path, f"seeds: [1]\n{text}{{steps: {{values: [12]}}}}"), tmp_path)
    assert others[0].name != names[1] and others[0].config.seed == 1


def test_trials_load_back_from_their_files_and_a_first_seed_comes_before_a_second(tiny, tmp_path):
    text = f"base: {tiny}\nmethod: grid\nseeds: [5, 6]\nbaseline: {{steps: 9}}\n" \
           "parameters: {steps: {values: [7, 9]}, grad_clip: {value: 0.5}}"
    trials = plan(sweep(tmp_path, text), tmp_path / "out")
    assert [(t.config.seed, t.config.steps, t.is_baseline) for t in trials] == \
        [(5, 9, True), (5, 7, False), (6, 9, True), (6, 7, False)]
    assert {trial.config.grad_clip for trial in trials} == {0.5}                # what is constant holds for the baseline
    for trial in trials:
        (tmp_path / "trial.yaml").write_text(to_yaml(trial.config))
        config = load(str(tmp_path / "trial.yaml")).config
        assert config == trial.config and config_identity(config) == trial.name


# ---- the machine

@pytest.mark.parametrize("asked, gpus, cores, expected", [
    ((None, None, None), [], 4, [((), (0, 1, 2, 3), 4)]),
    ((2, None, None), [], 5, [((), (0, 1), 2), ((), (2, 3), 2)]),
    ((None, 1, None), [], 3, [((), (0,), 1), ((), (1,), 1), ((), (2,), 1)]),
    ((1, 2, None), [], 4, [((), (0, 1), 2)]),
    ((None, None, None), ["2", "5"], 8, [(("2",), (), 4), (("5",), (), 4)]),
    ((None, None, 2), ["0", "1", "2", "3", "4"], 16, [(("0", "1"), (), 4), (("2", "3"), (), 4)]),
], ids=str)
def test_trials_share_a_machine_without_overlap(asked, gpus, cores, expected):
    found = pack.slots(*asked, gpus, list(range(cores)))
    assert [(slot.gpus, slot.cores, slot.threads) for slot in found] == expected
    assert len({slot.environment(ROOT)["TORCHINDUCTOR_CACHE_DIR"] for slot in found}) == len(found)
    assert all(slot.environment(ROOT).get("CUDA_VISIBLE_DEVICES", "") == ",".join(slot.gpus) for slot in found)
    assert all(("--nproc_per_node=2" in slot.launcher()) == (len(slot.gpus) == 2) for slot in found)


@pytest.mark.parametrize("asked, gpus, said", [
    ((5, None, None), [], "5 trials at once of 1 cores each are more than the 4 here"),
    ((3, 2, None), [], "3 trials at once of 2 cores"), ((None, 8, None), [], "1 trials at once of 8 cores"),
    ((2, None, 2), ["0", "1", "2"], "2 trials at once of 2 GPUs each are more than the 3"),
    ((None, None, 1), [], "there is no GPU here"), ((None, 1, None), ["0"], "trials run on the GPUs here")], ids=str)
def test_more_than_the_machine_has_is_refused(asked, gpus, said):
    with pytest.raises(ConfigError, match=said):
        pack.slots(*asked, gpus, list(range(4)))


# ---- what a terminal shows

def test_the_live_table_follows_the_logs_of_running_trials(tiny, tmp_path):
    from rich.console import Console
    text = f"base: {tiny}\nmethod: grid\nparameters: {{optim.hidden.lr: {{values: [0.03, 0.04]}}}}"
    trials = plan(sweep(tmp_path, text), tmp_path / "out")
    log = trials[0].folder / "run" / "log.jsonl"
    log.parent.mkdir(parents=True)
    (log.parent / "env.json").write_text("{}")
    show, slots = Show(3), pack.slots(2, None, None, [], [0, 1])

    def drawn_now():
        console = Console(width=150, file=io.StringIO())
        console.print(show._table([Going(trial, slot, 1, None) for trial, slot in zip(trials, slots)], 1))
        return console.file.getvalue()
    log.write_text('{"step": 0, "train_s": 0.0, "val_loss": 4.1589}\n'
                   '{"step": 3, "train_s": 1.5, "train_loss": 3.5}\n{"st')
    assert "0 of 3 trials ended, 2 running, 1 waiting" in drawn_now()
    for seen in ("cores 0", "optim.hidden.lr=0.03", "3 of 12", "3.5000", "4.1589", "4 s", "0 of 12", "starting"):
        assert seen in drawn_now()                                              # 9 steps left of half a second each
    with open(log, "a") as file:
        file.write('ep": 6, "train_s": 3.0, "train_loss": 3.25}\n')
    assert "6 of 12" in drawn_now() and "3.2500" in drawn_now() and "4.1589" in drawn_now()
    log.write_text('{"step": 1, "train_s": 0.5, "train_loss": 3.9}\n')         # cut back by a run that continues
    assert "1 of 12" in drawn_now()


def test_help_answers_without_loading_torch():
    code = "import sys, scripts.sweep.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n" \
           "print('loaded:', *{'torch', 'scipy', 'rich', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert "usage:" in done.stdout and done.stdout.strip().endswith("loaded:"), done.stdout + done.stderr
