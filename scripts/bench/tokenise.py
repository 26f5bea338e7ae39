"""Text to token shards against tiktoken's own batch encoding of the same documents, in turns on the same cores.

    python -m scripts.bench tokenise                                       the demo's text, in bytes
    python -m scripts.bench tokenise corpus.jsonl --tokenizer gpt2         text of your own

A side of data.tokenise is the whole command: start of the processes, reading, hashing, encoding, writing shards, their
SHA-256. tiktoken's side is `encode_ordinary_batch` alone, of documents that lie in memory, with a thread a worker.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.arguments import at_least
from scripts.bench.report import BenchError, Parser


def main(arguments: list[str]) -> int:
    from data import sources, texts, tokenise, tokenizers
    parser = Parser("tokenise", __doc__)
    parser.add_argument("source", nargs="*", help="as data.tokenise takes them (the Python files of torch)")
    parser.add_argument("--tokenizer", default="bytes", help="as data.tokenise takes it (%(default)s)")
    parser.add_argument("--field", default="text", help="field of JSON lines (%(default)s)")
    parser.add_argument("--workers", type=at_least(1), default=tokenise.cores(), help="(%(default)s, the cores)")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    args = parser.parse_args(arguments)
    encoding = tokenizers.by_name(args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        names = args.source or [torch_lines(Path(scratch) / "torch.jsonl")]
        found = sources.find_sources(names, Path(scratch) / "out")
        documents = [text for block, _ in sources.read(found, {}, args.field, b"")
                     for text in texts.documents(block, args.field, b"", "strict") if text]
        if not documents:
            raise BenchError(f"{names[0]}: no document in it")
        megabytes = sum(len(text.encode()) for text in documents) / 1e6

        def ours() -> float:
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                command = [sys.executable, "-m", "data.tokenise", *names, "--out", out, "--tokenizer", args.tokenizer,
                           "--field", args.field, "--workers", str(args.workers)]
                return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

        def theirs() -> float:
            return seconds(lambda: encoding.encode_ordinary_batch(documents, num_threads=args.workers))

        from scripts.bench.interleave import interleave
        versions = ", ".join(" ".join(pair) for pair in tokenise.versions().items())
        print(f"{megabytes:,.1f} MB of UTF-8, {len(documents):,} documents, {args.tokenizer}, {args.workers} workers, "
              f"{tokenise.cores()} cores, {args.rounds} rounds in turns, {versions}")
        sides = {"data.tokenise, the whole command": ours, "tiktoken encode_ordinary_batch": theirs}
        for name, times in zip(sides, interleave(list(sides.values()), args.rounds)):
            print(f"{name:<34}{megabytes / statistics.median(times):8.1f} MB/s   "
                  f"(rounds {megabytes / max(times):.1f} to {megabytes / min(times):.1f})")
    return 0


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def torch_lines(path: Path) -> str:
    """The demo's text as JSON lines."""
    from data.demo import documents, torch_sources
    with open(path, "w") as file:
        for content in documents(torch_sources()[0]).values():
            file.write(json.dumps({"text": content.decode(errors="replace")}) + "\n")
    return str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
