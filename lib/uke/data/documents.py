"""Documents: the passages that become locality probes, and the files they come from.

Accepted are JSON lines (also packed as .gz or .bz2) and Parquet with `title` and `text`, perhaps
`id`, `section` and `question`, and paragraphs with questions in the layout of SQuAD and XQuAD. A
MediaWiki dump becomes JSON lines by `wikiextractor --json`.
"""

import bz2
import gzip
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any
from urllib.parse import unquote

from uke.data.formats import Name, Source, Text, Trimmed, located, parse, read_json, read_list
from uke.errors import InputError

# Parameters that name collections of files, and where UKE_DATA has them.
COLLECTIONS = {"documents": "wikipedia", "structured": "structured"}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open}
ACCEPTED = "JSON lines or Parquet with title and text, or SQuAD's layout"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

BROKEN = (OSError, EOFError, zlib.error)  # what reading a damaged or cut archive raises

Raw = Iterator[tuple[str, Any]]  # what a file holds, one by one, each with its place in words


@dataclass(frozen=True, slots=True)
class Document:
    """A passage and what is known of it; `section` is "" for a whole article or its lead.

    `questions` are pairs of a question and its short answer, "" if the whole text is the answer.
    """

    id: str
    title: str
    text: str
    section: str = ""
    questions: tuple[tuple[str, str], ...] = ()

    @property
    def heading(self) -> str:
        """What the passage is about: its title, or "title: section"."""
        return f"{self.title}: {self.section}" if self.section else self.title


class Question(Source):
    """A question with its short answer."""

    question: Text
    answer: Text


class Passage(Source):
    """What a line, a row or a record of a file holds."""

    id: Name | None = None
    title: Text
    text: Trimmed
    section: Trimmed | None = None
    question: Trimmed | None = None
    questions: list[Question] = []

    def document(self, id: str) -> Document:
        questions = [(_spaced(one.question), one.answer) for one in self.questions]
        questions += [(_spaced(self.question), "")] if _spaced(self.question) else []
        heading = _spaced(self.title), _spaced(self.section)
        return Document(self.id or id, heading[0], self.text, heading[1], tuple(questions))


def gather(paths: Sequence[Path | str] | Path | str) -> list[Document]:
    """Read all documents of these files, in their order.

    Raises InputError, in one line, for a file that is missing, empty, cut or of no accepted form, a
    line, row or record that cannot be read, an id used twice, and no document at all. Warns of
    records without a text, which wikiextractor writes for redirects.
    """
    documents: list[Document] = []
    places: dict[str, str] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for place, document in _placed(Path(path).expanduser()):
            if earlier := places.get(document.id):
                taken = f"the id {document.id!r} is taken by {earlier}"
                raise InputError(f"{place}: {taken}; expected ids used once")
            places[document.id] = place
            documents.append(document)
    if not documents:
        raise InputError("documents: expected at least one file of documents, found none")
    return documents


def find_collections(name: str, given: Iterable[str] = ()) -> tuple[Path, ...]:
    """Return the files of one of `COLLECTIONS`: those given, else all in its folder of UKE_DATA.

    Raises InputError for a given file that does not exist. Files of the folder whose suffix no
    accepted form has are left out with a warning.
    """
    if missing := [path for path in given if not Path(path).expanduser().is_file()]:
        raise InputError(f"{name}: {missing[0]}: no such file")
    if (root := os.environ.get("UKE_DATA", "")) and not given:
        folder = Path(root) / COLLECTIONS[name]
        files = sorted(path for path in folder.glob("[!.]*") if path.is_file())
        given = [path for path in files if _unpacked(path).endswith(SUFFIXES)]
        if names := ", ".join(path.name for path in files if path not in given):
            warnings.warn(f"{folder}: left out {names}; expected {ACCEPTED}", stacklevel=2)
    return tuple(Path(path).expanduser().resolve() for path in given)


def _spaced(text: str | None) -> str:
    return " ".join((text or "").split())


def _unpacked(path: Path) -> str:
    """Return a file's name in lower case, without the suffix of its packing."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in OPENERS else name


def _open(path: Path) -> IO[bytes]:
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _placed(path: Path) -> Iterator[tuple[str, Document]]:
    """Yield a file's documents, each with its place in words; InputError if there is none."""
    count = without = 0
    stem = path.name[: len(Path(_unpacked(path)).stem)]
    for number, (place, values) in enumerate(_reader(path)(path)):
        place = f"{path}: {place}"
        if type(values) is not dict:
            raise InputError(f"{place}: expected an object, found {short(values)}")
        with located(place):
            document = Passage.model_validate(values).document(f"{stem}-{number}")
        if document.text:
            count += 1
            yield place, document
        else:
            without += 1
    if not count:
        raise InputError(f"{path}: holds no document; expected {ACCEPTED}")
    if without:
        warnings.warn(f"{path}: {without} records have no text and are left out", stacklevel=3)


def _reader(path: Path) -> Callable[[Path], Raw]:
    """Choose the reader by a file's beginning; the suffix counts only if a line may be spoilt."""
    try:
        with _open(path) as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); expected {ACCEPTED}") from None
    if not start:
        raise InputError(f"{path}: is empty; expected {ACCEPTED}")
    if start.startswith(b"PAR1"):
        return _rows
    if start.startswith(b"["):
        return lambda path: ((f"record {n}", one) for n, one in enumerate(read_list(path)))
    if re.match(rb'\{\s*"(?:data|version)"', start):
        return _squad
    if start.startswith(b"{") or _unpacked(path).endswith((".jsonl", ".ndjson")):
        return _lines
    dump = start.startswith((b"<?xml", b"<mediawiki"))
    hint = "; convert a MediaWiki dump with `wikiextractor --json`" if dump else ""
    raise InputError(f"{path}: expected {ACCEPTED}{hint}")


def _lines(path: Path) -> Raw:
    """Read JSON lines."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"line {number}"
                    yield place, parse(line.rstrip(), f"{path}: {place}", number)
    except BROKEN as error:
        damage = f"is cut or damaged after line {number} ({error})"
        raise InputError(f"{path}: {damage}; expected the whole file") from None


def _rows(path: Path) -> Raw:
    """Read the rows of a Parquet file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if missing := {"title", "text"} - names:
            raise InputError(f"{path}: expected columns title and text, found no '{min(missing)}'")
        batches = file.iter_batches(columns=sorted(names & set(Passage.model_fields)))
        rows = (values for batch in batches for values in batch.to_pylist())
        yield from ((f"row {number}", values) for number, values in enumerate(rows))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as Parquet ({reason})") from None


def _squad(path: Path) -> Raw:
    """Read SQuAD's layout, articles of paragraphs; questions without an answer are left out."""
    place = "data"
    try:
        for number, article in enumerate(read_json(path)["data"]):
            for inner, paragraph in enumerate(article["paragraphs"]):
                place = f"article {number}, paragraph {inner}"
                questions = [
                    {"question": one["question"], "answer": one["answers"][0]["text"]}
                    for one in paragraph["qas"]
                    if one["answers"]
                ]
                title = unquote(article["title"]).replace("_", " ")
                yield (
                    place,
                    {"title": title, "text": paragraph["context"], "questions": questions},
                )
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {place}: expected SQuAD's layout ({error!r})") from None
