from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optim.orthogonalise import COEFFICIENTS, Preset, iteration_dtype, newton_schulz_flops, orthogonalise
from tests import oracles

SHAPES = [(24, 24), (48, 16), (16, 48), (7, 1), (1, 7)]
# Where singular values of 0.01 to 1 end, as the comments of the table say.
BANDS = {"kj5": (.68, 1.14), "you5": (.97, 1.04), "polar_express5": (.85, 1.15), "exact12": (.9999, 1.0001),
         "cubic5": (.77, 1.31)}


def stack(*shape, n=3, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(X, reference):
    return ((X.double() - reference).norm() / reference.norm()).item()


def test_every_preset_that_a_configuration_may_name_is_in_the_table():
    assert set(get_args(Preset)) == set(COEFFICIENTS) == set(oracles.POLYNOMIALS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_newton_schulz_applies_the_published_polynomials_to_the_singular_values(preset, shape):
    X = stack(*shape)
    expected = torch.stack([oracles.newton_schulz(G, preset) for G in X])
    assert relative_error(orthogonalise(X, preset, dtype=torch.float64), expected) < 1e-12
    # Measured: 4e-6 at most for matrices (polar_express5, the steepest at zero, magnifies rounding most) and
    # 1.7e-5 for a single row or column (cubic5, whose first step takes 1 to 0.02 by cancellation).
    assert relative_error(orthogonalise(X.float(), preset, dtype=torch.float32), expected) < 3e-5


@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_singular_values_end_in_the_documented_band(preset):
    S = torch.logspace(-2, 0, 60, dtype=torch.float64)
    Q = torch.linalg.qr(stack(60, 60, n=1)[0])[0]
    X = Q * S @ Q.T
    ends = (Q.T @ orthogonalise(X[None], preset, dtype=torch.float64)[0] @ Q).diagonal()[S / S.norm() > .01]
    low, high = BANDS[preset]
    assert len(ends) > 30 and low < ends.min() and ends.max() < high


def test_twelve_exact_steps_reach_the_polar_factor():
    X = stack(24, 16)
    polar = torch.stack([oracles.polar(G) for G in X])
    assert relative_error(orthogonalise(X.float(), "exact12"), polar) < 2e-6          # measured 2e-7


def test_further_steps_repeat_the_last_polynomial_and_fewer_drop_it():
    X = stack(8, 8)
    for preset, (listed, safety) in COEFFICIENTS.items():
        steps = X / (safety * X.flatten(1).norm(dim=1)[:, None, None])
        for count in range(1, len(listed) + 3):
            a, b, c = listed[min(count, len(listed)) - 1]
            A = steps @ steps.mT
            steps = a * steps + b * A @ steps + c * A @ A @ steps
            assert relative_error(orthogonalise(X, preset, count, torch.float64), steps) < 1e-12


@pytest.mark.parametrize("magnitude", [1e-42, 1e-37, 1e-20, 1e-8, 1e20, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_the_magnitude(magnitude, dtype):
    X = stack(16, 24).float()
    usual = orthogonalise(X, "kj5", dtype=dtype).double()
    scaled = orthogonalise(X * magnitude, "kj5", dtype=dtype).double()
    tolerance = 2e-2 if dtype == torch.bfloat16 or magnitude == 1e-42 else 1e-4  # 1e-42 has 3 digits left
    assert relative_error(scaled, usual) < tolerance


@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_a_rank_one_matrix_comes_out_at_the_usual_size(preset, magnitude):
    X = stack(32, 1).float() @ stack(16, 1, seed=1).float().mT * magnitude
    expected = oracles.newton_schulz(X[0].double() / magnitude, preset)
    assert relative_error(orthogonalise(X, preset)[0], expected) < 1e-2              # measured 2e-4
    # In bfloat16 rounding makes X full rank, and all presets magnify what is small: only the size is certain.
    low_precision = orthogonalise(X, preset, dtype=torch.bfloat16)[0].float()
    assert .4 < torch.linalg.matrix_norm(low_precision, 2) < 1.4


def test_a_zero_matrix_stays_zero_among_others():
    X = stack(8, 8).float()
    X[1] = 0
    O = orthogonalise(X)
    assert not O[1].any() and O[0].any() and O[2].any()


def test_the_input_is_neither_changed_nor_returned():
    for dtype in (torch.float32, torch.bfloat16):
        X = stack(8, 12).to(dtype)
        before, O = X.clone(), orthogonalise(X, dtype=dtype)
        O.zero_()
        assert torch.equal(X, before)


def test_matrices_of_a_stack_do_not_touch_each_other():
    X = stack(16, 12).float()
    one_by_one = torch.cat([orthogonalise(x[None]) for x in X])
    assert relative_error(orthogonalise(X), one_by_one.double()) < 1e-5


@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_tall_matrices_cost_no_more_than_wide_ones_and_as_much_as_is_said(preset):
    flops = []
    for shape in ((64, 16), (16, 64)):
        for steps in (None, 3, 14):
            with FlopCounterMode(display=False) as counter:
                orthogonalise(stack(*shape).float(), preset, steps)
            flops.append(counter.get_total_flops())
            assert flops[-1] == 3 * newton_schulz_flops(*shape, preset, steps)        # 3 matrices
    assert flops[:3] == flops[3:]
    square = 0 if preset == "cubic5" else 2 * 16 ** 3
    assert flops[1] == 3 * 3 * (4 * 64 * 16 ** 2 + square)                            # 3 steps


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_is_fast_in_it(monkeypatch, fast, dtype):
    monkeypatch.setattr("optim.orthogonalise.CPU_FAST_IN_BF16", fast)
    assert iteration_dtype("auto", torch.device("cuda", 0)) is torch.bfloat16
    assert iteration_dtype("auto", torch.device("cpu")) is dtype
    assert iteration_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert iteration_dtype("float32", torch.device("cuda")) is torch.float32
