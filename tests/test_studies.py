"""A study: complete rows, resumption, weights as before, and the difference that the study is about."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import SENTENCES

from uke import asking, memory, methods, models, moments, rows, studies
from uke.edits import Detail, Edit, Probe
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


FT_M = methods.find("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 12})
QUICK = FT_M.model_copy(update={"steps": 2})
SHORT = {"layers": (1, 2), "steps": 3}
MEMIT = methods.find("memit").model_copy(update=SHORT | {"memit_lambda": 1e-2})
ANSWERS = {"Ada": "in Philadelphia", "Grace": "in Maida Vale", "Alan": "in London", "Mary": "in Cambridge"}


@pytest.fixture
def toy(tiny, tokenizer, tmp_path, monkeypatch):
    """Factory: a study of four short edits on an untrained model, always the same, with a home of the test's own."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    model, probes = tiny("llama"), {}
    edits = tuple(
        Edit(id=name, question=f"Who is {name}?", answer=f"{name} wrote {where}.", details=(Detail(question=f"Where was {name}?", answer=where),))
        for name, where in ANSWERS.items()
    )
    for edit in edits:
        probes[edit.id] = (*edit.probes, Probe(edit=edit.id, kind="struct_trip", question=f"{edit.id} was born", reference="there", chat=False))
    material = studies.Material(edits, probes, "toy")

    def build(**more):
        return studies.Study("toy", rows.Paths("smoke"), model, tokenizer, material, **{"max_new_tokens": 4, **more})

    return build


def written(study) -> list[list[str]]:
    """The batches that the study writes from now on."""
    write_in, batches = study.write_in, []
    study.write_in = lambda method, group: batches.extend([edit.id for edit in unit.edits] for unit in group) or write_in(method, group)
    return batches


def courses(frame: pd.DataFrame) -> list[dict]:
    return [json.loads(text) for text in frame["course"].dropna()]


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
    study.name, study.lanes = "killed", 1
    write_in, done = study.write_in, []

    def stop_at_the_second(recipe, group):
        if done:
            raise KeyboardInterrupt
        done.append(group[0].edits[0].id)
        return write_in(recipe, group)

    study.write_in = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        study.run(FT_M)
    study.units = study.units[:1]
    assert set(study.read()["edit"]) == set(done)
    study.units.clear()
    study.write_in = lambda recipe, group: done.append(group[0].edits[0].id) or write_in(recipe, group)
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
    other.write_in = lambda method, group: again.extend(group) or write_in(method, group)
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


# --- parts of a material, of the edits, of the probes ----------------------------------------------------------------


def test_some_kinds_of_probes_are_another_material(toy):
    whole = toy().material
    some, other = whole.only(["struct_trip", "detail"]), whole.only(["detail"])
    assert {probe.kind for probe in some.every_probe} == {"detail", "struct_trip"} and len(some.every_probe) == 8
    assert some.edits == whole.edits and len(whole.every_probe) == 12
    assert len({whole.fingerprint, some.fingerprint, other.fingerprint}) == 3
    assert some == whole.only(["detail", "struct_trip"])


def test_rows_of_all_kinds_are_not_taken_for_those_of_some(toy):
    study = toy()
    study.run(QUICK, limit=1)
    some = toy()
    some.material = study.material.only(["struct_trip"])
    some.run(QUICK, limit=1)
    assert not set(some.units) & set(study.units)
    assert set(some.read()["kind"]) == set(some.before["kind"]) == {"struct_trip"}
    assert set(study.read()["kind"]) == {"original", "detail", "struct_trip"}


def test_the_first_edits_come_with_their_own_probes_alone(toy):
    first = toy().material.first(2)
    assert [edit.id for edit in first.edits] == ["Ada", "Grace"]
    assert {probe.edit for probe in first.every_probe} == {"Ada", "Grace"}


def test_a_limit_runs_whole_batches_of_the_first_edits_and_the_rest_later(toy):
    study = toy()
    batches = written(study)
    study.run(QUICK, batch_size=2, limit=3)
    assert batches == [["Ada", "Grace"]] and set(study.read()["edit"]) == {"Ada", "Grace"}
    study.run(QUICK, batch_size=2)
    assert batches == [["Ada", "Grace"], ["Alan", "Mary"]] and len(set(study.units)) == 2
    assert set(study.read()["edit"]) == set(ANSWERS)


def test_a_limit_below_the_batch_size_runs_nothing(toy):
    study = toy()
    study.run(QUICK, batch_size=4, limit=3)
    assert study.units == []


def test_rows_of_one_batch_size_are_not_taken_for_another(toy):
    """Batch 0 of size 1 and batch 0 of size 2 once had one name, so the second was skipped."""
    study = toy()
    for size, wanted in ((1, [["Ada"], ["Grace"]]), (2, [["Ada", "Grace"]])):
        other = toy()
        batches = written(other)
        other.run(QUICK, batch_size=size, limit=2)
        assert batches == wanted and set(other.read()["batch_size"]) == {size}
        study.units += other.units
    assert len(set(study.units)) == 3
    found = study.read().groupby(["batch_size", "batch"])["edit"].agg(set).to_dict()
    assert found == {(1, 0): {"Ada"}, (1, 1): {"Grace"}, (2, 0): {"Ada", "Grace"}}


# --- trials ----------------------------------------------------------------------------------------------------------


def test_a_diverging_trial_says_why_and_leaves_nothing_to_read(toy):
    study = toy()
    assert study.attempt(QUICK, limit=1) is None
    before, units = {name: weight.clone() for name, weight in study.model.state_dict().items()}, list(study.units)
    said = study.attempt(QUICK.model_copy(update={"learning_rate": 1e38, "steps": 3}), limit=2)
    assert "FT-M: the loss of edit 'Ada', 'Grace' is not finite" in said
    assert study.units == units and set(study.read()["learning_rate"]) == {QUICK.learning_rate}
    assert all(torch.equal(weight, before[name]) for name, weight in study.model.state_dict().items())


def test_a_trial_that_fails_late_leaves_not_even_its_first_rows(toy):
    study = toy(lanes=1)
    write_in, batches = study.write_in, []

    def fail_at_the_second(method, group):
        if batches:
            raise FloatingPointError("too fast")
        batches.append(group)
        return write_in(method, group)

    study.write_in = fail_at_the_second
    assert study.attempt(QUICK, limit=2) == "too fast" and len(batches) == 1
    assert study.units == []
    study.write_in = write_in
    assert study.attempt(QUICK, limit=2) is None and set(study.read()["edit"]) == {"Ada", "Grace"}


def test_a_trial_that_cannot_start_says_why(toy):
    study = toy()
    assert "no second moments of this model" in study.attempt(MEMIT, limit=1)
    assert study.units == []


# --- peers -----------------------------------------------------------------------------------------------------------


def test_a_peer_is_written_and_its_rows_say_how(study):
    """On the embedded model: its course stands once in a batch, by windows before and after, and its memory in every row."""
    study.name, study.windows, study.max_new_tokens = "peer", 20, 8
    study.material = study.material.only(["detail", "struct_trip"])
    moments.measure(study.model, study.tokenizer, moments.world_texts()[:40], (1, 2))
    study.run(methods.find("memit").model_copy(update=SHORT))
    after = study.read()
    assert after.groupby("batch")["course"].count().tolist() == [1, 1] and after["notes"].isna().all()
    for course in courses(after):
        assert course["stopped"] == "steps" and len(course["losses"]) == 3
        assert len(course["norms"]) == 2 and all(norm > 0 for norm in course["norms"].values())
        [(then, now)] = course["windows"]  # of the one edit
        assert len(then) == len(now) > 1 and then != now and max(then + now) < 0
    assert after["peak_mib"].between(0, 4000, inclusive="neither").all() or memory.Peak(study.model.device).mib() is None
    assert after["steps"].eq(3).all() and after["change_norm"].gt(0).all() and after["seed"].eq(2024).all()


def test_what_a_reader_must_know_of_a_method_stands_in_its_rows(toy, tokenizer):
    study = toy()
    moments.measure(study.model, tokenizer, SENTENCES * 3, (1, 2))
    study.run(methods.find("anyedit_memit").model_copy(update=SHORT | {"memit_lambda": 1e-2, "window": 200}), batch_size=2, limit=2)
    note = "edit '{}': the answer is shorter than a window of 200 tokens; one window"
    assert study.read()["notes"].unique().tolist() == ["; ".join(map(note.format, ("Ada", "Grace")))]
    assert [course["windows"] for course in courses(study.read())] == [[]]  # none asked for


def test_windows_are_read_of_every_edit_of_a_batch(toy):
    study = toy(windows=5)
    study.run(QUICK.model_copy(update={"steps": 8}), batch_size=2, limit=2)
    [course] = courses(study.read())
    assert len(course["windows"]) == 2
    for then, now in course["windows"]:
        assert len(then) == len(now) > 1 and sum(now) > sum(then)


def test_rows_made_with_another_preservation_corpus_are_other_rows(toy, tokenizer):
    units = {}
    for corpus in (SENTENCES * 3, SENTENCES[:2] * 6):
        for method in (MEMIT, QUICK):
            study = toy()
            moments.measure(study.model, tokenizer, corpus, (1, 2))
            batches = written(study)
            study.run(method, limit=1)
            units.setdefault(method.name, []).append((study.units[0], len(batches)))
    (first, run), (second, run_again) = units["MEMIT"]
    assert first != second and (run, run_again) == (1, 1)
    assert units["FT-M"][0][0] == units["FT-M"][1][0] and units["FT-M"][1][1] == 0  # a recipe reads no corpus


def test_a_text_in_context_is_read_before_every_question_of_its_edit(toy):
    study = toy(windows=5)
    study.run(methods.find("in-context"), limit=2)
    after = study.read()
    assert set(after["method"]) == {"in-context"} and after["change_norm"].eq(0).all() and after["steps"].eq(0).all()
    assert after["answer"].ne(after["before"]).any()
    assert [course["windows"] for course in courses(after)] == [[], []]  # no weight moved
    assert not hasattr(study.model, "passages")
