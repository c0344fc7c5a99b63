"""Make tables: numbers in print, scores with intervals; one table as CSV and LaTeX.

table = tables.scores(scores, by="method")       # a row per method, a column per kind of probe
tables.save(table, paths.figures / "tables", "single", "Single edits: mean and 95 % interval.")
"""

import math
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uke.data.edits import KINDS
from uke.files import write_atomic
from uke.results.compare import label
from uke.results.stats import Score, ordered, summarise

MISSING = "–"
REFERENCES = ("no edit", "floor", "ceiling")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LABELLED = ("kind", "level", "factor", "loss_scope", "layers", "examination")  # cells in words
_LATEX = {
    "\\\\\n[": "\\\\\n{[}",  # a bracket behind a line break would be an option of it
    **{"−": "$-$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"→": r"$\rightarrow$", "μ": r"$\mu$", "µ": r"$\mu$", "⁻": r"\textsuperscript{$-$}"},
    **{power: rf"\textsuperscript{{{at}}}" for at, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}


class Cell(NamedTuple):
    """A cell in print: its text, the interval beside it, whether it is its column's best."""

    text: str
    note: str = ""
    best: bool = False


def absent(value: Any) -> bool:
    """Return True for None, NaN and pandas' missing values."""
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))


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


def bracket(low: float, high: float, decimals: int) -> str:
    """Print an interval: [low, high]."""
    return f"[{number(float(low), decimals)}, {number(float(high), decimals)}]"


def printed_score(score: Score) -> Cell:
    """Print a score and its interval with the same decimals, two at most."""
    decimals = min(2, places(score.mean, score.low, score.high))
    note = "" if absent(score.low) else bracket(score.low, score.high, decimals)
    return Cell(number(score.mean, decimals), note, score.best)


def scores(frame: pd.DataFrame, by: str = "method") -> pd.DataFrame:
    """Return a row for each `by` and a column of `Score` cells for each kind, the best one marked.

    `frame` is as `summarise` needs it. REFERENCES come last, never the best.
    """
    summary = summarise(frame, [by, "kind"]).set_index([by, "kind"])
    names = list(summary.index.unique(by))
    names.sort(key=lambda name: name in REFERENCES and 1 + REFERENCES.index(name))
    table = pd.DataFrame({by: names})
    for kind in ordered(summary.index.get_level_values("kind"), KINDS):
        of_kind = summary.xs(kind, level="kind").reindex(names)
        means = of_kind["mean"].drop(list(REFERENCES), errors="ignore").round(2)
        best = means.max() if means.count() > 1 else None
        ends = of_kind[["mean", "low", "high"]].itertuples()
        cells = [Score(*each, best=means.get(name, np.nan) == best) for name, *each in ends]
        table[kind] = [None if absent(cell.mean) else cell for cell in cells]
    if "batch" in frame and frame.groupby("batch")["edit"].nunique().max() > 1:
        table["batches"] = [summary.xs(name, level=by)["n"].max() for name in names]
    return table


def head(column: Any) -> str:
    """Print the name of a column."""
    text = label(column)
    text = text if text != column else str(column).replace("_", " ").replace(" mib", " (MiB)")
    return text[:1].upper() + text[1:] if len(text) > 1 else text  # n stays n


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

    def cell(value: Any) -> Cell:
        if isinstance(value, Score):
            return printed_score(value)
        if isinstance(value, (bool, np.bool_)):
            return Cell("yes" if value else "no")
        if not (isinstance(value, Real) or absent(value)):
            return Cell(words(value))
        text = number(value, decimals)
        hidden = not absent(value) and value > 0 and decimals and not text.strip("0.")
        return Cell(f"< {10**-decimals:.{decimals}f}" if hidden else text)

    return [cell(value) for value in column]


def printed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text, `0.93 [0.90, 0.96]` for a score: what a notebook shows."""
    columns = {name: cells(column) for name, column in frame.astype(object).items()}
    return pd.DataFrame(columns).map(lambda cell: " ".join(f"{cell.text} {cell.note}".split()))


def save(
    frame: pd.DataFrame, directory: Path, name: str, caption: str, latex: bool = True
) -> list[Path]:
    """Write `name`.csv (plain numbers) and, for a table with numbers, `name`.tex (booktabs)."""
    path = Path(directory) / name
    saved = [write_atomic(path.with_name(f"{name}.csv"), _csv(frame))]
    if latex and any(numeric(frame[column]) for column in frame):
        text = _latex(frame.astype(object), name, caption)
        saved.append(write_atomic(path.with_name(f"{name}.tex"), text))
    return saved


def _csv(frame: pd.DataFrame) -> str:
    plain = {}
    for name, column in frame.items():
        if not any(isinstance(value, Score) for value in column):
            plain[name] = column
            continue
        for part, end in (("", "mean"), ("_low", "low"), ("_high", "high")):
            plain[f"{name}{part}"] = [getattr(value, end, None) for value in column]
    return pd.DataFrame(plain).to_csv(index=False, lineterminator="\n")


def _latex(frame: pd.DataFrame, name: str, caption: str) -> str:
    """Set the table with pandas' Styler, every text escaped, the best of a column in bold."""
    shown = printed(frame).set_axis([head(column) for column in frame], axis="columns")
    bold = {
        head(column): ["font-weight: bold" if cell.best else "" for cell in cells(frame[column])]
        for column in frame
    }
    styler = shown.style.apply(lambda column: bold[column.name]).hide(axis="index")
    styler = styler.format(escape="latex").format_index(escape="latex", axis=1)
    text = styler.to_latex(
        hrules=True,
        convert_css=True,
        caption=re.sub(r"([&%$#_{}])", r"\\\1", caption.replace("`", "")),
        label=f"tab:{name}",
        position="t",
        position_float="centering",
        column_format="".join(_alignment(frame[column]) for column in frame),
    )
    for letter, command in _LATEX.items():
        text = text.replace(letter, command)
    # Many columns fit the width of a page only when they are set tightly.
    tight = "\\centering\n\\small\n\\setlength{\\tabcolsep}{3pt}"
    return text.replace("\\centering", tight, 1) if len(frame.columns) > 6 else text


def _alignment(column: pd.Series) -> str:
    if numeric(column):
        return "r"
    return r"p{0.3\linewidth}" if any(len(cell.text) > 40 for cell in cells(column)) else "l"
