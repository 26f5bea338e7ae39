"""Presets that extend presets: what merges, what replaces, what goes back to its default, what is refused."""
import pytest

from harness.load import ConfigError, load
from harness.merge import CONFIGS, find

PARENT = """
name: parent
steps: 100
batch_tokens: 512
seq_len: 64
val_tokens: 640
val_every: [{every: 50}, {every: 10, from_frac: 0.9}]
log: [wandb]
model: {vocab_size: 257, layers: 2, heads: 2, width: 32}
data: {train: train_*.bin, val: val_*.bin, tokenizer: bytes}
schedule: {cooldown_frac: 0.4}
optim:
  - name: hidden
    params: [q, k, v]
    rule: muon
    lr: 0.03
    weight_decay: 0.05
    nesterov: false
    scheduled: {momentum: {shape: piecewise, points: [{step: 0, value: 0.85}, {step: 50, value: 0.95}]}}
  - {name: embed, params: [embed], rule: adamw, lr: 0.3, betas: [0.8, 0.95], eps: 1e-10}
  - {name: rest, params: [rest], rule: adamw, lr: 0.01}
"""


@pytest.fixture
def child(tmp_path):
    """Loads a child of PARENT, given as the lines that it adds."""
    (tmp_path / "parent.yaml").write_text(PARENT)

    def load_child(text: str, *overrides: str):
        (tmp_path / "child.yaml").write_text(f"extends: parent.yaml\n{text}")
        return load(str(tmp_path / "child.yaml"), overrides)
    return load_child


def group(loaded, name: str):
    return next(group for group in loaded.config.optim if group.name == name)


def test_mappings_merge_key_by_key_and_other_lists_replace(child):
    loaded = child("seed: 3\nmodel: {layers: 4}\nlog: [speedrun]\nval_every: [{every: 7}]\n")
    assert (loaded.config.model.layers, loaded.config.model.width) == (4, 32)
    assert loaded.config.log == ("speedrun",) and len(loaded.config.val_every) == 1
    assert loaded.origins["model.layers"] == loaded.origins["seed"] == "child.yaml"
    assert loaded.origins["model.width"] == loaded.origins["steps"] == "parent.yaml"
    assert loaded.origins["trials"] == "default"


def test_groups_merge_by_name_and_new_ones_come_last(child):
    loaded = child("optim:\n  - {name: new, params: ['x.*'], rule: adamw}\n  - {name: embed, lr: 0.7}\n")
    assert [group.name for group in loaded.config.optim] == ["hidden", "embed", "rest", "new"]
    assert group(loaded, "embed").hyper.lr == 0.7 and group(loaded, "embed").hyper.eps == 1e-10
    assert loaded.origins["optim.embed.lr"] == "child.yaml"
    assert loaded.origins["optim.embed.eps"] == "parent.yaml"


def test_a_new_rule_drops_the_keys_that_it_does_not_know(child):
    hidden = group(child("optim: [{name: hidden, rule: adamw, betas: [0.9, 0.99]}]\n"), "hidden")
    assert hidden.rule == "adamw" and hidden.hyper.lr == 0.03 and hidden.hyper.weight_decay == 0.05
    assert hidden.hyper.betas == (0.9, 0.99) and hidden.scheduled == {}


def test_a_new_rule_keeps_the_schedules_that_it_knows(child):
    points = "{shape: piecewise, points: [{step: 0, value: 0.1}]}"
    hidden = child(f"optim: [{{name: hidden, weight_decay: null, scheduled: {{weight_decay: {points}}}}}]\n",
                   "optim.hidden.rule=adamw").config.optim[0]
    assert list(hidden.scheduled) == ["weight_decay"]


def test_a_key_that_no_rule_knows_is_not_dropped_but_refused(child, tmp_path):
    typo = PARENT.replace("nesterov: false", "nestrov: false")
    (tmp_path / "parent.yaml").write_text(typo)
    for rule in ("muon", "adamw"):
        with pytest.raises(ConfigError, match="parent.yaml:.*unknown key 'optim.hidden.nestrov'"):
            child(f"optim: [{{name: hidden, rule: {rule}}}]\n")


def test_a_new_rule_on_the_command_line_drops_keys_of_files_but_not_of_the_command_line(child):
    assert group(child("", "optim.hidden.rule=adamw"), "hidden").rule == "adamw"
    with pytest.raises(ConfigError, match="override optim.0.nesterov=true: unknown key 'optim.hidden.nest"):
        child("", "optim.0.nesterov=true", "optim.hidden.rule=adamw")


def test_a_group_can_be_removed(child):
    loaded = child("optim: [{name: embed, remove: true}]\n")
    assert [group.name for group in loaded.config.optim] == ["hidden", "rest"]
    assert len(child("", "optim.embed.remove=true").config.optim) == 2
    assert len(child("optim: [{name: embed, remove: false}]\n").config.optim) == 3
    with pytest.raises(ConfigError, match="unknown key 'schedule.remove'"):     # only groups are removed so
        child("schedule: {remove: true}\n")
    all_gone = ", ".join(f"{{name: {name}, remove: true}}" for name in ("hidden", "embed", "rest"))
    with pytest.raises(ConfigError, match="optim: expected 1 or more, got 0"):
        child(f"optim: [{all_gone}]\n")
    with pytest.raises(ConfigError, match="child.yaml:2: optim.embde: no such group to remove; groups: hid"):
        child("optim: [{name: embde, remove: true}]\n")


def test_null_goes_back_to_the_default(child):
    loaded = child("schedule: null\noptim: [{name: embed, eps: ~}]\nval_every: [{every: 5, from_step: ~}]\n")
    assert loaded.config.schedule.cooldown_frac is None
    assert loaded.origins["schedule.cooldown_frac"] == "default"
    assert group(loaded, "embed").hyper.eps == 1e-8
    with pytest.raises(ConfigError, match="steps is missing; add it"):
        child("steps: null\n")


def test_a_name_is_not_inherited_but_is_that_of_the_file(child):
    loaded = child("")
    assert loaded.config.name == "child" and loaded.origins["name"] == "file name"
    assert child("name: other\n").config.name == "other"


def test_a_parent_may_extend_too_and_is_found_beside_the_file_or_in_configs(child, tmp_path, monkeypatch):
    child("seed: 1\n")
    (tmp_path / "elsewhere").mkdir()
    grandchild = tmp_path / "elsewhere" / "grandchild.yaml"
    grandchild.write_text("extends: ../child.yaml\ntrials: 2\n")
    loaded = load(str(grandchild))
    assert (loaded.config.steps, loaded.config.seed, loaded.config.trials) == (100, 1, 2)
    monkeypatch.setattr("harness.merge.CONFIGS", tmp_path)
    grandchild.write_text("extends: child\n")
    assert load(str(grandchild)).config.seed == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("child").config.seed == load("child.yaml").config.seed == 1


@pytest.mark.parametrize("text, message", [
    ("extends: child.yaml\n", "child.yaml:1: extends goes round in a circle: child.yaml -> child.yaml"),
    ("extends: nothing.yaml\n", "child.yaml:1: extends: no configuration 'nothing.yaml'"),
    ("extends: [parent.yaml]\n", "child.yaml: extends: expected the name of one file, got a list"),
    ("optim: {name: a}\n", "child.yaml: optim: expected a list of groups, got a mapping"),
    ("optim: [{name: 3}]\n", "child.yaml:1: optim.0: expected a group with a name"),
    ("optim: [{lr: 1}]\n", "child.yaml:1: optim.0: expected a group with a name"),
    ("optim:\n  - {name: a}\n  - {name: a}\n", "child.yaml:3: optim: two groups have the name 'a'; rename")])
def test_what_cannot_be_merged_is_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load("child.yaml")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_circle_of_two_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="b.yaml:1: extends goes round in a circle: a.* -> b.* -> a.yaml"):
        load("a.yaml")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 6"):
        load(str(tmp_path / "latin.yaml"))
    with pytest.raises(ConfigError, match="no configuration"):
        load(str(tmp_path))


@pytest.mark.parametrize("name, said", [("demo/muom.yaml", "did you mean demo/muon"), ("adanw", "did you mean adamw"),
                                        ("zzz", "presets: adamw, demo, gpt2, muon, splus$")])
def test_a_misspelt_preset_is_answered_with_those_that_are_near(name, said):
    with pytest.raises(ConfigError, match=said):
        load(name)


def test_a_preset_is_found_by_its_name():
    for path in CONFIGS.glob("*.yaml"):
        assert find(path.stem) == find(path.name) == path
