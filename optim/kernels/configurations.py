"""Launch configurations of the kernels, fixed by architecture and size: nothing is tried out during a run.

    capability   shared memory a block may have, KiB      device of the timing, date
    8.0  A100    163                                      not timed yet
    9.0  H100    227                                      not timed yet
    10.0 B200    227                                      not timed yet
    12.0 RTX 50   99  (8.6, 8.9 and 12.1 too)             not timed yet

Not timed yet: the sizes are those that fill the tensor cores' instructions, keep two or more tiles on their way from
memory, and need no spilling, all of which tests read from the compiled kernels (tests/test_kernels_compiled.py).
`python -m scripts.bench kernels --tune` times the candidates on the GPU at hand and prints the rows to put here.
"""
from typing import NamedTuple


class Launch(NamedTuple):
    """How the symmetric product is cut: a program makes a tile × tile piece, `depth` of the sum at a time."""
    tile: int
    depth: int
    warps: int
    stages: int                                 # tiles on their way from memory at once


# By architecture: for few rows, and for more. Small tiles waste less at the edges, and make enough programs for a GPU.
SMALL_ROWS = 512
SYMMETRIC: dict[str, tuple[Launch, Launch]] = {
    "sm_80": (Launch(64, 64, 4, 4), Launch(128, 32, 8, 4)),
    "sm_90": (Launch(64, 64, 4, 4), Launch(128, 64, 8, 4)),
    "sm_100": (Launch(64, 64, 8, 3), Launch(128, 64, 8, 4)),
    "sm_120": (Launch(64, 64, 4, 4), Launch(128, 32, 8, 3)),
}
# Tiny tiles, for tests in the interpreter and nothing else.
INTERPRETED = Launch(16, 16, 1, 1)

CHUNK = 4096                                    # numbers that a program of the elementwise passes handles
CHUNK_WARPS = 8


def architecture(capability: tuple[int, int]) -> str:
    """The row of the table for a device of this compute capability; ValueError before 8.0, which has no bfloat16."""
    major, minor = capability
    if major < 8:
        raise ValueError(f"compute capability {major}.{minor} has no bfloat16 tensor cores, which begin with 8.0")
    if (major, minor) == (8, 0):
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def launches(capability: tuple[int, int]) -> tuple[Launch, Launch]:
    return SYMMETRIC[architecture(capability)]


def symmetric_launch(rows: int, capability: tuple[int, int]) -> Launch:
    small, large = launches(capability)
    return small if rows <= SMALL_ROWS else large
