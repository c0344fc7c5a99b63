"""Take the committed rows of a study in place of new ones, unit by unit, without a model."""

from collections.abc import Iterable
from functools import cached_property

import pandas as pd

from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.project import Paths
from uke.results import rows

UNIT = ["method", "factor", "level", "batch_size", "split", "batch"]


class MissingRows(InputError):
    """Committed rows that a notebook needs are not there."""


class Committed:
    """The committed rows of a study.

    committed = Committed(paths, "07_recipe")
    unit = committed.unit("FT-M", None, None, 1, "test", 0, edits[:1])
    committed.read([unit])
    """

    def __init__(self, paths: Paths, study: str) -> None:
        self.paths, self.study = paths, study

    @cached_property
    def after(self) -> pd.DataFrame:
        """All rows after edits, each with the name of its unit."""
        frame = rows.committed(self.paths, self.study)
        frame = frame.astype({"batch": int, "batch_size": int})  # the unedited rows have none
        names = [_name(*values) for values in frame[UNIT].itertuples(index=False)]
        return frame.assign(unit=names)

    @cached_property
    def _edits(self) -> dict[str, set[str]]:
        return self.after.groupby("unit")["edit"].agg(set).to_dict()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The model, data and code that made the rows."""
        frames = (self.after, rows.committed(self.paths, self.study, "before"))
        first = pd.concat(frame.head(1) for frame in frames).iloc[0]
        return {name: first[name] for name in ("model", "data", "code")}

    def unit(
        self,
        method: str,
        factor: str | None,
        level: str | None,
        batch_size: int,
        split: str,
        batch: int,
        edits: Iterable[Edit],
    ) -> str:
        """Return the name of a unit for `read`; MissingRows where it has not these very edits."""
        unit = _name(method, factor, level, batch_size, split, batch)
        if self._edits.get(unit) != {edit.id for edit in edits}:
            raise self._missing(unit)
        return unit

    def read(self, units: Iterable[str]) -> pd.DataFrame:
        """Return the rows of these units."""
        chosen = self.after["unit"].isin(list(units))
        return self.after[chosen].drop(columns="unit").reset_index(drop=True)

    def before(self, probes: Iterable[Probe]) -> pd.DataFrame:
        """Return the rows of the unedited model on these probes."""
        frame = rows.committed(self.paths, self.study, "before")
        wanted = {(probe.edit, probe.kind, probe.number) for probe in probes}
        found = frame.set_index(["edit", "kind", "number"]).index.isin(list(wanted))
        if found.sum() != len(wanted):
            raise self._missing("the unedited model")
        return frame[found].assign(before=frame["answer"]).reset_index(drop=True)

    def _missing(self, what: str) -> MissingRows:
        notebooks = [path.stem for path in (self.paths.home / "notebooks").glob("*.ipynb")]
        notebook = max(filter(self.study.startswith, notebooks), key=len, default=self.study)
        run = f"python -m uke run {notebook} --profile {self.paths.profile}"
        run += "" if self.paths.data == "world" else f" --data {self.paths.data}"
        path = self.paths.exported(self.study)
        return MissingRows(f"{path}: no rows of {what} on these edits; make them with `{run}`")


def _name(
    method: str, factor: str | None, level: str | None, batch_size: int, split: str, batch: int
) -> str:
    labels = [label for label in (factor, level) if not pd.isna(label)]
    return ", ".join([method, *labels, f"batch {batch} of size {batch_size}, split {split}"])
