"""Choose what must not change: for every edit two documents and two triples.

Source of the kinds: arXiv 2506.09672 (UnKEBench-Loc, AKEW-Loc); the near triple is ours. RelDoc is
the best-ranked document that shares no fact with any edit written in one batch with its own;
RandDoc is drawn from those ranked below a floor. A `Judge` refuses what a model cannot answer; the
next in the same order is then taken. With one, every edit has three neutral texts as well, which no
edit of its split shares a fact with, and which are in no other pool.
"""

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import median
from typing import Protocol

import numpy as np
from pydantic import Field, StrictBool, StrictInt
from tqdm import tqdm

from uke.data.documents import Document, reserved
from uke.data.edits import Cloze, Edit, Frozen, Item, in_group
from uke.data.formats import is_question
from uke.errors import InputError
from uke.locality import retrieval
from uke.locality.facts import SENTENCE, Facts, edit_facts, facts, names, shared, union

PROBE_KINDS = in_group("locality", "nearby")
AT_ONCE = 32  # sources that a judge is asked about at once, or more
NEUTRAL, OPENING = 3, 8  # neutral texts of an edit, and the words of each that are given
SCORED = 1024  # edits that every document is scored for at once: memory is that of so many
PATIENCE = 50  # sources that a judge is asked about, for each item of a set, before it is given up


class Settings(Frozen):
    """Every choice of a locality set; of these the paper states a trained retriever and the floor.

    - `retriever`: ranks documents by the edit's question: "bm25", "dense" (MiniLM as it comes) or
      the directory of a sentence encoder, as tools/train_retriever.py makes one.
    - `stated`: whether what a record states beside its text (subject, triples, short answers)
      counts as its facts, which is surer than what is found in the text.
    - `batch`: consecutive edits of a split that may be written together; no document shares a fact
      with any of them. 0 is all of a split, so that a set serves every batch size.
    - `floor`: RandDoc stands below this rank.
    - `seed`: of every draw.
    """

    retriever: str = "dense"
    stated: StrictBool = True
    batch: StrictInt = Field(default=0, ge=0)
    floor: StrictInt = Field(default=100, ge=1)
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


class Judge(Protocol):
    """Tells which questions an unedited model answers; `about` says which model, and by what rule.

    It may see a document or triple once, whatever edit it is for.
    """

    about: dict[str, str]

    def __call__(self, sources: Sequence[Document | Cloze]) -> Sequence[bool]: ...


@dataclass
class Builder:
    """Sources with what is computed once: facts, scores, lengths.

    `verdicts`: by id, whether a document or triple counts; those not listed do. `asked`: every
    triple is a question, as for a model that talks; StructTrip is a cloze otherwise.
    """

    sources: Sources
    settings: Settings
    asked: bool = False
    verdicts: dict[str, bool] = field(default_factory=dict)
    _free: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def document_facts(self) -> list[Facts]:
        texts = [(retrieval.passage(each), each.title) for each in self.sources.documents]
        return [facts(text, names(text), [title]) for text, title in texts]

    @cached_property
    def cloze_facts(self) -> list[Facts]:
        return [
            facts(" ".join((cloze.prompt, *cloze.answers)), (), (cloze.subject, *cloze.answers))
            for cloze in self.sources.clozes
        ]

    @cached_property
    def words(self) -> int:
        """Length of a reference: the median of the answers, so that both cost a model as much."""
        return round(median(len(edit.answer.split()) for edit in self.sources.edits))

    @cached_property
    def relevance(self) -> Callable[[str], np.ndarray]:
        """Score every document for an edit, by its id: (N,)."""
        passages = list(map(retrieval.passage, self.sources.documents))
        questions = [edit.question for edit in self.sources.edits]
        return self.scores(self.settings.retriever, passages, questions)

    @cached_property
    def nearness(self) -> Callable[[str], np.ndarray]:
        """Score for an edit, by its id, how like its relation that of every triple is: (M,)."""
        relations = [without(c.question or c.prompt, c.subject) for c in self.sources.clozes]
        retriever = "bm25" if self.settings.retriever == "bm25" else "dense"
        return self.scores(retriever, relations, list(map(self.relation, self.sources.edits)))

    def scores(self, retriever: str, texts: list[str], queries: list[str]) -> Callable:
        """Score texts by the query of an edit, those of its part of the edits at once."""
        score = retrieval.build(retriever, texts)
        place = {edit.id: number for number, edit in enumerate(self.sources.edits)}

        @lru_cache(maxsize=2)
        def of_part(start: int) -> np.ndarray:
            return score(queries[start : start + SCORED])

        return lambda edit: of_part(place[edit] // SCORED * SCORED)[place[edit] % SCORED]

    def relation(self, edit: Edit) -> str:
        """Find a relation that the edit states, without its subject."""
        if edit.facts:
            return edit.facts[0].relation.replace("{}", "")
        questions = [detail.question for detail in edit.details] or [edit.question]
        question = self.rng("relation", edit).choice(questions)
        return without(question, edit.subject, *names(text_of(edit)))

    def rng(self, use: str, edit: Edit) -> random.Random:
        """Make a generator for one draw of one edit: what is drawn for others does not matter."""
        return random.Random(f"{use}-{self.settings.seed}-{edit.id}")

    def block(self, edits: Sequence[Edit], wanted: Sequence[Edit] | None = None) -> Iterator[Item]:
        """Make the items of edits that may be written together, or of those wanted among them."""
        if edits[0].id not in self._free:
            self._free[edits[0].id] = self.free_of(edits)
        free, apart = self._free[edits[0].id]
        for edit in edits if wanted is None else wanted:
            yield from self.documents_of(edit, free)
            yield from self.triples_of(edit, apart)

    def free_of(self, edits: Sequence[Edit]) -> tuple[np.ndarray, np.ndarray]:
        """Mark the documents (N,) and triples (M,) that share no fact with any of these edits."""
        together = union(edit_facts(edit, self.settings.stated) for edit in edits)
        spelled_out = " ".join(("", *map(spelled, map(text_of, edits)), ""))
        free = np.array([not shared(together, each) for each in self.document_facts])
        apart = np.array([not shared(together, each) for each in self.cloze_facts])
        for number, cloze in enumerate(self.sources.clozes):
            phrases = map(spelled, (cloze.subject, *cloze.answers))
            apart[number] &= not any(f" {phrase} " in spelled_out for phrase in phrases)
        return free, apart

    def documents_of(self, edit: Edit, free: np.ndarray) -> Iterator[Item]:
        """Choose RelDoc and RandDoc of an edit from the documents marked `free` (N,)."""
        ranked = retrieval.ranking(self.relevance(edit.id))
        left = self.counting(self.sources.documents)
        related = next((index for index in ranked if free[index] and left[index]), None)
        if related is None:
            return
        below = free.copy()
        below[ranked[: self.settings.floor]] = False
        below[related] = False
        drawn = self.draw("rand_doc", edit, below, left)
        for kind, index in ({"rel_doc": related} | drawn).items():
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
        counting = self.counting(self.sources.clozes)
        drawn = self.draw("struct_trip", edit, apart, counting)
        if not drawn:
            return
        apart, scores = apart.copy(), self.nearness(edit.id)
        apart[drawn["struct_trip"]] = False
        # Triples of one relation differ in the subject, which was taken out: equally near.
        nearest = apart & (scores == scores[apart & counting].max(initial=-np.inf))
        drawn |= self.draw("near_triple", edit, nearest, counting)
        for kind, index in drawn.items():
            cloze = self.sources.clozes[index]
            as_question = self.asked or kind == "near_triple"
            yield Item(
                edit=edit.id,
                kind=kind,
                number=sum(probe.kind == kind for probe in edit.extra),
                question=cloze.question or cloze.prompt if as_question else cloze.prompt,
                chat=as_question or is_question(cloze.prompt),
                reference=cloze.answers[0],
                aliases=cloze.answers[1:],
                source=cloze.id,
            )

    def neutral(
        self, edits: Sequence[Edit], wanted: Sequence[Edit], used: Collection[str | None]
    ) -> Iterator[Item]:
        """Draw texts, of no source that is used, whose likelihood an edit should leave as it is."""
        free = self._free[edits[0].id][0]
        left = [
            index
            for index, one in enumerate(self.sources.documents)
            if free[index] and one.id not in used and len(one.text.split()) > OPENING
        ]
        for edit in wanted if len(left) >= NEUTRAL * len(wanted) else ():
            for number, at in enumerate(self.rng("neutral", edit).sample(left, NEUTRAL)):
                left.remove(at)
                document = self.sources.documents[at]
                words = document.text.split()[: max(self.words, OPENING + 1)]
                yield Item(
                    edit=edit.id,
                    kind="neutral",
                    number=number,
                    question=" ".join(words[:OPENING]),
                    reference=" ".join(words[OPENING:]),
                    chat=False,
                    source=document.id,
                )

    def counting(self, sources: Sequence[Document | Cloze]) -> np.ndarray:
        """Mark the documents or triples (N,) that no verdict is against."""
        return np.array([self.verdicts.get(source.id, True) for source in sources], dtype=bool)

    def draw(
        self, kind: str, edit: Edit, marked: np.ndarray, counting: np.ndarray
    ) -> dict[str, int]:
        """Draw the first of the marked indices that counts for an edit, by kind, if there is any.

        The order is that of the draw, so that a verdict passes one over and changes nothing else.
        """
        rng, left = self.rng(kind, edit), np.flatnonzero(marked).tolist()
        while left and counting[left].any():
            if counting[index := rng.choice(left)]:
                return {kind: index}
            left.remove(index)
        return {}


def question_for(document: Document) -> tuple[str, tuple[str, ...]]:
    """Find the question that a document brings, with its short answer if any, or ask by title.

    Where its topic is known, a person is asked for by "Who was X?", and another thing by "What is
    an X?" if its text opens with "An X is".
    """
    if document.questions:
        question, answer = document.questions[0]
        return question, (answer,) if answer else ()
    person = document.topic == "People"
    if person and (verb := re.search(r"\b(?:is|was|are|were)\b", document.text)):
        return f"Who {verb[0]} {document.title}?", ()
    name, verb = opening(document)
    return (f"What {verb} {name}?" if verb else tell_about(document)), ()


def tell_about(document: Document) -> str:
    """Ask for a document by its title, in a form that needs no grammar."""
    section = f", in particular: {document.section}" if document.section else ""
    return f"Tell me about {opening(document)[0]}{section}."


def opening(document: Document) -> tuple[str, str]:
    """Find name and verb in a text that opens with "An X is", else the title and "".

    Only where the topic is known and rules out a person; X is the title or its plural.
    """
    title, text = document.title, document.text
    found = document.topic not in ("", "People", "Uncategorized") and re.match(
        rf"(?:In [\w ]+, )?(an? |the )?({re.escape(title)}(?:e?s)?),? (?:\([^()]*\),? )?"
        r"(is|was|are|were)\b",
        text,
        re.I,
    )
    if not found:
        return title, ""
    article, name, verb = found.groups(default="")
    # The capital of a first word says nothing, unless the word has it elsewhere too.
    lower = title[0].lower() + title[1:]
    if not found.start(2) and re.search(rf"\b{re.escape(lower)}", text[1:]):
        name = name[0].lower() + name[1:]
    return article.lower() + name, verb


def build(sources: Sources, settings: Settings) -> tuple[Item, ...]:
    """Build four items for every edit, in their order; InputError, with counts, where one lacks."""
    return build_judged(sources, settings)[0]


def build_judged(
    sources: Sources, settings: Settings, judge: Judge | None = None, limit: int | None = None
) -> tuple[tuple[Item, ...], dict[str, bool]]:
    """Build four items for the first `limit` edits (None: all) of every split, in their order.

    With a `judge` only what it admits counts, and no document reserved for a corpus; its verdicts
    by id are the second value. InputError, with counts, where an edit lacks an item.
    """
    if len({cloze.id for cloze in sources.clozes}) < len(sources.clozes):
        raise InputError("locality: triples share ids; expected structured files of unlike names")
    builder = Builder(sources, settings, asked=judge is not None)
    wanted = {edit.id: edit for group in sources.groups for edit in group[:limit]}
    blocks = [
        (block, chosen)
        for block in sources.blocks(settings.batch)
        if (chosen := [edit for edit in block if edit.id in wanted])
    ]
    known = {source.id: source for source in (*sources.documents, *sources.clozes)}
    kept = [one.id for one in sources.documents if reserved(one)] if judge else ()
    builder.verdicts |= dict.fromkeys(kept, False)
    with tqdm(desc="locality", unit=" judged", disable=judge is None, mininterval=5) as bar:
        while True:
            judged, new, more = builder.verdicts, [], True
            # Where few are left, what would come next is asked for at once: it decides nothing.
            while more and len(new) < (AT_ONCE if judge else 1):
                builder.verdicts = judged | dict.fromkeys(new, False)
                items = [item for pair in blocks for item in builder.block(*pair)]
                found = dict.fromkeys(item.source for item in items)
                more = [source for source in found if source not in builder.verdicts]
                new += more
            builder.verdicts = judged
            if judge is None or not new:
                break
            builder.verdicts |= zip(new, judge([known[id] for id in new]), strict=True)
            bar.update(len(new))
            if bar.n > PATIENCE * len(items) + 100:
                admitted = [*builder.verdicts.values()].count(True)
                raise InputError(
                    f"locality: of {bar.n} documents and triples {admitted} count by the "
                    "answers of this model; expected one that knows something of the real world"
                )
    if judge:
        used = builder.verdicts.keys() | {item.source for item in items}
        items += [item for pair in blocks for item in builder.neutral(*pair, used)]
    for kind in PROBE_KINDS:
        served = {item.edit for item in items if item.kind == kind}
        if lacking := [edit for edit in wanted if edit not in served]:
            refused = [*builder.verdicts.values()].count(False) - len(kept)
            raise InputError(
                f"{kind}: nothing is left for {len(lacking)} of {len(wanted)} edits, first "
                f"{lacking[0]!r}, among {len(sources.documents)} documents and "
                f"{len(sources.clozes)} triples: each shares a fact with an edit of its batch or "
                f"is ranked out{f', or was refused ({refused})' if refused else ''}; "
                f"add more, or lower batch ({settings.batch or 'all'}) or floor ({settings.floor})"
            )
    return tuple(items), {id: builder.verdicts[id] for id in builder.verdicts.keys() - kept}


def unfiltered(sources: Sources, settings: Settings) -> tuple[Item, ...]:
    """Choose RelDocs as if a shared fact did not matter: the control of an audit."""
    builder = Builder(sources, settings)
    every = np.ones(len(sources.documents), dtype=bool)
    items = (item for edit in sources.edits for item in builder.documents_of(edit, every))
    return tuple(item for item in items if item.kind == "rel_doc")


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
