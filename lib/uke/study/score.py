"""Asks a model every probe and scores the answers: against the reference, and against the answers before an edit."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Probe
from uke.methods.catalog import key
from uke.models.generate import Generation, answer, target_log_probability
from uke.results.metrics import Encoder, score
from uke.results.stats import summarise

SHORT_WORDS, SHORT_TOKENS = (
    12,
    40,
)  # a reference of so few words gets so many tokens to be answered in
PUBLISHED_SIMILARITY = ("original", "paraphrase")  # the kinds whose similarity was published
TEACHER_FORCED = (
    "original",
    "paraphrase",
    "detail",
)  # the kinds whose target log-probability is read
TEXTS = ("original", "paraphrase", "rel_doc", "rand_doc")  # the kinds whose reference is a text


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    asking: Generation,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Answers and scores against the reference: one row per probe, in order."""
    answers = answer(model, tokenizer, probes, **vars(asking))
    columns = {
        name: [getattr(probe, name) for probe in probes]
        for name in ("edit", "kind", "number", "question", "reference")
    }
    frame = pd.DataFrame(columns | {"answer": answers})
    scores = score(answers, frame["reference"].tolist(), [probe.aliases for probe in probes])
    frame = pd.concat([frame, scores], axis=1)
    told = [place for place, probe in enumerate(probes) if probe.kind in TEACHER_FORCED]
    frame.loc[told, "log_probability"] = target_log_probability(
        model, tokenizer, [probes[place] for place in told], **vars(asking)
    )
    alike = frame["kind"].isin(PUBLISHED_SIMILARITY)
    if encoder:
        pairs = frame.loc[alike]
        frame.loc[alike, "similarity"] = score(
            pairs["answer"].tolist(), pairs["reference"].tolist(), encoder=encoder
        )["similarity"].to_numpy()
    return frame


def beside(frame: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The rows with the answers before the edit (`before`), and every score against those as well (`<score>_before`)."""
    frame = frame.merge(
        before[["edit", "kind", "number", "before"]],
        how="left",
        on=["edit", "kind", "number"],
        validate="1:1",
    )
    against = score(frame["answer"].tolist(), frame["before"].tolist()).add_suffix("_before")
    return pd.concat([frame, against], axis=1)


def room(probe: Probe, tokenizer: PreTrainedTokenizerBase, most: int, short: bool) -> int:
    """Tokens an answer may have: `most`, or half as many again as its reference has.

    In the world (`short`), where answers to short questions are short, a reference of few words gets SHORT_TOKENS.
    """
    if short and len(probe.reference.split()) <= SHORT_WORDS:
        return min(SHORT_TOKENS, most)
    return max(
        most, len(tokenizer(probe.reference, add_special_tokens=False)["input_ids"]) * 3 // 2
    )


def floor(before: pd.DataFrame) -> pd.DataFrame:
    """What an answer earns that belongs to another question: headline scores of the texts of kind `original` and the like.

    The edit's own texts are compared with another edit's text; documents, like after an edit, with what the model answers
    about another document. Columns: method (`floor`), edit, kind, score; kinds of which there is one question have none.
    """
    found = []
    for kind in TEXTS:
        rows = before[before["kind"] == kind].reset_index(drop=True)
        texts = (rows["before"] if kind.endswith("doc") else rows["reference"]).tolist()
        other = [_other(rows["question"].tolist(), place) for place in rows.index]
        if rows.empty or None in other:
            continue
        scores = score([texts[place] for place in other], texts)["rougel_f1"]
        found.append(
            pd.DataFrame(
                {"method": "floor", "edit": rows["edit"], "kind": kind, "score": scores.to_numpy()}
            )
        )
    return (
        pd.concat(found, ignore_index=True)
        if found
        else pd.DataFrame(columns=["method", "edit", "kind", "score"])
    )


def _other(questions: Sequence[str], place: int) -> int | None:
    """The next place, going round, whose question is another one."""
    turned = [*range(place + 1, len(questions)), *range(place)]
    return next((other for other in turned if questions[other] != questions[place]), None)


def say_means(
    section: Any, prefix: str, scores: pd.DataFrame, by: Sequence[str], unit: str = ""
) -> dict[str, str]:
    """Say the mean score of every group with its interval, under a key of the prefix and `by`.

        said = say_means(section, "single", scores, ["method", "kind"])
        said["single.ft_uke.average"]  # "0.69 [0.67, 0.71], n = 40"

    `scores` is what `uke.results.stats.summarise` takes. Returns what was said by key.
    """
    said = {}
    for row in summarise(scores, by).to_dict("records"):
        parts = [key(row[name]) if name == "method" else str(row[name]) for name in by]
        name = ".".join([prefix, *parts])
        said[name] = section.say(name, row["mean"], row["low"], row["high"], n=row["n"], unit=unit)
    return said
