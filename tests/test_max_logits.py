"""The largest attention logit of every head, which QK-clip steers by, against all pairs of positions in float64."""
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import CHUNK, attend, largest_logits
from model.config import ModelConfig
from model.gpt import GPT

SIZES = {"vocab_size": 61, "layers": 2, "heads": 3, "width": 24}
ROTARY = SIZES | {"positions": "rotary", "norm": "rmsnorm", "biases": False, "tied": False}
CONFIGS = {
    "gpt2": SIZES,
    "rotary": ROTARY,
    "own_scale": ROTARY | {"attn_scale": 0.12, "biases": True, "rotary": "half", "value_residual": "learned"},
    "qk_norm_before_rotary": ROTARY | {"qk_norm": "before_rotary"},
    "qk_norm_after_rotary": ROTARY | {"qk_norm": "after_rotary"},
}
BOTH = pytest.mark.parametrize("form", ["matmul", "sdpa"])


def scrambled(config, seq_len, dtype=torch.float32, track_logits=True):
    model = GPT(ModelConfig(**config), seq_len, dtype, track_logits=track_logits)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
    return model


def some_tokens(rows, t, seed=2):
    return torch.randint(61, (rows, t), generator=torch.Generator().manual_seed(seed))


def brute_force(q, k, scale):
    """(heads,) in float64 from q and k (b, t, h, d), a query at a time, which sees itself and what came before."""
    q, k = q.double(), k.double()
    seen = [torch.einsum("bhd,bjhd->bjh", q[:, i], k[:, :i + 1]).amax((0, 1)) for i in range(q.shape[1])]
    return torch.stack(seen).amax(0) * scale


def true_maxima(model, tokens):
    """{attention: (heads,)}, from what enters every attention."""
    entered = {}
    hooks = [attn.register_forward_pre_hook(lambda _, args, name=name: entered.update({name: args}))
             for name, attn in model.attentions().items()]
    with torch.no_grad():
        model(tokens, tokens)
    for hook in hooks:
        hook.remove()
    maxima = {}
    for name, (x, _, rotation) in entered.items():
        attn, heads = model.attentions()[name], model.config.heads
        q, k = (x @ linear.weight.T + (0 if linear.bias is None else linear.bias) for linear in (attn.q, attn.k))
        q, k = (attn.place(y.unflatten(-1, (heads, -1)), rotation).detach() for y in (q, k))
        maxima[name] = brute_force(q, k, model.config.attn_scale or q.shape[-1] ** -0.5)
    return maxima


def assert_maxima(model, expected, rtol=1e-5):
    found = model.max_logits()
    assert list(found) == list(expected)
    for name, largest in found.items():
        assert largest.dtype == torch.float32 and largest.shape == (model.config.heads,)
        torch.testing.assert_close(largest.double(), expected[name], rtol=rtol, atol=0)


class Recorder(TorchDispatchMode):
    """The names of all operations and the size of their largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


# --- the values

@BOTH
@pytest.mark.parametrize("config", CONFIGS)
def test_max_logits_equal_those_of_all_visible_pairs_in_float64(config, form):
    t = 2 * CHUNK + 37
    model, tokens = scrambled(CONFIGS[config] | {"attention": form}, t), some_tokens(2, t)
    model(tokens, tokens)
    expected = true_maxima(model, tokens)
    assert_maxima(model, expected)                                              # measured: at most 2e-7
    assert len({round(x, 3) for maxima in expected.values() for x in maxima.tolist()}) == 6     # all different


@BOTH
def test_max_logits_are_those_of_all_micro_batches_until_they_are_reset(form):
    model = scrambled(CONFIGS["rotary"] | {"attention": form}, 40)
    batches = [some_tokens(1, 40, seed) for seed in range(6)]
    one_by_one = [true_maxima(model, tokens) for tokens in batches]
    together = {name: torch.stack([maxima[name] for maxima in one_by_one]).amax(0) for name in one_by_one[0]}
    assert any((together[name] > torch.maximum(one_by_one[0][name], one_by_one[-1][name])).any() for name in together)
    for tokens in batches:
        model(tokens, tokens).backward()
    assert_maxima(model, together)
    model.reset_max_logits()
    assert all((largest == -torch.inf).all() for largest in model.max_logits().values())
    model(batches[0], batches[0])
    assert_maxima(model, one_by_one[0])


@BOTH
@pytest.mark.parametrize("t", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_a_huge_logit_with_a_later_key_does_not_count_and_the_diagonal_does(t, form):
    q, k, v = torch.randn(3, 1, t, 2, 4, generator=torch.Generator().manual_seed(0))
    for j in range(t):
        q_j, k_j = q.clone(), k.clone()
        k_j[:, j] *= 1e6                        # huge with every query, of which those up to j may not see it
        q_j[:, j:] = 0
        seen = torch.full((2,), -torch.inf)
        attend(q_j, k_j, v, 1.0, form, seen)
        torch.testing.assert_close(seen.double(), brute_force(q_j, k_j, 1.0), rtol=1e-5, atol=1e-6)
        if j in (0, CHUNK - 1, CHUNK, t - 1):
            q_j[:, j] = k_j[:, j]
            attend(q_j, k_j, v, 1.0, form, seen)
            torch.testing.assert_close(seen, k_j[0, j].square().sum(-1), rtol=1e-5, atol=0)


@BOTH
def test_maxima_below_zero_are_seen_as_such(form):
    q = torch.rand(2, 9, 3, 8) + 0.1
    seen = torch.full((3,), -torch.inf)
    attend(q, -q, q, None, form, seen)
    assert (seen < 0).all()
    torch.testing.assert_close(seen.double(), brute_force(q, -q, 8 ** -0.5))


@BOTH
def test_bfloat16_maxima_are_right_to_bfloat16s_rounding(form):
    q, k = torch.randn(2, 2, 150, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = torch.full((3,), -torch.inf)
    attend(q, k, k, None, form, seen)
    torch.testing.assert_close(seen.double(), brute_force(q, k, 0.25), rtol=2 ** -8, atol=0)     # measured: 2^-10


# --- what else it does: nothing

@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_to_the_bit_with_tracking(dtype, form):
    tokens, results = some_tokens(2, CHUNK + 9), []
    for track in (False, True):
        model = scrambled(CONFIGS["gpt2"] | {"attention": form}, CHUNK + 9, dtype, track)
        loss = model(tokens, tokens.roll(-1, 1))
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_tracking_changes_no_parameter_name_and_no_checkpoint():
    plain, tracking = (scrambled(SIZES, 8, track_logits=track) for track in (False, True))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in tracking.named_parameters()]
    assert list(plain.state_dict()) == list(tracking.state_dict()) == [n for n, _ in plain.named_parameters()]
    assert not list(plain.buffers()) and plain.max_logits() == {}
    plain.load_state_dict(tracking.state_dict())
    tracking.load_state_dict(plain.state_dict())
    with torch.device("meta"):
        assert GPT(ModelConfig(**SIZES), 8, track_logits=True).max_logits()["blocks.1.attn"].is_meta
    assert tracking.to(torch.device("meta")).max_logits()["blocks.1.attn"].is_meta          # they move with the model


@BOTH
def test_without_tracking_or_without_gradients_nothing_is_computed(form):
    tokens, counts = some_tokens(1, 8), []
    for track, grad in ((False, True), (True, False), (True, True)):
        model = scrambled(SIZES | {"attention": form}, 8, track_logits=track)
        with Recorder() as recorder, torch.set_grad_enabled(grad):
            model(tokens, tokens)
        counts.append(len([name for name in recorder.names if "amax" in name or "maximum" in name]))
        assert grad or all((largest == -torch.inf).all() for largest in model.max_logits().values())
    assert counts[:2] == [0, 0] and counts[2] >= 4


def test_logits_of_at_most_one_chunk_of_queries_are_in_memory():
    b, h, t, d = 2, 3, 4 * CHUNK, 8
    q, k = torch.randn(2, b, h, t, d)
    with Recorder() as recorder:
        largest_logits(q, k, 1.0)
    assert recorder.largest == b * h * CHUNK * t


# --- compiled

def assert_compiled_tracks(backend, form, layers):
    config = CONFIGS["rotary"] | {"attention": form, "layers": layers}
    model, tokens = scrambled(config, CHUNK + 9), some_tokens(2, CHUNK + 9)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    others, expected = some_tokens(2, CHUNK + 9, 3), {}
    for seen in (tokens, others):
        for name, maxima in true_maxima(model, seen).items():
            expected[name] = torch.maximum(expected.get(name, maxima), maxima)
        compiled(seen, seen).backward()
        assert_maxima(model, expected)
    model.reset_max_logits()
    with torch.no_grad():
        compiled(tokens, tokens)
    assert all((largest == -torch.inf).all() for largest in model.max_logits().values())
    compiled(tokens, tokens).backward()
    assert_maxima(model, true_maxima(model, tokens))


@BOTH
def test_compiled_without_graph_breaks_it_tracks_the_same(form):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_compiled_tracks("aot_eager", form, layers=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2     # with and without gradients


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@BOTH
def test_compiled_by_inductor_it_tracks_the_same(form):
    assert_compiled_tracks("inductor", form, layers=1)


# --- what belongs to what

def test_qk_parameters_are_the_weights_and_biases_of_queries_and_keys():
    model = GPT(ModelConfig(**SIZES), 8)
    assert model.qk_parameters() == {f"blocks.{i}.attn": [f"blocks.{i}.attn.q.weight", f"blocks.{i}.attn.q.bias",
                                                          f"blocks.{i}.attn.k.weight", f"blocks.{i}.attn.k.bias"]
                                     for i in range(2)}
    model = GPT(ModelConfig(**ROTARY), 8, track_logits=True)
    assert model.qk_parameters()["blocks.1.attn"] == ["blocks.1.attn.q.weight", "blocks.1.attn.k.weight"]
    assert list(model.qk_parameters()) == list(model.max_logits())
    assert {n for names in model.qk_parameters().values() for n in names} <= dict(model.named_parameters()).keys()
