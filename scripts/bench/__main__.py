"""Speed, measured in one run on one machine: python -m scripts.bench SUBCOMMAND [--help]"""
import os
import sys
from importlib import import_module
from importlib.util import find_spec

os.environ.setdefault("GOMP_SPINCOUNT", "2000")                       # as train.py does, and before torch is loaded

# Sub-command, and module of this folder with `main(arguments) -> exit code` -> what it answers.
SUBCOMMANDS = {
    "step": "a training step against a plain eager one; --breakdown: where its time goes; the largest micro-batch",
    "optimizer": "the whole optimizer step of a model under each rule, and its share of a training step",
    "compare": "two configurations in turns: the ratio of their speeds with its confidence interval",
    "kernels": "errors and times of the Triton kernels beside cuBLAS",
    "head": "the head and its loss in each form: torch, compiled, Triton",
    "loader": "batches a second out of token shards",
    "tokenise": "text to token shards, megabytes a second",
}


def usage() -> str:
    return "\n".join([__doc__, "", *(f"    {name:<11}{what}" for name, what in SUBCOMMANDS.items())])


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        return refuse(f"no sub-command {name!r}: take one of {', '.join(SUBCOMMANDS)}")
    if find_spec(f"scripts.bench.{name}") is None:
        return refuse(f"this checkout has no scripts/bench/{name}.py")
    try:
        return import_module(f"scripts.bench.{name}").main(rest)
    except ValueError as error:             # our own refusals are subclasses of it: ConfigError, ShardError, ...
        if type(error).__module__.split(".")[0] not in ("scripts", "harness", "data", "optim", "model"):
            raise
        return refuse(str(error))


def refuse(why: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(f"error: {line}" for line in why.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
