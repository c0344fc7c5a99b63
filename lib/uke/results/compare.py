"""Compare methods and factor levels: scores beside no edit, paired contrasts, leads, a trend.

What the headline numbers are, fixed before they were drawn:

floor       of a kind of efficacy: the mean score of another edit's reference, the next edit's by id
share       (score - floor) / (1 - floor), how far a score is on the way from its floor to 1
efficacy    the mean over original, paraphrase and detail of the mean share over edits
locality    the mean over RelDoc, RandDoc and StructTrip of the mean score
balance     the harmonic mean of max(0, efficacy) and locality: 0 for doing nothing. It belongs to
            a set of edits; an interval draws the edits anew (see `stats`), of methods in pairs
average     the plain mean of the six kinds, as in the paper; doing nothing has over half of it
lead        the balance of FT-UKE minus the better of no edit and the best baseline, which is best
            in balance on development edits; leads over either stand beside it

Kinds that the data lacks are left out, as is a side (efficacy, locality) of which it lacks all.
"""

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
from uke.results.metrics import METRICS, PAIRWISE
from uke.results.stats import (
    FEWEST,
    Interval,
    Score,
    estimated,
    holm,
    interval,
    ordered,
    p_value,
    pairs,
    pooled,
    summarise,
)

BEFORE = "no edit"
SIDES = {side: in_group(side) for side in ("efficacy", "locality")}
LABELS = {name: kind.label for name, kind in KINDS.items()} | {
    "balance": "Balance",
    "average": "Average",
    "efficacy": "Efficacy",
    "locality": "Locality",
    "reading": "Reading",
    "detail_held_out": "Details, held out",
    "last_prompt_token": "last prompt token",
    "target_tokens": "all target tokens",
}
HEADLINE = ("balance", "efficacy", "locality", "average")
# By key: the kind of score, and the lead of a method over the best baseline and no edit, in points.
LEADS = {
    "lead": ("balance", lambda own, best, none: 100 * (own - np.maximum(best, none))),
    "lead_over_baseline": ("balance", lambda own, best, none: 100 * (own - best)),
    "lead_over_no_edit": ("balance", lambda own, best, none: 100 * (own - none)),
    "lead_average": ("average", lambda own, best, none: 100 * (own - best)),
    "lead_relative": ("average", lambda own, best, none: 100 * (own / best - 1)),  # percent
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

    Columns: method, level, cell (both in words), edit, kind, score, kept. The kinds `average` and
    `balance` are over its kinds that the data has; of the latter `score` is the edit's efficacy and
    `kept` its locality. InputError where cells differ in their edits.
    """
    floor = floors(before)
    unedited = _measured(before, floor, "before").assign(method=BEFORE, level=BEFORE)
    both = pd.concat([_measured(after, floor), unedited])
    both = both.assign(level=both["level"].fillna(""), cell=cells(both))
    columns = ["method", "level", "cell", "edit", "kind", "score", "kept"]
    return _in_order(both[columns], "cell", cells(after))


def by_batch(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Score methods and `no edit` at every batch size like `scored`, methods on edits of their own.

    Columns: batch_size, method, level, batch, edit, kind, score, kept.
    """
    floor, place = floors(before), ["batch_size", "batch", "edit"]
    methods = _measured(after, floor, same_edits=False).assign(level="")
    unedited = _measured(before[before["kind"].isin(after["kind"])], floor, "before")
    unedited = unedited.drop(columns=place[:2]).merge(after[place].drop_duplicates(), on="edit")
    both = pd.concat([methods, unedited.assign(method=BEFORE, level=BEFORE)])
    columns = [*place[:1], "method", "level", *place[1:], "kind", "score", "kept"]
    return _in_order(both[columns], "method", after["method"])


def floors(questions: pd.DataFrame) -> dict[str, float]:
    """Return the floor of each kind of efficacy from rows (edit, kind, number, reference)."""
    found = {}
    for kind in SIDES["efficacy"]:
        own = questions[questions["kind"] == kind].drop_duplicates(["edit", "number"])
        texts = own.sort_values(["edit", "number"]).groupby("edit")["reference"].agg(list)
        others = np.roll(texts.to_numpy(), -1)
        metric, every = PAIRWISE[KINDS[kind].metric], zip(texts, others, strict=True)
        scores = [
            np.mean([metric(next_[at % len(next_)], text) for at, text in enumerate(each)])
            for each, next_ in every
        ]
        found |= {kind: float(np.mean(scores))} if len(scores) > 1 else {kind: 0.0}
    return found


def _measured(
    frame: pd.DataFrame, floor: Mapping[str, float], phase: str = "after", same_edits: bool = True
) -> pd.DataFrame:
    """Return the primary metrics of every edit with the kinds `average` and `balance`."""
    absent, primary = lacking(frame), rows.primary(frame, phase)
    lowest = primary["kind"].map(floor).fillna(0)
    shares = primary.assign(score=(primary["score"] - lowest) / (1 - lowest))
    every = [kind for kind in AVERAGE if kind not in absent]
    average = rows.average(primary, every, same_edits).assign(kind="average")
    sides = [[kind for kind in every if kind in kinds] for kinds in SIDES.values()]
    first, *second = [rows.average(shares, kinds, False) for kinds in sides if kinds]
    kept = second[0]["score"].to_numpy() if second else np.nan
    return pd.concat([primary, average, first.assign(kind="balance", kept=kept)])


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
    """Return the headline kinds: `balance`, its halves `efficacy` and `locality`, `average`."""
    both = scores[scores["kind"] == "balance"]
    halves = [both, both.assign(kind="efficacy", kept=np.nan)]
    halves.append(both.assign(kind="locality", score=both["kept"], kept=np.nan))
    found = pd.concat([*halves, scores[scores["kind"] == "average"]], ignore_index=True)
    return found.dropna(subset="score")


def means(scores: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """Return the headline numbers of every group with all of them, the best balance first."""
    found = summarise(sides(scores), [*by, "kind"]).set_index([*by, "kind"])["mean"]
    table = found.unstack("kind").reindex(columns=list(HEADLINE)).dropna()
    return table.sort_values("balance", ascending=False, kind="stable").reset_index()


def mean(scores: pd.DataFrame, method: str, kind: str = "average") -> Interval:
    """Return the mean score of a method (or of `no edit`) over edits."""
    return interval(pairs(scores[(scores["method"] == method) & (scores["kind"] == kind)]))


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Return weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

        contrasts(scores, {"gain": {("FT-M", "all"): 1, ("FT-M", "eighth_3"): -1}})

    Effects of absent cells are left out. Columns: effect, kind, difference, low, high, n, p
    (Holm-corrected over all; none for `balance`). InputError where the cells of an effect differ in
    their edits.
    """
    found, kinds = [], dict(list(scores.groupby("kind")))
    for name, weights in wanted.items():
        for kind in ordered(scores["kind"], KINDS):
            own = kinds[kind]
            if set(weights) <= set(zip(own["method"], own["level"], strict=True)):
                found.append((name, kind, *_weighted(own, weights)))
    table = pd.DataFrame(found, columns=["effect", "kind", "difference", "low", "high", "n", "p"])
    return table.assign(p=holm(table["p"]))


def _weighted(own: pd.DataFrame, weights: Mapping[tuple[str, str], float]) -> tuple:
    """Return the weighted sum of cells in points with its interval, n and p."""
    values, units = _paired(own, list(weights))
    parts = list(zip(weights.values(), values, strict=True))
    points = estimated(lambda drawn: sum(100 * w * pooled(own, drawn) for w, own in parts), units)
    plain = values[0].ndim == 1
    return *points, p_value(sum(w * own for w, own in parts)) if plain else np.nan


def _paired(own: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> tuple[list, Any]:
    """Return the scores of each cell on the edits of the first one, and the batch of each edit.

    `no edit` may have more edits than the others.
    """
    unit = [name for name in ("batch", "edit") if name in own]
    tables = {
        cell: own[(own["method"] == cell[0]) & (own["level"] == cell[1])].set_index(unit)
        for cell in cells
    }
    places = tables[cells[0]].index
    for (name, _), table in tables.items():
        same = (
            set(places) <= set(table.index) if name == BEFORE else set(places) == set(table.index)
        )
        if places.empty or not same:
            names, found = (" and ".join(map(str, each)) for each in zip(*cells, strict=True)), ""
            found = " and ".join(str(len(each)) for each in tables.values())
            raise InputError(f"{next(names)}: expected the same edits, found {found}")
    batches = places.get_level_values("batch") if len(unit) > 1 else len(places)
    return [pairs(table.loc[places]) for table in tables.values()], batches


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


def gains(scores: pd.DataFrame, baseline: str | None = None, kind: str = "balance") -> pd.DataFrame:
    """Return how far methods are above no edit (and a baseline) on a kind, in points."""
    own = scores[scores["kind"] == kind]
    names = [name for name in own["method"].unique() if name != BEFORE]
    columns = {"method": names}
    for other, level in ((BEFORE, BEFORE), (baseline, "")) if baseline else ((BEFORE, BEFORE),):
        wanted = {name: {(name, ""): 1, (other, level): -1} for name in names if name != other}
        found = shown(contrasts(own, wanted)).set_index("effect").reindex(names)
        columns[f"minus {other}"] = found["difference (points)"].to_numpy()
    return pd.DataFrame(columns)


def nearest_first(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Sort batch sizes by their ratio to one, the nearest first; of two alike the smaller."""
    return sorted(sizes, key=lambda size: (max(size / batch_size, batch_size / size), size))


def best_baselines(
    places: Sequence[Paths], baselines: Mapping[int, Sequence[str]], study: str = "tuning"
) -> dict[int, str]:
    """Return by batch size which of its baselines has the trial of best balance on development
    edits at the nearest tuned batch size.

    Read from the committed rows of `study` of the first place that has any of them; else empty.
    """
    every = {name for names in baselines.values() for name in names}
    for paths in places:
        if paths.exported(study).is_file():
            frame = rows.committed(paths, study)
            if len(frame := frame[frame["method"].isin(every)]):
                trials, found = _measured(frame, floors(frame), same_edits=False), {}
                for size, names in baselines.items():
                    best = best_here(trials, names)
                    found |= {size: best[nearest_first(best, size)[0]]} if best else {}
                return found
    return {}


def best_here(scores: pd.DataFrame, baselines: Sequence[str]) -> dict[int, str]:
    """Return the baseline with the best balance on these edits (of its levels) at each size."""
    own = scores[scores["method"].isin(baselines) & (scores["kind"] == "balance")]
    by = ["batch_size", "method", "level"]
    groups = own.assign(level=own["level"].fillna("")).groupby(by)
    found = {cell: float(pooled(pairs(each), np.ones(len(each)))) for cell, each in groups}
    sizes = sorted({size for size, *_ in found})
    return {at: max((c for c in found if c[0] == at), key=found.get)[1] for at in sizes}


def leads(scores: pd.DataFrame, method: str, best: Mapping[int, str]) -> pd.DataFrame:
    """Return every lead (LEADS) of a method at each batch size, beside the best baseline's name.

    `scores` is what `by_batch` gives. Columns: batch_size, baseline, lead (its key), mean, low,
    high, n (batches). InputError where the edits differ.
    """
    found = [
        (size, baseline, lead, *estimated(*_lead(scores, lead, size, method, baseline)))
        for size, baseline in best.items()
        for lead in LEADS
    ]
    names = ["batch_size", "baseline", "lead", "mean", "low", "high", "n"]
    return pd.DataFrame(found, columns=names)


def _lead(scores: pd.DataFrame, lead: str, size: int, method: str, baseline: str) -> tuple:
    """Return a lead as a statistic of the edits drawn, and the batch of each edit."""
    kind, difference = LEADS[lead]
    own = scores[(scores["batch_size"] == size) & (scores["kind"] == kind)]
    values, batches = _paired(own, [(method, ""), (baseline, ""), (BEFORE, BEFORE)])
    return lambda drawn: difference(*(pooled(each, drawn) for each in values)), batches


def shown_leads(leads: pd.DataFrame) -> pd.DataFrame:
    """Return leads as a table with a row for each batch size, and where its intervals are from."""
    by = ["batch_size", "baseline", "n"]
    cells = leads[by].assign(lead=leads["lead"], cell=_intervals(leads, "mean", "low", "high"))
    table = cells.pivot(index=by, columns="lead", values="cell").reset_index()
    kinds = ["t" if n < FEWEST else "bootstrap" for n in table["n"]]
    names = {"lead": "lead (points)", "lead_relative": "lead_average (percent)"}
    table = table[[*by[:2], *LEADS]].assign(batches=table["n"], interval=kinds)
    return table.rename(columns=names)


def trend(
    scores: pd.DataFrame, method: str, best: Mapping[int, str], lead: str = "lead"
) -> Interval:
    """Return the points by which a lead grows with every doubling: a slope of least squares.

    Batches are drawn anew within each size.
    """
    sizes = np.log2(list(best))
    found = [_lead(scores, lead, size, method, name) for size, name in best.items()]
    slope = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()

    def steepness(*drawn: np.ndarray) -> np.ndarray:
        every = zip(slope, found, drawn, strict=True)
        return sum(weight * statistic(own) for weight, (statistic, _), own in every)

    return estimated(steepness, *(batches for _, batches in found))


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
        "locality": lambda drawn: _between(locality, drawn),
        "general": lambda drawn: _between(general, drawn),
        "difference": lambda drawn: _between(locality, drawn) - _between(general, drawn),
    }
    return {name: estimated(share, locality.shape[1]) for name, share in shares.items()}


def _between(scores: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the share of squares between methods: (methods, edits), (..., edits) -> (...)."""
    centred = scores - scores.mean(axis=0)  # each edit's own level is taken off
    explained = ((drawn @ centred.T) ** 2).sum(axis=-1) / drawn.sum(axis=-1)
    total = drawn @ (centred**2).sum(axis=0)
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
