"""The Gram form makes the same steps as the standard one, and float16 is enough for it."""
import pytest
import torch

from optim.gram import gram_flops, gram_steps, stretches, worth_it
from optim.muon import Muon
from optim.normuon import NorMuon
from optim.orthogonalise import COEFFICIENTS, iteration_dtype, newton_schulz_flops, orthogonalise, polynomials


def gaussian(rows=48, cols=192):
    return torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def decaying(rows=48, cols=192):
    """Singular values from 1 down to 1e-4."""
    left, right = torch.linalg.qr(gaussian(rows, rows))[0], torch.linalg.qr(gaussian(cols, rows))[0]
    return left * torch.logspace(0, -4, rows, dtype=torch.float64) @ right.mT


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, None])
@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_in_float64_the_gram_form_is_the_standard_form(preset, steps):
    for X in (gaussian(), gaussian().mT, gaussian(16, 32)):
        standard = orthogonalise(X, preset, steps, torch.float64)
        assert error(orthogonalise(X, preset, steps, torch.float64, "gram"), standard) < 1e-11


# Measured: a fifth to a half of the bound, and a fourth of what the standard form is off by in bfloat16.
@pytest.mark.parametrize("draw, bound", [(gaussian, 6e-3), (decaying, 0.12)])
@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_in_float16_it_is_nearer_to_float64_than_the_standard_form_in_bfloat16(preset, draw, bound):
    X = draw()
    exact = orthogonalise(X, preset, dtype=torch.float64)
    off = error(orthogonalise(X, preset, dtype=torch.float16, form="gram"), exact)
    assert off < min(bound, error(orthogonalise(X, preset, dtype=torch.bfloat16), exact))


def test_without_making_x_again_the_gram_form_loses_its_way():
    X = decaying()
    exact = orthogonalise(X, "polar_express5", dtype=torch.float64)
    normal = (X / (1.02 * torch.linalg.matrix_norm(X, keepdim=True))).half()
    steps = polynomials("polar_express5", None)
    assert error(gram_steps(normal, steps), exact) < 0.12
    assert error(_in_one_stretch(normal, steps), exact) > 0.5


def _in_one_stretch(X, steps):
    R = Q = None
    R = X @ X.mT
    for a, b, c in steps:
        Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
        Q = (a * torch.eye(len(R[0])) + Z).half() if Q is None else torch.baddbmm(Q, Z, Q, beta=a)
        T = torch.baddbmm(R, Z, R, beta=a)
        R = torch.baddbmm(T, Z, T, beta=a)
    return Q @ X


def test_x_is_made_again_after_every_second_step_but_not_for_a_single_last_one():
    assert [len(s) for s in stretches(polynomials("kj5", 5))] == [2, 3]
    assert [len(s) for s in stretches(polynomials("exact12", 12))] == [2] * 6
    assert [[len(s) for s in stretches(polynomials("kj5", n))] for n in (1, 2, 3, 4)] == [[1], [2], [3], [2, 2]]


@pytest.mark.parametrize("alpha", [2, 4])
def test_operations_are_those_of_the_published_count(alpha):
    """(4T + 6α - 6) n³ with one restart, 38 for T = 5, α = 4 where the standard form with symmetric products takes 65."""
    n = 64
    assert gram_flops(n, alpha * n, polynomials("kj5", 5)) == (4 * 5 + 6 * alpha - 6) * n ** 3
    assert newton_schulz_flops(alpha * n, n, "kj5", form="gram") == (4 * 5 + 6 * alpha - 6) * n ** 3
    assert newton_schulz_flops(n, n, "kj5", form="gram") == newton_schulz_flops(n, n, "kj5")


def test_it_is_for_matrices_twice_as_long_as_wide():
    assert worth_it(10, 20) and worth_it(20, 10) and not worth_it(10, 19) and not worth_it(10, 10)


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_it_is_refused_in_bfloat16_and_is_float16_on_a_gpu(rule):
    with pytest.raises(ValueError, match="ns_form: gram diverges in bfloat16"):
        rule(ns_form="gram", ns_dtype="bfloat16")
    assert iteration_dtype("auto", torch.device("cuda"), "gram") == torch.float16
    assert iteration_dtype("auto", torch.device("cpu"), "gram") == torch.float32


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_rules_step_the_same_in_either_form(rule):
    steps = {}
    for form in ("standard", "gram"):
        made, W = rule(ns_form=form, ns_dtype="float32"), torch.zeros(2, 48, 192)
        h = {key: torch.tensor(getattr(made, key), dtype=torch.float64) for key in made.VARYING}
        made.update(W, gaussian().float(), made.init(W), h)
        steps[form] = W
    assert 0 < error(steps["gram"], steps["standard"].double()) < 1e-5
