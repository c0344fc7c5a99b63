"""Losses and the training loop: direct weights and adapters, all edits at once or in minibatches."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import Diverged, InputError
from uke.methods.lanes import Below, constant_below
from uke.methods.peers import Peer
from uke.methods.recipes import Recipe
from uke.models.model import max_context, module_names, select
from uke.models.prompts import IGNORED, Example, collate, example, group_by_length, training_tokens

# AdaLoRA starts with half as many ranks again and prunes them to `rank` in the middle of the training.
SPARE_RANK, WARM_UP, FINISH = 1.5, 0.2, 0.3

Progress = Callable[
    [int, float], None
]  # told the passes or steps so far and the loss (nats per token)


@dataclass
class Training:
    """What a training did: mean loss of each pass (nats per token), optimiser steps, wall seconds, why it ended.

    `notes`: what else a reader of the result must know, such as a fallback.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    stopped: Literal["loss", "steps"] = "steps"
    notes: list[str] = field(default_factory=list)


def target_tokens_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Teacher-forced mean of -log p over each edit's labelled tokens (FT-M), shape (B,), nats per token."""
    labels = batch["labels"][:, 1:]  # (B, T-1)
    read = (labels != IGNORED).any(0).nonzero().squeeze(1)  # (U,) positions that predict a label
    logits = _logits(model, batch, read)  # (B, U, V)
    labels = labels[:, read]  # (B, U)
    surprisal = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return surprisal.view_as(labels).sum(1) / (labels != IGNORED).sum(1)


def last_prompt_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of -log p over each edit's labelled tokens, all read where its prompt ends (FT-L), shape (B,), nats."""
    wanted = batch["labels"] != IGNORED  # (B, T)
    ends = wanted.int().argmax(1) - 1  # (B,)
    read, place = ends.unique(return_inverse=True)  # (U,), (B,)
    prompts = {name: tensor[:, : int(read.max()) + 1] for name, tensor in batch.items()}
    logits = _logits(model, prompts, read)  # (B, U, V)
    surprisal = -logits[torch.arange(len(place), device=place.device), place].log_softmax(
        -1
    )  # (B, V)
    surprisal = surprisal.gather(1, batch["labels"].clamp(min=0))  # (B, T)
    return surprisal.where(wanted, 0.0).sum(1) / wanted.sum(1)


def _logits(model: nn.Module, batch: Mapping[str, Tensor], read: Tensor) -> Tensor:
    """Logits at the positions `read` only: the vocabulary is the widest matrix of a small model."""
    # Padding stands to the right, so causality alone keeps it from what is read: no mask to build.
    return model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=read).logits.float()


LOSSES: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], Tensor]] = {
    "target_tokens": target_tokens_loss,
    "last_prompt_token": last_prompt_token_loss,
}


def loss(model: nn.Module, batch: Mapping[str, Tensor], scope: str) -> Tensor:
    """Loss of each edit of a right-padded batch (see `prompts.collate`) in one scope, shape (B,), nats per token."""
    return LOSSES[scope](model, batch)


def adapt(model: nn.Module, recipe: Recipe, count: int) -> PeftModel:
    """The model wrapped in the recipe's adapter, for a training on `count` edits; `unload` takes it off again.

    InputError where layers and components select no projection, or the steps are too few for AdaLoRA's schedule.
    """
    common = {
        "target_modules": module_names(model, recipe.layers, recipe.components),
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
    }
    if recipe.adapter == "lora":
        config = LoraConfig(r=recipe.rank, **common)
    else:
        steps = recipe.steps * math.ceil(count / (recipe.batch_size or count))
        if steps < 3:
            raise InputError(
                f"recipe {recipe.name}: steps: AdaLoRA prunes its ranks over 3 steps or more, not {steps}"
            )
        schedule = {
            "total_step": steps,
            "tinit": int(WARM_UP * steps),
            "tfinal": int(FINISH * steps),
        }
        ranks = {"init_r": math.ceil(SPARE_RANK * recipe.rank), "target_r": recipe.rank}
        config = AdaLoraConfig(**ranks, **schedule, **common)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return get_peft_model(model, config).eval()


def weights(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters a recipe trains, by name: those it selects, or the adapter's (made by `adapt`)."""
    if recipe.adapter is None:
        return select(model, recipe.layers, recipe.components)
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name}


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Recipe,
    progress: Progress | None = None,
) -> Training:
    """Write the edits into the model in place; for an adapter recipe the model is what `adapt` made.

    One pass is one optimiser step on all edits, or on each shuffled minibatch; a batch whose mean loss is below
    `stop_loss` is skipped, and a pass whose mean is below it ends the training. `progress(passes, loss)` follows
    each. InputError, before any weight moves, names an edit longer than the context; FloatingPointError names the
    edits whose loss is not finite. To restore the weights is the caller's part (`editing.edited`).
    """
    started = time.perf_counter()
    passes = _passes(
        prepare(model, tokenizer, edits, recipe),
        recipe,
        tokenizer.pad_token_id or 0,
        training_tokens(model.device),
    )
    training, trained = Training(), weights(model, recipe)
    # Minibatches are drawn anew in every pass; all edits at once are the same tokens every time.
    same = recipe.adapter is None and (recipe.batch_size or len(edits)) >= len(edits)
    with (
        _only(model, trained) as parameters,
        constant_below(model, list(trained)) if same else nullcontext(Below()) as below,
    ):
        optimiser = Optimiser(model, parameters, recipe)
        for batches in passes:
            losses = [
                value
                for batch in batches
                for value in _learn(model, optimiser, batch, recipe, below)
            ]
            training.losses.append(sum(losses) / len(losses))
            if progress:
                progress(len(training.losses), training.losses[-1])
            if training.losses[-1] < recipe.stop_loss:
                training.stopped = "loss"
                break
    training.steps, training.seconds = optimiser.steps, time.perf_counter() - started
    return training


def prepare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Recipe | Peer,
) -> dict[str, Example]:
    """Token ids and labels by the edit's id, as the recipe or peer trains them; InputError for one beyond the context."""
    if not edits:
        raise InputError(f"{recipe.name}: no edits; expected at least one")
    longest = max_context(model)
    examples = {}
    for edit in edits:
        one = example(
            tokenizer, edit.question, edit.answer, recipe.chat_template, recipe.end_of_turn
        )
        if len(one.ids) > longest:
            raise InputError(
                f"edit '{edit.id}': question and answer are {len(one.ids)} tokens; the model's context holds {longest}"
            )
        if edit.id in examples:
            raise InputError(f"edit '{edit.id}': given twice; expected unique ids")
        examples[edit.id] = one
    return examples


class Batch(NamedTuple):
    """The edits of one optimiser step: their ids, and their tensors in parts, which accumulate their gradient."""

    ids: list[str]
    parts: list[dict[str, Tensor]]


def _passes(
    examples: Mapping[str, Example], recipe: Recipe, pad_id: int, tokens: int
) -> Iterator[list[Batch]]:
    ids = list(examples)
    size = recipe.batch_size or len(ids)
    order = torch.Generator().manual_seed(recipe.seed)
    whole = [_batch(ids, examples, pad_id, tokens)] if size >= len(ids) else None
    for _ in range(recipe.steps):
        shuffled = [ids[i] for i in torch.randperm(len(ids), generator=order).tolist()]
        yield whole or [
            _batch(shuffled[i : i + size], examples, pad_id, tokens)
            for i in range(0, len(ids), size)
        ]


def _batch(ids: Sequence[str], examples: Mapping[str, Example], pad_id: int, tokens: int) -> Batch:
    each = [
        [ids[place] for place in part]
        for part in group_by_length([len(examples[edit].ids) for edit in ids], tokens)
    ]
    return Batch(
        [edit for part in each for edit in part],
        [collate([examples[edit] for edit in part], pad_id) for part in each],
    )


@contextmanager
def _only(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Gradients flow to these parameters alone, so autograd keeps nothing of the blocks below the lowest of them."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    try:
        yield list(trained.values())
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value).grad = None


class Optimiser:
    """Adam; weights in less than float32 are stepped as float32 copies and rounded back after each step."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], recipe: Recipe
    ) -> None:
        self.parameters, self.steps = parameters, 0
        self.adalora = model.base_model if recipe.adapter == "adalora" else None
        # `float` hands a float32 weight back as it is, so only less precise ones cost a copy.
        self.masters = [parameter.detach().float() for parameter in parameters]
        self.adam = torch.optim.Adam(
            self.masters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )

    def step(self) -> None:
        """One step on the gradients of the parameters; AdaLoRA also counts it in its budget of ranks."""
        if self.adalora:
            _orthogonality(self.adalora).backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.adam.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.data.copy_(master)
        self.steps += 1
        if self.adalora:
            self.adalora.update_and_allocate(self.steps)

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None


def _orthogonality(adalora: nn.Module) -> Tensor:
    """The part of AdaLoRA's loss that keeps its singular vectors orthogonal (arXiv 2303.10512, equation 4)."""
    distances = []
    for name, weight in adalora.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            vectors = weight if ".lora_A." in name else weight.T  # (r, features)
            distances.append(
                torch.linalg.norm(
                    vectors @ vectors.T - torch.eye(len(vectors), device=weight.device)
                )
            )
    return (
        adalora.peft_config[adalora.active_adapter[0]].orth_reg_weight
        * torch.stack(distances).mean()
    )


def _learn(
    model: nn.Module, optimiser: Optimiser, batch: Batch, recipe: Recipe, below: Below
) -> list[float]:
    """Loss of each edit of one batch, and one step unless their mean is below `stop_loss`."""
    losses: list[float] = []
    for below.part, part in enumerate(batch.parts):
        part = {name: tensor.to(model.device) for name, tensor in part.items()}
        each = loss(model, part, recipe.loss)  # (B,)
        (each.sum() / len(batch.ids)).backward()
        losses += each.tolist()
    if broken := [
        edit for edit, value in zip(batch.ids, losses, strict=True) if not math.isfinite(value)
    ]:
        raise diverged(recipe, broken, optimiser.steps)
    if sum(losses) / len(losses) >= recipe.stop_loss:
        optimiser.step()
    optimiser.clear()
    return losses


def diverged(recipe: Recipe, broken: Sequence[str], steps: int) -> Diverged:
    """What is said of edits whose loss is not finite after so many steps."""
    return Diverged(
        f"recipe {recipe.name}: the loss of edit {', '.join(map(repr, broken))} is not finite "
        f"after {steps} steps; expected a learning_rate below {recipe.learning_rate:g}",
        broken,
    )
