"""A configuration is refused with one line a problem, or is what the file says; its own text loads again."""
import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from harness.config import NOT_IDENTITY, Config, config_identity, to_yaml
from harness.keys import GROUP_KEYS, dataclasses_in, fields
from harness.load import ConfigError, format_resolved, load
from optim import RULES
from tests.conftest import ROOT

PRESET = """\
name: demo
steps: 100
batch_tokens: 512
seq_len: 64
val_tokens: 640
val_every: [{every: 50}, {every: 10, from_frac: 0.9}]
model: {vocab_size: 257, layers: 2, heads: 2, width: 32, positions: rotary}
data: {train: train_*.bin, val: val_*.bin, tokenizer: bytes}
schedule: {cooldown_frac: 0.4}
optim:
  - name: hidden
    params: [q, k, v]
    rule: muon
    lr: 0.03
    scheduled: {momentum: {shape: piecewise, points: [{step: 0, value: 0.85}, {step: 50, value: 0.95}]}}
  - {name: other, params: [rest], rule: adamw, lr: 1e-10, betas: [0.8, 0.95]}
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Loads PRESET, or the preset with other text, from configs/demo.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()

    def load_demo(*overrides: str, text: str = PRESET):
        (tmp_path / "configs" / "demo.yaml").write_text(text)
        return load("configs/demo.yaml", overrides)
    return load_demo


def errors_of(demo, *overrides: str, text: str = PRESET) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        demo(*overrides, text=text)
    return str(caught.value).split("\n")


@pytest.mark.parametrize("line, place, error", [
    ("steps: ten", 2, "steps: expected a whole number, got 'ten'"),
    ("steps: 1e2", 2, "steps: expected a whole number, got 100.0; write 100"),
    ("steps: 1.5", 2, "steps: expected a whole number, got 1.5"),
    ("steps: true", 2, "steps: expected a whole number, got true"),
    ("steps: 0", 2, "steps: must be greater than or equal to 1, got 0"),
    ("stepz: 100", 2, "unknown key 'stepz'; did you mean 'steps'?"),
    ("average: .nan", 2, "average: expected a finite number, got nan"),
    ("grad_clip: .inf", 2, "grad_clip: expected a finite number, got inf"),
    ("grad_clip: 1e999", 2, "grad_clip: expected a finite number, got inf"),
    ("compile: off", 2, "compile: expected true or false, got 'off'"),
    ("runs_dir: 3", 2, "runs_dir: expected text, got 3; put it in quotes"),
    ("target_on: mean", 2, "target_on: expected 'raw' or 'average', got 'mean'"),
    ("log: wandb", 2, "log: expected a list, got 'wandb'"),
    ("log: [file]", 2, "log.0: expected 'wandb' or 'speedrun', got 'file'"),
    ("schedule: 3", 2, "schedule: expected a mapping, got 3"),
    ("layers: 4", 2, "unknown key 'layers'; did you mean 'model.layers'?"),
    ("data: {train: a, vall: b}", 2, "unknown key 'data.vall'; did you mean 'data.val'?"),
    ("qqqqqq: 4", 2, "unknown key 'qqqqqq'; known here: name, steps, batch_tokens, ")])
def test_a_wrong_key_or_value_is_one_line_that_says_where_and_what(demo, line, place, error):
    key = line.split(":")[0]
    rest = [each for each in PRESET.splitlines() if not each.startswith((f"{key}:", "steps:"))]
    text = "\n".join([rest[0], line, *rest[1:]] + (["steps: 100"] if key != "steps" else []))
    assert errors_of(demo, text=text)[0].startswith(f"configs/demo.yaml:{place}: {error}")


@pytest.mark.parametrize("override, error", [
    ("model.n_layers=3", "unknown key 'model.n_layers'; did you mean 'model.layers'?"),
    ("optim.hidden.rule=moun",
     "optim.hidden.rule: unknown rule 'moun'; did you mean 'muon'? rules: adam, "),
    ("optim.hidden.nestrov=true",
     "unknown key 'optim.hidden.nestrov'; did you mean 'optim.hidden.nesterov'? muon knows lr, "),
    ("optim.other.nesterov=true",
     "unknown key 'optim.other.nesterov'; adamw knows lr, betas, eps, weight_decay"),
    ("optim.hidden.scheduled.momentum.points.0.valve=3",
     "unknown key 'optim.hidden.scheduled.momentum.points.0.valve'; "
     "did you mean 'optim.hidden.scheduled.momentum.points.0.value'?"),
    ("optim.other.betas=[0.9]", "optim.other.betas.1 is missing; add it"),
    ("optim.hidden.params=['(']", "optim.hidden: params: '(' is not a regular expression"),
    ("optim.hidden.params=[]", "optim.hidden.params: "),
    ("val_every=often", "val_every: expected a whole number or a list, got 'often'"),
    ("val_every.0.every=often", "val_every.0.every: expected a whole number, got 'often'"),
    ("val_every.1.from_step=3", "val_every.1: from_step and from_frac say the same thing; remove one"),
    ("name='a/b'", "name: ")])
def test_deeper_mistakes_are_named_by_their_dotted_key(demo, override, error):
    assert errors_of(demo, override)[0].startswith(f"override {override}: {error}")


@pytest.mark.parametrize("override, error", [
    ("batch_tokens=500", "batch_tokens 500 is not a multiple of seq_len 64; use 448 or 512"),
    ("micro_batch_tokens=10", "micro_batch_tokens 10 is not a multiple of seq_len 64; use 64"),
    ("micro_batch_tokens=1024", "micro_batch_tokens 1024 is more than batch_tokens 512"),
    ("val_tokens=650", "val_tokens 650 is not a multiple of seq_len 64; use 640 or 704"),
    ("target_on=average", "target_on is average, but there is no average; set average"),
    ("log=[wandb, wandb]", "log: wandb, wandb names one twice; remove it"),
    ("val_every=[{every: 5, from_step: 50}, {every: 1}]",
     "val_every: the entries begin at steps 50, 0; sort them by their beginnings"),
    ("optim.0.params=[q, rest]",
     "optim: hidden and other both take `rest`; only one group can have what is left"),
    ("schedule={shape: piecewise, cooldown_frac: null, points: [{step: 9, value: 1}, {step: 5, value: 1}]}",
     "schedule: ")])
def test_what_cannot_be_together_is_refused_with_a_remedy(demo, override, error):
    (line,) = errors_of(demo, override)
    assert line.startswith((f"override {override}: {error}", f"configs/demo.yaml: {error}")), line


def test_a_published_data_order_needs_a_batch_for_eight_ranks(demo):
    assert demo("data.order=2024-10").config.data.order == "2024-10"
    (line,) = errors_of(demo, "data.order=2024-10", "batch_tokens=576")
    assert "batch_tokens 576 is not a multiple of 8 x seq_len 64" in line and "use 512 or 1024" in line


def test_groups_of_one_name_are_refused_also_when_no_file_was_merged(demo):
    config = demo().config
    with pytest.raises(ValueError, match="two groups have the name 'hidden'; rename one"):
        dataclasses.replace(config, optim=(config.optim[0], config.optim[0]))


def test_the_average_can_be_the_target_only_where_both_exist(demo):
    assert demo("target_on=average", "average=0.999", "target_val_loss=3.28").config.target_on == "average"
    assert "not read without target_val_loss" in errors_of(demo, "target_on=average", "average=0.999")[0]


@pytest.mark.parametrize("overrides, error", [
    (["model.rotary_base=500", "model.positions=learned"],
     "model.rotary_base is not read while positions is 'learned', only while it is 'rotary'; remove it"),
    (["schedule.points=[{step: 0, value: 1}]"], "schedule.points is not read while shape is 'wsd'"),
    (["optim.hidden.scheduled.momentum.floor=0.5"],
     "optim.hidden.scheduled.momentum.floor is not read while shape is"),
    (["optim.hidden.momentum=0.9"],
     "optim.hidden.momentum is not read, for scheduled.momentum gives its values"),
    (["optim.hidden.scheduled.ns_steps={shape: piecewise, points: [{step: 0, value: 1}]}"],
     "optim.hidden.scheduled.ns_steps is not read, for muon varies weight_decay, momentum"),
    (["optim.hidden.scheduled.lr={shape: piecewise, points: [{step: 0, value: 1}]}"],
     "optim.hidden: scheduled.lr: lr follows `schedule`, a factor on it; write it there"),
    (["optim.hidden.scheduled.momentum={shape: wsd, points: null}"],
     "optim.hidden: scheduled.momentum has shape 'wsd'"),
    (["optim.0.schedule={floor: 0.1}", "optim.1.schedule={floor: 0.1}"],
     "schedule is not read, for every optim group has its own")])
def test_a_key_that_nothing_reads_is_an_error(demo, overrides, error):
    (line,) = errors_of(demo, *overrides)
    assert f": {error}" in line
    assert line.startswith(("override ", "configs/demo.yaml:9: schedule ", "configs/demo.yaml: optim.hidden"))


def test_a_key_that_nothing_reads_may_be_left_at_its_default(demo):
    assert demo("model.positions=learned", "model.rotary_base=10000.0", "schedule.points=[]").config
    assert demo("schedule=null", "optim.0.schedule={floor: 0.1}", "optim.1.schedule={floor: 0.1}").config


@pytest.mark.parametrize("cls", [*dataclasses_in(Config), *RULES.values()], ids=lambda cls: cls.__name__)
def test_conditions_of_being_read_speak_of_keys_that_exist(cls):
    for key, conditions in getattr(cls, "READ_WHEN", {}).items():
        assert {key, *conditions} <= fields(cls).keys()
        assert all(isinstance(values, tuple) and values for values in conditions.values()), key


def test_every_problem_is_reported_at_once(demo):
    overrides = ("optim.other.eps=x", "optim.other.momentum=1", "steps=ten", "model.layers=0")
    lines = errors_of(demo, *overrides)
    assert [line.split(": ")[0] for line in lines] == [f"override {override}" for override in overrides]


def test_a_missing_key_names_the_file(demo):
    text = PRESET.replace("steps: 100\n", "").replace("rule: muon", "")
    lines = errors_of(demo, text=text)
    assert "configs/demo.yaml: steps is missing; add it" in lines
    assert "configs/demo.yaml:10: optim.hidden.rule is missing; add it" in lines


def test_a_relation_that_an_override_breaks_names_the_override(demo):
    assert errors_of(demo, "model.heads=5")[0].startswith("override model.heads=5: model: ")
    assert errors_of(demo, "optim.0.params=[rest]")[0].startswith("configs/demo.yaml: optim: hidden and")
    text = PRESET.replace("heads: 2", "heads: 5")
    assert errors_of(demo, text=text)[0].startswith("configs/demo.yaml:7: model: ")


def test_a_configuration_survives_its_own_text(demo, tmp_path):
    config = demo("runs_dir='a: b #c'", "data.train='off'", "seed=5", "optim.0.params=['a\\.0\\..*']").config
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load(str(tmp_path / "again.yaml"))
    assert again.config == config and to_yaml(again.config) == to_yaml(config)
    assert again.origins["trials"] == "again.yaml"


def test_the_text_reads_the_same_to_a_reader_of_yaml_1_1(demo):
    plain = yaml.safe_load(to_yaml(demo("data.val='no'").config))
    assert plain["optim"][1]["lr"] == 1e-10 and plain["data"]["val"] == "no" and plain["compile"] is None


def test_the_resolved_configuration_shows_every_value_and_its_origin(demo):
    loaded = demo("seed=7")
    lines = format_resolved(loaded).splitlines()
    assert {re.sub(" +", " ", line) for line in lines} >= {
        "seed: 7 # override", "trials: 1 # default", "steps: 100 # demo.yaml", " lr: 1.0e-10 # demo.yaml",
        " params: [q, k, v] # demo.yaml", " scheduled: {} # default"}
    sections = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert sections == [field.name for field in dataclasses.fields(Config)]
    assert len({line.index("# ") for line in lines if "# " in line}) == 1          # the comments are aligned
    assert yaml.safe_load("\n".join(lines)) == yaml.safe_load(to_yaml(loaded.config))
    assert all(loaded.origins) and loaded.text == PRESET and loaded.path.name == "demo.yaml"


def test_the_resolved_configuration_shows_what_a_variant_set(demo):
    loaded = demo("optim.hidden.variant=moonlight", "optim.hidden.nesterov=false")
    lines = {re.sub(" +", " ", line) for line in format_resolved(loaded).splitlines()}
    assert lines >= {" lr: 0.03 # demo.yaml", " variant: moonlight # override", " nesterov: false # override",
                     " momentum_form: sgd # variant moonlight", " weight_decay: 0.1 # variant moonlight",
                     " ns_steps: null # default", " eps: 1.0e-08 # default"}
    assert demo().origins["optim.hidden.momentum_form"] == "default"


def test_identity_is_that_of_the_mathematics(demo):
    same = config_identity(demo().config)
    described = ["name=other", "runs_dir=elsewhere", "log=[wandb]", "trials=3", "checkpoint_every=5",
                 "keep_checkpoints=9", "compile=true", "micro_batch_tokens=64", "deterministic=true",
                 "diagnostics=[updates]", "kernels=torch"]
    assert {word.split("=")[0] for word in described} == NOT_IDENTITY
    assert config_identity(demo(*described).config) == same
    for word in ("seed=1", "steps=101", "optim.other.eps=1e-9", "model.layers=3", "optim.hidden.rule=splus",
                 "schedule.floor=0.1", "data.train=x.bin", "average=0.9", "loss_reduction=sum"):
        assert config_identity(demo(word).config) != same, word
    assert re.fullmatch("[0-9a-f]{16}", same)


@pytest.mark.parametrize("override, steps", [
    ("val_every=40", {0, 40, 80, 100}), ("val_every=1000", {0, 100}),
    ("val_every=[{every: 50}, {every: 10, from_frac: 0.75}]", {0, 50, 80, 90, 100}),
    ("val_every=[{every: 30}, {every: 25, from_step: 500}]", {0, 30, 60, 90, 100})])
def test_validation_comes_at_multiples_and_at_the_end(demo, override, steps):
    assert demo(override).config.validation_steps() == steps


def test_checkpoints_come_at_multiples_and_at_the_end(demo):
    assert demo("checkpoint_every=40").config.checkpoint_steps() == {40, 80, 100}
    assert demo().config.checkpoint_steps() == set()


def test_no_rule_has_a_hyperparameter_with_the_name_of_a_group_key():
    for name, rule in RULES.items():
        assert not {field.name for field in dataclasses.fields(rule)} & set(GROUP_KEYS), name


def test_refusing_a_configuration_loads_nothing_slow():
    code = ("import sys\nfrom harness.load import ConfigError, load\n"
            "try: load('nothing.yaml', ['steps=3'])\nexcept ConfigError as error: print(error)\n"
            "slow = {'torch._dynamo', 'torch._inductor', 'matplotlib', 'rich', 'wandb', 'tiktoken',\n"
            "        'datasets', 'triton', 'transformers', 'scipy', 'jsonschema'}\n"
            "print('loaded:', *sorted(slow & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "no configuration 'nothing.yaml'" in done.stdout and done.stdout.strip().endswith("loaded:"), done
