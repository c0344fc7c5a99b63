"""Check what a run asks for before a kernel or a model is started: one line for the first fault."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uke.data import edits, formats
from uke.data.edits import Edit
from uke.errors import InputError, nearest
from uke.locality.card import settings
from uke.methods.catalog import configured, find, trials
from uke.methods.method import Method
from uke.methods.recipes import FACTORS
from uke.project import EMBEDDED
from uke.results.metrics import encoder_folder

LEAST_ONE = ("limit", "max_new_tokens", "entities", "batch_sizes")


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
    methods = _methods(home, parameters, split)
    _check_levels(parameters, methods)
    model = parameters.get("model", "embedded")
    folder = EMBEDDED if model == "embedded" else Path(model).expanduser()
    on_disk = folder.is_dir() or model.startswith((".", "/", "~"))
    if on_disk:
        _check_depth(model, folder, methods)
    file = parameters.get("data_file")
    every = formats.load(data, file) if file else ()
    chosen = [edit for edit in every if edits.in_split(edit.id, split)]
    if on_disk and methods:
        _check_prompts(folder, chosen[: parameters.get("limit")], methods)


def narrow(home: Path, notebook: str, parameters: dict[str, Any], usual: Mapping) -> None:
    """Leave the notebook of a factor its own, of the methods and levels named for a whole run.

    Methods without factors go, and levels of other factors; where nothing is left, the methods stay
    (and are refused by `check`) and the levels are the `usual` ones.
    """
    known = configured(home / "params", parameters.get("model", "embedded"))
    names = parameters["methods"]
    factored = [name for name in names if find(name, known, "methods: ").factors]
    _check_levels(parameters, ())
    own = [factor.levels for name, factor in FACTORS.items() if name in notebook] or [
        factor.levels for factor in FACTORS.values()
    ]
    levels = [name for name in parameters["levels"] if any(name in each for each in own)]
    parameters |= {"methods": factored or names, "levels": levels or usual["levels"]}


def _methods(home: Path, parameters: Mapping[str, Any], split: str) -> list[Method]:
    """The methods of a run at each of its batch sizes; trials are needed where they are tuned."""
    if (names := parameters.get("methods")) is None:
        return []
    folder, model = home / "params", parameters.get("model", "embedded")
    found = []
    for size in parameters.get("batch_sizes", [1]):
        known = configured(folder, model, size)
        methods = [find(name, known, "methods: ") for name in names or known]
        if len({method.name for method in methods}) < len(names):
            raise InputError(f"methods: {', '.join(names)}; expected each method once")
        found += methods
    if "batch_sizes" in parameters and split == "development":
        trials(folder, model, methods)
    return found


def _check_levels(parameters: Mapping[str, Any], methods: Sequence[Method]) -> None:
    if "levels" not in parameters:
        return
    if without := [method.name for method in methods if not method.factors]:
        fault = "it has no levels of factors; expected a way to fine-tune"
        raise InputError(f"methods: {without[0]}: {fault}")
    known = list(dict.fromkeys(level for factor in FACTORS.values() for level in factor.levels))
    for level in parameters["levels"]:
        if level not in known:
            raise InputError(f"levels: unknown level '{level}'{nearest(level, known)}")


def _check_depth(model: str, folder: Path, methods: Sequence[Method]) -> None:
    """The directory is a model's, and it has every block that a method writes to."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"model: {model}: no such directory")
    if not path.is_file():
        raise InputError(f"model: {folder}: no config.json; expected a saved model's directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        depth = config.get("text_config", config)["num_hidden_layers"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a language model's configuration ({fault})") from None
    for method in methods:
        layers = getattr(method, "layers", ())  # a name for all or half of them is never too high
        layers = layers if isinstance(layers, tuple) else ()
        if beyond := [layer for layer in layers if type(layer) is int and layer >= depth]:
            blocks = f"the model has blocks 0 to {depth - 1}"
            raise InputError(f"{method.name}: layers: {beyond[0]} is out of range; {blocks}")


def _check_prompts(folder: Path, chosen: Sequence[Edit], methods: Sequence[Method]) -> None:
    """The tokenizer has the template that methods use, and every edit fits into the context."""
    from transformers import AutoConfig, AutoTokenizer

    from uke.models.prompts import example

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        fault = str(error).splitlines()[0]
        raise InputError(
            f"model: {folder}: no readable tokenizer and configuration ({fault})"
        ) from None
    longest = getattr(config, "max_position_embeddings", None) or 10**9
    for method in methods:
        if method.chat_template and not tokenizer.chat_template:
            fault = f"no chat template, and {method.name} trains through it"
            raise InputError(f"model: {folder}: {fault} (chat_template: false trains without)")
        for edit in chosen:
            text = (edit.question, edit.answer, method.chat_template, method.end_of_turn)
            length = len(example(tokenizer, *text).ids)
            if length > longest:
                fault = f"question and answer are {length} tokens"
                raise InputError(f"edit '{edit.id}': {fault}; the model's context holds {longest}")
