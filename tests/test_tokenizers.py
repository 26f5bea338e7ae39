"""The tokenizers: bytes without a download, GPT-2's where its vocabulary is to be had."""
import pytest
import tiktoken

from data.tokenizers import VocabularyError, by_name, byte_level, gpt2


@pytest.fixture
def offline(monkeypatch):
    """tiktoken as in a fresh process without a network."""
    def refuse(path):
        raise ConnectionError(f"no route to {path}")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)


def test_byte_level_tokens_are_the_bytes_of_the_text(offline):
    text = "def f(x):\n\treturn 'naïve — 数' + \"\\0\"\r\n" + "".join(map(chr, range(0x250)))
    tokens = byte_level().encode_ordinary(text)
    assert tokens == list(text.encode()) and byte_level().decode(tokens) == text


def test_byte_level_has_257_tokens_of_which_the_last_ends_a_text():
    encoding = byte_level()
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert encoding.encode("a<|endoftext|>b", allowed_special="all") == [97, 256, 98]
    assert encoding.decode_single_token_bytes(200) == b"\xc8"


def test_gpt2_is_the_published_vocabulary(offline):
    try:
        encoding = gpt2()
    except VocabularyError:
        pytest.skip("GPT-2's vocabulary is not in tiktoken's cache")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("hello world") == [31373, 995]


def test_a_vocabulary_that_cannot_be_had_is_one_line_with_the_remedy(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(VocabularyError) as caught:
        gpt2()
    message = str(caught.value)
    assert "\n" not in message
    assert all(words in message for words in ("GPT-2's vocabulary", "ConnectionError", "TIKTOKEN_CACHE_DIR"))


def test_a_damaged_download_is_the_same_error(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: b"<html>please log in</html>")
    with pytest.raises(VocabularyError, match="ValueError.*TIKTOKEN_CACHE_DIR"):
        gpt2()


def test_tokenizers_are_found_by_the_names_of_the_configuration():
    assert by_name("bytes").name == "bytes"
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt3'; known here: gpt2, bytes"):
        by_name("gpt3")
