import shutil

import pytest
import torch
from pydantic import ValidationError

from optim.bases import FAILURES
from optim.shampoo import Shampoo
from tests.oracles_bases import failing_eigh, gradients, hyper, orthonormal, run, shampoo, weights


def oracle_run(W, grads, lr=.01, **options):
    W, s = W.double(), {}
    for t, G in enumerate(grads, 1):
        W = shampoo(W, G.double(), s, t, lr * (1 + (t - 1) % 3), **options)
    return W, s


SWITCHES = [
    (dict(), dict()),
    (dict(precondition_frequency=4), dict(every=4)),
    (dict(precondition_frequency=4, betas=(.9, .8), eps=1e-2, graft_eps=1e-3, weight_decay=.5),
     dict(every=4, betas=(.9, .8), eps=1e-2, graft_eps=1e-3, weight_decay=.5)),
    (dict(precondition_frequency=4, graft="sgd"), dict(every=4, graft="sgd")),
    (dict(precondition_frequency=4, graft="none"), dict(every=4, graft="none")),
    (dict(precondition_frequency=4, exponent=.5), dict(every=4, p=.5)),
    (dict(precondition_frequency=4, sides="smaller"), dict(every=4, p=.5)),
    (dict(precondition_frequency=4, sides="smaller", exponent=.3, graft="none"), dict(every=4, p=.3, graft="none")),
    (dict(precondition_frequency=1, sides="smaller", eps=0., graft_eps=1e-15, betas=(.9, .9)),
     dict(every=1, p=.5, eps=0., graft_eps=1e-15, betas=(.9, .9))),
]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=str)
@pytest.mark.parametrize("ours, equations", SWITCHES, ids=lambda s: "-".join(map(str, s)) or "defaults")
def test_shampoo_equals_its_equations_in_float64(ours, equations, shape):
    one = {} if ours.get("sides") != "smaller" else {"right": False} if shape[0] <= shape[1] else {"left": False}
    W, grads = weights((2, *shape)), gradients((2, *shape), 24)
    start = W.clone()
    expected = [oracle_run(W[i], [G[i] for G in grads], **equations, **one) for i in range(2)]
    state = run(Shampoo(**ours, stagger=False), W, grads)
    for i, (W_i, s) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-9 * (W_i - start[i]).norm()
        for side, key in (("left", "L"), ("right", "R")):
            assert side not in state or (state[side][i] - s[key]).norm() < 1e-12 * s[key].norm()


@pytest.mark.parametrize("graft", ["adam", "sgd", "none"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=str)
def test_with_given_roots_float32_equals_float64(shape, graft):
    W, grads = weights((2, *shape), torch.float32), gradients((2, *shape), 20, torch.float32)
    rule = Shampoo(weight_decay=.3, graft=graft)
    roots = [torch.stack([A @ A.T for A in gradients((d, d), 2)]) for d in shape]
    state, expected = rule.init(W), []
    state["root_left"].copy_(roots[0]), state["root_right"].copy_(roots[1])
    for i in range(2):
        W_i, s = W[i].double(), {}
        for t, G in enumerate(grads, 1):
            W_i = shampoo(W_i, G[i].double(), s, t, .01, weight_decay=.3, graft=graft, every=100,
                          given=(roots[0][i], roots[1][i]))
        expected.append(W_i)
    for t, G in enumerate(grads, 1):
        rule.update(W, G, state, hyper(lr=.01, weight_decay=.3, t=t))
    assert (W - torch.stack(expected)).norm() < 1e-6 * W.norm()                       # measured 2e-7


def test_shampoo_equals_pytorch_optimizers_where_both_do_the_same():
    """ScalableShampoo takes its momentum after the roots and does not correct the sides' averages: without momentum,
    and with the length of an SGD step, which scales do not change, both are one rule but in one point. The port
    renews roots before the update and uses them in it, so at updates 5, 10, ... it is ahead by one interval.
    """
    theirs = pytest.importorskip("pytorch_optimizer").ScalableShampoo
    W, grads = weights((1, 6, 10)), gradients((1, 6, 10), 23)
    p = torch.nn.Parameter(W[0].clone())
    rule = Shampoo(betas=(0., .9), graft="sgd", precondition_frequency=5, eps=0., stagger=False)
    optimizer = theirs([p], lr=.01, betas=(0., .9), nesterov=False, start_preconditioning_step=5, use_svd=True,
                       preconditioning_compute_steps=5, shape_interpretation=False, matrix_eps=0.)
    state = rule.init(W)
    for step, G in enumerate(grads):
        before = W[0].clone(), p.detach().clone()
        rule.update(W, G, state, hyper(lr=.01, weight_decay=0, t=step + 1))
        if rule.refresh_due(step, 0, 1):
            rule.refresh(state, step)
        p.grad = G[0].clone()
        optimizer.step()
        apart = ((W[0] - before[0]) - (p - before[1])).norm() / (p - before[1]).norm()
        assert apart > .1 if (step + 1) % 5 == 0 else apart < 1e-10


def test_published_settings_are_these():
    """modded-nanogpt's 2024-10-29 comparison, and track 3's #21 as far as it differs."""
    rule = Shampoo()
    assert (rule.lr, rule.betas, rule.eps, rule.weight_decay, rule.graft, rule.graft_eps) == (
        .0018, (.95, .95), 1e-12, 0, "adam", 1e-8)
    assert (rule.precondition_frequency, rule.max_dim, rule.sides, rule.exponent) == (10, 8192, "both", None)
    assert Shampoo(lr=.0015, betas=(.9, .95), weight_decay=.2, precondition_frequency=5, graft_eps=1e-10)


# ---- what a step is

def test_before_the_first_roots_a_step_is_the_grafts():
    for graft, expected in (("adam", torch.optim.AdamW), ("sgd", None), ("none", None)):
        W, grads = weights((1, 6, 10)), gradients((1, 6, 10), 4)
        p, M = torch.nn.Parameter(W.clone()), 0
        run(Shampoo(graft=graft), W, grads, lr=.01)
        optimizer = torch.optim.AdamW([p], betas=(.95, .95), weight_decay=0.)
        for t, G in enumerate(grads):
            M = .95 * M + .05 * G
            if graft == "adam":
                optimizer.param_groups[0]["lr"] = .01 * (1 + t % 3)
                p.grad = G.clone()
                optimizer.step()
            elif graft == "sgd":
                p.data -= .01 * (1 + t % 3) * M / (1 - .95 ** (t + 1))
        assert torch.allclose(W, p, rtol=1e-12)


def test_a_step_is_as_long_as_adams_whatever_the_roots():
    W, G = torch.zeros(3, 6, 10).double(), gradients((3, 6, 10), 1)[0]
    rule = Shampoo()
    state = rule.init(W)
    state["root_left"].copy_(orthonormal(3, 6, 1) * 1e9), state["root_right"].copy_(orthonormal(3, 10, 1) * 1e-3)
    rule.update(W, G, state, hyper(lr=.1, weight_decay=0, t=1))
    assert torch.allclose(W.square().mean((1, 2)).sqrt(), torch.full((3,), .1 * rule.step_rms(6, 10)).double())
    assert not torch.allclose(W.abs(), torch.full_like(W, .1), rtol=.1)


def test_without_a_graft_the_step_from_one_gradient_is_orthogonal():
    for sides in ("both", "smaller"):
        for shape in ((2, 6, 10), (2, 10, 6)):
            W, G = torch.zeros(shape).double(), gradients(shape, 1)[0]
            rule = Shampoo(graft="none", sides=sides, eps=0., precondition_frequency=1)
            run(rule, W, [G, G], lr=.5)
            assert torch.allclose(torch.linalg.svdvals(W), torch.ones(2, 6).double())     # the second step's lr is 1
            assert W.square().mean().sqrt() == pytest.approx(rule.step_rms(*shape[1:]))


# ---- when roots are renewed

def test_roots_are_renewed_at_the_documented_updates():
    assert [s + 1 for s in range(45) if Shampoo(stagger=False).refresh_due(s, 7, 9)] == [10, 20, 30, 40]
    assert [s + 1 for s in range(4) if Shampoo(precondition_frequency=1).refresh_due(s, 7, 9)] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 7, 72, 150])
def test_staggered_roots_spread_the_work(count):
    rule = Shampoo()
    times = [[s + 1 for s in range(100) if rule.refresh_due(s, i, count)] for i in range(count)]
    assert all(10 <= own[0] < 20 and {b - a for a, b in zip(own, own[1:])} == {10} for own in times)
    assert max(sum(t in own for own in times) for t in range(101)) <= -(-count // 10)


# ---- gradients out of the ordinary

@pytest.mark.parametrize("options", [dict(), dict(graft="sgd"), dict(graft="none", eps=0.), dict(sides="smaller"),
                                     dict(sides="smaller", eps=0., graft_eps=1e-30)])
@pytest.mark.parametrize("magnitude", [1e-20, 1e20, 1e37])
def test_tiny_and_huge_gradients_make_finite_steps(magnitude, options):
    sizes = []
    for factor in (1, magnitude):
        W = torch.zeros(2, 10, 6)
        state = run(Shampoo(precondition_frequency=2, **options), W,
                    [G * factor for G in gradients((2, 10, 6), 12, torch.float32)])
        assert all(t.isfinite().all() for t in (W, *state.values()))
        sizes.append(W.norm())
    if magnitude > 1 and options.get("graft") != "sgd":
        assert .3 < sizes[1] / sizes[0] < 3
    else:                                                # far below ε: as in Adam; and SGD's is the gradient's
        assert sizes[1] > 0


def test_a_huge_gradient_after_tiny_ones_makes_a_finite_step_of_adams_size():
    W, rule = torch.zeros(2, 10, 6), Shampoo(precondition_frequency=1)
    grads = [G * 1e-15 for G in gradients((2, 10, 6), 5, torch.float32)]
    state = run(rule, W, grads)
    before = W.clone()
    rule.update(W, grads[0] * 1e30, state, hyper(lr=.1, weight_decay=0, t=6))
    assert W.isfinite().all() and .01 < (W - before).square().mean().sqrt() < 1


@pytest.mark.parametrize("options", [dict(), dict(sides="smaller", eps=0.), dict(graft="none", eps=0.)])
@pytest.mark.parametrize("magnitude", [1e-3, 1, 1e20])
def test_a_rank_one_gradient_makes_a_finite_step_of_the_usual_size(magnitude, options):
    W, rule = torch.zeros(2, 10, 6), Shampoo(precondition_frequency=1, **options)
    u, v = gradients((2, 10, 1), 1, torch.float32)[0], gradients((2, 1, 6), 2, torch.float32)[1]
    state = run(rule, W, [u @ v * magnitude] * 7)
    steps = .01 * (2 + 3 + 1 + 2 + 3 + 1)
    assert all(t.isfinite().all() for t in (W, *state.values()))
    rank = 6 if rule.graft == "none" else 1              # of U, against an orthogonal matrix's
    assert .5 * steps < W.square().mean().sqrt() / rule.step_rms(10, 6) * rank ** .5 < 1.5 * (steps + .01)


@pytest.mark.parametrize("graft", ["adam", "sgd", "none"])
def test_a_zero_gradient_lets_momentum_and_decay_go_on(graft):
    rule, W = Shampoo(precondition_frequency=1, graft=graft), weights((2, 6, 6))
    state = rule.init(W)
    for step in range(3):                                # before any other gradient
        rule.update(W, torch.zeros_like(W), state, hyper(lr=.2, weight_decay=.5, t=step + 1))
        rule.refresh(state, step)
    assert torch.allclose(W, weights((2, 6, 6)) * .9 ** 3, rtol=1e-12)
    assert all(value.isfinite().all() for value in state.values())
    G = gradients((2, 6, 6), 1)[0]
    for step, G in ((3, G), (4, torch.zeros_like(W))):
        before = W.clone(), state["m"].clone()
        rule.update(W, G, state, hyper(lr=.2, weight_decay=0, t=step + 1))
        rule.refresh(state, step)
    assert torch.allclose(state["m"], .95 * before[1]) and (W - before[0]).norm() > .01


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        for graft in ("adam", "sgd", "none"):
            W, grads = weights((2, 6, 4), dtype), gradients((2, 6, 4), 3, dtype)
            before = [G.clone() for G in grads]
            state = run(Shampoo(graft=graft, precondition_frequency=2), W, grads)
            assert all(torch.equal(*pair) for pair in zip(grads, before)) and W.dtype == dtype
            assert not {G.data_ptr() for G in grads} & {t.data_ptr() for t in (W, *state.values())}
            assert {t.dtype for t in state.values()} == {torch.float32}


def test_bfloat16_weights_are_rounded_once():
    W, G = weights((1, 12, 12), torch.bfloat16), gradients((1, 12, 12), 1)[0]
    expected = oracle_run(W[0].double(), [G[0]], weight_decay=40.)[0]
    run(Shampoo(weight_decay=40.), W, [G])
    assert (W[0] == expected.bfloat16()).float().mean() > .98


def test_without_decay_the_step_does_not_depend_on_the_weight():
    for graft in ("adam", "sgd", "none"):
        steps = []
        for start in (torch.zeros(2, 6, 4).double(), weights((2, 6, 4))):
            W = start.clone()
            run(Shampoo(graft=graft, precondition_frequency=2), W, gradients((2, 6, 4), 5))
            steps.append(W - start)
        assert torch.allclose(*steps, atol=1e-12)


def test_one_matrixs_path_does_not_depend_on_the_others():
    W, grads = weights((3, 8, 6), torch.float32), gradients((3, 8, 6), 12, torch.float32)
    alone = W[1:2].clone()
    run(Shampoo(precondition_frequency=3), W, grads)
    run(Shampoo(precondition_frequency=3), alone, [G[1:2] for G in grads])
    assert torch.equal(W[1:2], alone)


@pytest.mark.filterwarnings("ignore:a .* side was not decomposed")
def test_failing_roots_are_retried_and_then_kept(monkeypatch):
    W, rule = torch.zeros(2, 10, 6), Shampoo()
    state = run(rule, W, gradients((2, 10, 6), 10, torch.float32))
    expected = state["root_left"].clone()
    FAILURES.clear()
    failing_eigh(monkeypatch, [torch.float32])
    rule.refresh(state, 9)
    assert FAILURES == {"solved in float64": 4} and torch.allclose(state["root_left"], expected, rtol=1e-2, atol=1e-2)
    failing_eigh(monkeypatch, [torch.float64])
    before = state["root_left"].clone()
    rule.refresh(state, 19)
    assert FAILURES["kept the old"] == 4 and torch.equal(state["root_left"], before)


# ---- the rest of the interface

def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for lr, weight_decay in ((1., 2.), (3., 4.)):
        rule, W = Shampoo(lr=lr, weight_decay=weight_decay), weights((2, 6, 4))
        state = rule.init(W)
        for t, G in enumerate(gradients((2, 6, 4), 3), 1):
            rule.update(W, G, state, hyper(lr=.1, weight_decay=.2, t=t))
        results.append(W)
    assert torch.equal(*results)


def test_state_numbers_are_those_that_init_makes():
    for rule in (Shampoo(), Shampoo(max_dim=8), Shampoo(graft="sgd"), Shampoo(sides="smaller")):
        for shape in ((12, 8), (8, 12), (8, 8)):
            assert sum(t.numel() for t in rule.init(weights((1, *shape))).values()) == rule.state_numbers(*shape)
    assert Shampoo().state_numbers(768, 3072) == 2 * 768 * 3072 + 2 * (768 ** 2 + 3072 ** 2)
    assert Shampoo(graft="none", sides="smaller").state_numbers(768, 3072) == 768 * 3072 + 2 * 768 ** 2
    for rule in (Shampoo(max_dim=8), Shampoo(max_dim=8, sides="smaller")):
        with pytest.raises(ValueError, match="12×9.*max_dim 8.*adamw"):
            rule.init(weights((1, 12, 9)))


def test_a_side_beyond_max_dim_gets_no_root():
    W, grads = weights((2, 12, 8)), gradients((2, 12, 8), 12)
    expected = [oracle_run(W[i], [G[i] for G in grads], every=4, left=False)[0] for i in range(2)]
    state = run(Shampoo(max_dim=8, precondition_frequency=4, stagger=False), W, grads)
    assert set(state) == {"m", "v", "right", "root_right"}
    assert (W - torch.stack(expected)).norm() < 1e-9 * W.norm()


def test_flops_are_those_of_the_products_and_roots():
    d = 768
    assert Shampoo().flops(d, d) == pytest.approx(22 * d ** 2 + 2 * (4 * d ** 3 + 11 * d ** 3 / 10))
    assert Shampoo(sides="smaller").flops(d, 4 * d) == pytest.approx(22 * 4 * d ** 2 + 16 * d ** 3 + 1.1 * d ** 3)


def test_read_when_names_only_keys_that_exist():
    fields = Shampoo.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in Shampoo.READ_WHEN.items() for on in when)


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(betas=(.9, 1.0)), dict(precondition_frequency=0), dict(eps=-1.), dict(momentum=.9),
                  dict(graft="lion"), dict(exponent=0.), dict(exponent=-.25), dict(sides="left")):
        with pytest.raises(ValidationError):
            Shampoo(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("graft", ["adam", "none"])
def test_a_compiled_update_equals_an_eager_one(graft):
    rule, shape = Shampoo(weight_decay=.3, graft=graft), (2, 12, 8)
    W, compiled_W = weights(shape, torch.float32), weights(shape, torch.float32)
    state, compiled_state = rule.init(W), rule.init(W)
    for s in (state, compiled_state):
        s["root_left"].copy_(orthonormal(2, 12, 5)), s["root_right"].copy_(orthonormal(2, 8, 6))
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(shape, 3, torch.float32), 1):
        h = hyper(lr=.2 * t, weight_decay=.3, t=t)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert all(torch.allclose(compiled_state[k], state[k], rtol=1e-5, atol=1e-6) for k in state)
