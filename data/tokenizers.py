"""The tokenizers that shards are made with: bytes (no download), GPT-2's, or any file of ranks.

GPT-2's vocabulary is looked for in the folder that the environment variable GPT2_VOCAB names (OpenAI's vocab.bpe and
encoder.json), then in tiktoken's own cache (TIKTOKEN_CACHE_DIR), then on the network, by tiktoken.
"""
import base64
import binascii
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
# identity() of tiktoken's "gpt2", made of OpenAI's two files (tiktoken_ext/openai_public.py has their SHA-256).
GPT2_SHA256 = "b9014b21720a3763c3caf00e7bab88e275e193a41952b5153fb18a540035df4b"


class VocabularyError(ValueError):
    """A vocabulary that cannot be had or used; the message is one line with the remedy."""


def byte_level():
    """tiktoken.Encoding: ids 0 to 255 are the bytes of the text in UTF-8, id 256 is <|endoftext|>."""
    import tiktoken
    return tiktoken.Encoding(name="bytes", pat_str=r"[\s\S]", explicit_n_vocab=257,
                             mergeable_ranks={bytes([byte]): byte for byte in range(256)},
                             special_tokens={END_OF_TEXT: 256})


def gpt2():
    """tiktoken.Encoding of GPT-2: 50,257 ids, 50256 is <|endoftext|>."""
    folder = os.environ.get("GPT2_VOCAB")
    if folder:
        found = from_ranks(folder)
        if identity(found) != GPT2_SHA256:
            raise VocabularyError(f"GPT2_VOCAB={folder}: vocab.bpe and encoder.json are a vocabulary, but not GPT-2's; "
                                  "point GPT2_VOCAB at OpenAI's, or name this one with --tokenizer")
        found.name = "gpt2"
        return found
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:    # every network error of `requests` is an OSError
        cache = next((os.environ[name] for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if name in os.environ),
                     os.path.join(tempfile.gettempdir(), "data-gym-cache"))
        raise VocabularyError(
            "GPT-2's vocabulary is missing: GPT2_VOCAB is not set, tiktoken's cache "
            f"{cache or '(switched off by an empty TIKTOKEN_CACHE_DIR)'} does not have it, and it cannot be downloaded "
            f"({type(error).__name__}); run once with network access, set GPT2_VOCAB to a folder with OpenAI's "
            "vocab.bpe and encoder.json, or TIKTOKEN_CACHE_DIR to a copy of such a cache") from error


def from_ranks(path: str | Path, pattern: str | None = None):
    """tiktoken.Encoding of a file of ranks; <|endoftext|> is the id after the last.

    path: a .tiktoken file (a token in base64 and its rank on every line), or vocab.bpe with encoder.json beside it
    (GPT-2's form), or the folder of these two. pattern: the regular expression that cuts text into pieces before
    they are merged (GPT-2's where None); such files do not say with which they were trained.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    path = Path(path)
    if path.is_dir():
        path = path / "vocab.bpe"
    try:
        ranks = _gpt2_form(path) if path.suffix == ".bpe" else _tiktoken_form(path)
    except OSError as error:
        raise VocabularyError(f"{error.filename or path}: {error.strerror}; a vocabulary is gpt2, bytes, a .tiktoken "
                              "file, or a folder with vocab.bpe and encoder.json") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise VocabularyError(f"{path}: " + (f"no token for byte {missing[0]}" if missing else "the ranks are not 0 "
                              f"to {len(ranks) - 1:,}, each once") + "; the file is damaged or no vocabulary of bytes")
    try:
        return tiktoken.Encoding(name=str(path), pat_str=pattern or r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    except ValueError as error:
        raise VocabularyError(f"--pattern {pattern!r} is no regular expression ({_first_line(error)})") from error


def _gpt2_form(path: Path) -> dict[bytes, int]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    files = [path, path.with_name("encoder.json")]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]   # or tiktoken reads an older copy
    try:
        return data_gym_to_mergeable_bpe_ranks(*map(str, files), *hashes)
    except (ValueError, KeyError, AttributeError, AssertionError) as error:
        raise VocabularyError(f"{path} and encoder.json beside it are no vocabulary in GPT-2's form, or not the same "
                              f"one ({type(error).__name__}); fetch both again") from error


def _tiktoken_form(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise VocabularyError(f"{path}:{number}: not a token in base64 and its rank, as a .tiktoken file has on "
                                  "every line") from error
    return ranks


def by_name(name: str, pattern: str | None = None):
    """The tokenizer called `name` in a configuration or on a command line: "gpt2", "bytes" or a file of ranks."""
    if name == "bytes":
        return byte_level()
    if name == "gpt2":
        return gpt2()
    if not os.path.exists(name):
        raise VocabularyError(f"unknown tokenizer {name!r}; known here: gpt2, bytes, or a file of ranks "
                              "(.tiktoken, or vocab.bpe with encoder.json beside it)")
    return from_ranks(name, pattern)


def identity(encoding) -> str:
    """SHA-256 of what every id means: the tokens by rank, and the special tokens."""
    digest = hashlib.sha256()
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    digest.update(repr(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()


def encode(encoding, text: str) -> np.ndarray:
    """The ids of `text`, uint16 (tokens,): tiktoken's encode_ordinary without its lists."""
    if encoding.name == "bytes":             # 200 times faster than a pattern that matches single characters
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def count_bytes(tokens) -> int:
    """Bytes of text that an array of byte-level token ids stands for (an end of text stands for none)."""
    return int((tokens < 256).sum())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
