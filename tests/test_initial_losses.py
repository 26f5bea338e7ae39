"""The loss before training, at full size, is what the published runs printed at their first step."""
import gc
import math

import pytest
import torch

from model.config import Draw, Init, ModelConfig, Softcap
from model.gpt import GPT

TORCH_LINEAR = Draw(form="uniform", scale=1.0, over="sqrt_fan_in")           # nn.Linear's default
HIDDEN = {"qkv": TORCH_LINEAR, "mlp_in": TORCH_LINEAR}
FULL = {"vocab_size": 50257, "layers": 12, "heads": 6, "width": 768}
RECORD = FULL | {"positions": "rotary", "norm": "rmsnorm", "norm_gain": False, "biases": False}

GPT2 = FULL | {"heads": 12, "padded_vocab_size": 50304, "loss_over_padding": False}
ADAMW = RECORD | {"heads": 12, "activation": "gelu", "attn_branch_scale": 24**-0.5, "norm_eps": 1e-6,
                  "init": Init(embed=TORCH_LINEAR, attn_out=TORCH_LINEAR, mlp_out=TORCH_LINEAR, **HIDDEN)}
MODERN_ARCH = RECORD | {"padded_vocab_size": 50304, "qk_norm": "after_rotary", "activation": "relu2",
                        "init": Init(embed=TORCH_LINEAR, attn_out="zeros", mlp_out="zeros", **HIDDEN)}
UNTIED = MODERN_ARCH | {"qk_norm": "before_rotary", "tied": False, "embed_norm": True,
                        "init": Init(embed=Draw(scale=1.0), head="zeros", attn_out="zeros", mlp_out="zeros",
                                     **HIDDEN)}
UNET = UNTIED | {"value_residual": "learned", "embed_shortcut": True, "unet": True,
                 "softcap": Softcap(form="tanh", cap=30.0, before_cast=True)}
THIRD = Draw(scale=0.33**0.5, over="sqrt_fan_in")
TRACK3 = UNTIED | {"norm_gain": True, "biases": True, "rotary": "half", "rotary_base": 1024.0,
                   "attn_scale": 0.12, "softcap": Softcap(form="isru", cap=15.0),
                   "init": Init(embed=Draw(scale=1.0), head="zeros", attn_out="zeros", mlp_out="zeros",
                                qkv=THIRD, mlp_in=THIRD)}


def text_like_tokens(count: int) -> torch.Tensor:
    """Token ids with the frequencies of text, p ~ 1/(rank + 10), in which none follows itself."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(50257, generator=generator)
    frequencies = 1 / (torch.arange(50257) + 10.0)
    ranks = torch.multinomial(frequencies, 2 * count, replacement=True, generator=generator)
    return ids[ranks[1:][ranks[1:] != ranks[:-1]]][:count]


@torch.no_grad()
def initial_loss(config: dict, tokens: int) -> float:
    gc.collect()                            # the previous case's 650 MB
    row = text_like_tokens(tokens + 1)[None]
    model = GPT(ModelConfig(**config), tokens)
    model.init_weights(0)
    return model(row[:, :-1], row[:, 1:]).item() / tokens


@pytest.mark.parametrize("config", [UNTIED, UNET, TRACK3], ids=["record 8", "record 11", "track 3"])
def test_a_zero_head_starts_at_the_logarithm_of_the_padded_vocabulary(config):
    assert abs(initial_loss(config, 128) - math.log(50304)) < 5e-5           # every log prints 10.8258


def test_a_tied_model_with_zero_projections_starts_at_sixteen():
    """Each position predicts its own token with logit √768·‖w‖ = 16. Logs of record 5: 15.96 to 16.03."""
    assert abs(initial_loss(MODERN_ARCH, 512) - 16.00) < 0.03                # found: 15.981


@pytest.mark.parametrize("config, published", [(GPT2, 11.009), (ADAMW, 10.966)], ids=["llm.c", "record 2"])
def test_a_tied_model_of_random_matrices_starts_where_the_logs_do(config, published):
    assert abs(initial_loss(config, 512) - published) < 0.04                 # found: 11.018 and 10.981
