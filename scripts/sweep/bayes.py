"""Bayesian search: Optuna's tree-structured Parzen estimator proposes the next configuration from those that ended.

Every preset has a study of its own, with `budget` configurations. The study sees a parameter by its quantile, so that
whatever distribution was declared is its prior; the first STARTUP configurations are those of a random search. One that
did not end with a finite result counts as the worst that did, as wandb has it; running ones count as bad guesses, so
that several at once differ (`constant_liar`). search.jsonl, a line a configuration, is the memory of a sweep that
continues. Source: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, section 4; optuna.samplers.
"""
import importlib.util
import json
from pathlib import Path
from typing import Any

from harness.rundir import write_text
from harness.yaml_tree import ConfigError
from scripts.judge import spread
from scripts.sweep.draw import Parameter, quantile, share
from scripts.sweep.candidates import draws
from scripts.sweep.file import Configuration, Sweep
from scripts.sweep.plan import REFUSALS, Trial, configuration_id, trial_of

Places = dict[str, float | int]         # dotted key -> a quantile, or an index of `values`
Told = tuple[Places, float | None, bool]                              # with its result and whether it ended

TRIES = 50                              # for a proposal that is new and that train.py would take, then for a draw


class Search:
    """What was proposed so far, and what comes next.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, out: Path):
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("method bayes needs Optuna: python -m pip install optuna; or take method: random")
        self.sweep, self.out, self.checked = sweep, out, set()
        self.searched = [p for p in sweep.parameters if p.distribution != "constant"]
        self.known = [(places_of_draw(self.searched, number), each)
                      for base in sweep.bases for number, each in draws(sweep, base)]
        self.proposed = [each for _, each in self.known]
        self.remembered = []
        for places, each in self._read():
            if each not in self.proposed and self._count(each.base) < sweep.budget:
                self._add(places, each)
                self.remembered.append(each)

    def next_trials(self, rows: dict[str, dict]) -> list[Trial]:
        """The seeds of one more configuration, for the preset that has fewest; none where all have their budget, or
        everything that there is.

        Args:
            rows: of results.jsonl, by the names of their trials.
        """
        for base in sorted(self.sweep.bases, key=self._count):
            if self._count(base) >= self.sweep.budget:
                continue
            told = [(places, *_result(each, self.sweep.metric, rows)) for places, each in self.known
                    if each.base == base]
            for attempt in range(2 * TRIES):
                places = (propose(self.sweep, self.searched, told, attempt) if attempt < TRIES
                          else places_of_draw(self.searched, len(told) + attempt))
                each = self._at(base, places)
                try:
                    trials = [trial_of(each, seed, self.sweep, self.out, self.checked)
                              for seed in self.sweep.seeds or (None,)]
                except REFUSALS:                                      # a corner that train.py would not take
                    continue
                if each not in self.proposed and not any(trial.name in rows for trial in trials):
                    self._add(places, each)
                    self._write()
                    return trials
        return []

    def _add(self, places: Places, each: Configuration) -> None:
        self.known.append((places, each))
        self.proposed.append(each)

    def _count(self, base: str) -> int:
        return sum(each.base == base for each in self.proposed)

    def _at(self, base: str, places: Places) -> Configuration:
        return Configuration(base, {p.key: value_at(p, places[p.key]) if p.key in places else p.spec["value"]
                                    for p in self.sweep.parameters})

    def _write(self) -> None:
        write_text(self.out / "search.jsonl", "".join(
            json.dumps(dict(base=each.base, places=places, parameters=each.parameters)) + "\n"
            for places, each in self.known))

    def _read(self) -> list[tuple[Places, Configuration]]:
        """What earlier calls proposed, as far as the sweep file still means the same by it."""
        path, keys = self.out / "search.jsonl", {p.key for p in self.searched}
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [(line["places"], Configuration(line["base"], line["parameters"])) for line in lines
                 if line["places"].keys() == keys and line["base"] in self.sweep.bases]
        return [(places, each) for places, each in found if _inside(self.searched, places)
                and self._at(each.base, places) == each]


def value_at(p: Parameter, place: float | int) -> Any:
    return p.spec["values"][place] if "values" in p.spec else quantile(p, place)


def places_of_draw(searched: list[Parameter], number: int) -> Places:
    """Where a random search's draw lies."""
    places = {p.key: share(p, number) for p in searched}
    return places | {p.key: p.spec["values"].index(quantile(p, places[p.key])) for p in searched if "values" in p.spec}


def _inside(searched: list[Parameter], places: Places) -> bool:
    return all(places[p.key] < len(p.spec["values"]) for p in searched if "values" in p.spec)


def _result(each: Configuration, metric: str, rows: dict[str, dict]) -> tuple[float | None, bool]:
    """(Mean over the seeds of a configuration, or None; whether all of them ended.)"""
    own = [row for row in rows.values() if row["configuration"] == configuration_id(each)]
    ended = bool(own) and all(row["status"] in ("finished", "not_finite", "crashed", "refused") for row in own)
    values = [row[metric] for row in own if row["status"] == "finished" and row[metric] is not None]
    return (spread(values).mean if ended and len(values) == len(own) else None), ended


def propose(sweep: Sweep, searched: list[Parameter], told: list[Told], attempt: int) -> Places:
    """The next place, after those that are told; another attempt gives another one from the same results."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {p.key: CategoricalDistribution(range(len(p.spec["values"]))) if "values" in p.spec
             else FloatDistribution(0.0, 1.0) for p in searched}
    sampler = optuna.samplers.TPESampler(seed=1000 * len(told) + attempt, n_startup_trials=0, constant_liar=True)
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize", sampler=sampler)
    results = [result for _, result, _ in told if result is not None]
    worst = (min if sweep.maximize else max)(results, default=None)
    for places, result, ended in told:
        value = result if result is not None else worst if ended else None
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL if ended else TrialState.RUNNING
        study.add_trial(create_trial(state=state, value=value, params=places, distributions=space))
    return study.ask(space).params
