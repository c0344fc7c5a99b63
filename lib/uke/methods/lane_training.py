"""Training in lanes: every edit in weights or an adapter of its own, all of them in one forward pass."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import Diverged
from uke.methods.finetune import Training, adapt, diverged, loss, prepare, weights
from uke.methods.lanes import Lanes, LowRank, constant_below
from uke.methods.recipes import Recipe
from uke.models.prompts import collate, group_by_length, training_tokens

DROP_SHARE = 1 / 8  # lanes that have ended leave the batch when they are at least this share of it


def train_apart(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe
) -> tuple[Lanes, list[Training], dict[str, str]]:
    """Lanes that hold each edit as if it had been trained alone, and what each training did; seconds are an equal share.

    Adam is element-wise, so one Adam on stacked weights is one for each lane. Edits of like length are trained together;
    lanes that have ended leave the batch. An edit whose loss is not finite leaves too and gets no lane: the last of the
    three says why, by its id; Diverged where that is every edit. `requires_grad` is the caller's to restore.
    """
    started = time.perf_counter()
    examples = prepare(model, tokenizer, edits, recipe)
    ids = list(examples)
    courses = []
    for places in group_by_length(
        [len(one.ids) for one in examples.values()], training_tokens(model.device)
    ):
        lanes = _laid_out(model, recipe, [ids[place] for place in places])
        batch = collate([examples[edit] for edit in lanes.ids], tokenizer.pad_token_id or 0)
        courses.append(_Course(recipe, lanes.ids))
        _train(
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
    return lanes, [trainings[edit] for edit in written], failed


def _train(lanes: Lanes, batch: Mapping[str, Tensor], course: "_Course") -> None:
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
            {name: _leaf(weight, count) for name, weight in weights(model, recipe).items()},
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
