import shutil
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from optim.geometry import DIVIDED, GEOMETRIES, ORTHOGONALISED, norm
from optim.scion import Scion
from tests import oracles_lmo
from tests.draws import gradients, hyper, weights


def shape_for(geometry, matrix=(24, 16)):
    return (3, 24, 1) if geometry == "bias_rms" else (3, *matrix)


def run(rule, W, grads, lr=.01):
    """Updates with a learning rate and a momentum that both move, as schedules move them."""
    state = rule.init(W)
    for t, G in enumerate(grads):
        alpha = rule.momentum - .01 * (t % 5) if rule.momentum < 1 else 1
        rule.update(W, G, state, hyper(lr=lr * (1 + t % 3), momentum=alpha, t=t + 1))
    return state


def oracle_run(W, grads, alpha, lr=.01, **settings):
    W, D = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for t, G in enumerate(grads):
        W, D = oracles_lmo.scion(W, G.double(), D, lr * (1 + t % 3), alpha - .01 * (t % 5) if alpha < 1 else 1,
                                 **settings)
    return W, D


every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


@every_geometry
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("matrix", [(24, 16), (16, 24)], ids=str)
def test_scion_equals_its_equations_in_float64(geometry, constrained, matrix):
    shape = shape_for(geometry, matrix)
    W, grads = weights(shape), gradients(shape)
    settings = dict(geometry=geometry, constrained=constrained, radius=3.)
    expected = [oracle_run(W[i], [G[i] for G in grads], .2, **settings) for i in range(3)]
    state = run(Scion(momentum=.2, ns_dtype="float32", **settings), W, grads)
    for i, (W_i, D_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-6 * W_i.norm()                                # measured 3e-7 at most
        assert (state["momentum"][i] - D_i).norm() < 1e-6 * D_i.norm()


@pytest.mark.parametrize("preset", ["you5", "polar_express5", "exact12"])
def test_scion_takes_every_orthogonalisation(preset):
    W, grads = weights(), gradients()
    expected = oracle_run(W[0], [G[0] for G in grads], .2, geometry="spectral", radius=3., preset=preset)[0]
    run(Scion(momentum=.2, radius=3., ns_coefficients=preset, ns_dtype="float32"), W, grads)
    assert (W[0] - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("constrained", [False, True])
def test_in_bfloat16_scion_stays_close_to_its_equations(constrained):
    W, grads = weights(), gradients()
    start, settings = W[0].clone(), dict(geometry="spectral", radius=3., constrained=constrained)
    expected = oracle_run(W[0], [G[0] for G in grads], .2, **settings)[0]
    run(Scion(momentum=.2, ns_dtype="bfloat16", **settings), W, grads)
    assert (W[0] - expected).norm() < 2e-2 * (expected - start).norm()                # measured 6e-3


PORT = {"spectral": (2, {}), "spectral_clamped": (2, {"max_scale": True}), "sign": (4, {}),
        "max": (4, {"normalize": False}), "colnorm": (6, {}), "rownorm": (7, {}), "bias_rms": (5, {})}


@pytest.mark.parametrize("geometry", PORT)
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("iteration", [torch.float32, torch.bfloat16])
def test_scion_equals_pytorch_optimizer(geometry, constrained, iteration, monkeypatch):
    """In every geometry that the port has, once Newton-Schulz runs in the same dtype."""
    port = pytest.importorskip("pytorch_optimizer.optimizer.scion")
    newton_schulz = port.zero_power_via_newton_schulz_5
    monkeypatch.setattr(port, "zero_power_via_newton_schulz_5", partial(newton_schulz, dtype=iteration))
    shape = shape_for(geometry, (16, 24))
    W, grads = weights(shape), gradients(shape)
    start = W[0].clone()
    flat = (24,) if geometry == "bias_rms" else shape[1:]
    p = torch.nn.Parameter(W[0].clone().view(flat))
    kind, options = PORT[geometry]
    theirs = port.SCION([p], lr=.01, momentum=.1, constraint=constrained, norm_type=kind, norm_kwargs=options,
                        scale=3., foreach=False)
    rule = Scion(momentum=.1, radius=3., geometry=geometry, constrained=constrained, eps=1e-8,
                 ns_dtype=str(iteration).removeprefix("torch."))
    state = rule.init(W)
    for t, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=.01, momentum=.1, t=t + 1))
        p.grad = G[0].clone().view(flat)
        theirs.step()
    difference, p = (W[0] - p.detach().view(shape[1:])).norm(), p.detach().view(shape[1:])
    if geometry in ORTHOGONALISED and iteration == torch.bfloat16:
        assert difference < 2e-2 * (p - start).norm()                                 # measured 6e-3
    else:
        assert difference < 1e-6 * p.norm()                                           # measured 5e-7


@every_geometry
def test_constrained_weights_come_into_the_ball_and_stay_there(geometry):
    shape = shape_for(geometry)
    rule = Scion(geometry=geometry, constrained=True, radius=2., ns_coefficients="exact12", ns_dtype="float32")
    free = Scion(geometry=geometry, radius=2., ns_coefficients="exact12", ns_dtype="float32")
    W, free_W, G = weights(shape) * 100, torch.zeros(shape), gradients(shape)[0]
    state, free_state = rule.init(W), free.init(W)
    assert (norm(W, geometry) > 4).all()
    for t in range(150):
        h = hyper(lr=.1, momentum=.1, t=t + 1)
        rule.update(W, G, state, h), free.update(free_W, G, free_state, h)
    assert torch.allclose(norm(W, geometry), torch.full((3,), 2.), rtol=2e-2)
    assert torch.allclose(norm(free_W, geometry), torch.full((3,), 30.), rtol=2e-2)   # 150 steps of a tenth radius


@every_geometry
def test_initial_weights_lie_on_the_ball(geometry):
    rows, cols = shape_for(geometry)[1:]
    W = Scion(geometry=geometry, radius=7.).initial_weights(rows, cols, torch.Generator().manual_seed(0))
    assert W.shape == (rows, cols)
    assert norm(W[None], geometry).item() == pytest.approx(0 if geometry == "bias_rms" else 7, rel=1e-5)
    assert Scion(geometry=geometry, init_on_ball=False).initial_weights(rows, cols, torch.Generator()) is None


@pytest.mark.parametrize("geometry", ["spectral", "max"])
def test_without_momentum_there_is_no_state(geometry):
    W, grads, rule = weights(), gradients(), Scion(geometry=geometry, momentum=1., radius=3., ns_dtype="float32")
    expected = oracle_run(W[0], [G[0] for G in grads], 1, geometry=geometry, radius=3.)[0]
    assert run(rule, W, grads) == {} and rule.state_numbers(24, 16) == 0
    assert (W[0] - expected).norm() < 1e-6 * expected.norm()


@every_geometry
def test_the_stated_numbers_of_state_are_what_init_makes(geometry):
    rule, shape = Scion(geometry=geometry), shape_for(geometry)
    state = rule.init(torch.empty(shape, device="meta"))
    assert sum(t[0].numel() for t in state.values()) == rule.state_numbers(*shape[1:])
    assert all(len(t) == 3 for t in state.values())


def test_only_max_is_elementwise_and_only_norms_of_vectors_take_vectors():
    kinds = {name: (Scion(geometry=name).elementwise, Scion(geometry=name).takes_vectors) for name in GEOMETRIES}
    assert {name for name, (elementwise, _) in kinds.items() if elementwise} == {"max"}
    assert {name for name, (_, vectors) in kinds.items() if vectors} == {"bias_rms", "frobenius"}
    with pytest.raises(ValueError, match="bias_rms is a norm of vectors, not of 24×16"):
        Scion(geometry="bias_rms").init(weights())


def test_cutting_an_elementwise_group_changes_nothing():
    rule, whole, grads = Scion(geometry="max"), weights((40,)), gradients((40,))
    pieces = [whole[:13].clone(), whole[13:].clone()]
    run(rule, whole, grads)
    run(rule, pieces[0], [g[:13] for g in grads]), run(rule, pieces[1], [g[13:] for g in grads])
    assert torch.equal(torch.cat(pieces), whole)


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (Scion(lr=1., momentum=.3), Scion(lr=4., momentum=.6)):
        W = weights()
        state = rule.init(W)
        for G in gradients(count=2):
            rule.update(W, G, state, hyper(lr=.1, momentum=.9, t=1))
        results.append(W)
    assert torch.equal(*results)


@every_geometry
def test_the_examples_steps(geometry):
    """The reference's nanoGPT example: η ρ = .018 for hidden matrices and 1.08 for the head, in their norms."""
    rule, shape = Scion(geometry=geometry, ns_coefficients="exact12", ns_dtype="float32"), shape_for(geometry)
    W = torch.zeros(shape)
    rule.update(W, gradients(shape)[0], rule.init(W), hyper(lr=rule.lr, momentum=.1, t=1))
    assert norm(W, geometry).tolist() == pytest.approx([.018] * 3, rel=1e-3)
    rms = rule.lr * rule.step_rms(*shape[1:])
    assert W.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-3)
    head = Scion(geometry="sign", radius=3000.)
    assert head.lr * head.lr_multiplier(50304, 768) == pytest.approx(1.08 / 768)


@every_geometry
@pytest.mark.parametrize("constrained", [False, True])
def test_a_step_depends_on_the_weight_by_the_shrinkage_alone(geometry, constrained):
    rule, shape = Scion(geometry=geometry, constrained=constrained, radius=3.), shape_for(geometry)
    W, zeros, G, h = weights(shape), torch.zeros(shape), gradients(shape)[0], hyper(lr=.25, momentum=.1, t=1)
    rule.update(W, G, rule.init(W), h), rule.update(zeros, G, rule.init(zeros), h)
    taken = rule.shrinkage(h, *shape[1:])
    assert torch.allclose(W - zeros, (1 - taken) * weights(shape), atol=1e-6) and rule.confines == constrained
    assert taken == (.25 if constrained else 0)


@every_geometry
def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it(geometry):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for momentum in (.1, 1.):
            shape = shape_for(geometry)
            W, G = weights(shape, dtype), gradients(shape)[0].to(dtype)
            before = G.clone()
            state = run(Scion(geometry=geometry, momentum=momentum), W, [G])
            assert torch.equal(G, before) and W.dtype == dtype
            assert G.data_ptr() not in {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} <= {torch.promote_types(dtype, torch.float32)}


def test_bfloat16_weights_are_rounded_once():
    W, G = weights(dtype=torch.bfloat16), gradients()[0]
    settings = dict(geometry="spectral", radius=3., constrained=True)
    expected = torch.stack([oracle_run(W_i, [G_i], .1, lr=.3, **settings)[0] for W_i, G_i in zip(W, G)])
    run(Scion(ns_dtype="float32", **settings), W, [G], lr=.3)
    assert (W == expected.bfloat16()).float().mean() > .99


@every_geometry
@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_tiny_and_huge_gradients_make_steps_of_the_usual_size(geometry, magnitude):
    steps, shape = [], shape_for(geometry)
    for factor in (1, magnitude):
        W = torch.zeros(shape)
        state = run(Scion(geometry=geometry, ns_dtype="float32"), W, [G * factor for G in gradients(shape, 3)])
        steps.append(W)
        assert all(t.isfinite().all() for t in state.values())
    assert (steps[1] - steps[0]).norm() < 1e-5 * steps[0].norm()


@every_geometry
@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_rank_one_gradient_makes_a_step_of_the_usual_size(geometry, magnitude):
    shape = shape_for(geometry)
    u, v = gradients((3, shape[1], 1))[0], gradients((3, 1, shape[2]))[1]
    W = torch.zeros(shape)
    run(Scion(geometry=geometry, radius=1.), W, [u @ v * magnitude], lr=1)
    assert all(.6 < size < 1.3 for size in norm(W, geometry))


@every_geometry
@pytest.mark.parametrize("constrained", [False, True])
def test_a_zero_gradient_lets_momentum_and_shrinking_go_on(geometry, constrained):
    rule, shape = Scion(geometry=geometry, constrained=constrained, ns_dtype="float32"), shape_for(geometry)
    W, zero = weights(shape), torch.zeros(shape)
    state = rule.init(W)
    rule.update(W, zero, state, hyper(lr=.1, momentum=.1, t=1))
    assert torch.allclose(W, weights(shape) * (.9 if constrained else 1), rtol=1e-6) and not state["momentum"].any()
    rule.update(W, gradients(shape)[0], state, hyper(lr=.1, momentum=.1, t=2))
    before, momentum = W.clone(), state["momentum"].clone()
    rule.update(W, zero, state, hyper(lr=.1, momentum=.1, t=3))
    assert torch.allclose(state["momentum"], .9 * momentum) and (W - before).norm() > .1


def test_one_matrix_of_a_stack_does_not_feel_the_others():
    for geometry in ("spectral", "colnorm", "sign"):
        rule, W, grads = Scion(geometry=geometry, ns_dtype="float32"), weights(), gradients()
        alone = W[1:2].clone()
        run(rule, W, [G * torch.tensor([1e10, 1, 0])[:, None, None] for G in grads])
        run(rule, alone, [G[1:2] for G in grads])
        assert torch.allclose(W[1:2], alone, rtol=1e-5, atol=1e-5)


def test_eps_lets_a_token_that_batches_lack_come_to_rest():
    moved = []
    for eps in (0., 1e-8):
        rule, W, G = Scion(geometry="colnorm", radius=1., eps=eps), torch.zeros(1, 8, 4), gradients((1, 8, 4))[0]
        G[..., 2] *= 1e-6                                # a rare token's gradient, in a mean over many
        state = run(rule, W, [G], lr=1e-2)
        G[..., 2], before = 0, W.clone()
        for t in range(2, 200):
            rule.update(W, G, state, hyper(lr=1e-2, momentum=.1, t=t))
        moved.append((W - before)[0, :, 2].norm())
    assert moved[0] > 5 * moved[1] > 0


def test_read_when_names_only_keys_that_exist_and_geometries_that_read_them():
    fields = Scion.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in Scion.READ_WHEN.items() for on in when)
    for key, other in (("eps", 1.), ("ns_coefficients", "exact12"), ("ns_steps", 2)):
        for geometry in GEOMETRIES:
            shape, results = shape_for(geometry), []
            for options in ({}, {key: other}):
                W = torch.zeros(shape)
                run(Scion(geometry=geometry, ns_dtype="float32", **options), W, gradients(shape, 1))
                results.append(W)
            assert torch.equal(*results) == (geometry not in Scion.READ_WHEN[key]["geometry"]), (key, geometry)
    assert set(DIVIDED).isdisjoint(ORTHOGONALISED)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(momentum=0.), dict(momentum=1.1), dict(radius=0.), dict(geometry="nuclear"), dict(eps=-1.),
                  dict(weight_decay=.1), dict(ns_steps=0), dict(lr=-1.)):
        with pytest.raises(ValidationError):
            Scion(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("geometry", ["spectral", "colnorm", "max"])
def test_a_compiled_update_equals_an_eager_one(geometry):
    rule, shape = Scion(geometry=geometry, constrained=True, ns_dtype="float32"), shape_for(geometry)
    W, compiled_W = weights(shape), weights(shape)
    state, compiled_state = rule.init(W), rule.init(W)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(shape, 2), 1):
        h = hyper(lr=.02 * t, momentum=.1 * t, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert torch.allclose(compiled_state["momentum"], state["momentum"], rtol=1e-5, atol=1e-7)
