"""Methods by name: recipes and peers, the files that change them, and what tuning chose for a model and a batch size."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from filelock import FileLock
from pydantic import ValidationError

from uke.errors import InputError, nearest
from uke.files import write_yaml
from uke.methods.method import Method
from uke.methods.recipes import BASELINES, FACTORS, RECIPES, SINGLES, Recipe, candidate, vary

Named = TypeVar("Named")

# Published settings, by published name.
PUBLISHED: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (*RECIPES.values(), *BASELINES.values())}
)

# Every method by name: a method of your own is one line here.
METHODS: dict[str, Method] = dict(PUBLISHED)


def key(name: str) -> str:
    """The name as a part of a number's key and of a file's name: `AnyEdit (MEMIT)` is `anyedit_memit`, `AnyEdit++` `anyedit_pp`."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower().replace("++", " pp")).strip("_")


def find(name: Any, among: Mapping[str, Named] = PUBLISHED, where: str = "") -> Named:
    """The method of that name, or of that key, among those given; InputError naming the nearest one."""
    by_key = {key(known): known for known in among}
    if not isinstance(name, str) or key(name) not in by_key:
        raise InputError(f"{where}unknown method '{name}'{nearest(str(name), among)}")
    return among[by_key[key(name)]]


def load(path: str | Path) -> Method:
    """A method from a YAML file that holds only its differences from the published one that its key `base` names.

    Without a base the file stands on the defaults of `Recipe`. It is called as its base, or else as its file, unless it
    has a `name`. InputError for a missing file, a misspelt key, a wrong type or an unknown base.
    """
    written = _read(Path(path))
    base = written.pop("base", None)
    method = (
        Recipe(name=Path(path).stem) if base is None else find(base, where=f"{path}: field base: ")
    )
    return _changed(method, written, str(path))


def _changed(method: Method, written: Any, where: str) -> Method:
    """The method with these written, checked; InputError that begins with `where`."""
    fields = type(method).model_fields
    if not isinstance(written, Mapping):
        raise InputError(
            f"{where}: expected fields of {method.name} and their values, found {written!r}"
        )
    if unknown := [name for name in written if name not in fields]:
        raise InputError(f"{where}: unknown field '{unknown[0]}'{nearest(str(unknown[0]), fields)}")
    try:
        return type(method)(**{**method.model_dump(), **written})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise InputError(
            f"{where}: field {fault['loc'][0]}: {fault['msg']} (found {fault['input']!r})"
        ) from None


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict | None):
        raise InputError(f"{path}: a mapping was expected, found {type(content).__name__}")
    return dict(content or {})


def changes(method: Method, base: Method) -> dict[str, Any]:
    """What the method chooses otherwise than its base, by field, as YAML holds it."""
    own, other = method.model_dump(mode="json", exclude={"name"}), base.model_dump(mode="json")
    return {field: value for field, value in own.items() if value != other[field]}


def differences(method: Method, base: Method) -> str:
    """The same in one line, `as published` where there is none."""
    return (
        ", ".join(f"{field} {_plain(value)}" for field, value in changes(method, base).items())
        or "as published"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def tuned_file(folder: Path, model: str) -> Path:
    """Where the settings chosen for a model are kept, by batch size."""
    return folder / "tuned" / f"{_file_name(model)}.yaml"


def _file_name(model: str) -> str:
    """A model of another world has the settings of the embedded one: what is chosen must not depend on the world."""
    return "embedded" if _of_a_world(model) else re.sub("[^A-Za-z0-9.]+", "-", model).strip("-")


def _of_a_world(model: str) -> bool:
    return (Path(model).expanduser() / "training.json").is_file()


def configured(
    folder: Path, model: str, batch_size: int = 1, tuned: bool = True
) -> dict[str, Method]:
    """Every method of `folder`/methods by name, with what the model's tuned file changes in it, if there is one.

    Published settings are for models of 7 to 8 billion parameters; a tuned file holds what development edits chose for
    another model at some batch sizes, of which each method has the one nearest to `batch_size` (by ratio; the smaller of two).
    InputError for a bad file, or a tuned method that does not exist.
    """
    found = {method.name: method for method in map(load, sorted(folder.glob("methods/*.yaml")))}
    path = tuned_file(folder, model)
    held = tuned_at(path) if tuned and path.is_file() else {}
    chosen: dict[str, Method] = {}
    for size in nearest_first(held, batch_size):
        for name, own in held[size].items():
            method = find(name, found, f"{path}: {size}: ")
            chosen.setdefault(method.name, _changed(method, own, f"{path}: {size}: {method.name}"))
    own = {name: method for name, method in METHODS.items() if name not in PUBLISHED}
    return own | found | chosen


def nearest_first(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Batch sizes by their ratio to one, the nearest first; of two as far from it the smaller."""
    return sorted(sizes, key=lambda size: (max(size / batch_size, batch_size / size), size))


def tuned_at(path: Path) -> dict[int, dict[str, Any]]:
    """What a tuned file holds: by batch size, the changes of each method."""
    held = _read(path)
    for size, methods in held.items():
        if type(size) is not int or size < 1 or not isinstance(methods, dict):
            raise InputError(
                f"{path}: {size!r}: expected a batch size, and under it the methods with their fields"
            )
    return held


def tune(
    folder: Path, model: str, batch_size: int, chosen: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write what was chosen for some methods at a batch size to the model's tuned file, beside what it holds of others."""
    path = tuned_file(folder, model)
    with _alone(path, model):
        held = tuned_at(path) if path.is_file() else {}
        held[batch_size] = {
            **held.get(batch_size, {}),
            **{name: dict(own) for name, own in chosen.items()},
        }
        return _write(
            path,
            "By batch size; chosen on development edits by `make tune` (notebooks/tuning.ipynb and tuning_levels.ipynb, their rows are committed beside the figures).",
            held,
        )


@contextmanager
def _alone(path: Path, model: str) -> Iterator[None]:
    """Keep others on this machine from changing the file meanwhile: two notebooks may tune one model at once."""
    if _of_a_world(model):
        raise InputError(
            f"{model}: the model of another world has the settings of the embedded one; expected model embedded"
        )
    locks = Path(tempfile.gettempdir()) / f"uke-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.lock"):
        yield


def _write(path: Path, said: str, held: Mapping) -> Path:
    return write_yaml(path, dict(sorted(held.items())), said)


def levels_file(folder: Path, model: str) -> Path:
    """Where the rates chosen for a model at each level of each factor are kept."""
    return folder / "levels" / f"{_file_name(model)}.yaml"


def levels_at(folder: Path, model: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """What the model's levels file holds: by method, factor and level its own changes, and its `average` on development edits.

    Nothing where there is no file. InputError for an unknown method, factor, level or field, or a wrong value.
    """
    path = levels_file(folder, model)
    found: dict[str, Any] = {}
    for name, factors in (_read(path) if path.is_file() else {}).items():
        method = _recipe(name, PUBLISHED, f"{path}: ")
        for factor, levels in _mapping(factors, f"{path}: {name}").items():
            for level, own in _mapping(levels, f"{path}: {name}, {factor}").items():
                place = f"{path}: {name}, {factor}, {level}"
                changed = {
                    field: value
                    for field, value in _mapping(own, place).items()
                    if field != "average"
                }
                if not isinstance(own.get("average", 0.0), (int, float)):
                    raise InputError(
                        f"{place}: average: expected a number, found {own['average']!r}"
                    )
                _changed(_varied(method, factor, level, f"{path}: {name}: "), changed, place)
                found.setdefault(method.name, {}).setdefault(factor, {})[level] = own
    return found


def _mapping(value: Any, place: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise InputError(f"{place}: a mapping was expected, found {value!r}")
    return value


def _recipe(name: str, among: Mapping[str, Method], where: str = "") -> Recipe:
    method = find(name, among, where)
    if not method.factors:
        raise InputError(f"{where}{method.name}: it has no levels; expected a way to fine-tune")
    return method


def _varied(method: Recipe, factor: str, level: str, where: str) -> Recipe:
    try:
        return vary(method, factor, level)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def at_level(folder: Path, model: str, method_name: str, factor: str, level: str) -> Recipe:
    """The method at a level of a factor, with what the model's levels file chose for it there, its rate for one.

    The rates of the file belong to the settings that the method has before it is tuned; where the file lacks the level, it is
    the method as tuned for single edits that is varied. InputError for an unknown method, factor or level, or a bad file.
    """
    own = levels_at(folder, model).get(find(method_name).name, {}).get(factor, {}).get(level)
    method = _recipe(method_name, configured(folder, model, tuned=own is None))
    changed = {field: value for field, value in (own or {}).items() if field != "average"}
    return _changed(
        vary(method, factor, level),
        changed,
        f"{levels_file(folder, model)}: {method.name}, {factor}, {level}",
    )


def best_single(folder: Path, model: str, method_name: str, among: Sequence[str]) -> str:
    """Of the levels of `layers` given, the single block that was best on development edits, by the model's levels file.

    Where the file does not say: the published block, or else the last single one. InputError where none trains a single block.
    """
    singles = [level for level in SINGLES if level in among]
    if not singles:
        raise InputError(
            f"layers: {', '.join(among)}: none trains a single block; expected one of {', '.join(SINGLES)}"
        )
    held = levels_at(folder, model).get(find(method_name).name, {}).get("layers", {})
    averages = {
        level: held[level]["average"] for level in singles if "average" in held.get(level, {})
    }
    published = [
        level
        for level in singles
        if FACTORS["layers"].levels[level]["layers"] == RECIPES["FT-M"].layers[0]
    ]
    return max(averages, key=averages.__getitem__) if averages else (published or singles)[-1]


def keep_levels(folder: Path, model: str, chosen: Mapping[str, Mapping]) -> Path:
    """Write what was chosen at each level, by method and factor, to the model's levels file, in place of what it holds of these methods."""
    path = levels_file(folder, model)
    with _alone(path, model):
        held = {**levels_at(folder, model), **chosen}
        return _write(
            path,
            "By method, factor and level: the rate chosen on development edits, and its average there (notebooks/tuning_levels.ipynb).",
            held,
        )


def trials(folder: Path, model: str, methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Of each method by name, the variants that tuning tries, from `folder`/trials/<model>.yaml.

    InputError where the file lacks a method or tries one more often than another: budgets are equal.
    """
    path = folder / "trials" / f"{_file_name(model)}.yaml"
    spaces = _read(path)
    found = {}
    for method in methods:
        space = find(method.name, spaces, f"{path}: ")
        if not isinstance(space, list) or not space:
            raise InputError(
                f"{path}: {method.name}: expected a list of trials, found {type(space).__name__}"
            )
        found[method.name] = [
            _changed(method, own, f"{path}: {method.name}, trial {number}")
            for number, own in enumerate(space, 1)
        ]
    for name, tried in found.items():
        if (
            not len({one.fingerprint for one in tried})
            == len(tried)
            == len(next(iter(found.values())))
        ):
            raise InputError(
                f"{path}: {name}: {len(tried)} trials, {next(iter(found))} has {len(next(iter(found.values())))}; expected different ones, as many for every method"
            )
    return found


def rates_by_level(folder: Path, model: str, families: Iterable[Recipe]) -> dict[str, list[float]]:
    """Of each family by name, the rates that every level of a factor gets, from `<name> by level` of the trials file.

    InputError as `trials` has, and where it lacks the trials of the candidate for FT-UKE that the family may become.
    """
    families = list(families)
    found = trials(
        folder,
        model,
        [recipe.model_copy(update={"name": f"{recipe.name} by level"}) for recipe in families],
    )
    trials(folder, model, [candidate(recipe, {}) for recipe in families])
    return {
        recipe.name: [one.learning_rate for one in found[f"{recipe.name} by level"]]
        for recipe in families
    }
