"""Intervals of means and of balances, paired tests and the correction for many tests.

Units are batches, or edits that were written alone. From FEWEST units on, an interval is the
percentile bootstrap over units and the edits of each (Efron 1979); from fewer a t interval over
units (n - 1 degrees of freedom; jackknife, Tukey 1958), never a percentile of three.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uke.errors import InputError

RESAMPLES, AT_ONCE, SEED, FEWEST = 9999, 1000, 2024, 6
HELD = 20_000_000  # counts of draws in memory at once (160 MB), whatever the number of edits


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


def balance(efficacy: Any, locality: Any) -> Any:
    """Return the harmonic mean of max(0, efficacy) and locality, near 0 for no edit."""
    efficacy = np.maximum(efficacy, 0.0)
    total = np.asarray(efficacy + locality)
    return np.divide(2 * efficacy * locality, total, out=np.zeros_like(total), where=total > 0)


def pooled(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of values (N,), or the balance of means of pairs (N, 2); weights (..., N)."""
    means = (weights @ values).T / weights.sum(-1)
    return means.T if values.ndim == 1 else balance(*means)


def area(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over localities from 0 to 1 of the best efficacy at such a locality or more.

    values (S, N, 2): efficacy and locality of N edits at S strengths; weights (..., N).
    """
    means = np.moveaxis(weights @ values, 0, -2) / weights.sum(-1)[..., None, None]  # (..., S, 2)
    order = np.argsort(-means[..., 1], axis=-1, kind="stable")
    efficacy, locality = (np.take_along_axis(means[..., side], order, -1) for side in (0, 1))
    best = np.maximum.accumulate(np.maximum(efficacy, 0), axis=-1)
    lower = np.concatenate([locality[..., 1:], np.zeros_like(locality[..., :1])], axis=-1)
    return (best * (locality - lower)).sum(-1)


def interval(values: Sequence, groups: Sequence[Any] | None = None) -> Interval:
    """Return `pooled` values with its interval; units are values (edits), or `groups` (batches).

    InputError for no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=float)
    lost = (~np.isfinite(values)).sum()
    if lost or not len(values):
        raise InputError(f"interval: expected finite values, found {lost} missing of {len(values)}")
    groups = range(len(values)) if groups is None else groups
    return estimated(lambda drawn: pooled(values, drawn), groups)


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
    adjusted = (ranked * np.arange(ranked.count(), ranked.count() - len(ranked), -1)).cummax()
    return adjusted.clip(upper=1).sort_index().tolist()


def estimated(statistic: Callable[..., np.ndarray], *samples: Sequence[Any]) -> Interval:
    """Return a statistic with its 95 % interval.

        estimated(lambda drawn: pooled(values, drawn), batches)

    `samples` has the unit of every edit of each independent sample.
    `statistic` takes how often each edit is drawn, (resamples, edits) or (edits,), of each sample.
    """
    codes = [pd.factorize(np.asarray(each))[0] for each in samples]
    counts = [1 + int(own.max()) for own in codes]
    value = float(statistic(*(np.ones(len(own)) for own in codes)))
    if min(counts) < FEWEST:
        return Interval(value, *_jackknife(statistic, value, codes), sum(counts))
    at_once = max(1, HELD // sum(map(len, codes)))
    parts = (_draws(own, stream, at_once) for stream, own in enumerate(codes))
    draws = np.concatenate([statistic(*drawn) for drawn in zip(*parts, strict=True)])
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(value, float(low), float(high), sum(counts))


def _draws(codes: np.ndarray, stream: int, at_once: int) -> Iterator[np.ndarray]:
    """Yield how often edits are drawn, so many resamples at once: units, then as many of each."""
    generator, sizes = np.random.default_rng([SEED, stream]), np.bincount(codes)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        units = generator.integers(0, len(sizes), (count, len(sizes)))
        places = units + len(sizes) * np.arange(count)[:, None]
        times = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        drawn = times[:, codes].astype(float)
        for own in members:
            if (size := len(own)) > 1:
                many = size * times[:, codes[own[0]]]
                drawn[:, own] = generator.multinomial(many, np.full(size, 1 / size))
        yield drawn


def _jackknife(statistic: Callable[..., np.ndarray], value: float, codes: list) -> tuple:
    """Return the ends of the t interval; each sample adds its variance (Satterthwaite 1946)."""
    from scipy.stats import t

    variances, freedoms, full = [], [], [np.ones(len(own)) for own in codes]
    for at, own in enumerate(codes):
        n = 1 + own.max()
        if n < 2:
            return np.nan, np.nan
        left = [statistic(*full[:at], 1.0 * (own != out), *full[at + 1 :]) for out in range(n)]
        variances.append((n - 1) ** 2 / n * np.var(left, ddof=1))
        freedoms.append(n - 1)
    total, parts = sum(variances), np.square(variances) / freedoms
    half = t.ppf(0.975, total**2 / parts.sum()) * np.sqrt(total) if parts.sum() else 0.0
    return float(value - half), float(value + half)


def share(hits: int, count: int) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson 1934), also for all or none."""
    from scipy.stats import binomtest

    found = binomtest(int(hits), int(count)).proportion_ci()
    return Interval(hits / count, float(found.low), float(found.high), int(count))


def ordered(values: Iterable[Any], first: Iterable[str] = ()) -> list:
    """Return the distinct values: those of `first` in its order, then the others as they come."""
    values = dict.fromkeys(values)
    return list(dict.fromkeys([*(value for value in first if value in values), *values]))


def pairs(frame: pd.DataFrame) -> np.ndarray:
    """Return the scores (N,), or those of efficacy and `kept` locality (N, 2) where they are."""
    both = "kept" in frame and frame["kept"].notna().any()
    return frame[["score", "kept"] if both else "score"].to_numpy(float)


def overall(frame: pd.DataFrame) -> float:
    """Return the mean `score` of the edits of a frame, or their balance where they have `kept`."""
    return float(pooled(pairs(frame), np.ones(len(frame))))


def summarise(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean `score` (see `pooled`) with its 95 % interval for each group: `by`, mean,
    low, high, n.

    Probes of one edit are averaged first; the units drawn are batches where the frame has `batch`,
    else edits, as those of a floor, which no batch has.
    """
    if "batch" in frame:
        frame = frame.assign(batch=frame["batch"].astype(object).fillna(frame["edit"]))
    by, unit = list(by), "batch" if "batch" in frame else "edit"
    keys = [*by, *dict.fromkeys((unit, "edit"))]
    values = [name for name in ("score", "kept") if name in frame]
    edits = frame.groupby(keys, sort=False, observed=True)[values].mean().reset_index()
    rows = [
        [*key, *interval(pairs(group), group[unit].tolist())]
        for key, group in edits.groupby(by, sort=False, observed=True)
    ]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])
