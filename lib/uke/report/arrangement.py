"""What stands where in the report: verdicts first, the argument, an appendix; numbers of figures and tables, widths of columns."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

VERDICTS = "11_verdicts"  # its first table, the claims beside what was found, stands right after the abstract
# Sections that prepare or account for the study, whole, and tables and figures that an argument does not need to be followed.
RECIPES = "recipes_as_run"
APPENDIX = ("run", "tuning", "tuning_levels", RECIPES)
SUPPLEMENTS = {
    "table": (
        "recipes",
        "*_recipes",
        "methods",
        "*_methods",
        "*_settings",
        "*_effects",
        "*_metrics",
        "*_cost",
        "*_gains",
        "answers",
        "*_answers",
        "*_notes",
        "published",
        "*_published",
        "*_shape*",
        "*_locality",
        "*_leaks",
        "locality_example",
        "knowledge_scores",
    ),
    "figure": ("before", "components", "end_of_turn"),
}
LONG = 24  # rows; a longer table is a supplement whatever its name
SIZED = re.compile(
    r"(.+_)(\d+)"
)  # of tables that differ in a size alone, only the one of the largest is no supplement
WORDY = 60  # letters; a table with more than three columns of longer texts is set as one line for each of its cells
ROOM, STEP = (
    489.0,
    8.0,
)  # points: the width of a table in the PDF, and the bits in which it is shared
LETTER = 0.47  # of its size, the width of a letter on average
SIZES = (
    (8.6, 4.2),
    (7.6, 2.8),
    (6.8, 2.4),
    (6.2, 1.8),
)  # points: letters, and room beside a cell; the first that fits
_INSEPARABLE = re.compile(r"\[[−\d.,]+, [−\d.,]+\]|\bn = [\d,]+")


def split(sections: list[dict], directory: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """The table of verdicts (none or one), the sections of the main part, and those of the appendix, numbered.

    A section of the main part has `appended`, the figures and tables that stand in the appendix under its title. Figures that
    lack a file in `directory` become warnings.
    """
    sections = [_present(section, directory) for section in sections]
    found = [
        block
        for section in sections
        if section["notebook"] == VERDICTS
        for block in section["blocks"]
        if block["type"] == "table"
    ][:1]
    pointer = {"type": "finding", "text": "The verdicts are Table 1, after the abstract."}
    sections = [
        section | {"blocks": [pointer if block in found else block for block in section["blocks"]]}
        for section in sections
    ]
    main = [section for section in sections if section["notebook"] not in APPENDIX]
    rest = [section for section in sections if section["notebook"] in APPENDIX]
    supplements = [_supplements(section["blocks"]) for section in main]
    main = [
        section | {"blocks": [block for block in section["blocks"] if block not in own]}
        for section, own in zip(main, supplements)
    ]
    bare = {"question": "", "answer": "", "warnings": [], "checks": [], "appended": []}
    behind = [section | bare | {"blocks": own} for section, own in zip(main, supplements) if own]
    behind += [section | {"appended": []} for section in rest]
    verdicts = _number([{"blocks": found}], compact=True)[0]["blocks"]
    main, behind = _number(main, tables=len(found)), _number(behind, letter="A")
    moved = {section["notebook"]: section["blocks"] for section in behind}
    return (
        verdicts,
        [section | {"appended": moved.get(section["notebook"], [])} for section in main],
        behind,
    )


def _present(section: dict, directory: Path) -> dict:
    """The section without the figures that lack a file; each is a warning."""
    lost = [
        block
        for block in section["blocks"]
        if block["type"] == "figure"
        and not all(
            (directory / f"{block['name']}.{ending}").is_file() for ending in ("pdf", "png")
        )
    ]
    warnings = [
        f"The figure `{block['name']}` is missing from the directory: {block['caption']}"
        for block in lost
    ]
    return section | {
        "blocks": [block for block in section["blocks"] if block not in lost],
        "warnings": [*section["warnings"], *warnings],
    }


def _supplements(blocks: Iterable[Mapping]) -> list:
    """The blocks of a section of the main part that stand in the appendix."""
    sizes = [
        (found[1], int(found[2]))
        for block in blocks
        if block["type"] == "table" and (found := SIZED.fullmatch(block["name"]))
    ]
    smaller = {
        f"{stem}{size}"
        for stem, size in sizes
        if size < max(other for same, other in sizes if same == stem)
    }
    return [
        block
        for block in blocks
        if any(
            fnmatchcase(block["name"], pattern) for pattern in SUPPLEMENTS.get(block["type"], ())
        )
        or (block["type"] == "table" and (len(block["rows"]) > LONG or block["name"] in smaller))
    ]


def _number(
    sections: list[dict], tables: int = 0, letter: str = "", compact: bool = False
) -> list[dict]:
    """The sections with a label (`3`, or `A3` in the appendix) on each figure and table, and tables laid out."""
    counts = {"figure": 0, "table": tables}
    numbered = []
    for section in sections:
        blocks = []
        for block in section["blocks"]:
            if block["type"] in counts:
                counts[block["type"]] += 1
                block = block | {"label": f"{letter}{counts[block['type']]}"}
            blocks.append(block | lay_out(block, compact) if block["type"] == "table" else block)
        numbered.append(section | {"blocks": blocks})
    return numbered


def lay_out(block: Mapping[str, Any], compact: bool = False) -> dict:
    """How a table is set, where it is to be set otherwise than it is stored too.

    `columns`: points for each, 0 for what it takes; `size`, `inset`: of letters, beside a cell; `wraps`: how many columns are broken into lines; `full`: it is as wide as can be;
    `inline`: intervals stand beside their numbers and not below; `groups`: rows at which the first column changes.
    """
    head, rows, numeric = (block[key] for key in ("head", "rows", "numeric"))
    if (
        sum(
            max((len(row[place]["text"]) for row in rows), default=0) > WORDY
            for place in range(len(head))
        )
        > 3
    ):
        rows = [
            [row[0], {"text": name, "note": "", "best": False}, cell]
            for row in rows
            for name, cell in zip(head[1:], row[1:])
        ]
        head, numeric = [head[0], "", "Text"], [False] * 3
    noted = sum(any(row[place]["note"] for row in rows) for place in range(len(head)))
    first = SIZES[compact or len(head) > 8 or len(rows) > LONG]
    inline = noted <= 2 or sum(_needs(head, rows, (*first, True), numeric)[0]) <= 0.95 * ROOM
    for size, inset in SIZES[SIZES.index(first) :]:
        wanted, least = _needs(head, rows, (size, inset, inline), numeric)
        if sum(least) <= ROOM:
            break
    cells = [
        [1.15 * LETTER * size * len(name) for name in head],
        *([_points(cell, size, inline) for cell in row] for row in rows),
    ]
    fits = sum(wanted) <= 0.95 * ROOM
    columns = [0.0] * len(head) if fits else _share(wanted, least, cells, 2 * inset)
    firsts = [row[0]["text"] for row in rows]
    changes = [place for place in range(1, len(firsts)) if firsts[place] != firsts[place - 1]]
    return {
        "head": head,
        "rows": rows,
        "numeric": numeric,
        "inline": inline,
        "size": size,
        "inset": inset,
        "columns": [round(points, 1) for points in columns],
        "full": sum(wanted) > 0.9 * ROOM,
        "wraps": 0 if fits else sum(given < want * 0.9 for given, want in zip(columns, wanted)),
        "groups": changes if not numeric[0] and len(changes) < len(firsts) - 1 else [],
        "letters": sum(len(cell["text"]) for row in rows for cell in row),
    }


def _long(text: str) -> float:
    """Letters of a text, a capital as one and a half."""
    return len(text) + 0.5 * sum(letter.isupper() for letter in text)


def _points(cell: Mapping[str, Any], size: float, inline: bool) -> float:
    """About the width of a cell on one line."""
    text, note = LETTER * size * (_long(cell["text"]) + 1), 0.8 * LETTER * size * len(cell["note"])
    return text + note if inline else max(text, note)


def _needs(
    head: list, rows: list, setting: tuple[float, float, bool], numeric: list
) -> tuple[list[float], list[float]]:
    """Points that each column takes where no line is broken, and those it cannot do without: its longest word."""
    size, inset, inline = setting
    wanted, least = [], []
    for place, name in enumerate(head):
        cells = [_points(row[place], size, inline) for row in rows]
        words = (
            cells
            if numeric[place]
            else [
                LETTER * size * (min(_long(word), 30) + 1)
                for row in rows
                for word in re.split("[ \n]+", row[place]["text"])
            ]
        )
        bold = [
            1.15 * LETTER * size * len(word) for word in (name.replace("-", " ").split() or [""])
        ]
        wanted.append(max([*cells, 1.15 * LETTER * size * len(name)]) + 2 * inset)
        least.append(max([*words, *bold]) + 2 * inset)
    return wanted, least


def _share(
    wanted: list[float], least: list[float], cells: list[list[float]], inset: float
) -> list[float]:
    """Points for each column: what it must have, and then, bit by bit, more for the one that saves most lines."""

    def height(widths: list[float]) -> float:
        """Lines of all rows; a row is as high as its highest cell, smoothly, so that every bit of room counts."""
        return sum(
            sum(max(1.0, cell / (width - inset)) ** 4 for cell, width in zip(row, widths)) ** 0.25
            for row in cells
        )

    widths = list(least)
    while (left := ROOM - sum(widths)) > 0.5:
        bit, tried = min(STEP, left), {}
        for place, want in enumerate(wanted):
            if widths[place] < want:
                more = min(bit, want - widths[place])
                tried[place] = (
                    height([width + more * (other == place) for other, width in enumerate(widths)]),
                    more,
                )
        if not tried:
            break
        best = min(tried, key=lambda place: tried[place][0])
        widths[best] += tried[best][1]
    return widths


def hold_together(value: Any) -> Any:
    """The same JSON with no line break inside an interval or between n and its number."""
    if isinstance(value, dict):
        return {key: hold_together(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hold_together(each) for each in value]
    return (
        _INSEPARABLE.sub(lambda found: found[0].replace(" ", "\u00a0"), value)
        if isinstance(value, str)
        else value
    )
