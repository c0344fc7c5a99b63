"""Builds what must not change: for every edit a related and a random document, an unrelated triple and a near one.

Source of the kinds: arXiv 2506.09672 (UnKEBench-Loc, AKEW-Loc); the near triple is ours. RelDoc is the best-ranked document
that shares no fact with any edit written in one batch with its own; RandDoc is drawn from those ranked below a floor.
What the paper leaves open is a field of `Settings`, with the reason for its default.
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from pydantic import Field, StrictBool, StrictInt
from tqdm.auto import tqdm

from uke.data.documents import Document
from uke.data.edits import Cloze, Edit, Frozen, Item
from uke.data.formats import is_question
from uke.errors import InputError
from uke.locality import retrieval
from uke.locality.facts import EXTRACTORS, Facts, edit_facts, facts, shared, union
from uke.locality.phrases import SENTENCE

LEAST_QUESTIONS = 100  # fewer teach a retriever nothing
KINDS = ("rel_doc", "rand_doc", "struct_trip", "near_triple")
TITLE, SECTION = "Tell me about {title}.", "Tell me about {title}, in particular: {section}."


class Settings(Frozen):
    """Every choice of a locality set; the paper states a trained retriever, the floor, and that facts are compared.

    - `retriever`: MiniLM as it comes. The published one is trained, which needs documents that bring questions: where those
      are too few, "dense-trained" falls back to "dense", and the card says so.
    - `search`: every passage ("exact", "faiss"), or a graph of neighbours, nearly exact, for millions ("hnsw").
    - `query`: the edit's question, as in dense passage retrieval, or question and answer.
    - `extractor`: the one that needs no download. `stated`: whether what a record states beside its text (subject, triplets, short
      answers) counts as its facts, since that is surer than any extractor.
    - `batch`: edits that may be written together, consecutive ones of a split; no document shares a fact with any of them.
      0 is all of a split, so that a set serves every batch size.
    - `floor`: RandDoc stands below this rank. `candidates`: ranked documents looked through for RelDoc.
    - `own_question`: ask a document its own question where it has one, else (or where false) by its title.
    - `words`: length of a reference, 0 for the median of the answers to write, so that both cost a model as much.
    - `seed`: of every draw.
    """

    retriever: Literal["bm25", "dense", "dense-trained"] = "dense"
    search: Literal["exact", "faiss", "hnsw"] = "exact"
    query: Literal["question", "text"] = "question"
    extractor: Literal["offline", "spacy"] = "offline"
    stated: StrictBool = True
    batch: StrictInt = Field(default=0, ge=0)
    floor: StrictInt = Field(default=100, ge=1)
    candidates: StrictInt = Field(default=1000, ge=1)
    own_question: StrictBool = True
    words: StrictInt = Field(default=0, ge=0)
    seed: StrictInt = 1


@dataclass(frozen=True)
class Sources:
    """What a set is made from. `groups`: the edits in the order studies write them, one group for each split."""

    groups: tuple[tuple[Edit, ...], ...]
    documents: tuple[Document, ...]
    clozes: tuple[Cloze, ...]

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for group in self.groups for edit in group)

    def blocks(self, batch: int) -> list[tuple[Edit, ...]]:
        """The edits that may be written together: of every group consecutive ones, or the whole group."""
        return [
            group[start : start + (batch or len(group))]
            for group in self.groups
            for start in range(0, len(group), batch or len(group))
        ]


@dataclass
class Builder:
    """Sources with what is computed once: facts, rankings, lengths. `folder` keeps embeddings and a trained retriever."""

    sources: Sources
    settings: Settings
    folder: Path
    refused: dict[str, list[str]] = field(default_factory=dict, init=False)

    @cached_property
    def extract(self):
        return EXTRACTORS[self.settings.extractor]()

    @cached_property
    def document_facts(self) -> list[Facts]:
        texts = list(map(retrieval.passage, self.sources.documents))
        return [
            facts(text, self.extract(text), [document.title])
            for text, document in zip(texts, self.sources.documents)
        ]

    @cached_property
    def cloze_facts(self) -> list[Facts]:
        return [
            facts(" ".join((cloze.prompt, *cloze.answers)), (), (cloze.subject, *cloze.answers))
            for cloze in self.sources.clozes
        ]

    @cached_property
    def words(self) -> int:
        return self.settings.words or round(
            median(len(edit.answer.split()) for edit in self.sources.edits)
        )

    @cached_property
    def queries(self) -> list[str]:
        """What documents are ranked by, one for each edit; one list, so that an index encodes it once."""
        return [
            edit.question if self.settings.query == "question" else text_of(edit)
            for edit in self.sources.edits
        ]

    @cached_property
    def ranked(self) -> dict[str, np.ndarray]:
        """For every edit the places of the documents most relevant to it, best first, (k,)."""
        places, _ = self.index.top(self.queries, max(self.settings.candidates, self.settings.floor))
        return dict(zip((edit.id for edit in self.sources.edits), places))

    @cached_property
    def index(self) -> "retrieval.Index":
        return retrieval.over(
            self.sources.documents, self.settings.retriever, self.folder, self.settings.search
        )

    @cached_property
    def near(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For every edit the places of the triples by how like their relation is to one of its own, best first, and the scores, (M,) each."""
        name = "bm25" if self.settings.retriever == "bm25" else "dense"
        relations = [
            without(cloze.question or cloze.prompt, cloze.subject) for cloze in self.sources.clozes
        ]
        index = retrieval.build(name, relations, self.folder)
        places, scores = index.top(
            [self.relation(edit) for edit in self.sources.edits], len(relations)
        )
        return dict(zip((edit.id for edit in self.sources.edits), zip(places, scores)))

    def relation(self, edit: Edit) -> str:
        """One relation that the edit states, without its subject: of its edited fact, else of one of its details."""
        if edit.facts:
            return edit.facts[0].relation.replace("{}", "")
        asked = self.rng("relation", edit).choice(
            [detail.question for detail in edit.details] or [edit.question]
        )
        return without(
            asked, edit.subject, *(triple.subject for triple in self.extract(text_of(edit)))
        )

    def rng(self, use: str, edit: Edit) -> random.Random:
        """A generator for one draw of one edit: what is drawn for others does not matter."""
        return random.Random(f"{use}-{self.settings.seed}-{edit.id}")

    def facts_of(self, edit: Edit) -> Facts:
        """The facts of an edit: what its record states, and what is extracted from its text."""
        bare = edit.model_copy(update={"subject": None, "facts": (), "details": ()})
        return edit_facts(edit if self.settings.stated else bare, self.extract)

    def block(self, edits: Sequence[Edit]) -> Iterator[Item]:
        """The items of edits that may be written together, edit by edit."""
        together = union(map(self.facts_of, edits))
        free = np.array([not shared(together, each) for each in self.document_facts])
        spoken = " ".join(("", *map(spelled, map(text_of, edits)), ""))
        apart = np.array(
            [
                not shared(together, each)
                and not any(
                    f" {spelled(name)} " in spoken for name in (cloze.subject, *cloze.answers)
                )
                for each, cloze in zip(self.cloze_facts, self.sources.clozes)
            ]
        )
        for edit in edits:
            yield from self.documents_of(edit, free)
            yield from self.triples_of(edit, apart)

    def documents_of(self, edit: Edit, free: np.ndarray) -> Iterator[Item]:
        """RelDoc and RandDoc of an edit, from the documents marked `free` (N,)."""
        ranked = self.ranked[edit.id]
        related = next(
            (int(place) for place in ranked[: self.settings.candidates] if free[place]), None
        )
        below = free.copy()
        below[ranked[: self.settings.floor]] = False
        if related is not None:
            below[related] = False
        drawn = np.flatnonzero(below)
        random_ = int(self.rng("rand_doc", edit).choice(drawn)) if len(drawn) else None
        for kind, place in (("rel_doc", related), ("rand_doc", random_)):
            if place is None:
                self.refused.setdefault(kind, []).append(edit.id)
            else:
                document = self.sources.documents[place]
                asked, short = self.asked(document)
                reference = cut(document.text, self.words)
                yield Item(
                    edit=edit.id,
                    kind=kind,
                    question=asked,
                    reference=reference,
                    aliases=short,
                    source=document.id,
                )

    def triples_of(self, edit: Edit, apart: np.ndarray) -> Iterator[Item]:
        """StructTrip and near triple of an edit, from the triples marked `apart` (M,); numbered on from the edit's own."""
        places = np.flatnonzero(apart)
        drawn = int(self.rng("struct_trip", edit).choice(places)) if len(places) else None
        ranked, scores = self.near[edit.id]
        left = apart[ranked] & (ranked != drawn)
        # Triples of one relation differ in the subject, which was taken out: equally near, so one of them is drawn.
        nearest = ranked[left & (scores == scores[left].max(initial=-np.inf))]
        near = int(self.rng("near_triple", edit).choice(nearest)) if len(nearest) else None
        for kind, place in (("struct_trip", drawn), ("near_triple", near)):
            if place is None:
                self.refused.setdefault(kind, []).append(edit.id)
                continue
            cloze = self.sources.clozes[place]
            number = 1 + max(
                (probe.number for probe in edit.extra if probe.kind == kind), default=-1
            )
            asked = (
                (cloze.prompt, is_question(cloze.prompt))
                if kind == "struct_trip"
                else (cloze.question or cloze.prompt, True)
            )
            yield Item(
                edit=edit.id,
                kind=kind,
                number=number,
                question=asked[0],
                chat=asked[1],
                reference=cloze.answers[0],
                aliases=cloze.answers[1:],
                source=cloze.id,
            )

    def asked(self, document: Document) -> tuple[str, tuple[str, ...]]:
        """The question that stands for a document, its own or else made from its title, and its short answer where it has one."""
        if self.settings.own_question and document.questions:
            question, short = document.questions[0]
            return question, (short,) if short else ()
        return (SECTION if document.section else TITLE).format(
            title=document.title, section=document.section
        ), ()


def build(sources: Sources, settings: Settings, folder: Path) -> tuple[Item, ...]:
    """Four items for every edit, in the order of the edits; the same sources, settings and seed give the same items.

    Raises InputError, with counts, where documents are too few for the floor or some edit is left without an item.
    """
    check(sources, settings)
    builder = Builder(sources, settings, folder)
    blocks = sources.blocks(settings.batch)
    found = [
        item
        for block in tqdm(blocks, desc="locality", mininterval=5)
        for item in builder.block(block)
    ]
    for kind, without_one in builder.refused.items():
        of = (
            f"{len(sources.documents)} documents"
            if kind.endswith("doc")
            else f"{len(sources.clozes)} triples"
        )
        named = ", ".join(map(repr, without_one[:5])) + (" ..." if len(without_one) > 5 else "")
        raise InputError(
            f"{kind}: none of {of} is left for {len(without_one)} of {len(sources.edits)} edits ({named}): each shares a fact with an edit that may be "
            f"written in one batch with it, or is ranked out; add more, or lower batch ({settings.batch or 'all'}) or floor ({settings.floor})"
        )
    place = {document.id: number for number, document in enumerate(sources.documents)}
    ranks: dict[tuple[str, str], int] = {}
    for kind in ("rel_doc", "rand_doc"):
        chosen = [item for item in found if item.kind == kind]  # one for each query, in their order
        found_at = builder.index.ranks(builder.queries, [place[item.source] for item in chosen])
        ranks |= {(kind, item.edit): int(rank) for item, rank in zip(chosen, found_at, strict=True)}
    return tuple(
        item.model_copy(update={"rank": ranks.get((item.kind, item.edit))}) for item in found
    )


def unfiltered(sources: Sources, settings: Settings, folder: Path) -> tuple[Item, ...]:
    """The RelDocs that would be taken if a shared fact were no matter: the control of an audit."""
    builder = Builder(sources, fitted(settings, sources), folder)
    every = np.ones(len(sources.documents), bool)
    found = (item for edit in sources.edits for item in builder.documents_of(edit, every))
    return tuple(item for item in found if item.kind == "rel_doc")


def check(sources: Sources, settings: Settings) -> None:
    """InputError where no set can be made of these sources."""
    if not sources.edits:
        raise InputError("locality: there is no edit to build probes for")
    if len(sources.documents) < settings.floor + 2:
        raise InputError(
            f"locality: {len(sources.documents)} documents are too few for the floor {settings.floor}: "
            f"RandDoc is drawn from those ranked below it; expected {settings.floor + 2} or more"
        )
    if twice := [
        name for name, count in Counter(cloze.id for cloze in sources.clozes).items() if count > 1
    ]:
        raise InputError(
            f"locality: {len(twice)} triples share an id ({twice[0]!r}); expected structured sets whose files have different names"
        )
    if len(sources.clozes) < 2:
        raise InputError(
            f"locality: {len(sources.clozes)} triples in the structured set; expected 2 or more"
        )


def fitted(settings: Settings, sources: Sources) -> Settings:
    """The settings that these sources allow: without enough questions to learn from, MiniLM stays as it comes, with a warning."""
    brought = sum(len(document.questions) for document in sources.documents)
    if settings.retriever != "dense-trained" or brought >= LEAST_QUESTIONS:
        return settings
    warnings.warn(
        f"the documents bring {brought} questions, too few to train a retriever on ({LEAST_QUESTIONS}); MiniLM is used as it comes",
        stacklevel=2,
    )
    return settings.model_copy(update={"retriever": "dense"})


def text_of(edit: Edit) -> str:
    """Question and answer of an edit, as one text."""
    return f"{edit.question} {edit.answer}"


def spelled(text: str) -> str:
    """The words of a text in lower case, single spaces between."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def without(question: str, *names: str | None) -> str:
    """A question without the names it is about, so that what remains is its relation."""
    for name in sorted(filter(None, names), key=len, reverse=True):
        question = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", question)
    return " ".join(question.split())


def cut(text: str, words: int) -> str:
    """The first sentences of a text, as many as come nearest to so many words; at least one."""
    straight = text.translate(str.maketrans("“”‘’", "\"\"''"))  # as long as the text itself
    ends = [
        *(len(text[: found.end()].rstrip()) for found in SENTENCE.finditer(straight)),
        len(text.rstrip()),
    ]
    return text[: min(ends, key=lambda end: abs(len(text[:end].split()) - words))]
