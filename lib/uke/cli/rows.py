"""Divide a notebook's rows among jobs of a cluster; the notebook then finds them and only draws.

What is compared stands in the notebook's set-up cells alone, so these are run here, without a
kernel, up to the first cell that runs a comparison.
"""

import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from uke.cli.execute import Job
from uke.errors import InputError, nearest
from uke.files import write_atomic
from uke.project import number_key
from uke.study.comparison import Comparison
from uke.study.study import UNEDITED
from uke.study.tuning import Trials


class Share(NamedTuple):
    """One job: a part of a method's rows at a batch size; `edits` of all its runs added."""

    notebook: str
    method: str
    batch_size: int
    part: int
    parts: int
    edits: int

    @property
    def name(self) -> str:
        """The job's name, and the file that marks its end: `07_recipe.ft_uke.1.2of4`."""
        place = f"{self.notebook}.{number_key(self.method)}.{self.batch_size}"
        return f"{place}.{self.part + 1}of{self.parts}"


def shares(job: Job, most: int) -> Iterator[Share]:
    """List the jobs of a notebook, none if it compares nothing: at most `most` for each method.

    The first is what precedes any edit; all others wait for it.
    """
    compared, name = _compared(job)[0], job.notebook.stem
    if compared:
        yield Share(name, UNEDITED, 1, 0, 1, 0)
    found: dict[tuple[str, int], list[int]] = {}
    parts: dict[tuple[str, int], int] = {}
    for one in compared:
        for pair, edits in one.jobs().items():
            found.setdefault(pair, []).extend(edits)
            fitting = min(most, max(edits) // pair[1]) if one.divisible else 1
            parts[pair] = max(1, fitting, parts.get(pair, 1))
    for pair, edits in found.items():
        for part in range(parts[pair]):
            yield Share(name, *pair, part, parts[pair], sum(edits) // parts[pair])


def write(job: Job, share: str) -> None:
    """Write the rows of the job of this name (see `Share.name`); InputError for none of it."""
    (compared, section), (_, method, size, part) = _compared(job), share.rsplit(".", 3)
    number, _, parts = part.partition("of")
    known = {number_key(name): name for one in compared for name, _ in one.jobs()}
    known[UNEDITED] = UNEDITED
    if method not in known:
        raise InputError(f"{job.notebook}: share '{share}'{nearest(method, known)}")
    for one in compared:
        one.share(known[method], int(size), (int(number) - 1, int(parts)), section)


def _compared(job: Job) -> tuple[list[Comparison | Trials], Any]:
    """Run the set-up cells; return the comparisons that they define, and the section."""
    cells = [c for c in nbformat.read(job.notebook, 4).cells if c.cell_type == "code"]
    first = next((n for n, cell in enumerate(cells) if ".run(section" in cell.source), 0)
    given = "\n".join(f"{name} = {value!r}" for name, value in job.parameters.items())
    tagged = [given if "parameters" in c.metadata.get("tags", ()) else c.source for c in cells]
    with tempfile.TemporaryDirectory(prefix="uke-") as folder:
        script = write_atomic(Path(folder) / f"{job.notebook.stem}.py", "\n".join(tagged[:first]))
        names = runpy.run_path(str(script))
    found = [one for one in names.values() if isinstance(one, Comparison | Trials)]
    return found, names.get("section")
