"""Compare the levels of one factor of a recipe: what the factor notebooks share."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from uke.errors import InputError, nearest
from uke.methods.catalog import at_level, best_single, configured, differences, find, key
from uke.methods.recipes import FACTORS, FAMILIES, SINGLE_BLOCKS, Recipe
from uke.results import compare
from uke.results.stats import interval, summarise
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


class FactorStudy:
    """Compare the levels of one factor on the same edits, each at its own tuned rate.

        layers = FactorStudy("layers", ["FT-M", "LoRA"], [], Study("04_factor_layers", dataset))
        layers.run(section)  # trains what has no rows yet
        layers.scores        # a row per method, level, edit and kind of probe
        layers.effects       # all blocks minus the best single one, paired by edit

    No `methods` stand for FT-M and LoRA. `levels` names levels of the factor, in any order; none
    stands for all. Levels that exist only for adapters are skipped for direct weights. CONTRASTS
    says what is compared with what; where a selection of levels has none of these pairs, its last
    level is compared with its first. Raises InputError for an unknown factor, method or level (with
    the nearest name), and for a method that is left with fewer than two levels.
    """

    def __init__(self, factor: str, methods: Sequence[str], levels: Sequence[str], study: Study):
        if factor not in FACTORS:
            raise InputError(f"unknown factor '{factor}'{nearest(factor, FACTORS)}")
        self.factor, self.study, self.said = factor, study, {}
        self._params, self._model = study.paths.home / "params", study.subject.name
        self._tuned = configured(self._params, self._model)
        self.methods = [find(name, self._tuned).name for name in methods or FAMILIES]
        self.levels = {method: self._levels(method, levels) for method in self.methods}
        self.pairs = {method: self._pairs(method) for method in self.methods}
        self.recipes: dict[tuple[str, str], Recipe] = {
            (method, level): at_level(self._params, self._model, method, factor, level)
            for method, chosen in self.levels.items()
            for level in chosen
        }

    @property
    def title(self) -> str:
        """The factor in words, and how it was asked about if not as usual."""
        raw = ", asked through raw prompts" if self.study.chat is False else ""
        return compare.label(self.factor) + raw

    def _levels(self, method: str, names: Sequence[str]) -> list[str]:
        """The levels compared on a method, in the order of the factor."""
        factor = self._tuned[method].factors.get(self.factor)
        if not factor:
            raise InputError(f"{method}: it has no levels of factors; expected a way to fine-tune")
        for name in names:
            if name not in factor.levels:
                known = nearest(name, factor.levels)
                raise InputError(f"factor {self.factor}: unknown level '{name}'{known}")
        skipped = () if self._tuned[method].adapter else factor.of_adapters
        chosen = [name for name in factor.levels if name not in skipped]
        chosen = [name for name in chosen if not names or name in names]
        if len(chosen) < 2:
            where = f"factor {self.factor}, {method}: {', '.join(chosen) or 'none'}"
            raise InputError(f"{where}: expected two or more levels to compare")
        return chosen

    def _pairs(self, method: str) -> dict[str, tuple[str, str]]:
        """What is contrasted on a method, by the end of its key."""
        levels, pairs = self.levels[method], {}
        for end, (level, against) in CONTRASTS[self.factor].items():
            if against == BEST_SINGLE and set(SINGLE_BLOCKS) & set(levels):
                against = best_single(self._params, self._model, method, levels)
            if {level, against} <= set(levels):
                pairs[end] = (level, against)
        return pairs or {f"{levels[-1]}_minus_{levels[0]}": (levels[-1], levels[0])}

    def run(self, section: Any) -> None:
        """Write the rows of every cell that has none, and warn in a section of what failed or is
        missing."""
        section.environment, section.smoke_run = self.study.environment, self.study.smoke_run()
        for (method, level), recipe in self.recipes.items():
            section.method(recipe.model_dump())
            fault = self.study.attempt(recipe, factor=self.factor, level=level)
            if fault:
                section.warn(f"{method}, {compare.label(level)}: failed ({fault})")
        edits = len(self.study.dataset.edits)
        counts = self.rows.groupby(["method", "level"])["edit"].nunique()
        for method, level in self.recipes:
            if (found := counts.get((method, level), 0)) < edits:
                section.warn(
                    f"{method}, {compare.label(level)}: {found} of {edits} edits have rows."
                )
        if kinds := compare.lacking(self.rows):
            section.warn(f"The average is without {', '.join(kinds)}: the data has no such probes.")

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of all cells, in the order of methods and levels."""
        every = self.study.read()
        cells = dict(list(every[every["factor"] == self.factor].groupby(["method", "level"])))
        return pd.concat([cells[cell] for cell in self.recipes if cell in cells])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Primary metrics and the average metric by cell, edit and kind, also without any edit."""
        return compare.scored(self.rows, self.study.before)

    def comparison(self) -> pd.DataFrame:
        """What each cell is and costs: how it differs from the method as tuned, learning rate,
        steps, seconds of training and of answering, and the relative norm of the change."""
        found = [
            (method, level, differences(recipe, self._tuned[method]))
            for (method, level), recipe in self.recipes.items()
        ]
        found = pd.DataFrame(found, columns=["method", "level", "differs from the method"])
        return found.merge(compare.costs(self.rows), on=["method", "level"], how="left")

    def mean(self, level: str, kind: str = "average") -> float:
        """Mean score at a level (or of `no edit`) over edits and methods; NaN where it has none."""
        own = self.scores[(self.scores["level"] == level) & (self.scores["kind"] == kind)]
        return float(own["score"].mean())

    def best(self, kind: str = "average") -> dict[str, str]:
        """By method, the level with the highest mean score on these very edits."""
        own = self.scores[self.scores["kind"] == kind]
        means = own.groupby(["method", "level"], sort=False)["score"].mean()
        return {name: means[name].idxmax() for name in self.methods if name in means.index}

    @cached_property
    def contrasts(self) -> dict[str, tuple[str, dict[tuple[str, str], float]]]:
        """By key, the words and the weights of each contrast; of the layers of two methods also
        the interaction, the first method's contrast minus the second's."""
        contrasts = {}
        for method, pairs in self.pairs.items():
            for end, (level, against) in pairs.items():
                levels = f"{compare.label(level)} minus {compare.label(against)}"
                words = f"{method}, {self.title}: {levels}"
                weights = {(method, level): 1.0, (method, against): -1.0}
                contrasts[".".join(filter(None, (key(method), end)))] = (words, weights)
        if self.factor == "layers" and len(self.methods) == len(contrasts) == 2:
            (_, first), (_, second) = contrasts.values()
            minus = {cell: -weight for cell, weight in second.items()}
            contrasts["interaction"] = (
                f"{' minus '.join(self.methods)}, {self.title}",
                first | minus,
            )
        return contrasts

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Every contrast by kind in points, paired by edit; p is Holm-corrected over all."""
        return compare.contrasts(self.scores, dict(self.contrasts.values()))

    def effect(self, name: str, kind: str = "average") -> tuple | None:
        """Difference, both ends and number of edits of a contrast, or of a method's first one;
        None where it was not run."""
        if name in self.methods:
            name = next(one for one in self.contrasts if one.split(".")[0] == key(name))
        return compare.effect(self.effects, self.contrasts.get(name, ("", {}))[0], kind)

    def gained(self, *methods: str) -> bool:
        """Whether the first contrast of each of these methods (of all, where none is named) raises
        the average metric: its whole interval lies above zero."""
        found = [self.effect(name) for name in methods or self.methods]
        return all(effect is not None and effect[1] > 0 for effect in found)

    def lost(self, *methods: str) -> bool:
        """Whether that contrast lowers the average metric of each of these methods."""
        found = [self.effect(name) for name in methods or self.methods]
        return all(effect is not None and effect[2] < 0 for effect in found)

    def check(self, section: Any) -> None:
        """Check in a section what the conclusion needs."""
        cells, edits = self.rows.groupby(["method", "level"]), len(self.study.dataset.edits)
        recipes = self.rows.groupby("method")[["recipe", "level"]].nunique()
        section.check(
            cells["edit"].nunique().eq(edits).all(),
            f"{self.title}: every level that has rows has all {edits} edits",
        )
        section.check(
            self.rows["log_probability"].dropna().le(0).all(),
            f"{self.title}: no log-probability is above 0",
        )
        section.check(
            cells["recipe"].nunique().eq(1).all() and recipes["recipe"].eq(recipes["level"]).all(),
            f"{self.title}: each level of a method is one recipe, and no two are the same",
        )

    def say(self, section: Any) -> None:
        """Say every score (`factor.<factor>.<method>.<level>.<kind>`) and the effects
        (`effect.<factor>.<contrast>.<kind>`) in a section; `said` and `sentences` quote them."""
        own = self.scores[self.scores["method"].isin(self.methods)]
        self.said = say_means(section, self._prefix, own, ["method", "level", "kind"])
        for contrast in self.contrasts:
            for kind in SAID:
                if found := self.effect(contrast, kind):
                    name = self._effect_key(contrast, kind)
                    self.said[name] = section.say(name, *found[:3], n=found[3], unit="points")

    def say_seconds(self, section: Any, level: str) -> None:
        """Say how many seconds an edit takes at a level of the first method, if that was run."""
        cell = (self.rows["method"] == self.methods[0]) & (self.rows["level"] == level)
        units = compare.seconds(self.rows[cell])
        if len(units):
            section.say("cost.edit_seconds", *interval(units["score"]), unit="s")

    @property
    def _prefix(self) -> str:
        raw = self.study.chat is False
        return f"factor.{self.factor}_{RAW}" if raw else f"factor.{self.factor}"

    def _effect_key(self, contrast: str, kind: str) -> str:
        if self.study.chat is False:
            kind = RAW if kind == "average" else f"{RAW}_{kind}"
        return f"effect.{self.factor}.{contrast}.{kind}"

    def sentences(self, template: str) -> str:
        """Fill a sentence for each method whose first contrast was run with what `say` said, less
        the number of edits.

        Fields: `method`; `level`, `against` and `best` (the best average on these edits); the
        effects `average` and `original`; of each level its scores, as in `against_original`.
        """
        sentences, best = [], self.best()
        for method, pairs in self.pairs.items():
            end, (level, against) = next(iter(pairs.items()))
            contrast = ".".join(filter(None, (key(method), end)))
            fields = {kind: self.said.get(self._effect_key(contrast, kind)) for kind in SAID}
            if fields["average"]:
                for name, chosen in (
                    ("level", level),
                    ("against", against),
                    ("best", best[method]),
                ):
                    cell = f"{self._prefix}.{key(method)}.{chosen}"
                    scores = {kind: self.said[f"{cell}.{kind}"] for kind in SAID}
                    fields |= {f"{name}_{kind}": text for kind, text in scores.items()}
                    fields[name] = compare.label(chosen)
                texts = {name: text.partition(", n =")[0] for name, text in fields.items()}
                sentences.append(template.format(method=method, **texts))
        return " ".join(sentences) or "No method has both levels, so nothing can be compared."
