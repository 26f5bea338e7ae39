"""What Muon does beside the iteration, in three passes over memory: two before it, one after.

    first     g = γG,  M ← μM + (1-μ)g                      γ: clipping;  momentum_form "sgd":  M ← μM + g
              U = (1-μ)g + μM                               without nesterov:  U = M;  "sgd":  U = g + μM
              of every chunk: its largest |U|, and the sum of squares of U over that
    second    X = U / (s ‖U‖_F), in the products' dtype      U is made again from G and M rather than kept
    last      W ← W - (ηf O + δW)                           f: the shape's factor; δ: weight decay of a step

M and W are written only where `keep` is true, so that a step with a bad gradient leaves everything as it was and no
host has to look first. Squares are of numbers at most 1: every finite magnitude is normalised alike, and a matrix of
zeros stays zero (orthogonalise.py). μ, γ, η, δ and `keep` are read from the device.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from optim.kernels.configurations import CHUNK, CHUNK_WARPS

CHUNKS = tl.constexpr(512)                      # at most, of one matrix: a program handles as much as that takes


def reference(G: Tensor, M: Tensor, mu: float, ema: bool, nesterov: bool, safety: float = 1.0,
              clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """(M, X) after the first two passes, in float64."""
    fresh = G.double() * clip * (1 - mu if ema else 1)
    M = mu * M.double() + fresh
    U = fresh + mu * M if nesterov else M
    return M, U / (safety * torch.linalg.matrix_norm(U, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))


@triton.jit
def _fresh(G, at, here, mu, CLIP: tl.constexpr, clip, EMA: tl.constexpr):
    g = tl.load(G + at, mask=here, other=0.0).to(tl.float32)
    if CLIP:
        g *= tl.load(clip).to(tl.float32)
    if EMA:
        g *= 1.0 - mu
    return g


@triton.jit
def first_kernel(G, M, largest, squares, mu, clip, keep, numbers, span, chunks, G_matrix, M_matrix, keep_each,
                 EMA: tl.constexpr, NESTEROV: tl.constexpr, CLIP: tl.constexpr, CHUNK: tl.constexpr):
    matrix, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    mu, kept = tl.load(mu).to(tl.float32), tl.load(keep + matrix * keep_each) != 0
    G += matrix * G_matrix
    M += matrix * M_matrix
    top, total = 0.0, 0.0                       # largest |U| so far, and the sum of (U/top)²
    for first in range(chunk * span, min((chunk + 1) * span, numbers), CHUNK):
        at = first + tl.arange(0, CHUNK)
        here = at < numbers
        fresh = _fresh(G, at, here, mu, CLIP, clip, EMA)
        m = mu * tl.load(M + at, mask=here, other=0.0) + fresh
        tl.store(M + at, m, mask=here & kept)
        u = tl.abs(fresh + mu * m if NESTEROV else m)
        higher = tl.maximum(top, tl.max(u, 0))
        unit = tl.where(higher > 0.0, higher, 1.0)
        u = u / unit
        total = total * (top / unit) * (top / unit) + tl.sum(u * u, 0)
        top = higher
    tl.store(largest + tl.program_id(0), top)
    tl.store(squares + tl.program_id(0), total)


@triton.jit
def second_kernel(G, M, X, largest, squares, mu, clip, numbers, span, chunks, G_matrix, M_matrix, safety,
                  EMA: tl.constexpr, NESTEROV: tl.constexpr, CLIP: tl.constexpr, CHUNK: tl.constexpr,
                  CHUNKS: tl.constexpr):
    matrix, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    mu = tl.load(mu).to(tl.float32)
    every = tl.arange(0, CHUNKS)
    tops = tl.load(largest + matrix * chunks + every, mask=every < chunks, other=0.0)
    totals = tl.load(squares + matrix * chunks + every, mask=every < chunks, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top > 0.0, top, 1.0)
    tops = tops / top
    norm = safety * tl.sqrt(tl.sum(totals * tops * tops, 0))
    norm = tl.where(norm > 0.0, norm, 1.0)
    G += matrix * G_matrix
    M += matrix * M_matrix
    X += matrix * numbers
    for first in range(chunk * span, min((chunk + 1) * span, numbers), CHUNK):
        at = first + tl.arange(0, CHUNK)
        here = at < numbers
        fresh = _fresh(G, at, here, mu, CLIP, clip, EMA)
        m = tl.load(M + at, mask=here, other=0.0)
        u = fresh + mu * m if NESTEROV else m
        tl.store(X + at, (u / top / norm).to(X.dtype.element_ty), mask=here)


@triton.jit
def last_kernel(W, O, lr, decay, keep, factor, numbers, span, chunks, W_matrix, keep_each, CHUNK: tl.constexpr):
    matrix, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    step, shrink = tl.load(lr).to(tl.float32) * factor, tl.load(decay).to(tl.float32)
    kept = tl.load(keep + matrix * keep_each) != 0
    W += matrix * W_matrix
    O += matrix * numbers
    for first in range(chunk * span, min((chunk + 1) * span, numbers), CHUNK):
        at = first + tl.arange(0, CHUNK)
        here = (at < numbers) & kept
        w = tl.load(W + at, mask=here, other=0.0).to(tl.float32)
        o = tl.load(O + at, mask=here, other=0.0).to(tl.float32)
        tl.store(W + at, (w - (step * o + shrink * w)).to(W.dtype.element_ty), mask=here)


def momentum_and_norm(G: Tensor, M: Tensor, mu: Tensor, ema: bool, nesterov: bool, safety: float, dtype: torch.dtype,
                      clip: Tensor | None, keep: Tensor) -> Tensor:
    """The first two passes: M advances in place; X (n, rows, cols) in `dtype`, ready for the iteration.

    Args:
        G, M: (n, rows, cols), every matrix contiguous; M float32.
        mu, clip: 0-d, any floating dtype; clip may be None.
        keep: bool, 0-d or (n,).
    """
    numbers, span, chunks = _cut(G)
    assert _packed(G) and _packed(M) and M.dtype == torch.float32, (G.stride(), M.stride(), M.dtype)
    largest, squares = torch.empty(2, len(G) * chunks, dtype=torch.float32, device=G.device)
    X = torch.empty(G.shape, dtype=dtype, device=G.device)
    switches = dict(EMA=ema, NESTEROV=nesterov, CLIP=clip is not None, CHUNK=CHUNK, num_warps=CHUNK_WARPS)
    given = mu if clip is None else clip
    with torch.cuda.device_of(G):
        first_kernel[(len(G) * chunks,)](G, M, largest, squares, mu, given, keep, numbers, span, chunks, G.stride(0),
                                         M.stride(0), keep.ndim, **switches)
        second_kernel[(len(G) * chunks,)](G, M, X, largest, squares, mu, given, numbers, span, chunks, G.stride(0),
                                          M.stride(0), safety, CHUNKS=CHUNKS, **switches)
    return X


def step_and_decay(W: Tensor, O: Tensor, lr: Tensor, factor: float, decay: Tensor, keep: Tensor) -> None:
    """The last pass, in place on W (n, rows, cols); lr and decay are 0-d, keep is bool, 0-d or (n,)."""
    numbers, span, chunks = _cut(W)
    assert _packed(W) and O.is_contiguous(), (W.stride(), O.stride())
    with torch.cuda.device_of(W):
        last_kernel[(len(W) * chunks,)](W, O, lr, decay, keep, factor, numbers, span, chunks, W.stride(0), keep.ndim,
                                        CHUNK=CHUNK, num_warps=CHUNK_WARPS)


def _cut(stack: Tensor) -> tuple[int, int, int]:
    """Numbers of one matrix, those that one program handles (a multiple of CHUNK), programs a matrix."""
    numbers = stack.shape[1] * stack.shape[2]
    span = triton.cdiv(triton.cdiv(numbers, CHUNK), CHUNKS.value) * CHUNK
    return numbers, span, triton.cdiv(numbers, span)


def _packed(stack: Tensor) -> bool:
    """Whether the numbers of each matrix are adjacent."""
    return stack.stride(2) == 1 and stack.stride(1) == stack.shape[2]
