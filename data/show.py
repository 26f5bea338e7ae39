"""Look into token shards: any span as text, or the check of a whole folder.

    python -m data.show data/demo/val_000000.bin --from 1000 --count 300
    python -m data.show data/demo

A folder's shards must have whole headers and lengths, ids of their vocabulary, and the counts and SHA-256 that
meta.json (data.tokenise, data.demo) or manifest.json (data.download) has; the exit code is 2 where they have not.
A document's length counts its end-of-text token and what of it lies in the next shard.
"""
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import tokenizers
from data.arguments import Parser, at_least, exit_with
from data.documents import END_OF_TEXT, scan
from data.manifest import sha256_of
from data.shards import ShardError, open_shard
from data.tokenise import STATE

VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}
RECORDS = ("meta.json", "manifest.json")
CHUNK = 1 << 24                  # tokens looked at together


@dataclass
class Record:
    """What a folder says of its shards."""
    name: str                    # meta.json, manifest.json, or nothing
    content: dict

    def wants(self, file: str) -> tuple[int | None, str | None]:
        """(tokens, SHA-256) of a shard; data.demo's is of its tokens alone, without the header."""
        entry = self.content.get("files", {}).get(file)
        return (entry["tokens"], entry["sha256"]) if isinstance(entry, dict) else (None, entry)


@dataclass
class Row:
    """A shard, or a split."""
    name: str
    split: str                   # the name without number
    tokens: int = 0
    documents: int = 0           # that begin in it
    longest: int = 0             # of those, tokens
    largest_id: int = 0
    sha256: str = ""             # whether it is the record's

    def cells(self) -> list[str]:
        mean = f"{self.tokens / self.documents:,.1f}" if self.documents else "-"
        return [self.name, f"{self.tokens:,}", f"{self.documents:,}", mean, f"{self.longest:,}",
                f"{self.largest_id:,}", self.sha256]


# -------------------------------------------------------------------------------------------- what a folder says
def read_record(folder: Path) -> Record:
    for name in RECORDS:
        try:
            content = json.loads((folder / name).read_text())
            record = Record(name, {**content, "files": dict(content["files"])})
            for file in record.content["files"]:
                record.wants(file)
            return record
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:
            raise ShardError(f"{folder / name}: damaged ({type(error).__name__}: {error}); make or fetch the shards "
                             "again") from error
    return Record("", {})


def vocabulary(record: Record, asked: str | None) -> tuple[str, int, int]:
    """(tokenizer, its number of ids, its end of text): the one asked for, else the record's, else GPT-2's."""
    name, said = asked or record.content.get("tokenizer", "gpt2"), record.content
    if not asked and "vocab_size" in said:
        return name, said["vocab_size"], said["end_of_text"]
    if name in VOCAB_SIZE:
        return name, VOCAB_SIZE[name], END_OF_TEXT[name]
    encoding = tokenizers.by_name(name)
    return name, encoding.n_vocab, encoding.eot_token


# -------------------------------------------------------------------------------------------- the check of a folder
def check(folder: Path, asked: str | None) -> tuple[list[Row], list[str]]:
    """A row for every shard and then for every split, and what is wrong, a line each."""
    record = read_record(folder)
    tokenizer, vocab_size, end_of_text = vocabulary(record, asked)
    rows, splits, wrong = [], {}, []
    began: dict[str, Row] = {}               # where the document began that a split's next shard goes on with
    lengths: dict[str, int] = {}             # and its tokens so far
    for path in sorted(folder.glob("*.bin")):
        split = re.sub(r"_?\d*\.bin$", "", path.name) or path.name
        try:
            tokens = open_shard(path)
        except ShardError as error:
            wrong.append(str(error))
            continue
        row, total = Row(path.name, split, tokens.size), splits.setdefault(split, Row(f"{split}: all", split))
        starts = scan(tokens, end_of_text).astype(np.int64)
        if split in began:
            lengths[split] += int(starts[0]) if starts.size else tokens.size
            began[split].longest = max(began[split].longest, lengths[split])
        if starts.size:
            row.longest = int(np.diff(starts, append=tokens.size).max())
            began[split], lengths[split] = row, tokens.size - int(starts[-1])
        row.documents = starts.size
        row.largest_id = max(int(tokens[i:i + CHUNK].max()) for i in range(0, tokens.size, CHUNK))
        if row.largest_id >= vocab_size:
            wrong.append(f"{path}: id {row.largest_id} is beyond the {vocab_size:,} of {tokenizer}; say which made the "
                         "shards with --tokenizer, or make them again")
        if not starts.size and split not in began:
            wrong.append(f"{path}: no end of text ({end_of_text} in {tokenizer}) and no document before it; say which "
                         "tokenizer made the shards with --tokenizer")
        row.sha256, complaint = compare(path, tokens, record)
        wrong += complaint
        rows.append(row)
        total.tokens, total.documents = total.tokens + row.tokens, total.documents + row.documents
        total.largest_id = max(total.largest_id, row.largest_id)
    for row in rows:
        splits[row.split].longest = max(splits[row.split].longest, row.longest)
    return rows + list(splits.values()), wrong + of_the_whole(folder, record, splits)


def compare(path: Path, tokens: np.ndarray, record: Record) -> tuple[str, list[str]]:
    """What the table says of the hash of a shard, and what is wrong with it."""
    if path.name not in record.content.get("files", {}):
        return ("not listed", [f"{path}: not in {record.name}, but would be read with the shards that are; remove it"]
                ) if record.name else ("no record", [])
    count, digest = record.wants(path.name)
    found = hashlib.sha256(tokens).hexdigest() if count is None else sha256_of(path)
    if found == digest:
        return f"as in {record.name}", []
    return "differs", [f"{path}: SHA-256 {found[:12]}... where {record.name} has {str(digest)[:12]}...; the file has "
                       "changed: make or fetch it again"]


def of_the_whole(folder: Path, record: Record, splits: dict[str, Row]) -> list[str]:
    wrong = []
    if (folder / STATE).exists():
        wrong.append(f"{folder / STATE}: the shards are not finished; give the command that makes them again")
    if not splits:
        wrong.append(f"{folder}: no token shards (*.bin) that can be read")
    wrong += [f"{folder / name}: in {record.name} but not in the folder; make or fetch it again"
              for name in record.content.get("files", {}) if not (folder / name).exists()]
    for split, row in splits.items():
        said = record.content.get("val" if split.endswith("val") else "train") if record.name == RECORDS[0] else None
        for what in ("documents", "tokens"):
            if said and said[what] != getattr(row, what):
                wrong.append(f"{folder}: {getattr(row, what):,} {what} in {split} where {record.name} has "
                             f"{said[what]:,}; make the shards again")
    return wrong


def table(rows: list[Row]) -> str:
    lines = [["shard", "tokens", "documents", "mean", "longest", "largest id", "SHA-256"]]
    lines += [row.cells() for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


# -------------------------------------------------------------------------------------------- a span as text
def span(path: Path, first: int, count: int, asked: str | None) -> str:
    """Tokens first..first+count-1 of the shard as text, a line before every document."""
    tokens = open_shard(path)
    if first >= tokens.size:
        raise ShardError(f"{path}: has {tokens.size:,} tokens, so none at {first:,}; lower --from")
    record = read_record(path.parent)
    name, vocab_size, end_of_text = vocabulary(record, asked)
    ids = np.array(tokens[first:first + count])
    if ids.max() >= vocab_size:
        raise ShardError(f"{path}: token {first + int(np.argmax(ids >= vocab_size)):,} is id {ids.max()}, beyond the "
                         f"{vocab_size:,} of {name}; say which made the shard with --tokenizer")
    encoding = tokenizers.by_name(name)
    made_with = record.content.get("arguments", {}).get("tokenizer_sha256")
    if not asked and made_with and made_with != tokenizers.identity(encoding):
        raise ShardError(f"{path}: was made with another {name} than there is now; name the right file with "
                         "--tokenizer")
    lines = [f"{path}: tokens {first:,} to {first + ids.size - 1:,} of {tokens.size:,} ({name})"]
    starts = np.flatnonzero(ids == end_of_text)
    for piece, start in zip(np.split(ids, starts), [None, *starts]):
        if start is not None:
            lines.append(f"-------- document at token {first + start:,}")
        text = encoding.decode(piece[start is not None:].tolist(), errors="replace")
        lines += [text] if text else []
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m data.show", __doc__)
    parser.add_argument("path", type=Path, help="a shard, or a folder of shards")
    parser.add_argument("--from", type=at_least(0), dest="first", metavar="TOKEN", help="where to begin in a shard (0)")
    parser.add_argument("--count", type=at_least(1), metavar="TOKENS", help="how many to show of a shard (200)")
    parser.add_argument("--tokenizer", help="gpt2, bytes, or a file of ranks (the one in meta.json beside the "
                        "shards, else gpt2)")
    args = parser.parse_args(arguments)
    try:
        if not args.path.is_dir():
            print(span(args.path, args.first or 0, args.count or 200, args.tokenizer))
            return 0
        if args.first is not None or args.count is not None:
            raise ShardError(f"{args.path} is a folder: --from and --count go with a shard")
        rows, wrong = check(args.path, args.tokenizer)
    except (ShardError, tokenizers.VocabularyError) as error:
        rows, wrong = [], [str(error)]
    except BrokenPipeError:                                  # its reader has seen enough: `| head`
        return 0
    except OSError as error:
        rows, wrong = [], [f"{error.filename or args.path}: {error.strerror}"]
    if rows:
        print(table(rows))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    exit_with(main)
