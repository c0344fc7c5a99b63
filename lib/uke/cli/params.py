"""Read the parameters of a notebook: its own defaults, a profile, the study and the command line.

The later source wins: the notebook's parameters cell, `params/profiles/<profile>.yaml`, the
notebook's entry in `params/studies.yaml` (`fixed`, then `profiles`), `--shared`, `--set`. Names and
types are checked against the literals of the parameters cell, so no kernel is needed.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictInt, ValidationError

from uke.data.formats import DATA_FILES
from uke.errors import InputError, nearest
from uke.files import StrictLoader, read_yaml

Value = bool | int | float | str | list | None

# Chosen by the option of the same name, since they name the folder of the results.
RESERVED = ("profile", "data")
LOCALITY = "02_locality"  # the notebook that builds locality sets


def _mapping(value: Any) -> Any:
    return {} if value is None else value


Parameters = Annotated[dict[str, Any], BeforeValidator(_mapping)]


class Study(BaseModel):
    """One notebook's entry in `params/studies.yaml`.

    `after`: notebooks that must have run before; `priority`: of the notebooks that can start, the
    highest starts first; `report`: whether `make report` runs it, or the one profile on which it
    does; `fixed`: parameters of every run; `profiles`: parameters by profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: str
    after: tuple[str, ...] = ()
    priority: StrictInt = 0
    report: bool | str = True
    fixed: Parameters = {}
    profiles: dict[str, Parameters] = {}


def studies(root: Path) -> dict[str, Study]:
    """Read the study of every notebook by its name; InputError for a bad entry."""
    path = root / "params" / "studies.yaml"
    found = {}
    for notebook, entry in read_yaml(path).items():
        entry = entry or {}
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {notebook}: expected a mapping, found {entry!r}")
        if unknown := [key for key in entry if key not in Study.model_fields]:
            fault = f"unknown key '{unknown[0]}'{nearest(unknown[0], Study.model_fields)}"
            raise InputError(f"{path}: {notebook}: {fault}")
        try:
            study = Study(**{**entry, "notebook": notebook})
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = ".".join(map(str, fault["loc"]))
            text = f"{key}: {fault['msg']} (found {fault['input']!r})"
            raise InputError(f"{path}: {notebook}: {text}") from None
        for profile in study.profiles:
            profile_file(root, profile, f"{path}: {notebook}: profiles")
        found[notebook] = study
    return found


def reported(root: Path, profile: str, data: str, documents: bool = True) -> list[Study]:
    """List the studies in a report on `profile`: those made for it, or else all general ones.

    A benchmark's locality set is built from `documents`; without any, its notebook is left out.
    """
    every = studies(root).values()
    own = [study for study in every if study.report == profile]
    buildable = data == "world" or documents
    general = [
        study
        for study in every
        if study.report is True and (study.notebook != LOCALITY or buildable)
    ]
    return own or general


def profile_file(root: Path, profile: str, place: str = "") -> Path:
    """Find the file of a profile; InputError naming the nearest one where there is none."""
    path = root / "params" / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        valid = [other.stem for other in path.parent.glob("*.yaml")]
        raise InputError(
            f"{place or path.parent}: unknown profile '{profile}'{nearest(profile, valid)}"
        )
    return path


def dataset(root: Path, profile: str, data: str | None = None) -> str:
    """Name the dataset of a run: `data` if given, otherwise the profile's, otherwise the world."""
    chosen = data or read_yaml(profile_file(root, profile)).get("data", "world")
    valid = ["world", *DATA_FILES]
    if chosen not in valid:
        raise InputError(f"data: unknown dataset '{chosen}'{nearest(str(chosen), valid)}")
    return chosen


def declared(notebook: Path) -> dict[str, Value]:
    """Read names and defaults in the cell tagged `parameters`, without running anything."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        valid = [other.stem for other in notebook.parent.glob("*.ipynb")]
        raise InputError(f"{notebook}: no such notebook{nearest(notebook.stem, valid)}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{notebook}: expected a Jupyter notebook (JSON with 'cells')") from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", ())]
    if len(tagged) != 1:
        raise InputError(f"{notebook}: expected one cell tagged 'parameters', found {len(tagged)}")
    return dict(_literals("".join(tagged[0]["source"]), f"{notebook}: parameters cell"))


def _literals(source: str, place: str) -> Iterable[tuple[str, Value]]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"{place}, line {error.lineno}: not valid Python") from None
    for statement in statements:
        line = f"{place}, line {statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                pass
            case _:
                raise InputError(f"{line}: expected `name = literal`")
        try:
            value = ast.literal_eval(expression)
        except ValueError:
            raise InputError(f"{line}: {name}: expected a literal value") from None
        if not isinstance(value, Value):
            raise InputError(f"{line}: {name}: expected bool, int, float, str, list or None")
        yield name, value


def merge(root: Path, notebook: str, profile: str, shared=(), own=()) -> dict[str, Value]:
    """Merge all parameters of `notebook` on `profile`, but for `profile` and `data` themselves.

    `shared` and `own` are `name=value` texts of `--shared` (names that any notebook declares,
    skipped where this one does not) and `--set` (names that this notebook must declare).
    InputError names key, source and the nearest valid name.
    """
    defaults = declared(root / "notebooks" / f"{notebook}.ipynb")
    known = set(defaults)
    anywhere = known.union(*map(declared, (root / "notebooks").glob("*.ipynb")))
    profile_path = profile_file(root, profile)
    values = {key: value for key, value in read_yaml(profile_path).items() if key != "data"}
    study = studies(root).get(notebook, Study(notebook=notebook))
    entry = f"{root / 'params' / 'studies.yaml'}: {notebook}"
    merged = dict(defaults)
    for place, given, valid in (
        (str(profile_path), values, anywhere),
        (f"{entry}: fixed", study.fixed, known),
        (f"{entry}: profiles: {profile}", study.profiles.get(profile, {}), known),
        ("--shared", dict(_pairs("--shared", shared, defaults)), anywhere),
        ("--set", dict(_pairs("--set", own, defaults)), known),
    ):
        _check_names(place, given, valid)
        merged |= {
            name: check(place, name, value, defaults[name])
            for name, value in given.items()
            if name in defaults
        }
    return merged


def check(place: str, name: str, value: Value, default: Value) -> Value:
    """Return `value` as the type of `default` (an int passes for a float); InputError otherwise."""
    if default is None:
        return value
    if isinstance(value, bool) == isinstance(default, bool):
        if isinstance(value, list) and isinstance(default, list) and default:
            return [check(place, f"{name}[{i}]", item, default[0]) for i, item in enumerate(value)]
        if isinstance(value, type(default)):
            return value
        if isinstance(default, float) and isinstance(value, int):
            return float(value)
    expected, actual = type(default).__name__, type(value).__name__
    raise InputError(f"{place}: {name}: expected {expected}, found {value!r} ({actual})")


def _check_names(place: str, values: Mapping[str, Value], valid: set[str]) -> None:
    for name in values:
        if name in RESERVED:
            raise InputError(f"{place}: '{name}' is chosen by --{name}, not here")
        if name not in valid:
            raise InputError(f"{place}: unknown parameter '{name}'{nearest(name, valid)}")


def _pairs(option: str, texts: Iterable[str], defaults: Mapping[str, Value]):
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {text}: expected name=value")
        yield name, parse(value, defaults.get(name))


def parse(text: str, default: Value) -> Value:
    """Read a text of the command line as the type of `default`; commas separate list items."""
    if isinstance(default, str):
        return text
    if isinstance(default, list):
        items = [item.strip().strip("'\"") for item in text.strip("[]").split(",")]
        return [parse(item, default[0] if default else "") for item in items if item]
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, Value) else text
