"""A training step of a configuration, in turns with one of plain eager float32 PyTorch of the same shape.

    python -m scripts.bench step                                          demo.yaml
    python -m scripts.bench step --config muon.yaml batch_tokens=8192     another configuration, with overrides
    python -m scripts.bench step --breakdown                              where the time goes, memory, MFU
    python -m scripts.bench step --largest-micro-batch --memory-gib 24    the most tokens at once, and their speed

The two sides take turns (A B B A A B ...), so that a machine that slows down slows both; the ratio is the median over
rounds, with the smallest and largest round. Batches are those of the configuration's shards, or random tokens.
"""
import statistics

from data.arguments import at_least
from scripts.bench.report import BenchError, Parser, header, one_device


def main(arguments: list[str]) -> int:
    parser = Parser("step", __doc__)
    parser.add_argument("--config", default="demo.yaml")
    parser.add_argument("--rounds", type=at_least(1), default=10)
    parser.add_argument("--steps", type=at_least(1), default=10, help="steps a round")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--breakdown", action="store_true", help="where the time of a step goes, over --steps steps")
    what.add_argument("--largest-micro-batch", action="store_true", help="the most tokens that fit, on a GPU")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="of the GPU's memory use no more than this")
    args, overrides = parser.parse_known_args(arguments)
    if args.memory_gib is not None and not (args.largest_micro_batch and args.memory_gib > 0):
        parser.error("argument --memory-gib: a positive number, and only with --largest-micro-batch")
    from harness.load import load                                     # here and below: what takes its time to load
    cfg = load(args.config, overrides).config
    device = one_device()
    if args.breakdown:
        from scripts.bench.breakdown import breakdown
        print("\n".join(breakdown(cfg, device, args.steps)))
    elif args.largest_micro_batch:
        print("\n".join(largest_micro_batch(cfg, device, args.memory_gib, args.rounds)))
    else:
        print("\n".join(against_plain(cfg, device, args.rounds, args.steps)))
    return 0


def against_plain(cfg, device, rounds: int, steps: int) -> list[str]:
    from scripts.bench.interleave import interleave, seconds
    from scripts.bench.training import TrainingStep, plain_step
    ours = TrainingStep(cfg, device)
    ours.settle()
    batch = ours.batch()
    plain = plain_step(cfg, batch)
    times, plain_times = interleave([lambda: seconds(lambda: ours.take(batch), steps, device),
                                     lambda: seconds(plain, steps, device)], rounds)
    ratios = [p / o for o, p in zip(times, plain_times)]
    lines = [header(device, f"{rounds} rounds of {steps} steps of {cfg.batch_tokens:,} tokens")]
    for name, runs in ((cfg.name, times), ("plain eager float32 + AdamW", plain_times)):
        lines.append(speed(name, statistics.median(runs), cfg.batch_tokens))
    return [*lines, f"{'ratio':<30}{statistics.median(ratios):8.2f} x  (rounds {min(ratios):.2f} to {max(ratios):.2f})"]


def speed(name: str, step_s: float, tokens: int) -> str:
    return f"{name:<30}{1e3 * step_s:8.2f} ms/step{tokens / step_s:12,.0f} tokens/s"


def largest_micro_batch(cfg, device, memory_gib: float | None, rounds: int) -> list[str]:
    if device.type != "cuda":
        raise BenchError("--largest-micro-batch needs a GPU: a CPU's memory has no limit that a program may try out")
    import torch

    from scripts.bench.interleave import seconds
    from scripts.bench.training import TrainingStep
    total = torch.cuda.get_device_properties(device).total_memory
    if memory_gib is not None:
        if memory_gib * 2**30 > total:
            raise BenchError(f"--memory-gib {memory_gib:g}: this GPU has {total / 2**30:.1f}")
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / total, device)
    ours = TrainingStep(cfg, device)

    def fits(rows: int) -> bool:
        ours.micro_rows = rows
        return ours.fits(2)                                           # the second finds the first one's gradients
    rows = largest(fits, ours.micro_rows, cfg.batch_tokens // cfg.seq_len)
    if rows == 0:
        raise BenchError(f"{cfg.name}: out of memory with one row of {cfg.seq_len} tokens")
    ours.micro_rows = rows
    ours.settle()                                                     # the last micro-batch may be a smaller one
    torch.cuda.reset_peak_memory_stats()
    batch = ours.batch()
    step_s = statistics.median(seconds(lambda: ours.take(batch), 1, device) for _ in range(rounds))
    limit = f"{memory_gib:g} GiB of " if memory_gib is not None else ""
    return [header(device, f"{limit}{total / 2**30:.1f} GiB, without the CUDA context",
                   f"{rounds} steps of {cfg.batch_tokens:,} tokens"),
            f"{'largest micro-batch':<30}{ours.micro_rows * cfg.seq_len:8,} tokens ({ours.micro_rows} rows)",
            f"{'peak memory':<30}{torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB",
            speed(cfg.name, step_s, cfg.batch_tokens)]


def largest(fits, start: int, limit: int) -> int:
    """The largest of 1..limit that fits, where all smaller ones do too; 0 if none does. Doubles or halves from
    `start`, then bisects; asks no number twice."""
    good, bad, trying = 0, limit + 1, start
    while bad - good > 1:
        if fits(trying):
            good = trying
        else:
            bad = trying
        trying = min(2 * good, limit) if bad > limit else bad // 2 if good == 0 else (good + bad) // 2
    return good
