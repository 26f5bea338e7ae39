"""A Markdown table of what runs reached, from the files in their directories.

    python -m scripts.results runs/demo/demo-0-20261124-120302 ...

Losses are nats per token, those of the weights that the target was asked of; seconds are those on the clock. A run that
was cut off has no summary.json and shows what its log has.
"""
import json
import sys
from pathlib import Path

import yaml

from data.arguments import Parser
from harness.rundir import mixed, read_log, state_of

COLUMNS = ("preset", "seed", "steps", "first val loss", "target", "reached", "last val loss", "bits per byte",
           "tokens/s", "device", "date")
NUMBERS = COLUMNS[1:9]


def row(run: Path) -> dict[str, str]:
    """A cell for each column, "" where the run says nothing. An error if it is no run directory."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    env = json.loads((run / "env.json").read_text()) | mixed(run)
    cut_off = state_of(run) == "running"
    summary = {} if cut_off else json.loads((run / "summary.json").read_text())
    train, val = read_log(run)
    steps = train[-1]["step"] if train else 0
    judged = "val_loss_avg" if config["target_on"] == "average" else "val_loss"
    cells = dict.fromkeys(COLUMNS, "") | {
        "preset": config["name"], "seed": str(config["seed"]), "device": device(env), "date": env["started"][:10],
        "steps": f"{steps:,}" if steps == config["steps"] else f"{steps:,} of {config['steps']:,}"}
    if val:
        cells["first val loss"], cells["last val loss"] = f"{val[0][judged]:.4f}", f"{val[-1][judged]:.4f}"
    if summary:
        cells["tokens/s"] = f"{summary['tokens_per_s']:,.0f}"
        cells["bits per byte"] = f"{summary['val_bits_per_byte']:.4f}" if "val_bits_per_byte" in summary else ""
    if config["target_val_loss"] is not None:
        cells["target"], reached = f"{config['target_val_loss']:g}", summary.get("target_step")
        cells["reached"] = "no" if reached is None else f"step {reached:,}, {summary['target_train_s']:.1f} s"
    return cells


def device(env: dict) -> str:
    """`8 x NVIDIA H100, bfloat16`; for a CPU its cores, of which each process has its share."""
    dtype = env["activation_dtype"].removeprefix("torch.")
    where = f"{env['world_size']} x {env['device']}" if env["gpus"] else f"{env['device']}, {env['cores']} cores"
    return f"{where}, {dtype}"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown. Columns that no run fills are left out; numbers stand on the right."""
    columns = [column for column in COLUMNS if any(each[column] for each in rows)]
    marks = ["-:" if column in NUMBERS else "-" for column in columns]
    cells = [columns, marks, *([each[column] for column in columns] for each in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    parser = Parser("python -m scripts.results", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        try:
            rows.append(row(run))
        except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
            print(f"error: {run} is no run directory ({error})", file=sys.stderr)
            return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
