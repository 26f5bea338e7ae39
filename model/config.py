"""What the `model` section of a configuration may say.

The defaults are GPT-2 as published (Radford et al., 2019): learned positions, LayerNorm, tanh-GELU, biases, a
tied head, N(0, .02). `null` means the default. A parameter's *role* is what optimizer groups, initial values
and tables speak of.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

Role = Literal["embed", "pos", "head", "q", "k", "v", "attn_out", "mlp_in", "mlp_out",
               "gain", "bias", "scalar", "gate"]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Zeros = Literal["zeros"]

STRICT = {"extra": "forbid"}


@dataclass(frozen=True, config=STRICT)
class Draw:
    """How one weight is drawn: with width `scale`, divided by what `over` says."""

    form: Literal["normal", "uniform"] = "normal"  # distribution, centred on zero
    scale: Positive = 0.02  # standard deviation of normal, half-width of uniform
    over: Literal["one", "sqrt_fan_in", "sqrt_2_layers"] = "one"  # what divides the scale; fan_in = columns


@dataclass(frozen=True, config=STRICT)
class Init:
    """Initial values by role. torch's nn.Linear default is {form: uniform, scale: 1.0, over: sqrt_fan_in}."""

    embed: Draw | Zeros = Draw()  # token embedding; the tied matrix where the head is tied
    pos: Draw | Zeros = Draw()  # learned positions
    head: Draw | Zeros = Draw()  # untied head
    qkv: Draw | Zeros = Draw()  # query, key and value weights
    attn_out: Draw | Zeros = Draw(over="sqrt_2_layers")  # attention's output projection
    mlp_in: Draw | Zeros = Draw()  # the MLP's first weight
    mlp_out: Draw | Zeros = Draw(over="sqrt_2_layers")  # the MLP's output projection
    bias: Literal["zeros", "as_weight"] = "zeros"  # as_weight: drawn as the weight beside it (norms: zeros)
    in_bias: Draw | None = None  # biases of q, k, v and the MLP's first weight, with its fan_in (null: as `bias`)


@dataclass(frozen=True, config=STRICT)
class Softcap:
    """A bound on the logits z."""

    READ_WHEN: ClassVar = {"scale": {"form": ("tanh", "sigmoid")}, "shift": {"form": ("sigmoid",)}}

    form: Literal["tanh", "sigmoid", "isru"]  # cap·tanh(z/scale), cap·σ((z+shift)/scale), cap·z/√(z²+cap²)
    cap: Positive  # the bound
    scale: Positive | None = None  # divides the logits (null: cap)
    shift: float = 0.0  # added to the logits
    before_cast: bool = False  # computed in the activations' type, before logits become float32


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The transformer: sizes, parts and initial values."""

    READ_WHEN: ClassVar = {
        "rotary": {"positions": ("rotary",)},
        "rotary_base": {"positions": ("rotary",)},
    }

    vocab_size: Count  # token ids are 0 .. vocab_size-1
    layers: Count  # transformer blocks
    heads: Count  # attention heads per block
    width: Count  # width of the residual stream
    padded_vocab_size: Count | None = None  # rows of embedding and head (null: vocab_size)
    loss_over_padding: bool = True  # whether the softmax of the loss includes the padding
    head_dim: Count | None = None  # width of one attention head (null: width / heads)
    mlp_width: Count | None = None  # hidden width of the MLP (null: 4·width)
    positions: Literal["learned", "rotary"] = "learned"  # how a token knows where it is
    rotary: Literal["full", "half"] = "full"  # half: half of the frequencies are zero
    rotary_base: Positive = 10000.0  # the slowest rotation is (about) 1/base radians per token
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # normalisation
    norm_gain: bool = True  # norms multiply by a learned gain
    norm_eps: Positive | None = None  # added to the (mean) square (null: 1e-5, or float32's 1.19e-7 for rmsnorm)
    embed_norm: bool = False  # a norm after the embedding
    residual: Literal["activations", "float32"] = "activations"  # residual stream; float32: as in autocast
    qk_norm: Literal["none", "before_rotary", "after_rotary"] = "none"  # RMSNorm, without gain, of queries and keys
    attn_scale: Positive | None = None  # multiplies the attention scores (null: head_dim^-0.5)
    attn_branch_scale: Positive = 1.0  # multiplies what attention adds to the residual stream
    value_residual: Literal["none", "fixed", "learned"] = "none"  # mix in the first layer's values (λ = .5 or learned)
    embed_shortcut: bool = False  # blocks start from λ0·x + λ1·x0, with x0 the embedding
    unet: bool = False  # blocks of the second half also read their mirror block's output
    activation: Literal["gelu", "gelu_tanh", "relu2"] = "gelu_tanh"  # the MLP's nonlinearity
    biases: bool = True  # linear maps (an untied head too) and LayerNorm have biases
    tied: bool = True  # the head is the token embedding
    softcap: Softcap | None = None  # bound on the logits
    loss: Literal["torch", "triton"] = "torch"  # triton: softcap, loss and gradient in one kernel, no float32 logits
    window: Count | None = None  # a token sees itself and window-1 before it (null: all before it)
    attention: Literal["auto", "sdpa", "matmul"] = "auto"  # auto: matmul on CPUs, else sdpa, varlen for what hides keys
    bf16_roles: tuple[Role, ...] = ()  # roles stored in bfloat16 when activations are bfloat16
    init: Init = Init()  # initial values

    def __post_init__(self):
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; set head_dim")
        multiple = {"full": 2, "half": 4}[self.rotary]
        if self.positions == "rotary" and self.head_width % multiple:
            raise ValueError(f"rotary: {self.rotary} needs a head_dim that is a multiple of {multiple}, "
                             f"not {self.head_width}")
        if self.vocab_rows < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below "
                             f"vocab_size {self.vocab_size}")
        if self.unet and self.layers % 2:
            raise ValueError(f"unet pairs the blocks: layers must be even, not {self.layers}")
        for key, unread in {"head": self.tied, "pos": self.positions != "learned"}.items():
            if unread and getattr(self.init, key) != Draw():
                raise ValueError(f"init.{key} is set, but this model has no such parameter; remove it")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def vocab_rows(self) -> int:
        return self.padded_vocab_size or self.vocab_size
