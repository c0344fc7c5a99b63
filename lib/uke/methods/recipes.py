"""Name the published methods, the factors under study, and the rule that makes FT-UKE.

The rule was fixed before it had any rows and sees development rows alone. For each family (FT-M,
LoRA) it takes, of every factor, the level with the best balance, each at its own tuned rate
(`choose`). Together they are the family's `candidate`, which is tuned as any other
method; FT-UKE is the one with the best trial. The paper's own setting was not available to us.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pandas as pd
from pydantic import Field, StrictBool, StrictInt, model_validator
from torch import nn

from uke.errors import InputError, nearest
from uke.methods import finetune
from uke.methods.lanes import attached
from uke.methods.lessons import TEXTS
from uke.methods.locate_edit.covariance import LAYERS
from uke.methods.locate_edit.solvers import LocateRecipe
from uke.methods.method import EditRecord, Edits, Method, Progress, Tokenizer, Training, Written
from uke.methods.ranges import Count, Counted, Layers, NotNegative, Positive
from uke.models.model import module_names, select
from uke.project import number_key
from uke.results.stats import overall

INGREDIENTS = (
    *("general", "near", "paraphrases", "orders", "context", "shifts", "questions", "facts"),
    *("strength", "kept_rank", "null_threshold", "rate_ratio", "stop_on"),
)


class Recipe(Method):
    """Every choice of one way to fine-tune (protocol of arXiv 2506.09672 and its relatives).

    `layers` and `components`: see `module_names`. `steps` counts passes over all edits: one step
    of Adam each, or one per shuffled minibatch of `batch_size` edits. A loss (nats per token) below
    `stop_loss` ends the training: of the text after its question, or (`stop_on`) after a paraphrase
    that is never trained. The rate of the last block is `rate_ratio` times that of the first.

    Beside the text each step has a share, one of `turns`, of what is switched on (see
    `uke.methods.lessons`). With weight `hold`, divergence from the unedited model: along its own
    answers to `general` questions and to the edit's question asked of others (`near`). With weight
    `learn`: the text in `paraphrases` of the question; with its sentences in random `orders`; each
    sentence after so many words of `context` alone (COIN's idea); the text in `shifts` with a gap
    of positions at some token (FOVEATED's); and the model's own `questions` about each sentence,
    with that sentence or with what the model expects while reading the text (HPSE); and, of the
    league `text and facts`, every triple of the edit (`facts`) in no test's words. At the end the
    change of each weight keeps `kept_rank` singular values, is projected on directions of keys
    with a variance below `null_threshold`, and is scaled by `strength`.
    """

    loss: Literal["target_tokens", "last_prompt_token"] = "target_tokens"
    layers: Literal["all", "first_half", "second_half"] | Layers = "all"
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
    # Newer than stored rows, whose fingerprints know them where they are set alone.
    general: Counted = 0
    near: Counted = 0
    hold: NotNegative = 1.0
    paraphrases: Annotated[StrictInt, Field(ge=0, le=len(TEXTS["phrasings"]))] = 0
    orders: Counted = 0
    questions: Literal["sentence", "reading"] | None = None
    learn: NotNegative = 1.0
    turns: Count = 1
    strength: Positive = 1.0
    kept_rank: Count | None = None
    null_threshold: Positive | None = None
    context: Counted = 0
    shifts: Counted = 0
    facts: StrictBool = False
    rate_ratio: Positive = 1.0
    stop_on: Literal["question", "paraphrase"] = "question"

    later: ClassVar[Collection[str]] = (*INGREDIENTS, "hold", "learn", "turns")
    family: ClassVar[str] = "fine-tuning"

    @property
    def factors(self) -> Mapping[str, "Factor"]:
        return FACTORS

    @model_validator(mode="after")
    def _check_shrinking(self) -> "Recipe":
        if self.shrinks and self.adapter:
            raise ValueError("strength, kept_rank, null_threshold: expected no adapter")
        if self.null_threshold and self.components != ("down_proj",):
            raise ValueError("null_threshold: expected components down_proj alone")
        return self

    @property
    def shrinks(self) -> bool:
        """Whether less than the trained change stays."""
        return self.strength != 1 or bool(self.kept_rank or self.null_threshold)

    @property
    def measured(self) -> str | Sequence[int | float] | None:
        """Every layer for a null space; none where only texts of the covariance are needed."""
        if self.null_threshold:
            return self.layers
        return () if self.general or self.near else None

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The selected parameters; of an adapter the projections that it is merged into."""
        if self.adapter is None:
            return select(model, self.layers, self.components)
        names = module_names(model, self.layers, self.components)
        return {f"{name}.weight": model.get_submodule(name).weight for name in names}

    def write(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Training:
        """Train on the edits; an adapter is a fresh one, merged when it is trained."""
        if self.adapter is None:
            return finetune.train(model, tokenizer, edits, self, progress)
        with self.applied(model, tokenizer, edits, progress) as (wrapped, record):
            wrapped.merge_adapter()
        return Training(record.losses, record.steps)

    def applied(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> AbstractContextManager[tuple[nn.Module, EditRecord]]:
        """Write and undo as every method does; an adapter is left in peft's wrapper."""
        if self.adapter is None:
            return super().applied(model, tokenizer, edits, progress)
        return finetune.adapted(model, tokenizer, edits, self, progress)

    def write_each(self, model: nn.Module, tokenizer: Tokenizer, edits: Edits) -> Written:
        """Train all edits side by side; AdaLoRA, which prunes by step, and lessons one by one."""
        if self.adapter == "adalora" or {*INGREDIENTS} & {*self.model_dump(exclude_defaults=True)}:
            return super().write_each(model, tokenizer, edits)
        return finetune.train_each(model, tokenizer, edits, self)

    def lane_size(self, model: nn.Module) -> int:
        """Count the numbers of a lane: of LoRA its two low-rank matrices."""
        if self.adapter != "lora":
            return super().lane_size(model)
        return sum(self.rank * sum(weight.shape) for weight in self.weights(model).values())


class InContext(Method):
    """The text stands in the prompt before every question about it, and no weight changes."""

    family: ClassVar[str] = "in-context"
    moves_weights: ClassVar[bool] = False

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {}

    def write(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Training:
        """Refuse to write for good: nothing would pile up in the weights."""
        raise InputError(f"{self.name}: moves no weight; expected a method that writes")

    @contextmanager
    def applied(
        self, model: nn.Module, tokenizer: Tokenizer, edits: Edits, progress: Progress = None
    ) -> Iterator[tuple[nn.Module, EditRecord]]:
        """Let the model's `passages` say what stands before the questions about each edit."""
        passages = {edit.id: edit.answer for edit in edits}
        with attached(model, passages=getattr(model, "passages", {}) | passages):
            yield model, EditRecord()


# The published block of Llama-7/8B, 21 of 32, as a fraction of the depth: it fits any model.
_SINGLE = 0.66
_ADAPTER = {"components": ("q_proj", "v_proj"), "learning_rate": 5e-3, "steps": 70}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="FT-L", loss="last_prompt_token", layers=_SINGLE),
        Recipe(name="FT-M", layers=_SINGLE),
        Recipe(name="FT-A"),
        Recipe(name="LoRA", adapter="lora", **_ADAPTER),
        Recipe(name="AdaLoRA", adapter="adalora", **_ADAPTER),
        # Breadth first: every pass is an epoch of shuffled minibatches (block 22 of 32).
        Recipe(name="LocFT-BF", layers=22 / 32, batch_size=100),
        # Until the rule has chosen for a model: FT-M's loss on every `down_proj`.
        Recipe(name="FT-UKE"),
        Recipe(name="FT-UKE+", near=8, turns=4),
    )
}

_MEMIT = {"solver": "memit", "layers": LAYERS}
_ALPHAEDIT = {"solver": "alphaedit", "layers": LAYERS}
_UNKE = {"solver": "unke", "layers": (7 / 32,)}

# By key.
BASELINES: Mapping[str, Method] = {
    number_key(method.name): method
    for method in (
        LocateRecipe(name="MEMIT", **_MEMIT),
        LocateRecipe(name="AlphaEdit", stop_loss=0.0, **_ALPHAEDIT),
        LocateRecipe(name="UnKE", stop_loss=0.0, **_UNKE),
        LocateRecipe(name="AnyEdit (MEMIT)", anchors="windows", keep_keys=True, **_MEMIT),
        LocateRecipe(name="AnyEdit (AlphaEdit)", anchors="windows", keep_keys=True, **_ALPHAEDIT),
        LocateRecipe(name="AnyEdit (UnKE)", anchors="windows", stop_loss=5e-3, **_UNKE),
        LocateRecipe(name="AnyEdit++", anchors="surprisal", keep_keys=True, **_MEMIT),
        LocateRecipe(name="muKE", anchors="nested", window=30, keep_keys=True, **_MEMIT),
        InContext(name="in-context"),
    )
}


class Factor(NamedTuple):
    """One choice under study: a field of the recipe, and its value at each level.

    Levels in `of_adapters` are candidates for adapters alone; direct weights get them by name.
    """

    field: str
    levels: Mapping[str, Any]
    of_adapters: tuple[str, ...] = ()


# One block in each eighth of the depth, the middle one; where the published block is, that one.
_EIGHTHS = {f"eighth_{number}": ((number - 0.5) / 8,) for number in range(1, 9)}
_EIGHTHS[f"eighth_{int(_SINGLE * 8) + 1}"] = (_SINGLE,)
SINGLE_BLOCKS = tuple(_EIGHTHS)  # levels of the factor `layers` that train one block

FACTORS: Mapping[str, Factor] = {
    "loss_scope": Factor("loss", {one: one for one in ("last_prompt_token", "target_tokens")}),
    "layers": Factor("layers", _EIGHTHS | {n: n for n in ("first_half", "second_half", "all")}),
    "components": Factor(
        "components",
        {
            "down_proj": ("down_proj",),
            "mlp": ("mlp",),
            "attention": ("attention",),
            "both": ("mlp", "attention"),
            "query_value": _ADAPTER["components"],
        },
        of_adapters=("query_value",),
    ),
    "chat_template": Factor("chat_template", {"with": True, "without": False}),
    "end_of_turn": Factor("end_of_turn", {"with": True, "without": False}),
}
# The families on which the factors are studied; each becomes a candidate for FT-UKE.
FAMILIES = ("FT-M", "LoRA")


def vary(recipe: Recipe, levels: Mapping[str, str]) -> Recipe:
    """Set factors of the recipe to a level each; InputError for an unknown factor or level."""
    changes = {}
    for name, level in levels.items():
        if name not in FACTORS:
            raise InputError(f"unknown factor '{name}'{nearest(name, FACTORS)}")
        known = FACTORS[name].levels
        if level not in known:
            raise InputError(f"factor {name}: unknown level '{level}'{nearest(level, known)}")
        changes[FACTORS[name].field] = known[level]
    return recipe.model_copy(update=changes)


def levels(recipe: Recipe, names: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return by factor the levels that are studied on the recipe: all, or those of these names.

    Levels of adapters are studied on direct weights only if named. A factor without any of the
    names is left out. InputError for a name that no factor has.
    """
    known = {level for factor in FACTORS.values() for level in factor.levels}
    for name in names:
        if name not in known:
            raise InputError(f"levels: unknown level '{name}'{nearest(name, known)}")
    wanted, found = set(names) or known, {}
    for name, factor in FACTORS.items():
        left_out = () if recipe.adapter or names else factor.of_adapters
        own = [level for level in factor.levels if level in wanted and level not in left_out]
        if own:
            found[name] = own
    return found


def candidate(recipe: Recipe, chosen: Mapping[str, str]) -> Recipe:
    """Return the recipe with the chosen level of every factor, as a candidate for FT-UKE."""
    return vary(recipe, chosen).model_copy(update={"name": f"FT-UKE ({recipe.name})"})


def choose(frame: pd.DataFrame, names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return, by method and factor, the level with the best balance on development edits.

    Of equal ones the first listed is taken. `frame` has a row for each level and edit, at the
    level's tuned rate: split, method, factor, level, edit, score, kept (without it the mean score
    counts). InputError for a row of another split, and for a level (of these `names`, all if none)
    without one score for every edit.
    """
    others = frame.loc[frame["split"] != "development", "split"]
    if len(others) or frame.empty:
        found = f"{len(others)} of {others.iloc[0]!r}" if len(others) else "none"
        raise InputError(f"recipe rule: expected rows of split 'development' alone, found {found}")
    groups = frame.dropna(subset="score").groupby(["method", "factor", "level"])
    counts = groups["edit"].agg(["nunique", "size"]).eq(frame["edit"].nunique())
    # Rounded, so that a rounding error breaks no tie.
    scores = {cell: round(overall(own), 9) for cell, own in groups}
    chosen: dict[str, dict[str, str]] = {}
    for method in frame["method"].unique():
        for factor, studied in levels(RECIPES[method], names).items():
            cells = [(method, factor, level) for level in studied]
            for cell in cells:
                if cell not in scores or not counts.loc[cell].all():
                    where = f"recipe rule: {', '.join(cell)}"
                    raise InputError(f"{where}: expected one score for each edit")
            chosen.setdefault(method, {})[factor] = max(cells, key=scores.__getitem__)[-1]
    return chosen
