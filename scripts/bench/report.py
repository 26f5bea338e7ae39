"""How a bench is asked and how its answer begins. Light: torch is loaded where it is needed."""
import os
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from data import arguments


class BenchError(ValueError):
    """What was asked for cannot be measured here; one line with the remedy."""


class Parser(arguments.Parser):
    def __init__(self, subcommand: str, description: str):
        super().__init__(f"python -m scripts.bench {subcommand}", description)


def one_device():
    """The device to measure on. BenchError under torchrun: two processes would measure each other."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise BenchError(f"the benches measure one process, not {world}: start them without torchrun")
    from harness import processes
    return processes.start().device


def machine(device) -> str:
    """Device, threads and versions, in words."""
    import torch

    from harness import processes
    try:
        triton = [f"triton {version('triton')}"]
    except PackageNotFoundError:
        triton = []
    threads = torch.get_num_threads()
    return ", ".join([processes.device_name(device), f"{threads} thread{'s' * (threads > 1)}",
                      f"torch {torch.__version__}", *triton])


def header(device, *more: str) -> str:
    """What produced the numbers below it: the machine, date, `more`; then the command."""
    words = ", ".join([machine(device), time.strftime("%Y-%m-%d"), *more])
    return f"{words}\npython -m scripts.bench {shlex.join(sys.argv[1:])}"
