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

from uke.edits import Edit
from uke.finetune import Training, adapt, loss, prepare, weights
from uke.lanes import Lanes, LowRank, constant_below
from uke.models import collate
from uke.recipes import Recipe

DROP_SHARE = 1 / 8  # lanes that have ended leave the batch when they are at least this share of it


def train_apart(model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], recipe: Recipe) -> tuple[Lanes, list[Training]]:
    """Lanes that hold each edit as if it had been trained alone, and what each training did; seconds are an equal share.

    Adam is element-wise, so one Adam on stacked weights is one for each lane. Lanes that have ended leave the batch.
    FloatingPointError names every edit whose loss is not finite. `requires_grad` is the caller's to restore.
    """
    started = time.perf_counter()
    examples = prepare(model, tokenizer, edits, recipe)
    course = _Course(recipe, list(examples))
    lanes = _laid_out(model, recipe, course.ids)
    model.requires_grad_(False)
    batch = {name: tensor.to(model.device) for name, tensor in collate(list(examples.values()), tokenizer.pad_token_id or 0).items()}
    adam = torch.optim.Adam(_parameters(lanes), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    with constant_below(model, (*lanes.weights, *lanes.low_rank)) as below, lanes.laid():
        for _ in range(recipe.steps):
            losses = loss(model, batch, recipe.loss)  # (A,)
            course.note(losses.tolist(), _parameters(lanes))
            if len(course.ended) == len(course.ids):
                break
            adam.zero_grad()
            losses.sum().backward()
            adam.step()
            if places := course.left():
                batch = _shortened(batch, places)
                below.keep(places)
                _keep(lanes, adam, torch.tensor(places, device=model.device))
                lanes.ids = [course.ids[lane] for lane in course.going]
                lanes.places = {edit: place for place, edit in enumerate(lanes.ids)}
                lanes.read(lanes.ids)
    stacks = course.stacked(_parameters(lanes))
    for training in course.trainings:
        training.seconds = (time.perf_counter() - started) / len(edits)
    return _filled(lanes, course.ids, stacks), course.trainings


@dataclass
class _Course:
    """Trainings side by side: which lanes are still in the batch, what each has done, the weights of those that ended."""

    recipe: Recipe
    ids: list[str]
    going: list[int] = field(init=False)
    trainings: list[Training] = field(init=False)
    ended: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.going = list(range(len(self.ids)))
        self.trainings = [Training() for _ in self.ids]

    def note(self, losses: Sequence[float], parameters: Sequence[nn.Parameter]) -> None:
        """The loss of every lane in the batch before its next step; those below `stop_loss` end with the weights they have."""
        here = [(place, lane, losses[place]) for place, lane in enumerate(self.going) if lane not in self.ended]
        if broken := [self.ids[lane] for _, lane, value in here if not math.isfinite(value)]:
            raise FloatingPointError(
                f"recipe {self.recipe.name}: the loss of edit {', '.join(map(repr, broken))} is not finite "
                f"after {self.trainings[here[0][1]].steps} steps; expected a learning_rate below {self.recipe.learning_rate:g}"
            )
        for place, lane, value in here:
            training = self.trainings[lane]
            training.losses.append(value)
            if value < self.recipe.stop_loss:
                training.stopped = "loss"
                self.ended[lane] = [parameter.detach()[place].clone() for parameter in parameters]
            else:
                training.steps += 1

    def left(self) -> list[int] | None:
        """Places in the batch that go on, once enough lanes have ended to make it worth while."""
        places = [place for place, lane in enumerate(self.going) if lane not in self.ended]
        if len(self.going) - len(places) < max(1, DROP_SHARE * len(self.going)):
            return None
        self.going = [self.going[place] for place in places]
        return places

    def stacked(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Each parameter of all lanes, in their order."""
        for place, lane in enumerate(self.going):
            self.ended.setdefault(lane, [parameter.detach()[place].clone() for parameter in parameters])
        return [torch.stack([self.ended[lane][number] for lane in range(len(self.ids))]) for number in range(len(parameters))]


def _laid_out(model: nn.Module, recipe: Recipe, ids: Sequence[str]) -> Lanes:
    """Lanes that all begin where the recipe begins: at the model's weights, or at the adapter that `adapt` makes."""
    count = len(ids)
    if recipe.adapter is None:
        return Lanes(model, ids, {name: _leaf(weight, count) for name, weight in weights(model, recipe).items()})
    wrapped = adapt(model, recipe, 1)
    low_rank = {name: LowRank(_leaf(one.down[0], count), _leaf(one.up[0], count), one.scale) for name, one in adapter(wrapped).items()}
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
        if hasattr(layer, "lora_E") and own in layer.lora_E:  # AdaLoRA's singular values, and ranks that count after pruning
            down, up = layer.lora_A[own] * layer.lora_E[own], layer.lora_B[own]
            scale = float(layer.scaling[own] / (layer.ranknum[own] + 1e-5))
        else:
            down, up, scale = layer.lora_A[own].weight, layer.lora_B[own].weight, float(layer.scaling[own])
        found[name] = LowRank(down.detach()[None].clone(), up.detach()[None].clone(), scale)
    return found


def _parameters(lanes: Lanes) -> list[nn.Parameter]:
    return [*lanes.weights.values(), *(part for added in lanes.low_rank.values() for part in (added.down, added.up))]


def _filled(lanes: Lanes, ids: Sequence[str], stacks: Sequence[Tensor]) -> Lanes:
    """Lanes of all edits that hold these stacks, given in the order of `_parameters`."""
    following = iter(stacks)
    whole = {name: next(following) for name in lanes.weights}
    low_rank = {name: LowRank(next(following), next(following), added.scale) for name, added in lanes.low_rank.items()}
    return Lanes(lanes.model, ids, whole, low_rank)


def _shortened(batch: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """The rows that go on, without the columns that are padding in all of them."""
    longest = int(batch["attention_mask"][places].sum(1).max())
    return {name: tensor[places, :longest] for name, tensor in batch.items()}


def _keep(lanes: Lanes, adam: torch.optim.Adam, places: Tensor) -> None:
    """Lanes and moments of the places that go on."""
    renewed = []
    for parameter in adam.param_groups[0]["params"]:
        new = nn.Parameter(parameter.detach()[places].clone())
        state = adam.state.pop(parameter)
        adam.state[new] = {name: value[places].clone() if value.shape == parameter.shape else value for name, value in state.items()}
        renewed.append(new)
    adam.param_groups[0]["params"] = renewed
    following = iter(renewed)
    lanes.weights = {name: next(following) for name in lanes.weights}
    lanes.low_rank = {name: LowRank(next(following), next(following), added.scale) for name, added in lanes.low_rank.items()}
