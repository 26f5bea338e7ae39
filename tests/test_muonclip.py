import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data.shards import open_shard
from model.config import ModelConfig
from model.gpt import GPT
from optim.blocks import rescale_heads
from optim.muonclip import MuonClip
from tests import oracles
from tests.draws import gradients, hyper, weights


def run(rule, W, grads, lr=.01, momentum=.95, weight_decay=.5):
    """Updates with a learning rate and a momentum that both move, as schedules move them."""
    state = rule.init(W)
    for t, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=lr * (1 + t % 3), momentum=momentum - .01 * (t % 5),
                                       weight_decay=weight_decay, t=t + 1))
    return state


def oracle_run(W, grads, lr=.01, momentum=.95, weight_decay=.5, preset="kj5"):
    """(W, M) of one matrix in float64: Kimi K2, arXiv:2507.20534, Algorithm 1, lines 3 to 6."""
    W, M = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for t, G in enumerate(grads):
        eta, mu = lr * (1 + t % 3), momentum - .01 * (t % 5)
        M = mu * M + G.double()
        O = oracles.newton_schulz(M, preset) * .2 * max(W.shape) ** .5
        W = W - eta * (O + weight_decay * W)
    return W, M


def clip_oracle(S, tau):
    """√γ of one head, a number at a time."""
    return 1.0 if S <= tau else (tau / S) ** .5


# --- the update

@pytest.mark.parametrize("preset", oracles.POLYNOMIALS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)], ids=str)
def test_muonclip_equals_its_equations_in_float64(shape, preset):
    W, grads = weights((3, *shape)), gradients((3, *shape))
    expected = [oracle_run(W[i], [G[i] for G in grads], preset=preset) for i in range(3)]
    state = run(MuonClip(ns_coefficients=preset, ns_dtype="float32"), W, grads)
    for i, (W_i, M_i) in enumerate(expected):
        assert (W[i] - W_i).norm() < 1e-6 * W_i.norm()                 # measured: 1.5e-7, for polar_express5 4e-7
        assert (state["momentum"][i] - M_i).norm() < 1e-6 * M_i.norm()


def test_in_bfloat16_it_stays_close_to_its_equations():
    W, start, grads = weights(), weights(), gradients()
    expected = torch.stack([oracle_run(W[i], [G[i] for G in grads])[0] for i in range(3)])
    run(MuonClip(ns_dtype="bfloat16"), W, grads)
    assert (W - expected).norm() < 2e-2 * (expected - start).norm()    # measured: 4e-3


def test_muonclip_stays_close_to_torch_muon_without_nesterov():
    # torch's momentum is an average, which points the same way while μ is constant; it orthogonalises in bfloat16.
    W, grads, start = weights(), gradients(), weights()[0]
    p = torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon([p], lr=.02, weight_decay=.1, nesterov=False, adjust_lr_fn="match_rms_adamw")
    rule = MuonClip(ns_dtype="bfloat16")
    state = rule.init(W)
    for G in grads:
        rule.update(W, G, state, hyper(lr=.02, momentum=.95, weight_decay=.1))
        p.grad = G[0].clone()
        reference.step()
    assert (W[0] - p).norm() < 2e-2 * (p - start).norm()               # measured: 6e-3


def test_muonclip_stays_close_to_pytorch_optimizers_with_clipping():
    library = pytest.importorskip("pytorch_optimizer")
    grads, logits = gradients((2, 24, 16)), gradients((4,))
    q, k = (torch.nn.Parameter(W.clone()) for W in weights((2, 24, 16)))
    groups = [dict(params=[p], use_muon=True, attention_name="attn", qk_clip=role)
              for p, role in ((q, "query"), (k, "key"))]
    reference = library.MuonClip(groups, lr=.02, momentum=.95, weight_decay=.1, qk_clip_threshold=30.)
    W, rule = weights((2, 24, 16)), MuonClip(ns_dtype="bfloat16", tau=30.)
    state = rule.init(W)
    for G, S in zip(grads, logits):
        S = 30 + 10 * S                                                # 36 times of 80 a head exceeds τ
        q.grad, k.grad = G[0].clone(), G[1].clone()
        reference.step(attention_max_logits={"attn": S})
        rule.update(W, G, state, hyper(lr=.02, momentum=.95, weight_decay=.1))
        for matrix in W:
            rescale_heads(matrix, rule.clip_factors(S))
    for mine, theirs in zip(W, (q, k)):
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()           # measured: 2e-3


def test_scheduled_values_come_from_h_and_not_from_the_rule():
    results = []
    for rule in (MuonClip(lr=1., weight_decay=2., momentum=.3), MuonClip(lr=4., weight_decay=5., momentum=.6)):
        W = weights()
        state = rule.init(W)
        for G in gradients(count=2):
            rule.update(W, G, state, hyper(lr=.1, weight_decay=.2, momentum=.9))
        results.append(W)
    assert torch.equal(*results)


def test_the_defaults_are_k2s():
    rule = MuonClip()
    assert (rule.lr, rule.momentum, rule.weight_decay, rule.tau) == (2e-4, .95, .1, 100)
    assert (rule.ns_coefficients, rule.ns_steps) == ("kj5", None)


def test_steps_have_an_rms_of_a_fifth_of_the_learning_rate():
    rule = MuonClip(ns_coefficients="exact12", ns_dtype="float32")
    for shape in ((2, 32, 8), (2, 8, 32), (2, 16, 16)):
        W = torch.zeros(shape)
        rule.update(W, gradients(shape)[0], rule.init(W), hyper(lr=1, momentum=.9, weight_decay=0))
        assert W.square().mean().sqrt() == pytest.approx(rule.step_rms(*shape[1:]), rel=1e-3)


def test_without_decay_the_step_does_not_depend_on_the_weights():
    rule, W, nothing = MuonClip(), weights().double(), torch.zeros(3, 24, 16, dtype=torch.float64)
    run(rule, W, gradients(count=3), weight_decay=0)
    run(rule, nothing, gradients(count=3), weight_decay=0)
    torch.testing.assert_close(W - weights().double(), nothing, rtol=0, atol=1e-14)


def test_matrices_of_a_stack_do_not_see_each_other():
    grads = gradients()
    together, alone = weights(), weights()[1:2].clone()
    run(MuonClip(ns_dtype="float32"), together, grads)
    run(MuonClip(ns_dtype="float32"), alone, [G[1:2] for G in grads])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_the_state_is_one_momentum_in_float32_or_better():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        state = MuonClip().init(weights(dtype=dtype))
        assert {(key, t.dtype, t.shape) for key, t in state.items()} == {("momentum", kept, (3, 24, 16))}
    assert MuonClip().state_numbers(24, 16) == state["momentum"][0].numel()


def test_bfloat16_weights_are_rounded_once():
    W = weights(dtype=torch.bfloat16)
    expected = torch.stack([oracle_run(W_i, [G], weight_decay=40)[0] for W_i, G in zip(W, gradients()[0])])
    run(MuonClip(ns_dtype="float32"), W, gradients(count=1), weight_decay=40)
    assert (W == expected.bfloat16()).float().mean() > .99


def test_update_leaves_the_gradient_alone_and_shares_no_memory_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        W, G = weights(dtype=dtype), gradients()[0].to(dtype)
        before = G.clone()
        state = run(MuonClip(), W, [G])
        assert torch.equal(G, before) and torch.equal(state["momentum"], G.float())
        assert G.data_ptr() not in (W.data_ptr(), state["momentum"].data_ptr())


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_tiny_and_huge_gradients_make_steps_of_the_usual_size(magnitude, ns_dtype):
    steps = []
    for factor in (1, magnitude):
        W = weights()
        run(MuonClip(ns_dtype=ns_dtype), W, [G * factor for G in gradients()])
        steps.append(W - weights())
    assert (steps[1] - steps[0]).norm() < (2e-2 if ns_dtype == "bfloat16" else 1e-5) * steps[0].norm()


@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_a_rank_one_gradient_makes_a_step_of_the_usual_size(magnitude):
    u, v = gradients((3, 24, 1))[0], gradients((3, 1, 16))[1]
    W = torch.zeros(3, 24, 16)
    run(MuonClip(), W, [u @ v * magnitude], lr=1)
    assert all(.6 < norm / (.2 * 24 ** .5) < 1.3 for norm in torch.linalg.matrix_norm(W, 2))


def test_a_zero_gradient_lets_momentum_and_decay_go_on():
    rule, W, nothing = MuonClip(ns_dtype="float32"), weights(), torch.zeros(3, 24, 16)
    state = rule.init(W)
    rule.update(W, nothing, state, hyper(lr=.1, momentum=.9, weight_decay=.5))
    assert torch.allclose(W, weights() * .95, rtol=1e-6) and not state["momentum"].any()
    rule.update(W, gradients()[0], state, hyper(lr=.1, momentum=.9, weight_decay=0))
    before, momentum = W.clone(), state["momentum"].clone()
    rule.update(W, nothing, state, hyper(lr=.1, momentum=.9, weight_decay=0))
    assert torch.allclose(state["momentum"], .9 * momentum) and (W - before).norm() > .1


def test_impossible_hyperparameters_are_refused():
    for wrong in (dict(tau=0), dict(tau=-1), dict(momentum=1.0), dict(ns_coefficients="kj6"), dict(ns_steps=0),
                  dict(ns_dtype="float16"), dict(nesterov=True), dict(lr=-1)):
        with pytest.raises(ValidationError):
            MuonClip(**wrong)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_a_compiled_update_equals_an_eager_one():
    rule = MuonClip(ns_dtype="float32")
    W, compiled_W = weights(), weights()
    state, compiled_state = rule.init(W), rule.init(W)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    for t, G in enumerate(gradients(count=2), 1):
        h = hyper(lr=.02 * t, momentum=.9, weight_decay=.1)
        rule.update(W, G, state, h)
        compiled(compiled_W, G, compiled_state, h)
    assert (compiled_W - W).norm() < 1e-6 * W.norm()
    assert torch.allclose(compiled_state["momentum"], state["momentum"], rtol=1e-5, atol=1e-7)


# --- QK-clip

def test_clip_factors_are_the_root_of_tau_over_the_largest_logit_and_at_most_1():
    S = torch.tensor([-torch.inf, -1e4, -1, 0, 1e-30, 99.9, 100, 100.001, 200, 400, 1e4, 1e38], dtype=torch.float64)
    expected = torch.tensor([clip_oracle(s, 100) for s in S.tolist()], dtype=torch.float64)
    torch.testing.assert_close(MuonClip().clip_factors(S), expected, rtol=1e-15, atol=0)
    single = MuonClip().clip_factors(S.float())
    assert single.dtype == torch.float32 and (single[:7] == 1).all() and (single[7:] < 1).all()
    torch.testing.assert_close(single.double(), expected, rtol=2e-7, atol=0)
    assert MuonClip(tau=.25).clip_factors(torch.tensor([.25, 1])).tolist() == [1, .5]


@pytest.mark.parametrize("tau", [100., 30., .1, 1e-3])
def test_a_largest_logit_of_tau_itself_is_left_alone(tau):
    for dtype in (torch.float32, torch.float64):
        at = torch.tensor([tau], dtype=dtype)
        S = torch.stack([at, torch.nextafter(at, torch.zeros_like(at))])
        assert (MuonClip(tau=tau).clip_factors(S) == 1).all()


def test_heads_that_are_not_finite_are_left_alone():
    assert (MuonClip().clip_factors(torch.tensor([torch.inf, torch.nan, -torch.inf])) == 1).all()


def clip(model, rule, largest):
    """What the driver does after a step."""
    for name, parameters in model.qk_parameters().items():
        for parameter in parameters:
            rescale_heads(model.get_parameter(parameter), rule.clip_factors(largest[name]))


def rows_of(model, head):
    """What makes this head's queries and keys, copied."""
    weights = [model.get_parameter(name) for names in model.qk_parameters().values() for name in names]
    return [w.detach().unflatten(0, (model.config.heads, -1))[head].clone() for w in weights]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
def test_after_the_clip_the_same_input_gives_exceeding_heads_tau_and_the_others_what_they_had(
        attention, biases, positions):
    # One layer: the queries and keys of a second would get another input.
    model = GPT(ModelConfig(vocab_size=61, layers=1, heads=5, width=40, biases=biases, positions=positions,
                            attention=attention, attn_scale=.3), 32, track_logits=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    tokens = torch.randint(61, (4, 32), generator=generator)
    model(tokens, tokens)
    before = model.max_logits()["blocks.0.attn"].clone()
    rule = MuonClip(tau=before.median().item())                        # two of the five heads exceed it
    kept = [rows_of(model, head) for head in range(5)]
    clip(model, rule, model.max_logits())
    model.reset_max_logits()
    model(tokens, tokens)
    after = model.max_logits()["blocks.0.attn"]
    for head in range(5):
        same = [torch.equal(a, b) for a, b in zip(rows_of(model, head), kept[head])]
        if before[head] > rule.tau:
            assert not any(same)
            assert after[head].item() == pytest.approx(rule.tau, rel=1e-6)             # measured: 3e-7
        else:
            assert all(same) and after[head] == before[head]
    assert (before > rule.tau).sum() == 2


def test_every_logit_of_a_clipped_head_shrinks_by_gamma_in_float64():
    x, tau = torch.randn(50, 12, dtype=torch.float64), 2.0
    W, b = torch.randn(2, 8, 12, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)    # q and k, 2 heads

    def logits():
        q, k = ((x @ W[i].T + b[i]).unflatten(-1, (2, 4)).transpose(0, 1) for i in range(2))
        return q @ k.mT / 2                                            # (heads, 50, 50)

    before = logits()
    S = before.amax((1, 2))
    S[1] = 1.0                                                         # as if the second head had not exceeded it
    for parameter in (*W, *b):
        rescale_heads(parameter, MuonClip(tau=tau).clip_factors(S))
    after = logits()
    torch.testing.assert_close(after[0], before[0] * (tau / S[0]), rtol=1e-12, atol=1e-13)
    assert after[0].max().item() == pytest.approx(tau, rel=1e-13) and torch.equal(after[1], before[1])


def test_rescaling_writes_in_place_into_views_and_rounds_bfloat16_once():
    bank = weights((3, 24, 16), torch.bfloat16)
    parameter, before = torch.nn.Parameter(bank[1]), bank.clone()
    factors = MuonClip().clip_factors(torch.tensor([50, 150, -torch.inf, 333.]))
    rescale_heads(parameter, factors)
    exact = before[1].double() * factors.double().repeat_interleave(6)[:, None]
    assert torch.equal(bank[1], exact.bfloat16()) and not torch.equal(bank[1], before[1])
    assert torch.equal(bank[1, :6], before[1, :6]) and torch.equal(bank[1, 12:18], before[1, 12:18])
    assert torch.equal(bank[0], before[0]) and torch.equal(bank[2], before[2])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        rescale_heads(parameter, factors[:3].repeat(3))                # 24 rows are not 9 heads


def train(corpus, rule, clipping, steps):
    """The mean loss of the last 10 steps, and the largest logit of each step's batch before it and after its clip."""
    model = GPT(ModelConfig(vocab_size=64, layers=2, heads=2, width=32, positions="rotary", norm="rmsnorm",
                            tied=False), 32, track_logits=True)
    model.init_weights(0)
    hidden = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")}
    others = [p for name, p in model.named_parameters() if name not in hidden]
    state, aux = {name: rule.init(p[None]) for name, p in hidden.items()}, torch.optim.AdamW(others, lr=.01)
    h = hyper(lr=rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay)
    tokens = torch.from_numpy(np.array(open_shard(corpus / "train_000.bin"), dtype=np.int64))
    losses, before, after = [], [], []

    def forward(first):
        model.reset_max_logits()
        inputs, targets = (tokens[i:i + 256].view(8, 32) for i in (first, first + 1))
        loss = model(inputs, targets) / 256
        return loss, max(largest.max().item() for largest in model.max_logits().values())

    for step in range(steps):
        loss, largest = forward(step * 256 % 4608)
        losses.append(loss.item())
        before.append(largest)
        model.zero_grad()
        loss.backward()
        aux.step()
        with torch.no_grad():
            for name, p in hidden.items():
                rule.update(p[None], p.grad[None], state[name], h)
        if clipping:
            clip(model, rule, model.max_logits())
        after.append(forward(step * 256 % 4608)[1])
    return sum(losses[-10:]) / 10, before, after


def test_logits_that_grow_without_qk_norm_stay_at_tau_with_the_clip_and_the_model_learns_as_well(corpus):
    rule = MuonClip(lr=.1, tau=10., ns_dtype="float32")                # 500 times K2's rate: growth in seconds
    loss, before, after = train(corpus, rule, clipping=False, steps=90)
    clipped_loss, _, clipped = train(corpus, rule, clipping=True, steps=90)
    first = next(step for step, largest in enumerate(before) if largest > rule.tau)
    assert 0 < first < 60 and after[:first] == clipped[:first]         # until then the clip does nothing, to the bit
    assert after[-1] > 3 * rule.tau                                    # measured: 63
    assert max(clipped) < 1.3 * rule.tau                               # measured: 12.1, by what one step adds
    assert clipped_loss < loss + .1                                    # measured: 1.75 and 1.83
