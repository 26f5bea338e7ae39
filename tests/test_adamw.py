import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.adamw import AdamW
from tests import oracles
from tests.draws import hyper

SHAPE = (5, 40)


def gradients(count, dtype=torch.float32, shape=SHAPE):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) * 10 ** (-i % 3) for i in range(count)]


def weights(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(rule, w, grads, lrs):
    state = rule.init(w)
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        rule.update(w, g, state, hyper(lr=lr, weight_decay=rule.weight_decay, t=t))
    return state


def test_adamw_equals_its_equations_in_float64():
    rule, lrs = AdamW(betas=(.8, .95), eps=1e-10, weight_decay=.1), [.01 * (1 + t % 4) for t in range(20)]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):          # measured 1e-7
        w, grads = weights(dtype), gradients(20, dtype)
        expected, m, v = w.double(), 0, 0
        for t, (g, lr) in enumerate(zip(grads, lrs), 1):
            expected, m, v = oracles.adamw(expected, g.double(), m, v, t, lr, rule.betas, rule.eps, .1)
        state = run(rule, w, grads, lrs)
        assert (w - expected).norm() < tolerance * expected.norm()
        assert (state["m"] - m).norm() < tolerance * m.norm()
        assert (state["v"] - v).norm() < tolerance * v.norm()


def test_adamw_equals_torch_adamw():
    rule, grads = AdamW(lr=.01, weight_decay=.1), gradients(20)
    w, p = weights(), torch.nn.Parameter(weights())
    reference = torch.optim.AdamW([p], lr=.01, betas=rule.betas, eps=rule.eps, weight_decay=.1, foreach=False)
    run(rule, w, grads, [.01] * 20)
    for g in grads:
        p.grad = g.clone()
        reference.step()
    assert (w - p).abs().max() < 1e-6 * p.abs().max()


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (AdamW(lr=1., weight_decay=2.), AdamW(lr=3., weight_decay=4.)):
        w = weights()
        rule.update(w, gradients(1)[0], rule.init(w), hyper(lr=.1, weight_decay=.2, t=1))
        results.append(w)
    assert torch.equal(*results)


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w, (g,) = weights(dtype), gradients(1, dtype)
        before = g.clone()
        state = run(AdamW(), w, [g], [.01])
        assert torch.equal(g, before)
        assert g.data_ptr() not in {t.data_ptr() for t in (w, *state.values())}


def test_bfloat16_weights_have_float32_moments():
    w = weights(torch.bfloat16)
    exact = w.double()
    state = run(AdamW(weight_decay=.1), w, gradients(1), [.1])
    expected = oracles.adamw(exact, gradients(1)[0].double(), 0, 0, 1, .1, (.9, .95), 1e-8, .1)[0]
    assert {t.dtype for t in state.values()} == {torch.float32} and w.dtype == torch.bfloat16
    assert torch.equal(w, expected.bfloat16())                                        # rounded once


@pytest.mark.parametrize("magnitude", [1e20, 1e37])
def test_a_huge_gradient_makes_a_step_of_the_usual_size_and_does_not_freeze_the_weights(magnitude):
    rule, w = AdamW(), weights()
    state = run(rule, w, [gradients(1)[0].sign() * magnitude] * 3, [.01] * 3)
    assert torch.allclose((w - weights()).abs(), torch.tensor(.03), rtol=1e-4)
    assert all(t.isfinite().all() for t in state.values())


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    rule, w = AdamW(weight_decay=.1), weights()
    state = run(rule, w, [torch.zeros(SHAPE)], [.5])
    assert torch.allclose(w, weights() * .95, rtol=1e-6) and not state["m"].any()
    rule.update(w, gradients(1)[0], state, hyper(lr=.1, weight_decay=0, t=2))
    before = w.clone()
    rule.update(w, torch.zeros(SHAPE), state, hyper(lr=.1, weight_decay=0, t=3))
    assert (w != before).all()


def test_the_stated_numbers_of_state_are_what_init_makes():
    state = AdamW().init(torch.empty(SHAPE, device="meta"))
    assert sum(t.numel() for t in state.values()) == AdamW().state_numbers(*SHAPE)


def test_without_decay_a_step_does_not_depend_on_the_weight_and_with_it_by_the_shrinkage():
    for weight_decay in (0., .5):
        w, zeros, h = weights(torch.float64), torch.zeros(SHAPE).double(), hyper(lr=.1, weight_decay=weight_decay, t=1)
        for x in (w, zeros):
            AdamW().update(x, gradients(1, torch.float64)[0], AdamW().init(x), h)
        assert torch.allclose(w - zeros, (1 - AdamW().shrinkage(h, *SHAPE)) * weights(torch.float64), rtol=1e-12)


def test_a_steady_gradient_makes_steps_of_the_stated_size():
    w = torch.zeros(SHAPE)
    run(AdamW(), w, [gradients(1)[0]] * 3, [.01] * 3)
    assert w.square().mean().sqrt().item() == pytest.approx(3 * .01 * AdamW().step_rms(*SHAPE), rel=1e-4)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(beta=.9), dict(betas=(.9, 1.0)), dict(lr=-1.0), dict(eps=0.0)):
        with pytest.raises(ValidationError):
            AdamW(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_a_compiled_update_equals_an_eager_one():
    rule = AdamW(weight_decay=.1)
    w, compiled_w = weights(), weights()
    state, compiled_state = rule.init(w), rule.init(w)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, g in enumerate(gradients(2), 1):
        h = hyper(lr=.01 * t, weight_decay=.1, t=t)
        rule.update(w, g, state, h)
        compiled(compiled_w, g, compiled_state, h)
    assert torch.allclose(compiled_w, w, rtol=1e-6, atol=1e-7)
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-6) for k in state)
