"""`make demo`: write a corpus, train configs/demo.yaml on it with torchrun, show what came out."""
import json
import os
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs/demo")


def run(*command: str) -> None:
    print("$", " ".join(("python", *command)), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> int:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")         # as train.py, for the sample in this process
    try:
        run("-m", "data.demo")
        run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", "--config", "demo.yaml",
            f"runs_dir={RUNS}")
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    newest = max(RUNS.glob("*/summary.json"), key=lambda path: path.stat().st_mtime).parent
    summary = json.loads((newest / "summary.json").read_text())
    from scripts.sample import sample                       # torch is loaded here, after the training process is gone
    text, _ = sample(newest, "def ", new_tokens=240, temperature=0.7, top_k=None, seed=0)
    reached = (f"reached at step {summary['target_step']}, {summary['target_train_s']:.1f} s on the clock"
               if summary["target_step"] is not None else "NOT reached")
    print(f"""
target          {summary['target_val_loss']} nats per byte {reached}
final           {summary['val_loss']:.4f} nats per byte, {summary['val_bits_per_byte']:.4f} bits per byte, \
after {summary['steps']} steps and {summary['train_s']:.1f} s on the clock
run directory   {newest}
curve           {newest / 'curve.png'}
sample""")
    print("\n".join("    " + line for line in text.splitlines()))
    return 0 if summary["target_step"] is not None else 1


if __name__ == "__main__":
    sys.exit(main())
