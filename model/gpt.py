"""The transformer, from GPT-2 to the NanoGPT speedrun's tuned models; `model/config.py` names its parts.

Letters of the shapes: b batch, t time, c width of the residual stream, v rows of the vocabulary with padding.
Activations have one type, `activation_dtype` (but see `residual`); weights are cast to it at each use; logits, loss
are float32.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import rotary
from model.attention import Attention, Past, flash_takes, form_on
from model.config import ModelConfig
from model.documents import Sight, first_seen, mask
from model.head import head_logits, head_loss
from model.init import draw_weights
from model.layers import Embedding, Linear, Norm

# A parameter's name within the model or its block -> its role; gains and biases are known by their last word.
ROLES = {"embed.weight": "embed", "pos.weight": "pos", "head.weight": "head", "skips": "scalar",
         "attn.q.weight": "q", "attn.k.weight": "k", "attn.v.weight": "v", "attn.out.weight": "attn_out",
         "attn.value_mix": "scalar", "mlp.up.weight": "mlp_in", "mlp.down.weight": "mlp_out",
         "shortcut": "scalar"}

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
               "relu2": lambda x: F.relu(x).square()}       # ReLU²: So et al., arXiv:2109.08668


class GPT(nn.Module):
    """A decoder-only transformer over rows of (with learned positions: at most) `seq_len` tokens.

    Weights are made without values: call `init_weights` or load some. It may be built on "meta".
    With `track_logits` forward passes that record gradients note every head's largest attention logit.
    """

    def __init__(self, config: ModelConfig, seq_len: int, activation_dtype: torch.dtype = torch.float32,
                 track_logits: bool = False):
        super().__init__()
        self.config, self.seq_len, self.activation_dtype = config, seq_len, activation_dtype
        self.embed = Embedding(config.vocab_rows, config.width)
        self.pos = Embedding(seq_len, config.width) if config.positions == "learned" else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer, activation_dtype) for layer in range(config.layers))
        self.skips = nn.Parameter(torch.empty(config.layers // 2)) if config.unet else None
        self.head_norm = Norm(config, activation_dtype)
        self.head = None if config.tied else Linear(config.width, config.vocab_rows, config.biases)
        if activation_dtype == torch.bfloat16:
            for name, role in self.roles().items():
                if role in config.bf16_roles:
                    parameter = self.get_parameter(name)
                    parameter.data = parameter.data.to(torch.bfloat16)
        if track_logits:
            for attn in self.attentions().values():
                attn.max_logit = torch.full((config.heads,), -torch.inf, dtype=torch.float32)

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None,
                longest: int | None = None) -> Tensor:
        """Summed cross-entropies in nats (float32, 0-d) of tokens (b, t) against targets (b, t), int64.

        documents, int32 (k,): their boundaries over all b·t tokens as model/documents.py has them, each row's start
        among them; tokens see their own document only. None: each row is one. Positions count within the row
        in both cases. longest: a number of tokens that no document exceeds (None: t), which saves a GPU some work.
        """
        return head_loss(self.trunk(tokens, documents, longest), *self.head_weights(), targets, self.config)

    def losses(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None,
               longest: int | None = None) -> Tensor:
        """What `forward` sums, token by token: (b, t) float32, with all logits in memory."""
        logits = head_logits(self.trunk(tokens, documents, longest), *self.head_weights(), self.config.softcap)
        logits = logits if self.config.loss_over_padding else logits[..., :self.config.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def logits(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """The logits (b, t, vocab_size), float32, after the softcap, without the padding."""
        return self.read_out(self.trunk(tokens, documents))

    def trunk(self, tokens: Tensor, documents: Tensor | None = None, longest: int | None = None,
              pasts: list[Past] | None = None, start: int = 0) -> Tensor:
        """Everything before the head: tokens (b, t) -> (b, t, c).

        With `pasts`, a layer each, the tokens follow `start` others whose keys and values are there.
        """
        config, rotation, v0, outputs, t = self.config, None, None, [], tokens.shape[1]
        if config.positions == "rotary":
            rotation = rotary.tables(start + t, config.head_width, config.rotary_base, config.rotary, tokens.device)
            rotation = tuple(table[start:] for table in rotation) if start else rotation
        sight = self.sight(tokens, documents, longest) if pasts is None else None
        x = x0 = self.embedded(tokens, start)
        for layer, block in enumerate(self.blocks):
            mirror = config.layers - 1 - layer
            if config.unet and mirror < layer:
                x = x + self.skips[layer - config.layers // 2].to(x.dtype) * outputs[mirror]
            x, v = block(x, x0, v0, rotation, sight, None if pasts is None else pasts[layer])
            v0 = v if layer == 0 else v0
            if config.unet:
                outputs.append(x)
        return self.head_norm(x)

    def sight(self, tokens: Tensor, documents: Tensor | None, longest: int | None) -> Sight | None:
        """What tokens (b, t) see, made once for all layers; None where that is all that came before."""
        (b, t), window = tokens.shape, self.config.window
        window = None if window is None or window >= t else window
        if documents is None and window is None:
            return None
        sight = Sight(documents, window, min(longest or t, t), None)
        if self.attention_over(documents=True) == "varlen":
            return sight
        shown = mask(first_seen(sight, b, t, tokens.device), 0, t, t)
        return sight._replace(mask=shown.to(self.activation_dtype))

    def embedded(self, tokens: Tensor, start: int = 0) -> Tensor:
        """The start of the residual stream, (b, t, c) in its type: the activations', or float32 (or wider)."""
        x = self.embed(tokens)
        if self.pos is not None:
            end = start + tokens.shape[1]
            if end > self.seq_len:
                raise ValueError(f"rows of {end} tokens, but this model has positions for {self.seq_len}")
            x = x + self.pos(torch.arange(start, end, device=tokens.device))
        wide = self.config.residual == "float32"
        x = x.to(torch.promote_types(self.activation_dtype, torch.float32) if wide else self.activation_dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def read_out(self, x: Tensor) -> Tensor:
        """The logits of the trunk's output x (..., c): (..., vocab_size), float32."""
        return head_logits(x, *self.head_weights(), self.config.softcap)[..., :self.config.vocab_size]

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        return (self.embed.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    @property
    def attention_form(self) -> str:
        """The form of attention in use over whole rows, which depends on where the weights are."""
        return self.attention_over(documents=False)

    def attention_over(self, documents: bool) -> str:
        """sdpa, matmul or varlen: the form in use over documents or over whole rows; only varlen saves their work."""
        device, config = self.embed.weight.device, self.config
        hidden = documents or (config.window or self.seq_len) < self.seq_len
        return form_on(device, config.attention,
                       hidden and flash_takes(device, self.activation_dtype, config.head_width))

    def init_weights(self, seed: int) -> None:
        """Fill the weights in place; equal on every device and for every number of processes."""
        draw_weights(dict(self.named_parameters()), self.roles(), self.config, seed)

    def roles(self) -> dict[str, str]:
        """The role of every parameter, by name."""
        return {name: role_of(name) for name, _ in self.named_parameters()}

    def attentions(self) -> dict[str, Attention]:
        """The attention of every block, by name."""
        return {f"blocks.{layer}.attn": block.attn for layer, block in enumerate(self.blocks)}

    def max_logits(self) -> dict[str, Tensor]:
        """Attention's name -> (heads,) float32, the largest s·q·k of each head since the last reset: the tensors
        that the next forward pass raises, not copies. Empty without `track_logits`."""
        return {name: attn.max_logit for name, attn in self.attentions().items() if attn.max_logit is not None}

    def reset_max_logits(self) -> None:
        for largest in self.max_logits().values():
            largest.fill_(-torch.inf)

    def qk_parameters(self) -> dict[str, list[str]]:
        """Attention's name -> the names of the weights and biases that make its q and k, head after head in rows."""
        return {name: [f"{name}.{part}.{parameter}" for part in "qk"
                       for parameter, _ in attn.get_submodule(part).named_parameters()]
                for name, attn in self.attentions().items()}

    def flops_per_token(self) -> float:
        """Forward and backward: 6N + 12·L·H·Q·T, N without look-ups (PaLM, arXiv:2204.02311, appendix B).

        Of attention to whole rows: an upper bound where documents or a window hide some of a row.
        """
        looked_up = {"pos"} if self.config.tied else {"pos", "embed"}
        N = sum(p.numel() for name, p in self.named_parameters() if role_of(name) not in looked_up)
        L, H, Q, T = self.config.layers, self.config.heads, self.config.head_width, self.seq_len
        return float(6 * N + 12 * L * H * Q * T)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.branch_scale = config.attn_branch_scale
        self.shortcut = nn.Parameter(torch.empty(2)) if config.embed_shortcut else None
        self.attn_norm = Norm(config, dtype)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config, dtype)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, rotation, sight: Sight | None = None,
                past: Past = None) -> tuple[Tensor, Tensor]:
        """The stream x (b, t, c), its start x0 and the first layer's values -> the stream, this layer's."""
        if self.shortcut is not None:
            keep, again = self.shortcut.to(x.dtype)
            x = keep * x + again * x0
        y, v = self.attn(self.attn_norm(x), v0, rotation, sight=sight, past=past)
        x = x + (y if self.branch_scale == 1 else self.branch_scale * y)
        return x + self.mlp(self.mlp_norm(x)), v


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.width, config.mlp_hidden, config.biases)
        self.down = Linear(config.mlp_hidden, config.width, config.biases)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def role_of(name: str) -> str:
    """The role of the parameter `name`; ValueError if it has none."""
    inner, last = re.sub(r"^blocks\.\d+\.", "", name), name.rpartition(".")[2]
    if last not in ("gain", "bias") and inner not in ROLES:
        raise ValueError(f"parameter {name} has no role; give it one in ROLES")
    return last if last in ("gain", "bias") else ROLES[inner]
