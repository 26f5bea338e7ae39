"""The command line: three ways to write an override, switches, positions in lists, and what is refused."""
import pytest

from harness.load import ConfigError, load

PRESET = """
steps: 100
batch_tokens: 512
seq_len: 64
val_tokens: 640
val_every: [{every: 50}, {every: 10, from_frac: 0.9}]
model: {vocab_size: 257, layers: 2, heads: 2, width: 32, positions: rotary}
data: {train: train_*.bin, val: val_*.bin, tokenizer: bytes}
optim:
  - {name: hidden, params: [q, k, v], rule: muon, lr: 0.03}
  - {name: other, params: [rest], rule: adamw, lr: 0.01, betas: [0.8, 0.95]}
"""


@pytest.fixture
def with_overrides(tmp_path):
    (tmp_path / "demo.yaml").write_text(PRESET)
    return lambda *words: load(str(tmp_path / "demo.yaml"), words)


@pytest.mark.parametrize("words", [
    ["batch_tokens=1024"], ["--batch_tokens=1024"], ["--batch_tokens", "1024"], ["--batch-tokens", "1024"],
    ["--batch-tokens=1024"], ["batch_tokens=64", "batch_tokens=1024"]])
def test_three_ways_to_say_it_and_the_last_wins(with_overrides, words):
    loaded = with_overrides(*words)
    assert loaded.config.batch_tokens == 1024 and loaded.origins["batch_tokens"] == "override"


def test_groups_are_called_by_name_or_position(with_overrides):
    config = with_overrides("optim.0.lr=2e-3", "--optim.other.lr", "5", "optim.1.betas.0=0.5").config
    assert config.optim[0].hyper.lr == 2e-3
    assert config.optim[1].hyper.lr == 5.0 and config.optim[1].hyper.betas == (0.5, 0.95)


def test_lists_and_mappings_can_be_given_or_reached_into(with_overrides):
    loaded = with_overrides("val_every.1.every=5", "schedule={cooldown_frac: 0.5}", "schedule.floor=0.1",
                            "log=[wandb]")
    assert loaded.config.val_every[1].every == 5 and loaded.config.val_every[1].from_frac == 0.9
    assert (loaded.config.schedule.cooldown_frac, loaded.config.schedule.floor) == (0.5, 0.1)
    assert loaded.config.log == ("wandb",) and loaded.origins["val_every.1"] == "override, demo.yaml"
    scheduled = "optim.hidden.scheduled.momentum={shape: piecewise, points: [{step: 0, value: 0.85}]}"
    assert with_overrides(scheduled).config.optim[0].scheduled["momentum"].points[0].value == 0.85


def test_the_list_of_groups_is_merged_by_name(with_overrides):
    config = with_overrides("optim=[{name: hidden, lr: 1}, {name: new, params: ['x.*'], rule: adamw}]").config
    assert [group.name for group in config.optim] == ["hidden", "other", "new"]
    assert config.optim[0].hyper.lr == 1.0


def test_null_goes_back_to_the_default_also_in_what_an_override_set(with_overrides):
    loaded = with_overrides("val_every=null", "val_every=20", "schedule={floor: 0.1}", "schedule.floor=null",
                            "model.positions=null")
    assert loaded.config.schedule.floor == 0.0 and loaded.origins["model.positions"] == "default"


@pytest.mark.parametrize("words, expected", [
    (["--compile"], True), (["--no-compile"], False), (["--compile", "--seed", "3"], True),
    (["--compile=true"], True), (["--compile", "false"], False), (["--compile", "True"], True),
    (["--compile", "null"], None), (["--compile", "seed=3"], True)])
def test_switches(with_overrides, words, expected):
    assert with_overrides(*words).config.compile is expected


def test_nested_switches(with_overrides):
    config = with_overrides("--data.repeat", "--no-optim.hidden.nesterov").config
    assert config.data.repeat is True and config.optim[0].hyper.nesterov is False


def test_a_negative_number_is_a_value(with_overrides):
    with pytest.raises(ConfigError, match="override --seed -1: seed: must be greater than or equal to 0"):
        with_overrides("--seed", "-1")


@pytest.mark.parametrize("words, message", [
    (["demo.yaml"], "override demo.yaml: expected key=value or --key value"),
    (["-n", "3"], "override -n: expected key=value or --key value"),
    (["--"], "override --: expected key=value or --key value"),
    (["--steps"], "override --steps: expected a value behind it"),
    (["--steps", "--compile"], "override --steps: expected a value behind it"),
    (["--no-steps"], "override --no-steps: expected a value behind it"),
    (["steps="], "override steps=: the value is empty; write null to go back to the default"),
    (["steps=[1"], "override steps=[1: not YAML: "),
    (["data.train=*.bin"], "override data.train=*.bin: not YAML: "),
    (["=3"], "override =3: expected key=value or --key value"),
    (["model..layers=3"], "override model..layers=3: 'model..layers' is not a key"),
    (["optim.hiden.lr=1"], "override optim.hiden.lr=1: optim has no group 'hiden'; did you mean 'hidden'? "
                           "groups: 0 hidden, 1 other"),
    (["optim.2.lr=1"], "override optim.2.lr=1: optim has no group '2'; groups: 0 hidden, 1 other"),
    (["val_every.2.every=1"], "override val_every.2.every=1: val_every is a list of 2; there is no '2'"),
    (["val_every.x.every=1"], "override val_every.x.every=1: val_every is a list of 2; there is no 'x'"),
    (["optim.hidden.rule=[muon]"],
     "override optim.hidden.rule=[muon]: optim.hidden.rule: expected text, got"),
    (["optim=3"], "override optim=3: optim: expected a list of groups, got 3"),
    (["optim.hidden=3"], "override optim.hidden=3: optim.hidden: expected a mapping, got 3"),
    (["steps.x=3"], "override steps.x=3: steps: expected a whole number, got a mapping"),
    (["model=3"], "override model=3: model: expected a mapping, got 3")])
def test_what_is_no_override_is_one_line(with_overrides, words, message):
    with pytest.raises(ConfigError) as caught:
        with_overrides(*words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
