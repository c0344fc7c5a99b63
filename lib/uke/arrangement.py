"""What stands where in the report: verdicts first, the argument, an appendix; numbers of figures and tables, widths of columns."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

VERDICTS = "11_verdicts"  # its first table, the claims beside what was found, stands right after the abstract
# Sections that prepare or account for the study, whole, and tables and figures that an argument does not need to be followed.
APPENDIX = ("run", "tuning", "tuning_levels")
SUPPLEMENTS = {
    "table": (
        "recipes", "*_recipes", "methods", "*_methods", "*_settings", "*_effects", "*_metrics", "*_cost", "*_gains", "answers", "*_answers",
        "*_notes", "published", "*_published", "*_shape*", "*_locality", "*_leaks", "locality_example", "knowledge_scores",
    ),
    "figure": ("components", "end_of_turn"),
}  # fmt: skip
LONG = 24  # rows; a longer table is a supplement whatever its name
SIZED = re.compile(r"(.+_)(\d+)")  # of tables that differ in a size alone, only the one of the largest is no supplement
ROOM = 489.0  # points: the width of a table in the PDF
_INSEPARABLE = re.compile(r"\[[−\d.,]+, [−\d.,]+\]|\bn = [\d,]+")


def split(sections: list[dict], directory: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """The table of verdicts (none or one), the sections of the main part, and those of the appendix, numbered.

    A section of the main part has `appended`, the figures and tables that stand in the appendix under its title. Figures that
    lack a file in `directory` become warnings.
    """
    sections = [_present(section, directory) for section in sections]
    found = [block for section in sections if section["notebook"] == VERDICTS for block in section["blocks"] if block["type"] == "table"][:1]
    pointer = {"type": "finding", "text": "The verdicts are Table 1, after the abstract."}
    sections = [section | {"blocks": [pointer if block in found else block for block in section["blocks"]]} for section in sections]
    main = [section for section in sections if section["notebook"] not in APPENDIX]
    rest = [section for section in sections if section["notebook"] in APPENDIX]
    supplements = [_supplements(section["blocks"]) for section in main]
    main = [section | {"blocks": [block for block in section["blocks"] if block not in own]} for section, own in zip(main, supplements)]
    bare = {"question": "", "answer": "", "warnings": [], "checks": [], "appended": []}
    behind = [section | bare | {"blocks": own} for section, own in zip(main, supplements) if own]
    behind += [section | {"appended": []} for section in rest]
    verdicts = _number([{"blocks": found}])[0]["blocks"]
    main, behind = _number(main, tables=len(found)), _number(behind, letter="A")
    moved = {section["notebook"]: section["blocks"] for section in behind}
    return verdicts, [section | {"appended": moved.get(section["notebook"], [])} for section in main], behind


def _present(section: dict, directory: Path) -> dict:
    """The section without the figures that lack a file; each is a warning."""
    lost = [
        block for block in section["blocks"]
        if block["type"] == "figure" and not all((directory / f"{block['name']}.{ending}").is_file() for ending in ("pdf", "png"))
    ]  # fmt: skip
    warnings = [f"The figure `{block['name']}` is missing from the directory: {block['caption']}" for block in lost]
    return section | {"blocks": [block for block in section["blocks"] if block not in lost], "warnings": [*section["warnings"], *warnings]}


def _supplements(blocks: Iterable[Mapping]) -> list:
    """The blocks of a section of the main part that stand in the appendix."""
    sizes = [(found[1], int(found[2])) for block in blocks if block["type"] == "table" and (found := SIZED.fullmatch(block["name"]))]
    smaller = {f"{stem}{size}" for stem, size in sizes if size < max(other for same, other in sizes if same == stem)}
    return [
        block for block in blocks
        if any(fnmatchcase(block["name"], pattern) for pattern in SUPPLEMENTS.get(block["type"], ()))
        or (block["type"] == "table" and (len(block["rows"]) > LONG or block["name"] in smaller))
    ]  # fmt: skip


def _number(sections: list[dict], tables: int = 0, letter: str = "") -> list[dict]:
    """The sections with a label (`3`, or `A3` in the appendix) on each figure and table, and tables laid out."""
    counts = {"figure": 0, "table": tables}
    numbered = []
    for section in sections:
        blocks = []
        for block in section["blocks"]:
            if block["type"] in counts:
                counts[block["type"]] += 1
                block = block | {"label": f"{letter}{counts[block['type']]}"}
            blocks.append(block | lay_out(block) if block["type"] == "table" else block)
        numbered.append(section | {"blocks": blocks})
    return numbered


def lay_out(block: Mapping[str, Any]) -> dict:
    """How a table is set: `inline`, intervals beside their numbers and not below; `groups`, rows where the first column changes;
    `size`, points of its letters; `columns`, for each the points it needs, or a share (negative) of what the others leave.
    """
    rows, heads = block["rows"], block["head"]
    noted = sum(any(row[column]["note"] for row in rows) for column in range(len(heads)))
    inline = noted <= 2
    size, inset = (8.6, 4.2) if len(heads) <= 8 else (7.6, 2.8) if len(heads) <= 11 else (6.8, 2.2)
    letter = 0.5 * size  # points, on average, a little more than it takes
    wanted, least = [], []
    for place, head in enumerate(heads):
        cells = [row[place] for row in rows]
        lengths = [len(cell["text"]) + (0.8 * len(cell["note"]) + 1 if inline else 0) for cell in cells]
        lengths += [0.8 * len(cell["note"]) for cell in cells]
        words = lengths if block["numeric"][place] else [len(word) for cell in cells for word in re.split(r"[ \n]+", cell["text"])]
        words = [*words, *(1.12 * len(word) for word in head.split())]
        wanted.append(max([*lengths, 1.12 * len(head)]) * letter + 2 * inset)
        least.append(min(max(words), 26) * letter + 2 * inset)
    firsts = [row[0]["text"] for row in rows]
    changes = [place for place in range(1, len(firsts)) if firsts[place] != firsts[place - 1]]
    groups = changes if not block["numeric"][:1] == [True] and len(changes) < len(firsts) - 1 else []
    return {"inline": inline, "groups": groups, "size": size, "inset": inset, "columns": _share(wanted, least), "letters": sum(len(cell["text"]) for row in rows for cell in row)}


def _share(wanted: list[float], least: list[float]) -> list[float]:
    """Points for each column where all get what they want; else what each must have, and shares (negative) for those that want more.

    Shares grow with the root of what is wanted, so that a column of sentences does not starve one of short phrases.
    """
    if sum(wanted) <= ROOM:
        return [round(points, 1) for points in wanted]
    open_ended = [want > need * 1.05 for want, need in zip(wanted, least)]
    left = max(ROOM - sum(least), 0.0)
    weights = [(want - need) ** 0.5 if free else 0.0 for want, need, free in zip(wanted, least, open_ended)]
    given = [need + left * weight / (sum(weights) or 1.0) for need, weight in zip(least, weights)]
    return [round(-points if free else points, 1) for points, free in zip(given, open_ended)]


def hold_together(value: Any) -> Any:
    """The same JSON with no line break inside an interval or between n and its number."""
    if isinstance(value, dict):
        return {key: hold_together(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hold_together(each) for each in value]
    return _INSEPARABLE.sub(lambda found: found[0].replace(" ", "\u00a0"), value) if isinstance(value, str) else value
