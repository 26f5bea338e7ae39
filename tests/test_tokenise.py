"""Any text to shards: the same bytes whatever the workers, kills and order; bad text is one line."""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import shard_writer, tokenise, workers
from data.shard_writer import Seen
from data.shards import open_shard
from tests.conftest import ROOT

WORDS = "the cat naïve 数 sat\n on\t mat  1984 <|endoftext|> 😀".split(" ")


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randrange(60))) for number in range(count)]


def write_lines(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(documents)))
    return path


def run(*arguments, code: int = 0) -> None:
    arguments = [str(argument) for argument in arguments]
    assert tokenise.main([*arguments, *([] if "--tokenizer" in arguments else ["--tokenizer", "bytes"]),
                          *([] if "--workers" in arguments else ["--workers", "0"])]) == code


def refusal(capsys, *arguments, code: int = 2) -> str:
    """The one line in which the command is refused."""
    capsys.readouterr()
    run(*arguments, code=code)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def tokens_of(out: Path, split: str) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint16), *(open_shard(path) for path in sorted(out.glob(f"{split}_*.bin")))])


def documents_of(out: Path, split: str) -> list[str]:
    """The texts in the shards of a split of bytes, in order."""
    tokens = tokens_of(out, split)
    pieces = np.split(tokens, np.flatnonzero(tokens == 256))
    assert pieces[0].size == 0, "the first shard begins with a document"
    return [piece[1:].astype(np.uint8).tobytes().decode() for piece in pieces[1:]]


def meta(out: Path) -> dict:
    return json.loads((out / "meta.json").read_text())


@pytest.fixture
def small_tasks(monkeypatch):
    """Many tasks of a small text, and a checkpoint after each."""
    monkeypatch.setattr(workers, "TASK_BYTES", 1500)
    monkeypatch.setattr("data.sources.BLOCK_BYTES", 700)
    monkeypatch.setattr("data.sources.BLOCK_ROWS", 7)
    monkeypatch.setattr(tokenise, "CHECKPOINT_S", 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)          # it matters when power fails, and takes the time


# -------------------------------------------------------------------------------------------- what comes out
@pytest.mark.usefixtures("small_tasks")
def test_the_shards_are_the_documents_in_order_each_after_its_end_of_text(tmp_path):
    documents = texts(300)
    run(write_lines(tmp_path / "a.jsonl", documents), "--out", tmp_path / "o", "--shard-tokens", 5000, "--held-out", 0)
    assert documents_of(tmp_path / "o", "train") == documents
    counts = [open_shard(path).size for path in sorted((tmp_path / "o").glob("*.bin"))]
    assert len(counts) > 5 and set(counts[:-1]) == {5000} and 0 < counts[-1] <= 5000       # spilling over
    assert meta(tmp_path / "o")["train"] == {"documents": 300, "tokens": sum(counts),
                                             "bytes": sum(len(text.encode()) for text in documents)}


def test_meta_has_the_sha256_of_every_shard_and_nothing_else_is_left(tmp_path):
    run(write_lines(tmp_path / "a.jsonl", texts(200)), "--out", tmp_path / "o", "--shard-tokens", 3000, "--name", "x")
    found = contents(tmp_path / "o")
    said = meta(tmp_path / "o")["files"]
    assert found.keys() == {"meta.json", *said} and {"x_train_000000.bin", "x_val_000000.bin"} < said.keys()
    assert {name: hashlib.sha256(found[name]).hexdigest() for name in said} == {
        name: entry["sha256"] for name, entry in said.items()}


@pytest.mark.parametrize("held_out", ["0.2", "3000"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch, held_out):
    monkeypatch.setattr(workers, "TASK_BYTES", 50_000)
    monkeypatch.setattr("data.sources.BLOCK_BYTES", 50_000)
    source = write_lines(tmp_path / "a.jsonl", texts(6000))                  # some 20 tasks
    for count in (0, 1, 3):
        run(source, "--out", tmp_path / str(count), "--workers", count, "--held-out", held_out)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("held_out", ["0.2", "3000"])
def test_who_is_held_out_depends_on_the_text_alone_and_nobody_is_in_both(tmp_path, held_out):
    documents = texts(1000)
    shuffled = random.Random(1).sample(documents, 1000)
    for name, order in (("a", documents), ("b", shuffled)):
        run(write_lines(tmp_path / f"{name}.jsonl", order), "--out", tmp_path / name, "--held-out", held_out)
    val = set(documents_of(tmp_path / "a", "val"))
    assert val == set(documents_of(tmp_path / "b", "val"))
    for name in "ab":
        train = documents_of(tmp_path / name, "train")
        assert not val & set(train) and Counter(train) + Counter(val) == Counter(documents)
    if held_out == "0.2":
        assert 150 < len(val) < 250
    else:
        sizes = [1 + len(text.encode()) for text in documents_of(tmp_path / "a", "val")]
        assert 3000 <= sum(sizes) < 3000 + sizes[-1] + 1                      # the last is needed to get there


def test_copies_and_empty_texts_are_dropped_and_counted(tmp_path):
    documents = texts(50)
    source = write_lines(tmp_path / "a.jsonl", [*documents, "", *documents[:20], documents[0], "0"])
    run(source, "--out", tmp_path / "o", "--held-out", 0)
    assert documents_of(tmp_path / "o", "train") == [*documents, "0"]
    assert (meta(tmp_path / "o")["duplicates"], meta(tmp_path / "o")["empty"]) == (21, 1)


def test_remembering_documents_takes_16_bytes_each_at_most(tmp_path):
    import tracemalloc
    hashes = np.random.default_rng(0).integers(0, 2**64, 400_000, dtype=np.uint64)
    seen = Seen(tmp_path / "seen")
    tracemalloc.start()
    try:
        for batch in np.split(hashes, 400):
            assert seen.add(batch).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * hashes.size + 100_000, peak / hashes.size
    runs = [run.size for run in seen.runs]
    assert len(runs) > 1 and all(a >= 2 * b for a, b in zip(runs, runs[1:])), "merges are few"
    assert not seen.add(hashes[::1000]).any()
    assert seen.add(np.array([5, 6, 5], np.uint64)).tolist() == [True, True, False]


# -------------------------------------------------------------------------------------------- what goes in
def zst(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


@pytest.mark.usefixtures("small_tasks")
def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    documents = texts(100)
    plain = write_lines(tmp_path / "a.jsonl", documents).read_bytes()
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(plain))
        (tmp_path / f"c.txt{suffix}").write_bytes(pack("\n--\n".join(documents).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"n": range(100), "text": documents}), tmp_path / "a.parquet",
                                row_group_size=30)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for n, text in enumerate(documents):
        (tmp_path / "folder" / ("deeper" if n % 2 else "") / f"{n:03d}.txt").write_text(text, newline="")
    by_path = documents[::2] + documents[1::2]              # 000.txt, 002.txt, ..., deeper/001.txt, ...
    found = {}
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "c.txt.gz", "c.txt.zst",
                 "a.parquet", "folder", "folder/**/*.txt"):
        out = tmp_path / "out" / name.replace("/", "").replace("*", "")
        run(tmp_path / name, "--out", out, "--held-out", 0, "--separator", "\n--\n")
        found[name] = documents_of(out, "train")
    for name, got in found.items():                         # a folder's come in the order of their paths
        assert got == (by_path if "folder" in name else documents), name


def test_a_data_set_of_the_datasets_library_is_read_by_its_split_and_field(tmp_path):
    documents = texts(200)
    (tmp_path / "set").mkdir()
    for split, part in (("train", documents[:150]), ("test", documents[150:])):
        pyarrow.parquet.write_table(pyarrow.table({"body": part}), tmp_path / "set" / f"{split}.parquet")
    run(f"hf:{tmp_path / 'set'}::test", "--out", tmp_path / "o", "--field", "body", "--held-out", 0)
    assert documents_of(tmp_path / "o", "train") == documents[150:]


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    (tmp_path / "empty.txt").touch()
    run(*(tmp_path / name for name in ("a.jsonl", "b.txt", "empty.txt")), "--out", tmp_path / "o", "--held-out", 0)
    assert documents_of(tmp_path / "o", "train") == ["one", "two", "three"]


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", GOOD * 2 + b'{"text": bad}\n', ["a.jsonl:3:", "not JSON", "--errors skip"]),
    ("a.jsonl", GOOD + b'{"text": "cut', ["a.jsonl:2:", "not JSON"]),
    ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', ["a.jsonl:2:", "no field 'text'", "'body', 'id'", "--field"]),
    ("a.jsonl", GOOD + b'{"text": null}\n', ["a.jsonl:2:", "null", "not text"]),
    ("a.json", b'["text"]\n', ["a.json:1:", "a list", "object"]),
    ("a.jsonl", b"[" * 100_000 + b"\n", ["a.jsonl:1:", "RecursionError"]),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ["a.jsonl:1:"]),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ["a.jsonl:2:", "surrogate", "--errors replace"]),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', ["a.jsonl: byte 27 (0xff)", "UTF-8", "--errors replace"]),
    ("a.txt", b"abc\xe4def", ["a.txt: byte 3 (0xe4)", "UTF-8"]),
    ("a.txt", "naïve".encode("utf-16"), ["a.txt: byte 0 (0xff)"]),
    ("a.txt.gz", gzip.compress(b"abc" * 1000)[:-12], ["a.txt.gz", "EOFError"]),
    ("a.txt.xz", lzma.compress(b"abc" * 1000)[:-30], ["a.txt.xz", "EOFError"]),
    ("a.txt.zst", zst(b"abc" * 1000)[:-4], ["a.txt.zst", "Truncated"]),
    ("a.txt.gz", b"no gzip", ["a.txt.gz", "BadGzipFile"]),
    ("a.parquet", b"", ["a.parquet", "cannot be read"]),
    ("a.parquet", b"PAR1 not really PAR1", ["a.parquet", "cannot be read"]),
    ("a.pdf", b"%PDF", ["a.pdf", ".jsonl"]),
    ("a.txt", b"", ["no document"]),
    ("a.jsonl", b'{"text": ""}\n', ["no document", "1 empty"]),
], ids=range(20))
def test_bad_text_is_one_line_and_no_shard(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(capsys, tmp_path / name, "--out", tmp_path / "o")
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("o/*.bin"))


def test_a_missing_column_is_named_with_those_there_are(tmp_path, capsys):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    message = refusal(capsys, tmp_path / "a.parquet", "--out", tmp_path / "o")
    assert "no column 'text'" in message and "body, url" in message
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    assert "a.parquet:2: field 'text' is null" in refusal(capsys, tmp_path / "a.parquet", "--out", tmp_path / "o")


def test_bad_documents_are_mended_or_left_out_when_asked(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "a\xffb"}\n{"text": "\\ud800!"}\n')
    run(tmp_path / "a.jsonl", "--out", tmp_path / "o", "--errors", "replace", "--held-out", 0)
    assert documents_of(tmp_path / "o", "train") == ["good", "a\ufffdb", "\ufffd!"]
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "a\xffb"}\n{"text": 7}\nno\n{"text": "too"}\n')
    run(tmp_path / "a.jsonl", "--out", tmp_path / "p", "--errors", "skip", "--held-out", 0)
    assert documents_of(tmp_path / "p", "train") == ["good", "too"] and meta(tmp_path / "p")["skipped"] == 3


@pytest.mark.usefixtures("small_tasks")
def test_the_remedy_that_a_refusal_names_continues_what_was_begun(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", texts(50))
    source.write_bytes(source.read_bytes() + b'{"text": "\xff"}\n')
    assert "--errors replace" in refusal(capsys, source, "--out", tmp_path / "o")
    assert json.loads((tmp_path / "o" / tokenise.STATE).read_text())["position"]
    run(source, "--out", tmp_path / "o", "--errors", "replace")
    run(source, "--out", tmp_path / "whole", "--errors", "replace")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_document_too_long_for_memory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.sources.BLOCK_BYTES", 100)
    monkeypatch.setattr("data.sources.DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("ab\n" * 1000)
    assert "--separator" in refusal(capsys, tmp_path / "a.txt", "--out", tmp_path / "o")
    run(tmp_path / "a.txt", "--out", tmp_path / "o2", "--separator", "\n", "--held-out", 0)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
def test_mutated_lines_are_documents_or_one_line(tmp_path, capsys, errors):
    draw = random.Random(0)
    base = b"".join(json.dumps({"text": text, "m": [1.5, None, {"k": "\ud83d\ude00"}]}).encode() + b"\n"
                    for text in texts(4))
    outcomes = Counter()
    for number in range(100):
        raw = bytearray(base)
        for _ in range(draw.randrange(4)):
            at, kind = draw.randrange(len(raw)), draw.randrange(4)
            piece = draw.choice([b"\xff", b"\0", b"NaN", b"\n", b'"', b"\\ud800", b"{", b"}", b"1e999", b"\xed\xa0"])
            raw[at:at + draw.choice([0, 1, 30]) * (kind > 0)] = piece if kind < 3 else b""
        (tmp_path / "a.jsonl").write_bytes(raw)
        capsys.readouterr()
        code = tokenise.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / str(number)), "--tokenizer", "bytes",
                              "--workers", "0", "--held-out", "0", "--errors", errors])
        error = capsys.readouterr().err
        assert (code, error) == (0, "") or code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert code == 0 or not list(tmp_path.glob(f"{number}/*.bin"))
        outcomes[code] += 1
    assert outcomes[0] > 10 and (errors == "skip" or outcomes[2] > 10), outcomes


# -------------------------------------------------------------------------------------------- stopping and going on
class Stop(Exception):
    pass


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("kind, held_out", [("jsonl", "2000"), ("txt", "0.1"), ("xz", "0.1"), ("zst", "0.1"),
                                            ("parquet", "0.1")])
def test_stopped_anywhere_the_same_command_ends_with_the_same_bytes(tmp_path, monkeypatch, kind, held_out):
    documents = texts(120) + texts(10)
    source = tmp_path / {"xz": "a.jsonl.xz", "zst": "a.jsonl.zst"}.get(kind, f"a.{kind}")
    lines = write_lines(tmp_path / "lines", documents).read_bytes()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), source, row_group_size=33)
    else:
        source.write_bytes({"txt": "aaa".join(documents).encode(), "jsonl": lines, "xz": lzma.compress(lines),
                            "zst": zst(lines)}[kind])
    command = [source, "--shard-tokens", 1000, "--held-out", held_out, "--separator", "aa"]
    run(*command, "--out", tmp_path / "whole")
    draw, stops, finished = random.Random(held_out), 0, 0
    methods = [tokenise.ShardWriter.write, tokenise.ShardWriter.finish, tokenise.ShardWriter.checkpoint,
               tokenise.Seen.add, tokenise.Smallest.add, tokenise.Corpus.finish, shard_writer.sync]
    for _ in range(40):
        method, left = draw.choice(methods), [draw.choice([1, 2, 3, 5, 8, 13])]

        def stopping(*arguments, method=method, left=left, early=draw.random() < 0.5):
            left[0] -= 1
            if left[0] == 0 and early:
                raise Stop
            result = method(*arguments)
            if left[0] == 0:
                raise Stop
            return result

        owner = getattr(shard_writer, method.__qualname__.split(".")[0], tokenise.Corpus)
        with monkeypatch.context() as patch:
            patch.setattr(shard_writer if method is shard_writer.sync else owner, method.__name__, stopping)
            try:
                run(*command, "--out", tmp_path / "o")
            except Stop:
                stops += 1
                continue
        finished += 1
        assert contents(tmp_path / "o") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "o")
    assert stops > 15 and finished > 3, (stops, finished)


def start(*arguments, before: str = "") -> subprocess.Popen:
    """The command in a process group of its own, with a checkpoint after every task."""
    code = ("import sys; from data import tokenise, workers, sources\n"
            f"tokenise.CHECKPOINT_S = 0; workers.TASK_BYTES = sources.BLOCK_BYTES = 20_000\n{before}\n"
            "if __name__ == '__main__': sys.exit(tokenise.main(sys.argv[1:]))")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments), "--tokenizer", "bytes"], cwd=ROOT,
                            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition, process: subprocess.Popen):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    return found


def tokens_at_checkpoint(out: Path) -> int:
    try:
        return json.loads((out / tokenise.STATE).read_text())["counts"]["train_tokens"]
    except FileNotFoundError:
        return 0


def children(pid: int) -> list[int]:
    """The worker processes: python's own resource tracker is a child, too."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("whom", ["parent", "worker"])
def test_a_kill_leaves_whole_shards_and_no_process_and_the_command_continues(tmp_path, whom):
    source = write_lines(tmp_path / "a.jsonl", texts(20_000))
    command = [source, "--shard-tokens", 100_000, "--held-out", "5000", "--workers", 2]
    run(*command, "--out", tmp_path / "whole")
    process = start(*command, "--out", tmp_path / "o")
    wait_for(lambda: tokens_at_checkpoint(tmp_path / "o") > 300_000, process)
    pids = children(process.pid)
    assert len(pids) == 2
    os.kill(process.pid if whom == "parent" else pids[0], signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if whom == "parent":
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, error.count("\n")) == (1, 1) and "error: a worker was killed" in error, error
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)
    for path in (tmp_path / "o").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert tokens_at_checkpoint(tmp_path / "o") > 300_000
    run(*command, "--out", tmp_path / "o")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("when", ["workers start", "they work"])
def test_ctrl_c_is_one_line_from_all_processes_together(tmp_path, when):
    source = write_lines(tmp_path / "a.jsonl", texts(20_000))
    process = start(source, "--out", tmp_path / "o", "--held-out", 0, "--workers", 2,
                    before="tokenise.PROGRESS_S = 600")
    if when == "workers start":
        wait_for(lambda: len(children(process.pid)) == 2, process)
        time.sleep(0.05)                                                    # they import
    else:
        wait_for(lambda: tokens_at_checkpoint(tmp_path / "o") > 300_000, process)
    os.killpg(process.pid, signal.SIGINT)                                   # as a terminal sends it
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, "error: interrupted; the same command continues\n")


def test_a_full_disk_is_one_line_and_the_command_continues(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", texts(3000))
    command = [source, "--shard-tokens", 100_000, "--held-out", 0, "--workers", 0]
    limit = 150_000                                          # bytes of a file, of which a shard needs 201,024
    process = start(*command, "--out", tmp_path / "o",
                    before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "File too large" in error and error.count("\n") == 1, error
    assert not list((tmp_path / "o").glob("*.bin")) and list((tmp_path / "o").glob("*.bin.part"))
    run(*command, "--out", tmp_path / "o")
    run(*command, "--out", tmp_path / "whole")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_second_process_at_the_same_shards_is_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", texts(20_000))
    process = start(source, "--out", tmp_path / "o", "--workers", 0, before="import time; real = tokenise.Corpus.add\n"
                    "tokenise.Corpus.add = lambda *a: (time.sleep(60), real(*a))")
    try:
        wait_for(lambda: (tmp_path / "o" / tokenise.STATE).exists(), process)
        assert "another process" in refusal(capsys, source, "--out", tmp_path / "o")
    finally:
        process.kill()
        process.communicate()
    run(source, "--out", tmp_path / "o")                                    # the lock died with its holder


@pytest.mark.usefixtures("small_tasks")
def test_nothing_is_continued_or_overwritten_with_other_arguments_or_sources(tmp_path, capsys, monkeypatch):
    source, out = write_lines(tmp_path / "a.jsonl", texts(100)), tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(tokenise.Corpus, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "the same command continues" in refusal(capsys, source, "--out", out, code=130)
    assert "shard_tokens 100000000, not 5000" in refusal(capsys, source, "--out", out, "--shard-tokens", 5000)
    run(source, "--out", out)
    before = contents(out)
    assert "held_out 0.01, not 0.5" in refusal(capsys, source, "--out", out, "--held-out", 0.5)
    run(source, "--out", out)                                                # there already
    write_lines(source, texts(101))
    assert "other sources" in refusal(capsys, source, "--out", out)
    assert contents(out) == before
    (out / "meta.json").unlink()
    assert "another corpus" in refusal(capsys, source, "--out", out)


@pytest.mark.parametrize("arguments, words", [
    (["nosuch.jsonl"], ["nosuch.jsonl", "no such file"]),
    ([str(ROOT / "optim")], ["optim", "no such file", ".jsonl"]),
    ([__file__, "--tokenizer", "nosuch"], ["test_tokenise.py"]),
])
def test_sources_that_are_none_are_refused_before_anything_is_written(tmp_path, capsys, arguments, words):
    message = refusal(capsys, *arguments, "--out", tmp_path / "o")
    assert all(word in message for word in words) and not (tmp_path / "o").exists()


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path, capsys):
    import base64
    ranks = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(65_536 - 256)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (tmp_path / "big.tiktoken").write_text("".join(lines))
    source = write_lines(tmp_path / "a.jsonl", texts(3))
    message = refusal(capsys, source, "--out", tmp_path / "o", "--tokenizer", tmp_path / "big.tiktoken")
    assert "65,537 ids" in message and "uint16" in message and not (tmp_path / "o").exists()


def test_help_and_bad_arguments_load_nothing_slow():
    code = ("import sys; from data import tokenise, show\n"
            "try: tokenise.main(['a', '--out', 'b', '--held-out', '1.5'])\n"
            "except SystemExit as stop: print(stop.code)\n"
            "print(*{'datasets', 'tiktoken', 'pyarrow', 'torch'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2\n\n" and "--held-out" in done.stderr
