"""YAML 1.2 scalars, repeated keys, and one line with file and line number for text that is no YAML."""
import math

import pytest

from harness.yaml_tree import ConfigError, Origin, origin_of, plain, read_text, read_value


def value(text: str):
    return plain(read_value(text, Origin("override", "override")))


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "demo.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text, expected", [
    ("3e-4", 3e-4), ("1e-10", 1e-10), ("1e5", 1e5), ("3.", 3.0), (".5", 0.5), ("-1.5E+3", -1500.0),
    ("10", 10), ("-3", -3), ("010", 10), ("0x10", 16), ("0o17", 15), ("true", True), ("True", True),
    ("false", False), ("null", None), ("~", None), ("off", "off"), ("no", "no"), ("yes", "yes"),
    ("1:30", "1:30"), ("2024-06", "2024-06"), ("2024-06-01", "2024-06-01"), ("1_000", "1_000"),
    ("'3e-4'", "3e-4"), ("e5", "e5"), ("1e", "1e"), (".", "."), ("[1, 2e-1]", [1, 0.2]),
    ("{a: {b: 1}}", {"a": {"b": 1}}), ("<<", "<<"), (".inf", math.inf)])
def test_scalars_are_those_of_yaml_1_2(text, expected):
    assert value(text) == expected and type(value(text)) is type(expected)


def test_keys_are_text_as_they_are_written():
    assert plain(read_text("off: 1\n1: 2\ntrue: 3\n", "demo.yaml")) == {"off": 1, "1": 2, "true": 3}


def test_every_leaf_remembers_its_line():
    tree = read_text("a: 1\nb:\n  - 2\n  - {c: 3}\n", "configs/demo.yaml")
    assert origin_of(tree, ("b", 1, "c")) == Origin("demo.yaml", "configs/demo.yaml:4")
    assert origin_of(tree, ("b",)).place == "configs/demo.yaml:3"
    assert origin_of(tree, ("b", 2)) is None


def test_a_repeated_key_is_an_error_that_names_file_and_line():
    assert error_of("a: 1\nb:\n  c: 1\n  c: 2\n") == "demo.yaml:4: the key 'c' is there twice; remove one"


@pytest.mark.parametrize("text, line, words", [
    ("", None, "empty"), ("# only a comment\n", None, "empty"), ("- 1\n", 1, "expected a mapping"),
    ("ten\n", 1, "expected a mapping"), ("a: 1\nb:\n\tc: 2\n", 3, "indent with spaces"),
    ("a: [1, 2\nb: 3\n", 2, "not YAML"),
    ("a: 1\n b: 2\n", 2, "not YAML"), ("a: 1\n---\nb: 2\n", 2, "not YAML"), ("a: *b\n", 1, "undefined alias"),
    ("a: &x [*x]\n", 1, "holds itself"), ("a: !!python/name:os.system 1\n", 1, "tags"),
    ("a: !!set {b}\n", 1, "tags"), ("? [1]\n: 2\n", 1, "a key must be text"),
    ("a: 1\nb: \x07\n", 2, "#x0007"),
    ("a: !!int ten\n", 1, "tags"), ("a: !!bool 3\n", 1, "tags"), ("a: !b 3\n", 1, "tags")])
def test_what_is_not_a_yaml_mapping_is_one_line_with_file_and_line(text, line, words):
    message = error_of(text)
    assert message.startswith("demo.yaml:" if line is None else f"demo.yaml:{line}:") and words in message


def test_an_empty_value_is_an_error_because_a_shell_variable_was_empty():
    with pytest.raises(ConfigError, match="override steps=: the value is empty; write null"):
        read_value("", Origin("override", "override steps="))
