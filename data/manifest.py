"""manifest.json beside fetched shards: what each had when it was first fetched, and the check against that.

    {"repo": "kjj0/fineweb10B-gpt2", "files": {"fineweb_val_000000.bin":
        {"tokens": 100000000, "sha256": "...", "revision": "..."}, ...}}

`revision` is the hub's commit that the file was compared with, null where no hub could be asked.
"""
import hashlib
import json
import os
from pathlib import Path

from data.shards import ShardError, read_header

NAME = "manifest.json"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(folder: Path) -> dict:
    """The manifest of `folder`; without files where there is none. ShardError where it cannot be read."""
    path = folder / NAME
    if not path.exists():
        return {"repo": None, "files": {}}
    try:
        manifest = json.loads(path.read_text())
        for entry in manifest["files"].values():
            int(entry["tokens"]), bytes.fromhex(entry["sha256"]), entry["revision"]
        return {"repo": manifest["repo"], "files": manifest["files"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ShardError(f"{path} is damaged: remove it, and download again to compare the shards with the hub's "
                         "(what is whole is not fetched twice)") from None


def write(folder: Path, manifest: dict) -> None:
    path = folder / NAME
    temporary = path.with_name(f"{NAME}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def inspect(path: Path, entry: dict | None = None) -> dict:
    """{tokens, sha256} of the shard `path`, whole and as `entry` of the manifest has it.

    Raises:
        ShardError: it is missing, its header and its length disagree, or it is another file than the manifest's.
    """
    if not path.exists():
        raise ShardError(f"{path}: missing")
    found = {"tokens": read_header(path), "sha256": sha256_of(path)}
    if entry and found["sha256"] != entry["sha256"]:
        raise ShardError(f"{path}: SHA-256 {found['sha256'][:12]}... where {NAME} has {entry['sha256'][:12]}...; "
                         "the file has changed since it was fetched: download it again")
    return found
