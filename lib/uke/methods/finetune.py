"""Fine-tuning: the losses, the adapters, and the one training loop of every recipe.

What is trained are lanes, independent copies of the selected weights. Edits written together have
one, the model's own weights (`train`); edits written alone have one each (`train_each`).
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from uke.errors import Diverged, InputError
from uke.methods.lanes import Lanes, LowerBlocks, LowRank, lower_blocks_once, relative_norm
from uke.methods.lessons import TEXTS, Lesson, lessons
from uke.methods.locate_edit.anchors import sites
from uke.methods.locate_edit.covariance import projectors
from uke.methods.method import EditRecord, Edits, Progress, Tokenizer, Training, Written
from uke.models.divergence import divergence
from uke.models.model import kept, module_names
from uke.models.prompts import IGNORED, TRAINING_TOKENS, Example, collate, group_by_length

if TYPE_CHECKING:
    from uke.methods.recipes import Recipe

# AdaLoRA starts with half as many ranks again and prunes them in the middle of the training.
SPARE_RANK, WARM_UP, FINISH = 1.5, 0.2, 0.3
DROP_SHARE = 1 / 8  # ended lanes leave the batch when they are at least this share of it
# peft asks transformers for this under its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def target_tokens_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of -log p over each edit's answer, teacher-forced (FT-M): (B,), nats per token."""
    labels = batch["labels"][:, 1:]  # (B, T-1)
    read = (labels != IGNORED).any(0).nonzero().squeeze(1)  # (U,) positions that predict a label
    logits = _logits(model, batch, read)  # (B, U, V)
    labels = labels[:, read]  # (B, U)
    # Flat: along another axis than the last the softmax is three times slower.
    surprisal = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )  # (B * U,)
    return surprisal.view_as(labels).sum(1) / (labels != IGNORED).sum(1)


def last_prompt_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of -log p over each edit's answer, read where the prompt ends (FT-L): (B,), nats."""
    wanted = batch["labels"] != IGNORED  # (B, T)
    ends = wanted.int().argmax(1) - 1  # (B,)
    read, place = ends.unique(return_inverse=True)  # (U,), (B,)
    prompts = {name: tensor[:, : int(read.max()) + 1] for name, tensor in batch.items()}
    logits = _logits(model, prompts, read)  # (B, U, V)
    own = logits[torch.arange(len(place), device=place.device), place]  # (B, V)
    surprisal = (-own.log_softmax(-1)).gather(1, batch["labels"].clamp(min=0))  # (B, T)
    return surprisal.where(wanted, 0.0).sum(1) / wanted.sum(1)


def _logits(model: nn.Module, batch: Mapping[str, Tensor], read: Tensor) -> Tensor:
    """Logits at the positions `read` alone: the vocabulary is a small model's widest matrix."""
    # Padding stands to the right, so causality alone keeps it from what is read: no mask to build.
    # But a gap of positions without a mask would be read as the beginning of another text.
    ids, keep = batch["input_ids"], read.tolist()  # a list, as the last block may lie elsewhere
    own = {"input_ids": ids, "logits_to_keep": keep, "use_cache": False}
    if "position_ids" in batch:
        own |= {"position_ids": batch["position_ids"], "attention_mask": torch.ones_like(ids)}
    return model(**own).logits.float()


def lesson_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Divergence from what is expected along each lesson's answer, times its weight: (B,), nats."""
    weights = batch["weights"][:, 1:]  # (B, T-1)
    read = (weights != 0).any(0).nonzero().squeeze(1)  # (U,)
    tokens, logs = (batch[name][:, 1:][:, read] for name in ("tokens", "logs"))  # (B, U, K)
    found = divergence(tokens, logs, _logits(model, batch, read))  # (B, U)
    return (found * weights[:, read]).sum(1)


LOSSES: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], Tensor]] = {
    "target_tokens": target_tokens_loss,
    "last_prompt_token": last_prompt_token_loss,
}


def train(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: Recipe, progress: Progress = None
) -> Training:
    """Write the edits together into the model in place; one with an adapter is what `adapt` made.

    A batch whose mean loss is below `stop_loss` is skipped, and a pass whose mean is below it ends
    the training. `progress(passes, loss)` follows each pass. InputError as `Method.examples`,
    before any weight moves; Diverged names the edits whose loss is not finite.
    """
    examples = recipe.examples(model, tokenizer, edits)
    beside = lessons(model, tokenizer, edits, recipe)
    passes = _passes(examples, recipe, tokenizer, model.device, beside)
    held = []
    if recipe.stop_on == "paraphrase":  # a paraphrase that no recipe trains
        form = TEXTS["held out"].format
        asked = [edit.model_copy(update={"question": form(edit.question)}) for edit in edits]
        paraphrased = recipe.examples(model, tokenizer, asked)
        held = _batches(list(paraphrased), paraphrased, tokenizer, model.device)
    weights, lane = trained(model, recipe), _Lane(recipe)
    before = {n: one.detach().clone() for n, one in weights.items()} if recipe.shrinks else {}
    # Minibatches are drawn anew in every pass; all edits at once are the same tokens every time.
    same = recipe.adapter is None and (recipe.batch_size or len(edits)) >= len(edits)
    once = lower_blocks_once(model, list(weights)) if same else nullcontext(LowerBlocks())
    with kept(model, {}), once as lower:
        # Gradients flow to these weights alone, so that autograd keeps nothing of lower blocks.
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        adalora = model.base_model if recipe.adapter == "adalora" else None
        optimiser = _Optimiser(weights, recipe, adalora)
        if held:
            lane.read = partial(_loss_of, model, held, LOSSES[recipe.loss], lower)
        _descend(model, [lane], passes, optimiser, lower, progress=progress)
    if lane.error:
        raise lane.error
    for name, own in before.items():
        change = shrunk(model, recipe, name, weights[name].detach().float() - own.float())
        weights[name].data.copy_(own + change)
    return lane.training


def _loss_of(model: nn.Module, held: Sequence[_Batch], loss: Callable, lower: LowerBlocks) -> float:
    """Return the mean loss of edits that no step has: their parts are numbered below zero."""
    losses = []
    with torch.no_grad():
        for lower.part, batch in enumerate(held, -len(held)):
            losses += loss(model, batch.parts[0]).tolist()
    return fmean(losses)


def shrunk(model: nn.Module, recipe: Recipe, name: str, change: Tensor) -> Tensor:
    """Return what the recipe leaves of the change (d, W) of a weight."""
    if recipe.kept_rank and change.dim() > 1:
        left = torch.linalg.eigh(change @ change.T).eigenvectors[:, -recipe.kept_rank :]
        change = left @ (left.T @ change)
    if recipe.null_threshold:
        site = [one for one in sites(model, recipe.layers) if name == f"{one.name}.weight"]
        change = change @ projectors(model, site, recipe.null_threshold)[0].to(change)
    return recipe.strength * change


def train_each(model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: Recipe) -> Written:
    """Train each edit as if alone, side by side with those of similar length."""
    examples = recipe.examples(model, tokenizer, edits)
    lanes = {edit: _Lane(recipe) for edit in examples}
    for batch in _batches(list(examples), examples, tokenizer, model.device):
        stacks = _stacks(model, recipe, batch.ids)
        passes = itertools.repeat([batch], recipe.steps)
        group = [lanes[edit] for edit in batch.ids]
        model.requires_grad_(False)
        once = lower_blocks_once(model, (*stacks.weights, *stacks.low_rank))
        with once as lower, stacks.laid():
            optimiser = _Optimiser(dict(enumerate(stacks.stacks)), recipe)
            _descend(model, group, passes, optimiser, lower, stacks)
    failed = {edit: str(lane.error) for edit, lane in lanes.items() if lane.error}
    written = {edit: lane for edit, lane in lanes.items() if not lane.error}
    if not written:
        raise Diverged("; ".join(failed.values()), failed)
    columns = zip(*(lane.weights for lane in written.values()), strict=True)
    stacks.hold(list(written), [torch.stack(column) for column in columns])
    return Written(stacks, [lane.training for lane in written.values()], failed)


@dataclass
class _Lane:
    """What becomes of one copy of the weights; beside others that go on, also its last weights."""

    recipe: Recipe
    training: Training = field(default_factory=Training)
    seen: list[float] = field(default_factory=list)  # losses in the present pass
    weights: list[Tensor] = field(default_factory=list)
    error: Diverged | None = None
    ended: bool = False
    read: Callable[[], float] | None = None  # the loss that ends it, in place of the pass's own

    def note(self, ids: Sequence[str], losses: Sequence[float]) -> bool:
        """Note the losses of its edits in one batch; return whether they ask for a step."""
        broken = [edit for edit, value in zip(ids, losses, strict=True) if not math.isfinite(value)]
        if broken and not self.ended:
            names, rate = ", ".join(map(repr, broken)), self.recipe.learning_rate
            where = f"the loss of edit {names} is not finite after {self.training.steps} steps"
            message = f"recipe {self.recipe.name}: {where}; expected a learning_rate below {rate:g}"
            self.error, self.ended = Diverged(message, broken), True
        high = self.read is not None or fmean(losses) >= self.recipe.stop_loss
        step = high and not self.ended
        self.seen += losses
        self.training.steps += step
        return step

    def end_pass(self, progress: Progress) -> None:
        """Note the mean loss of the pass, and end the training where it is low enough."""
        loss, self.seen = fmean(self.seen), []
        self.training.losses.append(loss)
        if progress:
            progress(len(self.training.losses), loss)
        self.ended = (self.read() if self.read else loss) < self.recipe.stop_loss


def _descend(
    model: nn.Module,
    lanes: Sequence[_Lane],
    passes: Iterable[Sequence[_Batch]],
    optimiser: _Optimiser,
    lower: LowerBlocks,
    stacks: Lanes | None = None,
    progress: Progress = None,
) -> None:
    """Take steps until every lane's mean loss is below `stop_loss`, or the passes are over.

    Every lane has as many edits in a batch, in order; with `stacks` one, and a pass is that batch.
    Adam is element-wise: on stacked weights it is one Adam a lane.
    """
    for turn, batches in enumerate(passes):
        for batch in batches:
            losses, size = [], len(batch.ids) // len(lanes)
            for lower.part, part in enumerate(batch.parts):
                each = LOSSES[lanes[0].recipe.loss](model, part)  # (B,)
                (each.sum() / size).backward()
                losses += each.tolist()
            for lower.part, (own, part) in enumerate(batch.lessons, len(batch.parts)):
                if own == turn % lanes[0].recipe.turns:
                    (lesson_loss(model, part).sum() / size).backward()
            steps = []
            for row, lane in enumerate(lanes):
                own = slice(row * size, (row + 1) * size)
                steps.append(lane.note(batch.ids[own], losses[own]))
                if stacks and not (lane.ended or steps[row]):
                    lane.weights = stacks.weights_of(row)
            optimiser.step(any(steps))
        for lane in lanes:
            if not lane.ended:
                lane.end_pass(progress)
        going = [row for row, lane in enumerate(lanes) if not lane.ended]
        if not going:
            return
        if stacks and len(lanes) - len(going) >= max(1, DROP_SHARE * len(lanes)):
            lanes = [lanes[row] for row in going]
            batch.keep(going)
            lower.keep(going)
            stacks.hold(batch.ids, optimiser.keep(going))
    for row, lane in enumerate(lanes):
        if stacks and not lane.ended:
            lane.weights = stacks.weights_of(row)


@dataclass
class _Batch:
    """The edits of one optimiser step, in parts that each fit into a forward pass.

    Beside them `lessons`, each part with the turn in which a step has it.
    """

    ids: list[str]
    parts: list[dict[str, Tensor]]
    lessons: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows of the only part, without the columns that are padding in all of them."""
        (part,) = self.parts
        longest = int(part["attention_mask"][rows].sum(1).max())
        self.ids = [self.ids[row] for row in rows]
        self.parts = [{name: tensor[rows, :longest] for name, tensor in part.items()}]


def _groups(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Group texts of similar length by row, each as many as fit into one forward pass."""
    return group_by_length(lengths, TRAINING_TOKENS if device.type == "cpu" else math.inf)


def _batches(
    ids: Sequence[str], examples: Mapping[str, Example], tokenizer: Tokenizer, device: torch.device
) -> list[_Batch]:
    """Return batches of edits of similar length, each as many as fit into one forward pass."""
    found = []
    for rows in _groups([len(examples[edit].ids) for edit in ids], device):
        group = [ids[row] for row in rows]
        part = collate([examples[edit] for edit in group], tokenizer.pad_token_id or 0)
        found.append(_Batch(group, [{name: one.to(device) for name, one in part.items()}]))
    return found


def _passes(
    examples: Mapping[str, Example],
    recipe: Recipe,
    tokenizer: Tokenizer,
    device: torch.device,
    beside: Mapping[str, Sequence[tuple[int, Lesson]]],
) -> Iterator[list[_Batch]]:
    """Yield the batches of each pass: all edits at once, or shuffled minibatches."""

    def batch(ids: Sequence[str]) -> _Batch:
        each, found = _batches(ids, examples, tokenizer, device), []
        for turn in range(recipe.turns):
            rows = [one for edit in ids for own, one in beside[edit] if own == turn]
            for group in _groups([len(one["input_ids"]) for one in rows], device):
                columns = {name: [rows[row][name] for row in group] for name in rows[0]}
                part = {name: pad_sequence(own, True).to(device) for name, own in columns.items()}
                found.append((turn, part))
        listed = [edit for one in each for edit in one.ids]
        return _Batch(listed, [one.parts[0] for one in each], found)

    ids, order = list(examples), torch.Generator().manual_seed(recipe.seed)
    size = recipe.batch_size or len(ids)
    if size >= len(ids):
        yield from itertools.repeat([batch(ids)], recipe.steps)
        return
    for _ in range(recipe.steps):
        shuffled = [ids[row] for row in torch.randperm(len(ids), generator=order).tolist()]
        yield [batch(shuffled[row : row + size]) for row in range(0, len(ids), size)]


class _Optimiser:
    """Adam; weights in less than float32 are stepped as float32 copies and rounded back."""

    def __init__(
        self, weights: Mapping[Any, nn.Parameter], recipe: Recipe, adalora: nn.Module | None = None
    ) -> None:
        self.parameters, self.adalora, self.steps = list(weights.values()), adalora, 0
        # `float` hands a float32 weight back as it is, so only less precise ones cost a copy.
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        rate, options = recipe.learning_rate, {"weight_decay": recipe.weight_decay, "fused": True}
        stepped = self.masters
        if recipe.rate_ratio != 1:
            blocks = torch.tensor([int(re.search(r"\.(\d+)\.", name)[1]) for name in weights])
            shares = (blocks - blocks.min()) / (blocks.max() - blocks.min()).clamp(min=1)  # 0 to 1
            rates = (rate * recipe.rate_ratio**shares).tolist()
            pairs = zip(stepped, rates, strict=True)
            stepped = [{"params": [master], "lr": own} for master, own in pairs]
        self.adam = torch.optim.Adam(stepped, lr=rate, **options)

    def step(self, wanted: bool) -> None:
        """Take one step on the gradients if `wanted`, and drop them; AdaLoRA counts its steps."""
        if wanted:
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
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def keep(self, rows: Sequence[int]) -> list[nn.Parameter]:
        """Keep these lanes of float32 stacks, with Adam's moments; return the new stacks."""
        rows = torch.tensor(rows)  # an index that every device takes
        states = [self.adam.state.pop(master) for master in self.masters]
        self.parameters = [nn.Parameter(old.detach()[rows].clone()) for old in self.parameters]
        self.masters = [parameter.detach() for parameter in self.parameters]
        for old, new in zip(states, self.masters, strict=True):
            self.adam.state[new] = {
                name: value[rows].clone() if value.dim() else value for name, value in old.items()
            }
        self.adam.param_groups[0]["params"] = self.masters
        return self.parameters


def trained(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Return the parameters that a training steps, by name: those selected, or the adapter's."""
    if recipe.adapter is None:
        return recipe.weights(model)
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name}


def _stacks(model: nn.Module, recipe: Recipe, ids: Sequence[str]) -> Lanes:
    """Return lanes that begin where the recipe does: at the model's weights or a fresh adapter."""

    def stack(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach().float().expand(len(ids), *weight.shape).clone())

    if recipe.adapter is None:
        return Lanes(model, ids, {name: stack(w) for name, w in recipe.weights(model).items()})
    wrapped, low_rank = adapt(model, recipe, 1), {}
    own = wrapped.active_adapter
    for name, layer in _adapted_layers(wrapped).items():
        down, up = layer.lora_A[own].weight, layer.lora_B[own].weight
        low_rank[name] = LowRank(stack(down), stack(up), float(layer.scaling[own]))
    wrapped.unload()
    return Lanes(model, ids, {}, low_rank)


def adapt(model: nn.Module, recipe: Recipe, count: int) -> nn.Module:
    """Wrap the model in the recipe's adapter for training on `count` edits; `unload` undoes it."""
    import peft  # seconds, which drawing again from rows does without

    names = module_names(model, recipe.layers, recipe.components)
    common = {"target_modules": names, "lora_alpha": recipe.alpha, "lora_dropout": 0.0}
    if recipe.adapter == "lora":
        config = peft.LoraConfig(r=recipe.rank, **common)
    else:
        steps = recipe.steps * math.ceil(count / (recipe.batch_size or count))
        if steps < 3:
            reason = "AdaLoRA prunes its ranks over 3 or more"
            raise InputError(f"recipe {recipe.name}: steps: {reason}")
        if len({weight.device for weight in model.parameters()}) > 1:  # peft joins their scores
            raise InputError(f"recipe {recipe.name}: AdaLoRA takes a model on one device alone")
        schedule = {"tinit": int(WARM_UP * steps), "tfinal": int(FINISH * steps)}
        ranks = {"init_r": math.ceil(SPARE_RANK * recipe.rank), "target_r": recipe.rank}
        config = peft.AdaLoraConfig(total_step=steps, **schedule, **ranks, **common)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return peft.get_peft_model(model, config).eval()


@contextmanager
def adapted(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: Recipe, progress: Progress = None
) -> Iterator[tuple[nn.Module, EditRecord]]:
    """Yield the model wrapped in an adapter trained on the edits, which is taken off on exit."""
    recipe.depends_on(model)  # the texts are those of the model without an adapter
    wrapped = adapt(model, recipe, len(edits))
    try:
        training = train(wrapped, tokenizer, edits, recipe, progress)
        norms = {}
        for name, layer in _adapted_layers(wrapped).items():
            delta = layer.get_delta_weight(wrapped.active_adapter)
            norms[f"{name}.weight"] = relative_norm(delta.detach(), layer.weight.detach())
        yield wrapped, EditRecord(**vars(training), change_norm=norms)
    finally:
        wrapped.unload()


def _adapted_layers(wrapped: nn.Module) -> dict[str, nn.Module]:
    modules = wrapped.get_base_model().named_modules()
    return {name: layer for name, layer in modules if hasattr(layer, "lora_A")}


def _orthogonality(adalora: nn.Module) -> Tensor:
    """Return AdaLoRA's penalty on singular vectors not orthogonal (arXiv 2303.10512, eq. 4)."""
    distances = []
    for name, weight in adalora.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            vectors = weight if ".lora_A." in name else weight.T  # (r, features)
            identity = torch.eye(len(vectors), device=weight.device)
            distances.append((vectors @ vectors.T - identity).norm())
    weight = adalora.peft_config[adalora.active_adapter[0]].orth_reg_weight
    return weight * torch.stack(distances).mean()
