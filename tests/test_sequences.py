"""Edits that pile up: each starts from the weights the last one left, all is undone, the right ones are asked."""

import shutil

import pytest
import torch
from conftest import SENTENCES
from uke.data.edits import Detail, Edit, Probe
from uke.errors import InputError
from uke.methods import catalog as methods
from uke.methods.locate_edit import covariance
from uke.models import model as models
from uke.models.prompts import example
from uke.results import rows
from uke.study import sequential as sequences
from uke.study import study as studies
from uke.study.dataset import Dataset
from uke.study.dataset import load as load_dataset
from uke.study.sequential import first_and_last, sequence

STEPS = {"steps": 4, "learning_rate": 2e-2, "stop_loss": 0.0}
SHORT = {"layers": (1, 2), "steps": 3, "memit_lambda": 1e-2}
METHODS = {
    name: methods.find(name).model_copy(update=STEPS) for name in ("FT-M", "LoRA", "AdaLoRA")
}
METHODS |= {
    "MEMIT": methods.find("MEMIT").model_copy(update=SHORT),
    "UnKE": methods.find("UnKE").model_copy(
        update={"layers": (1,), "steps": 3, "unke_steps": 4, "preservation": 2, "unke_rate": 1e-2}
    ),
}
ANSWERS = {
    "Ada": "in Philadelphia",
    "Grace": "in Maida Vale",
    "Alan": "in London",
    "Mary": "in Cambridge",
    "Emmy": "in a compiler",
}
EDITS = tuple(
    Edit(
        id=name,
        question=f"Who is {name}?",
        answer=f"{name} wrote {where}.",
        details=(Detail(question=f"Where was {name}?", answer=where),),
    )
    for name, where in ANSWERS.items()
)
AROUND = {"struct_trip": "was born", "general": "can add", "multi_hop": "lives near the town of"}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))


@pytest.fixture
def loaded(tiny, tokenizer):
    """A model with second moments, and its tokenizer."""
    model = tiny()
    covariance.measure(model, tokenizer, list(SENTENCES), layers=(1, 2))
    return model, tokenizer


@pytest.fixture
def toy(loaded):
    """Factory: a study of five short edits on an untrained model, always the same."""
    probes = {
        edit.id: (
            *edit.probes,
            *(
                Probe(
                    edit=edit.id,
                    kind=kind,
                    question=f"{edit.id} {said}",
                    reference="there",
                    chat=False,
                )
                for kind, said in AROUND.items()
            ),
        )
        for edit in EDITS
    }
    dataset = Dataset(EDITS, probes, "toy", rows.Paths("smoke"))
    return lambda: studies.Study("toy", dataset, loaded, False, max_new_tokens=4)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model, before) -> set[str]:
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def logits(model, tokenizer, edit=EDITS[0]) -> torch.Tensor:
    ids = example(tokenizer, edit.question, edit.answer, True, True).ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]  # (T, V)


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, "A"), (2, "AB"), (3, "ABC"), (4, "ABCD"), (6, "ABEF")]
)
def test_the_first_and_the_last_are_asked_each_once(count, wanted):
    assert "".join(first_and_last("ABCDEF"[:count], 2)) == wanted


@pytest.mark.parametrize("together", [False, True])
def test_after_each_count_the_right_edits_are_asked(toy, together):
    study = toy()
    before = state(study.model)
    sequences.run(study, METHODS["FT-M"], [4, 1], 1, together)
    found = study.read()
    assert found.groupby("batch")["edit"].agg(set).to_dict() == {1: {"Ada"}, 4: {"Ada", "Mary"}}
    assert found.groupby("batch")[["level", "batch_size", "factor"]].agg(
        "first"
    ).values.tolist() == [["after 1", 1, "count"], ["after 4", 4, "count"]]
    assert (
        set(found["kind"]) == {"original", "detail", "struct_trip", "general"}
        and found["before"].notna().all()
    )
    assert found.groupby("batch")["steps"].first().tolist() == [4, 4 if together else 12]
    averages = rows.average(rows.primary(found), ["original", "detail", "struct_trip"])
    assert len(averages) == 3 and not moved(study.model, before)


def test_the_answers_of_a_count_are_those_of_the_weights_at_that_count(toy):
    """Rows hold how likely a text is, which moves with any weight."""
    study = toy()
    sequences.run(study, METHODS["FT-M"], [1, 3], 2)
    sequences.run(
        study, METHODS["FT-M"].model_copy(update={"name": "at once"}), [3], 2, together=True
    )
    found = (
        study.read()
        .query("kind == 'original'")
        .set_index(["method", "batch", "edit"])["log_probability"]
    )
    for count in (1, 3):
        with sequence(study.model, study.tokenizer, METHODS["FT-M"]) as writer:
            for edit in EDITS[:count]:
                writer.write([edit])
            for edit in first_and_last(EDITS[:count], 2):
                wanted = study.ask(study.model, edit.probes[:1])["log_probability"][0]
                assert found["FT-M", count, edit.id] == pytest.approx(wanted, abs=1e-5)
    assert abs(found["at once", 3, "Ada"] - found["FT-M", 3, "Ada"]) > 1e-3


def test_a_sequence_with_rows_is_not_written_again_and_another_one_is(toy, monkeypatch):
    sequences.run(toy(), METHODS["LoRA"], [1, 2], 1)
    asked = []
    checkpoint = sequences._checkpoint
    monkeypatch.setattr(
        sequences, "_checkpoint", lambda *given: asked.append(1) or checkpoint(*given)
    )
    again = toy()
    sequences.run(again, METHODS["LoRA"], [2, 1], 1)
    assert asked == [] and set(again.read()["batch"]) == {1, 2}
    for changed in (
        {"counts": [1, 3]},
        {"asked": 2},
        {"together": True},
        {"method": METHODS["LoRA"].model_copy(update={"steps": 3})},
    ):
        asked.clear()
        sequences.run(toy(), **{"method": METHODS["LoRA"], "counts": [1, 2], "asked": 1, **changed})
        assert asked == [1, 1], changed


def test_a_method_that_breaks_down_keeps_the_counts_it_reached_and_says_why(toy, monkeypatch):
    write = sequences.Writer.write

    def break_at_the_third(writer, edits):
        if edits[0].id == "Alan":
            raise FloatingPointError("the loss of edit 'Alan' is not finite")
        return write(writer, edits)

    monkeypatch.setattr(sequences.Writer, "write", break_at_the_third)
    study = toy()
    before = state(study.model)
    sequences.run(study, METHODS["FT-M"], [1, 2, 4], 1)
    found = study.read()
    assert set(found["batch"]) == {1, 2} and not moved(study.model, before)
    assert (
        found.dropna(subset="notes")["batch"].unique().tolist() == [2]
        and "edit 'Alan' is not finite" in found["notes"].dropna().iloc[0]
    )
    with pytest.raises(FloatingPointError):
        sequences.run(toy(), METHODS["FT-M"], [3, 4], 1)


@pytest.mark.parametrize("together", [False, True])
def test_a_sequence_too_large_for_memory_ends_the_study_or_scores_otherwise(
    toy, monkeypatch, caplog, together
):
    plain, study, write = toy(), toy(), sequences.Writer.write
    sequences.run(plain, METHODS["FT-M"], [1, 3], 1, together)

    def full(writer, edits):
        if not study.thrift.taken and edits[-1].id == "Alan":
            raise torch.OutOfMemoryError("out of memory")
        return write(writer, edits)

    monkeypatch.setattr(sequences.Writer, "write", full)
    study.name, before = "short", state(study.model)
    sequences.run(study, METHODS["FT-M"], [1, 3], 1, together)
    mine, others = study.read(), plain.read()
    assert (
        mine["answer"].tolist() == others["answer"].tolist()
        and mine["batch"].tolist() == others["batch"].tolist()
    )
    assert (
        mine["notes"].dropna().str.contains("computed again").all()
        and len(mine["notes"].dropna())
        and others["notes"].isna().all()
    )
    assert (
        len(caplog.records) == 1
        and "computed again" in caplog.records[0].getMessage()
        and not moved(study.model, before)
    )


@pytest.mark.parametrize(
    "given", [{"counts": [0, 2]}, {"counts": [6]}, {"counts": []}, {"asked": 0}]
)
def test_counts_beyond_the_edits_are_refused(toy, given):
    with pytest.raises(InputError, match="counts"):
        sequences.run(toy(), METHODS["FT-M"], **{"counts": [1], "asked": 1, **given})


def test_views_follow_the_first_and_the_last_edits(toy):
    study = toy()
    sequences.run(study, METHODS["FT-M"], [1, 4], 1)
    headline = rows.primary(study.read())
    found = (
        sequences.views(headline, EDITS, 1)
        .set_index(["count", "view", "edit"])["score"]
        .sort_index()
    )
    assert {place[:2]: place[2] for place in found.index if "edits" in place[1]} == {
        (1, "first edits"): "Ada",
        (1, "last edits"): "Ada",
        (4, "first edits"): "Ada",
        (4, "last edits"): "Mary",
    }
    kept_triple = headline[
        (headline["kind"] == "struct_trip") & (headline["batch"] == 4)
    ].set_index("edit")["score"]
    assert found.loc[4, "locality"].to_dict() == kept_triple.to_dict()


# --- the embedded model ----------------------------------------------------------------------------------------------


def test_later_edits_leave_an_early_text_less_likely(tmp_path, results):
    shutil.copytree(results, tmp_path / "results")
    dataset = load_dataset("smoke", limit=3)
    study = studies.Study(
        "fading", dataset, models.load("embedded", device="cpu"), max_new_tokens=130
    )
    sequences.run(study, methods.find("FT-M").model_copy(update={"learning_rate": 5e-3}), [1, 3], 1)
    found = study.read()
    shown = sequences.views(rows.primary(found), dataset.edits, 1).set_index(["view", "count"])[
        "score"
    ]
    assert shown["last edits", 1].item() > 0.9 and shown["last edits", 3].item() > 0.9
    likely = found.query("kind == 'original'").set_index(["batch", "edit"])["log_probability"]
    assert likely[3, dataset.edits[0].id] < likely[1, dataset.edits[0].id]
