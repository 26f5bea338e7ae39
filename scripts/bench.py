"""Speed, as ratios measured in one run on one machine.

    python -m scripts.bench step                      a training step of demo.yaml against plain eager float32 PyTorch
    python -m scripts.bench step --config muon.yaml batch_tokens=8192     ... of another configuration

The two sides take turns (A B B A A B ...), so that a machine that slows down slows both; the ratio is the median over
rounds, with the smallest and largest round.
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from harness import processes
from harness.config import Config
from harness.load import ConfigError, load
from model.gpt import GPT
from optim.driver import Optimizer
from scripts.plain_gpt import PlainGPT


def our_step(config: Config, device: torch.device) -> Callable[[], None]:
    """A training step as train.py takes it, on one fixed batch."""
    dtype, _ = processes.activation_dtype(config.precision, device)
    with device:
        model = GPT(config.model, config.seq_len, dtype)
    model.init_weights(config.seed)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = Optimizer(dict(model.named_parameters()), model.roles(), config.optim, config.average, config.grad_clip,
                          compiled, config.model.heads, config.model.tied)
    micro_rows = (config.micro_batch_tokens or config.batch_tokens) // config.seq_len
    batches = random_batch(config, device).split(micro_rows)
    step = 0

    def take() -> None:
        nonlocal step
        optimizer.set_hyperparameters(step, config.schedule, config.steps)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for tokens in batches:
            micro_loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            (micro_loss / config.batch_tokens).backward()
            loss += micro_loss.detach()
        optimizer.step(step, loss)
        step += 1
    return take


def plain_step(config: Config, device: torch.device) -> Callable[[], None]:
    """The same shape in PlainGPT with torch.optim.AdamW."""
    with device:
        model = PlainGPT(config.model.vocab_size, config.model.layers, config.model.heads, config.model.width,
                         config.seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    micro_rows = (config.micro_batch_tokens or config.batch_tokens) // config.seq_len
    batches = random_batch(config, device).split(micro_rows)

    def take() -> None:
        for tokens in batches:
            (model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return take


def random_batch(config: Config, device: torch.device) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    rows = config.batch_tokens // config.seq_len
    return torch.randint(config.model.vocab_size, (rows, config.seq_len + 1), generator=g).to(device)


def seconds(step: Callable[[], None], times: int, device: torch.device) -> float:
    """Mean seconds of one of `times` steps."""
    started = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def interleave(a: Callable[[], None], b: Callable[[], None], rounds: int, times: int,
               device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds a step of both, a list over rounds each, after one untimed round."""
    seconds(a, times, device), seconds(b, times, device)
    times_a, times_b = [], []
    for i in range(rounds):
        order = [(a, times_a), (b, times_b)]
        for side, into in order if i % 2 == 0 else reversed(order):
            into.append(seconds(side, times, device))
    return times_a, times_b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step"])
    parser.add_argument("--config", default="demo.yaml")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    args, overrides = parser.parse_known_args()
    try:
        config = load(args.config, overrides).config
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = processes.start().device
    ours, plain = interleave(our_step(config, device), plain_step(config, device), args.rounds, args.steps, device)
    ratios = [p / o for o, p in zip(ours, plain)]
    print(f"{processes.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}, {args.rounds} rounds of {args.steps} steps of {config.batch_tokens:,} tokens")
    for name, runs in ((config.name, ours), ("plain eager float32 + AdamW", plain)):
        middle = statistics.median(runs)
        print(f"{name:<30}{1e3 * middle:8.2f} ms/step{config.batch_tokens / middle:12,.0f} tokens/s")
    print(f"{'ratio':<30}{statistics.median(ratios):8.2f} x  (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
