"""Triton's kernels on the CPU: a process in which Triton interprets them, which it decides when a kernel is defined."""
import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


@contextlib.contextmanager
def interpreter():
    """run(f, *arguments): calls the module-level function `f` there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as pool:
        yield lambda f, *arguments: pool.submit(f, *arguments).result()


def _prepare():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
