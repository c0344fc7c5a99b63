"""The benchmark compares variants that do the same, and its files can be read."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from uke.data.edits import Detail, Edit, Probe
from uke.errors import InputError
from uke.methods.catalog import find
from uke.models.generate import answer
from uke.models.model import fingerprint
from uke.models.prompts import example
from uke.project import Paths
from uke.study.dataset import Dataset
from uke.study.study import Study

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench
import shapes
import variants
from variants import VARIANTS, check_same, timed

import results as stored

ROOT = Path(__file__).parents[1]
FT_M = find("FT-M").model_copy(update={"learning_rate": 2e-3, "steps": 6, "layers": "all"})
LORA = find("LoRA").model_copy(update={"steps": 4})


@pytest.fixture(scope="module")
def run(tmp_path_factory, results):
    """A smoke run of the benchmark on the processor, in a project of its own."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(results, home / "results")
    (home / "params").symlink_to(ROOT / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", str(home))
        into = ["--into", str(home / stored.RESULTS)]
        assert bench.main(["--size", "smoke", "--rows", "cpu", *into]) == 0
    return home


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
    cloze = {"kind": "struct_trip", "question": "Grace Hopper wrote the", "reference": "compiler"}
    probes = {one.id: (*one.probes, Probe(edit=one.id, chat=False, **cloze)) for one in edits}
    dataset = Dataset(edits, probes, "toy", Paths("smoke"))
    return Study("toy", dataset, (tiny("llama"), tokenizer), False, max_new_tokens=9)


def test_a_run_measures_every_method_in_every_variant_with_the_same_answers(run):
    (read,) = stored.read_all(run)
    counts = read.timings.groupby(["method", "variant"])["repeat"].nunique()
    assert set(counts.index) == {(m, v) for m in ("FT-UKE", "LoRA") for v in VARIANTS}
    assert (read.timings[["train_seconds", "answer_seconds", "tokens"]] > 0).all(axis=None)
    for row in read.same.to_dict("records"):
        check_same(row["variant"], row)
    place = {1: "one_core", 2: "two_cores"}[read.about["machine"]["threads"]]
    numbers = stored.numbers(read)
    ratios = [f"{own}lanes_over_{v}" for own in ("", "lora.") for v in ("loop", "single")]
    assert set(numbers) == {f"{place}.{ratio}" for ratio in ratios}
    assert read.about["command"] == "make bench SIZE=smoke ROWS=cpu"
    assert "smoke" in stored.about(read)
    for table in (stored.ratios_table, stored.resources_table, stored.growth_table):
        assert len(table(read))
    assert set(stored.growth_by_edits(read)["variant"]) == set(stored.VARIANTS.values())
    numbers = {"two_cores.lanes_over_loop": numbers[f"{place}.lanes_over_loop"]}
    targets = stored.targets_table(numbers)
    assert targets["measured"].notna().sum() == 1 == len(stored.met(targets))


def test_what_needs_a_gpu_runs_on_a_tiny_shape(run, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(run))
    into = ["--into", str(run / "gpu" / stored.RESULTS)]
    assert bench.main(["--size", "smoke", "--rows", "gpu", *into]) == 0
    (read,) = stored.read_all(run / "gpu")
    machine = read.about["machine"] | {"device": "some GPU"}
    found = stored.numbers(replace(read, about=read.about | {"machine": machine}))
    assert {one.key for one in stored.TARGETS if one.key.startswith("gpu")} <= set(found)


def test_other_answers_end_a_run_and_store_nothing(run, monkeypatch, tmp_path, capsys):
    def unwritten(study, edits, method, watch):
        for edit in edits:
            probes = study.dataset.probes[edit.id]
            yield answer(study.model, study.tokenizer, probes, max_new_tokens=study.token_limit)

    monkeypatch.setenv("UKE_HOME", str(run))
    monkeypatch.setitem(VARIANTS, "loop", unwritten)
    into = ["--into", str(tmp_path / "out")]
    assert bench.main(["--size", "smoke", "--rows", "cpu", *into]) == 2
    assert "variant loop of FT-UKE: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="average is 0.500 beside 0.520"):
        check_same("single", {"answers": 40, "share": 1.0, "average": 0.5, "average_lanes": 0.52})


@pytest.mark.parametrize("recipe", [FT_M, LORA], ids=["weights", "adapter"])
def test_every_variant_answers_alike_and_leaves_the_model_as_it_was(toy, recipe):
    before, probes = fingerprint(toy.model), toy.dataset.every_probe
    unedited = answer(toy.model, toy.tokenizer, probes, max_new_tokens=toy.token_limit)
    found = {v: timed(v, toy, toy.dataset.edits, recipe).answers for v in VARIANTS}
    assert found["loop"] == found["single"] == found["lanes"] and list(found["loop"]) == probes
    assert list(found["loop"].values()) != unedited
    assert fingerprint(toy.model) == before
    assert all(parameter.requires_grad for parameter in toy.model.parameters())


def test_the_loop_refuses_what_it_is_not_written_for(toy):
    edits = toy.dataset.edits
    for recipe, some in ((find("FT-L"), edits[:1]), (find("AdaLoRA"), edits[:1]), (FT_M, edits)):
        written = variants.rewritten(toy.model, toy.tokenizer, some, recipe)
        with pytest.raises(InputError, match="the published loop is written for"), written:
            pass


def test_too_many_lanes_for_memory_cost_lanes_and_not_the_run(toy, monkeypatch):
    each, sizes = variants.edited_each, []

    def full(model, tokenizer, edits, method):
        sizes.append(len(edits))
        if len(edits) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return each(model, tokenizer, edits, method)

    plain = timed("lanes", toy, toy.dataset.edits, FT_M).answers
    monkeypatch.setattr(variants, "edited_each", full)
    assert timed("lanes", toy, toy.dataset.edits, FT_M).answers == plain
    assert sizes == [2, 1, 1] and toy.lanes == 1


def test_an_edit_that_diverges_in_lanes_is_named(toy):
    ids = [set(toy.tokenizer(one.question + one.answer)["input_ids"]) for one in toy.dataset.edits]
    toy.model.get_input_embeddings().weight.data[min(ids[1] - ids[0])] = float("nan")
    with pytest.raises(FloatingPointError, match="edit 'Alan'"):
        timed("lanes", toy, toy.dataset.edits, FT_M)


def test_ratios_compare_seconds_of_an_edit_within_a_repeat():
    """Ten seconds for two edits one by one beside ten for eight in lanes are a factor of four."""
    rows = [(0, "single", 2, 6.0), (0, "lanes", 8, 6.0), (1, "single", 2, 16.0)]
    rows += [(1, "lanes", 8, 6.0), (2, "lanes", 8, 1.0)]
    frame = pd.DataFrame(rows, columns=["repeat", "variant", "edits", "train_seconds"])
    frame = frame.assign(method="A", tokens=5, answer_seconds=4.0, peak_mib=1.0)
    found = stored.ratio(frame, "A", "single")
    assert (found.mean, found.low, found.high) == (6.0, 4.0, 8.0)
    with pytest.raises(InputError, match="no timings of variant 'loop'"):
        stored.ratio(frame, "A", "loop")


def test_a_file_that_is_no_run_is_named(run, tmp_path):
    whole = json.loads((run / stored.RESULTS / "cpu.json").read_text())
    path = tmp_path / "cpu.json"
    for text, expected in (
        ("{", "not a file that `make bench` writes"),
        (json.dumps(whole | {"timings": 3}), "not a file"),
        (json.dumps({k: v for k, v in whole.items() if k != "growth"}), "no 'growth'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=expected) as error:
            stored.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert stored.read_all(tmp_path) == []
    assert set(stored.targets_table({})["measured"]) == {None}


def test_texts_of_random_words_have_the_length_that_is_asked_for(toy):
    _, tokenizer = shapes.random_qwen(shapes.TINY, "cpu", torch.float32)
    words = shapes.random_words(2, shapes.TINY["vocab_size"], 130, 11)
    edit = words.edits[0]
    assert len(example(tokenizer, edit.question, edit.answer, True, False).ids) == 130
    assert len(words.probes["e0"]) == 11
    many = shapes.repeated(toy.dataset, 5)
    ids = {edit.id for edit in many.edits}
    assert len(ids) == 5 and {probe.edit for probe in many.every_probe} == ids
    assert many.edits[4].answer == toy.dataset.edits[0].answer


def test_answers_are_cut_or_lengthened_by_the_next_text(toy):
    half, double = (bench.with_length(toy.dataset, share, 1) for share in (0.5, 2))
    assert half.edits[0].answer == "Ada wrote in" and len(half.every_probe) == 1
    assert double.edits[0].answer.startswith("Ada wrote in London in 1815. Alan wrote")
    assert half.probes["Ada"][0].reference == half.edits[0].answer
    assert len({half.fingerprint, double.fingerprint, toy.dataset.fingerprint}) == 3


def test_the_committed_run_is_a_whole_one_whose_variants_agree():
    for committed in stored.read_all(ROOT):
        assert committed.about["size"] == "full"
        for row in committed.same.to_dict("records"):
            check_same(row["variant"], row)
