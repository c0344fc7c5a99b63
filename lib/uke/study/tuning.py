"""Choose settings on development edits: what the notebooks on tuning share."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd

from uke.errors import InputError
from uke.methods import recipes
from uke.methods.catalog import changes, differences, key
from uke.methods.method import Method
from uke.methods.recipes import SINGLE_BLOCKS, Recipe
from uke.results import rows
from uke.results.compare import label
from uke.results.stats import Paired, Score, paired, summarise
from uke.study.say import begin
from uke.study.study import Study

CELL = ["method", "factor", "level"]


def untouched(study: Study) -> float:
    """Return the average metric of the unedited model, which a method that writes nothing earns."""
    return float(rows.average(rows.primary(study.before, phase="before"))["score"].mean())


class Trials:
    """Try settings of methods at several batch sizes, as many for every method.

        trials = Trials(study, {"FT-M": variants}, {"FT-M": published}, [1, 8], limit=6)
        trials.run(section)
        trials.best()    # the trial with the best average metric of each method and batch size

    A trial is called by how it differs from the method's entry in `base`. It gets `limit` edits, or
    one batch where that is larger. Of three batch sizes or more the last tries only the `finalists`
    best trials of the size before (successive halving, Jamieson and Talwalkar 2016). Trials with
    minibatches are not made at batch size 1, where they are full-batch training. Of equal trials
    the first listed is best.
    """

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
        self.planned: list[tuple[int, str, str]] = []
        self.failed: list[tuple[int, str, str]] = []

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
        """Make the trials that have no rows at these sizes (None: all) and of these methods (all if
        none).

        Warn in a section of those that fail because a loss or a system is not finite: they are out.
        """
        begin(self.study, section)
        for size in self.sizes if sizes is None else sizes:
            last = len(self.sizes) > 2 and size == self.sizes[-1]
            entered = self._leading(self.sizes[-2]) if last else self.settings
            for (name, level), trial in self.settings.items():
                if (names and name not in names) or (name, level) not in entered:
                    continue
                if size == 1 and getattr(trial, "batch_size", None):
                    continue
                self.planned.append((size, name, level))
                labels = {"factor": self.factor, "level": level}
                if fault := self.study.attempt(trial, size, self.edits(size), **labels):
                    self.failed.append(self.planned[-1])
                    where = f"{name}, batch size {size}"
                    section.warn(f"{where}: the trial with {level} failed: {fault}")

    def _leading(self, size: int) -> set[tuple[str, str]]:
        """Return method and level of the finalists of each method at a batch size."""
        averages = self.averages()
        means = averages[averages["batch_size"] == size].groupby(["method", "level"])["score"]
        best = means.mean().groupby("method", group_keys=False).nlargest(self.finalists)
        return set(best.index)

    def averages(self) -> pd.DataFrame:
        """Return the average metric of every trial and edit."""
        found = rows.average(rows.primary(self.study.read()))
        own = pd.MultiIndex.from_frame(found[["method", "level"]]).isin(list(self.settings))
        return found[own & (found["factor"] == self.factor)].astype({"batch_size": int})

    def means(self) -> pd.DataFrame:
        """Return the mean of every trial, in the order of the trials.

        Columns: method, level, batch_size, score, edits, chosen, and `before`, the unedited model.
        """
        groups = self.averages().groupby(["method", "level", "batch_size"])
        found = groups.agg(score=("score", "mean"), edits=("edit", "nunique")).reset_index()
        trials = pd.DataFrame(list(self.settings), columns=["method", "level"])
        found = trials.merge(found, on=["method", "level"])  # in the order of the trials
        best = found.groupby(["batch_size", "method"])["score"].idxmax()
        return found.assign(chosen=found.index.isin(best), before=untouched(self.study))

    def best(self) -> pd.DataFrame:
        """Return the best trial of each method at each batch size."""
        found = self.means()
        return found[found["chosen"]]

    def chosen(self, size: int) -> dict[str, dict[str, Any]]:
        """Return what the best trial of each method changes in its base, for `catalog.tune`."""
        found = self.best()
        return {
            row.method: changes(self.settings[row.method, row.level], self.base[row.method])
            for row in found[found["batch_size"] == size].itertuples()
        }

    def table(self) -> pd.DataFrame:
        """Return the best trials for a table."""
        shown = self.best().sort_values("batch_size", kind="stable")
        shown = shown.rename(columns={"level": "best trial", "score": "average"})
        return shown[["method", "batch_size", "best trial", "average"]]

    def last_gains(self) -> pd.Series:
        """Return what the last of N trials was expected to add, by method and batch size.

        Drawn without replacement, the best of N minus the best of N - 1 is the gap between the two
        best trials over N. A single trial is compared with the unedited model.
        """
        gains = {}
        for (name, size), own in self.means().groupby(["method", "batch_size"], sort=False):
            best, second = [*own["score"].nlargest(2), own["before"].iloc[0]][:2]
            gains[f"{name}, batch size {size}"] = (best - second) / len(own)
        return pd.Series(gains)

    def check(self, section: Any) -> None:
        """Check that all trials have rows of all their edits, and warn of rates at an edge."""
        means = self.means()
        wanted = means["batch_size"].map(self.edits)
        section.check(
            means["edits"].eq(wanted).all(), "every trial was made on all of its development edits"
        )
        made = len(means) + len(self.failed)
        section.check(made == len(self.planned), "every trial has rows or has failed")
        edges = []
        for row in means[means["chosen"]].itertuples():
            own = (one for (name, _), one in self.settings.items() if name == row.method)
            tried = {trial.learning_rate for trial in own}
            rate = self.settings[row.method, row.level].learning_rate
            if at_edge(rate, tried):
                edges.append(f"{row.method} at batch size {row.batch_size} ({rate:g})")
        warn_of_edges(section, edges)

    def say(self, section: Any, names: Mapping[str, str] | None = None) -> None:
        """Say the best average of each method (`tuning.<batch size>.<key>.average`)."""
        for row in self.best().itertuples():
            name = (names or {}).get(row.method, key(row.method))
            section.say(f"tuning.{row.batch_size}.{name}.average", row.score, n=row.edits)


def at_edge(rate: float, tried: Collection[float]) -> bool:
    """Whether a learning rate is the lowest or the highest of three or more."""
    return len(tried) > 2 and rate in (min(tried), max(tried))


def warn_of_edges(section: Any, edges: Sequence[str]) -> None:
    """Warn of trials whose best learning rate is at the edge."""
    if edges:
        section.warn(
            "The best learning rate is at the edge of those tried, so a better one may lie "
            f"beyond: {'; '.join(edges)}."
        )


class LevelTrials:
    """Try every level of every factor of some families at several learning rates.

        levels = LevelTrials(study, {"FT-M": recipe}, {"FT-M": [1e-3, 2e-3]}, limit=6)
        levels.run(section)
        levels.chosen    # by family and factor, the best level at its best rate

    `names` names the levels (all if none; see `recipes.levels`). Cells that are the same
    recipe are one training. The best rate has the best mean of the average metric; of equal ones it
    is the lower.
    """

    def __init__(
        self,
        study: Study,
        families: Mapping[str, Recipe],
        rates: Mapping[str, Sequence[float]],
        names: Sequence[str] = (),
        limit: int = 1,
    ):
        self.families, self.rates, self.names, self.limit = families, rates, names, limit
        tried: dict[str, list[Recipe]] = {name: [] for name in families}
        cells = []
        for name, recipe in families.items():
            studied = recipes.levels(recipe, names).items()
            pairs = [(factor, level) for factor, own in studied for level in own]
            for (factor, level), rate in product(pairs, rates[name]):
                varied = recipes.vary(recipe, {factor: level})
                trial = varied.model_copy(update={"learning_rate": rate})
                tried[name].append(trial)
                cells.append((name, factor, level, rate, differences(trial, recipe)))
        self._cells = pd.DataFrame(cells, columns=[*CELL, "learning_rate", "trial"])
        self.trials = Trials(study, tried, families, limit=limit)
        self.run = self.trials.run

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The average metric by method, factor, level, learning rate and edit."""
        averages = self.trials.averages().rename(columns={"level": "trial"})
        averages = averages[["split", "method", "trial", "edit", "score"]]
        return self._cells.merge(averages, on=["method", "trial"])

    @cached_property
    def means(self) -> pd.DataFrame:
        """The mean of every cell at every rate; `chosen` marks the best rate of each level."""
        groups = self.scores.groupby([*CELL, "learning_rate"], sort=False)
        found = groups["score"].mean().reset_index()
        best = found.groupby(CELL)["score"].idxmax()
        before = untouched(self.trials.study)
        return found.assign(chosen=found.index.isin(best), before=before)

    @cached_property
    def best(self) -> pd.DataFrame:
        """The rows of `means` at the best rate of each level."""
        return self.means[self.means["chosen"]]

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """The rows of `scores` at the best rate of each level."""
        return self.scores.merge(self.best[[*CELL, "learning_rate"]])

    @cached_property
    def chosen(self) -> dict[str, dict[str, str]]:
        """By method and factor, the level that the rule chooses."""
        return recipes.choose(self.tuned, self.names)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Mean and interval of every level at its best rate; `chosen` marks the rule's choice."""
        found = summarise(self.tuned, CELL).merge(self.best[[*CELL, "learning_rate"]])
        chosen = [self.chosen[row.method][row.factor] == row.level for row in found.itertuples()]
        return found.assign(chosen=chosen)

    def shown(self) -> pd.DataFrame:
        """Return the means for a figure, each line called by its factor and level."""
        names = self.means["factor"].map(label) + ": " + self.means["level"].map(label)
        return self.means.assign(level=names)

    def table(self) -> pd.DataFrame:
        """Return the summary for a table."""
        shown = _with_average(self.summary)
        shown["level"] = shown["level"].map(label)
        return shown[[*CELL, "learning_rate", "average", "chosen"]]

    def to_keep(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Return best rates and averages by method, factor and level, for `keep_levels`."""
        found: dict[str, dict[str, dict]] = {}
        for row in self.best.itertuples():
            own = {"learning_rate": row.learning_rate, "average": round(row.score, 4)}
            found.setdefault(row.method, {}).setdefault(row.factor, {})[row.level] = own
        return found

    def candidates(self) -> dict[str, Recipe]:
        """Return what each family becomes with the chosen level of every factor."""
        return {
            name: recipes.candidate(one, self.chosen[name]) for name, one in self.families.items()
        }

    def check(self, section: Any) -> None:
        """Check that the choice rests on all development edits, and warn of rates at an edge."""
        counts = self.tuned.groupby(CELL)["edit"].nunique()
        section.check(
            counts.eq(self.limit).all() and len(counts) == len(self.best),
            "every level was run on all development edits at its best rate",
        )
        section.check(
            set(self.scores["split"]) == {"development"},
            "no row but those of development edits chose anything",
        )
        edges = [
            f"{row.method}, {label(row.factor)} {label(row.level)} ({row.learning_rate:g})"
            for row in self.best.itertuples()
            if at_edge(row.learning_rate, self.rates[row.method])
        ]
        warn_of_edges(section, edges)

    def say(self, section: Any) -> None:
        """Say every level's average (`tuning.level.<method>.<factor>.<level>`)."""
        for row in self.summary.itertuples():
            name = f"tuning.level.{key(row.method)}.{row.factor}.{row.level}"
            section.say(name, row.mean, row.low, row.high, n=row.n)


class GridTrials:
    """Combine two levels of four factors in every way, to see what one factor at a time misses.

    On the first family of `levels`: both loss scopes, the best single block and all blocks, one
    projection and both components, with and without template, as far as they were tried. Each
    combination is tried at the lower of the rates chosen for its layers and its components, and at
    the one below.
    """

    def __init__(self, levels: LevelTrials):
        self.levels, self.family = levels, next(iter(levels.families))
        recipe, best = levels.families[self.family], levels.best
        best = best[best["method"] == self.family].set_index(["factor", "level"])
        self.alone, rates = best["score"], best["learning_rate"]
        singles = [cell for cell in best.index if cell[0] == "layers" and cell[1] in SINGLE_BLOCKS]
        single = self.alone[singles].idxmax()[1] if singles else None
        wanted = {
            "loss_scope": ["last_prompt_token", "target_tokens"],
            "layers": [single, "all"],
            "components": ["down_proj", "both"],
            "chat_template": ["with", "without"],
        }
        self.choices = {}
        for factor, own in wanted.items():
            if tried := [level for level in own if (factor, level) in best.index]:
                self.choices[factor] = tried
        ladder, self._cells, trials = sorted(levels.rates[self.family]), [], []
        for number, chosen in enumerate(product(*self.choices.values())):
            combination = dict(zip(self.choices, chosen, strict=True))
            varied = recipes.vary(recipe, combination)
            known = [rates[cell] for cell in combination.items() if cell[0] in _RATED]
            first = max(min(map(ladder.index, known), default=1) - 1, 0)
            for rate in ladder[first : first + 2]:
                trials.append(varied.model_copy(update={"learning_rate": rate}))
                cell = {"cell": number, "level": differences(trials[-1], recipe)}
                self._cells.append(combination | cell)
        study, families = levels.trials.study, levels.families
        self.trials = Trials(study, {self.family: trials}, families, limit=levels.limit)
        self.run = self.trials.run

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The average metric of each combination and edit, at the better of its rates."""
        averages = self.trials.averages()[["level", "edit", "score"]]
        found = pd.DataFrame(self._cells).merge(averages, on="level")
        means = found.groupby(["cell", "level"], sort=False)["score"].mean()
        best = means.groupby("cell").idxmax()
        return found[pd.MultiIndex.from_frame(found[["cell", "level"]]).isin(list(best))]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Mean and interval of each combination; `chosen` has the levels best one at a time."""
        found = summarise(self.scores, ["cell", *self.choices])
        wanted = {factor: self.alone[factor][own].idxmax() for factor, own in self.choices.items()}
        return found.assign(chosen=(found[list(wanted)] == pd.Series(wanted)).all(axis=1))

    @property
    def winner(self) -> pd.Series:
        """The best combination."""
        return self.summary.loc[self.summary["mean"].idxmax()]

    @property
    def picked(self) -> pd.Series:
        """The combination of the levels that are best one at a time."""
        return self.summary[self.summary["chosen"]].iloc[0]

    def regret(self) -> Paired:
        """Return what choosing one factor at a time loses, in points, paired by edit."""
        by_edit = self.scores.pivot_table(index="edit", columns="cell", values="score") * 100
        return paired(by_edit[self.winner["cell"]], by_edit[self.picked["cell"]])

    def shown(self) -> pd.DataFrame:
        """Return the summary for a figure."""
        return self.summary.assign(layers=self.summary["layers"].map(label))

    def table(self) -> pd.DataFrame:
        """Return the summary for a table, the best combination first."""
        ranked = self.summary.sort_values("mean", ascending=False, kind="stable")
        return _with_average(ranked)[[*self.choices, "average", "chosen"]]

    def check(self, section: Any) -> None:
        """Check that the grid is complete."""
        complete = self.summary["n"].eq(self.levels.limit).all()
        section.check(
            complete and self.summary["chosen"].sum() == 1,
            "every combination of the grid was run on all development edits, "
            "and one of them is that of the best levels",
        )

    def say(self, section: Any) -> dict[str, str]:
        """Say the best combination, that of the best levels, and the difference."""
        ends, n = ["mean", "low", "high"], self.levels.limit
        regret = self.regret()
        return {
            "best": section.say("grid.best.average", *self.winner[ends], n=n),
            "chosen": section.say("grid.chosen.average", *self.picked[ends], n=n),
            "regret": section.say("grid.regret", *regret[:3], n=regret.n, unit="points"),
        }


_RATED = ("layers", "components")  # factors whose levels need rates of their own


def _with_average(summary: pd.DataFrame) -> pd.DataFrame:
    ends = summary[["mean", "low", "high"]].itertuples(index=False)
    return summary.assign(average=[Score(*each) for each in ends])
