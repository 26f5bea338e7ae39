import copy
import io
import shutil
import statistics

import pytest
import torch
from pydantic import ValidationError

from optim.bases import FAILURES
from optim.splus import SPlus
from tests import oracles
from tests.oracles_bases import failing_eigh, gradients, hyper, orthonormal, run, weights

BASES = ("eigh", "eigh_late", "qr_shift")


def shifted_qr(S, Q):
    Q, R = torch.linalg.qr(S @ Q + .01 * S.norm() * Q)
    return Q @ R.diag().sign().diag()


def oracle_run(W, grads, times, weight_decay, lr=.2, left=True, right=True, renewed=None):
    """(W, M, L, R) of one matrix, with its own decompositions after the updates `times`."""
    m, n = W.shape
    W, M = W.double(), torch.zeros(m, n).double()
    L, R = torch.zeros(m, m).double() if left else None, torch.zeros(n, n).double() if right else None
    Q_L, Q_R = torch.eye(m).double(), torch.eye(n).double()
    renewed = renewed or (lambda S, Q: oracles.eigenvectors(S))
    for t, G in enumerate(grads, 1):
        _, W, M, L, R = oracles.splus(W, G.double(), M, L, R, Q_L, Q_R, lr * (1 + (t - 1) % 3), (.9, .999),
                                      weight_decay)
        if t in times:
            Q_L, Q_R = renewed(L, Q_L) if left else Q_L, renewed(R, Q_R) if right else Q_R
    return W, M, L, R


@pytest.mark.parametrize("basis, every, times, renewed", [
    ("eigh", 5, (1, 5, 10, 15), None), ("eigh_late", 12, (8, 12), None), ("eigh_late", 100, (8, 16), None),
    ("qr_shift", None, (1, 10), shifted_qr), ("qr_shift", 3, (1, 3, 6, 9, 12, 15, 18), shifted_qr)])
def test_splus_equals_its_equations_in_float64(basis, every, times, renewed):
    # Square: a full-rank gradient fixes both bases. (A rectangular one leaves a null space to LAPACK.)
    W, grads = weights((3, 12, 12)), gradients((3, 12, 12))
    expected = [oracle_run(W[i], [G[i] for G in grads], times, .3, renewed=renewed) for i in range(3)]
    state = run(SPlus(basis=basis, inverse_every=every, weight_decay=.3, stagger=False), W, grads, lr=.2)
    for i, (W_i, M_i, L_i, R_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-10 * W_i.norm()
        for name, value in (("momentum", M_i), ("left", L_i), ("right", R_i)):
            assert (state[name][i] - value).norm() < 1e-12 * value.norm()


def test_qr_shift_equals_its_equations_for_matrices_that_are_not_square():
    for shape in ((12, 30), (30, 12)):
        W, grads = weights((2, *shape)), gradients((2, *shape))
        expected = [oracle_run(W[i], [G[i] for G in grads], (1, 10), .3, renewed=shifted_qr)[0] for i in range(2)]
        run(SPlus(basis="qr_shift", weight_decay=.3, stagger=False), W, grads, lr=.2)
        assert (W - torch.stack(expected)).norm() < 1e-9 * W.norm()


@pytest.mark.parametrize("max_dim, sides", [(8, ("right",)), (7, ())])
def test_a_side_beyond_max_dim_gets_no_basis(max_dim, sides):
    rule, shape = SPlus(inverse_every=4, max_dim=max_dim, weight_decay=.3, stagger=False), (2, 12, 8)
    if not sides:
        with pytest.raises(ValueError, match="12×8.*max_dim 7.*preconditioned: false"):
            rule.init(weights(shape))
        return
    W, grads = weights(shape), gradients(shape, 9)
    expected = torch.stack([oracle_run(W_i, [G[i] for G in grads], (1, 4, 8), .3, lr=20, left=False)[0]
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
        for t, G in enumerate(grads):
            _, W_i, M, L, R = oracles.splus(W_i, G[i].double(), M, L, R, Q_L[i], Q_R[i], .02 * (1 + t % 3),
                                            rule.betas, .3)
        expected[i] = W_i
    for t, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=.02 * (1 + t % 3), weight_decay=.3, t=t + 1))
    assert (W - expected).norm() < 1e-6 * expected.norm()                             # measured 2e-7


@pytest.mark.parametrize("shape, given", [((12, 12), False), ((12, 20), True), ((20, 12), True), ((30,), False)])
def test_splus_equals_pytorch_optimizer(shape, given, monkeypatch):
    """At weight decay 0: the port decays before the update, the original after it. With eigenvectors of their own the
    two were found equal bit by bit in momentum, sides and bases, for every one of these shapes, and in the weights but
    for the port's fused multiply-add; a BLAS that rounds stacks otherwise would part the bases of the null spaces of
    those that are not square, so these are given.
    """
    theirs = pytest.importorskip("pytorch_optimizer").SPlus
    calls = []                                           # both ask for the left basis first, then the right

    def given_bases(S):
        calls.append(S.shape)
        Q = orthonormal(1, S.shape[-1], len(calls), S.dtype)
        return torch.return_types.linalg_eigh((torch.zeros(S.shape[:-1]), Q if S.ndim == 3 else Q[0]))
    if given:
        monkeypatch.setattr(torch.linalg, "eigh", given_bases)
    stacked = shape if len(shape) == 1 else (1, *shape)
    W, grads = weights(stacked, torch.float32), gradients(stacked, 30, torch.float32)
    p = torch.nn.Parameter(W.clone().view(shape))
    rule = SPlus(weight_decay=0., inverse_every=5, preconditioned=len(shape) == 2, stagger=False)
    run(rule, W, grads, lr=.2)
    assert len(calls) == (14 if given else 0)            # after updates 1, 5, 10, ... 30
    calls.clear()
    optimizer = theirs([p], lr=.2, weight_decay=0., inverse_steps=5)
    for step, G in enumerate(grads):
        optimizer.param_groups[0]["lr"] = .2 * (1 + step % 3)
        p.grad = G.view(shape).clone()
        optimizer.step()
    assert (W.view(shape) - p).norm() < 1e-6 * p.norm()                               # measured 1e-7


# ---- how far float32 and float64 go apart

def power_law_gradients(shape, count, seed):
    """Of matrices whose rows and columns have the spectrum 1, 1/2, 1/3, ... in a basis of their own."""
    A, B = (orthonormal(1, d, seed + d)[0] / torch.arange(1, d + 1).double() for d in shape[1:])
    return [A @ G @ B.mT for G in gradients(shape, count, seed=seed)]


def divergence(basis, make, shape=(1, 32, 128), steps=20, seed=1):
    """Of float32's and float64's displacements, relative."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        W = torch.zeros(shape, dtype=dtype)
        grads = [G.float().to(dtype) for G in make(shape, steps, seed)]
        run(SPlus(basis=basis, stagger=False, weight_decay=0.), W, grads)
        ends.append(W.double())
    return (ends[0] - ends[1]).norm() / ends[1].norm()


def iid(shape, count, seed):
    return gradients(shape, count, seed=seed)


@pytest.mark.parametrize("basis, make, above, below", [
    ("eigh", iid, .1, 1), ("eigh", power_law_gradients, .1, 1),                       # measured .43 and .43
    ("eigh_late", iid, 0, 5e-3), ("eigh_late", power_law_gradients, .02, 1),          # 2e-5 or 1e-3, and .2
    ("qr_shift", iid, 0, 1e-4), ("qr_shift", power_law_gradients, 0, 1e-4)])          # 1e-6 and 3e-6
def test_only_qr_shift_is_reproducible_over_solvers(basis, make, above, below):
    # The median of three: a sign of an entry near zero may fall either way, which alone makes some 1e-3.
    found = statistics.median(float(divergence(basis, make, seed=seed)) for seed in (1, 2, 3))
    assert above <= found < below


def test_eigh_late_is_plain_sign_descent_until_the_sides_can_have_full_rank():
    paths = []
    for rule in (SPlus(basis="eigh_late", weight_decay=0., stagger=False), None):
        W, M, grads = torch.zeros(1, 6, 12), 0, gradients((1, 6, 12), 9, torch.float32)
        if rule:
            run(rule, W, grads[:8], lr=.9)
        for t, G in enumerate(grads[:8] if not rule else ()):
            M = .9 * M + .1 * G
            W -= .9 * (1 + t % 3) * 2 / 18 * M.sign()
        paths.append(W)
    assert torch.allclose(*paths, atol=1e-6)


# ---- without preconditioning, and what a step is

def test_without_preconditioning_every_entry_moves_by_a_thousandth_of_lr():
    rule, w = SPlus(preconditioned=False, weight_decay=.3), weights((7,), torch.float64)
    grads, expected, m = gradients((7,), 6), w.clone(), torch.zeros(7).double()
    for t, g in enumerate(grads):
        m = .9 * m + .1 * g
        s = .2 * (1 + t % 3) * .001
        expected = (expected - s * m.sign()) * (1 - s * .3)
    state = run(rule, w, grads, lr=.2)
    assert set(state) == {"momentum"} and rule.elementwise and not SPlus().elementwise
    assert torch.allclose(w, expected, rtol=1e-14) and rule.lr_multiplier(300, 7) == 1e-3
    assert not any(rule.refresh_due(step, 0, 1) for step in range(101))


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
    run(SPlus(weight_decay=40.), W, [G], lr=.2)
    assert (W[0] == expected.bfloat16()).float().mean() > .99


def test_the_trainers_average_differs_from_the_references_by_the_decay():
    """The one deviation from the reference's order: it averages W before the decay, the trainer after."""
    W, G = weights((1, 8, 8)), gradients((1, 8, 8), 1)[0]
    I, zero = torch.eye(8).double(), torch.zeros(8, 8).double()
    before_decay = oracles.splus(W[0], G[0], zero, zero, zero, I, I, .2, (.9, .999), .3)[0]
    run(SPlus(weight_decay=.3), W, [G], lr=.2)
    s = .2 * 2 / 16
    assert torch.allclose(W[0], before_decay * (1 - s * .3), rtol=1e-13)
    assert not torch.allclose(W[0], before_decay, rtol=1e-4)


def test_the_first_step_is_the_sign_of_the_gradient_whose_entries_have_the_step_rms():
    for rule in (SPlus(), SPlus(max_dim=8)):
        W, G = torch.zeros(2, 6, 10), gradients((2, 6, 10), 1, torch.float32)[0]
        run(rule, W, [G], lr=.8)
        assert torch.allclose(W, -.8 * rule.step_rms(6, 10) * G.sign(), rtol=2e-3)    # decay: up to 1e-3


def test_shrinkage_is_what_decay_takes_from_a_weight():
    rule, W = SPlus(), weights((1, 6, 10))
    h = hyper(lr=.8, weight_decay=.3, t=1)
    rule.update(W, torch.zeros_like(W), rule.init(W), h)
    assert torch.allclose(W, weights((1, 6, 10)) * (1 - rule.shrinkage(h, 6, 10)), rtol=1e-14)


# ---- when bases are refreshed

@pytest.mark.parametrize("rule, times", [
    (SPlus(stagger=False), [1, 100, 200, 300]),
    (SPlus(basis="eigh_late", stagger=False), [8, 16, 32, 64, 100, 200, 300]),
    (SPlus(basis="eigh_late", stagger=False, inverse_every=20), [8, 16, *range(20, 302, 20)]),
    (SPlus(basis="eigh_late", stagger=False, inverse_every=4), [*range(8, 302, 4)]),
    (SPlus(basis="qr_shift", stagger=False), [1, *range(10, 302, 10)]),
    (SPlus(basis="qr_shift", stagger=False, inverse_every=1), [*range(1, 302)])], ids=str)
def test_bases_are_refreshed_at_the_documented_updates(rule, times):
    for index in (0, 4):
        assert [step + 1 for step in range(301) if rule.refresh_due(step, index, 5)] == times


@pytest.mark.parametrize("count", [1, 7, 72, 250])
@pytest.mark.parametrize("basis", BASES)
def test_staggered_refreshes_spread_the_work_of_every_interval(basis, count):
    rule, unstaggered = SPlus(basis=basis), SPlus(basis=basis, stagger=False)
    times = [t for t in range(1, 402) if unstaggered.refresh_due(t - 1, 0, count)]
    for last, following in zip(times, times[1:]):
        work = [sum(rule.refresh_due(t - 1, i, count) for i in range(count)) for t in range(last, following)]
        assert sum(work) == count and max(work) <= -(-count // (following - last))
    assert not any(rule.refresh_due(t - 1, i, count) for t in range(1, times[0]) for i in range(count))


def test_refresh_changes_the_bases_alone_and_diagonalises_both_sides():
    for basis in BASES:
        rule, W = SPlus(basis=basis), weights((3, 10, 6))
        state = run(rule, W, gradients((3, 10, 6), 30), refresh=False)
        before = {key: value.clone() for key, value in state.items()}
        for _ in range(1 if basis != "qr_shift" else 400):
            rule.refresh(state, 99)
        assert all(torch.equal(state[key], before[key]) for key in ("momentum", "left", "right"))
        for side in ("left", "right"):
            S, Q = state[side], state["q_" + side]
            D = Q.mT @ S @ Q
            assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).norm() < 1e-2 * S.norm()
            assert (Q.mT @ Q - torch.eye(S.shape[-1])).abs().max() < 1e-12


# ---- gradients out of the ordinary

@pytest.mark.parametrize("basis", BASES)
def test_the_update_is_invariant_to_the_gradients_scale(basis):
    for factor in (1e-3, 1e3):
        paths = []
        for scale in (1, factor):
            W = weights((2, 10, 10))
            run(SPlus(basis=basis, inverse_every=4), W, [G * scale for G in gradients((2, 10, 10), 12)], lr=.2)
            paths.append(W)
        assert torch.allclose(*paths, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
@pytest.mark.parametrize("basis", [*BASES, None])
def test_tiny_and_huge_gradients_make_finite_steps_of_the_usual_size(magnitude, basis):
    shape, sizes = (2, 10, 6), []
    rule = SPlus(basis=basis, inverse_every=2) if basis else SPlus(preconditioned=False)
    for factor in (1, magnitude):
        W = torch.zeros(shape)
        state = run(rule, W, [G * factor for G in gradients(shape, 12, torch.float32)], lr=.2)
        sizes.append(W.norm())
        assert all(t.isfinite().all() for t in (W, *state.values()))
    assert .3 < sizes[1] / sizes[0] < 3


@pytest.mark.parametrize("basis", BASES)
def test_a_rank_one_gradient_makes_a_finite_step_of_the_usual_size(basis):
    W = torch.zeros(2, 10, 6)
    u, v = gradients((2, 10, 1), 1, torch.float32)[0], gradients((2, 1, 6), 2, torch.float32)[1]
    run(SPlus(basis=basis, inverse_every=2, weight_decay=0.), W, [u @ v] * 6, lr=.2)
    steps = 0.2 * 2 / 16 * (1 + 2 + 3 + 1 + 2 + 3)
    assert W.isfinite().all() and .1 * steps < W.square().mean().sqrt() <= steps * 1.001


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    for rule, shape in ((SPlus(), (2, 6, 6)), (SPlus(basis="qr_shift"), (2, 6, 6)),
                        (SPlus(preconditioned=False), (9,))):
        W, s = weights(shape), .2 * (2 / 12 if rule.preconditioned else .001)
        state = rule.init(W)
        for step in range(2):
            rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=.5, t=1))
            rule.refresh(state, step)
        assert torch.allclose(W, weights(shape) * (1 - .5 * s) ** 2, rtol=1e-13) and not state["momentum"].any()
        state["momentum"].fill_(1.)
        before = W.clone()
        rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=0, t=2))
        assert torch.allclose(state["momentum"], torch.full_like(W, .9)) and W.ne(before).any()


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        for rule, shape in ((SPlus(), (2, 6, 4)), (SPlus(preconditioned=False), (24,))):
            W, (G,) = weights(shape, dtype), gradients(shape, 1, dtype)
            before = G.clone()
            state = run(rule, W, [G])
            assert torch.equal(G, before) and W.dtype == dtype
            assert G.data_ptr() not in {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} == {torch.float32}


# ---- the failures of kvfrans/splus, as far as they concern a rule

@pytest.mark.parametrize("basis", BASES)
def test_bfloat16_weights_and_gradients_pass_updates_and_refreshes(basis):
    """The reference: lerp and eigh raise."""
    W = weights((2, 10, 6), torch.bfloat16)
    state = run(SPlus(basis=basis, inverse_every=4), W, gradients((2, 10, 6), 9, torch.bfloat16), lr=2.)
    assert W.dtype == torch.bfloat16 and W.isfinite().all() and not torch.equal(W, weights((2, 10, 6), W.dtype))
    assert all(value.dtype == torch.float32 for value in state.values())


def test_rule_and_state_may_be_copied_and_saved_before_the_first_update():
    """The reference: __setstate__ raises TypeError."""
    rule, W, grads = SPlus(inverse_every=4), weights((2, 10, 6)), gradients((2, 10, 6), 9)
    expected = weights((2, 10, 6))
    run(rule, expected, grads)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(rule.init(W)), buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    copied = copy.deepcopy(rule)
    for step, G in enumerate(grads):
        copied.update(W, G, saved, hyper(lr=.01 * (1 + step % 3), weight_decay=.01, t=step + 1))
        if copied.refresh_due(step, 0, 1):
            copied.refresh(saved, step)
    assert torch.equal(W, expected)


def test_state_is_whole_before_any_gradient_and_never_changes_its_form():
    """The reference: makes it at the first gradient, and a state with some parameters that had none does not load."""
    for rule in (*(SPlus(basis=basis) for basis in BASES), SPlus(preconditioned=False)):
        W = weights((2, 10, 6))
        fresh, used = rule.init(W), run(rule, W, gradients((2, 10, 6), 12))
        assert {key: (t.shape, t.dtype) for key, t in fresh.items()} == {k: (t.shape, t.dtype) for k, t in used.items()}
        for key, value in fresh.items():
            value.copy_(used[key])


def test_a_matrix_that_never_had_a_gradient_is_refreshed_like_any():
    """The reference: KeyError at evaluation."""
    for basis in BASES:
        rule, W = SPlus(basis=basis), weights((2, 10, 6), torch.float32)
        state = rule.init(W)
        rule.refresh(state, 0)
        for side, d in (("left", 10), ("right", 6)):
            assert torch.allclose(state["q_" + side], torch.eye(d).expand(2, d, d), atol=1e-6)


def test_there_is_no_average_and_no_mode_in_which_an_update_could_be_lost():
    """The reference: eval() before the first step does nothing, and steps made in it are undone by train()."""
    assert set(SPlus().init(weights((2, 10, 6)))) == {"momentum", "left", "q_left", "right", "q_right"}
    assert not {"train", "eval", "ema_rate"} & set(dir(SPlus))


@pytest.mark.filterwarnings("ignore:a .* side was not decomposed")
@pytest.mark.parametrize("basis", BASES)
def test_a_nan_in_the_sides_costs_one_matrix_its_refresh_and_nobody_the_run(basis):
    """The reference: LinAlgError at the next refresh. (The driver lets no gradient that is not finite come here.)"""
    rule, W = SPlus(basis=basis), weights((3, 10, 6), torch.float32)
    state = run(rule, W, gradients((3, 10, 6), 12, torch.float32), refresh=False)
    healthy = {key: value.clone() for key, value in state.items()}
    rule.refresh(healthy, 11)
    state["left"][1, 2, 3] = state["left"][1, 3, 2] = torch.nan
    FAILURES.clear()
    rule.refresh(state, 11)
    assert FAILURES == {"kept the old": 1} and torch.equal(state["q_left"][1], torch.eye(10))
    assert all(torch.equal(state[key][[0, 2]], healthy[key][[0, 2]]) for key in ("q_left", "q_right"))


@pytest.mark.filterwarnings("ignore:a 6×6 side was not decomposed")
def test_a_failing_eigendecomposition_is_retried_and_then_given_up(monkeypatch):
    """The reference: raises."""
    rule, W = SPlus(), weights((2, 10, 6), torch.float32)
    state = run(rule, W, gradients((2, 10, 6), 12, torch.float32), refresh=False)
    expected = {key: value.clone() for key, value in state.items()}
    rule.refresh(expected, 99)
    FAILURES.clear()
    failing_eigh(monkeypatch, [torch.float32])
    rule.refresh(state, 99)
    assert FAILURES == {"solved in float64": 4}
    for key in ("q_left", "q_right"):                    # but for signs
        assert torch.allclose((state[key] * expected[key]).sum(-2).abs(), torch.ones(state[key].shape[::2]), atol=1e-3)
    failing_eigh(monkeypatch, [torch.float64])
    before = {key: value.clone() for key, value in state.items()}
    with pytest.warns(UserWarning, match="10×10 side.*keeps the old") as warned:
        rule.refresh(state, 199)
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert FAILURES["kept the old"] == len(warned) == 4


# ---- the rest of the interface

def test_state_numbers_are_those_that_init_makes():
    for rule in (SPlus(), SPlus(max_dim=8), SPlus(preconditioned=False)):
        for shape in ((12, 8), (8, 12), (8, 8)):
            if max(shape) <= 8 or rule.max_dim != 8 or min(shape) <= 8:
                made = sum(t.numel() for t in rule.init(weights((1, *shape))).values())
                assert made == rule.state_numbers(*shape)
    assert SPlus().state_numbers(768, 3072) == 768 * 3072 + 2 * (768 ** 2 + 3072 ** 2)


def test_flops_are_those_of_the_products_and_of_the_averaged_refreshes():
    d, elementwise = 768, 10 * 768 ** 2
    assert SPlus().flops(d, d) == pytest.approx(elementwise + 12 * d ** 3 + 2 * 9 * d ** 3 / 100)
    assert SPlus(basis="qr_shift").flops(d, d) == pytest.approx(elementwise + 12 * d ** 3 + 2 * 14 / 3 * d ** 3 / 10)
    assert SPlus().flops(d, 4 * d) - SPlus(inverse_every=10 ** 9).flops(d, 4 * d) == pytest.approx(65 * .09 * d ** 3)
    assert SPlus(preconditioned=False).flops(d, d) == elementwise


def test_read_when_names_only_keys_that_exist():
    fields = SPlus.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in SPlus.READ_WHEN.items() for on in when)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(betas=(.9, 1.0)), dict(inverse_every=0), dict(max_dim=0), dict(momentum=.9), dict(basis="qr")):
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
