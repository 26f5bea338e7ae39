"""C = α P Qᵀ + β D for stacks of products that are symmetric: half of the tiles are computed, the others are copies.

    A = X Xᵀ             P = Q = X; for a tall X the view Xᵀ, so that nothing is transposed in memory
    B = bA + cA²         P = Q = D = A: A is symmetric to the bit, so A Aᵀ is A²
    S T                  symmetric S and T that commute, as powers of one matrix do: P = S, Q = T

A program makes one tile on or below the diagonal, so n(n+1)/2 programs make a matrix of n × n tiles, and none has
nothing to do. A tile below the diagonal is stored twice, as it is and mirrored; a tile on the diagonal once, its upper
triangle copied from its lower, so that C equals Cᵀ to the bit whatever P and Q are. Sums are float32. Offsets within a
tile are 32-bit; where a tile starts is 64-bit, for a stack may have more than 2³¹ numbers.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from optim.kernels.configurations import INTERPRETED, Launch, symmetric_launch


def reference(P: Tensor, Q: Tensor, D: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """The same in float64, (n, rows, rows)."""
    C = alpha * P.double() @ Q.double().mT
    return C if D is None else C + beta * D.double()


@triton.jit
def symmetric_kernel(P, Q, D, C, alpha, beta, rows, inner, tiles,
                     P_matrix, P_row, P_col, Q_matrix, Q_row, Q_col, D_matrix, D_row, C_matrix, C_row,
                     ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    matrix, t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)   # t = i(i+1)/2 + j with j ≤ i,
    i += ((i + 1) * (i + 2) // 2 <= t).to(tl.int32)                          # and the root's rounding put right
    i -= (i * (i + 1) // 2 > t).to(tl.int32)
    j = t - i * (i + 1) // 2

    lane, depth = tl.arange(0, TILE), tl.arange(0, DEPTH)
    row_here, col_here = i * TILE + lane < rows, j * TILE + lane < rows
    P += matrix * P_matrix + (i * TILE).to(tl.int64) * P_row
    Q += matrix * Q_matrix + (j * TILE).to(tl.int64) * Q_row
    p_at = P + (lane[:, None] * P_row + depth[None, :] * P_col)              # (TILE, DEPTH)
    q_at = Q + (depth[:, None] * Q_col + lane[None, :] * Q_row)              # (DEPTH, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, inner, DEPTH):
        depth_here = depth < inner - start
        p = tl.load(p_at, mask=row_here[:, None] & depth_here[None, :], other=0.0)
        q = tl.load(q_at, mask=depth_here[:, None] & col_here[None, :], other=0.0)
        total = tl.dot(p, q, total, input_precision="ieee")
        p_at += DEPTH * P_col
        q_at += DEPTH * Q_col
    total *= alpha
    if ADD:
        D += matrix * D_matrix + (i * TILE).to(tl.int64) * D_row + j * TILE
        d = tl.load(D + (lane[:, None] * D_row + lane[None, :]), mask=row_here[:, None] & col_here[None, :], other=0.0)
        total += beta * d.to(tl.float32)

    out = total.to(C.dtype.element_ty)
    mirrored = tl.trans(out)
    out = tl.where(i * TILE + lane[:, None] >= j * TILE + lane[None, :], out, mirrored)
    C += matrix * C_matrix
    at = C + ((i * TILE).to(tl.int64) * C_row + j * TILE)
    tl.store(at + (lane[:, None] * C_row + lane[None, :]), out, mask=row_here[:, None] & col_here[None, :])
    if i > j:
        at = C + ((j * TILE).to(tl.int64) * C_row + i * TILE)
        tl.store(at + (lane[:, None] * C_row + lane[None, :]), mirrored, mask=col_here[:, None] & row_here[None, :])


def symmetric_product(P: Tensor, Q: Tensor, D: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0,
                      out: Tensor | None = None, launch: Launch | None = None) -> Tensor:
    """α P Qᵀ + β D of every matrix of a stack, where P Qᵀ and D are symmetric.

    Args:
        P, Q: (n, rows, inner), bfloat16 or float16 (in the interpreter float32 too), with any strides.
        D: (n, rows, rows) with rows of adjacent numbers, or None.
        out: what to write to, like D; None: a new tensor.
        launch: None: the table's choice for this device.
    Returns:
        (n, rows, rows) in P's dtype.
    """
    n, rows, inner = P.shape
    C = torch.empty(n, rows, rows, dtype=P.dtype, device=P.device) if out is None else out
    assert P.shape == Q.shape and C.stride(2) == 1 and (D is None or D.stride(2) == 1), (P.shape, Q.shape)
    if launch is None:
        launch = symmetric_launch(rows, torch.cuda.get_device_capability(P.device)) if P.is_cuda else INTERPRETED
    side = triton.cdiv(rows, launch.tile)
    tiles = side * (side + 1) // 2
    D_or_C = C if D is None else D
    with torch.cuda.device_of(P):
        symmetric_kernel[(n * tiles,)](
            P, Q, D_or_C, C, alpha, beta, rows, inner, tiles, *P.stride(), *Q.stride(), *D_or_C.stride()[:2],
            *C.stride()[:2], ADD=D is not None, TILE=launch.tile, DEPTH=launch.depth,
            num_warps=launch.warps, num_stages=launch.stages)
    return C
