"""Start-up and end of the processes of a run: ranks, device, threads, precision, signals."""
import ctypes
import os
import platform
import shutil
import signal
import stat
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXIT_BAD_INPUT = 2       # configuration, data or preflight refused; nothing was started
EXIT_NOT_FINITE = 3      # a loss or gradient was not finite
EXIT_REQUEUE = 75        # stopped by a signal after saving (EX_TEMPFAIL of sysexits.h): run again with --resume


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value):
        """Rank 0's (picklable) value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_max(self, value):
        """The largest of the ranks' numbers, or of each number in equally long lists, on every rank."""
        if self.world == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return box.tolist()

    def merged(self, found: dict) -> dict:
        """The entries of every rank's dict, on every rank; of entries with one key the highest rank's."""
        if self.world == 1:
            return found
        everyones = [None] * self.world
        dist.all_gather_object(everyones, found)
        return {key: value for each in everyones for key, value in each.items()}


def start(deterministic: bool = False) -> Processes:
    """Join torchrun's process group if there is one (NCCL on GPUs, gloo on CPUs) and choose this rank's device."""
    keep_lock()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        deterministic = True         # free here; else Inductor's threads add up the embedding's gradient in any order
        if local_world > 1:          # torchrun sets OMP_NUM_THREADS=1 then, which leaves cores idle: share them out
            torch.set_num_threads(max(1, _cores() // local_world))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False            # nothing here reads what it never wrote
    if "RANK" in os.environ and world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return Processes(rank, world, device)


def keep_lock() -> None:
    """Keep a standard input that is a file from the processes that we start.

    A sweep's trial has its lock there (scripts/sweep/run.py), and what outlives it, such as the service of wandb that
    still uploads, must not hold that.
    """
    try:
        is_file = stat.S_ISREG(os.fstat(0).st_mode)
    except OSError:                                                   # there is none
        return
    if is_file:
        os.dup(0)                                                     # open until we end, and not inherited
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step instead of giving them back to the system.

    Every step frees and allocates the same activations; mapping them anew costs page faults, which took a third of the
    demo's forward pass (18.5 ms against 11.9 with this, two cores). Nothing happens with another C library.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                       # <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**30)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def activation_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of activations and why: `auto` takes bfloat16 where the processor has fast products in it."""
    if precision != "auto":
        return getattr(torch, precision), "as configured"
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        reason = "tensor cores take bfloat16" if capable else "no bfloat16 tensor cores before compute capability 8.0"
    else:
        amx = torch.cpu._is_amx_tile_supported()
        capable = amx or torch.cpu._is_avx512_bf16_supported()
        reason = (f"the processor has {'AMX tiles' if amx else 'AVX512-BF16'}" if capable
                  else "neither AMX tiles nor AVX512-BF16: bfloat16 would be slower")
    return (torch.bfloat16 if capable else torch.float32), reason


def compilation(asked: bool | None, device: torch.device) -> tuple[bool, str]:
    """Whether the run is compiled, by default on a GPU alone, and the same in words."""
    wanted = device.type == "cuda" if asked is None else asked
    if wanted and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return False, "no: torch.compile needs a C++ compiler and none was found"
    return wanted, "yes" if wanted else "no"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Dense bf16 peak, FLOP/s, by a part of the device's name (vendor datasheets, without sparsity).
PEAK_FLOPS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}


def peak_flops(name: str) -> float | None:
    """The device's peak in dense bf16 FLOP/s, or None where it is not known (then no MFU is shown)."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class StopRequest:
    """Set by SIGTERM or SIGUSR1; the loop finishes its step, saves and exits with EXIT_REQUEUE."""

    def __init__(self):
        self.requested = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number, frame) -> None:
        self.requested = True

    def close(self) -> None:
        """Give the signals back their earlier meaning."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
