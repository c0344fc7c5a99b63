"""Methods by name: files that are misread, settings of another batch size, budgets that are not equal."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from uke.errors import InputError
from uke.methods import catalog as methods
from uke.methods.catalog import PUBLISHED
from uke.methods.recipes import BASELINES, FAMILIES, RECIPES, Choices, candidate

PARAMS = Path(__file__).parents[1] / "params"
FILES = sorted((PARAMS / "methods").glob("*.yaml"))


def differing(one: Choices, other: Choices) -> set[str]:
    assert type(one) is type(other)
    return {name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)}


@pytest.fixture
def folder(tmp_path):
    """A folder of params with a recipe, an adapter and two peers."""
    (tmp_path / "methods").mkdir()
    for name in ("FT-M", "LoRA", "MEMIT", "AnyEdit (MEMIT)"):
        (tmp_path / "methods" / f"{methods.key(name)}.yaml").write_text(f"base: {name}\n")
    return tmp_path


def write(folder: Path, kind: str, text: str) -> Path:
    path = folder / kind / "embedded.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# --- names -----------------------------------------------------------------------------------------------------------


def test_no_two_published_methods_share_a_name_or_a_key():
    assert (
        len(PUBLISHED)
        == len(RECIPES) + len(BASELINES)
        == len({methods.key(name) for name in PUBLISHED})
    )
    assert {methods.key(peer.name): peer for peer in BASELINES.values()} == BASELINES


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("AnyEdit (MEMIT)", "anyedit_memit"),
        ("AnyEdit++", "anyedit_pp"),
        ("in-context", "in_context"),
        ("FT-M", "ft_m"),
        ("LocFT-BF", "locft_bf"),
        ("muKE", "muke"),
    ],
)
def test_a_method_is_found_by_its_name_and_by_its_key(name, key):
    assert methods.key(name) == key == methods.key(key)
    assert methods.find(name) is methods.find(key) is PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "AnyEdit (MEMTI)",
            r"unknown method 'AnyEdit \(MEMTI\)'; did you mean 'AnyEdit \(MEMIT\)'",
        ),
        ("AnyEdit", "unknown method 'AnyEdit'"),
        (7, "unknown method '7'; expected one of"),
        (None, "unknown method 'None'"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name, expected):
    with pytest.raises(InputError, match=f"^here: {expected}"):
        methods.find(name, where="here: ")


def test_only_the_methods_given_are_searched(folder):
    with pytest.raises(InputError, match="unknown method 'UnKE'; expected one of .*FT-M"):
        methods.find("UnKE", methods.configured(folder, "embedded"))


# --- files of methods ------------------------------------------------------------------------------------------------


def test_a_file_holds_differences_from_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: LoRA\nlearning_rate: 5e-4\nlayers: [0.25, 1]\n")
    recipe = methods.load(path)
    assert differing(recipe, RECIPES["LoRA"]) == {"learning_rate", "layers"}
    assert (recipe.name, recipe.learning_rate, recipe.layers) == ("LoRA", 5e-4, (0.25, 1))
    path.write_text("base: anyedit_memit\nname: Mine\nwindow: 20\nlayers: 3\n")
    peer = methods.load(path)
    assert differing(peer, BASELINES["anyedit_memit"]) == {"name", "window", "layers"}
    assert (peer.name, peer.window, peer.layers) == ("Mine", 20, (3,))
    path.write_text("steps: 3\n")
    assert (methods.load(path).name, methods.load(path).steps) == ("mine", 3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_methods_repeat_nothing_of_their_base(path):
    written = yaml.safe_load(path.read_text())
    base = PUBLISHED[written.pop("base")]
    assert methods.key(base.name) == methods.key(path.stem)
    assert differing(methods.load(path), base) == set(written)


def test_every_published_method_has_its_file():
    assert {methods.key(path.stem) for path in FILES} >= {methods.key(name) for name in PUBLISHED}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "unknown field 'lerning_rate'; did you mean 'learning_rate'"),
        ("base: MEMIT\nrank: 8", "unknown field 'rank'; expected one of"),
        ("base: MEMIT\nmemit_lamda: 8", "unknown field 'memit_lamda'; did you mean 'memit_lambda'"),
        ("base: FT-N", "field base: unknown method 'FT-N'; did you mean"),
        ("base: [FT-M]", "field base: unknown method"),
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
        ("base: MEMIT\nlayers: all", "field layers: "),
        ("components: mlp", "field components: "),
        ("components: []", "field components: "),
        ("loss: all", "field loss: .*last_prompt_token"),
        ("adapter: dora", "field adapter: .*adalora"),
        ("base: MEMIT\nsolver: rome", "field solver: .*memit"),
        ("- steps", "a mapping was expected, found list"),
        ("steps: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        methods.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: no such file"):
        methods.load(tmp_path / "none.yaml")


def test_differences_say_every_changed_choice_and_no_name():
    base = BASELINES["anyedit_memit"]
    assert methods.differences(base.model_copy(update={"name": "Mine"}), base) == "as published"
    changed = base.model_copy(
        update={"layers": (1, 0.25), "memit_lambda": 100.0, "keep_keys": False}
    )
    assert methods.differences(changed, base) == "layers 1 0.25, memit_lambda 100, keep_keys False"
    assert methods.differences(RECIPES["FT-L"], RECIPES["FT-M"]) == "loss last_prompt_token"


# --- tuned settings --------------------------------------------------------------------------------------------------


def test_published_settings_stand_where_nothing_is_tuned(folder):
    assert methods.configured(folder, "embedded") == {
        name: PUBLISHED[name] for name in ("FT-M", "LoRA", "MEMIT", "AnyEdit (MEMIT)")
    }
    write(folder, "tuned", "1: {FT-M: {steps: 3}}\n")
    assert methods.configured(folder, "embedded", tuned=False)["FT-M"] == PUBLISHED["FT-M"]
    assert methods.configured(folder, "another/model")["FT-M"] == PUBLISHED["FT-M"]


def test_tuned_settings_change_their_fields_alone_by_name_or_by_key(folder):
    write(folder, "tuned", "1: {FT-M: {steps: 3}, anyedit_memit: {window: 20}}\n")
    found = methods.configured(folder, "embedded")
    assert {name: differing(method, PUBLISHED[name]) for name, method in found.items()} == {
        "FT-M": {"steps"},
        "LoRA": set(),
        "MEMIT": set(),
        "AnyEdit (MEMIT)": {"window"},
    }


@pytest.mark.parametrize(
    ("held", "asked", "used"),
    [
        ((1, 8, 40), 1, 1),
        ((1, 8, 40), 4, 8),
        ((1, 8, 40), 24, 40),
        ((1, 8, 40), 500, 40),
        ((8, 1), 2, 1),
        ((8, 40), 1, 8),
        ((1, 16), 4, 1),
        ((16, 1), 4, 1),
        ((4, 9), 6, 4),
        ((1, 49), 7, 1),  # as far from both: the smaller
    ],
)
def test_the_settings_of_the_nearest_batch_size_are_used_by_ratio(folder, held, asked, used):
    write(folder, "tuned", "".join(f"{size}: {{FT-M: {{steps: {size}}}}}\n" for size in held))
    assert methods.configured(folder, "embedded", asked)["FT-M"].steps == used


def test_a_method_not_tuned_at_the_nearest_size_goes_untuned(folder):
    write(folder, "tuned", "1: {FT-M: {steps: 3}}\n8: {FT-M: {steps: 5}, LoRA: {steps: 9}}\n")
    found = methods.configured(folder, "embedded", 2)
    assert (found["FT-M"].steps, found["LoRA"].steps) == (3, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FT-M: {steps: 3}", "'FT-M': expected a batch size, and under it the methods"),
        ("true: {FT-M: {steps: 3}}", "True: expected a batch size"),
        ("0: {FT-M: {steps: 3}}", "0: expected a batch size"),
        ("1.5: {FT-M: {steps: 3}}", "1.5: expected a batch size"),
        ("1: FT-M", "1: expected a batch size, and under it"),
        ("1: {FT-M: fast}", "1: FT-M: expected fields of FT-M and their values, found 'fast'"),
        ("1: {FT-N: {steps: 3}}", "1: unknown method 'FT-N'; did you mean 'FT-M'"),
        ("1: {FT-M: {setps: 3}}", "1: FT-M: unknown field 'setps'; did you mean 'steps'"),
        (
            "1: {FT-M: {steps: 3}}\n8: {MEMIT: {rank: 3}}",
            "8: MEMIT: unknown field 'rank'",
        ),  # read whatever size is asked for
        ("1: {FT-M: {steps: 0}}", "1: FT-M: field steps: .*greater than or equal to 1"),
        ("- 1", "a mapping was expected, found list"),
    ],
)
def test_a_bad_tuned_file_is_named_with_its_place(folder, text, expected):
    path = write(folder, "tuned", text)
    with pytest.raises(InputError, match=expected) as caught:
        methods.configured(folder, "embedded")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_tuning_keeps_what_was_chosen_for_other_sizes_and_methods(folder):
    methods.tune(
        folder,
        "embedded",
        8,
        {"FT-M": {"steps": 3, "learning_rate": 1e-3}, "MEMIT": {"layers": [1, 2]}},
    )
    methods.tune(folder, "embedded", 1, {"FT-M": {"steps": 5}})
    path = methods.tune(folder, "embedded", 8, {"FT-M": {"steps": 7}})
    assert methods.tuned_at(path) == {
        1: {"FT-M": {"steps": 5}},
        8: {"FT-M": {"steps": 7}, "MEMIT": {"layers": [1, 2]}},
    }
    assert list(methods.tuned_at(path)) == [1, 8]
    found = methods.configured(folder, "embedded", 8)
    assert differing(found["FT-M"], PUBLISHED["FT-M"]) == {"steps"} and found["MEMIT"].layers == (
        1,
        2,
    )


def test_a_model_on_a_hub_has_a_tuned_file_of_its_own(folder):
    path = methods.tune(folder, "Qwen/Qwen2.5-7B-Instruct", 1, {"FT-M": {"steps": 5}})
    assert path == folder / "tuned" / "Qwen-Qwen2.5-7B-Instruct.yaml"
    assert methods.configured(folder, "Qwen/Qwen2.5-7B-Instruct")["FT-M"].steps == 5


def test_the_shipped_tuned_settings_are_valid():
    for path in (PARAMS / "tuned").glob("*.yaml"):
        for size in methods.tuned_at(path):
            assert set(methods.configured(PARAMS, path.stem, size)) == set(PUBLISHED)


# --- trials ----------------------------------------------------------------------------------------------------------


def test_a_trial_changes_its_fields_of_the_method_alone(folder):
    write(
        folder,
        "trials",
        "FT-M: &same [{learning_rate: 1e-3}, {steps: 50}]\nLoRA: *same\nanyedit_memit: [{window: 20}, {window: 10, layers: [3]}]\n",
    )
    chosen = [methods.find(name) for name in ("FT-M", "AnyEdit (MEMIT)")]
    found = methods.trials(folder, "embedded", chosen)
    assert [[differing(one, method) for one in found[method.name]] for method in chosen] == [
        [{"learning_rate"}, {"steps"}],
        [{"window"}, {"window", "layers"}],
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}]", "MEMIT: 1 trials, FT-M has 2"),
        ("FT-M: [{steps: 3}]\nMEMIT: [{steps: 3}, {steps: 4}]", "MEMIT: 2 trials, FT-M has 1"),
        (
            "FT-M: [{steps: 3}, {steps: 3}]\nMEMIT: [{steps: 3}, {steps: 4}]",
            "FT-M: 2 trials, .*expected different ones",
        ),
        (
            "FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}, {steps: 3}]",
            "MEMIT: 2 trials, .*expected different ones",
        ),
        (
            "FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}, {steps: 4}, {steps: 4}]",
            "MEMIT: 3 trials, FT-M has 2",
        ),
        (
            "FT-M: [{steps: 25}, {}]\nMEMIT: [{steps: 3}, {steps: 4}]",
            "FT-M: 2 trials, .*expected different ones",
        ),  # 25 is the default
        ("FT-M: [{steps: 3}]", "unknown method 'MEMIT'; expected one of FT-M"),
        ("FT-M: [{steps: 3}]\nMEMIT: {steps: 3}", "MEMIT: expected a list of trials, found dict"),
        (
            "FT-M: [{steps: 3}]\nMEMIT: [{setps: 3}]",
            "MEMIT, trial 1: unknown field 'setps'; did you mean 'steps'",
        ),
        ("FT-M: [{steps: 3}]\nMEMIT: [{rank: 3}]", "MEMIT, trial 1: unknown field 'rank'"),
        (
            "FT-M: [{steps: 3}, {steps: 0}]\nMEMIT: [{steps: 3}, {steps: 4}]",
            "FT-M, trial 2: field steps: .*greater than or equal to 1",
        ),
        (
            "FT-M: [fast]\nMEMIT: [{steps: 3}]",
            "FT-M, trial 1: expected fields of FT-M and their values, found 'fast'",
        ),
    ],
)
def test_trials_that_give_no_equal_budget_are_refused(folder, text, expected):
    path = write(folder, "trials", text)
    with pytest.raises(InputError, match=expected) as caught:
        methods.trials(folder, "embedded", [methods.find("FT-M"), methods.find("MEMIT")])
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_trials_are_named(folder):
    with pytest.raises(InputError, match="trials/embedded.yaml: no such file"):
        methods.trials(folder, "embedded", [methods.find("FT-M")])


def test_the_shipped_trials_give_every_method_the_same_budget():
    """In-context editing has nothing to tune; FT-UKE is tuned as a candidate of either family, each level of a factor at rates alone."""
    known = methods.configured(PARAMS, "embedded", tuned=False)
    families = [known[name] for name in FAMILIES]
    tuned = [method for name, method in known.items() if name not in ("in-context", "FT-UKE")] + [
        candidate(recipe, {}) for recipe in families
    ]
    found = methods.trials(PARAMS, "embedded", tuned)
    assert len({len(tried) for tried in found.values()}) == 1 and len(found["FT-M"]) > 1
    rates = methods.rates_by_level(PARAMS, "embedded", families)
    assert set(yaml.safe_load((PARAMS / "trials" / "embedded.yaml").read_text())) == set(found) | {
        f"{name} by level" for name in rates
    }
    for name, own in rates.items():
        assert sorted(own) == own and differing(
            methods.trials(
                PARAMS, "embedded", [known[name].model_copy(update={"name": f"{name} by level"})]
            )[f"{name} by level"][0],
            known[name],
        ) <= {"name", "learning_rate"}


def test_a_family_without_trials_for_its_candidate_is_refused_before_anything_runs(folder):
    write(folder, "trials", "FT-M by level: [{learning_rate: 1e-3}, {learning_rate: 2e-3}]\n")
    with pytest.raises(InputError, match=r"unknown method 'FT-UKE \(FT-M\)'"):
        methods.rates_by_level(folder, "embedded", [RECIPES["FT-M"]])
    write(
        folder,
        "trials",
        "FT-M by level: [{learning_rate: 1e-3}, {learning_rate: 2e-3}]\nFT-UKE (FT-M): [{steps: 3}]\n",
    )
    assert methods.rates_by_level(folder, "embedded", [RECIPES["FT-M"]]) == {"FT-M": [1e-3, 2e-3]}


# --- levels of factors -----------------------------------------------------------------------------------------------


def test_a_level_has_its_own_rate_on_untuned_settings_and_the_tuned_method_stands_in_where_the_file_lacks_it(
    folder,
):
    write(folder, "tuned", "1: {FT-M: {learning_rate: 5e-3, steps: 100}}\n")
    write(folder, "levels", "ft_m: {layers: {all: {learning_rate: 1e-3, average: 0.7}}}\n")
    base = PUBLISHED["FT-M"]
    held = methods.at_level(folder, "embedded", "FT-M", "layers", "all")
    assert differing(held, base) == {"layers", "learning_rate"} and (
        held.layers,
        held.learning_rate,
    ) == ("all", 1e-3)
    lacking = methods.at_level(folder, "embedded", "FT-M", "layers", "eighth_1")
    assert differing(lacking, base) == {"layers", "learning_rate", "steps"} and (
        lacking.learning_rate,
        lacking.steps,
    ) == (5e-3, 100)
    elsewhere = methods.at_level(folder, "another/model", "FT-M", "layers", "all")
    assert differing(elsewhere, base) == {"layers"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "FT-N: {layers: {all: {learning_rate: 1e-3}}}",
            "unknown method 'FT-N'; did you mean 'FT-M'",
        ),
        ("MEMIT: {layers: {all: {learning_rate: 1e-3}}}", "MEMIT: it has no levels"),
        (
            "FT-M: {layer: {all: {learning_rate: 1e-3}}}",
            "FT-M: unknown factor 'layer'; did you mean 'layers'",
        ),
        (
            "FT-M: {layers: {al: {learning_rate: 1e-3}}}",
            "FT-M: factor layers: unknown level 'al'; did you mean 'all'",
        ),
        (
            "FT-M: {layers: {all: {lerning_rate: 1e-3}}}",
            "FT-M, layers, all: unknown field 'lerning_rate'; did you mean 'learning_rate'",
        ),
        (
            "FT-M: {layers: {all: {learning_rate: fast}}}",
            "FT-M, layers, all: field learning_rate: .*number",
        ),
        (
            "FT-M: {layers: {all: {learning_rate: 1e-3, average: high}}}",
            "FT-M, layers, all: average: expected a number, found 'high'",
        ),
        ("FT-M: {layers: {all: 1e-3}}", "FT-M, layers, all: a mapping was expected"),
        ("FT-M: {layers: all}", "FT-M, layers: a mapping was expected"),
        ("FT-M: [layers]", "FT-M: a mapping was expected"),
        ("- FT-M", "a mapping was expected, found list"),
    ],
)
def test_a_bad_levels_file_is_named_with_its_place(folder, text, expected):
    path = write(folder, "levels", text)
    with pytest.raises(InputError, match=expected) as caught:
        methods.at_level(folder, "embedded", "LoRA", "layers", "all")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("FT-N", "layers", "all"), "unknown method 'FT-N'; did you mean"),
        (("MEMIT", "layers", "all"), "MEMIT: it has no levels"),
        (("FT-M", "layer", "all"), "unknown factor 'layer'; did you mean"),
        (("FT-M", "layers", "al"), "unknown level 'al'; did you mean"),
    ],
)
def test_an_unknown_cell_is_answered_with_the_nearest(folder, asked, expected):
    with pytest.raises(InputError, match=expected):
        methods.at_level(folder, "embedded", *asked)


def test_the_best_single_block_is_that_of_development_rows_among_those_asked_for(folder):
    every = ["eighth_2", "eighth_6", "eighth_7", "all"]
    assert (
        methods.best_single(folder, "embedded", "FT-M", every) == "eighth_6"
    )  # the published one, where no file says
    assert methods.best_single(folder, "embedded", "FT-M", ["eighth_1", "all"]) == "eighth_1"
    write(
        folder,
        "levels",
        "FT-M: {layers: {all: {average: 0.9}, eighth_2: {average: 0.7}, eighth_3: {average: 0.8}, eighth_7: {average: 0.6}}}\n",
    )
    assert methods.best_single(folder, "embedded", "ft_m", every) == "eighth_2"
    assert methods.best_single(folder, "embedded", "LoRA", every) == "eighth_6"
    with pytest.raises(InputError, match="none trains a single block"):
        methods.best_single(folder, "embedded", "FT-M", ["all", "first_half"])


def test_what_is_kept_of_levels_replaces_a_method_and_leaves_the_others(folder):
    methods.keep_levels(
        folder,
        "embedded",
        {
            "FT-M": {"layers": {"all": {"learning_rate": 1e-3, "average": 0.5}}},
            "LoRA": {"layers": {"all": {"learning_rate": 2e-3}}},
        },
    )
    methods.keep_levels(
        folder, "embedded", {"FT-M": {"components": {"mlp": {"learning_rate": 3e-3}}}}
    )
    assert methods.levels_at(folder, "embedded") == {
        "FT-M": {"components": {"mlp": {"learning_rate": 3e-3}}},
        "LoRA": {"layers": {"all": {"learning_rate": 2e-3}}},
    }


def test_the_shipped_levels_are_valid():
    for path in (PARAMS / "levels").glob("*.yaml"):
        assert set(methods.levels_at(PARAMS, path.stem)) <= set(RECIPES)


def test_two_notebooks_that_tune_one_model_at_once_lose_nothing(folder):
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda steps: methods.tune(
                    folder, "embedded", steps, {f"method {steps}": {"steps": steps}}
                ),
                range(1, 41),
            )
        )
    assert sorted(methods.tuned_at(methods.tuned_file(folder, "embedded"))) == list(range(1, 41))
    assert [path.name for path in (folder / "tuned").iterdir()] == [
        "embedded.yaml"
    ]  # no lock, no half file left
