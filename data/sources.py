"""Documents out of files and data sets, in blocks: what `python -m data.tokenise` reads.

    .txt                      a file is a document, or several with --separator between them
    .jsonl .ndjson .json      a line is a document
    .parquet, hf:REPOSITORY   a row is a document, through `datasets`, streaming

Text and JSON lines may be compressed (.gz .bz2 .xz .zst). They are read here and not through `datasets`, because
its errors name neither the line nor the byte, it cannot go on in the middle of a file, it reads .zst only with
another package, and it parses in the process that reads; a block is parsed by whoever tokenises it.
"""
import bz2
import glob
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

KINDS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "rows"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BLOCK_BYTES = 1024 * 1024
BLOCK_ROWS = 64
DOCUMENT_BYTES = 256 * 1024 * 1024      # what a document may have; it is held in memory, and so are its tokens
ENDS_BYTES = 64 * 1024


class DocumentError(ValueError):
    """A source that cannot be read; the message is one line: where, what, the remedy."""


@dataclass(frozen=True)
class Source:
    name: str               # a path, or hf:REPOSITORY[:CONFIG[:SPLIT]]
    kind: str               # text, lines or rows
    size: int               # bytes of the file; 0 for a data set of the hub
    sha256: str             # of size and both ends of the file; the hub's revision of a data set


@dataclass(frozen=True)
class Block:
    """Whole documents that follow one another in a source."""
    source: str
    kind: str
    content: bytes | list   # bytes as they lie in the (decompressed) file; for rows the values of the field
    first_byte: int         # where `content` begins in the (decompressed) file
    first_row: int          # the number of its first line or row, from 1


# -------------------------------------------------------------------------------------------- which sources
def find_sources(names: list[str], out: Path) -> list[Source]:
    """The sources that `names` stand for, in this order, a directory's and a pattern's files sorted by path.

    Files under `out` and hidden ones in directories are left out, and so is whatever is named twice.
    """
    found: dict[str, Source] = {}
    for name in names:
        if name.startswith("hf:"):
            found.setdefault(name, _hub_source(name))
            continue
        for path in _files(name, out.resolve()):
            found.setdefault(str(path), _file_source(path))
    return list(found.values())


def _files(name: str, out: Path) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        paths = [file for file in sorted(path.rglob("*")) if _kind(file) and file.is_file()
                 and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
    paths = [file for file in paths if out not in file.resolve().parents]
    if not paths:
        raise DocumentError(f"{name}: no such file, and no text in it if it is a folder or a pattern; text is "
                            f"{' '.join(KINDS)}, also with {' '.join(COMPRESSED)}, or hf:REPOSITORY")
    return paths


def _kind(path: Path) -> str | None:
    """The kind of the file by its name; None where it is no text. Parquet has its own compression inside."""
    packed = path.suffix.lower() in COMPRESSED
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind == "rows" else kind


def _file_source(path: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise DocumentError(f"{path}: cannot tell by its name what it is; text is {' '.join(KINDS)}, all but .parquet "
                            f"also with {' '.join(COMPRESSED)}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(ENDS_BYTES)
            file.seek(max(size - ENDS_BYTES, 0))
            ends += file.read(ENDS_BYTES)
    except OSError as error:
        raise DocumentError(f"{path}: {error.strerror}") from error
    return Source(str(path), kind, size, hashlib.sha256(b"%d " % size + ends).hexdigest())


def _hub_source(name: str) -> Source:
    repository = name.split(":")[1]
    if os.path.isdir(repository):                     # `datasets` takes folders too
        return Source(name, "rows", 0, "")
    from huggingface_hub import HfApi
    try:
        revision = HfApi().dataset_info(repository).sha
    except Exception as error:                        # the hub's, the network's, or a bad name's: many classes
        raise DocumentError(f"{name}: the hub does not answer for it ({words(error)}); check the name and the network, "
                            "or download its .parquet files and name their folder") from error
    return Source(name, "rows", 0, revision)


# -------------------------------------------------------------------------------------------- reading blocks
def read(sources: list[Source], position: dict, field: str, separator: bytes) -> Iterator[tuple[Block, dict]]:
    """Every block from `position` on, each with the position behind it; {} is the beginning.

    A position is a value for JSON. DocumentError for what cannot be read.
    """
    for number in range(position.get("source", 0), len(sources)):
        source = sources[number]
        place = position.get("place", {}) if number == position.get("source", 0) else {}
        try:
            blocks = _rows(source, place, field) if source.kind == "rows" else _bytes(source, place, separator)
            for block, place in blocks:
                yield block, {"source": number, "place": place}
        except DocumentError:
            raise
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DocumentError(f"{source.name}: cannot be read ({words(error)}); the file is cut off or damaged: "
                                "fetch or make it again") from error


def _bytes(source: Source, place: dict, separator: bytes) -> Iterator[tuple[Block, dict]]:
    """A file of text or lines, cut behind a separator (lines: a newline); without one a file is one block."""
    byte, row = place.get("byte", 0), place.get("row", 1)
    cut = b"\n" if source.kind == "lines" else separator
    rest = bytearray()
    with _open(source.name) as file:
        _skip(file, byte)
        while True:
            more = file.read(BLOCK_BYTES)
            rest += more
            end = _last_cut(rest, cut) if more else len(rest)
            if len(rest) - end > DOCUMENT_BYTES:
                raise DocumentError(f"{source.name}: a document of more than {DOCUMENT_BYTES >> 20} MiB at byte "
                                    f"{byte + end:,}; " + ("correct the line" if source.kind == "lines" else
                                                           "say with --separator what stands between documents"))
            if end:
                content = bytes(rest[:end])
                block = Block(source.name, source.kind, content, byte, row)
                del rest[:end]
                byte, row = byte + end, row + content.count(b"\n")
                yield block, {"byte": byte, "row": row}
            if not more:
                return


def _last_cut(content: bytearray, cut: bytes) -> int:
    """Where the last whole separator in `content` ends; 0 if there is none. Cuts are found from the left, so that
    they do not depend on where a read ends, also where a separator can overlap itself."""
    if len(cut) == 1:
        return content.rfind(cut) + 1
    return len(content) - len(content.split(cut)[-1]) if cut and cut in content else 0


def _open(name: str) -> BinaryIO:
    suffix = Path(name).suffix.lower()
    if suffix == ".zst":
        import pyarrow                                # comes with `datasets`
        return pyarrow.CompressedInputStream(pyarrow.OSFile(name), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(name, "rb")


def _skip(file: BinaryIO, byte: int) -> None:
    """Go to `byte`; a compressed file is decompressed up to there."""
    if file.seekable():
        file.seek(byte)
        return
    while byte > 0:
        gone = len(file.read(min(byte, BLOCK_BYTES)))
        if not gone:
            raise EOFError(f"it ends {byte:,} bytes before the place where reading was to go on")
        byte -= gone


def _rows(source: Source, place: dict, field: str) -> Iterator[tuple[Block, dict]]:
    """The rows of a .parquet file or a data set; the place is what `datasets` calls its state."""
    import pyarrow.parquet
    try:
        if not source.name.startswith("hf:"):
            _has_column(source, field, pyarrow.parquet.read_schema(source.name).names)
        dataset = _dataset(source, field).with_format("arrow")
        if place:
            dataset.load_state_dict(place["state"])
        row = place.get("row", 1)
        for table in dataset.iter(batch_size=BLOCK_ROWS):
            _has_column(source, field, table.column_names)
            block = Block(source.name, "rows", table[field].to_pylist(), 0, row)
            row += table.num_rows
            yield block, {"state": dataset.state_dict(), "row": row}
    except DocumentError:
        raise
    except Exception as error:                        # pyarrow's, fsspec's, the hub's: many classes
        raise DocumentError(f"{source.name}: cannot be read ({words(error)}); fetch it again, or check the name and "
                            "the network") from error


def _has_column(source: Source, field: str, columns: list[str]) -> None:
    if field not in columns:
        raise DocumentError(f"{source.name}: no column {field!r}; it has: {', '.join(columns)}; name one with --field")


def _dataset(source: Source, field: str):
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not source.name.startswith("hf:"):
        return datasets.load_dataset("parquet", data_files=[source.name], split="train", streaming=True,
                                     columns=[field])
    repository, config, split = (source.name.split(":")[1:] + [None, None])[:3]
    return datasets.load_dataset(repository, config or None, split=split or "train", streaming=True,
                                 revision=source.sha256 or None)


def words(error: BaseException) -> str:
    """An exception as part of a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
