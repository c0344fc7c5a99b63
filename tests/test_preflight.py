"""Bad input is refused in one line before a kernel or a model is started."""

import json
import re
from pathlib import Path

import pytest
import yaml
from uke.cli import preflight, run
from uke.errors import InputError
from uke.methods.catalog import key


@pytest.fixture
def root(tmp_path):
    (tmp_path / "params" / "methods").mkdir(parents=True)
    for name in ("FT-L", "FT-M", "AnyEdit (MEMIT)"):
        (tmp_path / "params" / "methods" / f"{key(name)}.yaml").write_text(f"base: {name}\n")
    return tmp_path


@pytest.fixture
def directory(tmp_path, tokenizer, tiny):
    """An ordinary model directory: four blocks, context of 256."""
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refuse(root, match, data="world", **parameters):
    with pytest.raises(InputError, match=match) as caught:
        preflight.check(root, data, {"methods": ["FT-L", "FT-M"], **parameters})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"limit": 0}, "limit is 0; expected a whole number of at least 1"),
        ({"limit": -3}, "limit is -3"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_sizes": [8, 0]}, "batch_sizes: 8, 0; expected whole numbers of at least 1"),
        ({"batch_sizes": []}, "batch_sizes: none"),
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"methods": ["FT-N"]}, "unknown method 'FT-N'; did you mean"),
        ({"methods": ["FT-M", "FT-M"]}, "expected each method once"),
        ({"methods": ["AnyEdit (MEMIT)", "anyedit_memit"]}, "expected each method once"),
        ({"methods": ["MEMIT"]}, "methods: unknown method 'MEMIT'"),  # it has no file here
        ({"methods": []}, "methods: none"),
        ({"model": "./nowhere"}, "model: ./nowhere: no such directory"),
    ],
)
def test_a_bad_value_is_refused(root, parameters, match):
    refuse(root, match, **parameters)


def test_good_values_pass(root, directory):
    preflight.check(root, "world", {"methods": ["FT-M"], "limit": 3})
    preflight.check(root, "world", {"methods": ["FT-M"], "model": str(directory)})
    preflight.check(root, "world", {})


def test_a_directory_that_is_no_model_is_refused(root, tmp_path):
    refuse(root, "no config.json", model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    refuse(root, "config.json: not a language model's configuration", model=str(tmp_path))


@pytest.mark.parametrize("name", ["AnyEdit (MEMIT)", "anyedit_memit"])
def test_a_peer_is_accepted_by_name_and_by_key(root, directory, name):
    preflight.check(root, "world", {"methods": [name]})
    preflight.check(root, "world", {"methods": ["FT-M", name], "model": str(directory)})
    assert [method.name for method in preflight.methods(root, "embedded", [name, "ft_m"], 1)] == [
        "AnyEdit (MEMIT)",
        "FT-M",
    ]


@pytest.mark.parametrize("name", ["FT-M", "AnyEdit (MEMIT)"])
def test_a_layer_out_of_range_names_the_method_and_the_file(root, directory, name):
    path = root / "params" / "methods" / f"{key(name)}.yaml"
    path.write_text(yaml.safe_dump({"base": name, "layers": [1, 40]}))
    said = f"{re.escape(name)}: layers: 40 is out of range; the model has blocks 0 to 3 .*methods"
    refuse(root, said, model=str(directory), methods=["FT-L", name])
    preflight.check(root, "world", {"methods": ["FT-L"], "model": str(directory)})


def test_a_tuned_file_with_a_misspelt_field_is_refused(root):
    (root / "params" / "tuned").mkdir()
    (root / "params" / "tuned" / "embedded.yaml").write_text("1: {FT-M: {learnig_rate: 0.1}}\n")
    refuse(
        root,
        "tuned/embedded.yaml: 1: FT-M: unknown field 'learnig_rate'; did you mean 'learning_rate'",
    )


def test_tuning_without_trials_for_every_method_is_refused(root):
    tuning = {
        "data": "unkebench",
        "split": "development",
        "batch_sizes": [1, 8],
        "methods": ["FT-M", "AnyEdit (MEMIT)"],
    }
    refuse(root, "trials/embedded.yaml: no such file", **tuning)
    (root / "params" / "trials").mkdir()
    path = root / "params" / "trials" / "embedded.yaml"
    path.write_text("FT-M: [{learning_rate: 1e-3}]\n")
    refuse(root, r"trials/embedded.yaml: unknown method 'AnyEdit \(MEMIT\)'", **tuning)
    path.write_text("FT-M: [{learning_rate: 1e-3}]\nAnyEdit (MEMIT): [{window: 20}]\n")
    preflight.check(root, "unkebench", tuning)


def test_trials_are_asked_for_by_tuning_alone(root):
    asked = {"methods": ["FT-M"], "split": "test", "batch_sizes": [1, 8]}
    preflight.check(root, "unkebench", asked)
    preflight.check(root, "unkebench", {"methods": ["FT-M"], "split": "development"})


def test_a_tokenizer_without_a_template_is_refused_where_a_recipe_trains_through_one(
    root, directory
):
    (directory / "chat_template.jinja").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    refuse(root, "no chat template, and FT-L trains through it", model=str(directory))
    for name in ("FT-L", "FT-M"):
        (root / "params" / "methods" / f"{key(name)}.yaml").write_text(
            f"base: {name}\nchat_template: false\n"
        )
    preflight.check(root, "world", {"methods": ["FT-L", "FT-M"], "model": str(directory)})


def test_an_edit_longer_than_the_context_is_named(root, directory, tmp_path):
    records = [
        {
            "id": number,
            "question": "Who?",
            "answer": "word " * (5 if number != 2 else 400),
            "category": "x",
        }
        for number in range(8)
    ]
    (tmp_path / "edits.json").write_text(json.dumps(records))
    file = {
        "data": "editeverything",
        "data_file": str(tmp_path / "edits.json"),
        "model": str(directory),
    }
    with pytest.raises(
        InputError,
        match="edit '2': question and answer are .* tokens; the model's context holds 256",
    ):
        for split in ("test", "development"):  # the long one is in one of them
            preflight.check(root, file["data"], {"methods": ["FT-M"], "split": split, **file})


def test_every_record_of_a_file_is_checked_whatever_the_limit(root, tmp_path):
    records = [
        {"id": number, "question": "Who?", "answer": "Me." if number < 7 else "", "category": "x"}
        for number in range(8)
    ]
    (tmp_path / "edits.json").write_text(json.dumps(records))
    refuse(
        root,
        "edits.json.*answer",
        data="editeverything",
        data_file=str(tmp_path / "edits.json"),
        limit=2,
    )


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"levels": 1}, "levels is 1; expected 0 for all, or at least 2"),
        ({"levels": -2}, "levels is -2"),
        ({"levels": 0, "rates": -1}, "rates is -1; expected 0 for all, or at least 1"),
        (
            {"levels": 0, "methods": ["AnyEdit (MEMIT)"]},
            r"AnyEdit \(MEMIT\): it has no levels of factors",
        ),
        ({"levels": 0, "rates": 0}, "trials/embedded.yaml: no such file"),
    ],
)
def test_levels_that_there_are_not_are_refused(root, parameters, match):
    refuse(root, match, **parameters)


def test_methods_named_for_a_whole_run_leave_each_factor_those_that_have_levels(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])

    def planned(notebook, named):
        return run.plan(
            run._parser().parse_args(
                [notebook, "--profile", "quick", "--shared", f"methods={named}"]
            )
        ).parameters["methods"]

    assert planned("04_factor_layers", "FT-UKE,MEMIT,LoRA") == ["FT-UKE", "LoRA"]
    assert planned("07_recipe", "FT-UKE,MEMIT,LoRA") == ["FT-UKE", "MEMIT", "LoRA"]
    with pytest.raises(InputError, match="MEMIT: it has no levels of factors"):
        planned("04_factor_layers", "MEMIT,UnKE")


def test_a_bad_levels_file_is_refused_before_a_model_is_loaded(root):
    (root / "params" / "levels").mkdir()
    (root / "params" / "levels" / "embedded.yaml").write_text(
        "FT-M: {layers: {al: {learning_rate: 1e-3}}}\n"
    )
    refuse(
        root,
        "levels/embedded.yaml: FT-M: factor layers: unknown level 'al'; did you mean 'all'",
        levels=0,
    )
    preflight.check(root, "world", {"methods": ["FT-M"]})
