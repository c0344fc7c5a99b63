"""Audit a locality set with evidence that was not used to build it.

That is ground-truth facts of the world, facts that records state, and a reading of both texts.

    >>> frame = assess(items, sources, settings.batch, *known_of_world(1, "test", sources))
    >>> leak_counts(frame)   # by kind: items, those that share a fact with an edit

`assess` gives one row per item, without any of its text; every table and figure is made from such
rows.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from uke.data.edits import Edit, Item
from uke.data.formats import find_data, load, load_locality
from uke.errors import InputError
from uke.files import read_yaml, sha256, write_atomic
from uke.locality.build import Settings, Sources, text_of, unfiltered
from uke.locality.card import SetFiles, built, ensure, of_files, of_world
from uke.locality.card import settings as read_settings
from uke.locality.facts import Extractor, facts, names, normal
from uke.locality.retrieval import passage
from uke.project import Paths
from uke.results.metrics import Encoder, cosines, load_encoder
from uke.results.rows import stored
from uke.results.stats import Interval, Paired, interval, paired, share
from uke.world import files as world_files
from uke.world import generate as world

SHORT = 5  # words: a longer object is a clause, which no other text repeats word for word
VERDICT = {"set": str, "edit": str, "source": str, "texts": str, "shares": bool, "why": str}
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


def known_of_records(sources: Sources) -> tuple[Names, None]:
    """Look up what the records of a benchmark state; nothing is known of documents."""
    return stated_names(sources.edits), None


def names_found(edits: Iterable[Edit], extract: Extractor) -> pd.DataFrame:
    """Look for every stated name among the names that an extractor finds in the edit's answer.

    One row per stated name: `edit`, and whether it is `found`, in the sense in which two texts
    share it.
    """
    edits, rows = list(edits), []
    stated = stated_names(edits)
    for edit in edits:
        own = facts(edit.answer, extract(edit.answer))
        for name in stated.get(edit.id, ()):
            rows.append((edit.id, bool(own.names & facts(name, [name]).names)))
    return pd.DataFrame(rows, columns=["edit", "found"])


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
    missing = [edit.id for edit in sources.edits if edit.id not in known]
    if known_documents and missing:
        named = ", ".join(map(repr, sorted(missing)[:3]))
        raise InputError(
            f"audit: nothing is known of {len(missing)} edits ({named}); "
            "expected the facts of every edit"
        )
    whole = {document.id: passage(document) for document in sources.documents}
    patterns = {
        name: _pattern(names) for name, names in (*known.items(), *(known_documents or {}).items())
    }
    block = {edit.id: edits for edits in sources.blocks(batch) for edit in edits}
    texts = {edit.id: text_of(edit) for edit in sources.edits}
    spans = {name: _spans(patterns.get(name), text) for name, text in texts.items()}
    rows = []
    for item in items:
        short = " ".join((item.question, item.reference, *item.aliases))
        text = whole[item.source] if item.kind.endswith("doc") else short
        own = patterns.get(item.source)
        covered = _spans(own, text)
        shared = {
            edit.id: {
                *_named(patterns.get(edit.id), text, covered),
                *_named(own, texts[edit.id], spans[edit.id]),
            }
            for edit in block[item.edit]
        }
        every = sorted(set().union(*shared.values()))
        rows.append((item.edit, item.kind, item.source, sorted(shared[item.edit]), every))
    return pd.DataFrame(rows, columns=["edit", "kind", "source", "own", "batch"])


def _pattern(names: Iterable[str]) -> re.Pattern:
    """Match any of these names as whole words, the longest first; nothing where there is none."""
    longest_first = map(re.escape, sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first) or '(?!)'})(?!\w)", re.I)


def _spans(pattern: re.Pattern | None, text: str) -> list[tuple[int, int]]:
    """Find where a text has its own known names."""
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
    known_documents: Names | None = None,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Assess every item: one row each, without its text.

    Columns: edit, kind, source, rank, words (of the reference), own and batch (how many names it
    shares with its edit and with any edit of its batch), and for documents how like their edit they
    are: overlap (the share of the reference's longer words that the answer has) and similarity (the
    cosine of their embeddings; missing without an encoder).
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
    frame.loc[documents, "overlap"] = [_overlap(*pair) for pair in pairs]
    if encoder and pairs:
        frame.loc[documents, "similarity"] = cosines(*zip(*pairs, strict=True), encoder)
    return frame


def _overlap(text: str, other: str) -> float:
    """Compute the share of the words of `text` with four letters or more that `other` has."""
    words, known = (set(re.findall(r"\w{4,}", each.casefold())) for each in (text, other))
    return len(words & known) / len(words) if words else 0.0


def assess_sets(
    sets: Sequence[SetFiles],
    settings: Settings,
    folder: Path,
    known_of: Callable[[Sources], tuple[Names, Names | None]],
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Build sets and assess their items as they are used, by texts alone, and without any filter.

    A set as it is used is filtered by what records state, too, which is what leaks are counted by;
    so the set filtered by texts alone is what is judged. `known_of` looks up what is known of
    sources; where it knows nothing, only the set as used is assessed. Columns of `assess`, and set,
    filter, and of the set edits, documents, triples and sha256.
    """
    frames = []
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
    name: str,
    paths: Paths,
    settings: Settings,
    split: str = "test",
    world_seed: int = 1,
    data_file: str = "",
    documents: Sequence[str] = (),
    structured: Sequence[str] = (),
) -> pd.DataFrame:
    """Assess the sets of a run, and keep the rows under `name`; or read the committed ones.

    Of the world these are the sets of one split, in the form of both benchmarks.
    """
    if paths.data != "world":
        sets = [of_files(paths.data, data_file, documents, structured)]
        rows = partial(assess_sets, sets, settings, built(paths).parent, known_of_records)
    else:
        world = world_files.ensure(paths.home / "results", world_seed)
        sets = [of_world(world, split, form) for form in ("unkebench", "akew-counterfact")]
        known_of = partial(known_of_world, world_seed, split)
        rows = partial(assess_sets, sets, settings, world / split / "locality", known_of)
    return stored(paths.exported(name), lambda: rows(encoder=load_encoder()))


def assess_benchmarks(paths: Paths, documents: Sequence[str] = ()) -> pd.DataFrame:
    """Assess UnKEBench-Loc and AKEW-Loc-MQuAKE, built from the files in the folder UKE_DATA.

    Leaks are counted by what the records at odd places of the file state: the others were looked at
    when the extractor was written.
    """
    frames = []
    for data in BENCHMARKS:
        files = of_files(data, "", documents)
        names = stated_names(load(data, files.edit_file)[1::2])
        folder, encoder = paths.results / "locality", load_encoder()
        chosen = read_settings(paths.home, data)
        frames.append(assess_sets([files], chosen, folder, lambda _: (names, None), encoder))  # noqa: B023
    return pd.concat(frames, ignore_index=True)


def names_of_benchmark(data: str = "akew-mquake") -> pd.DataFrame:
    """Look for stated names by `names_found`, in the records looked at before and in the others."""
    edits = load(data, find_data(data))
    halves = {"looked at": edits[::2], "held out": edits[1::2]}
    frames = [names_found(part, names).assign(half=half) for half, part in halves.items()]
    return pd.concat(frames, ignore_index=True)


def read_benchmarks(paths: Paths, count: int, documents: Sequence[str] = ()) -> pd.DataFrame:
    """Read the verdicts on `count` RelDocs of UnKEBench and half as many of MQuAKE-CF.

    The sheets that a reader fills in are left beside the sets. Columns of `verdicts`, set, and
    drawn, the number of RelDocs that a verdict was wanted on.
    """
    frames = []
    for data, wanted in zip(BENCHMARKS, (count, count // 2), strict=True):
        files, folder = of_files(data, "", documents), paths.results / "locality"
        sources = files.sources()
        path = ensure(files, read_settings(paths.home, data), folder)
        drawn = sample(load_locality(path, sources.edits), wanted)
        write_atomic(folder / f"reading-{data}.md", sheet(drawn, sources, files.name))
        file = paths.home / "params" / "audit" / "reading.yaml"
        given = verdicts(file, files.name, drawn, sources)
        frames.append(given.assign(set=files.name, drawn=len(drawn)))
    return pd.concat(frames, ignore_index=True)


def shape(frame: pd.DataFrame, by: Sequence[str] = ("kind",)) -> pd.DataFrame:
    """Describe sets of assessed items: sources, edits of the most used one, words, ranks."""
    rows = []
    for key, part in frame.groupby(list(by), sort=False):
        ranks = part["rank"].dropna()
        rows.append(
            dict(zip(by, key, strict=True))
            | {
                "items": len(part),
                "sources": part["source"].nunique(),
                "edits of the most used": part["source"].value_counts().iloc[0],
                "words": int(part["words"].median()),
                "fewest words": part["words"].min(),
                "most words": part["words"].max(),
                "lowest rank": ranks.min(),
                "median rank": int(ranks.median()) if len(ranks) else pd.NA,
                "highest rank": ranks.max(),
            }
        )
    ranked = ("lowest rank", "median rank", "highest rank")
    return pd.DataFrame(rows).astype(dict.fromkeys(ranked, "Int64"))


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


def overlap_gain(frame: pd.DataFrame) -> Paired:
    """Compare the overlap of RelDoc and RandDoc, paired by edit."""
    overlap = frame.pivot(index="edit", columns="kind", values="overlap")
    return paired(overlap["rel_doc"], overlap["rand_doc"])


def first_set(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the items of the first set."""
    return frame[frame["set"] == frame["set"].iloc[0]]


def disjoint(frame: pd.DataFrame, filter: str) -> Interval:
    """Compute the share of the first set's RelDocs without a fact of any edit of their batch."""
    related = first_set(frame).query("kind == 'rel_doc' and filter == @filter")
    return share(int((related["batch"] == 0).sum()), len(related))


def leak_counts(frame: pd.DataFrame, by: Sequence[str] = ("kind",)) -> pd.DataFrame:
    """Count items that share a fact with their own edit and with any edit of their batch.

    Items of edits of which nothing is known are left out.
    """
    judged = frame.dropna(subset="own")
    leaking = judged.assign(own=judged["own"] > 0, batch=judged["batch"] > 0)
    counts = leaking.groupby(list(by), sort=False).agg(
        items=("own", "size"), own=("own", "sum"), batch=("batch", "sum")
    )
    names = {"own": "share a fact with their edit", "batch": "with any edit of the batch"}
    return counts.rename(columns=names).reset_index()


def sample(items: Sequence[Item], count: int, seed: int = 1) -> list[Item]:
    """Draw RelDocs to be read, without looking at them; in the order of the file."""
    related = [item for item in items if item.kind == "rel_doc"]
    generator = random.Random(f"reading-{seed}")
    drawn = generator.sample(range(len(related)), min(count, len(related)))
    return [related[index] for index in sorted(drawn)]


def sheet(chosen: Sequence[Item], sources: Sources, name: str) -> str:
    """Write what a reader is given: both texts of every chosen RelDoc, and a verdict to fill in."""
    parts = [f"# Do edit and document share a fact? ({name})\n"]
    for number, item in enumerate(chosen, start=1):
        edit, heading, text = _texts(item, sources)
        parts.append(
            f"## {number}. edit {item.edit}, document {item.source}\n\n{edit}\n\n"
            f"### {heading}\n\n{text}\n\n"
            f"- {{set: {name}, edit: '{item.edit}', source: '{item.source}', "
            f"texts: '{fingerprint(item, sources)}', shares: , why: ''}}\n"
        )
    return "\n".join(parts)


def fingerprint(item: Item, sources: Sources) -> str:
    """Compute 8 hex digits of a RelDoc's texts: a verdict holds for these and no others."""
    return hashlib.sha256("\n".join(_texts(item, sources)).encode()).hexdigest()[:8]


def _texts(item: Item, sources: Sources) -> tuple[str, str, str]:
    """Find the text of a RelDoc's edit, and heading and text of its document."""
    edit = next(edit for edit in sources.edits if edit.id == item.edit)
    document = next(each for each in sources.documents if each.id == item.source)
    return text_of(edit), document.heading, document.text


def verdicts(path: Path, name: str, chosen: Sequence[Item], sources: Sources) -> pd.DataFrame:
    """Read the verdicts on the chosen RelDocs of a set: columns edit, source, shares, why.

    The file holds `verdicts`, a list with the fields of a line of the sheet. Raises InputError for
    a field that is wrong. A RelDoc without a verdict on just these texts has none in the table.
    """
    found = read_yaml(path).get("verdicts")
    if not isinstance(found, list):
        raise InputError(f"{path}: verdicts: expected a list")
    for number, verdict in enumerate(found):
        fields = verdict if isinstance(verdict, dict) else {}
        right = all(isinstance(fields.get(key), kind) for key, kind in VERDICT.items())
        if not right or set(fields) != set(VERDICT):
            expected = ", ".join(f"{key} ({kind.__name__})" for key, kind in VERDICT.items())
            raise InputError(f"{path}: verdict {number}: expected {expected}")
    wanted = {(name, item.edit, item.source, fingerprint(item, sources)) for item in chosen}
    frame = pd.DataFrame(found, columns=list(VERDICT))
    keys = frame[["set", "edit", "source", "texts"]].itertuples(index=False, name=None)
    kept = [key in wanted for key in keys]
    return frame.loc[kept, ["edit", "source", "shares", "why"]].reset_index(drop=True)
