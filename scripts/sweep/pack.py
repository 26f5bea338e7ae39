"""The parts of this machine that trials have to themselves: k GPUs, or k cores where there is no GPU."""
import os
from pathlib import Path
from typing import NamedTuple

from harness.yaml_tree import ConfigError


class Slot(NamedTuple):
    number: int
    gpus: tuple[str, ...]               # as CUDA_VISIBLE_DEVICES has them; () on a CPU
    cores: tuple[int, ...]              # its processes keep to them; () for any, as on a GPU
    threads: int                        # of each process

    def caches(self, out: Path) -> Path:
        """Compile caches are a slot's own: trials that end badly while compiling spoil no other's, and the next
        trial there finds them warm. All slots compile at once in the beginning, so sharing would save little."""
        return (out / "caches" / f"slot-{self.number}").resolve()

    def environment(self, out: Path) -> dict[str, str]:
        caches = self.caches(out)
        own = {"OMP_NUM_THREADS": str(self.threads), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
               "TRITON_CACHE_DIR": str(caches / "triton")}
        return own | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})

    def launcher(self) -> list[str]:
        """Before train.py on the command line: torchrun where there are several GPUs, with a free port of its own."""
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(self.gpus)}"]
        return many if len(self.gpus) > 1 else []

    def __str__(self) -> str:
        if self.gpus:
            return f"GPU {','.join(self.gpus)}"
        return f"cores {','.join(map(str, self.cores))}" if self.cores else f"{self.threads} threads"


def gpus_here() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    named = visible.split(",") if visible else [str(number) for number in range(count)]
    return named if named[0].startswith("MIG-") else named[:count]    # a process sees one such part, whatever it names


def cores_here() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def slots(jobs: int | None, cores_each: int | None, gpus_each: int | None, gpus: list[str],
          cores: list[int]) -> list[Slot]:
    """As many as the machine holds, or `jobs`. On GPUs one each unless said, on a CPU all cores for one trial.

    Raises:
        ConfigError: more was asked for than there is.
    """
    if gpus_each is not None and cores_each is not None:
        raise ConfigError("--gpus-per-trial and --cores-per-trial exclude each other; leave one out")
    if gpus_each is not None and not gpus:
        raise ConfigError("--gpus-per-trial: there is no GPU here; use --cores-per-trial")
    if cores_each is not None and gpus:
        raise ConfigError("--cores-per-trial: trials run on the GPUs here; use --gpus-per-trial, or hide them with "
                          "CUDA_VISIBLE_DEVICES=''")
    what, there = ("GPUs", gpus) if gpus else ("cores", cores)
    each = gpus_each or cores_each or (1 if gpus else max(1, len(cores) // (jobs or 1)))
    fit = len(there) // each
    if (jobs or 1) > fit:
        raise ConfigError(f"{jobs or 1} trials at once of {each} {what} each are more than the {len(there)} here; "
                          "lower one of them")
    count = jobs or fit
    parts = [tuple(there[i * each:(i + 1) * each]) for i in range(count)]
    if gpus:
        threads = max(1, len(cores) // (count * each))
        return [Slot(number, part, (), threads) for number, part in enumerate(parts)]
    held = hasattr(os, "sched_setaffinity")
    return [Slot(number, (), part if held else (), each) for number, part in enumerate(parts)]
