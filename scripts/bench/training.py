"""A training step as train.py takes it, and the plain one beside it."""
import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from data.loader import open_data
from data.shards import write_shard
from harness import preflight, processes
from harness.config import Config
from model.gpt import GPT
from optim.driver import Optimizer
from scripts.bench.report import BenchError
from scripts.plain_gpt import PlainGPT

Micro = tuple[Tensor, ...]                  # what the model is called with: inputs and targets (rows, seq_len), ...


class TrainingStep:
    """Model, optimizer and data of a configuration, on one device; `take` is one step.

    The calls that make model and optimizer are train.py's own, word for word (a test holds them together).
    `note` is called with the name of what begins: "loop", "optimizer".
    Raises:
        ConfigError, GroupError, ShardError: what train.py would refuse.
    """

    def __init__(self, cfg: Config, device: torch.device):
        with torch.device("meta"):
            sketch = GPT(cfg.model, cfg.seq_len)
        preflight.check(cfg, sketch)
        preflight.check_kernels(cfg, device)
        self.cfg, self.device, self.step = cfg, device, 0
        dtype, _ = processes.activation_dtype(cfg.precision, device)
        compiled, _ = processes.compilation(cfg.compile, device)
        with device:
            model = GPT(cfg.model, cfg.seq_len, dtype, track_logits=cfg.needs_logits)
        model.init_weights(cfg.seed)
        optimizer = make_optimizer(cfg, model, compiled)
        optimizer.init_weights(cfg.seed)
        self.dtype, self.compiled, self.model, self.optimizer = dtype, compiled, model, optimizer
        self.forward = torch.compile(model, dynamic=False) if self.compiled else model
        self.tokens, self.folder, self.loader = training_tokens(cfg)
        self.micro_rows = (cfg.micro_batch_tokens or cfg.batch_tokens) // cfg.seq_len
        self.note: Callable[[str], None] = lambda part: None

    def read(self, step: int) -> list:
        """The step's micro-batches, as arrays."""
        cfg, rows = self.cfg, self.cfg.batch_tokens // self.cfg.seq_len
        return [self.loader.rows(step, step * cfg.batch_tokens, cfg.batch_tokens, i, min(i + self.micro_rows, rows))
                for i in range(0, rows, self.micro_rows)]

    def batch(self) -> list[Micro]:
        """The first step's micro-batches, on the device."""
        return [tuple(torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in micro)
                for micro in self.read(0)]

    def backward(self, batch: list[Micro]) -> Tensor:
        """Leave the gradient in .grad; the loss, summed over tokens."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in batch:
            micro_loss = self.forward(*micro)
            (micro_loss / self.cfg.batch_tokens if self.cfg.loss_reduction == "mean" else micro_loss).backward()
            self.note("loop")
            loss += micro_loss.detach()
        return loss

    def take(self, batch: list[Micro]) -> None:
        self.note("loop")
        self.optimizer.set_hyperparameters(min(self.step, self.cfg.steps - 1), self.cfg.schedule, self.cfg.steps)
        self.model.reset_max_logits()
        loss = self.backward(batch)
        self.note("optimizer")
        self.optimizer.step(self.step, loss, False, self.model.max_logits())
        self.note("loop")
        self.step += 1

    def fits(self, micro_batches: int | None = None) -> bool:
        """Whether two steps, of all micro-batches or the first few, find the memory they need; they compile, too."""
        try:
            batch = self.batch()[:micro_batches]
            for _ in range(2):                                        # the second finds optimizer state and caches
                self.take(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            pass                                                      # out of here the traceback holds no tensors
        self.model.zero_grad(set_to_none=True)
        self.optimizer.sent.clear()                                   # gradients taken by a step that did not end
        torch.cuda.empty_cache()
        return False

    def settle(self, micro_batches: int | None = None) -> None:
        """Warm up, and halve the micro-batch until it fits, as train.py does."""
        while not self.fits(micro_batches):
            if self.micro_rows == 1:
                raise BenchError(f"{self.cfg.name}: out of memory with one row of {self.cfg.seq_len} tokens")
            self.micro_rows = -(-self.micro_rows // 2)


def make_optimizer(cfg: Config, model: GPT, compiled: bool) -> Optimizer:
    params, roles = dict(model.named_parameters()), model.roles()
    return Optimizer(params, roles, cfg.optim, cfg.average, cfg.grad_clip, compiled,
                     cfg.model.heads, cfg.model.tied, model.qk_parameters(), cfg.kernels)


def training_tokens(cfg: Config):
    """(in words, folder to keep, loader): the configuration's shards; where none match, random ones made for this."""
    if glob.glob(cfg.data.train) and glob.glob(cfg.data.val):
        words, folder, data = cfg.data.train, None, cfg.data
    else:
        words, folder = f"random, for nothing matches {cfg.data.train}", TemporaryDirectory()
        random = np.random.default_rng(0)
        for name in ("train", "val"):
            tokens = random.integers(cfg.model.vocab_size, size=2 * cfg.batch_tokens + 2, dtype=np.uint16)
            write_shard(Path(folder.name) / f"{name}.bin", tokens)
        data = replace(cfg.data, train=f"{folder.name}/train.bin", val=f"{folder.name}/val.bin")
    train, _ = open_data(replace(data, repeat=True), cfg.seq_len, cfg.seq_len, cfg.model.vocab_size)
    return words, folder, train


def plain_step(cfg: Config, batch: list[Micro]) -> Callable[[], None]:
    """A step of the same shape in PlainGPT with torch.optim.AdamW, on the same tokens."""
    with batch[0][0].device:
        model = PlainGPT(cfg.model.vocab_size, cfg.model.layers, cfg.model.heads, cfg.model.width, cfg.seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def take() -> None:
        for inputs, targets, *_ in batch:
            (model(inputs, targets) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take
