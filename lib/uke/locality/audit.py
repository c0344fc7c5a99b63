"""Audits a locality set by what did not build it: known facts, stated triplets, a reader; similarity, ranks, twins, lengths."""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from uke.data.edits import Edit, Item
from uke.errors import InputError
from uke.files import read_yaml
from uke.locality.build import KINDS, Sources, text_of
from uke.locality.facts import normal
from uke.locality.retrieval import passage
from uke.results.similarity import Encoder, cosines
from uke.world import files as world_files
from uke.world import generate as world

SHORT = 5  # words: a longer object is a clause, which no other text repeats word for word
VERDICT = {"set": str, "edit": str, "source": str, "texts": str, "shares": bool, "why": str}


def known_of_world(
    seed: int, split: str, sources: Sources
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The true subjects and objects of every edit and of every document and triple, by id, as the world itself has them.

    `sources` are those of a file of this split, whose edits stand in the world's order whatever their ids are.
    """
    made = world.build(seed)
    edited = {
        edit.id: [new.name, *new.objects.values()]
        for edit, (_, _, new) in zip(sources.edits, world_files.shuffled(made, split), strict=True)
    }
    probed = {
        entity.name: [entity.name, *entity.objects.values()]
        for entity in world_files.collection(made, split)
    }
    return edited, probed | {cloze.id: [cloze.subject, *cloze.answers] for cloze in sources.clozes}


def stated_names(edits: Iterable[Edit]) -> dict[str, list[str]]:
    """Subjects and objects of the facts that each record states, by id: those that name something, in at most SHORT words.

    "He", "the series" and "many" are subjects in AKEW's triplets, but another text that has these words names nothing by
    them: a capital or a digit is asked for, and a word that is neither pronoun nor generic (by the extractor's word classes).
    """
    found = {}
    for edit in edits:
        names = [
            re.sub(r"^(the|an|a) ", "", name.strip(" ."), flags=re.I)
            for fact in edit.facts
            for name in (fact.subject, fact.object)
        ]
        kept = [
            name
            for name in names
            if len(name.split()) <= SHORT and re.search(r"[A-Z\d]", name) and normal(name)
        ]
        if kept:
            found[edit.id] = list(dict.fromkeys(kept))
    return found


def leaks(
    items: Sequence[Item],
    sources: Sources,
    batch: int,
    known: Mapping[str, Sequence[str]],
    known_documents: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """One row per item: `own`, the names it shares with its own edit, and `batch`, with any edit it may be written with.

    A name is shared where the item's text (of a document the whole of it) has a known subject or object of the edit, or the edit's text one of
    the document's: whole words, whatever the case, and not as part of a longer name that is known ("swan" in "glass swan").
    Columns: edit, kind, source, own, batch (each a list of names). Where the documents' facts are known, those of every edit must be:
    InputError otherwise, since what is not looked for is not found.
    """
    whole = {document.id: passage(document) for document in sources.documents}
    patterns = {
        name: _pattern(names) for name, names in (*known.items(), *(known_documents or {}).items())
    }
    block = {edit.id: edits for edits in sources.blocks(batch) for edit in edits}
    if (
        without := sorted({edit.id for edit in sources.edits} - set(known))
        if known_documents
        else []
    ):
        raise InputError(
            f"audit: nothing is known of {len(without)} edits ({', '.join(map(repr, without[:3]))}); expected the facts of every edit"
        )
    spoken = {
        edit.id: (text_of(edit), _spans(patterns.get(edit.id), text_of(edit)))
        for edit in sources.edits
    }
    rows = []
    for item in items:
        text = (
            whole[item.source]
            if item.kind.endswith("doc")
            else " ".join((item.question, item.reference, *item.aliases))
        )
        own, spans = patterns.get(item.source), _spans(patterns.get(item.source), text)
        shared = {
            edit.id: {*_named(patterns.get(edit.id), text, spans), *_named(own, *spoken[edit.id])}
            for edit in block[item.edit]
        }
        rows.append(
            (
                item.edit,
                item.kind,
                item.source,
                sorted(shared[item.edit]),
                sorted(set().union(*shared.values())),
            )
        )
    return pd.DataFrame(rows, columns=["edit", "kind", "source", "own", "batch"])


def _spans(pattern: re.Pattern | None, text: str) -> list[tuple[int, int]]:
    """Where a text has its own known names."""
    return [found.span() for found in pattern.finditer(text)] if pattern else []


def _named(pattern: re.Pattern | None, text: str, own: Sequence[tuple[int, int]]) -> set[str]:
    """The names of a pattern that a text has, but for those inside a longer name of its own."""
    found = pattern.finditer(text) if pattern else ()
    return {
        each[0].casefold()
        for each in found
        if not any(
            start <= each.start() and each.end() <= end and end - start > len(each[0])
            for start, end in own
        )
    }


def _pattern(names: Iterable[str]) -> re.Pattern:
    """Any of these names as whole words; nothing where there is none."""
    return (
        re.compile(
            r"(?<!\w)(?:"
            + "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            + r")(?!\w)",
            re.I,
        )
        if names
        else re.compile(r"(?!)")
    )


def likeness(items: Sequence[Item], sources: Sources, encoder: Encoder | None) -> pd.DataFrame:
    """How like its edit every document item is: `overlap`, the share of its longer words that the edit's text has too, and `similarity`.

    Similarity is the cosine of MiniLM embeddings of answer and reference (none without an encoder). Columns: edit, kind, measure, score.
    """
    answers = {edit.id: edit.answer for edit in sources.edits}
    texts = [item for item in items if item.kind.endswith("doc")]
    frame = pd.DataFrame(
        {"edit": [item.edit for item in texts], "kind": [item.kind for item in texts]}
    )
    pairs = [(item.reference, answers[item.edit]) for item in texts]
    measures = {"overlap": [_overlap(*pair) for pair in pairs]}
    if encoder:
        measures["similarity"] = cosines(
            [first for first, _ in pairs], [second for _, second in pairs], encoder
        ).tolist()
    return pd.concat(
        [frame.assign(measure=name, score=scores) for name, scores in measures.items()],
        ignore_index=True,
    )


def _overlap(text: str, other: str) -> float:
    """Share of the words of `text` with four letters or more that `other` has."""
    words, known = (set(re.findall(r"\w{4,}", each.casefold())) for each in (text, other))
    return len(words & known) / len(words) if words else 0.0


def shape(items: Sequence[Item]) -> pd.DataFrame:
    """One row per kind: items, different sources, edits that share the most used one, words of a reference (median, range), ranks."""
    rows = []
    for kind in KINDS:
        found = [item for item in items if item.kind == kind]
        uses = pd.Series([item.source for item in found]).value_counts()
        words = pd.Series([len(item.reference.split()) for item in found])
        ranks = pd.Series([item.rank for item in found], dtype="Int64").dropna()
        row = {
            "kind": kind,
            "items": len(found),
            "sources": len(uses),
            "edits of the most used": int(uses.max()),
            "words": int(words.median()),
        }
        row |= {"fewest words": int(words.min()), "most words": int(words.max())}
        rows.append(
            row
            | {f"{name} rank": int(value) if len(ranks) else None for name, value in _ranks(ranks)}
        )
    return pd.DataFrame(rows).astype(
        {f"{name} rank": "Int64" for name in ("lowest", "median", "highest")}
    )


def _ranks(ranks: pd.Series) -> list[tuple[str, float]]:
    return [
        ("lowest", ranks.min()),
        ("median", ranks.median() if len(ranks) else 0),
        ("highest", ranks.max()),
    ]


def sample(items: Sequence[Item], count: int, seed: int = 1) -> list[Item]:
    """RelDocs to be read, drawn without looking at them; in the order of the file."""
    related = [item for item in items if item.kind == "rel_doc"]
    drawn = set(
        random.Random(f"reading-{seed}").sample(range(len(related)), min(count, len(related)))
    )
    return [item for place, item in enumerate(related) if place in drawn]


def mark(item: Item, sources: Sources) -> str:
    """8 hex digits of both texts of a RelDoc: a verdict holds for these texts and no others."""
    edit = next(edit for edit in sources.edits if edit.id == item.edit)
    document = next(document for document in sources.documents if document.id == item.source)
    return hashlib.sha256(
        f"{text_of(edit)}\n{document.heading}\n{document.text}".encode()
    ).hexdigest()[:8]


def sheet(chosen: Sequence[Item], sources: Sources, name: str) -> str:
    """What a reader is given: both texts of every chosen RelDoc, and the lines of a verdict to fill in."""
    edits, documents = (
        {edit.id: edit for edit in sources.edits},
        {document.id: document for document in sources.documents},
    )
    parts = [
        f"## {place}. edit {item.edit}, document {item.source}\n\n{text_of(edits[item.edit])}\n\n"
        f"### {documents[item.source].heading}\n\n{documents[item.source].text}\n\n"
        f"- {{set: {name}, edit: '{item.edit}', source: '{item.source}', texts: '{mark(item, sources)}', shares: , why: ''}}\n"
        for place, item in enumerate(chosen, start=1)
    ]
    return f"# Do edit and document share a fact? ({name})\n\n" + "\n".join(parts)


def verdicts(path: Path, name: str, chosen: Sequence[Item], sources: Sources) -> pd.DataFrame:
    """The written verdicts on the chosen RelDocs of a set: columns edit, source, shares, why.

    The file holds `verdicts`, a list with the fields of a line of the sheet. Raises InputError for a field that is wrong; a RelDoc without
    a verdict on just these texts has none in the table, so the caller can count.
    """
    found = read_yaml(path).get("verdicts")
    if not isinstance(found, list):
        raise InputError(f"{path}: verdicts: expected a list")
    for place, verdict in enumerate(found):
        wrong = [
            key
            for key, kind in VERDICT.items()
            if not isinstance(verdict, dict) or not isinstance(verdict.get(key), kind)
        ]
        if wrong or set(verdict) != set(VERDICT):
            raise InputError(
                f"{path}: verdict {place}: expected {', '.join(f'{key} ({kind.__name__})' for key, kind in VERDICT.items())}"
            )
    wanted = {(name, item.edit, item.source, mark(item, sources)) for item in chosen}
    kept = [
        verdict
        for verdict in found
        if tuple(verdict[key] for key in ("set", "edit", "source", "texts")) in wanted
    ]
    return pd.DataFrame(kept, columns=list(VERDICT))[["edit", "source", "shares", "why"]]
