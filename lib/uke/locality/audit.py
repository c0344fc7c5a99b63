"""Audit a locality set by facts known from elsewhere: those of the world, or that records state.

>>> frame = assess_run(Paths("quick"))
>>> leak_counts(frame)   # items, and those that share a fact with an edit
"""

import re
from collections.abc import Mapping, Sequence

import pandas as pd

from uke.data.edits import Edit, Item
from uke.data.formats import load, load_locality
from uke.files import sha256
from uke.locality import card
from uke.locality.build import Judge, Sources, text_of, unfiltered
from uke.locality.facts import LONGEST, facts, names, normal
from uke.locality.retrieval import passage
from uke.project import Paths
from uke.results.metrics import cosines, load_encoder
from uke.results.stats import Interval, interval
from uke.world import files as world_files
from uke.world import generate as world

USED, ALONE, UNFILTERED = "texts and what records state", "texts alone", "no filter"  # filters
LIKENESS = {"overlap": "share of longer words in common", "similarity": "cosine of embeddings"}
Names = Mapping[str, Sequence[str]]


def known_of_world(seed: int, split: str, sources: Sources) -> tuple[Names, Names]:
    """Look up the true subjects and objects of edits, and those of documents and triples, by id."""
    made = world.build(seed)
    pairs = zip(sources.edits, world_files.edited(made, split).values(), strict=True)
    edited = {edit.id: [new.name, *new.objects.values()] for edit, new in pairs}
    probed = {cloze.id: [cloze.subject, *cloze.answers] for cloze in sources.clozes}
    for entity in world_files.collection(made, split):
        probed[entity.name] = [entity.name, *entity.objects.values()]
    return edited, probed


def stated_names(edit: Edit) -> list[str]:
    """List the named subjects and objects of the facts that a record states.

    "He", "the series" and "many" are subjects in AKEW's triplets, but name nothing in another text:
    a name has a capital or a digit, at most LONGEST words, and a normal form.
    """
    phrases = [phrase for fact in edit.facts for phrase in (fact.subject, fact.object)]
    phrases = [re.sub(r"^(the|an|a) ", "", each.strip(" ."), flags=re.I) for each in phrases]
    short = [each for each in dict.fromkeys(phrases) if len(each.split()) <= LONGEST]
    return [each for each in short if re.search(r"[A-Z\d]", each) and normal(each)]


def names_found(edits: Sequence[Edit]) -> pd.DataFrame:
    """Look for every stated name among the names that are found in the edit's answer.

    One row per stated name: `edit`, whether it is `found`, and `half`: the records at even places
    were looked at when the extractor was written.
    """
    rows = []
    for place, edit in enumerate(edits):
        own = facts(edit.answer, names(edit.answer)).names
        for name in stated_names(edit):
            found = bool(own & facts(name, [name]).names)
            rows.append((edit.id, found, "held out" if place % 2 else "looked at"))
    return pd.DataFrame(rows, columns=["edit", "found", "half"])


def assess(
    items: Sequence[Item], sources: Sources, batch: int, known: Names, of_documents: Names
) -> pd.DataFrame:
    """Assess every item: one row each, without its text.

    An item shares a name where its text (of a document all of it) has a known subject or object of
    an edit, or the edit's text one of the document's: whole words, in any case, and not as part of
    a longer known name ("swan" in "glass swan"). Columns: edit, kind, source, own and batch (how
    many names it shares with its edit, and with all edits of the batch; missing where nothing is
    known of its edit), rank, words (of the reference), and for documents overlap (the share of the
    reference's words of four letters or more that the answer has).
    """
    edits = {edit.id: edit for edit in sources.edits}
    together = {edit.id: block for block in sources.blocks(batch) for edit in block}
    passages = {document.id: passage(document) for document in sources.documents}
    phrases = {**known, **of_documents}
    every = {*edits, *(item.source for item in items)}
    patterns = {name: _pattern(phrases.get(name, ())) for name in every}
    # Most texts lack a word of every name, which is seen sooner than that they lack the name.
    words_of = {name: [*map(_words, phrases.get(name, ()))] for name in every}
    stated = {edit.id: _words(text_of(edit)) for edit in sources.edits}
    rows = []
    for item in items:
        text, overlap = " ".join((item.question, item.reference, *item.aliases)), None
        if item.kind.endswith("doc"):
            text = passages[item.source]
            pair = (item.reference, edits[item.edit].answer)
            words, answer = (set(re.findall(r"\w{4,}", each.casefold())) for each in pair)
            overlap = len(words & answer) / max(1, len(words))
        own, found, shared = patterns[item.source], _words(text), {}
        for edit in together[item.edit]:
            its, shared[edit.id] = patterns[edit.id], set()
            if any(name <= found for name in words_of[edit.id]):
                shared[edit.id] |= _named(its, text, own)
            if any(name <= stated[edit.id] for name in words_of[item.source]):
                shared[edit.id] |= _named(own, text_of(edit), its)
        counts = (len(shared[item.edit]), len(set().union(*shared.values())))
        length = len(item.reference.split())
        rows.append((item.edit, item.kind, item.source, *counts, item.rank, length, overlap))
    columns = ["edit", "kind", "source", "own", "batch", "rank", "words", "overlap"]
    types = dict.fromkeys(("own", "batch", "rank"), "Int64") | {"overlap": float}
    frame = pd.DataFrame(rows, columns=columns).astype(types)
    frame.loc[~frame["edit"].isin(known), ["own", "batch"]] = pd.NA
    return frame


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _pattern(names: Sequence[str]) -> re.Pattern:
    """Match any of these names, longer ones first, as whole words and in any case."""
    every = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<!\w)(?:{every or '(?!)'})(?!\w)", re.I)


def _named(pattern: re.Pattern, text: str, own: re.Pattern) -> set[str]:
    """List the names of a pattern that a text has, except inside a longer name of its own."""
    return {
        name[0].casefold()
        for name in pattern.finditer(text)
        if not any(
            longer.start() <= name.start() and name.end() <= longer.end() and longer[0] != name[0]
            for longer in own.finditer(text)
        )
    }


def assess_run(
    paths: Paths,
    split: str = "test",
    world_seed: int = 1,
    data_file: str = "",
    documents: Sequence[str] = (),
    structured: Sequence[str] = (),
    judge: Judge | None = None,
    limit: int = 0,
) -> pd.DataFrame:
    """Build and assess the set of a benchmark's file, or both forms of one split of the world.

    With a `judge` the set as it is used is a model's own, of the first `limit` edits of each split;
    `asked` and `refused` are columns then. Items are assessed as they are used, filtered by texts
    alone, and unfiltered: a set as it is used knows what records state, by which leaks of a
    benchmark are counted, though only of records at odd places (see `names_found`). Columns of
    `assess`, filter and figures of the set, and, where the encoder is installed, similarity (of a
    document's reference and the edit's answer).
    """
    real = {"documents": documents, "structured": structured}
    if paths.data == "world":
        home = world_files.ensure(paths.home / "results", world_seed)
        forms = ("unkebench", "akew-counterfact")
        sets = [card.of_world(home, split, form, **(real if judge else {})) for form in forms]
        folder = card.built(paths, split).parent if judge else home / split / "locality"
    else:
        sets = [card.of_files(paths.data, data_file, **real, own=judge is not None)]
        folder = card.built(paths).parent
    settings = card.settings(paths.home, paths.data)
    blind = settings.model_copy(update={"stated": False})
    frames, pairs = [], []
    for files in sets:
        sources, path = files.sources(), card.ensure(files, settings, folder, judge, limit)
        counts = card.read_card(path.with_suffix(".md")).get("judged", {}).values()
        counts = {name: sum(one[name] for one in counts) for name in ("asked", "refused") if judge}
        answers = {edit.id: edit.answer for edit in sources.edits}
        if files.generated:
            known = known_of_world(world_seed, split, sources)
        else:
            edits = load(files.dataset, files.edit_file)[1::2]
            known = {edit.id: names for edit in edits if (names := stated_names(edit))}, {}
        covered = [e for group in sources.groups for e in group[: limit if judge else None]]
        made = {USED: load_locality(path, covered)}
        if known[0]:
            made[ALONE] = load_locality(card.ensure(files, blind, folder), sources.edits)
            made[UNFILTERED] = unfiltered(sources, blind)
        for name, items in made.items():
            documents = [item for item in items if item.kind.endswith("doc")]
            pairs += [(item.reference, answers[item.edit]) for item in documents]
            frame = assess(items, sources, settings.batch, *known).assign(
                set=card.set_name(files.dataset),
                edits=len(sources.edits),
                documents=len(sources.documents),
                triples=len(sources.clozes),
                sha256=sha256(path),
                **counts,
                filter=name,
            )
            frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    if pairs and (encoder := load_encoder()):
        similarity = cosines(*zip(*pairs, strict=True), encoder)
        frame.loc[frame["kind"].str.endswith("doc"), "similarity"] = similarity
    return frame


def shape(frame: pd.DataFrame) -> pd.DataFrame:
    """Describe the items of each set and kind: sources, words of the references, ranks."""
    columns = {
        "items": ("source", "size"),
        "sources": ("source", "nunique"),
        "words": ("words", "median"),
        "lowest rank": ("rank", "min"),
        "median rank": ("rank", "median"),
        "highest rank": ("rank", "max"),
    }
    table = frame.groupby(["set", "kind"], sort=False).agg(**columns).round()
    return table.astype({"words": "Int64", "median rank": "Int64"}).reset_index()


def describe(frame: pd.DataFrame) -> pd.DataFrame:
    """List the assessed sets with the numbers of their edits, documents, triples and items."""
    columns = ["set", "edits", "documents", "triples", "sha256"]
    table = frame.groupby(columns, sort=False).size().reset_index(name="items")
    return table.assign(sha256=table["sha256"].str[:16]).rename(columns={"sha256": "SHA-256"})


def likeness(frame: pd.DataFrame) -> pd.DataFrame:
    """List how like its edit every document is: columns of `frame`, measure and score."""
    measures = [column for column in LIKENESS if column in frame]
    kept = frame.columns.drop(measures)
    return frame.melt(kept, measures, "measure", "score").dropna(subset="score")


def mean_likeness(frame: pd.DataFrame, by: str = "edit") -> dict[tuple[str, str], Interval]:
    """Average the likeness of documents by (kind, measure); intervals are over edits or sources."""
    return {
        key: interval(part["score"].to_numpy(float), part[by].tolist())
        for key, part in likeness(frame).groupby(["kind", "measure"], sort=False)
    }


def leak_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Count the judged items that share a fact with their own edit and with any of their batch."""
    names = {"own": "share a fact with their edit", "batch": "with any edit of the batch"}
    judged = frame.dropna(subset="own")
    leaking = judged.assign(items=1, own=judged["own"] > 0, batch=judged["batch"] > 0)
    groups = leaking.groupby(["set", "filter", "kind"], sort=False)
    return groups[["items", *names]].sum().rename(columns=names).reset_index()
