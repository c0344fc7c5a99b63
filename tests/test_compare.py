"""Contrasts, leads, their trend and separation: pairs that do not pair, wrong units, gaps."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from uke.data.edits import AVERAGE, KINDS
from uke.errors import InputError
from uke.project import Paths
from uke.results import compare
from uke.results.metrics import METRICS

EDITS = ("a", "b", "c")
GAIN = {("M", "all"): 1, ("M", "one"): -1}
RUN = dict.fromkeys(["factor", "split", "learning_rate", "seed", "model", "data", "recipe", "code"])


def cells(**scores):
    """Scores of kind `average` by cell, written `M_all=[0.1, 0.2, 0.3]`."""
    found = [
        ("average", *name.split("_"), edit, score)
        for name, own in scores.items()
        for edit, score in zip(EDITS, own, strict=False)
    ]
    return pd.DataFrame(found, columns=["kind", "method", "level", "edit", "score"])


def rows(score, kinds=AVERAGE, edits=EDITS, **columns):
    """Rows of the schema: every metric is 0.5, or `score` for the original question."""
    found = [(edit, kind, place) for place, edit in enumerate(edits) for kind in kinds]
    frame = pd.DataFrame(found, columns=["edit", "kind", "batch"])
    value = frame["kind"].eq("original").map({True: score, False: 0.5})
    fixed = {f"{name}{end}": value for name in METRICS for end in ("", "_before")} | RUN
    fixed |= {"study": "s", "number": 0, "batch_size": 1, "phase": "after", "curve": None}
    return frame.assign(**fixed | {"method": "FT-M", "level": None} | columns)


def averages(**scores):
    """The average metric by method: for each a list of batches, each the scores of its edits."""
    found = [
        (name, 1, batch, f"{batch}-{number}", score)
        for name, batches in scores.items()
        for batch, own in enumerate(batches)
        for number, score in enumerate(own)
    ]
    return pd.DataFrame(found, columns=["method", "batch_size", "batch", "edit", "score"])


# --- Contrasts ------------------------------------------------------------------------------------


def test_a_difference_is_paired_by_edit_whatever_the_order_in_points():
    frame = cells(M_all=[0.9, 0.5, 0.1], M_one=[0.8, 0.4, 0.0]).sample(frac=1, random_state=3)
    found = compare.contrasts(frame, {"gain": GAIN})
    assert compare.effect(found, "gain", "average") == pytest.approx((10, 10, 10, 3))
    assert compare.effect(found, "gain", "detail") is None


def test_an_interaction_is_the_difference_of_differences_and_p_values_are_corrected():
    frame = cells(M_all=[0.9, 0.8, 0.7], M_one=[0.5] * 3, L_all=[0.4] * 3, L_one=[0.3, 0.2, 0.1])
    weights = GAIN | {("L", "all"): -1, ("L", "one"): 1}
    found = compare.contrasts(frame, {"interaction": weights})
    assert found["difference"].tolist() == pytest.approx([10])
    alone, both = (
        compare.contrasts(frame, dict.fromkeys(names, GAIN))["p"] for names in ("x", "xy")
    )
    assert alone.tolist() == pytest.approx([0.25]) and both.tolist() == pytest.approx([0.5, 0.5])


def test_an_effect_of_an_absent_cell_is_left_out_and_unequal_ones_are_refused():
    frame = cells(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5, 0.5])
    lost = {("M", "all"): 1, ("M", "half"): -1}
    found = compare.contrasts(frame, {"lost": lost, "gain": GAIN})
    assert set(found["effect"]) == {"gain"} and len(compare.shown(found)) == 1
    assert compare.shown(compare.contrasts(frame, {})).empty
    with pytest.raises(InputError):
        compare.contrasts(cells(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5]), {"gain": GAIN})


# --- Scores ---------------------------------------------------------------------------------------


def test_the_average_is_a_kind_of_every_cell_and_of_the_unedited_model():
    after = pd.concat([rows(1.0, level="eighth_6"), rows(0.8, level="all")])
    found = compare.scored(after, rows(0.2, phase="before"))
    means = found[found["kind"] == "average"].groupby("cell", sort=False)["score"].mean()
    assert list(means.index) == ["FT-M, eighth 6", "FT-M, all", "no edit"]  # as they came
    kept = sum(KINDS[kind].against == "before" for kind in AVERAGE)
    unedited = (0.2 + 0.5 * (len(AVERAGE) - kept - 1) + kept) / 6
    assert means.tolist() == pytest.approx([3.5 / 6, 3.3 / 6, unedited])
    halves = compare.sides(found).groupby(["cell", "kind"])["score"].mean()["FT-M, all"]
    assert halves["efficacy"] == pytest.approx(1.8 / 3) and halves["locality"] == 0.5


def test_a_cell_on_fewer_edits_is_refused_and_kinds_that_the_data_lacks_are_named():
    short = pd.concat([rows(1.0, level="all"), rows(1.0, edits=("a", "b"), level="one")])
    with pytest.raises(InputError, match="FT-M one lacks 1 of the 3 edits beside it"):
        compare.scored(short, rows(0.2, phase="before"))
    kinds = ("original", "detail")
    few, before = rows(1.0, kinds), rows(0.2, kinds, phase="before")
    assert compare.lacking(few) == [kind for kind in AVERAGE if kind not in kinds]
    assert set(compare.sides(compare.scored(few, before))["kind"]) == {"average"}


def test_gains_are_over_no_edit_and_over_the_baseline():
    after = pd.concat([rows(0.9), rows(0.6, method="UnKE")])
    scores = compare.scored(after, rows(0.3, phase="before"))
    table = compare.gains(scores, "UnKE").set_index("method")
    assert table.loc["FT-M", "minus UnKE"].mean == pytest.approx(5)
    assert pd.isna(table.loc["UnKE", "minus UnKE"])
    # Without an edit locality is 1 by definition, with these edits it is 0.5.
    assert table.loc["UnKE", "minus no edit"].mean == pytest.approx(100 * (0.3 - 3 * 0.5) / 6)
    assert compare.ranking(scores) == ["no edit", "FT-M", "UnKE"]
    plane = compare.plane(scores).set_index("method")["locality"]
    assert plane.to_dict() == pytest.approx({"FT-M": 0.5, "UnKE": 0.5, "no edit": 1})


def test_published_metrics_are_means_over_the_questions_of_an_edit_first():
    frame = rows(1.0, kinds=("original",), edits=("a", "b"))
    again = frame[frame["edit"] == "a"].assign(number=1, **dict.fromkeys(METRICS, 0.0))
    found = compare.published(pd.concat([frame, again]))
    assert found["exact"].tolist() == pytest.approx([0.75])  # edit a 0.5, edit b 1.0


def test_losses_are_read_from_the_curves():
    frame = rows(1.0, kinds=("original",), edits=("a", "b"))
    frame["curve"] = ['{"losses": [2.0, 0.5]}', None]
    losses = compare.curves(frame)[["edit", "step", "loss"]]
    assert losses.values.tolist() == [["a", 0, 2.0], ["a", 1, 0.5]]


def test_answers_stand_beside_the_reference_and_those_without_an_edit():
    texts = {"question": "Who?", "reference": "Ada.", "before": "Bo."}
    levels = ("with", "without")
    after = pd.concat([rows(0.9, level=level, answer=level, **texts) for level in levels])
    shown = compare.answers(after, "a", ["original"])
    assert shown[["source", "answer"]].values.tolist() == [
        ["reference", "Ada."],
        ["no edit", "Bo."],
        ["FT-M, with", "with"],
        ["FT-M, without", "without"],
    ]


# --- The best baseline of development rows --------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("embedded")


def commit(paths, *trials):
    """Commit trials, each a method, a level, a batch size and its score."""
    frames = [rows(score, method=m, level=each, batch_size=n) for m, each, n, score in trials]
    frame = pd.concat(frames, ignore_index=True)
    frame["recipe"] = frame["method"] + frame["level"]
    paths.exported("tuning").parent.mkdir(parents=True)
    frame.to_parquet(paths.exported("tuning"))


def test_a_baseline_is_judged_by_its_best_trial(here):
    commit(here, ("MEMIT", "slow", 1, 0.1), ("MEMIT", "fast", 1, 0.8), ("UnKE", "x", 1, 0.6))
    assert compare.best_baselines([here], [1], ["UnKE", "MEMIT"]) == {1: "MEMIT"}
    assert compare.best_baselines([here], [1], ["UnKE"]) == {1: "UnKE"}
    assert compare.best_baselines([here], [1], ["AlphaEdit"]) == {}
    assert compare.best_baselines([], [1], ["UnKE"]) == {}


def test_the_batch_size_nearest_by_ratio_decides_of_two_alike_the_smaller(here):
    names = {1: "UnKE", 4: "MEMIT", 16: "muKE"}
    pairs = product(names, names.values())
    commit(here, *((name, "x", at, 0.9 if names[at] == name else 0.2) for at, name in pairs))
    nearest = {1: 1, 2: 1, 3: 4, 5: 4, 7: 4, 8: 4, 9: 16, 200: 16}
    found = compare.best_baselines([here], list(nearest), list(names.values()))
    assert found == {size: names[own] for size, own in nearest.items()}


def test_the_first_place_that_knows_a_baseline_decides(here):
    other = Paths("quick")
    commit(here, ("UnKE", "x", 1, 0.6), ("MEMIT", "x", 1, 0.5))
    commit(other, ("UnKE", "x", 1, 0.1), ("MEMIT", "x", 1, 0.9), ("muKE", "x", 1, 0.3))
    both = ["UnKE", "MEMIT"]
    assert compare.best_baselines([Paths("nowhere"), here, other], [1], both) == {1: "UnKE"}
    assert compare.best_baselines([other, here], [1], both) == {1: "MEMIT"}
    assert compare.best_baselines([here, other], [1], ["muKE"]) == {1: "muKE"}


# --- Leads ----------------------------------------------------------------------------------------


def lead(method="own", baseline="other", **scores):
    """The lead in points and in percent, each with its interval, and the number of batches."""
    frame = averages(**scores).sample(frac=1, random_state=2)
    found = compare.leads(frame, method, {1: baseline}).iloc[0].tolist()[2:]
    return found[:3], found[3:6], found[6]


def test_a_lead_is_in_points_and_in_percent_of_the_baseline():
    scores = {"own": [[0.6], [0.9], [0.6]], "other": [[0.5], [0.6], [0.4]]}
    points, percent, batches = lead(**scores)
    assert (points[0], batches) == (pytest.approx(20), 3)
    assert percent[0] == pytest.approx(100 * (2.1 / 1.5 - 1))  # of the means: no mean of ratios
    assert lead("other", "own", **scores)[0][0] == pytest.approx(-20)


def test_a_lead_is_drawn_over_batches_and_pairs_together():
    points, percent, _ = lead(own=[[0.6] * 50, [0.8] * 50], other=[[0.5] * 50, [0.5] * 50])
    assert points == pytest.approx((20, 10, 30)) and percent == pytest.approx((40, 20, 60))
    points, percent, _ = lead(own=[[0.11], [0.55], [0.99]], other=[[0.1], [0.5], [0.9]])
    assert percent == pytest.approx((10, 10, 10)) and points[1:] == pytest.approx((1, 9))
    *single, batches = lead(own=[[0.6, 0.7]], other=[[0.5, 0.5]])
    assert batches == 1 and all(math.isnan(low) for _, low, _ in single)


@pytest.mark.parametrize("other", [{"other": [[0.5]]}, {"third": [[0.5]]}, {"other": [[0.5, 0.5]]}])
def test_a_lead_over_other_edits_is_refused(other):
    with pytest.raises(InputError, match="lead: own and other: expected the same edits"):
        lead(own=[[0.6], [0.7]], **other)


def at_sizes(lead, sizes, batches=None):
    """Averages of 24 edits at each size: `own` is ahead of `other` by `lead(size)` points."""
    frames = []
    for size in sizes:
        edits = pd.DataFrame({"edit": range(24), "batch": np.arange(24) // (batches or size)})
        other = edits.assign(method="other", score=0.5)
        own = edits.assign(method="own", score=0.5 + np.broadcast_to(lead(size), 24) / 100)
        frames.append(pd.concat([own, other]).assign(batch_size=size))
    return pd.concat(frames), dict.fromkeys(sizes, "other")


def test_leads_are_over_the_best_baseline_of_each_size():
    frame, best = at_sizes(lambda size: 5 * size, (1, 8))
    leads = compare.leads(frame, "own", best)
    assert leads["mean"].tolist() == pytest.approx([5, 40])
    assert leads["batches"].tolist() == [24, 3]
    assert compare.shown_leads(leads)["lead (percent)"][1].mean == pytest.approx(80)
    assert compare.best_here(frame, ["other"]) == best


@pytest.mark.parametrize("slope", [3.0, -1.5])
def test_a_lead_that_is_linear_in_doublings_has_that_slope(slope):
    frame, best = at_sizes(lambda size: 4 + slope * np.log2(size), (1, 8, 24))
    found = compare.trend(frame, "own", best)
    assert found[:3] == pytest.approx((slope,) * 3) and found.n == 24 + 3 + 1


def test_noise_has_no_trend_and_batches_are_drawn_whole():
    noise = np.tile([-4.0, 4.0, 1.0, -1.0], 6)
    frame, best = at_sizes(lambda size: 5 + noise, (1, 2, 8), batches=1)
    found, steps = [compare.trend(frame, "own", best)], np.repeat([-4.0, 4.0], 12)
    assert found[0].mean == pytest.approx(0) and found[0].low < -0.2 and found[0].high > 0.2
    for batches in (1, 6):
        frame, best = at_sizes(lambda size: steps, (1, 4), batches=batches)
        found.append(compare.trend(frame, "own", best))
    assert found[2].high - found[2].low > 1.8 * (found[1].high - found[1].low)
    assert [each.n for each in found[1:]] == [48, 8]


# --- What tells methods apart ---------------------------------------------------------------------

PROBES = {"rel_doc": 1, "rand_doc": 1, "struct_trip": 1, "general": 3}


def probes(score, methods=3, edits=8, **counts):
    """Rows with three probes of locality and three of a general skill for each edit and method."""
    kinds = [(kind, at) for kind, count in (PROBES | counts).items() for at in range(count)]
    found = [
        (f"M{method}", f"e{edit}", edit, kind, number, score(kind, method, edit))
        for method, edit, (kind, number) in product(range(methods), range(edits), kinds)
    ]
    columns = ["method", "edit", "batch", "kind", "number", "score"]
    frame = pd.DataFrame(found, columns=columns).assign(**RUN, study="s", level=None, phase="after")
    metrics = {f"{name}{end}": frame["score"] for name in METRICS for end in ("", "_before")}
    return frame.drop(columns="score").assign(batch_size=1, **metrics)


def test_methods_explain_all_of_locality_and_edits_all_of_the_skill():
    found = compare.separation(
        probes(lambda kind, method, edit: edit / 20 + (method / 5 if kind != "general" else 0))
    )
    assert found["locality"] == pytest.approx((1, 1, 1, 8))
    assert found["general"] == pytest.approx((0, 0, 0, 8), abs=1e-12)
    assert found["difference"] == pytest.approx((1, 1, 1, 8))


def test_a_share_is_that_of_a_table_done_by_hand():
    """Differences of two methods of 1 and 3: between them 4, left over 1, whatever the edits."""
    apart = {0: 1.0, 1: 3.0}
    frame = probes(lambda kind, method, edit: 7 * edit + method * apart[edit], 2, 2)
    found = compare.separation(frame)["locality"]
    assert found.mean == found.low == pytest.approx(4 / 5)
    assert found.high == pytest.approx(1)  # one edit drawn twice: all


def test_unequal_probes_and_gaps_are_refused_and_absent_sorts_give_nothing():
    def score(kind, method, edit):
        return method / 5

    gap = probes(score)
    gap = gap[(gap["method"] != "M1") | (gap["edit"] != "e3")]
    for frame in (probes(score, general=2), probes(score, struct_trip=2), gap):
        with pytest.raises(InputError, match="separation: expected as many probes for each edit"):
            compare.separation(frame)
    for frame in (probes(score, general=0), probes(score, methods=1)):
        assert compare.separation(frame) == {}
