"""Documents: the passages that become locality probes, and the files they come from.

Accepted are JSON lines (.jsonl) and Parquet (.parquet) with `title` and `text`, perhaps `id`,
`section`, `topic` and `question`; and .json: a list of such records, or the layout of SQuAD and
XQuAD. A MediaWiki dump becomes JSON lines by `wikiextractor --json`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from uke.data.edits import Text
from uke.data.formats import parse, read_json
from uke.errors import InputError, located

ACCEPTED = (
    "JSON lines (.jsonl, of a MediaWiki dump by `wikiextractor --json`) or Parquet with title and "
    "text, or SQuAD's layout (.json)"
)
Records = Iterator[tuple[str, Any]]  # what a file holds, each with its place in words


@dataclass(frozen=True, slots=True, config=ConfigDict(str_strip_whitespace=True))
class Document:
    """A passage and what is known of it; `section` is "" for a whole article or its lead.

    `questions` are pairs of a question and its short answer, "" if the whole text is the answer.
    `topic` is "People" for a person; "" where it is not known.
    """

    id: Annotated[Text, Field(coerce_numbers_to_str=True)]
    title: Text
    text: str
    section: str = ""
    questions: tuple[tuple[str, str], ...] = ()
    topic: str = ""


def gather(paths: Sequence[Path | str]) -> list[Document]:
    """Read all documents of these files, in their order.

    Raises InputError, in one line, for a file or record that cannot be read, an id used twice, and
    no document at all. Warns of documents without a text, which wikiextractor writes for redirects.
    """
    documents: dict[str, Document] = {}
    for path in map(Path, paths):
        for number, (where, values) in enumerate(_records(path)):
            place = f"{path}: {where}"
            with located(place):
                document = _document(values, f"{path.stem}-{number}")
            if document.id in documents:
                raise InputError(f"{place}: the id {document.id!r} is taken; expected it once")
            documents[document.id] = document
    found = [document for document in documents.values() if document.text]
    if without := len(documents) - len(found):
        warnings.warn(f"documents: {without} have no text and are left out", stacklevel=2)
    if not found:
        raise InputError(f"documents: found none in {len(paths)} files; expected {ACCEPTED}")
    return found


def reserved(document: Document) -> bool:
    """Return whether a lead is kept for the corpus of second moments: one in twenty, by its id."""
    return document.topic != "" and int(sha256(document.id.encode()).hexdigest(), 16) % 20 == 0


def _document(values: Mapping, id: str) -> Document:
    questions = [(_spaced(one["question"]), one["answer"]) for one in values.get("questions", ())]
    if question := _spaced(values.get("question")):
        questions.append((question, ""))
    return Document(
        id=id if values.get("id") is None else values["id"],
        title=_spaced(values["title"]),
        text=values["text"],
        section=_spaced(values.get("section")),
        questions=tuple(questions),
        topic=_spaced(values.get("topic")),
    )


def _spaced(text: str | None) -> str:
    return " ".join((text or "").split())


def _records(path: Path) -> Records:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {ACCEPTED}")
    if path.suffix not in READERS:
        raise InputError(f"{path}: expected {ACCEPTED}")
    return READERS[path.suffix](path)


def _lines(path: Path) -> Records:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", parse(line.strip(), f"{path}: line {number}")


def _rows(path: Path) -> Records:
    import pyarrow.parquet as pq

    with located(f"{path}: cannot be read as Parquet"):
        rows = pq.read_table(path).to_pylist()
    return ((f"row {number}", values) for number, values in enumerate(rows))


def _json(path: Path) -> Records:
    """Read a list of records, or SQuAD's paragraphs; questions without an answer are left out."""
    content = read_json(path)
    if type(content) is list:
        yield from ((f"record {number}", values) for number, values in enumerate(content))
        return
    with located(f"{path}: expected SQuAD's layout"):
        for number, article in enumerate(content["data"]):
            title = unquote(article["title"]).replace("_", " ")
            for inner, paragraph in enumerate(article["paragraphs"]):
                questions = [
                    {"question": one["question"], "answer": one["answers"][0]["text"]}
                    for one in paragraph["qas"]
                    if one["answers"]
                ]
                values = {"title": title, "text": paragraph["context"], "questions": questions}
                yield f"article {number}, paragraph {inner}", values


READERS = {".jsonl": _lines, ".parquet": _rows, ".json": _json}
