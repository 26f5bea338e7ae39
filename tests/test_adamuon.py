import pytest
import torch
from pydantic import ValidationError

from optim.adamuon import AdaMuon
from tests import oracles
from tests.draws import gradients, hyper, run, weights
from tests.test_muon import SPELLING

SHAPES = [(24, 16), (16, 24), (16, 16)]


def oracle_run(W, grads, weight_decay, lr=.01, momentum=.95, **switches):
    W, M, V = W.double(), torch.zeros_like(W, dtype=torch.float64), torch.zeros_like(W, dtype=torch.float64)
    for t, G in enumerate(grads):
        W, M, V = oracles.adamuon(W, G.double(), M, V, lr * (1 + t % 3), momentum - .01 * (t % 5), weight_decay,
                                  **switches)
    return W, M, V


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("switches", [dict(), dict(form="sgd"), dict(nesterov=False), dict(preset="exact12"),
                                      dict(eps=.1), dict(form="sgd", nesterov=False, preset="cubic5")], ids=str)
def test_adamuon_equals_its_equations_in_float64(switches, shape):
    W, grads = weights((3, *shape)), gradients((3, *shape))
    rule = AdaMuon(weight_decay=.5, ns_dtype="float32", **{SPELLING.get(k, k): v for k, v in switches.items()})
    expected = [oracle_run(W[i], [G[i] for G in grads], .5, **switches) for i in range(3)]
    state = run(rule, W, grads)
    for i, (W_i, M_i, V_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-6 * W_i.norm()
        assert (state["momentum"][i] - M_i).norm() < 1e-6 * M_i.norm()
        assert (state["v"][i] - V_i).norm() < 1e-6 * V_i.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamuon_equals_pytorch_optimizers_given_the_signs_that_it_leaves_out(monkeypatch, shape):
    """4.1.0 orthogonalises the momentum itself, as version 1 of the paper, in bfloat16 and without Nesterov. Its bias
    correction cancels. Both orthogonalise in float64 here, and theirs is handed the signs."""
    module = pytest.importorskip("pytorch_optimizer.optimizer.muon.adamuon")
    paths = {}
    for signs in (True, False):
        monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", lambda M, num_steps, weights:
                            oracles.newton_schulz(M.sign() if signs else M, "kj5").float())
        rule = AdaMuon(nesterov=False, weight_decay=.1, eps=1e-10, ns_dtype="float32")
        W, grads = weights((1, *shape)), gradients((1, *shape))
        p = torch.nn.Parameter(W[0].clone())
        reference = module.AdaMuon([dict(params=[p], use_muon=True)], lr=.02, betas=(.95, .95), weight_decay=.1,
                                   foreach=False)
        state = rule.init(W)
        for t, G in enumerate(grads, 1):
            rule.update(W, G, state, hyper(lr=.02, momentum=.95, weight_decay=.1, t=t))
            p.grad = G[0].clone()
            reference.step()
        paths[signs] = (W[0] - p).norm() / p.norm()
    assert paths[True] < 2e-6 and paths[False] > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products_keep_to_the_equations(shape):
    W, exact, grads = torch.zeros(3, *shape), torch.zeros(3, *shape), gradients((3, *shape))
    run(AdaMuon(ns_dtype="bfloat16"), W, grads)
    run(AdaMuon(ns_dtype="float32"), exact, grads)
    assert 0 < (W - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_step_has_rms_a_fifth_whatever_the_gradient(magnitude):
    u, v = gradients((3, 24, 1))[0], gradients((3, 1, 16))[1]
    for G in (gradients()[0], u @ v):                    # rank-one too
        rule, W = AdaMuon(), torch.zeros(3, 24, 16)
        rule.update(W, G * magnitude, rule.init(W), hyper(lr=1, momentum=.95, weight_decay=0, t=1))
        rms = W.square().mean((-2, -1)).sqrt()
        assert torch.allclose(rms, torch.tensor(rule.step_rms(24, 16))) and rule.step_rms(24, 16) == .2


@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_tiny_and_huge_gradients_make_the_usual_steps(magnitude):
    steps = []
    for factor in (1, magnitude):
        W = torch.zeros(3, 24, 16)
        run(AdaMuon(ns_dtype="float32"), W, [G * factor for G in gradients(count=5)])
        steps.append(W)
    assert (steps[1] - steps[0]).norm() < 1e-5 * steps[0].norm()


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    rule, W = AdaMuon(ns_dtype="float32"), weights()
    state = rule.init(W)
    rule.update(W, torch.zeros_like(W), state, hyper(lr=.1, momentum=.9, weight_decay=.5, t=1))
    assert torch.allclose(W, weights() * .95, rtol=1e-6) and not any(t.any() for t in state.values())
    G = gradients()[0]
    G[0] = 0
    rule.update(W, G, state, hyper(lr=.1, momentum=.9, weight_decay=0, t=2))
    assert W.isfinite().all() and torch.allclose(W[0], weights()[0] * .95, rtol=1e-6)
    before, momentum = W.clone(), state["momentum"].clone()
    rule.update(W, torch.zeros_like(W), state, hyper(lr=.1, momentum=.9, weight_decay=0, t=3))
    assert torch.allclose(state["momentum"], .9 * momentum) and (W - before)[1:].norm() > .1


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (AdaMuon(lr=1., weight_decay=2., momentum=.3), AdaMuon(lr=4., weight_decay=5., momentum=.6)):
        W = weights()
        state = rule.init(W)
        for G in gradients(count=2):
            rule.update(W, G, state, hyper(lr=.1, weight_decay=.2, momentum=.9, t=1))
        results.append(W)
    assert torch.equal(*results)


def test_matrices_of_a_stack_do_not_touch_each_other():
    W, alone, grads = weights(), weights()[1:2], gradients(count=3)
    run(AdaMuon(ns_dtype="float32"), W, grads)
    run(AdaMuon(ns_dtype="float32"), alone, [G[1:2] for G in grads])
    assert torch.allclose(W[1], alone[0], atol=1e-6)


def test_steps_do_not_depend_on_weights_that_do_not_decay():
    steps = []
    for W in (weights(), torch.zeros(3, 24, 16)):
        before = W.clone()
        run(AdaMuon(ns_dtype="float32"), W, gradients(count=2))
        steps.append(W - before)
    assert torch.allclose(*steps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_left_alone_and_bfloat16_weights_are_rounded_once(dtype):
    W, G = weights(dtype=dtype), gradients()[0].to(dtype)
    before, exact = G.clone(), weights(dtype=dtype).double()
    state = run(AdaMuon(ns_dtype="float32", weight_decay=20.), W, [G])
    expected = torch.stack([oracle_run(w, [g], 20.)[0] for w, g in zip(exact, G)])
    assert torch.equal(G, before) and W.dtype == dtype
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert G.data_ptr() not in {t.data_ptr() for t in (W, *state.values())}
    assert dtype == torch.float32 or (W == expected.bfloat16()).float().mean() > .99


def test_state_numbers_are_what_init_makes():
    state = AdaMuon().init(torch.zeros(2, 24, 16, device="meta"))
    assert sum(t.numel() for t in state.values()) == 2 * AdaMuon().state_numbers(24, 16) == 2 * 768


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(eps=0.), dict(betas=(.9, .9)), dict(momentum=1.), dict(cautious=True), dict(variant="kj")):
        with pytest.raises(ValidationError):
            AdaMuon(**wrong)


def test_a_compiled_update_equals_an_eager_one():
    """As one graph, without code: torch 2.13's generator for CPUs stumbles over it (KeyError: 'buf21' in
    codegen/cpp.py try_outer_loop_fusion_with_local_buf), as it does over Muon behind a clipped gradient."""
    rule = AdaMuon(ns_dtype="float32")
    W, compiled_W = weights(), weights()
    state, compiled_state = rule.init(W), rule.init(W)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True, backend="aot_eager")
    for t, G in enumerate(gradients(count=2), 1):
        h = hyper(lr=.02 * t, momentum=.9, weight_decay=.1, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-5, atol=1e-7) for k in state)
