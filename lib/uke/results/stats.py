"""Bootstrap intervals, paired tests and the correction for many tests."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uke.errors import InputError

RESAMPLES, AT_ONCE, SEED = 9999, 1000, 2024


class Interval(NamedTuple):
    """A mean, its 95 % interval (NaN for a single unit) and the number of units resampled."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Score:
    """A cell of a table, shown as `mean [low, high]`; `best` is set in bold."""

    mean: float
    low: float | None = None
    high: float | None = None
    best: bool = False


def interval(values: Sequence[float], groups: Sequence[Any] | None = None) -> Interval:
    """Return the mean of `values` (N,) with its bootstrap interval.

    Units are drawn: values (edits), or whole `groups` of them (batches). InputError for no value,
    or one that is not finite.
    """
    sums, counts = units(values, groups)
    return bootstrapped(lambda drawn: sums[drawn].sum(-1) / counts[drawn].sum(-1), len(sums))


def p_value(differences: Sequence[float]) -> float:
    """Return p of the sign-flip test that differences (N,) have no mean; exact up to N = 13."""
    from scipy.stats import permutation_test

    if len(differences) < 2:
        return 1.0
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": AT_ONCE}
    options |= {"vectorized": True, "rng": np.random.default_rng(SEED)}
    return float(permutation_test((np.asarray(differences, float),), np.sum, **options).pvalue)


def holm(ps: Iterable[float]) -> list[float]:
    """Return adjusted p values in the order given, holding the family-wise error (Holm 1979)."""
    ranked = pd.Series(list(ps), dtype=float).sort_values(kind="stable")
    adjusted = (ranked * np.arange(len(ranked), 0, -1)).cummax().clip(upper=1)
    return adjusted.sort_index().tolist()


def units(values: Sequence[float], groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of the values of each unit: a value, or a group of them; (units,)."""
    values = np.asarray(values, dtype=float)
    absent = (~np.isfinite(values)).sum()
    if not len(values) or absent:
        found = f"{absent} missing of {values.size}"
        raise InputError(f"interval: expected finite values, found {found}")
    if groups is None:
        return values, np.ones_like(values)
    codes, names = pd.factorize(np.asarray(groups))
    counts = np.bincount(codes, minlength=len(names)).astype(float)
    return np.bincount(codes, values, len(names)), counts


def bootstrapped(statistic: Callable[..., np.ndarray], *counts: int) -> Interval:
    """Return a statistic with its 95 % percentile bootstrap interval (Efron 1979).

        bootstrapped(lambda drawn: values[drawn].mean(-1), len(values))

    `statistic` takes the indices of the units drawn, (resamples, count) or all of them (count,);
    of several independent samples of `counts` units one array for each.
    """
    value = statistic(*map(np.arange, counts))
    if max(counts) < 2:
        return Interval(float(value), np.nan, np.nan, sum(counts))
    generators = [np.random.default_rng([SEED, stream]) for stream in range(len(counts))]
    draws = []
    for start in range(0, RESAMPLES, AT_ONCE):
        rows = min(AT_ONCE, RESAMPLES - start)
        drawn = zip(generators, counts, strict=True)
        draws.append(statistic(*(each.integers(0, count, (rows, count)) for each, count in drawn)))
    low, high = np.quantile(np.concatenate(draws), (0.025, 0.975))
    return Interval(float(value), float(low), float(high), sum(counts))


def share(hits: int, count: int) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson 1934), also for all or none."""
    from scipy.stats import binomtest

    found = binomtest(int(hits), int(count)).proportion_ci()
    return Interval(hits / count, float(found.low), float(found.high), int(count))


def ordered(values: Iterable[Any], first: Iterable[str] = ()) -> list:
    """Return the distinct values: those of `first` in its order, then the others as they come."""
    values = dict.fromkeys(values)
    return list(dict.fromkeys([*(value for value in first if value in values), *values]))


def summarise(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean `score` with its 95 % interval for each group: `by`, mean, low, high, n.

    Probes of one edit are averaged first; the units drawn are batches where the frame has `batch`,
    else edits.
    """
    by, unit = list(by), "batch" if "batch" in frame else "edit"
    keys = [*by, *dict.fromkeys((unit, "edit"))]
    edits = frame.groupby(keys, sort=False, observed=True)["score"].mean().reset_index()
    rows = [
        [*key, *interval(group["score"].tolist(), group[unit].tolist())]
        for key, group in edits.groupby(by, sort=False, observed=True)
    ]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])
