"""Shards that need no download: `python -m data.demo [--out data/demo]`.

The text is the Python sources inside the installed torch package (about 46 MB): ids 0 to 255 are bytes, 256
stands before each document, and a document is a file. Empty files, exact copies and unreadable files are left
out. A hash of its path gives a document its place and says whether it is held out for validation, so that the
same torch gives the same shards everywhere.

meta.json is written last and says what the shards hold. Where it agrees with the sources and with the shards
there is nothing to do; anything else is made again.
"""
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from data.arguments import Parser, exit_with, line_of
from data.shards import ShardError, make_folder, open_shard, write_shard

END_OF_TEXT = 256
SHARD_TOKENS = 10_000_000
# A small validation set has to sample many files: one in 16 is held out, unless it is longer than 64 KiB
# (there is a generated table of 529 KB). In torch 2.13 these are 141 files and 1.66 million tokens.
HELD_OUT = 16
HELD_OUT_BYTES = 64 * 1024


def torch_sources() -> tuple[Path, str]:
    """The folder of the installed torch package and its version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ShardError("the demo's text is the sources of torch, which is not installed: install torch")
    return Path(spec.submodule_search_locations[0]), importlib.metadata.version("torch")


def documents(root: Path) -> dict[str, bytes]:
    """Relative path -> content of every Python file under `root` that is readable, not empty and no copy."""
    found, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if content and content not in seen:
            seen.add(content)
            found[path.relative_to(root).as_posix()] = content
    return found


def split(found: dict[str, bytes]) -> dict[str, list[bytes]]:
    """The documents of "train" and of "val", each shuffled; a pure function of paths and contents."""
    parts: dict[str, list[bytes]] = {"train": [], "val": []}
    digests = {path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest() for path in found}
    for path in sorted(found, key=lambda path: digests[path][8:]):
        chosen = int.from_bytes(digests[path][:8], "big") % HELD_OUT == 0
        parts["val" if chosen and len(found[path]) <= HELD_OUT_BYTES else "train"].append(found[path])
    return parts


def pack(texts: list[bytes]) -> np.ndarray:
    """All documents as one row of tokens, uint16: 256, the bytes of the first, 256, the next's, ..."""
    tokens = np.full(sum(len(text) + 1 for text in texts), END_OF_TEXT, dtype=np.uint16)
    end = 0
    for text in texts:
        start, end = end + 1, end + 1 + len(text)
        tokens[start:end] = np.frombuffer(text, dtype=np.uint8)
    return tokens


def plan(root: Path, version: str) -> tuple[dict[str, np.ndarray], dict]:
    """The shards to be, by file name, and what meta.json says of them."""
    found = documents(root)
    parts = split(found)
    if not parts["train"] or not parts["val"]:
        raise ShardError(f"{root}: {len(parts['train'])} files to train on and {len(parts['val'])} held out "
                         "are too few; install torch with its Python sources")
    shards, meta = {}, {"tokenizer": "bytes", "torch": version, "source_sha256": fingerprint(found)}
    for name, texts in parts.items():
        tokens = pack(texts)
        pieces = np.array_split(tokens, -(-tokens.size // SHARD_TOKENS))
        shards |= {f"{name}_{number:06d}.bin": piece for number, piece in enumerate(pieces)}
        meta[name] = {"documents": len(texts), "tokens": tokens.size, "bytes": sum(map(len, texts))}
    meta["files"] = {name: hashlib.sha256(tokens).hexdigest() for name, tokens in shards.items()}
    return shards, meta


def fingerprint(found: dict[str, bytes]) -> str:
    """SHA-256 of all paths and contents."""
    digest = hashlib.sha256()
    for path, content in found.items():
        digest.update(f"{path!r} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read_meta(out: Path) -> dict:
    """What meta.json in `out` says; no files where there is none or it is damaged."""
    try:
        meta = json.loads((out / "meta.json").read_text())
        return {**meta, "files": dict(meta["files"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {"files": {}}


def intact(out: Path, meta: dict) -> bool:
    """Whether meta.json and every shard in `out` are as `meta` says."""
    try:
        files = {name: hashlib.sha256(open_shard(out / name)).hexdigest() for name in meta["files"]}
    except (OSError, ShardError):
        return False
    return read_meta(out) == meta and files == meta["files"]


def make(root: Path, version: str, out: Path) -> tuple[dict, bool]:
    """Make the shards of the sources under `root`: (what meta.json says, whether anything was written)."""
    shards, meta = plan(root, version)
    others = {path.name for name in ("train", "val") for path in out.glob(f"{name}_*.bin")} - shards.keys()
    if unknown := others - read_meta(out)["files"].keys():
        raise ShardError(f"{out / min(unknown)} is not of this corpus, but would be read with it; remove it "
                         "or choose another --out")
    if intact(out, meta):
        return meta, False
    make_folder(out)
    for name in others:                                # of an earlier torch
        (out / name).unlink()
    (out / "meta.json").unlink(missing_ok=True)
    for name, tokens in shards.items():
        write_shard(out / name, tokens)
    temporary = out / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1) + "\n")
    temporary.replace(out / "meta.json")
    return meta, True


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m data.demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write (%(default)s)")
    out = parser.parse_args(arguments).out
    try:
        root, version = torch_sources()
        meta, written = make(root, version, out)
    except (ShardError, OSError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    print(f"{out}: {'written' if written else 'there already, and intact'}: the sources of torch {version}")
    for name in ("train", "val"):
        print("{:>7}: {tokens:,} tokens in {documents:,} documents".format(name, **meta[name]))
    return 0


if __name__ == "__main__":
    exit_with(main)
