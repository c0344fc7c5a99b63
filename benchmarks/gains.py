"""What each optimisation brings: predicted from counts or from a plain batch, measured with it switched off and on in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache
from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.methods import finetune
from uke.methods.edited import edited, edited_each
from uke.methods.lanes import Below
from uke.methods.method import Method
from uke.methods.recipes import Recipe
from uke.models import generate as answering
from uke.models import prompts
from uke.models.model import blocks, module_names
from uke.models.prompts import collate, encode
from uke.study import speed, ways
from uke.study.study import Study

NEVER = float("inf")  # no share of a batch is so large that its finished rows would leave it


@dataclass(frozen=True)
class Amount:
    """Edits of one measurement, its least number of pairs and of seconds, rows of a batch that is sorted by length, edits of one that is trained."""

    edits: int = 8
    repeats: int = 3
    seconds: float = 30
    rows: int = 32
    batch: int = 40


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module with another value under this name; InputError where it has none, since then nothing would be switched off."""
    if not hasattr(module, name):
        raise InputError(
            f"{module.__name__} has no {name}, so what it does cannot be switched off; mend benchmarks/gains.py"
        )
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def reread() -> Iterator[None]:
    """Frozen blocks are read in every step."""
    plain = lambda model, names: nullcontext(Below())
    with replaced(finetune, "constant_below", plain), replaced(finetune, "constant_below", plain):
        yield


def measured(
    study: Study, methods: Sequence[Method], timings: Sequence[dict], amount: Amount
) -> list[dict]:
    """A row for each optimisation; `methods` as they were timed, the first of them is taken where one is enough."""
    recipes = [method for method in methods if method.factors]
    edits = study.dataset.edits[: amount.edits]
    bar = tqdm(total=3 + 3 * len(recipes), desc="gains")
    found = []
    for recipe in recipes:
        found.append(_training_in_lanes(study, edits, recipe, timings, amount))
        bar.update()
        if recipe is recipes[0]:
            found += [_answering_in_lanes(study, edits, recipe, timings, amount)]
            found += [
                one(study, edits, recipe, amount)
                for one in (
                    _dropped_rows,
                    _in_place,
                    _many_at_once,
                    _dropped_lanes,
                    _of_like_length,
                )
            ]
            bar.update(2)
        found += _few_tokens(study, recipe, amount)
        bar.update()
        if (gain := _frozen(study, edits, recipe, amount)) is not None:
            found.append(gain)
        bar.update()
    found.append(_sorted_by_length(study, edits, amount))
    bar.update()
    bar.close()
    return found


def _gain(
    optimisation: str, method: str, predicted: float, measured: Sequence[float], why: str
) -> dict:
    ends = {"low": min(measured), "high": max(measured)}
    return (
        {
            "optimisation": optimisation,
            "method": method,
            "predicted": predicted,
            "measured": statistics.median(measured),
        }
        | ends
        | {"why": why}
    )


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = ways.Watch(device)
    work()
    started.lap("train")
    return started.seconds["train"]


def _in_turns(off: Callable[[], float], on: Callable[[], float], amount: Amount) -> list[float]:
    """Seconds without over seconds with, each pair right after each other; short work more often, since a busy moment weighs more in it."""
    started, found = time.perf_counter(), []
    while len(found) < amount.repeats or time.perf_counter() - started < amount.seconds:
        found.append(off() / on())
    return found


def _trained(
    study: Study, edits: Sequence[Edit], method: Method, write: Callable = edited_each
) -> float:
    """Seconds of writing these edits, in lanes if nothing else is said."""
    watch = ways.Watch(study.model.device)
    with write(study.model, study.tokenizer, edits, method):
        watch.lap("train")
    return watch.seconds["train"]


def _asked(
    study: Study, model: nn.Module, probes: Sequence[Probe], tokens: int | None = None
) -> float:
    """Seconds of answering these probes, with so many tokens of prompts and answers at once or as many as the default says."""
    held = {} if tokens is None else {"batch_tokens": tokens}
    return _seconds(
        lambda: answering.answer(model, study.tokenizer, probes, max_new_tokens=study.token_limit, **held),
        study.model.device,
    )


def _training_in_lanes(
    study: Study, edits: Sequence[Edit], recipe: Recipe, timings: Sequence[dict], amount: Amount
) -> dict:
    """Predicted by a batch of as many edits on shared weights: what the machine gains if a lane costs no more than a row."""
    examples = list(recipe.examples(study.model, study.tokenizer, edits).values())
    wrapped = finetune.adapt(study.model, recipe, 1) if recipe.adapter else study.model
    trained = finetune.trained(wrapped, recipe)
    required = [(parameter, parameter.requires_grad) for parameter in wrapped.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(any(parameter is one for one in trained.values()))

    def step(some: Sequence) -> float:
        batch = {name: tensor.to(study.model.device) for name, tensor in collate(some, 0).items()}
        return _seconds(
            lambda: finetune.loss(wrapped, batch, recipe.loss).sum().backward(), study.model.device
        )

    try:
        step(examples[:1])
        ratios = _in_turns(
            lambda: sum(step([one]) for one in examples), lambda: step(examples), amount
        )
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value).grad = None
        if recipe.adapter:
            wrapped.unload()
    why = "Predicted for a batch on shared weights; lanes multiply each lane's own weights apart, step as many times the weights, and end at different steps."
    return _gain(
        "lanes in training",
        recipe.name,
        statistics.median(ratios),
        _ratios(timings, recipe, "train_each"),
        why,
    )


def _answering_in_lanes(
    study: Study, edits: Sequence[Edit], recipe: Recipe, timings: Sequence[dict], amount: Amount
) -> dict:
    """Predicted by the unedited model, asked edit by edit and all at once."""
    groups = [study.dataset.probes[edit.id] for edit in edits]
    every = [probe for group in groups for probe in group]

    ratios = _in_turns(
        lambda: sum(_asked(study, study.model, group) for group in groups),
        lambda: _asked(study, study.model, every),
        amount,
    )
    why = "Predicted on the unedited model; lanes read their own weights for every token, rows of a lane are regrouped, and edited answers have other lengths."
    return _gain(
        "lanes in answering",
        recipe.name,
        statistics.median(ratios),
        _ratios(timings, recipe, "answer_each"),
        why,
    )


def _ratios(timings: Sequence[dict], recipe: Recipe, part: str) -> list[float]:
    found = speed.ratio(pd.DataFrame(timings), recipe.name, "single", part)
    return [found.low, found.mean, found.high]


def _lengths(study: Study, texts: Sequence[str]) -> list[int]:
    """Decoding steps of each answer, that of its end among them."""
    return [
        len(ids) + 1 for ids in study.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ]


def _in_place(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: bytes of the cache before each token, read and written again at the speed of a plain copy."""
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    config, block = study.model.config.get_text_config(decoder=True), torch.zeros(2**24)
    width = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * study.model.dtype.itemsize
    )  # bytes of a token
    speed_of_copy = block.nbytes / min(_seconds(block.clone, study.model.device) for _ in range(5))
    with edited_each(study.model, study.tokenizer, edits, recipe) as m:
        texts = answering.answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
        prompts = [len(encode(study.tokenizer, probe.question, probe.chat)) for probe in probes]
        on = partial(_asked, study, m, probes)
        copied = width * sum(
            length * (prompt + length / 2)
            for prompt, length in zip(prompts, _lengths(study, texts), strict=True)
        )
        predicted = 1 + copied / speed_of_copy / on()
        ratios = _in_turns(
            replaced(answering, "_empty_cache", lambda model: DynamicCache(config=model.config))(
                on
            ),
            on,
            amount,
        )
    why = "Predicted without the padding of prompts; rows that have finished are copied too until they leave, and a cache with room is read in strides."
    return _gain("a cache with room for the next tokens", recipe.name, predicted, ratios, why)


def _many_at_once(study: Study, _: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """As many edits as a study puts side by side. Predicted by counting: decoding steps in batches of a quarter of the tokens over those as it is, as if a step cost whatever its rows."""
    edits = study.dataset.edits[: study.lanes]
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    whole = answering.Generation().batch_tokens
    with edited_each(study.model, study.tokenizer, edits, recipe) as m:
        texts = answering.answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
        questions = [
            answering.Query(probe.edit, tuple(encode(study.tokenizer, probe.question, probe.chat)))
            for probe in probes
        ]
        longest = dict(zip(questions, _lengths(study, texts), strict=True))
        limits = {
            question: study.token_limit(probe) for question, probe in zip(questions, probes, strict=True)
        }
        off, on = (
            sum(
                max(longest[question] for question in batch)
                for batch in answering._batches(limits, tokens)
            )
            for tokens in (whole // 4, whole)
        )
        asked = [
            lambda tokens=tokens: _asked(study, m, probes, tokens) for tokens in (whole // 4, whole)
        ]
        ratios = _in_turns(*asked, amount)
    why = "Predicted as if a step of many rows cost what one of few does; products grow with the rows, only lanes' own weights and what a call costs are read once for all."
    return _gain("four times as many tokens at once", recipe.name, off / on, ratios, why)


def _dropped_rows(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: rows times the longest answer over the sum of all, as if a step cost as many rows as it has."""
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    with edited_each(study.model, study.tokenizer, edits, recipe) as m:
        texts = answering.answer(m, study.tokenizer, probes, max_new_tokens=study.token_limit)
        on = partial(_asked, study, m, probes)
        ratios = _in_turns(replaced(answering, "DROP_SHARE", NEVER)(on), on, amount)
    lengths = _lengths(study, texts)
    why = "Predicted as if a step cost as much as it has rows; a step of few rows costs nearly as much as one of many, rows leave in eighths, and leaving copies the cache."
    return _gain(
        "dropping finished rows",
        recipe.name,
        len(lengths) * max(lengths) / sum(lengths),
        ratios,
        why,
    )


def _dropped_lanes(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: lanes times the longest training over the sum of all."""
    with edited_each(study.model, study.tokenizer, edits, recipe) as m:
        steps = [record.steps + (record.stopped == "loss") for record in m.edit_records.values()]

    on = partial(_trained, study, edits, recipe)
    ratios = _in_turns(replaced(finetune, "DROP_SHARE", NEVER)(on), on, amount)
    why = "Predicted as if a step cost as much as it has lanes; lanes leave in eighths, and leaving copies weights and moments."
    return _gain(
        "dropping ended lanes", recipe.name, len(steps) * max(steps) / sum(steps), ratios, why
    )


def _of_like_length(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict:
    """Predicted by counting: tokens as padded, in one batch and in the groups that are trained one after another."""
    lengths = [
        len(one.ids) for one in recipe.examples(study.model, study.tokenizer, edits).values()
    ]
    padded = _padded(lengths, prompts.training_tokens(study.model.device))
    on = partial(_trained, study, edits, recipe)
    ratios = _in_turns(
        replaced(finetune, "parts", lambda lengths, tokens: [list(range(len(lengths)))])(on),
        on,
        amount,
    )
    why = "Predicted by padded tokens alone; groups are trained one after another, so each step has fewer lanes to share what a step costs whatever its size."
    return _gain(
        "training edits of like length together",
        recipe.name,
        len(lengths) * max(lengths) / padded,
        ratios,
        why,
    )


def _few_tokens(study: Study, recipe: Recipe, amount: Amount) -> list[dict]:
    """In lanes, as many edits as a study puts side by side, and in one batch, four steps of all. Predicted by counting: tokens as padded."""
    every, briefly = study.dataset.edits, recipe.model_copy(update={"steps": 4, "stop_loss": 0.0})
    why = "Predicted by padded tokens alone; a processor's caches, which hold what fewer tokens keep until the backward pass, are not counted. A GPU takes the same with and without."
    found = []
    for name, edits, given, write in (
        ("in lanes", every[: study.abreast(recipe)], recipe, edited_each),
        ("in a batch", every[: amount.batch], briefly, edited),
    ):
        lengths = [
            len(one.ids) for one in recipe.examples(study.model, study.tokenizer, edits).values()
        ]
        whole, few = (
            _padded(lengths, tokens)
            for tokens in (prompts.PASS_TOKENS, prompts.training_tokens(study.model.device))
        )
        on = partial(_trained, study, edits, given, write)
        ratios = _in_turns(
            replaced(prompts, "TRAINING_TOKENS", prompts.PASS_TOKENS)(on), on, amount
        )
        found.append(
            _gain(
                f"training {prompts.TRAINING_TOKENS:,} tokens at a time, {name}",
                recipe.name,
                whole / few,
                ratios,
                why,
            )
        )
    return found


def _padded(lengths: Sequence[int], tokens: int) -> int:
    """Tokens of rows of these lengths, with their padding, in parts of so many."""
    return sum(
        len(places) * max(lengths[place] for place in places)
        for places in prompts.group_by_length(lengths, tokens)
    )


def _frozen(study: Study, edits: Sequence[Edit], recipe: Recipe, amount: Amount) -> dict | None:
    """Predicted by counting products: forward through all blocks, back through those above; None where no block lies below."""
    names = (
        [name.removesuffix(".weight") for name in recipe.weights(study.model)]
        if not recipe.adapter
        else module_names(study.model, recipe.layers, recipe.components)
    )
    stack = blocks(study.model)
    lowest = min(
        place
        for place, (prefix, _) in enumerate(stack)
        if any(name.startswith(f"{prefix}.") for name in names)
    )
    if not lowest:
        return None
    sizes = [sum(weight.numel() for weight in block.parameters()) for _, block in stack]
    head = study.model.get_input_embeddings().weight.numel()
    changed = (
        sum(study.model.get_submodule(name).weight.numel() for name in names)
        if not recipe.adapter
        else 0
    )
    above = (
        2 * (sum(sizes[lowest:]) + head) + changed
    )  # forward, the gradient of the states, that of what is trained
    on = partial(_trained, study, edits, recipe)
    ratios = _in_turns(reread()(on), on, amount)
    why = "Predicted by counting products of matrices; attention, norms, the optimiser and the first step are there with and without."
    return _gain(
        "frozen blocks read once", recipe.name, (above + sum(sizes[:lowest])) / above, ratios, why
    )


def _sorted_by_length(study: Study, edits: Sequence[Edit], amount: Amount) -> dict:
    """Batches of as many rows, of questions as they come and of questions sorted by length and limit, on the unedited model."""
    probes = [probe for edit in edits for probe in study.dataset.probes[edit.id]]
    prompts = {probe: len(encode(study.tokenizer, probe.question, probe.chat)) for probe in probes}
    by_length = sorted(probes, key=lambda probe: (prompts[probe], study.token_limit(probe)), reverse=True)
    room = amount.rows * max(prompts[probe] + study.token_limit(probe) for probe in probes)

    def answers(order: Sequence[Probe]) -> list[tuple[Sequence[Probe], list[str]]]:
        groups = [order[start : start + amount.rows] for start in range(0, len(order), amount.rows)]
        return [
            (
                group,
                answering.answer(
                    study.model,
                    study.tokenizer,
                    group,
                    max_new_tokens=study.token_limit,
                    batch_tokens=room,
                ),
            )
            for group in groups
        ]

    def steps(order: Sequence[Probe]) -> int:
        """Decoding steps and prompt tokens of all batches, as padded."""
        told = [
            (
                group,
                max(
                    len(ids)
                    for ids in study.tokenizer(texts, add_special_tokens=False)["input_ids"]
                ),
            )
            for group, texts in answers(order)
        ]
        return sum(
            len(group) * (max(prompts[probe] for probe in group) + longest)
            for group, longest in told
        )

    off, on = (
        lambda order=order: _seconds(lambda: answers(order), study.model.device)
        for order in (probes, by_length)
    )
    why = "Predicted by padded tokens of prompts and answers; finished rows leave anyway, and the limit tells little of how long an answer becomes."
    return _gain(
        "length sorting",
        "unedited",
        steps(probes) / steps(by_length),
        _in_turns(off, on, amount),
        why,
    )
