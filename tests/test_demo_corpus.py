"""The demo corpus: every document once, none in both splits, and nothing rewritten that is intact."""
import json

import numpy as np
import pytest

from data import demo
from data.shards import ShardError, find_shards, open_shard, write_shard


@pytest.fixture
def sources(tmp_path):
    """A small tree with what real ones have: copies, empty files, other files, bytes that are no UTF-8."""
    root = tmp_path / "torch"
    for number in range(150):
        folder = root / ("nn" if number % 3 else "optim")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file_{number}.py").write_bytes(f"# file {number}\n".encode() * (number % 7 + 1))
    (root / "__init__.py").write_bytes(b"")
    (root / "nn" / "a_copy.py").write_bytes(b"# file 0\n")
    (root / "latin.py").write_bytes("# é".encode("latin-1"))
    (root / "read.me").write_bytes(b"not Python")
    return root


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(demo, "SHARD_TOKENS", 1000)


def documents_of(out, name):
    """The documents in the shards of one split: 256, the bytes of the first, 256, the next, ..."""
    tokens = np.concatenate([open_shard(path) for path in find_shards(str(out / f"{name}_*.bin"))])
    assert tokens[0] == 256 and tokens.max() == 256
    return [bytes(each[1:].astype(np.uint8)) for each in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]


def state(out):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}


def test_every_document_is_in_one_split_once(sources, tmp_path, small_shards):
    meta, written = demo.make(sources, "2.0", tmp_path / "out")
    train, val = (documents_of(tmp_path / "out", name) for name in ("train", "val"))
    wanted = {path.read_bytes() for path in sources.rglob("*.py")} - {b""}
    assert written and sorted(train + val) == sorted(wanted) and len(wanted) == 151
    assert len(find_shards(str(tmp_path / "out" / "train_*.bin"))) == -(-meta["train"]["tokens"] // 1000) > 3
    assert 4 <= len(val) <= 20                          # about one in sixteen


def test_meta_says_what_the_shards_hold(sources, tmp_path):
    meta, _ = demo.make(sources, "2.0", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta
    assert (meta["tokenizer"], meta["torch"]) == ("bytes", "2.0") and len(meta["source_sha256"]) == 64
    for name in ("train", "val"):
        texts = documents_of(tmp_path / "out", name)
        size = sum(map(len, texts))
        assert meta[name] == {"documents": len(texts), "tokens": size + len(texts), "bytes": size}


def test_the_documents_are_shuffled_and_the_same_at_every_place(sources, tmp_path):
    demo.make(sources, "2.0", tmp_path / "a")
    moved = sources.rename(tmp_path / "elsewhere")
    demo.make(moved, "2.0", tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    texts = documents_of(tmp_path / "a", "train")
    assert texts != sorted(texts) and len({text[:9] for text in texts[:30]}) > 20


def test_a_new_file_moves_no_other_document_to_the_other_split(sources):
    before = demo.split(demo.documents(sources))
    (sources / "one_more.py").write_bytes(b"more")
    after = demo.split(demo.documents(sources))
    assert all([text for text in after[name] if text != b"more"] == before[name] for name in before)


def test_no_long_document_is_held_out(sources):
    texts = {f"file_{number}.py": b"x" * (demo.HELD_OUT_BYTES + number) for number in range(300)}
    parts = demo.split(texts)
    assert [len(text) for text in parts["val"]] in ([], [demo.HELD_OUT_BYTES])
    assert len(parts["train"]) + len(parts["val"]) == 300
    assert demo.split({path: b"x" for path in texts})["val"]


def test_a_second_run_rewrites_nothing(sources, tmp_path, small_shards):
    meta, _ = demo.make(sources, "2.0", tmp_path / "out")
    before = state(tmp_path / "out")
    assert demo.make(sources, "2.0", tmp_path / "out") == (meta, False)
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [
    lambda out: (out / "train_000001.bin").unlink(),
    lambda out: (out / "train_000001.bin").write_bytes((out / "train_000001.bin").read_bytes()[:-100]),
    lambda out: write_shard(out / "train_000001.bin", open_shard(out / "train_000001.bin")[::-1].copy()),
    lambda out: (out / "val_000000.bin").write_bytes(b""),
    lambda out: (out / "meta.json").unlink(),
    lambda out: (out / "meta.json").write_text('{"tokenizer": "by'),
    lambda out: (out / "meta.json").write_text('{"files": 3}'),
    lambda out: (out / "meta.json").write_text((out / "meta.json").read_text().replace('"2.0"', '"1.9"')),
], ids=["missing", "cut", "other tokens", "empty", "no meta", "half a meta", "odd meta", "other version"])
def test_what_is_missing_or_wrong_is_made_again(sources, tmp_path, small_shards, damage):
    meta, _ = demo.make(sources, "2.0", tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    damage(tmp_path / "out")
    assert demo.make(sources, "2.0", tmp_path / "out") == (meta, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_meta_is_written_last(sources, tmp_path, small_shards, monkeypatch):
    demo.make(sources, "1.9", tmp_path / "out")
    (sources / "one_more.py").write_bytes(b"more")

    def interrupt(path, tokens):
        if path.name.startswith("val"):
            raise KeyboardInterrupt
        write_shard(path, tokens)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "write_shard", interrupt)
        demo.make(sources, "2.0", tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()
    assert demo.make(sources, "2.0", tmp_path / "out")[1]


def test_shards_of_an_earlier_torch_are_removed_and_others_are_not_touched(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHARD_TOKENS", 500)
    demo.make(sources, "1.9", tmp_path / "out")
    monkeypatch.setattr(demo, "SHARD_TOKENS", 3000)
    meta, _ = demo.make(sources, "2.0", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.bin")} == meta["files"].keys()
    write_shard(tmp_path / "out" / "train_mine.bin", [1])
    with pytest.raises(ShardError, match=r"train_mine\.bin is not of this corpus, .*--out"):
        demo.make(sources, "2.0", tmp_path / "out")
    assert (tmp_path / "out" / "train_mine.bin").exists()


def test_a_file_that_cannot_be_read_is_left_out(sources):
    (sources / "broken.py").symlink_to("nowhere")
    (sources / "folder.py").mkdir()
    assert len(demo.documents(sources)) == 151


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ShardError, match="0 files to train on and 0 held out are too few; install torch"):
        demo.make(tmp_path, "2.0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_installed_torch_and_says_so(sources, tmp_path, monkeypatch, capsys):
    folder, version = demo.torch_sources()
    assert (folder / "nn" / "functional.py").exists() and version
    monkeypatch.setattr(demo, "torch_sources", lambda: (sources, "2.0"))
    for words in ("written", "there already, and intact"):
        demo.main(["--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().out
