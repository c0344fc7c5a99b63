"""What comparisons of levels, methods and sequences share: runs, rows in order, numbers."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from uke.errors import InputError
from uke.methods.catalog import key
from uke.methods.method import Method
from uke.results import compare
from uke.results.stats import summarise
from uke.study.committed import MissingRows
from uke.study.study import UNEDITED, Study


class Comparison:
    """Cells of a study side by side, a cell being a method or a method at a level.

    `runs` has each method with the options of `Study.run`. `by` names the columns that tell cells
    apart, `cells` has their values in the order of tables. `said` holds what was said, by key.
    """

    by: str | list[str] = "method"
    averaged = True  # over the kinds of probe
    divisible = True  # into shares of the edits
    cells: Sequence[Any]
    runs: list[tuple[Method, dict[str, Any]]]

    def __init__(self, study: Study) -> None:
        self.study = study
        self.said: dict[str, str] = {}

    def run(self, section: Any) -> None:
        """Write the rows that are missing, and warn in a section of what a reader must know."""
        section.environment, section.smoke_run = self.study.environment, self.study.smoke_run()
        for method, options in self.runs:
            size = {"batch": options["batch_size"]} if "batch_size" in options else {}
            section.method(method.model_dump() | size)
            if fault := self.write(method, options):
                level = f", {compare.label(options['level'])}" if "level" in options else ""
                section.warn(f"{method.name}{level}: failed ({fault})")
        if self.averaged and (kinds := compare.lacking(self.rows)):
            section.warn(f"The average is without {', '.join(kinds)}: the data has no such probes.")

    @property
    def parts(self) -> list[Study]:
        """The studies whose rows are compared."""
        return [self.study]

    def jobs(self) -> dict[tuple[str, int], list[int]]:
        """Return how many edits each run of a method at a batch size writes."""
        found: dict[tuple[str, int], list[int]] = {}
        for method, options in self.runs:
            size, edits = options.get("batch_size", 1), len(self.study.dataset.edits)
            edits = min(options.get("limit") or edits, *options.get("counts", [edits])[-1:], edits)
            found.setdefault((method.name, size), []).append(edits)
        return found

    def share(self, name: str, size: int, part: tuple[int, int], section: Any = None) -> None:
        """Write a part of a method's rows at a batch size, or all that precede any edit.

        So jobs of a cluster divide what `run` does, which then finds its rows.
        """
        if name == UNEDITED:
            for study in self.parts:
                study.prepare([method for method, _ in self.runs])
        given = {"part": part} if self.divisible else {}
        for method, options in self.runs:
            if (method.name, options.get("batch_size", 1)) == (name, size):
                self.write(method, options | given)

    def write(self, method: Method, options: dict[str, Any]) -> str | None:
        """Write the rows of one run; return why it failed where the others go on without it."""
        return attempt(self.study.run, method, **options)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of all cells, in their order."""
        found = dict(list(self.read().groupby(self.by)))
        return pd.concat([found[cell] for cell in self.cells if cell in found])

    def read(self) -> pd.DataFrame:
        """Return the rows of the study that belong to the comparison."""
        return self.study.read()

    def check(self, section: Any) -> None:
        """Check in a section that every edit was undone."""
        text = "every weight of the model is as it was before the first edit"
        section.check(self.study.unchanged(), text)


def by_minibatches(method: Method) -> bool:
    """Whether edits are written in minibatches, of which a single one says nothing."""
    return getattr(method, "batch_size", None) is not None


def attempt(run: Callable[..., None], *given: Any, **options: Any) -> str | None:
    """Run; return the error message of a trial that fails. Missing committed rows still raise."""
    try:
        run(*given, **options)
    except MissingRows:
        raise
    except (FloatingPointError, InputError) as error:
        return str(error)
    return None


def say_means(
    section: Any, prefix: str, scores: pd.DataFrame, by: Sequence[str], unit: str = ""
) -> dict[str, str]:
    """Say the mean score of every group with its interval, and return what was said by key, as
    `single.ft_uke.average`: "0.69 [0.67, 0.71], n = 40"."""
    said = {}
    for row in summarise(scores, by).to_dict("records"):
        parts = [key(row[name]) if name == "method" else str(row[name]) for name in by]
        name = ".".join([prefix, *parts])
        said[name] = section.say(name, row["mean"], row["low"], row["high"], n=row["n"], unit=unit)
    return said


def say_contrasts(section: Any, name: str, contrasts: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Say these (`compare.contrasts`), key and kind put into the name; return all by both."""
    said = {}
    for row in contrasts.itertuples():
        own, ends = name.format(key(row.effect), row.kind), (row.low, row.high)
        text = section.say(own, row.difference, *ends, n=row.n, unit="points")
        said[row.effect, row.kind] = text
    return said


def say_leads(
    section: Any, name: str, leads: pd.DataFrame, untestable: Mapping[str, str] = {}
) -> dict[int, str]:
    """Say each of these leads (`compare.leads`), and return the first of each batch size as said.

    `{}` in the name, which ends in `lead`, stands for the batch size. A lead over a baseline that
    is not testable is void.
    """
    said: dict[int, str] = {}
    for row in leads.itertuples():
        own = name.format(row.batch_size).removesuffix("lead") + row.lead
        unit = "%" if row.lead == "lead_relative" else "points"
        void = "" if row.lead == "lead_over_no_edit" else untestable.get(row.baseline, "")
        text = section.say(own, row.mean, row.low, row.high, n=row.n, unit=unit, void=void)
        said.setdefault(row.batch_size, text)
    return said
