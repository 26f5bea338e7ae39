"""The inspector: spans of shards as text, and the check of a folder."""
import hashlib
import json
import random
import shutil
import struct

import numpy as np
import pytest

from data import show, tokenise
from data.shards import MAGIC, open_shard, write_shard


@pytest.fixture
def folder(tmp_path):
    """Shards of 2,000 tokens that documents of 1 to 900 bytes spill over."""
    texts = [f"{n}{'x' * n}" for n in range(0, 900, 30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "o"
    assert tokenise.main([str(tmp_path / "a.jsonl"), "--out", str(out), "--tokenizer", "bytes", "--workers", "0",
                          "--shard-tokens", "2000", "--held-out", "1"]) == 0
    return out


def look(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = show.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_span_is_its_text_with_every_document_marked(tmp_path, capsys):
    write_shard(tmp_path / "a.bin", [*b"end", 256, *"one\n数".encode(), 256, *b"two", 256])
    code, out, _ = look(capsys, tmp_path / "a.bin", "--from", 1, "--count", 12, "--tokenizer", "bytes")
    assert code == 0 and out == (f"{tmp_path}/a.bin: tokens 1 to 12 of 16 (bytes)\nnd\n"
                                 "-------- document at token 3\none\n数\n-------- document at token 11\nt\n")
    assert look(capsys, tmp_path / "a.bin", "--from", 16, "--tokenizer", "bytes")[2].startswith(
        f"error: {tmp_path}/a.bin: has 16 tokens")


def test_the_tokenizer_is_the_one_that_meta_json_names(folder, capsys):
    assert "(bytes)" in look(capsys, folder / "train_000000.bin")[1]
    meta = json.loads((folder / "meta.json").read_text())
    meta["arguments"]["tokenizer_sha256"] = "0"
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "made with another bytes" in look(capsys, folder / "train_000000.bin")[2]
    assert look(capsys, folder / "train_000000.bin", "--tokenizer", "bytes")[0] == 0


def test_a_whole_folder_is_right_and_its_documents_are_counted_over_shards(folder, capsys):
    code, out, error = look(capsys, folder)
    assert (code, error) == (0, "")
    tokens = np.concatenate([open_shard(path) for path in sorted(folder.glob("train_*.bin"))])
    lengths = np.diff(np.flatnonzero(tokens == 256), append=tokens.size)
    row = next(line.split() for line in out.splitlines() if line.startswith("train: all"))
    assert row[2:] == [f"{tokens.size:,}", f"{lengths.size}", f"{lengths.mean():,.1f}", f"{lengths.max()}", "256"]
    within = [np.diff(np.flatnonzero(open_shard(path) == 256)).max() for path in folder.glob("train_*.bin")]
    assert max(within) < lengths.max(), "the longest lies in two shards"
    assert out.count("as in meta.json") == len(list(folder.glob("*.bin")))


def other_token(path, where=-1, value=7):
    tokens = np.array(open_shard(path))
    tokens[where] = value
    write_shard(path, tokens)


@pytest.mark.parametrize("harm, words", [
    (lambda o: other_token(o / "train_000001.bin"), ["train_000001.bin: SHA-256"]),
    (lambda o: other_token(o / "train_000001.bin", value=300), ["id 300 is beyond the 257 of bytes", "SHA-256"]),
    (lambda o: (o / "train_000001.bin").unlink(), ["train_000001.bin: in meta.json but not in", "documents in train"]),
    (lambda o: (o / "train_000001.bin").write_bytes(b"short"), ["train_000001.bin: 5 bytes"]),
    (lambda o: shutil.copy(o / "train_000000.bin", o / "train_000099.bin"), ["train_000099.bin: not in meta.json"]),
    (lambda o: (o / "meta.json").write_text('{"files"'), ["meta.json: damaged"]),
    (lambda o: (o / "meta.json").write_text('{"files": {"a": {}}}'), ["meta.json: damaged"]),
    (lambda o: (o / "meta.json").unlink(), ["no end of text (50256 in gpt2)"]),
    (lambda o: (o / "tokenise.state.json").write_text("{}"), ["not finished"]),
], ids=["byte", "id", "missing", "header", "stranger", "json", "entry", "no record", "unfinished"])
def test_what_is_wrong_with_a_folder_is_said_a_line_each(folder, capsys, harm, words):
    harm(folder)
    code, out, error = look(capsys, folder)
    assert all(word in error for word in words), error
    assert all(line.startswith("error: ") for line in error.splitlines()), error
    assert code == 2, (out, error)


def test_shards_without_end_of_text_or_of_another_tokenizer_are_wrong(tmp_path, capsys):
    write_shard(tmp_path / "a_000000.bin", [1, 2, 3])
    assert "no end of text (50256 in gpt2)" in look(capsys, tmp_path)[2]
    assert look(capsys, tmp_path / "nothing")[2] == f"error: {tmp_path}/nothing: No such file or directory\n"
    (tmp_path / "a_000000.bin").unlink()
    assert "no token shards" in look(capsys, tmp_path)[2]


def test_the_records_of_the_demo_and_of_downloads_are_understood(tmp_path, capsys):
    write_shard(tmp_path / "val_000000.bin", [256, 1, 2])
    path, tokens = tmp_path / "val_000000.bin", open_shard(tmp_path / "val_000000.bin")
    (tmp_path / "meta.json").write_text(json.dumps({
        "tokenizer": "bytes", "val": {"documents": 1, "tokens": 3},
        "files": {"val_000000.bin": hashlib.sha256(tokens).hexdigest()}}))
    assert look(capsys, tmp_path)[0] == 0
    (tmp_path / "meta.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({"repo": "x", "files": {"val_000000.bin": {
        "tokens": 3, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "revision": None}}}))
    assert look(capsys, tmp_path, "--tokenizer", "bytes")[0] == 0
    other_token(path)
    assert "differs" in look(capsys, tmp_path, "--tokenizer", "bytes")[1]


def test_mutated_headers_are_shown_or_one_line(tmp_path, capsys):
    draw, good = random.Random(0), struct.pack("<256i", MAGIC, 1, 4, *[0] * 253) + struct.pack("<4H", 256, 1, 2, 3)
    codes = []
    for _ in range(200):
        raw = bytearray(good)
        for _ in range(draw.randrange(3)):
            at = draw.randrange(16) if draw.random() < 0.7 else draw.randrange(len(raw))
            raw[at] = draw.randrange(256)
        (tmp_path / "a.bin").write_bytes(raw[:draw.choice([len(raw), len(raw), draw.randrange(len(raw))])])
        for arguments in ([tmp_path / "a.bin"], [tmp_path]):
            code, out, error = look(capsys, *arguments, "--tokenizer", "bytes")
            assert (code, error) == (0, "") and out or code == 2 and all(
                line.startswith("error: ") for line in error.splitlines()) and error, error
            codes.append(code)
    assert codes.count(0) > 40 and codes.count(2) > 40
