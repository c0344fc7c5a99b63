"""What a dataset asks and what the unedited model answers, as tables of notebook 01_edits."""

from collections.abc import Sequence

import pandas as pd

from uke.data.edits import AVERAGE, KINDS, in_group
from uke.study.dataset import Dataset


def example(dataset: Dataset, edit: str, most: int = 2) -> pd.DataFrame:
    """Return at most `most` probes of each kind of an edit: kind, question, reference."""
    probes = [(one.kind, one.question, one.reference) for one in dataset.probes[edit]]
    frame = pd.DataFrame(probes, columns=["kind", "question", "reference"])
    return frame.groupby("kind", sort=False).head(most).reset_index(drop=True)


def count_probes(dataset: Dataset) -> pd.DataFrame:
    """Return how many probes there are of each kind."""
    kinds = pd.Series([probe.kind for probe in dataset.every_probe])
    counts = kinds.value_counts().reindex([kind for kind in KINDS if kind in set(kinds)])
    return counts.rename_axis("kind").reset_index(name="probes")


def lacking_kinds(dataset: Dataset) -> list[str]:
    """Return the kinds of the average metric that no probe has."""
    present = {probe.kind for probe in dataset.every_probe}
    return [kind for kind in AVERAGE if kind not in present]


def against_references(before: pd.DataFrame) -> pd.DataFrame:
    """Return the primary metric of each answer against its reference: method, edit, kind, score."""
    scores = [row[KINDS[row["kind"]].metric] for _, row in before.iterrows()]
    frame = before[["edit", "kind"]].assign(method="the unedited model", score=scores)
    return frame[["method", "edit", "kind", "score"]]


def group_mean(scores: pd.DataFrame, group: str) -> float:
    """Return the mean over the kinds of a group that the scores have; NaN if there is none."""
    own = scores[scores["kind"].isin(in_group(group))]
    return float(own.groupby("kind")["score"].mean().mean())


def first_answers(before: pd.DataFrame, edit: str, kinds: Sequence[str]) -> pd.DataFrame:
    """Return the first question of each kind of an edit, its reference and the answer."""
    own = before[(before["edit"] == edit) & before["kind"].isin(kinds)]
    columns = ["kind", "question", "reference", "answer"]
    return own.groupby("kind", sort=False).head(1)[columns].reset_index(drop=True)
