"""Settings files of methods: misread, of another batch size, with unequal budgets, overwritten."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from uke.errors import InputError
from uke.methods import catalog
from uke.methods.catalog import PUBLISHED, at_level, best_single, configured, find, key, trials
from uke.methods.recipes import BASELINES, FAMILIES, RECIPES, candidate, levels

PARAMS = Path(__file__).parents[1] / "params"
FILES = sorted((PARAMS / "methods").glob("*.yaml"))
FAMILY = "level_rates: {embedded: [1e-3, 2e-3]}\n"


def differing(one, other) -> set[str]:
    assert type(one) is type(other)
    return {name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project's folder, of params too, with a recipe, an adapter and two baselines."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    (tmp_path / "methods").mkdir()
    for name in ("FT-M", "LoRA", "MEMIT", "AnyEdit (MEMIT)"):
        write(tmp_path, name)
    return tmp_path


def write(folder: Path, name: str, text: str = "") -> Path:
    path = folder / "methods" / f"{key(name)}.yaml"
    path.write_text(f"base: {name}\n{text}\n")
    return path


def test_a_method_is_found_by_its_name_and_by_its_key():
    for name, expected in (("AnyEdit (MEMIT)", "anyedit_memit"), ("AnyEdit++", "anyedit_pp")):
        assert key(name) == expected == key(expected)
        assert find(name) is find(expected) is PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AnyEdit (MEMTI)", r"unknown method 'AnyEdit \(MEMTI\)'; did you mean 'AnyEdit \(MEMIT"),
        ("AnyEdit", "unknown method 'AnyEdit'"),
        (7, "unknown method '7'; expected one of"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name, expected):
    with pytest.raises(InputError, match=f"^here: {expected}"):
        find(name, where="here: ")


def test_a_file_holds_differences_from_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: LoRA\nlearning_rate: 5e-4\nlayers: [0.25, 1]\n")
    recipe = catalog.settings(path).method
    assert differing(recipe, RECIPES["LoRA"]) == {"learning_rate", "layers"}
    assert (recipe.name, recipe.learning_rate, recipe.layers) == ("LoRA", 5e-4, (0.25, 1))
    path.write_text("base: anyedit_memit\nname: Mine\nwindow: 20\nlayers: 3\n")
    baseline = catalog.settings(path).method
    assert differing(baseline, BASELINES["anyedit_memit"]) == {"name", "window", "layers"}
    assert (baseline.name, baseline.window, baseline.layers) == ("Mine", 20, (3,))
    path.write_text("steps: 3\n")
    assert (catalog.settings(path).method.name, catalog.settings(path).method.steps) == ("mine", 3)


def test_the_shipped_files_are_valid_and_give_every_method_the_same_budget():
    known = configured(PARAMS, "embedded", tuned=False)
    assert set(known) == set(PUBLISHED) and known == dict(PUBLISHED)
    assert {key(path.stem) for path in FILES} == {key(name) for name in known}
    # In-context editing has nothing to tune; FT-UKE is tuned as the candidate of either family, and
    # FT-UKE+ is chosen in `12_beyond`.
    families = [known[name] for name in FAMILIES]
    tuned = [known[name] for name in known if name not in ("in-context", "FT-UKE", "FT-UKE+")]
    tuned += [candidate(recipe, {}) for recipe in families]
    budgets = {len(one) for one in trials(PARAMS, "embedded", tuned).values()}
    rates = catalog.rates_by_level(PARAMS, "embedded", families)
    drawn = [known[name] for name in catalog.tunable(PARAMS, "smollm2")]
    drawn += [candidate(recipe, {}) for recipe in families]
    budgets |= {len(one) for one in trials(PARAMS, "smollm2", drawn, 12).values()}
    assert budgets == {5, 12} and all(sorted(own) == own for own in rates.values())
    for recipe in families:
        own = catalog.catalog(PARAMS)[recipe.name].file.levels["embedded"]
        assert {factor: set(own[factor]) for factor in own} == {
            factor: set(studied) for factor, studied in levels(recipe).items()
        }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "field 'lerning_rate': .*did you mean 'learning_rate'"),
        ("tuend: {}", "field 'tuend': .*did you mean 'tuned'"),
        ("base: MEMIT\nmemit_lamda: 8", "field 'memit_lamda': .*did you mean 'memit_lambda'"),
        ("base: MEMIT\nrank: 8", "field 'rank': .*expected one of"),
        ("base: FT-N", "field base: unknown method 'FT-N'; did you mean"),
        ("steps: '25'", "field 'steps': .*integer"),
        ("learning_rate: fast", "field 'learning_rate': .*number"),
        ("chat_template: 1", "field 'chat_template': .*boolean"),
        ("layers: most", "field 'layers.*first_half"),
        ("base: MEMIT\nlayers: all", "field 'layers"),
        ("loss: all", "field 'loss': .*last_prompt_token"),
        ("- steps", "valid dictionary; found"),
        ("steps: [", "not valid YAML"),
        ("tuned: {embedded: {FT-M: {steps: 3}}}", "field 'tuned.embedded.FT-M.*integer"),
        ("tuned: {embedded: {true: {steps: 3}}}", "field 'tuned.embedded.*found True"),
        ("tuned: {embedded: {1: fast}}", "field 'tuned.embedded.1': .*dictionary"),
        ("trials: {embedded: {steps: 3}}", "field 'trials.embedded.ranges.steps': .*found 3"),
        ("trials: {a: {steps: {low: 9, high: 3}}}", "ranges.steps': .*low < high, or a list"),
        ("trials: {a: {steps: {low: 0, high: 3}}}", "ranges.steps.low': .*greater than 0"),
        ("level_rates: {embedded: [fast]}", "field 'level_rates.embedded.0': .*number"),
        ("levels: {a: {layers: {all: {average: high}}}}", "layers.all.average': .*number"),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        catalog.settings(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "read", "expected"),
    [
        (
            "tuned: {embedded: {1: {setps: 3}}}",
            lambda folder: configured(folder, "embedded"),
            "ft_m.yaml: tuned, embedded, 1, field 'setps': .*did you mean 'steps'",
        ),
        (
            "trials: {embedded: [{steps: 3}, {rank: 0}]}",
            lambda folder: trials(folder, "embedded", [find("FT-M")]),
            "ft_m.yaml: trials, 2, field 'rank': .*equal to 1",
        ),
        (
            "levels: {embedded: {layers: {all: {setps: 3}}}}",
            lambda folder: at_level(folder, "embedded", "FT-M", "layers", "all"),
            "ft_m.yaml: layers, all, field 'setps'",
        ),
    ],
)
def test_settings_that_do_not_fit_their_method_are_named_on_use(folder, text, read, expected):
    write(folder, "FT-M", text)
    with pytest.raises(InputError, match=expected):
        read(folder)


def test_differences_name_every_changed_choice_but_not_the_name():
    base = BASELINES["anyedit_memit"]
    assert catalog.differences(base.model_copy(update={"name": "Mine"}), base) == "as published"
    other = base.model_copy(update={"layers": (1, 0.25), "memit_lambda": 100.0})
    assert catalog.differences(other, base) == "layers 1 0.25, memit_lambda 100"


def test_tuned_settings_change_their_fields_of_one_model_alone(folder):
    write(folder, "FT-M", "tuned: {embedded: {1: {steps: 3}}}")
    write(folder, "AnyEdit (MEMIT)", "tuned: {embedded: {1: {window: 20}}}")
    found = configured(folder, "embedded")
    assert {name: differing(method, PUBLISHED[name]) for name, method in found.items()} == {
        "FT-M": {"steps"},
        "LoRA": set(),
        "MEMIT": set(),
        "AnyEdit (MEMIT)": {"window"},
    }
    assert configured(folder, "embedded", tuned=False)["FT-M"] == PUBLISHED["FT-M"]
    assert configured(folder, "another/model")["FT-M"] == PUBLISHED["FT-M"]
    with pytest.raises(InputError, match="unknown method 'UnKE'; expected one of .*FT-M"):
        find("UnKE", found)


@pytest.mark.parametrize(
    ("tuned", "batch_size", "used"),
    [
        ((1, 8, 40), 1, 1),
        ((1, 8, 40), 4, 8),
        ((1, 8, 40), 500, 40),
        ((8, 1), 2, 1),
        ((1, 16), 4, 1),
        ((4, 9), 6, 4),
        ((1, 49), 7, 1),  # as far from both: the smaller
    ],
)
def test_the_settings_of_the_nearest_batch_size_are_used_by_ratio(folder, tuned, batch_size, used):
    by_size = ", ".join(f"{size}: {{steps: {size}}}" for size in tuned)
    write(folder, "FT-M", f"tuned: {{embedded: {{{by_size}}}}}")
    assert configured(folder, "embedded", batch_size)["FT-M"].steps == used


def test_writing_keeps_the_rest_of_the_file(folder):
    text = "# Why 3.\nsteps: 3\ntuned:\n  embedded:\n    1: {rank: 5}\n\n# Why these.\n" + FAMILY
    path = write(folder, "FT-M", text)
    other = folder / "methods" / "memit.yaml"
    before = other.read_text()
    chosen = {"steps": 9, "learning_rate": 1e-3}
    catalog.tune(folder, "embedded", 8, {"FT-M": chosen})
    catalog.tune(folder, "Qwen/Qwen2.5-7B-Instruct", 1, {"ft_m": {"layers": [1, 2]}})
    catalog.write(folder, "embedded", "levels", {"FT-M": {"layers": {"all": {"steps": 7}}}})
    catalog.write(folder, "embedded", "levels", {"FT-M": {"components": {"mlp": {"average": 0.5}}}})
    assert yaml.safe_load(path.read_text()) == {
        "base": "FT-M",
        "steps": 3,
        "tuned": {
            "embedded": {1: {"rank": 5}, 8: chosen},
            "Qwen/Qwen2.5-7B-Instruct": {1: {"layers": [1, 2]}},
        },
        "level_rates": {"embedded": ["1e-3", "2e-3"]},
        "levels": {
            "embedded": {"layers": {"all": {"steps": 7}}, "components": {"mlp": {"average": 0.5}}}
        },
    }
    assert "# Why 3.\nsteps: 3\n" in path.read_text() and "# Why these.\n" in path.read_text()
    assert other.read_text() == before
    assert configured(folder, "Qwen/Qwen2.5-7B-Instruct")["FT-M"].layers == (1, 2)
    assert configured(folder, "embedded", 8)["FT-M"].steps == 9


def test_two_notebooks_that_tune_one_model_at_once_lose_nothing(folder):
    def tune(size):
        catalog.tune(folder, "embedded", size, {"FT-M": {"steps": size}})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(tune, range(1, 31)))
    assert list(catalog.catalog(folder)["FT-M"].file.tuned["embedded"]) == list(range(1, 31))
    assert len(list((folder / "methods").iterdir())) == 4  # no lock, no half file left


def test_a_model_made_here_has_settings_by_its_name_another_world_the_embedded(folder, tmp_path):
    (made := folder / "results" / "models" / "smollm2").mkdir(parents=True)
    catalog.tune(folder, str(made), 1, {"FT-M": {"steps": 7}})
    assert configured(folder, "smollm2")["FT-M"].steps == 7
    write(folder, "FT-M", "tuned: {embedded: {1: {steps: 3}}}")
    (tmp_path / "training.json").write_text("{}")
    assert configured(folder, str(tmp_path))["FT-M"].steps == 3
    with pytest.raises(InputError, match="settings of the embedded one"):
        catalog.tune(folder, str(tmp_path), 1, {"FT-M": {"steps": 5}})


def test_settings_are_drawn_within_ranges_the_published_one_first_and_the_same_again(folder):
    own = "learning_rate: {low: 1e-4, high: 1e-2}, steps: {low: 10, high: 40}, layers: [[0.4], all]"
    write(folder, "FT-M", f"trials: {{smollm2: {{{own}}}}}")
    first, *drawn = found = trials(folder, "smollm2", [find("FT-M")], 12)["FT-M"]
    assert first == PUBLISHED["FT-M"] and len({one.fingerprint for one in found}) == 12
    assert all(10 <= one.steps <= 40 and type(one.steps) is int for one in drawn)
    assert all(float(f"{one.learning_rate:.1e}") == one.learning_rate for one in drawn)
    assert all(1e-4 <= one.learning_rate <= 1e-2 for one in drawn)
    assert trials(folder, "smollm2", [find("FT-M")], 5)["FT-M"] == found[:5]
    write(folder, "LoRA", "trials: {smollm2: {steps: {low: 1, high: 3}}}")
    with pytest.raises(InputError, match="lora.yaml: trials: the ranges give 4 .*expected 12"):
        trials(folder, "smollm2", [find("LoRA")], 12)


def test_trials_that_give_no_equal_budget_are_refused(folder):
    write(folder, "FT-M", "trials: {embedded: [{steps: 25}, {}]}")  # the default: one setting
    write(folder, "MEMIT", "trials: {embedded: [{steps: 3}, {steps: 4}]}")
    for other, counts in (("MEMIT", "1 of FT-M, 2 of MEMIT"), ("LoRA", "1 of FT-M, 0 of LoRA")):
        expected = f"different trials for model 'embedded': {counts}; expected as many"
        with pytest.raises(InputError, match=expected):
            trials(folder, "embedded", [find("FT-M"), find(other)])


def test_a_level_has_its_own_rate_on_untuned_settings_else_the_tuned_method_is_varied(folder):
    write(
        folder,
        "FT-M",
        "tuned: {embedded: {1: {learning_rate: 5e-3, steps: 100}}}\n"
        "levels: {embedded: {layers: {all: {learning_rate: 1e-3, average: 0.7}}}}",
    )
    base = PUBLISHED["FT-M"]
    known = at_level(folder, "embedded", "ft_m", "layers", "all")
    assert differing(known, base) == {"layers", "learning_rate"}
    assert (known.layers, known.learning_rate) == ("all", 1e-3)
    lacking = at_level(folder, "embedded", "FT-M", "layers", "eighth_1")
    assert differing(lacking, base) == {"layers", "learning_rate", "steps"}
    assert (lacking.learning_rate, lacking.steps) == (5e-3, 100)
    elsewhere = at_level(folder, "another/model", "FT-M", "layers", "all")
    assert differing(elsewhere, base) == {"layers"}


def test_the_best_single_block_is_that_of_development_rows_among_those_given(folder):
    every = ["eighth_2", "eighth_6", "eighth_7", "all"]
    # The published block, where no file has averages.
    assert best_single(folder, "embedded", "FT-M", every) == "eighth_6"
    assert best_single(folder, "embedded", "FT-M", ["eighth_1", "all"]) == "eighth_1"
    averages = {"all": 0.9, "eighth_2": 0.7, "eighth_3": 0.8, "eighth_7": 0.6}
    known = {level: {"average": average} for level, average in averages.items()}
    catalog.write(folder, "embedded", "levels", {"FT-M": {"layers": known}})
    assert best_single(folder, "embedded", "ft_m", every) == "eighth_2"
    assert best_single(folder, "embedded", "LoRA", every) == "eighth_6"
