"""report.md: the heading, the pictures and the tables, for a pull request or a README."""
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.sweep.report.folder import Folder
from scripts.sweep.report.heading import heading
from scripts.sweep.tables import Table, markdown


def text(folder: Folder, tables: Sequence[Table], pictures: Mapping[Path, str]) -> str:
    head = heading(folder)
    lines = [f"# {plain(head.title)}", head.what, "\n".join(f"    {command}" for command in head.commands)]
    lines += [f"> Warning: {plain(each)}" for each in head.warnings]
    if head.missing:
        lines.append("Unfinished:\n\n" + "\n".join(f"- {plain(each)}" for each in head.missing))
    lines.append("| | |\n|-|-|\n" + "\n".join(f"| {key} | {plain(value)} |" for key, value in head.facts))
    lines += [f"![{what}]({path.name})" for path, what in pictures.items()]
    lines += map(markdown, tables)
    lines.append(f"Report of {time.strftime('%Y-%m-%d %H:%M %Z')}; the second command also writes report.html, with "
                 "curves to zoom into.")
    return "\n\n".join(filter(None, lines)) + "\n"


def plain(said: str) -> str:
    """Text that Markdown takes for text."""
    return re.sub(r"([\\`*<>\[\]#|]|\b_|_\b)", r"\\\1", " ".join(said.split()))
