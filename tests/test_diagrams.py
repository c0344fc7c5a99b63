"""Figures of data and of cost show what they are given, and refuse what they cannot show."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from uke.errors import InputError
from uke.report import diagrams


def test_every_score_is_a_point_and_the_median_is_said():
    frame = pd.DataFrame(
        {
            "kind": ["rel_doc"] * 3 + ["rand_doc"] * 2,
            "measure": "overlap",
            "score": [0.1, 0.5, 0.9, 0.2, 0.4],
        }
    )
    fig = diagrams.spread(frame)
    (axes,) = fig.axes
    assert sorted(
        len(cloud.get_offsets())
        for cloud in axes.collections
        if hasattr(cloud, "get_sizes") and len(cloud.get_sizes())
    ) == [2, 3]
    assert {text.get_text() for text in axes.texts} == {"0.50", "0.30"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["RelDoc", "RandDoc"]


def test_costs_grow_from_zero_in_a_panel_each():
    frame = pd.DataFrame({"pages": [10, 20], "file": [1.0, 2.0], "peak": [0.5, 0.5]})
    fig = diagrams.growth(frame, "pages", {"file": "File", "peak": "Peak"})
    assert [axes.get_title(loc="left") for axes in fig.axes] == ["File", "Peak"]
    assert all(axes.get_ylim()[0] == 0 and axes.get_xlim()[0] == 0 for axes in fig.axes)


def test_the_share_of_items_up_to_a_rank_rises_to_one():
    frame = pd.DataFrame({"kind": ["rel_doc", "rel_doc", "rand_doc"], "rank": [1, 4, 200]})
    fig = diagrams.ranks(frame, floor=100)
    lines = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    assert list(lines["RelDoc"]) == [0, 0.5, 1, 1] and max(lines["RandDoc"]) == 1


TRIALS = pd.DataFrame(
    {
        "method": ["FT-M", "FT-M", "MEMIT", "MEMIT"] * 2,
        "batch_size": [1] * 4 + [8] * 4,
        "score": [0.7, 0.5, 0.6, 0.4, 0.6, 0.65, 0.3, 0.5],
        "chosen": [True, False, True, False, False, True, False, True],
        "before": 0.56,
    }
)


def rings(ax):
    return {
        (float(line.get_xdata()[0]), int(line.get_ydata()[0]))
        for line in ax.get_lines()
        if line.get_markerfacecolor() == "none" and len(line.get_xdata())
    }


def test_every_trial_is_a_point_and_the_chosen_one_is_ringed_even_if_another_scored_higher():
    axes = diagrams.trials(TRIALS.assign(chosen=[False, True] * 4)).axes
    assert [rings(ax) for ax in axes] == [{(0.5, 0), (0.4, 1)}, {(0.65, 0), (0.5, 1)}]
    assert [len(cloud.get_offsets()) for ax in axes for cloud in ax.collections] == [2, 2, 2, 2]


def test_best_of_k_is_the_mean_over_all_choices_of_k_trials():
    trials = [0.3, 0.1, 0.8, 0.8, 0.5]
    expected = [np.mean([max(some) for some in combinations(trials, k)]) for k in range(1, 6)]
    assert diagrams.best_of(trials) == pytest.approx(expected)


def test_a_method_without_trials_at_a_size_has_no_curve_there_and_the_others_keep_theirs():
    few = TRIALS[(TRIALS["batch_size"] == 8) | (TRIALS["method"] == "FT-M")]
    first, second = diagrams.budget(few).axes
    assert [list(line.get_ydata()) for line in first.get_lines()] == [pytest.approx([0.6, 0.7]), []]
    assert [len(line.get_ydata()) for line in second.get_lines()] == [2, 2]


def test_windows_show_the_median_over_edits_before_and_after():
    frame = pd.DataFrame(
        [
            ("MEMIT", edit, window, -2.0 - window, -1.0 * edit)
            for edit in (1, 2, 9)
            for window in (1, 2)
        ],
        columns=["method", "edit", "window", "before", "after"],
    )
    before, after = diagrams.windows(frame).axes[0].get_lines()
    assert list(before.get_ydata()) == [-3, -4] and list(after.get_ydata()) == [-2, -2]


def test_a_plane_has_a_point_for_each_method_and_a_cross_for_the_unedited_model():
    frame = pd.DataFrame({"method": ["FT-M", "no edit"], "kept": [0.9, 1.0], "written": [0.5, 0.1]})
    marks = {
        line.get_label(): (line.get_marker(), line.get_xdata()[0])
        for line in diagrams.plane(frame).axes[0].get_lines()
        if not line.get_label().startswith("_")
    }
    assert marks == {"FT-M": ("o", 0.9), "no edit": ("x", 1.0)}


@pytest.mark.parametrize(
    "draw",
    [
        lambda frame: diagrams.spread(frame),
        lambda frame: diagrams.growth(frame, "x", {"y": "Y"}),
        lambda frame: diagrams.ranks(frame),
        diagrams.trials,
        diagrams.budget,
        diagrams.windows,
        diagrams.plane,
        lambda frame: diagrams.trends(frame, "x"),
        diagrams.heat,
        diagrams.descents,
    ],
)
def test_a_missing_column_is_named_and_nothing_stays_in_memory(draw):
    with pytest.raises(InputError, match="no column"):
        draw(pd.DataFrame({"measure": ["a"], "score": [1.0]}))
    assert plt.get_fignums() == []


def test_trends_are_means_over_edits_a_line_for_each_method_and_a_panel_for_each_view():
    frame = pd.DataFrame(
        [
            (name, view, count, edit, score * count)
            for name, score in (("FT-M", 0.02), ("MEMIT", 0.01))
            for view in ("first", "seconds")
            for count in (10, 1)
            for edit in (0, 2)
        ],
        columns=["method", "panel", "count", "edit", "score"],
    ).assign(
        score=lambda frame: (
            (frame["score"] + 0.1 * frame["edit"]) * frame["panel"].map({"first": 1, "seconds": 40})
        )
    )
    first, seconds = diagrams.trends(frame, "count").axes
    assert [list(line.get_xdata()) for line in first.get_lines()] == [[1, 10]] * 2
    assert [list(line.get_ydata()) for line in first.get_lines()] == [
        pytest.approx([0.12, 0.3]),
        pytest.approx([0.11, 0.2]),
    ]
    assert (
        first.get_ylim()[1] == pytest.approx(1.03)
        and seconds.get_ylim()[0] == 0
        and seconds.get_ylim()[1] > 12
    )
    assert [label.get_text() for label in first.figure.legends[0].get_texts()] == ["FT-M", "MEMIT"]


def test_trends_over_orders_of_magnitude_get_a_log_axis_and_a_method_may_lack_a_panel():
    frame = pd.DataFrame(
        {
            "method": ["FT-M", "FT-M", "MEMIT"],
            "panel": ["a", "a", "b"],
            "x": [1, 2, 2],
            "score": [1.0, 100.0, 3.0],
        }
    )
    a, b = diagrams.trends(frame, "x").axes
    assert a.get_yscale() == "log" and b.get_yscale() == "linear" and len(b.get_lines()) == 1


def test_heat_says_each_mean_and_leaves_blank_what_was_not_written():
    frame = pd.DataFrame(
        {
            "method": ["FT-A", "FT-A", "FT-A", "MEMIT"],
            "layer": [10, 2, 2, 2],
            "norm": [0.1, 0.2, 0.4, 0.05],
        }
    )
    ax = diagrams.heat(frame).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "10"] and [
        label.get_text() for label in ax.get_yticklabels()
    ] == ["FT-A", "MEMIT"]
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "0.30"),
        ((1, 0), "0.10"),
        ((0, 1), "0.05"),
    }


def test_a_method_that_is_there_twice_keeps_its_colour_and_is_dashed():
    frame = pd.DataFrame(
        {
            "method": ["FT-UKE", "FT-UKE (at once)", "FT-M"],
            "panel": "a",
            "x": [1, 1, 1],
            "score": [0.5, 0.6, 0.7],
        }
    )
    first, second, other = diagrams.trends(frame, "x").axes[0].get_lines()
    assert first.get_color() == second.get_color() != other.get_color() and [
        line.get_linestyle() for line in (first, second)
    ] == ["-", "--"]


ACROSS = pd.DataFrame(
    [
        (level, method, "average", edit, score + edit / 10)
        for method, start in (("FT-M", 0.3), ("LoRA", 0.1))
        for level, score in (("all", start + 0.2), ("eighth 1", start), ("eighth 2", start + 0.1))
        for edit in (0, 1)
    ]
    + [("no edit", "no edit", "average", edit, 0.25) for edit in (0, 1)],
    columns=["level", "method", "kind", "edit", "score"],
)


def test_levels_that_stand_alone_are_points_beside_the_line_and_not_on_it():
    (ax,) = diagrams.across(ACROSS, alone=["all"]).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["eighth 1", "eighth 2", "all"]
    joined = [
        list(line.get_ydata())
        for line in ax.get_lines()
        if line.get_linestyle() == "-" and line.get_marker() == "None"
    ]
    assert joined == [pytest.approx([0.35, 0.45]), pytest.approx([0.15, 0.25])]
    points = [list(line.get_ydata()) for line in ax.get_lines() if line.get_marker() in ("o", "s")]
    assert points == [pytest.approx([0.35, 0.45, 0.55]), pytest.approx([0.15, 0.25, 0.35])]
    assert any(
        list(line.get_ydata()) == [0.25, 0.25] and line.get_label() == "no edit"
        for line in ax.get_lines()
    )


def test_a_level_that_a_method_lacks_leaves_its_place_empty():
    (ax,) = diagrams.across(
        ACROSS[(ACROSS["method"] != "LoRA") | (ACROSS["level"] != "eighth 1")]
    ).axes
    lora = next(line for line in ax.get_lines() if line.get_marker() == "s")
    assert np.isnan(lora.get_ydata()).sum() == 1 and len(lora.get_ydata()) == 3


def test_rows_of_panels_are_kept_apart():
    frame = ACROSS[ACROSS["method"] != "no edit"].assign(trained="with")
    axes = diagrams.across(frame, by="trained", row="method").axes
    assert [ax.get_title(loc="left") for ax in axes] == ["FT-M: Average", "LoRA: Average"]
    assert [
        max(line.get_ydata()) for ax in axes for line in ax.get_lines() if line.get_marker() == "o"
    ] == pytest.approx([0.55, 0.35])


def test_a_specification_is_sorted_and_shows_the_levels_of_each_combination():
    frame = pd.DataFrame(
        {
            "layers": ["one", "all"],
            "loss": ["x", "x"],
            "mean": [0.4, 0.7],
            "low": [0.3, 0.6],
            "high": [0.5, 0.8],
            "chosen": [True, False],
        }
    )
    top, below = diagrams.specification(frame, ["layers", "loss"]).axes
    assert top.collections[1].get_offsets()[:, 1].tolist() == [0.7, 0.4]
    (ring,) = [line for line in top.get_lines() if line.get_markerfacecolor() == "none"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([1], [0.4])
    assert [label.get_text() for label in below.get_yticklabels()] == [
        "layers: all",
        "layers: one",
        "loss: x",
    ]
    filled = [
        [
            tuple(colour[:3]) != tuple(below.collections[0].get_facecolors()[1][:3])
            for colour in cloud.get_facecolors()
        ]
        for cloud in below.collections
    ]
    assert filled[:2] == [[True, False], [False, True]]
    with pytest.raises(InputError, match="specification: no column 'chosen'"):
        diagrams.specification(frame.drop(columns="chosen"), ["layers"])


def test_an_edit_whose_training_ended_keeps_its_last_loss():
    frame = pd.DataFrame(
        [("FT-M", 0, 0, 4.0), ("FT-M", 0, 1, 1.0), ("FT-M", 1, 0, 2.0), ("MEMIT", 1, 0, 0.01)],
        columns=["method", "edit", "step", "loss"],
    )
    first, second = diagrams.descents(frame).axes
    assert list(first.get_lines()[0].get_ydata()) == [3, 1.5] and list(
        second.get_lines()[0].get_ydata()
    ) == [0.01]
    assert first.get_yscale() == second.get_yscale() == "log"


def test_a_line_that_the_last_panel_of_budgets_lacks_is_still_named():
    full, short = TRIALS, TRIALS[(TRIALS["batch_size"] == 1) | (TRIALS["method"] == "FT-M")]
    named = [
        {
            text.get_text()
            for text in (
                *fig.axes[-1].texts,
                *(each for legend in fig.legends for each in legend.get_texts()),
            )
        }
        for fig in map(diagrams.budget, (full, short))
    ]
    assert all({"FT-M", "MEMIT"} <= names for names in named)


@pytest.mark.parametrize(
    "sizes, scale",
    [
        ((1, 2, 4, 8, 16, 40), "log"),
        ((1, 4, 16, 64), "log"),
        ((26, 48, 95, 187), "log"),
        ((1, 10, 20, 40), "linear"),
        ((1, 2, 8), "linear"),
    ],
)
def test_numbers_that_grow_by_a_factor_stand_apart_from_each_other(sizes, scale):
    frame = pd.DataFrame({"method": "FT-M", "panel": "editing", "batch size": sizes, "score": 0.5})
    (axes,) = diagrams.trends(frame, "batch size").axes
    assert axes.get_xscale() == scale and list(axes.get_xticks()) == list(sizes)
