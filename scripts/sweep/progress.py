"""A sweep while it runs: its results.jsonl, what a person sees of it, what comes next and what has no hope."""
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.sweep.bayes import Search
from scripts.sweep.file import Sweep
from scripts.sweep.halving import Halving
from scripts.sweep.plan import Trial, reporting
from scripts.sweep.results import ENDED, FINAL, row, run_of, write_results
from scripts.sweep.run import Going
from scripts.sweep.show import Show


class Progress:
    """What run.run and slurm.run call.

    Args:
        rows: of results.jsonl, by the names of their trials.
        end: asks a running trial to save and end.
    """

    def __init__(self, sweep: Sweep, out: Path, trials: Sequence[Trial], rows: dict[str, dict], search: Search | None,
                 show: Show, end: Callable[[Going], None]):
        self.sweep, self.out, self.rows, self.search, self.show, self.end = sweep, out, rows, search, show, end
        self.early = Halving(sweep, out, trials) if sweep.early_terminate else None
        write_results(list(rows.values()), out)
        for trial in trials:                                          # some finished while nobody looked
            self._remove_checkpoints(trial)

    def changed(self, trial: Trial, what: str) -> None:
        """Note what became of a trial."""
        self._note(trial, running=what.startswith("started"))
        self._remove_checkpoints(trial)
        loss = self.rows[trial.name]["val_loss"]
        self.show.say(f"{trial.name[:8]}  seed {trial.config.seed}  {trial.label}: {what}"
                      + (f", val_loss {loss:.4f}" if what == "finished" else ""))

    def look(self, going: Sequence[Going], waiting: int) -> None:
        """Follow the running trials."""
        for each in going:
            if self.rows[each.trial.name]["run"] is None and run_of(each.trial):
                self._note(each.trial, running=True)
        self.show.look(going, waiting)
        hopeless = self.early.hopeless([each.trial for each in going]) if self.early else ()
        for each in going:
            if each.trial in hopeless:
                self.end(each)

    def more(self) -> list[Trial]:
        """Trials that the results so far ask for: the next of a search, the best of a comparison."""
        added = self.search.next_trials(self.rows) if self.search else []
        added = added or [trial for trial in reporting(self.sweep, list(self.rows.values()), self.out, ENDED)
                          if trial.name not in self.rows]
        self.rows.update((trial.name, row(trial, self.out)) for trial in added)
        self.show.trials = len(self.rows)
        return added

    def _note(self, trial: Trial, running: bool) -> None:
        found = row(trial, self.out)
        if running and found["status"] not in FINAL:                  # of a Slurm job nothing may be there yet
            found["status"] = "running"
        self.rows[trial.name] = found
        write_results(list(self.rows.values()), self.out)

    def _remove_checkpoints(self, trial: Trial) -> None:
        """Those of tens of MB each that nobody reads; the weights of a preset by itself are the point."""
        sweep = self.sweep
        alone = sweep.kind == "sweep" and not sweep.parameters and len(sweep.bases) * len(sweep.search_seeds) == 1
        if (self.rows[trial.name]["status"] in ("finished", "pruned") and not alone
                and "keep_checkpoints" not in trial.configuration.parameters and (run := run_of(trial))):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
