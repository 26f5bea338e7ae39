"""Every parameter in exactly one group, every pattern matching something, matrices for matrix rules."""
import pytest

from optim import RULES
from optim.groups import Group, GroupError, assign
from optim.schedules import Schedule

ROLES = {"embed.weight": "embed", "blocks.0.q": "q", "blocks.0.up": "mlp_in", "blocks.0.norm": "gain",
         "blocks.1.q": "q", "blocks.1.up": "mlp_in", "blocks.1.norm": "gain", "head.weight": "head"}
SHAPES = {name: {"embed": (10, 4), "q": (4, 4), "mlp_in": (16, 4), "gain": (4,), "head": (10, 4)}[role]
          for name, role in ROLES.items()}


def group(name: str, *params: str, rule: str = "adamw", **hyper) -> Group:
    return Group(name=name, params=params, rule=rule, hyper=RULES[rule](**hyper))


def divide(*groups: Group) -> dict:
    return assign(groups, ROLES, SHAPES)


def problems_of(*groups: Group) -> list[str]:
    with pytest.raises(GroupError) as caught:
        divide(*groups)
    return str(caught.value).split("\n")


def test_roles_expressions_and_rest_divide_the_parameters_in_model_order():
    groups = group("matrices", "mlp_in", "q", rule="muon"), group("head", r"head\..*"), group("other", "rest")
    assert divide(*groups) == {
        "matrices": ["blocks.0.q", "blocks.0.up", "blocks.1.q", "blocks.1.up"], "head": ["head.weight"],
        "other": ["embed.weight", "blocks.0.norm", "blocks.1.norm"]}


def test_an_expression_must_match_the_whole_name():
    (line,) = problems_of(group("first", r"blocks\.0"), group("other", "rest"))
    assert line == (r"optim.first: params 'blocks\\.0' matches no parameter; "
                    "roles in this model: embed, gain, head, mlp_in, q")


def test_two_patterns_of_one_group_may_overlap():
    assert divide(group("all", ".*", "q"))["all"] == list(ROLES)


def test_a_parameter_in_no_group_is_an_error_that_lists_it():
    (line,) = problems_of(group("matrices", "q", "mlp_in"), group("ends", "embed", "head"))
    assert line == ("in no group: blocks.0.norm (role gain), blocks.1.norm (role gain); "
                    "name their roles in a group's params, or add `rest`")
    assert problems_of(group("one", "head"))[0].count("role") == 8          # seven parameters, and the remedy


def test_a_long_list_of_parameters_is_cut():
    roles = {f"p{i}": "q" for i in range(20)} | {"head": "head"}
    with pytest.raises(GroupError, match=r"p7 \(role q\) and 12 more; name"):
        assign((group("one", "head"),), roles, {name: (2, 2) for name in roles})


def test_a_parameter_in_two_groups_is_an_error_that_names_both():
    lines = problems_of(group("a", "q"), group("b", r"blocks\.0\..*"), group("c", "rest"))
    assert lines == ["parameter blocks.0.q (role q) is in two groups, a and b; take it out of one"]


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_role():
    (line,) = problems_of(group("a", "mlp_inn"), group("b", "rest"))
    assert line.startswith("optim.a: params 'mlp_inn' matches no parameter; did you mean 'mlp_in'? roles in ")


def test_an_empty_rest_is_an_error():
    (line,) = problems_of(group("a", ".*"), group("b", "rest"))
    assert line == "optim.b: params `rest` is empty, for other groups take every parameter; remove it"


def test_a_matrix_rule_refuses_a_vector():
    (first, _) = problems_of(group("a", "rest", rule="muon"))
    assert first == ("optim.a: muon updates matrices, but blocks.0.norm has shape [4]; "
                     "move it to a group whose rule is elementwise, like adamw")


def test_a_group_checks_its_patterns_and_schedules():
    with pytest.raises(ValueError, match="params: '\\(' is not a regular expression"):
        group("a", "(")
    piecewise = Schedule(shape="piecewise", points=[{"step": 0, "value": 0.9}])
    for scheduled, words in (({"lr": piecewise}, "scheduled.lr: lr follows `schedule`"),
                             ({"momentum": Schedule()}, "scheduled.momentum has shape 'wsd'")):
        with pytest.raises(ValueError, match=words):
            Group(name="a", params=("q",), rule="muon", hyper=RULES["muon"](), scheduled=scheduled)
    for name in ("0", "a.b", "a-b", ""):
        with pytest.raises(ValueError, match="name"):
            group(name, "q")


def with_options(rule: str, hyper: dict, **options) -> Group:
    return Group(name="hidden", params=("q", "mlp_in"), rule=rule, hyper=RULES[rule](**hyper), **options)


@pytest.mark.parametrize("rule, hyper, options, words", [
    ("muon", {}, dict(cautious=True), "nothing reads cautious without weight decay: remove cautious, or set"),
    ("muon", dict(weight_decay=.1), dict(hyperball=True), "nothing reads weight_decay, for hyperball keeps every norm"),
    ("muon", dict(weight_decay=.1), dict(cautious=True, hyperball=True), "remove one of the two"),
    ("adamw", {}, dict(blocks="heads"), "nothing reads blocks, for adamw works on elements"),
    ("adam", dict(weight_decay=.1), dict(cautious=True), "adds its decay to the gradient"),
    ("scion", dict(constrained=True), dict(hyperball=True), "shrinks the weight in every step")])
def test_options_that_a_rule_cannot_take_are_refused(rule, hyper, options, words):
    lines = problems_of(with_options(rule, hyper, **options), group("other", "rest"))
    assert any(line.startswith("optim.hidden: ") and words in line for line in lines), lines


def test_hyperball_makes_an_elementwise_rule_one_for_matrices():
    divide(with_options("adamw", {}, hyperball=True), group("other", "rest"))
    lines = problems_of(Group(name="a", params=("rest",), rule="adamw", hyper=RULES["adamw"](), hyperball=True))
    assert [line.split(", but ")[1][:29] for line in lines] == ["blocks.0.norm has shape [4]; ", "blocks.1.norm has shape [4]; "]
