"""What an update does to every parameter, at the peak of its schedule: for people to read before a run."""
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from optim.blocks import cut_for
from optim.groups import Group, GroupError, assign
from optim.plan import BankPlan, plan_banks


class ParameterRow(NamedTuple):
    name: str
    role: str
    group: str
    rule: str
    block: str                                  # whole, or how many logical matrices the weight is cut into
    fan_out: int                                # of one block
    fan_in: int
    lr: float                                   # as configured
    step_rms: float | None                      # RMS of an entry's change in one update; None: lr times the weight's
    decay: float                                # share of the weight that decay takes away in one update
    state_bytes: int                            # over all ranks
    formula_bytes: int                          # the same by the paper's formula
    numel: int
    owner: str                                  # rank, or "all" where every rank has a part


def parameter_table(groups: tuple[Group, ...], params: Mapping[str, Tensor], roles: dict[str, str], heads: int,
                    tied: bool, world: int = 1) -> list[ParameterRow]:
    """One row for every parameter, in model order; `params` may be on "meta".

    Raises:
        GroupError: as `assign` and `plan_banks`, or a rule cannot take a parameter's shape.
    """
    assignment = assign(groups, roles, {name: tuple(p.shape) for name, p in params.items()})
    rows = {row.name: row for bank in plan_banks(groups, assignment, params, roles, heads, tied, world)
            for row in _rows(bank, params, roles, tied)}
    return [rows[name] for name in params]


def _rows(bank: BankPlan, params: Mapping[str, Tensor], roles: dict[str, str], tied: bool):
    group, rule = bank.group, bank.group.hyper
    for name, owner in zip(bank.names, bank.owners):
        p = params[name]
        cut = cut_for("whole", roles[name], 1, tied) if bank.shape is None else bank.cut
        fan_out, fan_in = cut.shape(tuple(p.shape))
        peaks = {key: max(point.value for point in schedule.points) for key, schedule in group.scheduled.items()}
        h = {key: torch.tensor(float(peaks.get(key, getattr(rule, key))), dtype=torch.float64) for key in rule.VARYING}
        h["t"] = torch.tensor(100.0, dtype=torch.float64)              # some update that is not the first
        yield ParameterRow(
            name, roles[name], group.name, group.rule, f"{bank.cut.blocks} blocks" if bank.cut.blocks > 1 else "whole",
            fan_out, fan_in, rule.lr, None if group.hyperball else rule.lr * rule.step_rms(fan_out, fan_in),
            float(rule.shrinkage(h, fan_out, fan_in)) if "weight_decay" in h and not group.hyperball else 0.0,
            state_bytes(bank, p), bank.cut.blocks * rule.state_numbers(fan_out, fan_in) * _bytes_of_a_number(p),
            p.numel(), owner)


def state_bytes(bank: BankPlan, p: Tensor) -> int:
    """What the rule's own `init` makes for this parameter.

    Raises:
        GroupError: the rule cannot take its shape.
    """
    sketch = torch.empty(p.numel() if bank.shape is None else (1, *p.shape), dtype=p.dtype, device="meta")
    try:
        state = bank.group.hyper.init(sketch if bank.shape is None else bank.cut.take(sketch))
    except ValueError as error:
        raise GroupError(f"optim.{bank.group.name}: {bank.names[0]}: {error}") from None
    return sum(t.numel() * t.element_size() for t in state.values())


def _bytes_of_a_number(p: Tensor) -> int:
    return torch.promote_types(p.dtype, torch.float32).itemsize
