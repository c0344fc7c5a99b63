"""A benchmark's file: one JSON list of objects, read field by field; each complaint is one line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from uke.errors import InputError

WORDS = {str: "text", list: "a list", dict: "an object", int: "a whole number", float: "a number"}
WORDS |= {bool: "true or false", type(None): "null"}


def describe(value: Any) -> str:
    """What a JSON value is, in the words of error messages."""
    shown = f" ({json.dumps(value)})" if type(value) in (bool, int, float) else ""
    return WORDS.get(type(value), type(value).__name__) + shown


def read_list(path: str | Path) -> list:
    """The JSON list that the file `path` (UTF-8) holds, at least one item long; InputError otherwise."""
    path = Path(path).expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig")
        items = json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected one JSON file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; expected a JSON text file"
        ) from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise InputError(f"{path}: is empty; expected a JSON list of records") from None
        place = f"line {error.lineno} column {error.colno}"
        hint = (
            "; is the file truncated?"
            if truncated(error)
            else "; expected one JSON list of records"
        )
        raise InputError(f"{path}: not valid JSON at {place}: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable JSON: {error}") from None
    if type(items) is not list:
        raise InputError(f"{path}: expected a list of records, found {describe(items)}")
    if not items:
        raise InputError(f"{path}: the list is empty; expected at least one record")
    return items


def truncated(error: json.JSONDecodeError) -> bool:
    """Whether JSON is wrong because it ends too early."""
    return error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip()


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object; Python's own reader would keep the last of two equal keys and say nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r} more than once")
    return made


class Record:
    """One JSON object of a file, read field by field; each complaint names file, record and field."""

    def __init__(self, values: dict, place: str, path: str = "", id: str = ""):
        self.values, self.place, self.path, self.id = values, place, path, id
        self.unanswered: list[str] = []

    @classmethod
    def at(cls, file: str | Path, position: int, values: Any) -> "Record":
        """The record at `position` (from 0) of `file`, with its id; InputError if it is no object."""
        place = f"{file}: record {position}"
        if type(values) is not dict:
            raise InputError(f"{place}: expected an object, found {describe(values)}")
        key = next((key for key in ("id", "case_id") if key in values), None)
        if key is None:
            return cls(values, place, id=str(position))
        id = cls(values, place).name(key)
        return cls(values, f"{place} (id {id!r})", id=id)

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raise the InputError that `field` of this record has this `problem`."""
        raise InputError(" ".join(f"{self.place}, field '{self.path}{field}': {problem}".split()))

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def check(self, value: Any, field: str, kind: type) -> Any:
        """`value`, if it is of this JSON kind and, for text, not blank; text comes back trimmed."""
        if type(value) is not kind:
            self.fail(field, f"expected {WORDS[kind]}, found {describe(value)}")
        if kind is not str:
            return value
        if not value.strip():
            self.fail(field, "is empty; expected text")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            self.fail(
                field, "holds half a character (a lone surrogate); expected valid Unicode text"
            )
        return value.strip()

    def raw(self, field: str) -> Any:
        """The field as it stands, which must exist."""
        if field not in self.values:
            present = ", ".join(map(repr, self.values)) or "no field"
            self.fail(field, f"is missing; the fields are {present}")
        return self.values[field]

    def value(self, field: str, kind: type) -> Any:
        """The field, which must exist, checked."""
        return self.check(self.raw(field), field, kind)

    def text(self, field: str) -> str:
        """A text that is not blank."""
        return self.value(field, str)

    def name(self, field: str) -> str:
        """An id: a whole number or a text, as text."""
        value = self.values.get(field)
        return str(value) if type(value) is int else self.text(field)

    def texts(self, field: str) -> list[str]:
        """A list of texts, none blank."""
        return [self.check(v, f"{field}[{i}]", str) for i, v in enumerate(self.value(field, list))]

    def inner(self, value: Any, field: str) -> "Record":
        """An object inside this record, as a record of its own that knows its place."""
        child = Record(self.check(value, field, dict), self.place, f"{self.path}{field}.", self.id)
        child.unanswered = self.unanswered
        return child

    def records(self, field: str) -> list["Record"]:
        """A list of objects."""
        return [self.inner(v, f"{field}[{i}]") for i, v in enumerate(self.value(field, list))]

    def answers(self, field: str) -> list[str]:
        """Acceptable answers, each once: a text, a list of texts, or lists of aliases; blanks left out."""
        found, nested = [], [(self.raw(field), field)]
        while nested:
            value, place = nested.pop()
            if type(value) is list:
                nested += reversed([(v, f"{place}[{i}]") for i, v in enumerate(value)])
            elif value is not None and value != "" and not (type(value) is str and value.isspace()):
                found.append(self.check(value, place, str))
        return list(dict.fromkeys(found))

    def beside(self, values: dict) -> "Record":
        """Other values at this record's place, for the items of lists that stand side by side."""
        other = Record(values, self.place, self.path, self.id)
        other.unanswered = self.unanswered
        return other

    def equal(self, first: str, second: str) -> None:
        """Two lists must have as many items as each other."""
        expected, found = len(self.value(first, list)), len(self.value(second, list))
        if expected != found:
            self.fail(second, f"has {found} items; expected {expected}, as many as '{first}'")

    def pairs(self, questions: str, answers: str) -> list[tuple[str, str]]:
        """Two lists of texts of equal length, side by side."""
        self.equal(questions, answers)
        return list(zip(self.texts(questions), self.texts(answers)))
