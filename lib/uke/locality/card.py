"""The files of a locality set: where its sources lie, the set itself, its schema and its data card; built once, whole or not at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock
from pydantic import ValidationError

from uke.data import documents, edits, formats
from uke.data.documents import COLLECTIONS, find_collections
from uke.data.edits import Item
from uke.data.formats import find_data
from uke.errors import InputError, nearest
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
BUILDING = ("data", "locality", "results.similarity")
LICENCES = {  # of the collections and sets that the README names, by the beginning of the file's name
    "xquad": "CC BY-SA 4.0 (Wikipedia)",
    "wikitext": "CC BY-SA 3.0 (Wikipedia)",
    "enwiki": "CC BY-SA 4.0 (Wikipedia)",
    "simplewiki": "CC BY-SA 4.0 (Wikipedia)",
    "zsre": "MIT (KnowEdit, EasyEdit)",
    "counterfact": "MIT (ROME)",
    "wikibigedit": "MIT (WikiBigEdit)",
    "final_data": "none stated (UnKEBench): use, do not redistribute",
    "MQuAKE": "none stated (AKEW): use, do not redistribute",
    "CounterFact": "none stated (AKEW): use, do not redistribute",
}


def name_of(dataset: str) -> str:
    """What the locality set of a dataset is called."""
    return NAMES.get(dataset, f"{dataset}-Loc")


@dataclass(frozen=True)
class Order:
    """A set to build: the benchmark whose parser reads `edit_file`, collections of documents, structured sets."""

    dataset: str
    edit_file: Path
    documents: tuple[Path, ...]
    structured: tuple[Path, ...]
    generated: bool = (
        False  # a split of a world; any other file holds both splits, told by a hash of the id
    )

    @property
    def name(self) -> str:
        return name_of(self.dataset)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.edit_file, *self.documents, *self.structured)

    def sources(self) -> Sources:
        """Everything read; InputError for the first thing wrong in any file."""
        every = formats.load(self.dataset, self.edit_file)
        groups = (
            [
                tuple(edit for edit in every if edits.in_split(edit.id, split))
                for split in edits.SPLITS
            ]
            if not self.generated
            else [every]
        )
        triples = tuple(cloze for path in self.structured for cloze in formats.load_clozes(path))
        return Sources(
            tuple(filter(None, groups)), tuple(documents.gather(self.documents)), triples
        )


def of_world(folder: Path, split: str, dataset: str = "unkebench") -> Order:
    """The set of one split of a world whose files lie below `folder`."""
    below = Path(folder) / split
    file = {"unkebench": world_files.UNKEBENCH, "akew-counterfact": world_files.AKEW}[dataset]
    return Order(
        dataset,
        below / file,
        (below / world_files.DOCUMENTS,),
        (below / world_files.KNOWEDIT,),
        generated=True,
    )


def of_files(data: str, data_file: str, given: Sequence[str], structured: Sequence[str]) -> Order:
    """The set of a benchmark's file: what is given, else what the folder UKE_DATA has; InputError where nothing is."""
    found = {
        "documents": find_collections("documents", given),
        "structured": find_collections("structured", structured),
    }
    for name, folder in COLLECTIONS.items():
        if not found[name]:
            raise InputError(
                f"locality: no file to take {name} from; name them with {name.upper()}=, or have them in {folder}/ of the folder UKE_DATA"
            )
    return Order(data, Path(find_data(data, data_file)), **found)


def built(paths: Paths) -> Path:
    """Where `make locality` leaves the set of a run on a benchmark's file."""
    return paths.results / "locality" / f"{name_of(paths.data)}.json"


def check_made_for(built: Path, edit_file: Path) -> None:
    """InputError where a set was made for another edit file, whose ids may be the same, or was changed since."""
    card = read_card(built.with_suffix(".md")) if built.with_suffix(".md").is_file() else {}
    if card.get("sha256") != sha256(built) or card["sources"][0]["sha256"] != sha256(edit_file):
        raise InputError(
            f"{built}: not the set made for {edit_file}, by its card; make it with `make locality`, or remove it"
        )


def settings(home: Path, data: str) -> Settings:
    """The settings of `params/locality/<data>.yaml`, which holds only differences from the defaults; these where there is none."""
    path = Path(home) / "params" / "locality" / f"{data}.yaml"
    values = read_yaml(path) if path.is_file() else {}
    for key in values:
        if key not in Settings.model_fields:
            raise InputError(f"{path}: unknown key '{key}'{nearest(key, Settings.model_fields)}")
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path}: {first['loc'][0]}: {first['msg']}, found {first['input']!r}"
        ) from None


def ensure(order: Order, chosen: Settings, folder: Path) -> Path:
    """Path of the set below `folder`, built if it is missing or was made of other files, by other settings or other code."""
    target, card = Path(folder) / f"{order.name}.json", Path(folder) / f"{order.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        head = header(order, chosen)
        if not (
            target.is_file()
            and card.is_file()
            and read_card(card) | {"retriever": ""}
            == head | {"sha256": sha256(target), "retriever": ""}
        ):
            sources = order.sources()
            used = fitted(chosen, sources)
            write(
                head | {"retriever": used.retriever},
                build(sources, used, Path(folder) / "retrieval"),
                Path(folder),
            )
    return target


def header(order: Order, chosen: Settings) -> dict:
    """What decides a set: its files, settings and the code that builds it; what a card begins with."""
    files = [
        {
            "file": path.name,
            "sha256": sha256(path),
            "licence": "MIT (generated by this project)" if order.generated else licence(path),
        }
        for path in order.files
    ]
    return {
        "set": order.name,
        "dataset": order.dataset,
        "sources": files,
        "settings": chosen.model_dump(),
        "code": f"{code_fingerprint(BUILDING)} {sha256(Path(__file__).with_name('phrases.yaml'))[:16]}",
    }


def read_card(path: Path) -> dict:
    """The front matter of a card; empty where there is none that can be read."""
    parts = path.read_text(encoding="utf-8").split("---\n")
    try:
        found = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def write(head: Mapping, items: Sequence[Item], folder: Path) -> None:
    """Set, schema and card below `folder`; the set last, since it is what others look for. `head` begins the card."""
    name = head["set"]
    records = [item.model_dump(mode="json", exclude_defaults=True) for item in items]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "type": "array",
        "items": Item.model_json_schema(),
    }
    text, schema_text = (
        json.dumps(value, indent=1, ensure_ascii=False) + "\n" for value in (records, schema)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(folder / f"{name}.schema.json", schema_text)
    write_atomic(folder / f"{name}.md", card(dict(head) | {"sha256": digest}, items))
    write_atomic(folder / f"{name}.json", text)


def card(head: Mapping, items: Iterable[Item]) -> str:
    """The data card: front matter that says what decided the set, then the same for people."""
    items = list(items)
    counts = Counter(item.kind for item in items)
    used = {kind: len({item.source for item in items if item.kind == kind}) for kind in counts}
    rows = "\n".join(f"| `{kind}` | {count} | {used[kind]} |" for kind, count in counts.items())
    files = "\n".join(
        f"| `{file['file']}` | {file['licence']} | `{file['sha256'][:16]}…` |"
        for file in head["sources"]
    )
    chosen = "\n".join(f"| `{key}` | {value} |" for key, value in head["settings"].items())
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=1000)
    edited = len({item.edit for item in items})
    return CARD.format(
        front=front, rows=rows, files=files, chosen=chosen, edited=edited, items=len(items), **head
    )


CARD = """---
{front}---
# {set}

A reconstruction of a locality set of arXiv 2506.09672, which is not published: {items} probes around {edited} edits, questions whose
answers must not change when the edits are written. The set is as good as its sources; `{set}.schema.json` describes its fields.

| kind | probes | different sources |
|---|---|---|
{rows}

`rel_doc`: the document most relevant to the edit among those that share no fact with any edit it may be written with. `rand_doc`: one of
the others, ranked below the floor. `struct_trip`: a triple whose subject and object occur in none of these edits. `near_triple` (ours): the
triple whose relation is most like one of the edit's, of another subject, asked as a question where the structured set has one.
Edits that may be written together are consecutive ones of one split (every fourth edit, by a hash of its id, is a development edit), as many as
`batch` says, 0 being all of the split. The retriever used was `{retriever}`. Score an answer after the edit against the model's own answer before it; `reference`, a text cut at a sentence end, is secondary.

| source | licence | SHA-256 |
|---|---|---|
{files}

| setting | value |
|---|---|
{chosen}

Probes carry text of their sources, under the licences above. SHA-256 of the set: `{sha256}`. The same sources, settings and code
give the same bytes on the same machine, a trained retriever only with the same number of threads; elsewhere documents of nearly equal
relevance may be ranked differently.
"""


def licence(path: Path) -> str:
    """The licence of a collection or set that is known by its name; nobody has compared the file with the published one."""
    return next(
        (f"{text}; by its name" for start, text in LICENCES.items() if path.name.startswith(start)),
        "not stated",
    )
