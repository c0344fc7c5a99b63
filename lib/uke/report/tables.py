"""Make tables: numbers in print, scores with intervals, gaps of a grid; one table as CSV and LaTeX.

table = tables.scores(scores, by="method")       # a row per method, a column per kind of probe
tables.save(table, paths.figures / "tables", "single", "Single edits: mean and 95 % interval.")
"""

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uke.data.edits import KINDS
from uke.errors import InputError
from uke.files import write_atomic
from uke.results.compare import label
from uke.results.stats import Score, ordered, require, summarise

__all__ = ["Score", "grid_gaps", "label", "number", "ordered", "save", "scores", "summarise"]

MISSING = "–"
REFERENCES = ("no edit", "floor")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LABELLED = ("kind", "level", "factor", "loss_scope", "layers", "examination")  # cells in words
_ESCAPED = re.compile(r"([&%$#_{}])")
_LATEX = {"−": "$-$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {"\\\\\n[": "\\\\\n{[}"}  # a bracket behind a line break would be an option of it
_LATEX |= {"→": r"$\rightarrow$", "μ": r"$\mu$", "µ": r"$\mu$", "⁻": r"\textsuperscript{$-$}"}
_LATEX |= {power: rf"\textsuperscript{{{at}}}" for at, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}


class Cell(NamedTuple):
    """A cell in print: its text, the interval beside it, whether it is its column's best."""

    text: str
    note: str = ""
    best: bool = False


def absent(value: Any) -> bool:
    """Return True for None, NaN and pandas' missing values."""
    whole = isinstance(value, (str, list, tuple, dict, Score))
    return value is None or (not whole and bool(pd.isna(value)))


def places(*values: float | None) -> int:
    """Return the decimals that give the largest of `values` two or three significant digits."""
    largest = max((abs(value) for value in values if not absent(value)), default=0)
    if not largest:
        return 2
    bounds = ((99.95, 0), (9.995, 1), (0.0995, 2), (0, 3))
    return next(decimals for bound, decimals in bounds if largest >= bound)


def number(value: float | None, decimals: int | None = None) -> str:
    """Print a number: proper minus, separated thousands, powers of ten for tiny ones, a dash.

    >>> number(-0.25), number(12000), number(5e-4), number(None)
    ('−0.25', '12,000', '5 × 10⁻⁴', '–')
    """
    if absent(value):
        return MISSING
    if isinstance(value, Integral):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "−∞" if value < 0 else "∞"
    if decimals is None and 0 < abs(value) < 1e-2:
        digits, power = f"{value:.1e}".split("e")
        digits = digits.removesuffix(".0").replace("-", "−")
        return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPTS)}"
    text = f"{value:,.{places(value) if decimals is None else decimals}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.lstrip("-")


def bracket(low: float, high: float, decimals: int | None = None) -> str:
    """Print an interval: [low, high]."""
    decimals = places(low, high) if decimals is None else decimals
    return f"[{number(float(low), decimals)}, {number(float(high), decimals)}]"


def printed_score(score: Score) -> Cell:
    """Print a score and its interval with the same decimals, two at most."""
    decimals = min(2, places(score.mean, score.low, score.high))
    note = "" if absent(score.low) else bracket(score.low, score.high, decimals)
    return Cell(number(score.mean, decimals), note, score.best)


def scores(frame: pd.DataFrame, by: str = "method", expected: Sequence[str] = ()) -> pd.DataFrame:
    """Return a row for each `by` and a column of `Score` cells for each kind, the best one marked.

    `frame` has the columns by, kind, edit, score (see `summarise`). Rows called as in REFERENCES
    come last and are never the best. An `expected` row without a score has dashes.
    """
    summary = summarise(frame, [by, "kind"], "scores").set_index([by, "kind"])
    names = ordered([*summary.index.get_level_values(by), *expected], expected)
    names = [name for name in names if name not in REFERENCES] + [
        name for name in REFERENCES if name in names
    ]
    table = pd.DataFrame({by: names})
    for kind in ordered(summary.index.get_level_values("kind"), KINDS):
        of_kind = summary.xs(kind, level="kind")
        means = of_kind["mean"].drop(list(REFERENCES), errors="ignore").round(2)
        best = means.max() if len(means) > 1 else None
        cells = [
            Score(*of_kind.loc[name, ["mean", "low", "high"]], best=means.get(name) == best)
            if name in of_kind.index
            else None
            for name in names
        ]
        table[kind] = pd.Series(cells, dtype=object)
    return table


def grid_gaps(
    frame: pd.DataFrame, by: str | Sequence[str], expected: Iterable[Any], edits: int | None = None
) -> list[str]:
    """Return a sentence for each cell of `expected` (values of `by`) that lacks some of its edits.

    `frame` has by and edit. A cell should have `edits` edits, or as many as the fullest.
    """
    by = [by] if isinstance(by, str) else list(by)
    if not frame.empty:
        require(frame, [*by, "edit"], "grid_gaps")
    counts = frame.groupby(by, sort=False, observed=True, dropna=False)["edit"].nunique()
    counted = {
        tuple(None if absent(each) else each for each in np.atleast_1d(np.array(key, object))): n
        for key, n in counts.items()
    }
    cells = [tuple(cell) if isinstance(cell, (tuple, list)) else (cell,) for cell in expected]
    full = max((counted.get(cell, 0) for cell in cells), default=0) if edits is None else edits
    sentences = []
    for cell in cells:
        rest = [
            f"{column.replace('_', ' ')} {label(each)}"
            for column, each in zip(by, cell, strict=False)
        ]
        name = ", ".join([str(cell[0]), *rest[1:]])
        if not counted.get(cell):
            sentences.append(f"{name}: no rows, so its cell is a dash.")
        elif counted[cell] < full:
            fewer = "so its mean is over fewer edits than those beside it"
            sentences.append(f"{name}: {counted[cell]} of {full} edits, {fewer}.")
    return sentences


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a named index as columns; InputError where two have the same name."""
    frame = frame if frame.index.names == [None] else frame.reset_index()
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"table: two columns have the same name, '{twice}'")
    return frame


def head(column: Any) -> str:
    """Print the name of a column."""
    text = label(column)
    text = text if text != column else str(column).replace("_", " ")
    return text[:1].upper() + text[1:]


def numeric(column: pd.Series) -> bool:
    """Return True where a column has numbers (or scores) alone, which are set flush right."""
    values = [value for value in column if not absent(value)]
    numbers = (isinstance(each, (Real, Score)) and not isinstance(each, bool) for each in values)
    return bool(values) and all(numbers)


def cells(column: pd.Series) -> list[Cell]:
    """Print the cells of a column, floats with the same decimals throughout."""
    sizes = [abs(each) for each in column if isinstance(each, float) and not absent(each)]
    decimals = None
    if sizes and max(sizes) >= 0.1:
        whole = max(sizes) > 1 and all(each.is_integer() for each in sizes)
        decimals = 0 if whole else places(*sizes)
    words = label if column.name in _LABELLED else str
    return [
        printed_score(value) if isinstance(value, Score) else Cell(words(_text(value, decimals)))
        for value in column
    ]


def _text(value: Any, decimals: int | None) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real) or absent(value):
        text = number(value, decimals)
        hidden = not absent(value) and value > 0 and decimals and not text.strip("0.")
        return f"< {10**-decimals:.{decimals}f}" if hidden else text
    return str(value)


def printed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text, `0.93 [0.90, 0.96]` for a score: what a notebook shows."""
    frame = flat(frame).astype(object)
    columns = {name: cells(frame[name]) for name in frame}
    return pd.DataFrame(
        {name: [" ".join(f"{c.text} {c.note}".split()) for c in columns[name]] for name in frame}
    )


def save(frame: pd.DataFrame, directory: Path, name: str, caption: str) -> list[Path]:
    """Write `name`.csv (plain numbers) and `name`.tex (booktabs); return both paths."""
    frame = flat(frame)
    contents = {"csv": _csv(frame), "tex": _latex(frame.astype(object), name, caption)}
    return [
        write_atomic(Path(directory) / f"{name}.{ending}", text)
        for ending, text in contents.items()
    ]


def _csv(frame: pd.DataFrame) -> str:
    plain: dict[str, Iterable] = {}
    for name, column in frame.items():
        if not any(isinstance(value, Score) for value in column):
            plain[name] = column
            continue
        for part, end in (("", "mean"), ("_low", "low"), ("_high", "high")):
            plain[f"{name}{part}"] = [getattr(value, end, None) for value in column]
    return pd.DataFrame(plain).to_csv(index=False, lineterminator="\n")


def _latex(frame: pd.DataFrame, name: str, caption: str) -> str:
    """Set the table with pandas' Styler, every text escaped, the best of a column in bold."""
    heads = [head(column) for column in frame]
    columns = [cells(frame[column]) for column in frame]
    shown = printed(frame).set_axis(heads, axis="columns")
    widths = [max(map(len, shown[each]), default=0) for each in heads]
    aligned = ["r" if numeric(frame[column]) else "l" for column in frame]
    long = [width > 40 and side == "l" for width, side in zip(widths, aligned, strict=True)]
    # Long texts share the space that the other columns leave.
    left = 0.93 - sum(0.012 * w + 0.03 for w, wide in zip(widths, long, strict=True) if not wide)
    paragraph = rf"p{{{max(0.25, left) / max(sum(long), 1):.2f}\linewidth}}"
    bold = [["font-weight: bold" if cell.best else "" for cell in cells] for cells in columns]
    styler = (
        shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    )
    text = styler.apply(lambda column: bold[heads.index(column.name)]).to_latex(
        hrules=True,
        convert_css=True,
        caption=_ESCAPED.sub(r"\\\1", caption.replace("`", "")),
        label=f"tab:{name}",
        position="t",
        position_float="centering",
        column_format="".join(
            paragraph if wide else side for wide, side in zip(long, aligned, strict=True)
        ),
    )
    for letter, command in _LATEX.items():
        text = text.replace(letter, command)
    # Many columns fit the width of a page only when they are set tightly.
    tight = "\\centering\n\\small\n\\setlength{\\tabcolsep}{3pt}"
    return text.replace("\\centering", tight, 1) if len(columns) > 6 else text
