"""The choices of a method that a person makes by hand: the level of each factor, which levels there are, and why not the others."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.errors import InputError
from uke.methods.method import Method
from uke.methods.recipes import FACTORS, Recipe, vary
from uke.models.model import layer_index, module_names

NAMES = {
    "loss_scope": "Loss from",
    "layers": "Blocks",
    "components": "Weights",
    "chat_template": "Trained through",
    "end_of_turn": "End of turn",
}
LEVELS = {
    ("loss_scope", "last_prompt_token"): "last prompt token",
    ("loss_scope", "target_tokens"): "all target tokens",
    ("layers", "first_half"): "first half",
    ("layers", "second_half"): "second half",
    ("layers", "all"): "all blocks",
    ("components", "down_proj"): "down projection",
    ("components", "mlp"): "feed-forward",
    ("components", "both"): "attention and feed-forward",
    ("components", "query_value"): "query and value",
    ("chat_template", "with"): "chat template",
    ("chat_template", "without"): "raw prompt",
    ("end_of_turn", "with"): "learnt",
    ("end_of_turn", "without"): "left out",
}


class Refused(InputError):
    """Bad input of one field of a form."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


def named(model: nn.Module, factor: str, level: str) -> str:
    """The level as a person reads it; a level that trains one block says which of this model's."""
    depth, layers = (
        model.config.get_text_config(decoder=True).num_hidden_layers,
        FACTORS[factor].levels[level].get("layers"),
    )
    if isinstance(layers, float):
        return f"block {layer_index(layers, depth)}"
    return LEVELS.get((factor, level), level.replace("_", " "))


def level_of(method: Method, factor: str) -> str | None:
    """The level of a factor that a method has, None where it has one of its own or no such choice."""
    if factor not in method.factors:
        return None
    return next(
        (level for level in FACTORS[factor].levels if vary(method, factor, level) == method), None
    )


def without_factors(method: Method) -> str:
    """Why a method has no factor to choose."""
    why = (
        "puts the text into the prompt and trains nothing"
        if not method.moves_weights
        else "finds its place in the weights itself"
    )
    return f"{method.name} {why}"


def reasons(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, method: Method, factor: str
) -> dict[str, str]:
    """Why each level of a factor cannot be chosen for a method on this model, by level; empty where it can."""
    if factor not in method.factors:
        return dict.fromkeys(FACTORS[factor].levels, without_factors(method))
    return {
        level: _reason(model, tokenizer, method, (factor, level))
        for level in FACTORS[factor].levels
    }


def _reason(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, cell: tuple[str, str]
) -> str:
    factor, level = cell
    if level in FACTORS[factor].of_adapters and not recipe.adapter:
        return "a choice of adapters only (LoRA, AdaLoRA)"
    varied = vary(recipe, factor, level)
    if factor == "chat_template" and varied.chat_template and not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    try:
        module_names(model, varied.layers, varied.components)
    except InputError as error:
        return str(error) if factor in ("layers", "components") else ""
    return ""


def composed(method: Method, changes: Mapping[str, Any]) -> Method:
    """The method with these fields; Refused, naming the field, where one is unknown or no such value."""
    if unknown := [field for field in changes if field not in type(method).model_fields]:
        raise Refused(str(unknown[0]), f"{method.name} has no choice '{unknown[0]}'")
    try:
        return type(method)(**{**method.model_dump(), **changes})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = str(fault["loc"][0])
        raise Refused(
            field,
            f"{field.replace('_', ' ')}: {fault['msg'][:1].lower()}{fault['msg'][1:]} (found {fault['input']!r})",
        ) from None


def check_place(model: nn.Module, method: Method) -> None:
    """Refused where a recipe selects no weight of the model."""
    if method.factors:
        try:
            module_names(model, method.layers, method.components)
        except InputError as error:
            raise Refused(
                "components" if str(error).startswith("components") else "layers", str(error)
            ) from None


def blocks(text: str) -> tuple[int | float, ...]:
    """Block numbers and fractions of the depth, as `2, 5` or `0.5`; Refused for anything else."""
    try:
        return tuple(
            float(part) if "." in part else int(part) for part in text.replace(",", " ").split()
        )
    except ValueError:
        raise Refused(
            "layers", f"own blocks: expected numbers such as 2, 5 or 0.5, found {text.strip()!r}"
        ) from None
