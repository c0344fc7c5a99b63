"""Figures and tables from stored data: what a section draws, it draws from what a redraw reads."""

import inspect
import io
import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from uke.errors import InputError, nearest
from uke.report import diagrams, figures, style, tables
from uke.report.numerals import Score, absent

_ROOMS = {"figures": figures, "diagrams": diagrams}
_CODED = b"uke.coded"  # the columns of objects: texts as they are, anything mixed as JSON


def named(draw: Any) -> str:
    """The name under which a redraw finds this function again, as in `diagrams.spread`; InputError where it would not."""
    room, name = getattr(draw, "__module__", "").rpartition(".")[2], getattr(draw, "__name__", "")
    if room not in _ROOMS or name.startswith("_") or getattr(_ROOMS[room], name, None) is not draw:
        raise InputError(
            f"figure: expected a function of uke.report.figures or uke.report.diagrams, found {getattr(draw, '__qualname__', draw)!r}"
        )
    return f"{room}.{name}"


def plain(options: Mapping[str, Any]) -> dict:
    """Options as a redraw reads them; InputError for what JSON cannot hold."""
    try:
        return json.loads(
            json.dumps(dict(options), default=lambda value: value.item(), allow_nan=False)
        )
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"figure: options: expected texts, numbers, lists and mappings, found {dict(options)!r}"
        ) from None


def stored(frame: pd.DataFrame) -> bytes:
    """A table of any columns as Parquet; a named index becomes columns, names become texts, other objects their texts."""
    flat = frame.reset_index(drop=frame.index.names == [None])
    flat.columns = [str(column) for column in flat.columns]
    if not flat.columns.is_unique:
        raise InputError(
            f"table: two columns have the same name, '{flat.columns[flat.columns.duplicated()][0]}'"
        )
    coded = {}
    for column in flat.columns[flat.dtypes == object]:
        texts = all(isinstance(value, str) for value in flat[column])
        coded[column] = "text" if texts else "json"
        flat[column] = pd.Series(
            [value if texts else _code(value) for value in flat[column]],
            index=flat.index,
            dtype="str",
        )
    table = pyarrow.Table.from_pandas(flat, preserve_index=False)
    table = table.replace_schema_metadata(
        {**table.schema.metadata, _CODED: json.dumps(coded).encode()}
    )
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written, compression="zstd")
    return written.getvalue()


def read(content: bytes | Path) -> pd.DataFrame:
    """The table that `stored` wrote: the same columns in the same order, kinds and rows."""
    table = pyarrow.parquet.read_table(
        io.BytesIO(content) if isinstance(content, bytes) else content
    )
    frame = table.to_pandas()
    for column, how in json.loads(table.schema.metadata[_CODED]).items():
        frame[column] = pd.Series(
            [value if how == "text" else _decode(value) for value in frame[column]],
            index=frame.index,
            dtype=object,
        )
    return frame


def data_path(directory: Path, block: Mapping[str, Any]) -> Path:
    """Where the data of a figure or of a table lie; a figure and a table may share a name."""
    return (
        directory
        / "data"
        / f"{block['name']}{'.table' if block['type'] == 'table' else ''}.parquet"
    )


def load(directory: Path, block: Mapping[str, Any], notebook: str) -> pd.DataFrame:
    """The stored data of a figure or of a table; InputError that names the file where they cannot be read."""
    path, what = data_path(directory, block), f"{block['type']} {block['name']}"
    again = f"run notebook {notebook} again"
    if block["type"] == "figure" and not {"draw", "options"} <= set(block):
        raise InputError(
            f"{directory / 'sections' / notebook}.json: {what}: not stored with what draws it; {again}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file: the data of {what}; {again}")
    try:
        return read(path)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not the data of {what} ({str(error).splitlines()[0]}); {again}"
        ) from None


def place(directory: Path, block: Mapping[str, Any], frame: pd.DataFrame) -> dict:
    """Draw a figure (PDF, PNG) or a table (CSV, LaTeX, Markdown) from its stored data; its block, renewed."""
    if block["type"] == "table":
        tables.save(frame, directory, block["name"], block["caption"])
        return dict(block) | tables.cells(frame)
    fig = _found(block)(frame, **block["options"])
    style.save(fig, directory, block["name"])
    return dict(block) | {"width": round(float(fig.get_figwidth()), 3)}


def _found(block: Mapping[str, Any]) -> Any:
    """The function that draws this figure; InputError where it is gone or does not take the options."""
    room, _, name = block["draw"].partition(".")
    known = {
        f"{each}.{one}": draw
        for each, where in _ROOMS.items()
        for one, draw in vars(where).items()
        if getattr(draw, "__module__", "") == f"uke.{each}"
    }
    draw = known.get(f"{room}.{name}")
    if draw is None:
        raise InputError(
            f"figure {block['name']}: no function '{block['draw']}'{nearest(block['draw'], known)}"
        )
    valid = list(inspect.signature(draw).parameters)[1:]
    if unknown := [option for option in block["options"] if option not in valid]:
        raise InputError(
            f"figure {block['name']}: {block['draw']} has no option '{unknown[0]}'{nearest(unknown[0], valid)}"
        )
    return draw


def _code(value: Any) -> str:
    if isinstance(value, Score):
        ends = [None if absent(each) else float(each) for each in (value.low, value.high)]
        return json.dumps(
            {"mean": _bare(value.mean), "low": ends[0], "high": ends[1], "best": bool(value.best)}
        )
    return json.dumps(_bare(value), ensure_ascii=False)


def _bare(value: Any) -> Any:
    """A cell as JSON has it: whole numbers stay whole, everything that is no number, flag or text becomes its text."""
    if absent(value):
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def _decode(text: str) -> Any:
    value = json.loads(text)
    return Score(**value) if isinstance(value, dict) else value
