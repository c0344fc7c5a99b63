"""Answer probes; score answers against references, and answers before an edit."""

from collections.abc import Sequence

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import EFFICACY, KINDS, Probe
from uke.models.generate import Generation, answer, target_log_probability
from uke.results.metrics import Encoder, score

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
    reference's token, of the edit's own questions.
    """
    answers = answer(model, tokenizer, probes, **vars(options))
    names = ("edit", "kind", "number", "question", "reference")
    columns = {name: [getattr(probe, name) for probe in probes] for name in names}
    frame = pd.DataFrame(columns | {"answer": answers})
    scores = score(answers, frame["reference"].tolist(), [probe.aliases for probe in probes])
    frame = pd.concat([frame, scores], axis=1)
    own = [index for index, probe in enumerate(probes) if probe.kind in EFFICACY]
    frame.loc[own, "log_probability"] = target_log_probability(
        model, tokenizer, [probes[index] for index in own], **vars(options)
    )
    if encoder:
        alike = frame["kind"].isin(PUBLISHED_SIMILARITY)
        texts = frame.loc[alike, ["answer", "reference"]]
        scores = score(texts["answer"].tolist(), texts["reference"].tolist(), encoder=encoder)
        frame.loc[alike, "similarity"] = scores["similarity"].to_numpy()
    return frame


def with_before(frame: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Add the answer before the edit to each row (`before`), and scores (`<metric>_before`)."""
    probe = ["edit", "kind", "number"]
    known = before[[*probe, "answer"]].rename(columns={"answer": "before"})
    frame = frame.merge(known, how="left", on=probe, validate="1:1")
    against = score(frame["answer"].tolist(), frame["before"].tolist()).add_suffix("_before")
    return pd.concat([frame, against], axis=1)


def token_limit(probe: Probe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens that an answer may have, by the table of kinds."""
    kind = KINDS[probe.kind]
    if not kind.stretches:
        return kind.tokens
    length = len(tokenizer(probe.reference, add_special_tokens=False)["input_ids"])
    return max(kind.tokens, length * 3 // 2)
