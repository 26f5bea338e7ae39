"""What the trials of a sweep reached: results.jsonl, one object a trial."""
import json
from pathlib import Path

from harness.processes import EXIT_BAD_INPUT, EXIT_NOT_FINITE
from harness.rundir import is_held, mixed, read_log, state_of, write_text
from scripts.sweep.plan import Trial, configuration_id

FINAL = ("finished", "not_finite", "pruned")            # nothing to do again: the same trial would end so again
ENDED = (*FINAL, "crashed", "refused")  # nothing more is awaited, in this call of the sweep


def run_of(trial: Trial) -> Path | None:
    """Its newest run directory, of those with a final result where there are any."""
    made = [env.parent for env in trial.folder.glob("*/env.json")]
    return max(made, key=lambda run: (state_of(run) in FINAL, (run / "env.json").stat().st_mtime_ns), default=None)


def status_of(trial: Trial) -> str:
    """finished, not_finite; pruned; crashed, refused (as its last attempt ended); running; stopped; waiting."""
    run = run_of(trial)
    state = state_of(run) if run else "waiting"
    if state in FINAL:
        return state
    if is_held(trial.folder) or run and is_held(run):                 # from before it has a run; without the sweep
        return "running"
    if pruned_of(trial):
        return "pruned"
    if failure := failure_of(trial):
        return failure["status"]
    return "stopped" if run else "waiting"                            # cut off, or by a signal: it goes on from there


def failure_of(trial: Trial) -> dict | None:
    try:
        return json.loads((trial.folder / "failure.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def note_failure(trial: Trial, code: int | None, error: str | None = None) -> dict:
    """Write failure.json: what an attempt ended with, in words the last line that it printed; what stands there."""
    output = trial.folder / "output.txt"
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    kind = {EXIT_BAD_INPUT: "refused", EXIT_NOT_FINITE: "not_finite"}.get(code, "crashed")
    failure = dict(status=kind, code=code, error=error or f"exit code {code}: {said}")
    write_text(trial.folder / "failure.json", json.dumps(failure) + "\n")
    return failure


def pruned_of(trial: Trial) -> dict | None:
    """Where successive halving ended its configuration: {seed, step, the metric}."""
    path = trial.folder / "pruned.json"
    return json.loads(path.read_text()) if trial.may_be_pruned and path.exists() else None


def row(trial: Trial, out: Path) -> dict:
    """Its line in results.jsonl. Losses are the last validation's, in nats a token; seconds are those on the clock;
    of the data 12 hex digits, equal where losses compare."""
    run, status, failure = run_of(trial), status_of(trial), failure_of(trial)
    train, val = read_log(run) if run and (run / "log.jsonl").exists() else ([], [])
    summary = json.loads((run / "summary.json").read_text()) if run and (run / "summary.json").exists() else {}
    env = json.loads((run / "env.json").read_text()) | mixed(run) if run else {}
    last, newest = val[-1] if val else {}, (train or val or [{}])[-1]
    finished = status == "finished"
    return dict(
        trial=trial.name, configuration=configuration_id(trial.configuration), base=trial.configuration.base,
        parameters=trial.configuration.parameters, label=trial.label, baseline=trial.is_baseline,
        seed=trial.config.seed, status=status,
        steps=newest.get("step", 0), of_steps=trial.config.steps,
        val_loss=last.get("val_loss"), val_loss_avg=last.get("val_loss_avg"),
        target_step=summary.get("target_step"), target_train_s=summary.get("target_train_s"),
        train_s=summary.get("train_s") if finished else newest.get("train_s"),
        tokens_per_s=summary.get("tokens_per_s") if finished else None,
        run=str(run.relative_to(out)) if run else None, device=env.get("device"),
        train_data=_digest(env, "train_data"), val_data=_digest(env, "val_data"),
        git_revision=env.get("git_revision"), git_dirty=env.get("git_dirty"),
        error=failure["error"] if failure and status == failure["status"] else None)


def _digest(env: dict, data: str) -> str | None:
    found = (env.get(data) or {}).get("sha256")
    return found and found[:12]


def write_results(rows: list[dict], out: Path) -> None:
    """Replaced in one go."""
    write_text(out / "results.jsonl", "".join(json.dumps(each) + "\n" for each in rows))
