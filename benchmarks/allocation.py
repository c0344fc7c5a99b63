"""What the memory settings of a notebook's kernel bring: the same edits written and asked about in two processes, without them and with."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from uke.answering import answer
from uke.apart import edited_apart
from uke.kernels import ALLOCATION
from uke.materials import Material, gather
from uke.models import load
from uke.paths import Paths
from uke.recipes import Recipe
from uke.studies import Study


def without_and_with(recipe: Recipe, edits: int, kinds: tuple[str, ...], repeats: int) -> tuple[float, list[float]]:
    """Seconds without the settings over those with them: predicted from the pages that the system has to clear, and measured in turns."""
    command = [sys.executable, str(Path(__file__).resolve()), recipe.model_dump_json(), str(edits), "--threads", str(torch.get_num_threads()), *kinds]
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATION}
    found = [[json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for env in (plain, plain | ALLOCATION)]
             for _ in range(repeats)]  # fmt: skip
    off = found[0][0]
    return off["seconds"] / max(off["seconds"] - off["pages"] * off["page_seconds"], off["seconds"] / 10), [each["seconds"] / on["seconds"] for each, on in found]


def _pages() -> int:
    """Pages that the system has cleared for this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _page_seconds() -> float:
    """Seconds of clearing one page: a tensor filled for the first time and again."""
    seconds, cleared = [], _pages()
    fresh = torch.empty(2**24)
    for _ in range(2):
        started = time.perf_counter()
        fresh.fill_(1.0)
        seconds.append(time.perf_counter() - started)
    return max(0.0, seconds[0] - seconds[1]) / max(1, _pages() - cleared)


def _written_and_asked(recipe: Recipe, material: Material) -> dict[str, float]:
    study = Study("bench", Paths("bench"), *load("embedded", "cpu"), material)
    page_seconds = _page_seconds()
    pages, started = _pages(), time.perf_counter()
    with edited_apart(study.model, study.tokenizer, material.edits, recipe) as m:
        answer(m, study.tokenizer, material.every_probe, max_new_tokens=study.room)
    return {"seconds": time.perf_counter() - started, "pages": _pages() - pages, "page_seconds": page_seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="as JSON")
    parser.add_argument("edits", type=int)
    parser.add_argument("kinds", nargs="*", help="of probes; all where none is named")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    some = gather(Paths("bench"), "test", given.edits)
    print(json.dumps(_written_and_asked(Recipe.model_validate_json(given.recipe), some.only(given.kinds) if given.kinds else some)))
