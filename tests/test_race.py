"""The race at GPT-2 124M: its file plans, every optimizer is treated alike, every preset trains. No GPU, no FineWeb."""
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from data.shards import HEADER_BYTES, HEADER_INTS, MAGIC, VERSION
from harness.load import load
from harness.yaml_tree import ConfigError
from scripts.logs import flat
from scripts.sweep.file import read
from scripts.sweep.plan import plan
from tests.conftest import ROOT, losses, the_run, train_here

RACE = ROOT / "configs" / "sweeps" / "race_124m.yaml"
SWEEP = read(RACE)
NAMES = [base.removeprefix("race/").removesuffix(".yaml") for base in SWEEP.bases]
CONFIGS = {name: load(f"race/{name}").config for name in NAMES}
TINY = ["model.vocab_size=64", "model.layers=1", "model.heads=2", "model.width=32", "seq_len=32", "batch_tokens=256",
        "micro_batch_tokens=256", "steps=8", "val_tokens=512", "val_every=8", "schedule.warmup_steps=0",
        "precision=float32", "compile=false", "data.tokenizer=bytes"]


def empty_shard(path, tokens):
    """A shard of zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.truncate(HEADER_BYTES + 2 * tokens)


@pytest.fixture
def fineweb(tmp_path, monkeypatch):
    """The working directory of someone who has fetched what the race reads, and no token more."""
    config = CONFIGS["adamw"]
    empty_shard(tmp_path / "data/fineweb10B/fineweb_train_000001.bin", config.steps * config.batch_tokens + 1)
    empty_shard(tmp_path / "data/fineweb10B/fineweb_val_000000.bin", config.val_tokens + 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_as_it_is_plans_six_draws_for_each_of_seven_presets(fineweb):
    trials = plan(SWEEP, fineweb / "out")
    assert [trial.configuration.base for trial in trials] == [f"race/{name}.yaml" for name in NAMES for _ in range(6)]
    assert len({trial.name for trial in trials}) == 42 and {trial.config.seed for trial in trials} == {100}


def test_presets_that_differ_in_more_than_optim_would_be_refused(fineweb):
    (fineweb / "other.yaml").write_text("extends: race/muon.yaml\nname: other\nschedule: {warmup_steps: 7}\n")
    unfair = RACE.read_text().replace("race/muon.yaml", str(fineweb / "other.yaml"))
    (fineweb / "unfair.yaml").write_text(unfair)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps is 7, but 100 in race/adamw.yaml"):
        plan(read(fineweb / "unfair.yaml"), fineweb / "out")


def test_every_preset_of_the_folder_runs_in_the_race_and_is_the_base_but_for_optim():
    assert {path.stem for path in (ROOT / "configs" / "race").glob("*.yaml")} == {"base", *NAMES}
    base = load("race/base").config
    for name, config in CONFIGS.items():
        assert config.optim[0].rule == name and config.name == f"race-{name}"
        assert {k for k, v in flat(asdict(config)) if dict(flat(asdict(base))).get(k) != v} <= {"optim", "name"}


def test_the_model_is_muons_with_all_weights_in_float32():
    muon, race = (dict(flat(asdict(load(name).config.model))) for name in ("muon", "race/base"))
    assert {key for key in muon if muon[key] != race[key]} == {"bf16_roles"} and not race["bf16_roles"]


@pytest.mark.parametrize("name", NAMES)
def test_every_range_is_a_factor_of_four_each_way_around_its_presets_value(name):
    hidden = CONFIGS[name].optim[0].hyper
    ranges = {p.key.removeprefix("optim.hidden."): p for p in SWEEP.spaces[f"race/{name}.yaml"]}
    assert ranges.keys() == {"lr", *{"scion": ["constrained"], "gluon": []}.get(name, ["weight_decay"])}
    for key, p in ranges.items():
        if key != "constrained":
            assert p.distribution == "log_uniform_values"
            assert (4 * p.spec["min"], p.spec["max"] / 4) == pytest.approx(2 * (getattr(hidden, key),), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_no_preset_has_initial_weights_of_its_own(name):
    for group in CONFIGS[name].optim:
        if group.stacked:
            assert group.hyper.initial_weights(8, 8, torch.Generator()) is None, group.name


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_lowers_the_loss_of_a_small_model_from_its_common_start(name, corpus, tmp_path):
    assert train_here("--config", f"race/{name}", *TINY, f"data.train={corpus}/train_*.bin",
                      f"data.val={corpus}/val_*.bin", f"runs_dir={tmp_path / 'runs'}") == 0
    found = losses(the_run(tmp_path / "_"))
    assert found["val", 0] == pytest.approx(math.log(64), abs=1e-5)
    assert found["val", 8] < found["val", 0] - 0.2
