"""README's "Adding one", followed by somebody outside the package: a rule in a file of its own, then everything works."""
import json
import os
import subprocess
import sys

import pytest
import torch

from harness import checkpoint
from tests.conftest import ROOT, losses, the_run

# Normalised momentum: every matrix moves by lr along its momentum's direction, whatever its size.
TOY = '''
import sys
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from optim import RULES
from optim.rule import Rule


@dataclass(frozen=True, config={"extra": "forbid"})
class Toy(Rule):
    lr: float = 0.1                 # Frobenius norm of a step, times the root of the matrix's size
    momentum: float = 0.9           # share of the momentum kept each step
    weight_decay: float = 0.0       # times lr

    VARYING = ("lr", "momentum", "weight_decay")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(W, dtype=torch.float32)}

    def update(self, W: Tensor, G: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> None:
        M = state["momentum"].mul_(h["momentum"]).add_(G)
        size = torch.linalg.matrix_norm(M, keepdim=True).clamp(min=1e-30)
        W.sub_(h["lr"] * (W.shape[-2] * W.shape[-1]) ** 0.5 * M / size + h["lr"] * h["weight_decay"] * W)


RULES["toy"] = Toy
if __name__ == "__main__":
    import train
    sys.exit(train.main(sys.argv[1:]))
'''


@pytest.fixture
def run_toy(tiny):
    script = tiny.parent / "toy.py"
    script.write_text(TOY)
    keys = ["optim.hidden.rule=toy", "optim.hidden.lr=0.005", "optim.hidden.weight_decay=0.1",
            "optim.hidden.cautious=true", "optim.hidden.momentum=0.8", "average=0.9", "checkpoint_every=4"]

    def run(*arguments: str, ranks: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                   str(script), "--config", str(tiny), *keys, *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done
    return run


def test_a_rule_from_outside_is_distributed_checkpointed_and_averaged(run_toy, tiny):
    run_toy("--print-config", ranks=1)
    run_toy(ranks=1)
    one = the_run(tiny)
    run_toy(f"runs_dir={tiny.parent / 'two'}", ranks=2)
    two = the_run(tiny, "two")
    assert losses(one).keys() == losses(two).keys()
    for key, loss in losses(one).items():
        assert losses(two)[key] == pytest.approx(loss, rel=2e-5), key
    assert losses(one)["val", 12] < losses(one)["val", 0] - 0.3
    summary = json.loads((one / "summary.json").read_text())
    assert summary["val_loss_avg"] != summary["val_loss"]

    # Back to the checkpoint of step 8, written by two ranks, and on with one: as if nothing had happened.
    (two / "checkpoints" / "step_000012.pt").unlink()
    (two / "summary.json").unlink()
    resumed = run_toy("--resume", str(two), f"runs_dir={tiny.parent / 'two'}", ranks=1)
    assert "resumed at step 8" in resumed.stdout
    state = checkpoint.newest_intact(two / "checkpoints")[1]
    assert state["optimizer"]["blocks.0.attn.q.weight"].keys() == {"momentum", "average"}
    assert losses(two)["val", 12] == pytest.approx(losses(one)["val", 12], rel=2e-5)
    whole = checkpoint.newest_intact(one / "checkpoints")[1]
    for name, weights in whole["model"].items():
        torch.testing.assert_close(state["model"][name], weights, rtol=1e-4, atol=1e-5, msg=name)
