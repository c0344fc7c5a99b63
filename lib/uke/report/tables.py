"""Tables: scores with intervals, cells that are missing, and one table saved as CSV, LaTeX and Markdown."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from uke.errors import InputError, nearest
from uke.files import write_atomic
from uke.report.numerals import MISSING, Score, absent, number, places
from uke.results.stats import interval

REFERENCES = ("no edit", "floor")
KIND_ORDER = (
    "original",
    "paraphrase",
    "detail",
    "multi_hop",
    "rel_doc",
    "rand_doc",
    "struct_trip",
    "near_triple",
    "general",
)
LABELS = {
    "original": "Original",
    "paraphrase": "Paraphrase",
    "detail": "Details",
    "multi_hop": "Multi-hop",
    "rel_doc": "RelDoc",
    "rand_doc": "RandDoc",
    "struct_trip": "StructTrip",
    "near_triple": "Near triples",
    "general": "General skill",
    "reading": "Reading",
    "average": "Average",
    "last_prompt_token": "last prompt token",
    "target_tokens": "all target tokens",
    "first_half": "first half",
    "second_half": "second half",
    "detail_held_out": "Details, held out",
    "written": "Written",
    "kept": "Kept",
    "loss_scope": "loss scope",
    "chat_template": "chat template",
    "end_of_turn": "end of turn",
    **{f"eighth_{place}": f"eighth {place}" for place in range(1, 9)},
}
_WORDED = (
    "kind",
    "level",
    "factor",
    "loss_scope",
    "layers",
    "examination",
)  # columns whose cells are set in the words of LABELS
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "[": "{[}",
        "]": "{]}",
        "−": r"\ensuremath{-}",
        "×": r"\ensuremath{\times}",
        "±": r"\ensuremath{\pm}",
        "≥": r"\ensuremath{\geq}",
        "≤": r"\ensuremath{\leq}",
        "≈": r"\ensuremath{\approx}",
        "→": r"\ensuremath{\rightarrow}",
        "µ": r"\ensuremath{\mu}",
        "μ": r"\ensuremath{\mu}",
        "\n": " ",
        "⁻": r"\textsuperscript{\ensuremath{-}}",
        **{digit: rf"\textsuperscript{{{place}}}" for place, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }
)
# In a cell of a Markdown table these would end the cell, start markup or become HTML.
_MARKDOWN = str.maketrans(
    {"|": r"\|", "*": r"\*", "_": r"\_", "`": r"\`", "<": "&lt;", "&": "&amp;", "\n": " "}
)


def require(frame: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """InputError naming the first of `columns` that the frame lacks, or that the frame has no row."""
    for column in columns:
        if column not in frame.columns:
            raise InputError(
                f"{what}: no column '{column}'{nearest(column, map(str, frame.columns))}"
            )
    if frame.empty:
        raise InputError(f"{what}: no rows to show")


def summarise(frame: pd.DataFrame, by: Sequence[str], what: str = "summarise") -> pd.DataFrame:
    """Mean of `score` with its 95 % bootstrap interval for each group of `by`: columns by + mean, low, high, n.

    Probes of one edit are averaged first; the units drawn are batches where the frame has `batch`, else edits. A frame
    that already has `mean`, `low` and `high` is taken as it is. Raises InputError for a missing column or score.
    """
    by = list(by)
    if {"mean", "low", "high"} <= set(frame.columns):
        require(frame, by, what)
        return frame.assign(n=frame.get("n", pd.NA)).reset_index(drop=True)
    require(frame, [*by, "edit", "score"], what)
    unit = "batch" if "batch" in frame.columns else "edit"
    edits = (
        frame.groupby([*by, *dict.fromkeys((unit, "edit"))], sort=False, observed=True)["score"]
        .mean()
        .reset_index()
    )
    rows = []
    for key, group in edits.groupby(by, sort=False, observed=True):
        found = interval(group["score"].tolist(), group[unit].tolist())
        rows.append([*key, found.mean, found.low, found.high, found.n])
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def ordered(values: Iterable[Any], first: Sequence[str] = ()) -> list:
    """The distinct values: those of `first` in its order, then the others as they come."""
    values = list(dict.fromkeys(values))
    return [value for value in first if value in values] + [
        value for value in values if value not in first
    ]


def grid_gaps(
    frame: pd.DataFrame, by: str | Sequence[str], expected: Iterable[Any], edits: int | None = None
) -> list[str]:
    """What a grid lacks, one sentence for each cell of `expected` (its values of `by`) without all of its edits.

    `frame` has the columns by and edit. A cell should have `edits` edits, or as many as the fullest of `expected` has.
    """
    by = [by] if isinstance(by, str) else list(by)
    if lost := [column for column in [*by, "edit"] if column not in frame.columns]:
        raise InputError(
            f"grid_gaps: no column '{lost[0]}'{nearest(lost[0], map(str, frame.columns))}"
        )
    counts = {
        key: own["edit"].nunique()
        for key, own in frame.groupby(by, sort=False, observed=True, dropna=False)
    }
    found = {
        tuple(None if absent(one) else one for one in key): int(count)
        for key, count in counts.items()
    }
    cells = [tuple(cell) if isinstance(cell, (tuple, list)) else (cell,) for cell in expected]
    full = max((found.get(cell, 0) for cell in cells), default=0) if edits is None else edits
    sentences = []
    for cell in cells:
        name = ", ".join(
            str(value)
            if column == by[0]
            else f"{column.replace('_', ' ')} {LABELS.get(value, value)}"
            for column, value in zip(by, cell)
        )
        if not found.get(cell):
            sentences.append(f"{name}: no rows, so its cell is a dash.")
        elif found[cell] < full:
            sentences.append(
                f"{name}: {found[cell]} of {full} edits, so its mean is over fewer edits than those beside it."
            )
    return sentences


def scores(frame: pd.DataFrame, by: str = "method", expected: Sequence[str] = ()) -> pd.DataFrame:
    """Table of scores: one row for each `by`, one column of `Score` cells for each kind, the best of a column marked.

    `frame` has the columns by, kind, edit, score (see `summarise`). Rows called as in REFERENCES are never the best; an
    `expected` row without a score is there all the same, with dashes.
    """
    summary = summarise(frame, [by, "kind"], "scores").set_index([by, "kind"])
    names = ordered([*summary.index.get_level_values(by), *expected], expected)
    names = [name for name in names if name not in REFERENCES] + [
        name for name in REFERENCES if name in names
    ]
    table = pd.DataFrame({by: names})
    for kind in ordered(summary.index.get_level_values("kind"), KIND_ORDER):
        found = summary.xs(kind, level="kind")
        rivals = [round(mean, 2) for name, mean in found["mean"].items() if name not in REFERENCES]
        cells = []
        for name in names:
            if name not in found.index:
                cells.append(None)
                continue
            mean, low, high = found.loc[name, ["mean", "low", "high"]]
            best = len(rivals) > 1 and name not in REFERENCES and round(mean, 2) == max(rivals)
            cells.append(Score(mean, low, high, best))
        table[kind] = pd.Series(cells, dtype=object)
    return table


def texts(column: pd.Series) -> list[str]:
    """The cells of a column in print, floats with the same decimals throughout the column."""
    values = [
        value
        for value in column
        if isinstance(value, Real) and not isinstance(value, Integral) and not absent(value)
    ]
    decimals = None
    if values and max(map(abs, values)) >= 0.1:
        whole = max(map(abs, values)) > 1 and all(float(value).is_integer() for value in values)
        decimals = 0 if whole else places(*values)
    return [_text(value, decimals) for value in column]


def _text(value: Any, decimals: int | None) -> str:
    if absent(value):
        return MISSING
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real):
        text = number(value, decimals)
        hidden = value > 0 and decimals and not text.strip("0.")
        return f"< {10**-decimals:.{decimals}f}" if hidden else text
    return str(value)


def save(frame: pd.DataFrame, directory: str | Path, name: str, caption: str) -> list[Path]:
    """Write `name`.csv (plain numbers), .tex (booktabs) and .md; the paths. A named index becomes columns."""
    frame = _flat(frame)
    directory = Path(directory)
    contents = {
        "csv": _csv(frame),
        "tex": _latex(frame, name, caption),
        "md": _markdown(frame, caption),
    }
    return [write_atomic(directory / f"{name}.{ending}", text) for ending, text in contents.items()]


def cells(frame: pd.DataFrame) -> dict:
    """The table in print, as JSON: head, numeric (one flag a column), rows of cells {text, note, best}."""
    frame = _flat(frame)
    columns = [_cells(frame[column]) for column in frame]
    return {
        "head": [_head(LABELS.get(column, str(column).replace("_", " "))) for column in frame],
        "numeric": [_numeric(frame[column]) for column in frame],
        "rows": [list(row) for row in zip(*columns)],
    }


def _head(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame if frame.index.names == [None] else frame.reset_index()
    if not frame.columns.is_unique:
        raise InputError("table: two columns have the same name")
    return frame.astype(object)


def _numeric(column: pd.Series) -> bool:
    values = [value for value in column if not absent(value)]
    return bool(values) and all(
        isinstance(value, (Real, Score)) and not isinstance(value, bool) for value in values
    )


def _cells(column: pd.Series) -> list[dict]:
    return [
        {"text": value.text, "note": value.note, "best": value.best}
        if isinstance(value, Score)
        else {
            "text": LABELS.get(text, text) if column.name in _WORDED else text,
            "note": "",
            "best": False,
        }
        for value, text in zip(column, texts(column))
    ]


def _csv(frame: pd.DataFrame) -> str:
    plain = {}
    for name, column in frame.items():
        plain[name] = [value.mean if isinstance(value, Score) else value for value in column]
        if any(isinstance(value, Score) for value in column):
            for end in ("low", "high"):
                plain[f"{name}_{end}"] = [getattr(value, end, None) for value in column]
    return pd.DataFrame(plain).to_csv(index=False, lineterminator="\n")


def _latex(frame: pd.DataFrame, name: str, caption: str) -> str:
    table = cells(frame)
    rows = [[_latex_cell(cell) for cell in row] for row in table["rows"]]
    shown = pd.DataFrame(rows, columns=[head.translate(_LATEX) for head in table["head"]])
    text = shown.style.hide(axis="index").to_latex(
        hrules=True,
        caption=caption.replace("`", "").translate(_LATEX),
        label=f"tab:{name}",
        position="t",
        position_float="centering",
        column_format=_column_format(table),
    )
    # Eight kinds side by side fit the width of a page only when set tightly.
    tight = "\\centering\n\\small\n\\setlength{\\tabcolsep}{3pt}"
    return text.replace("\\centering", tight, 1) if len(table["head"]) > 6 else text


def _column_format(table: dict) -> str:
    """Right-aligned numbers, and paragraphs that share the room the other columns leave where texts are long."""
    columns = list(zip(table["head"], table["numeric"], *table["rows"]))
    lengths = [
        max(len(head), *(len(cell["text"]) for cell in rows), 0) for head, _, *rows in columns
    ]
    long = [length > 40 and not numeric for length, numeric in zip(lengths, table["numeric"])]
    used = sum(0.012 * length + 0.03 for length, wide in zip(lengths, long) if not wide)
    paragraph = f"p{{{max(0.25, 0.93 - used) / max(sum(long), 1):.2f}\\linewidth}}"
    return "".join(
        paragraph if wide else "r" if numeric else "l"
        for wide, numeric in zip(long, table["numeric"])
    )


def _latex_cell(cell: dict) -> str:
    text = cell["text"].translate(_LATEX)
    text = rf"\textbf{{{text}}}" if cell["best"] else text
    if not cell["note"]:
        return text
    return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{text}\\[-2pt]{{\scriptsize {cell['note'].translate(_LATEX)}}}\end{{tabular}}"


def _markdown(frame: pd.DataFrame, caption: str) -> str:
    table = cells(frame)
    rule = ["---:" if numeric else ":---" for numeric in table["numeric"]]
    rows = [[_markdown_cell(cell) for cell in row] for row in table["rows"]]
    lines = [[head.translate(_MARKDOWN) for head in table["head"]], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n"


def _markdown_cell(cell: dict) -> str:
    text = cell["text"].translate(_MARKDOWN)
    return " ".join(filter(None, (f"**{text}**" if cell["best"] else text, cell["note"])))
