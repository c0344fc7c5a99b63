"""Choose what must not change: for every edit two documents and two triples.

Source of the kinds: arXiv 2506.09672 (UnKEBench-Loc, AKEW-Loc); the near triple is ours. RelDoc is
the best-ranked document that shares no fact with any edit written in one batch with its own;
RandDoc is drawn from those ranked below a floor. What the paper leaves open is a field of
`Settings`, with the reason for its default.
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictBool, StrictInt
from tqdm.auto import tqdm

from uke.data.documents import Document
from uke.data.edits import Cloze, Edit, Frozen, Item, in_group
from uke.data.formats import is_question
from uke.errors import InputError
from uke.locality import retrieval
from uke.locality.facts import EXTRACTORS, SENTENCE, Facts, edit_facts, facts, shared, union

LEAST_QUESTIONS = 100  # fewer teach a retriever nothing
PROBE_KINDS = in_group("locality", "nearby")
TITLE, SECTION = "Tell me about {title}.", "Tell me about {title}, in particular: {section}."


class Settings(Frozen):
    """Every choice of a locality set; of these the paper states a trained retriever and the floor.

    - `retriever`: ranks documents by the edit's question; MiniLM as it comes. The published one is
      trained, which needs documents that bring questions: where those are too few, "dense-trained"
      falls back to "dense", and the card says so.
    - `extractor`: the one that needs no download. `stated`: whether what a record states beside its
      text (subject, triples, short answers) counts as its facts, which is surer than any extractor.
    - `batch`: edits that may be written together, consecutive ones of a split; no document shares a
      fact with any of them. 0 is all of a split, so that a set serves every batch size.
    - `floor`: RandDoc stands below this rank. `candidates`: documents looked through for RelDoc.
    - `words`: length of a reference, 0 for the median of the answers to write, so that both cost a
      model as much.
    - `seed`: of every draw.
    """

    retriever: Literal["bm25", "dense", "dense-trained"] = "dense"
    extractor: Literal["offline", "spacy"] = "offline"
    stated: StrictBool = True
    batch: StrictInt = Field(default=0, ge=0)
    floor: StrictInt = Field(default=100, ge=1)
    candidates: StrictInt = Field(default=1000, ge=1)
    words: StrictInt = Field(default=0, ge=0)
    seed: StrictInt = 1


@dataclass(frozen=True)
class Sources:
    """What a set is made from. `groups`: the edits of each split, in the order they are written."""

    groups: tuple[tuple[Edit, ...], ...]
    documents: tuple[Document, ...]
    clozes: tuple[Cloze, ...]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for group in self.groups for edit in group)

    def blocks(self, batch: int) -> list[tuple[Edit, ...]]:
        """List the edits that may be written together: consecutive ones of a group, or all."""
        return [
            group[start : start + (batch or len(group))]
            for group in self.groups
            for start in range(0, len(group), batch or len(group))
        ]


@dataclass
class Builder:
    """Sources with what is computed once: facts, rankings, lengths.

    `folder` keeps embeddings and a trained retriever. `refused`: the edits left without an item, by
    kind.
    """

    sources: Sources
    settings: Settings
    folder: Path
    refused: dict[str, list[str]] = field(default_factory=dict, init=False)

    @cached_property
    def extract(self) -> Callable[[str], list[str]]:
        return EXTRACTORS[self.settings.extractor]()

    @cached_property
    def document_facts(self) -> list[Facts]:
        texts = [(retrieval.passage(each), each.title) for each in self.sources.documents]
        return [facts(text, self.extract(text), [title]) for text, title in texts]

    @cached_property
    def cloze_facts(self) -> list[Facts]:
        return [
            facts(" ".join((cloze.prompt, *cloze.answers)), (), (cloze.subject, *cloze.answers))
            for cloze in self.sources.clozes
        ]

    @cached_property
    def words(self) -> int:
        lengths = [len(edit.answer.split()) for edit in self.sources.edits]
        return self.settings.words or round(median(lengths))

    @cached_property
    def ranked(self) -> dict[str, np.ndarray]:
        """For every edit the indices (N,) of the documents, the most relevant to it first."""
        documents = self.sources.documents
        index = retrieval.over(documents, self.settings.retriever, self.folder)
        order, _ = index.top([edit.question for edit in self.sources.edits], len(documents))
        return self.by_edit(order)

    @cached_property
    def near(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For every edit the triples by how like their relation is to one of its own, best first.

        Indices and scores, (M,) each.
        """
        name = "bm25" if self.settings.retriever == "bm25" else "dense"
        relations = [
            without(cloze.question or cloze.prompt, cloze.subject) for cloze in self.sources.clozes
        ]
        index = retrieval.build(name, relations, self.folder)
        asked = [self.relation(edit) for edit in self.sources.edits]
        indices, scores = index.top(asked, len(relations))
        return self.by_edit(zip(indices, scores, strict=True))

    def by_edit(self, values: Iterable) -> dict[str, Any]:
        """Key values, one for each edit, by the edits' ids."""
        return dict(zip((edit.id for edit in self.sources.edits), values, strict=True))

    def relation(self, edit: Edit) -> str:
        """Find a relation that the edit states, without its subject."""
        if edit.facts:
            return edit.facts[0].relation.replace("{}", "")
        questions = [detail.question for detail in edit.details] or [edit.question]
        question = self.rng("relation", edit).choice(questions)
        return without(question, edit.subject, *self.extract(text_of(edit)))

    def rng(self, use: str, edit: Edit) -> random.Random:
        """Make a generator for one draw of one edit: what is drawn for others does not matter."""
        return random.Random(f"{use}-{self.settings.seed}-{edit.id}")

    def facts_of(self, edit: Edit) -> Facts:
        """Collect the facts of an edit: what its record states, and what is found in its text."""
        bare = edit.model_copy(update={"subject": None, "facts": (), "details": ()})
        return edit_facts(edit if self.settings.stated else bare, self.extract)

    def block(self, edits: Sequence[Edit]) -> Iterator[Item]:
        """Make the items of edits that may be written together, edit by edit."""
        together = union(map(self.facts_of, edits))
        spelled_out = " ".join(("", *map(spelled, map(text_of, edits)), ""))
        free = np.array([not shared(together, each) for each in self.document_facts])
        apart = [not shared(together, each) for each in self.cloze_facts]
        for number, cloze in enumerate(self.sources.clozes):
            names = map(spelled, (cloze.subject, *cloze.answers))
            apart[number] &= not any(f" {name} " in spelled_out for name in names)
        for edit in edits:
            yield from self.documents_of(edit, free)
            yield from self.triples_of(edit, np.array(apart))

    def documents_of(self, edit: Edit, free: np.ndarray) -> Iterator[Item]:
        """Choose RelDoc and RandDoc of an edit from the documents marked `free` (N,)."""
        ranked, settings = self.ranked[edit.id], self.settings
        related = next((int(one) for one in ranked[: settings.candidates] if free[one]), None)
        below = free.copy()
        below[ranked[: settings.floor]] = False
        if related is not None:
            below[related] = False
        random_ = self.draw("rand_doc", edit, np.flatnonzero(below))
        for kind, index in (("rel_doc", related), ("rand_doc", random_)):
            if index is None:
                self.refused.setdefault(kind, []).append(edit.id)
                continue
            document = self.sources.documents[index]
            question, aliases = question_for(document)
            yield Item(
                edit=edit.id,
                kind=kind,
                question=question,
                reference=cut(document.text, self.words),
                aliases=aliases,
                source=document.id,
                rank=1 + int(np.flatnonzero(ranked == index)[0]),
            )

    def triples_of(self, edit: Edit, apart: np.ndarray) -> Iterator[Item]:
        """Choose StructTrip and near triple of an edit from the triples marked `apart` (M,).

        They are numbered on from the probes that the edit brings.
        """
        drawn = self.draw("struct_trip", edit, np.flatnonzero(apart))
        ranked, scores = self.near[edit.id]
        left = apart[ranked] & (ranked != drawn)
        # Triples of one relation differ in the subject, which was taken out: equally near.
        nearest = ranked[left & (scores == scores[left].max(initial=-np.inf))]
        near = self.draw("near_triple", edit, nearest)
        for kind, index in (("struct_trip", drawn), ("near_triple", near)):
            if index is None:
                self.refused.setdefault(kind, []).append(edit.id)
                continue
            cloze = self.sources.clozes[index]
            own = [probe.number for probe in edit.extra if probe.kind == kind]
            as_question = kind == "near_triple"
            yield Item(
                edit=edit.id,
                kind=kind,
                number=1 + max(own, default=-1),
                question=cloze.question or cloze.prompt if as_question else cloze.prompt,
                chat=as_question or is_question(cloze.prompt),
                reference=cloze.answers[0],
                aliases=cloze.answers[1:],
                source=cloze.id,
            )

    def draw(self, kind: str, edit: Edit, indices: np.ndarray) -> int | None:
        """Draw one of these indices for an edit; None where there is none."""
        return int(self.rng(kind, edit).choice(indices)) if len(indices) else None


def question_for(document: Document) -> tuple[str, tuple[str, ...]]:
    """Find the question that a document brings, with its short answer if any, or ask by title."""
    if document.questions:
        question, answer = document.questions[0]
        return question, (answer,) if answer else ()
    template = SECTION if document.section else TITLE
    return template.format(title=document.title, section=document.section), ()


def build(sources: Sources, settings: Settings, folder: Path) -> tuple[Item, ...]:
    """Build four items for every edit, in the order of the edits.

    Raises InputError, with counts, where documents are too few for the floor or some edit is left
    without an item.
    """
    check(sources, settings)
    builder = Builder(sources, settings, folder)
    blocks = tqdm(sources.blocks(settings.batch), desc="locality", mininterval=5)
    items = [item for block in blocks for item in builder.block(block)]
    for kind, edits in builder.refused.items():
        documents = f"{len(sources.documents)} documents"
        among = documents if kind.endswith("doc") else f"{len(sources.clozes)} triples"
        named = ", ".join(map(repr, edits[:5])) + (" ..." if len(edits) > 5 else "")
        raise InputError(
            f"{kind}: none of {among} is left for {len(edits)} of {len(sources.edits)} edits "
            f"({named}): each shares a fact with an edit that may be written in one batch with it, "
            f"or is ranked out; add more, or lower batch ({settings.batch or 'all'}) or floor "
            f"({settings.floor})"
        )
    return tuple(items)


def unfiltered(sources: Sources, settings: Settings, folder: Path) -> tuple[Item, ...]:
    """Choose RelDocs as if a shared fact did not matter: the control of an audit."""
    builder = Builder(sources, fitted(settings, sources), folder)
    every = np.ones(len(sources.documents), dtype=bool)
    items = (item for edit in sources.edits for item in builder.documents_of(edit, every))
    return tuple(item for item in items if item.kind == "rel_doc")


def check(sources: Sources, settings: Settings) -> None:
    """Raise InputError where no set can be made of these sources."""
    if not sources.edits:
        raise InputError("locality: there is no edit to build probes for")
    if len(sources.documents) < settings.floor + 2:
        raise InputError(
            f"locality: {len(sources.documents)} documents are too few for the floor "
            f"{settings.floor}: RandDoc is drawn from those ranked below it; "
            f"expected {settings.floor + 2} or more"
        )
    counts = Counter(cloze.id for cloze in sources.clozes)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"locality: {len(repeated)} triples share an id ({repeated[0]!r}); "
            "expected structured sets whose files have different names"
        )
    if len(sources.clozes) < 2:
        raise InputError(
            f"locality: {len(sources.clozes)} triples in the structured set; expected 2 or more"
        )


def fitted(settings: Settings, sources: Sources) -> Settings:
    """Fall back to MiniLM as it comes where questions are too few to learn from; warn of it."""
    questions = sum(len(document.questions) for document in sources.documents)
    if settings.retriever != "dense-trained" or questions >= LEAST_QUESTIONS:
        return settings
    warnings.warn(
        f"the documents bring {questions} questions, too few to train a retriever on "
        f"({LEAST_QUESTIONS}); MiniLM is used as it comes",
        stacklevel=2,
    )
    return settings.model_copy(update={"retriever": "dense"})


def text_of(edit: Edit) -> str:
    """Write question and answer of an edit as one text."""
    return f"{edit.question} {edit.answer}"


def spelled(text: str) -> str:
    """Write the words of a text in lower case, with single spaces between."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def without(question: str, *names: str | None) -> str:
    """Take the names a question is about out of it, so that what remains is its relation."""
    for name in sorted(filter(None, names), key=len, reverse=True):
        question = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", question)
    return " ".join(question.split())


def cut(text: str, words: int) -> str:
    """Keep the first sentences of a text that come nearest to so many words; at least one."""
    straight = text.translate(str.maketrans("“”‘’", "\"\"''"))  # as long as the text itself
    ends = [len(text[: found.end()].rstrip()) for found in SENTENCE.finditer(straight)]
    ends.append(len(text.rstrip()))
    return text[: min(ends, key=lambda end: abs(len(text[:end].split()) - words))]
