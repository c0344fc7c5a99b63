"""Audit a locality set with evidence that was not used to build it.

That is ground-truth facts of the world, facts that records state, and a reading of both texts.

    >>> frame = assess(items, sources, settings.batch, *known_of_world(1, "test", sources))
    >>> leak_counts(frame, ["kind"])   # items, and those that share a fact with an edit

Every table and figure is made from the rows of `assess`, which hold none of the texts.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from uke.data.documents import Document
from uke.data.edits import Edit, Item
from uke.data.formats import load, load_locality
from uke.errors import InputError
from uke.files import read_yaml, sha256
from uke.locality.build import Settings, Sources, text_of, unfiltered
from uke.locality.card import SetFiles, built, ensure, of_files, of_world
from uke.locality.card import settings as read_settings
from uke.locality.facts import facts, names, normal
from uke.locality.retrieval import passage
from uke.project import Paths
from uke.results.metrics import Encoder, cosines, load_encoder
from uke.results.stats import Interval, interval, share
from uke.world import files as world_files
from uke.world import generate as world

SHORT = 5  # words: a longer object is a clause, which no other text repeats word for word
USED, ALONE, UNFILTERED = "texts and what records state", "texts alone", "no filter"  # filters
BENCHMARKS = ("unkebench", "akew-mquake")  # whose published locality sets are built anew
LIKENESS = {"overlap": "share of longer words in common", "similarity": "cosine of embeddings"}
Names = Mapping[str, Sequence[str]]


def known_of_world(seed: int, split: str, sources: Sources) -> tuple[Names, Names]:
    """Look up the true subjects and objects of every edit, and of every document and triple, by id.

    `sources` are those of a file of this split, whose edits stand in the world's order whatever
    their ids are.
    """
    made = world.build(seed)
    pairs = zip(sources.edits, world_files.shuffled(made, split), strict=True)
    edited = {edit.id: [new.name, *new.objects.values()] for edit, (_, _, new) in pairs}
    entities = world_files.collection(made, split)
    probed = {each.name: [each.name, *each.objects.values()] for each in entities}
    return edited, probed | {cloze.id: [cloze.subject, *cloze.answers] for cloze in sources.clozes}


def stated_names(edits: Iterable[Edit]) -> Names:
    """Look up the named subjects and objects of the facts that each record states, by id.

    "He", "the series" and "many" are subjects in AKEW's triplets, but another text that has these
    words names nothing by them: a name has a capital or a digit, at most SHORT words, and a normal
    form.
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
    """Look for every stated name among the names that the extractor finds in the edit's answer.

    One row per stated name: `edit`, whether it is `found`, in the sense in which two texts share
    it, and `half`: the records at even places were looked at when the extractor was written.
    """
    rows = []
    for place, edit in enumerate(edits):
        own = facts(edit.answer, names(edit.answer)).names
        half = "held out" if place % 2 else "looked at"
        for name in stated_names([edit]).get(edit.id, ()):
            rows.append((edit.id, bool(own & facts(name, [name]).names), half))
    return pd.DataFrame(rows, columns=["edit", "found", "half"])


def leaks(
    items: Sequence[Item],
    sources: Sources,
    batch: int,
    known: Names,
    known_documents: Names | None = None,
) -> pd.DataFrame:
    """List for every item the names it shares with its `own` edit and with any edit of its `batch`.

    A name is shared where the item's text (of a document all of it) has a known subject or object
    of the edit, or the edit's text one of the document's: whole words, in any case, and not as part
    of a longer known name ("swan" in "glass swan"). Columns: edit, kind, source, own, batch. Where
    the documents' facts are known, those of every edit must be, else InputError: what is not looked
    for is not found.
    """
    missing = sorted(edit.id for edit in sources.edits if edit.id not in known)
    if known_documents and missing:
        raise InputError(
            f"audit: nothing is known of {len(missing)} edits ({', '.join(missing[:3])}); "
            "expected the facts of every edit"
        )
    patterns = defaultdict(lambda: re.compile("(?!)"))  # nothing is known: nothing is found
    for name, phrases in (*known.items(), *(known_documents or {}).items()):
        longest_first = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
        patterns[name] = re.compile(rf"(?<!\w)(?:{longest_first or '(?!)'})(?!\w)", re.I)
    block = {edit.id: edits for edits in sources.blocks(batch) for edit in edits}
    whole = {document.id: passage(document) for document in sources.documents}
    texts = {edit.id: text_of(edit) for edit in sources.edits}
    spans = {name: _spans(patterns[name], text) for name, text in texts.items()}
    rows = []
    for item in items:
        short = " ".join((item.question, item.reference, *item.aliases))
        text = whole[item.source] if item.kind.endswith("doc") else short
        own = patterns[item.source]
        covered = _spans(own, text)
        shared = {
            edit.id: _named(patterns[edit.id], text, covered)
            | _named(own, texts[edit.id], spans[edit.id])
            for edit in block[item.edit]
        }
        every = sorted(set().union(*shared.values()))
        rows.append((item.edit, item.kind, item.source, sorted(shared[item.edit]), every))
    return pd.DataFrame(rows, columns=["edit", "kind", "source", "own", "batch"])


def _spans(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    return [found.span() for found in pattern.finditer(text)]


def _named(pattern: re.Pattern, text: str, own: Sequence[tuple[int, int]]) -> set[str]:
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
    known_documents: Names | None = None,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Assess every item: one row each, without its text.

    Columns: edit, kind, source, rank, words (of the reference), own and batch (how many names it
    shares with its edit and with any edit of its batch, missing where nothing is known of its
    edit), and for documents how like their edit they are: overlap (the share of the reference's
    words of four letters or more that the answer has) and similarity (the cosine of their
    embeddings; only with an encoder).
    """
    answers = {edit.id: edit.answer for edit in sources.edits}
    frame = leaks(items, sources, batch, known, known_documents)
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


def assess_sets(
    sets: Sequence[SetFiles],
    settings: Settings,
    folder: Path,
    known_of: Callable[[Sources], tuple[Names, Names | None]],
) -> pd.DataFrame:
    """Build sets and assess their items as they are used, by texts alone, and without any filter.

    A set as it is used is filtered by what records state, too, which is what leaks are counted by;
    so the set filtered by texts alone is what is judged. `known_of` looks up what is known of
    sources; where it knows nothing, only the set as used is assessed. Columns of `assess`, and set,
    filter, and of the set edits, documents, triples and sha256.
    """
    frames, encoder = [], load_encoder()
    for files in sets:
        path, sources = ensure(files, settings, folder), files.sources()
        known = known_of(sources)
        made = {USED: load_locality(path, sources.edits)}
        if known[0]:
            blind = settings.model_copy(update={"stated": False})
            alone = ensure(files, blind, folder / "blind", folder / "retrieval")
            made[ALONE] = load_locality(alone, sources.edits)
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


def assess_run(
    paths: Paths,
    settings: Settings,
    split: str = "test",
    world_seed: int = 1,
    data_file: str = "",
    documents: Sequence[str] = (),
    structured: Sequence[str] = (),
) -> pd.DataFrame:
    """Assess the set of a benchmark's file, or those of one split of the world in both forms."""
    if paths.data != "world":
        files = of_files(paths.data, data_file, documents, structured)
        folder = built(paths).parent
        return assess_sets([files], settings, folder, lambda of: (stated_names(of.edits), None))
    world = world_files.ensure(paths.home / "results", world_seed)
    sets = [of_world(world, split, form) for form in ("unkebench", "akew-counterfact")]
    known_of = partial(known_of_world, world_seed, split)
    return assess_sets(sets, settings, world / split / "locality", known_of)


def assess_benchmarks(paths: Paths, documents: Sequence[str] = ()) -> pd.DataFrame:
    """Assess UnKEBench-Loc and AKEW-Loc-MQuAKE, built from the files in the folder UKE_DATA.

    Leaks are counted by what the records at odd places of the file state: the others were looked at
    when the extractor was written.
    """
    frames = []
    for data in BENCHMARKS:
        files = of_files(data, "", documents)
        known = stated_names(load(data, files.edit_file)[1::2]), None
        chosen, folder = read_settings(paths.home, data), paths.results / "locality"
        frames.append(assess_sets([files], chosen, folder, lambda _, known=known: known))
    return pd.concat(frames, ignore_index=True)


def fingerprint(edit: Edit, document: Document) -> str:
    """Compute 8 hex digits of the texts of a RelDoc: a verdict holds for these and no others."""
    texts = "\n".join((text_of(edit), document.heading, document.text))
    return hashlib.sha256(texts.encode()).hexdigest()[:8]


def read_verdicts(paths: Paths, documents: Sequence[str] = ()) -> pd.DataFrame:
    """Read what a reader said of RelDocs of both benchmarks, from `params/audit/reading.yaml`.

    Columns set, edit, source, texts, shares, why, and holds: whether the set has this RelDoc with
    just the texts that were read.
    """
    verdicts = pd.DataFrame(read_yaml(paths.home / "params/audit/reading.yaml")["verdicts"])
    held = set()
    for data in BENCHMARKS:
        files = of_files(data, "", documents)
        path = ensure(files, read_settings(paths.home, data), paths.results / "locality")
        sources = files.sources()
        known = {each.id: each for each in sources.documents}
        edits = {edit.id: edit for edit in sources.edits}
        for item in load_locality(path, sources.edits):
            if item.kind == "rel_doc":
                texts = fingerprint(edits[item.edit], known[item.source])
                held.add((files.name, item.edit, item.source, texts))
    keys = verdicts[["set", "edit", "source", "texts"]].itertuples(index=False, name=None)
    return verdicts.assign(holds=[key in held for key in keys])


def shape(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Describe assessed items: sources, edits of the most used one, words, ranks."""
    columns = {
        "items": ("source", "size"),
        "sources": ("source", "nunique"),
        "edits of the most used": ("source", lambda sources: sources.value_counts().iloc[0]),
        "words": ("words", lambda words: int(words.median())),
        "fewest words": ("words", "min"),
        "most words": ("words", "max"),
        "lowest rank": ("rank", "min"),
        "median rank": ("rank", "median"),
        "highest rank": ("rank", "max"),
    }
    table = frame.groupby(list(by), sort=False).agg(**columns).reset_index()
    return table.assign(**{"median rank": table["median rank"].round().astype("Int64")})


def describe(frame: pd.DataFrame) -> pd.DataFrame:
    """List the assessed sets with the numbers of their edits, documents, triples and items."""
    columns = ["set", "edits", "documents", "triples", "sha256"]
    table = frame.groupby(columns, sort=False).size().rename("items").reset_index()
    return table.assign(sha256=table["sha256"].str[:16]).rename(columns={"sha256": "SHA-256"})


def likeness(frame: pd.DataFrame) -> pd.DataFrame:
    """List how like its edit every document is: columns of `frame`, measure and score."""
    documents = frame[frame["kind"].str.endswith("doc")].rename(columns=LIKENESS)
    measures = [name for name in LIKENESS.values() if name in documents]
    kept = [column for column in frame.columns if column not in LIKENESS]
    return documents.melt(kept, measures, "measure", "score").dropna(subset="score")


def mean_likeness(frame: pd.DataFrame, by: str = "edit") -> dict[tuple[str, str], Interval]:
    """Average the likeness of documents by (kind, measure); intervals are over edits or sources."""
    return {
        (kind, measure): interval(part[measure].to_numpy(float), part[by].tolist())
        for kind, part in frame[frame["kind"].str.endswith("doc")].groupby("kind", sort=False)
        for measure in LIKENESS
        if measure in part and part[measure].notna().all()
    }


def first_set(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the items of the first set."""
    return frame[frame["set"] == frame["set"].iloc[0]]


def disjoint(frame: pd.DataFrame, filter: str) -> Interval:
    """Compute the share of the first set's RelDocs without a fact of any edit of their batch."""
    related = first_set(frame).query("kind == 'rel_doc' and filter == @filter")
    return share(int((related["batch"] == 0).sum()), len(related))


def leak_counts(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Count items that share a fact with their own edit and with any edit of their batch.

    Items of edits of which nothing is known are left out.
    """
    names = {"own": "share a fact with their edit", "batch": "with any edit of the batch"}
    judged = frame.dropna(subset="own")
    leaking = judged.assign(items=1, own=judged["own"] > 0, batch=judged["batch"] > 0)
    counts = leaking.groupby(list(by), sort=False)[["items", *names]].sum()
    return counts.rename(columns=names).reset_index()
