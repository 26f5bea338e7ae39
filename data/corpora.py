"""The published corpora of GPT-2 tokens on Hugging Face, and how many of their shards a run reads.

A training shard has 100,000,000 tokens, the last one of a corpus fewer; shard 0 is for validation. The counts are
from the repositories' own listings.
"""
import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.loader import steps_in, tokens_needed
from data.shards import ShardError

SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Corpus:
    name: str               # on the command line, and of its folder
    repo: str               # the data set repository on Hugging Face
    prefix: str             # of the file names, before _train_ and _val_
    shards: int             # for training, numbered from 1
    last_tokens: int = 0    # of the last one; 0 = not known here, so that arithmetic does not count on it

    @property
    def val_file(self) -> str:
        return f"{self.prefix}_val_000000.bin"

    @property
    def train_files(self) -> list[str]:
        return [f"{self.prefix}_train_{number:06d}.bin" for number in range(1, self.shards + 1)]

    def files(self, shards: int) -> list[str]:
        """The validation shard and the first `shards` training shards."""
        if not 0 <= shards <= self.shards:
            raise ShardError(f"--shards {shards}: {self.name} has {self.shards} training shards; take 0 to "
                             f"{self.shards}")
        return [self.val_file, *self.train_files[:shards]]

    def tokens(self, file: str) -> int:
        """How many tokens the training shard `file` has."""
        return self.last_tokens if file == self.train_files[-1] else SHARD_TOKENS


CORPORA = {corpus.name: corpus for corpus in (
    Corpus("fineweb10B", "kjj0/fineweb10B-gpt2", "fineweb", 103, 55_324_043),
    Corpus("fineweb100B", "kjj0/fineweb100B-gpt2", "fineweb", 1030),
    Corpus("finewebedu10B", "kjj0/finewebedu10B-gpt2", "finewebedu", 99),
    Corpus("edu-100B", "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", 1001))}


def by_name(name: str) -> Corpus:
    if name not in CORPORA:
        raise ShardError(f"{name!r} is no published corpus known here: take one of {', '.join(CORPORA)}")
    return CORPORA[name]


def of_patterns(train: str, val: str, name: str | None = None) -> tuple[Corpus, Path]:
    """The corpus whose files the patterns data.train and data.val match, and the folder that they belong in.

    Where two corpora have the same file names, `name` decides, or else the folder's name.
    """
    folder, found = Path(os.path.expanduser(train)).parent, {}
    for corpus in CORPORA.values():
        if fnmatch.filter(corpus.train_files, Path(train).name):
            found[corpus.name] = corpus
    if not found:
        raise ShardError(f"data.train {train!r} matches no file of {', '.join(CORPORA)}: nothing to download for it "
                         "(`python -m data.demo` writes the demo's shards)")
    chosen = found.get(name or folder.name, None if name or len(found) > 1 else next(iter(found.values())))
    if chosen is None:
        raise ShardError(f"data.train {train!r} matches the files of {' and of '.join(found)}, "
                         + (f"not those of {name}" if name and name not in found else "and its folder is named like "
                            "none of them: name the corpus on the command line"))
    if Path(os.path.expanduser(val)).parent != folder or not fnmatch.fnmatch(chosen.val_file, Path(val).name):
        raise ShardError(f"data.val {val!r} does not match {folder / chosen.val_file}, the validation shard of "
                         f"{chosen.name}: correct data.val, or download with --shards and --out")
    return chosen, folder


def files_for(corpus: Corpus, train: str, order: str, repeat: bool, steps: int, batch_tokens: int,
              seq_len: int) -> list[str]:
    """The files that a run reads: the validation shard, and the fewest training shards that its steps need.

    Raises:
        ShardError: the corpus, as far as the pattern `train` matches it, is too short and data.repeat is off.
    """
    names = [name for name in fnmatch.filter(corpus.train_files, Path(train).name) if corpus.tokens(name)]
    counts = np.array([corpus.tokens(name) for name in names], dtype=np.int64)
    for count in range(1, len(names) + 1):
        if steps_in(order, counts[:count], batch_tokens, seq_len) >= steps:
            return [corpus.val_file, *names[:count]]
    if not repeat:
        raise ShardError(f"{steps:,} steps of {batch_tokens:,} tokens need {tokens_needed(steps, batch_tokens):,} "
                         f"tokens, but the {len(names)} training shards of {corpus.name} that data.train matches last "
                         f"for {steps_in(order, counts, batch_tokens, seq_len):,} steps in data.order {order}; take "
                         "fewer steps, a larger corpus, or set data.repeat=true")
    return [corpus.val_file, *names]
