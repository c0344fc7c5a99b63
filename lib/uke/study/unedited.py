"""What the unedited model's answers are worth, and what any other text would be."""

from collections.abc import Sequence

import pandas as pd

from uke.data.edits import KINDS
from uke.results.metrics import score
from uke.study.score import TEXTS


def against_references(before: pd.DataFrame) -> pd.DataFrame:
    """Return the primary metric of each answer against its reference: method, edit, kind, score."""
    scores = [row[KINDS[row["kind"]].metric] for _, row in before.iterrows()]
    frame = before[["edit", "kind"]].assign(method="the unedited model", score=scores)
    return frame[["method", "edit", "kind", "score"]]


def floor(before: pd.DataFrame) -> pd.DataFrame:
    """Return the chance level of texts: the primary metric of answers paired with the wrong
    question.

    An edit's own text is replaced by another edit's text, a document by what the unedited model
    answers about another document. Columns: method (`floor`), edit, kind, score; a kind with a
    single question has no row.
    """
    parts = [pd.DataFrame(columns=["method", "edit", "kind", "score"])]
    for kind in TEXTS:
        rows = before[before["kind"] == kind].reset_index(drop=True)
        compared_with = "before" if KINDS[kind].against == "before" else "reference"
        texts, questions = rows[compared_with].tolist(), rows["question"].tolist()
        others = [_other_question(questions, index) for index in rows.index]
        if rows.empty or None in others:
            continue
        scores = score([texts[index] for index in others], texts)[KINDS[kind].metric]
        columns = {"method": "floor", "edit": rows["edit"], "kind": kind}
        parts.append(pd.DataFrame(columns | {"score": scores.to_numpy()}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _other_question(questions: Sequence[str], index: int) -> int | None:
    """Return the next index, going round, whose question is another one."""
    turned = [*range(index + 1, len(questions)), *range(index)]
    return next((other for other in turned if questions[other] != questions[index]), None)
