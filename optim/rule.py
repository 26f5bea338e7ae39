"""What an update rule is: one file in this folder, a frozen dataclass of hyperparameters with `init` and `update`.

A rule knows its formula and nothing else: not which parameters it is given, not how many ranks there are, not where
gradients come from. It works on stacks of equal logical matrices (n, rows, cols), rows = fan out, cols = fan in, each
matrix for itself; or, `elementwise`, on tensors of any shape, usually a whole group's parameters end to end. What is
one logical matrix, a whole weight or one head of it, is the driver's business (optim/driver.py, optim/blocks.py).

To add one: write the file, list it in RULES (optim/__init__.py). `init` and `update` are all that most rules need
beside their hyperparameters; the rest of this class are defaults to override.
"""
from typing import ClassVar

from torch import Generator, Tensor


class Rule:
    elementwise: ClassVar[bool] = False                        # w is any tensor, and cutting it changes nothing
    VARYING: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")  # hyperparameters that a schedule may move

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """State before the first update. Every tensor's first dimension is that of `W`, so that stacks may be cut
        anywhere. Raises ValueError, with the remedy, for a shape that the rule cannot take; `W` may be on "meta"."""
        return {}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        """One step, in place on `W` and `state`; G is read only. May be compiled: no branch on a tensor's value.

        `h` holds VARYING and t (updates including this one, from 1) as 0-d float64 tensors on W's device. These, not
        the fields of the same names, are the values to use. With h["weight_decay"] = 0 the change of W must not
        depend on W, unless the rule says `confines`: cautious decay and hyperball rest on that.
        """
        raise NotImplementedError

    # ---- what tables, owners and options ask

    def lr_multiplier(self, rows: int, cols: int) -> float:
        """The factor on `lr` for matrices of this shape."""
        return 1.0

    def step_rms(self, rows: int, cols: int) -> float:
        """The root mean square of an entry's change in one update at learning rate 1, without decay, for a direction
        as the rule means it (orthogonal, all signs, Adam's ±1)."""
        return self.lr_multiplier(rows, cols)

    def shrinkage(self, h: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        """The share of W that weight decay takes away in one update, 0-d; what cautious decay applies instead."""
        return h["lr"] * h["weight_decay"]

    def flops(self, rows: int, cols: int) -> float:
        """Floating-point operations of one update of one matrix, refreshes averaged in; owners are chosen by it."""
        return 10.0 * rows * cols

    def state_numbers(self, rows: int, cols: int) -> int:
        """How many numbers of state one matrix needs by the paper's formula; tables show it beside what init makes."""
        return 0

    @property
    def orthogonalises(self) -> bool:
        """Whether the rule, as it is set, runs Newton-Schulz steps in `ns_dtype`; runs announce how."""
        return hasattr(self, "ns_dtype")

    # ---- what few rules have

    def fuses(self, W: Tensor) -> bool:
        """Whether `fused_update` is to be called for stacks that lie in memory as `W` does."""
        return False

    def fused_update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor], clip: Tensor | None,
                     keep: Tensor) -> None:
        """What `update` does with G times `clip` (0-d), in kernels of its own, and only where `keep` is true (bool, 0-d
        or one for each matrix). Never compiled."""
        raise NotImplementedError

    takes_vectors: ClassVar[bool] = False                      # vectors come as stacks of one column, (n, numel, 1)
    coupled_decay: ClassVar[bool] = False                      # decay goes through the gradient, as in Adam's L2 form
    confines: ClassVar[bool] = False                           # the step depends on W (Scion's shrinking ball)

    clips_heads: ClassVar[bool] = False                        # `clip_factors` is to be asked after every step

    def refresh_due(self, step: int, index: int, count: int) -> bool:
        """Whether `refresh` is due after the update that follows `step` completed ones, for matrix `index` of the
        group's `count`: rules spread the work over steps by it. Equal for any number of ranks."""
        return False

    def refresh(self, state: dict[str, Tensor], step: int) -> None:
        """Seldom and costly work on the state (n, ...), in place: new eigenbases, roots. Never compiled."""

    def initial_weights(self, rows: int, cols: int, generator: Generator) -> Tensor | None:
        """Float32 values (rows, cols) that the rule wants a matrix to start from; None: the model's own."""
        return None

    def clip_factors(self, max_logit: Tensor) -> Tensor:
        """What to multiply every head's query and key weights by after a step in which its largest attention logit was
        `max_logit` (heads,): 1 to leave a head alone."""
        raise NotImplementedError
