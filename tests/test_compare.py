"""Contrasts, leads, their trend and separation: pairs that do not pair, wrong units, invented
data."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from uke.data.edits import AVERAGE, KINDS
from uke.errors import InputError
from uke.project import Paths
from uke.results import compare
from uke.results.metrics import METRICS

EDITS = ("a", "b", "c")


def scores(**cells):
    """Scores of kind `average` by cell, written `FTM_all=[0.1, 0.2, 0.3]`."""
    return pd.DataFrame(
        [
            ("average", *name.split("_"), edit, score)
            for name, found in cells.items()
            for edit, score in zip(EDITS, found)
        ],
        columns=["kind", "method", "level", "edit", "score"],
    )


def rows(cells, kinds=AVERAGE, edits=EDITS, phase="after"):
    """Rows of the schema, every score 0.5 but for `original`, which is that of the cell."""
    found = []
    for (method, level), value in cells.items():
        for edit in edits:
            for kind in kinds:
                score = value if kind == "original" else 0.5
                metrics = dict.fromkeys(METRICS, score) | {
                    f"{name}_before": score for name in METRICS
                }
                found.append(
                    {
                        "method": method,
                        "level": level,
                        "factor": "layers",
                        "edit": edit,
                        "kind": kind,
                        "number": 0,
                        "phase": phase,
                        "batch": EDITS.index(edit),
                        "study": "s",
                        **metrics,
                    }
                )
    columns = ["split", "batch_size", "learning_rate", "seed", "model", "data", "recipe", "code"]
    return pd.DataFrame(found).assign(**dict.fromkeys(columns), curve=None)


def test_a_difference_is_paired_by_edit_whatever_the_order_and_said_in_points():
    frame = scores(M_all=[0.9, 0.5, 0.1], M_one=[0.8, 0.4, 0.0]).sample(frac=1, random_state=3)
    found = compare.contrasts(frame, {"gain": {("M", "all"): 1, ("M", "one"): -1}})
    (row,) = found.itertuples()
    assert (row.difference, row.low, row.high, row.n) == (
        pytest.approx(10),
        pytest.approx(10),
        pytest.approx(10),
        3,
    )
    assert (
        compare.effect(found, "gain", "average")[0] == pytest.approx(10)
        and compare.effect(found, "gain", "detail") is None
    )


def test_an_interaction_is_the_difference_of_differences():
    frame = scores(
        M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5, 0.5], L_all=[0.4, 0.4, 0.4], L_one=[0.3, 0.2, 0.1]
    )
    weights = {("M", "all"): 1, ("M", "one"): -1, ("L", "all"): -1, ("L", "one"): 1}
    found = compare.contrasts(frame, {"interaction": weights})
    assert found["difference"].tolist() == pytest.approx(
        [100 * ((0.4 + 0.3 + 0.2) - (0.1 + 0.2 + 0.3)) / 3]
    )


def test_the_p_values_are_corrected_over_all_effects_that_stand_together():
    frame = scores(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5, 0.5])
    gain = {("M", "all"): 1, ("M", "one"): -1}
    alone, both = (
        compare.contrasts(frame, dict.fromkeys(names, gain))["p"].tolist()
        for names in (["x"], ["x", "y"])
    )
    assert alone == pytest.approx([0.25]) and both == pytest.approx([0.5, 0.5])


def test_an_effect_with_an_absent_cell_is_left_out_and_one_of_cells_with_other_edits_is_refused():
    frame = scores(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5, 0.5])
    found = compare.contrasts(
        frame,
        {"lost": {("M", "all"): 1, ("M", "half"): -1}, "gain": {("M", "all"): 1, ("M", "one"): -1}},
    )
    assert set(found["effect"]) == {"gain"} and compare.effect(found, "lost", "average") is None
    assert compare.shown(compare.contrasts(frame, {})).empty
    with pytest.raises(InputError):
        compare.contrasts(
            scores(M_all=[0.9, 0.8, 0.7], M_one=[0.5, 0.5]),
            {"gain": {("M", "all"): 1, ("M", "one"): -1}},
        )
    with pytest.raises(InputError, match="effect gain: its weights sum to 1; expected 0"):
        compare.contrasts(frame, {"gain": {("M", "all"): 1}})


def test_the_average_is_a_kind_of_every_cell_and_of_the_unedited_model():
    after, before = (
        rows({("FT-M", "eighth_6"): 1.0, ("FT-M", "all"): 0.8}),
        rows({("unedited", None): 0.2}, phase="before"),
    )
    found = compare.scored(after, before)
    means = found[found["kind"] == "average"].groupby("cell", sort=False)["score"].mean()
    assert list(means.index) == [
        "FT-M, eighth 6",
        "FT-M, all",
        "no edit",
    ]  # as they came, not by the alphabet
    kept = sum(KINDS[kind].against == "before" for kind in AVERAGE)
    assert means.tolist() == pytest.approx(
        [3.5 / 6, 3.3 / 6, (0.2 + 0.5 * (len(AVERAGE) - kept - 1) + kept) / 6]
    )
    halves = compare.sides(found).groupby(["cell", "kind"])["score"].mean()
    assert halves["FT-M, all", "efficacy"] == pytest.approx(1.8 / 3) and halves[
        "FT-M, all", "locality"
    ] == pytest.approx(0.5)


def test_a_cell_on_fewer_edits_is_refused_and_kinds_that_the_data_lacks_are_said():
    short = pd.concat(
        [rows({("FT-M", "all"): 1.0}), rows({("FT-M", "one"): 1.0}, edits=("a", "b"))]
    )
    with pytest.raises(InputError, match="FT-M one lacks 1 of the 3 edits beside it"):
        compare.scored(short, rows({("unedited", None): 0.2}, phase="before"))
    few = rows({("FT-M", "all"): 1.0}, kinds=("original", "detail"))
    assert compare.lacking(few) == [kind for kind in AVERAGE if kind not in ("original", "detail")]
    found = compare.sides(
        compare.scored(
            few, rows({("unedited", None): 0.2}, kinds=("original", "detail"), phase="before")
        )
    )
    assert set(found["kind"]) == {"average"}


def test_published_metrics_are_means_over_the_questions_of_an_edit_first():
    frame = rows({("FT-M", "all"): 1.0}, kinds=("original",), edits=("a", "b"))
    again = frame[frame["edit"] == "a"].assign(number=1, **dict.fromkeys(METRICS, 0.0))
    found = compare.published(pd.concat([frame, again]))
    assert found["exact"].tolist() == pytest.approx([0.75])  # edit a 0.5, edit b 1.0
    with pytest.raises(InputError, match="published: no rows of rel_doc"):
        compare.published(frame, ("rel_doc",))


def test_the_loss_curve_of_a_training_is_read_from_its_row():
    frame = rows({("FT-M", "all"): 1.0}, kinds=("original",), edits=("a", "b"))
    frame["curve"] = [json.dumps({"losses": [2.0, 1.0]}), None]
    assert compare.curves(frame).to_dict("records") == [
        {"method": "FT-M", "level": "all", "edit": "a", "step": step, "loss": loss}
        for step, loss in ((0, 2.0), (1, 1.0))
    ]


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("eighth_3", "eighth 3"),
        ("down_proj", "down_proj"),
        ("target_tokens", "all target tokens"),
        ("with", "with"),
    ],
)
def test_levels_are_said_in_words(level, words):
    assert compare.label(level) == words


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("embedded")


def trial(method, level, size, scores):
    """Rows of one trial: every kind of an edit has the edit's score."""
    found = []
    for number, score in enumerate(scores):
        for kind in AVERAGE:
            metrics = dict.fromkeys(METRICS, score) | {f"{name}_before": score for name in METRICS}
            found.append(
                {
                    "method": method,
                    "level": level,
                    "batch_size": size,
                    "batch": number // size,
                    "edit": f"e{number}",
                    "kind": kind,
                    "number": 0,
                    **metrics,
                }
            )
    fixed = {
        "study": "tuning",
        "factor": None,
        "split": "development",
        "phase": "after",
        "learning_rate": 0.1,
        "seed": 1,
        "model": "m",
        "data": "d",
        "recipe": f"{method} {level}",
        "code": "c",
    }
    return pd.DataFrame(found).assign(**fixed)


def commit(paths, *trials):
    paths.exported("tuning").parent.mkdir(parents=True)
    pd.concat(trials, ignore_index=True).to_parquet(paths.exported("tuning"))


def averages(**scores):
    """Average metric by method: for each a list of batches, each the scores of its edits."""
    rows = [
        (name, batch, f"{batch}-{number}", score)
        for name, batches in scores.items()
        for batch, own in enumerate(batches)
        for number, score in enumerate(own)
    ]
    return pd.DataFrame(rows, columns=["method", "batch", "edit", "score"])


def best(places, batch_size: int, among) -> str:
    return compare.on_development(places, batch_size, among).index[0]


# --- the best of development rows -----------------------------------------------------------------


def test_a_method_is_judged_by_the_mean_of_its_trials(here):
    commit(
        here,
        trial("MEMIT", "slow", 1, (0.1, 0.1)),
        trial("MEMIT", "fast", 1, (0.9, 0.7)),
        trial("UnKE", "slow", 1, (0.6, 0.6)),
        trial("UnKE", "fast", 1, (0.5, 0.5)),
    )
    found = compare.on_development([here], 1, ["UnKE", "MEMIT"])
    assert found.to_dict() == {"MEMIT": pytest.approx(0.8), "UnKE": pytest.approx(0.6)} and list(
        found.index
    ) == ["MEMIT", "UnKE"]


def test_the_best_is_one_that_was_not_asked_about(here):
    commit(
        here,
        trial("FT-M", "x", 1, (1.0,)),
        trial("UnKE", "x", 1, (0.6,)),
        trial("muKE", "x", 1, (0.7,)),
    )
    assert best([here], 1, ["UnKE", "muKE"]) == "muKE" and best([here], 1, ["UnKE"]) == "UnKE"


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(1, 1), (2, 1), (3, 4), (4, 4), (5, 4), (9, 16), (8, 4), (7, 4), (200, 16)],
)
def test_another_batch_size_decides_than_the_nearest_by_ratio(here, size, nearest):
    """7 is nearer to 4 than to 16, by ratio; of two equally near ones (2 of 1 and 4, 8 of 4 and 16)
    the smaller counts."""
    names = {1: "UnKE", 4: "MEMIT", 16: "muKE"}
    trials = [
        trial(name, "x", own, (0.9 if names[own] == name else 0.2,) * 4)
        for own in names
        for name in names.values()
    ]
    commit(here, *trials)
    assert best([here], size, list(names.values())) == names[nearest]


def test_the_first_place_that_knows_a_method_is_passed_over(here):
    first, second, third = here, Paths("quick"), Paths("nowhere")
    commit(first, trial("UnKE", "x", 1, (0.6,)), trial("MEMIT", "x", 1, (0.5,)))
    commit(
        second,
        trial("UnKE", "x", 1, (0.1,)),
        trial("MEMIT", "x", 1, (0.9,)),
        trial("muKE", "x", 1, (0.3,)),
    )
    assert best([third, first, second], 1, ["UnKE", "MEMIT"]) == "UnKE"
    assert best([third, second, first], 1, ["UnKE", "MEMIT"]) == "MEMIT"
    assert (
        best([first, second], 1, ["muKE"]) == "muKE"
    )  # the first place has rows, none of this method


@pytest.mark.parametrize("among", [["AlphaEdit"], []])
def test_nothing_known_gives_some_baseline(here, among):
    commit(here, trial("UnKE", "x", 1, (0.6,)))
    assert (
        compare.on_development([here], 1, among).empty
        and compare.on_development([], 1, ["UnKE"]).empty
    )


# --- leads ----------------------------------------------------------------------------------------


def test_a_lead_is_said_in_points_and_in_percent_of_the_baseline():
    frame = averages(own=[[0.6], [0.9], [0.6]], baseline=[[0.5], [0.6], [0.4]])
    points, relative = compare.lead(frame.sample(frac=1, random_state=2), "own", "baseline")
    assert (points.mean, points.n, relative.n) == (pytest.approx(20), 3, 3)
    assert relative.mean == pytest.approx(
        100 * (2.1 / 1.5 - 1)
    )  # of the means: no mean of the ratios, 40
    back = compare.lead(frame, "baseline", "own")
    assert back[0].mean == pytest.approx(-20) and back[1].mean == pytest.approx(
        100 * (1.5 / 2.1 - 1)
    )


def test_a_lead_is_drawn_over_edits_that_share_their_weights():
    """Two batches: whatever is drawn, the ends are those of the batches, however many edits each
    has."""
    frame = averages(own=[[0.6] * 50, [0.8] * 50], baseline=[[0.5] * 50, [0.5] * 50])
    points, relative = compare.lead(frame, "own", "baseline")
    assert points == pytest.approx((20, 10, 30, 2)) and relative == pytest.approx((40, 20, 60, 2))


def test_a_constant_ratio_has_a_wide_interval():
    """Pairs are drawn together: where every edit gains a tenth, the percent is sure and the points
    are not."""
    points, relative = compare.lead(
        averages(own=[[0.11], [0.55], [0.99]], baseline=[[0.1], [0.5], [0.9]]), "own", "baseline"
    )
    assert (
        relative[:3] == pytest.approx((10, 10, 10))
        and points.low == pytest.approx(1)
        and points.high == pytest.approx(9)
    )


def test_one_batch_is_given_an_interval():
    points, relative = compare.lead(
        averages(own=[[0.6, 0.7]], baseline=[[0.5, 0.5]]), "own", "baseline"
    )
    assert (
        points.mean == pytest.approx(15)
        and relative.mean == pytest.approx(30)
        and points.n == relative.n == 1
    )
    assert all(math.isnan(end) for one in (points, relative) for end in (one.low, one.high))


@pytest.mark.parametrize(
    "frame",
    [
        averages(own=[[0.6], [0.7]], baseline=[[0.5]]),
        averages(own=[[0.6]], other=[[0.5]]),
        averages(own=[[0.6, 0.6]], baseline=[[0.5], [0.5]]),
    ],
)
def test_a_lead_over_other_edits(frame):
    with pytest.raises(InputError, match="lead: own and baseline: expected the same edits"):
        compare.lead(frame, "own", "baseline")


# --- the trend ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [3.0, -1.5, 0.0])
def test_a_lead_that_is_linear_in_doublings_has_another_slope(slope):
    """Sizes that are no even steps, and as many batches as come out: 24 edits are one batch of
    24."""
    leading = {
        size: ([4 + slope * np.log2(size)] * 24, np.repeat(range(24 // size), size))
        for size in (1, 8, 24)
    }
    found = compare.trend(leading)
    assert found[:3] == pytest.approx((slope,) * 3) and found.n == 24 + 3 + 1


def test_noise_is_a_trend():
    noise = np.tile([-4.0, 4.0, 1.0, -1.0], 10)
    found = compare.trend({size: (5 + noise, np.arange(40)) for size in (1, 2, 8)})
    assert (
        found.mean == pytest.approx(0) and found.low < -0.2 and found.high > 0.2
    )  # drawn anew for each size
    grown = compare.trend(
        {size: (5 + 3 * np.log2(size) + noise, np.arange(40)) for size in (1, 2, 8)}
    )
    assert grown.mean == pytest.approx(3) and 2 < grown.low < 3 < grown.high < 4


def test_edits_are_drawn_apart_from_their_batch():
    noise = np.repeat([-4.0, 4.0], 20)
    alone = compare.trend({1: (noise, np.arange(40)), 4: (noise, np.arange(40))})
    together = compare.trend({1: (noise, np.arange(40) // 10), 4: (noise, np.arange(40) // 10)})
    assert together.high - together.low > 2 * (alone.high - alone.low) and (
        alone.n,
        together.n,
    ) == (80, 8)


def test_one_size_has_a_trend():
    for differences in ({}, {8: ([1.0], [0])}):
        with pytest.raises(InputError, match="trend: one batch size"):
            compare.trend(differences)


# --- what tells methods apart ---------------------------------------------------------------------


def probes(score, methods=range(3), edits=range(8), **counts):
    """Three probes of locality and three of a general skill for each edit under each method;
    `score(kind, method, edit)`."""
    kinds = {"rel_doc": 1, "rand_doc": 1, "struct_trip": 1, "general": 3} | counts
    rows = [
        (f"M{method}", f"e{edit}", kind, score(kind, method, edit))
        for method in methods
        for edit in edits
        for kind, count in kinds.items()
        for _ in range(count)
    ]
    return pd.DataFrame(rows, columns=["method", "edit", "kind", "score"])


def test_methods_alone_explain_less_than_all():
    """Locality differs by method (and edits have levels of their own), the general skill by edit
    alone."""
    found = compare.separation(
        probes(
            lambda kind, method, edit: edit / 20 if kind == "general" else method / 5 + edit / 20
        ).sample(frac=1, random_state=1)
    )
    assert found["locality"] == pytest.approx((1, 1, 1, 8)) and found["general"] == pytest.approx(
        (0, 0, 0, 8), abs=1e-12
    )
    assert found["difference"] == pytest.approx((1, 1, 1, 8))


def test_no_difference_between_methods_is_a_separation():
    for score in (lambda *_: 1.0, lambda kind, method, edit: float((method + edit) % 2)):
        found = compare.separation(probes(score, methods=range(2)))
        assert (
            found["locality"].mean
            == found["general"].mean
            == found["difference"].mean
            == pytest.approx(0)
        )


def test_a_share_is_that_of_a_table_done_by_hand():
    """Differences of two methods of 1 and 3: between them 4, left over 1, whatever the edits' own
    levels."""
    apart = {0: 1.0, 1: 3.0}
    found = compare.separation(
        probes(
            lambda kind, method, edit: 7 * edit + method * apart[edit],
            methods=range(2),
            edits=range(2),
        )
    )
    assert found["locality"].mean == found["general"].mean == pytest.approx(4 / 5)
    assert found["locality"].low == pytest.approx(4 / 5) and found[
        "locality"
    ].high == pytest.approx(1)  # one edit drawn twice: all


@pytest.mark.parametrize(
    "counts",
    [
        {"general": 2},
        {"struct_trip": 2},
        {"general": 0},
        {"rel_doc": 0},
        {"near_triple": 5, "general": 2},
    ],
)
def test_more_probes_of_one_side_are_compared(counts):
    with pytest.raises(InputError, match="separation: .*as many of locality as of a general skill"):
        compare.separation(probes(lambda *place: place[1] / 5, **counts))


def test_kinds_of_neither_side_are_counted():
    score = lambda kind, method, edit: method / 5 + (edit if kind == "near_triple" else 0)
    assert compare.separation(probes(score, near_triple=5, original=2)) == compare.separation(
        probes(score)
    )


def test_a_gap_or_a_single_method_is_compared():
    frame = probes(lambda *place: place[1] / 5)
    for part in (
        frame[frame["method"] == "M0"],
        frame[(frame["method"] != "M1") | (frame["edit"] != "e3")],
        frame.iloc[1:],
        frame[:0],
    ):
        with pytest.raises(InputError, match="separation: .*two methods or more"):
            compare.separation(part)


def test_pairs_are_told_apart_by_noise_or_not_by_a_difference():
    """M0 is clearly below; M1 and M2 differ by edit, as often one way as the other."""
    noise = np.tile([0.1, -0.1], 6)
    frame = probes(
        lambda kind, method, edit: 0.0 if method == 0 else 0.5 + (method == 2) * noise[edit],
        edits=range(12),
    )
    assert compare.pairs_separated(frame, compare.LOCALITY) == (2, 3)
    assert compare.pairs_separated(
        probes(lambda kind, method, edit: edit / 9 if kind == "general" else method / 5),
        compare.SKILL,
    ) == (0, 3)


def test_many_pairs_are_told_apart_by_chance():
    """Six edits, all in one direction: p is 1/32 for a pair alone, and not below 5 % among
    three."""
    score = lambda kind, method, edit: method + edit / 9 if method < 2 else -1.0 * (-1) ** edit
    assert compare.pairs_separated(
        probes(score, methods=range(2), edits=range(6)), compare.LOCALITY
    ) == (1, 1)
    assert compare.pairs_separated(
        probes(score, methods=range(3), edits=range(6)), compare.LOCALITY
    ) == (0, 3)
