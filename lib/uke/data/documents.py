"""Documents: the passages that become locality probes, and the files they come from.

Every form is streamed, but for `xquad`, one JSON value that is read whole. What a reader leaves out, and why, is counted.
"""

import json
import os
import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pandas as pd

from uke.data.dumps import STUB_WORDS, pages
from uke.data.records import Record, describe, read_list, truncated
from uke.data.streams import OPENERS, beginning, lines
from uke.data.wikitext import HEADING, passages
from uke.errors import InputError, nearest

UNKNOWN = "<unk>"  # WikiText's mark of a word outside its vocabulary
Placed = Iterator[tuple[str, "Document"]]  # a document and its place in the file, in words


@dataclass(frozen=True, slots=True)
class Document:
    """A passage, and what is known of it; `section` is "" for an article's lead or where there is none.

    `questions` are pairs of a question and its short answer, "" where the whole text is the answer.
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

    @property
    def named(self) -> bool:
        """Whether the heading says what the passage is about: a title, and no `<unk>` in title or section."""
        return bool(self.title.strip()) and UNKNOWN not in self.heading


def read(
    path: Path | str, form: str | None = None, tally: Counter | None = None
) -> Iterator[Document]:
    """The documents of a file, one by one, in its order.

    `form` is one of `FORMATS`, told by the file's suffix and beginning if it is None. What was left out is added to
    `tally`, by reason, once the file is read to its end. InputError, in one line: at once for a file that is missing,
    empty, binary or of no known form; on the way at a line, page or record that cannot be read, or where the file is
    cut; at the end if it held no document.
    """
    path = Path(path).expanduser()
    if form is not None and form not in FORMATS:
        raise InputError(f"form: '{form}' is none that can be read{nearest(str(form), FORMATS)}")
    start = beginning(path)
    return (document for _, document in _placed(path, form or _form(path, start), tally))


def gather(paths: Sequence[Path | str], tally: Counter | None = None) -> list[Document]:
    """All documents of these files, in order; InputError if there is none, or if two have one id."""
    found: list[Document] = []
    places: dict[str, str] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path).expanduser()
        for place, document in _placed(path, _form(path, beginning(path)), tally):
            where = f"{path}: {place}"
            if document.id in places:
                raise InputError(
                    f"{where}: the id {document.id!r} is taken by {places[document.id]}; expected ids used once"
                )
            places[document.id] = where
            found.append(document)
    if not found:
        raise InputError("documents: expected at least one file of documents, found none")
    return found


def _placed(path: Path, form: str, tally: Counter | None) -> Placed:
    """A file's documents with their places; InputError if there is none."""
    skipped: Counter = Counter()
    empty = True
    for found in FORMATS[form](path, skipped):
        empty = False
        yield found
    if empty:
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common())
        left = f"left out {reasons}" if reasons else "nothing in it could be one"
        raise InputError(
            f"{path}: holds no document of the form '{form}' ({left}); expected at least one"
        )
    if tally is not None:
        tally.update(skipped)


def _form(path: Path, start: str) -> str:
    """The form of a file that begins so; a beginning says more than a suffix, except that any line may be spoilt."""
    name = path.name.lower()
    for suffix in OPENERS:
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    start = start.lstrip()
    if name.endswith(".xml") or start.startswith("<?xml") or start.startswith("<mediawiki"):
        return "mediawiki"
    if start.startswith("[") or re.match(r'\{\s*"(?:data|version)"', start):
        return "xquad"
    if start.startswith("{"):
        return "jsonl"
    if HEADING.match(start.split("\n", 1)[0]) or name.endswith((".txt", ".tokens", ".raw")):
        return "wikitext"
    known = ", ".join(FORMATS)
    raise InputError(
        f"{path}: neither its name nor its beginning tells its form; expected one of {known}"
    )


def _stem(path: Path) -> str:
    """A file's name without the suffixes of its form and its packing."""
    name = path.name
    for suffix in OPENERS:
        name = name.removesuffix(suffix)
    return Path(name).stem


def _optional(record: Record, field: str) -> str:
    """A text that may be missing, null or blank: "" then."""
    value = record.values.get(field)
    return (
        ""
        if value is None or (isinstance(value, str) and not value.strip())
        else record.text(field)
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _jsonl(path: Path, tally: Counter) -> Placed:
    """JSON lines: an object a line with `title` and `text`, perhaps `id`, `section`, `question`; the rest is ignored."""
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            hint = "is the file truncated?" if truncated(error) else "expected one object a line"
            raise InputError(
                f"{path}: line {number} column {error.colno} is not valid JSON: {error.msg}; {hint}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not usable JSON: {error}") from None
        if type(values) is not dict:
            raise InputError(f"{path}: line {number}: expected an object, found {describe(values)}")
        record = Record(values, f"{path}: line {number}")
        id = record.name("id") if record.has("id") else f"{_stem(path)}-{number - 1}"
        question = _line(_optional(record, "question"))
        yield (
            f"line {number}",
            Document(
                id=id,
                title=_line(record.text("title")),
                text=record.text("text"),
                section=_line(_optional(record, "section")),
                questions=((question, ""),) if question else (),
            ),
        )


def _mediawiki(path: Path, tally: Counter) -> Placed:
    """A MediaWiki XML dump: the lead of each article, under its page id."""
    for page in pages(path, tally):
        yield page.place, Document(page.id, page.title, page.lead)


def _wikitext(path: Path, tally: Counter) -> Placed:
    """A WikiText file: each paragraph of `STUB_WORDS` words or more, under its line (from 0, as in JSON lines)."""
    for line, title, section, text in passages(path):
        if not title:
            tally["paragraphs before the first title"] += 1
        elif len(text.split()) < STUB_WORDS:
            tally[f"paragraphs of fewer than {STUB_WORDS} words"] += 1
        else:
            yield f"line {line}", Document(f"{_stem(path)}-{line - 1}", title, text, section)


def _xquad(path: Path, tally: Counter) -> Placed:
    """Paragraphs with questions, read whole: a list of `{title, text, questions}`, or SQuAD's and XQuAD's own layout."""
    if beginning(path).lstrip().startswith("{"):
        yield from _squad(path)
        return
    for position, values in enumerate(read_list(path)):
        record = Record.at(path, position, values)
        asked = record.records("questions") if record.has("questions") else []
        questions = tuple((_line(one.text("question")), one.text("answer")) for one in asked)
        id = record.id if {"id", "case_id"} & record.values.keys() else f"{_stem(path)}-{position}"
        yield (
            f"record {position}",
            Document(id, _line(record.text("title")), record.text("text"), questions=questions),
        )


def _squad(path: Path) -> Placed:
    """SQuAD's layout, articles of paragraphs; a question without an answer (as SQuAD 2 has them) is left out."""
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is no usable JSON ({error}); expected one object with 'data'"
        ) from None
    number = 0
    for place, article in enumerate(Record(whole, str(path)).records("data")):
        title = _line(unquote(article.text("title")).replace("_", " "))
        for inner, paragraph in enumerate(article.records("paragraphs")):
            asked = [
                (one.text("question"), one.records("answers")) for one in paragraph.records("qas")
            ]
            questions = tuple(
                (_line(question), answers[0].text("text")) for question, answers in asked if answers
            )
            text = paragraph.text("context")
            yield (
                f"article {place}, paragraph {inner}",
                Document(f"{_stem(path)}-{number}", title, text, questions=questions),
            )
            number += 1


FORMATS = {"jsonl": _jsonl, "mediawiki": _mediawiki, "wikitext": _wikitext, "xquad": _xquad}


# What a file of each form holds before, for each and after its documents; WikiText's titles stand between blank lines.
SYNTHETIC = {
    "jsonl": (
        "",
        '{{"id": {number}, "title": "Page {number}", "text": "{lead}", "rest": "{rest}"}}\n',
        "",
    ),
    "wikitext": ("", " \n = Page {number} = \n \n {rest} \n", ""),
    "mediawiki": (
        '<mediawiki version="0.11">\n',
        "<page><title>Page {number}</title><ns>0</ns><id>{number}</id><revision><id>{number}</id><text>"
        "{{{{Infobox|a={number}}}}} '''Page''' is [[{number}|a page]] {lead}.&lt;ref&gt;{number}&lt;/ref&gt;\n== Rest ==\n{rest}"
        "</text></revision></page>\n",
        "</mediawiki>\n",
    ),
}


def growth(counts: Sequence[int], folder: Path | str, form: str = "mediawiki") -> pd.DataFrame:
    """What it costs to stream files of so many documents of a streamed form, made up in `folder` and removed again.

    A row a count, in the order given: `documents`, `file_mib` (size of the file), `peak_mib` (most memory allocated by
    Python and its parsers while reading, the documents dropped as they come), `seconds` (of a pass without that
    measurement). The words are random digits, so no two documents share their text, and a file grows with its count.
    InputError for a form of which none can be made up.
    """
    if form not in SYNTHETIC:
        raise InputError(
            f"form: no file of the form '{form}' can be made up{nearest(form, SYNTHETIC)}"
        )
    return pd.DataFrame([_growth(count, Path(folder), form) for count in counts])


def _growth(count: int, folder: Path, form: str) -> dict[str, float]:
    start, page, end = SYNTHETIC[form]
    path = folder / f"growth-{form}-{count}.txt"
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(start)
            for number in range(count):
                words = (
                    random.Random(number).randbytes(2400).hex(" ", 4)
                )  # 600 words of eight digits
                file.write(
                    page.format(number=number + 1, lead=words[: 9 * 2 * STUB_WORDS - 1], rest=words)
                )
            file.write(end)
        size = path.stat().st_size
        begun = time.perf_counter()
        found = sum(1 for _ in read(path, form))
        seconds = time.perf_counter() - begun
        tracemalloc.start()
        sum(1 for _ in read(path, form))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink(missing_ok=True)
    return {
        "documents": found,
        "file_mib": size / 2**20,
        "peak_mib": peak / 2**20,
        "seconds": seconds,
    }


# Parameters that name collections of files, and where UKE_DATA has them.
COLLECTIONS = {"documents": "wikipedia", "structured": "structured"}


def find_collections(name: str, given: Iterable[str] = ()) -> tuple[Path, ...]:
    """The files of one of COLLECTIONS: those given, else all in its folder of UKE_DATA, none where that names no folder.

    Raises InputError for a given file that does not exist.
    """
    if missing := [path for path in given if not Path(path).expanduser().is_file()]:
        raise InputError(f"{name}: {missing[0]}: no such file")
    if (folder := os.environ.get("UKE_DATA", "")) and not given:
        given = sorted(
            path for path in (Path(folder) / COLLECTIONS[name]).glob("[!.]*") if path.is_file()
        )
    return tuple(Path(path).expanduser().resolve() for path in given)
