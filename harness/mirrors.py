"""Where a run's numbers go: log.jsonl always, Weights & Biases and the speedrun's own lines on request.

Every sink has `write(step=..., ...)` for a training step (train_loss) or a validation (val_loss), and `close()`.
"""
from pathlib import Path

from harness.config import Config, to_yaml
from harness.rundir import Log, write_text


class SpeedrunLines:
    """`step:125/3250 val_loss:4.58624 train_time:21.243s step_avg:169.94ms`, as track 3's logs have them.

    step_avg is the mean over the steps since the last validation, as in those logs.
    """

    def __init__(self, path: Path, steps: int, say, resumed_at: int | None, train_s: float):
        if resumed_at is not None and path.exists():             # the validation at that step is done again
            kept = [line for line in path.read_text().splitlines()
                    if int(line.removeprefix("step:").partition("/")[0]) < resumed_at]
            write_text(path, "".join(line + "\n" for line in kept))
        self.file, self.steps, self.say = open(path, "a", buffering=1), steps, say
        self.since_step, self.since_s = resumed_at or 0, train_s

    def write(self, step: int, train_s: float, **values) -> None:
        if "val_loss" not in values:
            return
        steps = step - self.since_step
        step_avg = f"{1e3 * (train_s - self.since_s) / steps:.2f}" if steps else "nan"
        line = f"step:{step}/{self.steps} val_loss:{values['val_loss']:.5f} train_time:{train_s:.3f}s " \
               f"step_avg:{step_avg}ms"
        self.since_step, self.since_s = step, train_s
        self.file.write(line + "\n")
        self.say(line)

    def close(self) -> None:
        self.file.close()


class WeightsAndBiases:
    """Mirrors the log to wandb under the metric names the ecosystem uses; WANDB_MODE=offline works."""

    NAMES = {"train_loss": "train/loss", "val_loss": "val/loss", "val_loss_avg": "val/loss_avg", "lr": "train/lr",
             "grad_norm": "train/grad_norm"}

    def __init__(self, directory: Path, config: Config):
        import wandb
        import yaml
        self.run = wandb.init(project=config.name, name=directory.name, id=directory.name, resume="allow",
                              dir=directory, config=yaml.safe_load(to_yaml(config)))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, train_s: float, diagnostics: dict = {}, max_logits: dict = {}, **values) -> None:
        measured = {f"diagnostics/{what}/{name}": value
                    for name, found in diagnostics.items() for what, value in found.items()}
        measured |= {f"diagnostics/max_logit/{name}.{head}": value
                     for name, found in max_logits.items() for head, value in enumerate(found)}
        self.run.log({"step": step, "time/training_time_ms": 1e3 * train_s, **measured,
                      **{self.NAMES[key]: value for key, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


def open_sinks(directory: Path, config: Config, resumed_at: int | None, train_s: float, say) -> list:
    """The sinks of one run that continues from step resumed_at (None: a new one) with train_s on its clock."""
    sinks = [Log(directory / "log.jsonl", resumed_at)]
    if "speedrun" in config.log:
        sinks.append(SpeedrunLines(directory / "speedrun.txt", config.steps, say, resumed_at, train_s))
    if "wandb" in config.log:
        sinks.append(WeightsAndBiases(directory, config))
    return sinks
