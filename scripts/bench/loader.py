"""Reading batches: tokens a second of one process, and whether a step ever waits for them.

    python -m scripts.bench loader                                        muon.yaml's shards
    python -m scripts.bench loader --config X key=value ...               another configuration, with overrides
    python -m scripts.bench loader --shards 10             ten shards made for it, of random documents, 10^8 tokens each

One process reads what one of --ranks ranks reads of each batch, in the orders continuous, spread and documents: first
with the shards' pages dropped from the page cache, then with them there. The share is of a step of --step-ms, by
default that of the fastest record (78.5 s for 1,375 steps on 8 H100). Then Prefetcher reads for a consumer that
sleeps so long for each step: what it waits in `get` is what a step would wait.
"""
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from data.arguments import at_least
from scripts.bench.report import BenchError, Parser, header, one_device

ORDERS = ("continuous", "spread", "documents")
SHARD_TOKENS = 10**8
END_OF_TEXT = 50256


def main(arguments: list[str]) -> int:
    parser = Parser("loader", __doc__)
    parser.add_argument("--config", default="muon.yaml")
    parser.add_argument("--ranks", type=at_least(1), default=8, help="ranks that share a batch (%(default)s)")
    parser.add_argument("--steps", type=at_least(2), default=50, help="steps to read (%(default)s)")
    parser.add_argument("--step-ms", type=at_least(1), default=57, help="of training (%(default)s)")
    parser.add_argument("--shards", type=at_least(1), help="make so many instead of reading data.train")
    args, overrides = parser.parse_known_args(arguments)
    from harness.load import load                                     # here and below: what takes its time to load
    cfg, device = load(args.config, overrides).config, one_device()
    from data.shards import find_shards
    with ExitStack() as stack:
        if args.shards is None:
            paths, what = find_shards(cfg.data.train), f"shards {cfg.data.train}"
        elif cfg.data.tokenizer != "gpt2" or cfg.model.vocab_size <= END_OF_TEXT:
            raise BenchError("--shards makes GPT-2 tokens: leave it out, or take a configuration with that vocabulary")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shards-", dir=".")))
            paths, what = make_shards(folder, args.shards), f"{args.shards} made shards"
        lines = [header(device, f"{what}, {sum(path.stat().st_size for path in paths) / 1e9:.1f} GB"), "",
                 *opening(cfg, paths), "", *reading(cfg, paths, device, args.ranks, args.steps, args.step_ms / 1e3)]
    print("\n".join(lines))
    return 0


def make_shards(folder: Path, count: int) -> list[Path]:
    """Shards of random tokens in documents whose lengths are log-normal, of 900 tokens in the mean."""
    import numpy as np

    from data.shards import write_shard
    for number in range(count):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, END_OF_TEXT, SHARD_TOKENS, dtype=np.uint16)
        starts = np.cumsum(np.maximum(1, rng.lognormal(6.2, 1.1, SHARD_TOKENS // 800)).astype(np.int64))
        tokens[starts[starts < SHARD_TOKENS]] = END_OF_TEXT
        write_shard(folder / f"train_{number:06d}.bin", tokens)
    return sorted(folder.glob("train_*.bin"))


def opening(cfg, paths: list[Path]) -> list[str]:
    """Seconds to index documents, to read the index again, and to fill rows with documents."""
    from data import documents
    from data.packing import Packing
    from data.shards import Tokens
    end_of_text, kept, times = documents.END_OF_TEXT[cfg.data.tokenizer], documents.places, []
    with tempfile.TemporaryDirectory() as folder:                     # the shards' own indexes stay as they are
        documents.places = lambda path, _: [Path(folder) / path.name]
        try:
            for _ in range(2):
                drop(paths)
                since = time.perf_counter()
                starts = documents.index(paths, end_of_text)
                times.append(time.perf_counter() - since)
        finally:
            documents.places = kept
    since = time.perf_counter()
    packing = Packing(Tokens(paths, cfg.model.vocab_size), starts, cfg.seq_len, cfg.data.max_document_tokens)
    return [f"index of {packing.documents:,} documents: made in {times[0]:.2f} s, read again in {times[1]:.2f} s; "
            f"{packing.rows:,} rows of {cfg.seq_len:,} that begin with one: {time.perf_counter() - since:.2f} s"]


def reading(cfg, paths: list[Path], device, ranks: int, steps: int, step_s: float):
    """A line for each order and state of the page cache."""
    micro = (cfg.micro_batch_tokens or cfg.batch_tokens) // cfg.seq_len
    from data.loader import row_range
    first, last = row_range(cfg.batch_tokens // cfg.seq_len, 0, ranks)
    runs = [(row, min(row + micro, last)) for row in range(first, last, micro)]
    tokens = (last - first) * cfg.seq_len
    yield (f"{steps} batches of {cfg.batch_tokens:,} tokens, of which one of {ranks} ranks reads {tokens:,} in rows of "
           f"{cfg.seq_len:,}; a step is {step_s * 1e3:.0f} ms")
    yield (f"{'order':<12}{'page cache':<22}{'read ms: median, most':>22}{'tokens/s':>16}{'of a step':>11}"
           f"{'wait ms: first':>17}{'median, most of the others':>28}")
    for order in ORDERS:
        for cold in (True, False):
            results = []
            for measure in (read_times, wait_times):
                train = open_loader(cfg, paths, order, steps)         # anew: pages that are mapped cannot be dropped
                state = drop(paths) if cold else warm(paths)
                results.append([1e3 * s for s in measure(train, cfg.batch_tokens, runs, steps, step_s, device)])
            read, (wait, *waits) = results
            median = statistics.median(read)
            yield (f"{order:<12}{state:<22}{median:>13.2f}, {max(read):>7.2f}{tokens / median * 1e3:>16,.0f}"
                   f"{median / step_s / 1e3:>11.2%}{wait:>17.2f}{statistics.median(waits):>19.3f}, {max(waits):>7.3f}")


def open_loader(cfg, paths: list[Path], order: str, steps: int):
    from dataclasses import replace

    from data.loader import TrainLoader
    cut = cfg.data.max_document_tokens if order == "documents" else None
    data = replace(cfg.data, order=order, max_document_tokens=cut)
    separate = data.documents == "separate" or order == "documents"
    return TrainLoader(paths, order, cfg.seq_len, cfg.model.vocab_size, True, data.end_of_text, separate,
                       data.max_document_tokens, [cfg.batch_tokens] * steps)


def read_times(train, batch_tokens: int, runs, steps: int, *_) -> list[float]:
    """Seconds to read one rank's micro-batches of each step."""
    seconds = []
    for step in range(steps):
        since = time.perf_counter()
        for run in runs:
            train.rows(step, step * batch_tokens, batch_tokens, *run)
        seconds.append(time.perf_counter() - since)
    return seconds


def wait_times(train, batch_tokens: int, runs, steps: int, step_s: float, device) -> list[float]:
    """Seconds that each `get` of the prefetcher took a consumer that sleeps a step between them."""
    from data.prefetch import Prefetcher
    seconds = []
    fetch = lambda step: [train.rows(step, step * batch_tokens, batch_tokens, *run) for run in runs]  # noqa: E731
    with Prefetcher(fetch, device) as prefetcher:
        for step in range(steps):
            since = time.perf_counter()
            prefetcher.get(step)
            seconds.append(time.perf_counter() - since)
            time.sleep(step_s)
    return seconds


# ---------------------------------------------------------------- the page cache

def drop(paths: list[Path]) -> str:
    """Have the system forget the pages of these files; "cold", or what share of a sample of them is still there."""
    if not hasattr(os, "posix_fadvise"):
        return "warm: cannot drop it"
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())                                   # what is not yet on the disk cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    there = resident(paths)
    return "cold, not checked" if there is None else "cold" if there == 0 else f"{there:.0%} still there"


def warm(paths: list[Path]) -> str:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    there = resident(paths)
    return "warm" if there in (None, 1) else f"warm: {there:.0%} fits"


def resident(paths: list[Path]) -> float | None:
    """The share of 64 pages of each file that are in memory; None where the system does not say."""
    found = asked = 0
    for path in paths:
        with open(path, "rb") as file:
            for place in range(0, path.stat().st_size, path.stat().st_size // 64):
                try:
                    found += bool(os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT))
                except BlockingIOError:
                    pass
                except (AttributeError, OSError):
                    return None
                asked += 1
    return found / asked
