"""Figures of data and of cost show what they are given, and refuse what they cannot show."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from uke import diagrams
from uke.errors import InputError


def test_every_score_is_a_point_and_the_median_is_said():
    frame = pd.DataFrame({"kind": ["rel_doc"] * 3 + ["rand_doc"] * 2, "measure": "overlap", "score": [0.1, 0.5, 0.9, 0.2, 0.4]})
    fig = diagrams.spread(frame)
    (axes,) = fig.axes
    assert sorted(len(cloud.get_offsets()) for cloud in axes.collections if hasattr(cloud, "get_sizes") and len(cloud.get_sizes())) == [2, 3]
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
    return {(float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in ax.get_lines() if line.get_markerfacecolor() == "none" and len(line.get_xdata())}


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
        [("MEMIT", edit, window, -2.0 - window, -1.0 * edit) for edit in (1, 2, 9) for window in (1, 2)], columns=["method", "edit", "window", "before", "after"]
    )
    before, after = diagrams.windows(frame).axes[0].get_lines()
    assert list(before.get_ydata()) == [-3, -4] and list(after.get_ydata()) == [-2, -2]


def test_a_plane_has_a_point_for_each_method_and_a_cross_for_the_unedited_model():
    frame = pd.DataFrame({"method": ["FT-M", "before the edit"], "kept": [0.9, 1.0], "written": [0.5, 0.1]})
    marks = {line.get_label(): (line.get_marker(), line.get_xdata()[0]) for line in diagrams.plane(frame).axes[0].get_lines() if not line.get_label().startswith("_")}
    assert marks == {"FT-M": ("o", 0.9), "before the edit": ("x", 1.0)}


@pytest.mark.parametrize("draw", [lambda frame: diagrams.spread(frame), lambda frame: diagrams.growth(frame, "x", {"y": "Y"}), lambda frame: diagrams.ranks(frame), diagrams.trials, diagrams.budget, diagrams.windows, diagrams.plane])
def test_a_missing_column_is_named_and_nothing_stays_in_memory(draw):
    with pytest.raises(InputError, match="no column"):
        draw(pd.DataFrame({"measure": ["a"], "score": [1.0]}))
    assert plt.get_fignums() == []
