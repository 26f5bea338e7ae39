"""What is updated together, and by which rank: decided from shapes alone, before any memory is touched.

Parameters that one group updates alike share a bank (optim/bank.py): equal matrices as a stack, so that a step is a
batched product; or, for elementwise rules, everything end to end, so that a step is one fused pass. An elementwise
bank is cut evenly. Whole matrices have owners, chosen by the operations that their updates take: the costliest first,
each to the rank with the least to do so far.
"""
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from optim.blocks import Cut, cut_for
from optim.groups import Group, GroupError


ALIGNED = 32                                    # numbers; a share starts where vector loads and NCCL like it


class BankPlan(NamedTuple):
    """One bank: `names` in model order, stored (len(names), *shape), or flat and padded."""
    group: Group
    names: tuple[str, ...]
    shape: tuple[int, ...] | None               # of every parameter; None where they lie end to end
    cut: Cut                                    # what of it is one matrix to the rule
    offsets: tuple[int, ...]                    # rank r owns offsets[r]:offsets[r+1] of the first dimension
    first: int                                  # how many blocks of the group lie in banks before this one

    @property
    def even(self) -> bool:
        """Whether every rank owns as much, so that one operation reduces to all owners or gathers from them."""
        return len({end - start for start, end in zip(self.offsets, self.offsets[1:])}) == 1

    @property
    def owners(self) -> list[str]:
        """The owner of each parameter, in words: a rank, or all of them."""
        if self.shape is None:
            return ["all" if len(self.offsets) > 2 else "0"] * len(self.names)
        return [str(rank) for rank in range(len(self.offsets) - 1)
                for _ in range(self.offsets[rank + 1] - self.offsets[rank])]


def plan_banks(groups: tuple[Group, ...], assignment: dict[str, list[str]], params: Mapping[str, Tensor],
               roles: dict[str, str], heads: int, tied: bool, world: int) -> list[BankPlan]:
    """The banks of every group, in the order of the groups and of the model.

    Args:
        assignment: group name -> parameter names (`optim.groups.assign`).
        params: name -> parameter, which may be on "meta".
        heads, tied: attention heads a layer, and whether the head is the embedding.
    Raises:
        GroupError: a group's `blocks` do not suit a parameter's role.
    """
    drafts, blocks_so_far = [], dict.fromkeys(assignment, 0)
    for group in groups:
        alike: dict[tuple, list[str]] = {}
        for name in assignment[group.name]:
            p, stacked = params[name], group.stacked
            try:
                cut = cut_for(group.blocks, roles[name], heads, tied) if stacked else Cut()
            except ValueError as error:
                raise GroupError(f"optim.{group.name}: {name}: {error}") from None
            alike.setdefault((p.dtype, tuple(p.shape) if stacked else None, cut), []).append(name)
        for (_, shape, cut), names in alike.items():
            drafts.append(BankPlan(group, tuple(names), shape, cut, (), blocks_so_far[group.name]))
            blocks_so_far[group.name] += len(names) * cut.blocks
    counts = owned_counts([(len(d.names), cost_of(d)) for d in drafts if d.shape is not None], world)
    banks = []
    for draft in drafts:
        if draft.shape is None:
            share = -(-sum(params[name].numel() for name in draft.names) // world)
            share = -(-share // ALIGNED) * ALIGNED if world > 1 else share
            banks.append(draft._replace(offsets=tuple(share * rank for rank in range(world + 1))))
        else:
            per_rank = counts.pop(0)
            banks.append(draft._replace(offsets=tuple(sum(per_rank[:rank]) for rank in range(world + 1))))
    return banks


def cost_of(bank: BankPlan) -> float:
    """Operations of one update of one of the bank's parameters."""
    return bank.cut.blocks * bank.group.hyper.flops(*bank.cut.shape(bank.shape))


def owned_counts(kinds: list[tuple[int, float]], world: int) -> list[list[int]]:
    """How many of each kind of matrix every rank owns; kinds are (how many, cost of one)."""
    load, counts = [0.0] * world, [[0] * world for _ in kinds]
    for kind in sorted(range(len(kinds)), key=lambda kind: -kinds[kind][1]):
        how_many, cost = kinds[kind]
        for _ in range(how_many):
            idlest = min(range(world), key=load.__getitem__)
            counts[kind][idlest] += 1
            load[idlest] += cost
    return counts
