"""Recipes: every choice of one way to fine-tune, the named ones, the factors under study, and the rule that makes FT-UKE.

The rule, fixed before any row of it existed, sees development rows alone. For each family, direct weights from FT-M and
adapters from LoRA, it takes of every factor the level with the highest mean of the average metric, each level at its own
tuned rate (`choose`); together they are the family's candidate (`candidate`). Every candidate gets as many trials as any
other method, and FT-UKE is the one whose best trial has the highest mean of the average metric (`best_trial`). Of equal
ones the first listed is taken. The paper's own setting was not available to us.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pandas as pd
from pydantic import BeforeValidator, Field, StrictBool, StrictFloat, StrictInt
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit
from uke.errors import InputError, nearest
from uke.methods import finetune
from uke.methods.locate_edit import covariance, solvers
from uke.methods.method import (
    Applied,
    Method,
    Positive,
    Progress,
    Training,
    Written,
    refuse_boolean,
)
from uke.models.model import module_names, select


def _several(value: Any) -> Any:
    """One layer number becomes a list of one, so that equal choices have equal fingerprints."""
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
NotNegative = Annotated[float, BeforeValidator(refuse_boolean), Field(ge=0, allow_inf_nan=False)]
Layer = Annotated[StrictInt, Field(ge=0)] | Fraction
Several = BeforeValidator(_several)
Layers = Annotated[
    Literal["all", "first_half", "second_half"] | Annotated[tuple[Layer, ...], Field(min_length=1)],
    Several,
]


class Recipe(Method):
    """Every choice of one way to fine-tune (sources: the protocol of arXiv 2506.09672 and its relatives).

    `layers` are numbers, fractions of the depth, halves or "all"; `components` are "mlp", "attention", "all" or a
    projection's own name. `chat_template` trains through the tokenizer's template, `end_of_turn` puts that token into
    the target. `steps` counts passes over all edits: one optimiser step each, or one per shuffled minibatch of
    `batch_size` edits. A loss (nats per token) below `stop_loss` ends the training. Rates are Adam's.
    """

    loss: Literal["target_tokens", "last_prompt_token"] = "target_tokens"
    layers: Layers = "all"
    components: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        "down_proj",
    )
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

    family: ClassVar[str] = "fine-tuning"

    @property
    def factors(self) -> Mapping[str, "Factor"]:
        """The choices under study, all of which a way to fine-tune has."""
        return FACTORS

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The selected parameters; of an adapter the projections that it is merged into."""
        if self.adapter is None:
            return select(model, self.layers, self.components)
        parameters = dict(model.named_parameters())
        names = module_names(model, self.layers, self.components)
        return {f"{name}.weight": parameters[f"{name}.weight"] for name in names}

    def write(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        progress: Progress | None = None,
    ) -> Training:
        """Train on the edits; an adapter is a fresh one, merged when it is trained."""
        if self.adapter is None:
            return finetune.train(model, tokenizer, edits, self, progress)
        return finetune.train_and_merge(model, tokenizer, edits, self, progress)

    def applied(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        progress: Progress | None = None,
    ) -> AbstractContextManager[Applied]:
        """As every method; the model with an adapter is peft's wrapper around it."""
        if self.adapter is None:
            return super().applied(model, tokenizer, edits, progress)
        return finetune.adapted(model, tokenizer, edits, self, progress)

    def write_each(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]
    ) -> Written:
        """Train all edits side by side; AdaLoRA, whose ranks are pruned by step, one by one."""
        return finetune.train_each(model, tokenizer, edits, self)

    def lane_size(self, model: nn.Module) -> int:
        """Count the numbers of a lane: of an adapter its two low-rank matrices."""
        if self.adapter is None:
            return super().lane_size(model)
        names = module_names(model, self.layers, self.components)
        projections = map(model.get_submodule, names)
        return sum(self.rank * (one.in_features + one.out_features) for one in projections)


class LocateRecipe(Method):
    """Every choice of one locate-then-edit method (sources: the published code of each; arXiv 2210.07229, 2410.02355,
    2405.15349, 2502.05628). Defaults are published settings for models of 7 to 8 billion parameters.

    `anchors` says whose hidden states are set: the last prompt token's (`last`), that before each window of `window`
    tokens (`windows`), before each window that begins where surprisal peaks (`surprisal`), or as `windows` with a
    loss on all later windows too (`nested`), each weighing the share of prefixes that hold it or 2 - cosine of its
    gradient with the own window's (`weighting`). Target values: `steps` of Adam at `learning_rate` on nats per token
    of the window + `decay` |delta| / |h|^2, with |delta| at most `clamp` |h|; an edit's end below `stop_loss`.
    `solver` writes them: `memit` (ridge `memit_lambda` times the second moment; `keep_keys` also holds the keys of
    all other positions of the edits), `alphaedit` (ridge `alphaedit_l2`, on directions whose second moment is below
    `null_threshold`), or `unke` (`unke_steps` of AdamW on the last of `layers`, held to `preservation` texts).

    `layers` are block numbers or fractions of the depth. Published blocks become fractions: MEMIT's 4-8 of 32, which
    in the embedded model of 8 are 1 and 2, as several fractions may name one block; UnKE's 7 of 32, there 1.
    `as_published` divides every layer's residual by `layers - (edits - 1)` and takes the projector of that number, as
    AnyEdit's MEMIT and AlphaEdit do since an inner loop overwrites the counter of layers.
    """

    solver: Literal["memit", "alphaedit", "unke"]
    anchors: Literal["last", "windows", "surprisal", "nested"] = "last"
    window: Count = 40
    weighting: Literal["prefix", "gradient"] = "prefix"
    layers: Annotated[tuple[Layer, ...], Field(min_length=1), Several]
    chat_template: StrictBool = True
    end_of_turn: StrictBool = True
    learning_rate: Positive = 0.5
    steps: Count = 25
    stop_loss: NotNegative = 5e-2
    clamp: Positive = 4.0
    decay: NotNegative = 1e-3
    memit_lambda: Positive = 15_000.0
    keep_keys: StrictBool = False
    alphaedit_l2: Positive = 10.0
    null_threshold: Positive = 2e-2
    unke_steps: Count = 50
    unke_rate: Positive = 2e-4
    unke_decay: NotNegative = 1e-2
    preservation: Annotated[StrictInt, Field(ge=0)] = 20
    as_published: StrictBool = False

    family: ClassVar[str] = "locate-then-edit"

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The `down_proj` of the layers, or UnKE's whole block."""
        return solvers.weights(model, self)

    def write(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        progress: Progress | None = None,
    ) -> Training:
        """Locate, find target vectors, solve."""
        return solvers.write(model, tokenizer, edits, self, progress)

    def write_each(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]
    ) -> Written:
        """Find the target vectors of all edits together, then solve for each."""
        return solvers.write_each(model, tokenizer, edits, self)

    def depends_on(self, model: nn.Module) -> str | None:
        """Return the digest of the texts that the model's covariance was measured on."""
        return covariance.digest(model)


class InContext(Method):
    """The text stands in the prompt before every question about it, and no weight changes."""

    family: ClassVar[str] = "in-context"
    moves_weights: ClassVar[bool] = False

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """None at all."""
        return {}

    def write(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        progress: Progress | None = None,
    ) -> Training:
        """Refuse to write for good: nothing would pile up in the weights."""
        raise InputError(f"{self.name}: moves no weight; expected a method that writes")

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        progress: Progress | None = None,
    ) -> Iterator[Applied]:
        """Let the model's `passages` say what stands before the questions about each edit."""
        model.passages = {edit.id: edit.answer for edit in edits}
        try:
            yield Applied(model, Training(), {})
        finally:
            del model.passages


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
            # Until the rule has chosen for a model: FT-M's loss on every `down_proj`, with template and end of turn.
            Recipe(name="FT-UKE"),
        )
    }
)

_FIVE = {"layers": covariance.LAYERS}
_ONE = {"layers": (7 / 32,)}
_MEMIT = {"solver": "memit", "keep_keys": True, **_FIVE}

BASELINES: Mapping[str, Method] = MappingProxyType(
    {
        "memit": LocateRecipe(name="MEMIT", solver="memit", **_FIVE),
        "alphaedit": LocateRecipe(name="AlphaEdit", solver="alphaedit", **_FIVE),
        "unke": LocateRecipe(name="UnKE", solver="unke", **_ONE),
        "anyedit_memit": LocateRecipe(name="AnyEdit (MEMIT)", anchors="windows", **_MEMIT),
        "anyedit_alphaedit": LocateRecipe(
            name="AnyEdit (AlphaEdit)", anchors="windows", solver="alphaedit", **_FIVE
        ),
        "anyedit_unke": LocateRecipe(
            name="AnyEdit (UnKE)", anchors="windows", solver="unke", **_ONE
        ),
        "anyedit_pp": LocateRecipe(name="AnyEdit++", anchors="surprisal", **_MEMIT),
        "muke": LocateRecipe(name="muKE", anchors="nested", window=30, **_MEMIT),
        "in_context": InContext(name="in-context"),
    }
)


@dataclass(frozen=True)
class Factor:
    """One choice under study: a field of the recipe, and for each level the changes that set it.

    `asking` holds the ways of asking that each level is crossed with, as the `chat` argument of `answering.answer`
    (None: as each probe says, False: raw prompts). Levels of `of_adapters` are studied on adapters alone.
    """

    name: str
    field: str
    levels: Mapping[str, Mapping[str, Any]]
    question: str
    asking: Mapping[str, bool | None] = field(default_factory=lambda: {"with": None})
    of_adapters: tuple[str, ...] = ()


# One block in each eighth of the depth, the middle one; of the eighth with the published block, that block.
_EIGHTHS = {f"eighth_{place}": (place - 0.5) / 8 for place in range(1, 9)} | {
    f"eighth_{int(_SINGLE * 8) + 1}": _SINGLE
}
_COMPONENTS = {
    "down_proj": ("down_proj",),
    "mlp": ("mlp",),
    "attention": ("attention",),
    "both": ("mlp", "attention"),
}
SINGLE_BLOCKS = tuple(_EIGHTHS)  # levels of the factor `layers` that train one block

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
                {level: {"layers": layers} for level, layers in _EIGHTHS.items()}
                | {level: {"layers": level} for level in ("first_half", "second_half", "all")},
                "Which blocks are trained?",
            ),
            Factor(
                "components",
                "components",
                {level: {"components": names} for level, names in _COMPONENTS.items()}
                | {"query_value": {"components": _ADAPTER["components"]}},
                "Which weights inside a block are trained?",
                of_adapters=("query_value",),
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
# The families the factors are studied on, and what the rule makes a candidate of.
FAMILIES = ("FT-M", "LoRA")


class Cell(NamedTuple):
    """One level of one factor of a recipe; cells with equal recipes are one training."""

    factor: str
    level: str
    recipe: Recipe


def vary(recipe: Recipe, factor: str, level: str) -> Recipe:
    """The recipe with one factor set to a level; InputError for an unknown factor or level."""
    if factor not in FACTORS:
        raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
    levels = FACTORS[factor].levels
    if level not in levels:
        raise InputError(f"factor {factor}: unknown level '{level}'{nearest(level, levels)}")
    return Recipe(**{**recipe.model_dump(), **levels[level]})


def levels(recipe: Recipe, factor: str, count: int = 0) -> list[str]:
    """The levels of a factor that are studied on the recipe: all, or `count` of them, evenly, the first and the last among them.

    InputError for an unknown factor, or a count that is neither 0 nor 2 or more.
    """
    if factor not in FACTORS:
        raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
    if count < 0 or count == 1:
        raise InputError(f"levels is {count}; expected 0 for all, or at least 2")
    found = FACTORS[factor]
    return evenly(
        [level for level in found.levels if recipe.adapter or level not in found.of_adapters], count
    )


def evenly(values: Sequence, count: int) -> list:
    """So many of the values, the first and the last among them; of one the middle, of 0 all."""
    if not count or count >= len(values):
        return list(values)
    if count == 1:
        return [values[len(values) // 2]]
    return [values[place * (len(values) - 1) // (count - 1)] for place in range(count)]


def cells(recipe: Recipe, count: int = 0) -> list[Cell]:
    """Every level of every factor on the recipe (`count`: see `levels`), one factor at a time."""
    return [
        Cell(factor, level, vary(recipe, factor, level))
        for factor in FACTORS
        for level in levels(recipe, factor, count)
    ]


def grid(
    recipe: Recipe, choices: Mapping[str, Sequence[str]]
) -> list[tuple[dict[str, str], Recipe]]:
    """Every combination of these levels, by factor, with the recipe that has them."""
    every = [dict(zip(choices, levels)) for levels in product(*choices.values())]
    return [(levels, combined(recipe, levels)) for levels in every]


def combined(recipe: Recipe, chosen: Mapping[str, str]) -> Recipe:
    """The recipe with a level of each of several factors."""
    for factor, level in chosen.items():
        recipe = vary(recipe, factor, level)
    return recipe


def choose(frame: pd.DataFrame, count: int = 0) -> dict[str, dict[str, str]]:
    """By method and factor, the level with the highest mean score on development edits; of equal ones the first listed.

    `frame` has a row for each cell and edit, at the level's tuned rate: split, method, factor, level, edit, score. Raises
    InputError for a row of another split, and for a cell of `cells(recipe, count)` that lacks edits, or has one twice.
    """
    _refuse_others(frame)
    chosen: dict[str, dict[str, str]] = {}
    for method in dict.fromkeys(frame["method"]):
        if method not in RECIPES:
            raise InputError(
                f"recipe rule: unknown method '{method}'{nearest(str(method), RECIPES)}"
            )
        own = frame[frame["method"] == method]
        for factor in FACTORS:
            asked = levels(RECIPES[method], factor, count)
            means = _means(
                own[own["factor"] == factor], asked, set(own["edit"]), f"{method}, {factor}"
            )
            chosen.setdefault(method, {})[factor] = max(asked, key=means.__getitem__)
    return chosen


def candidate(recipe: Recipe, chosen: Mapping[str, str]) -> Recipe:
    """The recipe with the chosen level of every factor, as a candidate for FT-UKE."""
    return combined(recipe, chosen).model_copy(update={"name": f"FT-UKE ({recipe.name})"})


def best_trial(frame: pd.DataFrame) -> tuple[str, str]:
    """Method and level of the trial with the highest mean score on development edits; of equal ones the first listed.

    `frame` has a row for each trial and edit: split, method, level, edit, score. Raises InputError for a row of another
    split, and for a trial that lacks edits, or has one twice.
    """
    _refuse_others(frame)
    means = {}
    for method in dict.fromkeys(frame["method"]):
        own = frame[frame["method"] == method]
        tried = list(dict.fromkeys(own["level"]))
        means |= {
            (method, level): mean
            for level, mean in _means(own, tried, set(frame["edit"]), method).items()
        }
    return max(means, key=means.__getitem__)


def _means(rows: pd.DataFrame, asked: Sequence[str], edits: set, place: str) -> dict[str, float]:
    """Mean score of each level, to nine decimals, so that a rounding error breaks no tie."""
    found = {}
    for level in asked:
        own = rows[rows["level"] == level]
        if absent := sorted(f"'{edit}'" for edit in edits - set(own["edit"])):
            raise InputError(
                f"recipe rule: {place}: level '{level}' lacks {len(absent)} of {len(edits)} edits ({', '.join(absent[:5])})"
            )
        if own["edit"].duplicated().any() or own["score"].isna().any():
            raise InputError(
                f"recipe rule: {place}: level '{level}': expected one score for each edit, that of the tuned rate"
            )
        found[level] = round(float(own["score"].mean()), 9)
    return found


def _refuse_others(frame: pd.DataFrame) -> None:
    """Only development rows may choose, and there must be some."""
    others = frame[frame["split"] != "development"]
    if len(others):
        split = others["split"].iloc[0]
        said = (
            "Test rows offered to the recipe rule: refused"
            if split == "test"
            else "Rows of no development split offered to the recipe rule: refused"
        )
        raise InputError(
            f"{said} ({len(others)} of {len(frame)} rows have split {split!r}; it sees rows of split 'development' alone)"
        )
    if frame.empty:
        raise InputError("recipe rule: no rows")
