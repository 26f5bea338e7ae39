"""Write a finished run as the one text file that the speedrun takes: source, versions, steps.

    python -m scripts.speedrun_log RUN                                # RUN/<its name>.txt, in track 3's form
    python -m scripts.speedrun_log RUN --form track1 --out log.txt    # milliseconds, four decimals, a line a step

The three parts end with lines of 100 `=`. The first is a shell archive of the program and its resolved configuration as
they were when the run began, each file as it is:

    sed '/^=\\{100\\}$/,$d' LOG | sh                                   # writes them into a folder of the run's name
    torchrun --standalone --nproc_per_node=8 train.py --config config.yaml         # there; data.train=... for shards

The losses are those of the weights that the run's target is asked of, the times those on its clock. A log is written
only if `scripts.logs` reads from it what it reads from the run.
"""
import json
import os
import shlex
import sys
from pathlib import Path

from data.arguments import Parser

RULE = "=" * 100
END = "__END_OF_FILE__"             # of a file in the archive
PROGRAM = ("train.py", "model/**/*.py", "optim/**/*.py", "data/**/*.py", "harness/**/*.py", "requirements.txt")
FORMS = ("track1", "track3")


class ExportError(ValueError):
    """One line: what is wrong, where, what to do."""


def archive(run: Path, launch: str) -> str:
    """A shell script that writes the run's program and configuration into a folder of its name."""
    source = run / "source"
    files = {file.relative_to(source): file for pattern in PROGRAM for file in sorted(source.glob(pattern))}
    if Path("train.py") not in files:
        raise ExportError(f"{run}: no source/train.py in it, and a submission needs its source")
    folders = sorted({str(name.parent) for name in files} - {"."})
    lines = [f"# The source and configuration of {run.name}, as a shell archive: all up to the line of = can be",
             "# given to sh, which writes it into a new folder of that name. There the run is repeated by",
             f"#     {launch}",
             f"mkdir {shlex.quote(run.name)} && cd {shlex.quote(run.name)} && mkdir -p {' '.join(folders)} || exit"]
    for name, file in {**files, Path("config.yaml"): run / "config.yaml"}.items():
        text = file.read_text(encoding="utf-8")
        content = text.removesuffix("\n").split("\n") if text else []
        if reserved := {RULE, END} & set(content):
            raise ExportError(f"{file}: has a line {reserved.pop()!r}, which ends a part of such a log; change it")
        lines += [f"cat > {name} <<'{END}'", *content, END]
    return "\n".join(lines)


def versions(env: dict, summary: dict) -> str:
    """What the run ran on, in the words that readers of the speedrun's logs look for."""
    known, revision = env["versions"], env["git_revision"] or "not known"
    revision += " with changes" * bool(env["git_dirty"])
    cuda = f"compiled for CUDA {known['cuda']}" if known["cuda"] else "compiled without CUDA"
    lines = [f"Running Python {known['python']}",
             f"Running PyTorch {known['torch']} {cuda} on {env['device']} with world_size {env['world_size']}",
             f"Running Triton version {known['triton']}" if known["triton"] else "Running without Triton",
             f"{env['platform']}, {env['cores']} cores, {len(env['gpus'])} GPUs; numpy {known['numpy']}",
             f"{env['activation_dtype']} activations, attention {env['attention']}, "
             f"{'compiled' if env['compiled'] else 'not compiled'}",
             f"git revision {revision}, started {env['started']}, seed {summary['seed']}",
             *(f"{key.removesuffix('_data')} data: {data['tokens']:,} tokens in {data['files']} files, "
               f"sha256 {data['sha256']}" for key, data in env.items() if key in ("train_data", "val_data")),
             "seconds by activity, training alone on the clock: "
             + ", ".join(f"{key} {seconds:.3f}" for key, seconds in summary["ledger_s"].items())]
    return "\n".join(lines)


def track1(run) -> list[str]:
    """`step:125/3250 val_loss:4.1234 train_time:12345ms step_avg:98.76ms`; step_avg is the mean of all steps so far."""
    from harness.rundir import read_log
    points = [(line["step"], "", line["train_s"]) for line in read_log(run.path)[0]]
    points += [(v.step, f" val_loss:{v.loss:.4f}", v.train_s) for v in run.validations]
    return [f"step:{step}/{run.planned_steps}{loss} train_time:{1e3 * train_s:.0f}ms "
            f"step_avg:{1e3 * train_s / max(step, 1):.2f}ms" for step, loss, train_s in sorted(points)]


def track3(run) -> list[str]:
    """The lines that `log: [speedrun]` writes while a run trains."""
    from harness.mirrors import SpeedrunLines
    lines = []
    sink = SpeedrunLines(Path(os.devnull), run.planned_steps, lines.append, None, 0.0)
    for v in run.validations:
        sink.write(v.step, v.train_s, val_loss=v.loss)
    sink.close()
    return lines


def speedrun_log(run, form: str) -> str:
    """The text of a run's log, `run` as scripts.logs.read gives it; ExportError where it may not be submitted."""
    if run.form != "ours":
        raise ExportError(f"{run.path}: a published log already; give a run directory")
    if run.status != "finished":
        raise ExportError(f"{run.path}: not finished, its status is {run.status}; "
                          f"`python train.py --resume {run.path}` goes on with it")
    if run.changed:
        raise ExportError(f"{run.path}: resumed with other code or on another machine ("
                          + ", ".join(run.changed) + "), which one log cannot say; run it anew")
    if not run.validations or run.validations[-1].step != run.planned_steps:
        raise ExportError(f"{run.path}: no validation at its last step {run.planned_steps:,}; its log.jsonl is damaged")
    env = json.loads((run.path / "env.json").read_text())
    summary = json.loads((run.path / "summary.json").read_text())
    world = env["world_size"]
    launch = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    steps = {"track1": track1, "track3": track3}[form](run)
    if memory := summary["peak_memory_bytes"]:
        steps.append(f"peak memory allocated: {memory / 2**20:.0f} MiB")
    return "\n".join([archive(run.path, f"{launch} train.py --config config.yaml"), RULE, versions(env, summary), RULE,
                      *steps]) + "\n"


def write_checked(out: Path, text: str, run, form: str) -> None:
    """Write the text if its validations read back as the run's, to the digits of the form; else ExportError."""
    from scripts.logs import read
    loss_error, time_error = {"track1": (5.1e-5, 5.1e-4), "track3": (5.1e-6, 5.1e-4)}[form]
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        back = read(part)
        same = (back.form == form.replace("track", "track ") and back.planned_steps == run.planned_steps
                and [v.step for v in back.validations] == [v.step for v in run.validations]
                and all(abs(a.loss - b.loss) <= loss_error and abs(a.train_s - b.train_s) <= time_error
                        for a, b in zip(back.validations, run.validations)))
        if not same:
            raise ExportError(f"{run.path}: its log does not read back to its numbers, so it is not written; does a "
                              "line of its source begin with `step:` or `s:`?")
        part.replace(out)
    finally:
        if part.exists():
            part.unlink()


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m scripts.speedrun_log", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--form", choices=FORMS, default="track3", help="of the lines of steps (default: track3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/<its name>.txt")
    args = parser.parse_args(argv)
    run_path = args.run.resolve()
    out = args.out or args.run / f"{run_path.name}.txt"
    try:
        from scripts.logs import LogError, read              # torch is loaded here
        try:
            run = read(run_path)
            text = speedrun_log(run, args.form)
            write_checked(out, text, run, args.form)
        except LogError as error:
            raise ExportError(str(error)) from None
        except (KeyError, UnicodeDecodeError) as error:
            raise ExportError(f"{args.run}: a damaged run directory ({error!r})") from None
        except OSError as error:
            raise ExportError(f"{error.filename or out}: {error.strerror}") from None
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(run.validations)} validations, {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
