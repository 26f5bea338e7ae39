"""Mistakes on the command lines of data/ and of the programs over models."""
import os
import runpy
import signal
import subprocess
import sys

import pytest

from data.arguments import exit_with
from tests.conftest import ROOT


def run(program, arguments, monkeypatch) -> int:
    """The exit code of `python -m program arguments`."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.delitem(sys.modules, program, raising=False)        # or runpy warns
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(program, run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("program, arguments, message", [
    ("data.demo", ["--outt", "x"], "unrecognized arguments: --outt x"),
    ("data.download", ["fineweb10B", "--shards", "-1"], "argument --shards: '-1' is not a whole number from 0 on"),
    ("data.download", ["fineweb10B"], "give a corpus and --shards N, or --for FILE"),
    ("data.show", [], "the following arguments are required: path"),
    ("data.show", ["x.bin", "--count", "0"], "argument --count: '0' is not a whole number from 1 on"),
    ("data.tokenise", ["text"], "the following arguments are required: --out"),
    ("data.tokenise", ["text", "--out", "x", "--held-out", "2.5"], "'2.5' is neither a share below 1 nor a number"),
    ("data.tokenise", ["text", "--out", "x", "--held-out", "many"], "'many' is neither a share below 1 nor a number"),
    ("data.tokenise", ["text", "--out", "x", "--name", "a/b"], "'a/b' is no beginning of a file name"),
    ("data.tokenise", ["text", "--out", "x", "--name", "*"], "'*' is no beginning of a file name"),
    ("scripts.export", ["run"], "the following arguments are required: --out"),
])
def test_a_mistake_is_one_line_and_exit_code_2(program, arguments, message, monkeypatch, capsys):
    assert run(program, arguments, monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: ") and message in told and f"(see python -m {program} --help)" in told


@pytest.mark.parametrize("program, arguments", [
    ("data.demo", []), ("data.download", ["fineweb10B", "--shards", "0"]),
    ("data.tokenise", ["here.txt", "--tokenizer", "bytes"])])
def test_a_file_where_the_folder_is_to_be_is_one_line(program, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("text")
    assert run(program, [*arguments, "--out", "here.txt"], monkeypatch) == 2
    assert capsys.readouterr().err == "error: --out here.txt: no folder can be made there (is a file); choose another\n"
    assert (tmp_path / "here.txt").read_text() == "text"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith("interrupted")


def test_a_pattern_that_nothing_reads_is_refused_and_a_text_without_validation_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "here.txt").write_text("text")
    command = [str(tmp_path / "here.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "o")]
    assert run("data.tokenise", [*command, "--pattern", "."], monkeypatch) == 2
    assert "--pattern goes with a file of ranks; bytes has its own" in capsys.readouterr().err
    assert run("data.tokenise", command, monkeypatch) == 0
    assert "no document is held out for validation; raise --held-out" in capsys.readouterr().out
    assert run("data.tokenise", [*command[:-1], str(tmp_path / "all"), "--held-out", "0"], monkeypatch) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["or_refused(lambda argv: print(text) or 0, [])", "exit_with(lambda: print(text) or 0)"])
@pytest.mark.parametrize("text", ["'x'", "'x' * 10**6"])            # met at the end, and while it prints
def test_a_reader_that_has_had_enough_is_no_error(ends, text):
    code = f"import sys; sys.stdin.read(); from data.arguments import *; text = {text}; sys.exit({ends})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""})
    process.stdout.close()                                           # before it prints: `head` has gone
    _, err = process.communicate()
    assert (process.returncode, err) == (141, "")
