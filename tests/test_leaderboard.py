"""The leaderboard: what is counted together, what is left out, and that the page says what the runs say."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from scripts.leaderboard import main
from scripts.logs import read
from tests.conftest import ROOT, TINY, train_here


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Three seeds of one configuration, and one run of another name and learning rate, that reaches nothing."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "tiny.yaml").write_text(TINY.format(data=corpus, runs=folder / "runs"))
    assert train_here("--config", folder / "tiny.yaml", "trials=3", "target_val_loss=3.5", "val_every=2") == 0
    assert train_here("--config", folder / "tiny.yaml", "name=slow", "optim.hidden.lr=0.0001", "optim.rest.lr=0.00001",
                      "target_val_loss=3.5", "val_every=2") == 0
    return folder / "runs"


@pytest.fixture
def runs(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "runs")


def page(tmp_path, *folders) -> str:
    assert main([*map(str, folders), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "README.md").read_text()
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    return text


def sections(text: str) -> list[list[dict[str, str]]]:
    """The rows of every section's table, as dicts by column."""
    found = []
    for part in text.split("\n## ")[1:-1]:                                                # the last: what was left out
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
        found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def change(file, **values) -> None:
    load = yaml.safe_load if file.suffix == ".yaml" else json.loads
    content = load(file.read_text()) | values
    file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))


def run_of(runs, name):
    return next(path for path in sorted(runs.iterdir()) if path.name.startswith(name))


def test_a_row_says_what_its_runs_recorded_and_the_fastest_comes_first(runs, tmp_path):
    rows, = sections(text := page(tmp_path, runs))
    summaries = [json.loads((path / "summary.json").read_text()) for path in sorted(runs.glob("tiny-*"))]
    losses, seconds = ([each[key] for each in summaries] for key in ("val_loss", "target_train_s"))

    def spread(values, form):
        middle = sum(values) / 3
        sd = (sum((value - middle) ** 2 for value in values) / 2) ** .5
        return f"{middle:{form}} ± {sd:{form}}"

    assert "float32: target 3.5\n" in text and [row["preset"] for row in rows] == ["tiny", "slow"]
    tiny, slow = rows
    assert (tiny["n"], tiny["seeds"], tiny["steps"]) == ("3", "0 1 2", "12")
    assert tiny["last val loss"] == spread(losses, ".4f")
    assert tiny["steps to target"] == spread([each["target_step"] for each in summaries], ",.0f")
    assert tiny["seconds to target"] == spread(seconds, ",.1f")
    env = json.loads((run_of(runs, "tiny") / "env.json").read_text())
    assert tiny["date"] == env["started"][:10]
    assert tiny["revision"].split()[0] == (env["git_revision"] or "not")[:9]
    from scipy import stats
    p = stats.ttest_1samp(losses, 3.5, alternative="less").pvalue
    assert tiny["verdict"].startswith("target 3.5: p = ") and ("does not pass" in tiny["verdict"]) == (p >= 0.01)
    assert (slow["steps to target"], slow["seconds to target"], slow["verdict"]) == (
        "not reached", "", "target 3.5: no test of one run")


@pytest.mark.parametrize("file, values", [
    ("env.json", {"device": "NVIDIA H100", "gpus": ["NVIDIA H100"]}), ("env.json", {"world_size": 2}),
    ("env.json", {"activation_dtype": "torch.bfloat16"}), ("config.yaml", {"target_val_loss": 3.6}),
    ("env.json", {"val_data": {"files": 1, "tokens": 2000, "sha256": "0" * 64}})])
def test_another_class_is_another_section(runs, tmp_path, file, values):
    change(run_of(runs, "tiny-1") / file, **values)
    found = sections(page(tmp_path, runs))
    assert sorted(sorted(row["seeds"] for row in rows) for rows in found) == [["0", "0 2"], ["1"]]


def test_another_code_or_torch_is_another_row_with_its_date(runs, tmp_path):
    with open(run_of(runs, "tiny-1") / "source" / "train.py", "a") as file:
        file.write("# changed\n")
    rows, = sections(page(tmp_path, runs))
    assert sorted(row["seeds"] for row in rows) == ["0", "0 2", "1"]
    assert sum(bool(re.fullmatch(r"tiny \d{4}-\d\d-\d\d \d\d:\d\d", row["preset"])) for row in rows) == 2


def test_what_is_not_counted_is_listed_with_the_reason(runs, tmp_path):
    again = shutil.copytree(run_of(runs, "tiny-0"), runs / "tiny-0-later")
    change(again / "env.json", started="2999-01-01T00:00:00+0000")
    (run_of(runs, "tiny-1") / "summary.json").unlink()
    change(run_of(runs, "tiny-2") / "config.yaml", target_val_loss=None)
    broken = runs / "broken"
    broken.mkdir()
    (broken / "env.json").write_text("{}")
    text = page(tmp_path, runs, runs / "broken")                                        # given twice, listed once
    listed = dict(re.findall(r"^- `(.*)`: (.*)$", text, flags=re.M))
    said = {path.rsplit("/", 1)[1][:6]: why for path, why in listed.items()}
    assert "status is running" in said["tiny-1"] and "no target_val_loss" in said["tiny-2"]
    assert said["tiny-0"].startswith("seed 0 of the same configuration again; the first counts, ")
    assert "config.yaml: No such file" in said["broken"] and len(listed) == 4
    assert text.split("\n")[2].startswith("Made from 2 finished runs") and str(again) in listed
    assert sorted(row["seeds"] for rows in sections(text) for row in rows) == ["0", "0"]


def test_seconds_of_two_machines_are_not_counted(runs, tmp_path):
    change(run_of(runs, "tiny-1") / "env.json", resumes=[{"step": 4, "changed": {"device": "NVIDIA B200"}}])
    text = page(tmp_path, runs)
    assert re.search(r"tiny-1\S+`: resumed on another machine \(device: .*, then NVIDIA B200\)", text)
    assert "1" not in [seed for rows in sections(text) for row in rows for seed in row["seeds"].split()]


def test_a_row_of_which_one_run_missed_the_target_has_no_time(runs, tmp_path):
    run = run_of(runs, "tiny-1")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line | {"val_loss": max(line["val_loss"], 3.51)} if "val_loss" in line else line for line in lines]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, = sections(text := page(tmp_path, runs))
    tiny = next(row for row in rows if row["preset"] == "tiny")
    assert (tiny["steps to target"], tiny["seconds to target"]) == ("2 of 3 reached it", "")
    assert "bars" not in text and "curves" in text                                       # nobody has a time to draw


def test_track_3_is_asked_of_its_presets_with_what_is_outside_its_rules(runs, tmp_path):
    for path in runs.glob("tiny-*"):
        change(path / "config.yaml", name="track3-tiny")
    rows, = sections(page(tmp_path, runs))
    verdict = next(row["verdict"] for row in rows if row["preset"] == "track3-tiny")
    losses = [read(path).validations[-1].loss for path in runs.glob("tiny-*")]
    assert verdict.startswith(f"track3: score {(3.28 - sum(losses) / 3) * 3 ** .5:.4f}, does not pass (")


@pytest.mark.parametrize("folder, said", [("nowhere", "no such folder"), ("", "no run directory in")])
def test_a_folder_without_runs_is_one_line_and_no_page(tmp_path, folder, said):
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-m", "scripts.leaderboard", tmp_path / "empty" / folder, "--out",
                           tmp_path / "page"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "page").exists()
