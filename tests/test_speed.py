"""The benchmark compares ways that do the same, or says that they do not; its file says what the notebook shows."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from uke.data.edits import Detail, Edit, Probe
from uke.errors import InputError
from uke.methods import catalog as methods
from uke.models import generate as answering
from uke.models import model as models
from uke.models import prompts
from uke.report import diagrams
from uke.report import section as report
from uke.results import rows
from uke.study import speed, ways
from uke.study import study as studies
from uke.study.dataset import Dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import gains
import shapes

FT_M = methods.find("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 6, "layers": "all"})
LORA = methods.find("LoRA").model_copy(update={"steps": 4})


@pytest.fixture(scope="module")
def home(tmp_path_factory, results):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(results, home / "results")
    (home / "params").symlink_to(ROOT / "params")
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(home))
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def measured(home):
    """A smoke run of the benchmark, in the place of the committed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", str(home))
        assert (
            bench.main(
                ["--size", "smoke", "--rows", "cpu", "--into", str(home.joinpath(*speed.RESULTS))]
            )
            == 0
        )
    return speed.read(home)


@pytest.fixture
def toy(tiny, tokenizer):
    """A study of two short edits on an untrained model."""
    edits = tuple(
        Edit(
            id=name,
            question=f"Who is {name}?",
            answer=f"{name} wrote in {where}.",
            details=(Detail(question=f"Where was {name}?", answer=where),),
        )
        for name, where in (("Ada", "London in 1815"), ("Alan", "Maida Vale"))
    )
    around = {
        edit.id: Probe(
            edit=edit.id,
            kind="struct_trip",
            question="Grace Hopper wrote the",
            reference="compiler",
            chat=False,
        )
        for edit in edits
    }
    dataset = Dataset(
        edits,
        {edit.id: (*edit.probes, around[edit.id]) for edit in edits},
        "toy",
        rows.Paths("smoke"),
    )
    return studies.Study("toy", dataset, (tiny("llama"), tokenizer), False, max_new_tokens=9)


def test_a_run_measures_every_method_in_every_way_with_the_same_answers(measured):
    counts = measured.timings.groupby(["method", "way"])["repeat"].nunique()
    assert (
        set(counts.index) == {(method, way) for method in ("FT-UKE", "LoRA") for way in speed.WAYS}
        and counts["FT-UKE"].eq(2).all()
    )
    assert (
        measured.same["share"].ge(speed.ALIKE).all()
        and (measured.same["average"] - measured.same["average_lanes"]).abs().le(speed.WITHIN).all()
    )
    assert (measured.timings[["train_seconds", "answer_seconds", "tokens"]] > 0).all(axis=None)
    assert set(measured.gains["optimisation"]) >= {
        "lanes in training",
        "lanes in answering",
        "dropping finished rows",
        "dropping ended lanes",
        "training edits of like length together",
        "training 1,024 tokens at a time, in lanes",
        "training 1,024 tokens at a time, in a batch",
        "frozen blocks read once",
        "length sorting",
    }
    assert (
        measured.about["command"] == "make bench SIZE=smoke ROWS=cpu"
        and measured.about["machine"]["threads"] == torch.get_num_threads()
    )


def test_a_way_that_gives_other_answers_ends_the_run_and_stores_nothing(
    monkeypatch, tmp_path, capsys
):
    def unwritten(study, edits, method, watch):
        watch.lap("train")
        for edit in edits:
            found = answering.answer(
                study.model,
                study.tokenizer,
                study.dataset.probes[edit.id],
                max_new_tokens=study.token_limit,
            )
            watch.lap("answer")
            yield found

    monkeypatch.setitem(ways.WAYS, "loop", unwritten)
    assert bench.main(["--size", "smoke", "--rows", "cpu", "--into", str(tmp_path / "out")]) == 2
    assert "way loop of FT-UKE:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_equal_scores_by_other_answers_are_not_enough():
    found = {"answers": 40, "share": 0.9, "average": 0.5, "average_lanes": 0.5}
    with pytest.raises(InputError, match="way single: 0.900 of 40 answers"):
        ways.check_alike("single", found)
    with pytest.raises(InputError, match="average is 0.500 beside 0.520"):
        ways.check_alike("single", found | {"share": 1.0, "average_lanes": 0.52})
    ways.check_alike("single", found | {"share": 0.96})


@pytest.mark.parametrize("recipe", [FT_M, LORA], ids=["weights", "adapter"])
def test_every_way_answers_alike_and_leaves_the_model_as_it_was(toy, recipe):
    before = models.fingerprint(toy.model)
    unedited = answering.answer(
        toy.model, toy.tokenizer, toy.dataset.every_probe, max_new_tokens=toy.token_limit
    )
    found = {way: ways.timed(way, toy, toy.dataset.edits, recipe).answers for way in ways.WAYS}
    assert (
        found["loop"] == found["single"] == found["lanes"]
        and list(found["loop"]) == toy.dataset.every_probe
    )
    assert list(found["loop"].values()) != unedited
    assert models.fingerprint(toy.model) == before and all(
        parameter.requires_grad for parameter in toy.model.parameters()
    )


def test_the_loop_restores_a_model_whose_answering_failed(toy):
    before = models.fingerprint(toy.model)
    with (
        pytest.raises(ZeroDivisionError),
        ways.rewritten(toy.model, toy.tokenizer, toy.dataset.edits[:1], FT_M),
    ):
        assert models.fingerprint(toy.model) != before
        raise ZeroDivisionError
    assert models.fingerprint(toy.model) == before


def test_an_edit_that_diverges_in_lanes_is_named_and_not_timed(toy):
    """The token that stands in one edit alone has no number for a state."""
    ada, alan = (
        set(toy.tokenizer(edit.question + edit.answer)["input_ids"]) for edit in toy.dataset.edits
    )
    toy.model.get_input_embeddings().weight.data[min(alan - ada)] = float("nan")
    with pytest.raises(FloatingPointError, match="edit 'Alan'"):
        ways.timed("lanes", toy, toy.dataset.edits, FT_M)


def test_too_many_lanes_for_memory_end_a_benchmark_or_lose_an_edit(toy, monkeypatch, caplog):
    """On a GPU that is lent for half an hour, an end of memory must cost lanes and not the run."""
    apart, sizes = ways.edited_each, []

    def full(model, tokenizer, edits, method):
        sizes.append(len(edits))
        if len(edits) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return apart(model, tokenizer, edits, method)

    plain = ways.timed("lanes", toy, toy.dataset.edits, FT_M).answers
    monkeypatch.setattr(ways, "edited_each", full)
    assert ways.timed("lanes", toy, toy.dataset.edits, FT_M).answers == plain and sizes == [2, 1, 1]
    assert len(caplog.records) == 1 and toy.lanes == 1
    monkeypatch.setattr(ways, "edited_each", lambda *_: full(None, None, (1, 2), None))
    with pytest.raises(torch.OutOfMemoryError):
        ways.timed("lanes", toy, toy.dataset.edits, FT_M)


def test_the_loop_refuses_what_it_is_not_written_for(toy):
    for recipe, edits in (
        (methods.find("FT-L"), toy.dataset.edits[:1]),
        (methods.find("AdaLoRA"), toy.dataset.edits[:1]),
        (FT_M, toy.dataset.edits),
    ):
        with (
            pytest.raises(InputError, match="the published loop is written for"),
            ways.rewritten(toy.model, toy.tokenizer, edits, recipe),
        ):
            pass


def test_plain_generate_keeps_each_answers_own_limit(toy):
    """A short limit beside a long one in the same call, the end of a turn, and a prompt without the template."""
    probes = toy.dataset.probes["Ada"]
    limits = {probe: 2 + 5 * place for place, probe in enumerate(probes)}
    study = replace(toy)
    study.token_limit = limits.__getitem__
    own = answering.answer(toy.model, toy.tokenizer, probes, max_new_tokens=study.token_limit)
    assert ways.generated(toy.model, study, probes) == own and len(set(own)) > 1


def test_seconds_of_a_phase_are_its_own(toy, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(ways.time, "perf_counter", lambda: next(clock))
    watch = ways.Watch(torch.device("cpu"))
    for phase in ("train", "answer", "answer", "train"):
        watch.lap(phase)
    assert watch.seconds == {"train": 2, "answer": 2}


def test_the_notebooks_tables_and_figure_come_from_the_file(measured, tmp_path):
    section = report.Section("10_cost", SimpleNamespace(figures=tmp_path), "Cost", "What?")
    found = speed.numbers(measured)
    place = {1: "one_core", 2: "two_cores"}[measured.about["machine"]["threads"]]
    assert set(found) == {
        f"{place}.{own}lanes_over_{way}" for own in ("", "lora.") for way in ("loop", "single")
    }
    told = speed.targets({"two_cores.lanes_over_loop": found[f"{place}.lanes_over_loop"]})
    section.table(told, "targets", "Targets.")
    assert told["measured"].notna().sum() == 1 and "–" in (tmp_path / "targets.md").read_text()
    for name, frame in (
        ("ways", speed.compared(measured)),
        ("resources", speed.resources(measured)),
        ("sizes", speed.growth(measured)),
        ("memory", speed.remembered(measured)),
        ("gains", speed.gained(measured)),
    ):
        section.table(frame, name, "Caption.")
        assert len(frame)
    section.figure(
        diagrams.trends,
        speed.grown(measured, "edits"),
        "growth",
        "Caption.",
        "Alt.",
        x="edits",
        by="way",
    )
    assert "smoke" in speed.about(measured)


def test_ratios_compare_edits_and_not_seconds():
    """Ten seconds for two edits one by one beside ten for eight in lanes is a factor of four; pairs are of one repeat."""
    lines = [
        {
            "method": "A",
            "way": way,
            "repeat": repeat,
            "edits": edits,
            "tokens": 5,
            "train_seconds": train,
            "answer_seconds": 4.0,
            "peak_mib": 1.0,
        }
        for repeat, (way, edits, train) in (
            (0, ("single", 2, 6.0)),
            (0, ("lanes", 8, 6.0)),
            (1, ("single", 2, 16.0)),
            (1, ("lanes", 8, 6.0)),
            (2, ("lanes", 8, 1.0)),
        )
    ]
    found = speed.ratio(pd.DataFrame(lines), "A", "single")
    assert (found.mean, found.low, found.high) == (6.0, 4.0, 8.0)
    with pytest.raises(InputError, match="no timings of way 'loop'"):
        speed.ratio(pd.DataFrame(lines), "A", "loop")


def test_where_there_is_no_run_nothing_is_read(tmp_path):
    assert speed.read(tmp_path) is None
    assert "make bench" in speed.HOW and set(speed.targets({})["measured"]) == {None}


def test_a_file_that_is_no_run_is_named(measured, home, tmp_path):
    path = tmp_path.joinpath(*speed.RESULTS, "cpu.json")
    path.parent.mkdir(parents=True)
    whole = json.loads(home.joinpath(*speed.RESULTS, "cpu.json").read_text())
    for text, expected in (
        ("{", "not a file that `make bench` writes"),
        (json.dumps(whole | {"timings": 3}), "not a file"),
        (json.dumps({k: v for k, v in whole.items() if k != "gains"}), "no 'gains'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=expected) as error:
            speed.read(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_needs_a_gpu_runs_on_a_tiny_shape(tmp_path):
    assert (
        bench.main(
            ["--size", "smoke", "--rows", "gpu", "--into", str(tmp_path.joinpath(*speed.RESULTS))]
        )
        == 0
    )
    found = speed.numbers(
        replace(speed.read(tmp_path, speed.GPU), about={"machine": {"device": "some GPU"}})
    )
    assert {
        "gpu.embedded.lanes_over_loop",
        "gpu.qwen_shape.lanes_over_loop",
        "gpu.qwen_shape.peak_gib",
        "gpu.qwen_shape.minutes_per_1000_scaled",
    } <= set(found)
    assert {one.key for one in speed.TARGETS if one.key.startswith("gpu")} <= set(found)


def test_texts_of_random_words_have_the_length_that_is_asked_for():
    _, tokenizer = shapes.qwen(shapes.TINY, "cpu", torch.float32)
    dataset = shapes.worded(2, shapes.TINY["vocab_size"], 130, (11, 128))
    one = prompts.example(
        tokenizer, dataset.edits[0].question, dataset.edits[0].answer, True, False
    )
    assert len(one.ids) == 130 and len(dataset.probes["e0"]) == 11


def test_more_edits_than_there_are_come_again_under_other_ids(toy):
    many = shapes.repeated(toy.dataset, 5)
    assert len({edit.id for edit in many.edits}) == 5 and {
        probe.edit for probe in many.every_probe
    } == {edit.id for edit in many.edits}
    assert many.edits[4].answer == toy.dataset.edits[0].answer


def test_an_optimisation_that_cannot_be_switched_off_is_named():
    with (
        pytest.raises(InputError, match="uke.models.generate has no DROP_SHORE"),
        gains.replaced(answering, "DROP_SHORE", 1),
    ):
        pass
    own = answering.DROP_SHARE
    with gains.replaced(answering, "DROP_SHARE", gains.NEVER):
        assert answering.DROP_SHARE == gains.NEVER
    assert answering.DROP_SHARE == own


@pytest.mark.skipif(
    not ROOT.joinpath(*speed.RESULTS, "cpu.json").is_file(),
    reason="no committed run of `make bench`",
)
def test_the_committed_run_is_a_whole_one_whose_ways_agree():
    committed = speed.read(ROOT)
    assert committed.about["size"] == "full"
    for one in committed.same.to_dict("records"):
        ways.check_alike(one["way"], one)
