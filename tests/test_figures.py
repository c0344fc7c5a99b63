"""Figures show the numbers they are given, in colours that do not wander, as the same bytes."""

import json
import subprocess
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from uke.report import figures, style
from uke.results.stats import interval

SOME = ("original", "detail", "rel_doc", "general")


def scores(*methods: str) -> pd.DataFrame:
    generator = np.random.default_rng(7)
    cells = product(methods, SOME, range(6))
    rows = [(m, kind, f"e{edit}", generator.uniform(0.2, 0.9)) for m, kind, edit in cells]
    return pd.DataFrame(rows, columns=["method", "kind", "edit", "score"])


def panels(fig) -> dict:
    return {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_title(loc="left")}


def points(ax) -> list[tuple[float, float, str]]:
    """Return position and colour of every mark."""
    return [
        (float(x), float(y), to_hex(line.get_color()))
        for line in ax.get_lines()
        if line.get_marker() not in ("None", "")
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def lines(ax) -> list:
    """Return the solid lines that join something."""
    solid = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    return [line for line in solid if len(line.get_xdata()) > 1]


def explained(fig) -> list[str]:
    """Return what the legend says, which stands in an empty panel where there is one."""
    (legend,) = [*fig.legends, *filter(None, (ax.get_legend() for ax in fig.axes))]
    return [text.get_text() for text in legend.get_texts()]


def segments(ax) -> list[np.ndarray]:
    groups = [each for each in ax.collections if hasattr(each, "get_segments")]
    return [segment for group in groups for segment in group.get_segments()]


def test_a_point_and_its_interval_are_those_of_the_rows():
    frame = scores("FT-L", "FT-M")
    ax = panels(figures.scores(frame))["Details"]
    expected = interval(frame[(frame["method"] == "FT-M") & (frame["kind"] == "detail")]["score"])
    assert any(x == pytest.approx(expected.mean) and y == 1 for x, y, _ in points(ax))
    ends = [expected.low, expected.high]
    assert any(segment[:, 0] == pytest.approx(ends) for segment in segments(ax))


def test_no_edit_is_a_line_and_no_method():
    frame = scores("FT-M", "no edit")
    fig = figures.scores(frame)
    ax = panels(fig)["RelDoc"]
    assert [name.get_text() for name in fig.axes[0].get_yticklabels()] == ["FT-M"]
    unedited = frame[(frame["method"] == "no edit") & (frame["kind"] == "rel_doc")]["score"].mean()
    dashed = [line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert dashed == [pytest.approx(unedited)]
    assert explained(fig) == ["no edit"]


def test_a_method_keeps_its_colour_whatever_stands_beside_it():
    alone = points(panels(figures.scores(scores("FT-M")))["Original"])[0][2]
    beside = points(panels(figures.scores(scores("LoRA", "FT-L", "FT-M")))["Original"])
    assert alone == beside[2][2] and len({colour for _, _, colour in beside}) == 3
    assert len(set(style.looks(f"level {at}" for at in range(6)).values())) == 6
    method, variant = style.looks(["FT-UKE", "FT-UKE (at once)"]).values()
    assert method.colour == variant.colour and (method.dashes, variant.dashes) == ("-", "--")


LEVELS = pd.DataFrame(
    [
        (level, method, "average", edit, score + edit / 10)
        for method, start in (("FT-M", 0.3), ("LoRA", 0.1))
        for level, score in (("all", start + 0.2), ("eighth_1", start), ("eighth_2", start + 0.1))
        for edit in (0, 1)
    ]
    + [("no edit", "no edit", "average", edit, 0.25) for edit in (0, 1)],
    columns=["level", "method", "kind", "edit", "score"],
)


def test_levels_stand_along_an_axis_and_those_apart_are_not_on_the_line():
    (ax,) = figures.scores(LEVELS, x="level", separate=["all"]).axes
    assert [each.get_text() for each in ax.get_xticklabels()] == ["eighth 1", "eighth 2", "all"]
    joined = [list(line.get_ydata()) for line in lines(ax)]
    assert joined == [pytest.approx([0.35, 0.45]), pytest.approx([0.15, 0.25])]
    heights = [y for _, y, _ in points(ax)]
    assert heights == pytest.approx([0.35, 0.45, 0.55, 0.15, 0.25, 0.35])
    assert any(list(line.get_ydata()) == [0.25, 0.25] for line in ax.get_lines())  # no edit


def test_a_level_that_a_method_lacks_leaves_its_place_empty_and_rows_are_kept_apart():
    short = LEVELS[(LEVELS["method"] != "LoRA") | (LEVELS["level"] != "eighth_1")]
    (ax,) = figures.scores(short, x="level").axes
    assert sum(np.isnan(y) for _, y, _ in points(ax)) == 1
    frame = LEVELS[LEVELS["method"] != "no edit"].assign(trained="with")
    axes = figures.scores(frame, x="level", by="trained", row="method").axes
    assert [ax.get_title(loc="left") for ax in axes] == ["FT-M: Average", "LoRA: Average"]
    assert [max(y for _, y, _ in points(ax)) for ax in axes] == pytest.approx([0.55, 0.35])


CURVES = [("FT-M", 0, 0, 4.0), ("FT-M", 0, 1, 1.0), ("FT-M", 1, 0, 2.0), ("MEMIT", 1, 0, 0.01)]
CURVES = pd.DataFrame(CURVES, columns=["method", "edit", "step", "loss"])


def test_an_edit_whose_training_ended_keeps_its_last_loss():
    (ax,) = figures.curves(CURVES).axes
    assert list(lines(ax)[0].get_ydata()) == [3, 1.5] and ax.get_yscale() == "log"
    (ax,) = figures.curves(CURVES[CURVES["method"] == "FT-M"]).axes
    low, high = ax.get_ylim()
    assert ax.get_yscale() == "linear" and low < 1.5 < high


def test_names_of_lines_that_end_together_do_not_overlap():
    names = ("FT-L", "FT-M", "FT-A", "LoRA")
    rows = [(method, step, 1.0 + step) for method in names for step in range(3)]
    ax = figures.curves(pd.DataFrame(rows, columns=["method", "step", "loss"])).axes[0]
    heights = sorted(text.xyann[1] for text in ax.texts)
    assert len(heights) == 4 and min(np.diff(heights)) > 0.07 and heights[-1] < 1.06


def test_trends_are_means_over_edits_with_a_panel_for_each_quantity():
    scores, factors = {"FT-M": 0.02, "MEMIT": 0.01}, {"first": 1, "seconds": 40}
    rows = [
        (name, view, count, factors[view] * (scores[name] * count + 0.1 * edit))
        for name, view, count, edit in product(scores, factors, (10, 1), (0, 2))
    ]
    frame = pd.DataFrame(rows, columns=["method", "panel", "count", "score"])
    first, seconds = figures.trend(frame, "count", panel="panel").axes
    assert [list(line.get_xdata()) for line in lines(first)] == [[1, 10]] * 2
    expected = [pytest.approx([0.12, 0.3]), pytest.approx([0.11, 0.2])]
    assert [list(line.get_ydata()) for line in lines(first)] == expected
    assert first.get_ylim()[1] == pytest.approx(1.03) and seconds.get_ylim()[0] == 0
    assert [text.get_text() for text in seconds.texts] == ["FT-M", "MEMIT"]  # at the lines' ends


def test_a_lead_has_its_intervals_and_the_line_of_no_lead():
    frame = pd.DataFrame({"batch_size": [1, 8, 40], "mean": [4.0, 9.0, 20.0]})
    frame = frame.assign(low=frame["mean"] - 1, high=frame["mean"] + 1)
    frame = frame.assign(method="FT-UKE")
    (ax,) = figures.trend(frame, y="mean", baseline=0, label_y="lead (points)").axes
    assert [list(segment[:, 1]) for segment in segments(ax)] == [[3, 5], [8, 10], [19, 21]]
    assert any(list(line.get_ydata()) == [0, 0] for line in ax.get_lines())
    assert [text.get_text() for text in ax.texts] == ["4.0", "9.0", "20.0", "FT-UKE"]


SCALES = {"log": [(1, 4, 16, 64), (26, 48, 95, 187)], "linear": [(1, 10, 20, 40), (1, 2, 8)]}


@pytest.mark.parametrize("sizes, scale", [(each, one) for one in SCALES for each in SCALES[one]])
def test_numbers_that_grow_by_a_factor_stand_apart_from_each_other(sizes, scale):
    frame = pd.DataFrame({"method": "FT-M", "panel": "editing", "batch size": sizes, "score": 0.5})
    (ax,) = figures.trend(frame, "batch size", panel="panel").axes
    assert ax.get_xscale() == scale and list(ax.get_xticks()) == list(sizes)


TRIALS = pd.DataFrame(
    {
        "method": ["FT-M", "FT-M", "MEMIT", "MEMIT"] * 2,
        "batch_size": [1] * 4 + [8] * 4,
        "score": [0.7, 0.5, 0.6, 0.4, 0.6, 0.65, 0.3, 0.5],
        "chosen": [False, True] * 4,
        "before": 0.56,
    }
)


def test_every_trial_is_a_point_and_the_chosen_one_is_ringed_even_if_another_scored_higher():
    axes = figures.tuning(TRIALS).axes
    for ax, chosen in zip(axes, [[(0.5, 0), (0.4, 1)], [(0.65, 0), (0.5, 1)]], strict=True):
        rings = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
        assert [(*ring.get_xdata(), *ring.get_ydata()) for ring in rings] == chosen
    assert [len(cloud.get_offsets()) for ax in axes for cloud in ax.collections] == [2] * 4


def test_a_distribution_rises_to_one_and_says_its_medians():
    frame = pd.DataFrame({"kind": ["rel_doc"] * 3 + ["rand_doc"] * 2, "measure": "overlap"})
    frame = frame.assign(score=[0.1, 0.5, 0.9, 0.2, 0.4])
    (ax,) = figures.distribution(frame, panel="measure").axes
    assert points(ax)[1][:2] == (0.5, 0.5) and points(ax)[0][:2] == pytest.approx((0.3, 0.5))
    assert {text.get_text() for text in ax.texts} == {"0.50", "0.30"}
    ends = [(*line.get_xdata()[[1, -1]], line.get_ydata()[-1]) for line in lines(ax)]
    assert sorted(ends) == [(0.1, 0.9, 1), (0.2, 0.4, 1)]
    fig = figures.distribution(frame.assign(rank=[1, 4, 20, 200, 300]), "rank", floor=100)
    assert fig.axes[0].get_xscale() == "log" and fig.axes[0].texts[-1].get_text() == "floor 100"
    assert explained(fig) == ["RelDoc", "RandDoc"]


def test_a_plane_has_a_point_for_each_method_and_a_cross_for_no_edit():
    frame = pd.DataFrame({"method": ["FT-M", "no edit"]})
    ax = figures.plane(frame.assign(locality=[0.9, 1.0], efficacy=[0.5, 0.1])).axes[0]
    marks = [(line.get_marker(), line.get_xdata()[0]) for line in ax.get_lines()[-2:]]
    assert marks == [("o", 0.9), ("x", 1.0)] and len(ax.texts) == 2  # a name beside each


LOSSES = pd.DataFrame({"method": "FT-M", "step": range(5), "loss": [4.0, 2.0, 1.0, 0.5, 0.1]})
DRAW = """
import json, sys
import pandas as pd
from uke.report import compose, figures, style
frame = pd.read_json(sys.argv[1] + "/losses.json")
style.save(figures.curves(frame), sys.argv[1], "losses")
json.dump(sorted(sys.modules), open(sys.argv[1] + "/modules.json", "w"))
"""


def test_another_process_draws_the_same_bytes_and_loads_no_torch(tmp_path):
    LOSSES.to_json(tmp_path / "losses.json")
    path = ":".join(filter(None, sys.path))
    environment = {"PYTHONHASHSEED": "99", "PYTHONPATH": path, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path)], check=True, env=environment)
    saved = style.save(figures.curves(LOSSES), tmp_path / "here", "losses")
    assert saved.name == "losses.svg" and saved.read_bytes() == (tmp_path / saved.name).read_bytes()
    assert b">FT-M</text>" in saved.read_bytes() and b"<metadata" not in saved.read_bytes()
    loaded = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    assert "uke.report.section" in loaded and not {"torch", "transformers"} & set(loaded)
