"""Trials: settings tried too often or never, finalists that are not the best, test edits."""

from types import SimpleNamespace

import pandas as pd
import pytest
from uke.errors import InputError
from uke.methods.recipes import RECIPES
from uke.study import tuning
from uke.study.tuning import LevelTrials, Trials

BASE = {name: RECIPES[name] for name in ("FT-M", "LocFT-BF")}
TRIED = {
    "FT-M": [BASE["FT-M"].model_copy(update={"steps": steps}) for steps in (1, 2, 3)],
    "LocFT-BF": [BASE["LocFT-BF"].model_copy(update={"batch_size": size}) for size in (2, 3, 4)],
}


class Fake:
    """A study in which a trial scores what a function of it says, and whose rows are averages."""

    def __init__(self, score, split="development"):
        self.dataset = SimpleNamespace(split=split, world_seed=1)
        self.paths = SimpleNamespace(profile="quick", data="world")
        self.name, self.environment, self.score, self.found = "tuning", {}, score, []
        self.before = pd.DataFrame({"score": [0.3]})

    def smoke_run(self):
        return False

    def run(self, trial, size, limit, factor, level):
        score = self.score(trial, size)
        if score is None:
            raise FloatingPointError("not finite")
        row = {"split": "development", "method": trial.name, "factor": factor, "level": level}
        row["learning_rate"] = trial.learning_rate
        edits = range(limit)
        self.found += [row | {"batch_size": size, "edit": f"e{i}", "score": score} for i in edits]

    def read(self):
        return pd.DataFrame(self.found).drop_duplicates()


class Notes(SimpleNamespace):
    def __init__(self):
        super().__init__(warnings=[], checks=[], said={})

    def warn(self, text):
        self.warnings.append(text)

    def check(self, ok, text):
        self.checks.append((bool(ok), text))

    def say(self, name, value, *_, **__):
        self.said[name] = round(value, 3)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(tuning.rows, "primary", lambda frame, phase="after": frame)
    monkeypatch.setattr(tuning.rows, "average", lambda frame: frame)


def test_the_last_of_three_sizes_tries_the_finalists_and_single_edits_no_minibatches():
    study, notes = Fake(lambda trial, size: trial.steps / 10), Notes()
    trials = Trials(study, TRIED, BASE, [1, 2, 4], limit=3)
    trials.run(notes)
    made = {(row["method"], row["batch_size"], row["level"]) for row in study.found}
    assert {cell[1:] for cell in made if cell[0] == "FT-M"} == {
        *((size, f"steps {steps}") for size in (1, 2) for steps in (1, 2, 3)),
        (4, "steps 2"),
        (4, "steps 3"),
    }
    assert {size for name, size, _ in made if name == "LocFT-BF"} == {2, 4}
    assert trials.chosen(4)["FT-M"] == {"steps": 3}
    assert [trials.edits(size) for size in (1, 2, 4)] == [3, 2, 4]
    trials.check(notes)
    assert all(ok for ok, _ in notes.checks) and not notes.warnings
    trials.say(notes, {"FT-M": "mine"})
    assert notes.said["tuning.1.mine.average"] == 0.3 and "tuning.4.locft_bf.average" in notes.said
    assert not trials.decides


def test_a_trial_that_fails_is_out_and_of_equal_ones_the_first_is_chosen():
    study, notes = Fake(lambda trial, size: None if trial.steps == 1 else 0.5), Notes()
    trials = Trials(study, {"FT-M": TRIED["FT-M"]}, BASE, [1], limit=2)
    trials.run(notes)
    assert trials.chosen(1) == {"FT-M": {"steps": 2}} and "steps 1 failed" in notes.warnings[0]
    trials.check(notes)
    assert all(ok for ok, _ in notes.checks)


def test_every_level_gets_its_best_rate_and_the_rule_chooses_among_them():
    def score(trial, _):
        best = 2e-3 if trial.layers == "all" else 1e-3
        return (0.7 if trial.layers == "all" else 0.6) - 10 * abs(trial.learning_rate - best)

    study, notes = Fake(score), Notes()
    families, rates = {"FT-M": RECIPES["FT-M"]}, {"FT-M": [1e-3, 2e-3, 3e-3]}
    levels = LevelTrials(study, families, rates, ["eighth_6", "all", "with"], limit=2)
    levels.run(notes)
    # The level of the base is the same recipe for both factors that have a level `with`.
    assert len(study.read()) == 2 * 3 * 2
    kept = levels.to_keep()["FT-M"]
    assert kept["layers"]["all"] == {"learning_rate": 2e-3, "average": 0.7}
    assert kept["layers"]["eighth_6"]["learning_rate"] == 1e-3
    chosen = {"layers": "all", "chat_template": "with", "end_of_turn": "with"}
    assert levels.rule() == {"FT-M": chosen}
    assert levels.candidates()["FT-M"].layers == "all"
    levels.check(notes)
    assert all(ok for ok, _ in notes.checks) and "layers, eighth_6 (0.001)" in notes.warnings[0]


def test_other_edits_than_development_ones_choose_nothing():
    with pytest.raises(InputError, match="edits of the world alone, found split 'test'"):
        Trials(Fake(None, split="test"), TRIED, BASE)
