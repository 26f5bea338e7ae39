"""What the optimizers of a comparison cost: milliseconds and bytes of every configuration that was reported.

    python -m scripts.sweep.costs runs/sweeps/demo_race                 # measures again

A comparison measures them itself when its trials have ended, in a process with the cores or the GPU of one trial, and
again when other configurations were chosen. From the sweep's folder alone: results.jsonl and every trial's trial.yaml.
The configurations take turns, A B B A, so that a machine that slows down slows all of them alike; nothing else should
run on it. Goes to costs.json there: per configuration (`configuration` of results.jsonl)

    optimizer_ms     the whole optimizer step, all groups, refreshes of bases as often as in the average of a long run
    step_ms          forward and backward, too
    state_bytes      what all rules keep beside the weights, without their average
    peak_bytes       most memory that tensors had in a step, on a GPU; null on a CPU
    rounds           turns, of which the median counts

They are those of one process, also where a trial had several GPUs.
"""
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")         # as train.py does, and before torch is loaded

from data.arguments import Parser, or_refused
from harness.rundir import write_text
from harness.yaml_tree import ConfigError
from scripts.sweep.pack import Slot

ROUNDS = 2                              # turns of a configuration, after one that compiles and does not count
STEPS = 10                              # timed in a turn; their median is the turn's


class Turn(NamedTuple):
    optimizer_s: float
    step_s: float
    state_bytes: int
    peak_bytes: int | None


def read(out: Path) -> dict:
    """costs.json; {} where there is none that can be read."""
    try:
        found = json.loads((out / "costs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_due(out: Path) -> bool:
    """Whether the configurations that were reported are not those of costs.json."""
    wanted = reported(out)
    return bool(wanted) and {key for key, value in read(out).items() if isinstance(value, dict)} != wanted.keys()


def reported(out: Path) -> dict[str, Path]:
    """Configuration -> trial.yaml of its first reporting trial that finished.

    Raises:
        ConfigError: `out` is no sweep's folder, or the sweep no comparison.
    """
    from scripts.sweep.report.folder import sweep_and_rows
    sweep, rows = sweep_and_rows(out)
    if sweep.kind != "compare":
        raise ConfigError(f"{out}: costs are those of optimizers that are compared, and this sweep has no tuning_seeds")
    found: dict[str, Path] = {}
    for row in rows:
        if not sweep.is_tuning(row) and row["status"] == "finished":
            found.setdefault(row["configuration"], out / "trials" / row["trial"] / "trial.yaml")
    return found


def measure_in(slot: Slot, out: Path) -> str | None:
    """Measure in a process that has of the machine what a trial had; why that failed, or None. Trials must be over."""
    from scripts.sweep.run import settle
    one = slot._replace(gpus=slot.gpus[:1])
    done = subprocess.run([sys.executable, "-m", "scripts.sweep.costs", str(out)],
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, **one.environment(out)}, preexec_fn=settle(one))
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"costs not measured: exit code {done.returncode}: {said[-1].strip() if said else 'it printed nothing'}"


def measure(configs: dict, rounds: int = ROUNDS, steps: int = STEPS) -> dict:
    """What costs.json holds.

    Args:
        configs: configuration -> harness.config.Config.
        rounds: turns of each.
        steps: timed in a turn.
    """
    import torch

    from scripts.bench.interleave import interleave
    from scripts.bench.report import machine, one_device
    device = one_device()
    turns = interleave([lambda config=config: _turn(config, device, steps) for config in configs.values()], rounds)
    costs = {key: dict(optimizer_ms=round(1e3 * statistics.median(turn.optimizer_s for turn in of), 3),
                       step_ms=round(1e3 * statistics.median(turn.step_s for turn in of), 3),
                       state_bytes=of[0].state_bytes, peak_bytes=of[0].peak_bytes, rounds=rounds)
             for key, of in zip(configs, turns)}
    return costs | dict(machine=machine(device), threads=torch.get_num_threads(),
                        torch=torch.__version__, date=time.strftime("%Y-%m-%d"),
                        command=shlex.join(["python", "-m", "scripts.sweep.costs", *sys.argv[1:]]))


def _turn(config, device, steps: int) -> Turn:
    """One configuration, alone in memory."""
    import torch

    from scripts.bench.breakdown import peak_bytes
    from scripts.bench.optimizer import forward_backward_s, optimizer_step_s
    from scripts.bench.training import TrainingStep
    torch._dynamo.reset()                                             # else all share one limit of recompilations
    step = TrainingStep(config, device)
    passes_s, _ = forward_backward_s(step, steps)
    peak = peak_bytes(step, step.batch())[1] if device.type == "cuda" else None
    optimizer_s = optimizer_step_s(step, steps)
    state = sum(t.numel() * t.element_size() for bank in step.optimizer.banks for t in bank.state.values())
    del step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Turn(optimizer_s, passes_s + optimizer_s, state, peak)


def main(argv: list[str]) -> int:
    parser = Parser("python -m scripts.sweep.costs", __doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="the folder of a comparison")
    out = parser.parse_args(argv).out
    wanted = reported(out)
    if not wanted:
        raise ConfigError(f"{out}: no reporting trial has finished yet; continue the sweep")
    from harness.load import load
    costs = measure({key: load(str(path)).config for key, path in wanted.items()})
    write_text(out / "costs.json", json.dumps(costs, indent=1) + "\n")
    for key, path in wanted.items():
        cost = costs[key]
        print(f"{key}  optimizer {cost['optimizer_ms']:,.2f} ms of a step's {cost['step_ms']:,.2f} ms, state "
              f"{cost['state_bytes'] / 2**20:,.2f} MiB  ({path})")
    print(f"{costs['machine']}, {costs['date']}; of one process, however many a trial had  ({out / 'costs.json'})")
    return 0


if __name__ == "__main__":
    sys.exit(or_refused(main, sys.argv[1:]))
