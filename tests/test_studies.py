"""A study: complete rows, resumption, weights as before, and the difference that the study is about."""

import dataclasses
import shutil

import pandas as pd
import pytest
import torch

from uke import asking, models, recipes, rows, studies
from uke.errors import InputError

KINDS = {"original", "paraphrase", "detail", "rel_doc", "rand_doc", "struct_trip", "near_triple", "multi_hop", "general"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, results):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(results, home / "results")
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(home))


@pytest.fixture(scope="module")
def loaded():
    return models.load("embedded", device="cpu")


@pytest.fixture
def study(loaded):
    paths = rows.Paths("smoke")
    return studies.Study("trial", paths, *loaded, studies.gather(paths, "test", 2), max_new_tokens=130, labels={"split": "test"})


FT_M = recipes.named("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 12})


def test_every_probe_of_every_edit_has_a_row_before_and_after(study):
    study.run(FT_M)
    after = study.read()
    wanted = {(probe.edit, probe.kind, probe.number) for probe in study.material.every_probe}
    assert {kind for _, kind, _ in wanted} == KINDS
    for frame in (study.before, after):
        assert set(zip(frame["edit"], frame["kind"], frame["number"])) == wanted and len(frame) == len(wanted)
    assert after["before"].notna().all() and after["train_seconds"].gt(0).all()


def test_the_edit_is_written_and_undone(study):
    weights = {name: weight.clone() for name, weight in study.model.state_dict().items()}
    study.run(FT_M.model_copy(update={"seed": 7}))
    scores = studies.compared(study.read(), study.before)
    original = scores[scores["kind"] == "original"].groupby("method")["score"].mean()
    assert original["FT-M"] > original["before the edit"] + 0.2
    assert all(torch.equal(weight, weights[name]) for name, weight in study.model.state_dict().items())


def test_a_unit_with_rows_is_not_run_again(study, monkeypatch):
    study.run(FT_M)
    monkeypatch.setattr(studies, "edited", lambda *_: pytest.fail("edited again"))
    study.run(FT_M)


def test_a_killed_study_resumes_where_it_stopped(study):
    study.name = "killed"
    write_in, done = study.write_in, []

    def stop_at_the_second(recipe, batch):
        if done:
            raise KeyboardInterrupt
        done.append(batch[0].id)
        return write_in(recipe, batch)

    study.write_in = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        study.run(FT_M)
    study.units = study.units[:1]
    assert set(study.read()["edit"]) == set(done)
    study.units.clear()
    study.write_in = lambda recipe, batch: done.append(batch[0].id) or write_in(recipe, batch)
    study.run(FT_M)
    assert done == [edit.id for edit in study.material.edits] and set(study.read()["edit"]) == set(done)


@pytest.mark.parametrize("change", ["recipe", "tokens", "template"])
def test_rows_made_otherwise_are_neither_skipped_nor_mixed_in(study, monkeypatch, change):
    study.run(FT_M)
    first, again = study.read(), []
    other = studies.Study("trial", study.paths, study.model, study.tokenizer, study.material, max_new_tokens=130, labels={"split": "test"})
    recipe = FT_M.model_copy(update={"steps": 3}) if change == "recipe" else FT_M
    other.max_new_tokens = 50 if change == "tokens" else 130
    write_in = other.write_in
    other.write_in = lambda *batch: again.append(1) or write_in(*batch)
    with monkeypatch.context() as patch:
        if change == "template":
            patch.setattr(study.tokenizer, "chat_template", study.tokenizer.chat_template + " ")
        other.run(recipe)
        assert len(again) == 2 and len(other.read()) == len(first)
    study.units.clear()
    study.run(FT_M)
    pd.testing.assert_frame_equal(study.read(), first)


def test_batches_are_written_together_and_a_rest_is_left_out(study):
    study.name = "batches"
    study.run(FT_M, batch_size=2)
    assert study.read().groupby("batch")["edit"].nunique().tolist() == [2]
    assert [len(batch) for batch in studies.batched(range(5), 2)] == [2, 2]


def test_the_floor_is_another_edits_text(study):
    floor = asking.floor(study.before)
    assert set(floor["kind"]) == {"original", "paraphrase", "rel_doc", "rand_doc"}
    assert floor["score"].between(0, 0.7).all()


def test_the_floor_never_compares_a_question_with_itself():
    frame = pd.DataFrame({"edit": ["a", "b", "c"], "kind": "rel_doc", "question": ["Q1", "Q1", "Q2"], "reference": "", "before": ["one two", "one two", "three four"]})
    assert asking.floor(frame)["score"].tolist() == [0, 0, 0]
    assert asking.floor(frame[:2]).empty  # one question only: nothing to compare with


def test_a_world_model_on_real_data_is_wiring_only(study):
    assert not study.wiring_only()
    study.material = dataclasses.replace(study.material, world_seed=None)
    assert study.wiring_only()
    study.material = dataclasses.replace(study.material, world_seed=2)
    assert study.wiring_only()


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split"):
        studies.gather(rows.Paths("smoke"), "tset", 2)
