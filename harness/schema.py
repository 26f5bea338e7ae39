"""`python -m harness.schema` writes configs/schema.json, with which editors complete and check the presets.

It is pydantic's JSON schema of Config with what only the loader knows: a group of `optim` is flat and holds
the keys of its rule, a preset may extend another and so may leave out any key, and null means the default.
Descriptions are the comments behind the fields of the dataclasses. A preset's first line names the schema:

    # yaml-language-server: $schema=schema.json
"""
import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize

from pydantic import TypeAdapter

from harness.config import Config
from harness.keys import GROUP_KEYS, dataclasses_in
from harness.merge import CONFIGS
from optim import RULES
from optim.groups import Group

PATH = CONFIGS / "schema.json"
EXTENDS = {"type": "string", "description": "preset to change: a path seen from here, or a name in configs/"}
REMOVE = {"type": "boolean", "description": "whether to leave out this group of the preset that is extended"}


def comments(cls) -> dict[str, str]:
    """Field -> the comment behind it, of a dataclass; empty where there is none."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {each.start[0]: each.string.lstrip("# ") for each in tokens if each.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    found = {node.target.id: " ".join(by_line[line] for line in range(node.lineno, node.end_lineno + 1)
                                      if line in by_line) for node in fields}
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def generate() -> dict:
    """The JSON schema (2020-12) of a file that `--config` takes."""
    schema = TypeAdapter(Config).json_schema()
    shapes = {**schema["$defs"], Config.__name__: schema}
    for rule in RULES.values():
        of_rule = TypeAdapter(rule).json_schema()
        shapes |= {**of_rule.pop("$defs", {}), rule.__name__: of_rule}
    for cls in [*dataclasses_in(Config), *RULES.values()]:
        said = comments(cls)
        properties = shapes[cls.__name__]["properties"]
        shapes[cls.__name__] = {"type": "object", "additionalProperties": False, "properties": {
            key: _documented(properties[key], said[key]) for key in said}}
    root = shapes.pop(Config.__name__)
    root["properties"]["optim"]["items"] = _group(shapes)
    root["properties"] = {"extends": EXTENDS, **root["properties"]}
    used = [cls.__name__ for cls in dataclasses_in(Config) if cls not in (Config, Group)]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root,
            "$defs": {name: shapes[name] for name in sorted(used)}}


def _documented(schema: dict, description: str) -> dict:
    """The schema of one key: with a description instead of pydantic's title, and null besides."""
    schema = {key: value for key, value in schema.items()
              if key != "title" and (key, value) != ("default", None)}
    if "type" in schema:
        schema["type"] = [schema["type"], "null"]
        values = schema.get("enum", [schema.pop("const")] if "const" in schema else [])
        schema |= {"enum": [*values, None]} if values else {}
    elif schema:                                        # Any has no schema
        choices = schema.pop("anyOf", None) or [{"$ref": schema.pop("$ref")}]
        schema["anyOf"] = choices if {"type": "null"} in choices else [*choices, {"type": "null"}]
    return {"description": description, **schema}


def _group(shapes: dict) -> dict:
    """A group: of one of the rules, or, without a rule, one that changes or removes an inherited group."""
    common = {key: shapes[Group.__name__]["properties"][key] for key in GROUP_KEYS}
    choices, every = [], {}
    for name, rule in RULES.items():
        own = shapes[rule.__name__]["properties"]
        about = inspect.getdoc(inspect.getmodule(rule)).splitlines()[0]
        keys = {**common, "rule": {"const": name, "description": about}, **own}
        choices.append({"title": name, "type": "object", "additionalProperties": False,
                        "required": ["name", "rule"], "properties": keys})
        for key, schema in own.items():
            every.setdefault(key, []).extend([] if schema in every.get(key, []) else [schema])
    inherited = {key: schema for key, schema in common.items() if key != "rule"}
    inherited |= {key: own[0] if len(own) == 1 else {"anyOf": own} for key, own in every.items()}
    choices.append({"title": "inherited", "type": "object", "additionalProperties": False,
                    "required": ["name"], "properties": {**inherited, "remove": REMOVE}})
    return {"anyOf": choices}


def text() -> str:
    return json.dumps(generate(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(f"wrote {PATH}")
