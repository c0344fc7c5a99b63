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
from uke.data.formats import load, load_clozes, located
from uke.errors import InputError
from uke.files import read_yaml, sha256, write_atomic
from uke.locality.build import Settings, Sources, build
from uke.project import Paths, code_fingerprint
from uke.world import files as world_files

NAMES = {  # as published; any other file's set is called <dataset>-Loc
    "unkebench": "UnKEBench-Loc",
    "akew-counterfact": "AKEW-Loc-CF",
    "akew-mquake": "AKEW-Loc-MQuAKE",
}
BUILDING = ("data", "locality.build", "locality.facts", "locality.retrieval")


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


def of_world(folder: Path, split: str, dataset: str = "unkebench") -> SetFiles:
    """Find the files of one split of a world that lies below `folder`."""
    file = {"unkebench": world_files.UNKEBENCH, "akew-counterfact": world_files.AKEW}[dataset]
    names = (file, world_files.DOCUMENTS, world_files.KNOWEDIT)
    edits, documents, triples = (Path(folder) / split / name for name in names)
    return SetFiles(dataset, edits, (documents,), (triples,), generated=True)


def of_files(
    data: str, data_file: str = "", documents: Sequence[str] = (), structured: Sequence[str] = ()
) -> SetFiles:
    """Find the files for a benchmark's set: those given, else those of `data_folder()`."""
    given = {"documents": documents, "structured": structured}
    found = {name: find_files(name, given[name]) for name in COLLECTIONS}
    if missing := [name for name in COLLECTIONS if not found[name]]:
        expected = f"name them with {missing[0].upper()}=, set UKE_DATA, or run `make data`"
        raise InputError(f"locality: no file to take {missing[0]} from; {expected}")
    return SetFiles(data, Path(find_data(data, data_file)), **found)


def set_name(dataset: str) -> str:
    """Name the set of a dataset."""
    return NAMES.get(dataset, f"{dataset}-Loc")


def built(paths: Paths) -> Path:
    """Name the file where `make locality` leaves a benchmark's set."""
    return paths.results / "locality" / f"{set_name(paths.data)}.json"


def check_made_for(built: Path, edit_file: Path) -> None:
    """Raise InputError where a set, by its card, is of another edit file or was changed since."""
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


def ensure(files: SetFiles, chosen: Settings, folder: Path) -> Path:
    """Return the path of the set below `folder`, built if it is missing or out of date."""
    name = set_name(files.dataset) + ("" if chosen.stated else "-texts-alone")
    target = Path(folder) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        head, card = header(files, chosen), read_card(target.with_suffix(".md"))
        if not (target.is_file() and card == head | {"sha256": sha256(target)}):
            write(head, build(files.sources(), chosen), target)
    return target


def header(files: SetFiles, chosen: Settings) -> dict:
    """Collect what decides a set and begins its card: files, settings, building code."""
    below = Path(__file__).parent
    licences = read_yaml(below / "licences.yaml")  # by how the names of files begin
    sources = []
    for path in (files.edit_file, *files.documents, *files.structured):
        known = (licences[start] for start in licences if path.name.startswith(start))
        licence = next((f"{text}; by its name" for text in known), "not stated")
        licence = "MIT (generated by this project)" if files.generated else licence
        sources.append({"file": path.name, "sha256": sha256(path), "licence": licence})
    return {
        "set": set_name(files.dataset),
        "dataset": files.dataset,
        "sources": sources,
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
