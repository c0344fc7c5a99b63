"""A study: complete rows, resumption, memory, committed rows, and weights as before."""

import dataclasses
import json
import shutil
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import SENTENCES
from small import ANSWERS, toys
from uke.data.edits import KINDS, Edit, Probe
from uke.errors import InputError
from uke.methods import catalog, finetune
from uke.methods.locate_edit import covariance
from uke.models.generate import answer
from uke.models.model import load
from uke.results import rows
from uke.results.compare import floor
from uke.study import dataset as datasets
from uke.study import study as studies
from uke.study.comparison import Comparison, attempt
from uke.study.methods import MethodStudy
from uke.study.score import COMPARED, FACTS, leakages
from uke.study.study import Study

FT_M = catalog.find("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 12})
QUICK = FT_M.model_copy(update={"steps": 2})
LORA = catalog.find("LoRA").model_copy(update={"steps": 2, "learning_rate": 1e-2})
SHORT = {"layers": (1, 2), "steps": 3, "memit_lambda": 1e-2}
MEMIT = catalog.find("memit").model_copy(update=SHORT)
MEASURED = ["train_seconds", "answer_seconds", "peak_mib"]  # of the run, not of the edit


@pytest.fixture
def toy(tiny, tokenizer, tmp_path, monkeypatch):
    """Factory: a study of four short edits on an untrained model, with a home of the test's own."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    model, dataset = tiny("llama"), toys(struct_trip="was born")

    def build(name="toy", **more):
        options = {"similarity": False, "max_new_tokens": 4, **more}
        return Study(name, dataset, (model, tokenizer), **options)

    return build


def batches_of(study) -> list[list[str]]:
    """The batches that the study writes from now on, one list a call of `write`."""
    write, written = study.write, []

    def record(method, group):
        written.append([edit.id for unit in group for edit in unit.edits])
        return write(method, group)

    study.write = record
    return written


def curves(frame: pd.DataFrame) -> list[dict]:
    return [json.loads(text) for text in frame["curve"].dropna()]


def test_every_probe_of_the_world_has_a_row_before_and_after_and_the_edit_is_undone(
    tmp_path, results, monkeypatch
):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    shutil.copytree(results, tmp_path / "results")
    edits = datasets.load("smoke", limit=2)
    told = {"kind": "neutral", "chat": False, "question": "The owl", "reference": "hunts at night."}
    probes = {id: (*own, Probe(edit=id, **told)) for id, own in edits.probes.items()}
    edits = dataclasses.replace(edits, probes=probes)
    study = Study("trial", edits, load("embedded", device="cpu"), False, max_new_tokens=130)
    study.run(FT_M)
    after, before = study.read(), study.before
    wanted = {(probe.edit, probe.kind, probe.number) for probe in edits.every_probe}
    assert {kind for _, kind, _ in wanted} == set(KINDS)
    for frame in (before, after):
        assert set(frame.set_index(["edit", "kind", "number"]).index) == wanted
        assert len(frame) == len(wanted)
    assert after["before"].notna().all() and set(after["split"]) == {"test"}
    right = before["kind"].isin(FACTS) & (before["mention"] == 1)
    wanted = {"divergence": COMPARED, "leakage": COMPARED, "fact_kept": before["kind"][right]}
    wanted |= {"likelihood_before": {"neutral"}}
    for name, kinds in wanted.items():
        assert set(after["kind"][after[name].notna()]) == set(kinds) != set(), name
    means = [
        rows.primary(frame, phase).query("kind == 'original'")["score"].mean()
        for frame, phase in ((before, "before"), (after, "after"))
    ]
    assert means[1] > means[0] + 0.2 and study.unchanged() and not study.smoke_run()
    chance = floor(before, ["original", "paraphrase", "rel_doc", "rand_doc"])
    assert len(chance) == 8 and after["floor"].isna().all()
    assert (before["floor"].notna() == (before["kind"] != "neutral")).all()
    assert chance["score"].between(0, 0.7).all()
    for seed in (None, 2):
        study.dataset = dataclasses.replace(edits, world_seed=seed)
        assert study.smoke_run()
    study.subject.name = "smollm2"  # which knows the real world
    assert not study.smoke_run()


def test_the_table_of_kinds_limits_an_answer(toy):
    study = toy(max_new_tokens=None)
    probe = study.dataset.probes["Ada"][0]
    long = probe.model_copy(update={"reference": probe.reference * 20})
    tokens = len(study.tokenizer(long.reference, add_special_tokens=False)["input_ids"])
    assert study.token_limit(long) == tokens * 3 // 2 > 32
    assert study.token_limit(long.model_copy(update={"kind": "detail"})) == 32
    assert study.token_limit(probe) == 32 and toy().token_limit(long) == 4


@pytest.mark.parametrize("change", [None, "recipe", "tokens", "chat", "template", "kinds"])
def test_rows_of_the_same_work_are_not_made_again_and_others_are(toy, change, monkeypatch):
    first = toy()
    first.run(QUICK, factor="one", level="with")
    changes = {"tokens": {"max_new_tokens": 3}, "chat": {"chat": False}}
    if change == "template":
        monkeypatch.setattr(first.tokenizer, "chat_template", first.tokenizer.chat_template + " ")
    other = toy(**changes.get(change, {}))
    if change == "kinds":
        other.dataset = other.dataset.only(["struct_trip"])
    written = batches_of(other)
    other.run(FT_M if change == "recipe" else QUICK, factor="one", level="with")
    assert written == ([list(ANSWERS)] if change else [])
    if change == "kinds":
        assert set(other.read()["kind"]) == set(other.before["kind"]) == {"struct_trip"}


def test_rows_of_locate_methods_are_those_of_their_covariance_texts(toy, tokenizer):
    runs = []
    for corpus in (SENTENCES * 3, SENTENCES[:2] * 6):
        for method in (MEMIT, QUICK):
            study = toy()
            covariance.measure(study.model, tokenizer, corpus, (1, 2))
            written = batches_of(study)
            study.run(method, limit=1)
            runs.append((study.units[0], len(written)))
    assert runs[0][0] != runs[2][0] and [count for _, count in runs] == [1, 1, 1, 0]
    assert runs[1] == (runs[3][0], 1)  # a recipe reads no corpus


def test_batches_are_written_together_and_a_rest_is_left_out(toy):
    study = toy()
    written = batches_of(study)
    study.run(QUICK, batch_size=2, limit=3)
    study.run(QUICK, batch_size=2)
    study.run(QUICK, batch_size=4, limit=3)
    study.run(QUICK, limit=2)
    assert written == [["Ada", "Grace"], ["Alan", "Mary"], ["Ada", "Grace"]]
    assert study.read().query("batch_size == 2")["leakage"].notna().all()
    units = study.read().groupby(["batch_size", "batch"])["edit"].agg(set).to_dict()
    pairs = {(2, 0): {"Ada", "Grace"}, (2, 1): {"Alan", "Mary"}}
    assert units == {(1, 0): {"Ada"}, (1, 1): {"Grace"}} | pairs


def test_parts_of_a_run_are_its_batches_each_once(toy):
    comparison, whole = Comparison(toy("parts")), toy("whole")
    comparison.runs = [(QUICK, {"batch_size": 2, "limit": 2}), (QUICK, {})]
    assert comparison.jobs() == {("FT-M", 2): [2], ("FT-M", 1): [4]}
    for number in range(3):
        comparison.share("FT-M", 1, (number, 3))
    whole.run(QUICK)
    assert comparison.study.read()["answer"].tolist() == whole.read()["answer"].tolist()


def test_the_record_of_a_batch_stands_in_its_rows(toy, tokenizer):
    study = toy()
    covariance.measure(study.model, tokenizer, SENTENCES * 3, (1, 2))
    study.run(catalog.find("anyedit_memit").model_copy(update=SHORT | {"window": 200}), 2, 2)
    found = study.read()
    [curve] = curves(found)
    assert len(curve["losses"]) == 3 and len(curve["norms"]) == 2
    assert found["change_norm"].gt(0).all() and found["seed"].eq(2024).all()
    assert found[["train_seconds", "answer_seconds"]].gt(0).all(axis=None)


def test_rows_written_side_by_side_are_those_written_one_by_one(toy):
    frames = []
    for lanes, groups in ((1, [1, 1, 1, 1]), (3, [3, 1])):
        study = toy(lanes=lanes)
        written = batches_of(study)
        study.run(QUICK)
        assert [len(group) for group in written] == groups
        frames.append(study.read())
        shutil.rmtree(study.paths.rows("toy"))
    alone, together = frames
    rounded = ["change_norm", "log_probability", "divergence"]
    lost = [*MEASURED, *rounded, "curve", "steps"]
    pd.testing.assert_frame_equal(together.drop(columns=lost), alone.drop(columns=lost))
    pd.testing.assert_frame_equal(together[rounded], alone[rounded], rtol=1e-2)
    for one, other in zip(curves(together), curves(alone), strict=True):
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-2)


def test_what_leaks_is_another_text_than_what_is_asked_for():
    one, other = "Bo sold old maps.", "Cy sold new hats."
    edits = [Edit(id=text[0], question="Who?", answer=text) for text in (one, other)]
    columns = {"kind": ["rel_doc", "original", "detail"], "before": ["", other, ""]}
    frame = pd.DataFrame(columns | {"edit": "B", "question": "", "answer": f"{one} {other}"})
    # Of six runs two are of the edit's text and two of the other's, which one answer had before.
    assert leakages(frame, {"B": edits}) == pytest.approx([4 / 6, 0, 2 / 6])
    assert leakages(frame, {"B": edits[:1]})[0] == 2 / 6


def test_a_raw_prompt_is_used_for_every_probe_before_and_after(toy):
    raw, plain = toy("raw", chat=False), toy()
    raw.run(QUICK, limit=1)
    plain.run(QUICK, limit=1)
    probes = raw.dataset.probes["Ada"]
    texts = answer(raw.model, raw.tokenizer, probes, max_new_tokens=raw.token_limit, chat=False)
    own = raw.before[raw.before["edit"] == "Ada"].set_index(["kind", "number"])["answer"]
    assert [own[probe.kind, probe.number] for probe in probes] == texts
    assert raw.before["answer"].tolist() != plain.before["answer"].tolist()
    assert raw.read()["log_probability"].tolist() != plain.read()["log_probability"].tolist()


def test_the_floor_never_compares_a_question_with_itself():
    frame = pd.DataFrame({"edit": ["a", "b", "c"], "kind": "rel_doc", "number": 0, "reference": ""})
    frame = frame.assign(question=["Q1", "Q1", "Q2"], answer=["one two", "one two", "three four"])
    assert floor(frame, ["rel_doc"])["score"].tolist() == [0, 0, 0]
    assert floor(frame[:2], ["rel_doc"]).empty  # one question only: nothing to compare with


def test_a_trial_that_fails_says_why_and_leaves_nothing_to_read(toy):
    study = toy()
    assert attempt(study.run, QUICK, limit=1) is None
    units, wild = list(study.units), QUICK.model_copy(update={"learning_rate": 1e38, "steps": 3})
    message = attempt(study.run, wild, limit=2)
    assert all(f"'{name}' is not finite" in message for name in ("Ada", "Grace"))
    assert "no covariance of this model" in attempt(study.run, MEMIT, limit=1)
    assert study.units == units and study.unchanged()
    assert set(study.read()["learning_rate"]) == {QUICK.learning_rate}
    with pytest.raises(InputError, match="nothing was run"):
        toy("empty").read()


def test_an_edit_that_diverges_has_no_rows_and_the_others_have(toy, monkeypatch):
    study, plain = toy(lanes=2), finetune.LOSSES["target_tokens"]
    bad = max(ANSWERS, key=lambda edit: len(ANSWERS[edit]))

    def loss(model, batch):
        factors = [float("nan") if edit == bad else 1.0 for edit in model.lanes.ids]
        return plain(model, batch) * torch.tensor(factors)

    monkeypatch.setitem(finetune.LOSSES, "target_tokens", loss)
    with pytest.raises(FloatingPointError, match=f"the loss of edit '{bad}' is not finite"):
        study.run(QUICK)
    monkeypatch.setitem(finetune.LOSSES, "target_tokens", plain)
    again = toy(lanes=2)
    written = batches_of(again)
    again.run(QUICK)
    assert written == [[bad]] and set(again.read()["edit"]) == set(ANSWERS)


def test_where_memory_runs_out_fewer_edits_are_written_at_once(toy, caplog):
    study, write, tried = toy("short"), Study.write, []

    def full(method, group):
        tried.append(len(group))
        if len(group) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return write(study, method, group)

    study.write = full
    study.run(QUICK)
    assert tried == [4, 2, 1, 1, 1, 1]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "short: FT-M: out of memory with 4 edits side by side; going on with 2"
    plain = toy("plain")
    plain.run(QUICK)
    assert study.read()["answer"].tolist() == plain.read()["answer"].tolist()
    study.write = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(InputError, match="no memory for an edit"):  # nothing is left to try
        study.run(FT_M, batch_size=2)


def test_only_as_many_edits_as_fit_are_written_at_once(toy, monkeypatch):
    study = toy(lanes=16)
    written, free = batches_of(study), iter([2.0, 6.0])
    mib = studies.lane_mib(study.model, QUICK)
    monkeypatch.setattr(studies, "free_mib", lambda device: next(free) * mib)
    study.run(QUICK)
    assert [len(group) for group in written] == [1, 3]


def test_committed_rows_are_taken_without_a_model_whatever_code_wrote_them(toy, monkeypatch):
    study = toy()
    for method, size in ((QUICK, 1), (QUICK, 2), (LORA, 1)):
        study.run(method, size, factor="layers", level="all")
    after, before = study.read(), study.before
    path = study.export(after)
    shutil.rmtree(study.paths.results)
    monkeypatch.setattr(rows, "code_fingerprint", lambda: "newer code")
    monkeypatch.setenv("UKE_ROWS", "committed")
    study = Study("toy", study.dataset.first(2), "/no/model", False)
    study.run(QUICK.model_copy(update={"steps": 99}), factor="layers", level="all")
    study.run(LORA, limit=1, factor="layers", level="all")
    found = study.read()
    edits = found.groupby("method")["edit"].agg(set).to_dict()
    assert edits == {"FT-M": {"Ada", "Grace"}, "LoRA": {"Ada"}}
    wanted = after[(after["batch_size"] == 1) & after["edit"].isin(["Ada", "Grace"])]
    wanted = wanted[(wanted["method"] == "FT-M") | (wanted["edit"] == "Ada")]
    wanted = wanted.reset_index(drop=True)
    pd.testing.assert_frame_equal(found[list(wanted)], wanted, check_dtype=False)
    assert len(study.before) == sum(before["edit"].isin(["Ada", "Grace"]))
    assert study.environment["model"] == after["model"][0] and study.unchanged()
    content = path.read_bytes()
    assert study.export(found) == path and path.read_bytes() == content


def test_committed_rows_of_a_benchmark_are_drawn_without_its_file(monkeypatch):
    monkeypatch.setenv("UKE_ROWS", "committed")
    study = Study("07_recipe", datasets.load("smollm2", "unkebench", limit=2), "", False)
    study.run(catalog.find("FT-M"))
    assert set(study.read()["edit"]) == set(study.before["edit"]) == {"0", "1"}
    study = Study("08_batch_size", datasets.load("smollm2", "unkebench", limit=48), "", False)
    known = study.committed.after.groupby(["batch_size", "method"])["edit"].nunique()
    plan = MethodStudy(study, ["FT-UKE", "FT-M"], [4, 16], limit=12, batches=3).plan
    assert plan == {at: n for at, n in known.items() if at[1] in ("FT-UKE", "FT-M")}
    with pytest.raises(InputError, match="akew-counterfact/rows: no rows of test edits"):
        datasets.load("smollm2", "akew-counterfact")


def test_a_missing_committed_unit_is_named(toy, monkeypatch):
    study = toy()
    study.run(QUICK, limit=1)
    study.export(study.read())
    monkeypatch.setenv("UKE_ROWS", "committed")
    again = toy()
    for method, options, missing in (
        (MEMIT, {}, "method MEMIT, batch_size 1, split test, batch 0"),
        (QUICK, {"batch_size": 2}, "method FT-M, batch_size 2, split test, batch 0"),
        (QUICK, {}, "method FT-M, batch_size 1, split test, batch 1"),
    ):
        message = f"toy.parquet: no rows of {missing} on these edits; make them: python -m uke run"
        for run in (again.run, partial(attempt, again.run)):  # a missing unit is no failed trial
            with pytest.raises(InputError, match=message):
                run(method, **options)
    assert not again.taken
    monkeypatch.setenv("UKE_ROWS", "comitted")
    with pytest.raises(InputError, match="UKE_ROWS: unknown 'comitted'; did you mean 'committed'"):
        toy().run(QUICK)


def test_parts_of_a_dataset_are_datasets(toy, tokenizer):
    whole = toy().dataset
    some, other = whole.only(["struct_trip", "detail"]), whole.only(["detail"])
    assert len(some.every_probe) == 8 and len(whole.every_probe) == 12
    assert {probe.kind for probe in some.every_probe} == {"detail", "struct_trip"}
    assert len({whole.fingerprint, some.fingerprint, other.fingerprint}) == 3
    assert some.edits == whole.edits and some == whole.only(["detail", "struct_trip"])
    cut = whole.cut(3, tokenizer).every_probe
    assert [tokenizer.tokenize(probe.reference)[3:] for probe in cut] == [[]] * 4
    first = whole.first(2)
    assert {probe.edit for probe in first.every_probe} == {"Ada", "Grace"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "split: unknown split 'tset'; did you mean 'test'"),
        ({"limit": 0}, "limit is 0; expected at least one edit"),
        ({"data": "unkebnch"}, "unknown dataset 'unkebnch'; did you mean 'unkebench'"),
    ],
)
def test_an_unknown_dataset_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        datasets.load("smoke", **options)


def test_edits_of_the_other_benchmarks_form_are_the_same_texts(tmp_path, results, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    shutil.copytree(results, tmp_path / "results")
    plain = datasets.load("smoke", limit=5)
    akew = datasets.load("smoke", limit=5, form="akew-counterfact")
    assert akew.fingerprint != plain.fingerprint and akew.world_seed == plain.world_seed == 1
    for edit, other in zip(akew.edits, plain.edits, strict=True):
        assert edit.answer == other.answer and edit.question != other.question
        kinds = {probe.kind for probe in akew.probes[edit.id]}
        assert {"rel_doc", "rand_doc", "struct_trip", "near_triple"} <= kinds
        assert "general" not in kinds
        assert {probe.edit for probe in akew.probes[edit.id]} == {edit.id}
    assert datasets.load("smoke", limit=5) == plain  # one locality set does not replace the other
    assert datasets.load("smoke", limit=3).fingerprint == plain.fingerprint
