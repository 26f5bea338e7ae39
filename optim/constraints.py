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

from optim.groups import Group


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
    tiny = torch.finfo(D.dtype).tiny
    D = D / torch.linalg.vector_norm(D, float("inf"), (-2, -1), keepdim=True).clamp(min=tiny)      # squares stay finite
    radius = torch.linalg.matrix_norm(W, keepdim=True)
    moved = W + lr * radius * D / torch.linalg.matrix_norm(D, keepdim=True).clamp(min=tiny)
    return radius * moved / torch.linalg.matrix_norm(moved, keepdim=True).clamp(min=tiny)


def fuses(group: Group, W: Tensor) -> bool:
    """Whether the rule's own kernels make the whole update of a share `W`: no option of the group is in their way."""
    return not (group.cautious or group.hyperball) and group.hyper.fuses(W)


def update(group: Group, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor],
           clip: Tensor | None) -> None:
    """The update of a rank's share `W` of a bank, in place on `W` and `state`."""
    G = G if clip is None else G * clip.to(G.dtype)
    constrained_update(group.hyper, group.cautious, group.hyperball, W, G, state, h)


def guarded_update(group: Group, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor],
                   clip: Tensor | None, keep: Tensor) -> None:
    """The same, undone on the device unless `keep`: no host has to look first. Compiled, it costs no copies.

    keep: bool, 0-d, or one for each matrix or element of `W`.
    """
    kept = [W, *state.values()]
    before = [t.clone() for t in kept]
    update(group, W, G, state, h, clip)
    for t, old in zip(kept, before):
        t.copy_(torch.where(keep.view(-1, *[1] * (t.ndim - 1)), t, old))
