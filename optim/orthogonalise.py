"""Newton-Schulz iteration: nearly the polar factor UVᵀ of X = U diag(σ) Vᵀ, by matrix products alone.

    X ← X / (s ‖X‖_F)                                   so that every singular value is at most 1/s ≤ 1
    repeat:  A = XXᵀ,  X ← aX + (bA + cA²)X             tall X: A = XᵀX,  X ← aX + X(bA + cA²)

Each step moves every singular value by the odd polynomial σ ← aσ + bσ³ + cσ⁵ and leaves U and V alone; the
tall form is the same polynomial on the smaller Gram matrix, without a transposed copy. aX is added apart from
B = bA + cA²: folding aI into B would round away B's low bits in bfloat16.

The references divide by ‖X‖_F + 1e-7 or clamp the norm at 1e-7, in bfloat16, so that matrices with a norm
near that or below come out too small. Here every finite magnitude is normalised alike, and zeros stay zero.

A and B are symmetric, of which backend.py makes one half only where it can. gram.py has the same steps in another
form, for matrices that are long and thin.
"""
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optim.backend import symmetric_product
from optim.gram import gram_flops, gram_steps, worth_it

# Asked once: in a compiled update the question breaks the graph.
CPU_FAST_IN_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Coefficients(NamedTuple):
    """Polynomials of one Newton-Schulz variant."""
    steps: tuple[tuple[float, float, float], ...]        # (a, b, c) of each step
    safety: float = 1.0                                  # s


Preset = Literal["kj5", "you5", "polar_express5", "exact12", "cubic5"]
DtypeName = Literal["auto", "bfloat16", "float32"]       # see `iteration_dtype`
Form = Literal["standard", "gram"]                       # gram: gram.py's, for matrices for which it is worth it

# Bands: where singular values of 0.01 to 1 after normalising end up.
COEFFICIENTS: dict[Preset, Coefficients] = {
    # Keller Jordan, kellerjordan.github.io/posts/muon; the default of KellerJordan/Muon and torch.optim.Muon.
    # Steep at zero (a⁵ ≈ 485) at the price of never converging: band 0.68 to 1.14.
    "kj5": Coefficients(((3.4445, -4.7750, 2.0315),) * 5),
    # You Jiacheng, a polynomial per step: record 4 of modded-nanogpt's track 2 (2025-02-14), the default of
    # Dao-AILab/gram-newton-schulz (f08f25e). Band 0.97 to 1.04.
    "you5": Coefficients((
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012))),
    # Polar Express, the minimax-optimal composition (Amsel et al., arXiv:2505.16932), cushion 2, safety 2e-2,
    # hence the norm times 1.02; as in modded-nanogpt from record 38 (2025-09-29) on. Band 0.85 to 1.15.
    "polar_express5": Coefficients((
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)), safety=1.02),
    # Converges to 1; modded-nanogpt (f411b3d) records/track_3_optimization/train_gpt_simple.py.
    "exact12": Coefficients(((2.0, -1.5, 0.5),) * 12),
    # Cubic steps, which spare the product A² (arXiv:2606.00371). Band 0.77 to 1.31.
    "cubic5": Coefficients((
        (3.3657, -3.3421, 0.0),
        (2.5744, -1.4957, 0.0),
        (2.5369, -1.4313, 0.0),
        (2.4418, -1.2764, 0.0),
        (2.2230, -0.9631, 0.0))),
}


def orthogonalise(X: Tensor, coefficients: Preset = "kj5", steps: int | None = None,
                  dtype: torch.dtype = torch.float32, form: Form = "standard") -> Tensor:
    """Apply a preset's Newton-Schulz steps to every matrix of a stack; `X` itself is left as it is.

    Args:
        X: (n, rows, cols), any floating dtype and any finite magnitude.
        coefficients: a key of COEFFICIENTS.
        steps: how many; None: as many as the preset lists. Further ones repeat the preset's last.
        dtype: of the products and of the result. The norm is taken in float32 or better in any case.
    Returns:
        (n, rows, cols), a new tensor; zero where a matrix is zero.
    """
    return iterate(_normalise(X, COEFFICIENTS[coefficients].safety).to(dtype), coefficients, steps, form)


def iterate(X: Tensor, coefficients: Preset, steps: int | None, form: Form) -> Tensor:
    """The steps alone, in X's dtype, on matrices (n, rows, cols) whose norms are at most 1."""
    if form == "gram" and worth_it(*X.shape[-2:]):
        return gram_steps(X, polynomials(coefficients, steps))
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in polynomials(coefficients, steps):
        Y = X.mT if tall else X
        A = symmetric_product(Y, Y)
        B = symmetric_product(A, A, A, c, b) if c else b * A
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def newton_schulz_flops(rows: int, cols: int, coefficients: Preset = "kj5", steps: int | None = None,
                        form: Form = "standard") -> float:
    """Floating-point operations of the products for one matrix, with n its smaller and m its larger side:
    2mn² for A, 2n³ for A², which cubic steps spare, and 2mn² for BX, in each step."""
    n, m = sorted((rows, cols))
    if form == "gram" and worth_it(rows, cols):
        return gram_flops(rows, cols, polynomials(coefficients, steps))
    return float(sum(4 * m * n ** 2 + (2 * n ** 3 if c else 0) for _, _, c in polynomials(coefficients, steps)))


def polynomials(coefficients: Preset, steps: int | None) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each step."""
    listed = COEFFICIENTS[coefficients].steps
    steps = len(listed) if steps is None else steps
    return listed[:steps] + listed[-1:] * (steps - len(listed))


def _normalise(X: Tensor, safety: float) -> Tensor:
    """Every matrix over `safety` times its Frobenius norm."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    tiny, dims = torch.finfo(X.dtype).tiny, (-2, -1)
    # With the largest entry at 1 first, squares neither overflow nor vanish (float32 ends at 1e38 and 1e-38).
    X = X / torch.linalg.vector_norm(X, float("inf"), dims, keepdim=True).clamp(min=tiny)
    return X / (safety * torch.linalg.vector_norm(X, 2, dims, keepdim=True).clamp(min=tiny))


def iteration_dtype(name: DtypeName, device: torch.device, form: Form = "standard") -> torch.dtype:
    """The dtype that `ns_dtype` means on this device.

    "auto" is bfloat16 where the processor is fast in it: on CUDA, as in every reference, and on a CPU with AMX
    tiles or AVX512-BF16; float32 elsewhere. The Gram form has float16 on CUDA instead, and float32 on a CPU.
    5 steps, 2 threads, torch 2.13, float32 → bfloat16, ms:

                   with AMX     AVX512-BF16   AVX-512 only   AVX2 only
        16×128×128  3.3 → 1.2    6.5 → 2.7     3.4 → 14.7     5.4 → 193
        8×512×128   5.1 → 1.7   10.3 → 4.6     4.8 → 21.5     7.6 → 248
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if form == "gram":
        return torch.float16 if device.type == "cuda" else torch.float32
    fast = device.type == "cuda" or (device.type == "cpu" and CPU_FAST_IN_BF16)
    return torch.bfloat16 if fast else torch.float32


def refuse_bfloat16_gram(form: Form, dtype: DtypeName) -> None:
    """Raises ValueError: rounding to 8 bits makes the Gram matrix indefinite, and the steps then diverge."""
    if form == "gram" and dtype == "bfloat16":
        raise ValueError("ns_form: gram diverges in bfloat16; remove ns_dtype, then float16 is meant, or set float32")
