"""Shards: what is written is read back, and what is no shard is refused in one line."""
import struct

import numpy as np
import pytest

from data.shards import (MAGIC, ShardError, Tokens, find_shards, fingerprint, open_shard, read_header,
                         write_shard)


def raw_shard(magic=MAGIC, version=1, count=3, body=b"\x01\x00\x02\x00\xff\xff"):
    return struct.pack("<256i", magic, version, count, *[0] * 253) + body


def refusal(function, *arguments):
    with pytest.raises(ShardError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_shard_is_a_header_of_256_int32_and_then_uint16_tokens(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 65535])
    assert (tmp_path / "a.bin").read_bytes() == raw_shard()


def test_what_is_written_is_read_back_from_a_memory_map(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000)
    write_shard(tmp_path / "a.bin", tokens)
    found = open_shard(tmp_path / "a.bin")
    assert isinstance(found, np.memmap) and found.dtype == np.uint16 and not found.flags.writeable
    assert read_header(tmp_path / "a.bin") == 1000 and np.array_equal(found, tokens)


def test_tokens_that_are_not_contiguous_are_written_in_order(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(10, dtype=np.uint16)[::-2])
    assert open_shard(tmp_path / "a.bin").tolist() == [9, 7, 5, 3, 1]


def test_a_write_that_fails_leaves_the_old_shard_and_no_other_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.bin", [7])
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "a.bin", [8, 9])
    assert open_shard(tmp_path / "a.bin").tolist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("tokens, words", [([], "at least one"), ([1.5], "float64"), ([[1]], r"(1, 1)"),
                                           ([65536], "65536"), ([-1], "-1")])
def test_tokens_that_no_shard_holds_are_not_written(tmp_path, tokens, words):
    assert words in refusal(write_shard, tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (b"", ["0 bytes", "1,024"]),
    (raw_shard()[:1000], ["1,000 bytes", "1,024"]),
    (raw_shard(magic=20240801), ["20240801", "20240520"]),
    (raw_shard(version=7), ["version 7", "version 1"]),
    (raw_shard(count=0, body=b""), ["0 tokens"]),
    (raw_shard(count=-5), ["-5 tokens"]),
    (raw_shard(count=4), ["4 tokens", "1,032 bytes", "1,030"]),          # cut off
    (raw_shard(count=2), ["2 tokens", "1,028 bytes", "1,030"]),          # too long
    (raw_shard()[:-1], ["3 tokens", "1,030 bytes", "1,029"]),            # half a token
], ids=["empty", "header cut", "magic", "version", "no tokens", "negative", "cut", "long", "odd byte"])
def test_a_bad_shard_is_refused_in_one_line_with_its_name_and_the_numbers(tmp_path, content, words):
    (tmp_path / "bad.bin").write_bytes(content)
    for function in (read_header, open_shard):
        message = refusal(function, tmp_path / "bad.bin")
        assert all(word in message for word in [str(tmp_path / "bad.bin"), *words]), message
        assert ";" in message or ":" in message.split("bad.bin: ")[1]     # the remedy


def test_tokens_refuse_a_bad_shard_before_anything_is_read(tmp_path):
    write_shard(tmp_path / "a.bin", [1])
    (tmp_path / "b.bin").write_bytes(raw_shard(count=4))
    assert "b.bin" in refusal(Tokens, [tmp_path / "a.bin", tmp_path / "b.bin"], 10)


def test_shards_are_found_in_the_order_of_their_names(tmp_path):
    for name in ("t_000010.bin", "t_000002.bin", "v_000000.bin"):
        write_shard(tmp_path / name, [1])
    assert [path.name for path in find_shards(str(tmp_path / "t_*.bin"))] == ["t_000002.bin", "t_000010.bin"]


def test_a_pattern_that_matches_nothing_is_named_with_the_way_to_data(tmp_path):
    message = refusal(find_shards, str(tmp_path / "no_*.bin"), "data.val")
    assert "data.val" in message and "no_*.bin" in message and "python -m data.demo" in message


def test_the_stream_is_all_shards_in_a_row_and_begins_again_after_the_last(tmp_path):
    for name, tokens in (("a", [0, 1, 2]), ("b", [3]), ("c", [4, 5])):
        write_shard(tmp_path / name, tokens)
    tokens = Tokens([tmp_path / name for name in "abc"], 6)
    for first in range(14):
        for count in range(15):
            assert tokens.stream(first, count).tolist() == [(first + i) % 6 for i in range(count)]


def test_a_token_outside_the_vocabulary_is_named_with_its_file_and_place(tmp_path):
    write_shard(tmp_path / "a.bin", [0, 1, 2, 50256, 50257, 50301])
    tokens = Tokens([tmp_path / "a.bin"], 50257)
    assert tokens.read(0, 1, 3).tolist() == [1, 2, 50256]
    message = refusal(tokens.read, 0, 2, 3)
    assert all(word in message for word in (str(tmp_path / "a.bin"), "token 4 ", "id 50257", "50,257"))


def test_the_fingerprint_knows_names_counts_and_the_ends_of_shards(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tokens = np.arange(2000)
    write_shard(tmp_path / "a.bin", tokens)
    write_shard(tmp_path / "elsewhere" / "a.bin", tokens)
    write_shard(tmp_path / "b.bin", tokens)
    write_shard(tmp_path / "elsewhere" / "b.bin", np.append(tokens[:-1], 7))
    first = fingerprint([tmp_path / "a.bin"])
    assert first == fingerprint([tmp_path / "elsewhere" / "a.bin"])
    assert (first["files"], first["tokens"]) == (1, 2000)
    others = [fingerprint([path]) for path in (tmp_path / "b.bin", tmp_path / "elsewhere" / "b.bin")]
    assert len({each["sha256"] for each in (first, *others)}) == 3
    assert fingerprint([tmp_path / "a.bin", tmp_path / "b.bin"])["tokens"] == 4000
