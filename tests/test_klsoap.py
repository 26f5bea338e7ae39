import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.bases import FAILURES
from optim.klsoap import KLSOAP
from tests.oracles_bases import failing_eigh, gradients, hyper, klsoap, orthonormal, run, weights


def oracle_run(W, grads, lr=.01, **options):
    W, s = W.double(), {}
    for t, G in enumerate(grads, 1):
        W = klsoap(W, G.double(), s, t, lr * (1 + (t - 1) % 3), **options)
    return W, s


@pytest.mark.parametrize("ours, equations", [
    (dict(), dict()), (dict(precondition_frequency=3), dict(every=3)),
    (dict(betas=(.9, .8), shampoo_beta=.7, eps=1e-3, weight_decay=.5),
     dict(betas=(.9, .8), beta=.7, eps=1e-3, weight_decay=.5))], ids=lambda s: "-".join(map(str, s)) or "defaults")
def test_klsoap_equals_its_equations_in_float64(ours, equations):
    # Square: a full-rank gradient fixes both bases.
    W, grads = weights((2, 12, 12)), gradients((2, 12, 12), 24)
    start = W.clone()
    expected = [oracle_run(W[i], [G[i] for G in grads], **equations) for i in range(2)]
    state = run(KLSOAP(stagger=False, **ours), W, grads)
    for i, (W_i, s) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-9 * (W_i - start[i]).norm()
        for name, key in (("left", "L"), ("right", "R"), ("values_left", "l_L"), ("values_right", "l_R"), ("v", "V")):
            assert (state[name][i] - s[key]).norm() < 1e-9 * s[key].norm()


@pytest.mark.parametrize("max_dim", [20, 12])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_with_a_first_basis_given_it_equals_them_on_other_shapes_and_with_one_basis(shape, max_dim, monkeypatch):
    given = {d: orthonormal(1, d, d)[0] for d in shape}
    sides = [side for side, d in zip(("left", "right"), shape) if d <= max_dim]
    W, grads = weights((2, *shape)), gradients((2, *shape), 24)
    expected = [oracle_run(W[i], [G[i] for G in grads], every=4, first_bases=lambda S: given[len(S)],
                           left="left" in sides, right="right" in sides)[0] for i in range(2)]
    monkeypatch.setattr("optim.klsoap.eigenbases", lambda S, Q: given[S.shape[-1]].flip(-1).expand_as(S))
    state = run(KLSOAP(precondition_frequency=4, max_precond_dim=max_dim, stagger=False), W, grads)
    assert [key for key in ("left", "right") if key in state] == sides
    assert (W - torch.stack(expected)).norm() < 1e-9 * W.norm()


def test_with_given_bases_float32_equals_float64():
    W, grads = weights((1, 12, 20), torch.float32), gradients((1, 12, 20), 20, torch.float32)
    rule, given = KLSOAP(weight_decay=.3, stagger=False), (orthonormal(1, 12, 5), orthonormal(1, 20, 6))
    bases = iter(Q[0] for Q in given)
    expected, s = oracle_run(W[0], [G[0] for G in grads], weight_decay=.3, every=100, first_bases=lambda S: next(bases))
    state = rule.init(W)
    for t, G in enumerate(grads, 1):
        rule.update(W, G, state, hyper(lr=.01 * (1 + (t - 1) % 3), weight_decay=.3, t=t))
        if t == 1:
            state["q_left"].copy_(given[0]), state["q_right"].copy_(given[1])
            state["values_left"].fill_(.1), state["values_right"].fill_(.1)
    assert (W[0] - expected).norm() < 1e-6 * expected.norm()
    assert all((state[name][0] - s[key]).norm() < 1e-6 * s[key].norm() for name, key in (
        ("left", "L"), ("right", "R"), ("values_left", "l_L"), ("values_right", "l_R")))


@pytest.mark.parametrize("magnitude", [0., 1e-20, 1., 1e20])
def test_the_first_update_moves_nothing_and_makes_sides_bases_and_eigenvalues(magnitude):
    W, (G,) = weights((2, 10, 6), torch.float32), gradients((2, 10, 6), 1, torch.float32)
    rule = KLSOAP(weight_decay=.5)
    state = run(rule, W, [G * magnitude])
    assert torch.equal(W, weights((2, 10, 6), torch.float32)) and not state["m"].any() and not state["v"].any()
    assert (state["values_left"] == .1).all() and (state["values_right"] == .1).all()
    if magnitude == 1:
        assert torch.allclose(state["left"], G @ G.mT / 6, atol=1e-6)
        assert torch.allclose(state["right"], G.mT @ G / 10, atol=1e-6)
    assert rule.shrinkage(hyper(lr=1, weight_decay=1, t=1), 10, 6) == 0
    assert rule.shrinkage(hyper(lr=.1, weight_decay=.5, t=2), 10, 6) == .05


def test_bases_change_at_the_documented_updates():
    assert [s + 1 for s in range(25) if KLSOAP(precondition_frequency=10, stagger=False).refresh_due(s, 7, 9)] == [
        1, 11, 21]
    assert [s + 1 for s in range(25) if KLSOAP(precondition_frequency=10).refresh_due(s, 4, 8)] == [1, 6, 16]
    assert all(KLSOAP().refresh_due(s, 7, 9) for s in range(25))


def test_tiny_eigenvalues_count_as_those_of_the_bound():
    rule, W, G = KLSOAP(), torch.zeros(1, 4, 6).double(), gradients((1, 4, 6), 1)[0]
    lefts = []
    for value in (0., 1e-12, 4000. ** -2):
        state = rule.init(W)
        state["values_right"].fill_(value)
        rule.update(W, G, state, hyper(lr=.1, weight_decay=0, t=2))
        lefts.append(state["left"])
    assert torch.equal(lefts[0], lefts[1]) and torch.allclose(lefts[0], lefts[2], rtol=1e-12)
    assert torch.allclose(lefts[0], .1 * 4000. ** 2 * G @ G.mT / 6)


@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
def test_tiny_and_huge_gradients_make_finite_steps(magnitude):
    sizes = []
    for factor in (1, magnitude):
        W = torch.zeros(2, 10, 6)
        state = run(KLSOAP(), W, [G * factor for G in gradients((2, 10, 6), 12, torch.float32)])
        assert all(t.isfinite().all() for t in (W, *state.values()))
        sizes.append(W.norm())
    # Tiny ones are far below ε: as in Adam.
    assert .3 < sizes[1] / sizes[0] < 3 if magnitude > 1 else 0 < sizes[1] < 1e-6 * sizes[0]


def test_a_huge_gradient_after_tiny_ones_leaves_everything_finite():
    # Of rank one, so that all of it falls into one entry of P, and with eigenvalues where tiny ones end.
    W, rule, G = torch.zeros(2, 10, 6), KLSOAP(), torch.ones(2, 10, 6)
    state = run(rule, W, [G * 1e-12] * 5)
    state["values_left"].zero_(), state["values_right"].zero_()
    for step in range(5, 10):
        rule.update(W, G * 1e20, state, hyper(lr=.1, weight_decay=0, t=step + 1))
        rule.refresh(state, step)
        assert all(t.isfinite().all() for t in (W, *state.values()))


@pytest.mark.parametrize("magnitude", [1e-3, 1, 1e20])
def test_a_rank_one_gradient_makes_a_finite_step_of_the_usual_size(magnitude):
    W = torch.zeros(2, 10, 6)
    u, v = gradients((2, 10, 1), 1, torch.float32)[0], gradients((2, 1, 6), 2, torch.float32)[1]
    state = run(KLSOAP(), W, [u @ v * magnitude] * 7)
    assert all(t.isfinite().all() for t in (W, *state.values()))
    steps = sum(.01 * lr * .05 / .1 ** .5 for lr in (2, 3, 1, 2, 3, 1))               # no bias is corrected
    assert .1 * steps < W.square().mean().sqrt() < 3 * steps


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    rule, W = KLSOAP(weight_decay=.5), weights((2, 6, 6))
    state = rule.init(W)
    for step in range(4):                                # before any other gradient
        rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=.5, t=step + 1))
        rule.refresh(state, step)
    assert torch.allclose(W, weights((2, 6, 6)) * .9 ** 3, rtol=1e-12)
    assert all(value.isfinite().all() for value in state.values()) and not state["m"].any()
    rule.update(W, gradients((2, 6, 6), 1)[0], state, hyper(lr=.2, weight_decay=0, t=5))
    before = W.clone(), state["m"].norm()
    rule.refresh(state, 4)
    rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=0, t=6))
    assert torch.allclose(state["m"].norm(), .95 * before[1]) and (W - before[0]).norm() > .1


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        W, grads = weights((2, 6, 4), dtype), gradients((2, 6, 4), 3, dtype)
        before = [G.clone() for G in grads]
        state = run(KLSOAP(), W, grads)
        assert all(torch.equal(*pair) for pair in zip(grads, before)) and W.dtype == dtype
        assert not {G.data_ptr() for G in grads} & {t.data_ptr() for t in (W, *state.values())}
        assert {t.dtype for t in state.values()} == {torch.float32}


def test_without_decay_the_step_does_not_depend_on_the_weight_and_values_come_from_h():
    steps = []
    for start, lr in ((torch.zeros(2, 6, 4).double(), 1.), (weights((2, 6, 4)), 2.)):
        W = start.clone()
        run(KLSOAP(lr=lr, weight_decay=0.), W, gradients((2, 6, 4), 5))
        steps.append(W - start)
    assert torch.allclose(*steps, atol=1e-12)


def test_one_matrixs_path_does_not_depend_on_the_others():
    W, grads = weights((3, 8, 6), torch.float32), gradients((3, 8, 6), 12, torch.float32)
    alone = W[1:2].clone()
    run(KLSOAP(), W, grads)
    run(KLSOAP(), alone, [G[1:2] for G in grads])
    assert torch.equal(W[1:2], alone)


@pytest.mark.filterwarnings("ignore:a .* side was not decomposed")
def test_a_failing_eigendecomposition_leaves_a_basis_to_improve_by_qr(monkeypatch):
    FAILURES.clear()
    failing_eigh(monkeypatch, [torch.float32, torch.float64])
    W = torch.zeros(2, 10, 6)
    state = run(KLSOAP(), W, gradients((2, 10, 6), 20, torch.float32))
    assert FAILURES == {"kept the old": 4} and all(t.isfinite().all() for t in (W, *state.values()))
    assert not torch.equal(state["q_left"], torch.eye(10).expand(2, 10, 10))


def test_state_numbers_are_those_that_init_makes():
    for rule in (KLSOAP(), KLSOAP(max_precond_dim=8)):
        for shape in ((12, 8), (8, 12), (8, 8)):
            assert sum(t.numel() for t in rule.init(weights((1, *shape))).values()) == rule.state_numbers(*shape)
    with pytest.raises(ValueError, match="12×9.*max_precond_dim 8.*adamw"):
        KLSOAP(max_precond_dim=8).init(weights((1, 12, 9)))


def test_flops_are_those_of_the_products():
    d = 768
    assert KLSOAP().flops(d, d) == pytest.approx(30 * d ** 2 + 2 * (12 + 14 / 3) * d ** 3)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(betas=(.9, 1.0)), dict(precondition_frequency=0), dict(eps=0.), dict(momentum=.9)):
        with pytest.raises(ValidationError):
            KLSOAP(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_a_compiled_update_equals_an_eager_one():
    rule, shape = KLSOAP(weight_decay=.3), (2, 12, 8)
    W, compiled_W = weights(shape, torch.float32), weights(shape, torch.float32)
    state, compiled_state = rule.init(W), rule.init(W)
    for s in (state, compiled_state):
        s["q_left"].copy_(orthonormal(2, 12, 5)), s["q_right"].copy_(orthonormal(2, 8, 6))
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(shape, 3, torch.float32), 1):
        h = hyper(lr=.2 * t, weight_decay=.3, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-5 * W.norm()
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-5, atol=1e-6) for k in state)
