"""Compare methods and factor levels: scores with no edit beside them, paired contrasts, leads and
their trend."""

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
LOCALITY, SKILL = in_group("locality"), in_group("skill")
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


def label(name: Any) -> str:
    """Return a kind of probe, a factor or a level as readers see it; other names stay as they
    are."""
    name = str(name)
    return LABELS.get(name) or (name.replace("_", " ") if _PLAIN.fullmatch(name) else name)


def scored(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Score every cell (a method at a level) and the unedited model by kind of probe.

    The average metric, over those of its kinds that the data has (`lacking` names the others), is
    the kind `average`. Columns: method, level, cell (both in words), edit, kind, score. The
    unedited model's method, level and cell are `no edit`; cells keep the order of `after`. Raises
    InputError where cells differ in their edits.
    """
    kinds = [kind for kind in AVERAGE if kind in set(after["kind"])]
    after, parts = after.assign(level=after["level"].fillna("")), []
    for frame, phase in ((after, "after"), (before, "before")):
        primary = rows.primary(frame, phase)
        parts.append(pd.concat([primary, rows.average(primary, kinds).assign(kind="average")]))
    parts[1] = parts[1].assign(method=BEFORE, level=BEFORE)
    both = pd.concat(parts, ignore_index=True)[["method", "level", "edit", "kind", "score"]]
    order = {cell: index for index, cell in enumerate(dict.fromkeys(_pairs(after)))}
    places = pd.Series([order.get(cell, len(order)) for cell in _pairs(both)])
    both = both.iloc[places.argsort(kind="stable")].reset_index(drop=True)
    return both.assign(cell=cells(both))


def _pairs(frame: pd.DataFrame) -> Iterable[tuple[str, str]]:
    return zip(frame["method"], frame["level"])


def cells(frame: pd.DataFrame) -> list[str]:
    """Name the cell of each row: its method, and its level if it has one of its own."""
    pairs = zip(frame["method"], frame["level"].fillna(""))
    return [name if level in ("", name) else f"{name}, {label(level)}" for name, level in pairs]


def lacking(after: pd.DataFrame) -> list[str]:
    """Return the kinds of the average metric that the data has no probe of."""
    return [kind for kind in AVERAGE if kind not in set(after["kind"])]


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


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Return weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

        contrasts(scores, {"gain": {("FT-M", "all"): 1, ("FT-M", "eighth_3"): -1}})

    `wanted` gives the weight of each cell (method, level) by the effect's name. An effect of which
    a cell has no rows is left out. Columns: effect, kind, difference, low, high, p (Holm-corrected
    over all effects given together), n. Raises InputError for weights that do not sum to 0, and
    where the cells of an effect differ in their edits.
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
    """Sum cells for each edit, in points; NaN, which `paired` refuses, for an edit that a cell
    lacks."""
    cells = dict(list(scores.groupby(["method", "level"])))
    parts = [
        100 * weight * cells[cell].set_index("edit")["score"] for cell, weight in weights.items()
    ]
    return pd.concat(parts, axis=1).sum(axis=1, skipna=False)


def shown(effects: pd.DataFrame) -> pd.DataFrame:
    """Return the effects as a table: each with its interval in points, and p."""
    intervals = effects[["difference", "low", "high"]].itertuples(index=False)
    columns = {name: effects[name] for name in ("effect", "kind")}
    columns["difference (points)"] = [Score(*values) for values in intervals]
    return pd.DataFrame(columns | {"p (Holm)": effects["p"], "edits": effects["n"]})


def effect(effects: pd.DataFrame, effect: str, kind: str) -> tuple[float, float, float, int] | None:
    """Return difference, low, high and number of edits of one effect; None where it is left out."""
    row = effects[(effects["effect"] == effect) & (effects["kind"] == kind)]
    return None if row.empty else tuple(row.iloc[0][["difference", "low", "high", "n"]])


def published(after: pd.DataFrame, kinds: Sequence[str] = SIDES["efficacy"]) -> pd.DataFrame:
    """Every metric against the reference, by method, level and kind: mean over the questions of an
    edit, then over edits."""
    texts = after[after["kind"].isin(kinds)]
    if texts.empty:
        raise InputError(
            f"published: no rows of {', '.join(kinds)}{nearest(kinds[0], set(after['kind']))}"
        )
    names = [name for name in METRICS if texts[name].notna().any()]
    levels = ["level"] if texts["level"].notna().any() else []
    by = ["method", *levels, "kind"]
    return (
        texts.groupby([*by, "edit"], sort=False)[names]
        .mean()
        .groupby(by, sort=False)
        .mean()
        .reset_index()
    )


def curves(after: pd.DataFrame) -> pd.DataFrame:
    """Return the loss curve of every training: method, level, edit, step (from 0), loss (nats per
    token)."""
    steps = [
        (row.method, row.level, row.edit, step, loss)
        for row in after.dropna(subset="curve").itertuples()
        for step, loss in enumerate(json.loads(row.curve)["losses"])
    ]
    return pd.DataFrame(steps, columns=["method", "level", "edit", "step", "loss"])


def costs(after: pd.DataFrame, by: Sequence[str] = ("method", "level")) -> pd.DataFrame:
    """What writing an edit or a batch costs and how large its change is: means over them."""
    by = list(by)
    measured = [
        "learning_rate",
        "steps",
        "train_seconds",
        "answer_seconds",
        "peak_mib",
        "change_norm",
    ]
    units = after.drop_duplicates([*by, "batch"])
    return units.groupby(by, sort=False)[measured].mean().reset_index()


def on_development(places: Sequence[Paths], batch_size: int, among: Sequence[str]) -> pd.Series:
    """Return the average metric of each method's best trial on development edits, the best first.

    Of the batch sizes that were tuned, the one nearest to `batch_size` (by ratio; the smaller of
    two). Read from the committed rows of `tuning` of the first of the places that has any of these
    methods; empty where none has.
    """
    for paths in places:
        if paths.exported("tuning").is_file():
            frame = rows.committed(paths, "tuning")
            frame = frame[frame["method"].isin(among)]
            if len(frame):
                size = nearest_first(frame["batch_size"].unique(), batch_size)[0]
                scores = rows.average(rows.primary(frame[frame["batch_size"] == size]))
                means = scores.groupby(["method", "level"])["score"].mean()
                return means.groupby("method").max().sort_values(ascending=False)
    return pd.Series(dtype=float)


def lead(averages: pd.DataFrame, method: str, baseline: str) -> tuple[Interval, Interval]:
    """Return how far a method is ahead in points of the average metric, and in percent of the
    baseline's.

    `averages` is what `rows.average` gives at one batch size. Paired by edit; the units drawn are
    edits, or batches where edits share weights.
    """
    own, other = _same_edits(averages, method, baseline)
    batches = own.index.get_level_values("batch")
    points = interval(100 * (own - other).to_numpy(), batches)
    own, other = (units(scores, batches)[0] for scores in (own, other))  # (batches,)
    drawn = resampled(len(own))
    percent = 100 * (own[drawn].sum(-1) / other[drawn].sum(-1) - 1)
    return points, percentiles(100 * (own.sum() / other.sum() - 1), percent, len(own))


def differences(averages: pd.DataFrame, method: str, baseline: str) -> tuple[pd.Series, pd.Index]:
    """Return the lead of each edit in points, and the edit's batch, as `trend` reads them."""
    own, other = _same_edits(averages, method, baseline)
    return 100 * (own - other), own.index.get_level_values("batch")


def _same_edits(averages: pd.DataFrame, method: str, baseline: str) -> list[pd.Series]:
    """Return the scores of both by batch and edit, in one order; InputError where edits differ."""
    require(averages, ["method", "batch", "edit", "score"], "lead")
    own, other = (
        averages[averages["method"] == name].set_index(["batch", "edit"])["score"].sort_index()
        for name in (method, baseline)
    )
    if own.empty or list(own.index) != list(other.index):
        raise InputError(
            f"lead: {method} and {baseline}: expected the same edits under both, "
            f"found {len(own)} and {len(other)}"
        )
    return [own, other]


def trend(leads: Mapping[int, tuple[Sequence[float], Sequence]]) -> Interval:
    """Return the points by which a lead grows with every doubling of the batch size.

    It is the slope of least squares on log2 of the size. `leads` has by batch size the differences
    of its edits in points, and the batch of each (`differences`). Batches are drawn anew within
    each size; `n` counts them all. InputError for a single size.
    """
    if len(leads) < 2:
        raise InputError("trend: one batch size; expected two or more")
    sizes = np.log2(list(leads))
    slope = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()
    means, draws, count = [], [], 0
    for stream, (values, batches) in enumerate(leads.values()):
        sums, edits = units(values, batches)
        drawn = resampled(len(sums), stream)
        means.append(sums.sum() / edits.sum())
        draws.append(sums[drawn].sum(-1) / edits[drawn].sum(-1))
        count += len(sums)
    return percentiles(slope @ np.array(means), slope @ np.array(draws), count)


def separation(frame: pd.DataFrame) -> dict[str, Interval]:
    """Return how well locality and a general skill tell methods apart.

    That is, of the variance of scores, edits aside, the share that lies between methods. `frame`
    has the columns method, edit, kind, score: as many probes of locality as of a general skill for
    each edit under every method, else InputError. Gives `locality`, `general` and their
    `difference`, bootstrapped over edits.
    """
    tables, sizes = {}, set()
    for name, kinds in (("locality", LOCALITY), ("general", SKILL)):
        own = frame[frame["kind"].isin(kinds)].groupby(["method", "edit"])["score"]
        tables[name] = own.mean().unstack("edit")  # (methods, edits)
        sizes |= set(own.size())
    one, other = tables.values()
    whole = one.shape == other.shape and not (one.isna() | other.isna()).any(axis=None)
    if len(sizes) != 1 or len(one) < 2 or not whole:
        raise InputError(
            f"separation: probes of an edit: {sorted(sizes)}; expected as many of locality as of a "
            "general skill, under two methods or more"
        )
    edits = one.shape[1]
    shares = {
        name: (_share(own.to_numpy()[:, None])[0], _share(own.to_numpy()[:, resampled(edits)]))
        for name, own in tables.items()
    }
    (mean, drawn), (other_mean, other_drawn) = shares.values()
    shares["difference"] = (mean - other_mean, drawn - other_drawn)
    return {name: percentiles(*share, edits) for name, share in shares.items()}


def _share(scores: np.ndarray) -> np.ndarray:
    """Divide squares between methods by those that edits do not explain; scores (methods,
    resamples, edits)."""
    centred = scores - scores.mean(axis=0, keepdims=True)  # each edit's own level is taken off
    between = centred.mean(axis=-1, keepdims=True)  # (methods, resamples, 1)
    explained = (between**2).sum(axis=(0, 2)) * scores.shape[-1]
    left = ((centred - between) ** 2).sum(axis=(0, 2))
    total = explained + left
    return np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def pairs_separated(frame: pd.DataFrame, kinds: Sequence[str]) -> tuple[int, int]:
    """Count the pairs of methods that probes of these kinds tell apart, and all pairs.

    By sign-flip tests paired by edit, Holm-corrected, at 5 %.
    """
    own = frame[frame["kind"].isin(kinds)].groupby(["method", "edit"])["score"]
    means = own.mean().unstack("edit")
    pairs = combinations(means.index, 2)
    ps = holm([paired(means.loc[one], means.loc[other]).p for one, other in pairs])
    return sum(p < 0.05 for p in ps), len(ps)


def leading(averages: pd.DataFrame, batch_size: int, count: int) -> set[tuple[str, str]]:
    """Return method and level of the `count` levels of each method that score best at a batch
    size."""
    means = (
        averages[averages["batch_size"] == batch_size].groupby(["method", "level"])["score"].mean()
    )
    return {place for _, own in means.groupby("method") for place in own.nlargest(count).index}


def nearest_first(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Sort batch sizes by their ratio to one, the nearest first; of two as far from it the
    smaller."""
    return sorted(sizes, key=lambda size: (max(size / batch_size, batch_size / size), size))


def by_batch(after: pd.DataFrame) -> pd.DataFrame:
    """Score every method at every batch size by kind of probe; methods may differ in their edits.

    The average metric, over those of its kinds that the data has, is the kind `average`. Columns:
    batch_size, method, batch, edit, kind, score, with the methods in the order of `after`.
    """
    primary, kinds = rows.primary(after), [kind for kind in AVERAGE if kind in set(after["kind"])]
    averages = [
        rows.average(own, kinds).assign(kind="average")
        for _, own in primary.groupby(["batch_size", "method"], sort=False)
    ]
    found = pd.concat([primary, *averages])
    place = {name: at for at, name in enumerate(after["method"].unique())}
    found = found.sort_values("method", key=lambda names: names.map(place), kind="stable")
    columns = ["batch_size", "method", "batch", "edit", "kind", "score"]
    return found[columns].reset_index(drop=True)


def ranking(scores: pd.DataFrame) -> list[str]:
    """The methods by their mean average metric, the best first."""
    own = scores[scores["kind"] == "average"]
    return list(own.groupby("method")["score"].mean().sort_values(ascending=False).index)


def plane(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean efficacy and locality of every method for which the data has all kinds of both."""
    means = scores.groupby(["method", "kind"], sort=False)["score"].mean().unstack()
    means = means.reindex(scores["method"].unique())
    found = {
        side: means.reindex(columns=list(kinds)).mean(axis=1, skipna=False)
        for side, kinds in SIDES.items()
    }
    return pd.DataFrame(found).dropna().reset_index()


def final_losses(curves: pd.DataFrame) -> pd.Series:
    """By level, the median last loss (nats per token) of its trainings."""
    return curves.groupby(["level", "method", "edit"])["loss"].last().groupby("level").median()


def windows(after: pd.DataFrame) -> pd.DataFrame:
    """Log-probability of the answers by window, without an edit and with it.

    Columns: method, edit, window (from 1), phase (`no edit` or `edited`), log_probability (nats
    per token).
    """
    found = [
        (row.method, row.edit, number, phase, value)
        for row in after.dropna(subset="curve").itertuples()
        for pair in json.loads(row.curve)["windows"]
        for phase, values in zip((BEFORE, "edited"), pair)
        for number, value in enumerate(values, 1)
    ]
    return pd.DataFrame(found, columns=["method", "edit", "window", "phase", "log_probability"])


def last_windows(windows: pd.DataFrame) -> pd.Series:
    """By method, the median log-probability of the last window of the edited answers, the highest
    first."""
    edited = windows[windows["phase"] == "edited"].sort_values("window")
    last = edited.groupby(["method", "edit"])["log_probability"].last()
    return last.groupby("method").median().sort_values(ascending=False)


def likelier(windows: pd.DataFrame) -> list[str]:
    """The methods whose edits make the answers likelier than no edit, on average over windows."""
    means = windows.groupby(["method", "phase"])["log_probability"].mean().unstack()
    return list(means.index[means["edited"] > means[BEFORE]])


def answers(after: pd.DataFrame, edit: str, kinds: Sequence[str]) -> pd.DataFrame:
    """What an edit's first question of each kind was answered with, beside the reference and the
    answer without an edit. Columns: kind, question, source, answer."""
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
    """The share of answers that are the same to the letter at two levels, and how many there
    are."""
    place = ["method", "edit", "kind", "number"]
    one, two = (after[after["level"] == each].set_index(place)["answer"] for each in (level, other))
    both = pd.concat([one, two], axis=1, join="inner").dropna()
    return float((both.iloc[:, 0] == both.iloc[:, 1]).mean()), len(both)


def of_level(published: pd.DataFrame, metric: str, kind: str = "original") -> pd.Series:
    """By level, a published metric of one kind of probe: mean over methods."""
    own = published[published["kind"] == kind]
    return own.groupby("level")[metric].mean()


def seconds(after: pd.DataFrame) -> pd.DataFrame:
    """Seconds of editing and answering of every edit or batch, as scores of the kind `seconds`."""
    units = after.drop_duplicates(["method", "batch_size", "batch"]).assign(kind="seconds")
    units["score"] = units["train_seconds"] + units["answer_seconds"]
    return units[["method", "batch_size", "batch", "edit", "kind", "score"]]


def gains(scores: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """How far every method is above no edit and above a baseline in the average metric.

    `scores` is what `scored` gives of methods without levels. In points, paired by edit, with 95 %
    intervals; p values of the sign-flip tests are Holm-corrected within each column.
    """
    own = scores[scores["kind"] == "average"]
    names = [name for name in own["method"].unique() if name != BEFORE]
    columns = {"method": names}
    for other in filter(None, (BEFORE, baseline)):
        against = (other, own.loc[own["method"] == other, "level"].iloc[0])
        wanted = {name: {(name, ""): 1, against: -1} for name in names if name != other}
        found = contrasts(own, wanted).set_index("effect").reindex(names)
        score = [Score(*each) for each in found[["difference", "low", "high"]].to_numpy()]
        columns[f"minus {other}"] = [each if each.mean == each.mean else None for each in score]
        columns[f"p ({other})"] = found["p"].to_numpy()
    return pd.DataFrame(columns)


def best_baselines(
    places: Sequence[Paths], sizes: Sequence[int], baselines: Sequence[str]
) -> dict[int, str]:
    """The best baseline for each batch size on development edits, at the tuned size nearest to it;
    empty where no development rows of any baseline are committed."""
    found = {size: on_development(places, size, baselines) for size in sizes}
    return {size: means.index[0] for size, means in found.items() if len(means)}


def best_here(averages: pd.DataFrame, baselines: Sequence[str]) -> dict[int, str]:
    """The best baseline at each batch size on these very edits, which flatters it."""
    own = averages[averages["method"].isin(baselines)]
    means = own.groupby(["batch_size", "method"])["score"].mean()
    return {size: scores.idxmax()[1] for size, scores in means.groupby("batch_size")}


def leads(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> pd.DataFrame:
    """The lead of a method over the best baseline of each batch size.

    Columns: batch_size, baseline; mean, low, high in points; percent, percent_low, percent_high of
    the baseline's average; batches. Intervals are over batches.
    """
    found = []
    for size, baseline in best.items():
        points, percent = lead(averages[averages["batch_size"] == size], method, baseline)
        found.append((size, baseline, *points[:3], *percent[:3], points.n))
    names = ["mean", "low", "high", "percent", "percent_low", "percent_high", "batches"]
    return pd.DataFrame(found, columns=["batch_size", "baseline", *names])


def lead_trend(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> Interval:
    """Points by which that lead grows with every doubling of the batch size (see `trend`)."""
    at = {size: averages[averages["batch_size"] == size] for size in best}
    return trend({size: differences(at[size], method, name) for size, name in best.items()})


def shown_leads(leads: pd.DataFrame) -> pd.DataFrame:
    """Leads as a table, each with its interval."""
    points = [Score(*each) for each in leads[["mean", "low", "high"]].to_numpy()]
    columns = ["percent", "percent_low", "percent_high"]
    percent = [Score(*each) for each in leads[columns].to_numpy()]
    table = leads.drop(columns=["mean", "low", "high", *columns])
    return table.assign(**{"lead (points)": points, "lead (percent)": percent})


def separation_table(after: pd.DataFrame) -> tuple[dict[str, Interval], pd.DataFrame]:
    """How well locality and a general skill tell methods apart: `separation`, and the same as a
    table with the pairs of methods that each separates. Both are empty where the data has no such
    probes or there is one method."""
    primary = rows.primary(after)
    if not {*LOCALITY, *SKILL} <= set(primary["kind"]) or primary["method"].nunique() < 2:
        return {}, pd.DataFrame()
    found = separation(primary.loc[primary.index.repeat(primary["probes"])])
    pairs = {"locality": LOCALITY, "general": SKILL}
    told = {
        name: "{} of {}".format(*pairs_separated(primary, kinds)) for name, kinds in pairs.items()
    }
    table = pd.DataFrame(
        {
            "probes": list(found),
            "separation": [Score(*value[:3]) for value in found.values()],
            "pairs of methods told apart": [told.get(name) for name in found],
        }
    )
    return found, table


def mean(scores: pd.DataFrame, method: str, kind: str = "average") -> Interval:
    """Mean score of a method (or of `no edit`) over edits."""
    own = scores[(scores["method"] == method) & (scores["kind"] == kind)]
    return interval(own["score"].to_numpy())


def gap(scores: pd.DataFrame, method: str, other: str) -> Interval | None:
    """The average metric of one method minus that of another in points, paired by edit; None where
    either is missing. `scores` is what `scored` gives of methods without levels."""
    own = scores[scores["kind"] == "average"]
    found = contrasts(own, {"gap": {(method, ""): 1, (other, ""): -1}})
    found = effect(found, "gap", "average")
    return found and Interval(*found)
