"""What a step of the driver costs, counted from its plan and nothing else: bytes between ranks, operations, memory.

The payload of a collective operation is the tensor that is reduced or handed out, all ranks' shares of it together.
What a rank sends for it depends on how the library does it. On a ring of W ranks, as NCCL has it, for a payload N:

    reduce-scatter, all-gather      every rank sends and receives (W-1)/W N
    all-reduce                      twice that
    reduce to an owner              every rank but the owner sends N: it adds its own to what came, and passes it on
    broadcast from an owner         every rank but the last in the ring sends N

Nothing here has a clock; scripts/scaling.py makes times of these counts, and scripts/moved.py counts what really moves.
"""
from collections.abc import Mapping
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optim.plan import BankPlan, cost_of
from optim.table import state_bytes

Params = Mapping[str, Tensor]
What = Literal["gradients", "report", "weights", "logits"]
Operation = Literal["reduce_scatter", "reduce", "all_reduce", "all_gather", "broadcast"]


class Transfer(NamedTuple):
    """One collective operation."""
    what: What
    operation: Operation
    payload: int                                # bytes of the whole tensor
    bank: int | None = None                     # place among the plan's banks
    owner: int | None = None                    # the rank that reduces to itself, or broadcasts


class Work(NamedTuple):
    """What one rank does to update its run of one bank."""
    flops: float                                # by the rule's own count
    memory: int                                 # bytes read and written by one pass over all that an update needs


def transfers(banks: list[BankPlan], params: Params, clipped_heads: int = 0) -> list[Transfer]:
    """The collective operations of one step, in the order in which the driver starts them; none for one rank.

    Args:
        params: name -> parameter, in model order; they may be on "meta".
        clipped_heads: in all layers together, how many heads a rule clips (QK-clip).
    """
    if len(banks[0].offsets) == 2:
        return []
    found = []
    for place in backward_order(banks, params):
        found += _travel("gradients", place, banks[place], _gradient_bytes(banks[place], params))
    found.append(Transfer("report", "all_reduce", 8 * (3 + len(params))))  # float64: loss, norm², stops; who has any
    for place, bank in enumerate(banks):
        found += _travel("weights", place, bank, weight_bytes(bank, params))
    if clipped_heads:
        found.append(Transfer("logits", "all_reduce", 4 * clipped_heads))              # float32: the largest of each
    return found


def _travel(what: What, place: int, bank: BankPlan, entry: int) -> list[Transfer]:
    """One operation for a bank that is cut evenly, else one for every owner of something."""
    whole, single = ("reduce_scatter", "reduce") if what == "gradients" else ("all_gather", "broadcast")
    if bank.even:
        return [Transfer(what, whole, bank.offsets[-1] * entry, place)]
    lengths = [end - start for start, end in zip(bank.offsets, bank.offsets[1:])]
    return [Transfer(what, single, length * entry, place, rank) for rank, length in enumerate(lengths) if length]


def backward_order(banks: list[BankPlan], params: Params) -> list[int]:
    """Places of the banks in the order in which their last gradients come: those of their first parameters."""
    order = {name: index for index, name in enumerate(params)}
    return sorted(range(len(banks)), key=lambda place: -min(order[name] for name in banks[place].names))


# ---- bytes

def entry_numbers(bank: BankPlan) -> int:
    """How many numbers one entry of the bank's first dimension holds."""
    return prod(bank.shape) if bank.shape is not None else 1


def weight_bytes(bank: BankPlan, params: Params) -> int:
    """Of one entry, as stored."""
    return entry_numbers(bank) * params[bank.names[0]].element_size()


def _gradient_bytes(bank: BankPlan, params: Params) -> int:
    """Of one entry, as it travels: float32, or float64 of float64 weights."""
    return entry_numbers(bank) * torch.promote_types(params[bank.names[0]].dtype, torch.float32).itemsize


def ring_bytes(transfer: Transfer, rank: int, world: int) -> tuple[float, float]:
    """(sent, received) by one rank of a ring in the order of the ranks."""
    whole, share = float(transfer.payload), (world - 1) / world * transfer.payload
    match transfer.operation:
        case "reduce_scatter" | "all_gather":
            return share, share
        case "all_reduce":
            return 2 * share, 2 * share
        case "reduce":                          # from the rank after the owner once round to the owner
            return whole * (rank != transfer.owner), whole * (rank != (transfer.owner + 1) % world)
        case "broadcast":                       # from the owner to the rank before it
            return whole * (rank != (transfer.owner - 1) % world), whole * (rank != transfer.owner)


# ---- work

def work(bank: BankPlan, params: Params, entries: int) -> Work:
    """Of a rank that owns so many entries of a bank's first dimension.

    Memory is that of one pass: the gradient is read twice, for its norm and for the update; weight and state are read
    and written. What the products of an orthogonalisation read again is not in it.
    """
    first, stacked = params[bank.names[0]], bank.shape is not None
    state = state_bytes(bank, first) // (1 if stacked else first.numel())
    memory = 2 * _gradient_bytes(bank, params) + 2 * weight_bytes(bank, params) + 2 * state
    return Work(entries * (cost_of(bank) if stacked else bank.group.hyper.flops(1, 1)), entries * memory)


def collected_bytes(banks: list[BankPlan], params: Params) -> int:
    """Memory that every rank reads and writes to lay all gradients, its own before the sum, out as the banks are."""
    own = [params[name] for bank in banks for name in bank.names]
    return sum(p.numel() * (p.element_size() + torch.promote_types(p.dtype, torch.float32).itemsize) for p in own)
