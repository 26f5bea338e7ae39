"""Runs beside published curves: `python -m scripts.report`."""
import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.load import load
from scripts import report
from scripts.logs import Run, Validation
from tests.conftest import ROOT, the_run, train_here

LOGS = ROOT / "tests" / "data" / "logs"
TRACK3, TRACK1 = LOGS / "track3_36_tuned_baseline.txt", LOGS / "track1_2024-11-10_UNetDoubleLr.txt"
CURVES = {path.stem: json.loads(path.read_text()) for path in report.CURVES.glob("*.json")}


def run_of(points, planned, status="finished"):
    validations = tuple(Validation(step, loss, 0.) for step, loss in points)
    return Run(ROOT / "run", "ours", "x", validations, planned, status, 0, 3.28, None, {}, {})


@functools.cache
def steps_of_presets():
    """(name, steps) of every preset of a full run, with its file."""
    files = [path for path in (ROOT / "configs").rglob("*.yaml")
             if not {"demo", "demo.yaml", "race", "sweeps"} & set(path.relative_to(ROOT).parts)]
    return {path: (config.name, config.steps) for path in files for config in [load(str(path)).config]}


# ---- the data

@pytest.mark.parametrize("name", sorted(CURVES))
def test_a_curve_is_of_presets_that_are_there_and_of_their_length(name):
    curve = CURVES[name]
    assert len(curve["steps"]) == len(curve["val_loss"]) > 20
    assert curve["steps"] == sorted(set(curve["steps"])) and curve["steps"][0] == 0
    assert "modded-nanogpt" in curve["source"] and curve["result_step"] in curve["steps"]
    for preset in curve["presets"]:
        assert list(steps_of_presets().values()).count((preset, curve["result_step"])) == 1, preset


def test_every_preset_with_a_published_curve_has_it():
    have = {preset for curve in CURVES.values() for preset in curve["presets"]}
    without = {path.stem for path, (name, _) in steps_of_presets().items() if name not in have}
    assert without == {"muon2", "normuonh", "splus", "scion", "gluon", "muonclip"}


def test_curves_are_the_reference_data():
    reference = ROOT.parent / "shared" / "reference"
    if not reference.is_dir():
        pytest.skip("no reference data here")
    curves, several = (json.loads((reference / f).read_text()) for f in ("curves.json", "curves_multi.json"))
    known = [(curve["steps"], curve["val_loss"]) for curve in curves.values()]
    spreads = [(curve["n_runs"], curve["steps"], curve["mean"], curve["sd"]) for curve in several.values()]
    for curve in CURVES.values():
        assert (curve["steps"], curve["val_loss"]) in known
        if "several" in curve:
            assert tuple(curve["several"].values()) in spreads


# ---- the comparison

def test_a_published_run_lies_inside_its_own_band(tmp_path, capsys):
    out = tmp_path / "r.png"
    assert report.main([str(TRACK3), "--record", "muon", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "  1,500     3.5398  0.0014  3.5385 -0.0014  inside" in said
    assert "5 of 5 validations inside 3 standard deviations of 10 runs; step 3,250 is -0.0014 from their mean" in said
    assert out.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [out]


def test_without_a_band_only_the_end_point_is_judged(tmp_path, capsys):
    assert report.main([str(TRACK1), "--record", "11-unet", "--out", str(tmp_path / "r.svg")]) == 0
    said = capsys.readouterr().out
    assert "  3,000     3.2753  0.0040  3.2753 +0.0000  inside" in said
    assert said.count(" +0.0000") == 7                        # it is the published run, to the last digit
    assert said.count("inside") == 2                          # in the table, and in words
    assert "inside 3 x 0.0040; earlier points are for the eye" in said
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_a_run_outside_is_said_to_be(tmp_path):
    """The band is of one more run against a mean of ten: 3 · .00134 · √1.1, and the rounding."""
    record = report.record_of("muon")
    edge = 3.27866 + 3 * .00134 * 1.1**.5
    points = report.compare(run_of([(0, 10.8258), (1000, 3.7), (3250, edge)], 3250), record)
    assert [p.inside for p in points] == [True, False, True]
    assert "2 of 3" in report.verdict(run_of([], 3250), record, points)
    assert "OUTSIDE at step 1,000" in report.verdict(run_of([], 3250), record, points)
    assert not report.compare(run_of([(3250, edge + .0002)], 3250), record)[0].inside
    unet = report.record_of("11-unet")
    inside = [report.compare(run_of([(3000, 3.2753 + gap)], 3000), unet)[0].inside for gap in (.0119, .0122)]
    assert inside == [True, False]
    assert "OUTSIDE 3 x" in report.verdict(run_of([], 3000), unet, report.compare(run_of([(3000, 3.3)], 3000), unet))


def test_a_loss_that_is_not_finite_is_outside():
    assert not report.compare(run_of([(3250, float("nan"))], 3250), report.record_of("muon"))[0].inside


def test_a_run_that_has_not_ended_is_compared_as_far_as_it_is():
    run = run_of([(0, 10.8258), (125, 4.53)], 3000, "stopped")
    points = report.compare(run, report.record_of("11-unet"))
    said = report.verdict(run, report.record_of("11-unet"), points)
    assert "(stopped): step 125 is +0.0038 from the published curve; nothing is judged before step 3,000" in said


def test_a_run_of_ours_finds_its_record_by_its_name(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "CURVES", tmp_path)
    curve = {"source": "a source", "hardware": "some", "torch": None, "presets": ["tiny"], "result_step": 12,
             "steps": [0, 4, 8, 12], "val_loss": [4.159, 4., 3.9, 3.8]}
    (tmp_path / "a-record.json").write_text(json.dumps(curve))
    assert train_here("--config", tiny) == 0
    run = the_run(tiny)
    capsys.readouterr()
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "record   a-record, 12 steps" in said and "OUTSIDE 3 x 0.0040" in said
    assert (run / "report.png").stat().st_size > 10_000 and not list(run.glob("*.part*"))


# ---- refusals: one line, code 2, nothing written

@pytest.mark.parametrize("arguments, message", [
    ((TRACK1, "--record", "muon"), "a run of 3,000 steps, but track3-muon has 3,250"),
    ((TRACK1,), "no published curve for 'logs': give --record, one of 01-llmc, 02-adamw"),
    ((TRACK1, "--record", "nine"), "no published curve for 'nine'"),
    (("other.log", "--record", "11-unet"), "no validation at a step of 11-unet"),
    (("nowhere", "--record", "muon"), "nowhere: No such file or directory"),
    ((TRACK3, "--record", "muon", "--out", "r.txt"), "--out r.txt: give a file ending in .png"),
    ((TRACK3, "--record", "muon", "--out", "no/r.png"), "in a folder that is there"),
])
def test_what_cannot_be_compared_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.log").write_text("s:7 tel:6.1000\n")
    before = sorted(tmp_path.iterdir())
    assert report.main([str(a) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_runs_of_several_records_are_refused(monkeypatch, capsys, tmp_path):
    runs = iter([replace(run_of([], 3250), name="muon"), replace(run_of([], 3000), name="11-unet")])
    monkeypatch.setattr("scripts.logs.read", lambda path: next(runs))
    assert report.main(["a", "b", "--out", str(tmp_path / "r.png")]) == 2
    assert "runs of several records, track3-muon, 11-unet" in capsys.readouterr().err


def test_help_loads_nothing_slow():
    code = ("import runpy, sys\nsys.argv = ['x', '--help']\n"
            "try: runpy.run_module('scripts.report', run_name='__main__')\nexcept SystemExit: pass\n"
            "print('loaded:', *{'torch', 'scipy', 'matplotlib', 'yaml'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "usage: python -m scripts.report" in done.stdout and done.stdout.endswith("loaded:\n"), done.stdout
