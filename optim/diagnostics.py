"""What a step did to every weight, measured where a run asks for it: at validation steps, off the clock.

    update_rms, weight_rms     root mean square of an entry's change, and of an entry
    update_norm, weight_norm   largest singular value of a logical matrix's change, and of the matrix (vectors: 2-norm)
    orthogonality              ‖U Uᵀ/σ² - I‖_F/√r of the change U with r singular values of mean square σ²:
                               0 where all are equal, as orthogonalised steps without decay have them
    smoothness                 L̂ = ‖g₂-g₁‖_*/‖ΔX‖ on one batch before and after the step, and ‖g₁‖_* (smoothness.py)
    l0, l1                     the fit L̂ ≈ L⁰ + L¹‖g‖_* over the measurements so far (Gluon, arXiv:2505.13416, Eq. 10)

Of a weight with several logical matrices the largest value counts. A rank measures what it owns.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from optim.bank import Bank
from optim.driver import Optimizer
from optim.smoothness import dual_norm, fit, smoothness

POWER_STEPS = 30                                           # of the power iteration: 1 % and better on trained weights


class Probe:
    """Measures single steps of an optimizer: `before` one, `after` it. L⁰ and L¹ are fitted since it was made."""

    def __init__(self, optimizer: Optimizer, wanted: tuple[str, ...]):
        self.optimizer, self.wanted = optimizer, wanted
        self.pairs: dict[str, list[tuple[float, float]]] = {}      # parameter -> (L̂, ‖g‖_*) at every measurement

    def before(self, gradients: Callable[[], list[Tensor]]) -> None:
        """`gradients` gives the step's gradient at the present weights, as this rank's share of every bank."""
        self.gradients = gradients
        keep = {"updates", "smoothness"} & set(self.wanted)
        self.old = [measured(bank).clone() for bank in self.optimizer.banks] if keep else []
        self.g1 = gradients() if "smoothness" in self.wanted else None

    @torch.no_grad()
    def after(self) -> dict[str, dict[str, float]]:
        """{parameter: {what: value}} of this rank's parameters."""
        with torch.enable_grad():
            g2 = self.gradients() if self.g1 is not None else None
        found: dict[str, dict[str, float]] = {}
        for i, (bank, old) in enumerate(zip(self.optimizer.banks, self.old)):
            if "updates" in self.wanted:
                for name, before, now in zip(names_of(bank), pieces(bank, old), pieces(bank, measured(bank))):
                    found.setdefault(name, {}).update(movement(before.float(), now.float()))
            if g2 is not None and not bank.flat and len(old):
                for name, values in self._smoothness(bank, old, self.g1[i], g2[i]):
                    found.setdefault(name, {}).update(values)
        self.old = self.g1 = None
        return {name: {what: value for what, value in values.items() if math.isfinite(value)}      # JSON has no NaN
                for name, values in found.items()}

    def _smoothness(self, bank: Bank, old: Tensor, g1: Tensor, g2: Tensor):
        geometry = getattr(bank.rule, "geometry", "spectral")
        g1, g2, moved = bank.cut.take(g1), bank.cut.take(g2), bank.cut.take(bank.mine.float() - old.float())
        ratios, norms = smoothness(g1, g2, moved, geometry), dual_norm(g1, geometry)
        largest = (values.view(-1, bank.cut.blocks).amax(1).tolist() for values in (ratios, norms))
        for name, ratio, norm in zip(names_of(bank), *largest):
            window = self.pairs.setdefault(name, [])
            window.append((ratio, norm))
            values = {"smoothness": ratio, "gradient_dual_norm": norm}
            if len(window) > 1:
                values["l0"], values["l1"] = fit(*zip(*window))
            yield name, values


def measured(bank: Bank) -> Tensor:
    """What this rank measures of a bank: the matrices it owns; of a flat bank, whose cuts mean nothing, all."""
    return bank.weights if bank.flat else bank.mine


def names_of(bank: Bank) -> list[str]:
    names = list(bank.params)
    return names if bank.flat else names[bank.offsets[bank.rank]:bank.offsets[bank.rank + 1]]


def pieces(bank: Bank, full: Tensor) -> list[Tensor]:
    """The logical matrices (n, r, c) of each parameter of `names_of`, or a vector or scalar as it is."""
    if not bank.flat:
        return list(bank.cut.take(full).split(bank.cut.blocks))
    return [piece[None] if piece.ndim == 2 else piece for piece in bank.split(full)]


def movement(before: Tensor, now: Tensor) -> dict[str, float]:
    change = now - before
    found = {"update_rms": change.square().mean().sqrt(), "weight_rms": now.square().mean().sqrt()}
    if change.ndim < 3:
        found |= {"update_norm": change.norm(), "weight_norm": now.norm()}
    else:
        found |= {"update_norm": largest_singular_value(change).max(),
                  "weight_norm": largest_singular_value(now).max(), "orthogonality": spread(change).max()}
    return {key: value.item() for key, value in found.items()}


def largest_singular_value(X: Tensor) -> Tensor:
    """(n,) of X (n, r, c), from below, by power iteration from the row of largest norm."""
    longest = torch.linalg.vector_norm(X, dim=-1).argmax(-1)
    v = X[torch.arange(len(X), device=X.device), longest][:, :, None]
    for _ in range(POWER_STEPS):
        v = X.mT @ (X @ (v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-30)))
    return torch.linalg.vector_norm(v, dim=(1, 2)).sqrt()


def spread(X: Tensor) -> Tensor:
    """(n,) of X (n, r, c): ‖X Xᵀ/σ² - I‖_F/√r on the smaller side r, σ² the mean square of its singular values."""
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-30)
    small = min(X.shape[-2:])
    gram = X.mT @ X if X.shape[-1] == small else X @ X.mT                  # trace 1, or 0 for a zero matrix
    return (small * gram.square().sum((-2, -1)) - 1).clamp(min=0).sqrt()
