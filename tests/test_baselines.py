"""Adam, Lion and SGD; AdamW has a file of its own."""
import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.adam import Adam
from optim.adamw import AdamW
from optim.lion import Lion
from optim.sgd import SGD
from tests import oracles_lmo
from tests.draws import hyper
from tests.test_adamw import SHAPE, gradients, weights

RULES = [Adam(), Adam(weight_decay=.1), Lion(), Lion(weight_decay=.1), SGD(), SGD(weight_decay=.1, nesterov=True),
         SGD(momentum=0.)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule).replace(" ", ""))


def moving(rule, t):
    """Hyperparameters of update t, as schedules move them."""
    return hyper(lr=.01 * (1 + t % 4), weight_decay=rule.weight_decay * (1 + t % 2), t=t,
                 momentum=max(0, getattr(rule, "momentum", 0) - .01 * (t % 5)))


def run(rule, w, grads, h=moving):
    state = rule.init(w)
    for t, g in enumerate(grads, 1):
        rule.update(w, g, state, h(rule, t))
    return state


def oracle_run(rule, w, grads):
    w, m, v = w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()
    for t, g in enumerate(grads, 1):
        h = {key: value.item() for key, value in moving(rule, t).items()}
        g, lr, weight_decay = g.double(), h["lr"], h["weight_decay"]
        if isinstance(rule, Adam):
            w, m, v = oracles_lmo.adam(w, g, m, v, t, lr, rule.betas, rule.eps, weight_decay)
        elif isinstance(rule, Lion):
            w, m = oracles_lmo.lion(w, g, m, lr, rule.betas, weight_decay)
        else:
            w, m = oracles_lmo.sgd(w, g, m, lr, h["momentum"], weight_decay, rule.nesterov)
    return w, m


@every_rule
def test_baselines_equal_their_equations_in_float64(rule):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):          # measured 2e-7
        w, grads = weights(dtype), gradients(20, dtype)
        expected, m = oracle_run(rule, w, grads)
        state = run(rule, w, grads)
        assert (w - expected).norm() < tolerance * expected.norm()
        for momentum in (state[key] for key in ("m", "momentum") if key in state):
            assert (momentum - m).norm() < tolerance * m.norm()


TORCHS = [(Adam(weight_decay=.1), torch.optim.Adam, dict(weight_decay=.1)),
          (Adam(betas=(.8, .95), eps=1e-10), torch.optim.Adam, dict(betas=(.8, .95), eps=1e-10)),
          (SGD(weight_decay=.1), torch.optim.SGD, dict(momentum=.9, weight_decay=.1)),
          (SGD(nesterov=True), torch.optim.SGD, dict(momentum=.9, nesterov=True)),
          (SGD(momentum=0., weight_decay=.1), torch.optim.SGD, dict(weight_decay=.1))]


@pytest.mark.parametrize("rule, theirs, options", TORCHS, ids=str)
def test_adam_and_sgd_equal_torchs(rule, theirs, options):
    w, p, grads = weights(), torch.nn.Parameter(weights()), gradients(20)
    reference = theirs([p], lr=.01, foreach=False, **options)
    run(rule, w, grads, lambda rule, t: hyper(lr=.01, weight_decay=rule.weight_decay, t=t, momentum=.9))
    for g in grads:
        p.grad = g.clone()
        reference.step()
    assert (w - p).abs().max() < 1e-6 * p.abs().max()


@pytest.mark.parametrize("weight_decay", [0., .1])
def test_lion_equals_pytorch_optimizer(weight_decay):
    """Which decays the weight before the step instead of after it: the same sum."""
    theirs = pytest.importorskip("pytorch_optimizer").Lion
    w, p, grads = weights(), torch.nn.Parameter(weights()), gradients(20)
    reference = theirs([p], lr=.01, betas=(.9, .99), weight_decay=weight_decay, foreach=False)
    run(Lion(), w, grads, lambda rule, t: hyper(lr=.01, weight_decay=weight_decay, t=t))
    for g in grads:
        p.grad = g.clone()
        reference.step()
    assert (w - p).abs().max() < 1e-6 * p.abs().max()


def test_without_decay_adam_is_adamw_and_with_it_is_not():
    for weight_decay in (0., .1):
        w, decoupled = weights(), weights()
        for rule, weight in ((Adam(betas=(.9, .95)), w), (AdamW(betas=(.9, .95)), decoupled)):
            run(rule, weight, gradients(20), lambda _, t: hyper(lr=.01, weight_decay=weight_decay, t=t))
        assert torch.equal(w, decoupled) == (weight_decay == 0)


def test_lions_momentum_looks_further_than_its_step():
    """At β₁ = β₂ it would be the sign of an average; at β₁ = 0 the sign of the gradient alone."""
    w, grads = torch.zeros(SHAPE), gradients(3)
    state = run(Lion(betas=(0., .99)), w, grads, lambda rule, t: hyper(lr=.01, weight_decay=0, t=t))
    assert torch.allclose(w, -.01 * sum(g.sign() for g in grads))
    m = torch.zeros(SHAPE)
    for g in grads:
        m = .99 * m + .01 * g
    assert torch.allclose(state["momentum"], m, rtol=1e-5)


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    pairs = [(Adam(lr=1., weight_decay=2.), Adam(lr=3., weight_decay=4.)),
             (Lion(lr=1., weight_decay=2.), Lion(lr=3., weight_decay=4.)),
             (SGD(lr=1., weight_decay=2., momentum=.3), SGD(lr=3., weight_decay=4., momentum=.6))]
    for rules in pairs:
        results = []
        for rule in rules:
            w = weights()
            run(rule, w, gradients(2), lambda rule, t: hyper(lr=.1, weight_decay=.2, momentum=.5, t=t))
            results.append(w)
        assert torch.equal(*results)


@every_rule
def test_without_decay_a_step_does_not_depend_on_the_weight(rule):
    w, zeros, g = weights(torch.float64), torch.zeros(SHAPE).double(), gradients(1, torch.float64)[0]
    for x in (w, zeros):
        rule.update(x, g, rule.init(x), hyper(lr=.1, weight_decay=0, momentum=.9, t=1))
    assert torch.allclose(w - zeros, weights(torch.float64), rtol=1e-13) and not rule.confines


@every_rule
def test_coupled_decay_is_declared_where_the_gradient_carries_it(rule):
    """What momentum sees tells the two apart."""
    w, h = weights(), hyper(lr=.1, weight_decay=.5, momentum=.9, t=1)
    state = rule.init(w)
    if state:
        rule.update(w, torch.zeros(SHAPE), state, h)
        assert any(t.any() for t in state.values()) == rule.coupled_decay
    assert rule.coupled_decay == isinstance(rule, (Adam, SGD))


def test_shrinkage_is_what_the_decay_takes_in_one_update():
    h, zero = hyper(lr=.1, weight_decay=.5, momentum=.9, t=1), torch.zeros(SHAPE).double()
    for rule in (Lion(), SGD(), SGD(momentum=0.)):
        w = weights(torch.float64)
        rule.update(w, zero, rule.init(w), h)
        assert torch.allclose(w, weights(torch.float64) * (1 - rule.shrinkage(h, *SHAPE)), rtol=1e-13)
    assert Adam().shrinkage(h, *SHAPE) == 0


@every_rule
def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it(rule):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w, (g,) = weights(dtype), gradients(1, dtype)
        before = g.clone()
        state = run(rule, w, [g])
        assert torch.equal(g, before) and w.dtype == dtype
        assert g.data_ptr() not in {t.data_ptr() for t in (w, *state.values())}
        assert {t.dtype for t in state.values()} <= {torch.promote_types(dtype, torch.float32)}


@every_rule
def test_bfloat16_weights_are_rounded_once(rule):
    w, grads = weights(torch.bfloat16), gradients(1)
    expected = oracle_run(rule, w, grads)[0]
    run(rule, w, grads)
    assert (w == expected.bfloat16()).float().mean() > .99


@every_rule
def test_the_stated_numbers_of_state_are_what_init_makes(rule):
    state = rule.init(torch.empty(200, device="meta"))
    assert sum(t.numel() for t in state.values()) == rule.state_numbers(*SHAPE)
    assert all(len(t) == 200 for t in state.values())


@every_rule
def test_cutting_a_group_changes_nothing(rule):
    assert rule.elementwise
    whole, grads = weights().flatten(), [g.flatten() for g in gradients(5)]
    pieces = [whole[:77].clone(), whole[77:].clone()]
    run(rule, whole, grads)
    run(rule, pieces[0], [g[:77] for g in grads]), run(rule, pieces[1], [g[77:] for g in grads])
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-6)       # vectorised and left-over entries may round apart


@pytest.mark.parametrize("rule", [Adam(eps=1e-30), Lion()], ids=str)
@pytest.mark.parametrize("magnitude", [1e-15, 1e20, 1e37])
def test_tiny_and_huge_gradients_make_steps_of_the_usual_size(rule, magnitude):
    w = weights()
    state = run(rule, w, [gradients(1)[0].sign() * magnitude] * 3, lambda rule, t: hyper(lr=.01, weight_decay=0, t=t))
    assert torch.allclose((w - weights()).abs(), torch.tensor(.03), rtol=1e-4)
    assert rule.step_rms(*SHAPE) == 1 and all(t.isfinite().all() for t in state.values())


def test_lion_steps_by_lr_at_any_magnitude_and_adam_by_less_below_its_eps():
    h = hyper(lr=.01, weight_decay=0, t=1)
    for rule, most, least in ((Lion(), .01001, .00999), (Adam(), 1e-13, 0)):
        w = torch.zeros(SHAPE)
        rule.update(w, gradients(1)[0].sign() * 1e-20, rule.init(w), h)
        assert (w.abs() <= most).all() and (w.abs() >= least).all()


@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_step_of_sgd_is_proportional_to_the_gradient(magnitude):
    w, zeros, grads = torch.zeros(SHAPE), torch.zeros(SHAPE), gradients(5)
    run(SGD(), w, [g * magnitude for g in grads]), run(SGD(), zeros, grads)
    assert torch.allclose(w / magnitude, zeros, rtol=1e-5, atol=1e-6)


@every_rule
def test_a_zero_gradient_lets_momentum_and_decay_go_on(rule):
    w, zero = weights(), torch.zeros(SHAPE)
    state = run(rule, w, [zero], lambda rule, t: hyper(lr=.5, weight_decay=rule.weight_decay, momentum=.9, t=t))
    assert w.isfinite().all() and torch.equal(w, weights()) == (rule.weight_decay == 0)
    if state:
        rule.update(w, gradients(1)[0], state, hyper(lr=.1, weight_decay=0, momentum=.9, t=2))
        before = w.clone()
        rule.update(w, zero, state, hyper(lr=.1, weight_decay=0, momentum=.9, t=3))
        assert (w != before).all()


def test_impossible_hyperparameters_are_refused():
    for rule, wrong in ((Adam, dict(betas=(.9, 1.0))), (Adam, dict(eps=0.)), (Adam, dict(momentum=.9)),
                        (Lion, dict(betas=(1., .9))), (Lion, dict(eps=1e-8)), (Lion, dict(lr=-1.)),
                        (SGD, dict(momentum=1.)), (SGD, dict(nesterov=True, momentum=0.)), (SGD, dict(dampening=.1))):
        with pytest.raises(ValidationError):
            rule(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("rule", [RULES[1], RULES[3], RULES[5]], ids=str)
def test_a_compiled_update_equals_an_eager_one(rule):
    w, compiled_w = weights(), weights()
    state, compiled_state = rule.init(w), rule.init(w)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, g in enumerate(gradients(2), 1):
        h = moving(rule, t)
        rule.update(w, g, state, h)
        compiled(compiled_w, g, compiled_state, h)
    assert torch.allclose(compiled_w, w, rtol=1e-6, atol=1e-7)
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-5, atol=1e-7) for k in state)
