"""The row schema: append units of rows atomically, skip what is done, read, export, average."""

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from uke.files import replacing
from uke.errors import InputError, nearest
from uke.results.metrics import AVERAGE, HEADLINE, METRICS
from uke.project import Paths, check_name, code_fingerprint, digest, unit_key

__all__ = [
    "COLUMNS",
    "FINGERPRINTS",
    "PHASES",
    "RUN",
    "Paths",
    "append",
    "average",
    "by_work",
    "code_fingerprint",
    "digest",
    "done",
    "export",
    "primary",
    "read",
    "unit_key",
]

PHASES = ("before", "after")
FINGERPRINTS = ("model", "data", "recipe", "code")
TEXTS_EXPORTED = 5  # edits per method

_TEXT, _COUNT, _REAL = pa.string(), pa.int32(), pa.float64()
COLUMNS: dict[str, pa.DataType] = {
    **dict.fromkeys(("study", "method", "factor", "level", "split"), _TEXT),
    **dict.fromkeys(("batch", "batch_size"), _COUNT),
    **dict.fromkeys(("edit", "kind"), _TEXT),
    "number": _COUNT,
    **dict.fromkeys(("phase", "question", "reference", "answer", "before"), _TEXT),
    **dict.fromkeys(METRICS, _REAL),
    **dict.fromkeys((f"{name}_before" for name in METRICS), _REAL),
    "log_probability": _REAL,
    "steps": _COUNT,
    **dict.fromkeys(("train_seconds", "answer_seconds", "change_norm", "learning_rate"), _REAL),
    "peak_mib": _REAL,
    "seed": _COUNT,
    **dict.fromkeys(("notes", "curve"), _TEXT),
    **dict.fromkeys(FINGERPRINTS, _TEXT),
}
REQUIRED = (
    "method",
    "batch",
    "edit",
    "kind",
    "number",
    "phase",
    "question",
    "reference",
    "answer",
    "model",
    "data",
)
# What tells one run from another: scores are never averaged over any of these.
RUN = (
    "study",
    "method",
    "factor",
    "level",
    "split",
    "batch_size",
    "learning_rate",
    "seed",
    *FINGERPRINTS,
)
_EDIT = (*RUN, "batch", "edit")
_PROBE = (*_EDIT, "phase", "kind", "number")
_COMPARED = (
    "study",
    "factor",
    "split",
    "batch_size",
    "data",
)  # runs alike in these stand side by side


def append(paths: Paths, study: str, unit: str, frame: pd.DataFrame) -> Path:
    """Write the rows of one unit as a small parquet file, whole or not at all; rows of the same unit are replaced.

    Absent columns become null, `study` and `code` are filled in. Raises InputError, writing nothing, for an unknown
    column, kind or phase, a required value that is absent, a wrong type, a repeated probe, or unequal fingerprints.
    """
    place = f"rows of study '{study}', unit '{check_name('unit', unit)}'"
    given = {
        name: value
        for name, value in (("study", study), ("code", code_fingerprint()))
        if name not in frame
    }
    frame = frame.assign(**given)
    _check(place, study, frame)
    path = paths.rows(study) / f"{unit}.parquet"
    _write(_table(place, frame), path)
    return path


def _check(place: str, study: str, frame: pd.DataFrame) -> None:
    if frame.empty:
        raise InputError(f"{place}: expected at least one row")
    for name in frame.columns:
        if name not in COLUMNS:
            raise InputError(f"{place}: unknown column '{name}'{nearest(str(name), COLUMNS)}")
    for name in REQUIRED:
        if name not in frame or frame[name].isna().any():
            raise InputError(f"{place}: column '{name}': a value is missing")
    for name, valid in (("kind", tuple(HEADLINE)), ("phase", PHASES), ("study", (study,))):
        for value in frame[name].unique():
            if value not in valid:
                raise InputError(
                    f"{place}: column '{name}': unknown '{value}'{nearest(str(value), valid)}"
                )
    for name in FINGERPRINTS:
        if name in frame and frame[name].nunique(dropna=False) > 1:
            raise InputError(
                f"{place}: column '{name}': expected one fingerprint in a unit, found several"
            )
    _refuse_repeats(place, frame)


def _refuse_repeats(place: str, frame: pd.DataFrame) -> None:
    repeated = frame[frame.duplicated([name for name in _PROBE if name in frame])]
    if len(repeated):
        first = repeated.iloc[0]
        probe = f"edit '{first['edit']}', {first['kind']} {first['number']}"
        raise InputError(
            f"{place}: {first['method']}, {probe}: the same probe twice ({first['phase']} the edit)"
        )


def _table(place: str, frame: pd.DataFrame) -> pa.Table:
    """The frame in the schema's own column order and types, free of anything pandas adds."""
    arrays = {}
    for name, kind in COLUMNS.items():
        if name not in frame:
            arrays[name] = pa.nulls(len(frame), kind)
            continue
        try:
            if kind == _TEXT:
                values = [None if pd.isna(value) else value for value in frame[name]]
            else:
                values = pd.to_numeric(frame[name]).to_numpy(float, na_value=float("nan"))
            arrays[name] = pa.array(values, kind, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(
                f"{place}: column '{name}': expected {kind} ({str(error).splitlines()[0]})"
            ) from None
    return pa.table(arrays)


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as part:
        pq.write_table(
            table,
            part,
            compression="zstd",
            compression_level=9,
            store_schema=False,
            write_statistics=False,
        )


def done(paths: Paths, study: str, unit: str, fingerprints: Mapping[str, str | None]) -> bool:
    """Whether the unit has rows written with these fingerprints and by this code; any difference makes it stale."""
    wanted = {"code": code_fingerprint(), **_checked(fingerprints)}
    path = paths.rows(study) / f"{check_name('unit', unit)}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            found = file.read(columns=list(wanted)).slice(0, 1).to_pylist()
    except (
        pa.ArrowException,
        OSError,
    ):  # absent, or cut short when a machine went down: to be written again
        return False
    return found == [wanted]


def by_work(paths: Paths) -> dict[str, tuple[str, str]]:
    """Study and unit of every file of rows in this run's results, by the digest that its name ends in."""
    return {
        path.stem.rpartition("-")[2]: (path.parent.name, path.stem)
        for path in sorted((paths.results / "rows").glob("*/*.parquet"))
    }


def _checked(fingerprints: Mapping[str, str | None]) -> dict[str, str | None]:
    for name in fingerprints:
        if name not in FINGERPRINTS:
            raise InputError(f"fingerprints: unknown '{name}'{nearest(name, FINGERPRINTS)}")
    return dict(fingerprints)


def read(
    paths: Paths,
    study: str,
    fingerprints: Mapping[str, str | None] | None = None,
    mixed: bool = False,
    units: Iterable[str] | None = None,
) -> pd.DataFrame:
    """The study's rows (of the named `units`, else of all) in a fixed order, with every column of COLUMNS.

    Rows of the results are fresh if this code wrote them and they bear the `fingerprints`; without results, the
    committed rows are read whatever code wrote them. `mixed` lets stale rows and several models, data or codes
    through. Raises InputError where there are no (fresh) rows, or they do not belong together.
    """
    wanted = _checked(fingerprints or {})
    files = sorted(paths.rows(study).glob("*.parquet"))
    if units is not None:
        files = sorted(
            paths.rows(study) / f"{check_name('unit', unit)}.parquet" for unit in set(units)
        )
    if files and not mixed:
        wanted = {"code": code_fingerprint(), **wanted}
    place = paths.rows(study) if files else paths.exported(study)
    if not files and not place.is_file():
        raise InputError(
            f"{place}: no rows of study '{study}' here or in {paths.rows(study)}: run its notebook first"
        )
    frame = pa.concat_tables(map(_read_file, files or [place])).to_pandas()
    fresh = frame
    for name, value in wanted.items():
        fresh = fresh[fresh[name].isna() if value is None else fresh[name] == value]
    if fresh.empty:
        raise InputError(
            f"{place}: {len(frame)} rows, none with {wanted}: stale, run the notebook again"
        )
    if not mixed:
        _refuse_mixtures(str(place), fresh)
    return fresh.sort_values(list(_PROBE), kind="stable", ignore_index=True)


def _read_file(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: expected a parquet file of rows ({str(error).splitlines()[0]})"
        ) from None
    present = set(table.column_names)  # a column added since the file was written is null
    return pa.table(
        {
            name: table[name] if name in present else pa.nulls(len(table), kind)
            for name, kind in COLUMNS.items()
        },
        schema=pa.schema(list(COLUMNS.items())),
    )


def _refuse_mixtures(place: str, frame: pd.DataFrame) -> None:
    for name in ("model", "data", "code"):
        if frame[name].nunique(dropna=False) > 1:
            found = ", ".join(map(str, frame[name].unique()))
            raise InputError(
                f"{place}: rows of several '{name}' fingerprints ({found}); choose one, or mixed=True"
            )
    one_recipe = [name for name in RUN if name not in FINGERPRINTS]
    recipes = frame.groupby([*one_recipe, "phase"], dropna=False)["recipe"].nunique(dropna=False)
    if (recipes > 1).any():
        method = recipes[recipes > 1].index[0][one_recipe.index("method")]
        raise InputError(
            f"{place}: {method}: rows of several recipes; run the notebook again, or ask for mixed=True"
        )


def export(paths: Paths, study: str, frame: pd.DataFrame) -> Path:
    """Write the committed form of the rows in `frame`: all scores, and generated texts for five edits of each method."""
    frame = frame.copy()
    first = {
        method: sorted(edits.unique())[:TEXTS_EXPORTED]
        for method, edits in frame.groupby("method")["edit"]
    }
    shown = [edit in first[method] for method, edit in zip(frame["method"], frame["edit"])]
    for name in ("answer", "before"):
        frame[name] = frame[name].where(pd.Series(shown), None)
    _write(_table(f"rows of study '{study}'", frame), paths.exported(study))
    return paths.exported(study)


def primary(frame: pd.DataFrame, phase: str = "after") -> pd.DataFrame:
    """Each kind's own comparison (HEADLINE), one row per run, batch, edit and kind: `score`, and `probes` averaged.

    Before the edit, a comparison with the answer before the edit is 1 by definition. Raises InputError where a score
    is missing or a probe occurs twice.
    """
    if phase not in PHASES:
        raise InputError(f"primary: unknown phase '{phase}'{nearest(phase, PHASES)}")
    rows = frame[frame["phase"] == phase]
    _refuse_repeats("primary", rows)
    score = pd.Series(float("nan"), index=rows.index)
    for kind, (metric, against) in HEADLINE.items():
        of_kind = rows["kind"] == kind
        if against == "reference":
            score[of_kind] = rows.loc[of_kind, metric]
        else:
            score[of_kind] = rows.loc[of_kind, f"{metric}_before"] if phase == "after" else 1.0
    if score.isna().any():
        first = rows[score.isna()].iloc[0]
        metric, against = HEADLINE[first["kind"]]
        probe = f"edit '{first['edit']}', {first['kind']} {first['number']}"
        raise InputError(f"primary: {first['method']}, {probe}: no {metric} against the {against}")
    groups = rows.assign(score=score).groupby([*_EDIT, "kind"], dropna=False, as_index=False)
    return groups.agg(score=("score", "mean"), probes=("score", "size"))


def average(
    frame: pd.DataFrame, kinds: Sequence[str] = AVERAGE, partial: bool = False
) -> pd.DataFrame:
    """The average metric, one row per run, batch and edit: `score`, the plain mean over `kinds`, and `kinds` found.

    `frame` is what `primary` gives. Raises InputError naming what is missing where an edit lacks a kind, or runs that
    stand side by side differ in their edits, unless `partial` (then the column `kinds` counts what each mean holds).
    """
    scores = frame[frame["kind"].isin(kinds)]
    groups = scores.groupby(list(_EDIT), dropna=False, as_index=False)
    means = groups.agg(score=("score", "mean"), kinds=("kind", "nunique"))
    if not partial:
        _refuse_gaps(scores, means, tuple(kinds))
    return means


def _refuse_gaps(scores: pd.DataFrame, means: pd.DataFrame, kinds: Sequence[str]) -> None:
    if means.empty:
        raise InputError(f"average: no rows of {', '.join(kinds)}")
    short = means[means["kinds"] < len(kinds)].head(1)
    if len(short):
        held = set(short.drop(columns=["score", "kinds"]).merge(scores, on=list(_EDIT))["kind"])
        absent = ", ".join(kind for kind in kinds if kind not in held)
        edit = f"{short.iloc[0]['method']}, edit '{short.iloc[0]['edit']}'"
        raise InputError(
            f"average: {edit}: no {absent}; choose other kinds or ask for partial=True"
        )
    for _, side in means.groupby(list(_COMPARED), dropna=False):
        every = set(zip(side["batch"], side["edit"]))
        for _, run in side.groupby(list(RUN), dropna=False):
            absent = sorted(f"'{edit}'" for _, edit in every - set(zip(run["batch"], run["edit"])))
            if absent:
                name = " ".join(str(part) for part in run.iloc[0][["method", "level"]].dropna())
                lacks = f"{name} lacks {len(absent)} of the {len(every)} edits beside it ({', '.join(absent[:5])})"
                raise InputError(f"average: {lacks}; choose common ones or ask for partial=True")


def shortened(value: Any, digits: int) -> Any:
    """Return the value with its floats rounded to so many significant digits, however deep they lie."""
    if isinstance(value, Mapping):
        return {name: shortened(each, digits) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
