"""The tokenizers: bytes without a download, GPT-2's where its vocabulary is to be had, and files of ranks."""
import base64
import json
import random
import subprocess
import sys

import pytest
import tiktoken
import tiktoken.load

from data import tokenizers
from data.tokenizers import VocabularyError, by_name, byte_level, encode, from_ranks, gpt2, identity
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def offline(monkeypatch):
    """tiktoken as in a fresh process without a network."""
    def refuse(path):
        raise ConnectionError(f"no route to {path}")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    monkeypatch.delenv("GPT2_VOCAB", raising=False)


@pytest.fixture(scope="session")
def openai_files(tmp_path_factory):
    """A folder with OpenAI's vocab.bpe and encoder.json."""
    if not SHARED.exists():
        pytest.skip("no copy of GPT-2's vocabulary")
    folder = tmp_path_factory.mktemp("vocabulary")
    subprocess.run([sys.executable, SHARED / "unpack.py", folder, "0"], check=True, stdout=subprocess.DEVNULL)
    return folder


def spelled(token: bytes) -> str:
    """GPT-2's files spell bytes that do not print as characters from 256 on, in the order of the bytes."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in token)


def small_vocabulary(folder):
    """A vocabulary of 258 tokens in both forms; its ranks."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    ranks = {bytes([byte]): rank for rank, byte in
             enumerate(plain + [byte for byte in range(256) if byte not in plain])} | {b"th": 256, b" th": 257}
    (folder / "vocab.bpe").write_text(f"#version: 0.2\nt h\n{spelled(b' ')} th\n")
    (folder / "encoder.json").write_text(json.dumps({spelled(token): rank for token, rank in ranks.items()}))
    (folder / "small.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    return ranks


def refusal(function, *arguments) -> str:
    with pytest.raises(VocabularyError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_byte_level_tokens_are_the_bytes_of_the_text(offline):
    text = "def f(x):\n\treturn 'naïve — 数' + \"\\0\"\r\n" + "".join(map(chr, range(0x250)))
    tokens = byte_level().encode_ordinary(text)
    assert tokens == list(text.encode()) and byte_level().decode(tokens) == text


def test_byte_level_has_257_tokens_of_which_the_last_ends_a_text():
    encoding = byte_level()
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode("a<|endoftext|>b", allowed_special="all") == [97, 256, 98]
    assert encoding.decode_single_token_bytes(200) == b"\xc8"


@pytest.mark.parametrize("form", ["vocab.bpe", "small.tiktoken", "."])
def test_a_file_of_ranks_gives_its_ids_and_the_next_ends_a_text(tmp_path, form):
    ranks = small_vocabulary(tmp_path)
    encoding = by_name(str(tmp_path / form))
    assert (encoding.n_vocab, encoding.eot_token) == (259, 258)
    assert encoding.encode_ordinary("the th") == [256, ranks[b"e"], 257]
    assert identity(encoding) == identity(from_ranks(tmp_path / "vocab.bpe"))


def test_a_file_that_changed_is_not_read_from_tiktokens_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    small_vocabulary(tmp_path)
    assert from_ranks(tmp_path).n_vocab == 259
    ranks = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps({**ranks, "the": 258}))
    (tmp_path / "vocab.bpe").write_text((tmp_path / "vocab.bpe").read_text() + "th e\n")
    assert from_ranks(tmp_path).n_vocab == 260


def test_a_pattern_says_where_ranks_may_not_join(tmp_path):
    ranks = small_vocabulary(tmp_path)
    assert by_name(str(tmp_path), r"[\s\S]").encode_ordinary("th") == [ranks[b"t"], ranks[b"h"]]
    assert "regular expression" in refusal(by_name, str(tmp_path), "(")


def test_ids_are_tiktokens_ordinary_encoding(tmp_path):
    small_vocabulary(tmp_path)
    draw = random.Random(0)
    for encoding in (byte_level(), from_ranks(tmp_path)):
        for _ in range(200):
            text = "".join(draw.choices(["th", " th", "é", "😀", "\n", "  ", "<|endoftext|>", "\0", "a"], k=30))
            assert encode(encoding, text).tolist() == encoding.encode_ordinary(text)
        assert encode(encoding, "").size == 0 and encode(encoding, "th").dtype == "uint16"


def test_gpt2_from_its_files_is_tiktokens_own_encoding(offline, openai_files, monkeypatch):
    """tiktoken's own definition runs here, its two downloads served from the files."""
    from tiktoken_ext import openai_public
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with monkeypatch.context() as patch:
        patch.setattr("tiktoken.load.read_file", lambda path: (openai_files / path.rsplit("/", 1)[1]).read_bytes())
        theirs = tiktoken.Encoding(**openai_public.gpt2())
        patch.setenv("GPT2_VOCAB", str(openai_files))
        ours = gpt2()
    assert ours.__getstate__() == theirs.__getstate__() and ours.n_vocab == theirs.n_vocab == 50257
    assert ours.encode_ordinary("hello world") == [31373, 995] and ours.eot_token == 50256


def test_gpt2_is_read_from_tiktokens_cache(offline, openai_files, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("tiktoken.load.read_file", lambda path: (openai_files / path.rsplit("/", 1)[1]).read_bytes())
        gpt2()
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2")
    assert identity(gpt2()) == tokenizers.GPT2_SHA256


def test_another_vocabulary_is_not_taken_for_gpt2s(offline, monkeypatch, tmp_path):
    small_vocabulary(tmp_path)
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: open(path, "rb").read())
    monkeypatch.setenv("GPT2_VOCAB", str(tmp_path))
    assert "not GPT-2's" in refusal(gpt2)


def test_a_vocabulary_that_cannot_be_had_is_one_line_with_where_it_was_looked_for(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    message = refusal(gpt2)
    assert all(words in message for words in ("GPT-2's vocabulary", "GPT2_VOCAB is not set", str(tmp_path),
                                              "ConnectionError", "TIKTOKEN_CACHE_DIR", "vocab.bpe"))


def test_a_damaged_download_is_the_same_error(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: b"<html>please log in</html>")
    assert "ValueError" in refusal(gpt2) and "TIKTOKEN_CACHE_DIR" in refusal(gpt2)


@pytest.mark.parametrize("name, change, words", [
    ("small.tiktoken", lambda raw: raw + b"no base64 at all\n", [":259:", "base64"]),
    ("small.tiktoken", lambda raw: raw.replace(b" 257", b" 300"), ["ranks are not 0 to 257"]),
    ("small.tiktoken", lambda raw: raw.split(b"\n", 1)[1], ["no token for byte 33"]),
    ("small.tiktoken", lambda raw: b"\xff\xfe\x00", [":1:"]),
    ("vocab.bpe", lambda raw: raw + b"t e\n", ["encoder.json", "AssertionError"]),
    ("vocab.bpe", lambda raw: b"\xff" * 9, ["encoder.json", "UnicodeDecodeError"]),
    ("encoder.json", lambda raw: raw[:-5], ["encoder.json", "JSONDecodeError"]),
    ("encoder.json", lambda raw: b"[]", ["encoder.json", "AttributeError"]),
    ("encoder.json", None, ["encoder.json", "No such file"]),
], ids=range(9))
def test_a_damaged_file_of_ranks_is_one_line(tmp_path, name, change, words):
    small_vocabulary(tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    message = refusal(from_ranks, tmp_path / "vocab.bpe" if name == "encoder.json" else path)
    assert all(word in message for word in words), message


def test_tokenizers_are_found_by_the_names_of_the_configuration():
    assert by_name("bytes").name == "bytes"
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt3'; known here: gpt2, bytes"):
        by_name("gpt3")
