"""Recipes: every choice of one way to fine-tune, the named ones, and the factors under study."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

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


def load_recipe(path: str | Path, base: Recipe | str | None = None) -> Recipe:
    """A recipe from a YAML file that holds only its differences from `base`.

    The file's own key `base` (a name in RECIPES) comes before the argument; without either the file stands on the
    defaults of `Recipe` and is called after the file. InputError for a missing file, a misspelt key, a wrong type
    or an unknown base.
    """
    changes = _read(Path(path))
    base = changes.pop("base", base)
    if unknown := [key for key in changes if key not in Recipe.model_fields]:
        raise InputError(f"{path}: unknown field '{unknown[0]}'{nearest(str(unknown[0]), Recipe.model_fields)}")
    if not isinstance(base, Recipe | None):
        base = named(base, where=f"{path}: field base: ")
    try:
        return Recipe(**{"name": Path(path).stem, **(base.model_dump() if base else {}), **changes})
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def named(name: Any, where: str = "") -> Recipe:
    """The recipe of that name in RECIPES; InputError naming the nearest one."""
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(f"{where}unknown recipe '{name}'{nearest(str(name), RECIPES)}")
    return RECIPES[name]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such recipe file")
    try:
        changes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(changes, dict | None):
        raise InputError(f"{path}: a mapping of recipe fields was expected, found {type(changes).__name__}")
    return dict(changes or {})


def _first(error: ValidationError) -> str:
    """The first fault of a recipe in one line: the field, what was expected, what was found."""
    fault = error.errors(include_url=False)[0]
    return f"field {fault['loc'][0]}: {fault['msg']} (found {fault['input']!r})"


def tuned_file(folder: Path, model: str) -> Path:
    """Where the settings chosen for a model are kept."""
    return folder / "tuned" / f"{re.sub('[^A-Za-z0-9.]+', '-', model).strip('-')}.yaml"


def configured(folder: Path, model: str, tuned: bool = True) -> dict[str, Recipe]:
    """Every recipe of `folder`/methods by name, with what the model's tuned file changes in it, if there is one.

    Published settings are for models of 7 to 8 billion parameters; a tuned file holds what development edits chose for
    another model. InputError for a bad file, or a tuned recipe that does not exist.
    """
    found = {recipe.name: recipe for recipe in map(load_recipe, sorted(folder.glob("methods/*.yaml")))}
    path = tuned_file(folder, model)
    for name, changes in (_read(path) if tuned and path.is_file() else {}).items():
        if name not in found:
            raise InputError(f"{path}: unknown recipe '{name}'{nearest(str(name), found)}")
        if not isinstance(changes, dict) or (unknown := set(changes) - set(Recipe.model_fields)):
            wrong = f"unknown field '{min(unknown)}'{nearest(min(unknown), Recipe.model_fields)}" if isinstance(changes, dict) else "expected recipe fields"
            raise InputError(f"{path}: {name}: {wrong}")
        try:
            found[name] = Recipe(**{**found[name].model_dump(), **changes})
        except ValidationError as error:
            raise InputError(f"{path}: {name}: {_first(error)}") from None
    return found


def tune(folder: Path, model: str, chosen: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write what was chosen for some recipes to the model's tuned file, beside what it holds of others."""
    path = tuned_file(folder, model)
    held = _read(path) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**held, **{name: dict(changes) for name, changes in chosen.items()}}, sort_keys=True)
    path.write_text("# Chosen on development edits by `make tune` (notebooks/tuning.ipynb, its rows are committed beside the figures).\n" + text, encoding="utf-8")
    return path
