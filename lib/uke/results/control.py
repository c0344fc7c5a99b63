"""Positive control: can a method write anything at all into this model, and how long a text?

Every method writes answers cut to a few tokens, each alone, with the settings tuned for the model,
and is asked the question again, for as many tokens. The end of the turn is not written, since that
a text breaks off is the least likely thing in it. The rule:

target loss    nats a token of the text with every target vector in place; of fine-tuning, its last
               training loss
written loss   nats a token of the text after the write
original       ROUGE-L F1 of the answer to its question after the write
comes back     original is at least half of the way from that of no edit to 1, so at least .5
works          at a length: target loss at most MOST_LOSS, and the text comes back; means over edits
not testable   a baseline whose target loss is above MOST_LOSS at any length tried (of whole edits
               alone, until rows had shown that this passes a method that works at no length), or
               with which texts of at most SHORT tokens do not come back, on average

A baseline that fails is tried again with other settings (`uke.study.control.VARIANTS`): under the
name "MEMIT, as published" they have measures of their own. What works there says how far a method
can reach in this model; the rule is about the settings that the other rows were made with.

No verdict rests on a number that needs a baseline which is not testable or has no control.
"""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from uke.project import Paths
from uke.results import rows
from uke.results.compare import BEFORE

STUDY = "controls"
MOST_LOSS, SHORT = 0.1, 10  # nats a token; tokens
MEASURES = {
    "target_loss": "Loss of the target search",
    "written_loss": "Loss after the write",
    "original": "Original, ROUGE-L F1",
}


def measured(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Return the measures of every edit, and of `no edit`: method, tokens, edit, measure, score.

    `after` has one row for each cut edit and method, its level the tokens and then any variant.
    """
    curves = after["curve"].map(json.loads)
    ends = [curve.get("target_loss", [np.nan, *curve["losses"]][-1]) for curve in curves]
    parts = after["level"].str.partition(" ")
    variant = parts[2].map(lambda named: named and f", {named}")
    after = after.assign(method=after["method"] + variant, tokens=parts[0].astype(int))
    after = after.assign(target_loss=ends)
    unedited = before.assign(method=BEFORE).merge(after[["edit", "tokens"]].drop_duplicates())
    frame = pd.concat([after, unedited])
    frame = frame.assign(written_loss=-frame["log_probability"], original=frame["rougel_f1"])
    by = ["method", "tokens", "edit"]
    return frame.melt(by, list(MEASURES), "measure", "score").dropna(subset="score")


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean measures of what `measured` gives, by method and tokens; `least`, at which
    an original comes back; and `works`."""
    means = frame.groupby(["method", "tokens", "measure"], sort=False)["score"].mean()
    table = means.unstack("measure").reindex(columns=list(MEASURES)).sort_index(level="tokens")
    none = table["original"].xs(BEFORE)[table.index.get_level_values("tokens")]
    least = (1 + none.to_numpy()) / 2
    works = (table["target_loss"] <= MOST_LOSS) & (table["original"] >= least)
    return table.assign(least=least, works=works)


def works_up_to(table: pd.DataFrame) -> dict[str, int]:
    """Return by method the length (tokens) up to which it works, at every one; 0 for none."""
    found = {}
    for name, own in table["works"].groupby("method", sort=False):
        lengths = own.index.get_level_values("tokens")
        found[name] = int(max(lengths[own.cummin()], default=0))
    return found


def untestable(table: pd.DataFrame | None, baselines: Sequence[str]) -> dict[str, str]:
    """Return why these baselines are not testable, by name; those that are have no entry."""
    reasons = {}
    written = {} if table is None else table.groupby("method").size().to_dict()
    for name in baselines:
        if written.get(name, 0) < max(written.values(), default=1):  # of some length, or of all
            reasons[name] = f"{name} has no positive control (`{STUDY}`)."
            continue
        own, longest = table.loc[name], works_up_to(table)[name]
        losses, short = own["target_loss"].fillna(np.inf), own.loc[:SHORT].mean()
        faults = []
        if (loss := losses.max()) > MOST_LOSS:
            where = f"{loss:.2f} nats a token on {losses.idxmax()}"
            faults.append(f"its target search ends at {where}")
        if not short["original"] >= short["least"]:
            found = f"{short['original']:.2f} F1, below {short['least']:.2f}"
            faults.append(f"it brings texts of up to {SHORT} tokens back with {found}")
        if faults:
            works = f"works up to {longest} tokens" if longest else "works at no length"
            reasons[name] = f"{name} is not testable: {' and '.join(faults)}; it {works}."
            if tried := [other for other in written if other.startswith(f"{name}, ")]:
                listed = [f"{one[len(name) + 2 :]}: {works_up_to(table)[one]}" for one in tried]
                reasons[name] += f" Tried again it works up to ({'; '.join(listed)}) tokens."
    return reasons


def of_run(paths: Paths) -> pd.DataFrame | None:
    """Return the summary of a run's committed control; None where there is none."""
    if not paths.exported(STUDY).is_file():
        return None
    after, before = (rows.committed(paths, STUDY, phase) for phase in ("after", "before"))
    return summary(measured(after, before))
