"""Report a sweep; or draw runs over the curve of the published record that they repeat, and say step by step whether
they lie with it.

    python -m scripts.report runs/sweeps/demo_race                             # or configs/sweeps/demo_race.yaml
    python -m scripts.report runs/04-muon-0-20261124-120302 ...
    python -m scripts.report LOG.txt --record track3-muon --out report.svg     # published logs are read, too

A sweep's report comes from its folder alone, which may be unfinished or moved, and goes there: report.html (curves to
zoom into, tables to sort, every trial's configuration; it needs no network), report.md and pictures for papers.

RUN is a run directory or a published log (scripts/logs.py); the losses are those of the weights that its target is
asked of. The record is the one whose preset the run's name is; its curve is in configs/records/curves/.

Where several runs of a record were published, a loss lies inside if it is within three standard deviations of their
mean (deviations of one more run from a mean of n). Where there is one curve alone, only the end point is judged,
against three times .0040, the standard deviation between seeds of that time; what comes before is for the eye.
"""
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from data.arguments import Parser, or_refused

CURVES = Path(__file__).resolve().parent.parent / "configs" / "records" / "curves"
SIGMAS = 3
END_SD = 0.0040                     # of 45 runs of two records of late 2024, pooled; the earlier ones have none
ROUNDED = 1e-4                      # what curves and logs are rounded to, and then some: step 0 has no spread at all
FORMATS = (".png", ".svg", ".pdf")


class ReportError(ValueError):
    """One line: what is wrong, where, what to do."""


class Point(NamedTuple):
    step: int
    loss: float                     # the run's, nats a token
    published: float                # the mean where several runs were published
    sd: float | None                # of the difference between the two; None: not judged

    @property
    def inside(self) -> bool | None:
        return None if self.sd is None else abs(self.loss - self.published) <= SIGMAS * self.sd + ROUNDED


def record_of(name: str) -> dict:
    """The published curve of the record or preset `name`, with that of its file as `name`.

    Raises:
        ReportError: there is none.
    """
    known = {path.stem: json.loads(path.read_text()) for path in sorted(CURVES.glob("*.json"))}
    for stem, curve in known.items():
        if name == stem or name in curve["presets"]:
            return {**curve, "name": stem}
    raise ReportError(f"no published curve for {name!r}: give --record, one of {', '.join(known)}")


def compare(run, record: dict) -> list[Point]:
    """The run's validations at the steps of the record's curve.

    Raises:
        ReportError: the run is of another length than the record, so that its schedules are others, or has none of
            its steps.
    """
    if run.planned_steps not in (None, record["result_step"], record["steps"][-1]):
        raise ReportError(f"{run.path}: a run of {run.planned_steps:,} steps, but {record['name']} has "
                          f"{record['result_step']:,}: at the same step their learning rates differ; run it in full")
    several = record.get("several")
    published = dict(zip(record["steps"], record["val_loss"]))
    spread = {}
    if several:
        published = dict(zip(several["steps"], several["mean"]))
        spread = {step: sd * (1 + 1 / several["runs"]) ** .5 for step, sd in zip(several["steps"], several["sd"])}
    elif record["result_step"] in published:
        spread = {record["result_step"]: END_SD}
    points = [Point(v.step, v.loss, published[v.step], spread.get(v.step))
              for v in run.validations if v.step in published]
    if not points:
        steps = ", ".join(str(v.step) for v in run.validations[:4]) or "none"
        raise ReportError(f"{run.path}: no validation at a step of {record['name']}, which has "
                          f"{', '.join(map(str, record['steps'][:4]))}, ...; the run's: {steps}")
    return points


def verdict(run, record: dict, points: list[Point]) -> str:
    """What the points say together, in a line."""
    judged, end = [p for p in points if p.sd is not None], points[-1]
    who = f"{run.path}" + (f" ({run.status})" if run.status != "finished" else "")
    outside = [f"{p.step:,}" for p in judged if not p.inside]
    gap = f"{end.loss - end.published:+.4f}"
    if not judged:
        return (f"{who}: step {end.step:,} is {gap} from the published curve; nothing is judged before step "
                f"{record['result_step']:,}, for there is one curve alone")
    if "several" not in record:
        return (f"{who}: the end point {end.loss:.4f} is {gap} from the published one, "
                f"{'OUTSIDE' if outside else 'inside'} {SIGMAS} x {END_SD:.4f}; earlier points are for the eye")
    return (f"{who}: {len(judged) - len(outside)} of {len(judged)} validations inside {SIGMAS} standard deviations of "
            f"{record['several']['runs']} runs" + (f"; OUTSIDE at step {', '.join(outside)}" if outside else "")
            + f"; step {end.step:,} is {gap} from their mean")


def table(compared: list[list[Point]], names: list[str]) -> str:
    """A line a step: the published loss and its spread, and every run's loss, distance and place."""
    by_step = [{p.step: p for p in points} for points in compared]
    width = max(30, *map(len, names))
    lines = [f"{'step':>7}  {'published':>9}  {'sd':>6}" + "".join(f"  {name:<{width}}" for name in names)]
    for step in sorted({step for points in by_step for step in points}):
        there = [points.get(step) for points in by_step]
        one = next(p for p in there if p is not None)
        sd = f"{one.sd:.4f}" if one.sd is not None else ""
        lines.append((f"{step:>7,}  {one.published:>9.4f}  {sd:>6}"
                      + "".join(f"  {_cell(p):<{width}}" for p in there)).rstrip())
    return "\n".join(lines)


def _cell(p: Point | None) -> str:
    if p is None:
        return "-"
    place = {None: "", True: "inside", False: "OUTSIDE"}[p.inside]
    return f"{p.loss:.4f} {p.loss - p.published:+.4f}  {place}"


def draw(runs: list, names: list[str], record: dict, out: Path) -> None:
    """Curves above, distances from the published curve below; written under another name first."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    several = record.get("several")
    steps, published = ((several["steps"], several["mean"]) if several else (record["steps"], record["val_loss"]))
    of_step = dict(zip(steps, published))
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6.4), sharex=True, height_ratios=(3, 2),
                                          layout="constrained")
    label = f"published, mean of {several['runs']}" if several else "published"
    above.plot(steps, published, color="black", lw=1.0, label=label)
    below.axhline(0, color="black", lw=1.0)
    if several:
        band = [SIGMAS * sd * (1 + 1 / several["runs"]) ** .5 for sd in several["sd"]]
        below.fill_between(steps, [-b for b in band], band, color="0.85", label=f"{SIGMAS} standard deviations")
    elif record["result_step"] in of_step:
        below.errorbar([record["result_step"]], [0], yerr=SIGMAS * END_SD, color="0.6", capsize=3,
                       label=f"{SIGMAS} x {END_SD:.4f}, at the end alone")
    largest = 0.0
    for run, name in zip(runs, names):
        common = [v for v in run.validations if v.step in of_step]
        above.plot([v.step for v in run.validations], [v.loss for v in run.validations], marker=".", ms=3, lw=1.0,
                   label=name)
        gaps = [v.loss - of_step[v.step] for v in common]
        below.plot([v.step for v in common], gaps, marker=".", ms=4, lw=0.9)
        later = [abs(gap) for v, gap in zip(common, gaps) if v.step >= 0.1 * steps[-1]]
        largest = max([largest, *filter(math.isfinite, later)])
    height = 1.2 * max(largest, SIGMAS * END_SD)             # the first steps spread too far to leave room for others
    below.set(xlabel="step", ylabel="from the published", ylim=(-height, height))
    low = min(published)
    above.set(ylabel="validation loss (nats per token)", ylim=(low - 0.02, low + 1.2), title=record["name"])
    above.legend(frameon=False)
    if below.get_legend_handles_labels()[0]:
        below.legend(frameon=False)
    part = out.with_name(f"{out.stem}.part{out.suffix}")
    figure.savefig(part, dpi=130)
    plt.close(figure)
    part.replace(out)


def report_sweep(args) -> int:
    """The report of one sweep, given by its folder or by its file."""
    from harness.yaml_tree import ConfigError
    from scripts.sweep.report import write                   # torch is loaded here
    given = args.runs[0]
    if len(args.runs) > 1 or args.record or args.out:
        raise ConfigError(f"{given} is a sweep: report one at a time, without --record and --out")
    folder = given
    if not given.is_dir():
        folder = given.parent if (given.parent / "results.jsonl").exists() else Path("runs/sweeps") / given.stem
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; run the sweep first, or give the folder it has (--out)")
    print("\n".join(map(str, write(folder, None if given.is_dir() else given))))
    return 0


def check_runs(paths: list[Path]) -> None:
    """Raises ReportError: a folder that is no run's, with the sweeps in it."""
    for path in paths:
        if path.is_dir() and not (path / "config.yaml").exists():
            sweeps = sorted(each.parent.name for each in path.glob("*/results.jsonl"))
            raise ReportError(f"{path}: neither a sweep (results.jsonl) nor a run (config.yaml) is in it"
                              + (f"; give one of its folders, {', '.join(sweeps)}" if sweeps else ""))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m scripts.report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a sweep's folder or file, a run "
                        "directory or a published log")
    parser.add_argument("--record", metavar="NAME", help="a file of configs/records/curves/, or a preset; default: "
                        "the run's own preset")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture, .png, .svg or .pdf; default: report.png "
                        "in the first run's directory, or here for a log")
    args = parser.parse_args(argv)
    if args.runs[0].suffix in (".yaml", ".yml") or any((args.runs[0] / name).exists()
                                                       for name in ("sweep.yaml", "results.jsonl")):
        return or_refused(report_sweep, args)
    out = args.out or (args.runs[0] if args.runs[0].is_dir() else Path()) / "report.png"
    try:
        check_runs(args.runs)
        if out.suffix not in FORMATS or not out.resolve().parent.is_dir():
            raise ReportError(f"--out {out}: give a file ending in {', '.join(FORMATS)} in a folder that is there")
        named = record_of(args.record) if args.record else None
        from scripts.logs import LogError, read              # torch is loaded here
        try:
            runs = [read(path) for path in args.runs]
        except LogError as error:
            raise ReportError(str(error)) from None
        records = [named or record_of(run.name) for run in runs]
        if len({record["name"] for record in records}) > 1:
            listed = ", ".join(dict.fromkeys(record["name"] for record in records))
            raise ReportError(f"runs of several records, {listed}: report one record at a time, or give --record")
        compared = [compare(run, records[0]) for run in runs]
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = records[0]
    names = [run.path.resolve().name for run in runs]
    draw(runs, names, record, out)
    print(f"record   {record['name']}, {record['result_step']:,} steps, {record['hardware']}, torch {record['torch']}\n"
          f"source   {record['source']}\n")
    print(table(compared, names), end="\n\n")
    for run, points in zip(runs, compared):
        print(verdict(run, record, points))
    print(f"picture  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
