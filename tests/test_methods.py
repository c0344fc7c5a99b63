"""Methods by name: files that are misread, settings of another batch size, budgets that are not equal."""

from pathlib import Path

import pytest
import yaml
from uke import methods
from uke.errors import InputError
from uke.methods import PUBLISHED
from uke.peers import PEERS
from uke.recipes import RECIPES, Choices

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
    assert len(PUBLISHED) == len(RECIPES) + len(PEERS) == len({methods.key(name) for name in PUBLISHED})
    assert {methods.key(peer.name): peer for peer in PEERS.values()} == PEERS


@pytest.mark.parametrize(
    ("name", "key"),
    [("AnyEdit (MEMIT)", "anyedit_memit"), ("AnyEdit++", "anyedit_pp"), ("in-context", "in_context"), ("FT-M", "ft_m"), ("LocFT-BF", "locft_bf"), ("muKE", "muke")],
)
def test_a_method_is_found_by_its_name_and_by_its_key(name, key):
    assert methods.key(name) == key == methods.key(key)
    assert methods.find(name) is methods.find(key) is PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AnyEdit (MEMTI)", r"unknown method 'AnyEdit \(MEMTI\)'; did you mean 'AnyEdit \(MEMIT\)'"),
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
    assert differing(peer, PEERS["anyedit_memit"]) == {"name", "window", "layers"}
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
    base = PEERS["anyedit_memit"]
    assert methods.differences(base.model_copy(update={"name": "Mine"}), base) == "as published"
    changed = base.model_copy(update={"layers": (1, 0.25), "memit_lambda": 100.0, "keep_keys": False})
    assert methods.differences(changed, base) == "layers 1 0.25, memit_lambda 100, keep_keys False"
    assert methods.differences(RECIPES["FT-L"], RECIPES["FT-M"]) == "loss last_prompt_token"


# --- tuned settings --------------------------------------------------------------------------------------------------


def test_published_settings_stand_where_nothing_is_tuned(folder):
    assert methods.configured(folder, "embedded") == {name: PUBLISHED[name] for name in ("FT-M", "LoRA", "MEMIT", "AnyEdit (MEMIT)")}
    write(folder, "tuned", "1: {FT-M: {steps: 3}}\n")
    assert methods.configured(folder, "embedded", tuned=False)["FT-M"] == PUBLISHED["FT-M"]
    assert methods.configured(folder, "another/model")["FT-M"] == PUBLISHED["FT-M"]


def test_tuned_settings_change_their_fields_alone_by_name_or_by_key(folder):
    write(folder, "tuned", "1: {FT-M: {steps: 3}, anyedit_memit: {window: 20}}\n")
    found = methods.configured(folder, "embedded")
    assert {name: differing(method, PUBLISHED[name]) for name, method in found.items()} == {
        "FT-M": {"steps"}, "LoRA": set(), "MEMIT": set(), "AnyEdit (MEMIT)": {"window"},
    }  # fmt: skip


@pytest.mark.parametrize(("held", "asked", "used"), [
    ((1, 8, 40), 1, 1), ((1, 8, 40), 4, 8), ((1, 8, 40), 24, 40), ((1, 8, 40), 500, 40),
    ((8, 1), 2, 1), ((8, 40), 1, 8),
    ((1, 16), 4, 1), ((16, 1), 4, 1), ((4, 9), 6, 4), ((1, 49), 7, 1),  # as far from both: the smaller
])  # fmt: skip
def test_the_settings_of_the_nearest_batch_size_are_used_by_ratio(folder, held, asked, used):
    write(folder, "tuned", "".join(f"{size}: {{FT-M: {{steps: {size}}}}}\n" for size in held))
    assert methods.configured(folder, "embedded", asked)["FT-M"].steps == used


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
        ("1: {FT-M: {steps: 3}}\n8: {MEMIT: {rank: 3}}", "8: MEMIT: unknown field 'rank'"),  # read whatever size is asked for
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
    methods.tune(folder, "embedded", 8, {"FT-M": {"steps": 3, "learning_rate": 1e-3}, "MEMIT": {"layers": [1, 2]}})
    methods.tune(folder, "embedded", 1, {"FT-M": {"steps": 5}})
    path = methods.tune(folder, "embedded", 8, {"FT-M": {"steps": 7}})
    assert methods.tuned_at(path) == {1: {"FT-M": {"steps": 5}}, 8: {"FT-M": {"steps": 7}, "MEMIT": {"layers": [1, 2]}}}
    assert list(methods.tuned_at(path)) == [1, 8]
    found = methods.configured(folder, "embedded", 8)
    assert differing(found["FT-M"], PUBLISHED["FT-M"]) == {"steps"} and found["MEMIT"].layers == (1, 2)


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
    write(folder, "trials", "FT-M: &same [{learning_rate: 1e-3}, {steps: 50}]\nLoRA: *same\nanyedit_memit: [{window: 20}, {window: 10, layers: [3]}]\n")
    chosen = [methods.find(name) for name in ("FT-M", "AnyEdit (MEMIT)")]
    found = methods.trials(folder, "embedded", chosen)
    assert [[differing(one, method) for one in found[method.name]] for method in chosen] == [[{"learning_rate"}, {"steps"}], [{"window"}, {"window", "layers"}]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}]", "MEMIT: 1 trials, FT-M has 2"),
        ("FT-M: [{steps: 3}]\nMEMIT: [{steps: 3}, {steps: 4}]", "MEMIT: 2 trials, FT-M has 1"),
        ("FT-M: [{steps: 3}, {steps: 3}]\nMEMIT: [{steps: 3}, {steps: 4}]", "FT-M: 2 trials, .*expected different ones"),
        ("FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}, {steps: 3}]", "MEMIT: 2 trials, .*expected different ones"),
        ("FT-M: [{steps: 3}, {steps: 4}]\nMEMIT: [{steps: 3}, {steps: 4}, {steps: 4}]", "MEMIT: 3 trials, FT-M has 2"),
        ("FT-M: [{steps: 25}, {}]\nMEMIT: [{steps: 3}, {steps: 4}]", "FT-M: 2 trials, .*expected different ones"),  # 25 is the default
        ("FT-M: [{steps: 3}]", "unknown method 'MEMIT'; expected one of FT-M"),
        ("FT-M: [{steps: 3}]\nMEMIT: {steps: 3}", "MEMIT: expected a list of trials, found dict"),
        ("FT-M: [{steps: 3}]\nMEMIT: [{setps: 3}]", "MEMIT, trial 1: unknown field 'setps'; did you mean 'steps'"),
        ("FT-M: [{steps: 3}]\nMEMIT: [{rank: 3}]", "MEMIT, trial 1: unknown field 'rank'"),
        ("FT-M: [{steps: 3}, {steps: 0}]\nMEMIT: [{steps: 3}, {steps: 4}]", "FT-M, trial 2: field steps: .*greater than or equal to 1"),
        ("FT-M: [fast]\nMEMIT: [{steps: 3}]", "FT-M, trial 1: expected fields of FT-M and their values, found 'fast'"),
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
    """In-context editing has nothing to tune."""
    known = methods.configured(PARAMS, "embedded", tuned=False)
    found = methods.trials(PARAMS, "embedded", [method for name, method in known.items() if name != "in-context"])
    assert set(found) == set(PUBLISHED) - {"in-context"}
    assert len({len(tried) for tried in found.values()}) == 1 and len(found["FT-M"]) > 1
    assert set(yaml.safe_load((PARAMS / "trials" / "embedded.yaml").read_text())) == set(found)
