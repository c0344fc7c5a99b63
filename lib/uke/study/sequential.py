"""Write edits one after another into the same weights, or the first of them at once; ask on the
way, undo at the end."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from uke.data.edits import Edit
from uke.errors import InputError
from uke.methods.catalog import configured, find
from uke.methods.edited import Writer, sequence
from uke.methods.method import EditRecord, Method
from uke.results import compare, rows
from uke.results.metrics import HEADLINE
from uke.study.memory import Peak
from uke.study.score import beside, say_means
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
        "locality": scores["kind"].isin(compare.SIDES["locality"]),
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


class SequenceStudy:
    """Compare methods as edits pile up in the same weights, one after another or all at once.

        study = Study("09_sequential", dataset)
        study = SequenceStudy(study, ["FT-M"], ["LocFT-BF"], [1, 8, 24], 5)
        study.run(section)
        study.views()  # the first edits, the last, locality and a general skill

    `methods` write edit after edit, with settings tuned for one; those in `together` write all edits
    of a count at once, from the unedited weights and with settings tuned for as many. One that does
    both is called `<name> (at once)` there. The first and the last `asked` edits are asked about
    after each count; counts that exceed the dataset are cut to its size.
    """

    def __init__(
        self,
        study: Study,
        methods: Sequence[str],
        together: Sequence[str],
        counts: Sequence[int],
        asked: int,
    ):
        self.study, self.asked, self.said = study, asked, {}
        self.counts = sorted({min(count, len(study.dataset.edits)) for count in counts})
        self.runs = [(find(name, self._configured(1)), self.counts, False) for name in methods]
        self.singly = [method.name for method, *_ in self.runs]
        for name in together:
            for count in (count for count in self.counts if count > 1):
                method = find(name, self._configured(count))
                if method.name in self.singly:
                    method = method.model_copy(update={"name": f"{method.name} (at once)"})
                self.runs.append((method, [count], True))
        self.names = list(dict.fromkeys(method.name for method, *_ in self.runs))

    def _configured(self, size: int) -> dict[str, Method]:
        return configured(self.study.paths.home / "params", self.study.subject.name, size)

    def run(self, section: Any) -> None:
        """Write the rows that are missing, and warn in a section of methods that broke down."""
        section.environment, section.smoke_run = self.study.environment, self.study.smoke_run()
        for method, counts, together in self.runs:
            section.method(method.model_dump() | ({"batch": counts[0]} if together else {}))
            run(self.study, method, counts, self.asked, together)
        for name, own in self.rows.groupby("method", sort=False):
            if (reached := own["batch"].max()) < self.counts[-1]:
                note = own["notes"].dropna().iloc[-1]
                section.warn(
                    f"{name} did not reach {self.counts[-1]} edits: after {reached}, {note}."
                )
        if kinds := compare.lacking(self.rows):
            section.warn(f"The average is without {', '.join(kinds)}: the data has no such probes.")

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of all methods, in their order, by count."""
        every = self.study.read().sort_values("batch", kind="stable")
        return pd.concat([every[every["method"] == name] for name in self.names])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every score by method, count, edit and kind, the average metric among them."""
        found = compare.by_batch(self.rows).rename(columns={"batch_size": "count"})
        return found.drop(columns="batch")

    def final(self) -> pd.DataFrame:
        """Scores after the most edits, with those of the same edits without any (see `scored`)."""
        last = self.rows[self.rows["batch"] == self.counts[-1]].assign(level=None)
        before = self.study.before
        known = before["edit"].isin(last["edit"]) & before["kind"].isin(last["kind"])
        return compare.scored(last, before[known])

    def views(self) -> pd.DataFrame:
        """What happens to the first edits and the last ones, to locality and to a general skill."""
        scores = self.scores.rename(columns={"count": "batch"})
        return views(scores, self.study.dataset.edits, self.asked)

    def fading(self) -> pd.Series:
        """By method, how much better the original question of the last edits is answered than that
        of the first ones after the most edits, the least difference first."""
        views = self.views()
        views = views[views["count"] == self.counts[-1]]
        means = views.groupby(["view", "method"])["score"].mean()
        return (means["last edits"] - means["first edits"]).sort_values()

    def costs(self) -> pd.DataFrame:
        """What a whole sequence costs, all counts added up, and how large its change becomes."""
        units = self.rows.drop_duplicates(["method", "batch"])
        totals = units.groupby("method", sort=False).agg(
            edits=("batch", "max"),
            train_seconds=("train_seconds", "sum"),
            answer_seconds=("answer_seconds", "sum"),
            peak_mib=("peak_mib", "max"),
            change_norm=("change_norm", "last"),
        )
        return totals.reset_index()

    def norms(self) -> pd.DataFrame:
        """The relative norm of all that was changed (`norm`), by method and count."""
        units = self.rows.drop_duplicates(["method", "batch"])
        units = units.rename(columns={"batch": "count", "change_norm": "norm"})
        return units[["method", "count", "norm"]]

    def say(self, section: Any) -> None:
        """Say every mean score, and that of the first and the last edits, in a section."""
        self.said = say_means(section, "sequential", self.scores, ["method", "count", "kind"])
        views = self.views()
        views["view"] = views["view"].str.removesuffix(" edits")
        ends = views[views["view"].isin(["first", "last"])]
        self.said |= say_means(section, "sequential", ends, ["method", "count", "view"])

    def check(self, section: Any) -> None:
        """Check in a section what the conclusion needs."""
        places = {edit.id: at for at, edit in enumerate(self.study.dataset.edits)}
        place, count = self.rows["edit"].map(places), self.rows["batch"]
        asked = (place < self.asked) | (place >= count - self.asked)
        section.check(
            (asked & (place < count)).all(), "only the first and the last edits were asked about"
        )
        counts = self.rows.groupby(["method", "batch"])["edit"].nunique().reset_index()
        every = counts["edit"] == counts["batch"].clip(upper=2 * self.asked)
        section.check(every.all(), "all of them, after every count")
        section.check(
            self.study.unchanged(), "every weight of the model is as it was before the first edit"
        )
