"""Do these runs meet the rule, and are they better than those? With the statistics that say so.

    python -m scripts.verdict runs/muon-*                                       # the rule: the runs' own target
    python -m scripts.verdict runs/mine-* --rule track3 --baseline runs/muon-*
    python -m scripts.verdict runs/mine-* --baseline logs/record/*.txt --markdown > statistics.md

RUNS are run directories, or published logs of llm.c, track 1 or track 3: one configuration, a seed each, and not chosen
by their outcome. Refused, with what is wrong: a seed or a log twice, configurations, code, machines or numbers of steps
that differ, runs that did not finish, no ledger of the clock. A --baseline (may be repeated) is another such set.

Differences are runs less baseline. Seconds are compared where both sets name the same machine; they drift with what
else it does, so alternate the sets. "More runs" is how many it takes if mean and standard deviation stay as they are;
by chance it may take more, so a claim fixes its number first.
"""
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from data.arguments import Parser
from scripts import judge
from scripts.judge import Difference
from scripts.logs import LogError, Run, Validation, read
from scripts.verdict_text import markdown, shown, text

GPT2_VALIDATION = {"data.tokenizer": "gpt2", "val_tokens": 10_485_760}


class Rule(NamedTuple):
    name: str
    target: float
    scored: bool                    # by track 3's score, else by the t-test
    fixed: dict[str, object] = {}   # settings that the track does not leave to its runs
    forms: tuple[str, ...] = ()     # published logs that it may be asked of


RULES = {"track1": Rule("track1", 3.28, False, GPT2_VALIDATION, ("track 1", "llm.c")),
         "track2": Rule("track2", 2.92, False, GPT2_VALIDATION, ("track 1",)),      # whose logs look alike
         "track3": Rule("track3", 3.28, True, GPT2_VALIDATION | {"batch_tokens": 524_288, "seq_len": 1024},
                        ("track 3",))}


class Group(NamedTuple):
    """Runs that differ in their seed, at the step where they are judged."""

    name: str
    runs: list[Run]
    step: int
    losses: list[float]
    times: list[float] | None       # None: llm.c's logs have none

    @property
    def settings(self) -> dict[str, object]:
        return self.runs[0].settings

    @property
    def machine(self) -> dict[str, object]:
        return self.runs[0].machine


class Refused(ValueError):
    """Runs that no verdict may be given on; one line a reason."""


# ---- which runs may be judged together

def group(paths: Sequence[Path], step: int | None = None) -> Group:
    """The runs of `paths`, judged at their last step or at `step`; Refused with every reason not to."""
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(read(path))
        except LogError as error:
            problems.append(str(error))
    wrong = {run.path: problem for run in runs if (problem := problem_of(run, step))}
    problems += [*wrong.values(), *differences([run for run in runs if run.path not in wrong])]
    if problems:
        raise Refused("\n".join(problems))
    at_step = [validation(run, step) for run in runs]
    times = [v.train_s for v in at_step]
    name = runs[0].name if runs[0].form == "ours" or len(runs) > 1 else runs[0].path.stem
    return Group(name, runs, at_step[0].step, [v.loss for v in at_step], None if None in times else times)


def last_step(run: Run) -> int:
    return run.planned_steps or run.validations[-1].step


def validation(run: Run, step: int | None) -> Validation | None:
    """The one that is judged; None if there is none at that step."""
    asked = last_step(run) if step is None else step
    return next((v for v in run.validations if v.step == asked), None)


def problem_of(run: Run, step: int | None) -> str:
    """Why this run may not be judged; "" if it may."""
    if run.status != "finished":
        how = run.status if run.status.startswith("cut off") else f"its status is {run.status}"
        return f"{run.path}: not finished ({how}); finish it, or leave it out and say so"
    if run.form == "ours" and not run.ledger_s:
        return f"{run.path}: no ledger of the clock (ledger_s) in its summary.json, so that its seconds say nothing"
    if other := {key: values for key, values in run.changed.items() if key not in run.machine}:
        return f"{run.path}: resumed with other code ({in_words(other)}); run it anew"
    judged = validation(run, step)
    if judged is None:
        return f"{run.path}: no validation at step {last_step(run) if step is None else step:,}"
    return "" if math.isfinite(judged.loss) else f"{run.path}: its loss is {judged.loss}"


def differences(runs: list[Run]) -> list[str]:
    """Why runs are not one configuration on one machine with a seed each, a line for each reason."""
    problems, seen = [], {}
    for run in runs:
        key = run.validations if run.seed is None else run.seed
        if key in seen:
            what = "the same log" if run.seed is None else f"seed {run.seed}"
            problems.append(f"{what} twice, {seen[key]} and {run.path}: count one of them")
        seen.setdefault(key, run.path)
    for run in runs[1:]:
        first, pair = runs[0], f"{runs[0].path} and {run.path}"
        if run.form != first.form:
            problems.append(f"{pair}: logs of two kinds, {first.form} and {run.form}; compare them with --baseline")
            continue
        if last_step(run) != last_step(first):
            problems.append(f"{pair}: {last_step(first):,} and {last_step(run):,} steps; all must stop at one step "
                            "that no run chose for itself")
        if unlike := differing(first.settings, run.settings):
            problems.append(f"{pair}: mixed configurations, {shown(unlike)}; compare them with --baseline")
        if unlike := differing(first.machine, run.machine):
            problems.append(f"{pair}: mixed machines, {shown(unlike)}; run them on one")
    return problems


def in_words(changed: dict[str, str]) -> str:
    return ", ".join(f"{key}: {values}" for key, values in changed.items())


def differing(a: dict, b: dict) -> list[tuple[str, object, object]]:
    """(key, value there, value here) of every key that is not equal; a missing value is "nothing"."""
    pairs = [(key, a.get(key, "nothing"), b.get(key, "nothing")) for key in {**a, **b}]
    return [pair for pair in pairs if pair[1] != pair[2]]


def refuse_unlike(runs: Group, other: Group) -> None:
    """Losses compare on one validation text, where both sets say which that is, and between different runs."""
    for key in ("val_data.sha256", "val_tokens", "data.tokenizer"):
        a, b = runs.settings.get(key), other.settings.get(key)
        if None not in (a, b) and a != b:
            raise Refused(f"{runs.runs[0].path} and its baseline {other.runs[0].path} were validated on different text "
                          f"({key}: {a} and {b})")
    if {run.validations for run in runs.runs} & {run.validations for run in other.runs}:
        raise Refused(f"the baseline {other.runs[0].path} has a run that is among the runs too")


def times_not_compared(a: Group, b: Group) -> str:
    """Why seconds do not compare; "" where they do."""
    if a.times is None or b.times is None:
        return "a log without times"
    if not a.machine or not b.machine:
        return "a log without its machine"
    if changed := next((run.changed for run in [*a.runs, *b.runs] if run.changed), None):
        return f"resumed on another machine, {in_words(changed)}"
    known = {key: value for key, value in a.machine.items() if key in b.machine}
    unlike = differing(known, {key: b.machine[key] for key in known})
    return f"other machine, {shown(unlike)}" if unlike else ""


# ---- the verdict

def own_rule(runs: Group) -> Rule | None:
    """What the runs were to reach, where no --rule is given; None: they have no target."""
    if runs.runs[0].form != "ours":
        return RULES["track3" if runs.runs[0].form == "track 3" else "track1"]
    target = runs.runs[0].target
    return None if target is None else Rule(f"target {target:g}", target, False)


def verdict(runs: Group, baselines: list[Group], rule: Rule | None) -> dict:
    """Everything that is printed, as JSON has it."""
    several = len(baselines) > 1
    return {"rule": rule and rule._asdict(), "runs": about(runs, rule), "baselines": [
        about(other, rule) | {"name": f"baseline {f'{number} ' if several else ''}{other.name}",
                              "comparison": comparison(runs, other, rule)}
        for number, other in enumerate(baselines, 1)]}


def about(runs: Group, rule: Rule | None) -> dict:
    """One set of runs: its numbers, and what the rule says of it."""
    found = {"name": runs.name, "form": runs.runs[0].form, "paths": [str(run.path) for run in runs.runs],
             "seeds": [run.seed for run in runs.runs], "steps": runs.step, "losses": runs.losses,
             "loss": judge.spread(runs.losses)._asdict(), "train_s": runs.times,
             "time": runs.times and judge.spread(runs.times)._asdict() | {
                 "median": median(runs.times), "min": min(runs.times), "max": max(runs.times)},
             "machine": runs.machine, "ledger_s": [run.ledger_s for run in runs.runs]}
    if rule is not None:
        found |= by_rule(runs, rule)
    return found


def outside(runs: Group, rule: Rule) -> list[str]:
    """What of these runs the track does not leave to them."""
    other = [f"{key} is {runs.settings[key]}, {rule.name} fixes {value}" for key, value in rule.fixed.items()
             if runs.settings.get(key, value) != value]
    form = runs.runs[0].form
    return other + ([f"a log of {form}, {rule.name} fixes its own model"] if form not in ("ours", *rule.forms) else [])


def by_rule(runs: Group, rule: Rule) -> dict:
    unlike = outside(runs, rule)
    if rule.scored:
        score = judge.score(runs.losses, rule.target)
        p, passes, more = judge.p_of_score(score), judge.reaches(score), judge.more_score(runs.losses, rule.target)
    else:
        score, p = None, judge.p_below(runs.losses, rule.target)
        passes, more = p is not None and p < judge.LEVEL, judge.more_below(runs.losses, rule.target)
    return {"score": score, "p": p, "statistic_passes": passes, "more_runs": more, "outside_the_rule": unlike,
            "passes": passes and not unlike}


def comparison(runs: Group, other: Group, rule: Rule | None) -> dict:
    """The runs against a baseline; differences are runs less baseline."""
    by_seed = [{run.seed: loss for run, loss in zip(g.runs, g.losses) if run.seed is not None} for g in (runs, other)]
    scored = rule and rule.scored and not outside(runs, rule) and not outside(other, rule)
    score = judge.pairwise(runs.losses, runs.step, other.losses, other.step) if scored else None
    ours = runs.runs[0].form == other.runs[0].form == "ours"
    reason = times_not_compared(runs, other)
    return {"changed": differing(other.settings, runs.settings) if ours else None,
            "loss_mean": judge.spread(runs.losses).mean - judge.spread(other.losses).mean,
            "loss": as_dict(judge.welch(runs.losses, other.losses)), "loss_by_seed": as_dict(judge.paired(*by_seed)),
            "more_runs_each": judge.more_welch(runs.losses, other.losses),
            "pairwise_score": score, "pairwise_better": None if score is None else judge.reaches(score),
            "times_not_compared": reason, "time": None if reason else as_dict(judge.welch(runs.times, other.times))}


def as_dict(difference: Difference | None) -> dict | None:
    return difference and difference._asdict()


def main() -> int:
    parser = Parser("python -m scripts.verdict", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="run directories, or published logs")
    parser.add_argument("--baseline", type=Path, nargs="+", action="append", default=[], metavar="RUNS",
                        help="what to compare with")
    parser.add_argument("--rule", choices=RULES, help="default: the runs' own target; of published logs their track's")
    parser.add_argument("--step", type=int, help="judge the validation after this step of all runs, not their last")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="for a pull request")
    form.add_argument("--json", action="store_true", help="all numbers")
    args = parser.parse_args()
    try:
        runs = group(args.runs, args.step)
        baselines = [group(paths) for paths in args.baseline]
        for other in baselines:
            refuse_unlike(runs, other)
    except Refused as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    found = verdict(runs, baselines, RULES[args.rule] if args.rule else own_rule(runs))
    print(json.dumps(found, indent=1) if args.json else markdown(found) if args.markdown else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
