"""Bases of a matrix's two sides: what the rules in eigenbases share (splus.py, soap.py, klsoap.py, shampoo.py).

    L ← βL + (1-β)GGᵀ,   R ← βR + (1-β)GᵀG              the sides of a matrix (m×n) with gradients G
    Q_L, Q_R                                            orthogonal, nearly their eigenvectors, as columns

Sides, bases and roots are stacks (n, d, d), each matrix for itself. Their products want IEEE float32, which is
torch's default on every device: leave TF32 off, in whose products small eigenvalues drown.

What decomposes is for `refresh`: it may wait for the device, and it never raises. A stack that fails is tried again
a matrix at a time; a matrix that fails, in float64; and where that fails too, or a side is not finite, the matrix
keeps what it has. FAILURES counts both, and the last is warned of.
"""
import warnings
from collections import Counter
from typing import Callable

import torch
from torch import Tensor

LARGEST = 1e15                                           # entries of a bounded gradient; see `bounded`
RIDGE = 1e-30                                            # on the diagonal of a side before its eigenvectors
SHIFT = 1e-2                                             # δ, the shift of `shifted_qr` over the side's norm

FAILURES: Counter[str] = Counter()                       # in this process: "solved in float64", "kept the old"


# ---- sides

def new_sides(W: Tensor, max_dim: int, names: tuple[str, ...] = ("left", "right")) -> dict[str, Tensor]:
    """L (n, rows, rows) and R (n, cols, cols), zero, for sides of at most `max_dim`: float32, or W's float64."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return {name: torch.zeros(len(W), d, d, dtype=dtype, device=W.device)
            for name, d in sides_within(*W.shape[-2:], max_dim).items() if name in names}


def sides_within(rows: int, cols: int, max_dim: int) -> dict[str, int]:
    """The sides that are no longer than `max_dim`, with their lengths."""
    return {name: d for name, d in (("left", rows), ("right", cols)) if d <= max_dim}


def advance_sides(G: Tensor, state: dict[str, Tensor], beta: float) -> None:
    """Move the averages `left` and `right` towards GGᵀ and GᵀG, those of them that `state` has."""
    if "left" in state:
        state["left"].lerp_(G @ G.mT, 1 - beta)
    if "right" in state:
        state["right"].lerp_(G.mT @ G, 1 - beta)


def bounded(G: Tensor) -> Tensor:
    """Each matrix scaled so that no entry is beyond ±1e15: exactly G for any ordinary gradient.

    Its singular values, at most 1e15 √(rows·cols), then have squares that are float32 numbers.
    """
    return G / (torch.linalg.vector_norm(G, float("inf"), (-2, -1), keepdim=True) / LARGEST).clamp(min=1)


def identities(S: Tensor) -> Tensor:
    """The basis that changes nothing, for every side of a stack."""
    return torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).repeat(len(S), 1, 1)


def rotate(X: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Q_Lᵀ X Q_R, a missing basis being the identity."""
    X = X if Q_L is None else Q_L.mT @ X
    return X if Q_R is None else X @ Q_R


def rotate_back(X: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Q_L X Q_Rᵀ, a missing basis being the identity."""
    X = X if Q_L is None else Q_L @ X
    return X if Q_R is None else X @ Q_R.mT


# ---- decompositions

def eigenbases(S: Tensor, previous: Tensor) -> Tensor:
    """Orthonormal eigenvectors of S + 1e-30 I, by rising eigenvalue.

    Nothing says which vectors span a null space or an eigenspace of several dimensions, and so they differ between
    solvers: after its first gradient that is most of the longer side of any matrix that is not square.
    """
    ridge = RIDGE * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return _sturdy(lambda S, _: torch.linalg.eigh(S + ridge).eigenvectors, S, previous)


def shifted_qr(S: Tensor, previous: Tensor) -> Tensor:
    """One step of orthogonal iteration from the basis before: qr((S + δ‖S‖_F I) Q) with diag(R) > 0.

    The shift makes it a smooth function of S: directions of which S says nothing stay as they are, and rounding is
    magnified by no more than about 1/δ. Any number near the spectral norm serves; the Frobenius norm, which is never
    below it, costs one pass. On gradients of 192×384, iid or of power-law spectra, 20 steps of 10 leave
    ‖QᵀSQ - diag‖ at most a tenth larger than the spectral norm does, and float32 as near to float64 (test_bases.py).
    """
    def solve(S, Q):
        S, _ = _scaled(S)                                # a norm of at least 1 then, unless S is zero
        return _qr(S @ Q + SHIFT * torch.linalg.matrix_norm(S, keepdim=True).clamp(min=1) * Q)
    return _sturdy(solve, S, previous)


def power_qr(S: Tensor, Q: Tensor, sort: bool) -> tuple[Tensor, Tensor | None]:
    """One step of power iteration, qr(S Q) with diag(R) > 0; a side of zeros keeps its basis.

    Returns:
        The new basis, and the order (n, d) in which the columns of Q went into it, by falling eigenvalue as
        diag(QᵀSQ) estimates it; None for their own order, without `sort`.
    """
    S, nonzero = _scaled(S)
    product, order = S @ Q, None
    if sort:
        order = (product * Q).sum(-2).argsort(dim=-1, descending=True, stable=True)
        product, Q = (A.gather(-1, order[:, None, :].expand_as(A)) for A in (product, Q))
    return _qr_or(Q, torch.where(nonzero, product, Q)), order


def inverse_roots(S: Tensor, previous: Tensor, exponent: float, eps: float) -> Tensor:
    """(S + εI)^-p. Eigenvalues that rounding made negative count as zero; with ε = 0 zeros stay zero, as in a
    pseudo-inverse, where what is below rounding counts as zero too."""
    def solve(S, _):
        values, V = torch.linalg.eigh(S)
        values = values.clamp(min=0)
        floor = 0 if eps else S.shape[-1] * torch.finfo(S.dtype).eps * values.amax(-1, keepdim=True)
        powers = torch.where(values + eps > floor, (values + eps) ** -exponent, 0)
        return V * powers[:, None, :] @ V.mT
    return _sturdy(solve, S, previous)


def eigh_flops(d: int) -> float:
    """Operations of an eigendecomposition with vectors, about: Golub & Van Loan, 4th edition, section 8.3."""
    return 9.0 * d ** 3


def qr_flops(d: int) -> float:
    """Operations of the product, 2d³, and of QR with Q formed, 8/3 d³, that renew a basis."""
    return 14 / 3 * d ** 3


def _qr(A: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(A)
    return torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(Q.dtype)[:, None, :] * Q


def _scaled(S: Tensor) -> tuple[Tensor, Tensor]:
    """Every side with its largest entry at 1, so that nothing overflows, and whether it is not all zeros."""
    largest = torch.linalg.vector_norm(S, float("inf"), (-2, -1), keepdim=True)
    return S / largest.clamp(min=torch.finfo(S.dtype).tiny), largest != 0


def _qr_or(previous: Tensor, A: Tensor) -> Tensor:
    """The Q of A, by the ladder above. QR has no convergence that could fail, so that a GPU is not waited for: there a
    matrix whose Q is not finite keeps its previous one, uncounted."""
    if not A.is_cuda:
        return _sturdy(lambda A, _: _qr(A), A, previous)
    Q = _qr(A)
    return torch.where(Q.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), Q, previous)


def _sturdy(solve: Callable[[Tensor, Tensor], Tensor], S: Tensor, previous: Tensor) -> Tensor:
    """solve(S, previous), by the ladder above. One matrix's failure leaves the others' results alone, so that
    stacks may be cut anywhere."""
    found = _attempt(solve, S, previous)
    if found is None and len(S) > 1:
        return torch.cat([_sturdy(solve, *one) for one in zip(S.split(1), previous.split(1))])
    if found is None:
        found = _attempt(solve, S.double(), previous.double())
        if found is None:
            FAILURES["kept the old"] += 1
            warnings.warn(f"a {S.shape[-1]}×{S.shape[-1]} side was not decomposed: its matrix keeps the old basis or "
                          f"root ({FAILURES['kept the old']} so far)")
            return previous
        FAILURES["solved in float64"] += 1
    return found.to(S.dtype)


def _attempt(solve: Callable[[Tensor, Tensor], Tensor], S: Tensor, previous: Tensor) -> Tensor | None:
    try:
        found = solve(S, previous)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:                                 # LinAlgError is one, and so are cuSOLVER's own
        return None
    return found if found.isfinite().all() else None


# ---- when

def is_due(t: int, last: int, following: int, index: int, count: int, stagger: bool) -> bool:
    """Whether matrix `index` of `count` is refreshed after update t, last ≤ t < following, where all are refreshed
    after update `last` and again after `following`, or, staggered, at the share index/count of the time between.

    So no step has more than ⌈count / (following - last)⌉ to do. Staggering moves work and saves none: refreshes of
    different steps cannot run at once on different ranks, so that on many ranks less waiting at one step is more
    waiting in all.
    """
    return t == last + (index * (following - last) // count if stagger else 0)
