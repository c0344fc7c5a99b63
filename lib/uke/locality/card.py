"""Keep a locality set in files: its sources, the set itself, its schema and its data card.

>>> files = of_world(world_files.ensure(results, seed=1), "test")
>>> path = ensure(files, Settings(), results / "locality")
>>> probes = load_locality(path, files.sources().edits)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from filelock import FileLock
from jinja2 import Template
from pydantic import TypeAdapter

from uke.data.documents import gather
from uke.data.edits import SPLITS, Item, in_split
from uke.data.find import COLLECTIONS, find_data, find_files
from uke.data.formats import load, load_clozes
from uke.errors import InputError, located
from uke.files import read_yaml, sha256, write_atomic
from uke.locality.build import Judge, Settings, Sources, build_judged
from uke.project import Paths, code_fingerprint
from uke.results.metrics import cosines, load_encoder
from uke.results.stats import interval
from uke.world import files as world_files

NAMES = {  # as published; any other file's set is called <dataset>-Loc
    "unkebench": "UnKEBench-Loc",
    "akew-counterfact": "AKEW-Loc-CF",
    "akew-mquake": "AKEW-Loc-MQuAKE",
}
BUILDING = ("locality.build", "locality.facts", "locality.retrieval")
COUNTED = ("judged", "cosine")  # in the card of a model's own set, beside what decides it
GENERAL_FACTS = Path(__file__).with_name("general_facts.yaml")


@dataclass(frozen=True)
class SetFiles:
    """The files a set is built from: an edit file, collections of documents, structured sets.

    `generated`: the edit file is one split of a world; any other holds both, told apart by the id.
    """

    dataset: str
    edit_file: Path
    documents: tuple[Path, ...]
    structured: tuple[Path, ...]
    generated: bool = False

    def sources(self) -> Sources:
        """Read everything; InputError for the first thing wrong in any file."""
        every = load(self.dataset, self.edit_file)
        groups = [every]
        if not self.generated:
            groups = [tuple(e for e in every if in_split(e.id, split)) for split in SPLITS]
        triples = tuple(cloze for path in self.structured for cloze in load_clozes(path))
        return Sources(tuple(filter(None, groups)), tuple(gather(self.documents)), triples)


def of_world(
    folder: Path, split: str, dataset: str = "unkebench", **real: Sequence[str]
) -> SetFiles:
    """Find the files of one split of a world that lies below `folder`.

    `real` (documents, structured): ask around its edits for what a model of the real world knows,
    from these or what is found, and from our own facts.
    """
    file = {"unkebench": world_files.UNKEBENCH, "akew-counterfact": world_files.AKEW}[dataset]
    names = (file, world_files.DOCUMENTS, world_files.KNOWEDIT)
    edits, documents, triples = (Path(folder) / split / name for name in names)
    if real:
        return SetFiles(dataset, edits, **collections(**real, own=True), generated=True)
    return SetFiles(dataset, edits, (documents,), (triples,), generated=True)


def of_files(
    data: str,
    data_file: str = "",
    documents: Sequence[str] = (),
    structured: Sequence[str] = (),
    own: bool = False,
) -> SetFiles:
    """Find the files for a benchmark's set: those given, else those of `data_folder()`.

    `own`: our own facts of general knowledge are the triples.
    """
    found = collections(documents, structured, own)
    return SetFiles(data, Path(find_data(data, data_file)), **found)


def collections(
    documents: Sequence[str], structured: Sequence[str], own: bool
) -> dict[str, tuple[Path, ...]]:
    """Find documents and sets of triples; InputError where there is no file of either.

    With our `own` facts only sets from elsewhere than the usual folder count: a small model knows
    one in twenty of the benchmarks' triples, so most of its time would go into asking.
    """
    given = {"documents": documents, "structured": structured}
    found = {name: find_files(name, given[name]) for name in COLLECTIONS}
    if own:
        usual = find_files("structured")
        found["structured"] = (GENERAL_FACTS, *(p for p in found["structured"] if p not in usual))
    if missing := [name for name in COLLECTIONS if not found[name]]:
        expected = f"name them with {missing[0].upper()}=, set UKE_DATA, or run `make data`"
        raise InputError(f"locality: no file to take {missing[0]} from; {expected}")
    return found


def set_name(dataset: str) -> str:
    """Name the set of a dataset."""
    return NAMES.get(dataset, f"{dataset}-Loc")


def built(paths: Paths, split: str = "test", form: str = "unkebench") -> Path:
    """Name the file where `make locality` leaves a set of this run's own.

    A benchmark's has both splits; for the world's edits only a model of the real world has one.
    """
    name = f"{split}/{set_name(form)}" if paths.data == "world" else set_name(paths.data)
    return paths.results / "locality" / f"{name}.json"


def check_made_for(built: Path, edit_file: Path) -> int | None:
    """Return of how many edits of a split a model's own set is; None where it has them all.

    InputError where a set, by its card, is of another edit file or was changed since.
    """
    card = read_card(built.with_suffix(".md"))
    if card.get("sha256") != sha256(built) or card["sources"][0]["sha256"] != sha256(edit_file):
        raise InputError(
            f"{built}: not the set made for {edit_file}, by its card; "
            "make it with `make locality`, or remove it"
        )
    return card.get("limit")


def settings(home: Path, data: str) -> Settings:
    """Read the settings of a dataset's set: the defaults, and what `params/locality.yaml` says."""
    path = Path(home) / "params" / "locality.yaml"
    values = read_yaml(path).get(data, {}) if path.is_file() else {}
    with located(f"{path}: {data}", Settings.model_fields):
        return Settings.model_validate(values)


def ensure(
    files: SetFiles, chosen: Settings, folder: Path, judge: Judge | None = None, limit: int = 0
) -> Path:
    """Return the path of the set below `folder`, built if it is missing or out of date.

    With a `judge` it is a model's own set, of the first `limit` edits of each split at least; the
    documents reserved for a corpus are in no such set.
    """
    name = set_name(files.dataset) + ("" if chosen.stated else "-texts-alone")
    target = Path(folder) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        sources, card = files.sources(), read_card(target.with_suffix(".md"))
        head = header(files, chosen, sources)
        if judge:
            head |= {"judge": judge.about, "limit": max(limit, card.get("limit", 0))}
        decided = {name: value for name, value in card.items() if name not in COUNTED}
        if not (target.is_file() and decided == head | {"sha256": sha256(target)}):
            items, verdicts = build_judged(sources, chosen, judge, head.get("limit"))
            write(head | (described(items, verdicts, sources) if judge else {}), items, target)
    return target


def described(items: Sequence[Item], verdicts: Mapping[str, bool], sources: Sources) -> dict:
    """Count what a judge was asked for and refused; say how near documents are to their edits.

    `cosine`: of embeddings of document and answer, with a 95 % interval over edits; empty without
    an encoder.
    """
    judged = {}
    for name, every in (("documents", sources.documents), ("triples", sources.clozes)):
        asked = [verdicts[one.id] for one in every if one.id in verdicts]
        judged[name] = {"asked": len(asked), "refused": asked.count(False)}
    answers = {edit.id: edit.answer for edit in sources.edits}
    cosine, encoder = {}, load_encoder()
    for kind in ("rel_doc", "rand_doc") if encoder else ():
        texts = [(one.reference, answers[one.edit]) for one in items if one.kind == kind]
        found = interval(cosines(*zip(*texts, strict=True), encoder))
        cosine[kind] = [round(float(value), 3) for value in found[:3]]
    return {"judged": judged, "cosine": cosine}


def header(files: SetFiles, chosen: Settings, read: Sources) -> dict:
    """Collect what decides a set and begins its card: files, what they hold, settings, code."""
    below, digest = Path(__file__).parent, hashlib.sha256(repr(read).encode()).hexdigest()
    licences = read_yaml(below / "licences.yaml")  # by how the names of files begin
    sources = []
    for path in (files.edit_file, *files.documents, *files.structured):
        known = (licences[start] for start in licences if path.name.startswith(start))
        licence = next((f"{text}; by its name" for text in known), "not stated")
        if files.generated and path.is_relative_to(files.edit_file.parent):
            licence = "MIT (generated by this project)"
        sources.append({"file": path.name, "sha256": sha256(path), "licence": licence})
    return {
        "set": set_name(files.dataset),
        "dataset": files.dataset,
        "sources": sources,
        "read": digest[:16],
        "settings": chosen.model_dump(),
        "code": f"{code_fingerprint(BUILDING)} {sha256(below / 'facts.yaml')[:16]}",
    }


def read_card(path: Path) -> dict:
    """Read the front matter of a card; empty where there is none that can be read."""
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1]))
    except (FileNotFoundError, IndexError, ValueError, TypeError, yaml.YAMLError):
        return {}


def write(head: Mapping, items: Sequence[Item], target: Path) -> None:
    """Write schema, data card and set; the set last, since it is what others look for."""
    records = [item.model_dump(mode="json", exclude_defaults=True) for item in items]
    schema = TypeAdapter(list[Item]).json_schema() | {"title": head["set"]}
    content = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    described = json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    decided = {**head, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    frame = pd.DataFrame([(item.kind, item.source) for item in items], columns=["kind", "source"])
    kinds = frame.groupby("kind", sort=False)["source"].agg(["size", "nunique"])
    template = Path(__file__).with_name("templates") / "card.md"
    card = Template(template.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        decided,
        front=yaml.safe_dump(decided, sort_keys=False, allow_unicode=True, width=1000),
        kinds=list(kinds.itertuples()),
        edited=len({item.edit for item in items}),
        items=len(items),
    )
    write_atomic(target.with_suffix(".schema.json"), described)
    write_atomic(target.with_suffix(".md"), card)
    write_atomic(target, content)
