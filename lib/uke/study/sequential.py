"""Write edits one after another into the same weights, or the first of them at once, and query them
on the way."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
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
from uke.study.committed import MissingRows
from uke.study.memory import Peak
from uke.study.say import begin, check_unchanged, say_means, warn_of_lacking
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
    """Store rows of the first and the last `queried` edits after each of `counts` edits.

    The whole sequence is one unit. Depth first, every edit is trained to its end before the next,
    on top of it. With `together`, breadth first, the first n edits are trained at once from the
    unedited weights, for each n anew. Seconds are those since the count before. Where a method
    breaks down on the way, the rows end with the last count it reached, and their notes say why;
    it raises where it reached none. InputError for counts or `queried` out of range.
    """
    edits, counts = study.dataset.edits, sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > len(edits) or queried < 1:
        raise InputError(
            f"study {study.name}: counts {counts}, queried {queried}: "
            f"expected numbers from 1 to {len(edits)}, the edits there are"
        )
    if study.committed:
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
    """Take the committed rows of each count, up to where the method broke down."""
    split, units = study.dataset.split, []
    for count in counts:
        chosen = first_and_last(study.dataset.edits[:count], queried)
        labels = (method.name, FACTOR, f"after {count}", count, split, count)
        try:
            units.append(study.committed.unit(*labels, chosen))
        except MissingRows:
            notes = study.committed.read(units)["notes"].dropna()
            if not notes.str.startswith("broke down").any():
                raise
            break
    study.units += units


def _within_memory(study: Study, method: Method, *options: Any) -> pd.DataFrame:
    """Return the rows of a whole sequence, begun anew with less memory where it runs out."""
    while True:
        try:
            with study.subject.fallbacks.active():
                return _until_broken(_checkpoints(study, method, *options))
        except torch.OutOfMemoryError:
            if not study.take_less_memory(method, 1):
                raise


def _until_broken(checkpoints: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all checkpoints before a method broke down, as the last notes then say."""
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
            for start, count in zip([0, *counts], counts, strict=False):
                batches = [[edit] for edit in edits[start:count]]
                yield _checkpoint(study, writer, batches, count, queried)
                bar.update(count - start)


def _checkpoint(
    study: Study, writer: Writer, batches: Sequence[Sequence[Edit]], count: int, queried: int
) -> pd.DataFrame:
    """Write the batches one after another, then score probes of the first and the last edits."""
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
        stopped=trainings[-1].stopped,
        change_norm=writer.norms(),
        notes=study.subject.fallbacks.notes,
    )
    return with_record(frame, record)


class SequenceStudy:
    """Compare methods as edits pile up in the same weights, one after another or all at once.

        study = Study("09_sequential", dataset)
        sequences = SequenceStudy(study, ["FT-M"], ["LocFT-BF"], [1, 8, 24], 5)
        sequences.run(section)
        sequences.views()  # the first edits, the last, locality and a general skill

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
        params, model = study.paths.home / "params", study.subject.name
        singly = configured(params, model, 1)
        self.runs = [(find(name, singly), self.counts, False) for name in methods]
        self.singly = [method.name for method, *_ in self.runs]
        for name in together:
            for count in self.counts:
                method = find(name, configured(params, model, count))
                if method.name in self.singly:
                    method = method.model_copy(update={"name": f"{method.name} (at once)"})
                if count > 1:
                    self.runs.append((method, [count], True))
        self.names = list(dict.fromkeys(method.name for method, *_ in self.runs))

    def run(self, section: Any) -> None:
        """Write the rows that are missing, and warn in a section of methods that broke down."""
        begin(self.study, section)
        for method, counts, together in self.runs:
            section.method(method.model_dump() | ({"batch": counts[0]} if together else {}))
            run(self.study, method, counts, self.queried, together)
        for name, own in self.rows.groupby("method", sort=False):
            if (reached := own["batch"].max()) < self.counts[-1]:
                note = own["notes"].dropna().iloc[-1]
                section.warn(
                    f"{name} did not reach {self.counts[-1]} edits: after {reached}, {note}."
                )
        warn_of_lacking(self.rows, section)

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
        """What happens to the first edits and the last, to locality and to a general skill.

        Columns: method, count, edit, view, score; of `first edits` and `last edits` (the same
        where all are few) it is that of the original question.
        """
        scores, places = self.scores, self._places(self.scores)
        original = scores["kind"] == "original"
        chosen = {
            "first edits": original & (places < self.queried),
            "last edits": original & (places >= scores["count"] - self.queried),
            "locality": scores["kind"].isin(in_group("locality")),
            "general skill": scores["kind"].isin(in_group("skill")),
        }
        by = ["method", "count", "edit"]
        parts = [
            scores[mask].groupby(by, sort=False)["score"].mean().reset_index().assign(view=view)
            for view, mask in chosen.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def _places(self, frame: pd.DataFrame) -> pd.Series:
        """Return the place of each row's edit in the sequence."""
        edits = [edit.id for edit in self.study.dataset.edits]
        return frame["edit"].map(dict(zip(edits, range(len(edits)), strict=True)))

    def fading(self) -> pd.Series:
        """By method, how much better the last edits are answered than the first, least first."""
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
        places, count = self._places(self.rows), self.rows["batch"]
        queried = (places < self.queried) | (places >= count - self.queried)
        section.check(
            (queried & (places < count)).all(), "only the first and the last edits were queried"
        )
        counts = self.rows.groupby(["method", "batch"])["edit"].nunique().reset_index()
        every = counts["edit"] == counts["batch"].clip(upper=2 * self.queried)
        section.check(every.all(), "all of them, after every count")
        check_unchanged(self.study, section)
