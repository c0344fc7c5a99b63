"""The positive control of every method: answers cut to a few tokens, each written alone."""

from collections.abc import Mapping, Sequence
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
# What a baseline that fails with its tuned settings is tried again with, one after another until it
# passes: as published, and then also with what its paper gives it on other models.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as published": {},
    "200 steps, windows of 10": {"steps": 200, "unke_steps": 200, "window": 10},
    "six layers too": {"layers": tuple(eighth / 8 for eighth in range(1, 7))},
}


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
    have the factor `tokens` and the length as level. With `again` the baselines that fail are
    written as VARIANTS have them, whose levels are as "75 as published".
    """

    by, averaged = ["method", "level"], False

    def __init__(
        self,
        dataset: Dataset,
        model: str | Subject,
        methods: Sequence[str] = (),
        lengths: Sequence[int] = (5, 10, 20, 40, 75),
        again: bool = False,
    ):
        self.again = again
        subject = model if isinstance(model, Subject) else Subject(model)
        tokenizer = None if rows.use_committed() else subject.tokenizer
        self.studies = {
            str(tokens): _Cut(control.STUDY, dataset.cut(tokens, tokenizer), subject, False)
            for tokens in sorted(set(lengths))
        }
        super().__init__(next(iter(self.studies.values())))
        params = dataset.paths.home / "params", subject.name
        self.names, tuned = self.study.with_rows(writers(*params, methods)), configured(*params)
        self.baselines = [name for name in self.names if tuned[name].family in BASELINES]
        self.published = configured(*params, tuned=False)
        self.cells: list[tuple[str, str]] = []
        self._plan(tuned, self.names)

    def _plan(
        self, settings: Mapping[str, Method], names: Sequence[str], variant: str = ""
    ) -> None:
        """Plan to write every length with these methods; what is planned is in `runs`."""
        cells = [(name, f"{tokens} {variant}".strip()) for name in names for tokens in self.studies]
        self.cells += cells
        self.runs = [
            (settings[name].model_copy(update=OPEN), {"factor": "tokens", "level": level})
            for name, level in cells
        ]

    def run(self, section: Any) -> None:
        super().run(section)
        failing, settings = {name: name for name in self.baselines}, dict(self.published)
        for variant, more in VARIANTS.items() if self.again else ():
            reasons = control.untestable(control.summary(self.measured), [*failing.values()])
            failing = {name: last for name, last in failing.items() if last in reasons}
            settings |= {name: settings[name].model_copy(update=more) for name in failing}
            if self.study.committed:
                after = self.study.committed.after
                ran = set(after.loc[after["level"].str.endswith(variant, na=False), "method"])
                failing = {name: last for name, last in failing.items() if name in ran}
            failing = {name: f"{name}, {variant}" for name in failing}
            self._plan(settings, list(failing), variant)
            super().run(section)
            vars(self).pop("rows", None)

    def write(self, method: Method, options: dict[str, Any]) -> str | None:
        tokens = options["level"].partition(" ")[0]
        return attempt(self.studies[tokens].run, method, **options)

    def read(self) -> pd.DataFrame:
        return pd.concat([one.read() for one in self.studies.values()])

    @property
    def parts(self) -> list[Study]:
        return list(self.studies.values())

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
