"""What really moves between ranks in a step, counted, beside what optim/traffic.py says.

    python -m scripts.moved                  the presets at 1 to 4 ranks over gloo, with a small model; prints Markdown
    python -m scripts.moved --ranks 8

Payloads are taken from torch's own c10d operations as they are dispatched, whoever calls them: each must be the
predicted one, in the predicted order. Bytes are the kernel's count for this process's TCP sockets (TCP_INFO,
tcpi_bytes_received; Linux). Gloo's algorithms, as these counts show them for torch 2.13, for a payload N on W ranks:

    all-reduce          a ring; every rank receives 2(W-1)/W N
    reduce-scatter      an all-reduce of which a share is kept: 2(W-1)/W N, twice what a ring needs
    all-gather          a ring; (W-1)/W N
    reduce              a ring's reduce-scatter, (W-1)/W N for every rank, and as much again for the owner
    broadcast           a tree; N for every rank but the owner

Gloo adds headers and small messages: at most OVERHEAD bytes for every rank, peer and operation.
"""
import json
import multiprocessing
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data.arguments import Parser
from harness.config import Config
from harness.load import load
from model.gpt import GPT
from optim.driver import Optimizer
from optim.traffic import Transfer, transfers
from scripts.scaling import clipped_heads, plan

SMALL = ("model.layers=3", "model.width=64", "model.heads=2", "model.vocab_size=256", "seq_len=64",
         "batch_tokens=256", "micro_batch_tokens=64", "data.order=continuous", "optim.hidden.lr=0.01")
CASES = {"muon.yaml": (), "adamw.yaml": (),
         "muon.yaml with QK-clip": ("optim.hidden.rule=muonclip", "model.qk_norm=none")}
OVERHEAD = 500                                  # bytes; 393 was the most seen at 2 to 4 ranks
BARRIERS = 2                                    # are counted with a step, so that no rank's bytes fall outside
OPERATIONS = {"_reduce_scatter_base_": "reduce_scatter", "_allgather_base_": "all_gather", "allreduce_": "all_reduce",
              "reduce_": "reduce", "broadcast_": "broadcast"}


class Step(NamedTuple):
    """One step of one preset on some ranks."""
    predicted: list[Transfer]
    operations: list[list]                      # [operation, payload, owner] as dispatched
    received: int                               # bytes that came in at all ranks' sockets
    expected: float                             # the same by gloo's algorithms, without headers
    world: int

    @property
    def agrees(self) -> bool:
        """Whether every payload is the predicted one, in order, and bytes are as many but for headers."""
        headers = OVERHEAD * self.world * (self.world - 1) * (len(self.predicted) + BARRIERS)
        return ([[t.operation, t.payload, t.owner] for t in self.predicted] == self.operations
                and 0 <= self.received - self.expected <= headers)


class Recorder(TorchDispatchMode):
    """Notes every collective operation inside it; [operation, payload, owner]."""

    def __init__(self):
        super().__init__()
        self.operations: list[list] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            operation = OPERATIONS.get(name, name)
            whole = args[1] if operation == "reduce_scatter" else args[0]
            whole = whole if isinstance(whole, torch.Tensor) else whole[0]
            owner = {"reduce": 3, "broadcast": 2}.get(operation)
            self.operations.append([operation, whole.numel() * whole.element_size(),
                                    None if owner is None else args[owner]])
        return function(*args, **(kwargs or {}))


def received_bytes() -> int:
    """Payload bytes that ever came in at this process's open TCP sockets."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as s:
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        except OSError:                         # closed meanwhile, or no TCP socket
            continue
        total += struct.unpack_from("Q", info, 128)[0] if len(info) == 136 else 0      # <linux/tcp.h>
    return total


def gloo_received(transfer: Transfer, rank: int, world: int) -> float:
    """What `rank` receives in gloo's algorithms, without headers."""
    share = (world - 1) / world * transfer.payload
    match transfer.operation:
        case "reduce_scatter" | "all_reduce":
            return 2 * share
        case "all_gather":
            return share
        case "reduce":
            return 2 * share if rank == transfer.owner else share
        case "broadcast":
            return transfer.payload * (rank != transfer.owner)


def count(case: str, rank: int, world: int) -> tuple[list[list], int]:
    """One step of a case on this rank: its collective operations, and the bytes that came in."""
    config = configuration(case)
    model = GPT(config.model, config.seq_len, torch.bfloat16, track_logits=config.needs_logits)
    model.init_weights(0)
    optimizer = Optimizer(dict(model.named_parameters()), model.roles(), config.optim, config.average,
                          config.grad_clip, False, config.model.heads, config.model.tied, model.qk_parameters())
    optimizer.set_hyperparameters(0, config.schedule, config.steps)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.model.vocab_size, (1, config.seq_len + 1), generator=generator)
    barrier(world)
    before = received_bytes()
    barrier(world)                              # nobody sends before all have read
    with Recorder() as recorder:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.expect_last_gradients()
        loss.backward()
        optimizer.step(0, loss.detach(), False, model.max_logits())
    received = received_bytes() - before
    barrier(world)                              # nobody goes on before all have read
    return recorder.operations, received


def barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    counted = [count(case, rank, world) for case in CASES]
    Path(folder, f"rank{rank}").write_text(json.dumps(counted))
    dist.destroy_process_group()


def steps(world: int) -> dict[str, Step]:
    """Case -> what one step of it moved on so many gloo ranks, each a process of its own."""
    if world == 1:
        return {case: Step(prediction(case, 1), count(case, 0, 1)[0], 0, 0.0, 1) for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["optim.driver", "scripts.scaling"])    # once instead of once a rank
        torch.multiprocessing.start_processes(_rank, (world, folder), nprocs=world, start_method="forkserver")
        ranks = [json.loads(Path(folder, f"rank{rank}").read_text()) for rank in range(world)]
    found = {}
    for case, counted in zip(CASES, zip(*ranks)):
        assert all(operations == counted[0][0] for operations, _ in counted), f"{case}: ranks disagree"
        predicted = prediction(case, world)
        expected = sum(gloo_received(transfer, rank, world) for transfer in predicted for rank in range(world))
        found[case] = Step(predicted, counted[0][0], sum(received for _, received in counted), expected, world)
    return found


def configuration(case: str) -> Config:
    return load(case.split()[0], (*SMALL, *CASES[case])).config


def prediction(case: str, world: int) -> list[Transfer]:
    """The transfers of one step of a case, from shapes alone."""
    config = configuration(case)
    with torch.device("meta"):
        model = GPT(config.model, config.seq_len, torch.bfloat16)
    return transfers(plan(config, model, world), dict(model.named_parameters()), clipped_heads(config, model))


HEADER = ("| preset | ranks | operations | payload, kB: predicted | counted | received by all ranks, kB: expected | "
          "counted | more |\n|-|-:|-:|-:|-:|-:|-:|-:|")


def row(case: str, step: Step) -> str:
    payload, counted = sum(t.payload for t in step.predicted), sum(nbytes for _, nbytes, _ in step.operations)
    more = f"{step.received / step.expected - 1:.2%}" if step.expected else "–"
    return (f"| {case} | {step.world} | {len(step.operations)} | {payload / 1e3:,.3f} | {counted / 1e3:,.3f} | "
            f"{step.expected / 1e3:,.1f} | {step.received / 1e3:,.1f} | {more} |")


def main(argv: list[str]) -> int:
    parser = Parser("python -m scripts.moved", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of ranks (default 1 2 3 4)")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        print("error: counting a socket's bytes needs Linux's TCP_INFO; run this on Linux", file=sys.stderr)
        return 2
    if min(args.ranks) < 1:
        print(f"error: --ranks {min(args.ranks)}: use 1 or more", file=sys.stderr)
        return 2
    print(HEADER)
    wrong = 0
    for world in args.ranks:
        for case, step in steps(world).items():
            wrong += not step.agrees
            print(row(case, step) + ("" if step.agrees else " WRONG"), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
