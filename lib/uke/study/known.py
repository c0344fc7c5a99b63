"""Ask an unedited model what it knows: only that becomes its locality probes.

    judge = Knowledge(subject)
    path = ensure(of_files("unkebench", own=True), Settings(), folder, judge, limit=24)

A question counts if the model answers it and one rewording of it alike. The rule was written down
before any row existed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from uke.data.documents import Document
from uke.data.edits import Cloze, Probe
from uke.locality.build import question_for, tell_about
from uke.models.generate import AnswerCache, Generation, answer
from uke.project import Paths
from uke.results.metrics import score
from uke.study.study import Subject
from uke.world.files import world_of

ALIKE = 0.3  # ROUGE-L F1 of two answers about a document
TEXT_TOKENS, FACT_TOKENS = 64, 32
REPEATS, RUN = 3, 4  # an answer that says so many words in a row so often is a loop
REFUSAL = re.compile(
    r"\b(?:I'm sorry|I am sorry|I apologi[sz]e|I can(?:'t|not)|I (?:do not|don't)|I'm not|I am not|"
    r"unable to|as an AI|no information)\b",
    re.I,
)
RULE = (
    "A probe counts if the unedited model answers its question and a rewording without a refusal "
    f"or a loop ({RUN} words in a row {REPEATS} times): a document if the ROUGE-L F1 of both "
    f"answers, of {TEXT_TOKENS} tokens at most, is {ALIKE:g} or more; a triple if both, of "
    f"{FACT_TOKENS} tokens at most, mention a right answer."
)


@dataclass
class Knowledge:
    """Judge documents and triples by the answers of a model of the real world; answers are kept."""

    subject: Subject

    @cached_property
    def cache(self) -> AnswerCache:
        return AnswerCache(Paths("embedded").answers(self.subject.fingerprint()))

    @cached_property
    def about(self) -> dict[str, str]:
        name = re.split(r"[\\/]", self.subject.name.rstrip("\\/"))[-1]
        return {"model": f"{name} ({self.subject.fingerprint()})", "rule": RULE}

    def __call__(self, sources: Sequence[Document | Cloze]) -> list[bool]:
        """Tell of each document or triple whether the model knows it.

        The second question is asked where the first answer leaves that open.
        """
        asked, said = [phrasings(source) for source in sources], {}
        for turn in range(2):
            left = [
                index
                for index, source in enumerate(sources)
                if turn == 0 or admitted(source, said[index, 0], said[index, 0])
            ]
            options = vars(Generation(max_new_tokens=_tokens, cache=self.cache))
            probes = [asked[index][turn] for index in left]
            answers = answer(*self.subject.loaded, probes, **options)
            said |= {(index, turn): text for index, text in zip(left, answers, strict=True)}
        return [
            (index, 1) in said and admitted(source, said[index, 0], said[index, 1])
            for index, source in enumerate(sources)
        ]


def judge_of(model: str) -> Knowledge | None:
    """Return the judge of a model of the real world; None for one that was trained on a world."""
    return Knowledge(Subject(model)) if world_of(model) is None else None


def phrasings(source: Document | Cloze) -> tuple[Probe, Probe]:
    """Ask for a document or triple in two ways, the first as its probe does."""
    if isinstance(source, Document):
        first, second = question_for(source)[0], tell_about(source)
        if second == first:
            second = f"What do you know about{second.removeprefix('Tell me about').rstrip('.')}?"
        kind, reference = "rel_doc", source.text
    else:
        first, kind, reference = source.question or source.prompt, "near_triple", source.answers[0]
        second = f"Please tell me: {first}"
    fields = {"edit": source.id, "kind": kind, "reference": reference}
    return Probe(question=first, **fields), Probe(question=second, **fields)


def _tokens(probe: Probe) -> int:
    return TEXT_TOKENS if probe.kind == "rel_doc" else FACT_TOKENS


def admitted(source: Document | Cloze, first: str, second: str) -> bool:
    """Return whether these answers to its two phrasings make a document or triple count."""
    for answered in (first, second):
        if not answered or REFUSAL.search(answered) or loops(answered):
            return False
    if isinstance(source, Document):
        return score([second], [first])["rougel_f1"].item() >= ALIKE
    right = [source.answers[0]] * 2, [source.answers[1:]] * 2
    return bool((score([first, second], *right)["mention"] == 1).all())


def loops(text: str) -> bool:
    """Return whether a text repeats a run of words as a model does that is stuck."""
    words = re.findall(r"\w+", text.casefold())
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    return any(runs.count(run) >= REPEATS for run in set(runs))
