"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""
import atexit
import sys
import time


class Progress:
    """Shows steps, loss, ms/step, tokens/s, MFU where the peak is known, and the time left.

    Args:
        steps: of the whole run.
        flops_per_step, peak_flops: for the MFU over all ranks; peak None shows none.
        shown: False on every rank but the first.
    """

    def __init__(self, steps: int, batch_tokens: int, flops_per_step: float, peak_flops: float | None, shown: bool):
        self.steps, self.batch_tokens, self.shown = steps, batch_tokens, shown
        self.flops_per_step, self.peak_flops = flops_per_step, peak_flops
        self.bar, self.val_loss, self.last_line_at, self.step_s = None, None, 0.0, None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress as Bar, TextColumn
            counter, text = TextColumn("{task.completed:>6}/{task.total}"), TextColumn("{task.description}")
            self.bar = Bar(counter, BarColumn(), text)
            self.task = self.bar.add_task("warming up", total=steps)
            self.bar.start()
            atexit.register(self.close)                          # gives the cursor back however the run ends

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            print(text, flush=True) if self.bar is None else self.bar.console.print(text, highlight=False, markup=False)

    def step(self, step: int, train_loss: float, step_s: float) -> None:
        """After `step` completed updates, the last of which took step_s seconds."""
        self.step_s = step_s if self.step_s is None else 0.95 * self.step_s + 0.05 * step_s
        now = time.perf_counter()
        plain_due = now - self.last_line_at >= 5 or step == self.steps
        if not self.shown or (self.bar is None and not plain_due):
            return
        self.last_line_at = now
        rate = f"{1e3 * self.step_s:.1f} ms/step  {self.batch_tokens / self.step_s:,.0f} tokens/s"
        if self.peak_flops:
            rate += f"  MFU {self.flops_per_step / self.step_s / self.peak_flops:.1%}"
        left = int((self.steps - step) * self.step_s)
        text = f"loss {train_loss:.4f}  {rate}  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        if self.bar is None:
            print(f"step {step}/{self.steps}  {text}", flush=True)
        else:
            self.bar.update(self.task, completed=step, description=text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
