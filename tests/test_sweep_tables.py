"""The tables of sweeps, of rows written by hand: numbers against scipy and by hand; what is missing is named."""

import math

import pytest
from scipy import stats

from scripts import judge
from scripts.sweep.parameter import Parameter
from scripts.sweep.file import Configuration, Sweep
from scripts.sweep.plan import configuration_id
from scripts.sweep.tables import Cell, Table, markdown, tables
from scripts.sweep.tables.compare import at_edge

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


# ---- ladders

CHANGES = {"cap": {"model.softcap": 30}, "residual": {"model.value_residual": "fixed"}}
LADDER = PLAIN._replace(seeds=(0, 1, 2), baseline=Configuration("muon.yaml", {"steps": 5}), changes=CHANGES)
LOSSES = {(): [3.00, 3.10, 3.20], ("cap",): [2.90, 3.01, 3.09], ("residual",): [3.02, 3.13, 3.215],
          ("cap", "residual"): [2.91, 2.99, 3.12]}


def having(*names):
    return Configuration("muon.yaml", {"steps": 5} | {key: x for name in names for key, x in CHANGES[name].items()})


def ladder_rows(changed=None, losses=LOSSES, **more):
    """Of every configuration with every seed; `changed` maps (names, seed) to a status, which has no loss."""
    rows = [row(having(*names), seed, loss, baseline=not names, **more)
            for names, values in losses.items() for seed, loss in enumerate(values)]
    for (names, seed), status in (changed or {}).items():
        rows[list(losses).index(names) * len(losses[()]) + seed].update(status=status, val_loss=None)
    return rows


def test_a_ladder_tests_all_changes_and_every_one_alone_and_left_out_and_corrects_for_all_of_these():
    together, alone, left_out, configurations = tables(ladder_rows(), LADDER)
    every = ("cap", "residual")
    pairs = [(every, ()), (("cap",), ()), (("residual",), ()), (("residual",), every), (("cap",), every)]
    ps = [stats.ttest_rel(LOSSES[of], LOSSES[against]).pvalue for of, against in pairs]
    assert 5 * ps[1] < 4 * ps[0] < 3 * ps[3] < 0.05 < 4 * ps[3] < 2 * ps[2] < ps[4] and ps[2] < 0.05
    corrected = [4 * ps[0], 5 * ps[1], 2 * ps[2], 3 * ps[3], ps[4]]
    seen = [(line[0].text, line[table.columns.index("p (Holm)")].value) for table in (together, alone, left_out)
            for line in table.rows]
    assert [name for name, _ in seen] == ["all", "cap", "residual", "without cap", "without residual"]
    assert [p for _, p in seen] == pytest.approx(corrected, rel=1e-9)
    at = alone.columns.index("p (Holm)") - 2
    assert [line[at].value for line in alone.rows + left_out.rows] == pytest.approx(
        [-0.1, 0.065 / 3, 0.345 / 3, -0.02 / 3])
    assert together.title == "All together: every change at once, against the baseline"
    assert [texts(together)[0][key] for key in ("sets", "with less without", "verdict")] == [
        "model.softcap=30, model.value_residual=fixed", "-0.0933", "lowers the loss"]
    half = stats.t.ppf(1 - 0.05 / 5 / 2, 2) * 0.01 / math.sqrt(3)               # the gaps are -0.10, -0.09 and -0.11
    assert texts(alone)[0] == {
        "change": "cap", "sets": "model.softcap=30", "pairs": "3 of 3", "val_loss with it": "3.0000",
        "without it": "3.1000", "with less without": "-0.1000", "p (Holm)": f"{corrected[1]:.4f}",
        "simultaneous 95% interval": f"{-0.1 - half:+.4f} to {-0.1 + half:+.4f}", "verdict": "lowers the loss",
        "more seeds": ""}
    assert texts(alone)[1]["verdict"].startswith("no effect detected")          # though p < 0.05 before the correction
    first, second = texts(left_out)
    assert (first["val_loss with it"], first["without it"], first["verdict"]) == ("3.0067", "3.1217", "raises the loss")
    sd = math.sqrt((0.01 ** 2 + 0.03 ** 2 + 0.02 ** 2 - 3 * (0.02 / 3) ** 2) / 2)
    assert second["verdict"] == ("no effect detected; the smallest detectable at n = 3 is "
                                 f"{judge.detectable(3, sd, 0.05 / 5):.4f}")
    assert second["more seeds"] == str(judge.more_paired(3, sd, 0.02 / 3, 0.05 / 5))
    said = " ".join(together.notes)
    assert "Holm for 5 comparisons" in said and "99.00%" in said and "0.05/5" in said and "paired by seed" in said
    assert [(line["configuration"], line["val_loss"]) for line in texts(configurations)] == [
        ("+ cap", "3.0000 ± 0.0954"), ("all", "3.0067 ± 0.1060"), ("baseline", "3.1000 ± 0.1000"),
        ("+ residual", "3.1217 ± 0.0978")]


def test_a_rung_that_asks_what_a_change_alone_did_is_no_further_comparison():
    plain, rungs = tables(ladder_rows(), LADDER), tables(ladder_rows(), LADDER._replace(rungs=True))
    assert [table.title.partition(":")[0] for table in rungs] == ["All together", "Added alone", "Left out of all",
                                                                  "Rungs", "Configurations"]
    assert rungs[:3] == plain[:3]
    assert [cell.text for cell in rungs[3].rows[0]][:9] == [cell.text for cell in plain[1].rows[0]][:9]
    back, forth = texts(plain[2])[1], texts(rungs[3])[1]                        # the last rung, and leaving it out
    assert forth["p (Holm)"] == back["p (Holm)"] and forth["with less without"] == "+0.0067"


def test_rows_come_by_the_size_of_the_effect_and_rungs_in_their_order():
    losses = {**LOSSES, ("cap",): LOSSES[()], ("residual",): [loss - 1 for loss in LOSSES[()]]}
    losses[("cap",)] = [3.01, 3.10, 3.20]
    found = tables(ladder_rows(losses=losses), LADDER._replace(rungs=True))
    assert [line[0].text for line in found[1].rows] == ["residual", "cap"]
    assert [line[0].text for line in found[3].rows] == ["cap", "residual"]


@pytest.mark.parametrize("changed, pairs, verdict, named", [
    ({(("cap",), 1): "not_finite"}, "2 of 3", "with it diverged at 1 of 3 seeds", "+ cap: seed 1 not_finite"),
    ({((), 1): "not_finite", ((), 2): "not_finite"}, "1 of 3", "without it diverged at 2 of 3 seeds",
     "baseline: seeds 1 and 2 not_finite"),
    ({(("cap",), 0): "crashed", ((), 1): "crashed"}, "1 of 3", "one pair of seeds: no test",
     "baseline: seed 1 crashed; + cap: seed 0 crashed"),
    ({(("cap",), 0): "running"}, "2 of 3", "no verdict before all seeds ended", "+ cap: seed 0 running"),
    ({(("cap",), 0): "crashed"}, "2 of 3", "no effect detected; the smallest detectable at n = 2 is 0.8159",
     "+ cap: seed 0 crashed"),                                 # 1.2816 (z of 0.9) · 63.657 (t of 0.05/10, 1) · 0.01
    ({(("cap",), seed): "refused" for seed in range(3)}, "0 of 3", "no seed that both finished",
     "+ cap: seeds 0, 1 and 2 refused")], ids=lambda case: case if isinstance(case, str) else "")
def test_seeds_without_a_loss_are_named_and_what_diverged_has_no_mean(changed, pairs, verdict, named):
    together, alone, _, configurations = tables(ladder_rows(changed), LADDER)
    line = next(line for line in texts(alone) if line["change"] == "cap")
    assert (line["pairs"], line["verdict"]) == (pairs, verdict)
    gap = line.get("with less without", "")
    assert ("diverged" in verdict or "no seed" in verdict) == (gap == "")
    assert named in together.notes[-1]
    assert sum(bool(line["not finished"]) for line in texts(configurations)) == named.count(":")


def test_what_has_no_test_still_counts_as_a_comparison_of_the_plan():
    """Or a change that crashes would make the verdicts on the others easier."""
    _, alone, *_ = tables(ladder_rows({(("residual",), seed): "crashed" for seed in range(3)}), LADDER)
    p = stats.ttest_rel(LOSSES[("cap",)], LOSSES[()]).pvalue
    assert alone.rows[0][alone.columns.index("p (Holm)")].value == pytest.approx(5 * p)


def test_one_seed_or_equal_losses_have_no_verdict():
    one = {names: values[:1] for names, values in LOSSES.items()}
    together, alone, *_ = tables(ladder_rows(losses=one), LADDER._replace(seeds=(0,)))
    assert {line["verdict"] for line in texts(alone)} == {"one pair of seeds: no test"}
    assert texts(alone)[0]["with less without"] == "-0.1000" and "two seeds or more" in together.notes[1]
    assert "p (Holm)" not in alone.columns
    equal = {**LOSSES, ("cap",): LOSSES[()], ("residual",): [loss + 0.5 for loss in LOSSES[()]]}
    _, alone, *_ = tables(ladder_rows(losses=equal), LADDER)
    assert [line["verdict"] for line in texts(alone)] == ["the same difference at every seed: no test",
                                                          "equal at every seed"]


def test_a_ladder_of_nothing_that_ran_has_tables_that_say_so():
    together, alone, left_out, configurations = tables([], LADDER)
    assert {line["verdict"] for table in (together, alone, left_out) for line in texts(table)} == {
        "no seed that both finished"}
    assert "baseline: seeds 0, 1 and 2 not planned" in together.notes[-1]
    assert {line["seeds"] for line in texts(configurations)} == {"0 of 3"}
    markdown(alone), markdown(configurations)


def test_another_metric_is_named_and_a_target_that_a_seed_missed_has_no_mean():
    rows = ladder_rows(tokens_per_s=1000.0, target_step=90)
    for each in rows:
        each["target_step"] += each["seed"] - (20 + each["seed"] ** 2) * ("model.softcap" in each["parameters"])
        each["tokens_per_s"] += 7 * each["seed"] ** 2 + 300 * ("model.value_residual" in each["parameters"]) * (
            1 + each["seed"] / 50)
    _, alone, _, configurations = tables(rows, LADDER._replace(metric="tokens_per_s", maximize=True))
    assert texts(alone)[0]["verdict"] == "raises tokens/s" and texts(alone)[0]["change"] == "residual"
    assert {texts(configurations)[i]["configuration"] for i in (0, 1)} == {"+ residual", "all"}      # the largest first
    _, alone, *_ = tables(rows, LADDER._replace(metric="target_step"))
    assert texts(alone)[0]["verdict"] == "lowers steps to target" and texts(alone)[0]["with less without"] == "-22"
    assert alone.columns[3] == "steps to target with it"
    rows[0]["target_step"] = None
    _, alone, *_ = tables(rows, LADDER._replace(metric="target_step"))
    assert {line["verdict"] for line in texts(alone)} == {"without it target not reached at 1 of 3 seeds"}


def test_notes_explain_what_the_table_has_and_nothing_else():
    detected = {names: [3.0 - 0.1 * len(names) + 0.1 * seed + 0.001 * len(names) * (-1)**seed for seed in range(5)]
                for names in LOSSES}
    together, *others = tables(ladder_rows(losses=detected), LADDER._replace(seeds=tuple(range(5))))
    assert {line["verdict"] for table in (together, *others[:2]) for line in texts(table)} == {
        "lowers the loss", "raises the loss"}
    said = " ".join(together.notes)
    assert "Holm for 5 comparisons" in said and "Smallest detectable" not in said and "More seeds" not in said
    running = {(names, 2): "running" for names in LOSSES}
    together, alone, *_ = tables(ladder_rows(running), LADDER)
    assert {line["verdict"] for line in texts(alone)} == {"no verdict before all seeds ended"}
    assert not any(word in " ".join(together.notes) for word in ("two seeds", "Holm", "Smallest"))


def test_trials_with_different_data_are_called_out_over_the_table():
    rows = [lr(0.1, seed, 3.0, train_data="a" * 12, val_data="b" * 12) for seed in range(3)] + [lr(0.2, 0, 3.0)]
    table, = tables(rows, PLAIN)
    assert not any("data" in note for note in table.notes)                      # a row of an older sweep has none
    rows[1]["val_data"] = "c" * 12
    table, = tables(rows, PLAIN)
    assert table.notes[0] == ("Warning: mixed val data, so losses do not compare: bbbbbbbbbbbb (2 trials), "
                              "cccccccccccc (1 trial).")


# ---- comparisons

RATE = Parameter("lr", "log_uniform_values", {"min": 0.001, "max": 1.0})
RACE = Sweep("x.yaml", "random", (), ("adam", "muon", "soap"), (0, 1, 2), 4, None, Configuration("adam", {}),
             "val_loss", False, spaces={base: (RATE,) for base in ("adam", "muon", "soap")}, tuning_seeds=(7,))
REPORTED = {"adam": [1.50, 1.61, 1.72], "muon": [1.40, 1.51, 1.61], "soap": [1.52, 1.59, 1.73]}
TRIED = {0.02: 1.55, 0.05: 1.50, 0.1: 1.60, 0.3: 1.70}


def race_rows(tried=TRIED, reported=REPORTED, best=0.05, **more):
    rows = [row(Configuration(base, {"lr": rate}), 7, loss) for base in RACE.bases for rate, loss in tried.items()]
    return rows + [row(Configuration(base, {"lr": best}), seed, loss, **more)
                   for base, losses in reported.items() for seed, loss in enumerate(losses)]


def test_presets_are_compared_at_the_best_of_their_tuning_with_seeds_it_did_not_see():
    costs = {configuration_id(Configuration("muon", {"lr": 0.05})): {
        "optimizer_ms": 1.2345, "step_ms": 99.94, "state_bytes": 3 * 2**20, "peak_bytes": None}, "machine": "a laptop",
        "date": "2026-01-01"}
    results, tuning = tables(race_rows(train_s=30.0), RACE, costs)
    lines = texts(results)
    assert [(line["preset"], line["lr"], line["seeds"]) for line in lines] == [
        ("muon", "0.05", "3 of 3"), ("adam", "0.05", "3 of 3"), ("soap", "0.05", "3 of 3")]
    muon, adam, soap = lines
    mean = sum(REPORTED["muon"]) / 3
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in REPORTED["muon"]) / 2)
    half = 4.302653 * sd / math.sqrt(3)                                         # t(0.975, 2)
    assert muon["val_loss"] == f"{mean:.4f} ± {sd:.4f}"
    assert muon["95% interval"] == f"{mean - half:.4f} to {mean + half:.4f}"
    ps = {base: stats.ttest_rel(REPORTED[base], REPORTED["adam"]).pvalue for base in ("muon", "soap")}
    assert muon["p (Holm)"] == f"{2 * ps['muon']:.4f}" and soap["p (Holm)"] == f"{ps['soap']:.4f}"
    test = stats.ttest_rel(REPORTED["muon"], REPORTED["adam"]).confidence_interval(1 - 0.05 / 2)
    assert muon["simultaneous 95% interval"] == f"{test.low:+.4f} to {test.high:+.4f}"
    sd = math.sqrt(sum((gap - 0.01 / 3) ** 2 for gap in (0.02, -0.02, 0.01)) / 2)
    assert soap["verdict"] == ("no difference detected; the smallest detectable at n = 3 is "
                               f"{judge.detectable(3, sd, 0.05 / 2):.4f}")
    assert (muon["verdict"], adam["verdict"]) == ("better", "baseline")
    assert [muon[key] for key in ("optimizer ms", "step ms", "state MiB")] == ["1.23", "99.9", "3.0"]
    assert "peak MiB" not in muon and soap["step ms"] == ""
    said = "\n".join(results.notes)
    for part in ("4 draws each of a random search, with seed 7; reported: seeds 0, 1 and 2, which tuning did not see",
                 "Every preset had its 4 tuning trials.", "Holm for 2 comparisons", "packed alike",
                 "on a laptop, 2026-01-01"):
        assert part in said, part
    assert "edge" not in said and "Unequal" not in said
    assert [(line["preset"], line["lr"], line["val_loss"], line["chosen"]) for line in texts(tuning)][:5] == [
        ("adam", "0.05", "1.5000", "chosen"), ("adam", "0.02", "1.5500", ""), ("adam", "0.1", "1.6000", ""),
        ("adam", "0.3", "1.7000", ""), ("muon", "0.05", "1.5000", "chosen")]
    larger, _ = tables(race_rows(), RACE._replace(maximize=True))
    assert [(line["preset"], line["verdict"]) for line in texts(larger)][-1] == ("muon", "worse")


def test_without_a_baseline_no_preset_is_compared():
    results, _ = tables(race_rows(), RACE._replace(baseline=None))
    assert "verdict" not in results.columns and [line["preset"] for line in texts(results)] == ["muon", "adam", "soap"]
    assert not any("Holm" in note for note in results.notes)


def test_a_target_not_reached_is_counted_and_gives_no_verdict():
    rows = race_rows(target_step=100, target_train_s=10.0)
    for each in rows:
        if each["base"] == "soap" or (each["base"], each["seed"]) == ("muon", 2):
            each.update(target_step=None, target_train_s=None)
    results, _ = tables(rows, RACE)
    assert {line["preset"]: (line["steps to target"], line["seconds to target"]) for line in texts(results)} == {
        "muon": ("100 ± 0 (2 of 3)", "10.0 ± 0.0 (2 of 3)"), "adam": ("100 ± 0", "10.0 ± 0.0"),
        "soap": ("0 of 3", "0 of 3")}
    for each in rows:
        each["target_step"] = each["target_step"] if each["seed"] != 7 else 50
    results, _ = tables(rows, RACE._replace(metric="target_step"))
    assert [(line["preset"], line["verdict"]) for line in texts(results)] == [
        ("adam", "baseline"), ("muon", "target not reached at 1 of 3 seeds"),
        ("soap", "target not reached at 3 of 3 seeds")]


@pytest.mark.parametrize("base, status, seed, said", [
    ("muon", "crashed", 7, "Unequal tuning budgets, so the comparison is not fair: trials with a result are "
                           "adam 4 of 4, muon 3 of 4, soap 4 of 4."),
    ("muon", "pruned", 7, "Successive halving ended 1 of 12 tuning trials early"),
    ("muon", "not_finite", 7, "Every preset had its 4 tuning trials.")])
def test_what_tuning_had_is_told(base, status, seed, said):
    rows = race_rows()
    last = [each for each in rows if each["base"] == base and each["seed"] == seed][-1]
    last.update(status=status, val_loss=None)
    results, tuning = tables(rows, RACE)
    assert any(said in note for note in results.notes), results.notes
    assert [line["not finished"] for line in texts(tuning)].count(f"seed 7 {status}") == 1


def test_presets_without_results_say_why():
    rows = [each for each in race_rows() if each["base"] != "soap" or each["seed"] == 7]
    for each in rows:
        if each["base"] == "soap" and each["parameters"]["lr"] > 0.05:
            each["status"] = "running"
        if each["base"] == "muon" and each["seed"] == 1:
            each.update(status="not_finite", val_loss=None)
        if each["base"] == "adam" and each["seed"] == 0:
            each.update(status="crashed", val_loss=None)
    results, tuning = tables(rows, RACE)
    found = {line["preset"]: (line["verdict"], line["not finished"]) for line in texts(results)}
    assert found == {"adam": ("baseline", "seed 0 crashed"), "muon": ("diverged at 1 of 3 seeds", "seed 1 not_finite"),
                     "soap": ("no seed that both finished", "tuning: 2 of 4 trials ended")}
    assert [line["chosen"] for line in texts(tuning) if line["preset"] == "soap"] == ["", "", "", ""]
    crashed = [row(Configuration(base, {"lr": 0.1}), 7, None, "crashed") for base in RACE.bases]
    results, tuning = tables(crashed, RACE._replace(budget=1))
    assert {line["not finished"] for line in texts(results)} == {"no configuration has a val_loss at all tuning seeds"}
    assert "Every preset had 0 of its 1 tuning trials." in results.notes
    assert tables([], RACE)[0].rows and "tuning: 0 of 4 trials ended" in markdown(tables([], RACE)[0])


LOG = dict(distribution="log_uniform_values", spec={"min": 0.001, "max": 1.0})
UNIFORM = dict(distribution="uniform", spec={"min": 0.0, "max": 1.0})


@pytest.mark.parametrize("spec, best, tried, where", [
    (LOG, 0.0019, [], "in the lowest 10% of its range"), (LOG, 0.0021, [], ""), (LOG, 0.49, [], ""),
    (LOG, 0.52, [], "in the highest 10% of its range"),
    (UNIFORM, 0.52, [0.2, 0.52], ""), (UNIFORM, 0.52, [0.2, 0.3, 0.52], "the largest of 3 tried"),
    (UNIFORM, 0.2, [0.2, 0.3, 0.52], "the smallest of 3 tried"), (UNIFORM, 0.3, [0.2, 0.3, 0.52], ""),
    (dict(distribution="int_uniform", spec={"min": 1, "max": 5}), 5, [], "in the highest 10% of its range"),
    (dict(distribution="int_uniform", spec={"min": 1, "max": 5}), 1, [], "in the lowest 10% of its range"),
    (dict(distribution="int_uniform", spec={"min": 1, "max": 5}), 4, [], ""),
    (dict(distribution="normal", spec={"mu": 0.0, "sigma": 1.0}), 1.3, [], "in the highest 10% of its range"),
    (dict(distribution="normal", spec={"mu": 0.0, "sigma": 1.0}), 1.2, [], ""),
    (dict(distribution="categorical", spec={"values": [0.1, 0.0]}), 0.1, [], ""),
    (dict(distribution="categorical", spec={"values": [0.2, 0.1, 0.0]}), 0.2, [], "the largest of 3 values"),
    (dict(distribution="categorical", spec={"values": [0.2, 0.1, 0.0]}), 0.1, [], ""),
    (dict(distribution="categorical", spec={"values": ["a", "b", 3]}), 3, [], ""),
    (dict(distribution="constant", spec={"value": 3}), 3, [], "")], ids=str)
def test_a_best_value_at_an_edge_of_what_was_tried_is_pointed_out(spec, best, tried, where):
    assert at_edge(Parameter("lr", **spec), best, tried) == where


def test_the_edge_is_told_with_the_preset_and_the_value():
    results, _ = tables(race_rows(tried={0.05: 1.5, 0.1: 1.6, 0.2: 1.7, 0.3: 1.8}), RACE)
    assert any("adam: lr = 0.05 is the smallest of 4 tried; muon: lr = 0.05 is" in note for note in results.notes)
