"""Edits written one after another into the same weights, or the first of them at once; asked on the way, undone at the end."""

import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from uke.data.edits import Edit
from uke.errors import InputError
from uke.methods.edited import Writer, sequence
from uke.methods.method import EditRecord, Method
from uke.results import rows
from uke.results.compare import SIDES
from uke.results.metrics import HEADLINE
from uke.study.memory import Peak
from uke.study.score import beside
from uke.study.study import Study, with_record

FACTOR = "count"  # what the rows vary: how many edits the weights hold
ASKED = tuple(kind for kind in HEADLINE if kind != "multi_hop")


def first_and_last(written: Sequence[Edit], asked: int) -> list[Edit]:
    """The first `asked` edits and the last `asked`, each once."""
    return [*written[:asked], *written[max(asked, len(written) - asked) :]]


def run(
    study: Study, method: Method, counts: Sequence[int], asked: int, together: bool = False
) -> None:
    """Write rows of the first and the last `asked` edits after each of `counts` edits, one unit for the whole sequence.

    Depth first, every edit is trained to its end before the next, on top of it; with `together`, breadth first, the first
    n edits are trained at once from the unedited weights, for each n anew. Seconds are those since the count before. Where
    a method breaks down on the way, the rows end with the last count it reached, and their notes say why; it raises where
    it reached none. Raises InputError for counts or `asked` below 1, or more edits than the study has.
    """
    edits, counts = study.dataset.edits, sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > len(edits) or asked < 1:
        raise InputError(
            f"study {study.name}: counts {counts}, asked {asked}: expected numbers from 1 to {len(edits)}, the edits there are"
        )
    marks = {"model": study.mark, "data": study.dataset.fingerprint, "recipe": method.fingerprint}
    choices = study.labels | {
        "learning_rate": method.learning_rate,
        "seed": method.seed,
        "factor": FACTOR,
    }
    texts = method.depends_on(study.model)
    method.examples(study.model, study.tokenizer, edits[: counts[-1]])
    said = {
        "counts": " ".join(map(str, counts)),
        "asked": asked,
        "together": together,
        "texts": texts,
        "code": rows.code_fingerprint(("study.sequential",)),
    }
    unit = rows.unit_key(method.name, **said, **study.conditions, **marks)
    if not rows.done(study.paths, study.name, unit, marks):
        frame = _spared(
            study,
            method,
            lambda: _reached((_at_once if together else _one_by_one)(study, method, counts, asked)),
        )
        study.append(unit, frame.assign(method=method.name, **choices, **marks))
    study.units.append(unit)


def _spared(study: Study, method: Method, written: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The rows of a whole sequence, begun anew in a way that takes less where memory runs out."""
    while True:
        try:
            with study.thrift.used():
                return written()
        except torch.OutOfMemoryError:
            if not study.spare(method, 1):
                raise


def _reached(checkpoints: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all checkpoints, or of those before a method broke down, which the last one's notes then say."""
    frames: list[pd.DataFrame] = []
    try:
        for frame in checkpoints:
            frames.append(frame)
    except (FloatingPointError, InputError) as error:
        if not frames:
            raise
        frames[-1] = frames[-1].assign(notes=f"broke down before the next count: {error}")
    return pd.concat(frames, ignore_index=True)


def _one_by_one(
    study: Study, method: Method, counts: Sequence[int], asked: int
) -> Iterator[pd.DataFrame]:
    edits = study.dataset.edits
    with (
        sequence(study.model, study.tokenizer, method) as writer,
        _bar(study, method, counts[-1]) as bar,
    ):
        for start, count in zip([0, *counts], counts):
            yield _checkpoint(
                study,
                writer,
                ([edit] for edit in edits[start:count]),
                first_and_last(edits[:count], asked),
            ).pipe(_placed, count)
            bar.update(count - start)


def _at_once(
    study: Study, method: Method, counts: Sequence[int], asked: int
) -> Iterator[pd.DataFrame]:
    edits = study.dataset.edits
    with _bar(study, method, sum(counts)) as bar:
        for count in counts:
            with sequence(study.model, study.tokenizer, method) as writer:
                yield _checkpoint(
                    study, writer, [edits[:count]], first_and_last(edits[:count], asked)
                ).pipe(_placed, count)
            bar.update(count)


def _bar(study: Study, method: Method, edits: int) -> tqdm:
    return tqdm(desc=f"{study.name}: {method.name}", total=edits, mininterval=5)


def _placed(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    return frame.assign(batch=count, batch_size=count, level=f"after {count}")


def _checkpoint(
    study: Study, writer: Writer, batches: Iterator[Sequence[Edit]], asked: Sequence[Edit]
) -> pd.DataFrame:
    """Write the batches one after another, then ask about some edits: their rows, the course in the first."""
    probes = [
        probe for edit in asked for probe in study.dataset.probes[edit.id] if probe.kind in ASKED
    ]
    before, memory, started = study.before, Peak(study.model.device), time.perf_counter()
    trainings = [writer.write(batch) for batch in batches]
    highest, between = memory.mib(), time.perf_counter()
    frame = beside(study.ask(writer.model, probes), before)
    seconds = {"train_seconds": between - started, "answer_seconds": time.perf_counter() - between}
    last = EditRecord(
        trainings[-1].losses,
        sum(one.steps for one in trainings),
        seconds["train_seconds"],
        trainings[-1].stopped,
        writer.norms(),
        study.thrift.notes,
    )
    return with_record(frame.assign(phase="after", peak_mib=highest, **seconds), last)


def views(scores: pd.DataFrame, edits: Sequence[Edit], asked: int) -> pd.DataFrame:
    """What happens to the first edits and to the last, to locality and to a general skill, as edits pile up.

    `scores` is what `rows.primary` gives of this module's rows. Columns: method, count, edit, view and score; of `first
    edits` and `last edits` (the same where all are few) it is that of the original question.
    """
    number = scores["edit"].map({edit.id: place for place, edit in enumerate(edits)})
    original = scores["kind"] == "original"
    chosen = {
        "first edits": original & (number < asked),
        "last edits": original & (number >= scores["batch"] - asked),
        "locality": scores["kind"].isin(SIDES["locality"]),
        "general skill": scores["kind"] == "general",
    }
    parts = [
        scores[mask]
        .groupby(["method", "batch", "edit"], sort=False)["score"]
        .mean()
        .reset_index()
        .assign(view=name)
        for name, mask in chosen.items()
    ]
    return pd.concat(parts, ignore_index=True).rename(columns={"batch": "count"})[
        ["method", "count", "edit", "view", "score"]
    ]
