"""Batches: pure functions of the step, equal at any number of ranks; published orders equal 8 slow ranks."""
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from data import orders
from data.loader import DataConfig, TrainLoader, ValLoader, open_data, row_range, tokens_needed
from data.prefetch import Prefetcher
from data.shards import ShardError, write_shard

PUBLISHED = orders.ORDERS
SEQ = 4
BATCH = 8 * SEQ * 3                    # three rows for each of eight ranks


@pytest.fixture
def shards(tmp_path):
    """Five shards of uneven size, 0, 1, 2, ... in a row; at some sizes the orders differ."""
    paths, first = [], 0
    for number, count in enumerate([BATCH * 5 + 17, BATCH + 2, BATCH * 7, BATCH * 3 + 1, BATCH * 4 + 60]):
        write_shard(tmp_path / f"t_{number}.bin", np.arange(first, first + count))
        paths, first = [*paths, tmp_path / f"t_{number}.bin"], first + count
    return paths


def batch(loader, step, batch_tokens=BATCH, first=0, last=None):
    last = batch_tokens // loader.seq_len if last is None else last
    return loader.rows(step, step * batch_tokens, batch_tokens, first, last)


def counts_of(paths):
    return [(path.stat().st_size - 1024) // 2 for path in paths]


# ---------------------------------------------------------------- every order

@pytest.mark.parametrize("order", ["continuous", "spread", *PUBLISHED])
def test_targets_are_inputs_shifted_by_one_token(shards, order):
    inputs, targets = batch(TrainLoader(shards, order, SEQ, 65536), 3)
    assert inputs.shape == targets.shape == (BATCH // SEQ, SEQ) and inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, inputs + 1)                     # the token is its own position
    assert not np.shares_memory(inputs, targets)


@pytest.mark.parametrize("order", ["continuous", "spread", *PUBLISHED])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 24, 30])
def test_the_rows_of_all_ranks_together_are_the_rows_of_one(shards, order, world):
    loader = TrainLoader(shards, order, SEQ, 65536, repeat=True)
    for step in (0, 1, 4, 30):
        whole = batch(loader, step)
        parts = [batch(loader, step, BATCH, *row_range(24, rank, world)) for rank in range(world)]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])


@pytest.mark.parametrize("order", ["continuous", "spread", *PUBLISHED])
def test_a_batch_depends_on_nothing_that_was_read_before(shards, order):
    used, steps = TrainLoader(shards, order, SEQ, 65536, repeat=True), [7, 0, 23, 7, 1, 90, 2]
    for step in steps:
        fresh = TrainLoader(shards, order, SEQ, 65536, repeat=True)
        assert np.array_equal(batch(used, step)[0], batch(fresh, step)[0])


@pytest.mark.parametrize("order", ["continuous", *PUBLISHED])
def test_a_rank_reads_only_its_own_rows(tmp_path, order):
    tokens = np.zeros(BATCH * 3, dtype=int)
    tokens[BATCH // 2 + 1:BATCH] = 9                  # no such id; in the second half of batch 0
    write_shard(tmp_path / "a.bin", tokens)
    loader = TrainLoader([tmp_path / "a.bin"], order, SEQ, 5)
    assert not batch(loader, 0, BATCH, 0, 12)[0].any()
    with pytest.raises(ShardError, match=r"a\.bin: token 49 is id 9, but the vocabulary has 5 ids"):
        batch(loader, 0, BATCH, 12, 24)


def test_rows_are_shared_out_evenly_and_without_gaps():
    for rows in (0, 1, 7, 512):
        for world in (1, 2, 3, 8, 9):
            ranges = [row_range(rows, rank, world) for rank in range(world)]
            assert ranges[0][0] == 0 and ranges[-1][1] == rows
            assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
            sizes = [last - first for first, last in ranges]
            assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- order: continuous

def test_the_continuous_order_loses_nothing_between_shards(shards):
    loader = TrainLoader(shards, "continuous", SEQ, 65536)
    total = sum(counts_of(shards))
    steps = loader.steps_before_repeat(SEQ * 5)
    seen = np.concatenate([batch(loader, step, SEQ * 5)[0].ravel() for step in range(steps)])
    assert np.array_equal(seen, np.arange(steps * SEQ * 5)) and 0 <= total - 1 - seen.size < SEQ * 5


def test_the_position_counts_and_the_step_does_not_when_batch_sizes_change(shards):
    loader = TrainLoader(shards, "continuous", SEQ, 65536)
    position, seen = 0, []
    for step, batch_tokens in enumerate([8, 8, 16, 64, 4]):
        seen.append(loader.rows(step, position, batch_tokens, 0, batch_tokens // SEQ)[0].ravel())
        position += batch_tokens
    assert np.array_equal(np.concatenate(seen), np.arange(100))


def test_the_continuous_order_ends_with_its_last_whole_batch_unless_it_may_repeat(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9))
    write_shard(tmp_path / "b.bin", np.arange(9, 17))
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    once, again = (TrainLoader(paths, "continuous", SEQ, 65536, repeat) for repeat in (False, True))
    assert once.steps_before_repeat(8) == 2 and batch(once, 1, 8)[1].ravel().tolist() == list(range(9, 17))
    with pytest.raises(ValueError, match=r"at token 16 needs 9 tokens, .* end at 17; .*data\.repeat=true"):
        batch(once, 2, 8)
    write_shard(tmp_path / "c.bin", np.arange(9, 16))
    short = TrainLoader([tmp_path / "a.bin", tmp_path / "c.bin"], "continuous", SEQ, 65536)
    assert short.steps_before_repeat(8) == 1           # the last target is missing
    with pytest.raises(ValueError, match=r"at token 8 needs 9 tokens, .* end at 16"):
        batch(short, 1, 8)
    stream = np.arange(10_000) % 17                    # the first token follows the last
    for step in (1, 2, 3, 100):
        inputs, targets = batch(again, step, 8)
        assert np.array_equal(inputs.ravel(), stream[8 * step:8 * step + 8])
        assert np.array_equal(targets.ravel(), stream[8 * step + 1:8 * step + 9])


# ---------------------------------------------------------------- the published orders

class SlowRank:
    """One rank of the published scripts, read by read, from the description of their loaders."""

    def __init__(self, order, counts, rank):
        self.order, self.counts, self.rank = order, counts, rank
        self.rewind()
        if order == "2024-10":                         # a batch is read, and then the loader is reset
            self.primed = self.read()
            self.rewind()

    def rewind(self):
        self.shard, self.position = 0, 0 if self.order == "2025-01" else self.rank * BATCH // 8

    def next_shard(self):
        shard = (self.shard + 1) % len(self.counts)
        self.rewind()
        self.shard = shard

    def read(self):
        """The place of this read in all shards in a row."""
        if self.order == "2025-01" and self.position + BATCH + 1 >= self.counts[self.shard]:
            self.next_shard()
        offset = self.rank * BATCH // 8 if self.order == "2025-01" else 0
        place = sum(self.counts[:self.shard]) + self.position + offset
        assert self.position + offset + BATCH // 8 + 1 <= self.counts[self.shard]
        self.position += BATCH
        size = self.counts[self.shard]
        if {"2024-06": self.position + BATCH + 1 > size, "2024-10": self.position + BATCH + 1 > size,
                "2024-11": self.position + BATCH >= size, "2024-12": self.position + BATCH + 1 >= size,
                "2025-01": False}[self.order]:
            self.next_shard()
        return place

    def batch(self):
        if self.order == "2024-10" and self.primed is not None:
            place, self.primed = self.primed, None
            return place
        return self.read()


@pytest.mark.parametrize("order", PUBLISHED)
def test_a_published_order_equals_eight_slow_ranks_over_several_rounds(shards, order):
    loader = TrainLoader(shards, order, SEQ, 65536)
    ranks = [SlowRank(order, counts_of(shards), rank) for rank in range(8)]
    for step in range(400):
        places = [rank.batch() for rank in ranks]
        expected = np.concatenate([np.arange(place, place + BATCH // 8) for place in places])
        inputs, targets = batch(loader, step)
        assert np.array_equal(inputs.ravel(), expected), step
        assert np.array_equal(targets.ravel(), expected + 1), step


@pytest.mark.parametrize("order", PUBLISHED)
def test_the_number_of_reads_of_a_shard_is_right_at_every_size(order):
    for count in range(3 * BATCH - 1, 4 * BATCH + 3):
        for rank in range(8):
            slow = SlowRank(order, [count, 9 * BATCH], rank)
            slow.rewind()
            reads = 0
            while slow.read() < count:
                reads += 1
            assert orders.reads_per_shard(order, np.array([count]), BATCH, rank).tolist() == [reads]


def test_ranks_6_and_7_read_a_shard_of_1e8_tokens_189_times_and_the_others_190_times():
    def reads(order, batch_tokens=524_288):
        counts = np.array([10**8])
        return [int(orders.reads_per_shard(order, counts, batch_tokens, rank)[0]) for rank in range(8)]

    for order in ("2024-06", "2024-10", "2024-11", "2024-12"):
        assert reads(order) == [190] * 6 + [189] * 2
    assert reads("2025-01") == [190] * 8 and reads("2025-01", 393_216) == [254] * 8


def test_the_first_batch_is_delivered_twice_in_order_2024_10_and_once_in_the_others(shards):
    for order in PUBLISHED:
        loader = TrainLoader(shards, order, SEQ, 65536)
        assert np.array_equal(batch(loader, 0)[0], batch(loader, 1)[0]) == (order == "2024-10")
    june, october = (TrainLoader(shards, order, SEQ, 65536) for order in ("2024-06", "2024-10"))
    assert np.array_equal(batch(october, 9)[0], batch(june, 8)[0])


def test_a_published_order_refuses_a_changing_batch_size(shards):
    with pytest.raises(ValueError, match=r"2024-06: step 2 begins at token 64 .*order: continuous"):
        TrainLoader(shards, "2024-06", SEQ, 65536).rows(2, 64, BATCH, 0, 1)


@pytest.mark.parametrize("order, unit", [("continuous", SEQ), ("2024-10", 8 * SEQ)])
def test_a_batch_that_is_no_whole_number_of_rows_is_refused(shards, order, unit):
    for batch_tokens in (0, unit + 1, unit // 2):
        with pytest.raises(ValueError, match=f"batch_tokens {batch_tokens} must be .* of {unit}, .*{order}"):
            TrainLoader(shards, order, SEQ, 65536).rows(0, 0, batch_tokens, 0, 0)


@pytest.mark.parametrize("order, least", [("2024-06", 97), ("2024-12", 97), ("2025-01", 98)])
def test_a_published_order_needs_one_whole_batch_in_every_shard(tmp_path, order, least):
    assert BATCH == 96
    write_shard(tmp_path / "a.bin", np.arange(BATCH * 3))
    write_shard(tmp_path / "b.bin", np.arange(least))
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    assert TrainLoader(paths, order, SEQ, 65536).steps_before_repeat(BATCH) >= 3
    write_shard(tmp_path / "b.bin", np.arange(least - 1))
    with pytest.raises(ShardError, match=rf"b\.bin: {least - 1} tokens, .*{order} needs {least} in every"):
        batch(TrainLoader(paths, order, SEQ, 65536), 0)


# ---------------------------------------------------------------- enough data

@pytest.mark.parametrize("order", ["continuous", "spread", *PUBLISHED])
def test_a_run_may_take_as_many_steps_as_read_nothing_twice_and_no_more(shards, order):
    loader = TrainLoader(shards, order, SEQ, 65536)
    steps = loader.steps_before_repeat(BATCH)
    loader.check_enough(steps, BATCH)
    with pytest.raises(ValueError) as caught:
        loader.check_enough(steps + 1, BATCH)
    message, needed = str(caught.value), tokens_needed(steps + 1, BATCH)
    for words in (f"need {needed:,} tokens", f"hold {sum(counts_of(shards)):,}", "the 5 training shards",
                  f"enough for {steps:,} steps", "fewer steps", "add shards", "data.repeat=true"):
        assert words in message
    assert "\n" not in message
    TrainLoader(shards, order, SEQ, 65536, repeat=True).check_enough(10 * steps, BATCH)
    if order in PUBLISHED:
        firsts = [batch(loader, step)[0].reshape(8, -1)[:, 0] for step in range(steps + 1)]
        seen = [len({int(first[rank]) for first in firsts[:-1]}) for rank in range(8)]
        assert seen == [steps - (order == "2024-10")] * 8
        assert any(int(firsts[-1][rank]) == int(firsts[0][rank]) for rank in range(8))


# ---------------------------------------------------------------- validation

def test_validation_is_the_first_tokens_of_its_files_at_any_number_of_ranks(shards):
    loader = ValLoader(shards, SEQ * 150, SEQ, 65536)                # across the first border
    assert loader.row_count == 150
    parts = [loader.rows(*row_range(150, rank, 7)) for rank in range(7)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]).ravel(), np.arange(600))
    assert np.array_equal(np.concatenate([part[1] for part in parts]).ravel(), np.arange(1, 601))


def test_validation_needs_whole_rows_and_one_token_more(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(17))
    ValLoader([tmp_path / "a.bin"], 16, SEQ, 65536).rows(3, 4)
    write_shard(tmp_path / "b.bin", np.arange(16))
    with pytest.raises(ValueError, match="val_tokens 16 needs 17 tokens, .* shards hold 16; lower"):
        ValLoader([tmp_path / "b.bin"], 16, SEQ, 65536)
    with pytest.raises(ValueError, match="val_tokens 15 must be a multiple of seq_len 4"):
        ValLoader([tmp_path / "a.bin"], 15, SEQ, 65536)


# ---------------------------------------------------------------- configuration

def test_a_configuration_opens_both_loaders(shards, tmp_path):
    write_shard(tmp_path / "v.bin", np.arange(100))
    train, val = str(tmp_path / "t_*.bin"), str(tmp_path / "v*.bin")
    config = DataConfig(train=train, val=val, order="2024-12", repeat=True)
    train, val = open_data(config, SEQ, 64, 65536)
    assert (train.order, train.repeat, len(train.tokens.paths), val.row_count) == ("2024-12", True, 5, 16)


def test_a_file_to_train_on_is_not_validated_on(shards, tmp_path):
    config = DataConfig(train=str(tmp_path / "*.bin"), val=str(tmp_path / "t_0.bin"))
    with pytest.raises(ShardError, match=r"t_0\.bin is matched by data\.train .* and by data\.val"):
        open_data(config, SEQ, 64, 65536)


def test_the_configuration_refuses_unknown_keys_and_unknown_orders():
    adapter = TypeAdapter(DataConfig)
    good = '{"train": "a", "val": "b"}'
    assert adapter.validate_json(good, strict=True) == DataConfig("a", "b", "continuous", False, "gpt2")
    for more in ('"ordr": "2024-06"', '"order": "2024-07"', '"repeat": 1', '"tokenizer": "bpe"', '"val": 3'):
        with pytest.raises(ValidationError):
            adapter.validate_json(f"{good[:-1]}, {more}}}", strict=True)
    assert set(PUBLISHED) | {"continuous", "spread", "documents"} == set(DataConfig.__dataclass_fields__["order"].type.__args__)


def test_the_configuration_is_imported_without_torch_or_tiktoken():
    code = ("import sys, data.loader, data.tokenizers, data.demo\n"
            "sys.exit(bool({'torch', 'tiktoken'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- prefetching

def pair(step):
    return np.full((2, 3), step), np.full((2, 3), step + 1)


def test_the_prefetcher_delivers_the_batches_of_any_sequence_of_steps():
    with Prefetcher(lambda step: [pair(step), pair(10 * step)], "cpu") as prefetcher:
        for step in (0, 1, 2, 7, 8, 3, 3, 0, 1):
            (inputs, targets), (second, _) = prefetcher.get(step)
            assert torch.equal(inputs, torch.full((2, 3), step)) and inputs.dtype == torch.int64
            assert torch.equal(targets, inputs + 1) and torch.equal(second, 10 * inputs)


def test_the_prefetcher_reads_one_step_ahead_in_a_thread():
    calls, third = [], threading.Event()

    def fetch(step):
        calls.append((step, threading.current_thread() is threading.main_thread()))
        if step == 2:
            third.set()
        return [pair(step)]

    with Prefetcher(fetch, "cpu") as prefetcher:
        prefetcher.get(0)
        prefetcher.get(1)
        assert third.wait(60)                       # step 2 is read without being asked for
    assert calls == [(0, False), (1, False), (2, False)]


def test_an_error_in_the_thread_is_raised_for_its_step_with_its_message():
    errors = [ShardError("b.bin: no such luck")]

    def fetch(step):
        if step == 2 and errors:
            raise errors.pop()
        return [pair(step)]

    with Prefetcher(fetch, "cpu") as prefetcher:
        prefetcher.get(1)                           # reads step 2 ahead, and nobody hears of it yet
        with pytest.raises(ShardError, match="b.bin: no such luck"):
            prefetcher.get(2)
        assert prefetcher.get(2)[0][0][0, 0] == 2   # read again


def test_closing_the_prefetcher_ends_its_thread():
    before = set(threading.enumerate())
    prefetcher = Prefetcher(lambda step: [pair(step)], "cpu")
    prefetcher.get(0)
    assert set(threading.enumerate()) != before
    prefetcher.close()
    prefetcher.close()
    assert set(threading.enumerate()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_prefetcher_copies_from_pinned_memory_to_the_gpu():
    with Prefetcher(lambda step: [pair(step)], "cuda") as prefetcher:
        for step in range(20):
            (inputs, targets), = prefetcher.get(step)
            assert inputs.is_cuda and (inputs == step).all() and (targets == step + 1).all()
        assert prefetcher.ahead[1].result()[0][0].is_pinned()


def test_spread_rows_meet_every_row_once_and_those_of_a_batch_lie_far_apart(shards):
    loader = TrainLoader(shards, "spread", SEQ, 65536)
    rows, per_batch = (loader.tokens.total - 1) // SEQ, BATCH // SEQ
    steps = loader.steps_before_repeat(BATCH)
    places = np.array([batch(loader, step)[0][:, 0] // SEQ for step in range(steps)])      # the token is its position
    assert len(np.unique(places)) == places.size > 0.9 * rows
    gaps = np.diff(np.sort(np.concatenate([places, places.min(axis=1, keepdims=True) + rows], axis=1)), axis=1)
    assert gaps.min() > rows / per_batch / 3
