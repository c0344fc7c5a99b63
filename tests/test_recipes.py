"""Recipes: factors that change more than they say, files that are misread, fingerprints that miss a choice."""

from pathlib import Path

import pytest
import yaml
from uke.errors import InputError
from uke.recipes import FACTORS, RECIPES, Recipe, load_recipe, vary

METHODS = sorted((Path(__file__).parents[1] / "params" / "methods").glob("*.yaml"))
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


def test_a_file_holds_differences_from_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: LoRA\nlearning_rate: 5e-4\nlayers: [0.25, 1]\n")
    recipe = load_recipe(path, base="FT-L")
    assert differing(recipe, RECIPES["LoRA"]) == {"learning_rate", "layers"}
    assert (recipe.learning_rate, recipe.layers) == (5e-4, (0.25, 1))
    path.write_text("steps: 3\n")
    assert differing(load_recipe(path, base=RECIPES["FT-L"]), RECIPES["FT-L"]) == {"steps"}
    assert load_recipe(path).name == "mine"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_files_of_the_methods_repeat_nothing_of_their_base(path):
    written = yaml.safe_load(path.read_text())
    base = RECIPES[written.pop("base")]
    assert base.name.lower() == path.stem
    assert differing(load_recipe(path), base) == set(written)


def test_every_named_recipe_has_its_file():
    assert {path.stem for path in METHODS} >= {name.lower() for name in RECIPES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "unknown field 'lerning_rate'; did you mean 'learning_rate'"),
        ("base: FT-m", "field base: unknown recipe 'FT-m'; did you mean 'FT-M'"),
        ("base: [FT-M]", "field base: unknown recipe"),
        ("steps: '25'", "field steps: .*integer"),
        ("steps: true", "field steps: .*integer"),
        ("steps: 0", "field steps: .*greater than or equal to 1"),
        ("learning_rate: fast", "field learning_rate: .*number"),
        ("learning_rate: true", "field learning_rate: .*not a boolean"),
        ("learning_rate: .nan", "field learning_rate: "),
        ("learning_rate: 0", "field learning_rate: .*greater than 0"),
        ("chat_template: 1", "field chat_template: .*boolean"),
        ("layers: most", "field layers: .*first_half"),
        ("layers: 1.5", "field layers: "),
        ("layers: -1", "field layers: "),
        ("layers: true", "field layers: "),
        ("components: mlp", "field components: "),
        ("components: []", "field components: "),
        ("loss: all", "field loss: .*last_prompt_token"),
        ("adapter: dora", "field adapter: .*adalora"),
        ("- steps", "a mapping of recipe fields was expected, found list"),
        ("steps: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
