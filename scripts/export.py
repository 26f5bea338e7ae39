"""Write a trained model as a folder that others load without this project.

    python -m scripts.export runs/<run> --out models/mine
    python -m scripts.export runs/<run> --out models/mine --form hf

`ours`, for every model: model.safetensors, config.json, and model.py, which needs torch and safetensors only. `hf`, for
GPT-2's form: what transformers' GPT2LMHeadModel loads, with the tokenizer's files where the vocabulary is at hand. Both
have a README.md with the loss, the configuration and how to load them. Weights are float32, without the vocabulary's
padding: those that the run's target is asked of, the last ones or their average. The folder is read back and its
logits compared before it gets its name.
"""
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.arguments import Parser, exit_with, line_of
from data.documents import END_OF_TEXT
from data.shards import make_folder
from data.tokenizers import END_OF_TEXT as END_OF_TEXT_TOKEN
from data.tokenizers import VocabularyError, by_name
from harness import checkpoint
from harness.config import Config
from harness.load import ConfigError
from harness.rundir import read_log
from model.gpt import GPT
from model.hf import from_hf, refuse_unless_gpt2, to_hf
from scripts import export_model
from scripts.sample import load_run

# The keys of ModelConfig that change how a model is trained, not which function it is.
TRAINING_ONLY = ("padded_vocab_size", "loss_over_padding", "loss", "attention", "residual", "bf16_roles", "init")


def export(run: Path, out: Path, form: str = "ours") -> list[str]:
    """Write `run` into the folder `out`, which must not exist or be empty; the notes that a user should read."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; remove it or choose another")
    config, model = load_run(run)
    if form == "hf":
        try:
            refuse_unless_gpt2(config.model)
        except ValueError as error:
            raise ValueError(f"{error}; leave out --form hf") from None
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        notes = (write_hf if form == "hf" else write_ours)(config, model, folder)
        check(model, form, folder)
        (folder / "README.md").write_text(card(run, config, model, form, out.resolve().name, notes), encoding="utf-8")
        os.rename(folder, out)
    return notes


def write_ours(config: Config, model: GPT, folder: Path) -> list[str]:
    weights = {name: p.detach().float() for name, p in model.named_parameters()}
    for name in {"embed.weight", "head.weight", "head.bias"} & weights.keys():
        weights[name] = weights[name][:config.model.vocab_size]
    save_file({name: p.contiguous() for name, p in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(resolved(config, model), indent=2) + "\n")
    shutil.copyfile(export_model.__file__, folder / "model.py")
    return []


def resolved(config: Config, model: GPT) -> dict:
    """The fields of export_model.Config, nothing left to defaults."""
    m, softcap = config.model, config.model.softcap
    derived = {"head_dim": m.head_width, "mlp_width": m.mlp_hidden, "norm_eps": model.head_norm.eps,
               "attn_scale": m.attn_scale or m.head_width ** -0.5, "seq_len": config.seq_len,
               "softcap": softcap and asdict(softcap) | {"scale": softcap.scale or softcap.cap},
               "tokenizer": config.data.tokenizer, "end_of_text": END_OF_TEXT[config.data.tokenizer]}
    return {f.name: derived[f.name] if f.name in derived else getattr(m, f.name) for f in fields(export_model.Config)}


def write_hf(config: Config, model: GPT, folder: Path) -> list[str]:
    end_of_text = END_OF_TEXT[config.data.tokenizer]
    to_hf(model, folder, end_of_text if end_of_text < config.model.vocab_size else None)
    try:
        encoding = by_name(config.data.tokenizer)
    except VocabularyError as missing:
        return [f"no tokenizer files: {missing}"]
    if encoding.n_vocab > config.model.vocab_size:
        return [f"no tokenizer files: {encoding.name} has {encoding.n_vocab:,} ids, this model "
                f"{config.model.vocab_size:,}"]
    vocabulary, merges = hf_vocabulary(encoding)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ("#version: 0.2", *merges)), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_TOKEN)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.seq_len, **special}, indent=2) + "\n")
    return []


def hf_vocabulary(encoding) -> tuple[dict[str, int], list[str]]:
    """A tiktoken.Encoding as GPT-2's two files have it: {token: id}, and the merges in order of rank.

    There a byte is written as a character that can be seen: itself, or one from U+0100 on.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) if byte in seen else chr(256 + unseen.index(byte)) for byte in range(256)}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = encoding._mergeable_ranks
    in_order = sorted(ranks, key=ranks.get)
    merges = [" ".join(map(written, last_merge(token, ranks))) for token in in_order if len(token) > 1]
    return {written(token): ranks[token] for token in in_order} | encoding._special_tokens, merges


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that are merged into `token` when all merges of lower rank are done."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


@torch.no_grad()
def check(model: GPT, form: str, folder: Path) -> None:
    """ValueError unless the folder's model has the logits of `model` on some tokens."""
    again = from_hf(folder)[2].logits if form == "hf" else export_model.load(folder)
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (1, min(model.seq_len, 256)), generator=torch.Generator().manual_seed(0))
    expected: Tensor = model.logits(tokens)
    error = (again(tokens) - expected).abs().max().item()
    if not error <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise ValueError(f"the exported model's logits differ from the run's by up to {error:.2g}; nothing was written")


# ---- the card

def card(run: Path, config: Config, model: GPT, form: str, name: str, notes: list[str]) -> str:
    step = checkpoint.step_of(checkpoint.steps_newest_first(run / "checkpoints")[0])
    averaged = config.target_on == "average" and step > 0
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rows = {"run": run.resolve().name, "weights": f"{'average' if averaged else 'last'}, float32, after step {step:,} "
            f"of {config.steps:,}", "validation loss": loss_of(run, step, averaged),
            "parameters": f"{millions:,.2f} million", "context": f"{config.seq_len:,} tokens",
            "tokenizer": config.data.tokenizer + (", ids 0 to 255 are UTF-8 bytes" if config.data.tokenizer == "bytes"
                                                  else ", as tiktoken has it") +
            f"; every document begins with id {END_OF_TEXT[config.data.tokenizer]}, the end of text"}
    if config.data.documents == "separate":
        rows["documents"] = "trained with attention within documents only: give it one document a row"
    table = "\n".join(("| | |", "|-|-|", *(f"| {key} | {value} |" for key, value in rows.items())))
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n" if form == "hf" else ""
    said = "".join(f"\n{note}\n" for note in notes)
    trained = (run / "config.yaml").read_text().rstrip()
    return (f"{front}# {name}\n\n{table}\n{said}\n## Loading\n\n{LOADING[form]}\n\n"
            f"## Trained with\n\n```yaml\n{trained}\n```\n")


def loss_of(run: Path, step: int, averaged: bool) -> str:
    """The run's own loss of these weights, from its summary; of an unfinished run, from its log."""
    key, bits = "val_loss_avg" if averaged else "val_loss", ""
    try:
        found = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        found = {}
    if found.get("status") != "finished" or found.get("steps") != step:
        found = next((line for line in read_log(run)[1] if line["step"] == step), {})
    if key not in found:
        return "not measured after this step"
    if "val_bits_per_byte" in found and not averaged:
        bits = f", {found['val_bits_per_byte']:.4f} bits per byte"
    return f"{found[key]:.4f} nats per token{bits}"


LOADING = {
    "ours": """\
```python
import torch
from model import load                              # model.py of this folder; it needs torch and safetensors

model = load(".")
logits = model(torch.tensor([[1, 2, 3]]))           # (1, 3, vocab_size), float32
tokens = model.generate(torch.tensor([[1, 2, 3]]), 20)
```""",
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")      # where vocab.json is in this folder
```"""}


def main() -> int:
    parser = Parser("python -m scripts.export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--form", choices=("ours", "hf"), default="ours",
                        help="ours: any model; hf: GPT-2's form, for transformers (default ours)")
    args = parser.parse_args()
    try:
        notes = export(args.run, args.out, args.form)
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    print(*(f"note: {note}" for note in notes), f"{args.out}: {', '.join(sorted(f.name for f in args.out.iterdir()))}",
          sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
