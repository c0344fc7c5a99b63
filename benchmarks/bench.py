"""The benchmark: the published loop, one edit after another, and lanes, in one run, interleaved and repeated. `make bench` runs it.

Writes benchmarks/results/cpu.json and, where there is a CUDA device, benchmarks/results/gpu.json; a smoke run, and one of chosen
rows that are none of these, writes where `--into` says. What each field means stands in `uke.study.speed.Bench`.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import gains
import growth
import predictions
import shapes
import torch
from tqdm import tqdm
from uke.cli.execute import processor
from uke.data.edits import Edit
from uke.errors import InputError
from uke.methods.catalog import at_level, configured, find
from uke.methods.method import Method
from uke.models.generate import answer
from uke.models.model import load
from uke.project import Paths
from uke.study import dataset, speed, ways
from uke.study.study import Study, measure_world

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")


@dataclass(frozen=True)
class Amount:
    """Edits that each way is timed on in one repeat: lanes on the same ones each time, the slower ways on some of them in turn."""

    lanes: int
    single: int
    loop: int
    repeats: int = 3

    def chosen(self, edits: Sequence[Edit], repeat: int) -> dict[str, list[Edit]]:
        edits = list(edits[: self.lanes])
        start = repeat * self.single % len(edits)
        single = (edits[start:] + edits[:start])[: self.single]
        return {
            "loop": single[:: max(1, len(single) // self.loop)][: self.loop],
            "single": single,
            "lanes": edits,
        }


@dataclass(frozen=True)
class Size:
    """How much a run measures. The first method is the one of the targets."""

    headline: Amount
    others: Amount
    methods: tuple[str, ...] = ("FT-M", "FT-UKE", "LoRA", "AnyEdit (MEMIT)")
    kinds: tuple[str, ...] = ()  # all probes, or those of these kinds
    steps: int = 0  # as tuned, or so many
    growing: growth.Amount = growth.Amount()
    gaining: gains.Amount = gains.Amount()


SIZES = {
    "full": Size(Amount(64, 16, 8), Amount(16, 8, 4)),
    # Short questions after few steps: that it runs, and that the ways answer alike.
    "smoke": Size(
        Amount(3, 2, 1, 2),
        Amount(2, 1, 1, 1),
        ("FT-UKE", "LoRA"),
        ("detail", "struct_trip"),
        5,
        growth.Amount((2,), (1.0,), (0.5,), 2, 8),
        gains.Amount(2, 1, 0, 4, 3),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--rows",
        choices=("cpu", "gpu", "all"),
        default="all",
        help="all: those of the processor, and those of a CUDA device where there is one",
    )
    parser.add_argument(
        "--into",
        type=Path,
        help="folder of the results; benchmarks/results by default, results/bench for smoke",
    )
    given = parser.parse_args(arguments)
    into = given.into or (
        ROOT.joinpath(*speed.RESULTS)
        if given.size == "full"
        else Paths("smoke").home / "results" / "bench"
    )
    said = (
        "make bench"
        + (f" SIZE={given.size}" if given.size != "full" else "")
        + (f" ROWS={given.rows}" if given.rows != "all" else "")
    )
    try:
        if given.rows != "gpu":
            speed.save(
                described(of_processor, SIZES[given.size], said, given.size, "cpu"),
                into / f"{speed.CPU}.json",
            )
        if given.rows == "gpu" or (given.rows == "all" and torch.cuda.is_available()):
            import gpu

            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cpu" and given.size != "smoke":
                raise InputError("ROWS=gpu: no CUDA device here; expected one, or SIZE=smoke")
            speed.save(
                described(gpu.rows, gpu.SIZES[given.size], said, given.size, device),
                into / f"{speed.GPU}.json",
            )
    except (InputError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def described(measure, size, said: str, name: str, device: str) -> dict:
    """What was measured, with the machine, what it ran and how busy it was."""
    started, busy = time.perf_counter(), round(os.getloadavg()[0], 2)
    if busy > speed.BUSY:
        print(
            f"this machine is busy (load {busy:g}): the seconds of this run are not to be trusted",
            file=sys.stderr,
        )
    measured = measure(size, device)
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "load_before": busy,
        "load_after": round(os.getloadavg()[0], 2),
    }
    versions = {
        "python": platform.python_version(),
        **{each: metadata.version(each) for each in LIBRARIES},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": _commit(),
    }
    return {
        "size": name,
        "command": said,
        "machine": machine,
        "versions": versions,
        "seconds": time.perf_counter() - started,
        **measured,
    }


def of_processor(size: Size, device: str) -> dict[str, list[dict]]:
    """Every row of a machine without an accelerator, on the embedded model."""
    study = embedded(size.headline.lanes, device)
    if size.kinds:
        study.dataset = study.dataset.only(size.kinds)
    methods = [chosen(name, size.steps) for name in size.methods]
    if not all(method.factors for method in methods):
        measure_world(study.model, study.tokenizer)
    amounts = {
        method.name: size.others if place else size.headline for place, method in enumerate(methods)
    }
    timings, same = compared(study, methods, amounts)
    memory = predictions.memory(study, methods[0], timings)
    grown, of_width = growth.measured(study, methods[0], size.growing)
    found = gains.measured(study, methods, timings, size.gaining)
    return {
        "timings": timings,
        "same": same,
        "growth": grown,
        "memory": memory + of_width,
        "gains": found,
    }


def embedded(count: int, device: str) -> Study:
    """The embedded model with so many test edits of its world; where there are fewer, they come again under other ids.

    In float32 wherever it is: in less, the published loop would round every step into its weights, which the others do not.
    """
    paths = Paths("bench")
    model, tokenizer = load("embedded", device, torch.float32)
    return Study(
        "bench",
        shapes.repeated(dataset.load(paths.profile, limit=count), count),
        (model, tokenizer),
        False,
    )


def chosen(name: str, steps: int = 0) -> Method:
    """The method as the study tuned it for single edits, or with so many steps; FT-M on the down projections of all blocks."""
    params = ROOT / "params"
    method = (
        at_level(params, "embedded", "FT-M", "layers", "all")
        if name == "FT-M"
        else find(name, configured(params, "embedded"))
    )
    return method.model_copy(update={"steps": steps}) if steps else method


def compared(
    study: Study, methods: Sequence[Method], amounts: dict[str, Amount]
) -> tuple[list[dict], list[dict]]:
    """Timings of every method in every way, and how alike the answers were; a way that answers otherwise ends the run."""
    probes = study.dataset.every_probe
    before = dict(
        zip(
            probes,
            answer(study.model, study.tokenizer, probes, max_new_tokens=study.token_limit),
            strict=True,
        )
    )
    timings, same = [], []
    for method in methods:
        amount, answers = amounts[method.name], {way: {} for way in ways.WAYS}
        for way in ways.WAYS:  # what a process does once is not timed
            ways.timed(way, study, study.dataset.edits[:1], method)
        for repeat in tqdm(range(amount.repeats), desc=f"{method.name}: three ways"):
            for way, edits in amount.chosen(study.dataset.edits, repeat).items():
                found = ways.timed(way, study, edits, method)
                answers[way] |= found.answers
                timings.append(row(method, way, edits, found) | {"repeat": repeat})
            held = {
                way: ways.alike(answers[way], answers["lanes"], before)
                for way in ways.WAYS
                if way != "lanes"
            }
            for way, one in held.items():
                ways.check_alike(f"{way} of {method.name}", one)
        same += [{"method": method.name, "way": way} | one for way, one in held.items()]
    return timings, same


def row(method: Method, way: str, edits: Sequence[Edit], found: ways.Timed) -> dict:
    """A measurement as it is stored."""
    return {
        "method": method.name,
        "way": way,
        "edits": len(edits),
        "probes": len(found.answers),
    } | {name: value for name, value in found._asdict().items() if name != "answers"}


def _commit() -> str | None:
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return (
            subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
            or None
        )
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.exit(main())
