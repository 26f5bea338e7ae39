"""A race between update rules on the demo's model, data and schedule, one after the other, with equal steps.

    python -m scripts.race                          every rule of configs/demo/
    python -m scripts.race adamw muon splus steps=400 seed=1          these, with overrides for all

A laptop's version of a comparison, a run of about a minute each. The presets' learning rates come from a small sweep,
and one seed decides nothing. Data: python -m data.demo.
"""
import json
import subprocess
import sys
from pathlib import Path

from harness.merge import CONFIGS

RUNS = Path("runs/race")


def run(rule: str, overrides: list[str]) -> dict | None:
    """Train one preset; its summary, or None where it failed."""
    before = set(RUNS.glob(f"{rule}-*/summary.json"))
    done = subprocess.run([sys.executable, "train.py", "--config", f"demo/{rule}.yaml", f"runs_dir={RUNS}", *overrides],
                          stdout=subprocess.DEVNULL)
    made = set(RUNS.glob(f"{rule}-*/summary.json")) - before
    return json.loads(made.pop().read_text()) if done.returncode == 0 and made else None


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    overrides = [word for word in arguments if "=" in word]
    rules = [word for word in arguments if "=" not in word] or sorted(path.stem for path in CONFIGS.glob("demo/*.yaml"))
    if unknown := [rule for rule in rules if not (CONFIGS / "demo" / f"{rule}.yaml").exists()]:
        print(f"error: no preset configs/demo/{unknown[0]}.yaml", file=sys.stderr)
        return 2
    print("| rule | val loss | with averaged weights | target at step | ms a step |\n|-|-|-|-|-|", flush=True)
    for rule in rules:
        summary = run(rule, overrides)
        if summary is None:
            print(f"| {rule} | failed | | | |", flush=True)
            continue
        average = f"{summary['val_loss_avg']:.4f}" if "val_loss_avg" in summary else ""
        print(f"| {rule} | {summary['val_loss']:.4f} | {average} | {summary['target_step'] or 'not reached'} | "
              f"{1e3 * summary['train_s'] / summary['steps']:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
