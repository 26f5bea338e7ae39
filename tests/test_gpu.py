"""What only a GPU can show; skipped without one."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, losses, the_run, train_elsewhere, train_here

pytestmark = pytest.mark.gpu


def test_a_gpu_run_equals_the_cpu_run_up_to_rounding(tiny):
    train_here("--config", tiny, "compile=false", "optim.hidden.ns_dtype=float32")
    subprocess.run([sys.executable, "train.py", "--config", tiny, "compile=false", f"runs_dir={tiny.parent / 'cpu'}"],
                   cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    gpu, cpu = losses(the_run(tiny)), losses(the_run(tiny, "cpu"))
    for key in cpu:
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-3), key


def test_a_compiled_bfloat16_run_follows_the_float32_run(tiny):
    train_here("--config", tiny, "compile=false")
    train_here("--config", tiny, "compile=true", "precision=bfloat16", f"runs_dir={tiny.parent / 'fast'}")
    plain, fast = losses(the_run(tiny)), losses(the_run(tiny, "fast"))
    for key in plain:
        assert fast[key] == pytest.approx(plain[key], rel=3e-2), key


def test_a_deterministic_run_repeats_itself_to_the_bit(tiny):
    for runs in ("runs", "again"):      # processes of their own: cuBLAS reads its workspace setting once
        done = train_elsewhere("--config", tiny, "deterministic=true", f"runs_dir={tiny.parent / runs}")
        assert done.returncode == 0, done.stderr
    assert losses(the_run(tiny, "again")) == losses(the_run(tiny))
