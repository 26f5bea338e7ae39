"""The table of the presets in configs/records, made from the comments that open them.

    python -m scripts.records                 # writes docs/records.md

After its command a preset says what it is, and then, each on a line that begins with the word and may go on indented:

    # source: the log, in records/ of KellerJordan/modded-nanogpt (f411b3d)
    # published: 3.2785 at step 6200 from 10.9264, 22.3 min (216.3 ms a step), 8x H100, torch 2.4.1
    # data: 33 shards of FineWeb-10B
    # uncertain: what the sources leave open, and what was taken     (where there is something)
    # differs: in what a run of this preset is not that record's     (where it does)
"""
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "configs" / "records", ROOT / "docs" / "records.md"
KEYS = ("source", "published", "data", "uncertain", "differs")
PUBLISHED = re.compile(r"(?P<loss>[\d.]+) at step (?P<step>\d+) from (?P<first>[\d.]+), "
                       r"(?P<time>[\d.]+ \w+) \((?P<ms>[\d.]+) ms a step\), (?P<hardware>.+)")
PARTS = {"": "Records", "2024-10-29": "Four optimizers on record 7's model and batch (2024-10-29)",
         "2024-11-06": "From record 8 to record 9 in 3,200 steps (2024-11-06)"}
HEAD = """# Track 1's records as presets

Made by `python -m scripts.records` from the comments in `configs/records/`. Losses and times are the published ones, of
one seed each; none is a measurement of this harness. "from" is the first validation loss. Sources are logs in
`records/track_1_short` of KellerJordan/modded-nanogpt (f411b3d). Run one with

    torchrun --standalone --nproc_per_node=8 train.py --config records/11-unet.yaml

What holds them to the records, without FineWeb: twenty steps of each, scaled down, equal a second reading of its
description to 1e-8 in float64 and to rounding in its own precision (`tests/test_record_mathematics.py`); full-size
initial losses (`tests/test_initial_losses.py`); token order, schedules, groups and counts (`tests/test_records.py`).

Where a preset extends another, what is said of that one holds for it too.
"""


class Preset(NamedTuple):
    path: Path
    about: str
    source: str
    published: dict[str, str]               # loss, step, first (loss), time, ms, hardware
    data: str
    uncertain: str | None
    differs: str | None


def read(path: Path) -> Preset:
    """What the opening comments of a preset say.

    Raises:
        ValueError: a word is missing, or `published` has another form.
    """
    said = {"about": ""}
    key = "about"
    for line in path.read_text(encoding="utf-8").splitlines()[2:]:
        if not line.startswith("#"):
            break
        word, _, rest = line[2:].partition(": ")
        if word in KEYS:
            key = word
            said[key] = rest
        else:
            said[key] = f"{said[key]} {line[1:].strip()}".strip()
    if missing := {"source", "published", "data"} - said.keys():
        raise ValueError(f"{path}: no line `# {min(missing)}: ...` at its top")
    if not (published := PUBLISHED.fullmatch(said["published"])):
        raise ValueError(f"{path}: published: expected `LOSS at step N from LOSS, TIME (N ms a step), HARDWARE`, "
                         f"got {said['published']!r}")
    return Preset(path, said["about"], said["source"], published.groupdict(), said["data"], said.get("uncertain"),
                  said.get("differs"))


def presets() -> list[Preset]:
    """Track 1's: the records in their order, then the ladders."""
    return [read(path) for part in PARTS for path in sorted((FOLDER / part).glob("*.yaml"))]


def page() -> str:
    """docs/records.md."""
    lines = [HEAD]
    for part, title in PARTS.items():
        own = [preset for preset in presets() if preset.path.parent == FOLDER / part]
        lines += [f"## {title}", "", "| preset | loss | at step | from | time, hardware | ms a step | shards |",
                  "|-|-|-|-|-|-|-|", *map(row, own), "", *map(notes, own), ""]
    return "\n".join(lines).rstrip() + "\n"


def row(preset: Preset) -> str:
    p = preset.published
    return (f"| `{preset.path.relative_to(FOLDER.parent)}` | {p['loss']} | {int(p['step']):,} | {p['first']} | "
            f"{p['time']}, {p['hardware']} | {p['ms']} | {preset.data.split()[0]} |")


def notes(preset: Preset) -> str:
    log, _, more = preset.source.removeprefix("track_1_short/").partition(" ")
    said = [preset.about, f"Source: `{log}`{more and ' ' + more}.",
            *(f"{word.capitalize()}: {text}" for word in ("uncertain", "differs") if (text := getattr(preset, word)))]
    return f"- **{preset.path.stem}.** {' '.join(said)}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
