"""What each optimisation brings: predicted from counts or from a plain batch, measured with it switched off and on in turns."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from uke import answering, finetune, lane_training, padding, speed, ways
from uke.apart import edited_apart
from uke.edits import Edit, Probe
from uke.errors import InputError
from uke.finetune import prepare, weights
from uke.lanes import Below
from uke.methods import Method
from uke.models import blocks, collate, encode
from uke.recipes import Recipe
from uke.studies import Study

NEVER = float("inf")  # no share of a batch is so large that its finished rows would leave it


@dataclass(frozen=True)
class Amount:
    """Edits of one measurement, how often it is repeated, and the rows of a batch in which length sorting is tried."""

    edits: int = 8
    repeats: int = 3
    rows: int = 32


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module with another value under this name; InputError where it has none, since then nothing would be switched off."""
    if not hasattr(module, name):
        raise InputError(f"{module.__name__} has no {name}, so what it does cannot be switched off; mend benchmarks/gains.py")
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def reread() -> Iterator[None]:
    """Frozen blocks are read in every step."""
    plain = lambda model, names: nullcontext(Below())  # noqa: E731
    with replaced(finetune, "constant_below", plain), replaced(lane_training, "constant_below", plain):
        yield


def measured(study: Study, methods: Sequence[Method], timings: Sequence[dict], amount: Amount) -> list[dict]:
    """A row for each optimisation; `methods` as they were timed, the first of them is taken where one is enough."""
    recipes = [method for method in methods if isinstance(method, Recipe)]
    edits = study.material.edits[: amount.edits]
    bar = tqdm(total=3 + 2 * len(recipes), desc="gains")
    found = []
    for recipe in recipes:
        found.append(_training_in_lanes(study, edits, recipe, timings))
        bar.update()
        if recipe is recipes[0]:
            found += [_answering_in_lanes(study, edits, recipe, timings), _dropped_rows(study, edits, recipe, amount), _dropped_lanes(study, edits, recipe, amount), _of_like_length(study, edits, recipe, amount)]
            bar.update(2)
        if (gain := _frozen(study, edits, recipe, amount)) is not None:
            found.append(gain)
        bar.update()
    found.append(_sorted_by_length(study, edits, amount))
    bar.update()
    bar.close()
    return found


def _gain(optimisation: str, method: str, predicted: float, measured: Sequence[float], why: str) -> dict:
    ends = {"low": min(measured), "high": max(measured)}
    return {"optimisation": optimisation, "method": method, "predicted": predicted, "measured": statistics.median(measured)} | ends | {"why": why}


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = ways.Watch(device)
    work()
    started.lap("train")
    return started.seconds["train"]


def _in_turns(off: Callable[[], float], on: Callable[[], float], repeats: int) -> list[float]:
    """Seconds without over seconds with, each pair right after each other."""
    return [off() / on() for _ in range(repeats)]


def _trained(study: Study, edits: Sequence[Edit], method: Method) -> float:
    """Seconds of writing these edits in lanes."""
    watch = ways.Watch(study.model.device)
    with edited_apart(study.model, study.tokenizer, edits, method):
        watch.lap("train")
    return watch.seconds["train"]


def _asked(study: Study, model: nn.Module, probes: Sequence[Probe]) -> float:
    """Seconds of answering these probes at once."""
    return _seconds(lambda: answering.answer(model, study.tokenizer, probes, max_new_tokens=study.room), study.model.device)


def _training_in_lanes(study: Study, edits: Sequence[Edit], recipe: Recipe, timings: Sequence[dict]) -> dict:
    """Predicted by a batch of as many edits on shared weights: what the machine gains if a lane costs no more than a row."""
    examples = list(prepare(study.model, study.tokenizer, edits, recipe).values())
    wrapped = finetune.adapt(study.model, recipe, 1) if recipe.adapter else study.model
    trained = weights(wrapped, recipe)
    required = [(parameter, parameter.requires_grad) for parameter in wrapped.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(any(parameter is one for one in trained.values()))

    def step(some: Sequence) -> float:
        batch = {name: tensor.to(study.model.device) for name, tensor in collate(some, 0).items()}
        return _seconds(lambda: finetune.loss(wrapped, batch, recipe.loss).sum().backward(), study.model.device)

    try:
        step(examples[:1])
        ratios = [sum(step([one]) for one in examples) / step(examples) for _ in range(3)]
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value).grad = None
        if recipe.adapter:
            wrapped.unload()
    why = "Predicted for a batch on shared weights; lanes multiply each lane's own weights apart, step as many times the weights, and end at different steps."
    return _gain("lanes in training", recipe.name, statistics.median(ratios), _ratios(timings, recipe, "train_each"), why)


def _answering_in_lanes(study: Study, edits: Sequence[Edit], recipe: Recipe, timings: Sequence[dict]) -> dict:
    """Predicted by the unedited model, asked edit by edit and all at once."""
    groups = [study.material.probes[edit.id] for edit in edits]
    every = [probe for group in groups for probe in group]

    ratios = _in_turns(lambda: sum(_asked(study, study.model, group) for group in groups), lambda: _asked(study, study.model, every), 3)
    why = "Predicted on the unedited model; lanes read their own weights for every token, rows of a lane are regrouped, and edited answers have other lengths."
    return _gain("lanes in answering", recipe.name, statistics.median(ratios), _ratios(timings, recipe, "answer_each"), why)


def _ratios(timings: Sequence[dict], recipe: Recipe, part: str) -> list[float]:
    found = speed.ratio(pd.DataFrame(timings), recipe.name, "single", part)
    return [found.low, found.mean, found.high]


def _dropped_rows(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: rows times the longest answer over the sum of all, as if a step cost as many rows as it has."""
    probes = [probe for edit in edits for probe in study.material.probes[edit.id]]
    with edited_apart(study.model, study.tokenizer, edits, recipe) as m:
        texts = answering.answer(m, study.tokenizer, probes, max_new_tokens=study.room)

        def off() -> float:
            with replaced(answering, "DROP_SHARE", NEVER):
                return _asked(study, m, probes)

        ratios = _in_turns(off, lambda: _asked(study, m, probes), amount.repeats)
    lengths = [len(ids) + 1 for ids in study.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    why = "Predicted as if a step cost as much as it has rows; a step of few rows costs nearly as much as one of many, rows leave in eighths, and leaving copies the cache."
    return _gain("dropping finished rows", recipe.name, len(lengths) * max(lengths) / sum(lengths), ratios, why)


def _dropped_lanes(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: lanes times the longest training over the sum of all."""
    with edited_apart(study.model, study.tokenizer, edits, recipe) as m:
        steps = [record.steps + (record.stopped == "loss") for record in m.edit_records.values()]

    def off() -> float:
        with replaced(lane_training, "DROP_SHARE", NEVER):
            return _trained(study, edits, recipe)

    why = "Predicted as if a step cost as much as it has lanes; lanes leave in eighths, and leaving copies weights and moments."
    return _gain("dropping ended lanes", recipe.name, len(steps) * max(steps) / sum(steps), _in_turns(off, lambda: _trained(study, edits, recipe), amount.repeats), why)


def _of_like_length(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: tokens as padded, in one batch and in the groups that are trained one after another."""
    lengths = [len(one.ids) for one in prepare(study.model, study.tokenizer, edits, recipe).values()]
    padded = sum(len(places) * max(lengths[place] for place in places) for places in padding.parts(lengths))

    def off() -> float:
        with replaced(lane_training, "parts", lambda lengths: [list(range(len(lengths)))]):
            return _trained(study, edits, recipe)

    why = "Predicted by padded tokens alone; groups are trained one after another, so each step has fewer lanes to share what a step costs whatever its size."
    ratios = _in_turns(off, lambda: _trained(study, edits, recipe), amount.repeats)
    return _gain("training edits of like length together", recipe.name, len(lengths) * max(lengths) / padded, ratios, why)


def _frozen(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict | None:
    """Predicted by counting products: forward through all blocks, back through those above; None where no block lies below."""
    names = [name.removesuffix(".weight") for name in weights(study.model, recipe)] if not recipe.adapter else finetune.module_names(study.model, recipe.layers, recipe.components)
    stack = blocks(study.model)
    lowest = min(place for place, (prefix, _) in enumerate(stack) if any(name.startswith(f"{prefix}.") for name in names))
    if not lowest:
        return None
    sizes = [sum(weight.numel() for weight in block.parameters()) for _, block in stack]
    head = study.model.get_input_embeddings().weight.numel()
    changed = sum(study.model.get_submodule(name).weight.numel() for name in names) if not recipe.adapter else 0
    above = 2 * (sum(sizes[lowest:]) + head) + changed  # forward, the gradient of the states, that of what is trained

    def off() -> float:
        with reread():
            return _trained(study, edits, recipe)

    why = "Predicted by counting products of matrices; attention, norms, the optimiser and the first step are there with and without."
    return _gain("frozen blocks read once", recipe.name, (above + sum(sizes[:lowest])) / above, _in_turns(off, lambda: _trained(study, edits, recipe), amount.repeats), why)


def _sorted_by_length(study: Study, edits: Sequence[Edit], amount: Amount) -> dict:
    """Batches of as many rows, of questions as they come and of questions sorted by length and limit, on the unedited model."""
    probes = [probe for edit in edits for probe in study.material.probes[edit.id]]
    prompts = {probe: len(encode(study.tokenizer, probe.question, probe.chat)) for probe in probes}
    by_length = sorted(probes, key=lambda probe: (prompts[probe], study.room(probe)), reverse=True)
    room = amount.rows * max(prompts[probe] + study.room(probe) for probe in probes)

    def answers(order: Sequence[Probe]) -> list[tuple[Sequence[Probe], list[str]]]:
        groups = [order[start : start + amount.rows] for start in range(0, len(order), amount.rows)]
        return [(group, answering.answer(study.model, study.tokenizer, group, max_new_tokens=study.room, batch_tokens=room)) for group in groups]

    def steps(order: Sequence[Probe]) -> int:
        """Decoding steps and prompt tokens of all batches, as padded."""
        told = [(group, max(len(ids) for ids in study.tokenizer(texts, add_special_tokens=False)["input_ids"])) for group, texts in answers(order)]
        return sum(len(group) * (max(prompts[probe] for probe in group) + longest) for group, longest in told)

    off, on = (lambda order=order: _seconds(lambda: answers(order), study.model.device) for order in (probes, by_length))
    why = "Predicted by padded tokens of prompts and answers; finished rows leave anyway, and the limit tells little of how long an answer becomes."
    return _gain("length sorting", "unedited", steps(probes) / steps(by_length), _in_turns(off, on, amount.repeats), why)
