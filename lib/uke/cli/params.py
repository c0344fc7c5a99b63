"""Reads the parameters of a notebook: its own defaults, a profile, a study and what the user set.

Merge order, the later winning: the notebook's parameters cell <- params/profiles/<profile>.yaml
<- params/studies/<notebook>.yaml (`fixed`, `vary`, then its `profiles: <profile>:`) <- `--shared` <- `--set`.
Every name and type is checked against the literals of the parameters cell, so nothing depends on a running kernel.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from uke.data.edits import DATA_FILES
from uke.errors import InputError, nearest
from uke.files import StrictLoader, read_yaml

Value = bool | int | float | str | list | None

# Chosen by the option of the same name (or, for data, by the profile): they name the folder of the results.
RESERVED = ("profile", "data")

LOCALITY = "02_locality"  # the notebook that builds locality sets


@dataclass(frozen=True)
class Study:
    """What params/studies/<notebook>.yaml says of one notebook.

    `fixed`: parameters every run of it has; `vary`: list parameters it compares; `profiles`: sizes per profile; `priority`: of
    those that can start, the highest starts: the set that others wait for and what needs no set (2), then what takes longest (1);
    `report`: whether `make report` runs it, or the one profile on which it does.
    """

    notebook: str
    fixed: Mapping[str, Value] = field(default_factory=dict)
    vary: Mapping[str, list] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)  # notebooks that must have run before
    priority: int = 0
    report: bool | str = True


def study(root: Path, notebook: str) -> Study:
    """The study of `notebook`; a notebook without a file has an empty one."""
    path = root / "params" / "studies" / f"{notebook}.yaml"
    if not path.exists():
        return Study(notebook=notebook)
    content = read_yaml(path)
    types = {
        "notebook": str,
        "fixed": dict,
        "vary": dict,
        "profiles": dict,
        "after": list,
        "priority": int,
        "report": (bool, str),
    }
    for key, value in content.items():
        if key not in types:
            raise InputError(f"{path}: unknown key '{key}'{nearest(key, types)}")
        if not isinstance(value, types[key]):
            raise InputError(
                f"{path}: {key}: expected {getattr(types[key], '__name__', 'true, false or a profile')}, found {value!r}"
            )
    if content.get("notebook") != notebook:
        raise InputError(
            f"{path}: notebook: expected '{notebook}', found {content.get('notebook')!r}"
        )
    for profile, values in content.get("profiles", {}).items():
        _check_profile_name(root, profile, path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: profiles: {profile}: expected a mapping, found {values!r}")
    for name, levels in content.get("vary", {}).items():
        if not isinstance(levels, list):
            raise InputError(f"{path}: vary: {name}: expected a list, found {levels!r}")
    return Study(**content)


def studies(root: Path) -> list[Study]:
    """All studies in the order of their notebooks' names."""
    return [study(root, path.stem) for path in sorted((root / "params" / "studies").glob("*.yaml"))]


def reported(root: Path, profile: str, data: str, documents: bool = True) -> list[Study]:
    """The studies whose sections a report on `profile` has: those made for this profile, or else every general one.

    A locality set of a benchmark is built from `documents`; without any its notebook is left out.
    """
    every = studies(root)
    own = [study for study in every if study.report == profile]
    general = [
        study
        for study in every
        if study.report is True and (study.notebook != LOCALITY or data == "world" or documents)
    ]
    return own or general


def declared(notebook: Path) -> dict[str, Value]:
    """Names and default values in the cell of `notebook` tagged `parameters`, read without running anything."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        valid = [other.stem for other in notebook.parent.glob("*.ipynb")]
        raise InputError(
            f"{notebook}: no such notebook{nearest(notebook.stem, valid) if valid else ''}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{notebook}: not a Jupyter notebook (expected JSON with 'cells')"
        ) from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", ())]
    if len(tagged) != 1:
        raise InputError(f"{notebook}: expected one cell tagged 'parameters', found {len(tagged)}")
    return _literals("".join(tagged[0]["source"]), notebook)


def _literals(source: str, notebook: Path) -> dict[str, Value]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(
            f"{notebook}: parameters cell, line {error.lineno}: not valid Python"
        ) from None
    values = {}
    for statement in statements:
        place = f"{notebook}: parameters cell, line {statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                pass
            case _:
                raise InputError(f"{place}: expected `name = literal`")
        try:
            value = ast.literal_eval(expression)
        except ValueError:
            raise InputError(f"{place}: {name}: expected a literal value") from None
        if not isinstance(value, Value):
            raise InputError(f"{place}: {name}: expected bool, int, float, str, list or None")
        values[name] = value
    return values


def dataset(root: Path, profile: str, data: str | None = None) -> str:
    """Name of the dataset of a run: `data` if given, otherwise the profile's, otherwise the generated world."""
    chosen = data or read_yaml(_check_profile_name(root, profile, None)).get("data", "world")
    if chosen not in ("world", *DATA_FILES):
        raise InputError(
            f"data: unknown dataset '{chosen}'{nearest(str(chosen), ['world', *DATA_FILES])}"
        )
    return chosen


def merge(
    root: Path, notebook: str, profile: str, given: Mapping[str, Iterable[str]]
) -> dict[str, Value]:
    """All parameters of `notebook` under `profile`, but for `profile` and `data` themselves.

    `given` maps "shared" (names any notebook of the project declares; skipped where this one does not) and "set" (names this
    notebook must declare) to `name=value` texts. Raises InputError naming key, file and the nearest valid name.
    """
    path = root / "notebooks" / f"{notebook}.ipynb"
    defaults = declared(path)
    everywhere = _declared_anywhere(root) | set(defaults)
    profile_path = _check_profile_name(root, profile, None)
    shared = {name: value for name, value in read_yaml(profile_path).items() if name != "data"}
    sources = [(str(profile_path), shared, everywhere)]
    own, own_path = study(root, notebook), str(root / "params" / "studies" / f"{notebook}.yaml")
    for part, values in (
        ("fixed", own.fixed),
        ("vary", own.vary),
        ("profiles", own.profiles.get(profile, {})),
    ):
        sources.append((f"{own_path}: {part}", values, set(defaults)))
    for option, valid in (("shared", everywhere), ("set", set(defaults))):
        sources.append((f"--{option}", _pairs(option, given.get(option, ()), defaults), valid))
    merged = dict(defaults)
    for place, values, valid in sources:
        _check_names(place, values, valid)
        merged |= {
            name: check(place, name, value, defaults[name])
            for name, value in values.items()
            if name in defaults
        }
    return merged


def check(place: str, name: str, value: Value, default: Value) -> Value:
    """`value` as the type of `default` (an int may stand for a float); InputError otherwise."""
    if default is None or (isinstance(value, type(default)) and not _is_stray_bool(value, default)):
        if isinstance(value, list) and default:
            return [check(place, f"{name}[{i}]", item, default[0]) for i, item in enumerate(value)]
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise InputError(
        f"{place}: {name}: expected {type(default).__name__}, found {value!r} ({type(value).__name__})"
    )


def _is_stray_bool(value: Value, default: Value) -> bool:
    return isinstance(value, bool) and not isinstance(default, bool)


def _check_profile_name(root: Path, profile: str, place: Path | None) -> Path:
    path = root / "params" / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        valid = [other.stem for other in path.parent.glob("*.yaml")]
        where = f"{place}: profiles" if place else str(path.parent)
        raise InputError(f"{where}: unknown profile '{profile}'{nearest(profile, valid)}")
    return path


def _declared_anywhere(root: Path) -> set[str]:
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    return {name for notebook in notebooks for name in declared(notebook)}


def _check_names(place: str, values: Mapping[str, Value], valid: set[str]) -> None:
    for name in values:
        if name in RESERVED:
            raise InputError(f"{place}: '{name}' is chosen by --{name}, not here")
        if name not in valid:
            raise InputError(f"{place}: unknown parameter '{name}'{nearest(name, valid)}")


def _pairs(option: str, texts: Iterable[str], defaults: Mapping[str, Value]) -> dict[str, Value]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--{option} {text}: expected name=value")
        pairs[name] = parse(f"--{option}", name, value, defaults.get(name))
    return pairs


def parse(place: str, name: str, text: str, default: Value) -> Value:
    """`text` from the command line as the type of `default`; lists are separated by commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, list):
        items = [item.strip() for item in text.strip("[]").split(",") if item.strip()]
        return [
            parse(place, f"{name}[{i}]", item.strip("'\""), default[0] if default else None)
            for i, item in enumerate(items)
        ]
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError):
        value = text
    return value if isinstance(value, Value) else text
