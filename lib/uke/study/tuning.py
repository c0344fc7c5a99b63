"""Choose settings on development edits: what the notebooks on tuning share.

The rules, fixed before any row: every method has as many settings, the published one first. All of
them get the edits of the first round, at each batch size; the best third (two at least) those of
the next, and the best two those of the last (successive halving, Jamieson and Talwalkar 2016). The
balance decides (`uke.results.compare`). A chosen number within a tenth of an end of its range, in
the logarithm, adds settings up to ten times beyond that end, once; they take the same rounds.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import pandas as pd

from uke.data.edits import in_group
from uke.errors import InputError
from uke.methods import recipes
from uke.methods.catalog import Range, changed, changes, differences, key, own_name, whole
from uke.methods.method import Method
from uke.methods.recipes import Recipe
from uke.results import compare, rows
from uke.results.compare import label
from uke.results.stats import Score, overall, summarise
from uke.study.committed import MissingRows
from uke.study.comparison import attempt, by_minibatches
from uke.study.study import UNEDITED, Study

Cell = tuple[str, str]  # a method's name, and a setting of it as `differences` names it


class Trials:
    """Try settings of methods at several batch sizes, as many for every method.

        trials = Trials(study, {"FT-M": variants}, {"FT-M": published}, [1, 8], [4, 12, 24])
        trials.run(section)
        trials.best()    # the setting with the best balance of each method and batch size

    A setting is called by how it differs from the method in `base`. `rounds`: the edits that it has
    had by the end of each (see above); in batches at least one, and the last two at least two. Of
    `ranges`, by method and field, the ends are passed once. Minibatches are not tried at batch size
    1. Of equal settings the first listed is best.
    """

    divisible = False  # later rounds depend on the earlier
    among = ["batch_size", "method"]  # the columns within which one setting is chosen

    def __init__(
        self,
        study: Study,
        tried: Mapping[str, Sequence[Method]],
        base: Mapping[str, Method],
        sizes: Sequence[int] = (1,),
        rounds: Sequence[int] = (1,),
        factor: str = "trial",
        ranges: Mapping[str, Mapping[str, Range]] | None = None,
    ):
        _check(study, rounds)
        self.study, self.base, self.sizes, self.rounds = study, base, list(sizes), list(rounds)
        self.factor = factor
        self.ranges = {(size, name): own for size in sizes for name, own in (ranges or {}).items()}
        self.settings = {
            (name, differences(trial, base[name])): trial
            for name, every in tried.items()
            for trial in every
        }
        self.listed = list(self.settings)
        self.further: dict[int, list[Cell]] = {}  # by batch size, beyond the ends of ranges
        self.cells = pd.DataFrame(self.listed, columns=["method", "trial"])
        needed, found = self.edits_needed(sizes, rounds), len(study.dataset.edits)
        if found < needed:
            raise InputError(f"rounds: they take {needed} development edits, and {found} are there")

    @staticmethod
    def edits_needed(sizes: Sequence[int], rounds: Sequence[int]) -> int:
        """Return how many edits such trials read."""
        return max(_edits(size, rounds, len(rounds) - 1) for size in sizes)

    @property
    def decides(self) -> bool:
        """Whether the choice is written to `params/methods`: not from few edits or old rows."""
        return self.study.paths.profile not in ("smoke", "quick") and not rows.use_committed()

    def run(
        self, section: Any, sizes: Sequence[int] | None = None, names: Collection[str] = ()
    ) -> None:
        """Make the trials without rows, at these sizes and of these methods if any are given.

        Warn in a section of those that fail, as by a loss that is not finite: they are out.
        """
        section.environment, section.smoke_run = self.study.environment, self.study.smoke_run()
        names = names or self.base
        for size in self.sizes if sizes is None else sizes:
            faults = self._halve(size, names)
            if self._extend(section, size, names):
                faults |= self._halve(size, names)
            lost = [cell for cell, fault in faults.items() if fault is None]
            for (name, level), fault in faults.items():
                if fault:
                    where = f"{name}, batch size {size}"
                    section.warn(f"{where}: the trial with {level} failed: {fault}")
            if lost:
                section.warn(f"Batch size {size}: {len(lost)} trials have no committed rows.")

    def _entered(self, size: int, names: Collection[str]) -> list[Cell]:
        """Return the settings that enter the first round, without minibatches of a single edit."""
        return [
            cell
            for cell in [*self.listed, *self.further.get(size, ())]
            if cell[0] in names and not (size == 1 and by_minibatches(self.settings[cell]))
        ]

    def jobs(self) -> dict[tuple[str, int], list[int]]:
        """Return how many edits each trial of a method at a batch size takes, but for later ones
        beyond the ends of ranges."""
        found: dict[tuple[str, int], list[int]] = {}
        for name, size in product(dict.fromkeys(name for name, _ in self.listed), self.sizes):
            count = len(self._entered(size, [name]))
            for number in range(len(self.rounds) if count else 0):
                last = number == len(self.rounds) - 1
                count = count if not number else min(count, 2 if last else max(2, count // 3))
                before = _edits(size, self.rounds, number - 1) if number else 0
                took = _edits(size, self.rounds, number) - before
                found.setdefault((name, size), []).extend([took] * count)
        return found

    def share(self, name: str, size: int, part: tuple[int, int], section: Any) -> None:
        """Make all trials of a method at a batch size, or store what precedes any (see
        `Comparison.share`)."""
        if name == UNEDITED:
            self.study.prepare(list(self.settings.values()))
        else:
            self.run(section, [size], [name])

    def _halve(self, size: int, names: Collection[str]) -> dict[Cell, str | None]:
        """Make the trials of every round; return why trials failed, None where rows are missing."""
        entered = self._entered(size, names)
        faults: dict[Cell, str | None] = {}
        for number in range(len(self.rounds)):
            if number:
                entered = self._leading(size, number, entered)
            for cell in entered:
                given = self.settings[cell], size, _edits(size, self.rounds, number)
                try:
                    fault = attempt(self.study.run, *given, factor=self.factor, level=cell[1])
                except MissingRows:
                    faults[cell] = None
                else:
                    faults |= {cell: fault} if fault else {}
            vars(self).pop("scored", None)  # there are new rows
        return faults

    def _leading(self, size: int, number: int, entered: Sequence[Cell]) -> list[Cell]:
        """Return, of those that entered the round before, the best of each method."""
        edits, own = _edits(size, self.rounds, number - 1), self.scores
        own = own[(own["batch_size"] == size) & (own["batch"] < edits // size)]
        counts = pd.Series([name for name, _ in entered]).value_counts()
        last = number == len(self.rounds) - 1
        found: dict[str, dict[Cell, float]] = {}
        for cell, each in own.groupby(["method", "trial"], sort=False):
            if cell in entered and len(each) == edits:
                found.setdefault(cell[0], {})[cell] = overall(each)
        return [
            cell
            for name, scores in found.items()
            for cell in sorted(scores, key=scores.get, reverse=True)[
                : 2 if last else max(2, counts[name] // 3)
            ]
        ]

    def _extend(self, section: Any, size: int, names: Collection[str]) -> bool:
        """Add settings beyond the ends of ranges that the best ones lie at, and say them."""
        found, best = self.further.setdefault(size, []), self.best()
        extended = {name for name, _ in found}  # once
        for row in best[best["batch_size"] == size].itertuples():
            name, where = row.method, f"{row.method}, batch size {size}"
            if name not in names or name in extended:
                continue
            chosen, own = self.settings[name, row.trial], self.ranges.get((size, name), {})
            for field, one in own.items():
                value = getattr(chosen, field)
                if not one.extend or not (side := one.edge(value)):
                    continue
                values, wider = one.beyond(side, whole(chosen, field))
                self.ranges[size, name] = self.ranges[size, name] | {field: wider}
                further = [changed(chosen, {field: each}, where) for each in values]
                cells = {(name, differences(each, self.base[name])): each for each in further}
                self.settings |= cells
                found += cells
                listed = ", ".join(f"{each:g}" for each in values)
                end = f"the best {field}, {value:g}, lies at an end of its range"
                section.observe(f"{where}: {end}, so {listed} were tried too.")
        cells = pd.DataFrame(list(self.settings), columns=["method", "trial"])
        self.cells = cells if found else self.cells
        return bool(found)

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The scores of every trial, and of no edit, by kind of probe and edit."""
        after = self.study.read()
        after = after[after["factor"] == self.factor]
        return compare.scored(after, self.study.before, same_edits=False)

    @property
    def scores(self) -> pd.DataFrame:
        """The efficacy (`score`), locality (`kept`) and average of every trial and edit."""
        place = ["batch_size", "batch", "edit", "method", "trial"]
        found = self.scored[self.scored["method"] != compare.BEFORE]
        kinds = dict(list(found.rename(columns={"level": "trial"}).groupby("kind")))
        average = kinds["average"].set_index(place)["score"].rename("average")
        both = kinds["balance"].join(average, on=place)[[*place, "score", "kept", "average"]]
        both["split"] = self.study.dataset.split
        both["learning_rate"] = [
            self.settings[cell].learning_rate
            for cell in zip(both["method"], both["trial"], strict=True)
        ]
        return self.cells.merge(both, on=["method", "trial"]).astype({"batch_size": int})

    @property
    def untouched(self) -> dict[str, float]:
        """The balance and the average without any edit."""
        found = self.scored[self.scored["method"] == compare.BEFORE].drop_duplicates(
            ["edit", "kind"]
        )
        return {kind: overall(own) for kind, own in found.groupby("kind")}

    def means(self) -> pd.DataFrame:
        """Return every trial, in order: `cells`, batch_size, learning_rate, `score` (its balance),
        average, edits, `chosen` (the best of those with most edits) and `before` (the balance
        without any edit)."""
        by = [*self.cells, "batch_size", "learning_rate"]
        found = [
            [*cell, overall(each), each["average"].mean(), each["edit"].nunique()]
            for cell, each in self.scores.groupby(by, sort=False, dropna=False)
        ]
        table = pd.DataFrame(found, columns=[*by, "score", "average", "edits"])
        most = table["edits"] == table.groupby(self.among)["edits"].transform("max")
        best = table[most].groupby(self.among)["score"].idxmax()
        return table.assign(chosen=table.index.isin(best), before=self.untouched["balance"])

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
        """Check that all chosen trials have all their edits, and warn of numbers at an edge."""
        means = self.means()
        best, last = means[means["chosen"]], len(self.rounds) - 1
        wanted = [_edits(size, self.rounds, last) for size in best["batch_size"]]
        section.check(
            best["edits"].eq(wanted).all(), "every chosen trial was made on all development edits"
        )
        edges, rates = [], means.groupby("method")["learning_rate"].unique()
        for row in best.to_dict("records"):
            tried, trial = rates[row["method"]], self.settings[row["method"], row["trial"]]
            own = self.ranges.get((row.get("batch_size"), row["method"]))
            at = [field for field, one in (own or {}).items() if one.edge(getattr(trial, field))]
            if own is None and len(tried) > 2 and row["learning_rate"] in (min(tried), max(tried)):
                at = ["learning_rate"]
            where = ", ".join(str(row[name]) for name in self.among)
            edges += [f"{where} ({field} {getattr(trial, field):g})" for field in at]
        if edges:
            beyond = "at the edge of those tried, so a better one may lie beyond"
            section.warn(f"The best setting is {beyond}: {'; '.join(edges)}.")

    def budget(self) -> pd.DataFrame:
        """Return what the search for each method took: distinct settings, development edits, and
        trainings (of a setting on an edit). `tuning_levels` is the search for FT-UKE, unless it
        has trials of its own. Read from the rows of this study, and the committed ones of that.
        """
        levels, name, found = self.study.paths, "tuning_levels", [self.study.read()]
        searched = self.study.name == name or "FT-UKE" in set(found[0]["method"])
        if not searched and levels.exported(name).is_file():
            found.append(rows.committed(levels, name).assign(method="FT-UKE"))
        made = pd.concat(found)[["method", "recipe", "batch_size", "edit"]].drop_duplicates()
        groups = made.groupby("method", sort=False)
        counts = groups.agg(settings=("recipe", "nunique"), edits=("edit", "nunique"))
        return counts.assign(trainings=groups.size()).reset_index()

    def say_budget(self, section: Any) -> pd.DataFrame:
        """Say the budget of each method (`budget.<key>.settings` and so on), warn where they
        differ, and return it."""
        table = self.budget()
        for row in table.to_dict("records"):
            for name in ("settings", "edits", "trainings"):
                section.say(f"budget.{key(row['method'])}.{name}", row[name])
        if table["settings"].nunique() > 1:
            pairs = zip(table["settings"], table["method"], strict=True)
            listed = ", ".join(f"{count} of {name}" for count, name in pairs)
            section.warn(f"Budgets are unequal: settings {listed}.")
        return table

    def say(self, section: Any, names: Mapping[str, str] | None = None) -> None:
        """Say the best balance of each method (`tuning.<batch size>.<key>.balance`), and the
        average of the same trial."""
        for row in self.best().itertuples():
            name = f"tuning.{row.batch_size}.{(names or {}).get(row.method, key(row.method))}"
            section.say(f"{name}.balance", row.score, n=row.edits)
            section.say(f"{name}.average", row.average, n=row.edits)


def _edits(size: int, rounds: Sequence[int], number: int) -> int:
    """Return how many edits a trial has had by the end of a round."""
    least = 2 if size > 1 and 0 < number == len(rounds) - 1 else 1
    return max(rounds[number] // size, least) * size


def _check(study: Study, rounds: Sequence[int]) -> None:
    """Refuse rounds that do not grow, and edits on which nothing may be chosen."""
    dataset, data = study.dataset, study.paths.data
    if not rounds or min(rounds) < 1 or any(one >= two for one, two in pairwise(rounds)):
        given = ", ".join(map(str, rounds)) or "none"
        raise InputError(f"rounds: {given}; expected growing numbers of edits, at least one")
    foreign = dataset.world_seed is None and own_name(study.subject.name) == "embedded"
    if dataset.split != "development" or foreign:
        of = "the world's development edits" if foreign else "development edits"
        found = f"found split '{dataset.split}' of '{data}'"
        raise InputError(f"{study.name}: settings are chosen on {of} alone, {found}")
    if not {probe.kind for probe in dataset.every_probe} & {*in_group("locality")}:
        expected = "the balance needs a locality set, which `make locality` builds"
        raise InputError(f"{study.name}: no locality probes of '{data}'; {expected}")


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
        every = [level for factor in recipes.FACTORS.values() for level in factor.levels]
        for name, recipe in families.items():
            studied = recipes.levels(recipe, names or every).items()  # more than candidates have
            pairs = [(factor, level) for factor, own in studied for level in own]
            for (factor, level), rate in product(pairs, rates[name]):
                varied = recipes.vary(recipe, {factor: level})
                tried[name].append(varied.model_copy(update={"learning_rate": rate}))
                cells.append((name, factor, level, differences(tried[name][-1], recipe)))
        super().__init__(study, tried, families, rounds=[limit])
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
            balance=[Score(*each) for each in ends],
            chosen=[rule[name][factor] == level for name, factor, level in cells],
            level=found["level"].map(label),
        )

    def to_keep(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Return best rates and scores by method, factor and level, for `catalog.write`."""
        found: dict[str, dict[str, dict]] = {}
        for row in self.best().itertuples():
            own = {"learning_rate": row.learning_rate}
            own |= {"balance": round(row.score, 4), "average": round(row.average, 4)}
            found.setdefault(row.method, {}).setdefault(row.factor, {})[row.level] = own
        return found

    def candidates(self) -> dict[str, Recipe]:
        """Return what each family becomes with the chosen level of every factor."""
        rule = self.rule()
        return {name: recipes.candidate(one, rule[name]) for name, one in self.base.items()}

    def say(self, section: Any) -> None:
        """Say every level's balance (`tuning.level.<method>.<factor>.<level>`)."""
        for row in summarise(self.tuned(), self.among).itertuples():
            name = f"tuning.level.{key(row.method)}.{row.factor}.{row.level}"
            section.say(name, row.mean, row.low, row.high, n=row.n)
