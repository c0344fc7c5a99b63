"""Bootstrap intervals, paired tests and the correction for many tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uke.errors import InputError, nearest

RESAMPLES = 9999
SEED = 2024


class Interval(NamedTuple):
    """A mean, its 95 % interval (NaN for a single unit) and the number of units resampled."""

    mean: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """A mean difference, its 95 % interval, p of the sign-flip test, the number of units."""

    difference: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Score:
    """A cell of a table, shown as `mean [low, high]`; `best` is set in bold."""

    mean: float
    low: float | None = None
    high: float | None = None
    best: bool = False


def interval(values: Sequence[float], groups: Sequence[Any] | None = None) -> Interval:
    """Return the mean of `values` (N,) with its percentile bootstrap interval (Efron 1979).

    Units are drawn with replacement: values (edits), or whole `groups` of them (batches), so that
    the mean stays that of all values. InputError for no value, or one that is not finite.
    """
    sums, counts = units(values, groups)
    return Interval(float(_mean(sums, counts)), *_bootstrap(sums, counts), len(sums))


def paired(a: Sequence[float], b: Sequence[float], groups: Sequence[Any] | None = None) -> Paired:
    """Return the mean of a - b (N,) with its interval and a sign-flip test of no difference.

    Two Series are matched by their index, anything else by position. `groups` (in the order of
    `a`) are flipped and drawn as wholes; the test is exact up to 13 units. InputError where the
    two do not pair.
    """
    from scipy.stats import permutation_test

    sums, counts = units(_differences(a, b), groups)
    p = 1.0
    if len(sums) > 1:
        p = permutation_test(
            (sums,),
            np.sum,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            vectorized=True,
            batch=1000,
            rng=np.random.default_rng(SEED),
        ).pvalue
    return Paired(float(_mean(sums, counts)), *_bootstrap(sums, counts), float(p), len(sums))


def holm(ps: Sequence[float]) -> list[float]:
    """Return adjusted p values in the order given, holding the family-wise error (Holm 1979)."""
    ps = np.asarray(ps, dtype=float)
    if not ((ps >= 0) & (ps <= 1)).all():
        raise InputError("holm: expected p values from 0 to 1")
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return adjusted.tolist()


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    if isinstance(a, pd.Series) and isinstance(b, pd.Series):
        if a.index.has_duplicates or b.index.has_duplicates or set(a.index) != set(b.index):
            odd = sorted(map(str, set(a.index) ^ set(b.index)))[:3]
            found = ", ".join(odd) or "repeated ones"
            raise InputError(f"paired: the two sides differ in their units: {found}")
        b = b.reindex(a.index)
    if len(a) != len(b):
        found = f"{len(a)} and {len(b)}"
        raise InputError(f"paired: expected as many values on both sides, found {found}")
    return np.asarray(a, dtype=float) - np.asarray(b, dtype=float)


def units(values: Sequence[float], groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of the values of each unit: a value, or a group of them; (units,)."""
    values = np.asarray(values, dtype=float)
    absent = (~np.isfinite(values)).sum()
    if values.ndim != 1 or not len(values) or absent:
        found = f"{absent} missing of {values.size}"
        raise InputError(f"interval: expected finite values, found {found}")
    if groups is None:
        return values, np.ones_like(values)
    codes, names = pd.factorize(np.asarray(groups))
    if len(codes) != len(values) or (codes < 0).any():
        raise InputError(f"interval: expected a group for each of {len(values)} values")
    counts = np.bincount(codes, minlength=len(names)).astype(float)
    return np.bincount(codes, values, len(names)), counts


def _mean(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(sums) < 2:
        return float("nan"), float("nan")
    low, high = bootstrap(
        (sums, counts),
        _mean,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(low), float(high)


def resampled(count: int, stream: int = 0) -> np.ndarray:
    """Draw indices of units with replacement, (RESAMPLES, count): the same for the same stream."""
    generator = np.random.default_rng([SEED, stream])
    return generator.integers(0, count, (RESAMPLES, count))


def percentiles(value: float, draws: np.ndarray, n: int) -> Interval:
    """Return a statistic of `n` units with the 95 % percentile interval of its draws."""
    low, high = np.quantile(draws, (0.025, 0.975)) if n > 1 else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), n)


def share(hits: int, count: int) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson 1934), also for all or none."""
    from scipy.stats import binomtest

    found = binomtest(int(hits), int(count)).proportion_ci()
    return Interval(hits / count, float(found.low), float(found.high), int(count))


def require(frame: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """Raise InputError naming the first of `columns` that `frame` lacks, or that it has no rows."""
    for column in columns:
        if column not in frame.columns:
            hint = nearest(column, map(str, frame.columns))
            raise InputError(f"{what}: no column '{column}'{hint}")
    if frame.empty:
        raise InputError(f"{what}: no rows to show")


def ordered(values: Iterable[Any], first: Iterable[str] = ()) -> list:
    """Return the distinct values: those of `first` in its order, then the others as they come."""
    values = dict.fromkeys(values)
    return list(dict.fromkeys([*(value for value in first if value in values), *values]))


def summarise(frame: pd.DataFrame, by: Sequence[str], what: str = "summarise") -> pd.DataFrame:
    """Return the mean `score` with its 95 % interval for each group: `by`, mean, low, high, n.

    Probes of one edit are averaged first; the units drawn are batches where the frame has `batch`,
    else edits. A frame that has mean, low and high already is returned as it is. InputError for a
    missing column or score.
    """
    by = list(by)
    if {"mean", "low", "high"} <= set(frame.columns):
        require(frame, by, what)
        return frame.assign(n=frame.get("n", pd.NA)).reset_index(drop=True)
    require(frame, [*by, "edit", "score"], what)
    unit = "batch" if "batch" in frame.columns else "edit"
    keys = [*by, *dict.fromkeys((unit, "edit"))]
    edits = frame.groupby(keys, sort=False, observed=True)["score"].mean().reset_index()
    rows = [
        [*key, *interval(group["score"].tolist(), group[unit].tolist())]
        for key, group in edits.groupby(by, sort=False, observed=True)
    ]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])
