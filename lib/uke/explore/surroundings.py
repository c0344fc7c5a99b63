"""The edits a person can choose from, and the questions asked about any edit, of their own too: what must change, what must not."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uke.data import edits as edit_files
from uke.data import formats
from uke.data.edits import Detail, Edit, Probe
from uke.data.formats import find_data
from uke.errors import InputError, nearest
from uke.explore.choices import Refused
from uke.locality import card
from uke.locality.build import Builder, Settings, Sources
from uke.project import Paths
from uke.world import files as world_files

OWN_ID = "mine"
AROUND = ("rel_doc", "rand_doc", "struct_trip", "near_triple")
SETTINGS = Settings(
    retriever="bm25", words=60
)  # documents as long as the world's texts, however short what is written


class Library:
    """The edits of a split of the world, or of a benchmark's file, and what is asked around each of them.

    An edit that brings no locality probes gets some of the world's, chosen for it alone: a related and a random document,
    an unrelated triple and a near one, none of which shares a fact with it (`locality`, by BM25 so that nothing is built first);
    one of a person's own also some exercises of a general skill.
    InputError for an unknown split or dataset, or a file with bad records.
    """

    def __init__(
        self, paths: Paths, split: str = "test", data_file: str = "", world_seed: int = 1
    ) -> None:
        if split not in edit_files.SPLITS:
            raise InputError(f"split: unknown split '{split}'{nearest(split, edit_files.SPLITS)}")
        self.paths, self.split, self.data_file, self.world_seed = (
            paths,
            split,
            data_file,
            world_seed,
        )
        self.order = card.of_world(world_files.ensure(paths.home / "results", world_seed), split)
        self.built: dict[str, list[Probe]] = {}
        if paths.data == "world":
            self.edits = formats.load(self.order.dataset, self.order.edit_file)
            exercises = self._exercises
        else:
            file = find_data(paths.data, data_file)
            self.edits = tuple(
                edit
                for edit in formats.load(paths.data, file)
                if edit_files.in_split(edit.id, split)
            )
            exercises = ()
            if (built := card.built(paths)).is_file():
                card.check_made_for(built, Path(file))
                exercises = formats.load_locality(built, self.edits)
        for probe in exercises:
            self.built.setdefault(probe.edit, []).append(probe)
        self.around = lru_cache(maxsize=256)(self._around)

    def find(self, name: str) -> Edit:
        """The edit of this id; InputError naming the nearest one."""
        for edit in self.edits:
            if edit.id == name:
                return edit
        raise InputError(
            f"edit: unknown edit '{name}'{nearest(name, [edit.id for edit in self.edits])}"
        )

    def search(self, words: str) -> list[Edit]:
        """The edits whose id, question or answer holds every one of these words, in their order."""
        wanted = words.casefold().split()
        return [
            edit
            for edit in self.edits
            if all(word in f"{edit.id} {edit.question} {edit.answer}".casefold() for word in wanted)
        ]

    def probes(self, edit: Edit, paraphrases: Sequence[str] = ()) -> tuple[Probe, ...]:
        """Every question about an edit; further paraphrases are asked like the first."""
        first = 1 if edit.paraphrase else 0
        more = [
            Probe(
                edit=edit.id,
                kind="paraphrase",
                number=first + number,
                question=text,
                reference=edit.answer,
            )
            for number, text in enumerate(paraphrases)
        ]
        every = [*edit.probes, *more, *self.built.get(edit.id, ())]
        return (
            *every,
            *(() if any(probe.kind in AROUND for probe in every) else self.around(edit)),
        )

    @cached_property
    def _exercises(self) -> tuple[Probe, ...]:
        """The general skill that the world has to lose, by the ids of its edits."""
        return formats.load_locality(
            self.order.edit_file.parent / world_files.GENERAL,
            formats.load(self.order.dataset, self.order.edit_file),
        )

    @cached_property
    def _sources(self) -> Sources:
        return self.order.sources()

    @cached_property
    def _facts(self) -> Builder:
        """Facts of the documents and triples, which are the same whatever is written."""
        return Builder(self._sources, SETTINGS, self.order.edit_file.parent)

    def _around(self, edit: Edit) -> tuple[Probe, ...]:
        known = self._facts
        alone = Sources(((edit,),), self._sources.documents, self._sources.clozes)
        builder = Builder(alone, known.settings, known.folder)
        builder.document_facts, builder.cloze_facts = known.document_facts, known.cloze_facts
        borrowed = (
            ()
            if edit in self.edits
            else [probe for probe in self._exercises if probe.edit == self._exercises[0].edit]
        )
        return (
            *builder.block((edit,)),
            *(probe.model_copy(update={"edit": edit.id}) for probe in borrowed),
        )


def own_edit(
    question: str, answer: str, paraphrase: str = "", details: Sequence[Mapping[str, str]] = ()
) -> Edit:
    """An edit of a person's own; Refused, naming the field, where question or answer is empty."""
    for field, text, what in (
        ("question", question, "a question to ask"),
        ("answer", answer, "the text to write"),
    ):
        if not isinstance(text, str) or not text.strip():
            raise Refused(field, f"The {field} is empty; expected {what}.")
    try:
        return Edit(
            id=OWN_ID,
            question=question.strip(),
            answer=answer.strip(),
            paraphrase=paraphrase.strip() or None,
            details=tuple(Detail(**one) for one in details),
        )
    except (ValidationError, TypeError):
        raise Refused("details", "Each detail needs a question and an answer.") from None


def detail_lines(text: str) -> list[dict[str, Any]]:
    """Details written one on a line as `question | answer`; Refused for a line that is not."""
    found = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        question, bar, answer = (part.strip() for part in line.partition("|"))
        if not (bar and question and answer):
            raise Refused(
                "details",
                f"Details, line {number}: expected a question, a bar and its answer, as in: When was he born? | 1802",
            )
        found.append({"question": question, "answer": answer})
    return found
