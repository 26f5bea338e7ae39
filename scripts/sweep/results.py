"""What the trials of a sweep reached: results.jsonl, one object a trial, and the ranking."""
import json
from pathlib import Path

from harness.rundir import is_held, read_log, state_of, write_text
from scripts.judge import paired, spread
from scripts.sweep.file import Sweep
from scripts.sweep.plan import Trial, configuration_id

FINAL = ("finished", "not_finite")      # nothing to do again: the same configuration would end so again
ENDED = (*FINAL, "crashed", "refused")  # nothing more is awaited, in this call of the sweep


def run_of(trial: Trial) -> Path | None:
    """Its newest run directory."""
    made = [env.parent for env in trial.folder.glob("*/env.json")]
    return max(made, key=lambda run: (run / "env.json").stat().st_mtime_ns, default=None)


def status_of(trial: Trial) -> str:
    """finished, not_finite; crashed, refused (as its last attempt ended); running; stopped; waiting."""
    run = run_of(trial)
    state = state_of(run) if run else "waiting"
    if state in FINAL:
        return state
    if run and is_held(run):
        return "running"
    if failure := failure_of(trial):
        return failure["status"]
    return "stopped" if run else "waiting"                            # cut off, or by a signal: it goes on from there


def failure_of(trial: Trial) -> dict | None:
    try:
        return json.loads((trial.folder / "failure.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def row(trial: Trial, out: Path) -> dict:
    """Its line in results.jsonl. Losses are the last validation's, in nats a token; seconds are those on the clock."""
    run, status, failure = run_of(trial), status_of(trial), failure_of(trial)
    train, val = read_log(run) if run and (run / "log.jsonl").exists() else ([], [])
    summary = json.loads((run / "summary.json").read_text()) if run and (run / "summary.json").exists() else {}
    env = json.loads((run / "env.json").read_text()) if run else {}
    last, newest = val[-1] if val else {}, (train or val or [{}])[-1]
    finished = status == "finished"
    return dict(
        trial=trial.name, configuration=configuration_id(trial.configuration), base=trial.configuration.base,
        parameters=trial.configuration.parameters, baseline=trial.is_baseline, seed=trial.config.seed, status=status,
        steps=newest.get("step", 0), of_steps=trial.config.steps,
        val_loss=last.get("val_loss"), val_loss_avg=last.get("val_loss_avg"),
        target_step=summary.get("target_step"), target_train_s=summary.get("target_train_s"),
        train_s=summary.get("train_s") if finished else newest.get("train_s"),
        tokens_per_s=summary.get("tokens_per_s") if finished else None,
        run=str(run.relative_to(out)) if run else None, device=env.get("device"),
        git_revision=env.get("git_revision"), git_dirty=env.get("git_dirty"),
        error=failure["error"] if failure and status == failure["status"] else None)


def write_results(rows: list[dict], out: Path) -> None:
    """Replaced in one go."""
    write_text(out / "results.jsonl", "".join(json.dumps(each) + "\n" for each in rows))


def table(rows: list[dict], sweep: Sweep) -> str:
    """Markdown: a line a configuration, best first, mean ± standard deviation over its finished seeds.

    Differences from the baseline are of seeds that both have finished, with 95% intervals.
    """
    groups = {}
    for each in rows:
        groups.setdefault(each["configuration"], []).append(each)
    done = {key: [each for each in group if each["status"] == "finished"] for key, group in groups.items()}
    varying = _varying([group[0] for group in groups.values()])
    base = next((key for key, group in groups.items() if group[0]["baseline"]), None)
    columns = [*varying, "seeds", *_measured(rows, sweep)]
    head = [*columns, *([f"{sweep.metric} less baseline's"] if base else []), "not finished"]
    lines = []
    for key in sorted(groups, key=lambda key: _rank(done[key], len(groups[key]), sweep)):
        first, n = groups[key][0], len(done[key])
        cells = [_value(first, column) for column in varying] + [f"{n} of {len(groups[key])}"]
        cells += [_mean(done[key], column) for column in columns[len(varying) + 1:]]
        if base:
            cells.append("baseline" if key == base else _less(done[key], done[base], sweep.metric))
        states = [each["status"] for each in groups[key] if each["status"] != "finished"]
        cells.append(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        lines.append(cells)
    used = [i for i, title in enumerate(head) if title in varying or any(line[i] for line in lines)]
    marks = ["-" if head[i] in varying or head[i] == "not finished" else "-:" for i in used]
    return "\n".join(f"| {' | '.join(line)} |" for line in
                     ([head[i] for i in used], marks, *([line[i] for i in used] for line in lines)))


def _varying(firsts: list[dict]) -> list[str]:
    """`config`, and the keys that differ between configurations."""
    keys = ["config", *dict.fromkeys(key for each in firsts for key in each["parameters"])]
    return [key for key in keys if len({_value(each, key) for each in firsts}) > 1] or keys[:1]


def _value(each: dict, key: str) -> str:
    if key == "config":
        return each["base"]
    return str(each["parameters"][key]) if key in each["parameters"] else ""


def _measured(rows: list[dict], sweep: Sweep) -> list[str]:
    keys = ("val_loss", "val_loss_avg", "target_step", "target_train_s", "train_s", "tokens_per_s")
    return sorted((key for key in keys if any(each[key] is not None for each in rows)), key=lambda k: k != sweep.metric)


def _rank(done: list[dict], planned: int, sweep: Sweep) -> tuple:
    """Those of which every seed has the metric first: the mean of a few seeds is no rank."""
    values = [each[sweep.metric] for each in done if each[sweep.metric] is not None]
    mean = spread(values).mean if values else 0.0
    return not values, len(values) < planned, -mean if sweep.maximize else mean


DIGITS = {"val_loss": 4, "val_loss_avg": 4, "target_step": 0, "target_train_s": 1, "train_s": 1, "tokens_per_s": 0}


def _mean(done: list[dict], key: str) -> str:
    values = [each[key] for each in done if each[key] is not None]
    if not values:
        return ""
    found, digits = spread(values), DIGITS[key]
    said = f"{found.mean:,.{digits}f}" + ("" if found.sd is None else f" ± {found.sd:,.{digits}f}")
    return said if len(values) == len(done) else f"{said} ({len(values)} of {len(done)})"


def _less(done: list[dict], base: list[dict], key: str) -> str:
    values, others = ({each["seed"]: each[key] for each in side if each[key] is not None} for side in (done, base))
    both = sorted(values.keys() & others.keys())
    if not both:
        return ""
    digits = DIGITS[key]
    found = paired(values, others)
    if found is None:
        return f"{spread([values[seed] - others[seed] for seed in both]).mean:+,.{digits}f}"
    return f"{found.mean:+,.{digits}f} ({found.low:+,.{digits}f} to {found.high:+,.{digits}f})"
