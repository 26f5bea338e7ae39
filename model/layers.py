"""The parts with weights: float32 (but see `bf16_roles`), cast to the type of the input at each use.

They are made without values: `init_weights` or a checkpoint fills them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

RMS_EPS = torch.finfo(torch.float32).eps    # torch's own default, whatever the type of the input


class Linear(nn.Module):
    """y = x Wᵀ + b, with W (fan_out, fan_in)."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    """Row `index` of a table (rows, c), in the table's type."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in `dtype` (None: the input's); statistics in float32."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype
        self.centred = config.norm == "layernorm"
        self.eps = config.norm_eps or (1e-5 if self.centred else RMS_EPS)
        self.shape = (config.width,)
        self.gain = nn.Parameter(torch.empty(self.shape)) if config.norm_gain else None
        self.bias = nn.Parameter(torch.empty(self.shape)) if config.biases and self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = (None if w is None else w.to(x.dtype) for w in (self.gain, self.bias))
        if self.centred:
            return F.layer_norm(x, self.shape, gain, bias, self.eps).to(self.dtype or x.dtype)
        return F.rms_norm(x, self.shape, gain, self.eps).to(self.dtype or x.dtype)
