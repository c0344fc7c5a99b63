"""Name where a run reads and writes, its units of work, and the code behind them."""

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
# What decides a score beside edits and recipes, which have fingerprints of their own.
DECIDING = ("models", "methods", "results.metrics", "study.score")


@dataclass(frozen=True)
class Paths:
    """Name where a run on `profile` and `data` reads and writes, below UKE_HOME or the checkout."""

    profile: str
    data: str = "world"

    def __post_init__(self) -> None:
        check_name("profile", self.profile)
        check_name("data", self.data)

    @property
    def home(self) -> Path:
        """The project's folder."""
        folder = Path(os.environ.get("UKE_HOME") or Path(__file__).parents[2]).resolve()
        if not folder.is_dir():
            raise InputError(f"UKE_HOME: expected the project's folder, found none at '{folder}'")
        return folder

    @property
    def figures(self) -> Path:
        """The folder of what may be committed: figures, tables, rows, numbers and report."""
        name = self.profile if self.data == "world" else f"{self.profile}-{self.data}"
        return self.home / "figures" / name

    @property
    def results(self) -> Path:
        """The folder of everything else that the run writes."""
        return self.home / "results" / self.figures.name

    @property
    def sections(self) -> Path:
        """The folder of what the notebooks contribute to the report."""
        return self.results / "sections"

    def answers(self, fingerprint: str) -> Path:
        """The folder of an unedited model's answers, shared by all runs."""
        name = f"{check_name('fingerprint', fingerprint)}-{code_fingerprint(('models',))}"
        return self.home / "results" / "answers" / name

    def rows(self, study: str) -> Path:
        """The folder of a study's unit files."""
        return self.results / "rows" / check_name("study", study)

    def exported(self, study: str) -> Path:
        """The file of a study's committed rows."""
        return self.figures / "rows" / f"{check_name('study', study)}.parquet"

    def command(self, notebook: str) -> str:
        """Say which command runs a notebook, for whoever misses what it makes."""
        return f"python -m uke run {notebook} --profile {self.profile} --data {self.data}"


def check_name(field: str, name: str) -> str:
    """Return the name if a file can have it; InputError otherwise."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{field}: expected a name of letters, digits, '.', '_', '-': {name!r}")
    return name


def number_key(name: str) -> str:
    """Return a method's name as part of a key: `FT-UKE+` becomes `ft_uke_plus`."""
    words = str(name).lower().replace("++", " pp").replace("+", " plus")
    return re.sub(r"[^a-z0-9]+", "_", words).strip("_")


def unit_key(method: str, **choices: Any) -> str:
    """Name the file of one unit of work: readable, and equal for equal choices only."""
    given = [f"{name}-{value}" for name, value in sorted(choices.items()) if value is not None]
    words = re.sub(r"[^a-z0-9]+", "-", " ".join([method, *given]).lower())
    return f"{words.strip('-')[:80] or 'unit'}-{digest(method, **choices)}"


def digest(method: str, **choices: Any) -> str:
    """Return 10 hex digits that are equal for equal choices only."""
    plain = {name: getattr(value, "item", lambda v=value: v)() for name, value in choices.items()}
    text = json.dumps([method, dict(sorted(plain.items()))], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@functools.cache
def code_fingerprint(parts: tuple[str, ...] = DECIDING) -> str:
    """Return 16 hex digits of the code of packages or modules, by default what decides a score."""
    root, sources = Path(__file__).parent, []
    for part in parts:
        path = root.joinpath(*part.split("."))
        sources += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    code = {path.relative_to(root).as_posix(): _code(path) for path in sources}
    return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def _code(path: Path) -> str:
    """Return a module's code without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
