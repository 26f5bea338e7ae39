"""What a step costs by plan, against steps that are taken, and the page that is made of it."""
import subprocess
import sys

import pytest
import torch

from optim import RULES
from optim.adamw import AdamW
from optim.groups import Group, assign
from optim.muon import Muon
from optim.plan import plan_banks
from optim.traffic import Transfer, collected_bytes, ring_bytes, transfers, work
from scripts import moved, scaling
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "scaling.md"
SHAPES = {"embed": ("embed", (50, 8)), "q0": ("q", (8, 8)), "q1": ("q", (8, 8)), "up": ("mlp_in", (32, 8))}
PARAMS = {name: torch.empty(shape, device="meta") for name, (_, shape) in SHAPES.items()}


def banks(world: int, params=PARAMS):
    groups = (Group(name="hidden", params=("q", "mlp_in"), rule="muon", hyper=Muon()),
              Group(name="rest", params=("rest",), rule="adamw", hyper=AdamW()))
    roles = {name: role for name, (role, _) in SHAPES.items()}
    names = assign(groups, roles, {name: tuple(p.shape) for name, p in params.items()})
    return plan_banks(groups, names, params, roles, 2, False, world)


def test_one_rank_sends_nothing():
    assert transfers(banks(1), PARAMS, clipped_heads=4) == []


def test_a_step_s_operations_follow_from_the_shapes():
    """By hand, on 2 ranks: the tall matrix costs more than both squares, so one rank has it and the other these."""
    padded = 4 * 2 * 224                        # 400 numbers, 200 a rank, in whole 32s
    assert transfers(banks(2), PARAMS, clipped_heads=4) == [
        Transfer("gradients", "reduce", 4 * 256, 1, 0), Transfer("gradients", "reduce", 4 * 128, 0, 1),
        Transfer("gradients", "reduce_scatter", padded, 2), Transfer("report", "all_reduce", 8 * 7),
        Transfer("weights", "broadcast", 4 * 128, 0, 1), Transfer("weights", "broadcast", 4 * 256, 1, 0),
        Transfer("weights", "all_gather", padded, 2), Transfer("logits", "all_reduce", 16)]


def test_bfloat16_weights_travel_as_they_are_and_their_gradients_in_float32():
    half = {**PARAMS, "embed": PARAMS["embed"].to(torch.bfloat16)}
    one, other = (transfers(banks(2, params), params) for params in (PARAMS, half))
    assert one[2] == other[2] and one[-1].payload == 2 * other[-1].payload
    assert collected_bytes(banks(2), PARAMS) - collected_bytes(banks(2, half), half) == 2 * 400


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("operation", ["reduce_scatter", "all_gather", "all_reduce", "reduce", "broadcast"])
def test_on_a_ring_what_is_sent_is_received_and_no_less_than_needed(operation, world):
    sent, received = zip(*(ring_bytes(Transfer("weights", operation, 420, 0, world - 1), rank, world)
                           for rank in range(world)))
    assert sum(sent) == pytest.approx(sum(received))
    assert sum(sent) == pytest.approx((2 if operation == "all_reduce" else 1) * (world - 1) * 420)
    assert [received[(rank + 1) % world] for rank in range(world)] == list(sent)    # each sends to the next


def test_work_is_the_rule_s_operations_and_one_pass_over_memory():
    squares, _, rest = banks(2)
    assert work(squares, PARAMS, 2).flops == 2 * Muon().flops(8, 8)
    assert work(squares, PARAMS, 2).memory == 2 * 64 * 4 * (2 + 2 + 2)                 # G twice; W, M there and back
    assert work(rest, PARAMS, 224) == (224 * 16, 224 * 4 * (2 + 2 + 4))                # two moments


@pytest.fixture(scope="module")
def counted() -> list[str]:
    """The rows of scripts/moved.py: real steps on real processes."""
    if not sys.platform.startswith("linux"):
        pytest.skip("TCP_INFO's byte counts are Linux's")
    program = [sys.executable, "-m", "scripts.moved"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()[2:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_moves_between_ranks_is_what_was_predicted(counted, world):
    """Every payload exactly, and the kernel's count of received bytes within 2%; the page says so too."""
    rows = [row for row in counted if row.split(" | ")[1] == str(world)]
    assert len(rows) == 3
    for row in rows:
        _, _, operations, payload, payload_counted, expected, received, _ = row.split(" | ")
        assert payload == payload_counted and (float(payload_counted.replace(",", "")) > 1000) == (world > 1)
        assert (int(operations) > 8) == (world > 1)
        expected, received = (float(x.replace(",", "")) for x in (expected, received))
        assert expected <= received <= 1.02 * expected
        sure = row.rsplit(" | ", 2)[0]                                 # all but what headers change
        assert sure in PAGE.read_text(encoding="utf-8"), f"docs/scaling.md is old: it has no {sure}"


def test_a_count_that_is_not_the_predicted_one_disagrees():
    predicted = [Transfer("gradients", "reduce", 100, 0, 1), Transfer("report", "all_reduce", 8)]
    operations = [["reduce", 100, 1], ["all_reduce", 8, None]]
    good = moved.Step(predicted, operations, received=1000, expected=900.0, world=2)
    assert good.agrees
    for change in (dict(operations=operations[::-1]), dict(operations=operations[:1]), dict(received=899),
                   dict(operations=[["reduce", 104, 1], operations[1]]), dict(received=900 + 2 * 500 * 4 + 1),
                   dict(operations=[["reduce", 100, 0], operations[1]])):
        assert not good._replace(**change).agrees, change


def test_the_page_holds_the_tables_that_the_program_makes():
    page = PAGE.read_text(encoding="utf-8")
    assert scaling.with_tables(page, scaling.tables(scaling.Constants())) == page, \
        "docs/scaling.md is old: run python -m scripts.scaling --write docs/scaling.md"


def test_times_are_the_page_s_formulas():
    """AdamW at 124M on 64 GPUs by hand: four even banks, rings through eight nodes."""
    s, c = scaling.setup("adamw.yaml", "124M", 64), scaling.Constants()
    numbers = sum(bank.offsets[-1] for bank in s.banks)
    ring = 1e-6 * (7 * 5 + 56 * 2)
    wire = 63 / 64 * 4 * numbers / (.8 * 400e9)
    t = scaling.times(s, c)
    assert len(s.banks) == 4 and t.gradients == pytest.approx(4 * (10e-6 + ring) + wire, rel=1e-6)
    assert t.model == pytest.approx(s.model.flops_per_token() * 8192 / (.42 * 989e12))
    assert t.small == pytest.approx(10e-6 + 2e-6 * (7 * 2 + 3 * 5), rel=1e-2)
    assert t.step == pytest.approx(t.model + t.gradients_waited + t.small + t.collect + t.update + t.weights_waited)


def test_gradients_are_waited_for_at_most_as_long_as_they_travel_and_only_the_head_leaves_early():
    s, c = scaling.setup("muon.yaml", "124M", 8), scaling.Constants()
    t = scaling.times(s, c)
    early = [bank.names for place, bank in enumerate(s.banks) if scaling.work_left(s, place) > .5]
    assert early == [("head.weight",)] and 0 < t.gradients_waited < t.gradients


def test_owners_of_few_matrices_do_more_than_the_mean():
    s = scaling.setup("muon.yaml", "124M", 1024)
    flops = [sum(rank) for rank in zip(*scaling.loads(s).flops)]
    assert sum(f > 1e9 for f in flops) == 72 and max(flops) == pytest.approx(
        RULES["muon"](ns_coefficients="exact12").flops(3072, 768), rel=1e-3)


@pytest.mark.parametrize("arguments, error", [
    (["--network-gb-s", "0"], "error: --network-gb-s 0.0: give a number above 0\n"),
    (["--write", "README.md"], f"error: --write README.md: no page with the line {scaling.BEGIN}\n")])
def test_bad_arguments_are_one_line(arguments, error, capsys):
    assert scaling.main(arguments) == 2 and capsys.readouterr().err == error


@pytest.mark.parametrize("gpus, slower", [(8, False), (64, True)])
def test_a_slow_network_is_felt_between_nodes_only(gpus, slower):
    s = scaling.setup("muon.yaml", "124M", gpus)
    fast, slow = (scaling.times(s, scaling.Constants(network_gb_s=speed)).step for speed in (50, 5))
    assert (slow > 2 * fast) if slower else slow == fast


def test_options_reach_the_printed_tables(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", {"124M": scaling.SIZES["124M"]})
    monkeypatch.setattr(scaling, "GPUS", (8,))
    assert scaling.main(["--memory-gb", "40"]) == 0
    out = capsys.readouterr().out
    assert "| `--memory-gb` | 40 |" in out and "60 (too much) |" in out and out.count("\n| muon | 124M | 8 |") == 2
