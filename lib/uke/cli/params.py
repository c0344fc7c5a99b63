"""Read the parameters of a notebook: its own defaults, a profile, the study and the command line.

The later source wins: the notebook's parameters cell, `params/profiles/<profile>.yaml`, the
notebook's entry in `params/studies.yaml` (`fixed`, then `profiles`), `--shared`, `--set`. Names and
types are checked against the literals of the parameters cell, so no kernel is needed.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictInt, TypeAdapter

from uke.data.formats import FORMATS
from uke.errors import InputError, located, nearest
from uke.files import read_yaml
from uke.project import Paths

Parameters = dict[str, Any]
LOCALITY = "02_locality"  # the notebook that builds locality sets
SEARCH = ("tuning", "12_beyond")  # how the names of notebooks that `make tune` runs begin
ROWLESS = ("10_cost", "11_verdicts")  # notebooks that read the rows and numbers of others alone


class Study(BaseModel, extra="forbid", frozen=True):
    """One notebook's entry in `params/studies.yaml`.

    `after`: notebooks that must have run before; `priority`: of the notebooks that can start, the
    highest starts first; `report`: whether `make report` runs it, or the one profile on which it
    does; `fixed`: parameters of every run; `profiles`: parameters by profile.
    """

    after: tuple[str, ...] = ()
    priority: StrictInt = 0
    report: bool | str = True
    fixed: Parameters = {}
    profiles: dict[str, Parameters] = {}


def studies(root: Path) -> dict[str, Study]:
    """Read the study of every notebook by its name; InputError for a bad entry."""
    path, found = root / "params" / "studies.yaml", {}
    known = [file.stem for file in root.glob("params/profiles/*.yaml")]
    for notebook, entry in read_yaml(path).items():
        with located(f"{path}: {notebook}", Study.model_fields):
            found[notebook] = Study.model_validate(entry or {})
        for name in found[notebook].profiles:
            if name not in known:
                fault = f"unknown profile '{name}'{nearest(name, known)}"
                raise InputError(f"{path}: {notebook}: profiles: {fault}")
    return found


def reported(
    root: Path, profile: str, data: str, documents: bool = True, drawn: Paths | None = None
) -> list[str]:
    """List the notebooks in a report on `profile`: those made for it, or else all general ones.

    A benchmark's locality set is built from `documents`; without any, its notebook is left out. A
    run drawn again has the notebooks whose rows are committed, searches too, or that have none.
    """
    every = studies(root)
    own = [name for name, study in every.items() if study.report == profile]
    general = [name for name, study in every.items() if study.report is True]
    if drawn:
        general += [name for name in every if name.startswith(SEARCH)]
        return own or [n for n in general if n in ROWLESS or drawn.exported(n).is_file()]
    buildable = data == "world" or documents
    return own or [name for name in general if name != LOCALITY or buildable]


def dataset(root: Path, profile: str, data: str | None = None) -> str:
    """Name the dataset of a run: `data` if given, otherwise the profile's, otherwise the world."""
    chosen = data or read_yaml(root / f"params/profiles/{profile}.yaml").get("data", "world")
    valid = ["world", *FORMATS]
    if chosen not in valid:
        raise InputError(f"data: unknown dataset '{chosen}'{nearest(str(chosen), valid)}")
    return chosen


def declared(notebook: Path) -> Parameters:
    """Read names and defaults in the cell tagged `parameters`, without running anything."""
    if not notebook.is_file():
        hint = nearest(notebook.stem, (other.stem for other in notebook.parent.glob("*.ipynb")))
        raise InputError(f"{notebook}: no such notebook{hint}")
    with located(f"{notebook}: expected one cell tagged 'parameters', of lines `name = literal`"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        (cell,) = (one for one in cells if "parameters" in one["metadata"].get("tags", ()))
        lines = ast.parse("".join(cell["source"])).body
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def merge(root: Path, notebook: str, profile: str, shared=(), own=()) -> Parameters:
    """Merge all parameters of `notebook` on `profile`, but for `profile` and `data` themselves.

    `shared` and `own` are `name=value` texts of `--shared` (names that any notebook declares,
    skipped where this one does not) and `--set` (names that this notebook must declare).
    InputError names key, source and the nearest valid name.
    """
    merged = declared(root / "notebooks" / f"{notebook}.ipynb")
    known = set(merged)
    anywhere = known.union(*map(declared, (root / "notebooks").glob("*.ipynb")))
    source = root / f"params/profiles/{profile}.yaml"
    values = read_yaml(source)
    values.pop("data", None)
    study = studies(root).get(notebook, Study())
    entry = f"{root / 'params' / 'studies.yaml'}: {notebook}"
    for place, given, valid in (
        (f"{source}", values, anywhere),
        (f"{entry}: fixed", study.fixed, known),
        (f"{entry}: profiles: {profile}", study.profiles.get(profile, {}), known),
        ("--shared", _pairs("--shared", shared, merged), anywhere),
        ("--set", _pairs("--set", own, merged), known),
    ):
        for name, value in given.items():
            if name in ("profile", "data"):  # which name the folder of the results
                raise InputError(f"{place}: '{name}' is chosen by --{name}, not here")
            if name not in valid:
                raise InputError(f"{place}: unknown parameter '{name}'{nearest(name, valid)}")
            if name in known:
                # On the command line everything is text, in which lax reading finds the type.
                strict, default = not place.startswith("--"), merged[name]
                kind = type(default)
                kind = list[type(default[0])] if default and kind is list else kind
                with located(f"{place}: {name}"):
                    merged[name] = TypeAdapter(kind).validate_python(value, strict=strict)
    return merged


def _pairs(option: str, texts: Iterable[str], defaults: Mapping[str, Any]) -> Parameters:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {text}: expected name=value")
        found[name] = items(value) if isinstance(defaults.get(name), list) else value
    return found


def items(text: str) -> list[str]:
    """Split a list of the command line at its commas."""
    return [*filter(None, (item.strip(" '\"") for item in text.strip("[]").split(",")))]
