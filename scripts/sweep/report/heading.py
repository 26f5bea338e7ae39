"""What was run, where, with what: the same facts at the head of report.html and report.md."""
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from scripts.sweep.parameter import in_yaml
from scripts.sweep.report.folder import Folder, finite, in_words, machine, missing, started, warnings
from scripts.sweep.tables.cells import titled

KINDS = {"compare": "Comparison of tuned presets", "ladder": "Ablation ladder", "sweep": "Sweep"}


class Heading(NamedTuple):
    title: str
    what: str                           # a sentence
    commands: list[str]                 # that make it again, and this report
    facts: list[tuple[str, str]]
    warnings: list[str]
    missing: list[str]


def heading(folder: Folder) -> Heading:
    sweep, rows = folder.sweep, folder.rows
    times, place = started(folder), folder.path
    states = Counter(row["status"].replace("_", " ") for row in rows)
    configurations = len({row["configuration"] for row in rows})
    seeds = ", ".join(str(seed) for seed in sweep.seeds) or "the preset's"
    facts = [("presets", ", ".join(dict.fromkeys(row["base"] for row in rows))),
             ("trials", ", ".join(f"{count} {state}" for state, count in states.items())),
             ("seeds", seeds + (f"; tuning: {', '.join(map(str, sweep.tuning_seeds))}" if sweep.tuning_seeds else "")),
             ("ranked by", titled([sweep.metric])[0] + (", the highest first" if sweep.maximize else ""))]
    if sweep.budget is not None:
        facts.append(("search", f"{sweep.method}, {sweep.budget} configurations a preset"))
    if sweep.early_terminate:
        facts.append(("halving", f"tuning trials may end early: {in_yaml(sweep.early_terminate)}"))
    facts += [(in_words(key), ", ".join(values)) for key, values in machine(folder).items()]
    if times:
        facts.append(("started", times[0] if times[0] == times[1] else f"{times[0]} to {times[1]}"))
    seconds = sum(finite(row["train_s"] for row in rows))
    facts.append(("on the clock", f"{seconds:,.0f} s of training, all trials together"))
    command = ["python", "-m", "scripts.sweep", str(folder.file)]
    if place != Path("runs/sweeps") / folder.file.stem:
        command += ["--out", str(place)]
    return Heading(place.resolve().name, f"{KINDS[sweep.kind]}: {len(rows)} trials of {configurations} configurations.",
                   [shlex.join(command), shlex.join(["python", "-m", "scripts.report", str(place)])], facts,
                   warnings(folder), missing(folder))
