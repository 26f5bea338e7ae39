"""The seeds of a configuration together: what they are called and drawn with, their curves and what they reached."""
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from scripts.judge import spread
from scripts.sweep.candidates import comparisons
from scripts.sweep.candidates import label as short_name
from scripts.sweep.file import Configuration
from scripts.sweep.plan import configuration_id
from scripts.sweep.parameter import in_yaml
from scripts.sweep.report.folder import Folder, LoggedTrial, finite
from scripts.sweep.tables.cells import finished, given, rank, varying

# Okabe and Ito's colours, which the colour-blind tell apart, less their yellow, which white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C3E")
BLACK, GREY = "#1a1a1a", "#8a8a8a"
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 300                       # of a training curve; more are averaged, neighbours together
LOSSES = {"val": ("val_loss", "validation loss"), "avg": ("val_loss_avg", "validation loss of averaged weights"),
          "train": ("train_loss", "train loss")}


class Line(NamedTuple):
    """What a trial's log has of a loss; seconds are those on the clock."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]                 # nats a token; not finite ones are left out


class Band(NamedTuple):
    """The mean over seeds at the steps that all have, with its 95% interval by Student's t."""

    steps: list[int]
    seconds: list[float]                # mean
    mean: list[float]
    low: list[float] | None             # None for one seed
    high: list[float] | None
    n: int


class Group(NamedTuple):
    key: str                            # the configuration's id
    tuning: bool                        # trials of a search, whose values are not reported
    label: str
    words: list[str]                    # what it was given, as far as that differs between configurations
    colour: str
    dash: str                           # one of DASHES
    trials: list[LoggedTrial]

    @property
    def base(self) -> str:
        return self.trials[0].row["base"]

    @property
    def parameters(self) -> dict[str, Any]:
        return self.trials[0].row["parameters"]


def groups(folder: Folder) -> list[Group]:
    """All of them, the best first, those without a result last."""
    sweep, of = folder.sweep, {}
    for trial in folder.trials:
        of.setdefault((trial.row["configuration"], sweep.is_tuning(trial.row)), []).append(trial)
    firsts = [trials[0].row for trials in of.values()]
    labels, styles = _labels(firsts, folder), _styles(firsts, folder)
    found = [Group(key, tuning, labels[key, tuning], _words(trials[0].row, varying(firsts)), *styles[key], trials)
             for (key, tuning), trials in of.items()]

    def place(group: Group) -> tuple:
        rows = [trial.row for trial in group.trials]
        return group.tuning, *rank(finished(rows), len(rows), sweep)
    return sorted(found, key=place)


def final(group: Group, metric: str) -> dict[int, float]:
    """seed -> what its finished trial has reached."""
    return {trial.row["seed"]: trial.row[metric] for trial in group.trials
            if trial.row["status"] == "finished" and finite([trial.row[metric]])}


# ---- curves

def line(trial: LoggedTrial, loss: str) -> Line:
    """`loss` is a key of LOSSES."""
    key = LOSSES[loss][0]
    points = [(each["step"], each["train_s"], each[key]) for each in (trial.train if loss == "train" else trial.val)
              if finite([each.get(key)])]
    together = -(-len(points) // MOST_POINTS)
    if together > 1:
        points = [[sum(column) / len(column) for column in zip(*points[i:i + together])]
                  for i in range(0, len(points), together)]
    return Line(*([list(column) for column in zip(*points)] or ([], [], [])))


def band(group: Group, loss: str) -> Band | None:
    """Over the finished seeds, or, while there is none, those that have begun; None where they share no step."""
    finished = [trial for trial in group.trials if trial.row["status"] == "finished"]
    lines = [found for trial in finished or group.trials if (found := line(trial, loss)).steps]
    if not lines:
        return None
    at = [dict(zip(each.steps, zip(each.seconds, each.losses))) for each in lines]
    steps = [step for step in lines[0].steps if all(step in points for points in at)]
    spreads = [spread([points[step][1] for points in at]) for step in steps]
    if not steps:
        return None
    several = len(lines) > 1
    return Band(steps, [sum(points[step][0] for points in at) / len(at) for step in steps],
                [each.mean for each in spreads], [each.low for each in spreads] if several else None,
                [each.high for each in spreads] if several else None, len(lines))


# ---- a search's draws

def rate_key(folder: Folder, base: str) -> str | None:
    """The parameter that a search's draws are drawn over: its first learning rate, or else its first number."""
    drawn = [each.key for each in folder.sweep.parameters_of(base) if each.distribution != "constant"]
    numbers = [key for key in drawn if all(finite([row["parameters"].get(key)]) for row in folder.rows
                                           if row["base"] == base and key in row["parameters"])]
    return next((key for key in numbers if key.split(".")[-1] == "lr"), numbers[0] if numbers else None)


def chosen(found: Sequence[Group]) -> set[str]:
    """Configurations of a comparison that runs with reporting seeds."""
    return {group.key for group in found if not group.tuning}


# ---- names and colours

def _words(row: dict, differing: Sequence[str]) -> list[str]:
    return [f"{key} = {value}" for key in differing if (value := in_yaml(given(row, key)))] or [row["base"]]


def _labels(firsts: Sequence[dict], folder: Folder) -> dict[tuple[str, bool], str]:
    """(Configuration, whether of a search) -> a short name."""
    sweep, differing = folder.sweep, varying(firsts)
    bases = {row["base"]: PurePath(row["base"]).stem for row in firsts}
    if len(set(bases.values())) < len(bases):
        bases = {base: base for base in bases}
    short, labels = _shortest([key for key in differing if key != "config"]), {}
    for row in firsts:
        key, tuning = row["configuration"], sweep.is_tuning(row)
        own = ", ".join(f"{end} {value}" for name, end in short.items() if (value := in_yaml(given(row, name))))
        if sweep.kind == "ladder":
            label = short_name(Configuration(row["base"], row["parameters"]), sweep)
        elif sweep.kind == "compare":
            label = f"{bases[row['base']]}: {own}" if tuning and own else bases[row["base"]]
        else:
            name = bases[row["base"]]
            label = ", ".join(filter(None, [name if "config" in differing else "", own])) or name
        labels[key, tuning] = f"{label} (baseline)" if row["baseline"] and sweep.kind == "sweep" else label
    twice = Counter(labels.values())
    return {key: f"{label} [{key[0]}]" if twice[label] > 1 else label for key, label in labels.items()}


def _shortest(keys: Sequence[str]) -> dict[str, str]:
    """Each by as many of its last parts as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return found


def _styles(firsts: Sequence[dict], folder: Folder) -> dict[str, tuple[str, str]]:
    """Configuration -> (colour, dash): of one number's values by their size, of presets by the preset."""
    sweep, differing = folder.sweep, varying(firsts)
    keys = list(dict.fromkeys(row["configuration"] for row in firsts))
    if sweep.kind == "compare":
        bases = list(sweep.bases)
        of_base = {row["configuration"]: bases.index(row["base"]) if row["base"] in bases else 0 for row in firsts}
        return {key: _style(of_base[key]) for key in keys}
    if sweep.kind == "ladder":
        return _ladder_styles(keys, folder)
    alone = differing[0] if len(differing) == 1 else None
    values = {row["configuration"]: row["parameters"].get(alone) for row in firsts if alone}
    if len(values) > 2 and len(finite(values.values())) == len(values):
        from matplotlib import colormaps, colors
        ordered = sorted(values, key=values.get)
        return {key: (colors.to_hex(colormaps["viridis"](.8 * position / (len(ordered) - 1))), "solid")
                for position, key in enumerate(ordered)}
    baseline = {row["configuration"] for row in firsts if row["baseline"]}
    others = [key for key in keys if key not in baseline]
    return {key: (BLACK, "solid") for key in baseline} | {key: _style(i) for i, key in enumerate(others)}


def _style(number: int) -> tuple[str, str]:
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def _ladder_styles(keys: Sequence[str], folder: Folder) -> dict[str, tuple[str, str]]:
    """A change's colour is its own: alone solid, left out dashed; the baseline and all are black, rungs are grey."""
    asked = comparisons(folder.sweep)
    found = {configuration_id(folder.sweep.baseline): (BLACK, "solid")}
    for family in ("all together", "added alone", "left out of all", "rung"):
        for number, each in enumerate(each for each in asked if each.family == family):
            found.setdefault(configuration_id(each.of), {
                "all together": (BLACK, "dashdot"), "added alone": (PALETTE[number % len(PALETTE)], "solid"),
                "left out of all": (PALETTE[number % len(PALETTE)], "dash"), "rung": (GREY, "dot")}[family])
    return {key: found.get(key, (GREY, "dashdot")) for key in keys}
