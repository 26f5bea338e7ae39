"""The head and its loss: what a run replaces to change the objective.

Letters of the shapes: b batch, t time, c width, v rows of the vocabulary with padding.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig, Softcap


class LossError(ValueError):
    """A form of the loss was asked for that this machine cannot run; the message is one line with the remedy."""


def check_loss(config: ModelConfig, device: torch.device) -> None:
    """Refuse `loss: triton` where it cannot run, before anything starts.

    Raises:
        LossError: Triton is missing, or the device is not a GPU that has bfloat16.
    """
    if config.loss == "torch":
        return
    missing = ""
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        missing = f"the kernel needs a GPU, and this is a {device.type}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        missing = "the GPU's compute capability is below 8.0"
    if missing:
        raise LossError(f"model.loss: triton cannot be had here: {missing}; set model.loss=torch")


def head_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, config: ModelConfig) -> Tensor:
    """Sum over all tokens of the cross-entropy in nats, float32, of x (b, t, c) against targets (b, t)."""
    if config.loss == "triton":
        from model.cross_entropy import fused_head_loss       # here, because it imports Triton
        return fused_head_loss(x, weight, bias, targets, config)
    logits = head_logits(x, weight, bias, config.softcap)
    if not config.loss_over_padding:
        logits = logits[..., :config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def head_logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: Softcap | None) -> Tensor:
    """The logits (b, t, v), float32."""
    z = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if softcap is None:
        return z.float()
    return cap(z, softcap).float() if softcap.before_cast else cap(z.float(), softcap)


def cap(z: Tensor, softcap: Softcap) -> Tensor:
    """Bound the logits z elementwise, in their own type."""
    c, scale = softcap.cap, softcap.scale or softcap.cap
    if softcap.form == "tanh":
        return c * torch.tanh(z / scale)
    if softcap.form == "sigmoid":
        return c * torch.sigmoid((z + softcap.shift) / scale)
    return c * z * torch.rsqrt(z.square() + c**2)
