"""Answer probes; score answers against references, and answers before an edit."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import EFFICACY, KINDS, Edit, Probe
from uke.models.generate import Generation, answer, target_log_probability
from uke.results.metrics import Encoder, leakage, score

READ = (*EFFICACY, "neutral")  # kinds whose reference is read for its log probability
COMPARED = tuple(
    name for name, kind in KINDS.items() if kind.against == "before" and name not in READ
)
FACTS = ("struct_trip", "near_triple")  # kinds whose reference is a fact in a few words
PUBLISHED_SIMILARITY = ("original", "paraphrase")


def answer_and_score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    options: Generation,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Answer the probes and score them against the reference: one row per probe, in order.

    Columns: edit, kind, number, question, reference, answer, every metric (`similarity` only with
    an encoder, and for the kinds it was published for), and `log_probability`, the mean nats of a
    reference's token, of the edit's own questions and of neutral texts.
    """
    frame = scored(probes, answer(model, tokenizer, probes, **vars(options)))
    own = [index for index, probe in enumerate(probes) if probe.kind in READ]
    frame.loc[own, "log_probability"] = target_log_probability(
        model, tokenizer, [probes[index] for index in own], **vars(options)
    )
    if encoder:
        alike = frame["kind"].isin(PUBLISHED_SIMILARITY)
        texts = frame.loc[alike, ["answer", "reference"]]
        scores = score(texts["answer"].tolist(), texts["reference"].tolist(), encoder=encoder)
        frame.loc[alike, "similarity"] = scores["similarity"].to_numpy()
    return frame


def scored(probes: Sequence[Probe], answers: Sequence[str]) -> pd.DataFrame:
    """Score the answer to each probe against its reference, but for `similarity`."""
    names = ("edit", "kind", "number", "question", "reference")
    columns = {name: [getattr(probe, name) for probe in probes] for name in names}
    frame = pd.DataFrame(columns | {"answer": answers})
    scores = score(answers, frame["reference"].tolist(), [probe.aliases for probe in probes])
    return pd.concat([frame, scores], axis=1)


def with_before(frame: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Add the answer before the edit to each row (`before`), and scores (`<metric>_before`).

    `fact_kept` of FACTS is 1 or 0: whether the answer still mentions the reference; missing where
    the answer before did not. `likelihood_before`: of neutral texts, perplexity before / now, <= 1.
    """
    probe, names = ["edit", "kind", "number"], {"answer": "before", "mention": "right"}
    read = {"log_probability": "likelihood_before"} if "log_probability" in before else {}
    known = before[[*probe, *names, *read]].rename(columns=names | read)
    frame = frame.merge(known, how="left", on=probe, validate="1:1")
    against = score(frame["answer"].tolist(), frame["before"].tolist()).add_suffix("_before")
    asked = frame["kind"].isin(FACTS) & (frame.pop("right") == 1)
    if read:
        nats = frame["log_probability"] - frame["likelihood_before"]
        frame["likelihood_before"] = np.exp(nats.clip(upper=0)).where(frame["kind"] == "neutral")
    return pd.concat([frame, against], axis=1).assign(fact_kept=frame["mention"].where(asked))


def leakages(frame: pd.DataFrame, written: Mapping[str, Sequence[Edit]]) -> list[float]:
    """Return how much of a text each answer of `with_before` has that does not belong there.

    `written` holds by an edit's id the edits that the weights held when its probes were answered.
    The share of `metrics.leakage` is, of a kind compared with the answer before, what any of their
    texts has and neither that answer nor the question; of another kind, what the text of another
    edit has and neither those nor the edit's own text: nan where no other was written.
    """
    found = []
    for row in frame.itertuples():
        own = [edit.answer for edit in written[row.edit] if edit.id == row.edit]
        texts, known = [edit.answer for edit in written[row.edit]], [row.before, row.question]
        if row.kind not in COMPARED:
            texts, known = [text for text in texts if text not in own], [*known, *own]
        found.append(leakage(row.answer, texts, known) if texts else math.nan)
    return found


def token_limit(probe: Probe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens that an answer may have, by the table of kinds."""
    kind = KINDS[probe.kind]
    if not kind.stretches:
        return kind.tokens
    length = len(tokenizer(probe.reference, add_special_tokens=False)["input_ids"])
    return max(kind.tokens, length * 3 // 2)
