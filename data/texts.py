"""The texts in a block of documents (data/sources.py), or one line that says which document is bad and how."""
import json
from collections.abc import Iterator
from dataclasses import dataclass

from data.sources import Block, DocumentError, words

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Where:
    """The place of a document: line or row from 1, byte in the (decompressed) file."""
    source: str
    row: int
    byte: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


def documents(block: Block, field: str, separator: bytes, errors: str) -> Iterator[str | None]:
    """The texts in `block`. errors: "strict" raises DocumentError, "replace" puts U+FFFD for bytes that are no
    UTF-8, "skip" gives None for a document that cannot be used."""
    for where, raw in _pieces(block, separator):
        try:
            if block.kind == "rows":
                text = _is_text(raw, field, where)
            else:
                text = _decode(raw, where, block.source, errors)
                text = _field(text, field, where) if block.kind == "lines" else text
            yield _unicode(text, where, errors)
        except DocumentError:
            if errors != "skip":
                raise
            yield None


def _pieces(block: Block, separator: bytes) -> Iterator[tuple[Where, bytes | str | None]]:
    """The documents of a block, not parsed, each with its place."""
    if block.kind == "rows":
        for number, value in enumerate(block.content, block.first_row):
            yield Where(block.source, number, 0), value
        return
    byte, content = block.first_byte, block.content
    cut = b"\n" if block.kind == "lines" else separator
    for number, piece in enumerate(content.split(cut) if cut else [content]):
        where, size = Where(block.source, block.first_row + number, byte), len(piece)
        if byte == 0 and piece.startswith(BOM):
            where, piece = Where(block.source, where.row, len(BOM)), piece[len(BOM):]
        if piece if block.kind == "text" else piece.strip():     # nothing, or a blank line, is no document
            yield where, piece
        byte += size + len(cut)


def _decode(raw: bytes, where: Where, source: str, errors: str) -> str:
    try:
        return raw.decode("utf-8", "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{source}: byte {where.byte + error.start:,} (0x{raw[error.start]:02x}) is not UTF-8; "
                            "convert the file, or put U+FFFD there with --errors replace") from error


def _field(line: str, field: str, where: Where) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:     # also numbers of thousands of digits, and deep nesting
        raise DocumentError(f"{where}: not JSON ({words(error)}); correct the line, or leave such documents out with "
                            "--errors skip") from error
    if not isinstance(record, dict):
        raise DocumentError(f"{where}: {_json_name(record)} where an object with field {field!r} is wanted, one on "
                            "every line; correct the line, or leave such documents out with --errors skip")
    if field not in record:
        raise DocumentError(f"{where}: no field {field!r}; it has: {', '.join(map(repr, record)) or 'none'}; name one "
                            "with --field, or leave such documents out with --errors skip")
    return _is_text(record[field], field, where)


def _is_text(value, field: str, where: Where) -> str:
    if not isinstance(value, str):
        raise DocumentError(f"{where}: field {field!r} is {_json_name(value)}, not text; name another with --field, or "
                            "leave such documents out with --errors skip")
    return value


def _unicode(text: str, where: Where, errors: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding of Unicode can."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DocumentError(f"{where}: half a surrogate pair ({text[error.start]!a}) at character {error.start:,}; "
                            "correct the line, or put U+FFFD there with --errors replace") from error


def _json_name(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}")
