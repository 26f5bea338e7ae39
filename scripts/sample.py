"""Continue a prompt with a trained model, on a GPU if there is one.

    python -m scripts.sample runs/<run> --prompt "def main" --tokens 200 --temperature 0.8 --top-p 0.9 --seed 0
    python -m scripts.sample runs/<run> --prompt-file notes.txt          # - reads standard input

The text goes to standard output, the speed to standard error. When the text outgrows the model's context, the older
half of it is forgotten (model/generate.py).
"""
import math
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from data.arguments import Parser, at_least, exit_with, line_of
from data.tokenizers import by_name
from harness import checkpoint
from harness.config import Config
from harness.load import ConfigError, load
from model.generate import continuation
from model.gpt import GPT


def load_run(run: Path, activation_dtype: torch.dtype = torch.float32) -> tuple[Config, GPT]:
    """The configuration and the model (on the CPU) of a run's newest intact checkpoint.

    It has the weights that the run's target is asked of: the last ones, or their average where target_on says so.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run directory (there is no config.yaml in it); take one of runs/")
    config = load(str(run / "config.yaml"), []).config
    found = checkpoint.newest_intact(run / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run}/checkpoints holds no intact checkpoint: let the run end (train.py --resume)")
    content, model = found[1], GPT(config.model, config.seq_len, activation_dtype)
    weights = content["model"]
    if config.target_on == "average" and content["step"] > 0:
        debias = 1 - config.average ** content["step"]            # the average started from zero (optim/driver.py)
        weights = {name: content["optimizer"][name]["average"] / debias for name in weights}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{run}: the checkpoint is of another model than config.yaml says; restore that") from None
    return config, model


def sample(run: Path, prompt: str, new_tokens: int, temperature: float, top_k: int | None, seed: int,
           top_p: float | None = None) -> tuple[str, float]:
    """Text that continues `prompt` (which may be empty), the prompt included; and the tokens drawn a second."""
    config, model = load_run(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoding = by_name(config.data.tokenizer)
    start = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    drawn = continuation(model, start, temperature, top_k, top_p, torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    tokens = list(islice(drawn, new_tokens))
    return encoding.decode(start[1:] + tokens), new_tokens / (time.perf_counter() - began)


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input for "-"; ValueError where that is not UTF-8."""
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {path}: not UTF-8 text (byte {error.start})") from error


def main() -> int:
    parser = Parser("python -m scripts.sample", __doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file of text to continue; - is standard input")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="how many tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=at_least(1), help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that together have this share")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    for wrong, message in ((not 0 <= args.temperature < math.inf, "--temperature must be a number from 0 on"),
                           (args.top_p is not None and not 0 < args.top_p <= 1, "--top-p must be above 0, at most 1")):
        if wrong:
            parser.error(message)
    try:
        text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
        text, tokens_per_s = sample(args.run, text, args.tokens, args.temperature, args.top_k, args.seed, args.top_p)
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    print(text)
    print(f"{tokens_per_s:,.0f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with(main)
