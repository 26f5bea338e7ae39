"""What a person sees of a sweep: a live table on a terminal, a line for each change elsewhere."""
import json
import os
import sys
import time
from pathlib import Path

from scripts.sweep.plan import Trial
from scripts.sweep.results import run_of
from scripts.sweep.run import Going

REDRAW_EVERY_S = 1.0


class Show:
    """Follows the logs of running trials; `say` writes a line that stays."""

    def __init__(self, trials: int):
        self.trials, self.live, self.drawn_at, self.seen = trials, None, 0.0, {}
        if sys.stdout.isatty():
            from rich.live import Live
            self.live = Live(auto_refresh=False, transient=True)
            self.live.start()

    def say(self, text: str) -> None:
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def look(self, going: list[Going], waiting: int) -> None:
        now = time.monotonic()
        if self.live is not None and now - self.drawn_at >= REDRAW_EVERY_S:
            self.drawn_at = now
            self.live.update(self._table(going, waiting), refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _table(self, going: list[Going], waiting: int):
        from rich.table import Table
        ended = self.trials - waiting - len(going)
        table = Table(title=f"{ended} of {self.trials} trials ended, {len(going)} running, {waiting} waiting",
                      title_justify="left")
        for title in ("trial", "on", "what", "seed", "step", "train loss", "val loss", "left"):
            table.add_column(title)
        for each in going:
            steps, seen = each.trial.config.steps, self.follow(each.trial)
            step, train_s = seen.get("step", 0), seen.get("train_s", 0.0)
            left = f"{train_s / step * (steps - step):,.0f} s" if step else "starting"
            losses = [f"{seen[key]:.4f}" if key in seen else "" for key in ("train_loss", "val_loss")]
            table.add_row(each.trial.name[:8], str(each.slot), each.trial.label,
                          str(each.trial.config.seed), f"{step} of {steps}", *losses, left)
        return table

    def follow(self, trial: Trial) -> dict:
        """The newest value of each key in a trial's log.jsonl, of which only what is new is read."""
        run = run_of(trial)
        path = run / "log.jsonl" if run else Path()
        if not path.is_file():
            return {}
        was, offset, seen = self.seen.get(path, (None, 0, {}))
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != was or found.st_size < offset:         # another file: a run that continues cuts it back
                offset, seen = 0, {}
            file.seek(offset)
            new = file.read()
        whole = new[:new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                seen = {**seen, **json.loads(line)}
            except (ValueError, TypeError):
                continue                                              # damaged
        self.seen[path] = found.st_ino, offset + len(whole), seen
        return seen
