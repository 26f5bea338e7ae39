"""Kills, signals and damage: a run that was cut off ends as if it had not been."""
import fcntl
import json
import signal
import threading
import time

import pytest

from harness.checkpoint import step_of
from harness.rundir import ResumeError, hold, is_held, mixed, write_text
from tests.conftest import ROOT, losses, spawn, the_run, train_elsewhere, train_here

LONG = ("steps=24", "checkpoint_every=5", "val_every=6")


def interrupt_after(process, tiny, step: int, number: int) -> None:
    """Send the signal once the run has logged `step` training steps."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        logs = list((tiny.parent / "runs").glob("*/log.jsonl"))
        if logs and logs[0].read_text().count("train_loss") >= step:
            process.send_signal(number)
            return
        time.sleep(0.002)
    raise AssertionError(f"the run never came to step {step}: {process.communicate()}")




@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    from tests.conftest import TINY
    directory = tmp_path_factory.mktemp("whole")
    config = directory / "tiny.yaml"
    config.write_text(TINY.format(data=corpus, runs=directory / "runs"))
    assert train_here("--config", config, *LONG) == 0
    return losses(the_run(config))


@pytest.mark.parametrize("step", [3, 13])
def test_a_killed_run_resumes_bit_for_bit(tiny, uninterrupted, step):
    process = spawn("--config", tiny, *LONG)
    interrupt_after(process, tiny, step, signal.SIGKILL)
    process.communicate()
    run = the_run(tiny)
    assert not (run / "summary.json").exists()
    done = train_elsewhere("--config", tiny, *LONG, "--resume", "auto")
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stderr
    assert the_run(tiny) == run                                     # continued in its own directory
    assert losses(run) == uninterrupted
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_asks_to_be_queued_again(tiny, uninterrupted, number):
    process = spawn("--config", tiny, *LONG)
    interrupt_after(process, tiny, 3, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    run = the_run(tiny)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "stopped" and 3 <= summary["steps"] < 24
    assert (run / "checkpoints" / f"step_{summary['steps']:06d}.pt").exists()
    assert train_here("--config", tiny, *LONG, "--resume", run) == 0
    assert losses(run) == uninterrupted
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_signal_to_one_of_two_ranks_stops_both_together(tiny):
    """torchrun passes SIGTERM on to its workers; each saves the same step and none is killed."""
    process = spawn("--config", tiny, *LONG, ranks=2)
    interrupt_after(process, tiny, 3, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    summary = json.loads((the_run(tiny) / "summary.json").read_text())
    assert summary["status"] == "stopped"


def test_a_checkpoint_of_two_ranks_resumes_on_one(tiny, uninterrupted):
    process = spawn("--config", tiny, *LONG, ranks=2)
    interrupt_after(process, tiny, 6, signal.SIGTERM)
    process.communicate(timeout=60)
    done = train_elsewhere("--config", tiny, *LONG, "--resume", "auto")
    assert done.returncode == 0 and "not as before it was interrupted: world_size 1, was 2" in done.stdout
    assert mixed(the_run(tiny))["world_size"] == "2, then 1"
    for key, loss in losses(the_run(tiny)).items():
        assert loss == pytest.approx(uninterrupted[key], rel=2e-5), key


def stopped_at(tiny, step: int):
    """A run as it is when it was stopped after `step`, made from a whole one."""
    train_here("--config", tiny, *LONG, "keep_checkpoints=9")
    run = the_run(tiny)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if step_of(path.with_suffix("") if path.suffix == ".sha256" else path) > step:
            path.unlink()
    return run


def test_a_run_says_what_was_not_as_before_when_it_went_on(tiny, uninterrupted, capsys):
    run = stopped_at(tiny, 10)
    env = json.loads((run / "env.json").read_text())
    there = env | {"device": "NVIDIA B200", "versions": env["versions"] | {"torch": "2.0"}}
    (run / "env.json").write_text(json.dumps(there))
    (run / "source" / "model" / "gpt.py").write_text("# of then\n")
    assert train_here("--config", tiny, *LONG, "keep_checkpoints=9", "--resume", "auto") == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not as before"))
    assert f"device {env['device']}, was NVIDIA B200" in said and "versions.torch" in said and "model/gpt.py" in said
    changed = mixed(run)
    assert changed.keys() == {"device", "versions.torch", "source.model/gpt.py"}
    assert changed["device"] == f"NVIDIA B200, then {env['device']}"
    assert (run / "source-000010" / "model" / "gpt.py").read_text() == (ROOT / "model" / "gpt.py").read_text()
    assert (run / "source" / "model" / "gpt.py").read_text() == "# of then\n"

    (run / "summary.json").unlink()                                  # once more, from the same place: nothing is new
    assert train_here("--config", tiny, *LONG, "keep_checkpoints=9", "--resume", "auto") == 0
    resumes = json.loads((run / "env.json").read_text())["resumes"]
    assert [(each["step"], len(each["changed"])) for each in resumes] == [(10, 3), (24, 0)]
    assert mixed(run) == changed and losses(run) == uninterrupted


def test_a_run_is_not_continued_on_other_data(tiny):
    run = stopped_at(tiny, 10)
    env = json.loads((run / "env.json").read_text())
    for key in ("train_data", "val_data"):
        (run / "env.json").write_text(json.dumps(env | {key: env[key] | {"sha256": 64 * "0"}}))
        done = train_elsewhere("--config", tiny, *LONG, "keep_checkpoints=9", "--resume", "auto")
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert done.returncode == 2 and f"other {key} than it began with" in line and "start a new run" in line
    assert not (run / "summary.json").exists() and len(losses(run)) > 24                      # nothing was cut off


def test_a_run_is_held_until_its_last_checkpoint_and_its_summary_are_written(tiny, monkeypatch):
    from harness import checkpoint, rundir
    held, save, write_text = [], checkpoint.save, rundir.write_text
    monkeypatch.setattr(checkpoint, "save", lambda where, *rest: (held.append(is_held(where.parent)), save(where, *rest)))
    monkeypatch.setattr(rundir, "write_text", lambda path, text: (
        path.name == "summary.json" and held.append(is_held(path.parent)), write_text(path, text)))
    assert train_here("--config", tiny, *LONG) == 0
    assert len(held) == 6 and all(held) and not is_held(the_run(tiny))


def test_whoever_looks_whether_a_run_is_held_keeps_nobody_from_holding_it(tmp_path):
    (tmp_path / ".lock").touch()
    looking = open(tmp_path / ".lock")
    fcntl.flock(looking, fcntl.LOCK_SH)                              # a long look
    threading.Timer(0.1, looking.close).start()
    assert not is_held(tmp_path)                                     # nor do two who look see each other
    with hold(tmp_path), pytest.raises(ResumeError, match="another process is running this run"):
        assert is_held(tmp_path)
        hold(tmp_path)


def test_a_text_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "there", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_of_which_nothing_is_left_is_only_what_ran_last(tiny):
    run = stopped_at(tiny, 0)
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"device": "NVIDIA B200"}))
    (run / "source" / "model" / "gpt.py").write_text("# of then\n")
    assert train_here("--config", tiny, *LONG, "keep_checkpoints=9", "--resume", "auto") == 0
    assert json.loads((run / "env.json").read_text())["device"] == env["device"] and not mixed(run)
    assert (run / "source" / "model" / "gpt.py").read_text() == (ROOT / "model" / "gpt.py").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, uninterrupted):
    train_here("--config", tiny, *LONG)
    run = the_run(tiny)
    (run / "summary.json").unlink()                                # as if it had been cut off
    newest = run / "checkpoints" / "step_000024.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="step_000024.pt: its SHA-256 differs"):
        assert train_here("--config", tiny, *LONG, "--resume", "auto") == 0
    assert losses(run) == uninterrupted


def test_auto_starts_anew_where_nothing_is_unfinished(tiny):
    assert train_here("--config", tiny, "--resume", "auto") == 0
    assert train_here("--config", tiny, "--resume", "auto") == 0
    assert len(list((tiny.parent / "runs").iterdir())) == 2


def test_auto_never_continues_another_configuration(tiny):
    train_here("--config", tiny)
    run = the_run(tiny)
    (run / "summary.json").unlink()
    train_here("--config", tiny, "optim.hidden.lr=0.03", "--resume", "auto")
    assert len(list((tiny.parent / "runs").iterdir())) == 2
    assert losses(run)["val", 12] is not None


def test_naming_the_run_of_another_configuration_is_refused(tiny):
    train_here("--config", tiny)
    done = train_elsewhere("--config", tiny, "seed=9", "--resume", the_run(tiny))
    assert done.returncode == 2 and "another configuration" in done.stderr


def test_a_run_that_is_going_on_is_left_alone(tiny):
    """Two processes must not continue one run: auto starts anew, naming it is refused."""
    process = spawn("--config", tiny, *LONG, "steps=2000", "data.repeat=true")
    interrupt_after(process, tiny, 2, 0)                                     # signal 0 does nothing: it is running
    live = the_run(tiny)
    named = train_elsewhere("--config", tiny, *LONG, "steps=2000", "data.repeat=true", "--resume", live)
    from harness.rundir import find
    identity = json.loads((live / "env.json").read_text())["identity"]
    assert named.returncode == 2 and "another process" in named.stderr
    assert find(str(live.parent), identity, ("running",)) is None
    process.kill()
    process.communicate()
    assert find(str(live.parent), identity, ("running",)) == live            # the lock went with the process


def test_speedrun_lines_are_not_repeated_by_a_resumed_run(tiny):
    process = spawn("--config", tiny, *LONG, "log=[speedrun]")
    interrupt_after(process, tiny, 13, signal.SIGKILL)
    process.communicate()
    train_here("--config", tiny, *LONG, "log=[speedrun]", "--resume", "auto")
    lines = (the_run(tiny) / "speedrun.txt").read_text().splitlines()
    assert [int(line.split("/")[0].removeprefix("step:")) for line in lines] == [0, 6, 12, 18, 24]
