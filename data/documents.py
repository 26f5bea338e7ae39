"""Where documents begin: an index of every shard, and the boundaries that attention within documents takes.

A document begins with the tokenizer's end-of-text id, as the published shards have it. A shard's index is its
positions of that id. It is made once, in a pass of bounded memory, and kept in a hidden file beside the shard, or
where that folder cannot be written under XDG_CACHE_HOME (~/.cache); an index of another file, or a damaged one, is
made again. Several processes may index the same shards at once: files are renamed into place whole.

    10 little-endian int64: magic, version, end-of-text id, the shard's tokens, bytes and mtime in ns, CRC-32 of its
                            first and last 4,096 bytes, documents, CRC-32 of what follows, 0
    that many little-endian uint32: the documents' first tokens, rising
"""
import hashlib
import os
import random
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.shards import ShardError, open_shard, read_header

END_OF_TEXT = {"gpt2": 50256, "bytes": 256}     # data.tokenizer -> the id that stands before each document
MAGIC, VERSION = 20250712, 1
HEADER_BYTES = 80
START = np.dtype("<u4")
CHUNK = 1 << 22                                 # tokens searched at once: 8 MiB of shard, 4 MiB of flags
K_UNIT = 64                                     # lengths of cu_seqlens are multiples of it: fewer shapes to compile


# ---------------------------------------------------------------- the index

def index(paths: list[Path], end_of_text: int) -> list[np.ndarray]:
    """The first tokens of each shard's documents, uint32 (documents,) a shard.

    Made where missing, in an order of this process's own, so that processes that start together share the work.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        asked = {path: threads.submit(starts_in, path, end_of_text) for path in random.sample(paths, len(paths))}
        return [asked[path].result() for path in paths]


def starts_in(path: Path, end_of_text: int) -> np.ndarray:
    """The positions of `end_of_text` in one shard, uint32 and rising; from its index, which is made if need be."""
    key = _key(path, end_of_text)
    for place in places(path, end_of_text):
        if (starts := _load(place, key)) is not None:
            return starts
    starts = scan(open_shard(path), end_of_text)
    if _key(path, end_of_text) != key:
        raise ShardError(f"{path} changed while its documents were indexed; start again when it is complete")
    for place in places(path, end_of_text):
        try:
            _save(place, key, starts)
            break
        except OSError:                         # read-only, or full: the next place, or none, and again next time
            continue
    return starts


def scan(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """The positions of `end_of_text` in `tokens`, uint32, in memory that does not grow with the shard."""
    found = [np.empty(0, START)]
    for first in range(0, tokens.size, CHUNK):
        found.append((np.flatnonzero(tokens[first:first + CHUNK] == end_of_text) + first).astype(START))
    return np.concatenate(found)


def places(path: Path, end_of_text: int) -> list[Path]:
    """Where the index of `path` may lie: beside it, or in the user's cache. Hidden, so that no pattern matches it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    name = f"{path.name}.{end_of_text}.documents"
    return [path.with_name(f".{name}"), cache / "nanogpt-speedrun" / "documents" / f"{digest}.{name}"]


def _key(path: Path, end_of_text: int) -> list[int]:
    """What an index must say of the shard to be its index."""
    count = read_header(path)
    with open(path, "rb") as file:
        stat, ends = os.fstat(file.fileno()), file.read(4096)
        file.seek(max(0, stat.st_size - 4096))
        ends += file.read()
    return [MAGIC, VERSION, end_of_text, count, stat.st_size, stat.st_mtime_ns, zlib.crc32(ends)]


def _load(place: Path, key: list[int]) -> np.ndarray | None:
    """The index at `place` if it is whole and that of `key`."""
    try:
        raw = place.read_bytes()
    except OSError:
        return None
    if len(raw) < HEADER_BYTES:
        return None
    header, body = np.frombuffer(raw, "<i8", 10).tolist(), memoryview(raw)[HEADER_BYTES:]
    if header != [*key, len(body) // START.itemsize, zlib.crc32(body), 0] or len(body) % START.itemsize:
        return None
    return np.frombuffer(body, START)


def _save(place: Path, key: list[int], starts: np.ndarray) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    header = np.array([*key, starts.size, zlib.crc32(starts.tobytes()), 0], "<i8")
    try:
        temporary.write_bytes(header.tobytes() + starts.tobytes())
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- documents in a batch

class Boundaries:
    """The cu_seqlens of micro-batches: where documents begin in the rows taken as one line.

    int32 (k,): 0, rising places, then rows * seq_len as often as it takes. A document begins at every end of text
    and at every row. k depends on the number of rows alone, so that a compiled step meets one shape: it is what
    the run's fullest rows that follow each other need.

    longest: no document has more tokens in any row.
    """

    def __init__(self, end_of_text: int, seq_len: int, per_row: np.ndarray | None, longest: int):
        """per_row: documents in each row of the run, in order; None where the run is not known: k is then rows *
        seq_len + 1, one for every token."""
        self.end_of_text, self.seq_len, self.longest = end_of_text, seq_len, longest
        self.before = None if per_row is None else np.concatenate([[0], np.cumsum(per_row)])
        self.sizes: dict[int, int] = {}

    def size(self, rows: int) -> int:
        """k of micro-batches of `rows` rows."""
        if rows not in self.sizes:
            most = rows * self.seq_len
            if self.before is not None:
                many = min(rows, self.before.size - 1)
                most = int((self.before[many:] - self.before[:self.before.size - many]).max())
            self.sizes[rows] = min(-(-(most + 1) // K_UNIT) * K_UNIT, rows * self.seq_len + 1)
        return self.sizes[rows]

    def of(self, inputs: np.ndarray) -> np.ndarray:
        """The boundaries of inputs (rows, seq_len), int32 (k,)."""
        begins = inputs == self.end_of_text
        begins[:, :1] = True
        return self.padded(np.flatnonzero(begins), len(inputs))

    def padded(self, begins: np.ndarray, rows: int) -> np.ndarray:
        bounds = np.full(self.size(rows), rows * self.seq_len, np.int32)
        assert begins.size < bounds.size, f"{begins.size} documents in {rows} rows: not of the run"
        bounds[:begins.size] = begins
        return bounds


def count_in_rows(starts: np.ndarray, total: int, rows: np.ndarray, seq_len: int) -> np.ndarray:
    """Documents in each of the rows that begin at token `rows` (n,) of a stream of `total` tokens, which begins again
    at its end and whose documents begin at `starts`; the row's own beginning is one. int64 (n,)."""
    rounds = range(1, 2 + seq_len // total)
    starts = np.concatenate([starts, *(starts[:np.searchsorted(starts, total + seq_len - n * total)] + n * total
                                       for n in rounds)])
    rows = rows % total
    return 1 + np.searchsorted(starts, rows + seq_len) - np.searchsorted(starts, rows, side="right")
