"""Let edits pile up in the same weights, one by one or at once, and query them on the way."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
from tqdm import tqdm

from uke.data.edits import KINDS, Edit, in_group
from uke.errors import InputError
from uke.methods.catalog import configured, find
from uke.methods.edited import sequence
from uke.methods.method import EditRecord, Method
from uke.project import code_fingerprint, unit_key
from uke.results import compare, rows
from uke.study.comparison import Comparison, attempt, say_means
from uke.study.memory import Peak
from uke.study.study import Study, measure_for

FACTOR = "count"  # what the rows vary: how many edits the weights hold
QUERIED = tuple(kind for kind in KINDS if kind != "multi_hop")


def first_and_last(written: Sequence[Edit], number: int) -> list[Edit]:
    """Return the first `number` edits and the last `number`, each once."""
    return [*written[:number], *written[max(number, len(written) - number) :]]


def run(
    study: Study, method: Method, counts: Sequence[int], queried: int, together: bool = False
) -> None:
    """Store rows of the first and the last `queried` edits after each of `counts` edits.

    The whole sequence is one unit, begun anew with less where memory runs out. Every edit is
    trained to its end before the next, on top of it; with `together` the edits between two counts
    are trained at once. Seconds are those since the count before. InputError for counts or
    `queried` out of range.
    """
    edits, counts = study.dataset.edits, sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > len(edits) or queried < 1:
        raise InputError(
            f"study {study.name}: counts {counts}, queried {queried}: "
            f"expected numbers from 1 to {len(edits)}, the edits there are"
        )
    labels = {"method": method.name, "factor": FACTOR, "split": study.dataset.split}
    if study.committed:
        for count in counts:
            own = labels | {"level": f"after {count}", "batch_size": count}
            batch = {count: first_and_last(edits[:count], queried)}
            study.taken.append(study.committed.take(own, batch))
        return
    measure_for(method, study.model, study.tokenizer)
    fingerprints = study.fingerprints | {"recipe": method.fingerprint}
    choices = {
        "counts": " ".join(map(str, counts)),
        "queried": queried,
        "together": together,
        "texts": method.depends_on(study.model),
        "code": code_fingerprint(("study.sequential",)),
    }
    unit = unit_key(method.name, **choices, **study.conditions, **fingerprints)
    if not rows.done(study.paths, study.name, unit, fingerprints):
        method.examples(study.model, study.tokenizer, edits[: counts[-1]])
        labels |= {"learning_rate": method.learning_rate, "seed": method.seed}
        frames = _checkpoints(study, method, counts, queried, together)
        frame = pd.concat(frames, ignore_index=True).assign(**labels, **fingerprints)
        rows.append(study.paths, study.name, unit, frame)
    study.units.append(unit)


def _checkpoints(
    study: Study, method: Method, counts: Sequence[int], queried: int, together: bool
) -> Iterator[pd.DataFrame]:
    """Write the edits up to each count, then score probes of the first and the last of them."""
    edits, name = study.dataset.edits, f"{study.name}: {method.name}"
    unedited = study.before, study.expected
    with (
        tqdm(desc=name, total=counts[-1], mininterval=5, delay=5) as bar,
        sequence(study.model, study.tokenizer, method) as writer,
    ):
        for start, count in zip([0, *counts], counts, strict=False):
            probes = [
                probe
                for edit in first_and_last(edits[:count], queried)
                for probe in study.dataset.probes[edit.id]
                if probe.kind in QUERIED
            ]
            batch = edits[start:count]
            peak, started = Peak(study.model.device), time.perf_counter()
            groups = [batch] if together else [[edit] for edit in batch]
            trainings = [writer.write(group) for group in groups]
            cost = {"train_seconds": time.perf_counter() - started, "peak_mib": peak.mib()}
            labels = {"batch": count, "batch_size": count, "level": f"after {count}"}
            written = dict.fromkeys([edit.id for edit in edits[:count]], edits[:count])
            frame = study.scored(writer.model, probes, unedited, written).assign(**labels, **cost)
            steps = sum(training.steps for training in trainings)
            record = EditRecord(trainings[-1].losses, steps, writer.norms())
            yield study.recorded(frame, record)
            bar.update(len(batch))


class SequenceStudy(Comparison):
    """Compare methods as edits pile up in the same weights, one after another or all at once.

        study = Study("09_sequential", dataset)
        sequences = SequenceStudy(study, ["FT-M"], ["LocFT-BF"], [1, 8, 24], 5)
        sequences.run(section)
        sequences.views()  # the first edits, the last, locality and a general skill

    `methods` write edit after edit, tuned for one; those in `together` write all edits of a count
    at once, tuned for as many, and are called `<name> (at once)` if they do both. The first and the
    last `queried` edits are queried after each count; counts are cut to the size of the dataset.
    """

    divisible = False  # what is written hangs on all that was written before

    def __init__(
        self,
        study: Study,
        methods: Sequence[str],
        together: Sequence[str],
        counts: Sequence[int],
        queried: int,
    ):
        super().__init__(study)
        self.queried = queried
        self.counts = sorted({min(count, len(study.dataset.edits)) for count in counts})
        params, model = study.paths.home / "params", study.subject.name
        singly = [find(name, configured(params, model)) for name in methods]
        self.singly = [method.name for method in singly]
        self.runs = [(method, {"counts": self.counts}) for method in singly]
        for name, count in product(together, self.counts):
            method = find(name, configured(params, model, count))
            if method.name in self.singly:
                method = method.model_copy(update={"name": f"{method.name} (at once)"})
            if count > 1:
                self.runs.append((method, {"counts": [count], "together": True}))
        self.cells = self.names = list(dict.fromkeys(method.name for method, _ in self.runs))

    def write(self, method: Method, options: dict[str, Any]) -> str | None:
        return attempt(run, self.study, method, queried=self.queried, **options)

    def read(self) -> pd.DataFrame:
        return self.study.read().sort_values("batch", kind="stable")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every score by method, count, edit and kind, the average metric among them."""
        found = compare.scored(self.rows, self.study.before, False).rename(
            columns={"batch_size": "count"}
        )
        return found.drop(columns=["batch", "level", "cell"])

    def final(self) -> pd.DataFrame:
        """Scores after the most edits, with those of the same edits without any (see `scored`)."""
        last = self.rows[self.rows["batch"] == self.counts[-1]].assign(level=None)
        return compare.scored(last, self.study.before)

    def views(self) -> pd.DataFrame:
        """Score the original question of the first and the last edits, locality, a general skill.

        Columns: method, count, edit, view, score. Where edits are few, the first are the last.
        """
        edits = [edit.id for edit in self.study.dataset.edits]
        scores, places = self.scores, self.scores["edit"].map(edits.index)
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

    def say(self, section: Any) -> None:
        """Say every mean score, and that of the first and the last edits, in a section."""
        self.said = say_means(section, "sequential", self.scores, ["method", "count", "kind"])
        views = self.views()
        views["view"] = views["view"].str.removesuffix(" edits")
        ends = views[views["view"].isin(["first", "last"])]
        self.said |= say_means(section, "sequential", ends, ["method", "count", "view"])

    def check(self, section: Any) -> None:
        """Check that nothing is missing, and that every edit was undone."""
        counts = self.rows.groupby(["method", "batch"])["edit"].nunique().reset_index()
        every = counts["edit"] == counts["batch"].clip(upper=2 * self.queried)
        section.check(every.all(), "the first and the last edits were queried after every count")
        super().check(section)
