"""Recipes: factors that change more than they say, fingerprints that miss a choice."""

import pytest
from uke.errors import InputError
from uke.recipes import FACTORS, RECIPES, Recipe, vary

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


def test_ft_l_and_ft_m_differ_in_the_loss_scope_alone():
    assert differing(RECIPES["FT-L"], RECIPES["FT-M"]) == {"name", "loss"}
    assert differing(RECIPES["FT-M"], RECIPES["FT-A"]) == {"name", "layers"}


@pytest.mark.parametrize("name", FACTORS)
def test_a_level_changes_the_field_of_its_factor_alone(name):
    factor, base = FACTORS[name], RECIPES["FT-M"]
    varied = [vary(base, name, level) for level in factor.levels]
    assert all(differing(recipe, base) <= {factor.field} for recipe in varied)
    assert len({recipe.fingerprint for recipe in varied}) == len(factor.levels) >= 2


def test_a_misspelt_factor_or_level_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="unknown factor 'layer'; did you mean 'layers'"):
        vary(RECIPES["FT-M"], "layer", "all")
    with pytest.raises(InputError, match="factor layers: unknown level 'frist_half'; did you mean 'first_half'"):
        vary(RECIPES["FT-M"], "layers", "frist_half")


def test_the_fingerprint_sees_every_choice_and_no_name():
    base = RECIPES["FT-M"]
    assert set(OTHER) == set(Recipe.model_fields) - {"name"}
    changed = [Recipe(**{**base.model_dump(), field: value}).fingerprint for field, value in OTHER.items()]
    assert len({base.fingerprint, *changed}) == len(OTHER) + 1
    assert Recipe(**{**base.model_dump(), "name": "renamed"}).fingerprint == base.fingerprint
    assert Recipe(name="a", layers=3).fingerprint == Recipe(name="b", layers=[3]).fingerprint
