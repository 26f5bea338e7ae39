"""The report of a sweep: from real trials and from folders written by hand, read in a headless browser."""
import json
import math
import re
import shutil

import pytest
import yaml
from matplotlib import pyplot
from matplotlib.image import imread

from scripts import report
from scripts.sweep import file, plan
from scripts.sweep.__main__ import entry
from scripts.sweep.candidates import comparisons
from scripts.sweep.file import Configuration
from scripts.sweep.plan import configuration_id
from scripts.sweep.report import write
from scripts.sweep.report.folder import read_folder, reference
from scripts.sweep.report.groups import MOST_POINTS, band, groups, line
from scripts.sweep.report.pictures import _curves, _final, effects, limits
from scripts.sweep.tables import markdown, tables
from tests.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.conftest import TINY, losses, train_here

EVIL = "</script><b>&amp;\"'`|*"
ENV = {"started": "2026-01-01T00:00:00+0000", "device": "A", "versions": {"torch": "2.13.0"}, "cores": 2}


@pytest.fixture(scope="module")
def real(corpus, tmp_path_factory):
    """Two rates with two seeds each, run for real."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(TINY.format(data=corpus, runs=folder / "runs"))
    (folder / "rates.yaml").write_text(f"method: grid\nbase: {folder / 'tiny.yaml'}\nseeds: [0, 1]\n"
                                       "baseline: {optim.hidden.lr: 0.002}\n"
                                       "parameters: {optim.hidden.lr: {values: [0.002, 0.1]}}\n")
    for trial in plan.plan(file.read(folder / "rates.yaml"), folder / "rates"):
        assert train_here("--config", plan.write(trial)) == 0          # in this process, which saves starting four
    assert entry([str(folder / "rates.yaml"), "--out", str(folder / "rates")]) == 0
    return folder / "rates"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no chromium and chromedriver here (Debian: apt install chromium-driver)")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def by_hand(out, text, trials, **env):
    """A sweep's folder; `trials` are (configuration, seed, status, {step: validation loss})."""
    out.mkdir(parents=True)
    (out / "sweep.yaml").write_text(text)
    sweep, rows = file.read(out / "sweep.yaml"), []
    for number, (each, seed, status, val) in enumerate(trials):
        name, run = f"{number:016x}", f"trials/{number:016x}/run" if val else None
        if run:
            (out / run).mkdir(parents=True)
            config = {"seed": seed, "runs_dir": str(out), "name": each.base, "optim": [{"name": "hidden"}]}
            (out / "trials" / name / "trial.yaml").write_text(yaml.safe_dump(config | each.parameters))
            (out / run / "env.json").write_text(json.dumps(ENV | {key: value[number % len(value)]
                                                                   for key, value in env.items()}))
            (out / run / "log.jsonl").write_text("".join(
                json.dumps({"step": step, "train_s": step / 10, **what}) + "\n" for step, loss in val.items()
                for what in ([{"train_loss": loss}] if step else []) + [{"val_loss": loss}]))
        rows.append(dict(
            trial=name, configuration=configuration_id(each), base=each.base, parameters=each.parameters,
            baseline=each == sweep.baseline, seed=seed, status=status, steps=max(val, default=0), of_steps=20,
            val_loss=list(val.values())[-1] if val else None, val_loss_avg=None, target_step=None, target_train_s=None,
            train_s=max(val, default=0) / 10 if val else None, tokens_per_s=None, run=run, device="A" if val else None,
            git_revision="f" * 40 if val else None, git_dirty=bool(number) if val else None,
            error=f"exit code 1: {EVIL}" if status == "crashed" else None))
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture
def odd(tmp_path):
    """Of a sweep that is not finished: trials of every status, a name that is no name, losses that sort as numbers."""
    text = (f"method: grid\nbase: x.yaml\nseeds: [0, 1]\n"
            f"parameters: {{note: {{values: [{json.dumps(EVIL)}, b, c, d]}}}}\n")
    of = [Configuration("x.yaml", {"note": note}) for note in (EVIL, "b", "c", "d")]
    out = by_hand(tmp_path / "odd", text, [
        (of[0], 0, "finished", {0: 11., 10: 10.5, 20: 10.25}), (of[0], 1, "finished", {0: 11., 10: 9.5, 20: 9.5}),
        (of[1], 0, "not_finite", {0: 11., 10: math.nan}), (of[1], 1, "crashed", {}),
        (of[2], 0, "pruned", {0: 11., 10: 11., 15: 10.75}), (of[2], 1, "running", {0: 11., 10: 3.}),
        (of[3], 0, "finished", {0: 11., 10: 8., 20: 2.}), (of[3], 1, "stopped", {0: 11., 10: 8.})],
        device=["A", "B"], git_revision=["f" * 40, "e" * 40], val_data=[{"sha256": "a" * 64}, {"sha256": "b" * 64}])
    with open(out / "trials" / f"{5:016x}" / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 15, "train_')
    return out


RACE = """
method: random
budget: 2
tuning_seeds: [100]
seeds: [0, 1]
spaces:
  a/adamw.yaml: {optim.hidden.lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}}
  a/muon.yaml: {optim.hidden.lr: {distribution: log_uniform_values, min: 0.001, max: 0.1}}
parameters: {steps: {value: 20}}
"""


@pytest.fixture
def race(tmp_path):
    """One preset reported, of the other one draw diverged and nothing is chosen yet."""
    def of(preset, rate):
        return Configuration(preset, {"steps": 20, "optim.hidden.lr": rate})
    return by_hand(tmp_path / "race", RACE, [
        (of("a/adamw.yaml", .01), 100, "finished", {0: 5., 10: 3., 20: 2.5}),
        (of("a/adamw.yaml", .05), 100, "finished", {0: 5., 10: 3., 20: 2.75}),
        (of("a/muon.yaml", .01), 100, "not_finite", {0: 5., 10: math.inf}),
        (of("a/adamw.yaml", .01), 0, "finished", {0: 5., 10: 3., 20: 2.5}),
        (of("a/adamw.yaml", .01), 1, "finished", {0: 5., 10: 3., 20: 2.25})])


LADDER = """
method: grid
base: x.yaml
seeds: [0, 1, 2]
rungs: true
changes: {one: {a: 1}, two: {b: 1}, three <i>: {c: 1}}
parameters: {steps: {value: 20}}
"""


@pytest.fixture
def ladder(tmp_path):
    """A change lowers the loss by .25, another by .001 with more noise than that, a third raises it by .5."""
    def loss(each, seed):
        own = each.parameters
        return 3 + .1 * seed - own.get("a", 0) * (.25 + .001 * seed) + own.get("c", 0) * (.5 + .002 * seed) \
            - own.get("b", 0) * .001 * (-1)**seed
    (tmp_path / "ladder.yaml").write_text(LADDER)
    tried = {}
    for each in comparisons(file.read(tmp_path / "ladder.yaml")):
        tried |= {configuration_id(side): side for side in (each.against, each.of)}
    return by_hand(tmp_path / "ladder", LADDER, [(each, seed, "finished", {0: 5., 20: loss(each, seed)})
                                                 for each in tried.values() for seed in (0, 1, 2)])


# ---- what is written

def test_a_sweep_gets_its_report_from_its_folder_alone_wherever_that_is(real, tmp_path, capsys):
    out = shutil.copytree(real, tmp_path / "moved")
    assert report.main([str(out)]) == 0
    names = ["report.html", "report.md", "curves.png", "curves_seconds.png", "final.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert not list(out.glob(".*.part*"))
    said = (out / "report.md").read_text()
    assert all(f"({name})" in said for name in names[2:]) and f"    python -m scripts.sweep {out}/sweep.yaml" in said
    folder = read_folder(out)
    assert all(markdown(table) in said for table in tables(folder.rows, folder.sweep))
    for name in names[2:]:
        picture = imread(out / name)
        assert picture.shape[1] == 1152 and picture.std() > .05, name

    before = {name: (out / name).read_bytes() for name in names}
    (tmp_path / "file.yaml").write_text("# the same with a comment\n" + (out / "sweep.yaml").read_text())
    write(out, tmp_path / "file.yaml")
    assert f"    python -m scripts.sweep {tmp_path}/file.yaml --out {out}\n" in (out / "report.md").read_text()
    (tmp_path / "file.yaml").write_text((out / "sweep.yaml").read_text().replace("0.1", "0.3"))
    write(out, tmp_path / "file.yaml")
    assert f"    python -m scripts.sweep {out}/sweep.yaml --out {out}\n" in (out / "report.md").read_text()
    write(out)
    for name in names:
        now = re.sub(rb"Report of [-\d]+ [\d:]+", b"", (out / name).read_bytes())
        assert now == re.sub(rb"Report of [-\d]+ [\d:]+", b"", before[name]), name


def test_bands_are_means_over_the_seeds_at_steps_that_all_have(real, odd):
    found = groups(read_folder(real))
    assert [group.label for group in found] == ["lr 0.1", "lr 0.002 (baseline)"]
    for group in found:
        of_seeds = [losses(real / trial.row["run"]) for trial in group.trials]
        drawn = band(group, "val")
        assert drawn.steps == [0, 4, 8, 12] and drawn.n == 2
        for step, mean, low, high in zip(drawn.steps, drawn.mean, drawn.low, drawn.high):
            one, other = (each["val", step] for each in of_seeds)
            half = 12.7062047 * abs(one - other) / 2                  # t of one degree of freedom, sd / sqrt(2)
            assert mean == pytest.approx((one + other) / 2) and high - low == pytest.approx(2 * half, abs=1e-6)
    of = {group.words[0]: group for group in groups(read_folder(odd))}
    assert band(of["note = b"], "val").steps == [0] and band(of["note = c"], "val").steps == [0, 10]
    assert band(of["note = d"], "val").n == 1 and band(of["note = d"], "val").low is None


def test_long_training_curves_are_averaged_over_neighbours(tmp_path):
    each, steps = Configuration("x.yaml", {"a": 1}), 2 * MOST_POINTS
    out = by_hand(tmp_path / "long", "method: grid\nbase: x.yaml\nparameters: {a: {values: [1]}}",
                  [(each, 0, "finished", {step: float(step % 2) for step in range(1, steps + 1)})])
    drawn = line(read_folder(out).trials[0], "train")
    assert len(drawn.steps) == MOST_POINTS and drawn.steps[:2] == [1.5, 3.5] and set(drawn.losses) == {.5}


def test_an_unfinished_sweep_says_what_is_missing_and_what_does_not_compare(odd):
    write(odd)
    said = (odd / "report.md").read_text()
    for each in ("1 of 8 trials is running", "1 of 8 trials is stopped",
                 "1 of 8 trials ended without a result: crashed", "1 of 8 trials ended without a result: not finite",
                 "Warning: mixed device: A, B; seconds do not", "Warning: mixed git revision: ",
                 "Warning: mixed val data: aaaaaaaaaaaa, bbbbbbbbbbbb; losses do not compare",
                 "6 of 8 trials ran with uncommitted changes"):
        assert each in said, each


def test_a_trial_shows_what_its_configuration_has_otherwise(real):
    folder = read_folder(real)
    name, common = reference(folder)
    assert name == "the baseline" and common["optim.hidden.lr"] == .002 and "seed" not in common
    write(real)
    page = (real / "report.html").read_text()
    assert page.count("optim.hidden.lr: 0.1 <del>[0.002]</del>") == 2 and page.count(">nothing</td>") == 2


def test_a_comparison_shows_its_draws_and_reports_other_seeds(race):
    names = [path.name for path in write(race)]
    assert "learning_rates.png" in names and "effects.png" not in names
    found = {(group.label, group.tuning): group for group in groups(read_folder(race))}
    assert set(found) == {("adamw", False), ("adamw: lr 0.01", True), ("adamw: lr 0.05", True), ("muon: lr 0.01", True)}
    assert band(found["adamw", False], "val").mean == [5, 3, 2.375]    # of the reporting seeds alone
    page = (race / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    draws = next(figure for figure in data["figures"] if figure["id"] == "learning-rates")
    assert draws["layout"]["xaxis"]["type"] == "log" and "Not shown: 1 draw without a result." in draws["note"]
    (adamw,) = draws["data"]
    assert adamw["x"] == [.01, .05] and adamw["y"] == [2.5, 2.75] and adamw["marker"]["line"]["width"] == [3, 0]
    said = (race / "report.md").read_text()
    assert "a/muon.yaml: 1 of 2 configurations tried" in said
    assert "a/muon.yaml: no configuration chosen yet" in said and "tuning: 100" in said


def test_a_ladder_has_its_effects_by_size_with_the_tables_intervals_and_verdicts(ladder):
    assert [path.name for path in write(ladder) if path.suffix == ".png"] == ["final.png", "effects.png"]
    folder = read_folder(ladder)
    together, alone, left_out, rungs = effects(folder).values()
    assert [(each.name, each.is_detected) for each in alone] == [("three <i>", True), ("one", True), ("two", False)]
    assert alone[1].effect.difference == pytest.approx(-.251)
    assert [each.name for each in together + left_out] == ["all", "without three <i>", "without one", "without two"]
    made = tables(folder.rows, folder.sweep)
    assert [table.title for table in made[:4]] == list(effects(folder))
    for family, table in zip((together, alone, left_out, rungs), made):
        for each, row in zip(family, table.rows):
            texts = [cell.text for cell in row]
            assert texts[0] == each.name and f"{each.effect.test.low:+.4f} to {each.effect.test.high:+.4f}" in texts
    data = json.loads(re.search(r'id="data">(.*?)</script>', (ladder / "report.html").read_text())[1])
    by_id = {figure["id"]: figure["data"][0]["y"] for figure in data["figures"]}
    assert list(by_id) == ["final", "effects-all-together", "effects-added-alone", "effects-left-out-of-all",
                           "effects-rung"]
    assert by_id["effects-added-alone"] == ["three &lt;i&gt;", "one", "two"]
    assert by_id["effects-left-out-of-all"][0] == "without three &lt;i&gt;"
    means = next(figure["data"][1] for figure in data["figures"] if figure["id"] == "final")
    assert [symbol == "circle-open" for symbol in means["marker"]["symbol"]] == ["all but" in y for y in means["y"]]
    assert by_id["effects-rung"] == ["one", "two", "three &lt;i&gt;"]


def test_a_diverged_draw_does_not_set_the_axis():
    assert limits([2., 2.1, 2.2, 2.3, 900., math.inf]) == (2., pytest.approx(2.6))
    assert limits([2., 2.]) == (2., 2.001)


def test_a_curve_much_longer_than_the_others_leaves_the_picture_and_says_how_far_it_goes(tmp_path):
    of = [Configuration("x.yaml", {"a": a}) for a in (1, 2, 3)]
    for name, longest, end in (("near", 30, None), ("far", 50, 30)):
        out = by_hand(tmp_path / name, "method: grid\nbase: x.yaml\nparameters: {a: {values: [1, 2, 3]}}", [
            (each, 0, "finished", {0: 5., 10 * last: 2.}) for each, last in zip(of, (10, 20, longest))])
        figure = _curves(pyplot, groups(read_folder(out)), seconds=True)
        axes, = figure.axes
        assert (axes.get_xlim()[1] == end) == (end is not None)
        assert [each.get_text() for each in axes.get_legend().texts] == [
            "a 1", "a 2", "a 3 (to 50 s)" if end else "a 3"]
        pyplot.close(figure)


def test_marks_of_what_a_ladder_leaves_out_are_hollow(ladder):
    folder = read_folder(ladder)
    figure = _final(pyplot, folder, groups(folder))
    axes, = figure.axes
    hollow = [each.get_markerfacecolor() == "white" for each in axes.lines if len(each.get_xdata()) == 1]
    assert hollow == ["all but" in label.get_text() for label in axes.get_yticklabels()] and 0 < sum(hollow) < 8
    pyplot.close(figure)


# ---- the page in a browser

def open_page(browser, out):
    write(out)
    browser.open(out / "report.html")
    browser.until("return document.querySelectorAll('#curves .scatterlayer .trace').length > 0")
    assert browser.errors() == []
    tools = browser.run("return [...document.querySelectorAll('#curves .modebar-btn')].map(each => each.dataset.title)")
    assert "Zoom" in tools and not [each for each in tools if "Share" in each]      # which uploads the chart
    assert browser.run("return performance.getEntriesByType('resource').map(each => each.name)") == []


CURVES = "const plot = document.getElementById('curves'); "
POINT = CURVES + """const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
return [box.left + xaxis._offset + xaxis.d2p(8), box.top + yaxis._offset + yaxis.d2p(%s)]"""


def test_the_page_draws_curves_without_network_that_answer_the_mouse(browser, real):
    open_page(browser, real)
    best, _ = groups(read_folder(real))
    means = browser.run(CURVES + "return plot.data.filter(t => t.meta === 'mean').map(t => [t.name, t.x, t.y])")
    drawn = band(best, "val")
    assert [each[0] for each in means] == [group.label for group in groups(read_folder(real))]
    assert means[0][1] == [0, 4, 8, 12] and means[0][2] == pytest.approx(drawn.mean, rel=1e-5)
    bands = browser.run(CURVES + "return plot.data.filter(t => t.meta === 'band').map(t => [t.x, t.y])")
    assert bands[0] == [[0, 4, 8, 12, 12, 8, 4, 0], pytest.approx(drawn.high + drawn.low[::-1], rel=1e-5)]

    browser.run("document.getElementById('curves').scrollIntoView({block: 'center'})")
    browser.mouse(browser.run(POINT % drawn.mean[2]))
    hover = browser.until("return document.querySelector('#curves .hoverlayer .hovertext')?.textContent")
    for said in (best.label, "step 8", f"{drawn.mean[2]:.4f}", f"{drawn.low[2]:.4f} to {drawn.high[2]:.4f}", "n = 2",
                 "train loss ", *best.words):
        assert said in hover, hover

    left, right = browser.run(CURVES + "return plot._fullLayout.xaxis.range")
    x, y = browser.run(POINT % drawn.mean[2])
    browser.mouse((x - 100, y - 60), "down", (x, y), (x + 100, y + 60), "up")
    browser.until(CURVES + f"const [low, high] = plot._fullLayout.xaxis.range; return low > {left} && high < {right}")
    low, high = browser.run(CURVES + "return plot._fullLayout.xaxis.range")
    assert left < low < 8 < high < right


def test_buttons_change_axes_and_curves_and_the_legend_hides(browser, real):
    open_page(browser, real)
    types = CURVES + "return [plot._fullLayout.xaxis.type, plot._fullLayout.yaxis.type]"
    assert browser.run(types) == ["linear", "linear"]
    browser.click("#set-logy")
    assert browser.run(types) == ["linear", "log"]
    browser.click("#set-logx")
    assert browser.run(types) == ["log", "log"]
    browser.click("#set-seeds-true")
    assert browser.run(CURVES + "return plot.data.map(t => [t.meta, t.x.length])") == [["seed", 4]] * 4
    browser.click("#set-x-seconds")
    browser.click("#set-loss-train")
    assert browser.run(CURVES + "return [plot.layout.xaxis.title.text, plot.layout.yaxis.title.text]") == [
        "seconds on the clock", "train loss (nats per token)"]
    seconds = [each["train_s"] for each in read_folder(real).trials[0].train]
    assert seconds in browser.run(CURVES + "return plot.data.map(t => t.x)")
    assert browser.run("return document.getElementById('set-logx').getAttribute('aria-pressed')") == "true"
    browser.click("#curves .legendtoggle")
    browser.until(CURVES + "return plot._fullData.filter(t => t.visible === 'legendonly').length === 2")    # its seeds


def test_a_click_or_a_key_sorts_a_table_by_numbers_and_back(browser, odd):
    open_page(browser, odd)
    rows = "[...document.querySelector('#trials').tBodies[0].rows]"
    column = f"return {rows}.map(row => row.cells[5].innerText)"
    head = "#trials th:nth-child(6) button"
    browser.click(head)
    ordered = ["2.0000", "3.0000", "8.0000", "9.5000", "10.2500", "10.7500"]
    assert browser.run(column)[:6] == ordered and sorted(browser.run(column)[6:]) == ["", "nan"]
    browser.click(head)
    assert browser.run(column)[:6] == ordered[::-1] and sorted(browser.run(column)[6:]) == ["", "nan"]
    assert browser.run("return document.querySelector('#trials [aria-sort]').innerText.trim()") == "val_loss"
    browser.keys("#trials th:nth-child(4) button", "\ue007")                     # Enter
    assert browser.run(column.replace("5", "3")) == ["crashed", *["finished"] * 3, "not finite", "pruned", "running",
                                                     "stopped"]
    browser.keys("#filter", "not finite")
    assert browser.run(f"return {rows}.filter(row => !row.hidden).map(row => row.cells[3].innerText)") == ["not finite"]


def test_what_files_say_is_text_on_the_page(browser, odd):
    open_page(browser, odd)
    assert browser.run("return document.querySelectorAll('body b, td script').length") == 0
    text = browser.run("return document.querySelector('#trials').innerText")
    assert f"note: c [{EVIL}]" in text
    legend = browser.run("return [...document.querySelectorAll('#curves .legendtext')].map(each => each.textContent)")
    assert f"note {EVIL}" in legend, legend


@pytest.mark.parametrize("kind, figures", [("race", ["learning-rates"]), ("ladder", [
    "final", "effects-all-together", "effects-added-alone", "effects-left-out-of-all", "effects-rung"])])
def test_the_figures_of_a_kind_are_drawn(browser, kind, figures, request):
    open_page(browser, request.getfixturevalue(kind))
    points = "return document.querySelectorAll('#%s .scatterlayer .point').length"
    for figure in figures:
        assert browser.until(points % figure) >= (1 if figure.endswith("together") else 2), figure
    names = browser.run("return [...document.querySelectorAll('.plot')].map(each => each.id)")
    assert names == ["curves", *figures]
    if kind == "race":
        shown = CURVES + "return plot.data.filter(t => t.meta === 'mean').map(t => t.name)"
        assert browser.run(shown) == ["adamw"]
        browser.click("#set-tuning")
        assert len(browser.run(shown)) == 4


# ---- refusals

@pytest.mark.parametrize("arguments, message", [
    (("there", "there"), "there is a sweep: report one at a time, without --record and --out"),
    (("there", "--out", "r.png"), "there is a sweep: report one at a time"),
    (("configs/sweeps/nothing.yaml",), "nothing: no such folder; run the sweep first"),
    (("bare",), "bare: no sweep.yaml in it, so no sweep's folder"),
    (("early",), "early: no results.jsonl in it"),
    (("torn",), "results.jsonl:1: no JSON; the sweep's command writes it anew"),
    (("torn/sweep.yaml",), "torn/results.jsonl:1: no JSON"),
    (("empty",), "results.jsonl: no trials in it"),
    (("there",), "there/results.jsonl:1: not what a sweep says of a trial"),
    (("number",), "number/results.jsonl:1: not what a sweep says of a trial"),
    (("latin",), "latin/results.jsonl: cannot be read: 'utf-8' codec"),
    (("none",), "none: neither a sweep (results.jsonl) nor a run (config.yaml) is in it"),
    ((".",), "in it; give one of its folders, bare, empty, latin, number, there, torn"),
])
def test_what_has_no_report_is_refused_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("there", '{"trial": 1}\n'), ("bare", ""), ("torn", '{"trial'), ("empty", ""), ("number", "5\n"),
                       ("latin", "\xe9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text(rows, encoding="latin-1")
        if name != "bare":
            (tmp_path / name / "sweep.yaml").write_text("method: grid\nbase: x\nparameters: {a: {value: 1}}\n")
    (tmp_path / "none").mkdir()
    shutil.copytree(tmp_path / "there", tmp_path / "early", ignore=lambda *_: ["results.jsonl"])
    assert report.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err and not list(tmp_path.rglob("report*"))


def test_a_folder_that_cannot_be_written_to_is_named_and_left_as_it_was(race, capsys):
    (race / "report.md").mkdir()                                      # for a read-only disk, which root would not see
    assert report.main([str(race)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {race}: cannot be written to: ") and said.count("\n") == 1 and "report.md" in said
    assert not list(race.glob(".*part*"))
