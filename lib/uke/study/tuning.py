"""Choose settings on development edits: what the notebooks on tuning share."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd

from uke.errors import InputError
from uke.methods import recipes
from uke.methods.catalog import changes, differences, key
from uke.methods.method import Method
from uke.methods.recipes import Recipe
from uke.results import rows
from uke.results.compare import label
from uke.results.stats import Score, summarise
from uke.study.comparison import attempt
from uke.study.study import Study


class Trials:
    """Try settings of methods at several batch sizes, as many for every method.

        trials = Trials(study, {"FT-M": variants}, {"FT-M": published}, [1, 8], limit=6)
        trials.run(section)
        trials.best()    # the trial with the best average metric of each method and batch size

    A trial is called by how it differs from the method in `base`. It gets `limit` edits, or one
    batch where that is larger. Of three batch sizes or more the last tries only the `finalists`
    best trials of the size before (successive halving, Jamieson and Talwalkar 2016). Minibatches
    are not tried at batch size 1. Of equal trials the first listed is best.
    """

    among = ["batch_size", "method"]  # the columns within which one trial is chosen

    def __init__(
        self,
        study: Study,
        tried: Mapping[str, Sequence[Method]],
        base: Mapping[str, Method],
        sizes: Sequence[int] = (1,),
        limit: int = 1,
        finalists: int = 2,
        factor: str = "trial",
    ):
        if study.dataset.split != "development" or study.dataset.world_seed is None:
            raise InputError(
                f"{study.name}: settings are chosen on development edits of the world alone, "
                f"found split '{study.dataset.split}' of '{study.paths.data}'"
            )
        self.study, self.base, self.sizes, self.limit = study, base, list(sizes), limit
        self.finalists, self.factor = finalists, factor
        self.settings = {
            (name, differences(trial, base[name])): trial
            for name, every in tried.items()
            for trial in every
        }
        self.cells = pd.DataFrame(list(self.settings), columns=["method", "trial"])

    @property
    def decides(self) -> bool:
        """Whether the choice is written to `params/methods`: not from few edits or old rows."""
        return self.study.paths.profile not in ("smoke", "quick") and not rows.use_committed()

    def edits(self, size: int) -> int:
        """Return on how many edits a trial is made at a batch size."""
        return max(self.limit // size, 1) * size

    def run(
        self, section: Any, sizes: Sequence[int] | None = None, names: Sequence[str] = ()
    ) -> None:
        """Make the trials without rows, at these sizes and of these methods if any are given.

        Warn in a section of those that fail, as by a loss that is not finite: they are out.
        """
        section.environment, section.smoke_run = self.study.environment, self.study.smoke_run()
        for size in self.sizes if sizes is None else sizes:
            last = len(self.sizes) > 2 and size == self.sizes[-1]
            entered = self._leading(self.sizes[-2]) if last else self.settings
            for (name, level), trial in self.settings.items():
                alone = size == 1 and getattr(trial, "batch_size", None)
                if alone or (names and name not in names) or (name, level) not in entered:
                    continue
                labels = {"factor": self.factor, "level": level}
                if fault := attempt(self.study.run, trial, size, self.edits(size), **labels):
                    where = f"{name}, batch size {size}"
                    section.warn(f"{where}: the trial with {level} failed: {fault}")
            vars(self).pop("scores", None)  # there are new rows

    def _leading(self, size: int) -> set[tuple[str, str]]:
        """Return method and name of the finalists of each method at a batch size."""
        scores = self.scores
        means = scores[scores["batch_size"] == size].groupby(["method", "trial"])["score"].mean()
        return set(means.groupby("method", group_keys=False).nlargest(self.finalists).index)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The average metric of every trial and edit."""
        found = rows.average(rows.primary(self.study.read()))
        found = found[found["factor"] == self.factor].rename(columns={"level": "trial"})
        columns = ["split", "batch_size", "method", "trial", "learning_rate", "edit", "score"]
        found = found[columns]
        return self.cells.merge(found, on=["method", "trial"]).astype({"batch_size": int})

    def means(self) -> pd.DataFrame:
        """Return the mean of every trial, in order: `cells`, batch_size, learning_rate, score,
        edits, `chosen` (the best) and `before` (the score without any edit)."""
        by = [*self.cells, "batch_size", "learning_rate"]
        groups = self.scores.groupby(by, sort=False, dropna=False, as_index=False)
        found = groups.agg(score=("score", "mean"), edits=("edit", "nunique"))
        best = found.groupby(self.among)["score"].idxmax()
        before = rows.average(rows.primary(self.study.before, phase="before"))["score"].mean()
        return found.assign(chosen=found.index.isin(best), before=before)

    def best(self) -> pd.DataFrame:
        """Return the best trials."""
        found = self.means()
        return found[found["chosen"]]

    def chosen(self, size: int) -> dict[str, dict[str, Any]]:
        """Return what the best trial of each method changes in its base, for `catalog.tune`."""
        found = self.best()
        return {
            row.method: changes(self.settings[row.method, row.trial], self.base[row.method])
            for row in found[found["batch_size"] == size].itertuples()
        }

    def check(self, section: Any) -> None:
        """Check that all trials were made on all their edits, and warn of rates at an edge."""
        means = self.means()
        complete = means["edits"].eq(means["batch_size"].map(self.edits)).all()
        section.check(complete, "every trial was made on all of its development edits")
        edges, rates = [], means.groupby("method")["learning_rate"].unique()
        for row in means[means["chosen"]].to_dict("records"):
            tried, rate = rates[row["method"]], row["learning_rate"]
            if len(tried) > 2 and rate in (min(tried), max(tried)):
                edges.append(f"{', '.join(str(row[name]) for name in self.among)} ({rate:g})")
        if edges:
            beyond = "at the edge of those tried, so a better one may lie beyond"
            section.warn(f"The best learning rate is {beyond}: {'; '.join(edges)}.")

    def say(self, section: Any, names: Mapping[str, str] | None = None) -> None:
        """Say the best average of each method (`tuning.<batch size>.<key>.average`)."""
        for row in self.best().itertuples():
            name = (names or {}).get(row.method, key(row.method))
            section.say(f"tuning.{row.batch_size}.{name}.average", row.score, n=row.edits)


class LevelTrials(Trials):
    """Try every level of every factor of some families at several learning rates.

        levels = LevelTrials(study, {"FT-M": recipe}, {"FT-M": [1e-3, 2e-3]}, limit=6)
        levels.run(section)
        levels.rule()    # by family and factor, the best level at its best rate

    `names` names the levels (all if none; see `recipes.levels`). Levels that are the same recipe
    are one training. Of equal rates the lower is best.
    """

    among = ["method", "factor", "level"]

    def __init__(
        self,
        study: Study,
        families: Mapping[str, Recipe],
        rates: Mapping[str, Sequence[float]],
        names: Sequence[str] = (),
        limit: int = 1,
    ):
        tried: dict[str, list[Recipe]] = {name: [] for name in families}
        cells = []
        for name, recipe in families.items():
            studied = recipes.levels(recipe, names).items()
            pairs = [(factor, level) for factor, own in studied for level in own]
            for (factor, level), rate in product(pairs, rates[name]):
                varied = recipes.vary(recipe, {factor: level})
                tried[name].append(varied.model_copy(update={"learning_rate": rate}))
                cells.append((name, factor, level, differences(tried[name][-1], recipe)))
        super().__init__(study, tried, families, limit=limit)
        self.cells = pd.DataFrame(cells, columns=[*self.among, "trial"])
        self.names = names

    def tuned(self) -> pd.DataFrame:
        """Return the scores of every level at its best rate."""
        return self.scores.merge(self.best()[[*self.among, "trial"]])

    def rule(self) -> dict[str, dict[str, str]]:
        """Return by method and factor the level that the rule chooses."""
        return recipes.choose(self.tuned(), self.names)

    def table(self) -> pd.DataFrame:
        """Return every level at its best rate for a table: mean, interval and the rule's choice."""
        found = summarise(self.tuned(), [*self.among, "learning_rate"])
        rule, cells = self.rule(), found[self.among].itertuples(index=False)
        ends = found[["mean", "low", "high"]].itertuples(index=False)
        return found[[*self.among, "learning_rate"]].assign(
            average=[Score(*each) for each in ends],
            chosen=[rule[name][factor] == level for name, factor, level in cells],
            level=found["level"].map(label),
        )

    def to_keep(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Return best rates and averages by method, factor and level, for `catalog.write`."""
        found: dict[str, dict[str, dict]] = {}
        for row in self.best().itertuples():
            own = {"learning_rate": row.learning_rate, "average": round(row.score, 4)}
            found.setdefault(row.method, {}).setdefault(row.factor, {})[row.level] = own
        return found

    def candidates(self) -> dict[str, Recipe]:
        """Return what each family becomes with the chosen level of every factor."""
        rule = self.rule()
        return {name: recipes.candidate(one, rule[name]) for name, one in self.base.items()}

    def say(self, section: Any) -> None:
        """Say every level's average (`tuning.level.<method>.<factor>.<level>`)."""
        for row in summarise(self.tuned(), self.among).itertuples():
            name = f"tuning.level.{key(row.method)}.{row.factor}.{row.level}"
            section.say(name, row.mean, row.low, row.high, n=row.n)
