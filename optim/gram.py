"""Newton-Schulz steps on the small Gram matrix of a long one (Dao-AILab, Gram-Newton-Schulz).

A step of X ← p(XXᵀ) X, p(R) = aI + bR + cR², moves R = XXᵀ to p(R) R p(R), and all of these are polynomials of one
matrix, which commute. So the steps can be made on R (n × n), and their product Q be applied to X (n × m) at the end:

    R = XXᵀ,  Q = I
    repeat:  Z = bR + cR²,   Q ← aQ + ZQ,   R ← aT + ZT with T = aR + ZR
    X ← QX

Every product but the first and the last is of n³ instead of n²m, and all but the last are symmetric. What rounding does
to R grows from step to step, so X and R are made again from Q after every second step, and numbers are float16, whose
products are as fast as bfloat16's: entries stay below 100. Error against float64, 128 × 512, float16 (standard form in
bfloat16 in brackets), of a Gaussian matrix and of one with singular values from 1 down to 1e-4:

                      kj5                you5               polar_express5     exact12
    Gaussian          1.6e-3 (1.1e-2)    7.5e-4 (5.4e-3)    3.0e-3 (1.5e-2)    5.7e-4 (4.7e-3)
    1 to 1e-4         2.1e-2 (8.9e-2)    1.6e-2 (8.0e-2)    6.1e-2 (1.3e-1)    4.7e-2 (4.1e-1)

With kj5 it is no more for larger ones: 1.4e-3 at 768 × 3072, 1.2e-3 at 1600 × 6400 (sums in float32, results rounded).
Symmetry is needed: where both halves of a product are rounded by themselves, kj5 is off by 5.7e-2 at 128 × 512.
Without making X again it is up to 1, and with twelve steps not a number. Deviation from Dao-AILab/gram-newton-schulz
(f08f25e): X is not divided by another 1.05 first, for which no difference was found in the same experiment.
"""
import torch
from torch import Tensor

from optim.backend import symmetric_product

Polynomials = tuple[tuple[float, float, float], ...]


def worth_it(rows: int, cols: int) -> bool:
    """Whether the form takes fewer operations by far: from twice as long as wide on."""
    return max(rows, cols) >= 2 * min(rows, cols)


def stretches(polynomials: Polynomials) -> list[Polynomials]:
    """The steps between which X is made again: two and two, and three at the end of an odd number."""
    cuts = [0, *range(2, len(polynomials) - 1, 2), len(polynomials)]
    return [polynomials[start:end] for start, end in zip(cuts, cuts[1:])]


def gram_steps(X: Tensor, polynomials: Polynomials) -> Tensor:
    """Apply the steps to every matrix of (n, rows, cols), normalised and in the dtype to calculate in."""
    tall = X.shape[-2] > X.shape[-1]
    for stretch in stretches(polynomials):
        Y = X.mT if tall else X
        R, Q = symmetric_product(Y, Y), None
        for step, (a, b, c) in enumerate(stretch, 1):
            Z = symmetric_product(R, R, R, c, b) if c else b * R
            Q = _first(Z, a) if Q is None else symmetric_product(Z, Q, Q, 1.0, a)
            if step < len(stretch):
                T = symmetric_product(Z, R, R, 1.0, a)
                R = symmetric_product(Z, T, T, 1.0, a)
        X = X @ Q if tall else Q @ X
    return X


def _first(Z: Tensor, a: float) -> Tensor:
    """aI + Z, the product of the steps so far after the first; summed in float32 or better."""
    eye = torch.eye(Z.shape[-1], dtype=torch.promote_types(Z.dtype, torch.float32), device=Z.device)
    return (a * eye + Z).to(Z.dtype)


def gram_flops(rows: int, cols: int, polynomials: Polynomials) -> float:
    """Operations of the products for one matrix, of symmetric ones half, as the kernels make them."""
    n, m = sorted((rows, cols))
    total = 0.0
    for stretch in stretches(polynomials):
        total += 3 * m * n ** 2 - n ** 3                # R and QX, and the first step makes Q without a product
        total += sum((4 if c else 3) * n ** 3 for _, _, c in stretch) - 2 * n ** 3       # the last step leaves R
    return total
