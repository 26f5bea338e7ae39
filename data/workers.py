"""Blocks of documents to tokens, in as many processes as there are cores, in the order of the blocks."""
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from data import tokenizers
from data.sources import Block
from data.texts import documents

TASK_BYTES = 1024 * 1024         # text that a worker gets at a time


@dataclass
class Encoded:
    """The documents of a task, in order."""
    tokens: np.ndarray           # uint16 (all their tokens,), each document with its end of text before it
    lengths: np.ndarray          # int64 (documents,): tokens of each, the end of text included
    text_bytes: np.ndarray       # int64 (documents,): bytes of each in UTF-8
    keys: np.ndarray             # uint64 (documents, 2): a hash of each, half to find copies, half to hold some out
    empty: int                   # documents without text, left out
    skipped: int                 # documents that could not be used, left out


@dataclass(frozen=True)
class Recipe:
    """How a block becomes tokens."""
    encoding: object             # tiktoken.Encoding
    field: str
    separator: bytes
    errors: str


def encode_task(recipe: Recipe, task: list[Block]) -> Encoded:
    parts, lengths, text_bytes, keys = [], [], [], []
    end_of_text = np.array([recipe.encoding.eot_token], dtype=np.uint16)
    empty = skipped = 0
    for block in task:
        for text in documents(block, recipe.field, recipe.separator, recipe.errors):
            if not text:
                skipped, empty = skipped + (text is None), empty + (text == "")
                continue
            raw, tokens = text.encode(), tokenizers.encode(recipe.encoding, text)
            parts += end_of_text, tokens
            lengths.append(1 + tokens.size)
            text_bytes.append(len(raw))
            keys.append(hashlib.blake2b(raw, digest_size=16).digest())
    return Encoded(np.concatenate(parts) if parts else np.empty(0, np.uint16), np.array(lengths, dtype=np.int64),
                   np.array(text_bytes, dtype=np.int64), np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2),
                   empty, skipped)


def start_worker(recipe: Recipe) -> None:
    """Keep the recipe, leave Ctrl-C to the parent, and end when it ends: it may be killed without a word."""
    global worker_recipe
    worker_recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def submit(pool: ProcessPoolExecutor, task: list[Block]) -> Future:
    """Hand a task to the pool. A worker that this starts inherits the block: Ctrl-C cannot meet it while it imports."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def work(task: list[Block]) -> Encoded:
    return encode_task(worker_recipe, task)


def tasks(blocks: Iterable[tuple[Block, dict]]) -> Iterator[tuple[list[Block], dict]]:
    """Blocks together until they are TASK_BYTES, with the position behind the last."""
    task, size = [], 0
    for block, position in blocks:
        task.append(block)
        rows = [block.content] if isinstance(block.content, bytes) else block.content
        size += sum(len(row) for row in rows if isinstance(row, (bytes, str)))
        if size >= TASK_BYTES:
            yield task, position
            task, size = [], 0
    if task:
        yield task, position


def encode_all(recipe: Recipe, blocks: Iterable[tuple[Block, dict]], workers: int) -> Iterator[tuple[Encoded, dict]]:
    """What the workers make of the blocks, in order, each with the position behind it; 0 workers: in this process.

    No more than 2 * workers + 1 tasks are under way. BrokenProcessPool if a worker is killed.
    """
    todo = tasks(blocks)
    if workers == 0:
        yield from ((encode_task(recipe, task), position) for task, position in todo)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (recipe,))
    waiting = deque()
    try:
        for task, position in todo:
            waiting.append((submit(pool, task), position))
            if len(waiting) > 2 * workers:                   # the bound on what is in memory
                future, behind = waiting.popleft()
                yield future.result(), behind
        while waiting:
            future, behind = waiting.popleft()
            yield future.result(), behind
    finally:
        pool.shutdown(cancel_futures=True)
