"""The positive control of every method: answers cut to a few tokens, each written alone."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uke.data.edits import Probe
from uke.methods.catalog import configured
from uke.methods.method import Method
from uke.results import control, rows
from uke.study.comparison import Comparison, attempt
from uke.study.dataset import Dataset
from uke.study.methods import BASELINES, writers
from uke.study.study import Study, Subject

OPEN = {"end_of_turn": False}  # a text that breaks off does not end: its end is not written


class _Cut(Study):
    """A study whose answers are cut where their references are."""

    def token_limit(self, probe: Probe) -> int:
        return len(self.tokenizer(probe.reference, add_special_tokens=False)["input_ids"])


class ControlStudy(Comparison):
    """Write the first tokens of each edit's answer with every method, at several lengths.

        controls = ControlStudy(dataset, "embedded", ["MEMIT"], [5, 10, 75])
        controls.run(section)
        control.summary(controls.measured)

    No `methods` stand for all that write a single edit into the weights, as tuned for the model but
    for the end of the turn, which is not written. An answer has as many tokens as the text. Rows
    have the factor `tokens` and the length as level.
    """

    by, averaged = ["method", "level"], False

    def __init__(
        self,
        dataset: Dataset,
        model: str | Subject,
        methods: Sequence[str] = (),
        lengths: Sequence[int] = (5, 10, 20, 40, 75),
    ):
        subject = model if isinstance(model, Subject) else Subject(model)
        tokenizer = None if rows.use_committed() else subject.loaded[1]
        self.studies = {
            str(tokens): _Cut(control.STUDY, dataset.cut(tokens, tokenizer), subject, False)
            for tokens in sorted(set(lengths))
        }
        super().__init__(next(iter(self.studies.values())))
        params = dataset.paths.home / "params", subject.name
        self.names, tuned = self.study.with_rows(writers(*params, methods)), configured(*params)
        self.baselines = [name for name in self.names if tuned[name].family in BASELINES]
        self.cells = [(name, level) for name in self.names for level in self.studies]
        self.runs = [
            (tuned[name].model_copy(update=OPEN), {"factor": "tokens", "level": level})
            for name, level in self.cells
        ]

    def write(self, method: Method, options: dict[str, Any]) -> str | None:
        return attempt(self.studies[options["level"]].run, method, **options)

    def read(self) -> pd.DataFrame:
        return pd.concat([one.read() for one in self.studies.values()])

    @property
    def before(self) -> pd.DataFrame:
        """What the unedited model answers to the questions of all lengths."""
        return pd.concat([one.before for one in self.studies.values()])

    @property
    def measured(self) -> pd.DataFrame:
        """Every measure of every cut edit, by method (and `no edit`) and tokens."""
        return control.measured(self.rows, self.before)

    def check(self, section: Any) -> None:
        """Check that no row is missing, and that every edit was undone."""
        counts = self.rows.groupby(self.by)["edit"].nunique().reindex(self.cells)
        every = counts.eq(len(self.study.dataset.edits)).all()
        section.check(every, "every method wrote every length of every edit")
        super().check(section)

    def export(self) -> None:
        """Write the committed rows, those without an edit among them."""
        rows.export(self.study.paths, control.STUDY, pd.concat([self.rows, self.before]))
