"""Verdicts: what is refused, what the rule says, and how it is printed."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import judge
from scripts.verdict import RULES, Refused, comparison, group, main, times_not_compared
from tests.conftest import ROOT, train_here
from tests.test_logs import LLMC, TRACK1, TRACK1_NEW, TRACK3

SIX = [3.2771, 3.2762, 3.2785, 3.2779, 3.2768, 3.2790]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """{"runs": seeds 0 to 2, "base": seeds 1 to 3 at another learning rate}: really trained."""
    from tests.conftest import TINY
    found = {}
    for name, arguments in (("runs", ["seed=0"]), ("base", ["seed=1", "optim.hidden.lr=0.002"])):
        folder = tmp_path_factory.mktemp(name)
        (folder / "tiny.yaml").write_text(TINY.format(data=corpus, runs=folder / "runs"))
        arguments += ["steps=8", "trials=3", "target_val_loss=3.5"]
        assert train_here("--config", folder / "tiny.yaml", *arguments) == 0
        found[name] = sorted((folder / "runs").iterdir())
    return found


@pytest.fixture
def copies(trained, tmp_path):
    """Two runs that a test may change."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for source, target in zip(trained["runs"], paths):
        shutil.copytree(source, target)
    return paths


def change(file: Path, **values) -> None:
    """Set dotted keys of a JSON or YAML file; None takes the key away."""
    read = yaml.safe_load if file.suffix == ".yaml" else json.loads
    content = read(file.read_text())
    for dotted, value in values.items():
        *above, key = dotted.split("__")
        place = content
        for name in above:
            place = place[int(name) if isinstance(place, list) else name]
        if value is None:
            place.pop(key)
        else:
            place[key] = value
    file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))


def track3_logs(folder: Path, losses, times=None, steps=3250, source="lr = 0.025") -> list[Path]:
    """Logs in track 3's form that end at these losses after these seconds."""
    folder.mkdir(exist_ok=True)
    paths = []
    for i, loss in enumerate(losses):
        time = (times or [500 + 0.1 * j for j in range(len(losses))])[i]
        text = TRACK3.read_text().replace("(source code of the run stood here)", source)
        text = text.replace("/3250", f"/{steps}").replace("step:3250", f"step:{steps}")
        text = text.replace("val_loss:3.27722 train_time:503.169s", f"val_loss:{loss:.5f} train_time:{time:.3f}s")
        paths.append(folder / f"{i}.txt")
        paths[-1].write_text(text)
    return paths


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["verdict", *map(str, arguments)])
    code = main()
    return code, *capsys.readouterr()


# ---- what is refused

@pytest.mark.parametrize("file, values, message", [
    ("config.yaml", {"seed": 0}, "seed 0 twice, {a} and {b}: count one of them"),
    ("config.yaml", {"steps": 12}, "{b}: no validation at step 12"),
    ("config.yaml", {"optim__0__lr": 0.03}, "{a} and {b}: mixed configurations, optim.hidden.lr (0.02 and 0.03)"),
    ("config.yaml", {"model__window": 8}, "mixed configurations, model.window (None and 8)"),
    ("env.json", {"train_data__sha256": "0"}, "mixed configurations, train_data.sha256 ("),
    ("env.json", {"device": "NVIDIA B200"}, "{a} and {b}: mixed machines, device ("),
    ("env.json", {"world_size": 2}, "mixed machines, world_size (1 and 2); run them on one"),
    ("env.json", {"versions__torch": "2.11.0"}, "mixed machines, torch ("),
    ("env.json", {"micro_batch_rows": 4}, "mixed machines, micro_batch_rows (8 and 4)"),
    ("summary.json", {"ledger_s": None}, "{b}: no ledger of the clock (ledger_s) in its summary.json"),
    ("summary.json", {"status": "stopped"}, "{b}: not finished (its status is stopped)"),
])
def test_runs_that_do_not_belong_together_are_refused(copies, file, values, message):
    assert len(group(copies).losses) == 2
    change(copies[1] / file, **values)
    with pytest.raises(Refused) as error:
        group(copies)
    assert message.format(a=copies[0], b=copies[1]) in str(error.value) and "\n" not in str(error.value)


def test_other_code_and_a_run_that_was_killed_are_refused(copies):
    source = copies[1] / "source" / "model" / "gpt.py"
    source.write_text(source.read_text() + "\n")
    with pytest.raises(Refused, match=r"mixed configurations, source.model/gpt.py \(\w{12} and \w{12}\)"):
        group(copies)
    (copies[1] / "summary.json").unlink()
    with pytest.raises(Refused, match=r"^\S+b: not finished \(its status is running\); [^\n]+$"):
        group(copies)


def test_a_run_that_went_on_elsewhere_has_a_loss_but_no_seconds_and_with_other_code_neither(trained, copies):
    change(copies[1] / "env.json", resumes=[{"step": 4, "changed": {"device": "NVIDIA B200"}}])
    device = json.loads((copies[0] / "env.json").read_text())["device"]
    with pytest.raises(Refused, match=re.escape(f"mixed machines, device ({device} and {device}, then NVIDIA B200)")):
        group(copies)
    alone, base = group(copies[1:]), group(trained["base"])
    assert times_not_compared(alone, base) == times_not_compared(base, alone) == (
        f"resumed on another machine, device: {device}, then NVIDIA B200")
    change(copies[1] / "env.json", resumes=[{"step": 4, "changed": {"source.model/gpt.py": "0123456789ab"}}])
    with pytest.raises(Refused, match=r"resumed with other code \(source.model/gpt.py: \w{12}, then 0123456789ab"):
        group(copies[1:])


def test_runs_of_different_lengths_are_refused(copies):
    change(copies[1] / "config.yaml", steps=4)
    with pytest.raises(Refused, match="8 and 4 steps; all must stop at one step"):
        group(copies)


def test_every_reason_is_named_at_once(copies, tmp_path, monkeypatch, capsys):
    change(copies[1] / "env.json", device="NVIDIA B200")
    change(copies[1] / "config.yaml", seed=0)
    code, out, err = run_main(monkeypatch, capsys, *copies, tmp_path / "none")
    lines = err.splitlines()
    assert code == 2 and not out and len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "none: No such file" in lines[0] and "seed 0 twice" in lines[1] and "mixed machines" in lines[2]


def test_published_logs_are_held_to_the_same(tmp_path):
    logs = track3_logs(tmp_path / "a", SIX)
    assert group(logs).losses == SIX
    shutil.copyfile(logs[2], tmp_path / "copy.txt")
    for paths, message in (
            ([*logs, tmp_path / "copy.txt"], "the same log twice"),
            ([*logs, TRACK1], "logs of two kinds, track 3 and track 1"),
            ([*logs, *track3_logs(tmp_path / "b", SIX[:1], [9.0], steps=3225)], "3,250 and 3,225 steps"),
            ([*logs, *track3_logs(tmp_path / "c", SIX[:1], [9.0], source="lr = 0.03")], "mixed configurations, source"),
            ([TRACK1, TRACK1_NEW], "mixed machines, torch (2.5.1+cu124 and 2.10.0+cu128), cuda (12.4 and 12.8)"),
            (track3_logs(tmp_path / "d", [float("nan")]), "its loss is nan")):
        with pytest.raises(Refused, match=re.escape(message)):
            group(paths)


def test_a_baseline_on_other_text_or_with_a_run_of_the_runs_is_refused(trained, copies, monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, *trained["runs"], "--baseline", trained["runs"][0])
    assert code == 2 and "has a run that is among the runs too" in err and err.count("\n") == 1
    for copy in copies:
        change(copy / "env.json", val_data__sha256="other")
    code, _, err = run_main(monkeypatch, capsys, *trained["base"], "--baseline", *copies)
    assert code == 2 and "were validated on different text (val_data.sha256" in err and err.count("\n") == 1


# ---- what is said

def verdict_of(monkeypatch, capsys, *arguments) -> dict:
    code, out, err = run_main(monkeypatch, capsys, *arguments, "--json")
    assert code == 0 and not err
    return json.loads(out)


def test_runs_of_ours_are_judged_by_their_own_target(trained, monkeypatch, capsys):
    found = verdict_of(monkeypatch, capsys, *trained["runs"])
    losses = [json.loads((run / "summary.json").read_text())["val_loss"] for run in trained["runs"]]
    assert found["rule"]["name"] == "target 3.5" and found["baselines"] == []
    runs = found["runs"]
    assert runs["losses"] == losses and runs["seeds"] == [0, 1, 2] and runs["steps"] == 8
    assert runs["p"] == judge.p_below(losses, 3.5) and runs["passes"] is (runs["p"] < 0.01)
    assert runs["time"]["n"] == 3 and runs["time"]["min"] <= runs["time"]["median"] <= runs["time"]["max"]
    assert all(ledger["training"] > 0 for ledger in runs["ledger_s"]) and runs["machine"]["world_size"] == 1


def test_a_comparison_names_what_changed_and_pairs_the_seeds(trained, monkeypatch, capsys):
    found = verdict_of(monkeypatch, capsys, *trained["runs"], "--baseline", *trained["base"])
    compared, base = found["baselines"][0]["comparison"], found["baselines"][0]
    assert compared["changed"] == [["optim.hidden.lr", 0.002, 0.02]] and base["seeds"] == [1, 2, 3]
    a, b = found["runs"]["losses"], base["losses"]
    assert compared["loss"]["n"] == [3, 3] and compared["loss"]["p"] == judge.welch(a, b).p
    assert compared["loss_mean"] == pytest.approx(sum(a) / 3 - sum(b) / 3) and compared["loss_mean"] < 0
    assert compared["loss_by_seed"]["n"] == [2, 2]
    assert compared["loss_by_seed"]["mean"] == pytest.approx((a[1] - b[0] + a[2] - b[1]) / 2)
    assert compared["times_not_compared"] == "" and compared["time"]["n"] == [3, 3]
    assert compared["pairwise_score"] is None                   # the exchange rate is track 3's


@pytest.mark.parametrize("rule, losses, passes", [
    ("track1", SIX, True), ("track1", [x + 0.0015 for x in SIX], False), ("track2", SIX, False),
    ("track3", SIX, True), ("track3", [x + 0.0015 for x in SIX], False), ("track3", [3.276], True),
    ("track3", [3.2761], False), ("track1", [3.2], False),
])
def test_a_track_s_rule_decides(tmp_path, monkeypatch, capsys, rule, losses, passes):
    logs = track3_logs(tmp_path / "logs", losses)
    if rule != "track3":                                         # in track 1's form: milliseconds
        for log in logs:
            log.write_text(re.sub(r"train_time:([\d.]+)s", r"train_time:\g<1>ms", log.read_text()))
    found = verdict_of(monkeypatch, capsys, *logs, "--rule", rule)["runs"]
    assert found["passes"] is passes and found["outside_the_rule"] == []
    assert (found["score"] is None) == (rule != "track3") and (passes or found["more_runs"] != 0)


def test_runs_outside_of_a_track_do_not_pass_its_rule(trained, monkeypatch, capsys):
    found = verdict_of(monkeypatch, capsys, *trained["runs"], "--rule", "track3")["runs"]
    assert found["outside_the_rule"] == [
        "data.tokenizer is bytes, track3 fixes gpt2", "val_tokens is 512, track3 fixes 10485760",
        "batch_tokens is 256, track3 fixes 524288", "seq_len is 32, track3 fixes 1024"]
    assert found["statistic_passes"] and not found["passes"]
    found = verdict_of(monkeypatch, capsys, TRACK1, "--rule", "track3", "--baseline", LLMC)
    assert found["runs"]["statistic_passes"] and not found["runs"]["passes"]
    assert found["runs"]["outside_the_rule"] == ["a log of track 1, track3 fixes its own model"]
    assert found["baselines"][0]["comparison"]["pairwise_score"] is None


def test_steps_count_as_loss_between_results_of_track_3(tmp_path, monkeypatch, capsys):
    fewer = track3_logs(tmp_path / "a", SIX, steps=3125)
    more = track3_logs(tmp_path / "b", SIX, [600 + i for i in range(6)], source="lr = 1")
    compared = verdict_of(monkeypatch, capsys, *fewer, "--baseline", *more)["baselines"][0]["comparison"]
    assert compared["pairwise_score"] == pytest.approx(1.25 * 0.0045 / (1 / 3) ** 0.5) and compared["pairwise_better"]
    assert compared["loss"]["p"] == 1 and compared["more_runs_each"] is None and compared["time"]["mean"] < -100


def test_seconds_of_other_machines_are_not_compared(tmp_path):
    logs = group(track3_logs(tmp_path / "a", SIX))
    for other, reason in ((TRACK1, "other machine, torch (2.10.0+cu128 and 2.5.1+cu124), cuda (12.8 and 12.4)"),
                          (LLMC, "a log without times")):
        found = comparison(logs, group([other]), RULES["track1"])
        assert found["times_not_compared"] == reason and found["time"] is None
    assert comparison(logs, group([TRACK1_NEW]), None)["times_not_compared"] == ""


def test_all_runs_may_be_judged_at_an_earlier_step_of_all(tmp_path, monkeypatch, capsys):
    logs = track3_logs(tmp_path / "logs", SIX)
    for i, log in enumerate(logs):
        log.write_text(log.read_text().replace("val_loss:3.27788", f"val_loss:{3.277 + i / 1e4:.5f}"))
    found = verdict_of(monkeypatch, capsys, *logs, "--step", "3225")["runs"]
    assert found["steps"] == 3225 and found["losses"] == [round(3.277 + i / 1e4, 5) for i in range(6)]
    assert found["train_s"] == [499.288] * 6
    code, _, err = run_main(monkeypatch, capsys, *logs, "--step", "3226")
    assert code == 2 and err.count("no validation at step 3,226") == 6


# ---- how it is printed

def test_ours_and_three_kinds_of_published_logs_meet_in_one_table(trained, monkeypatch, capsys):
    code, out, _ = run_main(monkeypatch, capsys, *trained["runs"], "--rule", "track1", "--baseline", TRACK1,
                            "--baseline", TRACK3, "--baseline", LLMC, "--markdown")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and [cell.strip() for cell in rows[0]] == [
        "Runs", "Steps", "Time μ", "Time σ", "Time +/-", "Time p", "Loss μ", "Loss σ", "Loss +/-", "Loss p"]
    names = [*(f"baseline {i} {path.stem} (1)" for i, path in enumerate((TRACK1, TRACK3, LLMC), 1)), "tiny (3)"]
    assert [row[0].strip() for row in rows[2:]] == names and {len(row) for row in rows} == {10}
    assert [row[1].strip() for row in rows[2:]] == ["3,000", "3,250", "19,560", "8"]
    assert rows[2][2].strip() == "433.570" and rows[4][2].strip() == "" and rows[4][6].strip() == "3.2722"


def test_the_markdown_carries_numbers_that_give_its_p_value_again(tmp_path, monkeypatch, capsys):
    logs = track3_logs(tmp_path / "a", SIX), track3_logs(tmp_path / "b", [x + 0.003 for x in SIX], source="lr = 1")
    for rule in ("track1", "track3"):
        _, out, _ = run_main(monkeypatch, capsys, *logs[0], "--rule", rule, "--baseline", *logs[1], "--markdown")
        scripts = re.findall(r"```python\n(.*?)```", out, re.S)
        assert len(scripts) == 2
        done = subprocess.run([sys.executable, "-c", scripts[0]], capture_output=True, text=True)
        expected = judge.p_below(SIX, 3.28) if rule == "track1" else judge.score(SIX, 3.28)
        assert float(done.stdout) == pytest.approx(expected, rel=1e-6), done.stderr
    cells = [cell.strip() for cell in out.splitlines()[3].split("|")[1:-1]]
    welch = judge.welch(SIX, [x + 0.003 for x in SIX])
    assert cells[0] == "a (6)" and "are against baseline b.\n" in out
    assert cells[6:9] == ["3.2776", "0.0011", f"{welch.mean:+.4f}"] and cells[8] == "-0.0030"
    assert cells[9] == f"{judge.p_of_score(judge.score(SIX, 3.28)):.1e}"


def test_the_text_says_the_verdict_and_how_many_more_runs(tmp_path, monkeypatch, capsys):
    logs = track3_logs(tmp_path / "a", [x + 0.0015 for x in SIX])
    _, out, _ = run_main(monkeypatch, capsys, *logs, "--baseline", *track3_logs(tmp_path / "b", SIX, source="lr = 1"))
    losses = [round(x + 0.0015, 5) for x in SIX]
    assert "a: 6 runs of 3,250 steps (track 3)\n" in out and "baseline b: 6 runs of 3,250 steps (track 3)\n" in out
    assert f"= {judge.score(losses, 3.28):.5f}, asked 0.004 or more: does not pass\n" in out
    assert f"  more runs  {judge.more_score(losses, 3.28)}, if mean and standard deviation stay\n" in out
    assert f"p = {judge.welch(losses, SIX).p:.4f}: undecided (Welch)\n" in out
    more = judge.more_welch(losses, SIX)
    assert f"  more runs  {more}, if mean and standard deviation stay, of each set (Welch)\n" in out
    assert "asked 0.004 or more: not shown to be better" in out
    _, out, _ = run_main(monkeypatch, capsys, *logs, "--baseline", *track3_logs(
        tmp_path / "low", [x - 0.02 for x in SIX], [400 + 0.1 * i for i in range(6)], source="lr = 2"))
    assert re.search(r"loss       \+0\.0215 .* p = \S+: higher \(Welch\)\n", out)
    assert re.search(r"seconds    \+100\.000 .* p = \S+: slower \(Welch\)\n", out)
    _, out, _ = run_main(monkeypatch, capsys, *track3_logs(tmp_path / "c", [3.281, 3.282], source="x"))
    assert "  more runs  none decide it at this mean\n" in out


def test_one_run_without_a_target_says_so(copies, monkeypatch, capsys):
    change(copies[0] / "config.yaml", target_val_loss="")
    (copies[0] / "config.yaml").write_text((copies[0] / "config.yaml").read_text().replace("target_val_loss: ''",
                                                                                          "target_val_loss: null"))
    code, out, _ = run_main(monkeypatch, capsys, copies[0])
    assert code == 0 and "rule       none: the runs have no target; give --rule\n" in out and "1 run of 8 steps" in out


def test_help_is_quick_and_loads_nothing_slow():
    code = ("import runpy, sys; sys.argv = ['verdict', '--help']\n"
            "try: runpy.run_module('scripts.verdict', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('loaded:', *sorted({'scipy', 'matplotlib', 'triton', 'datasets', 'tiktoken'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stdout.endswith("loaded:\n"), done.stdout + done.stderr
