"""The house as the README draws it: which way imports run, and how long files may grow."""
import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGES = ("model", "optim", "data", "harness")
ALLOWED = {"model": set(), "optim": set(), "data": set(), "harness": {"model", "optim", "data"},
           "scripts": {"model", "optim", "data", "harness"}, "train": {"model", "optim", "data", "harness"}}
# harness knows the three by their configuration only: these modules define or judge keys of the YAML.
CONFIGURATION = {"model.config", "model.head", "data.loader", "data.orders", "optim", "optim.backend", "optim.groups",
                 "optim.schedules", "optim.table"}
FILES = [ROOT / "train.py", *(p for package in (*PACKAGES, "scripts") for p in sorted((ROOT / package).rglob("*.py")))]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_arrows_point_one_way(path):
    owner = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {m for m in imported_modules(path) if m.split(".")[0] in {*ALLOWED, "tests"}}
    outside = {m for m in ours if m.split(".")[0] not in ALLOWED[owner] | {owner}}
    assert not outside, f"{path.name} imports {outside}"
    if owner == "harness":
        beyond = {m for m in ours if m.split(".")[0] != "harness"} - CONFIGURATION
        assert not beyond, f"{path.name} imports {beyond}, which is not configuration"


@pytest.mark.parametrize("package", ["model", "optim"])
def test_mathematics_knows_nothing_of_ranks(package):
    for path in (ROOT / package).rglob("*.py"):
        if path.name not in ("driver.py", "bank.py"):
            assert not re.search(r"torch\.distributed|\bdist\.", path.read_text()), path


def test_files_stay_short():
    for path in FILES:
        lines = path.read_text().count("\n")
        assert lines <= (400 if path.name == "train.py" else 320), f"{path.name} has {lines} lines"
        longest = max(map(len, path.read_text().splitlines()), default=0)
        assert longest <= 120, f"{path.name} has a line of {longest} columns"


def test_help_loads_nothing_slow():
    code = ("import sys; sys.argv = ['train.py', '--help']\n"
            "import runpy\n"
            "try: runpy.run_path('train.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "slow = {'torch._inductor', 'matplotlib', 'wandb', 'rich', 'tiktoken', 'transformers', 'triton', 'scipy',\n"
            "        'datasets', 'huggingface_hub'}\n"
            "print('loaded:', *sorted(slow & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "usage:" in done.stdout and done.stdout.strip().endswith("loaded:"), done.stdout + done.stderr
