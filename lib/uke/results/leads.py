"""Who is to be beaten and by how much: the best peer of development rows, leads, their trend, and what tells methods apart."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import log2

import numpy as np
import pandas as pd

from uke.results import rows
from uke.results.effects import SIDES
from uke.errors import InputError
from uke.results.stats import RESAMPLES, SEED, Interval, holm, interval, paired, require
from uke.methods.catalog import nearest_first
from uke.project import Paths

LOCALITY, SKILL = SIDES["locality"], ("general",)


def on_development(places: Sequence[Paths], batch_size: int, among: Sequence[str]) -> pd.Series:
    """Average metric of the best trial of each of these methods on development edits, the best first.

    Of the batch sizes that were tuned, the one nearest to `batch_size` (by ratio; the smaller of two). Read from the
    committed rows of `tuning` of the first of the places that has them; empty where none has any of these methods.
    """
    for paths in places:
        if paths.exported("tuning").is_file():
            frame = pd.read_parquet(paths.exported("tuning"))
            frame = frame[frame["method"].isin(among)]
            if len(frame):
                size = nearest_first(frame["batch_size"].unique(), batch_size)[0]
                scores = rows.average(rows.headline(frame[frame["batch_size"] == size]))
                means = scores.groupby(["method", "level"])["score"].mean()
                return means.groupby("method").max().sort_values(ascending=False)
    return pd.Series(dtype=float)


def lead(averages: pd.DataFrame, method: str, peer: str) -> tuple[Interval, Interval]:
    """How far a method is ahead of a peer in points (hundredths) of the average metric, and in percent of the peer's.

    `averages` is what `rows.average` gives at one batch size. Paired by edit; the units drawn are edits, or batches where
    edits share weights.
    """
    own, other = _side_by_side(averages, method, peer)
    batches = own.index.get_level_values("batch")
    points = interval(100 * (own - other).to_numpy(), batches)
    relative = _ratio(own.to_numpy(), other.to_numpy(), batches)
    return points, relative


def differences(averages: pd.DataFrame, method: str, peer: str) -> tuple[pd.Series, pd.Index]:
    """The lead of each edit in points, and the edit's batch, as `trend` reads them; InputError as `lead` has."""
    own, other = _side_by_side(averages, method, peer)
    return 100 * (own - other), own.index.get_level_values("batch")


def _side_by_side(averages: pd.DataFrame, method: str, peer: str) -> list[pd.Series]:
    """The scores of both by batch and edit, in one order."""
    require(averages, ["method", "batch", "edit", "score"], "lead")
    own, other = (
        averages[averages["method"] == name].set_index(["batch", "edit"])["score"].sort_index()
        for name in (method, peer)
    )
    if own.empty or list(own.index) != list(other.index):
        raise InputError(
            f"lead: {method} and {peer}: expected the same edits under both, found {len(own)} and {len(other)}"
        )
    return [own, other]


def _ratio(own: np.ndarray, other: np.ndarray, groups: Sequence) -> Interval:
    """100 (sum own / sum other - 1) with its bootstrap interval over whole groups."""
    codes, names = pd.factorize(np.asarray(groups))
    sums = np.stack([np.bincount(codes, one, len(names)) for one in (own, other)])  # (2, groups)
    drawn = _draws(len(names))
    values = sums[:, drawn].sum(-1)  # (2, resamples)
    ends = (
        np.quantile(100 * (values[0] / values[1] - 1), (0.025, 0.975))
        if len(names) > 1
        else (np.nan, np.nan)
    )
    return Interval(float(100 * (sums[0].sum() / sums[1].sum() - 1)), *map(float, ends), len(names))


def trend(found: Mapping[int, tuple[Sequence[float], Sequence]]) -> Interval:
    """Points by which a lead grows with every doubling of the batch size: the slope of least squares on log2 of the size.

    `found` has for each batch size the differences of its edits in points, and the batch of each (`differences`). Batches are drawn
    anew within each size; `n` counts them all. InputError for a single size.
    """
    if len(found) < 2:
        raise InputError("trend: one batch size; expected two or more")
    sizes = np.array([log2(size) for size in found])
    centred = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()
    means, resampled, count = [], [], 0
    for number, (values, batches) in enumerate(found.values()):
        codes, names = pd.factorize(np.asarray(batches))
        sums, counts = (
            np.bincount(codes, np.asarray(values, float), len(names)),
            np.bincount(codes, minlength=len(names)),
        )
        drawn = _draws(len(names), number)
        means.append(sums.sum() / counts.sum())
        resampled.append(sums[drawn].sum(-1) / counts[drawn].sum(-1))
        count += len(names)
    slopes = centred @ np.array(resampled)
    return Interval(
        float(centred @ np.array(means)), *map(float, np.quantile(slopes, (0.025, 0.975))), count
    )


def _draws(count: int, stream: int = 0) -> np.ndarray:
    return np.random.default_rng([SEED, stream]).integers(
        0, count, (RESAMPLES, count)
    )  # (resamples, count)


def separation(frame: pd.DataFrame) -> dict[str, Interval]:
    """How well a set of probes tells methods apart: of the variance of scores, edits aside, the share that lies between methods.

    `frame` has the columns method, edit, kind, score: as many probes of locality (`LOCALITY`) as of a general skill for
    each edit under every method, else InputError. Gives `locality`, `general` and their `difference`, bootstrapped over edits.
    """
    tables = {}
    for name, kinds in (("locality", LOCALITY), ("general", SKILL)):
        own = frame[frame["kind"].isin(kinds)]
        counts = own.groupby(["method", "edit"])["score"].agg(["size", "mean"])
        tables[name] = counts["mean"].unstack("edit")  # (methods, edits)
        tables[f"{name} size"] = counts["size"]
    sizes = {size for name in ("locality", "general") for size in tables[f"{name} size"]}
    shapes = {tables[name].shape for name in ("locality", "general")}
    if (
        len(sizes) != 1
        or len(shapes) != 1
        or next(iter(shapes))[0] < 2
        or any(tables[name].isna().any(axis=None) for name in ("locality", "general"))
    ):
        raise InputError(
            f"separation: probes of an edit: {sorted(sizes)}; expected as many of locality as of a general skill, under two methods or more"
        )
    edits = tables["locality"].shape[1]
    shares = {
        name: (
            _share(tables[name].to_numpy()[:, None]),
            _share(tables[name].to_numpy()[:, _draws(edits)]),
        )
        for name in ("locality", "general")
    }
    shares["difference"] = tuple(
        shares["locality"][place] - shares["general"][place] for place in (0, 1)
    )
    return {
        name: Interval(float(value[0]), *map(float, np.quantile(drawn, (0.025, 0.975))), edits)
        for name, (value, drawn) in shares.items()
    }


def _share(scores: np.ndarray) -> np.ndarray:
    """Of scores (methods, resamples, edits): the sum of squares between methods over that and what neither edit nor method explains."""
    centred = scores - scores.mean(axis=0, keepdims=True)  # each edit's own level is taken off
    between = centred.mean(axis=-1, keepdims=True)  # (methods, resamples, 1)
    explained = (between**2).sum(axis=(0, 2)) * scores.shape[-1]
    left = ((centred - between) ** 2).sum(axis=(0, 2))
    total = explained + left
    return np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def told_apart(frame: pd.DataFrame, kinds: Sequence[str]) -> tuple[int, int]:
    """Pairs of methods that probes of these kinds tell apart (sign-flip test by edit, Holm-corrected, 5 %), and all pairs."""
    means = (
        frame[frame["kind"].isin(kinds)].groupby(["method", "edit"])["score"].mean().unstack("edit")
    )
    found = [
        paired(means.loc[one], means.loc[other]).p for one, other in combinations(means.index, 2)
    ]
    return sum(p < 0.05 for p in holm(found)), len(found)
