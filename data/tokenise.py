"""Any text to token shards, on all cores, in memory that does not grow with the text.

    python -m data.tokenise corpus/ --out data/corpus                          # .txt .jsonl .parquet, compressed or not
    python -m data.tokenise 'books/*.jsonl.zst' --out data/books --field body --held-out 1000000
    python -m data.tokenise hf:HuggingFaceFW/fineweb:sample-10BT --out data/fineweb --name fineweb

Every document is its end-of-text token and then its tokens, and may go on in the next shard, as in the published
shards. Documents come in the order of the sources, whatever --workers is. Exact copies are dropped. A hash of its
text says whether a document is held out for validation, so none is in both splits and its place does not matter.

What was begun is continued by the same command and ends with the same bytes. meta.json is written last.
"""
import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data import tokenizers
from data.arguments import Parser, at_least
from data.sources import DocumentError, Source, find_sources, read
from data.shard_writer import Seen, ShardWriter, Smallest, find_files, write_json
from data.shards import ShardError, make_folder
from data.workers import Encoded, Recipe, encode_all

CHECKPOINT_S = 5.0
PROGRESS_S = 10.0
META = "meta.json"
STATE = "tokenise.state.json"    # and beside it: the hashes of the documents, and those that may be held out
SPLITS = ("train", "val")
TRAIN, VAL, DROPPED = 0, 1, 2
NOTHING = dict.fromkeys([f"{split}_{what}" for split in SPLITS for what in ("documents", "tokens", "bytes")]
                        + ["duplicates", "empty", "skipped"], 0)
SEEN, CANDIDATES = "tokenise.seen.part", "tokenise.held_out.part"


class CorpusError(ValueError):
    """Shards that cannot be made; the message is one line with the remedy."""


class Corpus:
    """The shards of a directory while they are being made: both splits, what was seen, and the counts."""

    def __init__(self, out: Path, name: str, shard_tokens: int, held_out: float, state: dict):
        self.position, self.counts = state.get("position", {}), dict(state.get("counts", NOTHING))
        self.writers = {split: ShardWriter(out, prefix(name) + split, shard_tokens, state.get(split))
                        for split in SPLITS}
        self.seen = Seen(out / SEEN, state.get("seen", 0))
        self.smallest = Smallest(out / CANDIDATES, int(held_out), state.get("candidates", 0)) if held_out >= 1 else None
        self.threshold = 0 if self.smallest else int(held_out * 2**64)     # of 2^64 keys, so many are held out

    def add(self, encoded: Encoded, position: dict) -> None:
        """Take the documents of a task that are new, and note that the sources are read up to `position`."""
        fresh = self.seen.add(encoded.keys[:, 0])
        key = encoded.keys[:, 1]
        split = np.where(fresh, np.where(key < self.threshold, VAL, TRAIN), DROPPED)
        if self.smallest:
            ends = np.cumsum(encoded.lengths)
            for i in np.flatnonzero(fresh & (key < min(self.smallest.limit, 2**64 - 1))):
                if int(key[i]) < self.smallest.limit:             # which falls as they come
                    tokens = encoded.tokens[ends[i] - encoded.lengths[i]:ends[i]]
                    self.smallest.add(int(key[i]), int(encoded.text_bytes[i]), tokens)
                    split[i] = DROPPED
        for number, name in enumerate(SPLITS):
            chosen = split == number
            if chosen.any():
                tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, encoded.lengths)]
                self._write(name, tokens, int(chosen.sum()), int(encoded.text_bytes[chosen].sum()))
        self.counts["duplicates"] += int((~fresh).sum())
        self.counts["empty"] += encoded.empty
        self.counts["skipped"] += encoded.skipped
        self.position = position

    def _write(self, split: str, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        self.writers[split].write(tokens)
        for what, amount in (("documents", documents), ("tokens", tokens.size), ("bytes", text_bytes)):
            self.counts[split + "_" + what] += amount

    def checkpoint(self) -> dict:
        return {"position": self.position, "counts": self.counts, "seen": self.seen.checkpoint(),
                "candidates": self.smallest.checkpoint() if self.smallest else 0,
                **{split: writer.checkpoint() for split, writer in self.writers.items()}}

    def finish(self) -> dict:
        """Finish the last shards; what meta.json says of the shards."""
        for held_out, text_bytes, tokens in self.smallest.documents() if self.smallest else ():
            self._write(SPLITS[VAL if held_out else TRAIN], tokens, 1, text_bytes)
        counts = self.counts
        if not counts["train_documents"]:
            raise CorpusError(f"no document is left to train on: {counts['val_documents']:,} held out, "
                              f"{counts['empty']:,} empty, {counts['skipped']:,} skipped; add text or lower --held-out")
        for writer in self.writers.values():
            writer.finish()
        return {**{split: {what: counts[f"{split}_{what}"] for what in ("documents", "tokens", "bytes")}
                   for split in SPLITS},
                **{what: counts[what] for what in ("duplicates", "empty", "skipped")},
                "files": {name: file for writer in self.writers.values() for name, file in writer.files.items()}}


# -------------------------------------------------------------------------------------------- the whole run
def make(args: argparse.Namespace) -> tuple[dict, bool]:
    """Make the shards or go on making them: (what meta.json says, whether anything was written)."""
    if args.pattern is not None and args.tokenizer in ("gpt2", "bytes"):
        raise CorpusError(f"--pattern goes with a file of ranks; {args.tokenizer} has its own: leave it out")
    sources = find_sources(args.source, args.out)
    encoding = tokenizers.by_name(args.tokenizer, args.pattern)
    if encoding.max_token_value > 65_535:
        raise CorpusError(f"--tokenizer {args.tokenizer}: {encoding.n_vocab:,} ids do not fit the uint16 of a shard, "
                          "which holds 65,536; take a smaller vocabulary")
    named = ("tokenizer", "pattern", "field", "separator", "errors", "name", "shard_tokens", "held_out")
    arguments = {**{name: getattr(args, name) for name in named},
                 "tokenizer_sha256": tokenizers.identity(encoding), "sources_sha256": fingerprint(sources)}
    recipe = Recipe(encoding, args.field, args.separator.encode(), args.errors)
    make_folder(args.out)
    with ExitStack() as stack:
        lock(stack, args.out)
        meta = read_json(args.out / META)
        if meta is not None:
            check_same(args.out, META, meta.get("arguments", {}), arguments)
            if missing := [name for name in meta["files"] if not (args.out / name).exists()]:
                raise CorpusError(f"{args.out / missing[0]} is in {META} but not there; empty the folder to make all "
                                  "shards again")
            remove_parts(args.out)
            return meta, False
        state = begin(args.out, args.name, arguments)
        corpus = Corpus(args.out, args.name, args.shard_tokens, args.held_out, state)
        blocks = stack.enter_context(closing(read(sources, corpus.position, args.field, recipe.separator)))
        results = stack.enter_context(closing(encode_all(recipe, blocks, args.workers)))
        fill(corpus, results, lambda: write_json(args.out / STATE, {"arguments": arguments, **corpus.checkpoint()}))
        made = corpus.finish()
        files = [source for source in sources if not source.name.startswith("hf:")]     # those have a revision
        if files != find_sources([file.name for file in files], args.out):
            raise CorpusError(f"{args.out}: the sources changed while they were read; empty the folder and begin again")
        meta = {"tokenizer": args.tokenizer, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token, **made,
                "arguments": arguments, "sources": [asdict(source) for source in sources], "versions": versions()}
        write_json(args.out / META, meta)
        remove_parts(args.out)
        return meta, True


def fill(corpus: Corpus, results: Iterable[tuple[Encoded, dict]], save: Callable) -> None:
    """Take every result, call `save` now and then, and say how it goes."""
    save()
    started = saved = said = time.monotonic()
    text_bytes = 0
    for encoded, position in results:
        corpus.add(encoded, position)
        text_bytes += int(encoded.text_bytes.sum())
        now = time.monotonic()
        if now - saved >= CHECKPOINT_S:
            save()
            saved = now
        if now - said >= PROGRESS_S:
            tokens = sum(corpus.counts[split + "_tokens"] for split in SPLITS)
            print(f"{tokens:,} tokens, {text_bytes / 1e6 / (now - started):.1f} MB/s", file=sys.stderr)
            said = now


def begin(out: Path, name: str, arguments: dict) -> dict:
    """The state to go on from; empty where nothing was begun."""
    state = read_json(out / STATE)
    if state is not None and state["position"]:
        check_same(out, STATE, state["arguments"], arguments)
        return state
    for path in shards_of(out, name if state is None else state["arguments"]["name"]):
        if state is None:
            raise CorpusError(f"{path} is of another corpus, but would be read with this one; remove it or choose "
                              "another --out")
        path.unlink()                                        # of a command that did not get to its first checkpoint
    return {}


def shards_of(out: Path, name: str) -> list[Path]:
    return [path for split in SPLITS for path in find_files(out, prefix(name) + split)]


def prefix(name: str) -> str:
    return f"{name}_" if name else ""


def check_same(out: Path, file: str, begun: dict, arguments: dict) -> None:
    for key, value in arguments.items():
        if key == "errors" and begun.get(key) == "strict":   # what was read is the same in every way
            continue
        if begun.get(key) != value:
            what = "other sources, or they changed" if key == "sources_sha256" else (
                f"{key} {begun.get(key)!r}, not {value!r}")
            raise CorpusError(f"{out / file}: these shards were made with {what}; give the same arguments, choose "
                              "another --out, or empty that folder")


def lock(stack: ExitStack, out: Path) -> None:
    """Hold the folder until the process ends; the system lets go of it also when the process is killed."""
    handle = os.open(out, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorpusError(f"{out}: another process is making shards there; wait, or choose another --out") from error


def read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorpusError(f"{path}: damaged ({error}); empty the folder and begin again") from error


def remove_parts(out: Path) -> None:
    for name in (STATE, SEEN, CANDIDATES):
        (out / name).unlink(missing_ok=True)


def fingerprint(sources: list[Source]) -> str:
    """SHA-256 of the names of all sources, their sizes, and both ends of each or its revision."""
    return hashlib.sha256(json.dumps([asdict(source) for source in sources]).encode()).hexdigest()


def versions() -> dict[str, str]:
    from importlib.metadata import version
    return {package: version(package) for package in ("tiktoken", "datasets", "numpy")}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_out(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 or value.is_integer() and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share below 1 nor a number of tokens")
    return value


def shard_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is no beginning of a file name of letters, digits, - _ and .")
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m data.tokenise", __doc__)
    add = parser.add_argument
    add("source", nargs="+", help="a file, a folder, a pattern in quotes, or hf:REPOSITORY[:CONFIG[:SPLIT]]")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--tokenizer", default="gpt2", help="gpt2, bytes, or a file of ranks: .tiktoken, or vocab.bpe with "
        "encoder.json beside it (%(default)s)")
    add("--pattern", help="regular expression of a file of ranks (GPT-2's)")
    add("--field", default="text", help="field of JSON lines, column of tables (%(default)s)")
    add("--separator", default="", help="what stands between the documents of a .txt file (a file is one document)")
    add("--errors", choices=("strict", "replace", "skip"), default="strict", help="at a document that is bad: stop; "
        "put U+FFFD where it is not UTF-8; leave it out and count it (%(default)s)")
    add("--shard-tokens", type=at_least(1), default=100_000_000, metavar="N", help="tokens of a shard (%(default)s)")
    add("--held-out", type=held_out, default=0.01, metavar="N", help="for validation: the share of documents, below "
        "1, or at least so many tokens (%(default)s)")
    add("--name", type=shard_name, default="", help="of the shards: NAME_train_000000.bin (train_000000.bin)")
    add("--workers", type=at_least(0), default=cores(), metavar="N", help="processes; 0: only this one (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    again = "the same command continues"
    try:
        meta, written = make(args)
    except (CorpusError, DocumentError, ShardError, tokenizers.VocabularyError) as error:
        return complain(error, 2)
    except BrokenProcessPool:
        return complain(f"a worker was killed, perhaps for want of memory; {again}, with fewer --workers in less", 1)
    except OSError as error:
        where = f"{error.filename or args.out}: {error.strerror or error}"
        return complain(f"{where}; make room or allow it, then {again}", 1)
    except KeyboardInterrupt:
        return complain(f"interrupted; {again}", 130)
    print(f"{args.out}: {'written' if written else 'there already'}: {len(meta['files'])} shards, {META}")
    for split in SPLITS:
        print("{:>7}: {tokens:,} tokens in {documents:,} documents, {bytes:,} bytes".format(split, **meta[split]))
    if not meta["val"]["documents"] and args.held_out:
        print("note: no document is held out for validation; raise --held-out")
    print("dropped: {duplicates:,} copies, {empty:,} empty, {skipped:,} unusable".format(**meta))
    return 0


def complain(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
