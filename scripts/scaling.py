"""Predicted communication and optimizer time of a step at 8, 64 and 1,024 GPUs, from the driver's own counts.

    python -m scripts.scaling                                 the tables of docs/scaling.md, in Markdown
    python -m scripts.scaling --network-gb-s 25 --launch-us 20        with other constants
    python -m scripts.scaling --write docs/scaling.md         put them between the page's markers

Counts are optim/traffic.py's, of models on "meta"; times follow from them and from the constants below by the formulas
of docs/scaling.md. Nothing is measured here: scripts/moved.py counts what really moves.
"""
import math
import os
import sys
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from data.arguments import Parser
from harness.config import Config
from harness.load import load
from harness.preflight import memory_bytes
from model.gpt import GPT
from optim.groups import assign
from optim.plan import BankPlan, plan_banks
from optim.traffic import Transfer, backward_order, collected_bytes, ring_bytes, transfers, work

PRESETS = ("muon.yaml", "adamw.yaml")
GPUS = (8, 64, 1024)
SEQ_LEN = 1024


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    batch_tokens: int                           # at any number of GPUs that has a row for each, else a row for each
    micro_tokens: int                           # of one forward pass


# Batches: 0.5, 1 and 2 million tokens, as Brown et al. (arXiv:2005.14165, table 2.1) have for these sizes.
SIZES = {"124M": Size(12, 768, 6, 524_288, 65_536), "1.5B": Size(48, 1600, 25, 1_048_576, 16_384),
         "7B": Size(32, 4096, 32, 2_097_152, 4_096)}


def constant(value: float, meaning: str, source: str):
    return field(default=value, metadata={"meaning": meaning, "source": source})


@dataclass(frozen=True)
class Constants:
    peak_tflop_s: float = constant(989, "dense bf16 products", "NVIDIA's H200 SXM data sheet")
    model_efficiency: float = constant(0.42, "of it, in forward and backward", "the published log of muon.yaml's "
                                       "configuration on one H200: 1,073 ms for 4.49e14 FLOP")
    optimizer_efficiency: float = constant(0.5, "of it, in an optimizer's products", "assumed: 40 to 55% is usual for "
                                           "batched 768-wide products on an H100")
    memory_gb_s: float = constant(4800, "memory bandwidth", "NVIDIA's H200 SXM data sheet")
    memory_efficiency: float = constant(0.8, "of it, in an elementwise pass", "assumed")
    memory_gb: float = constant(141, "memory of a GPU", "NVIDIA's H200 SXM data sheet")
    gpus_per_node: int = constant(8, "GPUs that NVLink joins", "HGX H200")
    nvlink_gb_s: float = constant(450, "NVLink, a GPU, one way", "NVIDIA's H200 SXM data sheet: 900 GB/s both ways")
    network_gb_s: float = constant(50, "network, a GPU, one way", "a 400 Gb/s adapter for each GPU, as in a DGX H200")
    link_efficiency: float = constant(0.8, "of either, in a collective", "assumed")
    launch_us: float = constant(10, "to start one collective operation", "assumed")
    nvlink_hop_us: float = constant(2, "one step of a ring over NVLink", "assumed")
    network_hop_us: float = constant(5, "one step of a ring over the network", "assumed")


class Setup(NamedTuple):
    """One preset at one size on so many GPUs."""
    preset: str
    size: str
    gpus: int
    config: Config
    model: GPT                                  # on "meta"
    banks: list[BankPlan]
    transfers: list[Transfer]

    @property
    def params(self) -> dict:
        return dict(self.model.named_parameters())

    @property
    def rank_tokens(self) -> int:
        return self.config.batch_tokens // self.gpus


def setup(preset: str, size: str, gpus: int) -> Setup:
    s = SIZES[size]
    config = load(preset, (f"model.layers={s.layers}", f"model.width={s.width}", f"model.heads={s.heads}",
                           f"seq_len={SEQ_LEN}", f"batch_tokens={max(s.batch_tokens, gpus * SEQ_LEN)}",
                           f"micro_batch_tokens={s.micro_tokens}", "data.order=continuous")).config
    with torch.device("meta"):
        model = GPT(config.model, config.seq_len, torch.bfloat16)
    banks = plan(config, model, gpus)
    return Setup(preset, size, gpus, config, model, banks,
                 transfers(banks, dict(model.named_parameters()), clipped_heads(config, model)))


def assignment(config: Config, model: GPT) -> dict[str, list[str]]:
    return assign(config.optim, model.roles(), {name: tuple(p.shape) for name, p in model.named_parameters()})


def plan(config: Config, model: GPT, world: int) -> list[BankPlan]:
    """The driver's banks for this model on so many ranks."""
    return plan_banks(config.optim, assignment(config, model), dict(model.named_parameters()), model.roles(),
                      config.model.heads, config.model.tied, world)


def clipped_heads(config: Config, model: GPT) -> int:
    """In all layers together, the heads whose logits a rule clips."""
    names = assignment(config, model)
    clipped = {name for group in config.optim if group.hyper.clips_heads for name in names[group.name]}
    return config.model.heads * sum(qk[0] in clipped for qk in model.qk_parameters().values())


# ---- counts

class Loads(NamedTuple):
    """What updating costs every rank, a list a bank."""
    flops: list[list[float]]
    memory: list[list[int]]


def loads(s: Setup) -> Loads:
    flops, memory = [], []
    for bank in s.banks:
        lengths = [end - start for start, end in zip(bank.offsets, bank.offsets[1:])]
        works = {length: work(bank, s.params, length) for length in set(lengths)}
        flops.append([works[length].flops for length in lengths])
        memory.append([works[length].memory for length in lengths])
    return Loads(flops, memory)


def busiest_sent(s: Setup, some: list[Transfer]) -> float:
    """Ring bytes sent by the rank that sends most."""
    return max(sum(ring_bytes(t, rank, s.gpus)[0] for t in some) for rank in range(s.gpus))


def counts_row(s: Setup, c: Constants) -> list[str]:
    payload = {what: sum(t.payload for t in s.transfers if t.what == what)
               for what in ("gradients", "weights", "report")}
    flops = [sum(rank) for rank in zip(*loads(s).flops)]
    memory = [sum(rank) for rank in zip(*loads(s).memory)]
    stacked = [bank for bank in s.banks if bank.shape is not None]
    owners = sum(any(b.offsets[r] < b.offsets[r + 1] for b in stacked) for r in range(s.gpus)) if stacked else s.gpus
    held = sum(memory_bytes(s.config, s.model, min(s.config.micro_batch_tokens, s.rank_tokens), s.gpus, 2, True,
                            False).values())
    return [s.preset.removesuffix(".yaml"), s.size, f"{s.gpus:,}", f"{s.config.batch_tokens:,}", f"{s.rank_tokens:,}",
            f"{len(s.transfers)}", f"{payload['gradients'] / 1e6:,.0f}", f"{payload['weights'] / 1e6:,.0f}",
            f"{payload['report'] / 1e3:,.1f}", f"{busiest_sent(s, s.transfers) / 1e6:,.0f}", f"{owners:,}",
            f"{max(flops) / 1e9:,.1f}", f"{max(flops) / (sum(flops) / s.gpus):.2f}", f"{max(memory) / 1e6:,.0f}",
            f"{s.model.flops_per_token() * s.rank_tokens / 1e12:,.1f}",
            f"{held / 1e9:,.0f}" + (" (too much)" if held > c.memory_gb * 1e9 else "")]


# ---- times, in seconds

def ring_bandwidth(gpus: int, c: Constants) -> float:
    """Bytes a second that a rank sends to the next while all do: of the slowest edge, between nodes all adapters."""
    edges = [c.nvlink_gb_s] + ([c.gpus_per_node * c.network_gb_s] if gpus > c.gpus_per_node else [])
    return min(edges) * c.link_efficiency * 1e9


def ring_latency(gpus: int, c: Constants) -> float:
    """Of the gpus - 1 steps of an operation on a ring: one fewer over the network than there are nodes."""
    nodes = math.ceil(gpus / c.gpus_per_node)
    return 1e-6 * ((nodes - 1) * c.network_hop_us + (gpus - nodes) * c.nvlink_hop_us)


def tree_latency(gpus: int, c: Constants) -> float:
    """Up and down: a chain in the node, a binary tree over nodes."""
    nodes = math.ceil(gpus / c.gpus_per_node)
    return 2e-6 * ((min(gpus, c.gpus_per_node) - 1) * c.nvlink_hop_us + math.ceil(math.log2(nodes)) * c.network_hop_us)


def travel_time(s: Setup, some: list[Transfer], c: Constants) -> float:
    """Of one bank's operations one way, or of one small all-reduce."""
    latency = (tree_latency if some[0].operation == "all_reduce" else ring_latency)(s.gpus, c)
    return len(some) * c.launch_us * 1e-6 + latency + busiest_sent(s, some) / ring_bandwidth(s.gpus, c)


class Times(NamedTuple):
    model: float                                # forward and backward
    gradients: float                            # on the wire
    gradients_waited: float                     # what of it comes after the backward pass
    small: float                                # report and logits
    collect: float                              # gradients into banks
    update: float                               # of the rank that takes longest
    weights: float                              # on the wire
    weights_waited: float                       # what of it, and of waiting for owners, comes after the update

    @property
    def step(self) -> float:
        return self.model + self.collect + self.gradients_waited + self.small + self.update + self.weights_waited


def times(s: Setup, c: Constants) -> Times:
    product_rate, memory_rate = c.peak_tflop_s * 1e12, c.memory_gb_s * 1e9 * c.memory_efficiency
    model = s.model.flops_per_token() * s.rank_tokens / (product_rate * c.model_efficiency)
    micro = min(s.config.micro_batch_tokens, s.rank_tokens) / s.rank_tokens
    last_backward = 2 / 3 * model * micro                             # what gradients may travel beside
    wire = 0.0
    travelling = {key: travel_time(s, some, c) for key, some in by_bank(s).items()}
    for place in backward_order(s.banks, s.params):
        wire = max(wire, last_backward * (1 - work_left(s, place))) + travelling["gradients", place]
    update, sent = [0.0] * s.gpus, 0.0
    for place, (flops, memory) in enumerate(zip(*loads(s))):
        rate = product_rate * c.optimizer_efficiency if s.banks[place].shape is not None else math.inf
        update = [t + f / rate + m / memory_rate for t, f, m in zip(update, flops, memory)]
        sent = max(sent, max(update)) + travelling["weights", place]
    of = {what: sum(t for key, t in travelling.items() if key[0] == what) for what in ("gradients", "weights")}
    small = sum(t for (what, _), t in travelling.items() if what in ("report", "logits"))
    return Times(model, of["gradients"], max(0.0, wire - last_backward), small,
                 collected_bytes(s.banks, s.params) / memory_rate, max(update), of["weights"], sent - max(update))


def by_bank(s: Setup) -> dict[tuple, list[Transfer]]:
    """(what, place of the bank) -> its operations."""
    found: dict[tuple, list[Transfer]] = {}
    for transfer in s.transfers:
        found.setdefault((transfer.what, transfer.bank), []).append(transfer)
    return found


def work_left(s: Setup, place: int) -> float:
    """The share of a backward pass that follows a bank's last gradient: the weights before its first parameter."""
    roles = s.model.roles()
    numels = {name: 0 if roles[name] in ("embed", "pos") else p.numel() for name, p in s.params.items()}
    names = list(numels)
    before = names[:min(map(names.index, s.banks[place].names))]
    return sum(numels[name] for name in before) / sum(numels.values())


def times_row(s: Setup, c: Constants) -> list[str]:
    t = times(s, c)
    return [s.preset.removesuffix(".yaml"), s.size, f"{s.gpus:,}",
            *(f"{1e3 * x:,.1f}" for x in (t.model, t.gradients, t.gradients_waited, t.small, t.collect, t.update,
                                          t.weights, t.weights_waited, t.step)), f"{1 - t.model / t.step:.0%}"]


# ---- the page

def table(header: str, rows: list[list[str]], text_columns: int) -> str:
    columns = header.split(" | ")
    rule = ["-"] * text_columns + ["-:"] * (len(columns) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def tables(c: Constants) -> str:
    setups = [setup(preset, size, gpus) for size in SIZES for preset in PRESETS for gpus in GPUS]
    constants = [[f"`--{option(f)}`", f"{getattr(c, f.name):,g}", f.metadata["meaning"], f.metadata["source"]]
                 for f in fields(c)]
    return "\n\n".join((
        "**Constants**", table("option | value | what | source", constants, 4),
        "**Counted** for one step; FLOP and memory of the busiest rank",
        table("preset | size | GPUs | batch, tokens | a GPU | collectives | gradients, MB | weights, MB | report, kB | "
              "sent by a rank, MB | ranks with matrices | optimizer GFLOP | times the mean | update, MB | "
              "model TFLOP a GPU | held by a GPU, GB", [counts_row(s, c) for s in setups], 2),
        "**Predicted** milliseconds of one step",
        table("preset | size | GPUs | model | gradients | waited for | report | collect | update | weights | "
              "waited for | step | not the model", [times_row(s, c) for s in setups], 2)))


def option(f: Field) -> str:
    return f.name.replace("_", "-")


BEGIN, END = "<!-- made by python -m scripts.scaling -->", "<!-- end -->"


def with_tables(page: str, made: str) -> str:
    """The page with what is between its markers replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END, 1)[1]}"


def main(argv: list[str]) -> int:
    parser = Parser("python -m scripts.scaling", __doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables in this page, print nothing")
    for f in fields(Constants):
        parser.add_argument(f"--{option(f)}", type=f.type, default=f.default,
                            help=f"{f.metadata['meaning']} (default {f.default:g})".replace("%", "%%"))
    args = vars(parser.parse_args(argv))
    page = args.pop("write")
    if wrong := [name for name, value in args.items() if not 0 < value < math.inf]:
        print(f"error: --{wrong[0].replace('_', '-')} {args[wrong[0]]}: give a number above 0", file=sys.stderr)
        return 2
    if page is not None and not (page.is_file() and BEGIN in page.read_text(encoding="utf-8")):
        print(f"error: --write {page}: no page with the line {BEGIN}", file=sys.stderr)
        return 2
    made = tables(Constants(**args))
    if page is None:
        print(made)
        return 0
    fresh = page.with_suffix(".new")
    fresh.write_text(with_tables(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    os.replace(fresh, page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
