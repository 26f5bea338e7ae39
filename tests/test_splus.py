import shutil
import warnings

import pytest
import torch
from pydantic import ValidationError

from optim.splus import SPlus, eigenbases
from tests import oracles


def hyper(**values):
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in values.items()}


def weights(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 4


def gradients(shape, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def orthonormal(n, d, seed, dtype=torch.float64):
    A = torch.randn(n, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(A)[0].to(dtype)


def run(rule, W, grads, lr=.2, refresh=True):
    state = rule.init(W)
    for step, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=lr * (1 + step % 3), weight_decay=rule.weight_decay, t=step + 1))
        if refresh and rule.refresh_due(step):
            rule.refresh(state)
    return state


def oracle_run(W, grads, every, weight_decay, lr=.2, left=True, right=True):
    """(W, M, L, R) of one matrix, with its own eigendecompositions: after update 1 and every `every`."""
    m, n = W.shape
    W, M = W.double(), torch.zeros(m, n).double()
    L, R = torch.zeros(m, m).double() if left else None, torch.zeros(n, n).double() if right else None
    Q_L, Q_R = torch.eye(m).double(), torch.eye(n).double()
    for t, G in enumerate(grads, 1):
        _, W, M, L, R = oracles.splus(W, G.double(), M, L, R, Q_L, Q_R, lr * (1 + (t - 1) % 3), (.9, .999),
                                      weight_decay)
        if t == 1 or t % every == 0:
            Q_L = oracles.eigenvectors(L) if left else Q_L
            Q_R = oracles.eigenvectors(R) if right else Q_R
    return W, M, L, R


def test_splus_equals_its_equations_in_float64():
    # Square: a full-rank gradient fixes both bases. (A rectangular one leaves a null space to LAPACK.)
    W, grads = weights((3, 12, 12)), gradients((3, 12, 12), 12)
    expected = [oracle_run(W[i], [G[i] for G in grads], 5, .3) for i in range(3)]
    state = run(SPlus(inverse_every=5, weight_decay=.3), W, grads)
    for i, (W_i, M_i, L_i, R_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-10 * W_i.norm()
        for name, value in (("momentum", M_i), ("left", L_i), ("right", R_i)):
            assert (state[name][i] - value).norm() < 1e-12 * value.norm()


@pytest.mark.parametrize("max_dim, sides", [(8, ("right",)), (7, ())])
def test_a_side_beyond_max_dim_gets_no_basis(max_dim, sides):
    rule, shape = SPlus(inverse_every=4, max_dim=max_dim, weight_decay=.3), (2, 12, 8)
    if not sides:
        with pytest.raises(ValueError, match="12×8.*max_dim 7.*preconditioned: false"):
            rule.init(weights(shape))
        return
    W, grads = weights(shape), gradients(shape, 9)
    expected = torch.stack([oracle_run(W_i, [G[i] for G in grads], 4, .3, lr=20, left=False)[0]
                            for i, W_i in enumerate(W)])
    state = run(rule, W, grads, lr=20)
    assert set(state) == {"momentum", "right", "q_right"}
    assert (W - expected).norm() < 1e-10 * expected.norm()
    assert (rule.lr_multiplier(12, 8), rule.lr_multiplier(8, 8)) == (1e-3, 2 / 16)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=str)
def test_with_given_bases_float32_equals_float64(shape):
    W, grads = weights((2, *shape), torch.float32), gradients((2, *shape), 20, torch.float32)
    rule = SPlus(weight_decay=.3, lr=.02)
    Q_L, Q_R = orthonormal(2, shape[0], 5), orthonormal(2, shape[1], 6)
    expected, state = W.double(), rule.init(W)
    state["q_left"].copy_(Q_L), state["q_right"].copy_(Q_R)
    for i in range(2):
        W_i, M, L, R = W[i].double(), *(torch.zeros_like(S).double() for S in (W[i], Q_L[i], Q_R[i]))
        for G in grads:
            _, W_i, M, L, R = oracles.splus(W_i, G[i].double(), M, L, R, Q_L[i], Q_R[i], .02, rule.betas, .3)
        expected[i] = W_i
    for t, G in enumerate(grads, 1):
        rule.update(W, G, state, hyper(lr=.02, weight_decay=.3, t=t))
    assert (W - expected).norm() < 1e-6 * expected.norm()                             # measured 2e-7


def test_without_preconditioning_every_entry_moves_by_a_thousandth_of_lr():
    rule, w = SPlus(preconditioned=False, weight_decay=.3), weights((7,), torch.float64)
    grads, expected, m = gradients((7,), 6), w.clone(), torch.zeros(7).double()
    for t, g in enumerate(grads):
        m = .9 * m + .1 * g
        s = .2 * (1 + t % 3) * .001
        expected = (expected - s * m.sign()) * (1 - s * .3)
    state = run(rule, w, grads)
    assert set(state) == {"momentum"} and rule.elementwise and not SPlus().elementwise
    assert torch.allclose(w, expected, rtol=1e-14) and rule.lr_multiplier(300, 7) == 1e-3


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    for preconditioned, shape in ((True, (2, 6, 4)), (False, (9,))):
        results = []
        for lr, weight_decay in ((1., 2.), (3., 4.)):
            rule, W = SPlus(lr=lr, weight_decay=weight_decay, preconditioned=preconditioned), weights(shape)
            rule.update(W, gradients(shape, 1)[0], rule.init(W), hyper(lr=.1, weight_decay=.2, t=1))
            results.append(W)
        assert torch.equal(*results)


def test_bfloat16_weights_are_rounded_once():
    W = weights((1, 12, 12), torch.bfloat16)
    G, I, zero = gradients((1, 12, 12), 1)[0], torch.eye(12).double(), torch.zeros(12, 12).double()
    expected = oracles.splus(W[0].double(), G[0], zero, zero, zero, I, I, .2, (.9, .999), 40.)[1]
    run(SPlus(weight_decay=40.), W, [G])
    assert (W[0] == expected.bfloat16()).float().mean() > .99


def test_the_trainers_average_differs_from_the_references_by_the_decay():
    """The one deviation from the reference's order: it averages W before the decay, the trainer after."""
    W, G = weights((1, 8, 8)), gradients((1, 8, 8), 1)[0]
    I, zero = torch.eye(8).double(), torch.zeros(8, 8).double()
    before_decay = oracles.splus(W[0], G[0], zero, zero, zero, I, I, .2, (.9, .999), .3)[0]
    run(SPlus(weight_decay=.3), W, [G])
    s = .2 * 2 / 16
    assert torch.allclose(W[0], before_decay * (1 - s * .3), rtol=1e-13)
    assert not torch.allclose(W[0], before_decay, rtol=1e-4)


def test_the_first_step_is_the_sign_of_the_gradient():
    W, G = torch.zeros(2, 6, 10), gradients((2, 6, 10), 1, torch.float32)[0]
    run(SPlus(), W, [G], lr=.8)
    assert torch.allclose(W, -.8 * 2 / 16 * G.sign(), rtol=2e-3)                      # decay: up to 1e-3


def test_bases_are_refreshed_after_update_1_and_then_every_hundredth():
    rule, shape = SPlus(), (1, 4, 4)
    state = rule.init(weights(shape))
    changed = []
    for step in range(301):
        before = state["q_left"].clone()
        state["left"].copy_(orthonormal(1, 4, step) @ torch.diag(torch.arange(1., 5).double()) @
                            orthonormal(1, 4, step).mT)
        if rule.refresh_due(step):
            rule.refresh(state)
        if not torch.equal(before, state["q_left"]):
            changed.append(step + 1)
    assert changed == [1, 100, 200, 300]


def test_refresh_diagonalises_both_sides():
    rule, shape = SPlus(), (3, 10, 6)
    state = run(rule, weights(shape), gradients(shape, 100))
    for side in ("left", "right"):
        S, Q = state[side], state["q_" + side]
        D = Q.mT @ S @ Q
        assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).norm() < 1e-12 * S.norm()
        assert (Q.mT @ Q - torch.eye(S.shape[-1])).abs().max() < 1e-12


def test_the_update_is_invariant_to_the_gradients_scale():
    for factor in (1e-3, 1e3):
        paths = []
        for scale in (1, factor):
            W = weights((2, 10, 10))
            run(SPlus(inverse_every=4), W, [G * scale for G in gradients((2, 10, 10), 10)])
            paths.append(W)
        assert torch.allclose(*paths, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_tiny_and_huge_gradients_make_finite_steps_of_the_usual_size(magnitude, preconditioned):
    shape, sizes = (2, 10, 6), []
    rule = SPlus(preconditioned=preconditioned, inverse_every=2)
    for factor in (1, magnitude):
        W = torch.zeros(shape)
        state = run(rule, W, [G * factor for G in gradients(shape, 6, torch.float32)])
        sizes.append(W.norm())
        assert all(t.isfinite().all() for t in (W, *state.values()))
    assert .3 < sizes[1] / sizes[0] < 3


def test_a_rank_one_gradient_makes_a_finite_step_of_the_usual_size():
    W = torch.zeros(2, 10, 6)
    u, v = gradients((2, 10, 1), 1, torch.float32)[0], gradients((2, 1, 6), 2, torch.float32)[1]
    run(SPlus(inverse_every=2, weight_decay=0.), W, [u @ v] * 6)
    steps = 0.2 * 2 / 16 * (1 + 2 + 3 + 1 + 2 + 3)
    assert W.isfinite().all() and .1 * steps < W.square().mean().sqrt() <= steps * 1.001


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    for preconditioned, shape in ((True, (2, 6, 6)), (False, (9,))):
        rule, W = SPlus(weight_decay=.5, preconditioned=preconditioned), weights(shape)
        state = run(rule, W, [torch.zeros_like(W)])
        s = .2 * (2 / 12 if rule.preconditioned else .001)
        assert torch.allclose(W, weights(shape) * (1 - .5 * s), rtol=1e-13) and not state["momentum"].any()
        state["momentum"].fill_(1.)
        rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=0, t=2))
        assert torch.allclose(state["momentum"], torch.full_like(W, .9))
        assert W.ne(weights(shape) * (1 - .5 * s)).any()


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        for rule, shape in ((SPlus(), (2, 6, 4)), (SPlus(preconditioned=False), (24,))):
            W, (G,) = weights(shape, dtype), gradients(shape, 1, dtype)
            before = G.clone()
            state = run(rule, W, [G])
            assert torch.equal(G, before) and W.dtype == dtype
            assert G.data_ptr() not in {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} == {torch.float32}


def failing_eigh(bad, dtypes, monkeypatch):
    """torch.linalg.eigh that fails in these dtypes on any stack holding the marker value `bad`."""
    eigh = torch.linalg.eigh

    def patched(S):
        if S.dtype in dtypes and (S == bad).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(S)
    monkeypatch.setattr(torch.linalg, "eigh", patched)


def symmetric_stack():
    A = gradients((3, 5, 5), 1, torch.float32)[0]
    S = A @ A.mT
    S[1, 0, 0] = 77
    return S, torch.eye(5).repeat(3, 1, 1)


def test_a_failed_eigendecomposition_is_retried_in_float64(monkeypatch):
    S, previous = symmetric_stack()
    expected = eigenbases(S, previous)
    failing_eigh(77, (torch.float32,), monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Q = eigenbases(S, previous)
    assert torch.equal(Q[[0, 2]], expected[[0, 2]]), "a neighbour's failure changed a basis"
    D = Q[1].T @ S[1] @ Q[1]
    assert (D - D.diag().diag()).abs().max() < 1e-4 and Q.dtype == torch.float32


def test_a_hopeless_side_keeps_its_basis_and_says_so(monkeypatch):
    S, previous = symmetric_stack()
    expected = eigenbases(S, previous)
    failing_eigh(77, (torch.float32, torch.float64), monkeypatch)
    with pytest.warns(UserWarning, match="5×5.*keeps its old"):
        Q = eigenbases(S, previous)
    assert torch.equal(Q[[0, 2]], expected[[0, 2]]) and torch.equal(Q[1], previous[1])


@pytest.mark.filterwarnings("ignore:no eigenbasis")
def test_a_non_finite_side_keeps_its_basis():
    for poison in (float("nan"), float("inf")):
        S, previous = symmetric_stack()
        S[1, 2, 3] = S[1, 3, 2] = poison
        Q = eigenbases(S, previous)
        assert torch.equal(Q[1], previous[1]) and Q.isfinite().all() and not torch.equal(Q[0], previous[0])


@pytest.mark.parametrize("shape", [(12, 20), (12, 12), (30,)], ids=str)
def test_splus_equals_pytorch_optimizer_with_the_same_bases(shape, monkeypatch):
    """At weight decay 0; the port decays before the update, the original after it."""
    theirs = pytest.importorskip("pytorch_optimizer").SPlus
    calls = []                                           # both ask for the left basis first, then the right

    def given_bases(S):
        calls.append(S.shape)
        Q = orthonormal(1, S.shape[-1], len(calls), S.dtype)
        return torch.return_types.linalg_eigh((torch.zeros(S.shape[:-1]), Q if S.ndim == 3 else Q[0]))
    monkeypatch.setattr(torch.linalg, "eigh", given_bases)
    stacked = shape if len(shape) == 1 else (1, *shape)
    W, grads = weights(stacked, torch.float32), gradients(stacked, 12, torch.float32)
    p = torch.nn.Parameter(W.clone().view(shape))
    run(SPlus(weight_decay=0., inverse_every=5, preconditioned=len(shape) == 2), W, grads)
    calls.clear()
    optimizer = theirs([p], lr=.2, weight_decay=0., inverse_steps=5)
    for step, G in enumerate(grads):
        optimizer.param_groups[0]["lr"] = .2 * (1 + step % 3)
        p.grad = G.view(shape).clone()
        optimizer.step()
    assert (W.view(shape) - p).norm() < 1e-6 * p.norm()


def test_read_when_names_only_keys_that_exist():
    fields = SPlus.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in SPlus.READ_WHEN.items() for on in when)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(betas=(.9, 1.0)), dict(inverse_every=0), dict(max_dim=0), dict(momentum=.9)):
        with pytest.raises(ValidationError):
            SPlus(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_a_compiled_update_equals_an_eager_one():
    rule, shape = SPlus(weight_decay=.3), (2, 12, 8)
    W, compiled_W = weights(shape, torch.float32), weights(shape, torch.float32)
    state, compiled_state = rule.init(W), rule.init(W)
    for s in (state, compiled_state):
        s["q_left"].copy_(orthonormal(2, 12, 5)), s["q_right"].copy_(orthonormal(2, 8, 6))
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(shape, 2, torch.float32), 1):
        h = hyper(lr=.2 * t, weight_decay=.3, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-5, atol=1e-7) for k in state)
