import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.geometry import GEOMETRIES, norm
from optim.gluon import Gluon
from optim.muon import Muon
from optim.scion import Scion
from tests import oracles_lmo
from tests.draws import COUNT, gradients, hyper, weights


def shape_for(geometry, matrix=(24, 16)):
    return (3, 24, 1) if geometry == "bias_rms" else (3, *matrix)


def run(rule, W, grads, lr=.02, beta=.9, **more):
    """Updates with a radius and a momentum that both move, as schedules move them."""
    state = rule.init(W)
    for t, G in enumerate(grads):
        moving = dict(lr=lr * (1 + t % 3), momentum=beta - .01 * (t % 5) if beta else 0)
        rule.update(W, G, state, hyper(**moving, **more, t=t + 1))
    return state


def oracle_run(W, grads, geometry, lr=.02, beta=.9, **settings):
    W, M = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for t, G in enumerate(grads):
        W, M = oracles_lmo.gluon(W, G.double(), M, lr * (1 + t % 3), beta - .01 * (t % 5), geometry, **settings)
    return W, M


every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


@every_geometry
@pytest.mark.parametrize("smooth", [None, (0., 70.), (5., 2.)], ids=str)
@pytest.mark.parametrize("matrix", [(24, 16), (16, 24)], ids=str)
def test_gluon_equals_its_equations_in_float64(geometry, smooth, matrix):
    shape = shape_for(geometry, matrix)
    W, grads = weights(shape), gradients(shape)
    expected = [oracle_run(W[i], [G[i] for G in grads], geometry, smooth=smooth) for i in range(3)]
    adaptive = dict(adaptive=True, l0=smooth[0], l1=smooth[1]) if smooth else {}
    state = run(Gluon(geometry=geometry, ns_dtype="float32", **adaptive), W, grads)
    for i, (W_i, M_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-6 * W_i.norm()                                # measured 4e-7 at most
        assert (state["momentum"][i] - M_i).norm() < 1e-6 * M_i.norm()


def test_in_bfloat16_gluon_stays_close_to_its_equations():
    W, grads = weights(), gradients()
    start = W[0].clone()
    expected = oracle_run(W[0], [G[0] for G in grads], "spectral", smooth=(5., 2.))[0]
    run(Gluon(adaptive=True, l0=5., l1=2., ns_dtype="bfloat16"), W, grads)
    assert (W[0] - expected).norm() < 2e-2 * (expected - start).norm()


@pytest.mark.parametrize("geometry, scale", [("spectral", "unclamped"), ("spectral_clamped", "spectral")])
@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 16, 24)], ids=str)
def test_muon_without_nesterov_is_a_special_case(geometry, scale, shape):
    W, muon_W, grads = weights(shape), weights(shape), gradients(shape)
    run(Gluon(geometry=geometry, ns_dtype="float32"), W, grads)
    run(Muon(nesterov=False, scale=scale, ns_dtype="float32"), muon_W, grads, weight_decay=0)
    assert (W - muon_W).norm() < 2e-7 * W.norm() and (W - weights(shape)).norm() > .1 * W.norm()


@every_geometry
def test_unconstrained_scion_is_a_special_case(geometry):
    shape = shape_for(geometry)
    W, scion_W, grads = weights(shape), weights(shape), gradients(shape)
    gluon, scion = Gluon(geometry=geometry, ns_dtype="float32"), Scion(geometry=geometry, ns_dtype="float32")
    state, scion_state = gluon.init(W), scion.init(scion_W)
    for t, G in enumerate(grads):
        gluon.update(W, G, state, hyper(lr=50 * 3.6e-4, momentum=.9, t=t + 1))
        scion.update(scion_W, G, scion_state, hyper(lr=3.6e-4, momentum=.1, t=t + 1))
    assert (W - scion_W).norm() < 2e-7 * W.norm() and (W - weights(shape)).norm() > .01


def test_normalised_sgd_and_sign_sgd_are_special_cases():
    directions = {"frobenius": lambda M: M / torch.linalg.matrix_norm(M, keepdim=True), "max": torch.sign}
    for geometry, direction in directions.items():
        W, expected, M = weights(dtype=torch.float64), weights(dtype=torch.float64), 0
        grads = gradients(dtype=torch.float64)
        for t, G in enumerate(grads):
            M = (.9 - .01 * (t % 5)) * M + (.1 + .01 * (t % 5)) * G
            expected = expected - .02 * (1 + t % 3) * direction(M)
        run(Gluon(geometry=geometry), W, grads)
        assert (W - expected).norm() < 1e-15 * expected.norm() * COUNT


@every_geometry
def test_lr_is_the_radius_of_a_step(geometry):
    rule, shape = Gluon(geometry=geometry, ns_coefficients="exact12", ns_dtype="float32"), shape_for(geometry)
    W = torch.zeros(shape)
    rule.update(W, gradients(shape)[0], rule.init(W), hyper(lr=.3, momentum=.9, t=1))
    assert norm(W, geometry).tolist() == pytest.approx([.3] * 3, rel=1e-3)
    assert W.square().mean().sqrt().item() == pytest.approx(.3 * rule.step_rms(*shape[1:]), rel=1e-3)


@every_geometry
def test_the_adaptive_radius_is_the_one_that_smoothness_allows(geometry):
    shape = shape_for(geometry)
    rule = Gluon(geometry=geometry, adaptive=True, l0=5., l1=2., ns_coefficients="exact12", ns_dtype="float32")
    W, G = torch.zeros(shape), gradients(shape)[0]
    G *= torch.tensor([1e-2, 1, 1e4])[:, None, None]
    rule.update(W, G, rule.init(W), hyper(lr=1, momentum=0, t=1))
    dual = torch.stack([oracles_lmo.dual_norm(G_i.double(), geometry) for G_i in G])
    assert torch.allclose(norm(W, geometry).double(), dual / (5 + 2 * dual), rtol=1e-4)
    large = torch.zeros(shape)
    rule.update(large, G * 1e10, rule.init(large), hyper(lr=1, momentum=0, t=1))
    assert large[2].square().mean().sqrt().item() == pytest.approx(rule.step_rms(*shape[1:]), rel=1e-3)


def test_the_papers_constants_give_a_radius_near_that_of_scions_example():
    for geometry, l1, example in (("spectral", 70., 3.6e-4 * 50), ("sign", 1.3, 3.6e-4 * 3000)):
        W = torch.zeros(1, 48, 32)
        rule = Gluon(geometry=geometry, adaptive=True, l1=l1, ns_coefficients="exact12", ns_dtype="float32")
        rule.update(W, gradients(W.shape)[0], rule.init(W), hyper(lr=1, momentum=0, t=1))
        assert norm(W, geometry).item() == pytest.approx(1 / l1, rel=1e-4)
        assert .7 < norm(W, geometry).item() / example < 1


def test_the_theorems_schedule_moves_radius_and_momentum():
    W, grads = weights(), gradients()
    expected, M = W[0].double(), torch.zeros(24, 16).double()
    for t, G in enumerate(grads, 1):                     # t = k + 1 for k = 0, 1, ...
        expected, M = oracles_lmo.gluon(expected, G[0].double(), M, .02 * t ** -.75, 1 - t ** -.5, "spectral")
    rule = Gluon(momentum=0., schedule_theory=True, ns_dtype="float32")
    state = rule.init(W)
    for t, G in enumerate(grads, 1):
        rule.update(W, G, state, hyper(lr=.02, momentum=.3, t=t))
    assert (W[0] - expected).norm() < 1e-6 * expected.norm()
    assert (state["momentum"][0] - M).norm() < 1e-6 * M.norm()


def test_without_momentum_there_is_no_state():
    W, grads, rule = weights(), gradients(), Gluon(momentum=0., ns_dtype="float32")
    expected = W[0].double()
    for t, G in enumerate(grads):
        expected = oracles_lmo.gluon(expected, G[0].double(), 0, .02 * (1 + t % 3), 0, "spectral")[0]
    assert run(rule, W, grads, beta=0) == {} and rule.state_numbers(24, 16) == 0
    assert (W[0] - expected).norm() < 1e-6 * expected.norm()


@every_geometry
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_stated_numbers_of_state_are_what_init_makes(geometry, adaptive):
    for more in ({}, dict(momentum=0.), dict(momentum=0., schedule_theory=True)):
        rule, shape = Gluon(geometry=geometry, adaptive=adaptive, **more), shape_for(geometry)
        state = rule.init(torch.empty(shape, device="meta"))
        assert sum(t[0].numel() for t in state.values()) == rule.state_numbers(*shape[1:])


def test_an_adaptive_radius_needs_whole_layers():
    assert Gluon(geometry="max").elementwise and not Gluon(geometry="max", adaptive=True).elementwise
    assert not any(Gluon(geometry=name).elementwise for name in GEOMETRIES if name != "max")
    assert {name for name in GEOMETRIES if Gluon(geometry=name).takes_vectors} == {"max", "bias_rms", "frobenius"}
    with pytest.raises(ValueError, match="bias_rms is a norm of vectors, not of 24×16"):
        Gluon(geometry="bias_rms").init(weights())


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (Gluon(lr=1., momentum=.3), Gluon(lr=4., momentum=.6)):
        W = weights()
        run(rule, W, gradients(count=2))
        results.append(W)
    assert torch.equal(*results)


@every_geometry
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_does_not_depend_on_the_weight(geometry, adaptive):
    rule, shape = Gluon(geometry=geometry, adaptive=adaptive, l0=1.), shape_for(geometry)
    W, zeros, G = weights(shape), torch.zeros(shape), gradients(shape)[0]
    for X in (W, zeros):
        rule.update(X, G, rule.init(X), hyper(lr=.25, momentum=.9, t=1))
    assert torch.allclose(W - zeros, weights(shape), atol=1e-6) and not rule.confines


@every_geometry
@pytest.mark.parametrize("adaptive", [False, True])
def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it(geometry, adaptive):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for beta in (.9, 0.):
            shape = shape_for(geometry)
            W, G = weights(shape, dtype), gradients(shape)[0].to(dtype)
            before = G.clone()
            state = run(Gluon(geometry=geometry, momentum=beta, adaptive=adaptive), W, [G], beta=beta)
            assert torch.equal(G, before) and W.dtype == dtype
            assert G.data_ptr() not in {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} <= {torch.promote_types(dtype, torch.float32)}


def test_bfloat16_weights_are_rounded_once():
    W, G = weights(dtype=torch.bfloat16), gradients()[0]
    expected = torch.stack([oracle_run(W_i, [G_i], "spectral", lr=.3)[0] for W_i, G_i in zip(W, G)])
    run(Gluon(ns_dtype="float32"), W, [G], lr=.3)
    assert (W == expected.bfloat16()).float().mean() > .99


@every_geometry
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
def test_tiny_and_huge_gradients_make_steps_of_the_usual_size(geometry, adaptive, magnitude):
    steps, shape = [], shape_for(geometry)
    for factor in (1, magnitude):
        W = torch.zeros(shape)
        state = run(Gluon(geometry=geometry, adaptive=adaptive, ns_dtype="float32"), W,
                    [G * factor for G in gradients(shape, 3)])
        steps.append(W)
        assert all(t.isfinite().all() for t in state.values())
    assert (steps[1] - steps[0]).norm() < 1e-5 * steps[0].norm()


@every_geometry
@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_rank_one_gradient_makes_a_step_of_the_usual_size(geometry, magnitude):
    shape = shape_for(geometry)
    u, v = gradients((3, shape[1], 1))[0], gradients((3, 1, shape[2]))[1]
    W = torch.zeros(shape)
    run(Gluon(geometry=geometry), W, [u @ v * magnitude], lr=1)
    assert all(.6 < size < 1.3 for size in norm(W, geometry))


@every_geometry
@pytest.mark.parametrize("smooth", [{}, dict(adaptive=True), dict(adaptive=True, l0=5., l1=0.)], ids=str)
def test_a_zero_gradient_lets_momentum_go_on(geometry, smooth):
    rule, shape = Gluon(geometry=geometry, ns_dtype="float32", **smooth), shape_for(geometry)
    W, zero = weights(shape), torch.zeros(shape)
    state = rule.init(W)
    rule.update(W, zero, state, hyper(lr=.1, momentum=.9, t=1))
    assert torch.equal(W, weights(shape)) and not state["momentum"].any()
    rule.update(W, gradients(shape)[0], state, hyper(lr=1, momentum=.9, t=2))
    before, momentum = W.clone(), state["momentum"].clone()
    rule.update(W, zero, state, hyper(lr=1, momentum=.9, t=3))
    assert torch.allclose(state["momentum"], .9 * momentum) and (W - before).norm() > 1e-3


def test_read_when_names_only_keys_that_exist():
    fields = Gluon.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in Gluon.READ_WHEN.items() for on in when)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(momentum=1.), dict(geometry="nuclear"), dict(l0=-1.), dict(eps=-1.), dict(weight_decay=.1),
                  dict(adaptive=True, l0=0., l1=0.), dict(ns_steps=0), dict(radius=1.)):
        with pytest.raises(ValidationError):
            Gluon(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("options", [dict(adaptive=True, l0=5.), dict(geometry="max", schedule_theory=True)], ids=str)
def test_a_compiled_update_equals_an_eager_one(options):
    rule = Gluon(ns_dtype="float32", **options)
    W, compiled_W = weights(), weights()
    state, compiled_state = rule.init(W), rule.init(W)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(count=2), 1):
        h = hyper(lr=.02 * t, momentum=.9, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert torch.allclose(compiled_state["momentum"], state["momentum"], rtol=1e-5, atol=1e-7)
