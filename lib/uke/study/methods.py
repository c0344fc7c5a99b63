"""Compare methods at one batch size or several: what the notebooks on both share."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from uke.data.edits import KINDS
from uke.methods.catalog import METHODS, configured, find
from uke.methods.method import Method
from uke.project import Paths
from uke.results import compare, control
from uke.study.comparison import Comparison, by_minibatches, say_means
from uke.study.study import Study

LEADER = "FT-UKE"  # whose lead over the best baseline is measured, if it is among the methods
BASELINES = ("locate-then-edit", "in-context")  # families of methods it is compared with


class MethodStudy(Comparison):
    """Compare methods on the same edits, and one of them with the best baseline.

        single = MethodStudy(Study("07_recipe", dataset), ["FT-UKE", "AnyEdit++"])
        single.run(section)  # writes what has no rows yet
        compare.leads(single.scores, single.leader, single.best)

    No `methods` stand for all that write a single edit into the weights; each is tuned at the
    nearest batch size. At the sizes in `full` (all, if None) every method is run, elsewhere of the
    baselines the best alone. A size gets the first `limit` edits; the leader, the best baseline,
    and every method at a full size that `limit` fills, get at least `batches` batches.
    """

    def __init__(
        self,
        study: Study,
        methods: Sequence[str],
        sizes: Sequence[int] = (1,),
        full: Sequence[int] | None = None,
        limit: int | None = None,
        batches: int = 1,
        tuning: str = "tuning",
    ):
        super().__init__(study)
        params = study.paths.home / "params", study.subject.name
        self.published = configured(*params, tuned=False)
        self.names = study.with_rows(asked := writers(*params, methods))
        absent = [name for name in asked if name not in self.names]
        self.cells = self.names
        self.baselines = [n for n in self.names if self.published[n].family in BASELINES]
        others = [name for name in self.names if name not in self.baselines]
        writing = [name for name in self.baselines if self.published[name].moves_weights]
        self.leader = LEADER if LEADER in others else next(iter(others), None)
        # Development rows may be those of this run, or of its model's study of UnKEBench edits, as
        # may the control of a model of the real world: another world is another model.
        of_world = study.subject.name == "embedded" or study.dataset.world_seed not in (None, 1)
        other = Paths("embedded") if of_world else Paths(study.paths.profile, "unkebench")
        places = [study.paths, other]
        own = of_world or study.paths.exported(control.STUDY).is_file()
        self.untestable = control.untestable(control.of_run(places[not own]), writing)
        full, limit = sizes if full is None else full, limit or len(study.dataset.edits)
        study_of = tuning if any(one.exported(tuning).is_file() for one in places) else "tuning"
        known = dict.fromkeys(sizes, self.baselines)
        every = compare.best_baselines(places, known, study_of)
        ran = {}  # edits with committed rows, which come as they are made, by batch size and method
        if study.committed:  # where the best one has too few, the best with all stands for it
            held = study.committed.after.groupby(["batch_size", "method"])["edit"]
            ran = held.nunique().to_dict()
            least = {size: max(limit // size, batches) * size for size in sizes}
            known = {n: [b for b in known[n] if ran.get((n, b), 0) >= least[n]] for n in sizes}
        self.best = compare.best_baselines(places, known, study_of)
        lost = [f"{n} at {size}" for size, n in every.items() if self.best.get(size) != n]
        text = f"The best baseline on development edits has no rows here ({', '.join(lost)}): the "
        self.caveats = [f"{text}best of those that have stands for it."] if lost else []
        self.caveats += [f"No rows are there yet of {', '.join(absent)}."] if absent else []
        elsewhere = not of_world and self.best and not study.paths.exported(study_of).is_file()
        if study_of != tuning or elsewhere:
            self.caveats.append("Baselines were chosen on development edits of the other dataset.")
        self.plan: dict[tuple[int, str], int] = {}  # how many edits, by batch size and name
        for size in sizes:
            compared = [self.best[size]] if size in self.best else self.baselines
            for name in self.names:
                left_out = size not in full and name in self.baselines and name not in compared
                if left_out or (size == 1 and by_minibatches(self.published[name])):
                    continue
                counted = name in (self.leader, *compared) or (size in full and size <= limit)
                self.plan[size, name] = max(limit // size, batches if counted else 1) * size
        begun = {size for size, _ in ran}
        lacking = {at: ran.get(at, 0) for at, n in self.plan.items() if ran.get(at, 0) < n}
        few = {at: n for at, n in lacking.items() if at[0] in begun}
        self.plan |= {(size, name): n // size * size for (size, name), n in few.items()}
        self.plan = {at: n for at, n in self.plan.items() if n}
        names = ", ".join(dict.fromkeys(name for _, name in few))
        self.caveats += [f"Fewer edits than asked for have rows of {names}."] if few else []
        tuned = {size: configured(*params, size) for size in sizes}
        self.runs = [
            (tuned[size][name], {"batch_size": size, "limit": count})
            for (size, name), count in self.plan.items()
        ]

    @staticmethod
    def edits_needed(sizes: Sequence[int], limit: int, batches: int) -> int:
        """Return how many edits such a study reads."""
        return max(limit, *(max(limit // size, batches) * size for size in sizes))

    def void(self, baselines: Iterable[str]) -> str:
        """Return why no verdict may rest on these baselines; empty where one may."""
        return " ".join(self.untestable.get(name, "") for name in dict.fromkeys(baselines)).strip()

    def write(self, method: Method, options: dict[str, Any]) -> None:
        self.study.run(method, **options)  # a method that fails is no comparison

    def run(self, section: Any) -> None:
        super().run(section)
        if self.baselines and not self.best:
            self.best = compare.best_here(self.scores, self.baselines)
            fallback = "the best is the best on these very edits, which flatters it"
            self.caveats += [f"No development rows of the baselines: {fallback}."]
        if grey := ", ".join(self.untestable):
            self.caveats.append(f"Not testable on this model (see `controls`): {grey}.")
        for caveat in self.caveats:
            section.warn(caveat)
        section.untestable |= self.untestable

    def read(self) -> pd.DataFrame:
        own = super().read()
        return own[own["factor"].isna()]

    @cached_property
    def strengths(self) -> pd.DataFrame:
        """Every score with the share of its change that was applied as `level`, 1 among them."""
        found = self.study.read()
        found = dict(list(found[found["batch_size"] == 1].groupby("method")))
        after = pd.concat([found[name] for name in self.names if name in found])
        return compare.scored(after.fillna({"level": "1"}), self.study.before, False)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every score by batch size, method (and `no edit`), batch, edit and kind."""
        return compare.scored(self.rows, self.study.before, False)

    def say(self, section: Any, prefix: str, by: Sequence[str], kinds: Sequence[str] = ()) -> None:
        """Say headline numbers and means on these kinds of probe (all, if none), for `said`."""
        probes = [kind for kind in kinds or KINDS if kind in KINDS]
        own = self.scores[self.scores["kind"].isin(probes)]
        self.said |= say_means(section, prefix, pd.concat([own, compare.sides(self.scores)]), by)

    def check(self, section: Any) -> None:
        """Check that no row is missing, and that every edit was undone."""
        counts = self.rows.groupby(["batch_size", "method"])["edit"].nunique().to_dict()
        section.check(counts == self.plan, "every method wrote all edits that it was asked for")
        super().check(section)


def writers(folder: Path, model: str, names: Sequence[str] = ()) -> list[str]:
    """Return the names of these methods, or of all that write a single edit into the weights."""
    published = configured(folder, model, tuned=False)
    every = [n for n in METHODS if published[n].moves_weights and not by_minibatches(published[n])]
    return [find(name, published).name for name in names or every]
