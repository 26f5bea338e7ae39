"""When successive halving looks at a trial: wandb's `early_terminate`, counted in validations after step 0.

    early_terminate: {type: hyperband, min_iter: 3, eta: 3}             # after 3, 9, 27, ... validations
    early_terminate: {type: hyperband, max_iter: 27, s: 2, eta: 3}      # after 27/3/3 and 27/3
"""
from typing import Any

from scripts.sweep.parameter import is_whole

KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


def rule(said: Any) -> dict[str, int]:
    """What a sweep file says, eta filled in.

    Raises:
        ValueError: what is wrong with it, on one line.
    """
    if not isinstance(said, dict) or said.get("type") != "hyperband":
        raise ValueError("expected {type: hyperband, min_iter: 3, eta: 3}")
    if unknown := said.keys() - set(KEYS):
        raise ValueError(f"no key {min(unknown)!r}; there are {', '.join(KEYS)}")
    if said.get("strict", True) is not True:
        raise ValueError("the best 1/eta go on and no more: strict is true; remove it")
    found = {"eta": 3} | {key: said[key] for key in KEYS[1:5] if key in said}
    for key, least in (("min_iter", 1), ("max_iter", 1), ("s", 1), ("eta", 2)):
        value = found.get(key, least)
        if not is_whole(value) or value < least:
            raise ValueError(f"{key}: expected a whole number from {least} on, got {value!r}")
    if found.keys() - {"eta"} not in ({"min_iter"}, {"max_iter", "s"}):
        raise ValueError("write either min_iter, or max_iter and s")
    return found


def brackets(rule: dict[str, int], validations: int) -> list[int]:
    """After how many of its validations a trial may be ended: never at its last, it is done then."""
    eta = rule["eta"]
    if "min_iter" in rule:
        found = [rule["min_iter"]]
        while found[-1] * eta < validations:
            found.append(found[-1] * eta)
    else:
        found = [rule["max_iter"] // eta ** k for k in range(rule["s"], 0, -1)]
    return [each for each in found if 0 < each < validations]
