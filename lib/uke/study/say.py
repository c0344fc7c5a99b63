"""What every study says, warns of and checks in a section of the report."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uke.methods.catalog import key
from uke.results import compare
from uke.results.stats import summarise
from uke.study.study import Study


def begin(study: Study, section: Any) -> None:
    """Note in a section where the study's rows come from, before any is made."""
    section.environment, section.smoke_run = study.environment, study.smoke_run()


def warn_of_lacking(rows: pd.DataFrame, section: Any) -> None:
    """Warn of kinds of the average metric that the data has no probes of."""
    if kinds := compare.lacking(rows):
        section.warn(f"The average is without {', '.join(kinds)}: the data has no such probes.")


def check_unchanged(study: Study, section: Any) -> None:
    """Check that every edit was undone."""
    text = "every weight of the model is as it was before the first edit"
    section.check(study.unchanged(), text)


def say_means(
    section: Any, prefix: str, scores: pd.DataFrame, by: Sequence[str], unit: str = ""
) -> dict[str, str]:
    """Say the mean score of every group with its interval, under a key of the prefix and `by`.

        said = say_means(section, "single", scores, ["method", "kind"])
        said["single.ft_uke.average"]  # "0.69 [0.67, 0.71], n = 40"

    `scores` is what `uke.results.stats.summarise` takes. Returns what was said by key.
    """
    said = {}
    for row in summarise(scores, by).to_dict("records"):
        parts = [key(row[name]) if name == "method" else str(row[name]) for name in by]
        name = ".".join([prefix, *parts])
        said[name] = section.say(name, row["mean"], row["low"], row["high"], n=row["n"], unit=unit)
    return said
