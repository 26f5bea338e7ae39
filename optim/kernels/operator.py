"""The symmetric product as an operator of torch, which `torch.compile` takes as it is."""
import torch
from torch import Tensor

from optim.kernels import symmetric


@torch.library.custom_op("nanogpt::symmetric_product", mutates_args=())
def symmetric_product(P: Tensor, Q: Tensor, D: Tensor | None, alpha: float, beta: float) -> Tensor:
    return symmetric.symmetric_product(P, Q, D, alpha, beta)


@symmetric_product.register_fake
def _(P: Tensor, Q: Tensor, D: Tensor | None, alpha: float, beta: float) -> Tensor:
    return P.new_empty(P.shape[0], P.shape[1], P.shape[1])
