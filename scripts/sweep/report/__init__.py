"""The report of a sweep, from its folder alone: report.html, report.md and pictures."""
from pathlib import Path


def write(out: Path) -> list[Path]:
    """Into the sweep's folder `out`; the files, each replaced in one go.

    Raises:
        ReportError, ConfigError: one line: `out` is no sweep's folder, or a damaged one.
    """
    from harness.rundir import write_text
    from scripts.sweep.report.folder import read_folder
    from scripts.sweep.report.groups import groups
    from scripts.sweep.report.markdown import text
    from scripts.sweep.report.page import page
    from scripts.sweep.report.pictures import draw
    from scripts.sweep.tables import tables
    folder = read_folder(out)
    found = groups(folder)
    of_results = tables(folder.rows, folder.sweep, folder.costs)
    pictures = draw(folder, found, out)
    write_text(out / "report.html", page(folder, found, of_results))
    write_text(out / "report.md", text(folder, of_results, pictures))
    return [out / "report.html", out / "report.md", *pictures]
