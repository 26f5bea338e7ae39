"""Documents: their index, rows that begin with one, and boundaries, against loops that take a token at a time."""
import math
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data import documents
from data.documents import Boundaries, count_in_rows, index, places, scan, starts_in
from data.loader import DataConfig, TrainLoader, ValLoader, open_data, row_range
from data.packing import Packing
from data.prefetch import Prefetcher
from data.shards import ShardError, Tokens, open_shard, write_shard
from harness.load import ConfigError, load
from tests.conftest import losses, the_run, train_elsewhere, train_here

EOT = 256
SEQ = 16
BATCH = 16 * SEQ
ORDERS = ["continuous", "spread", "documents", "2024-10", "2024-12", "2025-01"]


def write_documents(folder: Path, name: str, lengths, seed: int) -> Path:
    """A shard of documents of `lengths` tokens, end of text included; a negative length is a document's second part."""
    rng, parts = np.random.default_rng(seed), []
    for length in lengths:
        body = rng.integers(257, 60_000, abs(length) - (length > 0))
        parts.append(np.concatenate([[EOT], body]) if length > 0 else body)
    write_shard(folder / name, np.concatenate(parts))
    return folder / name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    """Empty, short and very long documents; some that go on in the next shard, one that fills a shard."""
    rng = np.random.default_rng(1)
    mixed = [[*rng.integers(1, 6, 40), *rng.integers(1, 90, 30), 5 * SEQ, 1, 1, 1, *rng.integers(1, 40, 20)]
             for _ in range(4)]
    lengths = [mixed[0], [-7, *mixed[1], 3], [-20 * SEQ], [-1, 9 * SEQ, *mixed[2]], [*[SEQ] * 20, *[1] * 40, *mixed[3]]]
    return [write_documents(tmp_path, f"t_{n}.bin", each, n) for n, each in enumerate(lengths)]


def slow_rows(paths, seq_len, cut):
    """The rows of order "documents", a token at a time."""
    rows = []
    for path in paths:
        row, taken = [], None                    # tokens taken of this document; None: wait for the next one
        for token in open_shard(path).tolist():
            taken = 0 if token == EOT else taken
            if taken is None or (cut is not None and taken >= cut):
                continue
            row.append(token)
            taken += 1
            if len(row) == seq_len + 1:
                rows.append(row)
                row, taken = [], None
    return np.array(rows)


def slow_boundaries(inputs):
    found = []
    for row, tokens in enumerate(inputs.tolist()):
        found += [row * len(tokens) + column for column, token in enumerate(tokens) if column == 0 or token == EOT]
    return found


def loader(paths, order="documents", **options):
    options = {"end_of_text": EOT, "separate": True, "repeat": True, "run": [BATCH] * 40, **options}
    return TrainLoader(paths, order, SEQ, 65536, **options)


def batch(train, step, first=0, last=BATCH // SEQ):
    return train.rows(step, step * BATCH, BATCH, first, last)


# ---------------------------------------------------------------- the index

def test_the_index_is_where_the_end_of_text_stands_whatever_the_chunk(shards, monkeypatch):
    for path in shards:
        tokens = open_shard(path)
        slow = [place for place, token in enumerate(tokens.tolist()) if token == EOT]
        assert starts_in(path, EOT).tolist() == starts_in(path, EOT).tolist() == slow
        for chunk in (1, 7, tokens.size, tokens.size + 1):
            monkeypatch.setattr(documents, "CHUNK", chunk)
            assert scan(tokens, EOT).tolist() == slow


def test_an_index_is_read_again_and_made_again_when_its_shard_or_the_id_has_changed(shards, monkeypatch):
    path, scans = shards[0], []
    monkeypatch.setattr(documents, "scan", lambda tokens, end: scans.append(end) or scan(tokens, end))
    first = starts_in(path, EOT)
    assert starts_in(path, EOT).tolist() == first.tolist() and scans == [EOT]
    assert starts_in(path, 5).size == 0 and starts_in(path, EOT).size == first.size and scans == [EOT, 5]
    was, tokens = path.stat(), np.array(open_shard(path))
    tokens[3], tokens[-1] = EOT, EOT
    write_shard(path, tokens)                                                  # the same size ...
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))                      # ... and the same time
    assert starts_in(path, EOT)[-1] == tokens.size - 1 and scans == [EOT, 5, EOT]
    os.utime(path)
    write_shard(path, tokens[:-1])
    assert starts_in(path, EOT)[-1] < tokens.size - 1 and scans == [EOT, 5, EOT, EOT]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: raw[:50], lambda raw: b"", lambda raw: raw + b"1",
                                    lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: bytes(len(raw))])
def test_a_damaged_index_is_made_again(shards, damage):
    whole = starts_in(shards[0], EOT)
    place = places(shards[0], EOT)[0]
    raw = place.read_bytes()
    place.write_bytes(damage(raw))
    assert starts_in(shards[0], EOT).tolist() == whole.tolist() and place.read_bytes() == raw


def test_an_index_is_no_shard_to_any_pattern(shards, tmp_path):
    config = DataConfig(train=f"{tmp_path}/t_*", val=f"{tmp_path}/v*", documents="separate", tokenizer="bytes")
    write_documents(tmp_path, "v.bin", [50, 60], 9)
    for _ in range(2):
        train, _ = open_data(config, SEQ, SEQ, 65536)
        assert len(train.tokens.paths) == 5
    assert len(list(tmp_path.glob(".*.documents"))) == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user, which only root may")
def test_the_index_of_a_read_only_folder_goes_to_the_cache_or_nowhere(shards):
    nobody, outside = 65534, Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        path = Path(shutil.copy(shards[0], outside))
        (outside / "cache").mkdir()
        os.chown(outside / "cache", nobody, nobody)
        for folder in (outside, outside / "cache"):
            os.chmod(folder, 0o755)
        os.chmod(path, 0o644)
        slow = scan(open_shard(path), EOT).tolist()
        for cache, kept in ((outside / "cache", True), (outside / "none", False)):
            os.environ["XDG_CACHE_HOME"] = str(cache)
            os.seteuid(nobody)
            try:
                assert starts_in(path, EOT).tolist() == starts_in(path, EOT).tolist() == slow
            finally:
                os.seteuid(0)
            assert places(path, EOT)[1].exists() == kept and not places(path, EOT)[0].exists()
    finally:
        shutil.rmtree(outside)


def _index_at_once(paths, barrier, queue):
    barrier.wait()
    queue.put([starts.tolist() for starts in index(paths, EOT)])


def test_processes_that_index_the_same_shards_at_once_agree_and_leave_nothing_half_written(shards, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_index_at_once, args=(shards, barrier, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(each == [scan(open_shard(path), EOT).tolist() for path in shards] for each in found)
    assert len(list(tmp_path.glob(".*.documents"))) == 5 and not list(tmp_path.glob(".*.tmp"))


def test_an_index_that_cannot_be_finished_leaves_nothing(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert starts_in(shards[0], EOT).tolist() == scan(open_shard(shards[0]), EOT).tolist()
    assert not list(tmp_path.rglob("*.documents*"))


def test_a_shard_that_changes_while_it_is_indexed_is_an_error(shards, monkeypatch):
    monkeypatch.setattr(documents, "scan", lambda tokens, end: os.utime(shards[0]) or scan(tokens, end))
    with pytest.raises(ShardError, match=r"t_0\.bin changed while its documents were indexed"):
        starts_in(shards[0], EOT)
    assert not places(shards[0], EOT)[0].exists()


# ---------------------------------------------------------------- rows that begin with documents

@pytest.mark.parametrize("cut", [None, 2, 7, SEQ, SEQ + 1, 40])
@pytest.mark.parametrize("seq_len", [1, 4, SEQ, 5 * SEQ])
def test_rows_of_documents_are_those_of_a_loop_over_tokens(shards, seq_len, cut):
    tokens = Tokens(shards, 65536)
    packing, slow = Packing(tokens, index(shards, EOT), seq_len, cut), slow_rows(shards, seq_len, cut)
    assert packing.rows == len(slow) > 5
    assert np.array_equal(np.stack([packing.row(number) for number in range(packing.rows)]), slow)
    assert (slow[:, 0] == EOT).all()
    fewest = [len(slow_boundaries(row[None, :-1])) for row in slow]
    assert ((packing.documents_in_rows() - fewest >= 0) & (packing.documents_in_rows() - fewest <= 1)).all()


def test_training_in_rows_of_documents_ends_with_the_last_whole_batch_or_begins_again(shards):
    rows, (once, again) = slow_rows(shards, SEQ, 9), (loader(shards, repeat=r, max_document=9) for r in (False, True))
    steps = len(rows) * SEQ // BATCH
    assert once.steps_before_repeat(BATCH) == steps > 2
    once.check_enough(steps, BATCH)
    with pytest.raises(ShardError, match=rf"\({len(rows) * SEQ:,} in rows of documents\), enough for {steps} steps"):
        once.check_enough(steps + 1, BATCH)
    batch(once, steps - 1)
    with pytest.raises(ShardError, match=rf"needs 16 rows, but the documents fill {len(rows)}; .*data\.repeat=true"):
        batch(once, steps)
    for step in (0, steps - 1, steps, 3 * steps + 1):
        expected = rows[np.arange(16 * step, 16 * step + 16) % len(rows)]
        assert np.array_equal(batch(again, step)[0], expected[:, :-1])
        assert np.array_equal(batch(again, step)[1], expected[:, 1:])


def test_shards_without_documents_or_with_too_short_ones_are_refused(shards, tmp_path):
    for order in ("continuous", "documents"):
        with pytest.raises(ShardError, match=r"data\.train: no document begins in .*t_2\.bin .*no token is 256"):
            loader(shards[2:3], order)
    with pytest.raises(ShardError, match=r"data\.val: no document begins in .*correct data\.tokenizer"):
        ValLoader(shards[2:3], SEQ, SEQ, 65536, EOT)
    short = write_documents(tmp_path, "s.bin", [SEQ], 0)
    with pytest.raises(ShardError, match="no shard has documents that fill a row of seq_len 16"):
        loader([short])
    assert loader([write_documents(tmp_path, "s.bin", [SEQ + 1], 0)]).packing.rows == 1


# ---------------------------------------------------------------- boundaries

@pytest.mark.parametrize("order", ORDERS)
def test_batches_and_boundaries_are_the_same_at_any_number_of_ranks_micro_batch_and_restart(shards, order):
    options = {"max_document": 11} if order == "documents" else {}
    used, sizes = loader(shards, order, **options), {}
    for step in (0, 1, 7, 39):
        whole, plain = batch(used, step), batch(loader(shards, order, separate=False, **options), step)
        assert len(plain) == 2 and all(map(np.array_equal, whole, plain))
        for world in (1, 2, 3, 8):
            for micro in (1, 3, 16):
                rows, fresh = [], loader(shards, order, **options)
                for rank in range(world):
                    first, last = row_range(16, rank, world)
                    rows += [(i, min(i + micro, last)) for i in range(first, last, micro)]
                parts = [batch(fresh, step, *run) for run in rows]
                assert all(np.array_equal(np.concatenate([part[n] for part in parts]), whole[n]) for n in (0, 1))
                for inputs, _, bounds in parts:
                    slow, end = slow_boundaries(inputs), inputs.size
                    assert bounds.dtype == np.int32 and bounds.tolist() == slow + [end] * (len(bounds) - len(slow))
                    assert bounds[-1] == end and sizes.setdefault(len(inputs), len(bounds)) == len(bounds)
                    stretches = np.diff(bounds)
                    assert stretches.max() <= fresh.longest_document <= (11 if order == "documents" else SEQ)
    assert [used.dummy(n)[2].size for n in sizes] == list(sizes.values())


def test_the_length_of_boundaries_is_what_the_fullest_rows_need_and_no_more(shards, monkeypatch):
    monkeypatch.setattr(documents, "K_UNIT", 1)
    for order in ORDERS:
        train, run = loader(shards, order, run=[BATCH] * 5), range(5)
        per_row = [len(slow_boundaries(batch(train, step)[0][row:row + 1])) for step in run for row in range(16)]
        for rows in (1, 3, 16):
            fullest = max(sum(per_row[first:first + rows]) for first in range(len(per_row) - rows + 1))
            if order == "documents":             # of all its rows, and with documents that give a target only
                assert fullest + 1 <= train.boundaries.size(rows) <= rows * SEQ + 1
            else:
                assert train.boundaries.size(rows) == fullest + 1
    unknown = loader(shards, run=None, order="continuous").boundaries
    assert unknown.size(3) == 3 * SEQ + 1 and unknown.size(0) == 1


def test_documents_are_counted_in_rows_that_go_on_from_the_last_token_to_the_first():
    starts, total = np.array([2, 3, 9]), 10
    line = np.isin(np.arange(400) % total, starts)
    for seq_len in (1, 4, 10, 33):
        rows = np.arange(60)
        slow = [1 + int(line[row + 1:row + seq_len].sum()) for row in rows]
        assert count_in_rows(starts, total, rows, seq_len).tolist() == slow


def test_validation_has_boundaries_and_begins_anywhere(shards):
    val = ValLoader(shards, 70 * SEQ, SEQ, 65536, EOT)
    inputs, targets, bounds = val.rows(3, 67)
    stream = np.concatenate([open_shard(path) for path in shards])
    assert np.array_equal(inputs.ravel(), stream[3 * SEQ:67 * SEQ])
    assert np.array_equal(targets.ravel(), stream[3 * SEQ + 1:67 * SEQ + 1])
    slow = slow_boundaries(inputs)
    assert bounds.tolist() == slow + [64 * SEQ] * (len(bounds) - len(slow)) and len(bounds) > len(slow)
    assert val.longest_document == SEQ and [x.shape for x in val.dummy(64)] == [x.shape for x in val.rows(3, 67)]


def test_dummy_rows_are_one_document_each():
    train = Boundaries(EOT, SEQ, np.array([2, 2, 70]), SEQ)
    assert train.padded(np.arange(2) * SEQ, 2).tolist() == [0, SEQ] + [2 * SEQ] * 31
    with pytest.raises(AssertionError, match="33 documents in 2 rows"):
        train.padded(np.arange(33), 2)


def test_boundaries_travel_through_the_prefetcher(shards):
    train = loader(shards)
    with Prefetcher(lambda step: [batch(train, step, 0, 3), batch(train, step, 3, 16)], "cpu") as prefetcher:
        for step in (0, 1, 5):
            for tensors, run in zip(prefetcher.get(step), [(0, 3), (3, 16)]):
                assert [x.dtype for x in tensors] == [torch.int64, torch.int64, torch.int32]
                assert all(map(np.array_equal, tensors, batch(train, step, *run)))


# ---------------------------------------------------------------- the whole program

KEYS = ["model.vocab_size=257", "data.documents=separate"]
PACKED = [*KEYS, "data.order=documents", "data.max_document_tokens=20"]


@pytest.fixture
def text(tiny, tmp_path):
    """The tiny configuration on the tiny corpus cut into documents."""
    rng, folder = np.random.default_rng(0), tmp_path / "text"
    folder.mkdir()
    for name, count in (("train_000", 5000), ("train_001", 4000), ("val_000", 2000)):
        tokens = (np.arange(count) * 7) % 64
        tokens[rng.random(count) < 0.1] = EOT
        write_shard(folder / f"{name}.bin", tokens)
    lines = [f'data: {{train: "{folder}/train_*.bin", val: "{folder}/val_*.bin", tokenizer: bytes}}'
             if line.startswith("data:") else line for line in tiny.read_text().splitlines()]
    tiny.write_text("\n".join(lines))
    return tiny


def test_a_run_on_separate_documents_is_the_same_on_two_ranks_and_after_a_restart(text):
    def runs(name, *more):
        return ["--config", text, *PACKED, "micro_batch_tokens=128", "checkpoint_every=5",
                f"runs_dir={text.parent / name}", *more]

    train_here(*runs("one"))
    done = train_elsewhere(*runs("two"), ranks=2)
    assert done.returncode == 0, done.stderr
    one = losses(the_run(text, "one"))
    assert losses(the_run(text, "two")) == one
    shutil.copytree(text.parent / "one", text.parent / "again")
    run = the_run(text, "again")
    for path in (run / "summary.json", *(run / "checkpoints").glob("step_000012*")):
        path.unlink()
    train_here(*runs("again"), "--resume", "auto")
    assert losses(run) == one and (run / "summary.json").exists()


def test_separate_documents_change_the_loss_and_the_micro_batch_does_not(text):
    found = {}
    for name, keys in {"apart": KEYS, "rows": [*KEYS, "micro_batch_tokens=96"], "mixed": KEYS[:1]}.items():
        train_here("--config", text, f"runs_dir={text.parent / name}", *keys)
        found[name] = losses(the_run(text, name))
    assert found["apart"] == pytest.approx(found["rows"], rel=2e-5)
    assert all(map(math.isfinite, found["apart"].values()))
    assert abs(found["apart"]["val", 12] - found["mixed"]["val", 12]) > 1e-3


@pytest.mark.parametrize("keys", [KEYS, PACKED])
def test_every_pass_of_a_run_has_boundaries_in_a_shape_that_the_warm_up_has_met(text, monkeypatch, keys):
    import train
    from model.gpt import GPT
    activity, passes, enter, forward = ["setup"], [], train.Clock.enter, GPT.forward

    def spy(self, *tensors, **options):
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        passes.append((activity[-1], torch.is_grad_enabled(), shapes, *options.items()))
        return forward(self, *tensors, **options)

    monkeypatch.setattr(train.Clock, "enter", lambda self, name: (activity.append(name), enter(self, name)))
    monkeypatch.setattr(GPT, "forward", spy)
    train_here("--config", text, "micro_batch_tokens=96", *keys)
    met = {tuple(rest) for where, *rest in passes if where == "warm-up"}
    seen = {tuple(rest) for where, *rest in passes if where != "warm-up"}
    assert seen and seen <= met and all(len(shapes) == 3 for _, shapes, *_ in met)


@pytest.mark.parametrize("keys, words", [
    (KEYS[1:], "separate looks for id 256, with .* data.tokenizer bytes, but model.vocab_size is 64"),
    (["data.order=documents"], "order: documents looks for id 256"),
    ([*KEYS, "data.max_document_tokens=8"], "not read while order is 'continuous', only while it is 'documents'"),
    ([*PACKED, "data.max_document_tokens=33"], "max_document_tokens 33 is more than seq_len 32"),
    ([*PACKED, "data.max_document_tokens=1"], "greater than or equal to 2"),
    ([*KEYS, "data.documents=apart"], "'ignore' or 'separate'")])
def test_combinations_that_cannot_be_are_refused_in_a_line(text, keys, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load(str(text), keys)
    assert "\n" not in str(caught.value)


def test_a_dry_run_says_what_rows_of_documents_leave(text, capsys):
    assert train_here("--config", text, "--dry-run", *PACKED) == 0
    paths = sorted((text.parent / "text").glob("train*"))
    rows = len(slow_rows(paths, 32, 20))
    count = sum(int((open_shard(path) == EOT).sum()) for path in paths)
    said = f"{count:,}; rows that begin with one hold {rows * 32:,} tokens ({rows * 32 / 9000:.1%}), enough for"
    assert f"{said} {rows // 8} steps of 12" in capsys.readouterr().out
    with pytest.raises(ShardError, match=r"in rows of documents\), enough for"):
        train_here("--config", text, "--dry-run", *PACKED, "steps=200")


def test_looking_for_a_culprit_row_by_row_keeps_the_documents(text, monkeypatch):
    from harness.diagnose import name_culprit
    from harness.processes import Processes
    from model.gpt import GPT
    config = load(str(text), [*KEYS, "model.init.attn_out={scale: 0.1}", "model.init.head={scale: 0.1}"]).config
    train, _ = open_data(config.data, 32, 512, 257, [256])
    arrays = [torch.from_numpy(array) for array in train.rows(0, 0, 256, 0, 8)]
    model = GPT(config.model, 32)
    model.init_weights(0)
    whole, seen, forward = model(*arrays).item(), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *batch: seen.append(forward(self, *batch)) or seen[-1])
    alone = Processes.__new__(Processes)
    object.__setattr__(alone, "world", 1)
    name_culprit(alone, model, [arrays])
    assert len(seen) == 8 and sum(loss.item() for loss in seen) == pytest.approx(whole, rel=1e-5)
    assert abs(sum(forward(model, *(x[row:row + 1] for x in arrays[:2])).item() for row in range(8)) - whole) > 1e-2


def test_the_bench_reads_every_order_cold_and_warm(text, tmp_path, capsys):
    from scripts.bench.loader import drop, main, resident, warm
    kept = index(sorted((tmp_path / "text").glob("train*")), EOT)
    assert main(["--config", str(text), "--steps", "3", "--step-ms", "1", "--ranks", "3", *KEYS]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-6:]] == [o for o in ORDERS[:3] for _ in range(2)]
    assert f"index of {sum(map(len, kept)):,} documents" in out and "one of 3 ranks reads 64 in rows of 32" in out
    path = tmp_path / "text" / "big.bin"
    write_shard(path, np.zeros(2_000_000, np.uint16))
    assert (warm([path]), resident([path])) in (("warm", 1), ("warm", None))
    if resident([path]) is not None:
        state = drop([path])
        assert (state == "cold") == (resident([path]) == 0) or "still there" in state
    with pytest.raises(ValueError, match="--shards makes GPT-2 tokens"):
        main(["--config", str(text), "--shards", "1"])
