"""The rows of a run: schema, units of work, committed form, primary metric and average."""

import json
import math
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

FINGERPRINTS = ("model", "data", "recipe", "code")

_TEXT, _COUNT, _REAL = pa.string(), pa.int32(), pa.float64()
COLUMNS: dict[str, pa.DataType] = {
    **dict.fromkeys(("study", "method", "factor", "level", "split"), _TEXT),
    **dict.fromkeys(("batch", "batch_size"), _COUNT),
    **dict.fromkeys(("edit", "kind"), _TEXT),
    "number": _COUNT,
    **dict.fromkeys(("phase", "question", "reference", "answer", "before"), _TEXT),
    **dict.fromkeys(METRICS, _REAL),
    **dict.fromkeys((f"{name}_before" for name in METRICS), _REAL),
    **dict.fromkeys(("floor", "log_probability"), _REAL),
    "steps": _COUNT,
    **dict.fromkeys(("train_seconds", "answer_seconds", "change_norm", "learning_rate"), _REAL),
    "peak_mib": _REAL,
    "seed": _COUNT,
    **dict.fromkeys(("notes", "curve"), _TEXT),
    **dict.fromkeys(FINGERPRINTS, _TEXT),
    **dict.fromkeys(("divergence", "leakage", "fact_kept", "likelihood_before"), _REAL),
}
SCHEMA = pa.schema(COLUMNS.items())
REQUIRED = ("method", "batch", "edit", "kind", "number", "phase", "question", "reference")
REQUIRED += ("answer", "model", "data")  # until rows are committed: those of a benchmark lack texts
# What tells one run from another: scores are never averaged over any of these.
RUN = ("study", "method", "factor", "level", "split", "batch_size", "learning_rate", "seed")
RUN += FINGERPRINTS
AT_ONCE = 1000  # files that are read before they are joined: apart each takes ten times its bytes
_EDIT = (*RUN, "batch", "edit")
_PROBE = (*_EDIT, "phase", "kind", "number")
_COMPARED = ("study", "factor", "split", "batch_size", "data")  # runs alike in these are compared


def use_committed() -> bool:
    """Whether UKE_ROWS asks for rows of the committed files instead of new ones."""
    chosen = os.environ.get("UKE_ROWS", "")
    if chosen not in ("", "committed"):
        raise InputError(f"UKE_ROWS: unknown '{chosen}'{nearest(chosen, ['committed'])}")
    return chosen == "committed"


def append(paths: Paths, study: str, unit: str, frame: pd.DataFrame) -> Path:
    """Write the rows of one unit to a parquet file of its own, in place of any it had.

    `study` and `code` are filled in. InputError for an unknown column, absent value or wrong type.
    """
    place = f"rows of study '{study}', unit '{check_name('unit', unit)}'"
    frame = frame.assign(study=study, code=code_fingerprint())
    for name in frame.columns:
        if name not in COLUMNS:
            raise InputError(f"{place}: unknown column '{name}'{nearest(str(name), COLUMNS)}")
    for name in REQUIRED:
        if frame.empty or name not in frame or frame[name].isna().any():
            raise InputError(f"{place}: column '{name}': a value is missing")
    return _write(place, frame, paths.rows(study) / f"{unit}.parquet")


def _write(place: str, frame: pd.DataFrame, path: Path) -> Path:
    """Write the frame in the schema's order and types, free of anything pandas adds."""
    try:
        table = pa.Table.from_pandas(frame.reindex(columns=SCHEMA.names), SCHEMA, False)
    except pa.ArrowException as error:
        raise InputError(f"{place}: {': '.join(map(str, error.args))}") from None
    options = {"compression": "zstd", "compression_level": 9}
    with replacing(path) as part:
        table = table.replace_schema_metadata()
        pq.write_table(table, part, store_schema=False, write_statistics=False, **options)
    return path


def done(
    paths: Paths,
    study: str,
    unit: str,
    fingerprints: Mapping[str, str | None],
    levels: Iterable[str] = (),
) -> bool:
    """Whether the unit has rows of this code with these fingerprints, at these levels too."""
    wanted = {"code": code_fingerprint(), **fingerprints}
    try:
        with pq.ParquetFile(paths.rows(study) / f"{check_name('unit', unit)}.parquet") as file:
            table = file.read(columns=[*wanted, "level"])
    except (pa.ArrowException, OSError):  # absent, or cut short when a machine went down
        return False
    found = table.select(list(wanted)).slice(0, 1).to_pylist()
    return found == [wanted] and set(levels) <= set(table["level"].to_pylist())


def read(paths: Paths, study: str, units: Iterable[str]) -> pd.DataFrame:
    """Read the rows of these units, in a fixed order, with every column of COLUMNS."""
    folder = paths.rows(study)
    files = sorted(folder / f"{check_name('unit', unit)}.parquet" for unit in set(units))
    if not files:
        raise InputError(f"{folder}: no rows; make them: {paths.command(study)}")
    parts = (files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE))
    joined = (pa.concat_tables(map(_read_file, part)).combine_chunks() for part in parts)
    frame = pa.concat_tables(joined).to_pandas()
    return frame.sort_values(list(_PROBE), kind="stable", ignore_index=True)


def committed(paths: Paths, study: str, phase: str | None = "after") -> pd.DataFrame:
    """Read the committed rows of a phase (None: of both), whatever code wrote them; InputError for
    no file of the study."""
    path = paths.exported(study)
    if not path.is_file():
        raise InputError(f"{path}: no committed rows; make them: {paths.command(study)}")
    wanted = pc.field("phase").is_valid() if phase is None else pc.field("phase") == phase
    return _read_file(path).filter(wanted).to_pandas()


def _read_file(path: Path) -> pa.Table:
    """Read a file of rows; a column added since it was written is null."""
    try:
        return pq.read_table(path, schema=SCHEMA, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: expected a parquet file of rows ({reason})") from None


def export(paths: Paths, study: str, frame: pd.DataFrame) -> Path:
    """Write all scores, and the answers of five edits of each method, unless committed rows are
    used. No text of a benchmark or a foreign document is written, nor any answer to one."""
    path = paths.exported(study)
    if not use_committed():
        own = paths.data == "world" and not (paths.results / "locality").is_dir()  # all texts ours
        rank = frame.groupby("method")["edit"].rank("dense")
        hidden = ["answer", "before"] if own else ["question", "reference", "answer", "before"]
        texts = frame[hidden].where(own & (rank <= 5), None)  # rank: in the order of the ids
        _write(f"rows of study '{study}'", frame.assign(**texts), path)
    return path


def primary(frame: pd.DataFrame, phase: str = "after") -> pd.DataFrame:
    """Return the primary metric (`score`) by run, batch, edit and kind, averaged over `probes`.

    Before the edit, locality is 1 by definition. InputError where a score is missing or a probe
    occurs twice.
    """
    rows, parts = frame[frame["phase"] == phase], []
    if (twice := rows.duplicated(list(_PROBE))).any():
        raise InputError(f"primary: {_words(rows[twice])}: the same probe twice")
    for name, kind in KINDS.items():
        own = rows[rows["kind"] == name]
        metric = kind.metric if kind.against == "reference" else f"{kind.metric}_before"
        unchanged = kind.against == "before" and phase == "before"
        own = own.assign(score=1.0 if unchanged else own.get(metric, math.nan))
        if (absent := own["score"].isna()).any():
            missing = f"no {kind.metric} against the {kind.against}"
            raise InputError(f"primary: {_words(own[absent])}: {missing}")
        parts.append(own)
    groups = pd.concat(parts).groupby([*_EDIT, "kind"], dropna=False, as_index=False)
    return groups.agg(score=("score", "mean"), probes=("score", "size"))


def _words(probes: pd.DataFrame) -> str:
    probe = next(probes.itertuples())
    return f"{probe.method}, edit '{probe.edit}', {probe.kind} {probe.number}"


def average(
    frame: pd.DataFrame, kinds: Sequence[str] = AVERAGE, same_edits: bool = True
) -> pd.DataFrame:
    """Return the average metric (`score`) by run, batch and edit: the plain mean over `kinds`.

    `frame` is what `primary` gives. InputError where an edit lacks a kind, or (`same_edits`) runs
    side by side differ in their edits.
    """
    scores = frame[frame["kind"].isin(kinds)]
    if scores.empty:
        raise InputError(f"average: no rows of {', '.join(kinds)}")
    groups = scores.groupby(list(_EDIT), dropna=False, as_index=False)
    means = groups.agg(score=("score", "mean"), held=("kind", "nunique"))
    if (few := means["held"] < len(kinds)).any():
        row = next(groups["kind"].agg(frozenset)[few].itertuples())
        absent = ", ".join(kind for kind in kinds if kind not in row.kind)
        raise InputError(f"average: {row.method}, edit '{row.edit}': no {absent}")
    for _, compared in means.groupby(list(_COMPARED), dropna=False) if same_edits else ():
        every = set(compared["edit"])
        for (_, method, _, level, *_), own in compared.groupby(list(RUN), dropna=False)["edit"]:
            if absent := sorted(every - set(own)):
                name = method if pd.isna(level) else f"{method} {level}"
                found = f"{len(absent)} of the {len(every)} edits beside it"
                raise InputError(f"average: {name} lacks {found} ({', '.join(absent[:5])})")
    return means.drop(columns="held")


def shortened(value: Any, digits: int) -> Any:
    """Return data of JSON with its floats rounded to so many significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda x: float(f"{float(x):.{digits}g}"))


def stored(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Make rows and write them to `path`, or read them there where committed rows are asked for."""
    if not use_committed():
        write_atomic(path, make().to_parquet(index=False))
    elif not path.is_file():
        raise InputError(f"{path}: no committed rows; run the notebook without UKE_ROWS=committed")
    return pd.read_parquet(path)
