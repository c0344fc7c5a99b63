"""Simulate a study of many edits without a model: does the cost of one edit grow with their number?

    PYTHONPATH=lib python benchmarks/scale.py 1000 10000 100000 --into benchmarks/results/scale.json

Edits are written as UnKEBench and read by its loader; a locality set is built for them from as many
documents and triples whatever their number; each batch of them gets rows, before and after, which
are looked up, read, compared with no edit and drawn. Each size has a process and a folder of its
own. Seconds are of the processor. Of the last size no step may take a fifth more than of the first.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bench import described, save
from uke.data import formats
from uke.data.edits import AVERAGE, Edit
from uke.locality import card
from uke.locality.build import Settings
from uke.project import Paths, unit_key
from uke.report import figures
from uke.results import compare, rows
from uke.results.metrics import METRICS
from uke.results.stats import summarise

MARKS = {"model": "m" * 16, "data": "d" * 16, "recipe": "r" * 16}
ALLOWED = 1.2
SOURCES, LENGTH = 300, 30  # documents, and triples; words of an edit and of a document


def words(number: int, count: int) -> str:
    return " ".join(f"w{(number * 7919 + place * 104729) % 50021}" for place in range(count))


def record(number: int) -> dict[str, Any]:
    """An edit as UnKEBench writes it."""
    texts = {"question": f"Who is {number}?", "para_question": f"Tell me of {number}."}
    details = {"sub_question": [f"What of {number}?"] * 5, "sub_answer": words(number, 5).split()}
    return {"id": number, "answer": f"{words(number, LENGTH)}."} | texts | details


def source_files(folder: Path) -> tuple[Path, Path]:
    """Write documents and triples that share no fact with any edit."""
    documents, triples = folder / "documents.jsonl", folder / "triples.json"
    every = range(SOURCES)
    texts = [{"title": f"Thing {n}", "text": f"Thing {n} is {words(n, LENGTH)}."} for n in every]
    documents.write_text("\n".join(map(json.dumps, texts)))
    about = [{"subject": f"Place {n}", "ground_truth": f"Town {n}"} for n in every]
    asked = [one | {"prompt": f"{one['subject']} is near"} for one in about]
    triples.write_text(json.dumps(asked))
    return documents, triples


def probes(edits: Sequence[Edit], rng: np.random.Generator) -> pd.DataFrame:
    """Rows of a batch with scores by chance: of each edit a probe of each kind of the average."""
    kinds, every = list(AVERAGE), [*METRICS, *(f"{name}_before" for name in METRICS)]
    each = {"edit": [edit.id for edit in edits], "question": [edit.question for edit in edits]}
    each["answer"] = each["reference"] = [edit.answer for edit in edits]
    frame = pd.DataFrame(each).merge(pd.DataFrame({"kind": kinds}), how="cross")
    chance = rng.random((len(frame), len(every)))
    same = {"method": "FT-M", "number": 0, "split": "test", "batch_size": len(edits)}
    same |= {"phase": "after", "train_seconds": 1.0, "answer_seconds": 1.0} | MARKS
    return pd.concat([frame, pd.DataFrame(chance, columns=every)], axis=1).assign(**same)


def simulate(count: int, batch: int) -> dict[str, float]:
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
        documents, triples = source_files(Path(folder))
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        edits = timed("load", lambda: formats.load("unkebench", file))
        files = card.SetFiles("unkebench", file, (documents,), (triples,), generated=True)
        chosen = Settings(retriever="bm25", batch=batch)
        built = timed("locality set", lambda: card.ensure(files, chosen, Path(folder)))
        items = timed("load the set", lambda: formats.load_locality(built, edits))
        assert len(items) == 4 * count
        del items
        rng, starts = np.random.default_rng(1), range(0, count, batch)
        units = [unit_key("FT-M", batch=start, **MARKS) for start in starts]

        def write() -> None:
            for number, unit in enumerate(units):
                own = edits[number * batch : (number + 1) * batch]
                rows.append(paths, "scale", unit, probes(own, rng).assign(batch=number))

        timed("write rows", write)
        fresh = timed("look up", lambda: [rows.done(paths, "scale", u, MARKS) for u in units])
        assert all(fresh)
        frame = timed("read rows", lambda: rows.read(paths, "scale", units))
        before = frame.assign(method="unedited", phase="before", batch=0)
        scores = timed("compare", lambda: compare.scored(frame, before))
        own = scores[(scores["kind"] == "balance") & (scores["method"] == "FT-M")]
        assert len(own) == count
        timed("interval", lambda: summarise(own, ["method"]))
        timed(
            "draw",
            lambda: figures.distribution(own, by="method").savefig(paths.home / "figure.pdf"),
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory (KiB)"] = (peak - start) / count
    return found


def measure(sizes: Sequence[int], batch: int) -> dict[str, list[dict[str, float]]]:
    """Simulate each number of edits in a process of its own: a row each."""
    command = [sys.executable, __file__, "--batch", str(batch)]
    steps = []
    for size in sizes:
        run = subprocess.run([*command, str(size)], stdout=subprocess.PIPE, check=True)
        steps.append({"edits": size, "batch": batch} | json.loads(run.stdout))
        print(json.dumps(steps[-1]), file=sys.stderr, flush=True)
    return {"growth": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="+", help="numbers of edits")
    parser.add_argument("--batch", type=int, default=100, help="edits whose rows share a file")
    parser.add_argument("--into", type=Path, help="a file of results")
    given = parser.parse_args()
    if len(given.sizes) == 1 and not given.into:
        print(json.dumps(simulate(given.sizes[0], given.batch)))
        return
    command = f"python benchmarks/scale.py {' '.join(map(str, given.sizes))} --batch {given.batch}"
    content = described(
        lambda sizes, _: measure(sizes, given.batch), {"": given.sizes}, "", "cpu", command
    )
    if given.into:
        save(content, given.into)
    table = pd.DataFrame(content["growth"]).set_index("edits").drop(columns="batch").T
    table["growth"] = table[given.sizes[-1]] / table[given.sizes[0]]
    print(table.round(2).to_string())
    if (grown := table.index[table["growth"] > ALLOWED]).any():
        sys.exit(f"growing by more than a fifth: {', '.join(grown)}")


if __name__ == "__main__":
    main()
