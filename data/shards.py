"""Files of tokens, as llm.c and modded-nanogpt write them, one by one and several as one.

    256 little-endian int32: 20240520, 1, number of tokens, then zeros      (1,024 bytes)
    that many little-endian uint16 tokens

Source of the format: karpathy/llm.c, dev/data/data_common.py, `write_datafile` (version 1, GPT-2 tokens).
Llama-3 shards (magic 20240801, uint32 tokens) are not read here.
"""
import glob
import hashlib
import mmap
import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")


class ShardError(ValueError):
    """Shards that cannot be used; the message is one line: the file, the numbers, the remedy."""


def write_shard(path: str | Path, tokens) -> None:
    """Write `tokens` (one row of integers from 0 to 65,535) as the shard `path`.

    The bytes go to a temporary file in that folder, which then replaces `path`: no reader sees half a shard.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ShardError(f"{path}: a shard is one row of integers, at least one; got {tokens.dtype} of shape "
                         f"{tokens.shape}")
    if tokens.size >= 2**31:
        raise ShardError(f"{path}: {tokens.size:,} tokens do not fit the 32-bit count; write several shards")
    if tokens.min() < 0 or tokens.max() > 65_535:
        raise ShardError(f"{path}: token ids from {tokens.min()} to {tokens.max()}; a shard holds 0 to 65535")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype=TOKEN).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: str | Path) -> int:
    """The number of tokens in the shard `path`, after checking its header against the size of the file."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < HEADER_BYTES:
        raise ShardError(f"{path}: {size:,} bytes are less than the {HEADER_BYTES:,} of a shard's header; "
                         "the file is cut off or no shard: fetch or make it again")
    magic, version, count = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(f"{path}: magic number {magic} where a GPT-2 token shard has {MAGIC}; the file is "
                         "no such shard: correct the pattern, or make it with data.shards.write_shard")
    if version != VERSION:
        raise ShardError(f"{path}: shard version {version}, but only version {VERSION} (uint16 tokens) is "
                         "read; make it again with data.shards.write_shard")
    if count < 1:
        raise ShardError(f"{path}: the header counts {count:,} tokens; remove the file or make it again")
    wanted = HEADER_BYTES + TOKEN.itemsize * count
    if size != wanted:
        raise ShardError(f"{path}: the header counts {count:,} tokens, which takes {wanted:,} bytes, but the "
                         f"file has {size:,}; it is cut off or damaged: fetch or make it again")
    return count


def open_shard(path: str | Path) -> np.memmap:
    """The tokens of the shard `path`, uint16 (count,), memory-mapped and read-only."""
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(read_header(path),))


def make_folder(path: Path) -> None:
    """The folder `path`, made where it is not; ShardError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ShardError(f"--out {path}: no folder can be made there ({reason}); choose another") from error


def find_shards(pattern: str, key: str = "data.train") -> list[Path]:
    """The files that `pattern` matches, sorted by name; `key` is what the configuration calls the pattern."""
    paths = [Path(name) for name in sorted(glob.glob(os.path.expanduser(pattern)))]
    if not paths:
        raise ShardError(f"{key}: no file matches {pattern!r} (from {os.getcwd()}); `python -m data.demo` "
                         "writes small shards to data/demo, `python -m data.download --for CONFIG` fetches "
                         "the published ones")
    return paths


def fingerprint(paths: list[Path]) -> dict:
    """{files, tokens, sha256} of the shards: their names, their counts, and the ends of each (512 tokens).

    It tells one data set from another in the record of a run; it is no proof that every token is the same.
    """
    digest, total = hashlib.sha256(), 0
    for path in paths:
        tokens = open_shard(path)
        total += tokens.size
        digest.update(f"{Path(path).name} {tokens.size}\n".encode())
        digest.update(tokens[:512].tobytes() + tokens[-512:].tobytes())
    return {"files": len(paths), "tokens": total, "sha256": digest.hexdigest()}


class Tokens:
    """The tokens of several shards, by shard or as one stream; ids outside the vocabulary are an error."""

    def __init__(self, paths: list[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.counts = np.array([read_header(path) for path in self.paths], dtype=np.int64)
        self.ends = np.cumsum(self.counts)
        self.total = int(self.counts.sum())
        self.shards: dict[int, np.memmap] = {}     # opened at their first read

    def read(self, shard: int, first: int, count: int) -> np.ndarray:
        """`count` tokens of one shard from its token `first` on, uint16 (count,)."""
        if shard not in self.shards:
            self.shards[shard] = open_shard(self.paths[shard])
        tokens = self.shards[shard][first:first + count]
        assert tokens.size == count, f"{self.paths[shard]}: no {count} tokens from {first} on"
        if count and tokens.max() >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise ShardError(f"{self.paths[shard]}: token {first + place:,} is id {tokens[place]}, but the "
                             f"vocabulary has {self.vocab_size:,} ids; correct model.vocab_size, or use "
                             "shards of its tokenizer")
        return tokens

    def expect(self, first: int, count: int) -> None:
        """Let the system fetch `count` tokens of the stream from `first` on, without waiting for them."""
        first %= self.total
        shard = int(np.searchsorted(self.ends, first, side="right"))
        if shard not in self.shards:
            self.shards[shard] = open_shard(self.paths[shard])
        start = HEADER_BYTES + TOKEN.itemsize * (first - int(self.ends[shard] - self.counts[shard]))
        size = min(TOKEN.itemsize * count, HEADER_BYTES + TOKEN.itemsize * int(self.counts[shard]) - start)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):
            self.shards[shard].base.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def stream(self, first: int, count: int) -> np.ndarray:
        """`count` tokens of all shards in a row from `first` on, uint16; after the last comes the first."""
        parts = [np.empty(0, TOKEN)]
        while count > 0:
            first %= self.total
            shard = int(np.searchsorted(self.ends, first, side="right"))
            start = first - int(self.ends[shard] - self.counts[shard])
            take = min(count, int(self.counts[shard]) - start)
            parts.append(self.read(shard, start, take))
            first, count = first + take, count - take
        return np.concatenate(parts)
