"""Take the committed rows of a study in place of new ones, without a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.project import Paths
from uke.results import compare, rows


class MissingRows(InputError):
    """Committed rows that a notebook needs are not there."""


class Committed:
    """The committed rows of a study: `after` edits, and `before` any.

    labels = {"method": "FT-M", "factor": None, "level": None, "batch_size": 1, "split": "test"}
    Committed(paths, "07_recipe").take(labels, {0: edits[:1], 1: edits[1:2]})
    """

    def __init__(self, paths: Paths, study: str) -> None:
        self.path, self.make = paths.exported(study), paths.command(study)
        self.after, self.before = (
            rows.committed(paths, study, phase) for phase in ("after", "before")
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """The model, data and code that made the rows."""
        first = pd.concat([self.after.head(1), self.before.head(1)]).iloc[0]
        return {name: first[name] for name in ("model", "data", "code")}

    def matching(self, labels: Mapping[str, Any]) -> pd.DataFrame:
        """Return the rows after an edit with these labels."""
        own = self.after
        for column, value in labels.items():
            own = own[own[column].isna() if value is None else own[column] == value]
        return own

    def take(
        self, labels: Mapping[str, Any], batches: Mapping[int, Sequence[Edit]]
    ) -> pd.DataFrame:
        """Return the rows with these labels of these batches, by their number.

        MissingRows where a batch has no rows, or those of other edits.
        """
        own = self.matching(labels)
        own = own[own["batch"].isin(list(batches))]
        found = own.groupby("batch")["edit"].agg(set).to_dict()
        for batch, edits in batches.items():
            if found.get(batch) != {edit.id for edit in edits}:
                names = [f"{name} {value}" for name, value in labels.items() if value is not None]
                raise self._missing(f"{', '.join(names)}, batch {batch}")
        return own

    def weaker(self, whole: pd.DataFrame) -> pd.DataFrame:
        """Return what there is of these rows' edits at other strengths."""
        at, places = ["method", "batch_size", "batch"], self.after.set_index
        own = places(at).index.isin(whole.set_index(at).index)
        return self.after[own & (self.after["factor"] == compare.STRENGTH)]

    def unedited(self, probes: Sequence[Probe]) -> pd.DataFrame:
        """Return the rows of the unedited model on these probes."""
        wanted = [(probe.edit, probe.kind, probe.number) for probe in probes]
        found = self.before.set_index(["edit", "kind", "number"]).index.isin(wanted)
        if found.sum() != len(wanted):
            raise self._missing("the unedited model")
        return self.before[found]

    def _missing(self, what: str) -> MissingRows:
        return MissingRows(f"{self.path}: no rows of {what} on these edits; make them: {self.make}")
