"""Read methods with their settings from `params/methods`, and write back what tuning chose.

One YAML file a method:

    base: FT-M            # the published method; fields that differ from it stand beside this key
    tuned: {embedded: {8: {learning_rate: 2e-3}}}  # by model and batch size, chosen by tuning
    trials:                                        # by model, what tuning tries
      embedded: [{learning_rate: 5e-4}]            # settings, or ranges to draw them from
      smollm2: {learning_rate: {low: 1e-4, high: 1e-2}, layers: [[0.4], [0.66]]}
    levels: {embedded: {layers: {all: {learning_rate: 1e-3, average: 0.72}}}}
    level_rates: {embedded: [5e-4, 1e-3]}          # what every level of a factor is tried with
    candidate_trials: {embedded: [{steps: 100}]}   # trials as a candidate for FT-UKE

From ranges as many settings are drawn for every method, the one in its file first, by a generator
seeded with SEED, model and method: numbers even in their logarithm, with two significant digits.

`levels` has, by model, factor and level, the tuned changes and their scores on development edits.
Published settings are for models of 7 to 8 billion parameters; a model that a file does not
name uses them.
"""

import math
import os
import random
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, Tag, model_validator

from uke.errors import InputError, located, nearest, typed
from uke.files import read_yaml, write_atomic
from uke.methods.method import Method
from uke.methods.ranges import Count, Positive
from uke.methods.recipes import BASELINES, FACTORS, RECIPES, SINGLE_BLOCKS, Recipe, candidate, vary
from uke.project import Paths
from uke.project import number_key as key
from uke.results.compare import nearest_first

Named = TypeVar("Named")
Changes = dict[str, Any]  # fields of a method with the values that they get
SEED, SETTINGS, FURTHER = 2024, 12, 4  # settings drawn by default, and beyond an end of a range

# Published settings, by published name.
PUBLISHED: Mapping[str, Method] = RECIPES | {one.name: one for one in BASELINES.values()}

# Every method by name: a method of your own is one line here.
METHODS: dict[str, Method] = dict(PUBLISHED)


def find(name: Any, among: Mapping[str, Named] = PUBLISHED, where: str = "") -> Named:
    """Return the entry of that name or key; InputError naming the nearest one."""
    by_key = {key(known): known for known in among}
    if not isinstance(name, str) or key(name) not in by_key:
        raise InputError(f"{where}unknown method '{name}'{nearest(str(name), among)}")
    return among[by_key[key(name)]]


class Range(BaseModel):
    """What tuning draws for a field: a number from `low` to `high`, or one `among` a list.

    `extend` false: its ends are not passed, as of steps, of which more cost more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Positive | None = None
    high: Positive | None = None
    among: list[Any] | None = None
    extend: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        return {"among": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if not (self.among or (self.low and self.high and self.low < self.high)):
            raise ValueError("expected low and high with low < high, or a list of values")
        return self

    def draw(self, generator: random.Random, whole: bool) -> Any:
        """Return a value, of a number one that is even in its logarithm."""
        if self.among:
            return generator.choice(self.among)
        return _rounded(self.low * (self.high / self.low) ** generator.random(), whole)

    def edge(self, value: Any) -> int:
        """Return -1 or 1 for a number in or below the lowest tenth, or in or above the highest."""
        if self.among:
            return 0
        place = math.log(value / self.low) / math.log(self.high / self.low)
        return -1 if place <= 0.1 else int(place >= 0.9)

    def beyond(self, side: int, whole: bool) -> tuple[list[float], "Range"]:
        """Return numbers up to ten times beyond an end, and the range extended so far."""
        end = self.low if side < 0 else self.high
        values = [_rounded(end * 10 ** (side * n / FURTHER), whole) for n in range(1, FURTHER + 1)]
        return values, self.model_copy(update={"low" if side < 0 else "high": end * 10.0**side})


def _rounded(value: float, whole: bool) -> float:
    """Round to two significant digits, and to a whole number where the field has one."""
    value = float(f"{value:.2g}")
    return round(value) if whole else value


Trial = Annotated[
    Annotated[list[Changes], Tag("settings")] | Annotated[dict[str, Range], Tag("ranges")],
    Discriminator(lambda value: "settings" if isinstance(value, list) else "ranges"),
]


class Level(BaseModel):
    """The changes that were best at a level of a factor, and their scores."""

    model_config = ConfigDict(frozen=True, extra="allow")

    average: float | None = Field(default=None, strict=True)
    balance: float | None = Field(default=None, strict=True)


class MethodFile(BaseModel):
    """A file of `params/methods` as written; differing fields of the method are extra ones."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base: str | None = None
    tuned: dict[str, dict[Count, Changes]] = {}
    trials: dict[str, Trial] = {}
    levels: dict[str, dict[str, dict[str, Level]]] = {}
    level_rates: dict[str, list[Positive]] = {}
    candidate_trials: dict[str, Trial] = {}


class Settings(NamedTuple):
    """A method as its file describes it, and all that the file says of it by model."""

    path: Path
    file: MethodFile
    method: Method


def settings(path: Path) -> Settings:
    """Read one file; InputError, in one line with the place, for anything in it that is no setting.

    Without a `base` it stands on the defaults of `Recipe` and is called as the file.
    """
    stamp = path.stat() if path.is_file() else None
    return _settings(path, stamp and (stamp.st_mtime_ns, stamp.st_ino, stamp.st_size))


@lru_cache(maxsize=256)
def _settings(path: Path, stamp: tuple | None) -> Settings:
    written = read_yaml(path)
    with located(f"{path}"):
        file = MethodFile(**written)
    base = Recipe(name=path.stem)
    if file.base is not None:
        base = find(file.base, where=f"{path}: field base: ")
    return Settings(path, file, changed(base, file.model_extra, f"{path}", MethodFile.model_fields))


def changed(method: Method, changes: Changes, where: str, besides: Iterable[str] = ()) -> Method:
    """Return the method with these fields changed; InputError that begins with `where`."""
    own = type(method)
    if unknown := [name for name in changes if name not in own.model_fields]:
        hint = nearest(unknown[0], {*own.model_fields, *besides})
        raise InputError(f"{where}, field '{unknown[0]}': no such field{hint}")
    try:
        return own(**{**method.model_dump(), **changes})
    except InputError as error:
        raise InputError(f"{where}{str(error).removeprefix(own.__name__)}") from None


def changes(method: Method, base: Method) -> Changes:
    """Return the fields that differ from the base, as YAML holds them, in the class's own order."""
    own, other = method.model_dump(mode="json", exclude={"name"}), base.model_dump(mode="json")
    order = dict.fromkeys([*type(method).__annotations__, *own])
    return {field: own[field] for field in order if field in own and own[field] != other[field]}


def differences(method: Method, base: Method) -> str:
    """Return the same in one line, `as published` where there is none."""
    parts = [f"{field} {_plain(value)}" for field, value in changes(method, base).items()]
    return ", ".join(parts) or "as published"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def catalog(folder: Path) -> dict[str, Settings]:
    """Return the settings of every method of `folder`/methods, by name."""
    every = map(settings, sorted(Path(folder).glob("methods/*.yaml")))
    return {one.method.name: one for one in every}


def own_name(model: str) -> str:
    """Return a model's name in the files; what is chosen must not depend on the model's world.

    The directory that `make model` makes is called `smollm2`.
    """
    path, made = Path(model).expanduser(), Paths("embedded").home / "results" / "models" / "smollm2"
    if (path / "training.json").is_file():
        return "embedded"
    return made.name if path.is_dir() and path.resolve() == made.resolve() else model


@typed
def configured(
    folder: str | Path, model: str | Path, batch_size: Count = 1, tuned: bool = True
) -> dict[str, Method]:
    """Return every method by name, as tuned for the model and a batch size.

        configured(Path("params"), "embedded", batch_size=8)["FT-M"].learning_rate    # 2e-3

    Of the batch sizes that a method was tuned at the nearest counts (by ratio). Published settings
    stand where nothing is tuned, or `tuned` is false, and methods of your own as they are.
    """
    found = {name: own for name, own in METHODS.items() if name not in PUBLISHED}
    for name, (path, file, method) in catalog(folder).items():
        found[name] = method
        by_size = file.tuned.get(own_name(model), {}) if tuned else {}
        for size in nearest_first(by_size, batch_size)[:1]:
            found[name] = changed(method, by_size[size], f"{path}: tuned, {model}, {size}")
    return found


def at_level(folder: Path, model: str, method_name: str, factor: str, level: str) -> Recipe:
    """Return the method at a level of a factor, with the rate that was tuned for this level.

    Rates by level belong to the untuned settings. Where the file lacks the level, the method as
    tuned for single edits is varied. InputError for an unknown method, factor or level.
    """
    one = find(method_name, catalog(folder))
    own = one.file.levels.get(own_name(model), {}).get(factor, {}).get(level)
    method = one.method if own else configured(folder, model)[one.method.name]
    if not method.factors:
        raise InputError(f"{method.name}: it has no levels; expected a way to fine-tune")
    changes = own.model_extra if own else {}
    return changed(vary(method, {factor: level}), changes, f"{one.path}: {factor}, {level}")


def best_single(folder: Path, model: str, method_name: str, among: Sequence[str]) -> str:
    """Return, of these levels, the single block with the best score on development edits.

    Where the method's file has none it is the published block.
    """
    own = find(method_name, catalog(folder)).file.levels.get(own_name(model), {})
    scores = {level: one.balance or one.average for level, one in own.get("layers", {}).items()}
    blocks, published = FACTORS["layers"].levels, RECIPES["FT-M"].layers
    singles = [level for level in SINGLE_BLOCKS if level in among]
    return max(singles, key=lambda one: (scores.get(one) or 0.0, blocks[one] == published))


def _tries(
    folder: Path, model: str, methods: Iterable[Method]
) -> dict[str, tuple[Method, str, list[Changes] | dict[str, Range]]]:
    """Return, by name, what each of these methods is tried from, where that stands, and how."""
    every, name, found = catalog(folder), own_name(model), {}
    families = {
        candidate(one.method, {}).name: one for one in every.values() if one.file.candidate_trials
    }
    for method in methods:
        path, file, base = find(method.name, every | families)
        block, own = "trials", file.trials
        if method.name in families:
            base, block, own = method, "candidate_trials", file.candidate_trials
        found[method.name] = base, f"{path}: {block}", own.get(name, [])
    return found


def ranges(folder: Path, model: str, methods: Iterable[Method]) -> dict[str, dict[str, Range]]:
    """Return, by method, the ranges that its trials are drawn from; none where they are listed."""
    found = _tries(folder, model, methods)
    return {name: own if isinstance(own, dict) else {} for name, (_, _, own) in found.items()}


def trials(
    folder: Path, model: str, methods: Iterable[Method], settings: int = 0
) -> dict[str, list[Method]]:
    """Return, for each of these methods by name, the variants that tuning tries.

        trials(Path("params"), "smollm2", [find("FT-M")], settings=12)

    Of listed settings the first so many (0: all), from ranges so many draws (0: SETTINGS). Budgets
    are equal: InputError where there are none, where one method has more than another, and for
    ranges that give too few.
    """
    found = {}
    for name, (base, where, own) in _tries(folder, model, methods).items():
        if isinstance(own, dict):
            seed = f"{SEED} {own_name(model)} {name}"
            found[name] = _drawn(base, own, settings or SETTINGS, random.Random(seed), where)
            continue
        tried = [changed(base, each, f"{where}, {number}") for number, each in enumerate(own, 1)]
        distinct = {trial.fingerprint: trial for trial in tried}
        found[name] = list(distinct.values())[: settings or None]
    return _equal(found, f"{folder}/methods: different trials for model '{model}'")


def _drawn(
    base: Method, own: Mapping[str, Range], count: int, generator: random.Random, where: str
) -> list[Method]:
    """Return different settings, the base first; InputError where the ranges give too few."""
    found = {base.fingerprint: base}
    for _ in range(50 * count):
        if len(found) == count:
            return list(found.values())
        drawn = {name: one.draw(generator, whole(base, name)) for name, one in sorted(own.items())}
        one = changed(base, drawn, where)
        found.setdefault(one.fingerprint, one)
    raise InputError(f"{where}: the ranges give {len(found)} settings; expected {count}")


def whole(method: Method, field: str) -> bool:
    """Return whether a field holds whole numbers."""
    return type(getattr(method, field, None)) is int


def _equal(found: dict[str, list], what: str) -> dict[str, list]:
    """Return it; InputError where one method has nothing to try, or more than another."""
    counts = {name: len(own) for name, own in found.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InputError(f"{what}: {listed}; expected as many for every method, at least one")
    return found


def tunable(folder: Path, model: str) -> list[str]:
    """Return the names of the methods that have trials for the model."""
    return [name for name, one in catalog(folder).items() if own_name(model) in one.file.trials]


def rates_by_level(folder: Path, model: str, families: Iterable[Recipe]) -> dict[str, list[float]]:
    """Return, by family, the learning rates that every level of a factor is tried with.

    InputError where budgets are not equal, now or for the candidates for FT-UKE.
    """
    families, every = list(families), catalog(folder)
    trials(folder, model, [candidate(recipe, {}) for recipe in families])
    files = {recipe.name: find(recipe.name, every).file for recipe in families}
    found = {name: list(file.level_rates.get(own_name(model), [])) for name, file in files.items()}
    return _equal(found, f"{folder}/methods: level_rates for model '{model}'")


def tune(folder: Path, model: str, batch_size: int, chosen: Mapping[str, Changes]) -> None:
    """Write the changes chosen for methods at a batch size into their files."""
    write(folder, model, "tuned", {name: {batch_size: own} for name, own in chosen.items()})


def write(folder: Path, model: str, block: str, new: Mapping[str, Mapping]) -> None:
    """Update the model's part of a block of methods' files, and leave the rest as written."""
    if (named := own_name(model)) == "embedded" != model:
        world = f"{model}: the model of another world has the settings of the embedded one"
        raise InputError(f"{world}; expected model embedded")
    # The key's line and the indented ones below it.
    pattern = re.compile(rf"^{block}:.*\n(?:[ \t].*\n|\n(?=[ \t]))*", re.MULTILINE)
    # On this machine two notebooks may tune one model at once.
    with FileLock(Path(tempfile.gettempdir()) / f"uke-methods-{os.getuid()}.lock"):
        for name, own in new.items():
            path = find(name, catalog(folder)).path
            held = read_yaml(path).get(block, {})
            held[named] = dict(sorted({**held.get(named, {}), **own}.items()))
            form = {"sort_keys": False, "default_flow_style": None, "width": 100}
            dumped = yaml.safe_dump({block: held}, **form)
            text = path.read_text(encoding="utf-8").rstrip() + "\n"
            replaced, count = pattern.subn(lambda _, new=dumped: new, text, count=1)
            write_atomic(path, replaced if count else f"{text}\n{dumped}")
