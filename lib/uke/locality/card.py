"""Keep a locality set in files: its sources, the set itself, its schema and its data card.

    >>> files = of_world(world_files.ensure(results, seed=1), "test")
    >>> path = ensure(files, Settings(), results / "locality")
    >>> probes = load_locality(path, files.sources().edits)

A set is built once, whole or not at all, and again only when what decides it has changed.
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

from uke.data.documents import COLLECTIONS, find_collections, gather
from uke.data.edits import SPLITS, Item, in_split
from uke.data.formats import find_data, load, load_clozes, located
from uke.errors import InputError
from uke.files import read_yaml, sha256, write_atomic
from uke.locality.build import Settings, Sources, build, fitted
from uke.project import Paths, code_fingerprint
from uke.world import files as world_files

# Published names; any other file's set is called <dataset>-Loc.
NAMES = {
    "unkebench": "UnKEBench-Loc",
    "akew-counterfact": "AKEW-Loc-CF",
    "akew-mquake": "AKEW-Loc-MQuAKE",
}
BUILDING = ("data", "locality.build", "locality.facts", "locality.retrieval")


def name_of(dataset: str) -> str:
    """Name the locality set of a dataset."""
    return NAMES.get(dataset, f"{dataset}-Loc")


@dataclass(frozen=True)
class SetFiles:
    """The files a set is built from: an edit file, collections of documents, structured sets.

    `dataset` names the parser of the edit file. `generated`: the file is one split of a world; any
    other file holds both splits, told apart by a hash of the id.
    """

    dataset: str
    edit_file: Path
    documents: tuple[Path, ...]
    structured: tuple[Path, ...]
    generated: bool = False

    @property
    def name(self) -> str:
        return name_of(self.dataset)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.edit_file, *self.documents, *self.structured)

    def sources(self) -> Sources:
        """Read everything; InputError for the first thing wrong in any file."""
        every = load(self.dataset, self.edit_file)
        groups = [
            tuple(edit for edit in every if self.generated or in_split(edit.id, split))
            for split in SPLITS[: 1 if self.generated else None]
        ]
        triples = tuple(cloze for path in self.structured for cloze in load_clozes(path))
        return Sources(tuple(filter(None, groups)), tuple(gather(self.documents)), triples)


def of_world(folder: Path, split: str, dataset: str = "unkebench") -> SetFiles:
    """Find the files of one split of a world that lies below `folder`."""
    below = Path(folder) / split
    file = {"unkebench": world_files.UNKEBENCH, "akew-counterfact": world_files.AKEW}[dataset]
    collection, triples = below / world_files.DOCUMENTS, below / world_files.KNOWEDIT
    return SetFiles(dataset, below / file, (collection,), (triples,), generated=True)


def of_files(
    data: str, data_file: str, given: Sequence[str] = (), structured: Sequence[str] = ()
) -> SetFiles:
    """Find the files for a benchmark's set: those given, else what the folder UKE_DATA has."""
    named = {"documents": given, "structured": structured}
    found = {name: find_collections(name, files) for name, files in named.items()}
    for name, folder in COLLECTIONS.items():
        if not found[name]:
            raise InputError(
                f"locality: no file to take {name} from; name them with {name.upper()}=, "
                f"or have them in {folder}/ of the folder UKE_DATA"
            )
    return SetFiles(data, Path(find_data(data, data_file)), **found)


def built(paths: Paths) -> Path:
    """Name the file where `make locality` leaves the set of a run on a benchmark's file."""
    return paths.results / "locality" / f"{name_of(paths.data)}.json"


def check_made_for(built: Path, edit_file: Path) -> None:
    """Raise InputError where a set was made for another edit file or was changed since.

    Another file may have the same ids, so the card decides.
    """
    card = read_card(built.with_suffix(".md"))
    if card.get("sha256") != sha256(built) or card["sources"][0]["sha256"] != sha256(edit_file):
        raise InputError(
            f"{built}: not the set made for {edit_file}, by its card; "
            "make it with `make locality`, or remove it"
        )


def settings(home: Path, data: str) -> Settings:
    """Read the settings of a dataset's set: the defaults, and what `params/locality.yaml` says."""
    path = Path(home) / "params" / "locality.yaml"
    values = read_yaml(path).get(data, {}) if path.is_file() else {}
    with located(f"{path}: {data}", Settings.model_fields):
        return Settings.model_validate(values)


def ensure(files: SetFiles, chosen: Settings, folder: Path, cache: Path | None = None) -> Path:
    """Return the path of the set below `folder`, built if it is missing or out of date.

    `cache`: folder of embeddings and trained retrievers, `retrieval` below `folder` if not given.
    """
    target = Path(folder) / f"{files.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        head, card = header(files, chosen), read_card(target.with_suffix(".md"))
        decided = {key: card.get(key) for key in head} == head
        if not (decided and target.is_file() and card.get("sha256") == sha256(target)):
            sources = files.sources()
            used = fitted(chosen, sources)
            items = build(sources, used, cache or target.parent / "retrieval")
            write(head | {"retriever": used.retriever}, items, target)
    return target


def header(files: SetFiles, chosen: Settings) -> dict:
    """Collect what decides a set and begins its card: files, settings, building code."""
    generated = "MIT (generated by this project)"
    classes = sha256(Path(__file__).with_name("facts.yaml"))[:16]
    return {
        "set": files.name,
        "dataset": files.dataset,
        "sources": [
            {
                "file": path.name,
                "sha256": sha256(path),
                "licence": generated if files.generated else licence(path),
            }
            for path in files.files
        ],
        "settings": chosen.model_dump(),
        "code": f"{code_fingerprint(BUILDING)} {classes}",
    }


def licence(path: Path) -> str:
    """Find the licence of a file that is known by its name; nobody has compared its content."""
    known = read_yaml(Path(__file__).with_name("licences.yaml"))
    found = [text for start, text in known.items() if path.name.startswith(start)]
    return f"{found[0]}; by its name" if found else "not stated"


def read_card(path: Path) -> dict:
    """Read the front matter of a card; empty where there is none that can be read."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
    except (FileNotFoundError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def write(head: Mapping, items: Sequence[Item], target: Path) -> None:
    """Write schema, card and set; the set last, since it is what others look for."""
    records = [item.model_dump(mode="json", exclude_defaults=True) for item in items]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": head["set"],
        "type": "array",
        "items": Item.model_json_schema(),
    }
    content, described = (
        json.dumps(value, indent=1, ensure_ascii=False) + "\n" for value in (records, schema)
    )
    decided = dict(head) | {"sha256": hashlib.sha256(content.encode()).hexdigest()}
    write_atomic(target.with_suffix(".schema.json"), described)
    write_atomic(target.with_suffix(".md"), data_card(decided, items))
    write_atomic(target, content)


def data_card(head: Mapping, items: Sequence[Item]) -> str:
    """Write the data card: front matter with what decided the set, then the same for people."""
    frame = pd.DataFrame([(item.kind, item.source) for item in items], columns=["kind", "source"])
    kinds = frame.groupby("kind", sort=False)["source"].agg(["size", "nunique"])
    template = Path(__file__).with_name("templates") / "card.md"
    return Template(template.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        head,
        front=yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=1000),
        kinds=list(kinds.itertuples()),
        edited=len({item.edit for item in items}),
        items=len(items),
    )
