"""The report of a sweep, from its folder alone: report.html, report.md and pictures."""
from pathlib import Path


def write(out: Path, file: Path | None = None) -> list[Path]:
    """Into the sweep's folder `out`; the files, each replaced in one go.

    Args:
        file: what the sweep was asked for by, as in read_folder.

    Raises:
        ConfigError: one line: `out` is no sweep's folder, a damaged one, or one that cannot be written to.
    """
    from data.arguments import line_of
    from harness.rundir import write_text
    from harness.yaml_tree import ConfigError
    from scripts.sweep.report.folder import read_folder
    from scripts.sweep.report.groups import groups
    from scripts.sweep.report.markdown import text
    from scripts.sweep.report.page import page
    from scripts.sweep.report.pictures import draw
    from scripts.sweep.tables import tables
    folder = read_folder(out, file)
    found = groups(folder)
    of_results = tables(folder.rows, folder.sweep, folder.costs)
    try:
        pictures = draw(folder, found, out)
        write_text(out / "report.html", page(folder, found, of_results))
        write_text(out / "report.md", text(folder, of_results, pictures))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written to: {line_of(error)}; copy the folder to where it can") from None
    return [out / "report.html", out / "report.md", *pictures]
