"""The transformer against an independent one in float64, and the properties that users rely on."""
import dataclasses
import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model import rotary
from model.attention import attend, causal_mask, form_on
from model.config import Draw, Init, ModelConfig, Role, Softcap
from model.gpt import GPT, role_of
from model.head import cap
from model.init import draw_weights

SMALL = {"vocab_size": 61, "layers": 4, "heads": 2, "width": 32}
GPT2 = SMALL
SPEEDRUN = SMALL | {"positions": "rotary", "norm": "rmsnorm", "norm_gain": False, "biases": False,
                    "tied": False, "activation": "relu2", "qk_norm": "before_rotary", "embed_norm": True,
                    "padded_vocab_size": 64}
EVERYTHING = SPEEDRUN | {"value_residual": "learned", "embed_shortcut": True, "unet": True,
                         "softcap": Softcap(form="tanh", cap=3.0)}
TRACK3 = SPEEDRUN | {"norm_gain": True, "biases": True, "rotary": "half", "rotary_base": 1024.0,
                     "attn_scale": 0.12, "softcap": Softcap(form="isru", cap=3.0)}
FORMS = {
    "gpt2": GPT2,
    "gpt2_untied_padded": GPT2 | {"tied": False, "padded_vocab_size": 64, "norm_eps": 1e-2},
    "adamw_2024_06": SPEEDRUN | {"qk_norm": "none", "embed_norm": False, "tied": True, "activation": "gelu",
                                 "attn_branch_scale": 8**-0.5, "norm_eps": 1e-6},
    "modern_arch": SPEEDRUN | {"tied": True, "embed_norm": False, "qk_norm": "after_rotary"},
    "fixed_value_residual": SPEEDRUN | {"value_residual": "fixed"},
    "everything": EVERYTHING,
    "track3": TRACK3,
    "wide_heads": SPEEDRUN | {"head_dim": 24, "mlp_width": 40,
                              "softcap": Softcap(form="sigmoid", cap=3.0, scale=0.75, shift=0.5)},
}


def scrambled(config, seq_len=16, dtype=torch.float32):
    """A model in which no weight has a special value, so that every part shows in the output."""
    model = GPT(ModelConfig(**config), seq_len, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
    return model


def some_tokens(rows=2, t=16, vocab=61):
    return torch.randint(vocab, (rows, t), generator=torch.Generator().manual_seed(2))


def plain_logits(model, tokens):
    """The same function written out in float64, one position at a time where that is clearest."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(x, name):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        eps = c.norm_eps or {"layernorm": 1e-5, "rmsnorm": 2**-23}[c.norm]
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * w.get(name + ".gain", 1) + w.get(name + ".bias", 0)

    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, w[name + ".weight"]) + w.get(name + ".bias", 0)

    def turned(x, position):        # x1 + i·x2, turned back by the angle
        d = x.shape[-1]
        if c.positions != "rotary":
            return x
        frequencies = [c.rotary_base ** (-2 * i / d) for i in range(d // 2)]
        if c.rotary == "half":
            n = d // 4
            frequencies = [(1 / c.rotary_base) ** (i / (n - 1)) for i in range(n)] + [0.0] * n
        z = torch.complex(x[..., :d // 2], x[..., d // 2:])
        z = z * torch.exp(-1j * position * torch.tensor(frequencies, dtype=torch.float64))
        return torch.cat([z.real, z.imag], -1)

    def placed(x, position):
        unit = lambda x: x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()    # noqa: E731
        x = unit(x) if c.qk_norm == "before_rotary" else x
        x = turned(x, position)
        return unit(x) if c.qk_norm == "after_rotary" else x

    def attention(x, first, name):
        q, k, v = (linear(x, f"{name}.{n}").unflatten(-1, (c.heads, -1)) for n in "qkv")
        mixed, t = v, x.shape[1]
        if c.value_residual != "none" and first is not None:
            lam = w.get(name + ".value_mix", 0.5)
            mixed = (1 - lam) * v + lam * first
        q, k = (torch.stack([placed(y[:, i], i) for i in range(t)], 1) for y in (q, k))
        out = torch.zeros_like(v)
        for i in range(t):
            scale = c.attn_scale or v.shape[-1] ** -0.5
            weights = (torch.einsum("bhd,bjhd->bjh", q[:, i], k[:, :i + 1]) * scale).softmax(1)
            out[:, i] = torch.einsum("bjh,bjhd->bhd", weights, mixed[:, :i + 1])
        return linear(out.flatten(2), name + ".out"), v

    def activation(x):
        if c.activation == "relu2":
            return x.clamp(min=0) ** 2
        if c.activation == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["embed.weight"][tokens]
    x = x + w["pos.weight"][:tokens.shape[1]] if c.positions == "learned" else x
    x = norm(x, "embed_norm") if c.embed_norm else x
    x0, first, stack, half = x, None, [], c.layers // 2
    for i in range(c.layers):
        block = f"blocks.{i}"
        if c.unet and i >= half:
            x = x + w["skips"][i - half] * stack.pop()
        if c.embed_shortcut:
            x = w[block + ".shortcut"][0] * x + w[block + ".shortcut"][1] * x0
        y, v = attention(norm(x, block + ".attn_norm"), first, block + ".attn")
        first = v if first is None else first
        x = x + c.attn_branch_scale * y
        hidden = activation(linear(norm(x, block + ".mlp_norm"), block + ".mlp.up"))
        x = x + linear(hidden, block + ".mlp.down")
        if c.unet and i < half:
            stack.append(x)
    x = norm(x, "head_norm")
    z = x @ w["embed.weight"].T if c.tied else linear(x, "head")
    return plain_cap(z, c.softcap)


def plain_cap(z, softcap):
    if softcap is None:
        return z
    c, s = softcap.cap, softcap.scale or softcap.cap
    return {"tanh": c * torch.tanh(z / s), "sigmoid": c / (1 + torch.exp(-(z + softcap.shift) / s)),
            "isru": c * z / torch.sqrt(z**2 + c**2)}[softcap.form]


# --- the mathematics

@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_loss_equal_a_plain_float64_transformer(form, attention):
    model, tokens = scrambled(FORMS[form] | {"attention": attention}), some_tokens()
    targets, expected = tokens.roll(-1, 1), plain_logits(model, tokens)
    logits = expected[..., :61].float()
    torch.testing.assert_close(model.logits(tokens), logits, rtol=1e-5, atol=2e-5)      # measured: 3e-6
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    summed = -expected.log_softmax(-1).gather(-1, targets[..., None]).sum()
    torch.testing.assert_close(loss.double(), summed, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["full", "half"])
def test_rotary_scores_depend_on_the_distance_only(form):
    q, k = torch.randn(2, 1, 1, 1, 16)
    cos, sin = rotary.tables(40, 16, 1000.0, form, "cpu")
    q, k = (rotary.rotate(x.expand(1, 40, 1, 16), cos, sin)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[:30, :30], scores[10:, 10:], rtol=0, atol=1e-4)
    assert (scores[0, :-1] - scores[0, 1:]).abs().max() > 0.1


def test_half_rotary_leaves_half_of_the_dimensions_still():
    x = torch.randn(1, 9, 1, 16)
    y = rotary.rotate(x, *rotary.tables(9, 16, 1024.0, "half", "cpu"))
    moved = ((x - y).abs().amax((0, 1, 2)) > 0).tolist()
    assert moved == ([True] * 4 + [False] * 4) * 2


@pytest.mark.parametrize("softcap", [
    Softcap(form="tanh", cap=30.0), Softcap(form="tanh", cap=5.0, scale=2.0), Softcap(form="isru", cap=15.0),
    Softcap(form="sigmoid", cap=30.0, scale=7.5), Softcap(form="sigmoid", cap=23.0, scale=7.5, shift=5.0),
], ids=str)
def test_softcaps_equal_their_formulas(softcap):
    z = torch.linspace(-80, 80, 1001)
    y = cap(z, softcap)
    torch.testing.assert_close(y.double(), plain_cap(z.double(), softcap), rtol=1e-5, atol=1e-5)
    assert y.abs().max() <= softcap.cap and (y.diff() >= 0).all()


def test_softcap_before_the_cast_is_computed_in_bfloat16():
    tokens, logits = some_tokens(), {}
    for before in (True, False):
        config = SPEEDRUN | {"softcap": Softcap(form="tanh", cap=3.0, before_cast=before)}
        logits[before] = scrambled(config, dtype=torch.bfloat16).logits(tokens)
    assert torch.equal(logits[True], logits[True].bfloat16().float())
    assert not torch.equal(logits[False], logits[False].bfloat16().float())
    assert (logits[True] - logits[False]).abs().max() < 0.02           # measured .016: the roundings at 3


@pytest.mark.parametrize("scale", [None, 0.12])
def test_matmul_and_sdpa_agree_in_values_and_gradients(scale):
    results = []
    for form in ("matmul", "sdpa"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 33, 3, 16, requires_grad=True) for _ in range(3))
        y = attend(q, k, v, scale, form)
        results.append((y, *torch.autograd.grad((y * torch.randn(y.shape)).sum(), (q, k, v))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norm_of_a_bfloat16_stream_has_float32_statistics():
    from model.layers import Norm
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).bfloat16() + 20
    for kind in ("rmsnorm", "layernorm"):
        norm = Norm(ModelConfig(vocab_size=2, layers=1, heads=1, width=4096, norm=kind, norm_gain=False,
                                biases=False))
        z = x.double() - (x.double().mean(-1, keepdim=True) if kind == "layernorm" else 0)
        expected = z / (z.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        rounding = 2**-8 * expected.abs() + 1e-6
        assert ((norm(x).double() - expected).abs() <= rounding).all(), kind


def test_bfloat16_logits_and_losses_are_near_float32_ones():
    tokens = some_tokens(8, 64)
    for name, config in FORMS.items():
        exact, rounded = (scrambled(config, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
        losses = [model(tokens, tokens.roll(-1, 1)) / tokens.numel() for model in (exact, rounded)]
        assert abs(losses[0] - losses[1]) < 0.003, name                    # measured: at most .0008
        z = exact.logits(tokens)
        assert (rounded.logits(tokens) - z).norm() < 0.03 * z.norm(), name     # measured: at most .014


# --- what a user of the model relies on

@pytest.mark.parametrize("form", FORMS)
def test_the_future_does_not_change_earlier_logits(form):
    model, tokens = scrambled(FORMS[form]), some_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_reaches_every_parameter(form):
    model, tokens = scrambled(FORMS[form]), some_tokens()
    model(tokens, tokens.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        # Softmax ignores what all scores of a query share, so without rotary the keys' bias does nothing.
        if not (name.endswith("k.bias") and model.config.positions == "learned"):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_role(form):
    model = GPT(ModelConfig(**FORMS[form]), 16)
    roles = model.roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert set(roles.values()) <= set(get_args(Role))


def test_parameter_names_are_what_patterns_expect():
    with torch.device("meta"):
        roles = GPT(ModelConfig(**EVERYTHING), 16).roles() | GPT(ModelConfig(**GPT2), 16).roles()
    expected = {"embed.weight": "embed", "pos.weight": "pos", "head.weight": "head", "head_norm.gain": "gain",
                "head_norm.bias": "bias", "blocks.3.attn_norm.gain": "gain", "blocks.3.mlp_norm.bias": "bias",
                "blocks.0.attn.q.weight": "q", "blocks.0.attn.k.weight": "k", "blocks.0.attn.v.weight": "v",
                "blocks.0.attn.out.weight": "attn_out", "blocks.0.mlp.up.weight": "mlp_in",
                "blocks.0.mlp.down.weight": "mlp_out", "blocks.0.attn.q.bias": "bias", "skips": "scalar",
                "blocks.0.shortcut": "scalar", "blocks.1.attn.value_mix": "scalar"}
    assert expected.items() <= roles.items()
    with pytest.raises(ValueError, match="blocks.0.attn.gate has no role"):
        role_of("blocks.0.attn.gate")


def test_padding_never_matters_for_logits_and_for_the_loss_only_if_asked():
    tokens = some_tokens()
    for tied in (True, False):
        losses = {}
        for over in (True, False):
            model = scrambled(SPEEDRUN | {"tied": tied, "loss_over_padding": over})
            before = model.logits(tokens), model(tokens, tokens)
            with torch.no_grad():
                (model.embed if tied else model.head).weight[61:] += 1
            after = model.logits(tokens), model(tokens, tokens)
            assert before[0].shape[-1] == 61 and torch.equal(before[0], after[0])
            assert torch.equal(before[1], after[1]) == (not over)
            losses[over] = before
        exact = F.cross_entropy(losses[False][0].flatten(0, 1), tokens.flatten(), reduction="sum")
        torch.testing.assert_close(losses[False][1], exact)
        assert losses[True][1] > losses[False][1]


def test_compiled_without_graph_breaks_equals_eager():
    for name in ("gpt2", "everything"):
        model, tokens = scrambled(FORMS[name]), some_tokens()
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
        losses = [f(tokens, tokens) for f in (model, compiled)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_longer_than_the_learned_positions_are_an_error():
    with pytest.raises(ValueError, match="rows of 17 tokens, but this model has positions for 16"):
        scrambled(GPT2).logits(some_tokens(t=17))
    assert scrambled(SPEEDRUN).logits(some_tokens(t=17)).shape == (2, 17, 61)


def test_auto_is_matmul_on_a_cpu_and_sdpa_elsewhere():
    assert GPT(ModelConfig(**SMALL), 16).attention_form == "matmul"
    assert GPT(ModelConfig(**SMALL | {"attention": "sdpa"}), 16).attention_form == "sdpa"
    assert form_on(torch.device("cuda"), "auto") == "sdpa"
    assert form_on(torch.device("cuda"), "matmul") == "matmul"
    assert causal_mask(3, "cpu").tolist() == [[0, -math.inf, -math.inf], [0, 0, -math.inf], [0, 0, 0]]


@pytest.mark.parametrize("config, parameters", [
    ({"vocab_size": 50257}, 124_439_808),                                            # GPT-2 124M
    ({"vocab_size": 50304, "positions": "rotary", "norm": "rmsnorm", "norm_gain": False, "biases": False,
      "tied": False, "embed_norm": True}, 162_201_600),                  # record #8: "162M (124M active)"
    ({"vocab_size": 50304, "positions": "rotary", "norm": "rmsnorm", "tied": False, "embed_norm": True},
     162_354_816),
], ids=["gpt2", "untied", "track3"])
def test_the_published_sizes_have_their_numbers_of_parameters(config, parameters):
    with torch.device("meta"):
        model = GPT(ModelConfig(**config, layers=12, heads=12, width=768), 1024)
    assert sum(p.numel() for p in model.parameters()) == parameters
    looked_up = 1024 * 768 if config["vocab_size"] == 50257 else 50304 * 768
    assert model.flops_per_token() == 6 * (parameters - looked_up) + 12 * 12 * 768 * 1024


# --- initial values

def filled(config, seed=0, dtype=torch.float32):
    model = GPT(ModelConfig(**config), 16, dtype)
    model.init_weights(seed)
    return dict(model.named_parameters())


def test_gpt2_starts_as_published():
    p = filled({"vocab_size": 500, "layers": 8, "heads": 4, "width": 256})
    for name, values in p.items():
        if name.endswith(("gain", "bias")):
            assert (values == (1 if name.endswith("gain") else 0)).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert abs(values.std() / std - 1) < 0.05 and abs(values.mean()) < 0.05 * std, name


def test_every_draw_has_its_width():
    linear = Draw(form="uniform", scale=1.0, over="sqrt_fan_in")
    init = Init(embed=Draw(scale=1.0), qkv=linear, mlp_in=linear, mlp_out=linear, attn_out="zeros",
                head=Draw(scale=0.5, over="sqrt_fan_in"), bias="as_weight")
    p = filled({"vocab_size": 500, "layers": 2, "heads": 2, "width": 64, "mlp_width": 1600, "tied": False,
                "init": init})
    for name, fan_in in (("attn.q", 64), ("mlp.up", 64), ("mlp.down", 1600)):
        for kind in ("weight", "bias"):
            values, bound = p[f"blocks.1.{name}.{kind}"], fan_in**-0.5
            assert 0.9 * bound < values.abs().max() <= bound
            assert abs(values.std() / (bound / 3**0.5) - 1) < 0.2
    assert abs(p["embed.weight"].std() - 1) < 0.02 and abs(p["head.weight"].std() * 8 / 0.5 - 1) < 0.02
    assert not p["blocks.0.attn.out.weight"].any() and not p["blocks.0.attn.out.bias"].any()
    assert not p["blocks.0.attn_norm.bias"].any() and p["head.bias"].any()


def test_learned_scalars_start_at_the_records_values():
    p = filled(EVERYTHING)
    assert p["skips"].tolist() == [1, 1] and p["blocks.2.shortcut"].tolist() == [1, 0]
    assert p["blocks.1.attn.value_mix"].tolist() == [0.5] and "blocks.0.attn.value_mix" not in p


def test_initial_weights_do_not_depend_on_storage_or_on_other_parameters():
    plain = filled(EVERYTHING, seed=3)
    with torch.device("meta"):
        model = GPT(ModelConfig(**EVERYTHING), 16)
    model.to_empty(device="cpu")
    bank = torch.full((4, 32, 32), math.nan)        # parameters as views of one bank
    for i, block in enumerate(model.blocks):
        block.attn.q.weight.data = bank[i]
    model.init_weights(3)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain[name]), name
    assert torch.equal(bank[2], plain["blocks.2.attn.q.weight"])
    for name, p in filled(SPEEDRUN, seed=3).items():
        assert torch.equal(p, plain[name]), name


def test_seeds_layers_and_matrices_differ():
    a, b = filled(GPT2, seed=0), filled(GPT2, seed=1)
    drawn = [a["blocks.0.attn.q.weight"], b["blocks.0.attn.q.weight"], a["blocks.1.attn.q.weight"],
             a["blocks.0.attn.k.weight"]]
    correlations = torch.corrcoef(torch.stack([x.detach().flatten() for x in drawn]))
    assert (correlations - torch.eye(4)).abs().max() < 0.15


def test_a_parameter_without_a_rule_is_an_error():
    p = {"gate.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="no initial values for parameter gate.weight of role gate"):
        draw_weights(p, {"gate.weight": "gate"}, ModelConfig(**GPT2), 0)


def test_roles_are_stored_in_bfloat16_only_with_bfloat16_activations():
    config = EVERYTHING | {"bf16_roles": ("embed", "scalar")}
    for dtype in (torch.float32, torch.bfloat16):
        for name, p in filled(config, dtype=dtype).items():
            low = dtype == torch.bfloat16 and role_of(name) in ("embed", "scalar")
            assert p.dtype == (torch.bfloat16 if low else torch.float32), name


# --- configuration

@pytest.mark.parametrize("change, message", [
    ({"width": 33}, "width 33 is not a multiple of heads 2"),
    ({"positions": "rotary", "rotary": "half", "head_dim": 6}, "a head_dim that is a multiple of 4, not 6"),
    ({"positions": "rotary", "head_dim": 5}, "rotary: full needs a head_dim that is a multiple of 2, not 5"),
    ({"padded_vocab_size": 60}, "padded_vocab_size 60 is below vocab_size 61"),
    ({"layers": 3, "unet": True}, "layers must be even, not 3"),
    ({"init": Init(head="zeros")}, "init.head is set, but this model has no such parameter"),
    ({"positions": "rotary", "init": Init(pos=Draw(scale=1.0))}, "init.pos is set"),
    ({"layer": 3}, "layer"),
    ({"norm": "batchnorm"}, "norm"),
    ({"softcap": {"form": "tanh", "cap": 0}}, "cap"),
])
def test_impossible_configurations_are_errors(change, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig(**SMALL | change)


def test_read_when_names_keys_and_values_that_exist():
    for cls in (ModelConfig, Softcap):
        known = {field.name for field in dataclasses.fields(cls)}
        for key, conditions in cls.READ_WHEN.items():
            assert {key, *conditions} <= known
