"""Compare methods and factor levels: scores beside no edit, paired contrasts, leads, a trend."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from uke.data.edits import AVERAGE, KINDS, in_group
from uke.errors import InputError, nearest
from uke.project import Paths
from uke.results import rows
from uke.results.metrics import METRICS
from uke.results.stats import (
    Interval,
    Score,
    holm,
    interval,
    ordered,
    paired,
    percentiles,
    require,
    resampled,
    units,
)

BEFORE = "no edit"
SIDES = {side: in_group(side) for side in ("efficacy", "locality")}
LABELS = {name: kind.label for name, kind in KINDS.items()} | {
    "average": "Average",
    "efficacy": "Efficacy",
    "locality": "Locality",
    "reading": "Reading",
    "detail_held_out": "Details, held out",
    "last_prompt_token": "last prompt token",
    "target_tokens": "all target tokens",
}
_PLAIN = re.compile(
    r"(first|second)_half|eighth_\d|loss_scope|chat_template|end_of_turn|batch_size"
)
COSTS = ["learning_rate", "steps", "train_seconds", "answer_seconds", "peak_mib", "change_norm"]


def label(name: Any) -> str:
    """Return a kind of probe, a factor or a level as readers see it; other names as they are."""
    name = str(name)
    return LABELS.get(name) or (name.replace("_", " ") if _PLAIN.fullmatch(name) else name)


def cells(frame: pd.DataFrame) -> list[str]:
    """Name the cell of each row: its method, and its level if it has one of its own."""
    pairs = zip(frame["method"], frame["level"].fillna(""), strict=True)
    return [name if level in ("", name) else f"{name}, {label(level)}" for name, level in pairs]


# --- Scores ---------------------------------------------------------------------------------------


def scored(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Score every cell (a method at a level) and the unedited model by kind of probe.

    The average metric, over those of its kinds that the data has (`lacking` names the others), is
    the kind `average`. Columns: method, level, cell (both in words), edit, kind, score. The
    unedited model's method, level and cell are `no edit`; cells keep the order of `after`.
    InputError where cells differ in their edits.
    """
    kinds = _averaged(after)
    after = after.assign(level=after["level"].fillna(""))
    parts = []
    for frame, phase in ((after, "after"), (before, "before")):
        primary = rows.primary(frame, phase)
        parts.append(pd.concat([primary, rows.average(primary, kinds).assign(kind="average")]))
    parts[1] = parts[1].assign(method=BEFORE, level=BEFORE)
    both = pd.concat(parts, ignore_index=True)[["method", "level", "edit", "kind", "score"]]
    places = {cell: place for place, cell in enumerate(dict.fromkeys(_pairs(after)))}
    order = pd.Series([places.get(cell, len(places)) for cell in _pairs(both)])
    both = both.iloc[order.argsort(kind="stable")].reset_index(drop=True)
    return both.assign(cell=cells(both))


def _averaged(after: pd.DataFrame) -> list[str]:
    return [kind for kind in AVERAGE if kind in set(after["kind"])]


def _pairs(frame: pd.DataFrame) -> Iterable[tuple[str, str]]:
    return zip(frame["method"], frame["level"], strict=True)


def lacking(after: pd.DataFrame) -> list[str]:
    """Return the kinds of the average metric that the data has no probe of."""
    return [kind for kind in AVERAGE if kind not in set(after["kind"])]


def by_batch(after: pd.DataFrame) -> pd.DataFrame:
    """Score every method at every batch size by kind of probe; methods may differ in their edits.

    The average metric, over those of its kinds that the data has, is the kind `average`. Columns:
    batch_size, method, batch, edit, kind, score, with the methods in the order of `after`.
    """
    primary, kinds = rows.primary(after), _averaged(after)
    averages = [
        rows.average(own, kinds).assign(kind="average")
        for _, own in primary.groupby(["batch_size", "method"], sort=False)
    ]
    found = pd.concat([primary, *averages])
    place = {name: at for at, name in enumerate(after["method"].unique())}
    found = found.sort_values("method", key=lambda names: names.map(place), kind="stable")
    columns = ["batch_size", "method", "batch", "edit", "kind", "score"]
    return found[columns].reset_index(drop=True)


def sides(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the average metric and its halves `efficacy` and `locality`, as kinds.

    A half is left out where the data lacks a kind of it.
    """
    parts, cell = [scores[scores["kind"] == "average"]], ["method", "level", "cell", "edit"]
    for side, kinds in SIDES.items():
        if set(kinds) <= set(scores["kind"]):
            own = scores[scores["kind"].isin(kinds)].groupby(cell, sort=False)["score"]
            parts.append(own.mean().reset_index().assign(kind=side))
    return pd.concat(parts)[list(scores.columns)].reset_index(drop=True)


def plane(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean efficacy and locality of every method for which the data has all kinds."""
    means = scores.groupby(["method", "kind"], sort=False)["score"].mean().unstack()
    means = means.reindex(scores["method"].unique())
    found = {
        side: means.reindex(columns=list(kinds)).mean(axis=1, skipna=False)
        for side, kinds in SIDES.items()
    }
    return pd.DataFrame(found).dropna().reset_index()


def ranking(scores: pd.DataFrame) -> list[str]:
    """Return the methods by their mean average metric, the best first."""
    own = scores[scores["kind"] == "average"]
    return list(own.groupby("method")["score"].mean().sort_values(ascending=False).index)


def mean(scores: pd.DataFrame, method: str, kind: str = "average") -> Interval:
    """Return the mean score of a method (or of `no edit`) over edits."""
    own = scores[(scores["method"] == method) & (scores["kind"] == kind)]
    return interval(own["score"].to_numpy())


# --- Contrasts ------------------------------------------------------------------------------------


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Return weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

        contrasts(scores, {"gain": {("FT-M", "all"): 1, ("FT-M", "eighth_3"): -1}})

    `wanted` gives the weight of each cell (method, level) by the effect's name; an effect of which
    a cell has no rows is left out. Columns: effect, kind, difference, low, high, p (Holm-corrected
    over all effects given together), n. InputError for weights that do not sum to 0, and where the
    cells of an effect differ in their edits.
    """
    present, found = set(_pairs(scores)), []
    for name, weights in wanted.items():
        if abs(total := sum(weights.values())) > 1e-9:
            raise InputError(f"effect {name}: its weights sum to {total:g}; expected 0")
        for kind in ordered(scores["kind"], KINDS) if set(weights) <= present else ():
            own = scores[scores["kind"] == kind]
            gained = {cell: weight for cell, weight in weights.items() if weight > 0}
            lost = {cell: -weight for cell, weight in weights.items() if weight < 0}
            found.append((name, kind, *paired(_weighted(own, gained), _weighted(own, lost))))
    table = pd.DataFrame(found, columns=["effect", "kind", "difference", "low", "high", "p", "n"])
    return table.assign(p=holm(table["p"]))


def _weighted(scores: pd.DataFrame, weights: Mapping[tuple[str, str], float]) -> pd.Series:
    """Sum cells for each edit, in points; NaN, which `paired` refuses, where a cell lacks it."""
    by_cell = dict(list(scores.groupby(["method", "level"])))
    parts = [
        100 * weight * by_cell[cell].set_index("edit")["score"] for cell, weight in weights.items()
    ]
    return pd.concat(parts, axis=1).sum(axis=1, skipna=False)


def effect(effects: pd.DataFrame, effect: str, kind: str) -> Interval | None:
    """Return one effect on a kind; None where it is left out."""
    row = effects[(effects["effect"] == effect) & (effects["kind"] == kind)]
    return None if row.empty else Interval(*row.iloc[0][["difference", "low", "high", "n"]])


def shown(effects: pd.DataFrame) -> pd.DataFrame:
    """Return the effects as a table: each with its interval in points, and p."""
    columns = {name: effects[name] for name in ("effect", "kind")}
    columns["difference (points)"] = _intervals(effects, "difference", "low", "high")
    return pd.DataFrame(columns | {"p (Holm)": effects["p"], "edits": effects["n"]})


def _intervals(frame: pd.DataFrame, *ends: str) -> list[Score]:
    return [Score(*values) for values in frame[list(ends)].itertuples(index=False)]


def gap(scores: pd.DataFrame, method: str, other: str) -> Interval | None:
    """Return the average metric of one method minus another's in points; None without either.

    `scores` is what `scored` gives of methods without levels.
    """
    own = scores[scores["kind"] == "average"]
    found = contrasts(own, {"gap": {(method, ""): 1, (other, ""): -1}})
    return effect(found, "gap", "average")


def gains(scores: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Return how far every method is above no edit and a baseline in the average metric, in points.

    `scores` is what `scored` gives of methods without levels. p values of the sign-flip tests are
    Holm-corrected within each column.
    """
    own = scores[scores["kind"] == "average"]
    names = [name for name in own["method"].unique() if name != BEFORE]
    columns = {"method": names}
    for other in filter(None, (BEFORE, baseline)):
        against = (other, own.loc[own["method"] == other, "level"].iloc[0])
        wanted = {name: {(name, ""): 1, against: -1} for name in names if name != other}
        found = contrasts(own, wanted).set_index("effect").reindex(names)
        score = _intervals(found, "difference", "low", "high")
        columns[f"minus {other}"] = [each if each.mean == each.mean else None for each in score]
        columns[f"p ({other})"] = found["p"].to_numpy()
    return pd.DataFrame(columns)


# --- Leads over baselines -------------------------------------------------------------------------


def nearest_first(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Sort batch sizes by their ratio to one, the nearest first; of two alike the smaller."""
    return sorted(sizes, key=lambda size: (max(size / batch_size, batch_size / size), size))


def best_baselines(
    places: Sequence[Paths], sizes: Sequence[int], baselines: Sequence[str]
) -> dict[int, str]:
    """Return the baseline whose best trial on development edits is best, for each batch size.

    Of the batch sizes that were tuned, the one nearest by ratio counts. Read from the committed
    rows of `tuning` of the first of the places that has any of the baselines; empty for none.
    """
    for paths in places:
        if paths.exported("tuning").is_file():
            frame = rows.committed(paths, "tuning")
            frame = frame[frame["method"].isin(baselines)]
            if len(frame):
                trials = ["batch_size", "method", "level"]
                means = rows.average(rows.primary(frame)).groupby(trials)["score"].mean()
                best = means.groupby("batch_size").idxmax()
                return {size: best[nearest_first(best.index, size)[0]][1] for size in sizes}
    return {}


def best_here(averages: pd.DataFrame, baselines: Sequence[str]) -> dict[int, str]:
    """Return the best baseline at each batch size on these very edits, which flatters it."""
    own = averages[averages["method"].isin(baselines)]
    means = own.groupby(["batch_size", "method"])["score"].mean()
    return {size: scores.idxmax()[1] for size, scores in means.groupby("batch_size")}


def lead(averages: pd.DataFrame, method: str, baseline: str) -> tuple[Interval, Interval]:
    """Return how far a method is ahead in points, and in percent of the baseline's average.

    `averages` has the average metric at one batch size by method, batch and edit. Paired by edit;
    the units drawn are batches. InputError where the edits differ.
    """
    own, other, batches = _same_edits(averages, method, baseline)
    points = interval(100 * (own - other).to_numpy(), batches)
    own, other = (units(scores, batches)[0] for scores in (own, other))  # (batches,)
    drawn = resampled(len(own))
    percent = 100 * (own[drawn].sum(-1) / other[drawn].sum(-1) - 1)
    return points, percentiles(100 * (own.sum() / other.sum() - 1), percent, len(own))


def _same_edits(
    averages: pd.DataFrame, method: str, baseline: str
) -> tuple[pd.Series, pd.Series, pd.Index]:
    """Return the scores of both in one order, and the batch of each edit."""
    require(averages, ["method", "batch", "edit", "score"], "lead")
    own, other = (
        averages[averages["method"] == name].set_index(["batch", "edit"])["score"].sort_index()
        for name in (method, baseline)
    )
    if own.empty or list(own.index) != list(other.index):
        found = f"found {len(own)} and {len(other)}"
        raise InputError(f"lead: {method} and {baseline}: expected the same edits, {found}")
    return own, other, own.index.get_level_values("batch")


def leads(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> pd.DataFrame:
    """Return the lead of a method over the best baseline of each batch size.

    Columns: batch_size, baseline; mean, low, high in points; percent, percent_low, percent_high of
    the baseline's average; batches. Intervals are over batches.
    """
    found = []
    for size, baseline in best.items():
        points, percent = lead(averages[averages["batch_size"] == size], method, baseline)
        found.append((size, baseline, *points[:3], *percent[:3], points.n))
    names = ["mean", "low", "high", "percent", "percent_low", "percent_high", "batches"]
    return pd.DataFrame(found, columns=["batch_size", "baseline", *names])


def shown_leads(leads: pd.DataFrame) -> pd.DataFrame:
    """Return leads as a table, each with its interval."""
    table = leads[["batch_size", "baseline", "batches"]].copy()
    table["lead (points)"] = _intervals(leads, "mean", "low", "high")
    table["lead (percent)"] = _intervals(leads, "percent", "percent_low", "percent_high")
    return table


def trend(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> Interval:
    """Return the points by which that lead grows with every doubling of the batch size.

    It is the slope of least squares on log2 of the size. Batches are drawn anew within each size;
    `n` counts them all. InputError for a single size.
    """
    if len(best) < 2:
        raise InputError("trend: one batch size; expected two or more")
    sizes = np.log2(list(best))
    slope = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()
    means, draws, count = [], [], 0
    for stream, (size, baseline) in enumerate(best.items()):
        at_size = averages[averages["batch_size"] == size]
        own, other, batches = _same_edits(at_size, method, baseline)
        sums, edits = units(100 * (own - other), batches)
        drawn = resampled(len(sums), stream)
        means.append(sums.sum() / edits.sum())
        draws.append(sums[drawn].sum(-1) / edits[drawn].sum(-1))
        count += len(sums)
    return percentiles(slope @ np.array(means), slope @ np.array(draws), count)


# --- What tells methods apart ---------------------------------------------------------------------


def separation(after: pd.DataFrame) -> tuple[dict[str, Interval], pd.DataFrame]:
    """Return how well locality and a general skill tell methods apart, and the same as a table.

    That is, of the variance of scores, edits aside, the share that lies between methods: by name
    `locality`, `general` and their `difference`, bootstrapped over edits. The table also counts
    the pairs of methods that a sign-flip test separates (Holm-corrected, 5 %). Both are empty
    where the data has no such probes or there is one method. InputError where edits have more
    probes of one sort than of the other.
    """
    primary, tables, counts = rows.primary(after), {}, set()
    sorts = {"locality": in_group("locality"), "general": in_group("skill")}
    lacks = set().union(*sorts.values()) - set(primary["kind"])
    if lacks or primary["method"].nunique() < 2:
        return {}, pd.DataFrame()
    for name, kinds in sorts.items():
        own = primary[primary["kind"].isin(kinds)].assign(
            total=lambda frame: frame["score"] * frame["probes"]
        )
        sums = own.groupby(["method", "edit"])[["total", "probes"]].sum()
        counts |= set(sums["probes"])
        tables[name] = (sums["total"] / sums["probes"]).unstack("edit")  # (methods, edits)
    if len(counts) > 1 or any(table.isna().any(axis=None) for table in tables.values()):
        found = f"found {sorted(counts)}"
        raise InputError(f"separation: expected as many probes for each edit and sort, {found}")
    edits = tables["locality"].shape[1]
    drawn = resampled(edits)
    shares = {}
    for name, table in tables.items():
        scores = table.to_numpy()
        shares[name] = _between(scores[:, None])[0], _between(scores[:, drawn])
    (mean, draws), (other, other_draws) = shares.values()
    shares["difference"] = mean - other, draws - other_draws
    found = {name: percentiles(*share, edits) for name, share in shares.items()}
    columns = {"probes": list(found), "separation": [Score(*value[:3]) for value in found.values()]}
    pairs = {name: _pairs_apart(primary, kinds) for name, kinds in sorts.items()}
    columns["pairs of methods told apart"] = [pairs.get(name) for name in found]
    return found, pd.DataFrame(columns)


def _between(scores: np.ndarray) -> np.ndarray:
    """Divide squares between methods by all that edits do not explain, (resamples,).

    `scores`: (methods, resamples, edits).
    """
    centred = scores - scores.mean(axis=0, keepdims=True)  # each edit's own level is taken off
    between = centred.mean(axis=-1, keepdims=True)  # (methods, resamples, 1)
    explained = (between**2).sum(axis=(0, 2)) * scores.shape[-1]
    total = explained + ((centred - between) ** 2).sum(axis=(0, 2))
    return np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def _pairs_apart(primary: pd.DataFrame, kinds: Sequence[str]) -> str:
    own = primary[primary["kind"].isin(kinds)].groupby(["method", "edit"])["score"]
    means = own.mean().unstack("edit")
    pairs = combinations(means.index, 2)
    ps = holm([paired(means.loc[one], means.loc[other]).p for one, other in pairs])
    return f"{sum(p < 0.05 for p in ps)} of {len(ps)}"


# --- Read off the rows ----------------------------------------------------------------------------


def published(after: pd.DataFrame, kinds: Sequence[str] = SIDES["efficacy"]) -> pd.DataFrame:
    """Return every metric against the reference by method, level and kind.

    Each is a mean over the questions of an edit, then over edits.
    """
    texts = after[after["kind"].isin(kinds)]
    if texts.empty:
        hint = nearest(kinds[0], set(after["kind"]))
        raise InputError(f"published: no rows of {', '.join(kinds)}{hint}")
    names = [name for name in METRICS if texts[name].notna().any()]
    by = ["method", *(["level"] if texts["level"].notna().any() else []), "kind"]
    edits = texts.groupby([*by, "edit"], sort=False)[names].mean()
    return edits.groupby(by, sort=False).mean().reset_index()


def curves(after: pd.DataFrame) -> pd.DataFrame:
    """Return the loss curves: method, level, edit, step (from 0), loss (nats per token)."""
    steps = [
        (row.method, row.level, row.edit, step, loss)
        for row in after.dropna(subset="curve").itertuples()
        for step, loss in enumerate(json.loads(row.curve)["losses"])
    ]
    return pd.DataFrame(steps, columns=["method", "level", "edit", "step", "loss"])


def costs(after: pd.DataFrame, by: Sequence[str] = ("method", "level")) -> pd.DataFrame:
    """Return what writing an edit or a batch costs and how large its change is: means over them."""
    by = list(by)
    batches = after.drop_duplicates([*by, "batch"])
    return batches.groupby(by, sort=False)[COSTS].mean().reset_index()


def seconds(after: pd.DataFrame) -> pd.DataFrame:
    """Return seconds of editing and answering of every edit or batch as scores, kind `seconds`."""
    batches = after.drop_duplicates(["method", "batch_size", "batch"]).assign(kind="seconds")
    batches["score"] = batches["train_seconds"] + batches["answer_seconds"]
    return batches[["method", "batch_size", "batch", "edit", "kind", "score"]]


def windows(after: pd.DataFrame) -> pd.DataFrame:
    """Return the log-probability of the answers by window, without an edit and with it.

    Columns: method, edit, window (from 1), phase (`no edit` or `edited`), log_probability (nats
    per token).
    """
    found = [
        (row.method, row.edit, number, phase, value)
        for row in after.dropna(subset="curve").itertuples()
        for pair in json.loads(row.curve)["windows"]
        for phase, values in zip((BEFORE, "edited"), pair, strict=True)
        for number, value in enumerate(values, 1)
    ]
    return pd.DataFrame(found, columns=["method", "edit", "window", "phase", "log_probability"])


def answers(after: pd.DataFrame, edit: str, kinds: Sequence[str]) -> pd.DataFrame:
    """Return the answers to an edit's first question of each kind, the reference and `no edit`.

    Columns: kind, question, source, answer.
    """
    own = after[(after["edit"] == edit) & (after["number"] == 0)]
    parts = []
    for kind in kinds:
        found = own[own["kind"] == kind]
        first = found.head(1)
        parts.append(first.assign(source="reference", answer=first["reference"]))
        parts.append(first.assign(source=BEFORE, answer=first["before"]))
        parts.append(found.assign(source=cells(found)))
    return pd.concat(parts)[["kind", "question", "source", "answer"]].reset_index(drop=True)


def same_answers(after: pd.DataFrame, level: str, other: str) -> tuple[float, int]:
    """Return the share of answers that are the same at two levels, and how many there are."""
    place = ["method", "edit", "kind", "number"]
    both = after.pivot(index=place, columns="level", values="answer")[[level, other]].dropna()
    return float((both[level] == both[other]).mean()), len(both)
