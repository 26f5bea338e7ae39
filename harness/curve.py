"""curve.png: the losses of one run over its steps."""
from pathlib import Path

from harness.rundir import read_log


def draw(run: Path, target: float | None) -> Path:
    """Draw log.jsonl of the run directory; returns the picture's path. matplotlib is loaded here, off the clock."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, val = read_log(run)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        axes.plot([x["step"] for x in train], [x["train_loss"] for x in train], lw=0.6, alpha=0.5, label="train")
    for key, label in (("val_loss", "validation"), ("val_loss_avg", "validation, averaged weights")):
        points = [(x["step"], x[key]) for x in val if key in x]
        if points:
            axes.plot(*zip(*points), marker=".", ms=4, lw=1.2, label=label)
    if target is not None:
        axes.axhline(target, color="0.4", lw=0.8, ls="--", label=f"target {target}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title=run.name)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.legend(frameon=False)
    path = run / "curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
