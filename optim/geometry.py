"""Norms on matrices and their linear minimisation oracles: the geometries of Scion and Gluon.

    lmo(G) = argmin over ‖A‖ ≤ 1 of ⟨G, A⟩         ‖G‖* = max over ‖A‖ ≤ 1 of ⟨G, A⟩ = -⟨G, lmo(G)⟩

For A (m×n), m = fan out, n = fan in, every norm here is a plain norm over a factor s, so that lmo(G) = -s U with U a
matrix of plain norm 1:

    geometry          ‖A‖·s          U             s               ‖G‖*/s       for
    spectral          σ₁(A)          msign(G)      √(m/n)          Σ σ(G)       hidden layers
    spectral_clamped  σ₁(A)          msign(G)      max(1, √(m/n))  Σ σ(G)       input layers; Muon's scale `spectral`
    sign              max |aᵢⱼ|      sign(G)       1/n             Σ |gᵢⱼ|      the head, also when tied
    max               max |aᵢⱼ|      sign(G)       1               Σ |gᵢⱼ|      anything, elementwise: signSGD
    colnorm           maxⱼ ‖a:ⱼ‖     g:ⱼ/‖g:ⱼ‖     √m              Σⱼ ‖g:ⱼ‖     embeddings: their input is one-hot
    rownorm           maxᵢ ‖aᵢ:‖     gᵢ:/‖gᵢ:‖     1/√n            Σᵢ ‖gᵢ:‖     the head
    bias_rms          ‖a‖            g/‖g‖         √m              ‖g‖          vectors, which are one column
    frobenius         ‖A‖_F          G/‖G‖_F       1               ‖G‖_F        normalised SGD

msign(G) = PQᵀ for G = P diag(σ) Qᵀ, by Newton-Schulz (orthogonalise.py). All but the last are those of Pethick et al.
(arXiv:2502.07529) and LIONS-EPFL/scion, where `max` is Sign without its 1/n. They act on logical matrices: an untied
embedding is width × vocabulary, and a column of it one token's vector.

Deviation: the reference divides columns, rows and vectors by their norm/s plus ε = 1e-8. Here ε is the caller's
choice, 0 unless said, and then a direction does not depend on the gradient's magnitude. It shows in an embedding:
without ε a token that batches lack moves on in its last direction until float32 has nothing left of its momentum,
some 900 steps at .9 a step; with ε, until norm/s is near 1e-8.
"""
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from optim.orthogonalise import DtypeName, Preset, iteration_dtype, newton_schulz_flops, orthogonalise

Norm = Literal["spectral", "spectral_clamped", "sign", "max", "colnorm", "rownorm", "bias_rms", "frobenius"]
ORTHOGONALISED: tuple[Norm, ...] = ("spectral", "spectral_clamped")           # these read a NewtonSchulz
DIVIDED: tuple[Norm, ...] = ("colnorm", "rownorm", "bias_rms", "frobenius")   # these read eps
ALL = (-2, -1)


class NewtonSchulz(NamedTuple):
    """How msign is found; by default well enough for a measurement."""
    coefficients: Preset = "exact12"
    steps: int | None = None
    dtype: DtypeName = "float32"


class Geometry(NamedTuple):
    """One row of the table."""
    unit: Callable[[Tensor, float, NewtonSchulz], Tensor]   # U of every matrix of (n, rows, cols)
    norm: Callable[[Tensor], Tensor]                        # ‖A‖·s of every matrix, (n,)
    scale: Callable[[int, int], float]                      # s
    rms: Callable[[int, int], float]                        # root mean square of an entry of U


# ---- the plain norms and their U. Nothing is squared before its largest entry is 1: float32 ends at 1e38 and 1e-38.

def _msign(G: Tensor, eps: float, ns: NewtonSchulz) -> Tensor:
    return orthogonalise(G, ns.coefficients, ns.steps, iteration_dtype(ns.dtype, G.device)).to(G.dtype)


def _signs(G: Tensor, eps: float, ns: NewtonSchulz) -> Tensor:
    return G.sign()


def _divided(dims: tuple[int, ...]) -> Callable[[Tensor, float, NewtonSchulz], Tensor]:
    def unit(G: Tensor, eps: float, ns: NewtonSchulz) -> Tensor:
        X, largest = _levelled(G, dims)
        length = torch.linalg.vector_norm(X, 2, dims, keepdim=True) + eps / largest
        return X / length.clamp(min=torch.finfo(G.dtype).tiny)           # zero stays zero
    return unit


def _levelled(G: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """G over its largest magnitude along `dims`, and that magnitude."""
    largest = torch.linalg.vector_norm(G, float("inf"), dims, keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    return G / largest, largest


def _sigma_1(A: Tensor) -> Tensor:
    X, largest = _levelled(A, ALL)
    gram = X.mT @ X if A.shape[-2] > A.shape[-1] else X @ X.mT
    return largest[:, 0, 0] * torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()


def _largest_entry(A: Tensor) -> Tensor:
    return A.abs().amax(ALL)


def _longest(dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def norm(A: Tensor) -> Tensor:
        X, largest = _levelled(A, dims)
        return (largest * torch.linalg.vector_norm(X, 2, dims, keepdim=True)).amax(ALL)
    return norm


def _semi_orthogonal_rms(m: int, n: int) -> float:
    return max(m, n) ** -0.5


GEOMETRIES: dict[Norm, Geometry] = {
    "spectral": Geometry(_msign, _sigma_1, lambda m, n: (m / n) ** 0.5, _semi_orthogonal_rms),
    "spectral_clamped": Geometry(_msign, _sigma_1, lambda m, n: max(1.0, m / n) ** 0.5, _semi_orthogonal_rms),
    "sign": Geometry(_signs, _largest_entry, lambda m, n: 1 / n, lambda m, n: 1.0),
    "max": Geometry(_signs, _largest_entry, lambda m, n: 1.0, lambda m, n: 1.0),
    "colnorm": Geometry(_divided((-2,)), _longest((-2,)), lambda m, n: m ** 0.5, lambda m, n: m ** -0.5),
    "rownorm": Geometry(_divided((-1,)), _longest((-1,)), lambda m, n: n ** -0.5, lambda m, n: n ** -0.5),
    "bias_rms": Geometry(_divided(ALL), _longest(ALL), lambda m, n: m ** 0.5, lambda m, n: (m * n) ** -0.5),
    "frobenius": Geometry(_divided(ALL), _longest(ALL), lambda m, n: 1.0, lambda m, n: (m * n) ** -0.5),
}


def direction(G: Tensor, name: Norm, ns: NewtonSchulz = NewtonSchulz(), eps: float = 0.0) -> Tensor:
    """-lmo(G) = s U, a new tensor, for every matrix of `G` (n, rows, cols) in float32 or better.

    For "max", G may have any shape.
    """
    geometry = GEOMETRIES[name]
    s = geometry.scale(*G.shape[-2:]) if G.ndim > 1 else 1.0
    return s * geometry.unit(G, s * eps, ns)


def norm(A: Tensor, name: Norm) -> Tensor:
    """‖A‖ of every matrix of a stack (n, rows, cols): (n,)."""
    return GEOMETRIES[name].norm(_exact(A)) / GEOMETRIES[name].scale(*A.shape[-2:])


def dual_norm(G: Tensor, name: Norm, ns: NewtonSchulz = NewtonSchulz()) -> Tensor:
    """‖G‖* of every matrix of a stack (n, rows, cols): (n,); as exact as `ns` is where it orthogonalises."""
    G = _exact(G)
    return (G * direction(G, name, ns)).sum(ALL)


def _exact(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def initial_weights(name: Norm, rows: int, cols: int, generator: Generator) -> Tensor:
    """A random matrix with ‖W‖ = 1, float32: s U of a Gaussian one, its msign exact. Zero where `name` is bias_rms."""
    if name == "bias_rms":
        return torch.zeros(rows, cols, device=generator.device)
    X = torch.randn(rows, cols, generator=generator, device=generator.device)
    if name in ORTHOGONALISED:                           # QR with R's diagonal positive is as uniform as msign
        Q, R = torch.linalg.qr(X if rows >= cols else X.mT)
        Q = Q * R.diagonal().sign()
        return GEOMETRIES[name].scale(rows, cols) * (Q if rows >= cols else Q.mT)
    return direction(X[None], name)[0]


def flops(name: Norm, rows: int, cols: int, ns: NewtonSchulz) -> float:
    """Operations of one `direction`."""
    return newton_schulz_flops(rows, cols, ns.coefficients, ns.steps) if name in ORTHOGONALISED else 4.0 * rows * cols
