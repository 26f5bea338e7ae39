import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.bases import FAILURES
from optim.soap import SOAP
from tests import oracles
from tests.oracles_bases import failing_eigh, gradients, hyper, orthonormal, run, soap, weights

SAME = dict(stagger=False, ns_dtype="float32")


def oracle_run(W, grads, lr=.01, **options):
    W, s = W.double(), {}
    for t, G in enumerate(grads, 1):
        W = soap(W, G.double(), s, t, lr * (1 + (t - 1) % 3), **options)
    return W, s


SWITCHES = [
    (dict(), dict()),
    (dict(precondition_frequency=1), dict(every=1)),
    (dict(precondition_frequency=3, shampoo_beta=.8), dict(every=3, beta=.8)),
    (dict(precondition_frequency=3, betas=(.9, .8), eps=1e-3, weight_decay=.5),
     dict(every=3, betas=(.9, .8), eps=1e-3, weight_decay=.5)),
    (dict(precondition_frequency=3, bias_correction=False), dict(every=3, correct=False)),
    (dict(precondition_frequency=3, sort=False), dict(every=3, sort=False)),
    (dict(precondition_frequency=3, momentum_basis="unrotated"), dict(every=3)),
    (dict(precondition_frequency=3, first_step="take"), dict(every=3, take=True)),
    (dict(precondition_frequency=1, first_step="take", momentum_basis="unrotated", sort=False, bias_correction=False),
     dict(every=1, take=True, sort=False, correct=False)),
    (dict(precondition_frequency=3, then="muon", ns_coefficients="exact12"),
     dict(every=3, then=lambda U: oracles.newton_schulz(U, "exact12"))),
]


@pytest.mark.parametrize("ours, equations", SWITCHES, ids=lambda s: "-".join(map(str, s)) or "defaults")
def test_soap_equals_its_equations_in_float64(ours, equations):
    # Square: a full-rank gradient fixes both bases.
    W, grads = weights((2, 12, 12)), gradients((2, 12, 12), 24)
    start = W.clone()
    expected = [oracle_run(W[i], [G[i] for G in grads], **equations) for i in range(2)]
    state = run(SOAP(**ours, **SAME), W, grads)
    # Orthogonalising is float32's even for float64 weights.
    tolerance = 1e-6 if "then" in ours else 1e-9
    for i, (W_i, s) in enumerate(expected):
        assert (W[i] - W_i).norm() < tolerance * (W_i - start[i]).norm()
        assert (state["left"][i] - s["L"]).norm() < 1e-12 * s["L"].norm()
        assert (state["v"][i] - s["V"]).norm() < 1e-9 * s["V"].norm()


@pytest.mark.parametrize("max_dim", [20, 12])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_with_a_first_basis_given_it_equals_them_on_other_shapes_and_with_one_basis(shape, max_dim, monkeypatch):
    given = {d: orthonormal(1, d, d)[0] for d in shape}
    sides = [side for side, d in zip(("left", "right"), shape) if d <= max_dim]
    W, grads = weights((2, *shape)), gradients((2, *shape), 24)
    expected = [oracle_run(W[i], [G[i] for G in grads], every=4, first_bases=lambda S: given[len(S)],
                           left="left" in sides, right="right" in sides)[0] for i in range(2)]
    monkeypatch.setattr("optim.soap.eigenbases", lambda S, Q: given[S.shape[-1]].flip(-1).expand_as(S))
    state = run(SOAP(precondition_frequency=4, max_precond_dim=max_dim, **SAME), W, grads)
    assert [key for key in ("left", "right") if key in state] == sides
    assert (W - torch.stack(expected)).norm() < 1e-9 * W.norm()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=str)
@pytest.mark.parametrize("then", ["none", "muon"])
def test_with_given_bases_float32_equals_float64(shape, then):
    W, grads = weights((2, *shape), torch.float32), gradients((2, *shape), 20, torch.float32)
    rule = SOAP(weight_decay=.3, then=then, **SAME)
    Q_L, Q_R = orthonormal(2, shape[0], 5), orthonormal(2, shape[1], 6)
    state, expected = rule.init(W), []
    state["q_left"].copy_(Q_L), state["q_right"].copy_(Q_R)
    for i in range(2):
        given = iter((Q_L[i], Q_R[i]))
        expected.append(oracle_run(W[i], [G[i] for G in grads], weight_decay=.3, every=100,
                                   first_bases=lambda S: next(given), then=None if then == "none" else
                                   lambda U: oracles.newton_schulz(U, "kj5"))[0])
    for t, G in enumerate(grads, 1):
        rule.update(W, G, state, hyper(lr=.01 * (1 + (t - 1) % 3), weight_decay=.3, t=t))
    assert (W - torch.stack(expected)).norm() < 1e-6 * W.norm()                       # measured 2e-7


def test_bfloat16_orthogonalisation_stays_close():
    ends = []
    for ns_dtype in ("float32", "bfloat16"):
        W = torch.zeros(2, 12, 20)
        run(SOAP(then="muon", ns_dtype=ns_dtype, weight_decay=0.), W, gradients((2, 12, 20), 20, torch.float32))
        ends.append(W)
    assert (ends[0] - ends[1]).norm() < 2e-2 * ends[0].norm()


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("correct", [True, False])
def test_soap_equals_pytorch_optimizer(shape, correct, monkeypatch):
    """With first bases given where a side begins without full rank. The port keeps the momentum unrotated."""
    theirs = pytest.importorskip("pytorch_optimizer").SOAP
    if shape[0] != shape[1]:
        monkeypatch.setattr(torch.linalg, "eigh", lambda S: torch.return_types.linalg_eigh(
            (torch.zeros(S.shape[:-1]), orthonormal(1, S.shape[-1], 3, S.dtype)[(...,) if S.ndim == 3 else 0])))
    W, grads = weights((1, *shape), torch.float32), gradients((1, *shape), 20, torch.float32)
    p, start = torch.nn.Parameter(W[0].clone()), W[0].clone()
    run(SOAP(precondition_frequency=4, bias_correction=correct, **SAME), W, grads)
    optimizer = theirs([p], precondition_frequency=4, correct_bias=correct)
    for step, G in enumerate(grads):
        optimizer.param_groups[0]["lr"] = .01 * (1 + step % 3)
        p.grad = G[0].clone()
        optimizer.step()
    assert (W[0] - p).norm() < 1e-4 * (p - start).norm()                              # measured 6e-6


# ---- the first update

@pytest.mark.parametrize("magnitude", [0., 1e-20, 1., 1e20])
def test_the_first_update_moves_nothing_and_makes_the_bases(magnitude):
    W, (G,) = weights((2, 10, 6), torch.float32), gradients((2, 10, 6), 1, torch.float32)
    rule = SOAP(weight_decay=.5)
    state = run(rule, W, [G * magnitude])
    assert torch.equal(W, weights((2, 10, 6), torch.float32)) and not state["m"].any() and not state["v"].any()
    for side in ("left", "right"):
        S, Q = state[side], state["q_" + side]
        assert (Q.mT @ Q - torch.eye(S.shape[-1])).abs().max() < 1e-5
        if magnitude < 1:
            continue                                     # the ridge of 1e-30 outweighs the squares of 1e-20
        D = Q.mT @ S @ Q
        assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).norm() <= 1e-5 * S.norm()
        assert (D.diagonal(dim1=1, dim2=2).diff() <= 1e-6 * S.norm()).all()           # falling
    assert rule.shrinkage(hyper(lr=1, weight_decay=1, t=1), 10, 6) == 0
    assert rule.shrinkage(hyper(lr=.1, weight_decay=.5, t=2), 10, 6) == .05


def test_a_first_update_that_is_taken_is_adams():
    W, (G,) = torch.zeros(2, 10, 6), gradients((2, 10, 6), 1, torch.float32)
    rule = SOAP(first_step="take", weight_decay=0.)
    state = run(rule, W, [G], lr=.1)
    assert torch.allclose(W, -.1 * G.sign(), rtol=1e-4)
    assert rule.shrinkage(hyper(lr=.1, weight_decay=.5, t=1), 10, 6) == .05
    P = state["q_left"].mT @ G @ state["q_right"]        # and leaves the moments that its gradient has in its bases
    assert torch.allclose(state["m"], .05 * P, atol=1e-6) and torch.allclose(state["v"], .05 * P * P, atol=1e-6)


def test_both_ways_to_keep_the_momentum_are_one_rule():
    ends = []
    for kept in ("rotated", "unrotated"):
        W = torch.zeros(2, 12, 8).double()
        run(SOAP(momentum_basis=kept, precondition_frequency=3), W, gradients((2, 12, 8), 20))
        ends.append(W)
    assert (ends[0] - ends[1]).norm() < 1e-10 * ends[0].norm()


def test_a_change_of_bases_takes_the_momentum_over_and_sorts_the_second_moment():
    rule, W = SOAP(), weights((2, 10, 6))
    state = run(rule, W, gradients((2, 10, 6), 10))
    before = {key: value.clone() for key, value in state.items()}
    rule.refresh(state, 10)
    back = [s["q_left"] @ s["m"] @ s["q_right"].mT for s in (before, state)]
    assert torch.allclose(*back, atol=1e-12) and not torch.equal(before["q_left"], state["q_left"])
    assert torch.equal(before["v"].flatten(1).sort()[0], state["v"].flatten(1).sort()[0])
    assert not torch.equal(before["v"], state["v"])
    for i in range(2):
        rows, columns = ((before["q_" + side][i].T @ before[side][i] @ before["q_" + side][i]).diag().argsort(
            descending=True) for side in ("left", "right"))
        assert torch.equal(state["v"][i], before["v"][i][rows][:, columns])


# ---- when bases change

def test_bases_change_at_the_documented_updates():
    assert [s + 1 for s in range(45) if SOAP(stagger=False).refresh_due(s, 7, 9)] == [1, 11, 21, 31, 41]
    assert [s + 1 for s in range(5) if SOAP(precondition_frequency=1).refresh_due(s, 7, 9)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 7, 72, 150])
def test_staggered_changes_spread_the_work_and_none_is_later_than_unstaggered(count):
    rule = SOAP()
    times = [[s for s in range(101) if rule.refresh_due(s, i, count)] for i in range(count)]
    assert all(own[0] == 0 and max(b - a for a, b in zip(own, own[1:])) == 10 for own in times)
    work = [sum(s in own for own in times) for s in range(1, 101)]
    assert max(work) <= -(-count // 10)


# ---- gradients out of the ordinary

@pytest.mark.parametrize("then", ["none", "muon"])
@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
def test_tiny_and_huge_gradients_make_finite_steps(magnitude, then):
    sizes = []
    for factor in (1, magnitude):
        W = torch.zeros(2, 10, 6)
        state = run(SOAP(precondition_frequency=2, then=then, **SAME), W,
                    [G * factor for G in gradients((2, 10, 6), 12, torch.float32)])
        assert all(t.isfinite().all() for t in (W, *state.values()))
        sizes.append(W.norm())
    if magnitude > 1 or then == "muon":                  # elsewhere far below ε: as in Adam
        assert .3 < sizes[1] / sizes[0] < 3
    else:
        assert 0 < sizes[1] < 1e-6 * sizes[0]


@pytest.mark.parametrize("options", [dict(), dict(then="muon"), dict(first_step="take", momentum_basis="unrotated")])
@pytest.mark.parametrize("magnitude", [1e-3, 1, 1e20])
def test_a_rank_one_gradient_makes_a_finite_step_of_the_usual_size(magnitude, options):
    W, rule = torch.zeros(2, 10, 6), SOAP(precondition_frequency=2, weight_decay=0., **options, **SAME)
    u, v = gradients((2, 10, 1), 1, torch.float32)[0], gradients((2, 1, 6), 2, torch.float32)[1]
    state = run(rule, W, [u @ v * magnitude] * 7)
    steps = .01 * (1 + 2 + 3 + 1 + 2 + 3 + 1)
    assert all(t.isfinite().all() for t in (W, *state.values()))
    assert .1 * steps * rule.step_rms(10, 6) < W.square().mean().sqrt() < 1.5 * steps


@pytest.mark.parametrize("options", [dict(), dict(then="muon"), dict(momentum_basis="unrotated"),
                                     dict(first_step="take")])
def test_a_zero_gradient_lets_momentum_and_decay_go_on(options):
    rule, W = SOAP(weight_decay=.5, precondition_frequency=1, **options, **SAME), weights((2, 6, 6))
    state = rule.init(W)
    for step in range(4):                                # before any other gradient
        rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=.5, t=step + 1))
        rule.refresh(state, step)
    taken = 4 if rule.first_step == "take" else 3
    assert torch.allclose(W, weights((2, 6, 6)) * .9 ** taken, rtol=1e-12)
    assert all(value.isfinite().all() for value in state.values()) and not state["m"].any()
    rule.update(W, gradients((2, 6, 6), 1)[0], state, hyper(lr=.2, weight_decay=0, t=5))
    before = W.clone(), state["m"].norm()
    rule.refresh(state, 4)
    rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=0, t=6))
    assert torch.allclose(state["m"].norm(), .95 * before[1]) and (W - before[0]).norm() > .1


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        for then in ("none", "muon"):
            W, grads = weights((2, 6, 4), dtype), gradients((2, 6, 4), 3, dtype)
            before = [G.clone() for G in grads]
            state = run(SOAP(then=then, first_step="take"), W, grads)
            assert all(torch.equal(*pair) for pair in zip(grads, before)) and W.dtype == dtype
            assert not {G.data_ptr() for G in grads} & {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} == {torch.float32}


def test_bfloat16_weights_are_rounded_once():
    W, grads, s = weights((1, 12, 12), torch.bfloat16), gradients((1, 12, 12), 2), {}
    expected = W[0].double()
    for t, G in enumerate(grads, 1):
        expected = soap(expected, G[0], s, t, .01 * t, weight_decay=4.)
    run(SOAP(weight_decay=4.), W, grads)
    assert (W[0] == expected.bfloat16()).float().mean() > .98


def test_without_decay_the_step_does_not_depend_on_the_weight():
    for options in (dict(), dict(then="muon"), dict(first_step="take")):
        steps = []
        for start in (torch.zeros(2, 6, 4).double(), weights((2, 6, 4))):
            W = start.clone()
            run(SOAP(weight_decay=0., **options, **SAME), W, gradients((2, 6, 4), 5))
            steps.append(W - start)
        assert torch.allclose(*steps, atol=1e-12)


def test_one_matrixs_path_does_not_depend_on_the_others():
    W, grads = weights((3, 8, 6), torch.float32), gradients((3, 8, 6), 12, torch.float32)
    alone = W[1:2].clone()
    run(SOAP(precondition_frequency=3), W, grads)
    run(SOAP(precondition_frequency=3), alone, [G[1:2] for G in grads])
    assert torch.equal(W[1:2], alone)


@pytest.mark.filterwarnings("ignore:a .* side was not decomposed")
def test_a_failing_eigendecomposition_leaves_a_basis_to_improve_by_qr(monkeypatch):
    FAILURES.clear()
    failing_eigh(monkeypatch, [torch.float32, torch.float64])
    W = torch.zeros(2, 10, 6)
    state = run(SOAP(precondition_frequency=1, weight_decay=0.), W, gradients((2, 10, 6), 20, torch.float32))
    assert FAILURES == {"kept the old": 4} and all(t.isfinite().all() for t in (W, *state.values()))
    failing_eigh(monkeypatch, [])
    S, Q = state["left"], state["q_left"]
    D = Q.mT @ S @ Q
    assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).norm() < .3 * S.norm()


# ---- the rest of the interface

def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for lr, weight_decay in ((1., 2.), (3., 4.)):
        rule, W = SOAP(lr=lr, weight_decay=weight_decay), weights((2, 6, 4))
        state = rule.init(W)
        for t, G in enumerate(gradients((2, 6, 4), 3), 1):
            rule.update(W, G, state, hyper(lr=.1, weight_decay=.2, t=t))
        results.append(W)
    assert torch.equal(*results)


def test_state_numbers_are_those_that_init_makes():
    for rule in (SOAP(), SOAP(max_precond_dim=8)):
        for shape in ((12, 8), (8, 12), (8, 8)):
            assert sum(t.numel() for t in rule.init(weights((1, *shape))).values()) == rule.state_numbers(*shape)
    assert SOAP().state_numbers(768, 3072) == 2 * 768 * 3072 + 2 * (768 ** 2 + 3072 ** 2)
    with pytest.raises(ValueError, match="12×9.*max_precond_dim 8.*adamw"):
        SOAP(max_precond_dim=8).init(weights((1, 12, 9)))


def test_flops_are_those_of_the_products():
    d = 768
    assert SOAP().flops(d, d) == pytest.approx(16 * d ** 2 + 2 * (6.4 * d ** 3 + 14 / 30 * d ** 3))
    unrotated, rotated = (SOAP(precondition_frequency=1, momentum_basis=kept).flops(d, d)
                          for kept in ("unrotated", "rotated"))
    assert rotated - unrotated == pytest.approx(4 * d ** 3)
    assert SOAP(then="muon").flops(d, d) - SOAP().flops(d, d) == pytest.approx(5 * (4 + 2) * d ** 3)


def test_only_an_orthogonalised_step_is_scaled_by_the_shape():
    assert (SOAP().lr_multiplier(3072, 768), SOAP().step_rms(3072, 768)) == (1, 1)
    rule = SOAP(then="muon")
    assert (rule.lr_multiplier(3072, 768), rule.lr_multiplier(768, 3072)) == (2, 1)
    W = torch.zeros(2, 24, 6)
    run(SOAP(then="muon", ns_coefficients="exact12", ns_dtype="float32", first_step="take", weight_decay=0.), W,
        gradients((2, 24, 6), 1, torch.float32), lr=1)
    assert W.square().mean().sqrt() == pytest.approx(rule.step_rms(24, 6), rel=1e-3)


def test_read_when_names_only_keys_that_exist():
    fields = SOAP.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in SOAP.READ_WHEN.items() for on in when)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(betas=(.9, 1.0)), dict(precondition_frequency=0), dict(eps=0.), dict(momentum=.9),
                  dict(first_step="skipped"), dict(then="lion"), dict(shampoo_beta=1.)):
        with pytest.raises(ValidationError):
            SOAP(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("options", [dict(), dict(then="muon", momentum_basis="unrotated")])
def test_a_compiled_update_equals_an_eager_one(options):
    rule, shape = SOAP(weight_decay=.3, **options, **SAME), (2, 12, 8)
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
