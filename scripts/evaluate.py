"""Measure a trained model, on a GPU if there is one: validation loss, bits per byte, HellaSwag.

    python -m scripts.evaluate runs/<run>
    python -m scripts.evaluate runs/<run> --context 256 1024 --tokens 1048576 --data "data/other/val_*.bin"
    python -m scripts.evaluate runs/<run> --hellaswag hellaswag_val.jsonl --json result.json

The text is the first tokens of the validation shards in rows of each context, as the run itself validates: with the
run's own context, tokens, data and precision the loss is the one that it logged. A document's length is in tokens,
its end of text included, and the prediction of what follows its last token counts as its own. Bits per byte take all
losses, and the bytes of the decoded text, in which an end of text has none. The weights are those that the run's
target is asked of, raw or averaged.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data.arguments import Parser, at_least, exit_with, line_of
from data.documents import END_OF_TEXT, index
from data.loader import ValLoader
from data.shards import find_shards
from data.tokenizers import VocabularyError, by_name
from harness.config import Config
from harness.load import ConfigError
from harness.rundir import write_text
from model.gpt import GPT
from scripts.hellaswag import accuracies, read_items
from scripts.sample import load_run

NUMBERS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 28}      # of logits or attention scores, whichever are more


def open_val(config: Config, pattern: str | None, tokens: int, context: int) -> ValLoader:
    """The first `tokens` validation tokens, cut to whole rows of `context`, with documents as the run has them."""
    if config.model.positions == "learned" and context > config.seq_len:
        raise ValueError(f"--context {context}: this model has learned positions for {config.seq_len} tokens, no more")
    if tokens < context:
        raise ValueError(f"{tokens:,} tokens are less than a row of {context:,}: raise --tokens or lower --context")
    separate = config.data.documents == "separate"
    return ValLoader(find_shards(pattern or config.data.val, "--data" if pattern else "data.val"),
                     tokens - tokens % context, context, config.model.vocab_size,
                     config.data.end_of_text if separate else None)


def measure(model: GPT, val: ValLoader, tokenizer: str) -> dict:
    """The losses of a context and what they depend on; bits_per_byte is a text, the reason, where it is not known."""
    losses, targets = token_losses(model, val)
    total = losses.sum(dtype=np.float64)
    number, lengths = documents_of(val, END_OF_TEXT[tokenizer])
    by_length = table(lengths, losses)
    own_lengths = lengths.ravel()[np.unique(number, return_index=True)[1]]          # each document's once
    counts = np.bincount(bin_of(own_lengths))
    for entry, documents in zip(by_length, counts[counts > 0].tolist()):
        entry["documents"] = documents
    try:
        bits_per_byte = total / math.log(2) / text_bytes(by_name(tokenizer), targets)
    except VocabularyError as missing:
        bits_per_byte = str(missing)
    return {"context": val.seq_len, "tokens": losses.size, "val_loss": total / losses.size,
            "bits_per_byte": bits_per_byte, "by_document_length": by_length,
            "by_position": table(np.broadcast_to(1 + np.arange(val.seq_len), losses.shape), losses)}


@torch.no_grad()
def token_losses(model: GPT, val: ValLoader) -> tuple[np.ndarray, np.ndarray]:
    """Every loss in nats, float32 (rows, context), and the targets, int64."""
    device, context = model.embed.weight.device, val.seq_len
    numbers = context * max(model.config.vocab_rows, model.config.heads * context)
    at_once = max(1, NUMBERS_AT_ONCE[device.type] // numbers)
    losses, targets = [], []
    for first in range(0, val.row_count, at_once):
        batch = val.rows(first, min(first + at_once, val.row_count))
        found = model.losses(*(torch.from_numpy(array).to(device) for array in batch), longest=val.longest_document)
        losses.append(found.cpu().numpy())
        targets.append(batch[1])
    return np.concatenate(losses), np.concatenate(targets)


def text_bytes(encoding, targets: np.ndarray) -> int:
    """The bytes of text that tokens stand for; an end of text stands for none."""
    ids, counts = np.unique(targets, return_counts=True)
    try:
        return sum(count * len(encoding.decode_single_token_bytes(token))
                   for token, count in zip(ids.tolist(), counts.tolist()) if token != encoding.eot_token)
    except KeyError as error:
        raise ValueError(f"token {error.args[0]} is not in the vocabulary of {encoding.name}: "
                         "wrong data for this run") from None


def documents_of(val: ValLoader, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each input token the number of its document and the length of that, int64 (rows, context).

    What stands before the first end of text is a document too; the last one ends with the shards.
    """
    firsts = val.tokens.ends - val.tokens.counts
    starts = [found.astype(np.int64) + first for found, first in zip(index(val.tokens.paths, end_of_text), firsts)]
    edges = np.unique(np.concatenate([[0], *starts, [val.tokens.total]]))
    number = np.searchsorted(edges, np.arange(val.row_count * val.seq_len), side="right") - 1
    return number.reshape(-1, val.seq_len), np.diff(edges)[number].reshape(-1, val.seq_len)


def bin_of(values: np.ndarray) -> np.ndarray:
    """The bins of whole numbers from 1 on: 1, 2, 3-4, 5-8, ..., of which bin n ends with 2^n."""
    return np.frexp(values - 1)[1]


def table(values: np.ndarray, losses: np.ndarray) -> list[dict]:
    """{from, to, tokens, loss (their mean)} of every bin of `values` that has tokens; both arrays of one shape."""
    bins = bin_of(values).ravel()
    counts, sums = np.bincount(bins), np.bincount(bins, weights=losses.ravel())
    return [{"from": 2 ** (n - 1) + 1 if n else 1, "to": 2 ** n, "tokens": int(counts[n]), "loss": sums[n] / counts[n]}
            for n in np.flatnonzero(counts).tolist()]


def logged_loss(run: Path, config: Config) -> float | None:
    """The run's own last loss of the weights that are measured here."""
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary.get("val_loss_avg" if config.target_on == "average" else "val_loss")


def precision_of(run: Path, asked: str) -> torch.dtype:
    """The type of activations: what is asked for, or what the run had."""
    if asked != "auto":
        return getattr(torch, asked)
    try:
        return getattr(torch, json.loads((run / "env.json").read_text())["activation_dtype"].removeprefix("torch."))
    except (OSError, ValueError, KeyError, AttributeError):
        return torch.float32


def lines_of(found: dict) -> list[str]:
    """What measure() found, as tables."""
    bits = found["bits_per_byte"]
    lines = [f"context {found['context']:,}: {found['tokens']:,} tokens, val_loss {found['val_loss']:.4f}, "
             + (f"bits per byte not known ({bits})" if isinstance(bits, str) else f"{bits:.4f} bits per byte")]
    for title, key in (("tokens of context", "by_position"), ("length of document", "by_document_length")):
        counted = "documents" if key == "by_document_length" else ""
        lines += ["", f"  {title:<20}{counted:>12}{'tokens':>14}{'loss':>10}"]
        for entry in found[key]:
            span = f"{entry['from']:,}" + (f" - {entry['to']:,}" if entry["to"] > entry["from"] else "")
            documents = f"{entry['documents']:,}" if "documents" in entry else ""
            lines.append(f"  {span:<20}{documents:>12}{entry['tokens']:>14,}{entry['loss']:>10.4f}")
    return [*lines, ""]


def share(right: float, items: int) -> str:
    return f"{right:.4f} ± {math.sqrt(right * (1 - right) / items):.4f}"


def evaluate(args: argparse.Namespace) -> dict:
    """Everything that is asked for, printed as it is found and as one object."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json {args.json}: is a folder; name a file in it")
    items = None if args.hellaswag is None else read_items(args.hellaswag)
    config, model = load_run(args.run, precision_of(args.run, args.precision))
    tokens, tokenizer = args.tokens or config.val_tokens, config.data.tokenizer
    vals = [open_val(config, args.data, tokens, context) for context in args.context or [config.seq_len]]
    encoding = None if items is None else by_name(tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = {"run": str(args.run), "weights": config.target_on, "device": model.embed.weight.device.type,
              "precision": str(model.activation_dtype).removeprefix("torch."), "data": args.data or config.data.val,
              "tokenizer": tokenizer, "documents": config.data.documents, "logged_loss": logged_loss(args.run, config),
              "contexts": [], "hellaswag": None}
    logged = result["logged_loss"]
    print(f"{args.run}: {result['weights']} weights, {result['precision']} on {result['device']}; the run itself "
          f"logged {'no loss' if logged is None else f'val_loss {logged:.4f}'} on {config.val_tokens:,} tokens of "
          f"{config.data.val} in rows of {config.seq_len:,}\n")
    for val in vals:
        result["contexts"].append(measure(model, val, tokenizer))
        print("\n".join(lines_of(result["contexts"][-1])), flush=True)
    if items is not None:
        numbers = NUMBERS_AT_ONCE[result["device"]] // model.config.vocab_rows
        result["hellaswag"] = found = accuracies(model, encoding, items, numbers)
        print(f"hellaswag: {found['items']:,} items, acc {share(found['acc'], found['items'])}, acc_norm "
              f"{share(found['acc_norm'], found['items'])}; {found['cut']:,} items cut at the front to the context of "
              f"{config.seq_len:,} tokens")
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    parser = Parser("python -m scripts.evaluate", __doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--data", metavar="PATTERN", help="shards to measure on (default: the run's data.val)")
    parser.add_argument("--context", type=at_least(1), nargs="+", metavar="N", help="tokens a row (default: seq_len)")
    parser.add_argument("--tokens", type=at_least(1), metavar="N", help="how many to measure on (default: val_tokens)")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="JSONL with ctx, endings and label")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of activations (auto: as in the run)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers here too")
    args = parser.parse_args()
    try:
        evaluate(args)
    except (ConfigError, OSError, ValueError) as error:              # ShardError and VocabularyError are ValueErrors
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_with(main)
