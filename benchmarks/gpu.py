"""Rows that need a GPU: the embedded model with hundreds of lanes, and random weights in the shape of Qwen2.5-7B.

With `make bench SIZE=smoke ROWS=gpu` the same code runs on a tiny shape, on a processor too.
"""

from dataclasses import dataclass, replace

import bench
import predictions
import shapes
from uke.methods.catalog import PUBLISHED
from uke.models.model import precision
from uke.study import speed, ways
from uke.study.study import Study


@dataclass(frozen=True)
class Size:
    """Edits of the embedded model and of the shape in lanes, one by one and in the loop; the shape and its texts."""

    embedded: bench.Amount
    shaped: bench.Amount
    shape: dict
    edit_tokens: int = 130
    probe_tokens: int = 128
    probes: int = 11
    steps: int = 0
    lanes: int = 512  # at most; free memory decides


SIZES = {
    "full": Size(bench.Amount(512, 16, 6), bench.Amount(128, 4, 4, 1), shapes.QWEN),
    "smoke": Size(bench.Amount(3, 2, 1, 1), bench.Amount(3, 2, 1, 1), shapes.TINY, 40, 12, 3, 2, 4),
}


def rows(size: Size, device: str) -> dict[str, list[dict]]:
    """Timings, peak memory and how alike the answers were; each model is held alone."""
    study = replace(bench.embedded(size.embedded.lanes, device), lanes=size.lanes)
    if size.steps:
        study.dataset = study.dataset.only(("detail", "struct_trip"))
    method = bench.chosen("FT-M", size.steps)
    timings, same = bench.compared(study, [method], {method.name: size.embedded})
    memory = predictions.memory(study, method, timings)
    del study
    shaped, alike, of_shape = _shaped(size, device)
    return {
        "timings": timings + shaped,
        "same": same + alike,
        "growth": [],
        "memory": memory + of_shape,
        "gains": [],
    }


def _shaped(size: Size, device: str) -> tuple[list[dict], list[dict], list[dict]]:
    """LoRA on all layers in three ways, timed; FT-M on all down projections, its memory."""
    model, tokenizer = shapes.qwen(size.shape, device, precision(device))
    dataset = shapes.worded(
        size.shaped.lanes,
        size.shape["vocab_size"],
        size.edit_tokens,
        (size.probes, size.probe_tokens),
    )
    study = Study(
        "bench",
        dataset,
        (model, tokenizer),
        similarity=False,
        max_new_tokens=size.probe_tokens,
        lanes=size.lanes,
    )
    changed = {"steps": size.steps} if size.steps else {}
    lora = PUBLISHED["LoRA"].model_copy(
        update={"name": f"LoRA, {speed.SHAPE}", "rank": 8, "layers": "all", **changed}
    )
    timings, answers = [], {way: {} for way in ways.WAYS}
    for way in ways.WAYS:  # what a process does once is not timed
        ways.timed(way, study, dataset.edits[:1], lora)
    for repeat in range(size.shaped.repeats):
        for way, edits in size.shaped.chosen(dataset.edits, repeat).items():
            found = ways.timed(way, study, edits, lora)
            answers[way] |= found.answers
            timings.append(bench.row(lora, way, edits, found) | {"repeat": repeat})
    # Random weights have next to no favourite among their words, and bf16 rounds: alike or not is told, and asked of no one.
    same = [
        {"method": lora.name, "way": way}
        | ways.alike(answers[way], answers["lanes"], answers["lanes"])
        for way in ways.WAYS
        if way != "lanes"
    ]
    direct = PUBLISHED["FT-M"].model_copy(
        update={
            "name": f"FT-M, {speed.SHAPE}",
            "layers": "all",
            "components": ("down_proj",),
            "steps": 3,
        }
    )
    found = ways.timed("single", study, dataset.edits[:1], direct)
    timings.append(bench.row(direct, "single", dataset.edits[:1], found) | {"repeat": 0})
    weights = (
        sum(weight.numel() * weight.element_size() for weight in model.parameters())
        / predictions.MIB
    )
    memory = [
        each | {"model_mib": weights}
        for recipe in (lora, direct)
        for each in predictions.memory(study, recipe, timings, speed.SHAPE)
    ]
    return timings, same, memory
