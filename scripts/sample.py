"""Continue a prompt with a trained model.

    python -m scripts.sample runs/<run> --prompt "def main" --tokens 200 --temperature 0.8 --top-k 50 --seed 0
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizers import by_name
from harness import checkpoint
from harness.config import Config
from harness.load import ConfigError, load
from model.gpt import GPT


def load_run(run: Path) -> tuple[Config, GPT]:
    """The configuration and the model (float32, CPU) of a run's newest intact checkpoint.

    It has the weights that the run's target is asked of: the last ones, or their average where target_on says so.
    """
    config = load(str(run / "config.yaml"), []).config
    found = checkpoint.newest_intact(run / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run}/checkpoints holds no intact checkpoint")
    content, model = found[1], GPT(config.model, config.seq_len)
    weights = content["model"]
    if config.target_on == "average" and content["step"] > 0:
        debias = 1 - config.average ** content["step"]            # the average started from zero (optim/driver.py)
        weights = {name: content["optimizer"][name]["average"] / debias for name in weights}
    model.load_state_dict(weights)
    return config, model


@torch.no_grad()
def continue_tokens(model: GPT, prompt: list[int], new_tokens: int, seq_len: int, temperature: float, top_k: int | None,
                    generator: torch.Generator) -> list[int]:
    """`new_tokens` more tokens, each drawn from the model's distribution given the last seq_len ones."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits: Tensor = model.logits(torch.tensor([tokens[-seq_len:]]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        logits = logits / temperature
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return tokens


def sample(run: Path, prompt: str, new_tokens: int, temperature: float, top_k: int | None, seed: int) -> str:
    """Text that continues `prompt` (which may be empty), the prompt included."""
    config, model = load_run(run)
    encoding = by_name(config.data.tokenizer)
    start = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    tokens = continue_tokens(model, start, new_tokens, config.seq_len, temperature, top_k,
                             torch.Generator().manual_seed(seed))
    return encoding.decode(tokens[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=None, help="draw from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(sample(args.run, args.prompt, args.tokens, args.temperature, args.top_k, args.seed))
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
