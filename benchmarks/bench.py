"""The benchmark: the published loop, one by one, and lanes, in turns and repeated (`make bench`).

Writes benchmarks/results/cpu.json and, where there is a CUDA device, benchmarks/results/gpu.json; a
smoke run writes below results/bench. `results.py` reads the files. A run whose variants give
different answers ends with an error and stores nothing.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from shapes import QWEN, TINY, random_qwen, random_words, repeated, widened
from tqdm import tqdm
from uke.cli import params
from uke.cli.execute import processor
from uke.data.edits import Edit, fingerprint
from uke.data.find import find_data
from uke.errors import InputError
from uke.files import write_atomic
from uke.methods.catalog import PUBLISHED, at_level, configured, find
from uke.methods.method import Method
from uke.models.generate import answer
from uke.models.model import load, precision
from uke.project import Paths
from uke.results.rows import shortened
from uke.study import dataset
from uke.study.study import Study, measure_for, measure_world
from variants import VARIANTS, check_same, compare_answers, timed

from results import BUSY, PARTS, RESULTS, SHAPE, file_name

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")

# Edits of lanes, one by one and loop in a repeat: `first` of the first method, the one of the
# targets, `others` of the others; then repeats, and the points of growth.
CPU_SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "methods": ("FT-M", "FT-UKE", "LoRA", "AnyEdit (MEMIT)"),
        "first": (64, 16, 8),
        "others": (16, 8, 4),
        "repeats": 3,
        "grow": {"edits": (1, 4, 16, 64), "length": (0.5, 1, 2), "width": (0.5, 1, 2), "at": 8},
    },
    "smollm2": {  # minutes an edit: what a process does once does not matter there
        "profile": "smollm2",
        "methods": ("FT-M", "FT-UKE", "LoRA", "AnyEdit (UnKE)"),
        "first": (4, 1, 1),
        "others": (4, 1, 1),
        "repeats": 1,
        "warm_up": False,
    },
    "smoke": {  # short questions after few steps: that it runs, and that the variants answer alike
        "methods": ("FT-UKE", "LoRA"),
        "first": (2, 1, 1),
        "others": (2, 1, 1),
        "repeats": 1,
        "kinds": ("detail", "struct_trip"),
        "steps": 5,
        "grow": {"edits": (2,), "length": (1.0,), "width": (0.5,), "at": 2},
    },
}
GPU_SIZES: dict[str, dict[str, Any]] = {
    "full": {"edits": (512, 16, 6), "repeats": 3, "shape": QWEN, "of_shape": (128, 4, 4)},
    "smoke": {"edits": (2, 1, 1), "repeats": 1, "shape": TINY, "of_shape": (2, 1, 1), "steps": 2},
}
TEXT_TOKENS, ANSWER_TOKENS, PROBES, LANES = 130, 128, 11, 512  # of an edit of random words


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--model", choices=("embedded", "smollm2"), default="embedded")
    parser.add_argument("--rows", choices=("cpu", "gpu", "all"), default="all")
    parser.add_argument("--into", type=Path, help="folder of the results")
    given = parser.parse_args(arguments)
    stored = ROOT / RESULTS if given.size == "full" else Paths("smoke").home / "results" / "bench"
    command = "make bench" + (f" SIZE={given.size}" if given.size != "full" else "")
    command += f" ROWS={given.rows}" if given.rows != "all" else ""
    command += f" MODEL={given.model}" if given.model != "embedded" else ""
    cuda = torch.cuda.is_available() and given.model == "embedded"
    size = given.size if given.model == "embedded" else given.model
    try:
        if given.rows != "gpu":
            content = described(measure_cpu, CPU_SIZES, size, "cpu", command)
            save(content, (given.into or stored) / file_name(given.model))
        if given.rows == "gpu" or (given.rows == "all" and cuda):
            if not cuda and given.size != "smoke":
                raise InputError("ROWS=gpu: no CUDA device here; expected one, or SIZE=smoke")
            device = "cuda" if cuda else "cpu"
            content = described(measure_gpu, GPU_SIZES, given.size, device, command)
            save(content, (given.into or stored) / "gpu.json")
    except (InputError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def described(measure, sizes: Mapping, size: str, device: str, command: str) -> dict[str, Any]:
    """Return what was measured with the machine, the versions and how busy the machine was."""
    started, load_before = time.perf_counter(), round(os.getloadavg()[0], 2)
    if load_before > BUSY:
        warning = "the seconds of this run are not to be trusted"
        print(f"this machine is busy (load {load_before:g}): {warning}", file=sys.stderr)
    measured = measure(sizes[size], device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "platform": platform.platform(),
        "load_before": load_before,
        "load_after": round(os.getloadavg()[0], 2),
    }
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in LIBRARIES} | {"commit": _commit()}
    versions["cuda"] = torch.version.cuda if device == "cuda" else None
    seconds = time.perf_counter() - started
    head = {"size": size, "command": command, "machine": machine, "versions": versions}
    return head | {"seconds": seconds} | measured


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def save(content: Mapping[str, Any], path: Path) -> Path:
    """Write a run with a measurement a line, so that a reader of its changes can follow."""
    parts = []
    for name, value in content.items():
        rows = value if name in PARTS else [value]
        lines = [json.dumps(shortened(row, 5), ensure_ascii=False) for row in rows]
        text = lines[0] if name not in PARTS else "[\n  " + ",\n  ".join(lines) + "\n ]"
        parts.append(f' "{name}": {text}')
    return write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def measure_cpu(size: Mapping[str, Any], device: str) -> dict[str, list[dict]]:
    """Measure every method on a model, and on the embedded one how the first method grows."""
    count = size["first"][0]
    study = of_profile(size["profile"], count) if "profile" in size else embedded(count, device)
    if "kinds" in size:
        study.dataset = study.dataset.only(size["kinds"])
    name = study.subject.name if "profile" in size else "embedded"
    methods = [chosen(method, name, size.get("steps")) for method in size["methods"]]
    timings, same = [], []
    warm_up, world = size.get("warm_up", True), "profile" not in size
    for number, method in enumerate(methods):
        if world and not method.factors:
            measure_world(study.model, study.tokenizer)
        measure_for(method, study.model, study.tokenizer)
        counts = size["others"] if number else size["first"]
        # Answers of a real model are long: rounding may tip some, which the table then shows.
        options = {"required": world, "warm_up": warm_up}
        found = compare(study, method, counts, size["repeats"], **options)
        timings, same = timings + found[0], same + found[1]
    grown = growth(study, methods[0], size["grow"]) if "grow" in size else []
    return {"timings": timings, "same": same, "growth": grown}


def measure_gpu(size: Mapping[str, Any], device: str) -> dict[str, list[dict]]:
    """Measure the embedded model with hundreds of lanes, and random weights of a 7B shape."""
    study = replace(embedded(size["edits"][0], device), lanes=LANES)
    if "steps" in size:
        study.dataset = study.dataset.only(("detail", "struct_trip"))
    method = chosen("FT-M", steps=size.get("steps"))
    timings, same = compare(study, method, size["edits"], size["repeats"])
    del study  # each model is held alone
    model, tokenizer = random_qwen(size["shape"], device, precision(device))
    count = size["of_shape"][0]
    shaped = random_words(count, size["shape"]["vocab_size"], TEXT_TOKENS, PROBES)
    options = {"similarity": False, "max_new_tokens": ANSWER_TOKENS, "lanes": LANES}
    study = Study("bench", shaped, (model, tokenizer), **options)
    changes = {"layers": "all"} | ({"steps": size["steps"]} if "steps" in size else {})
    lora = PUBLISHED["LoRA"].model_copy(update=changes | {"name": f"LoRA, {SHAPE}", "rank": 8})
    # Random weights prefer no word to another, and bf16 rounds, so equal answers are not required.
    found = compare(study, lora, size["of_shape"], 1, required=False, trained=False)
    changes |= {"name": f"FT-M, {SHAPE}", "components": ("down_proj",), "steps": 3}
    direct = PUBLISHED["FT-M"].model_copy(update=changes)
    found[0].append(measurement("single", study, shaped.edits[:1], direct, repeat=0)[0])
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    of_shape = [row | {"model_mib": held} for row in found[0]]
    return {"timings": timings + of_shape, "same": same + found[1], "growth": []}


def embedded(count: int, device: str) -> Study:
    """Return a study of the embedded model with `count` test edits of its world, repeated if few.

    In float32: in less, the published loop would round every step into its weights, which the
    other variants do not.
    """
    edits = repeated(dataset.load("bench", limit=count), count)
    return Study("bench", edits, load("embedded", device, torch.float32), similarity=False)


def of_profile(profile: str, count: int) -> Study:
    """Return a study of a profile's model with the first `count` test edits of its benchmark."""
    data = params.dataset(ROOT, profile, None)
    edits = dataset.load(profile, data, "test", count, str(find_data(data, "")))
    model = params.merge(ROOT, "07_recipe", profile)["model"]
    return Study("bench", edits, model, similarity=False)


def chosen(name: str, model: str = "embedded", steps: int | None = None) -> Method:
    """Return a method as tuned for single edits; the embedded model's FT-M on every `down_proj`."""
    folder = ROOT / "params"
    if name == "FT-M" and model == "embedded":
        method = at_level(folder, model, "FT-M", "layers", "all")
    else:
        method = find(name, configured(folder, model))
    return method.model_copy(update={"steps": steps}) if steps else method


def compare(
    study: Study,
    method: Method,
    counts: Sequence[int],
    repeats: int,
    required: bool = True,
    warm_up: bool = True,
    trained: bool = True,
) -> tuple[list[dict], list[dict]]:
    """Time a method in every variant, in turns, and compare the answers with those of lanes.

    Equal answers are `required`, or only counted. A model that is not `trained` has no answers to
    keep. Lanes write the same edits in every repeat, the slower variants some of them, in turn.
    """
    probes = study.dataset.every_probe
    limit = {"max_new_tokens": study.token_limit}
    texts = answer(study.model, study.tokenizer, probes, **limit) if trained else probes
    before = dict(zip(probes, texts, strict=True))
    timings, answers = [], {variant: {} for variant in VARIANTS}
    for variant in VARIANTS if warm_up else ():  # what a process does once is not timed
        timed(variant, study, study.dataset.edits[:1], method)
    for repeat in tqdm(range(repeats), desc=method.name):
        edits = study.dataset.edits[: counts[0]]
        start = repeat * counts[1] % len(edits)
        some = (edits[start:] + edits[:start])[: counts[1]]
        fewest = some[:: max(1, len(some) // counts[2])][: counts[2]]
        for variant, own in {"loop": fewest, "single": some, "lanes": edits}.items():
            row, found = measurement(variant, study, own, method, repeat=repeat)
            timings.append(row)
            answers[variant] |= found
    same = []
    for variant in ("loop", "single"):
        found = compare_answers(answers[variant], answers["lanes"], before if trained else {})
        if required:
            check_same(f"variant {variant} of {method.name}", found)
        same.append({"method": method.name, "variant": variant} | found)
    return timings, same


def measurement(
    variant: str, study: Study, edits: Sequence[Edit], method: Method, **labels: Any
) -> tuple[dict[str, Any], dict]:
    """Time a variant; return a row as it is stored, and the answers."""
    found = timed(variant, study, edits, method)
    row = {"method": method.name, "variant": variant} | labels | found._asdict()
    row |= {"edits": len(edits), "probes": len(found.answers)}
    return row, row.pop("answers")


def growth(study: Study, method: Method, grow: Mapping[str, Any]) -> list[dict]:
    """Time every variant once at each number of edits, length of the text and width of a model."""
    rows = []
    for what, value, at in tqdm(list(_points(study, grow)), desc=f"{method.name}: growth"):
        count = len(at.dataset.edits)
        most = {"loop": max(4, grow["at"] // 2), "single": grow["at"], "lanes": count}
        for variant in VARIANTS:
            edits = at.dataset.edits[: min(count, most[variant])]
            labels = {"repeat": 0, "grows": what, "value": value}
            rows.append(measurement(variant, at, edits, method, **labels)[0])
    return rows


def _points(study: Study, grow: Mapping[str, Any]) -> Iterator[tuple[str, float, Study]]:
    for count in grow["edits"]:
        yield "edits", count, replace(study, dataset=study.dataset.first(count))
    for share in grow["length"]:
        cut = with_length(study.dataset, share, grow["at"])
        texts = [edit.answer for edit in cut.edits]
        ids = study.tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = round(sum(map(len, ids)) / len(ids))
        yield "tokens of the answer", tokens, replace(study, dataset=cut)
    few = study.dataset.first(grow["at"])
    for share in grow["width"]:
        model = widened(study.model, share)
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        pair = (model, study.tokenizer)
        at = replace(study, subject=pair, dataset=few)
        yield "parameters (millions)", size, at


def with_length(whole: dataset.Dataset, share: float, count: int) -> dataset.Dataset:
    """Return the first `count` edits with answers of `share` of their length.

    The next edit's text continues where one ends. Only the original probe of each is kept.
    """
    words = [edit.answer.split() for edit in whole.edits]
    edits = []
    for index, edit in enumerate(whole.edits[:count]):
        longer = words[index] + words[(index + 1) % len(words)]
        text = " ".join(longer[: max(1, round(share * len(words[index])))])
        edits.append(edit.model_copy(update={"answer": text}))
    probes = {edit.id: edit.probes[:1] for edit in edits}
    changed = fingerprint(edits, [edit.probes[0] for edit in edits])
    return replace(whole, edits=tuple(edits), probes=probes, fingerprint=changed)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.exit(main())
