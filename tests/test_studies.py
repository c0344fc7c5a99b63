"""A study: complete rows, resumption, weights as before, and the difference that the study is about."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SENTENCES
from uke.data.edits import Detail, Edit, Probe
from uke.errors import InputError
from uke.methods import catalog as methods
from uke.methods import edited, finetune
from uke.methods.locate_edit import covariance
from uke.models import generate as answering
from uke.models import model as models
from uke.results import compare, rows
from uke.study import memory
from uke.study import score as asking
from uke.study import study as studies
from uke.study.dataset import Dataset, batched
from uke.study.dataset import load as load_dataset

KINDS = {
    "original",
    "paraphrase",
    "detail",
    "rel_doc",
    "rand_doc",
    "struct_trip",
    "near_triple",
    "multi_hop",
    "general",
}


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
    return studies.Study("trial", load_dataset("smoke", limit=2), loaded, False, max_new_tokens=130)


FT_M = methods.find("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 12})
QUICK = FT_M.model_copy(update={"steps": 2})
SHORT = {"layers": (1, 2), "steps": 3}
MEMIT = methods.find("memit").model_copy(update=SHORT | {"memit_lambda": 1e-2})
ANSWERS = {
    "Ada": "in Philadelphia",
    "Grace": "in Maida Vale",
    "Alan": "in London",
    "Mary": "in Cambridge",
}


@pytest.fixture
def toy(tiny, tokenizer, tmp_path, monkeypatch):
    """Factory: a study of four short edits on an untrained model, always the same, with a home of the test's own."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    model, probes = tiny("llama"), {}
    edits = tuple(
        Edit(
            id=name,
            question=f"Who is {name}?",
            answer=f"{name} wrote {where}.",
            details=(Detail(question=f"Where was {name}?", answer=where),),
        )
        for name, where in ANSWERS.items()
    )
    for edit in edits:
        probes[edit.id] = (
            *edit.probes,
            Probe(
                edit=edit.id,
                kind="struct_trip",
                question=f"{edit.id} was born",
                reference="there",
                chat=False,
            ),
        )
    dataset = Dataset(edits, probes, "toy", rows.Paths("smoke"))

    def build(**more):
        return studies.Study(
            "toy", dataset, (model, tokenizer), False, **{"max_new_tokens": 4, **more}
        )

    return build


def written(study) -> list[list[str]]:
    """The batches that the study writes from now on."""
    write_in, batches = study.write_in, []
    study.write_in = lambda method, group, also: (
        batches.extend([edit.id for edit in unit.edits] for unit, *_ in group)
        or write_in(method, group, also)
    )
    return batches


def courses(frame: pd.DataFrame) -> list[dict]:
    return [json.loads(text) for text in frame["curve"].dropna()]


def test_every_probe_of_every_edit_has_a_row_before_and_after(study):
    study.run(FT_M)
    after = study.read()
    wanted = {(probe.edit, probe.kind, probe.number) for probe in study.dataset.every_probe}
    assert {kind for _, kind, _ in wanted} == KINDS
    for frame in (study.before, after):
        assert set(zip(frame["edit"], frame["kind"], frame["number"])) == wanted and len(
            frame
        ) == len(wanted)
    assert after["before"].notna().all() and after["train_seconds"].gt(0).all()


def test_the_edit_is_written_and_undone(study):
    weights = {name: weight.clone() for name, weight in study.model.state_dict().items()}
    study.run(FT_M.model_copy(update={"seed": 7}))
    scores = compare.compared(study.read(), study.before)
    original = scores[scores["kind"] == "original"].groupby("method")["score"].mean()
    assert original["FT-M"] > original["no edit"] + 0.2
    assert all(
        torch.equal(weight, weights[name]) for name, weight in study.model.state_dict().items()
    )


def test_a_unit_with_rows_is_not_run_again(study, monkeypatch):
    study.run(FT_M)
    monkeypatch.setattr(studies, "edited", lambda *_: pytest.fail("edited again"))
    study.run(FT_M)


def test_a_killed_study_resumes_where_it_stopped(study):
    study.name, study.lanes, study.max_new_tokens = "killed", 1, 120
    write_in, done = study.write_in, []

    def stop_at_the_second(recipe, group, also):
        if done:
            raise KeyboardInterrupt
        done.append(group[0][0].edits[0].id)
        return write_in(recipe, group, also)

    study.write_in = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        study.run(FT_M)
    study.units = study.units[:1]
    assert set(study.read()["edit"]) == set(done)
    study.units.clear()
    study.write_in = lambda recipe, group, also: (
        done.append(group[0][0].edits[0].id) or write_in(recipe, group, also)
    )
    study.run(FT_M)
    assert done == [edit.id for edit in study.dataset.edits] and set(study.read()["edit"]) == set(
        done
    )


@pytest.mark.parametrize("change", ["recipe", "tokens", "template"])
def test_rows_made_otherwise_are_neither_skipped_nor_mixed_in(study, monkeypatch, change):
    study.run(FT_M)
    first, again = study.read(), []
    other = studies.Study("trial", study.dataset, study.subject, False, max_new_tokens=130)
    recipe = FT_M.model_copy(update={"steps": 3}) if change == "recipe" else FT_M
    other.max_new_tokens = 50 if change == "tokens" else 130
    write_in = other.write_in
    other.write_in = lambda method, group, also: (
        again.extend(group) or write_in(method, group, also)
    )
    with monkeypatch.context() as patch:
        if change == "template":
            patch.setattr(study.tokenizer, "chat_template", study.tokenizer.chat_template + " ")
        other.run(recipe)
        assert len(again) == 2 and len(other.read()) == len(first)
    study.units.clear()
    study.run(FT_M)
    pd.testing.assert_frame_equal(study.read(), first)


def test_an_edit_is_trained_again_to_be_asked_otherwise(toy, monkeypatch):
    plain, raw = toy(), toy(chat=False)
    raw.name = "raw"
    alone = toy(chat=False)
    alone.name = "alone"
    alone.run(QUICK)
    trained, write = [], studies.edited_each
    monkeypatch.setattr(
        studies,
        "edited_each",
        lambda model, tokenizer, edits, method: (
            trained.extend(edits) or write(model, tokenizer, edits, method)
        ),
    )
    plain.run(QUICK, also=[raw], level="some")
    assert [edit.id for edit in trained] == list(ANSWERS) and raw.read()[
        "answer"
    ].tolist() != plain.read()["answer"].tolist()
    timed = [name for name in raw.read() if name.endswith("seconds")]
    assert raw.read()[timed].gt(0).all(axis=None) and set(raw.read()["level"]) == {"some"}
    pd.testing.assert_frame_equal(
        *(
            study.read().drop(columns=["study", "level", *timed, "peak_mib"])
            for study in (raw, alone)
        )
    )
    again = toy()
    again.run(QUICK, also=[raw], level="some")
    assert len(trained) == len(ANSWERS)
    shutil.rmtree(raw.paths.rows("raw"))
    shutil.rmtree(raw.paths.rows("alone"))
    again.run(QUICK, also=[raw], level="some")
    assert len(trained) == 2 * len(ANSWERS)


def test_a_trial_that_fails_leaves_rows_of_another_way_of_asking(toy, monkeypatch):
    plain, raw = toy(), toy(chat=False)
    monkeypatch.setattr(
        studies, "edited_each", lambda *_: (_ for _ in ()).throw(FloatingPointError("too fast"))
    )
    assert plain.attempt(QUICK, also=[raw]) == "too fast" and plain.units == raw.units == []


@pytest.mark.parametrize("change", [None, "steps", "windows", "tokens", "chat"])
def test_the_same_work_is_done_twice_or_other_work_is_taken_for_it(toy, change):
    first = toy()
    first.run(QUICK, factor="one", level="with")
    other = toy(
        **{"windows": {"windows": 5}, "tokens": {"max_new_tokens": 3}, "chat": {"chat": False}}.get(
            change, {}
        )
    )
    other.name = "other"
    batches = written(other)
    other.run(
        FT_M if change == "steps" else QUICK.model_copy(update={"name": "another name"}),
        factor="two",
    )
    assert batches == ([[name] for name in ANSWERS] if change else [])
    if not change:
        found = other.read()
        assert (
            set(found["method"]) == {"another name"}
            and set(found["factor"]) == {"two"}
            and found["level"].isna().all()
        )
        told = ["study", "method", "factor", "level"]
        pd.testing.assert_frame_equal(found.drop(columns=told), first.read().drop(columns=told))


def test_batches_are_written_together_and_a_rest_is_left_out(study):
    study.name = "batches"
    study.run(FT_M, batch_size=2)
    assert study.read().groupby("batch")["edit"].nunique().tolist() == [2]
    assert [len(batch) for batch in batched(range(5), 2)] == [2, 2]


def test_the_floor_is_another_edits_text(study):
    floor = asking.floor(study.before)
    assert set(floor["kind"]) == {"original", "paraphrase", "rel_doc", "rand_doc"}
    assert floor["score"].between(0, 0.7).all()


def test_the_floor_never_compares_a_question_with_itself():
    frame = pd.DataFrame(
        {
            "edit": ["a", "b", "c"],
            "kind": "rel_doc",
            "question": ["Q1", "Q1", "Q2"],
            "reference": "",
            "before": ["one two", "one two", "three four"],
        }
    )
    assert asking.floor(frame)["score"].tolist() == [0, 0, 0]
    assert asking.floor(frame[:2]).empty  # one question only: nothing to compare with


def test_a_world_model_on_real_data_is_wiring_only(study):
    assert not study.smoke_run()
    study.dataset = dataclasses.replace(study.dataset, world_seed=None)
    assert study.smoke_run()
    study.dataset = dataclasses.replace(study.dataset, world_seed=2)
    assert study.smoke_run()


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split"):
        load_dataset("smoke", split="tset")


# --- parts of a dataset, of the edits, of the probes ----------------------------------------------------------------


def test_some_kinds_of_probes_are_another_material(toy):
    whole = toy().dataset
    some, other = whole.only(["struct_trip", "detail"]), whole.only(["detail"])
    assert {probe.kind for probe in some.every_probe} == {"detail", "struct_trip"} and len(
        some.every_probe
    ) == 8
    assert some.edits == whole.edits and len(whole.every_probe) == 12
    assert len({whole.fingerprint, some.fingerprint, other.fingerprint}) == 3
    assert some == whole.only(["detail", "struct_trip"])


def test_rows_of_all_kinds_are_not_taken_for_those_of_some(toy):
    study = toy()
    study.run(QUICK, limit=1)
    some = toy()
    some.dataset = study.dataset.only(["struct_trip"])
    some.run(QUICK, limit=1)
    assert not set(some.units) & set(study.units)
    assert set(some.read()["kind"]) == set(some.before["kind"]) == {"struct_trip"}
    assert set(study.read()["kind"]) == {"original", "detail", "struct_trip"}


def test_the_first_edits_come_with_their_own_probes_alone(toy):
    first = toy().dataset.first(2)
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
    before, units = (
        {name: weight.clone() for name, weight in study.model.state_dict().items()},
        list(study.units),
    )
    said = study.attempt(QUICK.model_copy(update={"learning_rate": 1e38, "steps": 3}), limit=2)
    assert (
        said.count("FT-M: the loss of edit") == 2
        and "'Ada' is not finite" in said
        and "'Grace' is not finite" in said
    )
    assert study.units == units and set(study.read()["learning_rate"]) == {QUICK.learning_rate}
    assert all(
        torch.equal(weight, before[name]) for name, weight in study.model.state_dict().items()
    )


def test_a_trial_that_fails_late_leaves_not_even_its_first_rows(toy):
    study = toy(lanes=1)
    write_in, batches = study.write_in, []

    def fail_at_the_second(method, group, also):
        if batches:
            raise FloatingPointError("too fast")
        batches.append(group)
        return write_in(method, group, also)

    study.write_in = fail_at_the_second
    assert study.attempt(QUICK, limit=2) == "too fast" and len(batches) == 1
    assert study.units == []
    study.write_in = write_in
    assert study.attempt(QUICK, limit=2) is None and set(study.read()["edit"]) == {"Ada", "Grace"}


def test_a_trial_that_cannot_start_says_why(toy):
    study = toy()
    assert "no covariance of this model" in study.attempt(MEMIT, limit=1)
    assert study.units == []


# --- peers -----------------------------------------------------------------------------------------------------------


def test_a_peer_is_written_and_its_rows_say_how(study):
    """On the embedded model: its course stands once in a batch, by windows before and after, and its memory in every row."""
    study.name, study.windows, study.max_new_tokens = "peer", 20, 8
    study.dataset = study.dataset.only(["detail", "struct_trip"])
    covariance.measure(study.model, study.tokenizer, covariance.world_texts()[:40], (1, 2))
    study.run(methods.find("memit").model_copy(update=SHORT))
    after = study.read()
    assert (
        after.groupby("batch")["curve"].count().tolist() == [1, 1] and after["notes"].isna().all()
    )
    for course in courses(after):
        assert course["stopped"] == "steps" and len(course["losses"]) == 3
        assert len(course["norms"]) == 2 and all(norm > 0 for norm in course["norms"].values())
        [(then, now)] = course["windows"]  # of the one edit
        assert len(then) == len(now) > 1 and then != now and max(then + now) < 0
    assert (
        after["peak_mib"].between(0, 4000, inclusive="neither").all()
        or memory.Peak(study.model.device).mib() is None
    )
    assert (
        after["steps"].eq(3).all()
        and after["change_norm"].gt(0).all()
        and after["seed"].eq(2024).all()
    )


def test_what_a_reader_must_know_of_a_method_stands_in_its_rows(toy, tokenizer):
    study = toy()
    covariance.measure(study.model, tokenizer, SENTENCES * 3, (1, 2))
    study.run(
        methods.find("anyedit_memit").model_copy(
            update=SHORT | {"memit_lambda": 1e-2, "window": 200}
        ),
        batch_size=2,
        limit=2,
    )
    note = "edit '{}': the answer is shorter than a window of 200 tokens; one window"
    assert study.read()["notes"].unique().tolist() == [
        "; ".join(map(note.format, ("Ada", "Grace")))
    ]
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
            covariance.measure(study.model, tokenizer, corpus, (1, 2))
            batches = written(study)
            study.run(method, limit=1)
            units.setdefault(method.name, []).append((study.units[0], len(batches)))
    (first, run), (second, run_again) = units["MEMIT"]
    assert first != second and (run, run_again) == (1, 1)
    assert (
        units["FT-M"][0][0] == units["FT-M"][1][0] and units["FT-M"][1][1] == 0
    )  # a recipe reads no corpus


def test_a_text_in_context_is_read_before_every_question_of_its_edit(toy):
    study = toy(windows=5)
    study.run(methods.find("in-context"), limit=2)
    after = study.read()
    assert (
        set(after["method"]) == {"in-context"}
        and after["change_norm"].eq(0).all()
        and after["steps"].eq(0).all()
    )
    assert after["answer"].ne(after["before"]).any()
    assert [course["windows"] for course in courses(after)] == [[], []]  # no weight moved
    assert not hasattr(study.model, "passages")


# --- lanes -----------------------------------------------------------------------------------------------------------

LORA = methods.find("LoRA").model_copy(update={"steps": 4, "learning_rate": 1e-2})
MEASURED = ("train_seconds", "answer_seconds", "peak_mib")  # of the run, not of the edit
COURSED = (
    "curve",
    "steps",
    "change_norm",
    "log_probability",
)  # compared with room for rounding, or by themselves


def groups(study) -> list[int]:
    """How many edits the study writes side by side from now on."""
    write_in, sizes = study.write_in, []
    study.write_in = lambda method, group, also: (
        sizes.append(len(group)) or write_in(method, group, also)
    )
    return sizes


@pytest.mark.parametrize(
    "method", [FT_M, LORA, MEMIT, methods.find("in-context")], ids=lambda method: method.name
)
def test_rows_written_in_lanes_are_other_rows(toy, tokenizer, method):
    frames, units, sizes = {}, {}, {}
    for lanes in (1, 3, 16):
        study = toy(lanes=lanes, windows=5)
        covariance.measure(study.model, tokenizer, SENTENCES * 3, (1, 2))
        sizes[lanes] = groups(study)
        study.run(method)
        frames[lanes], units[lanes] = study.read(), study.units
        folder = study.paths.rows("toy")
        assert {path.stem for path in folder.glob("*.parquet")} == set(study.units) and len(
            study.units
        ) == 4
        shutil.rmtree(folder)
    assert sizes == {1: [1] * 4, 3: [3, 1], 16: [4]} and units[1] == units[3] == units[16]
    alone = frames.pop(1)
    for frame in frames.values():
        pd.testing.assert_frame_equal(
            frame.drop(columns=[*MEASURED, *COURSED]), alone.drop(columns=[*MEASURED, *COURSED])
        )
        assert frame["log_probability"].tolist() == pytest.approx(
            alone["log_probability"].tolist(), rel=1e-2, nan_ok=True
        )
        assert frame["change_norm"].tolist() == pytest.approx(
            alone["change_norm"].tolist(), rel=1e-2
        )
        assert frame["curve"].notna().tolist() == alone["curve"].notna().tolist() and frame[
            ["train_seconds", "answer_seconds"]
        ].gt(0).all(axis=None)
        for found, own in zip(courses(frame), courses(alone), strict=True):
            assert found["norms"] == pytest.approx(own["norms"], rel=1e-2) and len(
                found["windows"]
            ) == len(own["windows"]) == (method.name != "in-context")
            for pair, wanted in zip(found["windows"], own["windows"], strict=True):
                assert all(
                    one == pytest.approx(two, rel=1e-2)
                    for one, two in zip(pair, wanted, strict=True)
                )
            if isinstance(method, methods.Recipe):
                assert (
                    found["losses"] == pytest.approx(own["losses"], rel=1e-2)
                    and found["stopped"] == own["stopped"]
                )
        if isinstance(method, methods.Recipe):
            assert frame["steps"].tolist() == alone["steps"].tolist()


def test_a_batch_is_written_in_lanes(toy, monkeypatch):
    """Edits of one batch share one set of weights, whatever the number of lanes."""
    monkeypatch.setattr(studies, "edited_each", lambda *_: pytest.fail("written apart"))
    study = toy(lanes=16)
    sizes = groups(study)
    study.run(QUICK, batch_size=2)
    assert sizes == [1, 1] and study.read()["batch"].nunique() == 2


def test_a_killed_study_writes_again_what_it_wrote_in_lanes(toy):
    first, again = toy(lanes=2), toy(lanes=16)
    batches = written(again)
    first.run(QUICK, limit=3)
    again.run(QUICK)
    assert batches == [["Mary"]] and set(again.read()["edit"]) == set(ANSWERS)


def test_an_edit_that_diverges_ends_the_study_before_the_others_are_written(toy, monkeypatch):
    study, plain = toy(lanes=2), finetune.loss
    bad = max(ANSWERS, key=lambda edit: len(ANSWERS[edit]))

    def loss(model, batch, scope):
        return plain(model, batch, scope) * torch.tensor(
            [float("nan") if edit == bad else 1.0 for edit in model.lanes.ids]
        )

    monkeypatch.setattr(finetune, "loss", loss)
    with pytest.raises(
        FloatingPointError, match=f"the loss of edit '{bad}' is not finite after 0 steps"
    ):
        study.run(QUICK)
    left = [
        unit for unit in study.units if rows.done(study.paths, "toy", unit, {"model": study.mark})
    ]
    assert len(left) == len(ANSWERS) - 1 and bad not in set(
        rows.read(study.paths, "toy", units=left)["edit"]
    )
    monkeypatch.setattr(finetune, "loss", plain)
    again = toy(lanes=2)
    batches = written(again)
    again.run(QUICK)
    assert batches == [[bad]] and set(again.read()["edit"]) == set(ANSWERS)


def test_the_unedited_model_is_asked_again_for_other_probes(toy, monkeypatch):
    """The same prompts in a study of fewer edits: its rows are others, its answers known."""
    seen, decode = [], answering._decode
    monkeypatch.setattr(
        answering,
        "_decode",
        lambda model, questions, limits, ends: (
            seen.extend(questions) or decode(model, questions, limits, ends)
        ),
    )
    whole = toy().before
    asked = len(seen)
    study = toy()
    study.dataset = study.dataset.first(2)
    assert asked and len(seen) == asked and len(study.before) < len(whole)
    same = whole[whole["edit"].isin(study.before["edit"])]
    assert study.before["answer"].tolist() == same["answer"].tolist()


def test_too_many_lanes_for_the_memory_end_the_study(toy, caplog):
    study = toy(lanes=16)
    write_in, tried = study.write_in, []

    def full(method, group, also):
        tried.append([unit.edits[0].id for [unit] in group])
        if len(group) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return write_in(method, group, also)

    study.write_in = full
    study.run(QUICK, limit=3)
    assert tried == [["Ada", "Grace", "Alan"], ["Ada"], ["Grace"], ["Alan"]] and study.lanes == 1
    assert set(study.read()["edit"]) == {"Ada", "Grace", "Alan"} and len(study.units) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "toy: FT-M: out of memory with 3 edits side by side; going on with 1"
    ]


def test_after_an_end_of_memory_as_many_lanes_are_tried_again(toy, caplog):
    study = toy(lanes=16)
    write_in, sizes = study.write_in, []

    def full(method, group, also):
        sizes.append(len(group))
        if len(group) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return write_in(method, group, also)

    study.write_in = full
    study.run(QUICK)
    assert sizes == [4, 2, 2] and study.lanes == 2 and len(caplog.records) == 1
    study.run(LORA)
    assert sizes[3:] == [2, 2]  # what is known of the memory holds for the next method


@pytest.mark.parametrize("size", [1, 2])
def test_an_edit_or_batch_too_large_alone_is_tried_for_ever(toy, size):
    study = toy(lanes=2)
    tried = []

    def full(method, group, also):
        tried.append(group)
        raise torch.OutOfMemoryError("out of memory")

    study.write_in = full
    with pytest.raises(torch.OutOfMemoryError):
        study.run(QUICK, batch_size=size)
    assert len(tried) == (3 if size == 1 else 2) and not list(study.paths.rows("toy").glob("*"))


def test_a_batch_too_large_costs_single_edits_their_lanes_or_a_lane_too_many_the_memory_that_was_spared(
    toy,
):
    """Each step of thrift is taken by itself: the second must not undo the first, nor the first cost what it need not."""
    study = toy(lanes=16)
    assert study.spare(QUICK, 1) and len(study.thrift.taken) == 1 and study.lanes == 16
    assert study.spare(QUICK, 4) and len(study.thrift.taken) == 1 and study.lanes == 2
    assert not study.spare(QUICK, 1)


@pytest.mark.parametrize(("method", "size"), [(QUICK, 2), (LORA, 1), (MEMIT, 2)])
def test_what_fits_only_with_activations_computed_again_ends_the_study_or_scores_otherwise(
    toy, caplog, monkeypatch, method, size
):
    plain, study = toy(lanes=1), toy(lanes=1)
    covariance.measure(plain.model, plain.tokenizer, SENTENCES * 3, (1, 2))
    plain.run(method, batch_size=size, limit=2)
    study.name, write_in, inside = "short", study.write_in, []

    def full(*args):
        if not study.thrift.taken:
            raise torch.OutOfMemoryError("out of memory")
        return write_in(*args)

    study.write_in = full
    monkeypatch.setattr(study, "take_over", lambda *_: False)
    for way, made in memory.WAYS.items():
        monkeypatch.setitem(
            memory.WAYS, way, lambda model, made=made: inside.append(model) or made(model)
        )
    study.run(method, batch_size=size, limit=2)
    mine, others = study.read(), plain.read()
    assert mine["answer"].tolist() == others["answer"].tolist() and np.allclose(
        mine["change_norm"], others["change_norm"], rtol=1e-6
    )
    assert (
        mine["notes"].str.contains("computed again").all()
        and not others["notes"].fillna("").str.contains("computed again").any()
    )
    assert (
        len(inside) == 2 // size
        and len(caplog.records) == 1
        and "computed again" in caplog.records[0].getMessage()
    )


@pytest.mark.parametrize(
    ("lanes_free", "abreast"), [(0, 1), (0.4, 1), (1.9, 1), (4, 2), (6.1, 3), (6.9, 3), (1000, 5)]
)
def test_lanes_do_not_follow_the_free_memory(toy, monkeypatch, lanes_free, abreast):
    """Half of what is free, down to one lane, and no more than asked for."""
    study = toy(lanes=5)
    for method in (QUICK, LORA, MEMIT, methods.find("in-context")):
        each = studies.lane_mib(study.model, method)
        monkeypatch.setattr(studies, "free_mib", lambda device: lanes_free * each)
        assert study.abreast(method) == abreast


def test_a_system_that_does_not_tell_what_is_free_gets_no_lane(toy, monkeypatch):
    study = toy(lanes=5)
    monkeypatch.setattr(studies, "free_mib", lambda device: float("inf"))
    assert study.abreast(QUICK) == 5


def test_the_free_memory_is_looked_at_once(toy, monkeypatch):
    study = toy(lanes=16)
    sizes, free = groups(study), iter([2.0, 6.0])
    monkeypatch.setattr(
        studies, "free_mib", lambda device: next(free) * studies.lane_mib(study.model, QUICK)
    )
    study.run(QUICK)
    assert sizes == [1, 3]


# --- raw prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 16])
def test_raw_prompts_are_asked_through_the_template_or_share_its_rows(toy, lanes):
    raw, plain = toy(chat=False, lanes=lanes), toy(lanes=lanes)
    probes, limit = raw.dataset.every_probe, {"max_new_tokens": raw.token_limit}
    method = FT_M.model_copy(update={"steps": 4})
    for study in (raw, plain):
        study.run(method)
        before = study.before.set_index(["edit", "kind", "number"])["answer"]
        after = study.read().set_index(["edit", "kind", "number"])
        places = [(probe.edit, probe.kind, probe.number) for probe in probes]
        assert before[places].tolist() == answering.answer(
            study.model, study.tokenizer, probes, chat=study.chat, **limit
        )
        assert after.loc[places, "before"].tolist() == before[places].tolist()
        for edit in study.dataset.edits:
            own = [probe for probe in probes if probe.edit == edit.id]
            told = [place for place, probe in enumerate(own) if probe.kind != "struct_trip"]
            with edited(study.model, study.tokenizer, [edit], method) as m:
                texts = answering.answer(m, study.tokenizer, own, chat=study.chat, **limit)
                likely = answering.target_log_probability(
                    m, study.tokenizer, [own[place] for place in told], chat=study.chat
                )
            found = after.loc[[(probe.edit, probe.kind, probe.number) for probe in own]]
            assert found["answer"].tolist() == texts
            assert found["log_probability"].dropna().tolist() == pytest.approx(likely, rel=1e-2)
    assert not set(raw.units) & set(plain.units)
    texts = {
        study: frame.loc[frame["kind"] != "struct_trip", "answer"].tolist()
        for study, frame in (("raw", raw.before), ("plain", plain.before))
    }
    assert texts["raw"] != texts["plain"]  # the rows of each are its own, those before the edit too
    assert toy(chat=False).before["answer"].tolist() == raw.before["answer"].tolist()


def test_rows_of_studies_that_ask_as_each_probe_says_are_named_anew(toy):
    """Committed rows were named before there was a choice."""
    assert "chat" not in toy().conditions and toy(chat=False).conditions["chat"] is False


# --- the other form of the world -------------------------------------------------------------------------------------


def test_edits_of_the_other_form_are_those_of_this_one(home):
    akew, plain = (
        load_dataset("smoke", limit=5, form="akew-counterfact"),
        load_dataset("smoke", limit=5),
    )
    [world] = (home / "results").glob("world-1-*")
    assert akew.fingerprint != plain.fingerprint and akew.world_seed == plain.world_seed == 1
    records = json.loads((world / "test" / "AKEW-CounterFact.json").read_text())[:5]
    for edit, other, record in zip(akew.edits, plain.edits, records, strict=True):
        assert (
            edit.answer == other.answer == record["requested_rewrite"]["fact_new_uns"]
            and edit.question != other.question
        )
        assert edit.question == record["requested_rewrite"]["prompt_full"]
    own = {probe.kind for edit in akew.edits for probe in edit.probes}
    kinds = {probe.kind for probe in akew.every_probe}
    assert (
        kinds - own == {"rel_doc", "rand_doc", "struct_trip", "near_triple"}
        and "general" not in kinds
    )
    listed = json.loads((world / "test" / "locality" / "AKEW-Loc-CF.json").read_text())
    wanted = {(one["edit"], one["kind"], one["question"]) for one in listed}
    around = [
        probe for edit in akew.edits for probe in akew.probes[edit.id] if probe not in edit.probes
    ]
    assert around and {(probe.edit, probe.kind, probe.question) for probe in around} <= wanted
    for edit in akew.edits:
        assert {"rel_doc", "rand_doc", "struct_trip"} <= {
            probe.kind for probe in akew.probes[edit.id]
        } and {probe.edit for probe in akew.probes[edit.id]} == {edit.id}
    assert (
        world / "test" / "locality" / "UnKEBench-Loc.json"
    ).is_file()  # one set does not take the other's place
    assert load_dataset("smoke", limit=5) == plain
    assert {edit.id for edit in load_dataset("smoke", limit=3, form="akew-counterfact").edits} == {
        edit.id for edit in akew.edits[:3]
    }
