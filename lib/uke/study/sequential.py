"""Write edits one after another into the same weights, or the first of them at once, and query them
on the way."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from uke.data.edits import KINDS, Edit, in_group
from uke.errors import InputError
from uke.methods.catalog import configured, find
from uke.methods.edited import Writer, sequence
from uke.methods.method import EditRecord, Method
from uke.project import code_fingerprint, unit_key
from uke.results import compare, rows
from uke.study.factor import say_means
from uke.study.memory import Peak
from uke.study.score import with_before
from uke.study.study import Study, with_record

FACTOR = "count"  # what the rows vary: how many edits the weights hold
QUERIED = tuple(kind for kind in KINDS if kind != "multi_hop")


def first_and_last(written: Sequence[Edit], number: int) -> list[Edit]:
    """Return the first `number` edits and the last `number`, each once."""
    return [*written[:number], *written[max(number, len(written) - number) :]]


def run(
    study: Study, method: Method, counts: Sequence[int], queried: int, together: bool = False
) -> None:
    """Store rows of the first and the last `queried` edits after each of `counts` edits, one unit
    for the whole sequence.

    Depth first, every edit is trained to its end before the next, on top of it. With `together`,
    breadth first, the first n edits are trained at once from the unedited weights, for each n anew.
    Seconds are those since the count before. Where a method breaks down on the way, the rows end
    with the last count it reached, and their notes say why; it raises where it reached none.
    InputError for counts or `queried` below 1, or more edits than there are.
    """
    edits, counts = study.dataset.edits, sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > len(edits) or queried < 1:
        raise InputError(
            f"study {study.name}: counts {counts}, queried {queried}: "
            f"expected numbers from 1 to {len(edits)}, the edits there are"
        )
    if rows.use_committed():
        _take_committed(study, method, counts, queried)
        return
    fingerprints = study.fingerprints | {"recipe": method.fingerprint}
    choices = {
        "counts": " ".join(map(str, counts)),
        "queried": queried,
        "together": together,
        "texts": study.depends_on(method),
        "code": code_fingerprint(("study.sequential",)),
    }
    unit = unit_key(method.name, **choices, **study.conditions, **fingerprints)
    if not rows.done(study.paths, study.name, unit, fingerprints):
        method.examples(study.model, study.tokenizer, edits[: counts[-1]])
        frame = _within_memory(study, method, counts, queried, together)
        columns = {"method": method.name, "factor": FACTOR, "split": study.dataset.split}
        columns |= {"learning_rate": method.learning_rate, "seed": method.seed}
        study.append(unit, frame.assign(**columns, **fingerprints))
    study.units.append(unit)


def _take_committed(study: Study, method: Method, counts: Sequence[int], queried: int) -> None:
    for count in counts:
        try:
            chosen = first_and_last(study.dataset.edits[:count], queried)
            study.take_committed(method.name, count, count, chosen, FACTOR, f"after {count}")
        except InputError:
            own = study.read() if study.units else pd.DataFrame({"method": [], "notes": []})
            notes = own.loc[own["method"] == method.name, "notes"].dropna()
            if notes.empty or not notes.iloc[-1].startswith("broke down"):
                raise
            return


def _within_memory(study: Study, method: Method, *options) -> pd.DataFrame:
    """Return the rows of a whole sequence, begun anew with less memory where it runs out."""
    while True:
        try:
            with study.subject.fallbacks.active():
                return _until_broken(_checkpoints(study, method, *options))
        except torch.OutOfMemoryError:
            if not study.take_less_memory(method, 1):
                raise


def _until_broken(checkpoints: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all checkpoints, or of those before a method broke down, as the last one's
    notes then say."""
    frames: list[pd.DataFrame] = []
    try:
        for frame in checkpoints:
            frames.append(frame)
    except (FloatingPointError, InputError) as error:
        if not frames:
            raise
        frames[-1] = frames[-1].assign(notes=f"broke down before the next count: {error}")
    return pd.concat(frames, ignore_index=True)


def _checkpoints(
    study: Study, method: Method, counts: Sequence[int], queried: int, together: bool
) -> Iterator[pd.DataFrame]:
    edits, model, tokenizer = study.dataset.edits, study.model, study.tokenizer
    total = sum(counts) if together else counts[-1]
    with tqdm(desc=f"{study.name}: {method.name}", total=total, mininterval=5) as bar:
        if together:
            for count in counts:
                with sequence(model, tokenizer, method) as writer:
                    yield _checkpoint(study, writer, [edits[:count]], count, queried)
                bar.update(count)
            return
        with sequence(model, tokenizer, method) as writer:
            for start, count in pairwise([0, *counts]):
                batches = [[edit] for edit in edits[start:count]]
                yield _checkpoint(study, writer, batches, count, queried)
                bar.update(count - start)


def _checkpoint(
    study: Study, writer: Writer, batches: Sequence[Sequence[Edit]], count: int, queried: int
) -> pd.DataFrame:
    """Write the batches one after another, then score probes of some edits; the loss curve is that
    of the last batch."""
    probes = [
        probe
        for edit in first_and_last(study.dataset.edits[:count], queried)
        for probe in study.dataset.probes[edit.id]
        if probe.kind in QUERIED
    ]
    before, peak, started = study.before, Peak(study.model.device), time.perf_counter()
    trainings = [writer.write(batch) for batch in batches]
    trained, highest = time.perf_counter(), peak.mib()
    frame = with_before(study.answer_and_score(writer.model, probes), before)
    frame = frame.assign(
        phase="after",
        batch=count,
        batch_size=count,
        level=f"after {count}",
        peak_mib=highest,
        train_seconds=trained - started,
        answer_seconds=time.perf_counter() - trained,
    )
    record = EditRecord(
        losses=trainings[-1].losses,
        steps=sum(training.steps for training in trainings),
        seconds=trained - started,
        stopped=trainings[-1].stopped,
        change_norm=writer.norms(),
        notes=study.subject.fallbacks.notes,
    )
    return with_record(frame, record)


def views(scores: pd.DataFrame, edits: Sequence[Edit], queried: int) -> pd.DataFrame:
    """Show what happens to the first edits and to the last, to locality and to a general skill, as
    edits pile up.

    `scores` is what `rows.primary` gives of this module's rows. Columns: method, count, edit, view,
    score; of `first edits` and `last edits` (the same where all are few) it is that of the original
    question.
    """
    index = scores["edit"].map({edit.id: index for index, edit in enumerate(edits)})
    original = scores["kind"] == "original"
    chosen = {
        "first edits": original & (index < queried),
        "last edits": original & (index >= scores["batch"] - queried),
        "locality": scores["kind"].isin(in_group("locality")),
        "general skill": scores["kind"].isin(in_group("skill")),
    }
    by = ["method", "batch", "edit"]
    parts = [
        scores[mask].groupby(by, sort=False)["score"].mean().reset_index().assign(view=view)
        for view, mask in chosen.items()
    ]
    found = pd.concat(parts, ignore_index=True).rename(columns={"batch": "count"})
    return found[["method", "count", "edit", "view", "score"]]


class SequenceStudy:
    """Compare methods as edits pile up in the same weights, one after another or all at once.

        study = Study("09_sequential", dataset)
        study = SequenceStudy(study, ["FT-M"], ["LocFT-BF"], [1, 8, 24], 5)
        study.run(section)
        study.views()  # the first edits, the last, locality and a general skill

    `methods` write edit after edit, with settings tuned for one; those in `together` write all
    edits of a count at once, from the unedited weights and with settings tuned for as many. One
    that does both is called `<name> (at once)` there. The first and the last `queried` edits are
    queried after each count; counts that exceed the dataset are cut to its size.
    """

    def __init__(
        self,
        study: Study,
        methods: Sequence[str],
        together: Sequence[str],
        counts: Sequence[int],
        queried: int,
    ):
        self.study, self.queried, self.said = study, queried, {}
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
            run(self.study, method, counts, self.queried, together)
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
        return views(scores, self.study.dataset.edits, self.queried)

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
        queried = (place < self.queried) | (place >= count - self.queried)
        section.check(
            (queried & (place < count)).all(), "only the first and the last edits were queried"
        )
        counts = self.rows.groupby(["method", "batch"])["edit"].nunique().reset_index()
        every = counts["edit"] == counts["batch"].clip(upper=2 * self.queried)
        section.check(every.all(), "all of them, after every count")
        section.check(
            self.study.unchanged(), "every weight of the model is as it was before the first edit"
        )
