"""Contrasts, leads, their trend and separation: pairs that do not pair, wrong units, gaps."""

import json
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from uke.data.edits import AVERAGE
from uke.errors import InputError
from uke.project import Paths
from uke.results import compare, control
from uke.results.metrics import METRICS
from uke.results.stats import balance, interval, pooled, summarise

EDITS = ("a", "b", "c", "d", "e", "f")
GAIN = {("M", "all"): 1, ("M", "one"): -1}
RUN = dict.fromkeys(["factor", "split", "learning_rate", "seed", "model", "data", "recipe", "code"])


def cells(**scores):
    """Scores of kind `average` by cell, written `M_all=[0.1, 0.2, 0.3]`, each edit a batch."""
    found = [
        ("average", *name.split("_"), edit, edit, score)
        for name, own in scores.items()
        for edit, score in zip(EDITS, own, strict=False)
    ]
    return pd.DataFrame(found, columns=["kind", "method", "level", "batch", "edit", "score"])


def rows(score, kinds=AVERAGE, edits=EDITS, **columns):
    """Rows of the schema: every metric is 0.5, or `score` for the original question."""
    found = [(edit, kind, place) for place, edit in enumerate(edits) for kind in kinds]
    frame = pd.DataFrame(found, columns=["edit", "kind", "batch"])
    value = frame["kind"].eq("original").map({True: score, False: 0.5})
    fixed = {f"{name}{end}": value for name in METRICS for end in ("", "_before")} | RUN
    fixed |= {"study": "s", "number": 0, "batch_size": 1, "phase": "after", "curve": None}
    text = ("text of " + frame["edit"]).where(frame["kind"] != "detail", frame["edit"])
    fixed |= {"question": frame["edit"], "reference": text, "answer": "I do not know."}
    return frame.assign(**fixed | {"method": "FT-M", "level": None} | columns)


def scores(size=1, **pairs):
    """Scores by method at a batch size: of each a list of batches of edits, each its efficacy and
    locality, and their mean as the average. Beside them `no edit`, with 0 and 1."""
    found, first = [], next(iter(pairs.values()))
    pairs = pairs | {compare.BEFORE: [[(0.0, 1.0)] * len(batch) for batch in first]}
    for name, batches in pairs.items():
        level = compare.BEFORE if name == compare.BEFORE else ""
        for batch, own in enumerate(batches):
            for number, (efficacy, locality) in enumerate(own):
                cell = (size, name, level, batch, f"{batch}-{number}")
                found.append((*cell, "balance", efficacy, locality))
                found.append((*cell, "average", (efficacy + locality) / 2, np.nan))
    columns = ["batch_size", "method", "level", "batch", "edit", "kind", "score", "kept"]
    return pd.DataFrame(found, columns=columns)


def test_a_difference_is_paired_by_edit_whatever_the_order_in_points():
    frame = cells(M_all=[0.9, 0.5, 0.1] * 2, M_one=[0.8, 0.4, 0.0] * 2)
    frame = frame.sample(frac=1, random_state=3)
    found = compare.contrasts(frame, {"gain": GAIN})
    assert compare.effect(found, "gain", "average") == pytest.approx((10, 10, 10, 6))
    assert compare.effect(found, "gain", "detail") is None


def test_an_interaction_is_the_difference_of_differences_and_p_values_are_corrected():
    frame = cells(M_all=[0.9, 0.8, 0.7], M_one=[0.5] * 3, L_all=[0.4] * 3, L_one=[0.3, 0.2, 0.1])
    weights = GAIN | {("L", "all"): -1, ("L", "one"): 1}
    found = compare.contrasts(frame, {"interaction": weights})
    assert found["difference"].tolist() == pytest.approx([10])
    every = (dict.fromkeys(names, GAIN) for names in ("x", "xy"))
    alone, both = (compare.contrasts(frame, one)["p"] for one in every)
    assert alone.tolist() == pytest.approx([0.25]) and both.tolist() == pytest.approx([0.5, 0.5])


def test_an_effect_of_an_absent_cell_is_left_out_and_unequal_ones_share_edits():
    frame = cells(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5, 0.5])
    lost = {("M", "all"): 1, ("M", "half"): -1}
    found = compare.contrasts(frame, {"lost": lost, "gain": GAIN})
    assert set(found["effect"]) == {"gain"} and len(compare.shown(found)) == 1
    assert compare.shown(compare.contrasts(frame, {})).empty
    fewer = compare.contrasts(cells(M_all=[0.9, 0.8, 0.1], M_one=[0.5, 0.5]), {"gain": GAIN})
    assert set(fewer["n"]) == {2} and fewer["difference"].tolist() == pytest.approx([35])


# --- Scores ---------------------------------------------------------------------------------------


def test_doing_nothing_has_over_half_of_the_average_and_a_balance_of_nothing():
    after = pd.concat([rows(1.0, level="eighth_6"), rows(0.8, level="all")])
    found = compare.scored(after, rows(0.2, phase="before"))
    means = compare.means(found, ["cell"]).set_index("cell")
    assert list(found["cell"].unique()) == ["FT-M, eighth 6", "FT-M, all", "no edit"]
    assert list(means.index) == ["FT-M, eighth 6", "FT-M, all", "no edit"]  # the best first
    unedited = (0.2 + 0.5 * 2 + 3) / 6  # locality is 1 by definition
    assert means["average"].tolist() == pytest.approx([3.5 / 6, 3.3 / 6, unedited])
    assert means.loc["no edit", "balance"] < means.loc["FT-M, all", "balance"]
    # A text scores 2/3 with another one: the floor of original and paraphrase; details have 0.
    efficacy = ((0.8 - 2 / 3) * 3 + (0.5 - 2 / 3) * 3 + 0.5) / 3
    found = means.loc["FT-M, all"][["efficacy", "locality", "balance"]].tolist()
    assert found == pytest.approx([efficacy, 0.5, float(balance(efficacy, 0.5))])


def test_side_effects_tell_rewording_from_lost_facts_and_are_left_out_without_measures():
    after = rows(0.5, ["rel_doc", "near_triple", "detail"], EDITS[:2])
    blank = after.assign(divergence=np.nan, leakage=np.nan, fact_kept=np.nan)
    assert compare.side_effects(blank).empty
    kinds = after["kind"].map({"rel_doc": 0.1, "near_triple": 0.3, "detail": np.nan})
    kept = after["edit"].map({"a": 1, "b": 0}).where(after["kind"] == "near_triple")
    measured = after.assign(divergence=kinds, leakage=kinds.fillna(0.7), fact_kept=kept)
    found = compare.side_effects(measured.assign(exact_before=0.0)).iloc[0]
    means = {"divergence": 0.2, "leakage": 0.2, "foreign": 0.7, "facts_kept": 0.5, "reworded": 1}
    assert {name: found[name].mean for name in means} == pytest.approx(means)


def test_the_floor_is_what_another_edit_scores_and_no_edit_stands_at_every_size():
    before = rows(0.2, phase="before")
    floor = compare.floor(before)
    expected = {"original": 2 / 3, "paraphrase": 2 / 3, "detail": 0}
    assert floor.groupby("kind")["score"].mean().to_dict() == pytest.approx(expected)
    committed = before.assign(floor=compare.floors(before), question=None, reference=None)
    pd.testing.assert_frame_equal(compare.floor(committed), floor)
    beside = pd.concat([floor, floor.assign(batch=0, method="FT-M")])  # a floor has no batch
    assert set(summarise(beside, ["method", "kind"])["method"]) == {"floor", "FT-M"}
    most = compare.ceiling(Paths("embedded")).groupby("kind")["score"].mean().round(1)
    assert most.to_dict() == {"detail": 0.6, "original": 1.0, "paraphrase": 0.3}  # as 00 says
    pairs = rows(0.7, edits=EDITS[:4], method="UnKE", batch_size=2)
    after = pd.concat([rows(0.9), pairs.assign(batch=pairs["batch"] // 2)])
    found = compare.scored(after, rows(0.2, phase="before"), same_edits=False)
    none = found[(found["cell"] == "no edit") & (found["kind"] == "balance")]
    assert none.groupby("batch_size")["batch"].nunique().to_dict() == {1: 6, 2: 2}
    assert none.groupby("batch_size")["edit"].nunique().to_dict() == {1: 6, 2: 4}


def test_a_balance_is_of_the_set_and_no_mean_of_balances():
    halves = np.array([(1.0, 1.0), (0.0, 1.0)])
    assert pooled(halves, np.ones(2)) == balance(0.5, 1.0) == pytest.approx(2 / 3)
    assert balance(np.array([-0.2, 0.0, 0.5]), np.array([1.0, 0.0, 0.5])).tolist() == [0, 0, 0.5]
    found = interval([(0.5, 1.0)] * 8)
    assert found == pytest.approx((2 / 3, 2 / 3, 2 / 3, 8))


def test_a_cell_on_fewer_edits_is_refused_and_kinds_that_the_data_lacks_are_named():
    short = pd.concat([rows(1.0, level="all"), rows(1.0, edits=("a", "b"), level="one")])
    with pytest.raises(InputError, match="FT-M one lacks 4 of the 6 edits beside it"):
        compare.scored(short, rows(0.2, phase="before"))
    kinds = ("original", "detail")
    few, before = rows(1.0, kinds), rows(0.2, kinds, phase="before")
    assert compare.lacking(few) == [kind for kind in AVERAGE if kind not in kinds]
    sides = compare.sides(compare.scored(few, before))
    assert set(sides["kind"]) == {"balance", "efficacy", "average"}


def test_gains_are_over_no_edit_and_over_the_baseline():
    good, poor = [[(0.6, 0.6)]] * 6, [[(0.2, 1.0)]] * 6
    table = compare.gains(scores(FT=good, UnKE=poor), "UnKE").set_index("method")
    expected = 100 * (0.6 - balance(0.2, 1.0))
    assert table.loc["FT", "minus UnKE"].mean == pytest.approx(expected)
    assert table.loc["FT", "minus no edit"].mean == pytest.approx(60)
    assert pd.isna(table.loc["UnKE", "minus UnKE"])
    average = compare.gains(scores(FT=good, UnKE=poor), kind="average").set_index("method")
    assert average.loc["FT", "minus no edit"].mean == pytest.approx(10)


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
    hidden = after.assign(**dict.fromkeys([*texts, "answer"]))  # as a benchmark's are committed
    assert compare.answers(hidden, "a", ["original"])["answer"].isna().all()


# --- The best baseline of development rows --------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("embedded")


def commit(paths, *trials):
    """Commit trials, each a method, a level, a batch size and its score; `lucky` has one edit."""
    frames = [
        rows(
            score, edits=EDITS[: 1 if each == "lucky" else None], method=m, level=each, batch_size=n
        )
        for m, each, n, score in trials
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.assign(recipe=frame["method"] + frame["level"], reference=frame["edit"])
    paths.exported("tuning").parent.mkdir(parents=True)
    frame.to_parquet(paths.exported("tuning"))


def best(places, sizes, names, study="tuning"):
    return compare.best_baselines(places, dict.fromkeys(sizes, names), study)


def test_a_baseline_is_judged_by_its_best_trial(here):
    trials = ("MEMIT", "slow", 1, 0.1), ("MEMIT", "fast", 1, 0.8), ("UnKE", "x", 1, 0.6)
    commit(here, *trials, ("UnKE", "lucky", 1, 0.9))
    assert best([here], [1], ["UnKE", "MEMIT"]) == {1: "MEMIT"}
    assert best([here], [1], ["UnKE"]) == {1: "UnKE"}
    assert best([here], [1], ["AlphaEdit"]) == {}
    assert best([], [1], ["UnKE"]) == {}


def test_the_batch_size_nearest_by_ratio_decides_of_two_alike_the_smaller(here):
    names = {1: "UnKE", 4: "MEMIT", 16: "muKE"}
    pairs = product(names, names.values())
    commit(here, *((name, "x", at, 0.9 if names[at] == name else 0.2) for at, name in pairs))
    nearest = {1: 1, 2: 1, 3: 4, 5: 4, 7: 4, 8: 4, 9: 16, 200: 16}
    found = best([here], list(nearest), list(names.values()))
    assert found == {size: names[own] for size, own in nearest.items()}


def test_the_first_place_that_knows_a_baseline_decides(here):
    other = Paths("quick")
    commit(here, ("UnKE", "x", 1, 0.6), ("MEMIT", "x", 1, 0.5))
    commit(other, ("UnKE", "x", 1, 0.1), ("MEMIT", "x", 1, 0.9), ("muKE", "x", 1, 0.3))
    both = ["UnKE", "MEMIT"]
    assert best([Paths("nowhere"), here, other], [1], both) == {1: "UnKE"}
    assert best([other, here], [1], both) == {1: "MEMIT"}
    assert best([here, other], [1], ["muKE"]) == {1: "muKE"}


# --- Leads ----------------------------------------------------------------------------------------


def leads(method="own", baseline="other", size=1, **pairs):
    """The leads by key, from rows in any order."""
    frame = scores(size, **pairs).sample(frac=1, random_state=2)
    return compare.leads(frame, method, {size: baseline}).set_index("lead")


def test_a_lead_is_over_the_better_of_no_edit_and_the_best_baseline():
    own = [[(0.6, 0.6)]] * 8
    found = leads(own=own, other=[[(0.3, 0.6)]] * 8)["mean"]
    assert found["lead"] == found["lead_over_baseline"] == pytest.approx(20)
    assert found["lead_over_no_edit"] == pytest.approx(60)
    assert found["lead_average"] == pytest.approx(15)
    assert found["lead_relative"] == pytest.approx(100 * (0.6 / 0.45 - 1))
    # A baseline that breaks the model has less than doing nothing in the average, not in balance.
    broken = leads(own=own, other=[[(-0.1, 0.1)]] * 8)["mean"]
    assert broken["lead"] == broken["lead_over_no_edit"] == pytest.approx(60)
    worse = leads("other", "own", own=own, other=[[(0.0, 1.0)]] * 8)["mean"]
    assert worse["lead"] == pytest.approx(-60) and worse["lead_over_no_edit"] == 0


def test_an_area_counts_the_best_efficacy_with_such_a_locality_or_more():
    weak = scores(A=[[(0.2, 0.9)] * 6], B=[[(0.1, 0.3)] * 6]).replace({"level": {"": "0.5"}})
    whole = scores(A=[[(0.6, 0.5)] * 6], B=[[(0.8, 0.3)] * 6]).replace({"level": {"": "1"}})
    found = compare.areas(pd.concat([weak, whole]).drop_duplicates(), "B").set_index("method")
    a = 0.2 * (0.9 - 0.5) + 0.6 * 0.5  # nothing is written where more than .9 is kept
    assert [one.mean for one in found["area"]] == pytest.approx([a, 0.8 * 0.3])
    assert found.loc["A", "minus B"].low == pytest.approx(100 * (a - 0.8 * 0.3))


def test_intervals_are_t_of_few_batches_and_else_a_bootstrap_of_their_edits(monkeypatch):
    own = [[(0.5 + step, 1.0)] * 50 for step in (0.0, 0.1, 0.2)]
    found = leads(own=own, other=[[(0.0, 1.0)] * 50] * 3).loc["lead_average"]
    half = 5 * 4.3027 / math.sqrt(3)  # points; t of 2 degrees of freedom
    assert found[["mean", "low", "high"]].tolist() == pytest.approx(
        [30, 30 - half, 30 + half], abs=1e-3
    )
    assert found["n"] == 3
    single = leads(own=[[(0.6, 1.0)] * 2], other=[[(0.5, 1.0)] * 2]).loc["lead"]
    assert single["n"] == 1 and math.isnan(single["low"])
    within = [[(0.2, 1.0), (0.8, 1.0)]] * 8  # batches are alike, their edits are not
    wide = leads(own=within, other=[[(0.0, 1.0)] * 2] * 8).loc["lead_average"]
    assert wide["n"] == 8 and wide["high"] - wide["low"] > 10
    whole = interval(range(9))
    monkeypatch.setattr(compare.stats, "HELD", 50)  # few resamples at once: in less memory
    assert interval(range(9)) == whole


def test_a_lead_is_over_the_edits_that_both_methods_have():
    found = leads(own=[[(0.6, 1.0)], [(0.8, 1.0)]], other=[[(0.5, 1.0)]]).loc["lead_average"]
    assert found["mean"] == pytest.approx(5) and found["n"] == 1
    for other in ({"other": []}, {"x": [[(1, 1)]]}):
        with pytest.raises(InputError, match="own and other: no edit in common"):
            leads(own=[[(0.6, 1.0)]], **other)


def at_sizes(lead, sizes, batches=None):
    """24 edits at each size: `own` is ahead of `other` by `lead(size)` points of the average."""
    frames = []
    for size in sizes:
        ahead = np.broadcast_to(lead(size), 24) / 50
        every = np.arange(24).reshape(-1, batches or size)
        own = [[(0.5 + ahead[at], 0.5) for at in batch] for batch in every]
        frames.append(scores(size, own=own, other=[[(0.5, 0.5)] * len(batch) for batch in own]))
    return pd.concat(frames), dict.fromkeys(sizes, "other")


def slope(frame, best):
    return compare.trend(frame, "own", best, "lead_average")


def test_leads_of_every_size_are_shown_with_what_their_intervals_are():
    frame, best = at_sizes(lambda size: 5 * size, (1, 8))
    found = compare.leads(frame, "own", best)
    average = found[found["lead"] == "lead_average"]
    assert average["mean"].tolist() == pytest.approx([5, 40])
    shown = compare.shown_leads(found)
    assert shown[["batches", "interval"]].values.tolist() == [[24, "bootstrap"], [3, "t"]]
    assert shown["lead_relative"][1].mean == pytest.approx(80)
    assert compare.best_here(frame, ["other"]) == best


@pytest.mark.parametrize("steep", [3.0, -1.5])
def test_a_lead_that_is_linear_in_doublings_has_that_slope(steep):
    found = slope(*at_sizes(lambda size: 4 + steep * np.log2(size), (1, 8, 24)))
    assert math.isnan(found.low) and found.mean == pytest.approx(steep)  # one batch of 24
    found = slope(*at_sizes(lambda size: 4 + steep * np.log2(size), (1, 4, 8)))
    assert found[:3] == pytest.approx((steep,) * 3) and found.n == 24 + 6 + 3


def test_noise_has_no_trend_and_batches_are_drawn_whole():
    noise = np.tile([-4.0, 4.0, 1.0, -1.0], 6)
    found = [slope(*at_sizes(lambda size: 5 + noise, (1, 2, 8), batches=1))]
    assert found[0].mean == pytest.approx(0) and found[0].low < -0.2 and found[0].high > 0.2
    steps = np.repeat([-4.0, 4.0], 12)
    found += [slope(*at_sizes(lambda size: steps, (1, 4), batches=each)) for each in (1, 4)]
    assert found[2].high - found[2].low > 1.6 * (found[1].high - found[1].low)
    assert [each.n for each in found[1:]] == [48, 12]


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
    frame = probes(lambda kind, method, edit: 7 * edit + method * apart[edit % 2], 2, 6)
    found = compare.separation(frame)["locality"]
    assert found.mean == pytest.approx(4 / 5) and found.high == pytest.approx(1)  # one edit alone


def test_unequal_probes_are_refused_gaps_left_out_and_absent_sorts_give_nothing():
    def score(kind, method, edit):
        return method / 5

    gap = probes(score).query("method != 'M1' or edit != 'e3'")
    assert {share.n for share in compare.separation(gap).values()} == {7}
    for frame in (probes(score, general=2), probes(score, struct_trip=2)):
        with pytest.raises(InputError, match="separation: expected as many probes for each edit"):
            compare.separation(frame)
    for frame in (probes(score, general=0), probes(score, methods=1)):
        assert compare.separation(frame) == {}


def wrote(method, losses, originals, levels=("5", "75"), end="target_loss"):
    curves = [json.dumps({"losses": [3.0, loss], end: loss}) for loss in losses]
    frame = pd.DataFrame({"level": levels, "curve": curves, "rougel_f1": originals})
    return frame.assign(method=method, edit=list(levels), log_probability=-0.2)


def test_a_baseline_is_testable_by_the_rule_and_the_reason_says_how_far_it_works():
    after = [wrote("FT-M", (0.01, 0.02), (1, 1), end="norms"), wrote("muKE", (0,), (1,), ("5",))]
    after += [wrote("AnyEdit++", (0, 0.1), (0.7, 0.5)), wrote("MEMIT", (0.05, 0.5), (0.9, 0.9))]
    after += [wrote("UnKE", (0.05, 0.05), (0.69, 1)), wrote("unedited", (0, 0), (0.4, 0))]
    before = after.pop().drop(columns="curve")  # so .7 and .5 come back
    table = control.summary(control.measured(pd.concat(after), before))
    reach = {"FT-M": 75, "muKE": 5, "AnyEdit++": 75, "MEMIT": 5, "UnKE": 0, "no edit": 0}
    assert control.works_up_to(table) == reach
    muke, memit, unke = control.untestable(table, [*reach][1:5]).values()
    assert "ends at 0.50 nats a token on 75; it works up to 5 tokens" in memit
    assert "0.69 F1, below 0.70; it works at no length" in unke
    assert [muke] == [*control.untestable(None, ["muKE"]).values()]  # a length is missing, or all
    again = wrote("MEMIT", (0, 0), (1, 0.4), ("5 as published", "75 as published"))
    again["edit"] = ["5", "75"]
    table = control.summary(control.measured(pd.concat([*after, again]), before))
    reason = control.untestable(table, ["MEMIT"])["MEMIT"]
    assert reason.endswith("Tried again it works up to (as published: 5) tokens.")
    assert {**control.works_up_to(table), **reach} == control.works_up_to(table)
