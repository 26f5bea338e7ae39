"""What the README says can be done is there to be done."""
import re
import shlex

import pytest

from harness.load import load
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    ((?:torchrun|python|make) .*)$", README, re.M)]


def test_there_are_commands_to_check():
    assert {"make demo", "make test"} <= set(COMMANDS) and sum("train.py" in c for c in COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_things_that_exist(command):
    words = shlex.split(re.sub(r"\[.*?\]", "", command))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif "-m" in words:
        module = ROOT / words[words.index("-m") + 1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    else:
        assert (ROOT / next(w for w in words if w.endswith(".py")).removeprefix("source/")).exists()
        if "--config" in words and "source/train.py" not in words:
            overrides = [w for w in words[words.index("--config") + 2:] if "=" in w]
            assert load(words[words.index("--config") + 1], overrides).config.steps > 0


def test_every_preset_is_in_the_table_and_loads():
    presets = {p.name for p in (ROOT / "configs").glob("*.yaml")}
    assert presets == set(re.findall(r"^\| `(\w+\.yaml)`", README, re.M))
    for preset in presets:
        load(preset)


def test_every_folder_of_the_house_is_drawn():
    drawn = set(re.findall(r"^    (\w+)/ ", README, re.M))
    packages = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert packages - {"runs", "wandb", "__pycache__"} <= drawn


def test_the_readme_stays_short():
    assert README.count("\n") <= 220


def test_every_preset_opens_with_its_command():
    for preset in (ROOT / "configs").glob("*.yaml"):
        head = preset.read_text().splitlines()[:6]
        assert any("train.py --config " + preset.name in line for line in head), preset
