"""Trials: settings given up or kept wrongly, ends of ranges passed twice, edits of a test."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from uke.errors import InputError
from uke.methods.catalog import Range
from uke.methods.recipes import RECIPES
from uke.study import tuning
from uke.study.tuning import LevelTrials, Trials

FT_M, BASE = RECIPES["FT-M"], {name: RECIPES[name] for name in ("FT-M", "LocFT-BF")}
STEPS = {"FT-M": [FT_M.model_copy(update={"steps": steps}) for steps in range(1, 13)]}
BUDGET = {"settings": 3, "edits": 4, "trainings": 2 * (4 + 4 + 2)}
MINIBATCHES = [BASE["LocFT-BF"].model_copy(update={"batch_size": size}) for size in (2, 3, 4)]


class Fake:
    """A study in which a trial has the efficacy and locality that a function of it says."""

    def __init__(self, score, split="development", model="smollm2", kinds=("rel_doc",), edits=99):
        self.dataset = SimpleNamespace(split=split, world_seed=None, edits=range(edits))
        self.dataset.every_probe = [SimpleNamespace(kind=kind) for kind in kinds]
        self.paths = SimpleNamespace(profile="quick", data="unkebench", exported=Path)
        self.subject = SimpleNamespace(name=model)
        self.name, self.environment, self.score, self.found = "tuning", {}, score, {}
        self.before, self.smoke_run = pd.DataFrame(), bool

    def run(self, trial, size, limit, factor, level):
        for edit in range(limit):
            if (found := self.score(trial, size, edit)) is None:
                raise FloatingPointError("not finite")
            cell = size, edit // size, edit, trial.name, factor, level
            self.found[*cell, trial.fingerprint] = found

    def read(self):
        names = ["batch_size", "batch", "edit", "method", "factor", "level", "recipe"]
        return pd.DataFrame(list(self.found), columns=names).assign(score=[*self.found.values()])

    def made(self, size, method="FT-M"):
        """Count the edits of each trial of a method at a batch size."""
        cells = [cell for cell in self.found if cell[0] == size and cell[3] == method]
        return Counter(cell[5] for cell in cells)


class Notes:
    def __init__(self):
        self.warnings, self.observed, self.checks, self.said = [], [], [], {}
        self.warn, self.observe = self.warnings.append, self.observed.append
        self.check = lambda ok, text: self.checks.append(bool(ok))
        self.say = lambda name, value, **_: self.said.update({name: round(value, 3)})


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Scores are what the fake study says: (efficacy, locality), whose mean is the average."""

    def scored(after, before, same_edits):
        both = pd.concat([after, after.head(1).assign(method="no edit", score=[(0.0, 1.0)])])
        efficacy, locality = zip(*both["score"], strict=True)
        own = both.assign(kind="balance", score=efficacy, kept=locality)
        average = both.assign(kind="average", score=(own["score"] + own["kept"]) / 2, kept=None)
        return pd.concat([own, average], ignore_index=True)

    monkeypatch.setattr(tuning.compare, "scored", scored)


def test_the_best_third_by_balance_goes_on_and_then_the_best_two_on_more_than_one_batch():
    # The timid ones have the best average. On the first four edits 3 steps are better than 9.
    def score(trial, _, edit):
        steps = 9.5 if trial.steps == 3 and edit < 4 else trial.steps
        return (0.0, 1.0) if steps < 3 else (0.1 * steps - 0.3, 0.1)

    study, notes = Fake(score), Notes()
    trials = Trials(study, STEPS, BASE, [1, 16], [4, 12, 24])
    trials.run(notes)
    every = {f"steps {steps}": 4 for steps in range(1, 13)}
    assert study.made(1) == every | {"steps 3": 12, "steps 10": 12, "steps 11": 24, "steps 12": 24}
    assert study.made(16) == dict.fromkeys(every, 16) | {"steps 11": 32, "steps 12": 32}
    assert trials.chosen(1) == trials.chosen(16) == {"FT-M": {"steps": 12}}
    trials.check(notes), trials.say(notes)
    assert notes.checks == [True] and not notes.warnings and not trials.decides
    said = {"tuning.1.ft_m.balance": 0.18, "tuning.16.ft_m.average": 0.5}
    assert notes.said.items() >= said.items()
    rows = dict(study.found)
    Trials(study, STEPS, BASE, [1, 16], [4, 12, 24]).run(Notes())
    assert study.found == rows  # after a kill nothing else is made


def test_a_trial_that_fails_is_out_and_minibatches_are_tried_in_batches_alone():
    def score(trial, size, edit):
        fails = trial.name == "FT-M" and trial.steps == (12 if edit < 4 else 11)
        return None if fails else (0.5, 0.01 * getattr(trial, "steps", 1))

    study, notes, tried = Fake(score), Notes(), STEPS | {"LocFT-BF": MINIBATCHES}
    trials = Trials(study, tried, BASE, [1, 2], [4, 8])
    trials.run(notes)
    assert trials.chosen(1) == {"FT-M": {"steps": 10}} and not study.made(1, "LocFT-BF")
    assert trials.chosen(2)["LocFT-BF"] == {"batch_size": 2}  # of equal ones the first
    assert "steps 12 failed" in notes.warnings[0] and "steps 11 failed" in notes.warnings[1]


def test_an_end_of_a_range_is_passed_once_at_the_batch_size_where_the_best_lies_there():
    rates = [FT_M.model_copy(update={"learning_rate": rate}) for rate in (1e-4, 1e-3, 9e-3)]
    steps = Range(low=20, high=25, extend=False)
    ranges = {"FT-M": {"learning_rate": Range(low=1e-4, high=1e-2), "steps": steps}}

    def score(trial, size, _):
        middle = trial.learning_rate == 1e-3 and size == 2
        return (1.0, 1.0) if middle else (10 * trial.learning_rate, 0.5)

    study, notes = Fake(score), Notes()
    trials = Trials(study, {"FT-M": rates}, BASE, [1, 2], [2, 4], ranges=ranges)
    trials.run(notes)
    assert len(study.made(1)) == 7 and len(study.made(2)) == 3
    assert trials.chosen(1) == {"FT-M": {"learning_rate": 0.1}}
    said = "FT-M, batch size 1: the best learning_rate, 0.009, lies at an end of its range, so "
    assert notes.observed == [f"{said}0.018, 0.032, 0.056, 0.1 were tried too."]
    trials.check(notes)
    assert ": 2, FT-M (steps 25); 1, FT-M (learning_rate 0.1); 1, FT-M (s" in notes.warnings[0]
    trials.run(notes)
    assert len(study.made(1)) == 7  # once


def test_the_search_for_ft_uke_is_its_budget_and_unequal_ones_are_said(tmp_path, monkeypatch):
    study, notes = Fake(lambda *_: (0.5, 0.5)), Notes()
    levels = pd.DataFrame({"recipe": ["r1", "r2", "r2"], "batch_size": 1, "edit": ["a", "a", "b"]})
    study.paths.exported = tmp_path.joinpath
    monkeypatch.setattr(tuning.rows, "committed", lambda *_: levels)
    trials = Trials(study, {"FT-M": STEPS["FT-M"][:3]}, BASE, [1, 2], [2, 4])
    trials.run(notes)
    trials.say_budget(notes)
    (tmp_path / "tuning_levels").touch()
    assert notes.said == {f"budget.ft_m.{n}": v for n, v in BUDGET.items()}
    assert [*trials.say_budget(notes).iloc[1]] == ["FT-UKE", 2, 2, 3]
    assert notes.warnings == ["Budgets are unequal: settings 3 of FT-M, 2 of FT-UKE."]


def test_every_level_gets_its_best_rate_and_the_rule_chooses_among_them():
    def score(trial, *_):
        best = 2e-3 if trial.layers == "all" else 1e-3
        return 1.0, (0.7 if trial.layers == "all" else 0.6) - 10 * abs(trial.learning_rate - best)

    study, notes, rates = Fake(score), Notes(), {"FT-M": [1e-3, 2e-3, 3e-3]}
    levels = LevelTrials(study, {"FT-M": FT_M}, rates, ["eighth_6", "all", "with"], limit=2)
    levels.run(notes)
    # The level of the base is the same recipe for both factors that have a level `with`.
    assert len(study.read()) == 2 * 3 * 2
    kept = levels.to_keep()["FT-M"]["layers"]
    assert kept["all"] == {"learning_rate": 2e-3, "balance": 0.8235, "average": 0.85}
    assert kept["eighth_6"]["learning_rate"] == 1e-3
    ends = {"chat_template": "with", "end_of_turn": "with"}
    assert levels.rule() == {"FT-M": {"layers": "all"} | ends}
    levels.check(notes)
    assert notes.checks == [True] and "eighth_6 (learning_rate 0.001)" in notes.warnings[0]


@pytest.mark.parametrize(
    ("study", "rounds", "expected"),
    [
        ({"split": "test"}, [1], "on development edits alone, found split 'test'"),
        ({"model": "embedded"}, [1], "on the world's development edits alone"),
        ({"kinds": ["original"]}, [1], "no locality probes of 'unkebench'; .*`make locality`"),
        ({}, [4, 4], "rounds: 4, 4; expected growing numbers of edits"),
        ({"edits": 3}, [4], "rounds: they take 4 development edits, and 3 are there"),
    ],
)
def test_edits_on_which_nothing_may_be_chosen_are_refused(study, rounds, expected):
    with pytest.raises(InputError, match=expected):
        Trials(Fake(None, **study), STEPS, BASE, rounds=rounds)
