import math

import pytest
import torch

from optim.geometry import GEOMETRIES, direction
from optim.smoothness import dual_norm, fit, smoothness
from tests import oracles_lmo


def stack(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_smoothness_of_a_quadratic_is_its_constant(geometry):
    """f(X) = c/2 ⟨A, X⟩² has the constant c‖A‖*² in any norm, and shows it along the lmo of A."""
    A, X = stack((3, 12, 1 if geometry == "bias_rms" else 8)), stack((3, 12, 1 if geometry == "bias_rms" else 8), 1)
    c = torch.tensor([.5, 1, 200]).double()

    def gradient(X):
        return c[:, None, None] * (A * X).sum((-2, -1), keepdim=True) * A
    constants = c * torch.stack([oracles_lmo.dual_norm(A_i, geometry) for A_i in A]) ** 2
    for length in (1e-3, .1, 10):
        moved = -length * direction(A, geometry)
        found = smoothness(gradient(X), gradient(X + moved), moved, geometry)
        assert torch.allclose(found, constants, rtol=1e-3)                            # Newton-Schulz in float32
    elsewhere = stack(A.shape, 2)
    assert (smoothness(gradient(X), gradient(X + elsewhere), elsewhere, geometry) < constants).all()


def test_l0_and_l1_are_recovered_in_one_dimension():
    """f'' = L⁰ + L¹ f' with f'(0) = 0 has f'(x) = (L⁰/L¹)(exp(L¹x) - 1)."""
    for l0, l1 in ((3., .5), (.1, 40.), (0., 7.)):
        def gradient(x):
            return torch.full((1, 1, 1), l0 / l1 * math.expm1(l1 * x) if l0 else math.exp(l1 * x), dtype=torch.float64)
        ratios, norms, move = [], [], 1e-6 / l1
        for x in torch.linspace(0, 2 / l1, 9).tolist():
            g1, g2 = gradient(x), gradient(x + move)
            ratios.append(smoothness(g1, g2, torch.full_like(g1, move), "frobenius").item())
            norms.append(dual_norm(g1, "frobenius").item())
        assert fit(ratios, norms) == pytest.approx((l0, l1), rel=1e-4, abs=1e-5)


def test_the_fit_is_the_best_of_all_that_are_not_negative():
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(torch.linspace(0, 4, 81), torch.linspace(0, 4, 81)).double()
    edges = set()
    for _ in range(60):
        norms = torch.rand(6, generator=generator).double() * 3
        ratios = torch.randn(6, generator=generator).double() + 1
        l0, l1 = fit(ratios, norms)
        edges.add((l0 == 0, l1 == 0))
        assert l0 >= 0 and l1 >= 0

        def error(a, b):
            return (a + b * norms - ratios).square().sum().item()
        assert error(l0, l1) <= min(error(a, b) for a, b in grid) + 1e-12
    assert {(False, False), (True, False), (False, True)} <= edges                    # every case has occurred


def test_pairs_that_say_nothing_do_not_count():
    nan, inf = float("nan"), float("inf")
    assert fit([3, nan, 5, 7, inf], [1, 1, 2, inf, 4]) == pytest.approx((1, 2))
    for ratios, norms in (([], []), ([3], [1]), ([3, 4, nan], [1, 1, 2]), ([3, 4, 5], [.1, .1, .1])):
        assert all(math.isnan(value) for value in fit(ratios, norms))
    same = stack((1, 4, 4))
    assert not smoothness(same, same + 1, torch.zeros(1, 4, 4), "spectral").isfinite().any()


def test_bfloat16_gradients_are_subtracted_in_float32():
    g1 = stack((1, 6, 4)).bfloat16()
    g2 = g1.float() * (1 + 2 ** -12)
    moved = stack((1, 6, 4), 1, torch.float32)
    expected = oracles_lmo.dual_norm((g2 - g1.float())[0].double(), "sign") / oracles_lmo.norm(moved[0], "sign")
    assert smoothness(g1, g2, moved, "sign").item() == pytest.approx(expected.item(), rel=1e-4)
