"""A trained language model in one file: needs torch and safetensors, reads config.json and model.safetensors beside it.

    from model import load
    model = load(".")                                   # this folder
    logits = model(tokens)                              # int64 (b, t) -> float32 (b, t, vocab_size)
    tokens = model.generate(tokens, 100)                # 100 more for every row

The weights are float32; `load(".").to("cuda", torch.bfloat16)` works too. Letters of the shapes: b batch, t time,
h heads, d width of a head, c width of the residual stream.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

QK_NORM_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Config:
    """What config.json says."""

    vocab_size: int
    seq_len: int                # tokens in a row of training; with learned positions no row may have more
    layers: int
    heads: int
    width: int
    head_dim: int
    mlp_width: int
    positions: str              # learned, rotary
    rotary: str                 # full, half (half of the frequencies are zero)
    rotary_base: float
    norm: str                   # layernorm, rmsnorm
    norm_gain: bool
    norm_eps: float
    embed_norm: bool            # a norm after the embedding
    qk_norm: str                # none, before_rotary, after_rotary: RMSNorm of queries and keys
    attn_scale: float           # multiplies the attention scores
    attn_branch_scale: float    # multiplies what attention adds to the stream
    value_residual: str         # none, fixed, learned: mix in the first layer's values
    embed_shortcut: bool        # blocks start from l0·x + l1·x0, with x0 the embedding
    unet: bool                  # blocks of the second half also read their mirror block's output
    activation: str             # gelu, gelu_tanh, relu2
    biases: bool
    tied: bool                  # the head is the token embedding
    softcap: dict | None        # bound on the logits: form, cap, scale, shift, before_cast
    window: int | None          # a token sees itself and window-1 before it; None: all before it
    tokenizer: str              # gpt2 (tiktoken's), or bytes (ids 0 to 255 are UTF-8 bytes)
    end_of_text: int            # the id with which documents begin


def load(folder: str | Path) -> "GPT":
    """The model of config.json and model.safetensors in `folder`, in float32 on the CPU."""
    config = Config(**json.loads((Path(folder) / "config.json").read_text()))
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model.eval()


class GPT(nn.Module):
    """Logits of the next token at every place."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.pos = nn.Embedding(config.seq_len, config.width) if config.positions == "learned" else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skips = nn.Parameter(torch.empty(config.layers // 2)) if config.unet else None
        self.head_norm = Norm(config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, config.biases)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (b, t) -> float32 (b, t, vocab_size)"""
        config, outputs, t = self.config, [], tokens.shape[1]
        x = self.embed(tokens)
        if self.pos is not None:
            if t > config.seq_len:
                raise ValueError(f"rows of {t} tokens, but this model has positions for {config.seq_len}")
            x = x + self.pos(torch.arange(t, device=tokens.device))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x0, v0, rotation = x, None, rotary_tables(config, t, tokens.device)
        for layer, block in enumerate(self.blocks):
            mirror = config.layers - 1 - layer
            if config.unet and mirror < layer:
                x = x + self.skips[layer - config.layers // 2] * outputs[mirror]
            x, v = block(x, x0, v0, rotation)
            v0 = v if layer == 0 else v0
            outputs.append(x)
        x = self.head_norm(x)
        return capped(F.linear(x, self.embed.weight) if self.head is None else self.head(x), config.softcap)

    @torch.no_grad()
    def generate(self, tokens: Tensor, new_tokens: int, temperature: float = 1.0) -> Tensor:
        """Rows (b, t) and what follows them (b, t + new_tokens); temperature 0 takes the likeliest token.

        Every step reads the last `seq_len` tokens anew: simple, and slow for long texts.
        """
        for _ in range(new_tokens):
            logits = self(tokens[:, -self.config.seq_len:])[:, -1]
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.branch_scale = config.attn_branch_scale
        self.shortcut = nn.Parameter(torch.empty(2)) if config.embed_shortcut else None
        self.attn_norm, self.attn = Norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, rotation) -> tuple[Tensor, Tensor]:
        """The stream and its start (b, t, c), the first layer's values -> the stream, this layer's values."""
        if self.shortcut is not None:
            x = self.shortcut[0] * x + self.shortcut[1] * x0
        y, v = self.attn(self.attn_norm(x), v0, rotation)
        x = x + self.branch_scale * y
        return x + self.mlp(self.mlp_norm(x)), v


class Attention(nn.Module):
    """Causal self-attention, over the last `window` tokens where there is one."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, inner, config.biases) for _ in range(3))
        self.out = nn.Linear(inner, config.width, config.biases)
        learned = config.value_residual == "learned" and layer > 0
        self.value_mix = nn.Parameter(torch.empty(1)) if learned else None

    def forward(self, x: Tensor, v0: Tensor | None, rotation) -> tuple[Tensor, Tensor]:
        """What to add to the stream (b, t, c), and this layer's own values (b, h, t, d)."""
        config, (b, t, _) = self.config, x.shape
        q, k, v = (linear(x).view(b, t, config.heads, config.head_dim).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))
        q, k = self.place(q, rotation), self.place(k, rotation)
        mixed = v
        if config.value_residual != "none" and v0 is not None:      # arXiv:2410.17897
            mixed = torch.lerp(v, v0, 0.5 if self.value_mix is None else self.value_mix)
        if config.window is None or config.window >= t:
            seen = {"is_causal": True}
        else:
            back = torch.arange(t, device=x.device)[:, None] - torch.arange(t, device=x.device)
            seen = {"attn_mask": (back >= 0) & (back < config.window)}
        y = F.scaled_dot_product_attention(q, k, mixed, scale=config.attn_scale, **seen)
        return self.out(y.transpose(1, 2).reshape(b, t, -1)), v

    def place(self, x: Tensor, rotation) -> Tensor:
        """Normalise and rotate queries or keys (b, h, t, d)."""
        if self.config.qk_norm == "before_rotary":
            x = F.rms_norm(x, x.shape[-1:], eps=QK_NORM_EPS)
        if rotation is not None:
            cos, sin = rotation
            x1, x2 = x.float().chunk(2, dim=-1)
            x = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)
        if self.config.qk_norm == "after_rotary":
            x = F.rms_norm(x, x.shape[-1:], eps=QK_NORM_EPS)
        return x


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, config.biases)
        self.down = nn.Linear(config.mlp_width, config.width, config.biases)
        self.activation = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
                           "relu2": lambda x: F.relu(x).square()}[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Norm(nn.Module):
    """LayerNorm or RMSNorm of the last dimension."""

    def __init__(self, config: Config):
        super().__init__()
        self.shape, self.eps, self.centred = (config.width,), config.norm_eps, config.norm == "layernorm"
        self.gain = nn.Parameter(torch.empty(self.shape)) if config.norm_gain else None
        self.bias = nn.Parameter(torch.empty(self.shape)) if config.biases and self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.gain, self.eps)


def rotary_tables(config: Config, t: int, device) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (t, d/2) of every pair of dimensions i, i + d/2 at every place (arXiv:2104.09864)."""
    if config.positions != "rotary":
        return None
    if config.rotary == "full":
        frequencies = config.rotary_base ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    else:
        moving = (1 / config.rotary_base) ** torch.linspace(0, 1, config.head_dim // 4, device=device)
        frequencies = torch.cat([moving, torch.zeros_like(moving)])
    angles = torch.arange(t, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def capped(z: Tensor, softcap: dict | None) -> Tensor:
    """The logits in float32, bounded if the model bounds them."""
    if softcap is None:
        return z.float()
    z = z if softcap["before_cast"] else z.float()
    cap, scale = softcap["cap"], softcap["scale"]
    if softcap["form"] == "tanh":
        z = cap * torch.tanh(z / scale)
    elif softcap["form"] == "sigmoid":
        z = cap * torch.sigmoid((z + softcap["shift"]) / scale)
    else:
        z = cap * z * torch.rsqrt(z.square() + cap**2)
    return z.float()
