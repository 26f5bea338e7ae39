"""Options that any rule takes, written as keys of its group: cautious decay and hyperball.

Both need the rule's step D alone. With weight decay off a step does not depend on the weight, so that D is what the
rule makes of a weight of zeros; it is exact, where a difference of weights would have been rounded.

    cautious     W ← W + D - δ mask ⊙ W         mask = 1 where D ⊙ W ≤ 0, that is where the step shrinks the weight
                 δ: the rule's own decay a step  (Chen et al., arXiv:2510.12402; modded-nanogpt from record 43 on)
    hyperball    W' = W + η R D/‖D‖_F,  W ← R W'/‖W'‖_F       R = ‖W‖_F, which the step itself preserves
                 (arXiv:2606.16899; the rows AdamH, MuonH, ... of modded-nanogpt's track 3)

With hyperball the learning rate η is the step's length relative to the weight's, whatever the rule and the shape,
there is no weight decay, and weights that start at zero stay there.
"""
import torch
from torch import Tensor


def constrained_update(rule, cautious: bool, hyperball: bool, W: Tensor, G: Tensor, state: dict[str, Tensor],
                       h: dict[str, Tensor]) -> None:
    """The rule's update of `W` (n, rows, cols) and `state`, in place, under the group's options."""
    if not (cautious or hyperball):
        rule.update(W, G, state, h)
        return
    D = torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))
    off = {"weight_decay": torch.zeros_like(h["lr"])} if "weight_decay" in h else {}
    if hyperball:
        rule.update(D, G, state, {**h, **off, "lr": torch.ones_like(h["lr"])})
        W.copy_(on_sphere(W.to(D.dtype), D, h["lr"]))
    else:
        rule.update(D, G, state, {**h, **off})
        old = W.to(D.dtype)
        mask = (D * old.sign() <= 0).to(D.dtype)
        W.copy_(old + D - rule.shrinkage(h, *(*W.shape, 1, 1)[1:3]) * mask * old)


def on_sphere(W: Tensor, D: Tensor, lr: Tensor) -> Tensor:
    """W moved by lr‖W‖ along D and brought back to its norm, for every matrix of (n, rows, cols)."""
    tiny = 1e-10
    radius = torch.linalg.matrix_norm(W, keepdim=True)
    moved = W + lr * radius * D / torch.linalg.matrix_norm(D, keepdim=True).clamp(min=tiny)
    return radius * moved / torch.linalg.matrix_norm(moved, keepdim=True).clamp(min=tiny)
