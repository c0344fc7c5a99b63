"""Figures of data and of cost show what they are given, and refuse what they cannot show."""

import matplotlib.pyplot as plt
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


@pytest.mark.parametrize("draw", [lambda frame: diagrams.spread(frame), lambda frame: diagrams.growth(frame, "x", {"y": "Y"}), lambda frame: diagrams.ranks(frame)])
def test_a_missing_column_is_named_and_nothing_stays_in_memory(draw):
    with pytest.raises(InputError, match="no column"):
        draw(pd.DataFrame({"measure": ["a"], "score": [1.0]}))
    assert plt.get_fignums() == []
