"""Studies of factors, methods and sequences on invented rows: compared, said and refused."""

from types import SimpleNamespace

import pandas as pd
import pytest
from uke.data.edits import AVERAGE
from uke.errors import InputError
from uke.project import Paths
from uke.results import compare
from uke.results.metrics import METRICS
from uke.study import FactorStudy, MethodStudy, SequenceStudy, say_leads, sequential

KINDS = (*AVERAGE, "general")
BLANK = ("split", "seed", "model", "data", "code", "peak_mib", "curve", "notes")


def rows(edits, score, phase="after", **columns):
    """Rows of the schema for these edits: every score is 0.5 but that of the original question."""
    metrics = {name: 0.5 for metric in METRICS for name in (metric, f"{metric}_before")}
    found = []
    for batch, edit in enumerate(edits):
        for kind in KINDS:
            own = dict.fromkeys(metrics, score + batch / 100) if kind == "original" else metrics
            found.append({"batch": batch, "edit": edit, "kind": kind, **own} | columns)
    frame = pd.DataFrame(found).assign(number=0, phase=phase, log_probability=-1.0, steps=5)
    frame["question"] = frame["reference"] = frame["edit"]
    frame = frame.assign(train_seconds=1.0, answer_seconds=1.0, change_norm=0.1, study="s")
    return frame.assign(**{name: None for name in BLANK if name not in columns})


class Invented(SimpleNamespace):
    """A study whose rows are invented: `originals` has the score of a method, level or both."""

    def __init__(self, originals=None, edits=4, chat=None, fails=()):
        every = [SimpleNamespace(id=f"edit-{at}") for at in range(edits)]
        dataset = SimpleNamespace(edits=every, split="test", world_seed=None)
        more = {"chat": chat, "environment": {}, "committed": None, "paths": Paths("smoke")}
        more |= {"subject": SimpleNamespace(name="embedded"), "with_rows": lambda x, *_, **__: x}
        super().__init__(dataset=dataset, **more)
        self.originals, self.fails, self.frames = originals or {}, fails, []
        names = [edit.id for edit in every]
        empty = {"method": "unedited", "factor": None, "level": None, "batch_size": None}
        self.before = rows(names, 0.1, "before", recipe=None, learning_rate=None, **empty)

    def smoke_run(self):
        return False

    def unchanged(self):
        return True

    def run(self, method, batch_size=1, limit=None, factor=None, level=None):
        if level in self.fails:
            raise FloatingPointError("loss is not finite")
        score = self.originals.get((method.name, level), self.originals.get(level, 0.5))
        names = [edit.id for edit in self.dataset.edits[:limit]]
        labels = {"method": method.name, "factor": factor, "level": level, "split": "test"}
        labels |= {"recipe": method.fingerprint, "learning_rate": method.learning_rate}
        frame = rows(names, score, batch_size=batch_size, **labels)
        self.frames.append(frame.assign(batch=frame["batch"] // batch_size))

    def read(self):
        return pd.concat(self.frames, ignore_index=True)


class Recorder:
    """A section that keeps what it is told."""

    def __init__(self):
        self.numbers, self.checks, self.warnings, self.recipes = {}, {}, [], []
        self.untestable, self.void = {}, {}
        self.warn, self.method = self.warnings.append, self.recipes.append

    def say(self, key, value, low=None, high=None, n=None, unit="", void=""):
        assert key not in self.numbers
        self.numbers[key], self.void[key] = value, void
        return f"{value:.2f} {unit}, n = {n}".replace(" ,", ",")

    def check(self, ok, text):
        self.checks[text] = bool(ok)


def ran(factor, levels=(), methods=("FT-M", "LoRA"), **invented):
    """A study of a factor that was run and said, and the section."""
    study, section = FactorStudy(factor, methods, levels, Invented(**invented)), Recorder()
    study.run(section)
    study.say(section)
    return study, section


BOTH = "second_half_minus_first_half"


# The factor, the levels given, those compared in their order, and the pairs of the contrasts.
CHOICES = [
    ("end_of_turn", "", "with without", {"": "with without"}),
    ("layers", "all eighth_3", "eighth_3 all", {"": "all eighth_3"}),
    (
        "layers",
        "second_half first_half",
        "first_half second_half",
        {BOTH: "second_half first_half"},
    ),
    ("components", "both query_value mlp", "mlp both query_value", {"both": "both mlp"}),
    ("components", "mlp down_proj", "down_proj mlp", {"mlp_minus_down_proj": "mlp down_proj"}),
]


@pytest.mark.parametrize(("factor", "given", "levels", "pairs"), CHOICES)
def test_levels_come_in_the_order_of_the_factor_with_the_contrasts_they_allow(
    factor, given, levels, pairs
):
    study = FactorStudy(factor, ["FT-M", "lora"], given.split(), Invented())
    assert study.levels == dict.fromkeys(("FT-M", "LoRA"), levels.split())
    assert study.cells == [(name, one) for name, own in study.levels.items() for one in own]
    own = {name: " ".join(pair[1:]) for name, pair in study.pairs.items() if pair[0] == "FT-M"}
    assert own == {f"ft_m{end and '.'}{end}": pair for end, pair in pairs.items()}


def test_all_blocks_are_compared_with_the_best_single_one_of_the_methods_file():
    pairs = FactorStudy("layers", ["FT-M"], [], Invented()).pairs
    assert pairs == {"ft_m": ("FT-M", "all", "eighth_7")}


def test_methods_and_levels_named_for_every_factor_leave_each_its_own():
    named = ["MEMIT", "LoRA"], ["eighth_3", "all"]
    assert FactorStudy("layers", *named, Invented()).levels == {"LoRA": ["eighth_3", "all"]}
    others = FactorStudy("loss_scope", *named, Invented()).levels
    assert others == {"LoRA": ["last_prompt_token", "target_tokens"]}


@pytest.mark.parametrize(
    ("factor", "methods", "levels", "message"),
    [
        ("layer", ["FT-M"], [], "unknown factor 'layer'; did you mean 'layers'?"),
        ("layers", ["FTM"], [], "unknown method 'FTM'; did you mean 'FT-M'?"),
        ("layers", ["FT-M"], ["eigth_3"], "levels: unknown level 'eigth_3'; did you mean"),
        ("layers", ["FT-M"], ["all"], "layers, FT-M: all: expected two or more levels"),
        ("components", ["FT-M"], ["mlp"], "components, FT-M: mlp: expected two"),
        ("layers", ["MEMIT"], [], "MEMIT: it has no levels"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(factor, methods, levels, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        FactorStudy(factor, methods, levels, Invented())


def test_effects_are_said_with_the_interaction_and_quoted_in_sentences():
    scores = {("FT-M", "all"): 0.8, ("FT-M", "eighth_3"): 0.2, ("LoRA", "all"): 0.5}
    study, section = ran("layers", ["eighth_3", "all"], originals=scores)
    said = section.numbers
    assert said["factor.layers.ft_m.all.original"] == pytest.approx(0.815)
    assert said["effect.layers.ft_m.original"] == pytest.approx(60)
    assert said["effect.layers.ft_m.average"] == pytest.approx(10)
    assert said["effect.layers.interaction.average"] == pytest.approx(10)
    assert "differ in components" in section.void["effect.layers.interaction.average"]
    assert not section.warnings and len(section.recipes) == 4
    template = "{method}: {level} over {against} {average}, from {against_original}."
    assert study.sentences(template).startswith("FT-M: all over eighth 3 10.00 points, from 0.21")
    assert study.gained("FT-M") and not study.gained() and not study.gained("FT-M", sign=-1)
    assert not study.gained("AdaLoRA")
    assert study.best() == {"FT-M": "all", "LoRA": "all"}  # LoRA's are equal


def test_an_interaction_needs_methods_that_are_alike_in_all_else():
    scores = {("FT-A", "mlp"): 0.9, ("FT-A", "query_value"): 0.2, ("FT-M", "mlp"): 0.3}
    given = ["FT-M", "FT-A", "LoRA"], ["mlp", "query_value"], Invented(scores)
    study = FactorStudy("components", *given)
    study.run(Recorder())
    assert study.crossed == ("FT-A", "LoRA")
    assert study.effect("interaction", "original").mean == pytest.approx(70)
    table = study.crossing("original").set_index("level")
    assert table.loc["query_value", "FT-A"].mean == pytest.approx(0.215)
    study.asked.append("AdaLoRA")  # as a method that has no rows yet
    assert study.crossing("original").set_index("level")["AdaLoRA"].isna().all()


def test_raw_prompts_have_keys_of_their_own():
    study, section = ran("chat_template", methods=["FT-M"], chat=False)
    assert "factor.chat_template_asked_without.ft_m.with.average" in section.numbers
    effects = {key for key in section.numbers if key.startswith("effect")}
    ends = ("asked_without", "asked_without_balance", "asked_without_original")
    assert effects == {f"effect.chat_template.ft_m.{end}" for end in ends}
    assert "raw prompts" in study.effects["effect"].iloc[0]


def test_a_level_that_fails_is_warned_of_and_has_no_effect():
    study, section = ran("loss_scope", methods=["FT-M"], fails=["last_prompt_token"])
    assert section.warnings == ["FT-M, last prompt token: failed (loss is not finite)"]
    assert study.effects.empty and not study.gained()
    assert study.sentences("{method}") == "No method has both levels, so nothing can be compared."


def test_checks_see_levels_that_are_one_recipe():
    study, section = ran("end_of_turn", methods=["FT-M"])
    study.check(section)
    assert len(section.checks) == 2 and all(section.checks.values())
    study.rows = study.rows.assign(recipe="same")
    study.check(again := Recorder())
    assert list(again.checks.values()) == [False, True]


# --- methods at several batch sizes ---------------------------------------------------------------

METHODS = ["FT-UKE", "LocFT-BF", "MEMIT", "UnKE"]


@pytest.mark.parametrize(
    ("best", "plan"),
    [
        (
            {2: "UnKE", 8: "MEMIT"},  # run alone of its kind at a size that is not full
            {(2, "FT-UKE"): 6, (2, "LocFT-BF"): 4, (2, "UnKE"): 6}
            | {(8, "FT-UKE"): 24, (8, "LocFT-BF"): 8, (8, "MEMIT"): 24, (8, "UnKE"): 8},
        ),
        (
            {},  # any baseline may turn out to be the best
            {(2, "FT-UKE"): 6, (2, "LocFT-BF"): 4, (2, "MEMIT"): 6, (2, "UnKE"): 6}
            | {(8, "FT-UKE"): 24, (8, "LocFT-BF"): 8, (8, "MEMIT"): 24, (8, "UnKE"): 24},
        ),
    ],
)
def test_a_plan_has_the_best_baseline_everywhere_and_all_at_full_sizes(monkeypatch, best, plan):
    monkeypatch.setattr(compare, "best_baselines", lambda *_: best)
    study = MethodStudy(Invented(), METHODS, [2, 8], [8], limit=5, batches=3)
    assert study.plan == plan
    assert MethodStudy.edits_needed([2, 8], 5, 3) == 24


def test_single_edits_are_of_every_method_that_writes_one(monkeypatch):
    monkeypatch.setattr(compare, "best_baselines", lambda *_: {})
    study = MethodStudy(Invented(), [])
    assert "LocFT-BF" not in study.names and "in-context" not in study.names
    assert study.leader == "FT-UKE" and {"MEMIT", "AnyEdit++"} <= set(study.baselines)
    asked = MethodStudy(Invented(), ["LocFT-BF", "in-context"])
    assert asked.plan == {(1, "in-context"): 4} and not asked.untestable  # it writes nothing


def test_without_development_rows_the_best_baseline_is_said_to_be_flattered(monkeypatch):
    monkeypatch.setattr(compare, "best_baselines", lambda *_: {})
    originals = {("FT-UKE", None): 0.9, ("MEMIT", None): 0.5, ("UnKE", None): 0.6}
    study, section = MethodStudy(Invented(originals), ["FT-UKE", "MEMIT", "UnKE"]), Recorder()
    study.run(section)
    assert study.best == {1: "UnKE"} and "flatters" in section.warnings[0]
    study.say(section, "single", ["method", "kind"], ["average"])
    leads = compare.leads(study.scores, study.leader, study.best)
    said = say_leads(section, "single.lead", leads, study.untestable)
    assert said == {1: "22.33 points, n = 4"} and not section.void["single.lead_over_no_edit"]
    assert section.void["single.lead"] == study.untestable["UnKE"]
    assert "(see `controls`): MEMIT, UnKE." in section.warnings[-1]
    assert section.numbers["single.lead_average"] == pytest.approx(5)
    assert {"single.memit.balance", "single.no_edit.average"} < set(section.numbers)
    study.check(section)
    assert all(section.checks.values())


def test_a_second_dataset_takes_the_best_baseline_of_the_first_and_says_so():
    asked = Invented()
    asked.subject.name, asked.paths = "smollm2", Paths("smollm2", "akew-mquake")
    study = MethodStudy(asked, ["FT-UKE", "MEMIT", "AnyEdit (UnKE)"])
    assert study.best == {1: "AnyEdit (UnKE)"} and "the other dataset" in study.caveats[0]
    assert {*study.untestable} == {"MEMIT"}  # by the control of this very model


# --- sequences ------------------------------------------------------------------------------------


def test_a_sequence_warns_of_a_breakdown_and_names_what_is_written_at_once(monkeypatch):
    study = Invented(edits=4)

    def run(_, method, counts, queried, together=False):
        if method.name == "MEMIT":
            raise FloatingPointError("loss is not finite")
        for count in counts:
            labels = {"factor": "count", "level": f"after {count}", "recipe": method.fingerprint}
            names = [edit.id for edit in sequential.first_and_last(study.dataset.edits[:count], 1)]
            frame = rows(names, 0.5, method=method.name, batch_size=count, **labels)
            study.frames.append(frame.assign(batch=count, learning_rate=0.1))

    monkeypatch.setattr(sequential, "run", run)
    section, methods = Recorder(), ["FT-M", "MEMIT"]
    sequences = SequenceStudy(study, methods, ["FT-M"], [1, 9], 1)
    sequences.run(section)
    assert sequences.counts == [1, 4] and sequences.names == [*methods, "FT-M (at once)"]
    assert section.warnings == ["MEMIT: failed (loss is not finite)"]
    sequences.say(section)
    assert {"sequential.ft_m.4.last", "sequential.ft_m_at_once.4.first"} < set(section.numbers)
    sequences.check(section)
    assert all(section.checks.values())
    assert set(sequences.final()["method"]) == {"FT-M", "FT-M (at once)", "no edit"}
    views = sequences.views().query("method == 'FT-M'").groupby(["count", "view"])["edit"].agg(set)
    assert views[1, "first edits"] == views[1, "last edits"] == {"edit-0"}
    assert views[4, "first edits"] == {"edit-0"} and views[4, "last edits"] == {"edit-3"}
    assert views[4, "locality"] == views[4, "general skill"] == {"edit-0", "edit-3"}
