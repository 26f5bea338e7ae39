"""Parameters that are updated together: one tensor of which every parameter is a view, and how it travels.

    stacked    weights (slots, *shape)     one slot a matrix
    flat       weights (numel,)            padded to a multiple of the number of ranks

Rank r owns the run offsets[r]:offsets[r+1] of the first dimension, with the optimizer state of that run and no other.
Where all runs are equally long, gradients come to their owners by one reduce-scatter and weights go out by one
all-gather. Where they are not, no padding travels: each owner has a reduction and a broadcast of its own.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.groups import GroupError
from optim.plan import BankPlan

# torch 2.13 renames the two; 2.11 has only the older names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Bank:
    """One bank on one rank.

    Attributes:
        weights: the parameters' storage, all of it on every rank.
        mine: this rank's run of `weights`, a view.
        state: the rule's tensors for `mine`, a first dimension of blocks (stacked) or elements (flat).
        average: float32 running sum for the weight average of `mine`, or None.
        missing: places in `params` of those that had no gradient at the last `take_gradients`.
    """

    def __init__(self, plan: BankPlan, params: dict[str, nn.Parameter], average: bool, rank: int, world: int):
        self.plan, self.rank, self.world = plan, rank, world
        self.rule, self.group, self.cut, self.offsets = plan.group.hyper, plan.group, plan.cut, plan.offsets
        self.params = {name: params[name] for name in plan.names}
        self.flat, self.even = plan.shape is None, plan.even
        first = next(iter(self.params.values()))
        self.used = sum(p.numel() for p in self.params.values()) if self.flat else len(self.params)
        self.weights = torch.zeros(self.offsets[-1], *(plan.shape or ()), dtype=first.dtype, device=first.device)
        for p, view in zip(self.params.values(), self.split(self.weights)):
            view.copy_(p.data)
            p.data = view
        self.mine = self.run_of(self.weights, rank)
        self.state = self.fresh_state()
        self.average = torch.zeros_like(self.mine, dtype=torch.float32) if average else None
        self.missing: list[int] = []

    def run_of(self, full: Tensor, rank: int, unit: int = 1) -> Tensor:
        """The part of a tensor laid out as the bank, `unit` entries a slot, that `rank` owns."""
        return full[self.offsets[rank] * unit:self.offsets[rank + 1] * unit]

    def split(self, full: Tensor) -> list[Tensor]:
        """One view a parameter of a tensor laid out as the bank is."""
        if not self.flat:
            return list(full[:self.used])
        sizes = [p.numel() for p in self.params.values()]
        return [piece.view(p.shape) for piece, p in zip(full[:self.used].split(sizes), self.params.values())]

    def blocks(self, run: Tensor) -> Tensor:
        """A run of the bank as its rule sees it: logical matrices, or elements."""
        return run if self.flat else self.cut.take(run)

    def fresh_state(self) -> dict[str, Tensor]:
        """The rule's state before the first update. An empty run has an empty state of the same kinds."""
        return self.rule.init(self.blocks(self.mine))

    # ---- gradients in

    def take_gradients(self) -> Tensor:
        """The gradients in one float32 tensor laid out as the bank, zero where there is none; frees the parameters'."""
        grads = [p.grad for p in self.params.values()]
        self.missing = [place for place, grad in enumerate(grads) if grad is None]
        stacked = torch.empty_like(self.weights, dtype=torch.promote_types(self.weights.dtype, torch.float32))
        stacked[self.used:].zero_()
        views = self.split(stacked)
        for place in self.missing:
            views[place].zero_()
        there = [(view, grad) for view, grad in zip(views, grads) if grad is not None]
        if there:
            torch._foreach_copy_(*map(list, zip(*there)))
        for p in self.params.values():
            p.grad = None
        return stacked

    def reduce_to_owners(self, stacked: Tensor) -> tuple[Tensor, list]:
        """Start summing the ranks' gradients; (this rank's share, handles to wait for)."""
        if self.world == 1:
            return stacked, []
        if self.even:
            share = torch.empty_like(self.mine, dtype=stacked.dtype)
            return share, [reduce_scatter(share, stacked, async_op=True)]
        runs = [self.run_of(stacked, rank) for rank in range(self.world)]
        return runs[self.rank], [dist.reduce(run, rank, async_op=True) for rank, run in enumerate(runs) if len(run)]

    def had_gradient(self, present: Tensor) -> Tensor:
        """For every block or element of this rank's run whether its parameter had a gradient on any rank.

        present: bool, one for each of `params`.
        """
        sizes = [p.numel() for p in self.params.values()] if self.flat else [1] * self.used
        each = present.repeat_interleave(torch.tensor(sizes, device=present.device), output_size=sum(sizes))
        padded = each.new_zeros(self.offsets[-1])
        padded[:len(each)] = each
        return self.run_of(padded, self.rank).repeat_interleave(self.cut.blocks)

    # ---- weights and state out

    def send_weights(self) -> list:
        """Start giving every rank this rank's weights and taking theirs; handles to wait for."""
        if self.world == 1:
            return []
        if self.even:                           # only NCCL may read the run that it writes
            mine = self.mine if self.mine.is_cuda else self.mine.clone()
            return [all_gather(self.weights, mine, async_op=True)]
        runs = [self.run_of(self.weights, rank) for rank in range(self.world)]
        return [dist.broadcast(run, rank, async_op=True) for rank, run in enumerate(runs) if len(run)]

    def gather(self, share: Tensor, unit: int = 1) -> Tensor:
        """Every rank's share of a tensor that is cut as the bank is, `unit` entries a slot, whole."""
        if self.world == 1:
            return share
        lengths = [(end - start) * unit for start, end in zip(self.offsets, self.offsets[1:])]
        padded = share.new_zeros(max(lengths), *share.shape[1:])
        padded[:len(share)] = share
        full = share.new_empty(max(lengths) * self.world, *share.shape[1:])
        all_gather(full, padded)
        pieces = full.split(max(lengths))
        return torch.cat([piece[:length] for piece, length in zip(pieces, lengths)])

    def kept(self) -> list[tuple[str, Tensor, int]]:
        """(name, tensor, entries a slot) of all that a checkpoint keeps beside the weights."""
        average = [("average", self.average, 1)] if self.average is not None else []
        return [(key, value, self.cut.blocks) for key, value in self.state.items()] + average

    def by_parameter(self) -> dict[str, dict[str, Tensor]]:
        """{parameter name: {state name: tensor}} on the CPU, whole; every rank must call it."""
        whole: dict[str, dict[str, Tensor]] = {name: {} for name in self.params}
        for key, share, unit in self.kept():
            full = self.gather(share, unit)
            pieces = self.split(full) if self.flat else full.split(unit) if unit > 1 else list(full)
            for name, piece in zip(self.params, pieces):
                whole[name][key] = piece.detach().to("cpu", copy=True)
        return whole

    def take_up(self, whole: dict[str, dict[str, Tensor]]) -> None:
        """Fill this rank's state from `by_parameter()`'s result of any number of ranks.

        Raises:
            GroupError: something that this rule keeps is not there.
        """
        for key, share, unit in self.kept():
            for name in self.params:
                if key not in whole.get(name, {}):
                    raise GroupError(f"the checkpoint has no {key} of {name}: it is of another version of the program")
            saved = [whole[name][key] for name in self.params]
            full = (torch.cat([t.reshape(-1) for t in saved]) if self.flat else
                    torch.cat(saved) if unit > 1 else torch.stack(saved))
            padded = full.new_zeros(self.offsets[-1] * unit, *full.shape[1:])
            padded[:len(full)] = full
            share.copy_(self.run_of(padded, self.rank, unit))
