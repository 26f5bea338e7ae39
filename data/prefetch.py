"""Read the next step's batch in a thread while this step trains.

A thread suffices: reading is one copy out of a memory-mapped file. With CUDA the thread also copies into
pinned memory, so that the copy to the device keeps nobody waiting.
"""
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, ...]     # of a micro-batch: inputs, targets, perhaps the boundaries of documents


class Prefetcher:
    """`get(step)` returns the micro-batches of `step` on `device` and starts reading those of step + 1.

    fetch: step -> micro-batches as tuples of arrays, in which they come out as tensors; runs in the
    thread. Any step may be asked for; one that was not read ahead is read then. What `fetch` raises, `get`
    raises, for the step that it belongs to. Close it, or use it in a `with` statement.
    """

    def __init__(self, fetch: Callable[[int], list[Arrays]], device: torch.device | str):
        self.fetch = fetch
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        # pinning makes a context on the thread's current device, which would be GPU 0 on every rank
        start = (torch.cuda.set_device, (self.device,)) if self.cuda else (None, ())
        self.thread = ThreadPoolExecutor(1, "prefetch", *start)
        self.ahead: tuple[int, Future] | None = None

    def get(self, step: int) -> list[tuple[Tensor, ...]]:
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[0] != step:
            if ahead is not None:
                ahead[1].cancel()
            ahead = step, self.thread.submit(self._read, step)
        batches = ahead[1].result()
        self.ahead = step + 1, self.thread.submit(self._read, step + 1)
        return [tuple(map(self._move, batch)) for batch in batches]

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _read(self, step: int) -> list[tuple[Tensor, ...]]:
        return [tuple(map(self._hold, batch)) for batch in self.fetch(step)]

    def _hold(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.cuda else tensor

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
