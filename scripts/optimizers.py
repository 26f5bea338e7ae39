"""The table of update rules: what each is given, what it holds, how long it takes, how far it gets on the demo.

    python -m scripts.optimizers [--losses runs/sweeps/demo_rules] [--gpt2]    prints the Markdown of docs/optimizers.md

Times are of the hidden matrices alone (attention and MLP weights), refreshes of bases averaged in: of all of the demo's
matrices together; with --gpt2 also for GPT-2 124M, where one matrix of each shape is timed and counted as often as
there are such, since some rules take minutes there on a CPU. State is what `init` makes, beside the paper's formula.
"""
import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from data.arguments import Parser
from harness import processes
from harness.load import load
from optim import RULES
from optim.rule import Rule

# (how many, rows, cols) of the hidden matrices
DEMO = ((16, 128, 128), (4, 512, 128), (4, 128, 512))
GPT2 = ((48, 768, 768), (12, 3072, 768), (12, 768, 3072))

SCALES = {"adam": "1", "adamw": "1", "lion": "1", "sgd": "1", "muon": "√max(1, m/n)", "normuon": "√max(1, m/n)",
          "muon2": "√max(1, m/n)", "adamuon": "0.2 √(mn)/‖O‖", "muonclip": "0.2 √max(m, n)", "spectral": "√max(1, m/n)",
          "scion": "ρ √(m/n)", "gluon": "√(m/n)", "splus": "2/(m+n)", "soap": "1", "klsoap": "1",
          "shampoo": "Adam's norm"}


def hidden_rule(name: str) -> Rule:
    """The rule as the demo's preset sets it for hidden matrices."""
    return load(f"demo/{name}.yaml").config.optim[0].hyper


def milliseconds(rule: Rule, count: int, rows: int, cols: int, device: torch.device, rounds: int) -> float:
    """Of one update of `count` such matrices, with the refreshes of a long run averaged in."""
    g = torch.Generator().manual_seed(0)
    W, G = (torch.randn(count, rows, cols, generator=g).to(device) for _ in range(2))
    shape = (-1,) if rule.elementwise else W.shape
    W, G = W.view(shape), G.view(shape)
    state, h = rule.init(W), {key: torch.tensor(float(getattr(rule, key)), dtype=torch.float64, device=device)
                              for key in rule.VARYING}
    times = []
    for t in range(1, rounds + 2):
        h["t"] = torch.tensor(float(t), dtype=torch.float64, device=device)
        times.append(clocked(device, lambda: rule.update(W, G, state, h)))
    update = statistics.median(times[1:])
    first, steps = 1000, 1000                                          # where the schedule of refreshes has settled
    rate = sum(rule.refresh_due(step, i, count) for step in range(first, first + steps) for i in range(count)) / steps
    if rate == 0:
        return 1e3 * update
    one = {key: value[:1] for key, value in state.items()}
    rule.refresh(one, 0)
    return 1e3 * (update + rate * clocked(device, lambda: rule.refresh(one, first)))


def clocked(device: torch.device, work) -> float:
    """Seconds that `work` takes, with the device done before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def state_bytes(rule: Rule, shapes) -> tuple[float, float]:
    """(measured, by the formula) state bytes a parameter over these matrices."""
    numel = sum(count * rows * cols for count, rows, cols in shapes)
    measured = formula = 0
    for count, rows, cols in shapes:
        W: Tensor = torch.empty(1, rows, cols, device="meta")
        state = rule.init(W.view(-1) if rule.elementwise else W)
        measured += count * sum(t.numel() * t.element_size() for t in state.values())
        formula += count * 4 * rule.state_numbers(rows, cols)
    return measured / numel, formula / numel


def applied_to(name: str) -> str:
    """What the demo's preset gives to the rule."""
    groups = [group for group in load(f"demo/{name}.yaml").config.optim if group.rule == name]
    return "all" if len(groups) > 1 else "hidden" if groups else "none"


def losses(sweep: Path) -> dict[str, float]:
    """Rule -> the mean of the final losses of its preset, as it is, over the finished trials in a sweep's folder."""
    try:
        rows = [json.loads(line) for line in (sweep / "results.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return {}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == "finished" and not row["parameters"]:
            found.setdefault(Path(row["base"]).stem, []).append(row["val_loss"])
    return {name: statistics.fmean(values) for name, values in found.items()}


def source_of(name: str) -> str:
    """The citation in brackets in the first line of the rule's file."""
    first = import_module(RULES[name].__module__).__doc__.split("\n")[0]
    return first[first.index("(") + 1:first.rindex(")")]


def main() -> int:
    parser = Parser("python -m scripts.optimizers", __doc__)
    parser.add_argument("--losses", type=Path, default=Path("runs/sweeps/demo_rules"), metavar="DIR",
                        help="the folder of configs/sweeps/demo_rules.yaml; without it their column is empty")
    parser.add_argument("--gpt2", action="store_true", help="time GPT-2 124M's matrices too (minutes on a CPU)")
    parser.add_argument("rules", nargs="*", help="default: every rule")
    args = parser.parse_args()
    device, results = processes.start().device, losses(args.losses)
    print("| rule | for | state, bytes a parameter (formula) | ms, demo |" + (" ms, GPT-2 124M |" if args.gpt2 else "")
          + " demo's loss | factor on lr | source |\n|-|-|-|-|-|-|-|" + ("-|" if args.gpt2 else ""))
    for name in args.rules or sorted(RULES):
        rule = hidden_rule(name)
        measured, formula = state_bytes(rule, DEMO)
        cells = [f"`{name}`", applied_to(name), f"{measured:.1f} ({formula:.1f})",
                 f"{sum(milliseconds(rule, *shape, device, 10) for shape in DEMO):.1f}"]
        if args.gpt2:
            cells.append(f"{sum(n * milliseconds(rule, 1, *shape, device, 2) for n, *shape in GPT2):,.0f}")
        loss = f"{results[name]:.3f}" if name in results else "–"
        print("| " + " | ".join([*cells, loss, SCALES[name], source_of(name)]) + " |", flush=True)
    print(f"\n{processes.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
