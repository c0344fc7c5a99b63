"""Recipes: factors that change more than they say, fingerprints that miss a choice, a bad rule."""

import pandas as pd
import pytest
from uke.errors import InputError
from uke.methods import recipes
from uke.methods.recipes import FACTORS, RECIPES, SINGLE_BLOCKS, Recipe, levels, vary

OTHER = {
    "loss": "last_prompt_token",
    "layers": (1, 0.5),
    "components": ("mlp",),
    "chat_template": False,
    "end_of_turn": False,
    "adapter": "lora",
    "rank": 4,
    "alpha": 16.0,
    "learning_rate": 1e-3,
    "steps": 7,
    "stop_loss": 0.5,
    "batch_size": 3,
    "weight_decay": 0.1,
    "seed": 1,
}
OTHER |= {"general": 2, "near": 2, "hold": 2.0, "paraphrases": 2, "orders": 2, "turns": 2}
OTHER |= {"questions": "reading", "learn": 2.0, "strength": 0.5, "kept_rank": 2}
OTHER |= {"null_threshold": 0.1, "context": 2, "shifts": 2, "facts": True, "rate_ratio": 2.0}
OTHER |= {"stop_on": "paraphrase"}


def differing(one: Recipe, other: Recipe) -> set[str]:
    return {name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)}


def test_the_fingerprint_sees_every_choice_and_no_name():
    base, fields = RECIPES["FT-M"], RECIPES["FT-M"].model_dump()
    assert set(OTHER) == set(Recipe.model_fields) - {"name"}
    changed = [Recipe(**fields | {name: value}).fingerprint for name, value in OTHER.items()]
    assert len({base.fingerprint, *changed}) == len(OTHER) + 1
    assert Recipe(**{**base.model_dump(), "name": "renamed"}).fingerprint == base.fingerprint
    # Those of stored rows, which are older than some choices.
    known = {"FT-L": "30d66b278c3f3dc3", "FT-M": "017f1172e320ae9f", "LoRA": "8ef47e7e210fae1e"}
    assert {name: RECIPES[name].fingerprint for name in known} == known
    assert Recipe(name="a", layers=3).fingerprint == Recipe(name="b", layers=[3]).fingerprint


# --- factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORS)
def test_a_level_changes_the_field_of_its_factor_alone(name):
    factor, base = FACTORS[name], RECIPES["FT-M"]
    varied = [vary(base, {name: level}) for level in factor.levels]
    assert all(differing(recipe, base) <= {factor.field} for recipe in varied)
    assert len({recipe.fingerprint for recipe in varied}) == len(factor.levels) >= 2
    assert varied == [Recipe(**recipe.model_dump()) for recipe in varied]


@pytest.mark.parametrize("name", recipes.FAMILIES)
def test_one_level_of_every_factor_is_the_recipe_itself(name):
    base, own = RECIPES[name], {}
    for factor, studied in levels(base).items():
        (own[factor],) = (level for level in studied if vary(base, {factor: level}) == base)
    direct = {"loss_scope": "target_tokens", "chat_template": "with", "end_of_turn": "with"}
    assert own == direct | (
        {"layers": "eighth_6", "components": "down_proj"}
        if name == "FT-M"
        else {"layers": "all", "components": "query_value"}
    )


@pytest.mark.parametrize(
    ("depth", "expected"), [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (32, [2, 6, 10, 14, 18, 21, 26, 30])]
)
def test_the_eighths_are_one_block_in_each_eighth_of_the_depth(depth, expected):
    fractions = [FACTORS["layers"].levels[level] for level in SINGLE_BLOCKS]
    assert [int(fraction * depth) for (fraction,) in fractions] == expected
    assert RECIPES["FT-M"].layers in fractions


def test_levels_are_chosen_by_name_in_the_factors_order():
    names = ["all", "query_value", "mlp", "eighth_3"]
    found = {"layers": ["eighth_3", "all"], "components": ["mlp", "query_value"]}
    assert levels(RECIPES["FT-M"], names) == levels(RECIPES["LoRA"], names) == found
    assert "query_value" not in levels(RECIPES["FT-M"])["components"]


def test_misspelt_factors_and_levels_are_answered_with_the_nearest():
    recipe = RECIPES["FT-M"]
    with pytest.raises(InputError, match="unknown factor 'layer'; did you mean 'layers'"):
        vary(recipe, {"layer": "all"})
    with pytest.raises(InputError, match="factor layers: unknown level 'frist_half'; did you mean"):
        vary(recipe, {"layers": "frist_half"})
    with pytest.raises(InputError, match="unknown level 'eigth_3'; did you mean"):
        levels(recipe, ["eigth_3"])


def test_the_candidate_has_every_chosen_level_and_nothing_else_changed():
    chosen = {"loss_scope": "target_tokens", "layers": "second_half", "components": "both"}
    found = recipes.candidate(RECIPES["LoRA"], chosen | {"chat_template": "without"})
    assert (found.name, found.layers, found.components, found.chat_template) == (
        "FT-UKE (LoRA)",
        "second_half",
        ("mlp", "attention"),
        False,
    )
    assert differing(found, RECIPES["LoRA"]) == {"name", "layers", "components", "chat_template"}


# --- the rule -------------------------------------------------------------------------------------


def measured(best=None, method="FT-M", names=()):
    """Development rows of every level on three edits; `best` gives some another score than 0.5."""
    found = [
        ("development", method, factor, level, edit, (best or {}).get((factor, level), 0.5) + shift)
        for factor, own in levels(RECIPES[method], names).items()
        for level in own
        for edit, shift in (("a", -0.1), ("b", 0.0), ("c", 0.1))
    ]
    return pd.DataFrame(found, columns=["split", "method", "factor", "level", "edit", "score"])


def test_the_rule_takes_of_every_factor_the_best_level_for_each_method_on_its_own():
    frame = pd.concat(
        [
            measured({("layers", "all"): 0.9, ("chat_template", "without"): 0.6}),
            measured({("layers", "eighth_2"): 0.7, ("components", "query_value"): 0.8}, "LoRA"),
        ]
    )
    chosen = recipes.choose(frame.sample(frac=1, random_state=1))
    assert (chosen["FT-M"]["layers"], chosen["FT-M"]["chat_template"]) == ("all", "without")
    lora = {"layers": "eighth_2", "components": "query_value", "chat_template": "with"}
    assert lora.items() <= chosen["LoRA"].items()
    assert set(chosen["FT-M"]) == set(FACTORS)


def test_ties_go_to_the_level_listed_first_whatever_the_order_of_the_rows():
    chosen = recipes.choose(measured().iloc[::-1])["FT-M"]
    assert chosen == {name: next(iter(factor.levels)) for name, factor in FACTORS.items()}
    nearly = measured({("chat_template", "without"): 0.5 + 1e-12})
    assert recipes.choose(nearly)["FT-M"]["chat_template"] == "with"


@pytest.mark.parametrize("split", ["test", None])
def test_rows_of_another_split_are_refused_even_one_of_them(split):
    frame = pd.concat([measured(), measured().iloc[:1].assign(split=split)])
    with pytest.raises(InputError, match=f"split 'development' alone, found 1 of {split!r}"):
        recipes.choose(frame)


def test_a_level_without_one_score_for_every_edit_is_named():
    frame = measured()
    level = (frame["factor"] == "layers") & (frame["level"] == "eighth_3")
    missing = frame.assign(score=frame["score"].where(~level | (frame["edit"] != "a")))
    one = "FT-M, layers, eighth_3: expected one score for each edit"
    for broken, message in (
        (frame[~level], one),
        (frame[~level | (frame["edit"] != "b")], one),
        (pd.concat([frame, frame[level]]), one),
        (missing, one),
        (frame.iloc[:0], "found none"),
    ):
        with pytest.raises(InputError, match=message):
            recipes.choose(broken)


def test_fewer_levels_are_chosen_among_where_fewer_were_run():
    names = ["eighth_1", "all", "with"]
    few = measured({("layers", "all"): 0.6}, names=names)
    chosen = {"layers": "all", "chat_template": "with", "end_of_turn": "with"}
    assert recipes.choose(few, names)["FT-M"] == chosen
    with pytest.raises(InputError, match="FT-M, loss_scope, last_prompt_token: expected one score"):
        recipes.choose(few)
