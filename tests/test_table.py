"""The table of --print-config: what one update does to every parameter, and who does it."""
import pytest
import torch

from optim import RULES
from optim.groups import Group, GroupError
from optim.table import parameter_table

SHAPES = {"embed": ("embed", (50, 8)), "q0": ("q", (8, 8)), "q1": ("q", (8, 8)), "up": ("mlp_in", (32, 8)),
          "gain": ("gain", (8,)), "scale": ("scalar", ())}
PARAMS = {name: torch.empty(shape, device="meta") for name, (_, shape) in SHAPES.items()}
ROLES = {name: role for name, (role, _) in SHAPES.items()}


def table(hidden: str = "muon", world: int = 1, **hyper) -> dict:
    groups = (Group(name="hidden", params=("q", "mlp_in"), rule=hidden, hyper=RULES[hidden](**hyper)),
              Group(name="rest", params=("rest",), rule="adamw", hyper=RULES["adamw"](lr=.5, weight_decay=.1)))
    return {row.name: row for row in parameter_table(groups, PARAMS, ROLES, 2, False, world)}


def test_every_parameter_has_a_row_in_model_order():
    assert list(table()) == list(PARAMS)


def test_a_row_says_what_a_step_does():
    rows = table(lr=.02, weight_decay=.05)
    up = rows["up"]
    assert (up.fan_out, up.fan_in, up.rule, up.lr, up.block, up.state_bytes) == (32, 8, "muon", .02, "whole", 1024)
    assert up.step_rms == pytest.approx(.02 * 2 / 32 ** .5) and up.decay == pytest.approx(.001)
    assert rows["embed"].step_rms == .5 and rows["embed"].decay == pytest.approx(.05)
    assert (rows["embed"].fan_out, rows["embed"].fan_in) == (8, 50)             # its input is one-hot
    assert rows["scale"].state_bytes == 8 and rows["embed"].state_bytes == 8 * 400


def test_the_step_rms_is_what_a_step_does():
    """One update from zero weights with an exact orthogonalisation, against the table's word."""
    rule = RULES["muon"](lr=.02, ns_coefficients="exact12", ns_dtype="float32")
    W, G = torch.zeros(1, 32, 8), torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(0))
    h = {key: torch.tensor(float(getattr(rule, key)), dtype=torch.float64) for key in rule.VARYING}
    rule.update(W, G, rule.init(W), h)
    assert W.square().mean().sqrt() == pytest.approx(table(lr=.02)["up"].step_rms, rel=1e-3)


def test_heads_and_hyperball_show():
    rows = parameter_table((Group(name="q", params=("q",), rule="muon", hyper=RULES["muon"](), blocks="heads"),
                            Group(name="up", params=("mlp_in",), rule="adamw", hyper=RULES["adamw"](), hyperball=True),
                            Group(name="rest", params=("rest",), rule="adamw", hyper=RULES["adamw"]())),
                           PARAMS, ROLES, 2, False)
    rows = {row.name: row for row in rows}
    assert (rows["q0"].block, rows["q0"].fan_out, rows["q0"].fan_in) == ("2 blocks", 4, 8)
    assert rows["up"].step_rms is None and rows["up"].decay == 0 and rows["up"].fan_out == 32


def test_owners_are_ranks_or_all():
    rows = table(world=2)
    assert {rows["q0"].owner, rows["q1"].owner, rows["up"].owner} == {"0", "1"} and rows["embed"].owner == "all"
    assert rows["q0"].owner == rows["q1"].owner != rows["up"].owner              # the tall one costs more than both


@pytest.mark.parametrize("name", RULES)
def test_the_state_is_the_formula_s(name):
    for row in table(name).values():
        assert row.state_bytes == row.formula_bytes, row


def test_a_shape_that_a_rule_cannot_take_is_named():
    with pytest.raises(GroupError, match=r"optim\.hidden: q0: no side of a 8×8 matrix is within max_dim 4"):
        table("splus", max_dim=4)
