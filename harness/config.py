"""The configuration of a run: every key of a YAML file, its type, its default and what it means.

A key is declared once, here or beside the code that reads it (model/config.py, data/loader.py, optim/*.py).
The comment behind a field is its documentation: `python -m harness.schema` copies it to configs/schema.json,
where editors find it. Constraints within one key are in its type, those between keys in `__post_init__`, and
harness/load.py reports both.
"""
import dataclasses
import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data.loader import DataConfig
from data.orders import ORDERS, RANKS
from harness.emit import lines_of
from model.config import ModelConfig
from optim.backend import Kernels
from optim.groups import REST, Group
from optim.schedules import Schedule

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Diagnostic = Literal["updates", "logits", "smoothness"]  # see optim/diagnostics.py
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]

# Keys that do not change the mathematics: configurations that differ in these only describe the same run, and
# `--resume auto` may continue one with the other. (The last four change rounding, no more.)
NOT_IDENTITY = frozenset({"name", "runs_dir", "log", "trials", "checkpoint_every", "keep_checkpoints",
                          "diagnostics", "micro_batch_tokens", "compile", "kernels", "deterministic"})


@dataclass(frozen=True, config={"extra": "forbid"})
class ValEvery:
    every: Count                        # validate every so many steps
    from_step: Whole | None = None      # from this step on
    from_frac: Fraction | None = None   # or from this fraction of the run on

    def __post_init__(self):
        if self.from_step is not None and self.from_frac is not None:
            raise ValueError("from_step and from_frac say the same thing; remove one")

    def first_step(self, steps: int) -> int:
        """The step from which this entry holds in a run of `steps`; 0 where it does not say."""
        return self.from_step or 0 if self.from_frac is None else round(self.from_frac * steps)


ValPlan = Annotated[tuple[ValEvery, ...], Field(min_length=1)]
Groups = Annotated[tuple[Group, ...], Field(min_length=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class Config:
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]  # of the run directory; default: the file's own name
    steps: Count                                # updates of the weights in the whole run
    batch_tokens: Count                         # tokens an update, over all ranks and micro-batches
    seq_len: Count                              # tokens a row of the batch, the longest context
    val_tokens: Count                           # tokens validated on: the first ones of data.val
    val_every: Count | ValPlan                  # steps between validations, or several with their beginnings
    model: ModelConfig                          # the transformer
    data: DataConfig                            # token shards
    optim: Groups                               # which update rule trains which parameters; merged by name
    schedule: Schedule = Field(default_factory=Schedule)  # multiplies every group's lr over the run
    seed: Whole = 0                             # of the initial weights
    micro_batch_tokens: Count | None = None     # tokens a forward pass on one rank; null = as many as fit
    target_val_loss: Positive | None = None     # the run says when validation first reaches it; nats a token
    target_on: Literal["raw", "average"] = "raw"  # which weights must reach the target
    loss_reduction: Literal["mean", "sum"] = "mean"  # over the tokens of a batch, before the gradient
    grad_clip: Positive | None = None           # largest global 2-norm of a gradient; null = no clipping
    average: Decay | None = None                # decay a step of an average of the weights; null = no average
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of activations; auto = bfloat16 where fast
    compile: bool | None = None                 # torch.compile; null = on for a GPU, off for a CPU
    kernels: Kernels = "auto"                   # of orthogonalisations; auto = Triton on a GPU, torch elsewhere
    trials: Count = 1                           # runs in a row, with seeds seed, seed+1, ...
    runs_dir: str = "runs"                      # where run directories are made
    log: tuple[Literal["wandb", "speedrun"], ...] = ()  # logs beside the run's own
    diagnostics: tuple[Diagnostic, ...] = ()    # measured in the step after each validation: its updates, logits, ...
    checkpoint_every: Count | None = None       # steps between checkpoints; null = none but when stopped
    keep_checkpoints: Count = 2                 # how many checkpoints to keep, the latest ones
    deterministic: bool = False                 # on a GPU only algorithms that repeat every bit, if slower

    def __post_init__(self):
        if problems := [*self._tokens_that_do_not_fit(), *self._documents_that_cannot_be(), *self._groups_that_clash(),
                        *self._entries_out_of_order(), *self._keys_nothing_reads(),
                        *self._points_out_of_order()]:
            raise ValueError("\n".join(problems))

    @property
    def needs_logits(self) -> bool:
        """Whether forward passes must note the largest attention logits."""
        return "logits" in self.diagnostics or any(group.hyper.clips_heads for group in self.optim)

    def validation_steps(self) -> frozenset[int]:
        """The numbers of completed updates at which to validate: multiples of `val_every`, and the end."""
        plan = self.val_every if isinstance(self.val_every, tuple) else (ValEvery(every=self.val_every),)
        starts = [entry.first_step(self.steps) for entry in plan]
        ends = [*starts[1:], self.steps]
        multiples = [step for entry, start, end in zip(plan, starts, ends)
                     for step in range(start, min(end, self.steps)) if step % entry.every == 0]
        return frozenset([*multiples, self.steps])

    def checkpoint_steps(self) -> frozenset[int]:
        """The numbers of completed updates at which to save: multiples of `checkpoint_every`, and the end."""
        if self.checkpoint_every is None:
            return frozenset()
        return frozenset({*range(self.checkpoint_every, self.steps, self.checkpoint_every), self.steps})

    def _tokens_that_do_not_fit(self):
        for key in ("batch_tokens", "micro_batch_tokens", "val_tokens"):
            tokens = getattr(self, key)
            if tokens is not None and tokens % self.seq_len:
                yield (f"{key} {tokens} is not a multiple of seq_len {self.seq_len}; "
                       f"{_nearest(tokens, self.seq_len)}")
        if (self.micro_batch_tokens or 0) > self.batch_tokens:
            yield (f"micro_batch_tokens {self.micro_batch_tokens} is more than batch_tokens "
                   f"{self.batch_tokens}; lower it or leave it null")
        unit = RANKS * self.seq_len
        uneven = self.batch_tokens % self.seq_len == 0 and self.batch_tokens % unit > 0
        if self.data.order in ORDERS and uneven:
            yield (f"batch_tokens {self.batch_tokens} is not a multiple of {RANKS} x seq_len {self.seq_len}, "
                   f"but data.order {self.data.order} is that of a script on {RANKS} GPUs; "
                   f"{_nearest(self.batch_tokens, unit)}, or data.order: continuous")

    def _documents_that_cannot_be(self):
        longest, end_of_text = self.data.max_document_tokens, self.data.end_of_text
        if longest is not None and longest > self.seq_len:
            yield (f"data.max_document_tokens {longest} is more than seq_len {self.seq_len}, and no row holds as much; "
                   f"leave it out, or use at most {self.seq_len}")
        if end_of_text is not None and end_of_text >= self.model.vocab_size:
            key = "documents: separate" if self.data.documents == "separate" else "order: documents"
            yield (f"data.{key} looks for id {end_of_text}, with which documents begin in data.tokenizer "
                   f"{self.data.tokenizer}, but model.vocab_size is {self.model.vocab_size}; correct one of them")

    def _groups_that_clash(self):
        names = [group.name for group in self.optim]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"optim: two groups have the name {name!r}; rename one"
        rests = [group.name for group in self.optim if REST in group.params]
        if len(rests) > 1:
            yield f"optim: {' and '.join(rests)} both take `{REST}`; only one group can have what is left"

    def _entries_out_of_order(self):
        for key in ("log", "diagnostics"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                yield f"{key}: {', '.join(getattr(self, key))} names one twice; remove it"
        plan = self.val_every if isinstance(self.val_every, tuple) else ()
        starts = [entry.first_step(self.steps) for entry in plan]
        if any(later < earlier for earlier, later in zip(starts, starts[1:])):
            yield (f"val_every: the entries begin at steps {', '.join(map(str, starts))}; sort them by "
                   "their beginnings")

    def _keys_nothing_reads(self):
        if self.target_on == "average" and self.average is None:
            yield "target_on is average, but there is no average; set average or target_on: raw"
        elif self.target_on == "average" and self.target_val_loss is None:
            yield "target_on is not read without target_val_loss; set target_val_loss or remove target_on"

    def _points_out_of_order(self):
        schedules = {"schedule": self.schedule}
        for group in self.optim:
            above = f"optim.{group.name}"
            schedules |= {f"{above}.schedule": group.schedule} if group.schedule else {}
            schedules |= {f"{above}.scheduled.{key}": each for key, each in group.scheduled.items()}
        for key, each in schedules.items():
            try:
                each.at(0, self.steps)
            except ValueError as error:
                yield f"{key}: {error}"


def _nearest(tokens: int, unit: int) -> str:
    below, above = tokens // unit * unit, -(-tokens // unit) * unit
    return f"use {above}" if below == 0 else f"use {below} or {above}"


def to_yaml(config: Config) -> str:
    """YAML of every key, defaults too, that loads back to an equal Config."""
    return "".join(f"{line}\n" for _, line in lines_of(config))


def config_identity(config: Config) -> str:
    """16 hex digits that are equal for configurations that describe the same run with the same seed.

    A digest of every key except NOT_IDENTITY; `--resume auto` continues only a run of equal identity.
    """
    keys = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
