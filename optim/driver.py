"""The one place where optimization meets ranks: when gradients travel, who updates what, when weights travel.

A step has three phases: sum the gradients to the owners of their weights, update what this rank owns, send the
weights to everyone. Gradients leave bank by bank in the order in which a backward pass finishes them, while it still
goes on; weights leave as soon as their bank is updated, while the next one is. What lies in a bank and who owns it is
decided by optim/plan.py, how it travels by optim/bank.py. The rules (optim/*.py) know nothing of this, and nothing
here knows a formula of theirs.
"""
import zlib
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim import backend
from optim.bank import Bank
from optim.bases import FAILURES
from optim.blocks import rescale_heads
from optim.constraints import fuses, guarded_update, update
from optim.groups import Group, assign
from optim.orthogonalise import iteration_dtype
from optim.plan import plan_banks


class StepReport(NamedTuple):
    """What a step says about itself, as 0-d float64 tensors on the device, equal on every rank."""
    loss: Tensor                                # summed over the batch's tokens, nats
    grad_norm: Tensor                           # global 2-norm of the reduced gradient, before clipping
    ok: Tensor                                  # 1.0 while every loss and gradient so far was finite
    stops: Tensor                               # how many ranks asked to stop


class Optimizer:
    """Drives every group's rule over all ranks.

    Args:
        params: name -> parameter, in model order; afterwards each is a view into a bank.
        roles: name -> parameter role.
        heads, tied: attention heads a layer, and whether the head is the embedding; they decide logical blocks.
        average: decay d of the weight average E ← d·E + (1-d)·W kept for evaluation, or None.
        compile: compile the updates (one fused kernel for an elementwise rule).
        qk: attention -> names of its query and key weights (heads·d, cols) and biases (heads·d,).
        kernels: what makes the products of orthogonalisations (optim/backend.py); a choice for the whole process.
    Raises:
        GroupError: a parameter falls in no group or in two, or an option does not suit a group.
        ValueError: the kernels cannot be had here.
    """

    def __init__(self, params: dict[str, nn.Parameter], roles: dict[str, str], groups: tuple[Group, ...],
                 average: float | None = None, grad_clip: float | None = None, compile: bool = False,
                 heads: int = 1, tied: bool = False, qk: dict[str, list[str]] = {}, kernels: backend.Kernels = "auto"):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.params, self.groups, self.grad_clip, self.decay = params, groups, grad_clip, average
        self.device, self.compiled = next(iter(params.values())).device, compile
        self.why_not_triton = backend.choose(kernels, self.device)
        assignment = assign(groups, roles, {name: tuple(p.shape) for name, p in params.items()})
        plans = plan_banks(groups, assignment, params, roles, heads, tied, self.world)
        self.banks = [Bank(plan, params, average is not None, self.rank, self.world) for plan in plans]
        scalar = dict(dtype=torch.float64, device=self.device)
        self.varying = {group.name: {key: torch.zeros((), **scalar) for key in (*group.hyper.VARYING, "t")}
                        for group in groups}
        # A device must not be waited for, so it decides itself whether an update counts; a CPU is never behind.
        self.host_may_look = self.device.type == "cpu"
        self.ok = torch.ones((), dtype=torch.bool, device=self.device)
        self.all_present = torch.ones(len(params), **scalar)
        self.averaged, self.averaged_steps, self.count = False, 0, {group.name: 0 for group in groups}
        for bank in self.banks:
            self.count[bank.group.name] += len(bank.params) * bank.cut.blocks
        plain = fused = (update, guarded_update)
        if compile:                             # a graph a bank; past its default limit of 8 dynamo would run eagerly
            torch._dynamo.config.recompile_limit = max(64, 4 * len(self.banks))
            fused = tuple(torch.compile(f, dynamic=False) for f in plain)
        # On a CPU only elementwise ones: torch 2.13's CPU code generation fails on several others (KeyError in
        # codegen/cpp.py), whose time goes into products anyway.
        self.updates = {id(bank): fused if bank.flat or not self.host_may_look else plain for bank in self.banks}
        rules = {name: bank.rule for bank in self.banks for name in bank.params}
        self.clipped = {attn: (rules[names[0]], [params[name] for name in names])
                        for attn, names in qk.items() if rules[names[0]].clips_heads}
        self._expect_gradients_in_backward_order()

    @property
    def orthogonalisation(self) -> str:
        """How matrices are orthogonalised here, in words."""
        rules = [group.hyper for group in self.groups if group.hyper.orthogonalises]
        dtypes = [iteration_dtype(rule.ns_dtype, self.device, getattr(rule, "ns_form", "standard")) for rule in rules]
        if not rules:
            return "none"
        by_torch = "compiled torch" if self.compiled and not self.host_may_look else "plain torch"
        names: dict[str, list[str]] = {}
        for dtype in dict.fromkeys(dtypes):
            code = "Triton" if backend.takes(self.device, dtype) else by_torch
            names.setdefault(code, []).append(str(dtype).removeprefix("torch."))
        words = "; ".join(f"{code} in {', '.join(found)}" for code, found in names.items())
        return words + (f" ({self.why_not_triton})" if self.why_not_triton else "")

    def failures(self) -> int:
        """How many decompositions failed since the last `reset`, on all ranks; every rank must call it."""
        count = torch.tensor(float(sum(FAILURES.values())), device=self.device)
        if self.world > 1:
            dist.all_reduce(count)
        return int(count)

    # ---- before the run

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Let rules that want certain initial weights draw them: by seed and name, equal on every rank."""
        for bank in self.banks:
            for name, p in bank.params.items() if not bank.flat else ():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} optim".encode()))
                whole = torch.empty(1, *p.shape)
                blocks = bank.cut.take(whole)
                drawn = [bank.rule.initial_weights(*blocks.shape[1:], generator) for _ in blocks]
                if None not in drawn:
                    blocks.copy_(torch.stack(drawn))
                    bank.cut.put(whole, blocks)
                    p.copy_(whole[0])

    def reset(self) -> None:
        """State as before the first step; the weights stay as they are."""
        for bank in self.banks:
            for key, fresh in bank.fresh_state().items():
                bank.state[key].copy_(fresh)
            if bank.average is not None:
                bank.average.zero_()
        self.ok.fill_(True)
        self.averaged_steps = 0
        FAILURES.clear()

    def set_hyperparameters(self, step: int, schedule, steps: int) -> None:
        """Put step's scheduled values where the updates read them; a kernel launch each, no recompilation."""
        for group in self.groups:
            values = {key: getattr(group.hyper, key) for key in group.hyper.VARYING}
            values["lr"] *= (group.schedule or schedule).at(step, steps)
            values.update({key: s.at(step, steps) for key, s in group.scheduled.items()})
            for key, value in {**values, "t": step + 1}.items():
                self.varying[group.name][key].fill_(value)

    # ---- gradients, as a backward pass finishes them

    def _expect_gradients_in_backward_order(self) -> None:
        """Have a bank's gradients leave when its last one is there. The order is fixed, for ranks must agree on it."""
        place = {name: index for index, name in enumerate(self.params)}
        self.backward_order = sorted(self.banks, key=lambda bank: -min(place[name] for name in bank.params))
        self.to_send: deque[Bank] = deque()
        self.unfinished: dict[int, int] = {}
        self.sent: dict[int, tuple[Tensor, list]] = {}
        for bank in self.banks if self.world > 1 else ():
            for p in bank.params.values():
                p.register_post_accumulate_grad_hook(partial(self._gradient_came, bank))

    def expect_last_gradients(self) -> None:
        """The next backward pass is the batch's last: send what it finishes while it goes on."""
        self.to_send = deque(self.backward_order)
        self.unfinished = {id(bank): len(bank.params) for bank in self.banks}

    def _gradient_came(self, bank: Bank, p: Tensor) -> None:
        if self.to_send:
            self.unfinished[id(bank)] -= 1
            while self.to_send and not self.unfinished[id(self.to_send[0])]:
                self._send_gradients(self.to_send.popleft())

    @torch.no_grad()
    def _send_gradients(self, bank: Bank) -> None:
        self.sent[id(bank)] = bank.reduce_to_owners(bank.take_gradients())

    @torch.no_grad()
    def reduced_gradients(self) -> list[Tensor]:
        """This rank's share of every bank's gradient, summed over ranks; the parameters' `.grad` are free after."""
        for bank in self.backward_order:
            if id(bank) not in self.sent:
                self._send_gradients(bank)
        self.to_send.clear()
        for _, handles in self.sent.values():
            for handle in handles:
                handle.wait()
        shares = [self.sent[id(bank)][0] for bank in self.banks]
        self.sent.clear()
        return shares

    # ---- a step

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, stop: bool = False, max_logits: dict[str, Tensor] = {}) -> StepReport:
        """One update from the gradients in the parameters' `.grad`; set_hyperparameters comes first.

        A parameter that has no gradient on any rank stays untouched, and so does its state.

        Args:
            step: updates completed so far.
            loss: 0-d, this rank's loss summed over its tokens; summed over ranks for the report.
            stop: whether this rank wants to stop; every rank learns of it from the report.
            max_logits: attention -> largest logit of each head (heads,) on this rank, for rules that clip heads.
        """
        assert not self.averaged, "a step inside averaged_weights() would be lost"
        shares = self.reduced_gradients()
        square_sum = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in shares)
        report = torch.cat([torch.stack([loss.double(), square_sum, torch.full_like(square_sum, float(stop))]),
                            self._present_here()])
        if self.world > 1:
            dist.all_reduce(report)
        norm = report[1].sqrt()
        # Sticky: after one bad gradient nothing is written any more, so the state stays that from before it.
        self.ok.logical_and_(report[:2].isfinite().all())
        clip = (self.grad_clip / (norm + 1e-6)).clamp(max=1) if self.grad_clip is not None else None
        present = (report[3:] > 0).split([len(bank.params) for bank in self.banks])
        gathering = []
        for bank, g, there in zip(self.banks, shares, present):
            if len(bank.mine):
                self._update_bank(bank, g, clip, there)
            gathering += bank.send_weights()
            if len(bank.mine):
                self._refresh(bank, step, there)                       # while the weights travel
        for handle in gathering:
            handle.wait()
        self._clip_heads(max_logits)
        self._advance_averages()
        self.averaged_steps = step + 1
        return StepReport(report[0], norm, self.ok.double(), report[2])

    def _present_here(self) -> Tensor:
        """1.0 for every parameter, in the order of the banks, that had a gradient on this rank; made only if needed."""
        if not any(bank.missing for bank in self.banks):
            return self.all_present
        return torch.cat([torch.tensor([float(place not in bank.missing) for place in range(len(bank.params))],
                                       dtype=torch.float64, device=self.device) for bank in self.banks])

    def _update_bank(self, bank: Bank, g: Tensor, clip: Tensor | None, present: Tensor) -> None:
        h, W, G = self.varying[bank.group.name], bank.blocks(bank.mine), bank.blocks(g)
        plainly, guardedly = self.updates[id(bank)]
        keep = self.ok & bank.had_gradient(present) if bank.missing else self.ok
        if fuses(bank.group, W):
            bank.rule.fused_update(W, G, bank.state, h, clip, keep)
        elif bank.missing or not self.host_may_look:
            guardedly(bank.group, W, G, bank.state, h, clip, keep)
        elif self.ok:
            plainly(bank.group, W, G, bank.state, h, clip)
        if not bank.flat:
            bank.cut.put(bank.mine, W)

    def _refresh(self, bank: Bank, step: int, present: Tensor) -> None:
        """The rule's seldom work for those of this rank's matrices for which it is due."""
        if bank.flat:
            return
        here = range(len(bank.mine) * bank.cut.blocks)
        if bank.missing:
            here = bank.had_gradient(present).nonzero().flatten().tolist()
        first, count = bank.plan.first + bank.offsets[self.rank] * bank.cut.blocks, self.count[bank.group.name]
        for start, end in runs([i for i in here if bank.rule.refresh_due(step, first + i, count)]):
            state = {key: value[start:end] for key, value in bank.state.items()}
            if not self.host_may_look:
                fresh = {key: value.clone() for key, value in state.items()}
                bank.rule.refresh(fresh, step)
                for key, value in state.items():
                    value.copy_(torch.where(self.ok, fresh[key], value))
            elif self.ok:
                bank.rule.refresh(state, step)

    def _clip_heads(self, max_logits: dict[str, Tensor]) -> None:
        """Scale heads on every rank alike: they all hold the weights, and the largest logits of all ranks."""
        if not self.clipped:
            return
        largest = torch.stack([max_logits[attn] for attn in self.clipped])           # (layers, heads)
        if self.world > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        for (rule, params), max_logit in zip(self.clipped.values(), largest):
            factors = torch.where(self.ok, rule.clip_factors(max_logit), 1.0)
            for p in params:
                rescale_heads(p, factors)

    def _advance_averages(self) -> None:
        if self.decay is not None:
            fresh = (1 - self.decay) * self.ok.float()                # 0 after a bad gradient
            for bank in self.banks:
                bank.average.lerp_(bank.mine.float(), fresh)

    # ---- evaluation and checkpoints

    @contextmanager
    def averaged_weights(self):
        """The parameters hold the bias-corrected weight average inside, their own values again after."""
        raw = [bank.weights.clone() for bank in self.banks]
        self.averaged = True
        try:
            with torch.no_grad():
                for bank in self.banks if self.averaged_steps else ():
                    bank.weights.copy_(bank.gather(bank.average / (1 - self.decay ** self.averaged_steps)))
            yield
        finally:
            self.averaged = False
            with torch.no_grad():
                for bank, weights in zip(self.banks, raw):
                    bank.weights.copy_(weights)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{parameter name: {state name: tensor}} on the CPU, whole and independent of the number of ranks.

        Every rank must call it (owners send their shares); every rank gets it.
        """
        pieces = {name: state for bank in self.banks for name, state in bank.by_parameter().items()}
        return {name: pieces[name] for name in self.params}

    def load_state_dict(self, whole: dict[str, dict[str, Tensor]], step: int) -> None:
        """Take up `state_dict()`'s result, saved after `step` updates on any number of ranks."""
        for bank in self.banks:
            bank.take_up(whole)
        self.ok.fill_(True)
        self.averaged_steps = step


def runs(places: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as (first, last + 1) of stretches without a gap."""
    starts = [p for i, p in enumerate(places) if i == 0 or places[i - 1] != p - 1]
    ends = [p + 1 for i, p in enumerate(places) if i == len(places) - 1 or places[i + 1] != p + 1]
    return list(zip(starts, ends))
