"""Audit a locality set by facts known from elsewhere: those of the world, or that records state.

    >>> frame = assess_run(Paths("quick"))
    >>> leak_counts(frame)   # items, and those that share a fact with an edit

Tables and figures are made from the rows of `assess`, which hold none of the texts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from uke.data.edits import Edit, Item
from uke.data.formats import load, load_locality
from uke.files import sha256
from uke.locality.build import Sources, text_of, unfiltered
from uke.locality.card import built, ensure, of_files, of_world
from uke.locality.card import settings as read_settings
from uke.locality.facts import facts, names, normal
from uke.locality.retrieval import passage
from uke.project import Paths
from uke.results.metrics import Encoder, cosines, load_encoder
from uke.results.stats import Interval, interval
from uke.world import files as world_files
from uke.world import generate as world

SHORT = 5  # words: a longer object is a clause, which no other text repeats word for word
USED, ALONE, UNFILTERED = "texts and what records state", "texts alone", "no filter"  # filters
LIKENESS = {"overlap": "share of longer words in common", "similarity": "cosine of embeddings"}
Names = Mapping[str, Sequence[str]]


def known_of_world(seed: int, split: str, sources: Sources) -> tuple[Names, Names]:
    """Look up the true subjects and objects of every edit, and of every document and triple, by id.

    `sources`: those of a file of this split, whose edits stand in the world's order.
    """
    made = world.build(seed)
    pairs = zip(sources.edits, world_files.shuffled(made, split), strict=True)
    edited = {edit.id: [new.name, *new.objects.values()] for edit, (_, _, new) in pairs}
    entities = world_files.collection(made, split)
    probed = {each.name: [each.name, *each.objects.values()] for each in entities}
    return edited, probed | {cloze.id: [cloze.subject, *cloze.answers] for cloze in sources.clozes}


def stated_names(edits: Iterable[Edit]) -> Names:
    """Look up the named subjects and objects of the facts that each record states, by id.

    "He", "the series" and "many" are subjects in AKEW's triplets, but name nothing in another text:
    a name has a capital or a digit, at most SHORT words, and a normal form.
    """
    found = {}
    for edit in edits:
        phrases = [phrase for fact in edit.facts for phrase in (fact.subject, fact.object)]
        phrases = [re.sub(r"^(the|an|a) ", "", each.strip(" ."), flags=re.I) for each in phrases]
        named = [each for each in phrases if re.search(r"[A-Z\d]", each) and normal(each)]
        short = [each for each in named if len(each.split()) <= SHORT]
        if short:
            found[edit.id] = list(dict.fromkeys(short))
    return found


def names_found(edits: Sequence[Edit]) -> pd.DataFrame:
    """Look for every stated name among the names that are found in the edit's answer.

    One row per stated name: `edit`, whether it is `found`, and `half`: the records at even places
    were looked at when the extractor was written.
    """
    rows = []
    for place, edit in enumerate(edits):
        own = facts(edit.answer, names(edit.answer)).names
        half = "held out" if place % 2 else "looked at"
        for name in stated_names([edit]).get(edit.id, ()):
            rows.append((edit.id, bool(own & facts(name, [name]).names), half))
    return pd.DataFrame(rows, columns=["edit", "found", "half"])


def leaks(
    items: Sequence[Item], sources: Sources, batch: int, known: Names, of_documents: Names
) -> pd.DataFrame:
    """List for every item the names it shares with its `own` edit and with any edit of its `batch`.

    A name is shared where the item's text (of a document all of it) has a known subject or object
    of the edit, or the edit's text one of the document's: whole words, in any case, and not as part
    of a longer known name ("swan" in "glass swan"). Columns: edit, kind, source, own, batch.
    """
    patterns = {}
    for name, phrases in (*known.items(), *of_documents.items()):
        longest_first = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
        patterns[name] = re.compile(rf"(?<!\w)(?:{longest_first or '(?!)'})(?!\w)", re.I)
    block = {edit.id: edits for edits in sources.blocks(batch) for edit in edits}
    whole = {document.id: passage(document) for document in sources.documents}
    texts = {edit.id: text_of(edit) for edit in sources.edits}
    spans = {name: _spans(patterns.get(name), text) for name, text in texts.items()}
    rows = []
    for item in items:
        short = " ".join((item.question, item.reference, *item.aliases))
        text = whole[item.source] if item.kind.endswith("doc") else short
        own = patterns.get(item.source)
        covered = _spans(own, text)
        shared = {
            edit.id: _named(patterns.get(edit.id), text, covered)
            | _named(own, texts[edit.id], spans[edit.id])
            for edit in block[item.edit]
        }
        every = sorted(set().union(*shared.values()))
        rows.append((item.edit, item.kind, item.source, sorted(shared[item.edit]), every))
    return pd.DataFrame(rows, columns=["edit", "kind", "source", "own", "batch"])


def _spans(pattern: re.Pattern | None, text: str) -> list[tuple[int, int]]:
    return [found.span() for found in pattern.finditer(text)] if pattern else []


def _named(pattern: re.Pattern | None, text: str, own: Sequence[tuple[int, int]]) -> set[str]:
    """List the names of a pattern that a text has, except inside a longer name of its own."""
    return {
        text[start:end].casefold()
        for start, end in _spans(pattern, text)
        if not any(a <= start and end <= b and b - a > end - start for a, b in own)
    }


def assess(
    items: Sequence[Item],
    sources: Sources,
    batch: int,
    known: Names,
    of_documents: Names,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Assess every item: one row each, without its text.

    Columns: edit, kind, source, rank, words (of the reference), own and batch (numbers of names as
    in `leaks`, missing where nothing is known of the edit), and for documents overlap (the share of
    the reference's words of four letters or more that the answer has) and, with an encoder,
    similarity (the cosine of their embeddings).
    """
    answers = {edit.id: edit.answer for edit in sources.edits}
    frame = leaks(items, sources, batch, known, of_documents)
    judged = frame["edit"].isin(known)
    for column in ("own", "batch"):
        frame[column] = frame[column].str.len().astype("Int64").where(judged)
    frame["rank"] = pd.Series([item.rank for item in items], dtype="Int64")
    frame["words"] = [len(item.reference.split()) for item in items]
    documents = frame["kind"].str.endswith("doc")
    pairs = [(item.reference, answers[item.edit]) for item in items if item.kind.endswith("doc")]
    long = [[set(re.findall(r"\w{4,}", text.casefold())) for text in pair] for pair in pairs]
    frame.loc[documents, "overlap"] = [
        len(words & answer) / max(1, len(words)) for words, answer in long
    ]
    if encoder and pairs:
        frame.loc[documents, "similarity"] = cosines(*zip(*pairs, strict=True), encoder)
    return frame


def assess_run(
    paths: Paths,
    split: str = "test",
    world_seed: int = 1,
    data_file: str = "",
    documents: Sequence[str] = (),
    structured: Sequence[str] = (),
) -> pd.DataFrame:
    """Build and assess the set of a benchmark's file, or both forms of one split of the world.

    Items are assessed as they are used, by texts alone, and without any filter: a set as it is used
    is filtered by what records state, which is what leaks of a benchmark are counted by. There,
    records at odd places count: the others were looked at when names were first found. Columns of
    `assess`, and set, filter, and of the set edits, documents, triples and sha256.
    """
    if paths.data == "world":
        home = world_files.ensure(paths.home / "results", world_seed)
        sets = [of_world(home, split, form) for form in ("unkebench", "akew-counterfact")]
        folder = home / split / "locality"
    else:
        sets = [of_files(paths.data, data_file, documents, structured)]
        folder = built(paths).parent
    settings, encoder = read_settings(paths.home, paths.data), load_encoder()
    blind = settings.model_copy(update={"stated": False})
    frames = []
    for files in sets:
        sources, path = files.sources(), ensure(files, settings, folder)
        if files.generated:
            known = known_of_world(world_seed, split, sources)
        else:
            known = stated_names(load(files.dataset, files.edit_file)[1::2]), {}
        made = {USED: load_locality(path, sources.edits)}
        if known[0]:
            made[ALONE] = load_locality(ensure(files, blind, folder), sources.edits)
            made[UNFILTERED] = unfiltered(sources, blind, folder / "retrieval")
        described = {
            "set": files.name,
            "edits": len(sources.edits),
            "documents": len(sources.documents),
            "triples": len(sources.clozes),
            "sha256": sha256(path),
        }
        for name, items in made.items():
            frame = assess(items, sources, settings.batch, *known, encoder=encoder)
            frames.append(frame.assign(**described, filter=name))
    return pd.concat(frames, ignore_index=True)


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
    table = frame.groupby(columns, sort=False).size().rename("items").reset_index()
    return table.assign(sha256=table["sha256"].str[:16]).rename(columns={"sha256": "SHA-256"})


def likeness(frame: pd.DataFrame) -> pd.DataFrame:
    """List how like its edit every document is: columns of `frame`, measure and score."""
    kept = [column for column in frame.columns if column not in LIKENESS]
    measures = [column for column in LIKENESS if column in frame]
    documents = frame[frame["kind"].str.endswith("doc")]
    return documents.melt(kept, measures, "measure", "score").dropna(subset="score")


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
