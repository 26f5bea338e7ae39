"""Shards written piece by piece, so that a program killed at any moment can go on and end with the same bytes.

Everything unfinished has a name that ends in .part, and its length at the last checkpoint is on record: going on
means cutting it there. A shard gets its own name when it is whole.
"""
import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.manifest import sha256_of
from data.shards import HEADER_BYTES, HEADER_INTS, MAGIC, TOKEN, VERSION

CHUNK_BYTES = 8 * 1024 * 1024


class ShardWriter:
    """A stream of tokens as `prefix`_000000.bin, `prefix`_000001.bin, ... of `shard_tokens` each, the last shorter."""

    def __init__(self, out: Path, prefix: str, shard_tokens: int, state: dict | None = None):
        state = state or {"number": 0, "tokens": 0, "files": {}}
        self.out, self.prefix, self.shard_tokens = out, prefix, shard_tokens
        self.number, self.tokens = state["number"], state["tokens"]        # of the shard that is being written
        self.files: dict[str, dict] = dict(state["files"])                  # of the shards that are whole
        self.file = None
        self._cut_back()

    def _cut_back(self) -> None:
        """Make the shard that was being written at the checkpoint what it was then. Later ones are written again."""
        if self.tokens:
            if self._path().exists():                        # finished after the checkpoint
                self._path().replace(self._part())
            os.truncate(self._part(), HEADER_BYTES + TOKEN.itemsize * self.tokens)

    def _path(self) -> Path:
        return self.out / f"{self.prefix}_{self.number:06d}.bin"

    def _part(self) -> Path:
        return self._path().with_suffix(".bin.part")

    def write(self, tokens: np.ndarray) -> None:
        """Append uint16 (tokens,); a document may begin in one shard and end in the next."""
        while tokens.size:
            if self.file is None:
                self.file = open(self._part(), "r+b" if self.tokens else "w+b")
                if self.tokens == 0:
                    self.file.write(bytes(HEADER_BYTES))     # the count is known at the end
                self.file.seek(0, os.SEEK_END)
            piece, tokens = np.split(tokens, [self.shard_tokens - self.tokens])
            self.file.write(np.ascontiguousarray(piece, dtype=TOKEN).data)
            self.tokens += piece.size
            if self.tokens == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Give the shard that is being written its header and its name."""
        if self.tokens == 0:
            return
        self.file = self.file or open(self._part(), "r+b")   # none if this process has only cut it back
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        sync(self.file)
        self.file.close()
        self.file = None
        path = self._path()
        self.files[path.name] = {"tokens": self.tokens, "sha256": sha256_of(self._part())}
        self._part().replace(path)
        self.number, self.tokens = self.number + 1, 0

    def checkpoint(self) -> dict:
        """The state to go on from, after what was written is on the disk."""
        if self.file is not None:
            sync(self.file)
        return {"number": self.number, "tokens": self.tokens, "files": self.files}


class Seen:
    """The 64-bit hashes of the documents so far, 8 bytes each and 16 while the longest run of them grows.

    They lie in sorted runs, each at least twice as long as the next. Of n different documents one is taken for a
    copy of another with probability n^2 / 2^65: 1e-5 at the 15 million of FineWeb's 10B sample. `path` keeps them
    in the order of their coming, for going on.
    """

    def __init__(self, path: Path, count: int = 0):
        self.count, self.runs = count, []
        self.file = open_at(path, 8 * count)
        self.file.seek(0)
        while (hashes := np.fromfile(self.file, dtype="<u8", count=CHUNK_BYTES // 8)).size:
            self._insert(np.sort(hashes))

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Remember `hashes`, uint64 (n,); bool (n,): which of them are the first of their kind."""
        fresh = np.zeros(hashes.size, dtype=bool)
        fresh[np.unique(hashes, return_index=True)[1]] = True
        for run in self.runs:
            fresh &= run[np.minimum(np.searchsorted(run, hashes), run.size - 1)] != hashes
        new = hashes[fresh]
        if new.size:
            self.file.write(new.astype("<u8").tobytes())
            self.count += new.size
            self._insert(np.sort(new))
        return fresh

    def _insert(self, run: np.ndarray) -> None:
        while self.runs and self.runs[-1].size < 2 * run.size:
            run = np.concatenate([self.runs.pop(), run])
            run.sort()
        self.runs.append(run)

    def checkpoint(self) -> int:
        sync(self.file)
        return self.count


class Smallest:
    """The documents with the smallest keys that together have at least `wanted` tokens.

    Which these are is known at the end only, so every document that may be among them is kept in the file `path`:
    some wanted * (1 + ln(all tokens / wanted)) tokens, in records of key, bytes of text, number of tokens, tokens.
    """
    RECORD = np.dtype([("key", "<u8"), ("text_bytes", "<u8"), ("tokens", "<u8")])

    def __init__(self, path: Path, wanted: int, length: int = 0):
        self.wanted, self.total, self.length = wanted, 0, 0
        self.heap: list[tuple[int, int, int]] = []           # (-key, tokens, place in the file): largest key first
        self.file = open_at(path, length)
        while self.length < length:
            self.file.seek(self.length)
            self._remember(self._header())

    @property
    def limit(self) -> int:
        """A document with a key at or above this is not among them."""
        return -self.heap[0][0] if self.total >= self.wanted else 2**64

    def add(self, key: int, text_bytes: int, tokens: np.ndarray) -> None:
        """Keep a document whose key is below `limit`; tokens: uint16 (n,)."""
        header = np.array((key, text_bytes, tokens.size), dtype=self.RECORD)
        self.file.write(header.tobytes() + tokens.astype(TOKEN).tobytes())
        self._remember(header)

    def _remember(self, header: np.ndarray) -> None:
        heapq.heappush(self.heap, (-int(header["key"]), int(header["tokens"]), self.length))
        self.total += int(header["tokens"])
        self.length += self.RECORD.itemsize + TOKEN.itemsize * int(header["tokens"])
        while self.total - self.heap[0][1] >= self.wanted:
            self.total -= heapq.heappop(self.heap)[1]

    def _header(self) -> np.ndarray:
        return np.frombuffer(self.file.read(self.RECORD.itemsize), dtype=self.RECORD)[0]

    def documents(self) -> Iterator[tuple[bool, int, np.ndarray]]:
        """(whether it is one, bytes of text, tokens): the smallest by key, then the others as they came."""
        chosen = [place for _, _, place in sorted(self.heap, reverse=True)]
        for place in chosen:
            yield True, *self._document(place)
        place, kept = 0, set(chosen)
        while place < self.length:
            text_bytes, tokens = self._document(place)
            if place not in kept:
                yield False, text_bytes, tokens
            place += self.RECORD.itemsize + TOKEN.itemsize * tokens.size

    def _document(self, place: int) -> tuple[int, np.ndarray]:
        self.file.seek(place)
        header = self._header()
        return int(header["text_bytes"]), np.frombuffer(self.file.read(TOKEN.itemsize * int(header["tokens"])), TOKEN)

    def checkpoint(self) -> int:
        sync(self.file)
        return self.length


def find_files(out: Path, prefix: str) -> list[Path]:
    """The shards of `prefix` in `out`, whole and unfinished ones."""
    return sorted(out.glob(f"{prefix}_{'[0-9]' * 6}.bin*"))


def open_at(path: Path, length: int):
    """`path` for reading and appending, cut back to its first `length` bytes."""
    file = open(path, "a+b")
    if os.fstat(file.fileno()).st_size < length:
        file.close()
        raise OSError(f"{path}: shorter than at the last checkpoint")
    file.truncate(length)
    return file


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: dict) -> None:
    """Replace `path` by `value` as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        sync(file)
    temporary.replace(path)
