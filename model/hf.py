"""Weights to and from Hugging Face's form of GPT-2: a directory with config.json and model.safetensors.

There a linear map's weight is (fan_in, fan_out), the transpose of ours, and q, k and v are one, c_attn. Only
safetensors is needed, not transformers. Only the model as published has this form; others are refused.
"""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT

# their name -> our names, to be stacked; with the prefix h.<layer>. there and blocks.<layer>. here in BLOCK
OUTSIDE = {"wte.weight": ["embed.weight"], "wpe.weight": ["pos.weight"],
           "ln_f.weight": ["head_norm.gain"], "ln_f.bias": ["head_norm.bias"]}
BLOCK = {"ln_1.weight": ["attn_norm.gain"], "ln_1.bias": ["attn_norm.bias"],
         "ln_2.weight": ["mlp_norm.gain"], "ln_2.bias": ["mlp_norm.bias"],
         "attn.c_attn.weight": ["attn.q.weight", "attn.k.weight", "attn.v.weight"],
         "attn.c_attn.bias": ["attn.q.bias", "attn.k.bias", "attn.v.bias"],
         "attn.c_proj.weight": ["attn.out.weight"], "attn.c_proj.bias": ["attn.out.bias"],
         "mlp.c_fc.weight": ["mlp.up.weight"], "mlp.c_fc.bias": ["mlp.up.bias"],
         "mlp.c_proj.weight": ["mlp.down.weight"], "mlp.c_proj.bias": ["mlp.down.bias"]}

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}   # theirs -> ours

# What their configuration must say, where it says anything, for our model to be the same function.
ONLY = {"model_type": "gpt2", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True}

# The keys in which a model of ours may differ from GPT-2 as published and still have this form.
FREE = ("vocab_size", "padded_vocab_size", "loss_over_padding", "layers", "heads", "width", "mlp_width", "norm_eps",
        "loss", "attention", "bf16_roles", "residual", "init")


def to_hf(model: GPT, directory: str | Path, end_of_text: int | None = None) -> None:
    """Write the weights in float32 for transformers' GPT2LMHeadModel; ValueError if it is not a GPT-2.

    end_of_text: the id of <|endoftext|>; None: the last, as in GPT-2's own vocabulary.
    """
    config = model.config
    end_of_text = config.vocab_size - 1 if end_of_text is None else end_of_text
    refuse_unless_gpt2(config)
    ours = {name: p.detach().cpu().float() for name, p in model.named_parameters()}
    ours["embed.weight"] = ours["embed.weight"][:config.vocab_size]
    tensors = {}
    for theirs, names in names_of(config.layers).items():
        stacked = torch.cat([ours[name] for name in names])
        tensors["transformer." + theirs] = (stacked.t() if ".c_" in theirs else stacked).contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(ONLY | {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size, "n_positions": model.seq_len,
        "n_layer": config.layers, "n_head": config.heads, "n_embd": config.width,
        "n_inner": config.mlp_hidden, "layer_norm_epsilon": config.norm_eps or 1e-5,
        "activation_function": next(name for name, own in ACTIVATIONS.items() if own == config.activation),
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }, indent=2) + "\n")


def from_hf(directory: str | Path) -> tuple[ModelConfig, int, GPT]:
    """The configuration, seq_len and float32 model in a directory; ValueError if it does not hold a GPT-2."""
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}; needed are config.json and one model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    for key, only in ONLY.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{directory}/config.json: {key} is {raw[key]!r}, but only {only!r} can be read")
    activation = raw.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{directory}/config.json: activation_function is {activation!r}, "
                         f"not one of {', '.join(ACTIVATIONS)}")
    config = ModelConfig(vocab_size=raw["vocab_size"], layers=raw["n_layer"], heads=raw["n_head"],
                         width=raw["n_embd"], mlp_width=raw.get("n_inner"),
                         norm_eps=raw.get("layer_norm_epsilon", 1e-5), activation=ACTIVATIONS[activation])
    model = GPT(config, raw["n_positions"])
    fill(model, load_file(directory / "model.safetensors"), directory)
    return config, model.seq_len, model


@torch.no_grad()
def fill(model: GPT, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy their tensors into the model; attention masks and a copy of the tied head are left out."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    ours = dict(model.named_parameters())
    for theirs, names in names_of(model.config.layers).items():
        if theirs not in tensors:
            raise ValueError(f"{where}/model.safetensors has no {theirs}")
        stacked = tensors[theirs].t() if ".c_" in theirs else tensors[theirs]
        for name, part in zip(names, stacked.chunk(len(names))):
            if part.shape != ours[name].shape:
                raise ValueError(f"{where}/model.safetensors: {theirs} has shape "
                                 f"{list(tensors[theirs].shape)}, which config.json does not say")
            ours[name].copy_(part)


def names_of(layers: int) -> dict[str, list[str]]:
    """Their name of every tensor -> our names of its parts."""
    blocks = {f"h.{layer}.{theirs}": [f"blocks.{layer}.{name}" for name in names]
              for layer in range(layers) for theirs, names in BLOCK.items()}
    return OUTSIDE | blocks


def refuse_unless_gpt2(config: ModelConfig) -> None:
    """ValueError that names the first key in which the model has another form than GPT-2."""
    allowed = {field.name: (field.default,) for field in fields(config) if field.name not in FREE}
    allowed |= {"activation": tuple(ACTIVATIONS.values()), "head_dim": (None, config.width // config.heads)}
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            raise ValueError(f"only GPT-2's form can be written for Hugging Face; this model has "
                             f"{key}: {getattr(config, key)!r}, not {values[0]!r}")
