"""Run a sweep: every trial of a YAML file, packed onto this machine, and what they reached.

    python -m scripts.sweep configs/sweeps/lr.yaml                       # again: continues, finished trials are skipped
    python -m scripts.sweep configs/sweeps/lr.yaml --jobs 2              # two at once, each with half of the cores
    python -m scripts.sweep configs/sweeps/lr.yaml --gpus-per-trial 2
    python -m scripts.sweep configs/sweeps/lr.yaml --slurm partition=main time=60 gpus_per_node=1
    python -m scripts.sweep configs/sweeps/lr.yaml --dry-run | --table   # what it would do; the ranking so far

The file is one of Weights & Biases' (docs/sweeps.md). Results: runs/sweeps/<file name>/results.jsonl. Ctrl-C or SIGTERM
has the trials save; the next call continues them. Exit code 0: all trials ended with a result, 1: some failed,
2: refused before anything started, 75: stopped by a signal.
"""
import argparse
import fcntl
import shutil
import sys
from pathlib import Path

from data.arguments import Parser, at_least, or_refused


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m scripts.sweep", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a sweep file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="its folder; default runs/sweeps/<file name>")
    for name, what in (("jobs", "trials at once, at most"), ("cores-per-trial", "on a CPU; default all of them / jobs"),
                       ("gpus-per-trial", "default 1; above it trials run under torchrun")):
        parser.add_argument(f"--{name}", type=at_least(1), metavar="N", help=what)
    parser.add_argument("--slurm", nargs="*", metavar="KEY=VALUE",
                        help="submit to Slurm: partition= time= (minutes) nodes= gpus_per_node= ... (docs/slurm.md)")
    parser.add_argument("--dry-run", action="store_true", help="check every trial and say what would run")
    parser.add_argument("--table", action="store_true", help="print the ranking of what is finished")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    # ------------------------------------------------------------ 1. the file, and every trial of it
    args = arguments(argv)
    from harness.processes import EXIT_REQUEUE
    from harness.rundir import write_text
    from scripts.sweep import bayes, costs, file, halving, pack, plan, slurm
    from scripts.sweep.results import ENDED, FINAL, row, run_of, status_of, write_results
    from scripts.sweep.run import Going, end, run
    from scripts.sweep.show import Show
    from scripts.sweep.tables import markdown, tables

    def shown(rows: list[dict]) -> str:
        return "\n\n".join(markdown(each) for each in tables(rows, sweep, costs.read(out)))
    sweep = file.read(args.file)
    out = args.out or Path("runs/sweeps") / args.file.stem
    search = bayes.Search(sweep, out) if sweep.method == "bayes" else None
    trials = plan.plan(sweep, out, search.remembered if search else ())
    tuned = FINAL if not args.table else ENDED              # a crashed one would be tried again, and might be the best
    rows = {trial.name: row(trial, out) for trial in trials}
    if search is None or search.is_over(rows):
        trials += plan.reporting(sweep, list(rows.values()), out, tuned)
    if args.table:
        print(shown([row(trial, out) for trial in trials]))
        return 0

    # ------------------------------------------------------------ 2. the machine
    if args.slurm is not None:
        slots = slurm.cluster(args.slurm, args.jobs, args.cores_per_trial or args.gpus_per_trial)
    else:
        slots = pack.slots(args.jobs, args.cores_per_trial, args.gpus_per_trial, pack.gpus_here(), pack.cores_here())
    done = sum(status_of(trial) in FINAL for trial in trials)
    configurations = len({plan.configuration_id(trial.configuration) for trial in trials})
    heading = (f"{out}: {len(trials)} trials of {configurations} configurations, {done} done already; "
               + (f"{len(slots)} at once on {', '.join(map(str, slots))}" if args.slurm is None else f"on {slots}")
               + (f"; {sweep.budget} configurations a preset in the end, as results come" if search else "")
               + (f"; then the best of each of {len(sweep.bases)} presets with {len(sweep.seeds)} seeds"
                  if sweep.kind == "compare" else ""))
    if args.dry_run:
        print(heading)
        for trial in trials:
            print(f"{trial.name}  {status_of(trial):<10}  seed {trial.config.seed}  {trial.label}"
                  + ("  (baseline)" if trial.is_baseline else ""))
        return 0

    # ------------------------------------------------------------ 3. the trials
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")                                   # the system gives it back however we end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise file.ConfigError(f"{out}: another process is running this sweep") from None
    write_text(out / "sweep.yaml", args.file.read_text(encoding="utf-8"))
    rows = {trial.name: row(trial, out) for trial in trials}
    write_results(list(rows.values()), out)
    show = Show(len(trials))
    show.say(heading)
    early = halving.Halving(sweep, out, trials) if sweep.early_terminate else None

    def changed(trial: plan.Trial, what: str) -> None:
        rows[trial.name] = row(trial, out)
        write_results(list(rows.values()), out)
        if what.startswith("started"):
            rows[trial.name]["status"] = "running"                    # its run directory comes in seconds
        if keeps_none(trial) and (run := run_of(trial)):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        loss = rows[trial.name]["val_loss"]
        show.say(f"{trial.name[:8]}  seed {trial.config.seed}  {trial.label}: {what}"
                 + (f", val_loss {loss:.4f}" if what == "finished" else ""))

    def keeps_none(trial: plan.Trial) -> bool:                        # of tens of MB each, which nobody reads
        alone = trial.configuration.base == str(sweep.path)           # a preset by itself: its weights are the point
        return (rows[trial.name]["status"] in ("finished", "pruned") and not alone
                and "keep_checkpoints" not in trial.configuration.parameters)

    def look(going: list[Going], waiting: int) -> None:
        show.look(going, waiting)
        hopeless = early.hopeless([each.trial for each in going]) if early else ()
        for each in going:
            if each.trial in hopeless:
                (end if args.slurm is None else slurm.end)(each)

    def more() -> list[plan.Trial]:
        added = search.next_trials(rows) if search else []
        added = added or [trial for trial in plan.reporting(sweep, list(rows.values()), out, ENDED)
                          if trial.name not in rows]
        rows.update((trial.name, row(trial, out)) for trial in added)
        show.trials = len(rows)
        return added

    try:
        if args.slurm is not None:
            complete = slurm.run(trials, slots, out, changed, look, more, show.say)
        else:
            complete = run(trials, slots, out, changed, look, more)
        show.close()
        if complete and sweep.kind == "compare" and args.slurm is None and costs.is_due(out):
            print("measuring what the optimizers cost, a minute or two", flush=True)
            if problem := costs.measure_in(slots[0], out):
                print(f"warning: {problem}", file=sys.stderr)
    finally:
        show.close()
        lock.close()

    # ------------------------------------------------------------ 4. the end
    print(shown(list(rows.values())))
    if not complete:
        print(f"stopped by a signal; the same command continues it ({out})")
        return EXIT_REQUEUE
    failed = [each for each in rows.values() if each["status"] not in FINAL]
    for each in failed:
        print(f"error: trial {each['trial']}: {each['status']}; {each['error'] or 'it did not end'}", file=sys.stderr)
    reported = {each["base"] for each in rows.values() if each["seed"] in sweep.seeds}
    lost = [base for base in sweep.bases if base not in reported] if sweep.kind == "compare" else []
    for base in lost:
        print(f"error: {base}: no configuration has a {sweep.metric} at all tuning seeds, so none was reported",
              file=sys.stderr)
    return 1 if failed or lost else 0


def entry(argv: list[str]) -> int:
    try:
        return or_refused(main, argv)
    except KeyboardInterrupt:                   # while planning, measuring costs or printing: trials have their own
        print("stopped by a signal; the same command continues it", file=sys.stderr)
        return 75


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
