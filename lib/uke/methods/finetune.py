"""Losses and the training loop: direct weights and adapters, all edits at once or in minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import Diverged, InputError
from uke.methods.lanes import Below, Lanes, LowRank, constant_below, relative_norm
from uke.methods.method import Applied, Progress, Training, Written
from uke.models.model import module_names
from uke.models.prompts import IGNORED, Example, collate, group_by_length, training_tokens

if TYPE_CHECKING:
    from uke.methods.recipes import Recipe

# AdaLoRA starts with half as many ranks again and prunes them to `rank` in the middle of the training.
SPARE_RANK, WARM_UP, FINISH = 1.5, 0.2, 0.3

DROP_SHARE = 1 / 8  # lanes that have ended leave the batch when they are at least this share of it


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


def trained(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters a recipe trains, by name: those it selects, or the adapter's (made by `adapt`)."""
    if recipe.adapter is None:
        return recipe.weights(model)
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
        recipe.examples(model, tokenizer, edits),
        recipe,
        tokenizer.pad_token_id or 0,
        training_tokens(model.device),
    )
    training, parameters = Training(), trained(model, recipe)
    # Minibatches are drawn anew in every pass; all edits at once are the same tokens every time.
    same = recipe.adapter is None and (recipe.batch_size or len(edits)) >= len(edits)
    with (
        _only(model, parameters),
        constant_below(model, list(parameters)) if same else nullcontext(Below()) as below,
    ):
        optimiser = Optimiser(model, list(parameters.values()), recipe)
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


@contextmanager
def adapted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Recipe,
    progress: Progress | None = None,
) -> Iterator[Applied]:
    """The model wrapped in an adapter trained on the edits, which is taken off on exit."""
    wrapped = adapt(model, recipe, len(edits))
    try:
        training = train(wrapped, tokenizer, edits, recipe, progress)
        norms = {
            f"{name}.weight": relative_norm(
                layer.get_delta_weight(wrapped.active_adapter).detach(), layer.weight.detach()
            )
            for name, layer in wrapped.get_base_model().named_modules()
            if isinstance(layer, LoraLayer)
        }
        yield Applied(wrapped, training, norms)
    finally:
        wrapped.unload()


def train_and_merge(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Recipe,
    progress: Progress | None = None,
) -> Training:
    """Train a fresh adapter on the edits and add it to the model's own weights."""
    with adapted(model, tokenizer, edits, recipe, progress) as applied:
        applied.model.merge_adapter()
    return applied.training


def train_each(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> Written:
    """Each edit in weights or an adapter of its own; AdaLoRA, whose ranks are pruned by step, one by one."""
    if recipe.adapter != "adalora":
        return _train_lanes(model, tokenizer, edits, recipe)
    trainings, found, failed = {}, [], {}
    for edit in edits:
        try:
            with adapted(model, tokenizer, [edit], recipe) as applied:
                trainings[edit.id] = applied.training
                found.append(adapter(applied.model))
        except Diverged as error:
            failed[edit.id] = str(error)
    if not found:
        raise Diverged("; ".join(failed.values()), failed)
    scaled = {name: [one[name] for one in found] for name in found[0]}
    low_rank = {
        name: LowRank(
            torch.cat([one.down for one in each]),
            torch.cat([one.scale * one.up for one in each]),
            1.0,
        )
        for name, each in scaled.items()
    }
    return Written(Lanes(model, list(trainings), {}, low_rank), list(trainings.values()), failed)


def _train_lanes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> Written:
    """Lanes that hold each edit as if it had been trained alone, and what each training did; seconds are an equal share.

    Adam is element-wise, so one Adam on stacked weights is one for each lane. Edits of like length are trained together;
    lanes that have ended leave the batch. An edit whose loss is not finite leaves too and gets no lane: the last of the
    three says why, by its id; Diverged where that is every edit. `requires_grad` is the caller's to restore.
    """
    started = time.perf_counter()
    examples = recipe.examples(model, tokenizer, edits)
    ids = list(examples)
    courses = []
    for places in group_by_length(
        [len(one.ids) for one in examples.values()], training_tokens(model.device)
    ):
        lanes = _laid_out(model, recipe, [ids[place] for place in places])
        batch = collate([examples[edit] for edit in lanes.ids], tokenizer.pad_token_id or 0)
        courses.append(_Course(recipe, lanes.ids))
        _train_all(
            lanes, {name: tensor.to(model.device) for name, tensor in batch.items()}, courses[-1]
        )
    ended, trainings, failed = (
        {edit: one for course in courses for edit, one in getattr(course, of).items()}
        for of in ("ended", "trainings", "failed")
    )
    written = [edit for edit in ids if edit not in failed]
    if not written:
        raise Diverged("; ".join(failed.values()), ids)
    lanes.hold(
        written,
        [
            torch.stack([ended[edit][number] for edit in written])
            for number in range(len(lanes.stacks))
        ],
    )
    for training in trainings.values():
        training.seconds = (time.perf_counter() - started) / len(edits)
    return Written(lanes, [trainings[edit] for edit in written], failed)


def _train_all(lanes: Lanes, batch: Mapping[str, Tensor], course: "_Course") -> None:
    """All lanes from where they begin to where each ends; the course has what became of them."""
    recipe, model = course.recipe, lanes.model
    model.requires_grad_(False)
    adam = torch.optim.Adam(
        lanes.stacks, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    with constant_below(model, (*lanes.weights, *lanes.low_rank)) as below, lanes.laid():
        for _ in range(recipe.steps):
            losses = loss(model, batch, recipe.loss)  # (A,)
            course.note(losses.tolist(), lanes.stacks)
            if course.left == 0:
                return
            adam.zero_grad()
            losses.sum().backward()
            adam.step()
            if places := course.leave():
                batch = _shortened(batch, places)
                below.keep(places)
                lanes.hold(course.going, _kept(adam, torch.tensor(places, device=model.device)))
    course.end(lanes.stacks)


@dataclass
class _Course:
    """Trainings side by side: which edits are still in the batch, what each has done, the weights of those that ended."""

    recipe: Recipe
    going: list[str]
    trainings: dict[str, Training] = field(init=False)
    ended: dict[str, list[Tensor]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.going = list(self.going)
        self.trainings = {edit: Training() for edit in self.going}

    def _goes_on(self, edit: str) -> bool:
        return edit not in self.ended and edit not in self.failed

    @property
    def left(self) -> int:
        """How many have not ended."""
        return sum(map(self._goes_on, self.going))

    def note(self, losses: Sequence[float], stacks: Sequence[Tensor]) -> None:
        """The loss of every edit in the batch before its next step; those below `stop_loss` end with the weights they have."""
        for place, (edit, value) in enumerate(zip(self.going, losses, strict=True)):
            training = self.trainings[edit]
            if not self._goes_on(edit):
                continue
            if not math.isfinite(value):
                self.failed[edit] = str(diverged(self.recipe, [edit], training.steps))
                continue
            training.losses.append(value)
            if value < self.recipe.stop_loss:
                training.stopped = "loss"
                self.ended[edit] = [stack.detach()[place].clone() for stack in stacks]
            else:
                training.steps += 1

    def leave(self) -> list[int] | None:
        """Places in the batch that go on, once enough edits have ended to make it worth while."""
        places = [place for place, edit in enumerate(self.going) if self._goes_on(edit)]
        if len(self.going) - len(places) < max(1, DROP_SHARE * len(self.going)):
            return None
        self.going = [self.going[place] for place in places]
        return places

    def end(self, stacks: Sequence[Tensor]) -> None:
        """Those that have not ended yet end with the weights they have."""
        for place, edit in enumerate(self.going):
            if self._goes_on(edit):
                self.ended[edit] = [stack.detach()[place].clone() for stack in stacks]


def _laid_out(model: nn.Module, recipe: Recipe, ids: Sequence[str]) -> Lanes:
    """Lanes that all begin where the recipe begins: at the model's weights, or at the adapter that `adapt` makes."""
    count = len(ids)
    if recipe.adapter is None:
        return Lanes(
            model,
            ids,
            {name: _leaf(weight, count) for name, weight in trained(model, recipe).items()},
        )
    wrapped = adapt(model, recipe, 1)
    low_rank = {
        name: LowRank(_leaf(one.down[0], count), _leaf(one.up[0], count), one.scale)
        for name, one in adapter(wrapped).items()
    }
    wrapped.unload()
    return Lanes(model, ids, {}, low_rank)


def _leaf(weight: Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(weight.detach().float().expand(count, *weight.shape).clone())


def adapter(wrapped: PeftModel) -> dict[str, LowRank]:
    """What a model's adapter adds to each projection by name, as one lane."""
    found = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        own = wrapped.active_adapter
        if (
            hasattr(layer, "lora_E") and own in layer.lora_E
        ):  # AdaLoRA's singular values, and ranks that count after pruning
            down, up = layer.lora_A[own] * layer.lora_E[own], layer.lora_B[own]
            scale = float(layer.scaling[own] / (layer.ranknum[own] + 1e-5))
        else:
            down, up, scale = (
                layer.lora_A[own].weight,
                layer.lora_B[own].weight,
                float(layer.scaling[own]),
            )
        found[name] = LowRank(down.detach()[None].clone(), up.detach()[None].clone(), scale)
    return found


def _shortened(batch: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """The rows that go on, without the columns that are padding in all of them."""
    longest = int(batch["attention_mask"][places].sum(1).max())
    return {name: tensor[places, :longest] for name, tensor in batch.items()}


def _kept(adam: torch.optim.Adam, places: Tensor) -> list[nn.Parameter]:
    """The parameters of the places that go on, in their order, with their moments."""
    renewed = []
    for parameter in adam.param_groups[0]["params"]:
        new = nn.Parameter(parameter.detach()[places].clone())
        state = adam.state.pop(parameter)
        adam.state[new] = {
            name: value[places].clone() if value.shape == parameter.shape else value
            for name, value in state.items()
        }
        renewed.append(new)
    adam.param_groups[0]["params"] = renewed
    return renewed
