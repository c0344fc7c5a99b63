"""Simulate a study of many edits without a model: does the cost of one edit grow with their number?

    PYTHONPATH=lib python benchmarks/scale.py 1000 10000 100000

Seconds are of the processor. Each size has a process and a folder of its own. Edits are written as
UnKEBench and read by its loader; every edit gets the rows of a unit, which are looked up, read,
scored and drawn. What a step takes is printed by edit, and of the last size no step may take a
fifth more than of the first.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from uke.data import formats
from uke.data.edits import AVERAGE, KINDS, Edit
from uke.project import Paths, unit_key
from uke.report import figures
from uke.results import rows
from uke.results.metrics import METRICS
from uke.results.stats import summarise

MARKS = {"model": "m" * 16, "data": "d" * 16, "recipe": "r" * 16}
ALLOWED = 1.2


def record(number: int) -> dict[str, Any]:
    """An edit of about a hundred words as UnKEBench writes it."""
    words = [f"w{(number * 7919 + place * 104729) % 50021}" for place in range(100)]
    texts = {"question": f"Who is {number}?", "para_question": f"Tell me of {number}."}
    details = {"sub_question": [f"What of {number}?"] * 5, "sub_answer": words[:5]}
    return {"id": number, "answer": f"{' '.join(words)}."} | texts | details


def probes(edit: Edit, rng: np.random.Generator) -> pd.DataFrame:
    """Rows after the edit, with scores by chance: a probe of each kind of the average."""
    kinds = list(AVERAGE)
    scores = {name: rng.random(len(kinds)) for name in METRICS}
    scores |= {f"{name}_before": rng.random(len(kinds)) for name in METRICS}
    same = {"edit": edit.id, "method": "FT-M", "number": 0, "batch_size": 1, "split": "test"}
    texts = {"phase": "after", "question": edit.question, "reference": edit.answer}
    same |= texts | {"answer": edit.answer, "train_seconds": 1.0, "answer_seconds": 1.0} | MARKS
    return pd.DataFrame({"kind": kinds, **scores}).assign(**same)


def simulate(count: int) -> dict[str, float]:
    """Return the microseconds of every step by edit, and the kilobytes of memory that stay."""
    found: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        started = time.process_time()
        made = step()
        found[f"{name} (us)"] = 1e6 * (time.process_time() - started) / count
        return made

    with tempfile.TemporaryDirectory(prefix="uke-scale-") as folder:
        os.environ["UKE_HOME"] = folder
        paths, file = Paths("smoke"), Path(folder) / "UnKEBench.json"
        file.write_text(json.dumps([record(number) for number in range(count)]))
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        edits = timed("load", lambda: formats.load("unkebench", file))
        rng = np.random.default_rng(1)
        units = [unit_key("FT-M", batch=number, **MARKS) for number in range(count)]

        def write() -> None:
            for number, (unit, edit) in enumerate(zip(units, edits, strict=True)):
                rows.append(paths, "scale", unit, probes(edit, rng).assign(batch=number))

        timed("write rows", write)
        fresh = timed("look up", lambda: [rows.done(paths, "scale", u, MARKS) for u in units])
        assert all(fresh)
        frame = timed("read rows", lambda: rows.read(paths, "scale", units))
        scores = timed("score", lambda: rows.average(rows.primary(frame)))
        assert len(scores) == count and set(frame["kind"]) <= set(KINDS)
        timed("interval", lambda: summarise(scores, ["method"]))
        timed(
            "draw",
            lambda: figures.distribution(scores, by="method").savefig(paths.home / "figure.pdf"),
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory (KiB)"] = (peak - start) / count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="+", help="numbers of edits")
    sizes = parser.parse_args().sizes
    if len(sizes) == 1:
        print(json.dumps(simulate(sizes[0])))
        return
    command = [sys.executable, __file__]
    runs = [subprocess.run([*command, str(n)], capture_output=True, check=True) for n in sizes]
    table = pd.DataFrame([json.loads(run.stdout) for run in runs], index=sizes).T
    table["growth"] = table[sizes[-1]] / table[sizes[0]]
    print(table.round(2).to_string())
    if (grown := table.index[table["growth"] > ALLOWED]).any():
        sys.exit(f"growing by more than a fifth: {', '.join(grown)}")


if __name__ == "__main__":
    main()
