"""Compare methods and factor levels: scores beside no edit, paired contrasts, leads, a trend.

What the headline numbers are, fixed before they were drawn:

score       of a kind of probe: its primary metric, by the one table of kinds (`data.edits.KINDS`):
            ROUGE-L F1 of texts and triples, ROUGE-L recall of details, mention of multi-hop answers
floor       of a kind of efficacy: the mean score of another edit's reference, the next edit's by id
ceiling     of a kind of efficacy: what the embedded model scores on facts known from pretraining,
            asked in phrasings that it never saw, so about the most an edit can reach
share       (score - floor) / (1 - floor), how far a score is on the way from its floor to 1
efficacy    the mean over original, paraphrase and detail of the mean share over edits
locality    the mean over RelDoc, RandDoc and StructTrip of the mean score
balance     the harmonic mean of max(0, efficacy) and locality: near 0 for doing nothing. It belongs
            to a set of edits; an interval draws the edits anew (see `stats`), of methods in pairs
average     the plain mean of the six kinds, as in the paper; doing nothing has over half of it
lead        the balance of FT-UKE minus the better of no edit and the best baseline, which is best
            in balance on development edits; leads over either stand beside it
area        under the frontier of efficacy against locality, as the strength of an edit's change
            varies from none on: the mean over localities of the best efficacy at such or more

Kinds that the data lacks are left out, as is a side (efficacy, locality) of which it lacks all.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd

from uke.data.edits import AVERAGE, KINDS, in_group
from uke.errors import InputError
from uke.project import Paths
from uke.results import rows, stats
from uke.results.metrics import METRICS, PAIRWISE
from uke.results.stats import Interval, Score, estimated, ordered, overall, pairs, pooled

BEFORE, STRENGTH = "no edit", "strength"
HEADLINE = ("balance", "efficacy", "locality", "average")
SIDES = {side: in_group(side) for side in ("efficacy", "locality")}
LABELS = {name: kind.label for name, kind in KINDS.items()} | {
    **{name: name.title() for name in (*HEADLINE, "reading")},
    "detail_held_out": "Details, held out",
    "last_prompt_token": "last prompt token",
    "target_tokens": "all target tokens",
}
# By key: the kind of score, and a lead over the best baseline and no edit: points (last: percent).
LEADS = {
    "lead": ("balance", lambda own, best, none: 100 * (own - np.maximum(best, none))),
    "lead_over_baseline": ("balance", lambda own, best, none: 100 * (own - best)),
    "lead_over_no_edit": ("balance", lambda own, best, none: 100 * (own - none)),
    "lead_average": ("average", lambda own, best, none: 100 * (own - best)),
    "lead_relative": ("average", lambda own, best, none: 100 * (own / np.maximum(best, 1e-6) - 1)),
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


def scored(after: pd.DataFrame, before: pd.DataFrame, same_edits: bool = True) -> pd.DataFrame:
    """Score every cell (a method at a level) and the unedited model, `no edit`, by kind of probe.

    Columns: batch_size, batch, edit, method, level, cell (both in words), kind, score, kept. `no
    edit` is there at every batch size. The kinds `average` and `balance` are over their kinds that
    the data has; of the latter `score` is the edit's efficacy and `kept` its locality. InputError
    where cells differ in their edits, unless they may.
    """
    lowest, place = floor(before), ["batch_size", "batch", "edit"]
    unedited = _measured(before[before["kind"].isin(after["kind"])], lowest, "before")
    unedited = unedited.drop(columns=place[:2]).merge(after[place].drop_duplicates(), on="edit")
    own = _measured(after, lowest, same_edits=same_edits)
    both = pd.concat([own, unedited.assign(method=BEFORE, level=BEFORE)])
    both = both.assign(level=both["level"].fillna(""), cell=cells(both))
    columns = [*place, "method", "level", "cell", "kind", "score", "kept"]
    return _in_order(both[columns], "cell", cells(after))


def floor(questions: pd.DataFrame, kinds: Sequence[str] = SIDES["efficacy"]) -> pd.DataFrame:
    """Return the chance level: what an edit scores with what belongs to another one, the next.

    It is the column `floor` where rows have it, else what `floors` makes of their texts. Columns:
    method (`floor`), edit, kind, score; none for a single question.
    """
    own = questions[questions["kind"].isin(kinds)].drop_duplicates(["edit", "kind", "number"])
    if "floor" not in own or own["floor"].isna().all():
        own = own.assign(floor=floors(own))
    means = own.dropna(subset="floor").groupby(["kind", "edit"], as_index=False)["floor"].mean()
    means = means.rename(columns={"floor": "score"}).assign(method="floor")
    return means[["method", "edit", "kind", "score"]]


def floors(questions: pd.DataFrame) -> list[float]:
    """Return the floor of each row, in the primary metric of its kind; NaN for a single question.

    An edit's reference is replaced by another edit's, an answer that must not change by what the
    unedited model answers to another edit's question.
    """
    found = {}
    pairwise = [name for name, kind in KINDS.items() if kind.metric in PAIRWISE]
    answered = questions[questions["kind"].isin(pairwise)]
    for kind, own in answered.drop_duplicates(["edit", "kind", "question"]).groupby("kind"):
        column = "answer" if KINDS[kind].against == "before" else "reference"
        texts = list(own.groupby("edit")[["question", column]].agg(list).itertuples())
        for at, (edit, asked, wanted) in enumerate(texts):
            later = (texts[(at + step) % len(texts)] for step in range(1, len(texts)))
            if other := next((each for _, question, each in later if question != asked), None):
                for n, pair in enumerate(zip(asked, wanted, strict=True)):
                    score = PAIRWISE[KINDS[kind].metric](other[n % len(other)], pair[1])
                    found[kind, edit, pair[0]] = score
    places = zip(*(questions[name] for name in ("kind", "edit", "question")), strict=True)
    return [found.get(place, np.nan) for place in places]


def ceiling(paths: Paths) -> pd.DataFrame:
    """Return what facts known from pretraining score in the phrasings that edits are asked in.

    Read from the committed examination of the embedded model. Columns as those of `floor`.
    """
    exam = pd.read_parquet(paths.exported("00_embedded_model"))
    kinds = {"original": "original", "paraphrase": "paraphrase", "detail_held_out": "detail"}
    own = exam[exam["kind"].isin(kinds)].replace({"kind": kinds})
    texts = zip(own["kind"], own["answer"], own["reference"], strict=True)
    found = [PAIRWISE[KINDS[kind].metric](answer, wanted) for kind, answer, wanted in texts]
    means = own.assign(score=found).groupby(["edit", "kind"], as_index=False)["score"].mean()
    return means.assign(method="ceiling")[["method", "edit", "kind", "score"]]


def _measured(
    frame: pd.DataFrame, floor: pd.DataFrame, phase: str = "after", same_edits: bool = True
) -> pd.DataFrame:
    """Return the primary metrics of every edit with the kinds `average` and `balance`."""
    absent, primary = lacking(frame), rows.primary(frame, phase)
    lowest = primary["kind"].map(floor.groupby("kind")["score"].mean()).fillna(0)
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
    halves = [
        both.assign(kind=side, score=both[own], kept=np.nan)
        for side, own in zip(SIDES, ("score", "kept"), strict=True)
    ]
    average = scores[scores["kind"] == "average"]
    return pd.concat([both, *halves, average], ignore_index=True).dropna(subset="score")


def means(scores: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """Return the headline numbers of every group, the best balance first; a side may be missing."""
    found = stats.summarise(sides(scores), [*by, "kind"]).set_index([*by, "kind"])["mean"]
    table = found.unstack("kind").reindex(columns=list(HEADLINE)).dropna(subset="balance")
    return table.sort_values("balance", ascending=False, kind="stable").reset_index()


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Return weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

        contrasts(scores, {"gain": {("FT-M", "all"): 1, ("FT-M", "eighth_3"): -1}})

    Effects of absent cells are left out. Columns: effect, kind, difference, low, high, n, p
    (Holm-corrected over all; none for `balance`). InputError where the cells of an effect have no
    edit in common.
    """
    found, kinds = [], dict(list(scores.groupby("kind")))
    for name, weights in wanted.items():
        for kind in ordered(scores["kind"], KINDS):
            own = kinds[kind]
            if set(weights) <= set(zip(own["method"], own["level"], strict=True)):
                found.append((name, kind, *_weighted(own, weights)))
    table = pd.DataFrame(found, columns=["effect", "kind", "difference", "low", "high", "n", "p"])
    return table.assign(p=stats.holm(table["p"]))


def _weighted(own: pd.DataFrame, weights: Mapping[tuple[str, str], float]) -> tuple:
    """Return the weighted sum of cells in points with its interval, n and p."""
    values, units = _paired(own, list(weights))
    parts = list(zip(weights.values(), values, strict=True))
    points = estimated(lambda drawn: sum(100 * w * pooled(own, drawn) for w, own in parts), units)
    sums = sum(w * own for w, own in parts)
    return *points, stats.p_value(sums) if sums.ndim == 1 else np.nan


def _paired(own: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> tuple[list, Any]:
    """Return the scores of each cell on the edits that all of them have, and the batch of each."""
    tables = [
        own[(own["method"] == name) & (own["level"] == level)].set_index(["batch", "edit"])
        for name, level in cells
    ]
    shared = tables[0].index[[all(at in one.index for one in tables) for at in tables[0].index]]
    if shared.empty:
        raise InputError(f"{' and '.join(name for name, _ in cells[:2])}: no edit in common")
    return [pairs(table.loc[shared]) for table in tables], shared.get_level_values("batch")


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


def gains(scores: pd.DataFrame, baseline: str = "", kind: str = "balance") -> pd.DataFrame:
    """Return how far methods are above no edit (and a baseline) on a kind, in points; and `n`, the
    number of single edits or batches of each."""
    own = scores[scores["kind"] == kind]
    table = pd.DataFrame({"method": [name for name in own["method"].unique() if name != BEFORE]})
    for other in filter(None, (BEFORE, baseline)):
        against = (other, BEFORE if other == BEFORE else "")
        wanted = {name: {(name, ""): 1, against: -1} for name in table["method"] if name != other}
        found = shown(contrasts(own, wanted)).set_index("effect")["difference (points)"]
        table[f"minus {other}"] = table["method"].map(found)
    return table.assign(n=table["method"].map(own.groupby("method")["batch"].nunique()))


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
    for paths in (one for one in places if one.exported(study).is_file()):
        trials = _trials(paths, study, paths.exported(study).stat().st_mtime_ns)
        if trials["method"].isin(every).any():
            tuned = {size: best_here(trials, names) for size, names in baselines.items()}
            return {at: b[nearest_first(b, at)[0]] for at, b in tuned.items() if b}
    return {}


@lru_cache(maxsize=4)
def _trials(paths: Paths, study: str, written: int) -> pd.DataFrame:
    """Return the scores of committed trials, read again when they are written anew."""
    lowest = floor(rows.committed(paths, study, "before"))
    return _measured(rows.committed(paths, study), lowest, same_edits=False)


def best_here(scores: pd.DataFrame, baselines: Sequence[str]) -> dict[int, str]:
    """Return the baseline with the best balance on these edits at each size.

    Of its levels those with most edits count: a search that halves gives the others fewer.
    """
    own = scores[scores["method"].isin(baselines) & (scores["kind"] == "balance")]
    own, by = own.assign(level=own["level"].fillna("")), ["batch_size", "method", "level"]
    found: dict[int, dict[str, tuple]] = {}
    for (size, name, _), each in own.groupby(by):
        score = len(each), overall(each)
        found.setdefault(size, {})[name] = max(found.get(size, {}).get(name, score), score)
    return {size: max(every, key=lambda one: every[one][1]) for size, every in found.items()}


def leads(scores: pd.DataFrame, method: str, best: Mapping[int, str]) -> pd.DataFrame:
    """Return every lead (LEADS) of a method at each batch size, beside the best baseline's name.

    `scores` is what `scored` gives. Columns: batch_size, baseline, lead (its key), mean, low,
    high, n (batches). InputError without an edit in common.
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


def areas(scores: pd.DataFrame, baseline: str = "") -> pd.DataFrame:
    """Return the area of each method (see above), how far it is above a baseline's, in points, and
    `n`, the edits of each; a difference is over the edits that both have.

    `scores` has the strengths of single edits as `level`.
    """
    own = scores[scores["kind"] == "balance"]
    cells = {cell: one.set_index("edit") for cell, one in own.groupby(["method", "level"])}
    found = {name: [cells[BEFORE, BEFORE]] for name in own["method"].unique() if name != BEFORE}
    for (name, _), one in cells.items():
        found.get(name, []).append(one)

    def score(statistic: Callable[..., np.ndarray], *names: str) -> tuple[Score, int]:
        every = [set(one.index) for name in names for one in found[name]]
        edits = sorted(set.intersection(*every))
        values = [np.stack([pairs(s.loc[edits]) for s in found[name]]) for name in names]
        *ends, n = estimated(partial(statistic, *values), range(len(edits)))
        return Score(*ends), n

    table = pd.DataFrame({"method": list(found)})
    table["area"], counts = zip(*(score(stats.area, name) for name in found), strict=True)
    if baseline:
        table[f"minus {baseline}"] = [
            None if name == baseline else score(_more_area, name, baseline)[0] for name in found
        ]
    return table.assign(n=counts)


def _more_area(first: np.ndarray, second: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return 100 * (stats.area(first, drawn) - stats.area(second, drawn))


def shown_leads(leads: pd.DataFrame) -> pd.DataFrame:
    """Return leads as a table with a row for each batch size, and where its intervals are from."""
    by = ["batch_size", "baseline", "n"]
    cells = leads[by].assign(lead=leads["lead"], cell=_intervals(leads, "mean", "low", "high"))
    table = cells.pivot(index=by, columns="lead", values="cell").reset_index()
    kinds = ["t" if n < stats.FEWEST else "bootstrap" for n in table["n"]]
    return table[[*by[:2], *LEADS]].assign(batches=table["n"], interval=kinds)


def trend(
    scores: pd.DataFrame, method: str, best: Mapping[int, str], lead: str = "lead"
) -> Interval:
    """Return the points by which a lead grows with every doubling: a slope of least squares.

    Batches are drawn anew within each size.
    """
    sizes = np.log2(list(best))
    found = [_lead(scores, lead, size, method, name) for size, name in best.items()]
    slope = (sizes - sizes.mean()) / ((sizes - sizes.mean()) ** 2).sum()

    return estimated(
        lambda *drawn: sum(w * own[0](at) for w, own, at in zip(slope, found, drawn, strict=True)),
        *(batches for _, batches in found),
    )


def separation(after: pd.DataFrame) -> dict[str, Interval]:
    """Return how well locality and a general skill tell methods apart, and their difference.

    That is, of the variance of scores, edits aside, the share that lies between methods, over the
    edits that all methods have. Empty without such probes, edits or a second method; InputError for
    unequal numbers of probes.
    """
    primary, tables, counts = rows.primary(after), [], set()
    primary["total"] = primary["score"] * primary["probes"]
    held = set(primary["kind"])
    for kinds in (in_group("locality"), held.intersection(in_group("skill"))):
        own = primary[primary["kind"].isin(kinds)]
        if not kinds or own["kind"].nunique() < len(kinds) or own["method"].nunique() < 2:
            return {}
        sums = own.groupby(["method", "edit"])[["total", "probes"]].sum()
        counts |= set(sums["probes"])
        tables.append((sums["total"] / sums["probes"]).unstack("edit"))
    if len(counts) > 1:
        found = f"found {sorted(counts)}"
        raise InputError(f"separation: expected as many probes for each edit and sort, {found}")
    if not (shared := sorted(set.intersection(*(set(table.dropna(axis=1)) for table in tables)))):
        return {}
    locality, general = (table[shared].to_numpy() for table in tables)  # (methods, edits)
    shares = {
        "locality": lambda drawn: _between(locality, drawn),
        "general": lambda drawn: _between(general, drawn),
        "difference": lambda drawn: _between(locality, drawn) - _between(general, drawn),
    }
    return {name: estimated(share, range(locality.shape[1])) for name, share in shares.items()}


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


def side_effects(after: pd.DataFrame) -> pd.DataFrame:
    """Return by method what else changed, with intervals; no row where the rows do not say it.

    Means over edits of their probes: `divergence` (nats per token, from the unedited model) and
    `leakage` (share of an answer) of what must not change; the share of facts kept (`fact_kept`)
    and of those `reworded`, in other words than before; in batches `foreign`, the leakage of other
    edits' texts into answers about an edit.
    """
    about = after["kind"].isin(SIDES["efficacy"])
    changes = {
        "divergence": after["divergence"],
        "leakage": after["leakage"].mask(about | (after["kind"] == "multi_hop")),
        "foreign": after["leakage"].where(about),
        "facts_kept": after["fact_kept"],
        "reworded": after["exact_before"].rsub(1).where(after["fact_kept"] == 1),
    }
    by = ["method", "batch", "edit"]
    long = after[by].assign(**changes).melt(by, list(changes), "change", "score")
    found = stats.summarise(long.dropna(subset="score"), ["method", "change"])
    found = found.assign(cell=_intervals(found, "mean", "low", "high"))
    table = found.pivot(index="method", columns="change", values="cell")
    names = [name for name in changes if name in table]
    order = [name for name in after["method"].unique() if name in table.index]
    return table.loc[order, names].rename_axis(columns=None).reset_index()


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
