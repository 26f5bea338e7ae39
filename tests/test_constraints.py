"""Cautious decay and hyperball: options that any rule takes."""
import pytest
import torch

from optim import RULES
from optim.constraints import constrained_update
from tests import oracles

SHAPE = (2, 12, 8)


def draw(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def hyper(rule, **values):
    given = {key: getattr(rule, key) for key in rule.VARYING} | dict(t=1) | values
    return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in given.items()}


def test_cautious_muon_equals_its_equations_in_float64():
    rule = RULES["muon"](weight_decay=.5, ns_dtype="float32")
    W = draw(0) / 4
    expected, M = [w.double() for w in W], [torch.zeros(12, 8).double()] * 2
    state = rule.init(W)
    for t in range(20):
        G = draw(100 + t)
        constrained_update(rule, True, False, W, G, state, hyper(rule, lr=.01 * (1 + t % 3)))
        for i in range(2):
            expected[i], M[i] = oracles.muon(expected[i], G[i].double(), M[i], .01 * (1 + t % 3), .95, .5, cautious=True)
    for W_i, want in zip(W, expected):
        assert (W_i - want).norm() < 1e-6 * want.norm()


def test_cautious_decay_spares_weights_that_the_step_grows():
    rule = RULES["adamw"](lr=.1, weight_decay=1.)
    W, G = draw(0), draw(1)
    plain, start = W.clone(), W.clone()
    rule.update(plain, G, rule.init(W), hyper(rule, weight_decay=0))
    constrained_update(rule, True, False, W, G, rule.init(W), hyper(rule))
    grows = (plain - start) * start > 0
    assert 0 < grows.sum() < grows.numel()
    assert torch.allclose(W[grows], plain[grows], atol=1e-6)
    assert torch.allclose(W[~grows], (plain - .1 * start)[~grows], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "soap", "normuon"])
def test_hyperball_keeps_every_norm_and_steps_by_lr_times_it(name):
    rule = RULES[name](weight_decay=0) if hasattr(RULES[name](), "weight_decay") else RULES[name]()
    W = draw(0)
    norms, state = torch.linalg.matrix_norm(W), rule.init(W)
    for t in range(1, 5):
        before = W.clone()
        constrained_update(rule, False, True, W, draw(t), state, hyper(rule, lr=.05, t=t))
        moved = torch.linalg.matrix_norm(W - before) / norms
    assert torch.allclose(torch.linalg.matrix_norm(W), norms, rtol=1e-5)
    assert ((moved > .04) & (moved < .06)).all()               # .05 before it is brought back to the sphere


def test_hyperball_equals_its_equation():
    rule, W, G = RULES["spectral"](weight_decay=0, ns_coefficients="kj5", ns_dtype="float32"), draw(0), draw(1)
    start = W.double()
    constrained_update(rule, False, True, W, G, {}, hyper(rule, lr=.2))
    for before, after, g in zip(start, W, G):
        u, R = -oracles.newton_schulz(g, "kj5"), before.norm()
        moved = before + .2 * R * u / u.norm()
        assert (after - R * moved / moved.norm()).norm() < 1e-6 * R


def test_a_zero_gradient_and_a_zero_learning_rate_leave_the_sphere_alone():
    rule, W = RULES["muon"](), draw(0)
    before = W.clone()
    constrained_update(rule, False, True, W, torch.zeros(SHAPE), rule.init(W), hyper(rule, lr=.1))
    constrained_update(rule, False, True, W, draw(1), rule.init(W), hyper(rule, lr=0))
    assert torch.allclose(W, before, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e20])
def test_hyperball_steps_are_as_long_whatever_the_gradient_s_size(magnitude):
    """SGD's step is proportional to the gradient, so that only hyperball itself can see to it."""
    rule, W = RULES["sgd"](), draw(0)
    before = W.clone()
    constrained_update(rule, False, True, W, draw(1) * magnitude, rule.init(W), hyper(rule, lr=.1))
    moved = torch.linalg.matrix_norm(W - before) / torch.linalg.matrix_norm(before)
    assert ((moved > .09) & (moved < .11)).all()


def test_bfloat16_weights_are_rounded_once():
    rule = RULES["adamw"](lr=.01, weight_decay=1.)
    W, exact, G = draw(0).bfloat16(), draw(0).bfloat16().float(), draw(1)
    constrained_update(rule, True, False, W, G, rule.init(W), hyper(rule))
    constrained_update(rule, True, False, exact, G, rule.init(exact), hyper(rule))
    assert torch.equal(W, exact.bfloat16())
