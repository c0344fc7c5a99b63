"""Recipes: factors that change more than they say, fingerprints that miss a choice, a bad rule."""

import pandas as pd
import pytest
from uke.errors import InputError
from uke.methods import recipes
from uke.methods.recipes import FACTORS, RECIPES, Recipe, vary

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


def differing(one: Recipe, other: Recipe) -> set[str]:
    return {name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("name", FACTORS)
def test_a_level_changes_the_field_of_its_factor_alone(name):
    factor, base = FACTORS[name], RECIPES["FT-M"]
    varied = [vary(base, name, level) for level in factor.levels]
    assert all(differing(recipe, base) <= {factor.field} for recipe in varied)
    assert len({recipe.fingerprint for recipe in varied}) == len(factor.levels) >= 2


def test_the_fingerprint_sees_every_choice_and_no_name():
    base = RECIPES["FT-M"]
    assert set(OTHER) == set(Recipe.model_fields) - {"name"}
    changed = [
        Recipe(**{**base.model_dump(), field: value}).fingerprint for field, value in OTHER.items()
    ]
    assert len({base.fingerprint, *changed}) == len(OTHER) + 1
    assert Recipe(**{**base.model_dump(), "name": "renamed"}).fingerprint == base.fingerprint
    assert Recipe(name="a", layers=3).fingerprint == Recipe(name="b", layers=[3]).fingerprint


# --- the factors, one at a time and together ------------------------------------------------------


@pytest.mark.parametrize("name", recipes.FAMILIES)
def test_a_cell_with_the_bases_own_level_is_the_base_and_so_trained_once(name):
    base, found = RECIPES[name], recipes.cells(RECIPES[name])
    own = {cell.factor: cell.level for cell in found if cell.recipe.fingerprint == base.fingerprint}
    direct = {"loss_scope": "target_tokens", "chat_template": "with", "end_of_turn": "with"}
    assert own == direct | (
        {"layers": "eighth_6", "components": "down_proj"}
        if name == "FT-M"
        else {"layers": "all", "components": "query_value"}
    )
    assert len({cell.recipe.fingerprint for cell in found}) == len(found) - len(FACTORS) + 1


@pytest.mark.parametrize(
    ("depth", "expected"), [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (32, [2, 6, 10, 14, 18, 21, 26, 30])]
)
def test_the_eighths_name_one_block_in_each_eighth_of_the_depth_and_the_published_one_among_them(
    depth, expected
):
    fractions = [FACTORS["layers"].levels[level]["layers"] for level in recipes.SINGLE_BLOCKS]
    assert [int(fraction * depth) for fraction in fractions] == expected
    assert RECIPES["FT-M"].layers[0] in fractions and len(fractions) == 8


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "abcde"), (1, "c"), (2, "ae"), (3, "ace"), (4, "abce"), (5, "abcde"), (9, "abcde")],
)
def test_fewer_values_are_spread_evenly_and_keep_both_ends(count, expected):
    assert recipes.evenly("abcde", count) == list(expected)


def test_levels_are_chosen_by_name_in_the_factors_order():
    direct, adapter = RECIPES["FT-M"], RECIPES["LoRA"]
    names = ["all", "query_value", "mlp", "eighth_3"]
    layers = {"layers": ["eighth_3", "all"]}
    assert recipes.studied_levels(direct, names) == layers | {"components": ["mlp"]}
    both = {"components": ["mlp", "query_value"]}
    assert recipes.studied_levels(adapter, names) == layers | both
    assert "query_value" not in recipes.levels(direct, "components")
    some = recipes.cells(direct, ["all", "with"])
    assert [(cell.factor, cell.level) for cell in some] == [
        ("layers", "all"),
        ("chat_template", "with"),
        ("end_of_turn", "with"),
    ]


def test_misspelt_factors_and_levels_are_answered_with_the_nearest():
    recipe = RECIPES["FT-M"]
    with pytest.raises(InputError, match="unknown factor 'layer'; did you mean 'layers'"):
        vary(recipe, "layer", "all")
    with pytest.raises(InputError, match="unknown factor 'layer'; did you mean 'layers'"):
        recipes.levels(recipe, "layer")
    with pytest.raises(InputError, match="factor layers: unknown level 'frist_half'; did you mean"):
        vary(recipe, "layers", "frist_half")
    with pytest.raises(InputError, match="unknown level 'eigth_3'; did you mean"):
        recipes.cells(recipe, ["eigth_3"])


def test_the_grid_has_every_combination_once():
    choices = {
        "layers": ["eighth_6", "all"],
        "components": ["down_proj", "both"],
        "chat_template": ["with", "without"],
    }
    found = recipes.grid(RECIPES["FT-M"], choices)
    assert len({recipe.fingerprint for _, recipe in found}) == len(found) == 8
    assert len({tuple(levels.values()) for levels, _ in found}) == 8
    assert found[0][1] == RECIPES["FT-M"]
    assert differing(found[-1][1], RECIPES["FT-M"]) == set(choices)


# --- the rule -------------------------------------------------------------------------------------


def measured(best=None, method="FT-M", names=(), split="development"):
    """Development rows of every cell on three edits; `best` gives some another score than 0.5."""
    found = []
    for factor, level, _ in recipes.cells(RECIPES[method], names):
        score = (best or {}).get((factor, level), 0.5)
        for edit, shift in (("a", -0.1), ("b", 0.0), ("c", 0.1)):
            found.append((split, method, factor, level, edit, score + shift))
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


@pytest.mark.parametrize("split", ["test", "locality", None])
def test_rows_of_another_split_are_refused_even_one_of_them(split):
    frame = pd.concat([measured(), measured().iloc[:1].assign(split=split)])
    said = (
        "Test rows offered to the recipe rule: refused"
        if split == "test"
        else "of no development split .* refused"
    )
    for rule in (recipes.choose, recipes.best_trial):
        with pytest.raises(InputError, match=said) as caught:
            rule(frame)
        assert repr(split) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        (
            {"factor": "layers", "level": "eighth_3"},
            "FT-M, layers: level 'eighth_3' lacks 3 of 3 edits",
        ),
        (
            {"factor": "end_of_turn", "level": "without", "edit": "b"},
            r"FT-M, end_of_turn: level 'without' lacks 1 of 3 edits \('b'\)",
        ),
        ({"factor": "components"}, "FT-M, components: level 'down_proj' lacks 3 of 3"),
    ],
)
def test_a_cell_that_is_missing_or_short_is_named(lost, match):
    frame = measured()
    with pytest.raises(InputError, match=match):
        recipes.choose(frame[~(frame[list(lost)] == pd.Series(lost)).all(axis=1)])


def test_two_rates_of_a_level_and_missing_scores_are_refused():
    frame = measured()
    with pytest.raises(
        InputError, match="level 'last_prompt_token': expected one score for each edit"
    ):
        recipes.choose(pd.concat([frame, frame[frame["level"] == "last_prompt_token"]]))
    with pytest.raises(InputError, match="expected one score for each edit"):
        recipes.choose(frame.assign(score=frame["score"].where(frame["edit"] != "a")))
    with pytest.raises(InputError, match="unknown method 'FT-N'; did you mean"):
        recipes.choose(frame.assign(method="FT-N"))
    with pytest.raises(InputError, match="recipe rule: no rows"):
        recipes.choose(frame.iloc[:0])


def test_fewer_levels_are_chosen_among_where_fewer_were_run():
    names = ["eighth_1", "all", "with"]
    few = measured({("layers", "all"): 0.6}, names=names)
    chosen = {"layers": "all", "chat_template": "with", "end_of_turn": "with"}
    assert recipes.choose(few, names)["FT-M"] == chosen
    with pytest.raises(InputError, match="FT-M, loss_scope: level 'last_prompt_token' lacks"):
        recipes.choose(few)


def test_the_candidate_has_every_chosen_level_and_nothing_else_changed():
    chosen = {
        "loss_scope": "target_tokens",
        "layers": "second_half",
        "components": "both",
        "chat_template": "without",
        "end_of_turn": "with",
    }
    found = recipes.candidate(RECIPES["LoRA"], chosen)
    assert (found.name, found.layers, found.components, found.chat_template, found.adapter) == (
        "FT-UKE (LoRA)",
        "second_half",
        ("mlp", "attention"),
        False,
        "lora",
    )
    assert differing(found, RECIPES["LoRA"]) == {"name", "layers", "components", "chat_template"}


def tried(*scores):
    return pd.DataFrame(
        [
            ("development", method, level, edit, score)
            for method, level, *both in scores
            for edit, score in zip("ab", both, strict=False)
        ],
        columns=["split", "method", "level", "edit", "score"],
    )


def test_ft_uke_is_the_candidate_of_the_best_trial_not_of_the_best_mean_and_ties_go_to_the_first():
    assert recipes.best_trial(
        tried(
            ("direct", "low", 0.1, 0.1),
            ("direct", "high", 0.9, 0.7),
            ("adapter", "low", 0.7, 0.7),
            ("adapter", "high", 0.7, 0.8),
        )
    ) == ("direct", "high")
    assert recipes.best_trial(tried(("direct", "x", 0.4, 0.6), ("adapter", "y", 0.5, 0.5))) == (
        "direct",
        "x",
    )
    with pytest.raises(InputError, match=r"adapter: level 'y' lacks 1 of 2 edits \('b'\)"):
        recipes.best_trial(tried(("direct", "x", 0.4, 0.6), ("adapter", "y", 0.5)))
