"""Compare the levels of one factor of a recipe: what the factor notebooks share."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from uke.errors import InputError, nearest
from uke.methods import recipes
from uke.methods.catalog import at_level, best_single, configured, find, key
from uke.methods.recipes import FACTORS, FAMILIES, SINGLE_BLOCKS
from uke.results import compare
from uke.results.stats import Interval
from uke.study.comparison import Comparison, say_means
from uke.study.study import Study

BEST_SINGLE = "best single block"  # the one that was best on development edits
# By factor, what is contrasted: the end of its key, a level and the level it is compared with.
CONTRASTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "loss_scope": {"": ("target_tokens", "last_prompt_token")},
    "layers": {"": ("all", BEST_SINGLE)},
    "components": {"": ("mlp", "attention"), "both": ("both", "mlp")},
    "chat_template": {"": ("with", "without")},
    "end_of_turn": {"": ("with", "without")},
}
SAID = ("average", "original")  # the kinds whose effects are said
RAW = "asked_without"  # in keys: every probe was asked through a raw prompt


class FactorStudy(Comparison):
    """Compare the levels of one factor on the same edits, each at its own tuned rate.

        layers = FactorStudy("layers", ["FT-M", "LoRA"], [], Study("04_factor_layers", dataset))
        layers.run(section)  # trains what has no rows yet
        layers.scores        # a row per method, level, edit and kind of probe
        layers.effects       # all blocks minus the best single one, paired by edit

    No `methods` stand for FT-M and LoRA, no `levels` for all of the factor. Methods without factors
    and levels of other factors are left out, as are levels for adapters with direct weights.
    CONTRASTS says what is compared with what; where a selection of levels has none of these pairs,
    its last level is compared with its first. InputError for an unknown factor, method or level
    (with the nearest name), where no method has factors, and for fewer than two levels.
    """

    by = ["method", "level"]

    def __init__(self, factor: str, methods: Sequence[str], levels: Sequence[str], study: Study):
        super().__init__(study)
        if factor not in FACTORS:
            raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
        self.factor, self._raw = factor, study.chat is False
        self._params = study.paths.home / "params", study.subject.name
        self._tuned = configured(*self._params)
        found = [find(name, self._tuned) for name in methods or FAMILIES]
        self.methods = [method.name for method in found if method.factors]
        if not self.methods:
            fault = "it has no levels of factors; expected a way to fine-tune"
            raise InputError(f"{found[0].name}: {fault}")
        self.levels = {method: self._levels(method, levels) for method in self.methods}
        self.pairs = {name: pair for each in self.methods for name, pair in self._pairs(each)}
        self.first: dict[str, str] = {}  # the key of each method's first contrast
        for name, (method, *_) in self.pairs.items():
            self.first.setdefault(method, name)
        self.cells = [(name, level) for name, own in self.levels.items() for level in own]
        self.runs = [
            (at_level(*self._params, name, factor, level), {"factor": factor, "level": level})
            for name, level in self.cells
        ]
        self.title = compare.label(factor) + (", asked through raw prompts" if self._raw else "")
        self._prefix = f"factor.{factor}_{RAW}" if self._raw else f"factor.{factor}"

    def _levels(self, method: str, names: Sequence[str]) -> list[str]:
        """Return the levels compared on a method, in the order of the factor."""
        chosen = recipes.levels(self._tuned[method], names).get(self.factor, [])
        if not set(names) & set(FACTORS[self.factor].levels):
            chosen = recipes.levels(self._tuned[method])[self.factor]
        if len(chosen) < 2:
            where = f"factor {self.factor}, {method}: {', '.join(chosen) or 'none'}"
            raise InputError(f"{where}: expected two or more levels to compare")
        return chosen

    def _pairs(self, method: str) -> list[tuple[str, tuple[str, str, str]]]:
        """Return the contrasts on a method: key, and method, level, and the level it is against."""
        levels, pairs = self.levels[method], {}
        for end, (level, against) in CONTRASTS[self.factor].items():
            if against == BEST_SINGLE and set(SINGLE_BLOCKS) & set(levels):
                against = best_single(*self._params, method, levels)
            if {level, against} <= set(levels):
                pairs[end] = (method, level, against)
        if not pairs:
            pairs[f"{levels[-1]}_minus_{levels[0]}"] = (method, levels[-1], levels[0])
        return [(".".join(filter(None, [key(method), end])), pair) for end, pair in pairs.items()]

    def read(self) -> pd.DataFrame:
        every = self.study.read()
        return every[every["factor"] == self.factor]

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Primary metrics and the average metric by cell, edit and kind, also without any edit."""
        return compare.scored(self.rows, self.study.before)

    def mean(self, level: str, kind: str = "average") -> float:
        """Return the mean score at a level (or of `no edit`) over edits and methods."""
        own = self.scores[(self.scores["level"] == level) & (self.scores["kind"] == kind)]
        return float(own["score"].mean())

    def best(self) -> dict[str, str]:
        """Return by method the level with the highest average metric on these very edits."""
        own = self.scores[self.scores["kind"] == "average"]
        means = own.groupby(["method", "level"], sort=False)["score"].mean()
        return {name: means[name].idxmax() for name in self.methods if name in means.index}

    @cached_property
    def contrasts(self) -> dict[str, tuple[str, dict[tuple[str, str], float]]]:
        """By key, the words and the weights of each contrast.

        For the layers of two methods also the interaction: the first contrast minus the second.
        """
        contrasts = {}
        for name, (method, level, against) in self.pairs.items():
            words = f"{compare.label(level)} minus {compare.label(against)}"
            weights = {(method, level): 1.0, (method, against): -1.0}
            contrasts[name] = (f"{method}, {self.title}: {words}", weights)
        if self.factor == "layers" and len(self.methods) == len(contrasts) == 2:
            (_, first), (_, second) = contrasts.values()
            weights = first | {cell: -weight for cell, weight in second.items()}
            contrasts["interaction"] = (f"{' minus '.join(self.methods)}, {self.title}", weights)
        return contrasts

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Every contrast by kind in points, paired by edit; p is Holm-corrected over all."""
        return compare.contrasts(self.scores, dict(self.contrasts.values()))

    def effect(self, name: str, kind: str = "average") -> Interval | None:
        """Return a contrast, or a method's first one; None where it was not run."""
        words, _ = self.contrasts.get(self.first.get(name, name), ("", {}))
        return compare.effect(self.effects, words, kind)

    def gained(self, *methods: str, sign: int = 1) -> bool:
        """Whether the first contrast of these methods (all, if none) raises the average metric.

        That is, its whole interval lies above zero; with `sign` -1, below.
        """
        found = [self.effect(name) for name in methods or self.methods]
        return all(one is not None and min(sign * one.low, sign * one.high) > 0 for one in found)

    def check(self, section: Any) -> None:
        """Check in a section what the conclusion needs."""
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
            for kind in SAID:
                if found := self.effect(contrast, kind):
                    name = self._effect_key(contrast, kind)
                    self.said[name] = section.say(name, *found[:3], n=found.n, unit="points")

    def _effect_key(self, contrast: str, kind: str) -> str:
        if self._raw:
            kind = RAW if kind == "average" else f"{RAW}_{kind}"
        return f"effect.{self.factor}.{contrast}.{kind}"

    def sentences(self, template: str) -> str:
        """Fill a sentence for each method whose first contrast was said, less the number of edits.

        Fields: `method`; `level`, `against` and `best` (the best average on these edits); the
        effects `average` and `original`; of each level its scores, as in `against_original`.
        """
        sentences, best = [], self.best()
        for method, contrast in self.first.items():
            _, level, against = self.pairs[contrast]
            fields = {kind: self.said.get(self._effect_key(contrast, kind)) for kind in SAID}
            if not fields["average"]:
                continue
            chosen = {"level": level, "against": against, "best": best[method]}
            for name, one in chosen.items():
                cell = f"{self._prefix}.{key(method)}.{one}"
                fields |= {f"{name}_{kind}": self.said[f"{cell}.{kind}"] for kind in SAID}
                fields[name] = compare.label(one)
            texts = {name: text.partition(", n =")[0] for name, text in fields.items()}
            sentences.append(template.format(method=method, **texts))
        return " ".join(sentences) or "No method has both levels, so nothing can be compared."
