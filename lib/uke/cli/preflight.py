"""Checks what a run is asked for before a kernel or a model is started: one line for the first thing that is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uke.data import edits
from uke.errors import InputError, nearest
from uke.locality import card
from uke.methods.catalog import (
    Method,
    configured,
    find,
    levels_at,
    rates_by_level,
    trials,
    tuned_file,
)
from uke.project import EMBEDDED
from uke.results.similarity import encoder_folder


def check(root: Path, data: str, parameters: Mapping[str, Any]) -> None:
    """Numbers, split, methods, model directory, the encoder that documents are ranked with, and every record of a benchmark's file.

    InputError for the first fault.

    `root` is the project's folder. A name on a hub is looked up only when it is loaded.
    """
    for name in ("limit", "max_new_tokens", "entities"):
        if parameters.get(name, 1) < 1:
            raise InputError(f"{name} is {parameters[name]}; expected a whole number of at least 1")
    sizes = parameters.get("batch_sizes", [1])
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"batch_sizes: {', '.join(map(str, sizes)) or 'none'}; expected whole numbers of at least 1"
        )
    if (split := parameters.get("split", "test")) not in edits.SPLITS:
        raise InputError(f"split: unknown split '{split}'{nearest(split, edits.SPLITS)}")
    if data == "world" and "split" in parameters and card.settings(root, data).retriever != "bm25":
        encoder_folder()
    if "reading" in parameters:
        for name in ("unkebench", "akew-mquake"):
            card.of_files(name, "", [], [])
    model = parameters.get("model", "embedded")
    chosen = [
        method for size in sizes for method in methods(root, model, parameters.get("methods"), size)
    ]
    if parameters.get("batch_sizes") and split == "development":
        trials(root / "params", model, methods(root, model, parameters.get("methods"), 1))
    check_levels(root, model, parameters, chosen)
    folder = EMBEDDED if model == "embedded" else Path(model).expanduser()
    if folder.is_dir() or model.startswith((".", "/", "~")):
        check_depth(root, model, folder, chosen)
    every = edits.load(data, parameters["data_file"]) if parameters.get("data_file") else ()
    asked = [edit for edit in every if edits.in_split(edit.id, split)][: parameters.get("limit")]
    if folder.is_dir() and chosen and (asked or model != "embedded"):
        check_prompts(folder, asked, chosen)


def check_levels(
    root: Path, model: str, parameters: Mapping[str, Any], chosen: list[Method]
) -> None:
    """Levels of factors are asked for in a number there can be, on ways to fine-tune, with rates to try where they are tuned."""
    if "levels" not in parameters:
        return
    for name, least in (("levels", 2), ("rates", 1)):
        if 0 != parameters.get(name, 0) < least:
            raise InputError(
                f"{name} is {parameters[name]}; expected 0 for all, or at least {least}"
            )
    if peers := [method.name for method in chosen if not method.factors]:
        raise InputError(
            f"methods: {peers[0]}: it has no levels of factors; expected a way to fine-tune"
        )
    levels_at(root / "params", model)
    if "rates" in parameters:
        rates_by_level(root / "params", model, {method.name: method for method in chosen}.values())


def with_levels(root: Path, parameters: Mapping[str, Any]) -> list[str]:
    """Of methods named for every notebook of a run those that have levels of factors; all of them where none has."""
    known = configured(root / "params", parameters.get("model", "embedded"))
    return [
        name for name in parameters["methods"] if find(name, known, "methods: ").factors
    ] or parameters["methods"]


def methods(root: Path, model: str, names: list[str] | None, batch_size: int) -> list[Method]:
    """The methods that `names` names, as tuned for batches of this size; none where a notebook has no methods."""
    known = configured(root / "params", model, batch_size)
    if names is None:
        return []
    found = [find(name, known, "methods: ") for name in names]
    if not names or len({method.name for method in found}) < len(names):
        raise InputError(
            f"methods: {', '.join(names) or 'none'}; expected each method once, and at least one"
        )
    return found


def check_depth(root: Path, model: str, folder: Path, chosen: list[Method]) -> None:
    """The directory is a model's, and it has every block that a method writes to."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"model: {model}: no such directory")
    if not path.is_file():
        raise InputError(
            f"model: {folder}: no config.json; expected a model directory as `save_pretrained` writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        depth = config.get("text_config", config)["num_hidden_layers"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: not a language model's configuration ({type(error).__name__}: {error})"
        ) from None
    for method in chosen:
        beyond = (
            [layer for layer in method.layers if type(layer) is int and layer >= depth]
            if isinstance(method.layers, tuple)
            else []
        )
        if beyond:
            places = f"{root / 'params' / 'methods'} or {tuned_file(root / 'params', model)}"
            raise InputError(
                f"{method.name}: layers: {beyond[0]} is out of range; the model has blocks 0 to {depth - 1} (set in {places})"
            )


def check_prompts(folder: Path, asked: list[edits.Edit], chosen: list[Method]) -> None:
    """The tokenizer has the template that methods train through, and every edit fits into the context."""
    from transformers import AutoConfig, AutoTokenizer

    from uke.models.prompts import example

    try:
        tokenizer, config = (
            AutoTokenizer.from_pretrained(folder),
            AutoConfig.from_pretrained(folder),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model: {folder}: no readable tokenizer and configuration ({str(error).splitlines()[0]})"
        ) from None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    for method in chosen:
        if method.chat_template and not tokenizer.chat_template:
            raise InputError(
                f"model: {folder}: the tokenizer has no chat template, and {method.name} trains through it (chat_template: false trains on the raw prompt)"
            )
        for edit in asked:
            length = len(
                example(
                    tokenizer, edit.question, edit.answer, method.chat_template, method.end_of_turn
                ).ids
            )
            if length > longest:
                raise InputError(
                    f"edit '{edit.id}': question and answer are {length} tokens; the model's context holds {longest}"
                )
