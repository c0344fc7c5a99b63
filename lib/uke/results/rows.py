"""The rows of a run: their schema, atomic units of work, the committed form, primary metric and
average."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from uke.data.edits import AVERAGE, KINDS
from uke.errors import InputError, nearest
from uke.files import replacing, write_atomic
from uke.project import Paths, check_name, code_fingerprint
from uke.results.metrics import METRICS

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
REQUIRED = ("method", "batch", "edit", "kind", "number", "phase", "question", "reference")
REQUIRED += ("answer", "model", "data")
# What tells one run from another: scores are never averaged over any of these.
RUN = ("study", "method", "factor", "level", "split", "batch_size", "learning_rate", "seed")
RUN += FINGERPRINTS
_EDIT = (*RUN, "batch", "edit")
_PROBE = (*_EDIT, "phase", "kind", "number")
_COMPARED = ("study", "factor", "split", "batch_size", "data")  # runs alike in these are compared


def use_committed() -> bool:
    """Whether rows are taken from the committed files (UKE_ROWS=committed) instead of being
    made."""
    chosen = os.environ.get("UKE_ROWS", "")
    if chosen not in ("", "committed"):
        raise InputError(f"UKE_ROWS: unknown '{chosen}'{nearest(chosen, ['committed'])}")
    return chosen == "committed"


def append(paths: Paths, study: str, unit: str, frame: pd.DataFrame) -> Path:
    """Write the rows of one unit as a small parquet file, atomically; rows of the same unit are
    replaced.

    Absent columns become null, `study` and `code` are filled in. Raises InputError, writing
    nothing, for an unknown column, kind or phase, a required value that is absent, a wrong type, a
    repeated probe, or unequal fingerprints.
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
    for name, valid in (("kind", tuple(KINDS)), ("phase", PHASES), ("study", (study,))):
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
    """Return the frame in the schema's own column order and types, free of anything pandas adds."""
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
    options = {"compression": "zstd", "compression_level": 9}
    with replacing(path) as part:
        pq.write_table(table, part, store_schema=False, write_statistics=False, **options)


def done(paths: Paths, study: str, unit: str, fingerprints: Mapping[str, str | None]) -> bool:
    """Whether the unit has rows written with these fingerprints and by this code; any difference
    makes it stale."""
    for name in fingerprints:
        if name not in FINGERPRINTS:
            raise InputError(f"fingerprints: unknown '{name}'{nearest(name, FINGERPRINTS)}")
    wanted = {"code": code_fingerprint(), **fingerprints}
    try:
        with pq.ParquetFile(paths.rows(study) / f"{check_name('unit', unit)}.parquet") as file:
            found = file.read(columns=list(wanted)).slice(0, 1).to_pylist()
    except (pa.ArrowException, OSError):  # absent, or cut short when a machine went down
        return False
    return found == [wanted]


def by_work(paths: Paths) -> dict[str, tuple[str, str]]:
    """Return study and unit of every file of rows in this run's results, by the digest that its
    name ends in."""
    files = sorted((paths.results / "rows").glob("*/*.parquet"))
    return {path.stem.rpartition("-")[2]: (path.parent.name, path.stem) for path in files}


def read(paths: Paths, study: str, units: Iterable[str]) -> pd.DataFrame:
    """Read the rows of these units from the results, in a fixed order, with every column of
    COLUMNS.

    Raises InputError where a unit has no rows or other code wrote them, and where the units do not
    belong together: several models, data or codes, or several recipes under one method and level.
    """
    folder = paths.rows(study)
    files = sorted(folder / f"{check_name('unit', unit)}.parquet" for unit in set(units))
    frame = pa.concat_tables(map(_read_file, files)).to_pandas() if files else pd.DataFrame()
    if frame.empty:
        raise InputError(f"{folder}: no rows of study '{study}': run its notebook first")
    for name in ("model", "data", "code"):
        if frame[name].nunique(dropna=False) > 1:
            found = ", ".join(map(str, frame[name].unique()))
            raise InputError(f"{folder}: rows of several '{name}' fingerprints ({found})")
    if frame["code"].iloc[0] != code_fingerprint():
        raise InputError(f"{folder}: rows written by other code: run the notebook again")
    run = [*(name for name in RUN if name not in FINGERPRINTS), "phase"]
    recipes = frame.groupby(run, dropna=False)["recipe"].nunique(dropna=False)
    if (recipes > 1).any():
        method = recipes[recipes > 1].index[0][run.index("method")]
        raise InputError(f"{folder}: {method}: rows of several recipes; run the notebook again")
    return frame.sort_values(list(_PROBE), kind="stable", ignore_index=True)


def committed(paths: Paths, study: str, phase: str = "after") -> pd.DataFrame:
    """Read the study's committed rows, whatever code wrote them; InputError where there are
    none."""
    path = paths.exported(study)
    if not path.is_file():
        raise InputError(f"{path}: no committed rows of study '{study}': run its notebook first")
    return _read_file(path).filter(pc.field("phase") == phase).to_pandas()


def _read_file(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: expected a parquet file of rows ({str(error).splitlines()[0]})"
        ) from None
    # A column added since the file was written is null.
    columns = {
        name: table[name] if name in table.column_names else pa.nulls(len(table), kind)
        for name, kind in COLUMNS.items()
    }
    return pa.table(columns, schema=pa.schema(list(COLUMNS.items())))


def export(paths: Paths, study: str, frame: pd.DataFrame) -> Path:
    """Write the committed form of the rows: all scores, and generated texts for five edits of each
    method.

    Where rows are taken from the committed files (`use_committed`), they stay as they are.
    """
    path = paths.exported(study)
    if use_committed():
        return path
    first = {
        method: sorted(set(edits))[:TEXTS_EXPORTED]
        for method, edits in frame.groupby("method")["edit"]
    }
    shown = [edit in first[method] for method, edit in zip(frame["method"], frame["edit"])]
    texts = {
        name: frame[name].where(pd.Series(shown, frame.index), None)
        for name in ("answer", "before")
    }
    _write(_table(f"rows of study '{study}'", frame.assign(**texts)), path)
    return path


def primary(frame: pd.DataFrame, phase: str = "after") -> pd.DataFrame:
    """Return the primary metric of each kind (KINDS), one row per run, batch, edit and kind:
    `score`, and `probes` averaged.

    Before the edit, a comparison with the answer before the edit is 1 by definition. Raises
    InputError where a score is missing or a probe occurs twice.
    """
    if phase not in PHASES:
        raise InputError(f"primary: unknown phase '{phase}'{nearest(phase, PHASES)}")
    rows = frame[frame["phase"] == phase]
    _refuse_repeats("primary", rows)
    score = pd.Series(float("nan"), index=rows.index)
    for name, kind in KINDS.items():
        own = rows["kind"] == name
        if kind.against == "reference":
            score[own] = rows.loc[own, kind.metric]
        else:
            score[own] = rows.loc[own, f"{kind.metric}_before"] if phase == "after" else 1.0
    if score.isna().any():
        first = rows[score.isna()].iloc[0]
        kind = KINDS[first["kind"]]
        probe = f"edit '{first['edit']}', {first['kind']} {first['number']}"
        raise InputError(
            f"primary: {first['method']}, {probe}: no {kind.metric} against the {kind.against}"
        )
    groups = rows.assign(score=score).groupby([*_EDIT, "kind"], dropna=False, as_index=False)
    return groups.agg(score=("score", "mean"), probes=("score", "size"))


def average(
    frame: pd.DataFrame, kinds: Sequence[str] = AVERAGE, partial: bool = False
) -> pd.DataFrame:
    """The average metric, one row per run, batch and edit: `score`, the plain mean over `kinds`,
    and `kinds` found.

    `frame` is what `primary` gives. Raises InputError naming what is missing where an edit lacks a
    kind, or runs that stand side by side differ in their edits, unless `partial` (then the column
    `kinds` counts what each mean holds).
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
                lacks = f"{name} lacks {len(absent)} of the {len(every)} edits beside it"
                lacks += f" ({', '.join(absent[:5])})"
                raise InputError(f"average: {lacks}; choose common ones or ask for partial=True")


def shortened(value: Any, digits: int) -> Any:
    """Return the value with its floats rounded to so many significant digits, however deep they
    lie."""
    if isinstance(value, Mapping):
        return {name: shortened(each, digits) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def stored(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Make rows and write them to `path`, or read them there where committed rows are asked for."""
    if not use_committed():
        write_atomic(path, make().to_parquet(index=False))
    elif not path.is_file():
        raise InputError(f"{path}: no committed rows; run the notebook without UKE_ROWS=committed")
    return pd.read_parquet(path)
