"""A page that ranks finished runs by their time to the target, apart for each kind of machine.

    python -m scripts.leaderboard                             # all of runs/ to runs/leaderboard/README.md and pictures
    python -m scripts.leaderboard runs/demo runs/reproduce --out page

RUNS_DIR are searched for run directories at any depth. A section is one class: device, number of processes, precision,
target and validation text; runs of two classes never meet. A row is one configuration with one code on one machine,
its runs a seed each. Every run that is not counted is listed, with the reason. A target counts as reached at the first
validation that meets it, and a row's time is given where all of its runs did; +- is the standard deviation.
"""
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from data.arguments import Parser

COLUMNS = ("preset", "n", "seeds", "steps", "last val loss", "steps to target", "seconds to target", "verdict", "date",
           "revision")
TEXT = ("preset", "seeds", "verdict", "date", "revision")


class Entry(NamedTuple):
    run: object                     # scripts.logs.Run
    env: dict


class Class(NamedTuple):
    machine: str                    # device x processes, precision
    target: float                   # nats a token
    text: str                       # digest of the validation shards, and how many tokens of them


class Row(NamedTuple):
    """One configuration, code and machine: a line of the table."""

    entries: list[Entry]            # a seed each, in order
    label: str

    @property
    def runs(self) -> list:
        return [entry.run for entry in self.entries]

    def reached(self) -> list:
        """The first validation of every run that met the target, of those that did."""
        firsts = [next((v for v in run.validations if v.loss <= run.target), None) for run in self.runs]
        return [v for v in firsts if v is not None]


def collect(folders: list[Path]) -> tuple[list[Entry], list[tuple[Path, str]]]:
    """(finished runs with a target, oldest first; what was left out and why)."""
    from scripts.logs import LogError, read
    from scripts.verdict import in_words, problem_of
    found, left_out = [], []
    paths = {file.parent.resolve(): file.parent for folder in folders for file in sorted(folder.rglob("env.json"))}
    for path in paths.values():
        try:
            run, env = read(path), json.loads((path / "env.json").read_text())
            env["started"], env["git_revision"], env["git_dirty"]
        except (LogError, KeyError, ValueError) as error:
            left_out.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        if problem := problem_of(run, None):
            left_out.append((path, problem.removeprefix(f"{path}: ").partition("; finish it")[0]))
        elif run.changed:
            left_out.append((path, f"resumed on another machine ({in_words(run.changed)})"))
        elif run.target is None:
            left_out.append((path, "no target_val_loss to measure the time to"))
        else:
            found.append(Entry(run, env))
    return sorted(found, key=lambda entry: entry.env["started"]), left_out


def class_of(entry: Entry) -> Class:
    from scripts.results import device
    run, env = entry
    world = env["world_size"]
    where = device(env) if env["gpus"] else f"{world} process{'es' * (world > 1)} on {device(env)}"
    return Class(where, run.target, f"{run.settings['val_data.sha256'][:12]}, {run.settings['val_tokens']:,} tokens")


def rows_of(entries: list[Entry]) -> tuple[list[Row], list[tuple[Path, str]]]:
    """The runs of one class as rows, fastest first; and what was left out: a seed again, of which the first counts."""
    from scripts.verdict import differing, last_step
    sets, left_out = [], []
    for entry in entries:
        run = entry.run
        same = next((known for known in sets for other in [known[0].run]
                     if other.name == run.name and last_step(other) == last_step(run)
                     and not differing(other.settings, run.settings) and not differing(other.machine, run.machine)),
                    None)
        if same is None:
            sets.append([entry])
        elif first := next((known for known in same if known.run.seed == run.seed), None):
            left_out.append((run.path, f"seed {run.seed} of the same configuration again; the first counts, "
                             f"{first.run.path}"))
        else:
            same.append(entry)
    names, rows = [known[0].run.name for known in sets], []
    for name, known in zip(names, sets):
        began = f" {known[0].env['started'][:16].replace('T', ' ')}" * (names.count(name) > 1)
        rows.append(Row(sorted(known, key=lambda entry: entry.run.seed), name + began))
    return sorted(rows, key=rank), left_out


def rank(row: Row) -> tuple:
    """By mean seconds to the target; rows of which not every run reached it follow, by their last loss."""
    reached = row.reached()
    every = len(reached) == len(row.runs)
    return (not every, mean([v.train_s for v in reached]) if every else 0.0,
            mean([run.validations[-1].loss for run in row.runs]))


def mean(values: list[float]) -> float:
    from scripts.judge import spread
    return spread(values).mean


# ---- the table

def cells(row: Row) -> list[str]:
    reached, first, n = row.reached(), row.entries[0].env, len(row.runs)
    every = len(reached) == n
    days = sorted({entry.env["started"][:10] for entry in row.entries})
    revision = f"{first['git_revision'] or 'not known':.9}" + " with changes" * bool(first["git_dirty"])
    none = f"{len(reached)} of {n} reached it" if reached else "not reached"
    return [row.label, str(n), " ".join(str(run.seed) for run in row.runs), f"{row.runs[0].planned_steps:,}",
            shown([run.validations[-1].loss for run in row.runs], ".4f"),
            shown([v.step for v in reached], ",.0f") if every else none,
            shown([v.train_s for v in reached], ",.1f") if every else "",
            said(row), " to ".join(days[::max(1, len(days) - 1)]), revision]


def shown(values: list[float], form: str) -> str:
    from scripts.judge import spread
    found = spread(values)
    return f"{found.mean:{form}}" + ("" if found.sd is None else f" ± {found.sd:{form}}")


def said(row: Row) -> str:
    """What the rule of the row's track says: track 3's for its presets, track 1's at 3.28, or else their own target."""
    from scripts.verdict import RULES, Group, by_rule, own_rule
    from scripts.verdict_text import p_text
    runs = row.runs
    group = Group(runs[0].name, runs, runs[0].planned_steps, [run.validations[-1].loss for run in runs], None)
    rule = RULES["track3"] if runs[0].name.startswith("track3-") else own_rule(group)
    if rule.target == RULES["track1"].target and not rule.scored:
        rule = RULES["track1"]
    found = by_rule(group, rule)
    if found["p"] is None:
        return f"{rule.name}: no test of {'one run' if len(runs) == 1 else 'equal losses'}"
    test = f"score {found['score']:.4f}" if rule.scored else f"p = {p_text(found['p'])}"
    outside = f" ({found['outside_the_rule'][0]})" if found["outside_the_rule"] else ""
    return f"{rule.name}: {test}, {'passes' if found['passes'] else 'does not pass'}{outside}"


def section(of: Class, rows: list[Row], pictures: dict[str, str]) -> str:
    marks = ["-" if column in TEXT else "-:" for column in COLUMNS]
    lines = [f"| {' | '.join(line)} |" for line in (COLUMNS, marks, *map(cells, rows))]
    return "\n".join([f"## {of.machine}: target {of.target:g}", "", f"Validation text {of.text}.", "", *lines, "",
                      *(f"![{title}]({file})" for title, file in pictures.items())])


# ---- the pictures

def bars(rows: list[Row], title: str, out: Path) -> bool:
    """Seconds to the target, with the steps; False where no row has all runs there, and no picture is made."""
    from scripts.judge import spread
    rows = [row for row in rows if len(row.reached()) == len(row.runs)][::-1]
    if not rows:
        return False
    times = [spread([v.train_s for v in row.reached()]) for row in rows]
    figure, axes = figure_of(1, (7.5, 1.2 + 0.3 * len(rows)))
    axes = axes[0]
    axes.barh(range(len(rows)), [time.mean for time in times], height=0.7, color="0.75")
    for place, (row, time) in enumerate(zip(rows, times)):
        if time.sd is not None:
            axes.errorbar(time.mean, place, xerr=time.sd, color="black", lw=1.0, capsize=3)
        steps = shown([v.step for v in row.reached()], ",.0f")
        axes.annotate(f"{time.mean:,.1f} s, {steps} steps" + f", n = {len(row.runs)}" * (len(row.runs) > 1),
                      (time.mean + (time.sd or 0.0), place), (5, 0), textcoords="offset points", va="center",
                      fontsize=8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set(xlabel="seconds on the clock until the target", title=title, ylim=(-0.8, len(rows) - 0.2),
             xlim=(0, 1.4 * max(time.mean + (time.sd or 0.0) for time in times)))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, out)
    return True


def curves(rows: list[Row], target: float, title: str, out: Path) -> None:
    """Validation losses over steps and over seconds; means of a row's runs where they were validated alike."""
    import matplotlib
    figure, axes = figure_of(2, (11, 5.2))
    colours = matplotlib.colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    styles = ("-", "--", ":")
    ends = []
    for i, row in enumerate(rows):
        common = set.intersection(*({v.step for v in run.validations} for run in row.runs))
        points = [[v for v in run.validations if v.step in common] for run in row.runs]
        steps = [v.step for v in points[0]]
        losses, times = ([mean(list(each)) for each in zip(*([getattr(v, key) for v in one] for one in points))]
                         for key in ("loss", "train_s"))
        look = {"color": colours[i % len(colours)], "ls": styles[i // len(colours) % len(styles)], "lw": 1.2}
        axes[0].plot(steps, losses, label=row.label + f" ({len(row.runs)})" * (len(row.runs) > 1), **look)
        axes[1].plot(times, losses, **look)
        ends += [losses[0], losses[-1]]
    low, high = min([*ends, target]), max(ends)
    top = min(high, target + 2 * (target - low) + 0.1 * target)     # the first steps would leave the rest no room
    for each, name in zip(axes, ("step", "seconds on the clock")):
        each.axhline(target, color="black", lw=0.8, ls="--", label=f"target {target:g}")
        each.set(xlabel=name, ylim=(low - 0.05 * (top - low), top))
    axes[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, out)


def figure_of(columns: int, size: tuple[float, float]):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, columns, figsize=size, sharey=columns > 1, squeeze=False, layout="constrained")
    return figure, axes[0]


def save(figure, out: Path) -> None:
    import matplotlib.pyplot as plt
    part = out.with_name(f".{out.stem}.part.png")
    figure.savefig(part, dpi=130)
    plt.close(figure)
    part.replace(out)


# ---- the page

def page(folders: list[Path], out: Path) -> tuple[int, int]:
    """Write `out`/README.md and its pictures; (runs on it, runs left out)."""
    from harness.rundir import write_text
    entries, left_out = collect(folders)
    classes: dict[Class, list[Entry]] = {}
    for entry in entries:
        classes.setdefault(class_of(entry), []).append(entry)
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for of, members in sorted(classes.items()):
        rows, again = rows_of(members)
        left_out += again
        slug = re.sub(r"[^a-z0-9.]+", "-", f"{of.machine} {of.target:g} {of.text[:6]}".lower()).strip("-")
        title = f"{of.machine}: target {of.target:g}"
        pictures = {"time to target": f"{slug}-bars.png"} if bars(rows, title, out / f"{slug}-bars.png") else {}
        curves(rows, of.target, title, out / f"{slug}-curves.png")
        sections.append(section(of, rows, {**pictures, "validation losses": f"{slug}-curves.png"}))
    listed = [f"- `{path}`: {why}" for path, why in sorted(left_out)] or ["None."]
    on_it = len(entries) - sum(path in {entry.run.path for entry in entries} for path, _ in left_out)
    head = ["# Leaderboard", "", f"Made from {on_it} finished runs in {', '.join(map(str, folders))} by "
            f"`python -m scripts.leaderboard`. Losses are nats per token; seconds are those on the clock. Only runs on "
            "one kind of machine, to one target on one validation text, are ranked together."]
    write_text(out / "README.md", "\n\n".join(["\n".join(head), *sections, "## Left out", "\n".join(listed)]) + "\n")
    return on_it, len(left_out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m scripts.leaderboard", __doc__)
    parser.add_argument("folders", type=Path, nargs="*", metavar="RUNS_DIR", help="default: runs")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"), metavar="DIR",
                        help="for README.md and its pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    folders = args.folders or [Path("runs")]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing or not any(True for folder in folders for _ in folder.rglob("env.json")):
        print(f"error: {missing[0]}: no such folder" if missing else
              f"error: no run directory in {', '.join(map(str, folders))}; train one, or name their folder",
              file=sys.stderr)
        return 2
    try:
        on_it, left_out = page(folders, args.out)
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{args.out / 'README.md'}: {on_it} runs, {left_out} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
