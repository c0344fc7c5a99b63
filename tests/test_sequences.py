"""Edits that pile up: the right ones are queried with the weights of their count, and all is
undone."""

import pytest
from conftest import SENTENCES
from small import toys
from uke.errors import InputError
from uke.methods import catalog
from uke.methods.edited import Writer, sequence
from uke.methods.locate_edit import covariance
from uke.study import sequential
from uke.study.sequential import first_and_last
from uke.study.study import Study

STEPS = {"steps": 4, "learning_rate": 2e-2, "stop_loss": 0.0}
FT_M, LORA = (catalog.find(name).model_copy(update=STEPS) for name in ("FT-M", "LoRA"))
SHORT = {"layers": (1, 2), "steps": 3, "memit_lambda": 1e-2}
MEMIT = catalog.find("MEMIT").model_copy(update=SHORT)
AROUND = {"struct_trip": "was born", "general": "can add", "multi_hop": "lives near the town of"}
TOYS = toys(**AROUND)
EDITS = TOYS.edits


@pytest.fixture
def toy(tiny, tokenizer, tmp_path, monkeypatch):
    """Factory: a study of four short edits on an untrained model with measured covariance."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    model = tiny()
    covariance.measure(model, tokenizer, list(SENTENCES), layers=(1, 2))
    return lambda name="toy": Study(name, TOYS, (model, tokenizer), False, max_new_tokens=4)


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, "A"), (2, "AB"), (3, "ABC"), (4, "ABCD"), (6, "ABEF")]
)
def test_the_first_and_the_last_are_queried_each_once(count, wanted):
    assert "".join(first_and_last("ABCDEF"[:count], 2)) == wanted


@pytest.mark.parametrize("method", [FT_M, LORA, MEMIT], ids=lambda method: method.name)
@pytest.mark.parametrize("together", [False, True])
def test_rows_of_a_count_are_those_of_the_weights_at_that_count(toy, method, together):
    study = toy()
    sequential.run(study, method, [3, 1], 1, together)
    found = study.read()
    edits = found.groupby("batch")["edit"].agg(set).to_dict()
    assert edits == {1: {"Ada"}, 3: {"Ada", "Alan"}}
    labels = found.groupby("batch")[["level", "batch_size", "factor"]].first()
    assert labels.values.tolist() == [["after 1", 1, "count"], ["after 3", 3, "count"]]
    assert set(found["kind"]) == {"original", "detail", "struct_trip", "general"}
    assert found["before"].notna().all() and study.unchanged()
    likely = found[found["kind"] == "original"].set_index(["batch", "edit"])["log_probability"]
    for count in (1, 3):
        with sequence(study.model, study.tokenizer, method) as writer:
            batches = [EDITS[:1], EDITS[1:count]] if together else [[one] for one in EDITS[:count]]
            for batch in filter(None, batches):
                writer.write(batch)
            for edit in first_and_last(EDITS[:count], 1):
                wanted = study.answer_and_score(study.model, edit.probes[:1])["log_probability"]
                assert likely[count, edit.id] == pytest.approx(wanted[0], abs=1e-5)


def test_a_sequence_with_rows_is_not_written_again_and_another_one_is(toy, monkeypatch):
    quick = FT_M.model_copy(update={"steps": 1})
    sequential.run(toy(), quick, [1, 2], 1)
    written, made = [], sequential._checkpoints
    monkeypatch.setattr(sequential, "_checkpoints", lambda *own: written.append(1) or made(*own))
    again = toy()
    sequential.run(again, quick, [2, 1], 1)
    assert written == [] and set(again.read()["batch"]) == {1, 2}
    for changed in ({"counts": [1, 3]}, {"queried": 2}, {"together": True}, {"method": FT_M}):
        written.clear()
        sequential.run(toy(), **{"method": quick, "counts": [1, 2], "queried": 1, **changed})
        assert written == [1], changed


def test_a_sequence_that_breaks_down_raises_and_leaves_no_rows(toy, monkeypatch):
    write = Writer.write

    def break_at_the_third(writer, edits):
        if edits[0].id == "Alan":
            raise FloatingPointError("the loss of edit 'Alan' is not finite")
        return write(writer, edits)

    monkeypatch.setattr(Writer, "write", break_at_the_third)
    study = toy()
    with pytest.raises(FloatingPointError, match="edit 'Alan' is not finite"):
        sequential.run(study, FT_M, [1, 2, 4], 1)
    assert not study.units and study.unchanged()


def test_a_sequence_is_drawn_again_from_committed_rows(toy, monkeypatch):
    study = toy()
    sequential.run(study, FT_M, [1, 2], 1)
    found = study.read()
    study.export(found)
    monkeypatch.setenv("UKE_ROWS", "committed")
    drawn = toy()
    sequential.run(drawn, FT_M, [1, 2], 1)
    assert len(drawn.read()) == len(found)
    missing = "no rows of method LoRA, factor count, split test, level after 1"
    with pytest.raises(InputError, match=missing):
        sequential.run(drawn, LORA, [1, 2], 1)


@pytest.mark.parametrize(
    "given", [{"counts": [0, 2]}, {"counts": [6]}, {"counts": []}, {"queried": 0}]
)
def test_counts_beyond_the_edits_are_refused(toy, given):
    with pytest.raises(InputError, match="counts .* expected numbers from 1 to 4"):
        sequential.run(toy(), FT_M, **{"counts": [1], "queried": 1, **given})
