"""Run a sweep: every trial of a YAML file, packed onto this machine or submitted to Slurm, and what they reached.

    python -m scripts.sweep configs/sweeps/lr.yaml                       # again: continues, finished trials are skipped
    python -m scripts.sweep configs/sweeps/lr.yaml --jobs 2              # two at once, each with half of the cores
    python -m scripts.sweep configs/sweeps/lr.yaml --gpus-per-trial 2
    python -m scripts.sweep configs/sweeps/lr.yaml --slurm partition=main time=60 gpus_per_node=1
    python -m scripts.sweep configs/sweeps/lr.yaml --dry-run | --table   # what it would do; the tables so far

The file is one of Weights & Biases' (docs/sweeps.md). Results: runs/sweeps/<file name>/results.jsonl. Ctrl-C or SIGTERM
has the trials save; the next call continues them. Exit code 0: all trials ended with a result, 1: some failed,
2: refused before anything started, 75: stopped, by a signal or because nothing more could be written.
"""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.arguments import Parser, at_least, or_refused


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m scripts.sweep", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a sweep file, or a preset")
    parser.add_argument("--out", type=Path, metavar="DIR", help="its folder; default runs/sweeps/<file name>")
    for name, what in (("jobs", "trials at once, at most"), ("cores-per-trial", "on a CPU; default all of them / jobs"),
                       ("gpus-per-trial", "default 1; above it trials run under torchrun")):
        parser.add_argument(f"--{name}", type=at_least(1), metavar="N", help=what)
    parser.add_argument("--slurm", nargs="*", metavar="KEY=VALUE",
                        help="submit to Slurm: partition= time= (minutes) nodes= gpus_per_node= ... (docs/slurm.md)")
    parser.add_argument("--dry-run", action="store_true", help="check every trial and say what would run")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished")
    args = parser.parse_args(argv)
    for name in ("jobs", "cores_per_trial", "gpus_per_trial", "slurm", "dry_run"):
        if args.table and getattr(args, name) not in (None, False):
            parser.error(f"--table runs nothing; leave out --{name.replace('_', '-')}")
    if args.slurm is not None and (args.cores_per_trial or args.gpus_per_trial):
        parser.error("--cores-per-trial and --gpus-per-trial divide this machine; with --slurm write "
                     "cpus_per_task=N or gpus_per_node=N after it")
    return args


def main(argv: list[str]) -> int:
    # ------------------------------------------------------------ 1. the file, and the machine
    args = arguments(argv)
    from harness.processes import EXIT_REQUEUE
    from harness.rundir import write_text
    from scripts.sweep import costs, file, pack, run, slurm
    from scripts.sweep.progress import Progress
    from scripts.sweep.results import ENDED, FINAL
    from scripts.sweep.show import Show
    sweep = file.read(args.file)
    out = args.out or Path("runs/sweeps") / args.file.stem
    if args.slurm is not None:
        place = slurm.cluster(args.slurm, args.jobs)
    elif not args.table:
        place = pack.slots(args.jobs, args.cores_per_trial, args.gpus_per_trial, pack.gpus_here(), pack.cores_here())

    reads = args.table or args.dry_run and out.exists()               # also while another process runs the sweep
    with look_at(out, args.dry_run) if reads else hold(out):
        # -------------------------------------------------------- 2. every trial of it
        # A crashed trial will be tried again, and might be the best, unless nothing will be run.
        search, trials, rows = planned(sweep, out, ENDED if args.table else FINAL)
        if args.table:
            print(tables_of(rows, sweep, out))
            return 0
        heading = heading_of(sweep, trials, rows, place, out)
        if args.dry_run:
            print(heading)
            for trial in trials:
                print(f"{trial.name}  {rows[trial.name]['status']:<10}  seed {trial.config.seed}  {trial.label}"
                      + ("  (baseline)" if trial.is_baseline else ""))
            return 0

        # -------------------------------------------------------- 3. the trials
        show = Show(len(trials))
        try:
            write_text(out / "sweep.yaml", file_again(sweep, args.file.read_text(encoding="utf-8")))
            show.say(heading)
            follow = Progress(sweep, out, trials, rows, search, show, run.end if args.slurm is None else slurm.end)
            called = follow.changed, follow.look, follow.more
            if args.slurm is not None:
                complete = slurm.run(trials, place, out, *called, show.say)
            else:
                complete = run.run(trials, place, out, *called)
            show.close()
            if complete and sweep.kind == "compare" and args.slurm is None and costs.is_due(out):
                print("measuring what the optimizers cost, a minute or two", flush=True)
                if problem := costs.measure_in(place[0], out):
                    print(f"warning: {problem}", file=sys.stderr)
        except OSError as error:                                      # no space left, say
            show.close()
            print(f"error: {error.filename or out}: {error.strerror}; mend that, and the same command continues the "
                  "sweep", file=sys.stderr)
            return EXIT_REQUEUE
        finally:
            show.close()

    # ------------------------------------------------------------ 4. the end
    print(tables_of(rows, sweep, out))
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


def planned(sweep, out: Path, ended: tuple[str, ...]) -> tuple:
    """(The Bayesian search or None, the trials that are known by now, their rows of results.jsonl by name).

    Args:
        ended: the statuses of trials that nothing more is awaited of.
    """
    from scripts.sweep import bayes, plan
    from scripts.sweep.results import row
    search = bayes.Search(sweep, out) if sweep.method == "bayes" else None
    trials = plan.plan(sweep, out, search.remembered if search else ())
    rows = {trial.name: row(trial, out) for trial in trials}
    if search is None or search.is_over(rows):
        reported = plan.reporting(sweep, list(rows.values()), out, ended)
        trials += reported
        rows |= {trial.name: row(trial, out) for trial in reported}
    return search, trials, rows


def heading_of(sweep, trials: list, rows: dict[str, dict], place, out: Path) -> str:
    from scripts.sweep.results import FINAL
    done = sum(row["status"] in FINAL for row in rows.values())
    configurations = len({row["configuration"] for row in rows.values()})
    return (f"{out}: {len(trials)} trials of {configurations} configurations, {done} done already; "
            + (f"{len(place)} at once on {', '.join(map(str, place))}" if isinstance(place, list) else f"on {place}")
            + (f"; {sweep.budget} configurations a preset in the end, as results come"
               if sweep.method == "bayes" else "")
            + (f"; then the best of each of {len(sweep.bases)} presets with {len(sweep.seeds)} seeds"
               if sweep.kind == "compare" else ""))


def tables_of(rows: dict[str, dict], sweep, out: Path) -> str:
    from scripts.sweep import costs
    from scripts.sweep.tables import markdown, tables
    return "\n\n".join(markdown(each) for each in tables(list(rows.values()), sweep, costs.read(out)))


def file_again(sweep, text: str) -> str:
    """The text of a sweep file; for a preset one that names it, since what it extends does not lie beside a copy."""
    name = str(sweep.path)
    return f"method: grid\nparameters: {{config: {{value: {json.dumps(name)}}}}}\n" if sweep.bases == (name,) else text


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """The sweep's folder for this process alone, from before its memory is read; gone again if nothing came into it.

    Raises:
        ConfigError: it cannot be made or written to, or another process runs the sweep.
    """
    from harness import rundir
    from harness.yaml_tree import ConfigError
    try:
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = rundir.hold(out)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}; give --out another folder") from None
    except rundir.ResumeError:
        raise ConfigError(f"{out}: another process is running this sweep") from None
    with lock:                                                        # the system gives it back however we end
        try:
            yield
        finally:
            with suppress(OSError):
                if [path.name for path in out.iterdir()] == [".lock"]:              # refused
                    (out / ".lock").unlink()
                    for path in made:
                        path.rmdir()


@contextmanager
def look_at(out: Path, to_write: bool) -> Iterator[None]:
    """The same, of a folder into which nothing is written now. Raises ConfigError where it could not be."""
    from harness.yaml_tree import ConfigError
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: Not a directory; give --out another folder")
    if to_write and not os.access(out, os.W_OK):
        raise ConfigError(f"{out}: Cannot be written to; give --out another folder")
    yield


def entry(argv: list[str]) -> int:
    try:
        return or_refused(main, argv)
    except KeyboardInterrupt:                   # while planning, measuring costs or printing: trials have their own
        from harness.processes import EXIT_REQUEUE
        print("stopped by a signal; the same command continues it", file=sys.stderr)
        return EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
