"""Edits and their probes: the texts to write, the questions to ask, and the files they come from.

No chat template and no model in sight. Probe kinds: `original`, `paraphrase` and `detail` ask for the
edit itself; `rel_doc`, `rand_doc`, `struct_trip` and `near_triple` for what must not change;
`multi_hop` for what follows from the edit; `general` for a skill that needs none of it.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from uke.data.formats import PARSERS as DATASETS
from uke.data.formats import cloze
from uke.data.records import Record, read_list
from uke.errors import InputError, nearest


class Kind(NamedTuple):
    """What a kind of probe is called, what it measures and how an answer is scored.

    `metric` is the primary metric, a name in `uke.results.metrics.METRICS`. It compares the answer
    with `against`: the "reference", or the answer "before" the edit. `short`: the answer is a few words.
    """

    label: str
    group: str
    metric: str
    against: str
    short: bool


# The one table of probe kinds, in the order of every table; fixed before any row existed.
KINDS: Mapping[str, Kind] = {
    "original": Kind("Original", "efficacy", "rougel_f1", "reference", short=False),
    "paraphrase": Kind("Paraphrase", "efficacy", "rougel_f1", "reference", short=False),
    "detail": Kind("Details", "efficacy", "exact", "reference", short=True),
    "multi_hop": Kind("Multi-hop", "portability", "exact", "reference", short=True),
    "rel_doc": Kind("RelDoc", "locality", "rougel_f1", "before", short=False),
    "rand_doc": Kind("RandDoc", "locality", "rougel_f1", "before", short=False),
    "struct_trip": Kind("StructTrip", "locality", "exact", "before", short=True),
    "near_triple": Kind("Near triples", "nearby", "exact", "before", short=True),
    "general": Kind("General skill", "skill", "exact", "before", short=True),
}


def in_group(*groups: str) -> tuple[str, ...]:
    """Return the kinds of these groups ("efficacy", "locality", ...), in the order of `KINDS`."""
    return tuple(name for name, kind in KINDS.items() if kind.group in groups)


EFFICACY = in_group("efficacy")  # the kinds that an edit derives from its own fields
AVERAGE = (*EFFICACY, *in_group("locality"))  # the six kinds of the paper's average
SPLITS = ("development", "test")

Text = Annotated[str, Field(pattern=r"\S")]
Made = TypeVar("Made", bound=BaseModel)


class Frozen(BaseModel):
    """A value that cannot change and has no field but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(Frozen):
    """One triple; the relation is a cloze with one "{}" for the subject."""

    subject: Text
    relation: Text
    object: Text

    @field_validator("relation")
    @classmethod
    def _has_place(cls, relation: str) -> str:
        if relation.count("{}") != 1:
            raise ValueError('expected a cloze with one "{}" for the subject')
        return relation


class Probe(Frozen):
    """One question asked of a model. `number` counts an edit's probes of one kind, from 0.

    `chat` false: the question is a cloze, continued as raw text without the chat template.
    `aliases` are further acceptable answers beside the reference.
    """

    edit: Text
    kind: Literal[tuple(KINDS)]
    number: StrictInt = Field(default=0, ge=0)
    question: Text
    reference: Text
    aliases: tuple[Text, ...] = ()
    chat: StrictBool = True


class Item(Probe):
    """A probe of a locality file with its provenance.

    `source`: id of the document or triple it is made of, None where it was made otherwise. `rank`: the document's place
    among all, by relevance to the edit, from 1.
    """

    source: Text | None = None
    rank: StrictInt | None = Field(default=None, ge=1)


class Cloze(Frozen):
    """A triple of a structured set: `prompt` is continued by the first of `answers`; `question` asks the same, where the set has one."""

    id: Text
    subject: Text
    prompt: Text
    answers: tuple[Text, ...]
    question: Text | None = None


class Detail(Frozen):
    """A question about one detail of an edit's answer."""

    question: Text
    answer: Text


class Edit(Frozen):
    """One text to write: the answer to a question, and what is asked about it.

    `facts`: what the text states, where the source says so. `extra`: probes of other kinds than the
    edit's own that come with it. `probes`: all of them, original, paraphrase, details, extra.
    """

    id: Text
    question: Text
    answer: Text
    paraphrase: Text | None = None
    details: tuple[Detail, ...] = ()
    facts: tuple[Fact, ...] = ()
    extra: tuple[Probe, ...] = ()
    subject: Text | None = None
    category: Text | None = None

    @model_validator(mode="after")
    def _check_extra(self) -> "Edit":
        for probe in self.extra:
            if probe.edit != self.id or probe.kind in EFFICACY:
                raise ValueError(
                    f"an extra probe is of edit {probe.edit!r} and kind '{probe.kind}'"
                )
        _refuse_twins(self.extra)
        return self

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Every question that comes with the edit."""
        whole = [("original", self.question)]
        whole += [("paraphrase", self.paraphrase)] if self.paraphrase else []
        own = [
            Probe(edit=self.id, kind=kind, question=asked, reference=self.answer)
            for kind, asked in whole
        ]
        details = [
            Probe(
                edit=self.id,
                kind="detail",
                number=number,
                question=detail.question,
                reference=detail.answer,
            )
            for number, detail in enumerate(self.details)
        ]
        return (*own, *details, *self.extra)


def _key(probe: Probe) -> tuple[str, str, int]:
    return probe.edit, probe.kind, probe.number


def _refuse_twins(probes: Iterable[Probe]) -> None:
    """ValueError if two probes share edit, kind and number, which tell rows apart."""
    for (edit, kind, number), count in Counter(map(_key, probes)).items():
        if count > 1:
            shared = f"{count} probes of kind '{kind}' with number {number}"
            raise ValueError(f"edit {edit!r} has {shared}; expected one")


def _make(kind: type[Made], values: Mapping, place: str) -> Made:
    """A validated value; the first thing wrong with it becomes an InputError of one line."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        hint = nearest(field, kind.model_fields) if first["type"] == "extra_forbidden" else ""
        if first["type"] == "literal_error":
            hint = nearest(str(first["input"]), KINDS)
        where = f"{place}, field '{field}'" if field else place
        raise InputError(" ".join(f"{where}: {first['msg']}{hint}".split())) from None


def load(dataset: str, path: str | Path, limit: int | None = None) -> tuple[Edit, ...]:
    """The first `limit` edits (None: all) of a benchmark's file, in its order; no record is left out.

    `dataset` is a key of `DATASETS`. Raises InputError, naming file, record and field, for an unknown
    dataset, an unreadable file, a record that lacks or misuses a field, or an id that comes twice.
    Two records may ask the same question: real files do. Warns of locality and portability items
    without an answer, which cannot be scored and make no probe.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}{nearest(str(dataset), DATASETS)}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(
            f"limit is {limit!r}; expected a whole number of at least 1, or None for all"
        )
    edits: list[Edit] = []
    seen: dict[str, int] = {}
    unanswered: list[str] = []
    for position, values in enumerate(read_list(path)[:limit]):
        record = Record.at(path, position, values)
        if record.id in seen:
            raise InputError(
                f"{record.place}: record {seen[record.id]} has this id too; expected each id once"
            )
        seen[record.id] = position
        edits.append(_make(Edit, DATASETS[dataset](record), record.place))
        unanswered += record.unanswered
    if unanswered:
        lost = f"{len(unanswered)} items have no answer and make no probe"
        warnings.warn(f"{lost}; the first: {unanswered[0]}", stacklevel=2)
    return tuple(edits)


def load_clozes(path: str | Path) -> tuple[Cloze, ...]:
    """The triples of a structured set (ZsRE, CounterFact, WikiBigEdit, KnowEdit), in the file's order, ids as `<file>-<id>`.

    Raises InputError as `load` does; warns of records without an answer, which are left out.
    """
    found, unanswered = {}, []
    for position, values in enumerate(read_list(path)):
        record = Record.at(path, position, values)
        if fields := cloze(record):
            name = f"{Path(path).stem}-{fields['id']}"
            if name in found:
                raise InputError(
                    f"{record.place}: an earlier record has this id too; expected each id once"
                )
            found[name] = _make(Cloze, fields | {"id": name}, record.place)
        unanswered += record.unanswered
    if unanswered:
        warnings.warn(
            f"{len(unanswered)} triples have no answer and are left out; the first: {unanswered[0]}",
            stacklevel=2,
        )
    return tuple(found.values())


def load_locality(path: str | Path, edits: Iterable[Edit]) -> tuple[Item, ...]:
    """The probes of these edits in a locality file, a JSON list of objects with the fields of `Item`.

    Probes of other edits are checked and left out, so that one file serves every selection of its
    edits. Raises InputError for a field that is wrong, missing or misspelt, for a kind that an edit
    asks itself, for an edit that has no probe in the file, and for two probes of one edit, kind and number.
    """
    edits = tuple(edits)
    wanted = {edit.id for edit in edits}
    taken = {_key(probe) for edit in edits for probe in edit.extra}
    probes: list[Item] = []
    for position, values in enumerate(read_list(path)):
        record = Record.at(path, position, values)
        plain = record.values | ({"edit": record.name("edit")} if "edit" in record.values else {})
        probe = _make(Item, plain, record.place)
        if probe.kind in EFFICACY:
            record.fail(
                "kind",
                f"is '{probe.kind}', which the edit itself asks{nearest(probe.kind, set(KINDS) - set(EFFICACY))}",
            )
        if _key(probe) in taken:
            twin = (
                f"edit {probe.edit!r} has a probe of kind '{probe.kind}' with this number already"
            )
            record.fail("number", f"is {probe.number}, but {twin}; expected another number")
        taken.add(_key(probe))
        probes.append(probe)
    found = [probe for probe in probes if probe.edit in wanted]
    without = sorted(wanted - {probe.edit for probe in found})
    if without:
        named = ", ".join(map(repr, without[:3])) + (" ..." if len(without) > 3 else "")
        lacking = f"no probe for {len(without)} of {len(wanted)} edits ({named})"
        raise InputError(f"{path}: {lacking}; expected the same ids")
    return tuple(found)


def in_split(edit: str, split: str) -> bool:
    """Whether a benchmark's edit belongs to a split: a quarter, told by a hash of the id, are development edits."""
    return (int(hashlib.sha256(edit.encode()).hexdigest(), 16) % 4 == 0) == (split == "development")


def fingerprint(edits: Iterable[Edit], probes: Iterable[Probe] = ()) -> str:
    """16 hex digits that change with any field, and with the order, of these edits and probes."""
    groups = [[value.model_dump(mode="json") for value in group] for group in (edits, probes)]
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


# Where a benchmark's file lies below the folder UKE_DATA; "world" is generated and needs none.
DATA_FILES = {
    "unkebench": "unkebench/final_data_v*.json",
    "akew-counterfact": "akew/CounterFact*.json",
    "akew-mquake": "akew/MQuAKE-CF*.json",
    "akew-wikiupdate": "akew/WikiUpdate*.json",
    "editeverything": "editeverything/editevery*.json",
    "zsre": "structured/zsre*.json",
    "counterfact": "structured/counterfact*.json",
    "wikibigedit": "structured/wikibigedit*.json",
    "knowedit": "structured/knowedit*.json",
}


def find_data(data: str, data_file: str = "") -> str:
    """Absolute path of the file that holds the benchmark `data`; "" for the generated world.

    `data_file` if given, otherwise the one file of that name in the folder named by the environment variable UKE_DATA.
    """
    if data == "world" and not data_file:
        return ""
    if data == "world":
        raise InputError(
            f"data_file: {data_file}: the world is generated; name the benchmark that this file is of with DATA="
        )
    if data_file:
        if not Path(data_file).is_file():
            raise InputError(f"data_file: {data_file}: no such file")
        return str(Path(data_file).resolve())
    folder = os.environ.get("UKE_DATA", "")
    if not folder or not Path(folder).is_dir():
        said = f"UKE_DATA names no folder: '{folder}'" if folder else "UKE_DATA is not set"
        raise InputError(
            f"data: {data} needs a file, and {said}; set it, or give the file itself as DATA_FILE"
        )
    found = sorted(Path(folder).glob(DATA_FILES[data]))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"{folder}: data: {data}: expected one file {DATA_FILES[data]}, found {names}; name it with DATA_FILE"
        )
    return str(found[0].resolve())
