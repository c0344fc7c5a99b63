"""What edits cost: seconds and memory, from the rows of other studies.

units = cost.by_unit([paths.exported("07_recipe"), paths.exported("08_batch_size")])
section.table(cost.table(units), "cost", caption)
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from uke.results.rows import COLUMNS
from uke.results.stats import Score, summarise

MEASURES = {
    "train_each": "editing, seconds an edit",
    "answer_each": "answering, seconds an edit",
    "peak_mib": "peak memory (MiB)",
}


def by_unit(paths: Iterable[Path]) -> pd.DataFrame:
    """Return a row for each batch that a method has written, from the first study that has it.

    `train_each` and `answer_each` are seconds an edit. Files that do not exist are left out.
    """
    frames = [pd.read_parquet(path) for path in paths if path.is_file()]
    rows = pd.concat(frames or [pd.DataFrame(columns=list(COLUMNS))])
    rows = rows[rows["phase"] == "after"].drop_duplicates(["method", "batch_size", "batch"])
    return rows.astype({"batch_size": int}).assign(
        train_each=rows["train_seconds"] / rows["batch_size"],
        answer_each=rows["answer_seconds"] / rows["batch_size"],
    )


def measures(units: pd.DataFrame) -> pd.DataFrame:
    """Return method, batch_size, edit, panel (what is measured) and score, for `trend`."""
    columns, units = ["method", "batch_size", "edit"], units.rename(columns=MEASURES)
    return units.melt(columns, list(MEASURES.values()), "panel", "score").dropna(subset="score")


def table(units: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method with the mean and interval of each measure."""
    summary = summarise(measures(units), ["method", "panel"])
    cells = [Score(*each) for each in summary[["mean", "low", "high"]].itertuples(index=False)]
    shown = summary.assign(cell=cells).pivot(index="method", columns="panel", values="cell")
    order = [name for name in MEASURES.values() if name in shown]
    return shown.loc[summary["method"].unique(), order].rename_axis(columns=None).reset_index()
