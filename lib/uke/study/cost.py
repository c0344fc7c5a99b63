"""What edits cost: seconds and memory from the rows of other studies, and how they grow.

rows = cost.by_unit([paths.exported("07_recipe"), paths.exported("08_batch_size")])
section.table(cost.single_edits(rows), "cost_single", caption)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from uke.methods.method import Method
from uke.results.rows import COLUMNS
from uke.results.stats import Score, summarise
from uke.study.study import Study

MEASURES = {
    "train_seconds": "editing (s)",
    "answer_seconds": "answering (s)",
    "peak_mib": "peak memory (MiB)",
}
PER_EDIT = {
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
    return rows.assign(
        train_each=rows["train_seconds"] / rows["batch_size"],
        answer_each=rows["answer_seconds"] / rows["batch_size"],
    )


def single_edits(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method with the cost of a single edit: mean and interval over edits."""
    long = _long(rows[rows["batch_size"] == 1], ["method", "edit"], MEASURES)
    summary = summarise(long, ["method", "panel"])
    ends = summary[["mean", "low", "high"]].itertuples(index=False)
    table = summary.assign(cell=[Score(*each) for each in ends])
    table = table.pivot(index="method", columns="panel", values="cell")
    order = [name for name in MEASURES.values() if name in table]
    return table.loc[long["method"].unique(), order].rename_axis(columns=None).reset_index()


def by_batch_size(rows: pd.DataFrame) -> pd.DataFrame:
    """Return method, batch_size, panel and score: seconds an edit and memory, for `trend`."""
    return _long(rows.astype({"batch_size": int}), ["method", "batch_size"], PER_EDIT)


def write_lengths(
    study: Study, methods: Sequence[Method], shares: Sequence[float], texts: int
) -> pd.DataFrame:
    """Write the first `texts` edits with answers of each share of their length; return the rows.

    `tokens` is the mean number of tokens of the answers of a share.
    """
    frames = []
    for share in shares:
        part = replace(study, dataset=study.dataset.with_length(share, texts))
        if not part.committed:
            _ = part.before  # answered first, so that no training pays for what happens once
        for method in methods:
            part.run(method, factor="answer_length", level=f"{share:g}")
        answers = [edit.answer for edit in part.dataset.edits]
        ids = part.tokenizer(answers, add_special_tokens=False)["input_ids"]
        tokens = round(sum(map(len, ids)) / len(ids))
        frames.append(part.read().assign(share=share, tokens=tokens))
    rows = pd.concat(frames)
    return pd.concat([rows[rows["method"] == method.name] for method in methods])


def by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Return method, edit, tokens of the answer, panel and score, for `trend`."""
    rows = rows.rename(columns={"tokens": "tokens of the answer"})
    return _long(rows, ["method", "edit", "tokens of the answer"], MEASURES)


def growth(rows: pd.DataFrame) -> pd.Series:
    """Return by how much seconds of editing grow from the shortest to the longest answer."""
    means = rows.groupby(["method", "share"], sort=False)["train_seconds"].mean().unstack("share")
    return means[means.columns.max()] / means[means.columns.min()]


def layer_norms(rows: pd.DataFrame) -> pd.DataFrame:
    """Return method, edit, weight, layer and relative norm of the change of each weight."""
    single = rows[(rows["batch_size"] == 1) & rows["curve"].notna()]
    found = [
        (row.method, row.edit, weight, norm)
        for row in single.itertuples()
        for weight, norm in json.loads(row.curve)["norms"].items()
    ]
    frame = pd.DataFrame(found, columns=["method", "edit", "weight", "norm"])
    layers = frame["weight"].str.extract(r"\.(\d+)\.", expand=False)
    return frame.assign(layer=layers).dropna(subset="layer").astype({"layer": int})


def changes(norms: pd.DataFrame) -> tuple[float, float]:
    """Return the mean norm of a layer's change in methods that change all layers, and in others."""
    layers = norms.groupby("method")["layer"].nunique()
    everywhere = norms["method"].map(layers) == layers.max()
    return float(norms.loc[everywhere, "norm"].mean()), float(norms.loc[~everywhere, "norm"].mean())


def _long(rows: pd.DataFrame, columns: Sequence[str], panels: dict[str, str]) -> pd.DataFrame:
    rows = rows.rename(columns=panels)
    return rows.melt(columns, list(panels.values()), "panel", "score").dropna(subset="score")
