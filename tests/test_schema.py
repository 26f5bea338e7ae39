"""The committed JSON schema is the generated one, documents every key, and judges as the loader does."""
import dataclasses
import json

import jsonschema
import pytest

from harness.config import Config
from harness.keys import dataclasses_in
from harness.merge import CONFIGS
from harness.schema import PATH, comments, generate, text
from harness.yaml_tree import plain, read_text
from optim import RULES

PRESET = """
steps: 100
batch_tokens: 512
seq_len: 64
val_tokens: 640
val_every: [{every: 50}, {every: 10, from_frac: 0.9}]
model: {vocab_size: 257, layers: 2, heads: 2, width: 32}
data: {train: train_*.bin, val: val_*.bin, tokenizer: bytes}
schedule: null
optim:
  - {name: hidden, params: [q, k, v], rule: muon, lr: 3e-2, nesterov: true}
  - {name: other, params: [rest], rule: adamw, lr: 1e-10, betas: [0.8, 0.95]}
"""


def is_valid(text: str) -> bool:
    return jsonschema.Draft202012Validator(generate()).is_valid(plain(read_text(text, "demo.yaml")))


def test_the_committed_schema_is_the_generated_one():
    assert PATH.read_text(encoding="utf-8") == text(), "run `python -m harness.schema`"


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json.loads(text()))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_agrees_with_the_schema_that_its_first_line_names(path):
    content = path.read_text(encoding="utf-8")
    assert content.startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.validate(plain(read_text(content, path.name)), generate(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("cls", [*dataclasses_in(Config), *RULES.values()], ids=lambda cls: cls.__name__)
def test_every_key_has_a_description(cls):
    for key, said in comments(cls).items():
        assert said, f"{cls.__name__}.{key} needs a trailing comment"


def test_descriptions_and_defaults_are_those_of_the_fields():
    properties = generate()["properties"]
    assert properties["steps"]["description"] == "updates of the weights in the whole run"
    assert properties["trials"]["default"] == 1
    assert list(properties) == ["extends", *(field.name for field in dataclasses.fields(Config))]


def test_a_preset_and_one_that_extends_it_are_valid():
    assert is_valid(PRESET)
    assert is_valid("extends: demo.yaml\noptim: [{name: other, remove: true}, {name: hidden, ns_steps: 3}]")


@pytest.mark.parametrize("old, new", [
    ("steps: 100", "steps: ten"), ("steps: 100", "stepz: 100"),
    ("layers: 2", "layer: 2"), ("layers: 2", "layers: 0"),
    ("rule: muon", "rule: moun"), ("nesterov: true", "nestrov: true"), ("nesterov: true", "eps: 1e-8"),
    ("name: hidden, ", ""), ("every: 50", "evry: 50"), ("tokenizer: bytes", "tokenizer: char")])
def test_what_the_loader_refuses_the_schema_refuses(old, new):
    assert PRESET.count(old) == 1 and not is_valid(PRESET.replace(old, new))
