import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.muon import Muon
from optim.spectral import SpectralDescent
from tests import oracles
from tests.draws import gradients, hyper, weights
from tests.test_muon import SPELLING

SHAPES = [(24, 16), (16, 24), (16, 16)]


def run(rule, W, grads, lr=.01):
    for t, G in enumerate(grads):
        rule.update(W, G, {}, hyper(lr=lr * (1 + t % 3), weight_decay=rule.weight_decay, t=t + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("switches", [dict(), dict(preset="kj5", scale="unclamped"),
                                      dict(preset="polar_express5", scale="rms"), dict(scale="rms1")], ids=str)
def test_spectral_descent_equals_its_equations_in_float64(switches, shape):
    W, grads = weights((3, *shape)), gradients((3, *shape))
    settings = {SPELLING.get(k, k): v for k, v in switches.items()}
    rule = SpectralDescent(weight_decay=.5, ns_dtype="float32", **settings)
    expected = W.double()
    for i in range(3):
        for t, G in enumerate(grads):
            lr = .01 * (1 + t % 3)
            expected[i] = oracles.spectral_descent(expected[i].clone(), G[i].double(), lr, .5, **switches)
    run(rule, W, grads)
    assert (W - expected).norm() < 1e-6 * expected.norm()                             # measured 4e-7 at most


def test_spectral_descent_is_muon_without_momentum():
    """modded-nanogpt's track 3, result #22; and with the polar factor of facebookresearch/optimizers' SVD."""
    W, other, G = weights(), weights(), gradients()[0]
    rule = SpectralDescent(ns_dtype="float32")
    run(rule, W, [G], lr=.03)
    muon = Muon(variant="track3", momentum=0., ns_dtype="float32")
    muon.update(other, G, muon.init(other), hyper(lr=.03, momentum=0, weight_decay=.015, t=1))
    exact = weights() * (1 - .03 * .015) - .03 * 1.5 ** .5 * torch.stack([oracles.polar(g) for g in G])
    assert torch.allclose(W, other, atol=1e-7) and torch.allclose(W.double(), exact.double(), atol=1e-6)


def test_there_is_no_state():
    assert SpectralDescent().init(weights()) == {} and SpectralDescent().state_numbers(24, 16) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products_keep_to_the_equations(shape):
    W, exact, grads = torch.zeros(3, *shape), torch.zeros(3, *shape), gradients((3, *shape))
    run(SpectralDescent(ns_dtype="bfloat16"), W, grads)
    run(SpectralDescent(ns_dtype="float32"), exact, grads)
    assert 0 < (W - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("scale", ["spectral", "rms", "none"])
@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_step_rms_is_that_of_a_step_whatever_the_gradients_size(magnitude, scale):
    rule = SpectralDescent(scale=scale, ns_dtype="float32")
    for shape in ((2, 32, 8), (2, 8, 32)):
        W = torch.zeros(shape)
        rule.update(W, gradients(shape)[0] * magnitude, {}, hyper(lr=1, weight_decay=0, t=1))
        assert W.square().mean().sqrt() == pytest.approx(rule.step_rms(*shape[1:]), rel=1e-3)


@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_rank_one_gradient_makes_a_step_of_the_usual_size(magnitude):
    u, v = gradients((3, 24, 1))[0], gradients((3, 1, 16))[1]
    W = torch.zeros(3, 24, 16)
    SpectralDescent(scale="none").update(W, u @ v * magnitude, {}, hyper(lr=1, weight_decay=0, t=1))
    assert all(.8 < norm < 1.2 for norm in torch.linalg.matrix_norm(W, 2))


def test_a_zero_gradient_lets_decay_go_on():
    W = weights()
    SpectralDescent().update(W, torch.zeros_like(W), {}, hyper(lr=.1, weight_decay=.5, t=1))
    assert torch.allclose(W, weights() * .95, rtol=1e-6)


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (SpectralDescent(lr=1., weight_decay=2.), SpectralDescent(lr=4., weight_decay=5.)):
        W = weights()
        rule.update(W, gradients()[0], {}, hyper(lr=.1, weight_decay=.2, t=1))
        results.append(W)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_left_alone_and_bfloat16_weights_are_rounded_once(dtype):
    W, G = weights(dtype=dtype), gradients()[0].to(dtype)
    before = G.clone()
    expected = torch.stack([oracles.spectral_descent(w.double(), g.double(), .01, 40.) for w, g in zip(W, G)])
    run(SpectralDescent(ns_dtype="float32", weight_decay=40.), W, [G])
    assert torch.equal(G, before) and W.dtype == dtype and (W - expected).norm() < 1e-2 * expected.norm()
    assert dtype == torch.float32 or (W == expected.bfloat16()).float().mean() > .99


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(momentum=.9), dict(lr=-1.), dict(scale="rms2"), dict(ns_steps=0)):
        with pytest.raises(ValidationError):
            SpectralDescent(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_a_compiled_update_equals_an_eager_one():
    rule, W, compiled_W = SpectralDescent(ns_dtype="float32"), weights(), weights()
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(count=2), 1):
        h = hyper(lr=.02 * t, weight_decay=.1, t=t)
        rule.update(W, G, {}, h)
        compiled(compiled_W, G, {}, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
