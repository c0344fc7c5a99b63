"""Where a run of the study reads and writes, the names of its units of work, and the mark of the code behind them."""

import ast
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uke.errors import InputError

EMBEDDED = Path(__file__).with_name("embedded")  # the model directory shipped in this package
# Edits and recipes are fingerprinted by what they hold; these packages and modules decide what is
# made of them.
DECIDING = ("models", "methods", "results.metrics", "study.score")


@dataclass(frozen=True)
class Paths:
    """Where a run of the study on `profile` and `data` reads and writes, below UKE_HOME or the checkout."""

    profile: str
    data: str = "world"

    def __post_init__(self) -> None:
        for field, name in (("profile", self.profile), ("data", self.data)):
            check_name(field, name)

    @property
    def home(self) -> Path:
        folder = Path(os.environ.get("UKE_HOME") or Path(__file__).parents[2]).resolve()
        if not folder.is_dir():
            raise InputError(f"UKE_HOME: expected the project's folder, found none at '{folder}'")
        return folder

    @property
    def figures(self) -> Path:
        return (
            self.home
            / "figures"
            / (self.profile if self.data == "world" else f"{self.data}-{self.profile}")
        )

    @property
    def results(self) -> Path:
        return (
            self.home
            / "results"
            / (self.profile if self.data == "world" else f"{self.profile}-{self.data}")
        )

    @property
    def sections(self) -> Path:
        """Folder of what the notebooks contribute to the report."""
        return self.results / "sections"

    def answers(self, mark: str) -> Path:
        """Folder of the answers of an unedited model, shared by all runs; `mark` says which model."""
        return (
            self.home
            / "results"
            / "answers"
            / f"{check_name('mark', mark)}-{code_fingerprint(('models',))}"
        )

    def rows(self, study: str) -> Path:
        """Folder of the study's unit files."""
        return self.results / "rows" / check_name("study", study)

    def exported(self, study: str) -> Path:
        """The study's committed rows, one file."""
        return self.figures / "rows" / f"{check_name('study', study)}.parquet"


def check_name(field: str, name: str) -> str:
    """The name, if it can be that of a file; InputError otherwise."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{field}: expected a name of letters, digits, '.', '_' and '-', found {name!r}"
        )
    return name


def unit_key(method: str, **choices: Any) -> str:
    """File name of one unit of work (a method on one batch): readable, equal for equal choices and only for them."""
    words = [
        method,
        *(f"{name}-{value}" for name, value in sorted(choices.items()) if value is not None),
    ]
    readable = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")[:80]
    return f"{readable or 'unit'}-{digest(method, **choices)}"


def number_key(name: str) -> str:
    """Return a method's name as part of a number's key: `AnyEdit (MEMIT)` becomes `anyedit_memit`."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower().replace("++", " pp")).strip("_")


def digest(method: str, **choices: Any) -> str:
    """10 hex digits, equal for equal choices and only for them."""
    plain = {
        name: value.item() if hasattr(value, "item") else value for name, value in choices.items()
    }
    return hashlib.sha256(
        json.dumps([method, dict(sorted(plain.items()))], default=str).encode()
    ).hexdigest()[:10]


@functools.cache
def code_fingerprint(parts: tuple[str, ...] = DECIDING) -> str:
    """16 hex digits of the source of these packages or modules, named as below `uke` ("models", "results.metrics").

    Comments, docstrings and layout do not count. By default: those that decide a score.
    """
    root = Path(__file__).parent
    sources = []
    for part in parts:
        path = root.joinpath(*part.split("."))
        sources += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    trees = {
        path.relative_to(root).as_posix(): _shape(ast.parse(path.read_text("utf-8")))
        for path in sources
    }
    return hashlib.sha256(repr(trees).encode()).hexdigest()[:16]


def _shape(node: Any) -> Any:
    """A syntax tree as tuples, without what differs between versions of Python (empty fields) or means nothing."""
    if isinstance(node, list):
        return tuple(_shape(one) for one in node)
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(
        node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    ) and ast.get_docstring(node):
        fields["body"] = fields["body"][1:]
    return (
        type(node).__name__,
        *((name, _shape(value)) for name, value in fields.items() if value not in (None, [])),
    )
