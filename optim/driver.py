"""The one place where optimization meets ranks: who owns which weights, and how they travel.

Parameters that one rule updates alike lie in one contiguous `Bank`, of which every parameter is a view:

    a matrix rule       (slots, rows, cols)   one slot a matrix, equal shapes together, so a step is a batched product
    an elementwise rule (numel,)              everything in the group end to end, so a step is one fused pass

Each rank owns an equal run of the bank's first dimension (padded to a multiple of the number of ranks) with its
optimizer state. A step has three phases: reduce-scatter the gradients to their owners, update what this rank owns,
all-gather the weights. The rules (optim/*.py) know nothing of this, and nothing here knows a formula of theirs.
"""
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.groups import Group, assign


# torch 2.13 renames the two; 2.11 has only the older names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class StepReport(NamedTuple):
    """What a step says about itself, as 0-d float64 tensors on the device, equal on every rank."""
    loss: Tensor                                # summed over the batch's tokens, nats
    grad_norm: Tensor                           # global 2-norm of the reduced gradient, before clipping
    ok: Tensor                                  # 1.0 while every loss and gradient so far was finite
    stops: Tensor                               # how many ranks asked to stop


class Bank:
    """Parameters updated together, with this rank's share of their optimizer state.

    Attributes:
        weights: (slots, rows, cols) or (numel,), padded; the parameters' storage.
        mine: this rank's run of `weights`, a view.
        state: the rule's tensors for `mine`.
        average: float32 running sum for the weight average of `mine`, or None.
    """

    def __init__(self, group: Group, params: dict[str, nn.Parameter], average: bool, rank: int, world: int):
        self.group, self.params, self.world = group, params, world
        first = next(iter(params.values()))
        elementwise = group.hyper.elementwise
        self.used = sum(p.numel() for p in params.values()) if elementwise else len(params)
        padded = -(-self.used // world) * world
        shape = (padded,) if elementwise else (padded, *first.shape)
        self.weights = torch.zeros(shape, dtype=first.dtype, device=first.device)
        for p, view in zip(params.values(), self.split(self.weights)):
            view.copy_(p.data)
            p.data = view
        share = padded // world
        self.mine = self.weights[rank * share:(rank + 1) * share]
        self.state = group.hyper.init(self.mine)
        self.average = torch.zeros_like(self.mine, dtype=torch.float32) if average else None

    def split(self, full: Tensor) -> list[Tensor]:
        """One view a parameter of a tensor laid out as the bank is."""
        if not self.group.hyper.elementwise:
            return list(full[:self.used])
        sizes = [p.numel() for p in self.params.values()]
        return [piece.view(p.shape) for piece, p in zip(full[:self.used].split(sizes), self.params.values())]

    def take_gradients(self) -> Tensor:
        """The gradients in one float32 tensor laid out as the bank; frees the parameters' own."""
        missing = [name for name, p in self.params.items() if p.grad is None]
        assert not missing, f"no gradient reached {', '.join(missing)}"
        stacked = torch.empty_like(self.weights, dtype=torch.promote_types(self.weights.dtype, torch.float32))
        stacked[self.used:].zero_()
        torch._foreach_copy_(self.split(stacked), [p.grad for p in self.params.values()])
        for p in self.params.values():
            p.grad = None
        return stacked

    def reduce_to_owner(self, stacked: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Start summing the ranks' gradients; (this rank's share, handle to wait for)."""
        if self.world == 1:
            return stacked, None
        share = torch.empty_like(self.mine, dtype=stacked.dtype)
        return share, reduce_scatter(share, stacked, async_op=True)

    def gather(self, share: Tensor) -> Tensor:
        """Every rank's share of a tensor that is cut as the bank is, whole."""
        if self.world == 1:
            return share
        full = share.new_empty(share.shape[0] * self.world, *share.shape[1:])
        all_gather(full, share.contiguous())
        return full

    def share_of(self, full: Tensor, rank: int) -> Tensor:
        """This rank's run of a tensor laid out as the bank's used part, padded with zeros."""
        padded = full.new_zeros(self.weights.shape[0], *full.shape[1:])
        padded[:self.used] = full
        size = self.mine.shape[0]
        return padded[rank * size:(rank + 1) * size]


def guarded_update(rule, w, g, state, h, clip, ok, average, decay: float) -> None:
    """The rule's update of `w` and `state`, undone on the device unless `ok`: no host has to look first."""
    kept = [w, *state.values()] + ([average] if average is not None else [])
    before = [t.clone() for t in kept]
    rule.update(w, g * clip.to(g.dtype) if clip is not None else g, state, h)
    if average is not None:
        average.mul_(decay).add_(w, alpha=1 - decay)
    for t, old in zip(kept, before):
        t.copy_(torch.where(ok, t, old))


class Optimizer:
    """Drives every group's rule over all ranks.

    Args:
        params: name -> parameter, in model order; afterwards each is a view into a bank.
        roles: name -> parameter role.
        average: decay d of the weight average E ← d·E + (1-d)·W kept for evaluation, or None.
        compile: compile the update (on a GPU: one fused kernel for an elementwise rule).
    Raises:
        GroupError: a parameter falls in no group or in two.
    """

    def __init__(self, params: dict[str, nn.Parameter], roles: dict[str, str], groups: tuple[Group, ...],
                 average: float | None = None, grad_clip: float | None = None, compile: bool = False):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.params, self.groups, self.grad_clip, self.decay = params, groups, grad_clip, average
        self.device = next(iter(params.values())).device
        self.assignment = assign(groups, roles, {name: tuple(p.shape) for name, p in params.items()})
        self.banks = [Bank(group, {n: params[n] for n in names}, average is not None, self.rank, self.world)
                      for group in groups for names in self._alike(group)]
        scalar = dict(dtype=torch.float64, device=self.device)
        self.varying = {group.name: {key: torch.zeros((), **scalar) for key in (*group.hyper.VARYING, "t")}
                        for group in groups}
        self.ok = torch.ones((), dtype=torch.bool, device=self.device)
        self.averaged_steps = 0
        self._update = guarded_update
        if compile:                             # a graph a bank; past its default limit of 8 dynamo would run eagerly
            torch._dynamo.config.recompile_limit = max(64, 2 * len(self.banks))
            self._update = torch.compile(guarded_update, dynamic=False)

    def _alike(self, group: Group) -> list[list[str]]:
        """The group's parameter names, those that can share a bank together."""
        alike: dict[tuple, list[str]] = {}
        for name in self.assignment[group.name]:
            p = self.params[name]
            alike.setdefault((p.dtype, None if group.hyper.elementwise else p.shape), []).append(name)
        return list(alike.values())

    def set_hyperparameters(self, step: int, schedule, steps: int) -> None:
        """Put step's scheduled values where the updates read them; a kernel launch each, no recompilation."""
        for group in self.groups:
            values = {key: getattr(group.hyper, key) for key in group.hyper.VARYING}
            values["lr"] *= (group.schedule or schedule).at(step, steps)
            values.update({key: s.at(step, steps) for key, s in group.scheduled.items()})
            for key, value in {**values, "t": step + 1}.items():
                self.varying[group.name][key].fill_(value)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, stop: bool = False) -> StepReport:
        """One update from the gradients in the parameters' `.grad`; set_hyperparameters comes first.

        Args:
            step: updates completed so far.
            loss: 0-d, this rank's loss summed over its tokens; summed over ranks for the report.
            stop: whether this rank wants to stop; every rank learns of it from the report.
        """
        reducing = [bank.reduce_to_owner(bank.take_gradients()) for bank in self.banks]     # all in flight at once
        for _, handle in reducing:
            if handle is not None:
                handle.wait()
        shares = [share for share, _ in reducing]
        square_sum = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in shares)
        report = torch.stack([loss.double(), square_sum, torch.full_like(square_sum, float(stop))])
        if self.world > 1:
            dist.all_reduce(report)
        norm = report[1].sqrt()
        # Sticky: after one bad gradient nothing is written any more, so the state stays that from before it.
        self.ok.logical_and_(report[:2].isfinite().all())
        clip = (self.grad_clip / (norm + 1e-6)).clamp(max=1) if self.grad_clip is not None else None
        gathering = []
        for bank, g in zip(self.banks, shares):
            h = self.varying[bank.group.name]
            self._update(bank.group.hyper, bank.mine, g, bank.state, h, clip, self.ok, bank.average, self.decay or 0.)
            if hasattr(bank.group.hyper, "refresh") and bank.group.hyper.refresh_due(step) and self.ok:
                bank.group.hyper.refresh(bank.state)                   # seldom, and waits for the device anyway
            if self.world > 1:
                gathering.append(all_gather(bank.weights, bank.mine.clone(), async_op=True))
        for handle in gathering:
            handle.wait()
        self.averaged_steps = step + 1
        return StepReport(report[0], norm, self.ok.double(), report[2])

    @contextmanager
    def averaged_weights(self):
        """The parameters hold the bias-corrected weight average inside, their own values again after."""
        with torch.no_grad():
            raw = [bank.weights.clone() for bank in self.banks]
            for bank in self.banks if self.averaged_steps else ():
                bank.weights.copy_(bank.gather(bank.average / (1 - self.decay ** self.averaged_steps)))
        try:
            yield
        finally:
            with torch.no_grad():
                for bank, weights in zip(self.banks, raw):
                    bank.weights.copy_(weights)

    def reset(self) -> None:
        """State as before the first step; the weights stay as they are."""
        for bank in self.banks:
            for key, fresh in bank.group.hyper.init(bank.mine).items():
                bank.state[key].copy_(fresh)
            if bank.average is not None:
                bank.average.zero_()
        self.ok.fill_(True)
        self.averaged_steps = 0

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{parameter name: {state name: tensor}} on the CPU, whole and independent of the number of ranks.

        Every rank must call it (owners send their shares); every rank gets it.
        """
        whole: dict[str, dict[str, Tensor]] = {name: {} for name in self.params}
        for bank in self.banks:
            kept = {**bank.state, **({"average": bank.average} if bank.average is not None else {})}
            for key, share in kept.items():
                full = bank.gather(share)
                pieces = bank.split(full) if bank.group.hyper.elementwise else full[:bank.used]
                for name, piece in zip(bank.params, pieces):
                    whole[name][key] = piece.detach().to("cpu", copy=True)
        return whole

    def load_state_dict(self, whole: dict[str, dict[str, Tensor]], step: int) -> None:
        """Take up `state_dict()`'s result, saved after `step` updates on any number of ranks."""
        for bank in self.banks:
            kept = {**bank.state, **({"average": bank.average} if bank.average is not None else {})}
            for key, share in kept.items():
                saved = [whole[name][key] for name in bank.params]
                elementwise = bank.group.hyper.elementwise
                full = torch.cat([t.reshape(-1) for t in saved]) if elementwise else torch.stack(saved)
                share.copy_(bank.share_of(full, self.rank))
        self.ok.fill_(True)
        self.averaged_steps = step
