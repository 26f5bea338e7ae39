"""Bayesian search: Optuna's tree-structured Parzen estimator proposes the next configuration from those that ended.

Every preset has a study of its own, with `budget` configurations. The study sees a parameter by its quantile, so that
whatever distribution was declared is its prior; the first STARTUP configurations are those of a random search. One that
did not end with a finite result counts as the worst that did, as wandb has it; running ones count as bad guesses, so
that several at once differ (`constant_liar`); pruned ones rank behind all that ended, by their last loss. search.jsonl,
a line a configuration, is the memory of a sweep that continues. Source: Bergstra et al. 2011, Algorithms for
Hyper-Parameter Optimization, section 4; optuna.samplers.TPESampler.
"""
import json
from pathlib import Path
from typing import Any, NamedTuple

from harness.rundir import write_text
from scripts.judge import spread
from scripts.sweep.candidates import draws
from scripts.sweep.file import Configuration, Sweep
from scripts.sweep.parameter import Parameter, load_optuna, quantile, shares
from scripts.sweep.plan import REFUSALS, Trial, configuration_id, trial_of
from scripts.sweep.results import ENDED

Places = dict[str, float | int]         # dotted key -> a quantile, or an index of `values`
TRIES = 50                              # for a proposal that is new and that train.py would take, then for a draw


class Told(NamedTuple):
    """What the study hears of a configuration."""

    places: Places
    status: str                         # running, ended or pruned
    value: float | None                 # the mean over its seeds, of the first seed's where pruned


class Search:
    """What was proposed so far, and what comes next."""

    def __init__(self, sweep: Sweep, out: Path):
        load_optuna()                                                 # refused before anything starts
        self.sweep, self.out, self.checked = sweep, out, set()
        self.searched = {base: [p for p in sweep.parameters_of(base) if p.distribution != "constant"]
                         for base in sweep.bases}
        self.known = [(places_of_draw(self.searched[base], number), each)
                      for base in sweep.bases for number, each in draws(sweep, base)]
        self.remembered = []
        for places, each in self._read():
            if each not in self.proposed and self._count(each.base) < sweep.budget:
                self.known.append((places, each))
                self.remembered.append(each)

    @property
    def proposed(self) -> list[Configuration]:
        return [each for _, each in self.known]

    def next_trials(self, rows: dict[str, dict]) -> list[Trial]:
        """The seeds of one more configuration, for the preset that has fewest; none where all have their budget, or
        everything that there is.

        Args:
            rows: of results.jsonl, by the names of their trials.
        """
        places, each, trials = self._next(rows) or (None, None, [])
        if trials:
            self.known.append((places, each))
            self._write()
        return trials

    def is_over(self, rows: dict[str, dict]) -> bool:
        """Whether nothing more comes."""
        return self._next(rows) is None

    def _next(self, rows: dict[str, dict]) -> tuple[Places, Configuration, list[Trial]] | None:
        for base in sorted(self.sweep.bases, key=self._count):
            if self._count(base) >= self.sweep.budget:
                continue
            told = [_told(places, each, self.sweep, rows) for places, each in self.known if each.base == base]
            for attempt in range(2 * TRIES):
                places = (propose(self.sweep, self.searched[base], told, attempt) if attempt < TRIES
                          else places_of_draw(self.searched[base], len(told) + attempt))
                each = self._at(base, places)
                try:
                    trials = [trial_of(each, seed, self.sweep, self.out, self.checked)
                              for seed in self.sweep.search_seeds]
                except REFUSALS:                                      # a corner that train.py would not take
                    continue
                if each not in self.proposed and not any(trial.name in rows for trial in trials):
                    return places, each, trials
        return None

    def _count(self, base: str) -> int:
        return sum(each.base == base for each in self.proposed)

    def _at(self, base: str, places: Places) -> Configuration:
        return Configuration(base, {p.key: value_at(p, places[p.key]) if p.key in places else p.spec["value"]
                                    for p in self.sweep.parameters_of(base)})

    def _write(self) -> None:
        write_text(self.out / "search.jsonl", "".join(
            json.dumps(dict(base=each.base, places=places, parameters=each.parameters)) + "\n"
            for places, each in self.known))

    def _read(self) -> list[tuple[Places, Configuration]]:
        """What earlier calls proposed, as far as the sweep file still means the same by it."""
        path = self.out / "search.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [(line["places"], Configuration(line["base"], line["parameters"])) for line in lines]
        return [(places, each) for places, each in found if each.base in self.searched
                and _inside(self.searched[each.base], places) and self._at(each.base, places) == each]


def value_at(p: Parameter, place: float | int) -> Any:
    return p.spec["values"][place] if "values" in p.spec else quantile(p, place)


def places_of_draw(searched: list[Parameter], number: int) -> Places:
    """Where a random search's draw lies."""
    places = shares(searched, number)
    return places | {p.key: p.spec["values"].index(quantile(p, places[p.key])) for p in searched if "values" in p.spec}


def _inside(searched: list[Parameter], places: Places) -> bool:
    return places.keys() == {p.key for p in searched} \
        and all(places[p.key] in range(len(p.spec["values"])) for p in searched if "values" in p.spec)


def _told(places: Places, each: Configuration, sweep: Sweep, rows: dict[str, dict]) -> Told:
    """From its rows of the search's own seeds; a comparison's best has others, too."""
    key, seeds = configuration_id(each), sweep.search_seeds
    own = [row for row in rows.values() if row["configuration"] == key and (seeds == (None,) or row["seed"] in seeds)]
    if not own or not all(row["status"] in ENDED for row in own):
        return Told(places, "running", None)
    if any(row["status"] == "pruned" for row in own):
        return Told(places, "pruned", max(own, key=lambda row: row["steps"])[sweep.metric])
    values = [row[sweep.metric] for row in own if row["status"] == "finished" and row[sweep.metric] is not None]
    return Told(places, "ended", spread(values).mean if len(values) == len(own) else None)


def propose(sweep: Sweep, searched: list[Parameter], told: list[Told], attempt: int) -> Places:
    """The next place, after those that are told; another attempt gives another one from the same results."""
    optuna = load_optuna()
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial
    space = {p.key: CategoricalDistribution(range(len(p.spec["values"]))) if "values" in p.spec
             else FloatDistribution(0.0, 1.0) for p in searched}
    sampler = optuna.samplers.TPESampler(seed=1000 * len(told) + attempt, n_startup_trials=0, constant_liar=True)
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize", sampler=sampler)
    results = [each.value for each in told if each.status == "ended" and each.value is not None]
    worst = (min if sweep.maximize else max)(results, default=None)
    for each in told:
        value, at, state = each.value if each.value is not None else worst, {}, TrialState.COMPLETE
        if each.status == "pruned":                                   # at one step: their losses rank them, not that
            value, at, state = None, {0: each.value}, TrialState.PRUNED
        elif each.status == "running" or value is None:
            value, state = None, TrialState.RUNNING if each.status == "running" else TrialState.FAIL
        study.add_trial(create_trial(state=state, value=value, intermediate_values=at, params=each.places,
                                     distributions=space))
    return study.ask(space).params
