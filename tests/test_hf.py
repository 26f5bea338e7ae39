"""Weights to and from Hugging Face's form, judged by transformers itself."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import Draw, Init, ModelConfig, Softcap
from model.gpt import GPT
from model.hf import from_hf, to_hf

CONFIG = {"vocab_size": 61, "padded_vocab_size": 64, "layers": 3, "heads": 2, "width": 32, "mlp_width": 96,
          "init": Init(embed=Draw(scale=0.3), qkv=Draw(scale=0.3), bias="as_weight")}


def model_of(**change):
    model = GPT(ModelConfig(**CONFIG | change), 24)
    model.init_weights(0)
    return model


def some_tokens():
    return torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: it is the judge here")


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"activation": "gelu"}, {"norm_eps": 0.01}, {"head_dim": 16}],
                         ids=str)
def test_a_written_model_has_the_same_logits_in_transformers(tmp_path, transformers, change):
    model = model_of(**change)
    to_hf(model, tmp_path / "new" / "directory")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "directory").eval()
    tokens = some_tokens()
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"activation_function": "gelu"}, {"n_inner": 40},
                                    {"layer_norm_epsilon": 0.01}], ids=str)
def test_a_model_of_transformers_has_the_same_logits_here(tmp_path, transformers, change):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=2, initializer_range=0.2, bos_token_id=60,
        eos_token_id=60, **change)).eval()
    theirs.save_pretrained(tmp_path)
    config, seq_len, model = from_hf(tmp_path)
    assert config == model.config and seq_len == model.seq_len == 24
    tokens = some_tokens()
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_writing_and_reading_gives_the_same_weights(tmp_path):
    model = model_of()
    to_hf(model, tmp_path)
    config, seq_len, again = from_hf(tmp_path)
    assert (config.vocab_rows, config.mlp_hidden, seq_len) == (61, 96, 24)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p[:61] if name == "embed.weight" else p, q), name


def test_names_without_the_transformer_prefix_and_with_masks_are_read(tmp_path):
    model = model_of()                                  # the form of the files on the hub
    to_hf(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}, path)
    assert torch.equal(from_hf(tmp_path)[2].logits(some_tokens()), model.logits(some_tokens()))


def test_keys_that_do_not_change_the_function_do_not_matter(tmp_path):
    model = model_of(loss="triton", loss_over_padding=False, attention="sdpa", bf16_roles=("embed",),
                     residual="float32")
    to_hf(model, tmp_path, end_of_text=7)
    again = from_hf(tmp_path)[2]
    torch.testing.assert_close(again.logits(some_tokens()), model.logits(some_tokens()), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize("change, key", [
    ({"positions": "rotary"}, "positions: 'rotary', not 'learned'"), ({"tied": False}, "tied: False"),
    ({"tied": False, "init": Init(head="zeros")}, "tied: False"), ({"window": 8}, "window: 8, not None"),
    ({"unet": True, "layers": 4}, "unet"), ({"activation": "relu2"}, "activation: 'relu2', not 'gelu_tanh'"),
    ({"head_dim": 8}, "head_dim: 8, not None"), ({"biases": False}, "biases"),
    ({"qk_norm": "before_rotary"}, "qk_norm"),
    ({"softcap": Softcap(form="tanh", cap=30.0)}, "softcap"), ({"attn_scale": 0.12}, "attn_scale"),
])
def test_a_model_that_is_not_a_gpt2_is_refused_in_one_line(tmp_path, change, key):
    with pytest.raises(ValueError, match="only GPT-2's form can be written") as error:
        to_hf(model_of(**change), tmp_path / "x")
    assert key in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("key, value, message", [
    ("model_type", "llama", "model_type is 'llama', but only 'gpt2' can be read"),
    ("tie_word_embeddings", False, "tie_word_embeddings is False"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
    ("activation_function", "relu", "activation_function is 'relu', not one of gelu_new"),
    ("n_layer", 4, "model.safetensors has no h.3."),
    ("n_inner", 48, "mlp.c_fc.weight has shape [32, 96], which config.json does not say"),
])
def test_a_directory_that_is_not_a_gpt2_is_refused_in_one_line(tmp_path, key, value, message):
    to_hf(model_of(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ValueError) as error:
        from_hf(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        from_hf(tmp_path)
    to_hf(model_of(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        from_hf(tmp_path)
