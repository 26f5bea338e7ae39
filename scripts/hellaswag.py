"""HellaSwag (Zellers et al., arXiv:1905.07830) in the form that llm.c uses: which of four endings is likeliest.

A file of the data set is JSONL; of each item `ctx`, `endings` and `label` (the right one, from 0) are read. A row is
the tokens of ctx and those of " " + ending, and its score the summed loss of the ending's tokens (acc) or their mean
(acc_norm): the item is right if the labelled ending has the least. No end of text stands before ctx.
"""
import json
from pathlib import Path
from typing import NamedTuple

import torch

from model.gpt import GPT


class Item(NamedTuple):
    ctx: str
    endings: list[str]
    label: int


def read_items(path: Path) -> list[Item]:
    """The items of a file; ValueError, one line with the place, for what is none."""
    items = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(item_of(json.loads(line.decode())))
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ValueError(f"{path}:{number}: {reason}; each line of a HellaSwag file is an object with ctx, endings "
                             "and label") from error
    if not items:
        raise ValueError(f"{path}: no items; a HellaSwag file has one on each line")
    return items


def item_of(found) -> Item:
    """An item from what JSON said; the label may be a string, as in the Hugging Face copy."""
    if not isinstance(found, dict) or not {"ctx", "endings", "label"} <= found.keys():
        raise ValueError("no ctx, endings and label")
    ctx, endings, label = found["ctx"], found["endings"], found["label"]
    if not isinstance(ctx, str) or not ctx.strip():
        raise ValueError("ctx is no text")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(x, str) and x for x in endings):
        raise ValueError("endings are not two texts or more")
    if str(label) not in map(str, range(len(endings))):
        raise ValueError(f"label {label!r} is none of the {len(endings)} endings")
    return Item(ctx, endings, int(label))


def accuracies(model: GPT, encoding, items: list[Item], batch_tokens: int) -> dict:
    """{items, acc, acc_norm, cut}: the share that is right by the sum and by the mean; and of how many items a row
    was longer than the model's context and lost its beginning."""
    rows, cut = [], set()
    for number, item in enumerate(items):
        ctx = encoding.encode_ordinary(item.ctx)
        for ending in item.endings:
            scored = encoding.encode_ordinary(" " + ending)
            if len(ctx) + len(scored) > model.seq_len + 1:
                cut.add(number)
            rows.append(((ctx + scored)[-(model.seq_len + 1):], min(len(scored), model.seq_len)))
    sums, means = scores(model, rows, batch_tokens)
    right, right_norm, first = 0, 0, 0
    for item in items:
        own = slice(first, first + len(item.endings))
        right += int(sums[own].argmin()) == item.label
        right_norm += int(means[own].argmin()) == item.label
        first = own.stop
    return {"items": len(items), "acc": right / len(items), "acc_norm": right_norm / len(items), "cut": len(cut)}


@torch.no_grad()
def scores(model: GPT, rows: list[tuple[list[int], int]], batch_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and the mean, float64 (rows,), of the losses of each row's last tokens; a row says of how many.

    The rows are read in order of length, batch_tokens at once, filled up behind, where no token sees it.
    """
    sums, means = torch.empty(2, len(rows), dtype=torch.float64)
    for batch in batches([len(row) for row, _ in rows], batch_tokens):
        width = len(rows[batch[0]][0])
        tokens = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in batch],
                              device=model.embed.weight.device)
        losses = model.losses(tokens[:, :-1], tokens[:, 1:].contiguous()).double().cpu()
        for i, row_losses in zip(batch, losses):
            row, scored = rows[i]                           # the row's losses are of its tokens from the second on
            ending = row_losses[len(row) - 1 - scored:len(row) - 1]
            sums[i], means[i] = ending.sum(), ending.mean()
    return sums, means


def batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """The numbers of the rows, longest first, in groups of at most batch_tokens tokens with padding (or one row)."""
    groups, order = [], sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        groups.append(order[:size])
        order = order[size:]
    return groups
