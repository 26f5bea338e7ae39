"""The head's loss with its gradient written over the logits, in Triton: `model.loss: triton`.

Statement. Logits z = x Wᵀ + b, one row of v for each of n tokens, in the activations' type; the first `columns` of a
row count, the rest is padding outside the softmax. With y = cap(z) in float32 (model/head.py) a row gives

    loss = log Σⱼ exp yⱼ - y_target,    dzⱼ = (softmax(y)ⱼ - [j = target]) · cap'(zⱼ),    dzⱼ = 0 in the padding.

The kernel reads a row twice: once for the maximum and the sum of the softmax, kept together in one pass (Milakov &
Gimelshein, arXiv:1805.02867), once to replace z by dz. So the backward pass has nothing to do but its two products, dx
= dz W and dW = dzᵀ x, and what the head keeps is one tensor of the logits' size in the activations' type: for 64 x 1024
tokens of 50,304 logits 6.59 GB in bfloat16, where every float32 copy of them has 13.19 GB. Uncompiled, torch's form
keeps one such copy for the softmax and one for the cap (isru: three), and makes more on its way back.

The file imports Triton, so it is imported only where it is used.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import ModelConfig, Softcap
from model.head import LossError, cap

# Columns a step and warps a row, by compute capability; no autotuning. Chosen by arithmetic and by the compiler's
# report: 8 bfloat16 of a thread are one load of 16 bytes, and with their maxima and sums stay in 64 registers, so that
# a multiprocessor has four rows or more on their way. For sm_100 the compiler spills at 8.
CONFIGURATIONS = {          # device         timed on
    80: (2048, 8),          # A100           not timed yet
    90: (2048, 8),          # H100, H200     not timed yet
    100: (2048, 16),        # B200           not timed yet
    120: (2048, 8),         # RTX 50         not timed yet
}
INTERPRETED = (256, 1)      # in tests without a GPU, where small rows are to take several steps
TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# ------------------------------------------------------------ float64 reference

def reference(z: Tensor, targets: Tensor, columns: int, softcap: Softcap | None) -> tuple[Tensor, Tensor]:
    """Losses (n,) and dz (n, v), float64, of the logits z (n, v), by torch's own gradient."""
    z = z.detach().double().requires_grad_()
    y = z if softcap is None else cap(z, softcap)
    losses = F.cross_entropy(y[:, :columns], targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


# ------------------------------------------------------------ kernel

@triton.jit
def _cap(z, c, scale, shift, FORM: tl.constexpr, TYPE: tl.constexpr):
    """cap(z), float32, of which every operation rounds to TYPE."""
    f32: tl.constexpr = tl.float32
    y = z
    if FORM == "tanh":
        u = (z / scale).to(TYPE).to(f32)
        e = tl.exp(-2 * tl.abs(u))
        tanh = (1 - e) / (1 + e)
        y = (c * tl.where(u < 0, -tanh, tanh).to(TYPE).to(f32)).to(TYPE).to(f32)
    if FORM == "sigmoid":
        u = ((z + shift).to(TYPE).to(f32) / scale).to(TYPE).to(f32)
        e = tl.exp(-tl.abs(u))
        y = (c * (tl.where(u < 0, e, 1.0) / (1 + e)).to(TYPE).to(f32)).to(TYPE).to(f32)
    if FORM == "isru":
        r = tl.rsqrt(((z * z).to(TYPE).to(f32) + c * c).to(TYPE).to(f32)).to(TYPE).to(f32)
        y = ((c * z).to(TYPE).to(f32) * r).to(TYPE).to(f32)
    return y


@triton.jit
def _slope(z, c, scale, shift, FORM: tl.constexpr):
    """cap'(z), float32, in forms that do not cancel where the cap is flat."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if FORM == "tanh":
        e = tl.exp(-2 * tl.abs(z / scale))
        slope = c / scale * 4 * e / ((1 + e) * (1 + e))
    if FORM == "sigmoid":
        e = tl.exp(-tl.abs((z + shift) / scale))
        slope = c / scale * e / ((1 + e) * (1 + e))
    if FORM == "isru":
        r = c * tl.rsqrt(z * z + c * c)
        slope = r * r * r
    return slope


@triton.jit
def row_kernel(z_ptr, target_ptr, loss_ptr, row_stride, columns, padded, c, scale, shift,
               FORM: tl.constexpr, TYPE: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """The loss of one row of z (n, padded); with WRITE z becomes dz. A target that is no column has loss NaN."""
    row = tl.program_id(0).to(tl.int64)                     # rows of 50,304 pass 2³¹ numbers at 42,691 of them
    z_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < columns)
    z_target = tl.load(z_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    y_target = _cap(z_target, c, scale, shift, FORM, TYPE)

    # Every lane has the largest y of its own columns, and the sum of exp(y - largest).
    largest = tl.full((BLOCK,), -3e38, tl.float32)          # below all, and finite: -inf less itself is NaN
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + j, mask=j < columns, other=0.0).to(tl.float32)
        y = _cap(z, c, scale, shift, FORM, TYPE)
        above = tl.where(j < columns, y, -float("inf")) - largest
        e = tl.exp(-tl.abs(above))                          # one exponential rescales the sum, or joins it
        total = tl.where(above > 0, total * e + 1, total + e)
        largest = tl.where(above > 0, y, largest)
    top = tl.max(largest)
    total_of_row = tl.sum(total * tl.exp(largest - top))
    tl.store(loss_ptr + row, tl.log(total_of_row) + (top - y_target))

    if WRITE:
        share = 1 / total_of_row
        for start in range(0, padded, BLOCK):
            j = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + j, mask=j < columns, other=0.0).to(tl.float32)
            y = _cap(z, c, scale, shift, FORM, TYPE)
            dy = tl.exp(y - top) * share - tl.where(j == target, 1.0, 0.0)
            dz = dy * _slope(z, c, scale, shift, FORM)
            tl.store(z_ptr + j, tl.where(j < columns, dz, 0.0).to(z_ptr.dtype.element_ty), mask=j < padded)


# ------------------------------------------------------------ launcher

def losses_of(z: Tensor, targets: Tensor, columns: int, form: str, c: float, scale: float, shift: float,
              before_cast: bool, write: bool) -> Tensor:
    """Losses (n,), float32, of the logits z (n, v) against targets (n,), int64; with `write` z becomes dz.

    Raises:
        LossError: the logits are on a CPU, and Triton does not interpret its kernels there (TRITON_INTERPRET=1).
    """
    if z.device.type != "cuda" and isinstance(row_kernel, triton.runtime.JITFunction):
        raise LossError(f"loss: triton needs a GPU, and the logits are on the {z.device}; set model.loss=torch")
    if z.stride(1) != 1:
        raise ValueError(f"the logits of one token must lie side by side, not {z.stride(1)} apart")
    block, warps = configuration_of(z.device)
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        row_kernel[(len(z),)](z, targets.contiguous(), losses, z.stride(0), columns, z.shape[1], c, scale, shift,
                              FORM=form, TYPE=TRITON[z.dtype if before_cast else torch.float32], WRITE=write,
                              BLOCK=block, num_warps=warps)
    return losses


def configuration_of(device: torch.device) -> tuple[int, int]:
    """(columns a step, warps a row): those of the table's newest architecture up to the device's."""
    if device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0]
    return CONFIGURATIONS[max((known for known in CONFIGURATIONS if known <= 10 * major), default=80)]


def in_numbers(softcap: Softcap | None) -> tuple[str, float, float, float, bool]:
    """(form, c, scale, shift, before_cast), as kernels and operators take them."""
    if softcap is None:
        return "none", 0.0, 1.0, 0.0, False
    return softcap.form, softcap.cap, softcap.scale or softcap.cap, softcap.shift, softcap.before_cast


# ------------------------------------------------------------ torch's view of it

def fused_head_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, config: ModelConfig) -> Tensor:
    """What model.head.head_loss computes: the sum of the losses, float32, of x (b, t, c) against targets (b, t).

    Weight and bias are cast to x's type out here, so that their gradients round as they do in torch's form.
    """
    columns = config.vocab_rows if config.loss_over_padding else config.vocab_size
    bias = None if bias is None else bias.to(x.dtype)
    return loss_and_dz(x.flatten(0, 1), weight.to(x.dtype), bias, targets.flatten(), columns,
                       *in_numbers(config.softcap), torch.is_grad_enabled())[0]


# The logits are born and overwritten inside, so that no caller, and no compiler, sees a tensor change its meaning.
@torch.library.custom_op("nanogpt::loss_and_dz", mutates_args=())
def loss_and_dz(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, columns: int, form: str, c: float,
                scale: float, shift: float, before_cast: bool, write: bool) -> tuple[Tensor, Tensor]:
    """The summed loss, float32, of x (n, c); and dz (n, v) in x's type, or nothing (0,) without `write`."""
    z = F.linear(x, weight, bias)
    losses = losses_of(z, targets, columns, form, c, scale, shift, before_cast, write)
    return losses.sum(), z if write else z.new_empty(0)


@loss_and_dz.register_fake
def _(x, weight, bias, targets, columns, form, c, scale, shift, before_cast, write):
    return x.new_empty((), dtype=torch.float32), x.new_empty((len(x), len(weight)) if write else 0)


def _keep(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)                # else the gradient of dz would be logits of zeros
    ctx.has_bias = bias is not None


@once_differentiable
def _backward(ctx, g, _):
    """g (): the factor of the sum, and so of every row; it scales the products, which are smaller than dz."""
    x, weight, dz = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = dz @ weight * g if wanted[0] else None
    dweight = dz.mT @ x * g if wanted[1] else None
    dbias = dz.sum(0) * g if ctx.has_bias and wanted[2] else None
    return dx, dweight, dbias, *[None] * 8


loss_and_dz.register_autograd(_backward, setup_context=_keep)
