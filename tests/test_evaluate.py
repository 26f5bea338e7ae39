"""Evaluation repeats the run's own loss, and its tables and HellaSwag scores are those of a plain loop."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch

from data.loader import ValLoader
from data.shards import write_shard
from data.tokenizers import byte_level
from harness.rundir import read_log
from scripts import evaluate, hellaswag
from scripts.hellaswag import Item, accuracies, batches, read_items
from scripts.sample import load_run
from tests.conftest import ROOT, TINY, train_here
from tests.test_model import EVERYTHING, scrambled, some_tokens

EOT, SEQ_LEN = 256, 32
VAL_LENGTHS = [1, 2, 3, 5, 60, 4, 100, 33, 8, 9, 200, 7, 64, 500]
# One of each kind: what changes the weights, the precision or the attention of a validation.
RUNS = {"plain": (), "average": ("average=0.8", "target_on=average", "target_val_loss=1"),
        "documents": ("data.documents=separate", "model.window=9"), "bfloat16": ("precision=bfloat16",)}


def documents(lengths, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([[EOT, *rng.integers(97, 101, n - 1)] for n in lengths]).astype(np.uint16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every kind on bytes with documents; the validation shards begin and break in the middle of one."""
    directory = tmp_path_factory.mktemp("evaluate")
    val = np.concatenate([np.full(11, 97, np.uint16), documents(VAL_LENGTHS, 1)])
    for name, tokens in (("train_0", documents([50] * 100, 0)), ("val_0", val[:300]), ("val_1", val[300:])):
        write_shard(directory / f"{name}.bin", tokens)
    (directory / "tiny.yaml").write_text(TINY.format(data=directory, runs=directory / "runs")
                                         .replace("vocab_size: 64", "vocab_size: 257"))
    found = {}
    for name, overrides in RUNS.items():
        assert train_here("--config", directory / "tiny.yaml", f"name={name}", *overrides) == 0
        found[name] = next((directory / "runs").glob(f"{name}-*"))
    return found


def run_main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def measured(runs, monkeypatch, tmp_path, name, *arguments):
    assert run_main(monkeypatch, runs[name], "--json", tmp_path / "out.json", *arguments) == 0
    return json.loads((tmp_path / "out.json").read_text())


# --- losses

@pytest.mark.parametrize("name", RUNS)
def test_at_the_runs_own_context_the_loss_is_the_one_it_logged(name, runs, monkeypatch, tmp_path, capsys):
    result = measured(runs, monkeypatch, tmp_path, name)
    logged = read_log(runs[name])[1][-1]["val_loss_avg" if name == "average" else "val_loss"]
    [context] = result["contexts"]
    assert context["val_loss"] == pytest.approx(logged, rel=1e-6) and result["logged_loss"] == logged
    assert context["tokens"] == 512 and context["context"] == SEQ_LEN
    assert result["precision"] == ("bfloat16" if name == "bfloat16" else "float32")
    assert f"val_loss {logged:.4f}, {context['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    if name != "average":
        summary = json.loads((runs[name] / "summary.json").read_text())
        assert context["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("context", [1, 7, 32, 100])
def test_the_tables_are_those_of_a_plain_loop_at_any_context(context, runs):
    config, model = load_run(runs["plain"])
    val = evaluate.open_val(config, None, 700, context)
    found = evaluate.measure(model, val, "bytes")
    stream, rows = val.tokens.stream(0, val.tokens.total).astype(int).tolist(), 700 // context
    starts = [i for i, token in enumerate(stream) if i == 0 or token == EOT] + [len(stream)]
    length_at = [b - a for a, b in zip(starts, starts[1:]) for _ in range(a, b)]
    at = {"by_position": {}, "by_document_length": {}}
    for row in range(rows):
        tokens = torch.tensor(stream[row * context:(row + 1) * context + 1])
        with torch.no_grad():
            losses = -model.logits(tokens[None, :-1])[0].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        for place, loss in enumerate(losses.tolist()):
            for key, value in (("by_position", place + 1), ("by_document_length", length_at[row * context + place])):
                at[key].setdefault(math.ceil(math.log2(value)), []).append(loss)
    everything = sum(at["by_position"].values(), [])
    assert found["tokens"] == rows * context == len(everything)
    assert found["val_loss"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    text = sum(token != EOT for token in stream[1:rows * context + 1])
    assert found["bits_per_byte"] == pytest.approx(sum(everything) / math.log(2) / text, rel=1e-5)
    for key, bins in at.items():
        assert [entry["to"] for entry in found[key]] == [2 ** n for n in sorted(bins)]
        for entry, n in zip(found[key], sorted(bins)):
            assert entry["from"] == (2 ** (n - 1) + 1 if n else 1) and entry["tokens"] == len(bins[n])
            assert entry["loss"] == pytest.approx(sum(bins[n]) / len(bins[n]), rel=1e-4)
    begun = [b - a for a, b in zip(starts, starts[1:]) if a < rows * context]
    assert [entry["documents"] for entry in found["by_document_length"]] == [
        sum(entry["from"] <= length <= entry["to"] for length in begun) for entry in found["by_document_length"]]


def test_documents_apart_do_not_see_each_other(runs):
    config, model = load_run(runs["documents"])
    val = evaluate.open_val(config, None, 512, SEQ_LEN)
    losses, targets = evaluate.token_losses(model, val)
    joined = evaluate.token_losses(model, ValLoader(val.tokens.paths, 512, SEQ_LEN, 257))[0]
    first = (val.rows(0, val.row_count)[0] == EOT).argmax(1)            # up to a row's first end of text: the same
    for row, place in enumerate(first.tolist()):
        np.testing.assert_allclose(losses[row, :place], joined[row, :place], rtol=1e-4)
    assert (np.abs(losses - joined) > 1e-4).sum() > 50 and targets.shape == losses.shape


@pytest.mark.parametrize("over_padding", [True, False])
def test_the_losses_of_tokens_sum_to_the_loss_that_is_trained_on(over_padding):
    model, tokens = scrambled(EVERYTHING | {"loss_over_padding": over_padding}), some_tokens()
    assert model.config.padded_vocab_size > 61
    torch.testing.assert_close(model.losses(tokens, tokens).sum(), model(tokens, tokens))


def test_few_rows_at_once_give_the_same_losses(runs, monkeypatch):
    config, model = load_run(runs["plain"])
    val = evaluate.open_val(config, None, 512, SEQ_LEN)
    whole = evaluate.token_losses(model, val)[0]
    monkeypatch.setitem(evaluate.NUMBERS_AT_ONCE, "cpu", 3 * SEQ_LEN * 257)
    read = []
    monkeypatch.setattr(val, "rows", lambda a, b, rows=val.rows: read.append((a, b)) or rows(a, b))
    np.testing.assert_allclose(evaluate.token_losses(model, val)[0], whole, rtol=1e-4)
    assert read == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15), (15, 16)]


def test_bytes_are_counted_for_any_tokenizer():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, " é".encode(): 257}
    encoding = tiktoken.Encoding("merged", pat_str=r"\S+|\s+\S*", mergeable_ranks=ranks, special_tokens={
        "<|endoftext|>": 258})
    tokens = [258, 256, 97, 257, 258, 98]
    assert evaluate.text_bytes(encoding, np.array([tokens, tokens])) == 2 * len("aba éb".encode())
    with pytest.raises(ValueError, match="token 999 is not in the vocabulary of merged"):
        evaluate.text_bytes(encoding, np.array([97, 999]))


def test_without_the_vocabulary_the_loss_is_there_and_bits_per_byte_say_why(runs, monkeypatch, capsys):
    def missing(name):
        raise evaluate.VocabularyError("no vocabulary here")
    monkeypatch.setattr(evaluate, "by_name", missing)
    assert run_main(monkeypatch, runs["plain"]) == 0
    assert "bits per byte not known (no vocabulary here)" in capsys.readouterr().out


# --- HellaSwag

ITEMS = [Item(ctx, endings, label) for ctx, endings, label in (
    ("A man sits.", ["He stands up and goes away.", "no", "It", "The dog barks at night"], 1),
    ("Snow falls on the roof", ["then it melts", "so", "and we shovel it for an hour or two", "."], 0),
    ("She cooks " * 9, ["rice", "a very long dinner for all of her many friends and family", "x", "yes"], 3),
    ("Go", ["on", "left and then right", "up", "a"], 2))]


def plain_scores(model, item):
    """Of every ending the summed and mean loss, one unpadded row at a time."""
    encoding, sums, means = byte_level(), [], []
    for ending in item.endings:
        row = encoding.encode(item.ctx) + encoding.encode(" " + ending)
        row, scored = row[-(model.seq_len + 1):], min(len(ending) + 1, model.seq_len)
        with torch.no_grad():
            log_p = model.logits(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)
        losses = [-log_p[place - 1, row[place]].item() for place in range(len(row) - scored, len(row))]
        sums.append(sum(losses))
        means.append(sum(losses) / len(losses))
    return sums, means


@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
def test_hellaswag_scores_are_those_of_single_rows(batch_tokens, monkeypatch):
    found = []
    monkeypatch.setattr(hellaswag, "scores", lambda *args, s=hellaswag.scores: found.append(s(*args)) or found[-1])
    longest = max(len(item.ctx) + 1 + len(ending) for item in ITEMS for ending in item.endings)
    for seq_len, cut in ((40, 2), (longest - 2, 1), (longest - 1, 0)):
        model = scrambled(EVERYTHING | {"vocab_size": 257, "padded_vocab_size": 257}, seq_len)
        expected = [plain_scores(model, item) for item in ITEMS]
        accuracies(model, byte_level(), ITEMS, batch_tokens)
        for own, plain in zip(found.pop(), zip(*expected)):
            torch.testing.assert_close(own, torch.tensor(plain, dtype=torch.float64).flatten(), rtol=1e-5, atol=1e-5)
        answers = [[int(np.argmin(each)) for each in pair] for pair in expected]
        assert any(by_sum != by_mean for by_sum, by_mean in answers)
        for chosen in (0, 1):                      # with the labels that one of the two scores gives, that one is right
            items = [item._replace(label=answer[chosen]) for item, answer in zip(ITEMS, answers)]
            agree = sum(a == b for a, b in answers) / len(items)
            assert accuracies(model, byte_level(), items, batch_tokens) == {
                "items": 4, "acc": agree if chosen else 1.0, "acc_norm": 1.0 if chosen else agree, "cut": cut}


def test_every_row_is_in_one_batch_of_the_size_that_fits():
    lengths = [3, 9, 1, 9, 4, 50, 2]
    groups = batches(lengths, 18)
    assert sorted(sum(groups, [])) == list(range(7)) and groups[0] == [5]
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 18 for group in groups)
    assert groups[1:] == [[1, 3], [4, 0, 6, 2]]


def test_items_are_read_as_either_published_file_has_them(tmp_path):
    lines = [{"ind": 24, "ctx": item.ctx, "endings": item.endings, "label": label, "split": "val"}
             for item, label in zip(ITEMS, (1, "0", 3, "2"))]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_items(tmp_path / "items.jsonl") == ITEMS


@pytest.mark.parametrize("line, message", [
    (b"{", ":2: Expecting property name"), (b"[1]", ":2: no ctx, endings and label"), (b"\xff\xfe", ":2: not UTF-8"),
    (b'{"ctx": "a", "endings": ["b"], "label": 0}', ":2: endings are not two texts or more"),
    (b'{"ctx": "a", "endings": ["b", ""], "label": 0}', ":2: endings are not two texts or more"),
    (b'{"ctx": " ", "endings": ["b", "c"], "label": 0}', ":2: ctx is no text"),
    (b'{"ctx": "a", "endings": ["b", "c"], "label": 2}', ":2: label 2 is none of the 2 endings"),
    (b'{"ctx": "a", "endings": ["b", "c"], "label": true}', ":2: label True is none of the 2 endings"),
    (b'{"ctx": "a", "endings": ["b", "c"], "label": ""}', ":2: label '' is none of the 2 endings"),
    (b"[" * 100000, ":2: "), (None, ": no items"),
])
def test_a_file_that_is_none_is_one_line_with_its_place(line, message, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\n" if line is None else
                     json.dumps({"ctx": "a", "endings": ["b", "c"], "label": 1}).encode() + b"\n" + line)
    with pytest.raises(ValueError) as raised:
        read_items(path)
    assert str(raised.value).startswith(f"{path}{message}") and "\n" not in str(raised.value)


def test_the_program_scores_a_hellaswag_file(runs, monkeypatch, tmp_path, capsys):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item._asdict()) + "\n" for item in ITEMS))
    result = measured(runs, monkeypatch, tmp_path, "plain", "--hellaswag", tmp_path / "items.jsonl")
    found = result["hellaswag"]
    assert found == accuracies(load_run(runs["plain"])[1], byte_level(), ITEMS, 1000) and found["items"] == 4
    assert f"hellaswag: 4 items, acc {found['acc']:.4f} ± " in capsys.readouterr().out


# --- what cannot be

@pytest.mark.parametrize("arguments, message", [
    (["--context", "600"], "512 tokens are less than a row of 600: raise --tokens or lower --context"),
    (["--tokens", "99999"], "validation shards hold 1,007"),
    (["--data", "nowhere/*.bin"], "--data: no file matches 'nowhere/*.bin'"),
    (["--hellaswag", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    (["--json", "nowhere/out.json"], "--json nowhere/out.json: there is no folder"),
    (["--json", "."], "--json .: is a folder; name a file in it"),
])
def test_what_cannot_be_is_one_line(arguments, message, runs, monkeypatch, capsys):
    assert run_main(monkeypatch, runs["plain"], *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_learned_positions_reach_no_further_than_they_were_learned(runs):
    config = load_run(runs["plain"])[0]
    object.__setattr__(config.model, "positions", "learned")
    assert evaluate.open_val(config, None, 512, SEQ_LEN).row_count == 16
    with pytest.raises(ValueError, match="--context 33: this model has learned positions for 32 tokens, no more"):
        evaluate.open_val(config, None, 512, 33)


@pytest.mark.parametrize("arguments, message", [
    (["--context", "0"], "argument --context: '0' is not a whole number from 1 on"),
    (["--tokens", "x"], "argument --tokens: 'x' is not a whole number from 1 on"),
    (["--precision", "float16"], "argument --precision: invalid choice: 'float16'"),
])
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "runs/none", *arguments)
    assert stopped.value.code == 2 and message in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_what_is_no_run_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.evaluate", tmp_path / "none"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr == (f"error: {tmp_path / 'none'} is no run directory (there is no config.yaml in it); take one "
                           "of runs/\n")
