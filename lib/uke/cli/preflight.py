"""Check what a run asks for before a kernel or a model is started: one line for the first fault."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uke.data import edits, formats
from uke.data.edits import Edit
from uke.errors import InputError, nearest
from uke.locality.card import settings
from uke.methods import recipes
from uke.methods.catalog import configured, find, trials
from uke.methods.method import Method
from uke.methods.recipes import FACTORS, RECIPES
from uke.models.model import load, source
from uke.results.metrics import encoder_folder

LEAST_ONE = ("limit", "max_new_tokens", "entities", "batch_sizes")
ANY_EDIT = Edit(id="any", question="Who?", answer="She.")


def check(home: Path, data: str, parameters: Mapping[str, Any]) -> None:
    """Check numbers, split, methods, levels, the model's directory and every record of a benchmark.

    A name on a hub is looked up only when it is loaded. Raises InputError for the first fault.
    """
    for name in LEAST_ONE:
        value = parameters.get(name, 1)
        numbers = value if isinstance(value, list) else [value]
        if not numbers or min(numbers) < 1:
            given = ", ".join(map(str, numbers)) or "none"
            raise InputError(f"{name}: {given}; expected whole numbers of at least 1")
    if (split := parameters.get("split", "test")) not in edits.SPLITS:
        raise InputError(f"split: unknown split '{split}'{nearest(split, edits.SPLITS)}")
    if data == "world" and "split" in parameters and settings(home, data).retriever != "bm25":
        encoder_folder()
    methods = list(_methods(home, parameters, split))
    if "levels" in parameters:
        recipes.levels(RECIPES["FT-M"], parameters["levels"])
        if without := [method.name for method in methods if not method.factors]:
            fault = "it has no levels of factors; expected a way to fine-tune"
            raise InputError(f"methods: {without[0]}: {fault}")
    file = parameters.get("data_file")
    every = formats.load(data, file) if file else ()
    chosen = [edit for edit in every if edits.in_split(edit.id, split)][: parameters.get("limit")]
    model = parameters.get("model", "embedded")
    if not source(model)[1]:
        return
    modules, tokenizer = load(model, device="meta")
    for method in methods:
        try:
            method.weights(modules)
            method.examples(modules, tokenizer, chosen or [ANY_EDIT])
        except InputError as error:
            raise InputError(f"{method.name}: {error}") from None


def _methods(home: Path, parameters: Mapping[str, Any], split: str) -> Iterator[Method]:
    """The methods of a run at each of its batch sizes; trials are needed where they are tuned."""
    if (names := parameters.get("methods")) is None:
        return
    folder, model = home / "params", parameters.get("model", "embedded")
    for size in parameters.get("batch_sizes", [1]):
        known = configured(folder, model, size)
        methods = [find(name, known, "methods: ") for name in names or known]
        if len({method.name for method in methods}) < len(names):
            raise InputError(f"methods: {', '.join(names)}; expected each method once")
        if "batch_sizes" in parameters and split == "development":
            trials(folder, model, methods)
        yield from methods


def narrow(home: Path, notebook: str, parameters: dict[str, Any], usual: list[str]) -> None:
    """Leave the notebook of a factor its own, of the methods and levels named for a whole run.

    Methods without factors go, and levels of other factors; where nothing is left, the methods stay
    (and are refused by `check`) and the levels are the `usual` ones.
    """
    recipes.levels(RECIPES["FT-M"], parameters["levels"])
    known = configured(home / "params", parameters.get("model", "embedded"))
    names = parameters["methods"]
    factored = [name for name in names if find(name, known, "methods: ").factors]
    own = [name for name in FACTORS if name in notebook] or FACTORS
    valid = {level for name in own for level in FACTORS[name].levels}
    levels = [name for name in parameters["levels"] if name in valid]
    parameters |= {"methods": factored or names, "levels": levels or usual}
