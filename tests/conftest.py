"""Shared by the tests: a tiny corpus and configuration, and ways to run train.py in this process or in others."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

signal.signal(signal.SIGINT, signal.default_int_handler)     # a background job ignores Ctrl-C, and so would its children
torch.set_num_threads(1)                # tiny tensors: a second thread only waits, and costs most on a busy machine

TINY = """
name: tiny
steps: 12
batch_tokens: 256
seq_len: 32
val_tokens: 512
val_every: 4
precision: float32
model:
  {{vocab_size: 64, layers: 2, heads: 2, width: 32, positions: rotary, norm: rmsnorm, norm_gain: true,
    qk_norm: before_rotary, activation: relu2, biases: true, tied: false, embed_norm: true,
    init: {{embed: {{scale: 1.0}}, qkv: {{over: sqrt_fan_in, scale: 1.0}}, mlp_in: {{over: sqrt_fan_in, scale: 1.0}},
      attn_out: zeros, mlp_out: zeros, head: zeros}}}}
data: {{train: "{data}/train_*.bin", val: "{data}/val_*.bin", tokenizer: bytes}}
schedule: {{shape: wsd, cooldown_frac: 0.5}}
optim:
  - {{name: hidden, params: [q, k, v, attn_out, mlp_in, mlp_out], rule: muon, lr: 0.02, ns_dtype: float32}}
  - {{name: rest, params: [rest], rule: adamw, lr: 0.01, betas: [0.8, 0.95]}}
runs_dir: "{runs}"
"""


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


# A file's tests run in one process, and those of a file that begins last are waited for alone: the slowest first.
SLOWEST = ("test_sweep_slurm.py", "test_sweep_run.py", "test_resume.py", "test_sweep_report.py", "test_reproduce.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Two training shards and a validation shard of a learnable sequence: token i+1 follows from token i, mostly."""
    from data.shards import write_shard
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count in (("train_000", 5000), ("train_001", 4000), ("val_000", 2000)):
        noise = rng.integers(0, 64, count)
        tokens = np.where(rng.random(count) < 0.8, (np.arange(count) * 7) % 64, noise)
        write_shard(directory / f"{name}.bin", tokens.astype(np.uint16))
    return directory


@pytest.fixture
def tiny(corpus, tmp_path) -> Path:
    """The tiny configuration as a file; its runs go to tmp_path/runs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(data=corpus, runs=tmp_path / "runs"))
    return path


def train_here(*arguments: str) -> int:
    """train.py in this process; the exit code."""
    import train
    return train.main([str(a) for a in arguments])


def spawn(*arguments: str, ranks: int = 0, **options) -> subprocess.Popen:
    """train.py in a process of its own, under torchrun when `ranks` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, "train.py", *map(str, arguments)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def train_elsewhere(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    process = spawn(*arguments, ranks=ranks)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def the_run(tiny: Path, runs: str = "runs") -> Path:
    """The one run directory that was made."""
    directories = list((tiny.parent / runs).iterdir())
    assert len(directories) == 1, directories
    return directories[0]


def losses(run: Path) -> dict:
    """{("train"|"val", step): loss} of a run's log."""
    from harness.rundir import read_log
    train, val = read_log(run)
    return {("train", x["step"]): x["train_loss"] for x in train} | {("val", x["step"]): x["val_loss"] for x in val}
