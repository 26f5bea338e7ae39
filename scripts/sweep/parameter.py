"""A parameter of a sweep: its distribution, its values in a grid, its quantiles.

Names, keys and defaults are those of Weights & Biases' sweep files (its package `sweeps` 0.3.0, config/schema.json):

    constant                      value
    categorical                   values
    categorical_w_probabilities   values, probabilities
    int_uniform, uniform          min, max, both included
    log_uniform                   exp(x), x uniform from min to max;  log_uniform_values: from log(min) to log(max)
    inv_log_uniform               1/exp(x);                           inv_log_uniform_values: as log_uniform_values
    normal, log_normal            x, exp(x) with x normal of mu (0), sigma (1)
    beta                          a (1), b (1)
    q_...                         the nearest multiple of q (1)

Without `distribution` it follows from the keys: value, values (with probabilities), min and max (int_uniform where both
are whole numbers, else uniform).
"""
import json
import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from harness.yaml_tree import ConfigError

NEEDED = object()
RANGE = {"min": NEEDED, "max": NEEDED}
FORMS = {
    "constant": {"value": NEEDED},
    "categorical": {"values": NEEDED},
    "categorical_w_probabilities": {"values": NEEDED, "probabilities": NEEDED},
    "int_uniform": RANGE, "uniform": RANGE, "q_uniform": {**RANGE, "q": 1},
    "log_uniform": RANGE, "log_uniform_values": RANGE, "inv_log_uniform": RANGE, "inv_log_uniform_values": RANGE,
    "q_log_uniform": {**RANGE, "q": 1}, "q_log_uniform_values": {**RANGE, "q": 1},
    "normal": {"mu": 0.0, "sigma": 1.0}, "q_normal": {"mu": 0.0, "sigma": 1.0, "q": 1},
    "log_normal": {"mu": 0.0, "sigma": 1.0}, "q_log_normal": {"mu": 0.0, "sigma": 1.0, "q": 1},
    "beta": {"a": 1.0, "b": 1.0}, "q_beta": {"a": 1.0, "b": 1.0, "q": 1},
}
IN_A_GRID = ("constant", "categorical", "int_uniform", "q_uniform")


class Parameter(NamedTuple):
    key: str                    # dotted, as overrides have it
    distribution: str
    spec: dict[str, Any]        # the keys of its form, defaults too


def parameter(key: str, said: dict[str, Any]) -> Parameter:
    """The parameter that a mapping of a sweep file describes.

    Raises:
        ValueError: what is wrong with it, on one line.
    """
    distribution = said.get("distribution") or _inferred(said)
    if not isinstance(distribution, str) or distribution not in FORMS:
        raise ValueError(f"no distribution {distribution!r}; there are {', '.join(FORMS)}")
    form = FORMS[distribution]
    if unknown := said.keys() - form.keys() - {"distribution"}:
        raise ValueError(f"{distribution} has no {min(unknown)!r}; it has {', '.join(form)}")
    if missing := [name for name in form if form[name] is NEEDED and name not in said]:
        raise ValueError(f"{distribution} needs {' and '.join(missing)}")
    spec = {name: said.get(name, default) for name, default in form.items()}
    if problem := _wrong(distribution, spec):
        raise ValueError(problem)
    return Parameter(key, distribution, spec)


def _inferred(said: dict[str, Any]) -> str:
    if "value" in said:
        return "constant"
    if "values" in said:
        return "categorical_w_probabilities" if "probabilities" in said else "categorical"
    if {"min", "max"} <= said.keys():
        return "int_uniform" if all(is_whole(said[key]) for key in ("min", "max")) else "uniform"
    raise ValueError("expected value, values, min and max, a distribution, or parameters below it")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)         # to Python yes and no are 1 and 0


def is_number(value: Any) -> bool:
    """A finite one."""
    return is_whole(value) or isinstance(value, float) and math.isfinite(value)


def in_yaml(value: Any) -> str:
    """As YAML has it on one line; numbers as short as they are exact."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value)


def _wrong(distribution: str, spec: dict[str, Any]) -> str | None:
    numbers = {key: spec[key] for key in ("min", "max", "q", "mu", "sigma", "a", "b") if key in spec}
    for key, value in numbers.items():
        if not is_number(value):
            return f"{key}: expected a number, got {value!r}"
    if distribution == "int_uniform" and not all(map(is_whole, numbers.values())):
        return "int_uniform: min and max must be whole numbers"
    if "min" in spec and spec["min"] > spec["max"]:
        return f"min {spec['min']} is above max {spec['max']}"
    if distribution.endswith("_values") and spec["min"] <= 0:
        return f"{distribution}: min must be above 0, it is {spec['min']}"
    if spec.get("q", 1) <= 0 or spec.get("sigma", 0) < 0 or min(spec.get("a", 1), spec.get("b", 1)) <= 0:
        return "q, a and b must be above 0, sigma not below"
    if "values" in spec and not (isinstance(spec["values"], list) and spec["values"]):
        return "values: expected a list with something in it"
    for value in spec.get("values", [spec.get("value")]):
        if isinstance(value, float) and not math.isfinite(value):
            return f"expected finite numbers, got {value}"
    if "probabilities" in spec:
        p = spec["probabilities"]
        if not isinstance(p, list) or not all(map(is_number, p)) or min(p, default=0) < 0:
            return "probabilities: expected a list of numbers, none below 0"
        if len(p) != len(spec["values"]) or abs(math.fsum(p) - 1) > 1e-6:
            return f"{len(spec['values'])} values need as many probabilities, with the sum 1"
    return None


def grid(p: Parameter) -> list:
    """Its values in a grid: as wandb has them, q_uniform without max.

    Raises:
        ValueError: it has no grid.
    """
    if p.distribution not in IN_A_GRID:
        raise ValueError(f"a grid has no {p.distribution}; write values, or take method: random")
    if p.distribution == "constant":
        return [p.spec["value"]]
    if p.distribution == "categorical":
        return list(p.spec["values"])
    low, high = p.spec["min"], p.spec["max"]
    if p.distribution == "int_uniform":
        return list(range(low, high + 1))
    q = p.spec["q"]
    return [_digits(low + i * q, 12) for i in range(math.ceil((high - low) / q - 1e-9))]


def different(parameters: Sequence[Parameter]) -> float:
    """How many configurations there are to draw; infinite where a range is continuous or a draw is rounded."""
    found = 1
    for p in parameters:
        if "values" in p.spec:
            possible = p.spec.get("probabilities", [1.0] * len(p.spec["values"]))
            values = [value for value, share in zip(p.spec["values"], possible) if share > 0]
            found *= sum(value not in values[:position] for position, value in enumerate(values))
        elif p.distribution != "constant":
            found *= p.spec["max"] - p.spec["min"] + 1 if p.distribution == "int_uniform" else math.inf
    return found


def shares(parameters: Sequence[Parameter], number: int) -> dict[str, float]:
    """Dotted key -> from 0 to 1, for draw `number` of a random search; of those that are not constant.

    Draws are quasi-random: they fill the space evenly, however few they are. They are always the same, and a parameter
    behind the others leaves theirs as they are. Source: Bousquet et al. 2017, Critical Hyper-Parameters: No Random, No
    Cry (arXiv:1706.03200).
    """
    keys = [p.key for p in parameters if p.distribution != "constant"]
    return dict(zip(keys, _points(len(keys), 1 << number.bit_length())[number]))


@cache
def _points(dimensions: int, count: int) -> list[list[float]]:
    """The first `count` points of the scrambled Halton sequence: those of Optuna's QMCSampler, without its study."""
    from scipy.stats.qmc import Halton
    return Halton(dimensions, scramble=True, seed=0).random(count).tolist() if dimensions else [[]] * count


def load_optuna() -> ModuleType:
    """Optuna, saying nothing but errors.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("method: bayes and early_terminate need Optuna: python -m pip install optuna; or take "
                          "method: random without early_terminate") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def drawn(parameters: Sequence[Parameter], number: int) -> dict[str, Any]:
    """The values of draw `number`."""
    places = shares(parameters, number)
    return {p.key: quantile(p, places.get(p.key, 0.0)) for p in parameters}


def quantile(p: Parameter, u: float) -> Any:
    """The value below which a share u of the draws lies, 0 <= u < 1; numbers have six digits."""
    spec, kind = p.spec, p.distribution.removeprefix("q_")
    if kind == "constant":
        return spec["value"]
    if kind.startswith("categorical"):
        shares = spec.get("probabilities") or [1 / len(spec["values"])] * len(spec["values"])
        ends = [math.fsum(shares[:i + 1]) for i in range(len(shares))]
        last = max(i for i, share in enumerate(shares) if share > 0)
        return spec["values"][next((i for i, end in enumerate(ends) if u < end), last)]
    if kind == "int_uniform":
        return spec["min"] + int(u * (spec["max"] - spec["min"] + 1))
    x = _continuous(kind, spec, u)
    if "q" in spec:
        multiple = round(x / spec["q"]) * spec["q"]
        return multiple if is_whole(spec["q"]) else _digits(multiple, 12)
    x = _digits(x, 6)
    if kind in ("uniform", "log_uniform_values", "inv_log_uniform_values"):
        x = min(max(x, float(spec["min"])), float(spec["max"]))
    return x


def _continuous(kind: str, spec: dict[str, Any], u: float) -> float:
    if kind in ("normal", "log_normal"):
        from statistics import NormalDist
        u = min(max(u, 1e-12), 1 - 1e-12)
        x = NormalDist(spec["mu"], spec["sigma"]).inv_cdf(u) if spec["sigma"] else spec["mu"]
        return math.exp(x) if kind == "log_normal" else x
    if kind == "beta":
        from scipy.stats import beta
        return float(beta.ppf(u, spec["a"], spec["b"]))
    low, high = spec["min"], spec["max"]
    if kind.endswith("_values"):
        low, high = math.log(low), math.log(high)
    if kind == "inv_log_uniform":
        low, high = -high, -low
    x = low + u * (high - low)
    return x if kind == "uniform" else math.exp(x)


def _digits(x: float, digits: int) -> float | int:
    return x if isinstance(x, int) else float(f"{x:.{digits}g}")
