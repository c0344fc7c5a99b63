"""Recipes: every choice of one way to fine-tune, the named ones, and the factors under study."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from uke.errors import InputError, nearest


def _refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number was expected, not a boolean")
    return value


def _several(value: Any) -> Any:
    """One layer number becomes a list of one, so that equal choices have equal fingerprints."""
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
# YAML reads `5e-4` as text, so numbers may come as text; only true and false are refused.
Positive = Annotated[float, BeforeValidator(_refuse_boolean), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_refuse_boolean), Field(ge=0, allow_inf_nan=False)]
Layer = Annotated[StrictInt, Field(ge=0)] | Fraction
Several = BeforeValidator(_several)
Layers = Annotated[Literal["all", "first_half", "second_half"] | Annotated[tuple[Layer, ...], Field(min_length=1)], Several]


class Choices(BaseModel):
    """Every choice of one way to edit, under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of every choice but the name: equal choices edit equally whatever they are called."""
        choices = json.dumps(self.model_dump(exclude={"name"}), sort_keys=True)
        return hashlib.sha256(choices.encode()).hexdigest()[:16]


class Recipe(Choices):
    """Every choice of one way to fine-tune (sources: the protocol of arXiv 2506.09672 and its relatives).

    `layers` are numbers, fractions of the depth, halves or "all"; `components` are "mlp", "attention", "all" or a
    projection's own name. `chat_template` trains through the tokenizer's template, `end_of_turn` puts that token into
    the target. `steps` counts passes over all edits: one optimiser step each, or one per shuffled minibatch of
    `batch_size` edits. A loss (nats per token) below `stop_loss` ends the training. Rates are Adam's.
    """

    loss: Literal["target_tokens", "last_prompt_token"] = "target_tokens"
    layers: Layers = "all"
    components: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = ("down_proj",)
    chat_template: StrictBool = True
    end_of_turn: StrictBool = True
    adapter: Literal["lora", "adalora"] | None = None
    rank: Count = 8
    alpha: Positive = 32.0
    learning_rate: Positive = 5e-4
    steps: Count = 25
    stop_loss: NotNegative = 1e-2
    batch_size: Count | None = None
    weight_decay: NotNegative = 0.0
    seed: Annotated[StrictInt, Field(ge=0)] = 2024


# The published block of Llama-7/8B, 21 of 32, as a fraction of the depth, so that it fits any model (Qwen2.5-7B: 27 of 28).
_SINGLE = 0.66
_ADAPTER = {"components": ("q_proj", "v_proj"), "learning_rate": 5e-3, "steps": 70}

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(name="FT-L", loss="last_prompt_token", layers=_SINGLE),
            Recipe(name="FT-M", layers=_SINGLE),
            Recipe(name="FT-A"),
            Recipe(name="LoRA", adapter="lora", **_ADAPTER),
            Recipe(name="AdaLoRA", adapter="adalora", **_ADAPTER),
            # Breadth first: every pass is an epoch of shuffled minibatches (block 22 of Llama-3-8B's 32).
            Recipe(name="LocFT-BF", layers=22 / 32, batch_size=100),
        )
    }
)


@dataclass(frozen=True)
class Factor:
    """One choice under study: a field of the recipe, and for each level the changes that set it.

    `asking` holds the ways of asking that each level is crossed with, as the `chat` argument of `answering.answer`
    (None: as each probe says, False: raw prompts).
    """

    name: str
    field: str
    levels: Mapping[str, Mapping[str, Any]]
    question: str
    asking: Mapping[str, bool | None] = field(default_factory=lambda: {"with": None})


FACTORS: Mapping[str, Factor] = MappingProxyType(
    {
        factor.name: factor
        for factor in (
            Factor(
                "loss_scope",
                "loss",
                {level: {"loss": level} for level in ("last_prompt_token", "target_tokens")},
                "Is the loss read from the last prompt token only, or from every target token?",
            ),
            Factor(
                "layers",
                "layers",
                {"single": {"layers": _SINGLE}}
                | {level: {"layers": level} for level in ("first_half", "second_half", "all")},
                "Which blocks are trained?",
            ),
            Factor(
                "components",
                "components",
                {level: {"components": (level,)} for level in ("down_proj", "mlp", "attention", "all")},
                "Which weights inside a block are trained?",
            ),
            Factor(
                "chat_template",
                "chat_template",
                {"with": {"chat_template": True}, "without": {"chat_template": False}},
                "Is the text trained through the chat template, and asked through it?",
                {"with": None, "without": False},
            ),
            Factor(
                "end_of_turn",
                "end_of_turn",
                {"with": {"end_of_turn": True}, "without": {"end_of_turn": False}},
                "Does the target include the token that ends the assistant's turn?",
            ),
        )
    }
)


def vary(recipe: Recipe, factor: str, level: str) -> Recipe:
    """The recipe with one factor set to a level; InputError for an unknown factor or level."""
    if factor not in FACTORS:
        raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
    levels = FACTORS[factor].levels
    if level not in levels:
        raise InputError(f"factor {factor}: unknown level '{level}'{nearest(level, levels)}")
    return Recipe(**{**recipe.model_dump(), **levels[level]})
