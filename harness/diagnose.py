"""Which parameter went wrong first.

The batch is a pure function of the step and nothing was written from the bad gradient, so the step can be run again,
uncompiled and off the hot path, to find the culprit.
"""
import torch
from torch import nn

from harness.processes import Processes


def name_culprit(procs: Processes, model: nn.Module, batch: list) -> str:
    """Repeat a step's forward and backward passes; what is not finite, in words. Every rank must call it.

    Args:
        batch: this rank's micro-batches on the device: inputs, targets (rows, seq_len), perhaps documents (k,).
    """
    model.zero_grad(set_to_none=True)
    losses = []
    for inputs, targets, *documents in batch:
        rows, seq_len = inputs.shape
        for row in range(rows):                         # row by row: uncompiled, a whole micro-batch may not fit
            bounds = [(each - row * seq_len).clamp(0, seq_len) for each in documents]
            loss = model(inputs[row:row + 1], targets[row:row + 1], *bounds)
            loss.backward()
            losses.append(loss.detach())
    named = list(model.named_parameters())
    for name, p in named:
        if procs.all_max(float(not p.detach().isfinite().all())):
            return f"parameter {name} itself"
    bad = [name for name, p in named if procs.all_max(float(p.grad is not None and not p.grad.isfinite().all()))]
    bad_loss = procs.all_max(float(not torch.stack(losses).isfinite().all()))
    model.zero_grad(set_to_none=True)
    if bad:
        return f"the gradient of {bad[0]} (the first of {len(bad)} bad ones)" + (", and the loss," if bad_loss else "")
    return "the loss" if bad_loss else "a value that was finite when the step was repeated (a hardware fault?) "
