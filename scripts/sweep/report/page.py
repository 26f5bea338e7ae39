"""report.html: one file with everything in it, plotly too, that asks the network for nothing."""
import json
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.sweep.parameter import in_yaml
from scripts.sweep.report.folder import Folder, difference, finite, reference
from scripts.sweep.report.groups import Group
from scripts.sweep.report.heading import heading
from scripts.sweep.report.plots import curves, figures
from scripts.sweep.tables import Cell, Table
from scripts.sweep.tables.cells import titled, value_cell

HERE = Path(__file__).parent
MOST_DIFFERENCES = 4                    # of a trial that are shown at once; those that the sweep gave it come first


def page(folder: Folder, found: Sequence[Group], tables: Sequence[Table]) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"in_yaml": in_yaml, "numeric": _numeric}
    drawn = figures(folder, found)
    return environment.get_template("page.html").render(
        heading=heading(folder), most=MOST_DIFFERENCES,
        date=time.strftime("%Y-%m-%d %H:%M %Z"), tables=tables, trials=trials(folder, found),
        figures=drawn, common=reference(folder), file=folder.text,
        data=script_json({"curves": curves(found), "figures": drawn}), plotly=get_plotlyjs(),
        css=(HERE / "page.css").read_text(), js=(HERE / "page.js").read_text())


def script_json(data) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace(
        "\u2029", "\\u2029")


def trials(folder: Folder, found: Sequence[Group]) -> dict:
    """A row a trial, with how its configuration differs from the common one between what it reached and where."""
    _, common = reference(folder)
    metric, searched, listed = folder.sweep.metric, folder.sweep.kind == "compare", []
    for group in found:
        for trial in group.trials:
            row = trial.row
            differs = difference(trial.config, common) if trial.config else []
            differs.sort(key=lambda each: each[0] not in row["parameters"])     # stable
            revision = (row["git_revision"] or "")[:10] + (" + changes" if row["git_dirty"] else "")
            search = [Cell("tuning" if group.tuning else "", int(group.tuning))] if searched else []
            before = [value_cell(group.label), *search,
                      Cell("" if row["seed"] is None else str(row["seed"]), row["seed"]),
                      Cell(row["status"].replace("_", " "), row["status"]), _cell(row["steps"], ",d"),
                      _cell(row[metric], ".4f" if "loss" in metric else ",.1f"), _cell(row["train_s"], ",.1f")]
            after = [Cell(row["device"] or "", row["device"]), Cell(revision, revision)]
            listed.append({"trial": row["trial"], "run": row["run"], "error": row["error"], "before": before,
                           "started": bool(trial.config), "differs": differs, "after": after})
    results = titled([metric, "train_s"])
    columns = ["trial", "what", *(["search"] * searched), "seed", "status", "step", *results, "differs in", "device",
               "revision"]
    return {"columns": columns, "numeric": [columns.index(name) for name in ("seed", "step", *results)],
            "rows": listed}


def _numeric(table: Table) -> list[int]:
    """Columns that hold numbers and nothing else."""
    columns = list(zip(*table.rows))
    return [place for place, cells in enumerate(columns)
            if {type(cell.value) for cell in cells} - {type(None)} in ({float}, {int}, {int, float})]


def _cell(value, form: str) -> Cell:
    return Cell("", None) if value is None else Cell(format(value, form), value if finite([value]) else None)
