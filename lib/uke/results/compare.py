"""Compare methods and factor levels: scores beside no edit, paired contrasts, leads, a trend."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from uke.data.edits import AVERAGE, KINDS, in_group
from uke.errors import InputError
from uke.project import Paths
from uke.results import rows
from uke.results.metrics import METRICS
from uke.results.stats import Interval, Score, bootstrapped, holm, interval, ordered, p_value, units

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
_PLAIN = re.compile(r"[a-z]+_half|eighth_\d|loss_scope|chat_template|end_of_turn|batch_size")


def label(name: Any) -> str:
    """Return a kind of probe, a factor or a level as readers see it; other names as they are."""
    name = str(name)
    return LABELS.get(name) or (name.replace("_", " ") if _PLAIN.fullmatch(name) else name)


def cells(frame: pd.DataFrame) -> list[str]:
    """Name the cell of each row: its method, and its level if it has one of its own."""
    pairs = zip(frame["method"], frame["level"].fillna(""), strict=True)
    return [name if level in ("", name) else f"{name}, {label(level)}" for name, level in pairs]


def scored(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Score every cell (a method at a level) and the unedited model, `no edit`, by kind of probe.

    Columns: method, level, cell (both in words), edit, kind, score. The kind `average` is the mean
    over its kinds that the data has. InputError where cells differ in their edits.
    """
    unedited = _primary_and_average(before, "before").assign(method=BEFORE, level=BEFORE)
    both = pd.concat([_primary_and_average(after), unedited])
    both = both.assign(level=both["level"].fillna(""), cell=cells(both))
    columns = ["method", "level", "cell", "edit", "kind", "score"]
    return _in_order(both[columns], "cell", cells(after))


def by_batch(after: pd.DataFrame) -> pd.DataFrame:
    """Score every method at every batch size like `scored`; methods may differ in their edits.

    Columns: batch_size, method, batch, edit, kind, score.
    """
    columns = ["batch_size", "method", "batch", "edit", "kind", "score"]
    scores = _primary_and_average(after, same_edits=False)[columns]
    return _in_order(scores, "method", after["method"])


def _primary_and_average(
    frame: pd.DataFrame, phase: str = "after", same_edits: bool = True
) -> pd.DataFrame:
    absent, primary = lacking(frame), rows.primary(frame, phase)
    kinds = [kind for kind in AVERAGE if kind not in absent]
    return pd.concat([primary, rows.average(primary, kinds, same_edits).assign(kind="average")])


def _in_order(frame: pd.DataFrame, column: str, names: Iterable[str]) -> pd.DataFrame:
    """Sort rows by their place among the distinct names; those of no name come last."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return frame.sort_values(
        column, key=lambda own: own.map(places), kind="stable", ignore_index=True
    )


def lacking(after: pd.DataFrame) -> list[str]:
    """Return the kinds of the average metric that the data has no probe of."""
    return [kind for kind in AVERAGE if kind not in set(after["kind"])]


def sides(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the average metric and its halves `efficacy` and `locality` (if complete) as kinds."""
    by = [name for name in scores if name not in ("kind", "score")]
    parts = [scores[scores["kind"] == "average"]]
    for side, kinds in SIDES.items():
        own = scores[scores["kind"].isin(kinds)]
        if own["kind"].nunique() == len(kinds):
            means = own.groupby(by, sort=False)["score"].mean()
            parts.append(means.reset_index().assign(kind=side))
    return pd.concat(parts, ignore_index=True)


def plane(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean efficacy and locality of every method for which the data has all kinds."""
    means = sides(scores).groupby(["method", "kind"], sort=False)["score"].mean().unstack()
    means = means.reindex(index=scores["method"].unique(), columns=list(SIDES))
    return means.dropna().rename_axis(columns=None).reset_index()


def ranking(scores: pd.DataFrame) -> list[str]:
    """Return the methods by their mean average metric, the best first."""
    own = scores[scores["kind"] == "average"]
    return list(own.groupby("method")["score"].mean().sort_values(ascending=False).index)


def mean(scores: pd.DataFrame, method: str, kind: str = "average") -> Interval:
    """Return the mean score of a method (or of `no edit`) over edits."""
    own = scores[(scores["method"] == method) & (scores["kind"] == kind)]
    return interval(own["score"].to_numpy())


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Return weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

        contrasts(scores, {"gain": {("FT-M", "all"): 1, ("FT-M", "eighth_3"): -1}})

    Effects of absent cells are left out. Columns: effect, kind, difference, low, high, n, p
    (Holm-corrected over all). InputError where the cells of an effect differ in their edits.
    """
    found, cells_of_kind = [], {}
    for kind, own in scores.groupby("kind"):
        table = own.pivot(index="edit", columns=["method", "level"], values="score")
        cells_of_kind[kind] = table.reindex(own["edit"].unique())
    for name, weights in wanted.items():
        for kind in ordered(scores["kind"], KINDS):
            if set(weights) <= set(cells_of_kind[kind]):
                own = cells_of_kind[kind][list(weights)].dropna(how="all")
                sums = sum(100 * weight * own[cell] for cell, weight in weights.items())
                found.append((name, kind, *interval(sums), p_value(sums)))
    table = pd.DataFrame(found, columns=["effect", "kind", "difference", "low", "high", "n", "p"])
    return table.assign(p=holm(table["p"]))


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


def gains(scores: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Return how far methods are above no edit and a baseline, in average points.

    p values are Holm-corrected within each column.
    """
    own = scores[scores["kind"] == "average"]
    names = [name for name in own["method"].unique() if name != BEFORE]
    columns = {"method": names}
    for other, level in ((BEFORE, BEFORE), (baseline, "")):
        wanted = {name: {(name, ""): 1, (other, level): -1} for name in names if name != other}
        if other:
            found = shown(contrasts(own, wanted)).set_index("effect").reindex(names)
            columns[f"minus {other}"] = found["difference (points)"].to_numpy()
            columns[f"p ({other})"] = found["p (Holm)"].to_numpy()
    return pd.DataFrame(columns)


def nearest_first(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Sort batch sizes by their ratio to one, the nearest first; of two alike the smaller."""
    return sorted(sizes, key=lambda size: (max(size / batch_size, batch_size / size), size))


def best_baselines(
    places: Sequence[Paths], sizes: Sequence[int], baselines: Sequence[str]
) -> dict[int, str]:
    """Return the baseline with the best trial on development edits at the nearest tuned batch size.

    Read from the committed rows of `tuning` of the first place that has any of them; else empty.
    """
    for paths in places:
        if paths.exported("tuning").is_file():
            frame = rows.committed(paths, "tuning")
            averages = rows.primary(frame[frame["method"].isin(baselines)])
            if len(averages):
                best = best_here(rows.average(averages), baselines)
                return {size: best[nearest_first(best, size)[0]] for size in sizes}
    return {}


def best_here(averages: pd.DataFrame, baselines: Sequence[str]) -> dict[int, str]:
    """Return the baseline with the best average on these edits (of its levels) at each size."""
    own = averages[averages["method"].isin(baselines)]
    by = ["batch_size", "method", *({"level"} & set(averages))]
    means = own.groupby(by, dropna=False)["score"].mean()
    return {size: scores.idxmax()[1] for size, scores in means.groupby("batch_size")}


def leads(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> pd.DataFrame:
    """Return the lead of a method over the best baseline of each batch size.

    `averages` has the average metric by batch_size, method, batch and edit. Columns: batch_size,
    baseline; mean, low, high (points); percent, percent_low, percent_high (of the baseline's
    average); batches (the units drawn). InputError where the edits differ.
    """
    found = []
    for size, baseline in best.items():
        own, other, batches = _side_by_side(averages, size, method, baseline)
        points = interval(100 * (own - other), batches)
        percent = _percent(units(own, batches)[0], units(other, batches)[0])
        found.append((size, baseline, *points[:3], *percent[:3], points.n))
    names = ["mean", "low", "high", "percent", "percent_low", "percent_high", "batches"]
    return pd.DataFrame(found, columns=["batch_size", "baseline", *names])


def _percent(own: np.ndarray, other: np.ndarray) -> Interval:
    """Return how far the sum over batches (batches,) is ahead, in percent of the other."""
    return bootstrapped(lambda at: 100 * (own[at].sum(-1) / other[at].sum(-1) - 1), len(own))


def _side_by_side(averages: pd.DataFrame, size: int, *methods: str) -> tuple:
    """Return the scores of two methods in one order, and the batch of each edit."""
    own = averages[(averages["batch_size"] == size) & averages["method"].isin(methods)]
    table = own.pivot(index=["batch", "edit"], columns="method", values="score")
    table = table.reindex(columns=list(methods))
    if table.empty or table.isna().any(axis=None):
        found = " and ".join(map(str, table.count()))
        raise InputError(f"lead: {' and '.join(methods)}: expected the same edits, found {found}")
    return table[methods[0]], table[methods[1]], table.index.get_level_values("batch")


def shown_leads(leads: pd.DataFrame) -> pd.DataFrame:
    """Return leads as a table, each with its interval."""
    table = leads[["batch_size", "baseline", "batches"]].copy()
    table["lead (points)"] = _intervals(leads, "mean", "low", "high")
    table["lead (percent)"] = _intervals(leads, "percent", "percent_low", "percent_high")
    return table


def trend(averages: pd.DataFrame, method: str, best: Mapping[int, str]) -> Interval:
    """Return the points by which that lead grows with every doubling: a slope of least squares.

    Batches are drawn anew within each size.
    """
    sizes, batches = np.log2(list(best)), []
    for size, baseline in best.items():
        own, other, names = _side_by_side(averages, size, method, baseline)
        batches.append(units(100 * (own - other), names))
    slope = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()

    def steepness(*drawn: np.ndarray) -> np.ndarray:
        every = zip(batches, drawn, strict=True)
        return slope @ np.array(
            [sums[at].sum(-1) / edits[at].sum(-1) for (sums, edits), at in every]
        )

    return bootstrapped(steepness, *(len(sums) for sums, _ in batches))


def separation(after: pd.DataFrame) -> dict[str, Interval]:
    """Return how well locality and a general skill tell methods apart, and their difference.

    That is, of the variance of scores, edits aside, the share that lies between methods. Empty
    without such probes or a second method; InputError for unequal numbers of probes.
    """
    primary, tables, counts = rows.primary(after), [], set()
    primary["total"] = primary["score"] * primary["probes"]
    for kinds in (in_group("locality"), in_group("skill")):
        own = primary[primary["kind"].isin(kinds)]
        if own["kind"].nunique() < len(kinds) or own["method"].nunique() < 2:
            return {}
        sums = own.groupby(["method", "edit"])[["total", "probes"]].sum()
        counts |= set(sums["probes"])
        tables.append((sums["total"] / sums["probes"]).unstack("edit").to_numpy())
    if len(counts) > 1 or any(np.isnan(table).any() for table in tables):
        found = f"found {sorted(counts)}"
        raise InputError(f"separation: expected as many probes for each edit and sort, {found}")
    locality, general = tables  # (methods, edits)
    shares = {
        "locality": lambda drawn: _between(locality[:, drawn]),
        "general": lambda drawn: _between(general[:, drawn]),
        "difference": lambda drawn: _between(locality[:, drawn]) - _between(general[:, drawn]),
    }
    return {name: bootstrapped(share, locality.shape[1]) for name, share in shares.items()}


def _between(scores: np.ndarray) -> np.ndarray:
    """Return the share of squares between methods: (methods, ..., edits) -> (...)."""
    centred = scores - scores.mean(axis=0)  # each edit's own level is taken off
    explained = (centred.mean(axis=-1) ** 2).sum(axis=0) * scores.shape[-1]
    total = (centred**2).sum(axis=(0, -1))
    return np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def published(after: pd.DataFrame, kinds: Sequence[str] = SIDES["efficacy"]) -> pd.DataFrame:
    """Return the mean over edits of every metric against the reference, by method, level, kind."""
    texts = after[after["kind"].isin(kinds)]
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
    names = "learning_rate steps train_seconds answer_seconds peak_mib change_norm".split()
    batches = after.drop_duplicates([*by, "batch"])
    return batches.groupby(list(by), sort=False)[names].mean().reset_index()


def answers(after: pd.DataFrame, edit: str, kinds: Sequence[str]) -> pd.DataFrame:
    """Return kind, question, source (reference, `no edit` or cell) and answer of an edit's first
    question of each kind."""
    own = after[(after["edit"] == edit) & (after["number"] == 0) & after["kind"].isin(kinds)]
    first = own.drop_duplicates("kind")
    parts = (
        first.assign(source="reference", answer=first["reference"]),
        first.assign(source=BEFORE, answer=first["before"]),
        own.assign(source=cells(own)),
    )
    return _in_order(pd.concat(parts)[["kind", "question", "source", "answer"]], "kind", kinds)
