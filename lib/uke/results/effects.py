"""How large the effect of a factor is: the scores of its cells, and differences between cells, paired by edit."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from uke.data.edits import KINDS
from uke.errors import InputError, nearest
from uke.results import rows
from uke.results.stats import Score, holm, ordered, paired
from uke.results.metrics import AVERAGE, METRICS

BEFORE = "no edit"
SIDES = {
    "efficacy": ("original", "paraphrase", "detail"),
    "locality": ("rel_doc", "rand_doc", "struct_trip"),
}


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
    """Return a kind of probe, a factor or a level as readers see it; other names stay as they are."""
    name = str(name)
    return LABELS.get(name) or (name.replace("_", " ") if _PLAIN.fullmatch(name) else name)


def scored(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Scores of every cell (a method at a level) by kind of probe, and its average metric as the kind `average`.

    Columns: method, level, cell (both in words), edit, kind, score. The unedited model's cell, method and level are called
    `no edit`; cells keep the order of `after`. The average is over those of its kinds that the data has (`lacking` says which it has not). Raises
    InputError where cells differ in their edits.
    """
    kinds = [kind for kind in AVERAGE if kind in set(after["kind"])]
    parts = []
    for frame, phase in ((after, "after"), (before, "before")):
        of_kinds = rows.headline(frame, phase)
        found = pd.concat([of_kinds, rows.average(of_kinds, kinds).assign(kind="average")])
        parts.append(found if phase == "after" else found.assign(method=BEFORE, level=BEFORE))
    both = pd.concat(parts)[["method", "level", "edit", "kind", "score"]]
    places = {
        cell: place
        for place, cell in enumerate(dict.fromkeys(zip(after["method"], after["level"])))
    }
    order = pd.Series(
        [places.get(cell, len(places)) for cell in zip(both["method"], both["level"])],
        index=both.index,
    )
    both = both.iloc[order.argsort(kind="stable")].reset_index(drop=True)
    names = [
        method if method == BEFORE else f"{method}, {label(level)}"
        for method, level in zip(both["method"], both["level"])
    ]
    return both.assign(cell=names)


def lacking(after: pd.DataFrame) -> list[str]:
    """The kinds of the average metric that the data has no probe of."""
    return [kind for kind in AVERAGE if kind not in set(after["kind"])]


def sides(scores: pd.DataFrame) -> pd.DataFrame:
    """The average metric and its two halves, `efficacy` and `locality`, as kinds; a half is left out where the data lacks a kind of it."""
    parts = [scores[scores["kind"] == "average"]]
    for side, kinds in SIDES.items():
        if set(kinds) <= set(scores["kind"]):
            means = (
                scores[scores["kind"].isin(kinds)]
                .groupby(["method", "level", "cell", "edit"], sort=False)["score"]
                .mean()
            )
            parts.append(means.reset_index().assign(kind=side))
    return pd.concat(parts)[list(scores.columns)].reset_index(drop=True)


def contrasts(
    scores: pd.DataFrame, wanted: Mapping[str, Mapping[tuple[str, str], float]]
) -> pd.DataFrame:
    """Weighted sums of cells by kind, paired by edit, in points (hundredths) of the score.

    `wanted` gives for each effect by name the weight of each cell (method, level): 1 and -1 for a difference. An effect of
    which a cell has no rows is left out. Columns: effect, kind, difference, low, high, p (Holm-corrected over all that stand
    here), n. Raises InputError for weights that do not sum to 0, and where the cells of an effect differ in their edits.
    """
    present = set(zip(scores["method"], scores["level"]))
    found = []
    for name, weights in wanted.items():
        if abs(sum(weights.values())) > 1e-9:
            raise InputError(
                f"effect {name}: its weights sum to {sum(weights.values()):g}; expected 0"
            )
        for kind in ordered(scores["kind"], KINDS) if set(weights) <= present else ():
            gained, lost = (
                _summed(
                    scores[scores["kind"] == kind],
                    {cell: sign * weight for cell, weight in weights.items() if sign * weight > 0},
                )
                for sign in (1, -1)
            )
            found.append((name, kind, *paired(gained, lost)))
    table = pd.DataFrame(found, columns=["effect", "kind", "difference", "low", "high", "p", "n"])
    return table.assign(p=holm(table["p"]))


def _summed(scores: pd.DataFrame, weights: Mapping[tuple[str, str], float]) -> pd.Series:
    """The weighted sum of cells for each edit, in points; NaN, which `paired` refuses, for an edit that a cell lacks."""
    by_cell = [
        weight
        * 100
        * scores[(scores["method"] == method) & (scores["level"] == level)].set_index("edit")[
            "score"
        ]
        for (method, level), weight in weights.items()
    ]
    return pd.concat(by_cell, axis=1).sum(axis=1, skipna=False)


def shown(effects: pd.DataFrame) -> pd.DataFrame:
    """The effects as a table: each with its interval in points, and p."""
    cells = [
        Score(*each) for each in effects[["difference", "low", "high"]].itertuples(index=False)
    ]
    return pd.DataFrame(
        {
            "effect": effects["effect"],
            "kind": effects["kind"],
            "difference (points)": cells,
            "p (Holm)": effects["p"],
            "edits": effects["n"],
        }
    )


def one(effects: pd.DataFrame, effect: str, kind: str) -> tuple[float, float, float, int] | None:
    """Difference, both ends of its interval and the number of edits of one effect; None where a cell of it has no rows."""
    row = effects[(effects["effect"] == effect) & (effects["kind"] == kind)]
    return None if row.empty else tuple(row.iloc[0][["difference", "low", "high", "n"]])


def published(after: pd.DataFrame, kinds: Sequence[str] = SIDES["efficacy"]) -> pd.DataFrame:
    """Every metric against the reference, by method, level and kind: mean over the questions of an edit, then over edits."""
    texts = after[after["kind"].isin(kinds)]
    if texts.empty:
        raise InputError(
            f"published: no rows of {', '.join(kinds)}{nearest(kinds[0], set(after['kind']))}"
        )
    names = [name for name in METRICS if texts[name].notna().any()]
    by = ["method", "level", "kind"]
    return (
        texts.groupby([*by, "edit"], sort=False)[names]
        .mean()
        .groupby(by, sort=False)
        .mean()
        .reset_index()
    )


def courses(after: pd.DataFrame) -> pd.DataFrame:
    """The course of every training: method, level, edit, step (from 0), loss (nats per token)."""
    kept = after.dropna(subset="course")
    steps = [
        (row.method, row.level, row.edit, step, loss)
        for row in kept.itertuples()
        for step, loss in enumerate(json.loads(row.course)["losses"])
    ]
    return pd.DataFrame(steps, columns=["method", "level", "edit", "step", "loss"])


def costs(after: pd.DataFrame) -> pd.DataFrame:
    """What an edit costs and how large it is, by method and level: means over edits."""
    units = after.drop_duplicates(["method", "level", "batch"])
    return (
        units.groupby(["method", "level"], sort=False)[
            ["learning_rate", "steps", "train_seconds", "answer_seconds", "change_norm"]
        ]
        .mean()
        .reset_index()
    )
