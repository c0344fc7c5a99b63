"""A method of one's own: one class and one line in METHODS, then everywhere a method is used."""

import pytest
import torch
from conftest import to_explore
from small import EDITS, Snapshot, moved, state
from uke.data.edits import Detail
from uke.errors import Diverged
from uke.explore.bench import Bench, Library, Task
from uke.methods import METHODS, Method, Training, edited, edited_each, load, save, sequence
from uke.models.generate import answer
from uke.models.model import select
from uke.project import Paths
from uke.results import rows
from uke.study.dataset import Dataset
from uke.study.study import Study


class Shifted(Method):
    """Moves one matrix by the length of the answer: a solver that sees what it is given."""

    rate: float = 1e-3

    def weights(self, model):
        return select(model, 1, ["down_proj"])

    def write(self, model, tokenizer, edits, progress=None):
        length = sum(len(edit.answer) for edit in edits)
        if length > 1000:
            raise Diverged("too long", [edit.id for edit in edits])
        for weight in self.weights(model).values():
            weight.data.add_(self.rate * length * weight.data.sign())
        return Training(losses=[1.0], steps=1)


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "Shifted", Shifted(name="Shifted"))


def test_it_is_written_together_alone_and_on_top_and_undone(tiny, tokenizer, tmp_path):
    model, amounts = tiny(), {edit.id: 1e-3 * len(edit.answer) for edit in EDITS}
    weight = model.get_parameter(NAME)
    before, sign = weight.detach().clone(), weight.detach().sign()
    snapshot = Snapshot(model)
    with edited(model, tokenizer, EDITS, "shifted") as m:
        assert moved(model, snapshot.weights) == set(m.edit_record.change_norm) == {NAME}
        torch.testing.assert_close(weight - before, sum(amounts.values()) * sign)
        save(m, tmp_path / "kept")
    snapshot.check()
    loaded = load(tiny(), tmp_path / "kept").get_parameter(NAME)
    torch.testing.assert_close(loaded - before, sum(amounts.values()) * sign)
    with edited_each(model, tokenizer, EDITS, "Shifted") as m:
        assert [record.steps for record in m.edit_records.values()] == [1, 1, 1]
        for lane, edit in enumerate(EDITS):
            shift = m.lanes.weights[NAME][lane] - before
            torch.testing.assert_close(shift, amounts[edit.id] * sign)
        asked = [probe for edit in EDITS for probe in edit.probes]
        found = answer(m, tokenizer, asked, max_new_tokens=6)
    for edit in EDITS:
        with edited(model, tokenizer, [edit], "Shifted") as m:
            for probe in edit.probes:
                (alone,) = answer(m, tokenizer, [probe], max_new_tokens=6)
                assert alone == found[asked.index(probe)]
    with sequence(model, tokenizer, "Shifted") as writer:
        for edit in EDITS:
            writer.write([edit])
        torch.testing.assert_close(weight - before, sum(amounts.values()) * sign)
    snapshot.check()


def test_a_study_writes_its_rows(tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    detail = Detail(question="Where was that?", answer="London")
    edits = tuple(edit.model_copy(update={"details": (detail,)}) for edit in EDITS)
    data = Dataset(edits, {edit.id: edit.probes for edit in edits}, "toy", Paths("smoke"))
    model = tiny()
    before = state(model)
    study = Study("own", data, (model, tokenizer), False, max_new_tokens=4)
    study.run(METHODS["Shifted"])
    study.run(METHODS["Shifted"], batch_size=3)
    found = study.read()
    assert set(found["method"]) == {"Shifted"} and set(found["batch_size"]) == {1, 3}
    assert found["learning_rate"].isna().all() and (found["change_norm"] > 0).all()
    assert set(rows.primary(found)["kind"]) == {"original", "detail"}
    assert not moved(model, before)


def test_the_explorer_offers_and_writes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(to_explore(tmp_path)))
    bench = Bench("embedded", Library(Paths("quick")))
    before = state(bench.model)
    task = Task(bench.library.edits[0], bench.methods["Shifted"])
    trial = bench.write(task)
    assert moved(bench.model, before) == set(trial.record.change_norm) != set()
    assert trial.record.steps == 1 and len(trial.rows)
    bench.undo()
    assert not moved(bench.model, before)


def test_a_method_without_its_two_members_is_none():
    with pytest.raises(ValueError, match="abstract"):
        Method(name="nothing")
    with pytest.raises(ValueError, match="Extra inputs .*; did you mean .rate"):
        Shifted(name="Shifted", rat=1.0)
    one, other = Shifted(name="one"), Shifted(name="other")
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Shifted(name="one", rate=2.0).fingerprint
