"""Initial values. Each parameter is drawn on the CPU, in float32, from a generator seeded by the run's seed
and the parameter's name: the same on every device, whatever else this configuration adds or leaves out.
"""

import math
import zlib

import torch
from torch import Tensor

from model.config import Draw, ModelConfig

SCALARS = {"value_mix": [0.5], "shortcut": [1.0, 0.0], "skips": [1.0]}


@torch.no_grad()
def draw_weights(parameters: dict[str, Tensor], roles: dict[str, str], config: ModelConfig, seed: int):
    """Fill every parameter in place, whatever its storage; ValueError for one without a rule."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if roles[name] == "gain":
            values = torch.ones(())
        elif roles[name] == "scalar":
            values = torch.tensor(SCALARS[name.rpartition(".")[2]])
        else:
            values = drawn(parameter.shape, *rule(name, parameters, roles, config), config, generator)
        parameter.copy_(values)


def rule(name, parameters, roles, config) -> tuple[Draw | str, int]:
    """How to draw the weight or bias `name`, and its fan-in (of a bias: that of the weight beside it)."""
    init = config.init
    by_role = {"embed": init.embed, "pos": init.pos, "head": init.head, "q": init.qkv, "k": init.qkv,
               "v": init.qkv, "attn_out": init.attn_out, "mlp_in": init.mlp_in, "mlp_out": init.mlp_out}
    weight = name.removesuffix("bias") + "weight" if roles[name] == "bias" else name
    if roles[name] == "bias" and init.in_bias and roles.get(weight) in ("q", "k", "v", "mlp_in"):
        return init.in_bias, parameters[weight].shape[1]
    if roles[name] == "bias" and (init.bias == "zeros" or weight not in parameters):    # norms have no weight
        return "zeros", 1
    if roles[weight] not in by_role:
        raise ValueError(f"no initial values for parameter {name} of role {roles[name]}; give it a rule here")
    return by_role[roles[weight]], parameters[weight].shape[1]


def drawn(shape, how: Draw | str, fan_in: int, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Values of this shape, float32, on the CPU."""
    values = torch.zeros(shape, device="cpu", dtype=torch.float32)
    if how == "zeros":
        return values
    width = how.scale / {"one": 1.0, "sqrt_fan_in": math.sqrt(fan_in),
                         "sqrt_2_layers": math.sqrt(2 * config.layers)}[how.over]
    if how.form == "normal":
        return values.normal_(0.0, width, generator=generator)
    return values.uniform_(-width, width, generator=generator)
