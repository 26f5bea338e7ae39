"""The tables of sweeps, of rows written by hand: numbers against scipy and by hand, and what is missing, always named."""
import json
import math

import pytest
from scipy import stats

from scripts.sweep.candidates import comparisons
from scripts.sweep.draw import Parameter
from scripts.sweep.file import Configuration, Sweep
from scripts.sweep.plan import configuration_id
from scripts.sweep.tables import Cell, Table, markdown, tables

NOTHING = dict(steps=10, of_steps=10, val_loss=None, val_loss_avg=None, target_step=None, target_train_s=None,
               train_s=None, tokens_per_s=None, run=None, error=None)
PLAIN = Sweep("x.yaml", "grid", (), ("muon.yaml",), (0, 1), None, None, None, "val_loss", False)


def row(configuration, seed, loss, status="finished", baseline=False, **more):
    return {**NOTHING, "configuration": configuration_id(configuration), "base": configuration.base,
            "parameters": configuration.parameters, "baseline": baseline, "seed": seed, "status": status,
            "val_loss": loss, **more}


def texts(table):
    """Rows as column -> text."""
    return [dict(zip(table.columns, [cell.text for cell in line])) for line in table.rows]


# ---- the ranking

def lr(rate, seed, loss, status="finished", baseline=False, **more):
    return row(Configuration("muon.yaml", {"lr": rate}), seed, loss, status, baseline, **more)


def test_the_ranking_is_of_means_over_seeds_and_puts_what_is_incomplete_last():
    rows = [lr(0.1, 0, 3.0, baseline=True), lr(0.2, 0, 2.0), lr(0.3, 0, 1.0, "stopped"), lr(0.4, 0, None, "crashed"),
            lr(0.1, 1, 3.2, baseline=True), lr(0.2, 1, 2.4), lr(0.3, 1, 0.9), lr(0.4, 1, None, "pruned")]
    table, = tables(rows, PLAIN)
    assert table.columns == ("lr", "seeds", "val_loss", "val_loss less baseline's", "not finished")
    lines = texts(table)
    assert [line["lr"] for line in lines] == ["0.2", "0.1", "0.3", "0.4"]
    assert list(lines[0].values())[1:4] == ["2 of 2", "2.2000 ± 0.2828", "-0.9000 (-2.1706 to +0.3706)"]
    assert list(lines[2].values())[1:4] == ["1 of 2", "0.9000", "-2.3000"] and lines[2]["not finished"] == "1 stopped"
    assert lines[3]["not finished"] == "1 crashed, 1 pruned"                    # above: t(0.975, 1) = 12.706
    assert [cell.value for cell in table.rows[0]][::2] == [0.2, pytest.approx(2.2), None]
    backwards, = tables(rows, PLAIN._replace(maximize=True))
    assert [line["lr"] for line in texts(backwards)] == ["0.1", "0.2", "0.3", "0.4"]


def test_a_target_that_some_seeds_did_not_reach_is_no_first_rank():
    rows = [lr(0.1, 0, 3.0, target_step=100), lr(0.1, 1, 3.0), lr(0.2, 0, 3.0, target_step=150),
            lr(0.2, 1, 3.0, target_step=152)]
    table, = tables(rows, PLAIN._replace(metric="target_step"))
    assert [list(line.values())[:3] for line in texts(table)] == [["0.2", "2 of 2", "151 ± 1"],
                                                                  ["0.1", "2 of 2", "100 (1 of 2)"]]


def test_markdown_has_the_title_the_table_and_the_notes():
    table = Table("Losses", ("form", "val_loss"), [[Cell("tanh|relu", "tanh|relu"), Cell("1.5", 1.5)]], ["of one run"])
    assert markdown(table) == "**Losses**\n\n| form | val_loss |\n| - | -: |\n| tanh\\|relu | 1.5 |\n\n- of one run"
