"""Numbers on their way from the device to the host."""
import torch


class NotFinite(Exception):
    """A loss or a gradient was not finite after `step` good updates."""

    def __init__(self, step: int):
        self.step = step


class InFlight:
    """A step's report on its way from the device: copied without making anyone wait, read a step later."""

    def __init__(self, completed: int, report):
        self.completed = completed                                   # steps done when this was reported
        packed = torch.stack(report)
        on_gpu = packed.is_cuda
        self.values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=on_gpu)
        self.values.copy_(packed, non_blocking=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None
        if on_gpu:
            self.arrived.record()

    def read(self) -> tuple[float, float, bool, bool]:
        """(summed loss, gradient norm, finite so far, somebody asked to stop); waits for that step only."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm, ok, stops = self.values.tolist()
        return loss, grad_norm, ok == 1.0, stops > 0
