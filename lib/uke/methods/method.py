"""The protocol of an editing method: which weights it changes, how it writes, and defaults."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edits
from uke.errors import Diverged, InputError, Told, about, typed
from uke.methods.lanes import Lanes, relative_norm
from uke.methods.locate_edit import covariance
from uke.methods.ranges import Layers, Positive
from uke.models.model import kept, max_context
from uke.models.prompts import Example, example

Tokenizer = PreTrainedTokenizerBase
# Called after every step with the steps so far and the loss (nats per token).
Progress = Callable[[int, float], None] | None


@dataclass
class Training:
    """What a training did: mean loss of each pass (nats per token), and steps of the optimiser.

    `target_loss`: nats per token of the text with all target vectors in place, if there are any.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    target_loss: float | None = None


@dataclass
class EditRecord(Training):
    """What an edit did: its training, and the relative Frobenius norm of each weight's change."""

    change_norm: dict[str, float] = field(default_factory=dict)


class Written(NamedTuple):
    """Edits written alone: a lane and a training each; `failed` says why others have none."""

    lanes: Lanes
    trainings: list[Training]
    failed: dict[str, str]


class Method(BaseModel, ABC, metaclass=Told):
    """Every choice of one way to edit, under a name. A method of your own is one class:

        class Doubled(Method):
            def weights(self, model):
                return select(model, 0, ["down_proj"])

            def write(self, model, tokenizer, edits, progress=None):
                for weight in self.weights(model).values():
                    weight.data.mul_(2)
                return Training(steps=1)

        METHODS["Doubled"] = Doubled(name="Doubled")

    Choices are pydantic fields. `chat_template` presents texts through the tokenizer's template,
    `end_of_turn` puts that token into the target.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: ClassVar[str] = "own"
    moves_weights: ClassVar[bool] = True
    factors: ClassVar[Mapping[str, Any]] = {}  # the choices under study that the method has
    later: ClassVar[Collection[str]] = ()  # fields newer than stored rows, told where they are set

    name: Annotated[str, Field(min_length=1)]
    chat_template: StrictBool = True
    end_of_turn: StrictBool = True
    learning_rate: Positive | None = None
    seed: Annotated[StrictInt, Field(ge=0)] = 2024

    @property
    def fingerprint(self) -> str:
        """16 hex digits of every choice but the name: equal choices edit equally under any name."""
        unset = {*self.later}.difference(self.model_dump(exclude_defaults=True))
        choices = json.dumps(self.model_dump(exclude={"name", *unset}), sort_keys=True)
        return hashlib.sha256(choices.encode()).hexdigest()[:16]

    @property
    def measured(self) -> Layers | None:
        """Layers whose covariance it needs, none for its texts alone; None if it needs neither."""
        return None

    @abstractmethod
    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the model's own parameters that `write` changes, by name."""

    @abstractmethod
    def write(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Training:
        """Write the edits together into the weights as they are now, in place."""

    def depends_on(self, model: nn.Module | str) -> str | None:
        """Return a digest of what else decides the result: the texts of the model's covariance.

        `model`: the unedited model, or its fingerprint where only stored rows are looked up.
        """
        return None if self.measured is None else covariance.digest(model)

    def lane_size(self, model: nn.Module) -> int:
        """Count the numbers that each lane of `write_each` holds."""
        return sum(weight.numel() for weight in self.weights(model).values())

    @typed
    def examples(self, model: nn.Module, tokenizer: Tokenizer, edits: Edits) -> dict[str, Example]:
        """Return token ids and labels by the edit's id, as the method learns them.

        InputError for what is no list of edits, an edit given twice, one that spells a special
        token, and one that is longer than the context.
        """
        if not edits:
            raise InputError(f"{self.name}: no edits; expected at least one")
        longest, found, form = max_context(model), {}, (self.chat_template, self.end_of_turn)
        for edit in edits:
            if edit.id in found:
                raise InputError(f"edit '{edit.id}': given twice; expected unique ids")
            with about(f"edit '{edit.id}'"):
                found[edit.id] = example(tokenizer, edit.question, edit.answer, *form)
            if (length := len(found[edit.id].ids)) > longest:
                context = f"the model's context holds {longest}"
                raise InputError(f"edit '{edit.id}': it is {length} tokens long; {context}")
        return found

    @contextmanager
    def applied(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Iterator[tuple[nn.Module, EditRecord]]:
        """Yield the model with the edits written together; undone on exit, bit for bit."""
        weights = self.weights(model)
        with kept(model, weights) as before:
            training = self.write(model, tokenizer, edits, progress)
            yield model, EditRecord(**vars(training), change_norm=norms_since(weights, before))

    def write_each(self, model: nn.Module, tokenizer: Tokenizer, edits: Edits) -> Written:
        """Write each edit alone into the same weights; here one after another."""
        writes = {edit.id: partial(self.write, model, tokenizer, [edit]) for edit in edits}
        return write_one_by_one(model, self.weights(model), writes)


def write_one_by_one(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    writes: Mapping[str, Callable[[], Training]],
) -> Written:
    """Write each edit by its own call, and keep the weights it left as its lane.

    An edit that is not finite gets no lane; Diverged where that is every edit.
    """
    trainings, failed = {}, {}
    stacks: dict[str, list[Tensor]] = {name: [] for name in weights}
    for edit, write in writes.items():
        with kept(model, weights):
            try:
                trainings[edit] = write()
            except FloatingPointError as error:
                failed[edit] = str(error)
                continue
            for name, weight in weights.items():
                stacks[name].append(weight.detach().clone())
    if not trainings:
        raise Diverged("; ".join(dict.fromkeys(failed.values())), failed)
    lanes = Lanes(model, list(trainings), {name: torch.stack(own) for name, own in stacks.items()})
    return Written(lanes, list(trainings.values()), failed)


def norms_since(now: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each weight's relative Frobenius norm of what was changed since `before`."""
    return {
        name: relative_norm(weight.detach() - before[name], before[name])
        for name, weight in now.items()
    }
