"""The tokenizers that shards are made with: bytes (no download) and GPT-2's."""
END_OF_TEXT = "<|endoftext|>"


class VocabularyError(ValueError):
    """A vocabulary that is neither on this machine nor to be had from the network."""


def byte_level():
    """tiktoken.Encoding: ids 0 to 255 are the bytes of the text in UTF-8, id 256 is <|endoftext|>."""
    import tiktoken
    return tiktoken.Encoding(name="bytes", pat_str=r"[\s\S]", explicit_n_vocab=257,
                             mergeable_ranks={bytes([byte]): byte for byte in range(256)},
                             special_tokens={END_OF_TEXT: 256})


def gpt2():
    """tiktoken.Encoding of GPT-2: 50,257 ids, 50256 is <|endoftext|>. Downloaded at its first use."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:    # every network error of `requests` is an OSError
        raise VocabularyError(
            "GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded "
            f"({type(error).__name__}): run once with network access, or set TIKTOKEN_CACHE_DIR to a copy of "
            "the cache folder of a machine that has it") from error


def by_name(name: str):
    """The tokenizer called `name` in a configuration's data.tokenizer: "gpt2" or "bytes"."""
    known = {"gpt2": gpt2, "bytes": byte_level}
    if name not in known:
        raise ValueError(f"unknown tokenizer {name!r}; known here: {', '.join(known)}")
    return known[name]()


def count_bytes(tokens) -> int:
    """Bytes of text that an array of byte-level token ids stands for (an end of text stands for none)."""
    return int((tokens < 256).sum())
