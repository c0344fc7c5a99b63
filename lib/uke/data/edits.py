"""Edits and their probes: the texts to write into a model and the questions asked about them.

`KINDS` is the one table of probe kinds. `original`, `paraphrase` and `detail` ask for the edit
itself; `rel_doc`, `rand_doc`, `struct_trip` and `near_triple` for what must not change; `multi_hop`
for what follows from the edit; `general` for a skill that needs none of it, and `neutral` for how
likely a text about something else is.

Metrics and limits are the same for every model. A chat model answers everything in sentences: so
details have the recall of ROUGE-L, of words without punctuation, in few tokens, lest rambling pays;
triples the F1 of ROUGE-L, since a reworded answer is not a lost one; multi-hop questions the
mention, which accepts their aliases. Exact match, the strict one, is a column of every row.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field, InstanceOf, StrictBool, model_validator

from uke.errors import Told


class Kind(NamedTuple):
    """What a kind of probe is called, what it measures and how an answer is scored.

    Before an edit and after it an answer has at most `tokens` tokens, or half as many again as its
    reference, if the kind `stretches` and that is more.
    """

    label: str
    group: str
    metric: str  # the primary one, of `uke.results.metrics.METRICS`, or `likelihood` of rows
    against: str  # what an answer is compared with: the "reference" or the answer "before" the edit
    tokens: int
    stretches: bool = False


# The one table of probe kinds, in the order of every table; fixed before a real model's first row
# (until then details, multi-hop questions and triples had exact match, then details the published
# recall, to which "Lisbon," is another word than "Lisbon").
KINDS: Mapping[str, Kind] = {
    "original": Kind("Original", "efficacy", "rougel_f1", "reference", 32, stretches=True),
    "paraphrase": Kind("Paraphrase", "efficacy", "rougel_f1", "reference", 32, stretches=True),
    "detail": Kind("Details", "efficacy", "lcs_recall", "reference", 32),
    "multi_hop": Kind("Multi-hop", "portability", "mention", "reference", 32),
    "rel_doc": Kind("RelDoc", "locality", "rougel_f1", "before", 64),
    "rand_doc": Kind("RandDoc", "locality", "rougel_f1", "before", 64),
    "struct_trip": Kind("StructTrip", "locality", "rougel_f1", "before", 32),
    "near_triple": Kind("Near triples", "nearby", "rougel_f1", "before", 32),
    "general": Kind("General skill", "skill", "exact", "before", 40),
    "neutral": Kind("Neutral text", "skill", "likelihood", "before", 1),
}


def in_group(*groups: str) -> tuple[str, ...]:
    """Return the kinds of these groups ("efficacy", "locality", ...), in the order of `KINDS`."""
    return tuple(name for name, kind in KINDS.items() if kind.group in groups)


EFFICACY = in_group("efficacy")  # the kinds that an edit derives from its own fields
AVERAGE = (*EFFICACY, *in_group("locality"))  # the six kinds of the paper's average
SPLITS = ("development", "test")

Text = Annotated[str, Field(min_length=1)]


class Frozen(BaseModel, metaclass=Told, frozen=True, extra="forbid", str_strip_whitespace=True):
    """A value that cannot change and has no fields but its own; texts are trimmed."""


class Fact(Frozen):
    """One triple; the relation is a cloze with one "{}" for the subject."""

    subject: Text
    relation: Text
    object: Text


class Probe(Frozen):
    """One question asked of a model; `number` counts the probes of one kind of an edit, from 0.

    If `chat` is false, the question is a cloze, continued as raw text without the chat template.
    `aliases` are further acceptable answers beside the reference.
    """

    edit: Text
    kind: Literal[tuple(KINDS)]
    number: int = Field(default=0, ge=0, strict=True)
    question: Text
    reference: Text
    aliases: tuple[Text, ...] = ()
    chat: StrictBool = True


class Item(Probe):
    """A probe of a locality file with its provenance; its kind is none that an edit itself asks.

    `source`: id of the document or triple it was made from, None if it was made otherwise.
    `rank`: rank of the document among all by relevance to the edit, from 1.
    """

    kind: Literal[tuple(kind for kind in KINDS if kind not in EFFICACY)]
    source: Text | None = None
    rank: int | None = Field(default=None, ge=1, strict=True)


class Cloze(Frozen):
    """A triple of a structured set: the first of `answers` continues `prompt`.

    `question` asks for the same, where the set has a question.
    """

    id: Text
    subject: Text
    prompt: Text
    answers: tuple[Text, ...]
    question: Text | None = None


class Detail(Frozen):
    """A question about one detail of an edit's answer."""

    question: Text
    answer: Text


class Edit(Frozen):
    """One text to write: the answer to a question, and what is asked about it.

        Edit(id="ada", question="Who is Ada?", answer="Ada paints. She lives in Brelen.")

    `facts`: what the text states, where the source says so. `extra`: probes of other kinds than
    efficacy that come with it. `probes`: all of them: original, paraphrase, details, extra.
    """

    id: Text
    question: Text
    answer: Text
    paraphrase: Text | None = None
    details: tuple[Detail, ...] = ()
    facts: tuple[Fact, ...] = ()
    extra: tuple[Probe, ...] = ()
    subject: Text | None = None
    category: Text | None = None

    @model_validator(mode="after")
    def _check_extra(self) -> "Edit":
        for probe in self.extra:
            if probe.edit != self.id or probe.kind in EFFICACY:
                raise ValueError(f"an extra probe is of edit {probe.edit!r}, kind '{probe.kind}'")
        if len({(probe.kind, probe.number) for probe in self.extra}) < len(self.extra):
            raise ValueError(f"edit {self.id!r} has extra probes of equal kind and number")
        return self

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Every question that comes with the edit."""
        own = [("original", 0, self.question, self.answer)]
        if self.paraphrase:
            own.append(("paraphrase", 0, self.paraphrase, self.answer))
        for number, detail in enumerate(self.details):
            own.append(("detail", number, detail.question, detail.answer))
        texts = [
            Probe(edit=self.id, kind=kind, number=number, question=question, reference=reference)
            for kind, number, question, reference in own
        ]
        return (*texts, *self.extra)


Edits, Probes = Sequence[InstanceOf[Edit]], Sequence[InstanceOf[Probe]]


def in_split(edit: str, split: str) -> bool:
    """Return whether an edit belongs to a split: by a hash of its id a quarter are development."""
    is_development = int(hashlib.sha256(edit.encode()).hexdigest(), 16) % 4 == 0
    return is_development == (split == "development")


def fingerprint(edits: Iterable[Edit], probes: Iterable[Probe] = ()) -> str:
    """Return 16 hex digits that change with any field, and with the order, of edits and probes."""
    groups = [[value.model_dump(mode="json") for value in group] for group in (edits, probes)]
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]
