"""A preset at a size that a test can afford, driven through the real model, optimizer, schedule and loader."""
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from unittest import mock

import numpy as np
import torch

from data.loader import open_data
from data.shards import write_shard
from harness.config import Config
from model.gpt import GPT
from optim.driver import Optimizer

STEPS, WARMUP, WARMDOWN, RAMP = 20, 4, 7, 10        # of a shrunk run; RAMP: of schedules with points at steps
CLIP = 0.75                                         # share of the preset's largest gradient norm: some steps feel it
SEQ, ROWS, VOCAB, PADDED = 16, 16, 61, 64
BATCH = SEQ * ROWS
COUNTS = (BATCH * 5 + 17, BATCH * 6, BATCH * 9 + 130)      # tokens a shard: ranks turn to the next at different steps


def write_shards(folder) -> None:
    """Text of sorts: a token follows from the one before it, mostly, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for number, count in enumerate((*COUNTS, 2 * BATCH)):
        kind = "train" if number < len(COUNTS) else "val"
        tokens = np.where(rng.random(count) < 0.8, np.cumsum(rng.integers(1, 4, count)) % VOCAB,
                          rng.integers(0, VOCAB, count))
        write_shard(folder / f"{kind}_{number}.bin", tokens.astype(np.uint16))


def shrunk(config: Config, folder, **model) -> Config:
    """The preset with few, short and narrow layers, 20 steps, and its schedules' times scaled to them."""
    small = dict(layers=2, heads=2, width=32, vocab_size=VOCAB,
                 padded_vocab_size=config.model.padded_vocab_size and PADDED)
    groups = tuple(replace(group, schedule=group.schedule and hurried(group.schedule),
                           scheduled={key: hurried(each) for key, each in group.scheduled.items()})
                   for group in config.optim)
    data = replace(config.data, train=f"{folder}/train_*.bin", val=f"{folder}/val_*.bin", repeat=True)
    return replace(config, steps=STEPS, batch_tokens=BATCH, micro_batch_tokens=BATCH // 2, seq_len=SEQ,
                   val_tokens=BATCH, val_every=STEPS, model=replace(config.model, **{**small, **model}), data=data,
                   optim=groups, schedule=hurried(config.schedule),
                   grad_clip=config.grad_clip and CLIP * config.grad_clip)


def hurried(schedule):
    points = tuple(replace(point, step=point.step and RAMP) for point in schedule.points)
    return replace(schedule, warmup_steps=schedule.warmup_steps and WARMUP, points=points,
                   cooldown_steps=schedule.cooldown_steps and WARMDOWN)


@contextmanager
def products_in(dtype: torch.dtype):
    """All arithmetic in float64, or Newton-Schulz steps in bfloat16 whatever this processor is fast in."""
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("optim.")]
    patches = [mock.patch.object(module, "iteration_dtype", lambda *_: dtype) for module in loaded
               if hasattr(module, "iteration_dtype")]
    before = torch.get_default_dtype()
    if dtype == torch.float64:
        patches.append(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        torch.set_default_dtype(torch.float64)
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        torch.set_default_dtype(before)


def losses_of(config: Config, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights before, and the mean loss of every step, as train.py makes them on one rank; inside `products_in`."""
    model = GPT(config.model, config.seq_len, dtype)
    model.init_weights(config.seed)
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = Optimizer(params, model.roles(), config.optim, config.average, config.grad_clip, False,
                          config.model.heads, config.model.tied, model.qk_parameters(), "torch")
    batch_tokens = [config.batch_tokens] * config.steps
    positions, rows = list(accumulate(batch_tokens, initial=0)), config.batch_tokens // config.seq_len
    train, _ = open_data(config.data, config.seq_len, config.val_tokens, config.model.vocab_size, batch_tokens)
    losses, micro_rows = [], config.micro_batch_tokens // config.seq_len
    for step in range(config.steps):
        optimizer.set_hyperparameters(step, config.schedule, config.steps)
        loss = torch.zeros((), dtype=torch.float64)
        for first in range(0, rows, micro_rows):
            arrays = train.rows(step, positions[step], config.batch_tokens, first, first + micro_rows)
            micro_loss = model(*map(torch.from_numpy, arrays))
            (micro_loss / config.batch_tokens if config.loss_reduction == "mean" else micro_loss).backward()
            loss += micro_loss.detach()
        report = optimizer.step(step, loss)
        assert report.ok
        losses.append(report.loss.item() / config.batch_tokens)
    return before, losses
