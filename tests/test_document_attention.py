"""Attention over documents and in a window: three forms against a loop over documents and queries in float64."""
import shutil

import pytest
import torch
import torch.nn.attention.varlen as varlen

from model import attention
from model.attention import attend, flash_takes, form_on
from model.config import ModelConfig
from model.documents import Sight, first_seen, mask, row_bounds
from model.gpt import GPT
from tests.test_max_logits import Recorder
from tests.test_model import FORMS, scrambled, some_tokens

B, T = 3, 21
WINDOWS = [None, 1, 2, 6, T - 1, T, 3 * T]


def random_bounds(seed, k=24):
    """cu_seqlens whose boundaries are the rows' and some others, some twice (an empty document), filled up to k."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, B * T + 1, (10,), generator=generator).tolist()
    places = sorted([*range(0, B * T + 1, T), *inner, *inner[:3]])
    return torch.tensor(places + [B * T] * (k - len(places)), dtype=torch.int32)


def loop(q, k, v, scale, bounds, window):
    """One document and one query at a time; q, k, v (b·t, h, d) -> the same shape."""
    rows = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        for i in range(start, stop):
            j = slice(max(start, i - (window or i + 1) + 1), i + 1)
            weights = (torch.einsum("hd,jhd->hj", q[i], k[j]) * scale).softmax(-1)
            rows.append(torch.einsum("hj,jhd->hd", weights, v[j]))
    return torch.stack(rows)


def flash(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, grad=None):
    """What FlashAttention's documentation says that it computes: a query i of n sees the keys j of m with
    i+m-n-left <= j <= i+m-n+right (-1: no limit); queries from max_q on are never computed. The output, or with
    the gradient of the output those of q, k and v."""
    left, right, scale = window[0], 0 if is_causal else window[1], scale or q.shape[-1] ** -0.5
    y, *grads = (torch.zeros_like(x) for x in (q, q, k, v))
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        n, m = min(int(b - a), max_q), min(int(d - c), max_k)
        rows, keys = slice(a, a + n), slice(c, c + m)
        back = torch.arange(n)[:, None] + m - n - torch.arange(m)
        hidden = ((back > left) if left >= 0 else False) | ((-back > right) if right >= 0 else back > m)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[keys]) * scale
        P = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        y[rows] = torch.einsum("hij,jhd->ihd", P, v[keys])
        if grad is not None:
            dP = torch.einsum("ihd,jhd->hij", grad[rows], v[keys])
            dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * scale
            grads[0][rows] = torch.einsum("hij,jhd->ihd", dS, k[keys])
            grads[1][keys] = torch.einsum("hij,ihd->jhd", dS, q[rows])
            grads[2][keys] = torch.einsum("hij,ihd->jhd", P, grad[rows])
    return y if grad is None else tuple(grads)


@pytest.fixture
def flash_on_cpu():
    """A CPU kernel for torch's own operation, so that its public function, its checks and its autograd are what runs."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
        assert cu_q.dtype == cu_k.dtype == torch.int32              # as the GPU's kernel asks for
        return (flash(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size),
                q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64))

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window_size=None):
        return flash(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size, grad)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.fixture
def form(request, monkeypatch):
    """One of the three forms, also where a model asks for it."""
    if request.param == "varlen":
        request.getfixturevalue("flash_on_cpu")
        monkeypatch.setattr(GPT, "attention_over", lambda self, documents: "varlen")
    return request.param


EVERY_FORM = pytest.mark.parametrize("form", ["matmul", "sdpa", "varlen"], indirect=True)


def sight_of(form, bounds, window, longest=T):
    sight = Sight(bounds, window, longest, None)
    return sight if form == "varlen" else sight._replace(mask=mask(first_seen(sight, B, T, "cpu"), 0, T, T).double())


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, 2, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]


# --- the mathematics

@EVERY_FORM
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", [True, False])
def test_values_and_gradients_equal_a_loop_over_documents(form, window, documents):
    for seed in range(3):
        bounds = random_bounds(seed) if documents else None
        rows = row_bounds(B, T, "cpu") if bounds is None else bounds
        q, k, v, grad = drawn(seed=seed)
        expected = loop(*(x.flatten(0, 1) for x in (q, k, v)), 0.3, rows, window).view_as(q)
        longest = int(rows.diff().max())
        y = attend(q, k, v, 0.3, form, None, sight_of(form, bounds, window, longest=longest))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(z, (q, k, v), grad.detach()) for z in (y, expected)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EVERY_FORM
@pytest.mark.parametrize("window", [None, 1, 6])
def test_the_largest_logits_are_those_of_visible_pairs(form, window, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 8)                      # several chunks, the last one short
    larger_ones_hidden = False
    for seed in range(4):
        bounds, (q, k, v, _) = random_bounds(seed), drawn(seed=seed)
        seen, expected = torch.full((2,), -torch.inf), torch.full((2,), -torch.inf, dtype=torch.float64)
        attend(q, k, v, 0.3, form, seen, sight_of(form, bounds, window))
        pairs = torch.einsum("ihd,jhd->ijh", q.flatten(0, 1), k.flatten(0, 1)).detach() * 0.3
        for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
            for i in range(start, stop):
                expected = torch.maximum(expected, pairs[i, max(start, i - (window or T) + 1):i + 1].amax(0))
        torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=0)
        everything = torch.full((2,), -torch.inf)
        attend(q, k, v, 0.3, "matmul", everything)
        larger_ones_hidden |= bool((everything > seen).any())
    assert larger_ones_hidden


@EVERY_FORM
def test_a_document_among_others_has_the_losses_that_it_has_alone(form):
    model = scrambled(FORMS["everything"] | {"attention": "auto" if form == "varlen" else form, "window": 6}, T)
    bounds, tokens = random_bounds(4), some_tokens(B, T)
    alone, together = torch.zeros(()), model(tokens, tokens.roll(-1, 1), bounds)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        row = slice(start % T, start % T + stop - start)
        if stop > start:
            inputs, targets = (x[start // T, row][None] for x in (tokens, tokens.roll(-1, 1)))
            alone += model(inputs, targets, torch.tensor([0, stop - start], dtype=torch.int32))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert (model(tokens, tokens.roll(-1, 1)) - alone).abs() > 1e-2 * alone


# --- what a user of the model relies on

@EVERY_FORM
@pytest.mark.parametrize("name", ["gpt2", "everything"])
def test_no_document_changes_another(form, name):
    model = scrambled(FORMS[name] | {"attention": "auto" if form == "varlen" else form}, T)
    tokens, bounds = some_tokens(2, T), torch.tensor([0, 7, 7, 15, T, T + 4, 2 * T, 2 * T], dtype=torch.int32)
    changed = tokens.clone()
    changed[0, 7:15] = (changed[0, 7:15] + 1) % 61
    before, after = (model.logits(x, bounds) for x in (tokens, changed))
    differs = (before - after).abs().amax(-1) > 0
    assert differs[0, 7:15].all() and not differs[0, :7].any() and not differs[0, 15:].any() and not differs[1].any()
    assert (model.logits(tokens) - model.logits(changed))[0, 15:].abs().amax(-1).min() > 1e-4


@EVERY_FORM
def test_a_window_of_n_reaches_n_minus_1_tokens_back_in_one_layer(form):
    config = FORMS["everything"] | {"attention": "auto" if form == "varlen" else form, "layers": 2, "window": 4}
    model, tokens = scrambled(config, T), some_tokens(1, T)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61
    differs = ((model.logits(tokens) - model.logits(changed)).abs().amax(-1) > 0)[0]
    assert differs.nonzero().flatten().tolist() == list(range(5, 5 + 2 * 3 + 1))       # each layer adds three


def test_one_document_a_row_and_a_window_as_long_as_the_row_change_nothing():
    tokens = some_tokens(B, T)
    for name in ("gpt2", "everything"):
        plain = scrambled(FORMS[name], T).logits(tokens)
        assert torch.equal(scrambled(FORMS[name] | {"window": T}, T).logits(tokens), plain)
        assert torch.equal(scrambled(FORMS[name], T).logits(tokens, row_bounds(B, T, "cpu")), plain)


def test_what_is_off_computes_nothing():
    operations = []
    for change, documents in (({}, None), ({"window": T}, None), ({"window": 4}, None), ({}, row_bounds(B, T, "cpu"))):
        model, tokens = scrambled(FORMS["everything"] | change, T), some_tokens(B, T)
        with Recorder() as recorder:
            model(tokens, tokens, documents).backward()
        operations.append(recorder.names)
    assert operations[0] == operations[1]
    masks = [names.count("aten.where.self") for names in operations]
    assert masks == [4, 4, 1, 1]                                    # one for all layers instead of one a layer
    assert all("aten.searchsorted.Tensor" not in names for names in operations[:3])


def test_the_form_of_attention_says_what_is_in_use(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert form_on(cpu, "auto", True) == "matmul" and form_on(gpu, "auto", True) == "varlen"
    assert form_on(gpu, "sdpa", True) == "sdpa" and form_on(gpu, "auto", False) == "sdpa"
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert flash_takes(gpu, torch.bfloat16, 128) == expected
    assert not flash_takes(gpu, torch.float32, 128) and not flash_takes(cpu, torch.bfloat16, 128)
    assert not flash_takes(gpu, torch.bfloat16, 12) and not flash_takes(gpu, torch.bfloat16, 264)
    monkeypatch.setattr("model.gpt.form_on", lambda device, form, varlen: "varlen" if varlen else "sdpa")
    monkeypatch.setattr("model.gpt.flash_takes", lambda *_: True)
    for window, documents, form in ((None, False, "sdpa"), (None, True, "varlen"), (4, False, "varlen"),
                                    (16, False, "sdpa"), (16, True, "varlen")):
        model = GPT(ModelConfig(**FORMS["gpt2"] | {"window": window}), 16)
        assert model.attention_over(documents) == form
        assert model.attention_form == model.attention_over(documents=False)


# --- compiled

def assert_compiled_equals_eager(backend, forms, **config):
    model, tokens, bounds = scrambled(config, T), some_tokens(B, T), random_bounds(2)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    for documents in forms:
        losses = [f(tokens, tokens.roll(-1, 1), bounds if documents else None) for f in (model, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@EVERY_FORM
def test_compiled_without_graph_breaks_equals_eager(form):
    assert_compiled_equals_eager("aot_eager", [True, False], **FORMS["track3"] | {
        "window": 6, "layers": 1, "attention": "auto" if form == "varlen" else form})


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_by_inductor_equals_eager():
    assert_compiled_equals_eager("inductor", [True], **FORMS["track3"] | {"window": 6, "layers": 1})


def test_what_the_device_can_do_is_a_constant_to_the_compiler():
    marks = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marks and marks.items() <= vars(flash_takes).items()


# --- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
def test_flash_attention_on_a_gpu_equals_the_loop(window):
    bounds, (q, k, v, grad) = random_bounds(0), drawn()
    expected = loop(*(x.flatten(0, 1) for x in (q, k, v)), 0.3, bounds, window).view_as(q)
    wanted = torch.autograd.grad(expected, (q, k, v), grad.detach())
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in (q, k, v)]
    sight = Sight(bounds.cuda(), window, int(bounds.diff().max()), None)
    y = attend(*inputs, 0.3, "auto", None, sight)
    found = torch.autograd.grad(y, inputs, grad.detach().cuda().bfloat16())
    for a, b in zip((y, *found), (expected, *wanted)):
        assert (a.double().cpu() - b).norm() < 0.02 * b.norm()


@pytest.mark.gpu
def test_a_compiled_bfloat16_model_on_a_gpu_equals_the_masked_one():
    tokens, bounds, losses = some_tokens(B, T).cuda(), random_bounds(0).cuda(), {}
    for form in ("auto", "sdpa", "matmul"):
        model = scrambled(FORMS["everything"] | {"attention": form, "window": 6}, T, torch.bfloat16).cuda()
        assert model.attention_over(documents=True) == {"auto": "varlen"}.get(form, form)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        losses[form] = [f(tokens, tokens.roll(-1, 1), bounds).item() for f in (model, compiled)]
    assert max(map(max, losses.values())) < 1.01 * min(map(min, losses.values())), losses
