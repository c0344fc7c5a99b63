"""Compare the levels of one factor of a recipe: what the factor notebooks share."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd

from uke.errors import InputError, nearest
from uke.methods import recipes
from uke.methods.catalog import at_level, best_single, configured, find, key
from uke.methods.recipes import FACTORS, FAMILIES, SINGLE_BLOCKS, Recipe
from uke.results import compare
from uke.results.stats import Interval, Score, summarise
from uke.study.comparison import Comparison, say_means
from uke.study.study import Study

# By factor, what is contrasted: the end of its key, a level and the level it is compared with; None
# is the single block that was best on development edits.
CONTRASTS: Mapping[str, Mapping[str, tuple[str, str | None]]] = {
    "loss_scope": {"": ("target_tokens", "last_prompt_token")},
    "layers": {"": ("all", None)},
    "components": {"": ("mlp", "attention"), ".both": ("both", "mlp")},
    "chat_template": {"": ("with", "without")},
    "end_of_turn": {"": ("with", "without")},
}
# By factor, what its effect on direct weights less that on adapters is of (the first contrast of
# each if None), and the field that both must have alike: else the interaction is void.
INTERACTIONS: Mapping[str, tuple[tuple[str, str] | None, str]] = {
    "layers": (None, "components"),
    "components": (("mlp", "query_value"), "layers"),
}
RAW = "asked_without"  # in keys: every probe was asked through a raw prompt


class FactorStudy(Comparison):
    """Compare the levels of one factor on the same edits, each at its own tuned rate.

        layers = FactorStudy("layers", ["FT-M", "LoRA"], [], Study("04_factor_layers", dataset))
        layers.run(section)  # trains what has no rows yet
        layers.scores        # a row per method, level, edit and kind of probe
        layers.effects       # all blocks minus the best single one, paired by edit

    No `methods` stand for FT-M and LoRA, no `levels` for all of the factor. Methods without factors
    and levels of other factors are left out, as are levels for adapters with direct weights if not
    named. CONTRASTS says what is compared with what; where a selection of levels has none of these
    pairs, its last level is compared with its first. InputError for an unknown factor, method or
    level (with the nearest name), where no method has factors, and for fewer than two levels.
    """

    by = ["method", "level"]

    def __init__(self, factor: str, methods: Sequence[str], levels: Sequence[str], study: Study):
        super().__init__(study)
        if factor not in FACTORS:
            raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
        self.factor, raw = factor, study.chat is False
        params = study.paths.home / "params", study.subject.name
        tuned = configured(*params)
        found = [find(name, tuned) for name in methods or FAMILIES]
        self.asked = [method.name for method in found if method.factors]
        self.methods = study.with_rows(self.asked)
        if not self.methods:
            fault = "it has no levels of factors; expected a way to fine-tune"
            raise InputError(f"{found[0].name}: {fault}")
        self.levels = {name: self._levels(tuned[name], levels) for name in self.methods}
        self.pairs: dict[str, tuple[str, str, str]] = {}
        for name, own in self.levels.items():
            single = best_single(*params, name, own) if set(SINGLE_BLOCKS) & set(own) else None
            self.pairs |= self._pairs(name, single)
        self._first = {pair[0]: name for name, pair in reversed(self.pairs.items())}
        self.cells = [(name, level) for name, own in self.levels.items() for level in own]
        self.runs = [
            (at_level(*params, name, factor, level), {"factor": factor, "level": level})
            for name, level in self.cells
        ]
        self._recipes = {recipe.name: recipe for recipe, _ in self.runs}
        self.title = compare.label(factor) + (", asked through raw prompts" if raw else "")
        self._prefix = f"factor.{factor}_{RAW}" if raw else f"factor.{factor}"
        # The kinds whose effects are said, and the end of their key.
        self._said = {kind: kind for kind in ("balance", "average", "original")}
        if raw:
            self._said = {"average": RAW} | {k: f"{RAW}_{k}" for k in ("balance", "original")}

    def _levels(self, method: Recipe, names: Sequence[str]) -> list[str]:
        """Return the levels compared on a method, in the order of the factor."""
        recipes.levels(method, names)  # refuses unknown ones
        own = [name for name in names if name in FACTORS[self.factor].levels]
        chosen = recipes.levels(method, own).get(self.factor, [])
        chosen = self.study.with_rows(chosen, "level", method=method.name, factor=self.factor)
        if len(chosen) < 2:
            where = f"factor {self.factor}, {method.name}: {', '.join(chosen) or 'none'}"
            raise InputError(f"{where}: expected two or more levels to compare")
        return chosen

    def _pairs(self, method: str, single: str | None) -> dict[str, tuple[str, str, str]]:
        """Return a method's contrasts by key: method, level, and the level it is compared with."""
        levels, pairs = self.levels[method], {}
        for end, (level, against) in CONTRASTS.get(self.factor, {}).items():
            if {level, against or single} <= set(levels):
                pairs[key(method) + end] = (method, level, against or single)
        first, last = levels[0], levels[-1]
        return pairs or {f"{key(method)}.{last}_minus_{first}": (method, last, first)}

    def read(self) -> pd.DataFrame:
        every = self.study.read()
        return every[every["factor"] == self.factor]

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Primary metrics and the average metric by cell, edit and kind, also without any edit."""
        return compare.scored(self.rows, self.study.before)

    def best(self) -> dict[str, str]:
        """Return by method the level with the highest balance on these very edits."""
        best_first = compare.means(self.scores, ["method", "level"]).drop_duplicates("method")
        levels = dict(zip(best_first["method"], best_first["level"], strict=True))
        return {name: levels[name] for name in self.methods if name in levels}

    @cached_property
    def contrasts(self) -> dict[str, tuple[str, dict[tuple[str, str], float]]]:
        """By key, words and weights of the contrasts, among them the interaction, if any."""
        contrasts = {}
        for name, (method, level, against) in self.pairs.items():
            words = f"{compare.label(level)} minus {compare.label(against)}"
            weights = {(method, level): 1.0, (method, against): -1.0}
            contrasts[name] = (f"{method}, {self.title}: {words}", weights)
        if self.crossed:
            levels, weights = INTERACTIONS[self.factor][0], {}
            for sign, name in zip((1.0, -1.0), self.crossed, strict=True):
                level, against = levels or self.pairs[self._first[name]][1:]
                weights |= {(name, level): sign, (name, against): -sign}
            words = f"{' minus '.join(self.crossed)}, {self.title}"
            words += f": {' minus '.join(map(compare.label, levels))}" if levels else ""
            contrasts["interaction"] = (words, weights)
        return contrasts

    @cached_property
    def crossed(self) -> tuple[str, str] | None:
        """Direct weights and adapters whose effects an interaction compares, alike if any are."""
        if self.factor not in INTERACTIONS:
            return None
        own = [name for name in self._recipes if name in self._first]
        adapters = [name for name in own if self._recipes[name].adapter]
        pairs = product([name for name in own if name not in adapters], adapters)
        return min(pairs, key=lambda pair: self._confounded(pair) != "", default=None)

    def _confounded(self, methods: Sequence[str]) -> str:
        """Return why an interaction of these methods would say nothing; empty where it does."""
        field = INTERACTIONS[self.factor][1]
        alike = len({getattr(self._recipes[name], field) for name in methods}) == 1
        fault = f"{' and '.join(methods)} differ in {field} too, so either may make the difference."
        return "" if alike else fault

    def crossing(self, kind: str = "balance") -> pd.DataFrame:
        """Return the mean of a kind, a row a level and a column a method; None without rows."""
        own = summarise(self.scores[self.scores["kind"] == kind], ["level", "method"])
        ends = own[["mean", "low", "high"]].itertuples(index=False)
        own["cell"] = [Score(*each) for each in ends]
        table = own.pivot(index="level", columns="method", values="cell")
        every = dict.fromkeys(level for own in self.levels.values() for level in own)
        return table.reindex(index=[*every], columns=self.asked).reset_index()

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Every contrast by kind in points, paired by edit; p is Holm-corrected over all."""
        return compare.contrasts(self.scores, dict(self.contrasts.values()))

    def effect(self, name: str, kind: str = "balance") -> Interval | None:
        """Return a contrast, or a method's first one; None where it was not run."""
        words, _ = self.contrasts.get(self._first.get(name, name), ("", {}))
        return compare.effect(self.effects, words, kind)

    def gained(self, *methods: str, sign: int = 1) -> bool:
        """Whether the first contrasts of these methods (or all) are above 0 (`sign` -1: below)."""
        found = [self.effect(name) for name in methods or self.methods]
        return all(one is not None and min(sign * one.low, sign * one.high) > 0 for one in found)

    def check(self, section: Any) -> None:
        """Check that each level is one recipe of its own, and that every edit was undone."""
        recipes = self.rows.groupby("method")[["recipe", "level"]].nunique()
        of_each = self.rows.groupby(self.by)["recipe"].nunique()
        section.check(
            of_each.eq(1).all() and recipes["recipe"].eq(recipes["level"]).all(),
            f"{self.title}: each level of a method is one recipe, and no two are the same",
        )
        super().check(section)

    def say(self, section: Any) -> None:
        """Say every score (`factor.<factor>.<method>.<level>.<kind>`) and the effects
        (`effect.<factor>.<contrast>.<kind>`) in a section; `said` and `sentences` quote them."""
        own = self.scores[self.scores["method"].isin(self.methods)]
        self.said = say_means(section, self._prefix, own, ["method", "level", "kind"])
        for contrast in self.contrasts:
            for kind, end in self._said.items():
                if found := self.effect(contrast, kind):
                    name = f"effect.{self.factor}.{contrast}.{end}"
                    void = self._confounded(self.crossed) if contrast == "interaction" else ""
                    ends = {"n": found.n, "unit": "points", "void": void}
                    self.said[name] = section.say(name, *found[:3], **ends)

    def sentences(self, template: str) -> str:
        """Fill a sentence for each method whose first contrast was said, less the number of edits.

        Fields: `method`; `level`, `against` and `best` (the best balance on these edits); effects
        `balance`, `average` and `original`; of each level its scores, as in `against_original`.
        """
        sentences, best = [], self.best()
        for method in self.methods:
            _, level, against = self.pairs[self._first[method]]
            effect = f"effect.{self.factor}.{self._first[method]}"
            fields = {kind: self.said.get(f"{effect}.{end}") for kind, end in self._said.items()}
            if not fields["average"]:
                continue
            chosen = {"level": level, "against": against, "best": best[method]}
            for name, one in chosen.items():
                cell = f"{self._prefix}.{key(method)}.{one}"
                fields |= {f"{name}_{kind}": self.said[f"{cell}.{kind}"] for kind in self._said}
                fields[name] = compare.label(one)
            texts = {name: text.partition(", n =")[0] for name, text in fields.items()}
            sentences.append(template.format(method=method, **texts))
        return " ".join(sentences) or "No method has both levels, so nothing can be compared."
