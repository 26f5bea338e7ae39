"""Successive halving: trials of a search that fall behind are ended early, by Optuna's asynchronous form of it.

A trial that comes to a bracket (brackets.py) goes on if its loss there is among the best 1/eta of those that came to it
so far, of the same preset; with fewer than eta of them, if it is the best. Trials of the search's first seed decide,
and a configuration that is ended there does not run with the others, so that at least one of a preset runs with all.
One that is ended saves, has the status pruned, and a file pruned.json that says where it was. The reported seeds of a
comparison are never ended. A sweep that continues compares with all that its logs hold, and decides nothing again.
Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, section 3.2;
optuna.pruners.SuccessiveHalvingPruner.
"""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.rundir import write_text
from scripts.sweep.brackets import brackets
from scripts.sweep.parameter import load_optuna
from scripts.sweep.file import Sweep
from scripts.sweep.plan import Trial, trial_of
from scripts.sweep.results import pruned_of, run_of


class Halving:
    """The trials that compete, and which of them were ended."""

    def __init__(self, sweep: Sweep, out: Path, trials: Sequence[Trial]):
        self.sweep, self.out, self.optuna = sweep, out, load_optuna()
        self.studies, self.entered, self.said = {}, {}, set()
        for trial in trials:
            list(self._reached(trial))                                # it competes; what became of it was decided then

    def hopeless(self, running: Sequence[Trial]) -> list[Trial]:
        """Those of running trials that are to end, each said once; their pruned.json is there by then."""
        for trial in running:
            behind = next((step for step, goes_on in self._reached(trial) if not goes_on), None)
            if behind is not None:
                self._end(trial, behind)
        found = [each for each in running if pruned_of(each) and each.name not in self.said]
        self.said |= {each.name for each in found}
        return found

    def _end(self, trial: Trial, step: int) -> None:
        """Its configuration, with all seeds of the search."""
        said = dict(seed=trial.config.seed, step=step, **{self.sweep.metric: self._losses(trial)[step]})
        for seed in self.sweep.search_seeds:
            each = trial_of(trial.configuration, seed, self.sweep, self.out, set())
            each.folder.mkdir(parents=True, exist_ok=True)
            write_text(each.folder / "pruned.json", json.dumps(said) + "\n")

    def _reached(self, trial: Trial) -> Iterator[tuple[int, bool]]:
        """(Step, whether it may go on) of every bracket that it came to since it was last asked for.

        To Optuna brackets are after 1, eta, eta^2, ... of something, since those of max_iter need not be powers.
        """
        if not trial.may_be_pruned or self.sweep.search_seeds[0] not in (None, trial.config.seed):
            return
        steps, losses, ended = sorted(trial.config.validation_steps() - {0}), self._losses(trial), pruned_of(trial)
        entry, passed = self.entered.get(trial.name, (None, 0))
        for number, bracket in [*enumerate(brackets(self.sweep.early_terminate, len(steps)))][passed:]:
            step = steps[bracket - 1]
            if step not in losses or ended and step > ended["step"]:
                return
            entry = entry or self._study(trial.configuration.base).ask()
            entry.report(losses[step], self.sweep.early_terminate["eta"] ** number)
            self.entered[trial.name] = entry, number + 1
            yield step, not entry.should_prune()

    def _study(self, base: str):
        if base not in self.studies:
            pruner = self.optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=self.sweep.early_terminate["eta"], min_early_stopping_rate=0)
            self.studies[base] = self.optuna.create_study(
                direction="maximize" if self.sweep.maximize else "minimize", pruner=pruner)
        return self.studies[base]

    def _losses(self, trial: Trial) -> dict[int, float]:
        """Step -> the metric, of its log as far as it has come."""
        run = run_of(trial)
        path = run / "log.jsonl" if run else Path()
        whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
        lines = [json.loads(line) for line in whole.splitlines() if '"val_loss"' in line]
        return {line["step"]: line[self.sweep.metric] for line in lines}
