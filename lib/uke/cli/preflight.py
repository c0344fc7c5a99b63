"""Check what a run asks for before a kernel or a model is started: one line for the first fault."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from uke.data import edits, formats
from uke.data.edits import Edit
from uke.errors import InputError, about, nearest
from uke.locality.card import settings
from uke.methods.catalog import configured, find, trials, tunable
from uke.methods.locate_edit import covariance
from uke.methods.method import Method
from uke.methods.recipes import RECIPES, levels
from uke.models.model import load, source
from uke.results.metrics import encoder_folder
from uke.study.study import reserved_texts
from uke.world.files import world_of


def check(home: Path, data: str, parameters: Mapping[str, Any]) -> None:
    """Check numbers, split, methods, levels, the model's directory and every record of a benchmark.

    A name on a hub is looked up only when it is loaded. Raises InputError for the first fault.
    """
    for name in ("limit", "entities", "batch_sizes", "rounds", "lengths"):
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
        levels(RECIPES["FT-M"], parameters["levels"])
        if not any(method.factors for method in methods):
            fault = "it has no levels of factors; expected a way to fine-tune"
            raise InputError(f"methods: {methods[0].name}: {fault}")
    file = parameters.get("data_file")
    every = formats.load(data, file) if file else ()
    chosen = [edit for edit in every if edits.in_split(edit.id, split)][: parameters.get("limit")]
    model = parameters.get("model", "embedded")
    if not source(model)[1]:
        return
    modules, tokenizer = load(model, device="meta")
    if any(method.measured is not None for method in methods):
        _check_corpus(model)
    chosen = chosen or [Edit(id="any", question="Who?", answer="She.")]
    for method in methods:
        with about(method.name):
            method.weights(modules)
            method.examples(modules, tokenizer, chosen)


@cache
def _check_corpus(model: str) -> None:
    """Check that second moments of a model of the real world are there, or texts to make them."""
    if world_of(source(model)[0]) is None and not reserved_texts():
        covariance.preservation(load(model)[0])


def _methods(home: Path, parameters: Mapping[str, Any], split: str) -> Iterator[Method]:
    """The methods of a run at each of its batch sizes; trials are needed where they are tuned."""
    if (names := parameters.get("methods")) is None:
        return
    folder, model = home / "params", parameters.get("model", "embedded")
    for size in parameters.get("batch_sizes", [1]):
        known = configured(folder, model, size)
        searched = "batch_sizes" in parameters and split == "development"
        chosen = names or (tunable(folder, model) if searched else known)
        methods = [find(name, known, "methods: ") for name in chosen]
        if len({method.name for method in methods}) < len(names):
            raise InputError(f"methods: {', '.join(names)}; expected each method once")
        if searched:
            trials(folder, model, methods, parameters.get("settings", 0))
        yield from methods
