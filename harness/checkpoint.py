"""Checkpoints: complete, independent of the number of ranks, whole or not there.

A checkpoint is `step_000123.pt` (torch.save of plain tensors, numbers and strings) and `step_000123.pt.sha256`. Both
are written under temporary names, flushed to the disk and renamed, the digest first: a file under its final name is
complete, and a later bit flip or truncation is found by the digest.
"""
import hashlib
import os
import warnings
from pathlib import Path

import torch


class DamagedCheckpoint(Exception):
    """The file's content is not what was saved; the message names the file."""


class _Digesting:
    """A file that also feeds what is written to a SHA-256."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def save(directory: Path, step: int, content: dict, keep: int) -> Path:
    """Write the checkpoint of `step` into `directory`, then delete all but the newest `keep`."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{step:06d}.pt"
    part, digest_part = directory / f".{final.name}.part", directory / f".{final.name}.sha256.part"
    with open(part, "wb") as f:
        digesting = _Digesting(f)
        torch.save(content, digesting)
        _flush_to_disk(f)
    with open(digest_part, "w") as f:
        f.write(digesting.sha256.hexdigest() + "\n")
        _flush_to_disk(f)
    os.replace(digest_part, f"{final}.sha256")
    os.replace(part, final)
    _flush_names_to_disk(directory)
    for old in [path for path in steps_newest_first(directory) if step_of(path) < step][max(0, keep - 1):]:
        old.unlink()
        Path(f"{old}.sha256").unlink(missing_ok=True)
    return final


def _flush_names_to_disk(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps_newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step_*.pt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def load(path: Path) -> dict:
    """One checkpoint, on the CPU. Raises DamagedCheckpoint."""
    try:
        expected = Path(f"{path}.sha256").read_text().strip()
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            while block := f.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
    if digest.hexdigest() != expected:
        raise DamagedCheckpoint(f"{path}: its SHA-256 differs from {path.name}.sha256")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_intact(directory: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole; None if there is none. Damaged ones are named and renamed to *.damaged."""
    for path in steps_newest_first(directory):
        try:
            return path, load(path)
        except DamagedCheckpoint as damage:
            warnings.warn(f"damaged checkpoint passed over: {damage}")
            os.replace(path, f"{path}.damaged")
    return None
