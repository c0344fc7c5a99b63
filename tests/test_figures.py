"""Figures show the numbers they are given, in colours that do not wander, and redraw to the same bytes."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from uke.errors import InputError
from uke.report import figures
from uke.results.stats import interval

KINDS = ("original", "detail", "rel_doc", "general")


def scores(*methods: str) -> pd.DataFrame:
    generator = np.random.default_rng(7)
    rows = [
        (method, kind, f"e{edit}", float(generator.uniform(0.2, 0.9)))
        for method in methods
        for kind in KINDS
        for edit in range(6)
    ]
    return pd.DataFrame(rows, columns=["method", "kind", "edit", "score"])


def panels(fig) -> dict:
    return {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_title(loc="left")}


def marks(ax) -> list[tuple[float, float, str]]:
    """Position and colour of the point of each line."""
    found = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    return [(line.get_xdata()[0], line.get_ydata()[0], to_hex(line.get_color())) for line in found]


def test_a_point_and_its_interval_are_those_of_the_rows():
    frame = scores("FT-L", "FT-M")
    ax = panels(figures.levels(frame))["Details"]
    own = frame[(frame["method"] == "FT-M") & (frame["kind"] == "detail")]["score"]
    expected = interval(own)
    assert any(x == pytest.approx(expected.mean) and place == 1 for x, place, _ in marks(ax))
    ends = [
        segment[:, 0]
        for lines in ax.collections
        if hasattr(lines, "get_segments")
        for segment in lines.get_segments()
    ]
    assert any(end == pytest.approx([expected.low, expected.high]) for end in ends)


def test_details_of_one_edit_do_not_count_as_several_edits():
    frame = pd.DataFrame(
        {
            "method": "FT-M",
            "kind": "detail",
            "edit": ["a", "a", "a", "b"],
            "score": [0.0, 0.0, 0.0, 1.0],
        }
    )
    (x, _, _), *_ = marks(panels(figures.levels(frame))["Details"])
    assert x == pytest.approx(0.5)


def test_the_model_before_the_edit_is_a_reference_and_no_method():
    frame = scores("FT-M", "no edit", "floor")
    fig = figures.levels(frame)
    ax = panels(fig)["RelDoc"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["FT-M"]
    before = frame[(frame["method"] == "no edit") & (frame["kind"] == "rel_doc")]["score"].mean()
    dashed = [line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert dashed == [pytest.approx(before)]
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {
        "no edit",
        "below the floor",
    }
    with pytest.raises(InputError, match="besides the references"):
        figures.levels(scores("no edit"))


def test_a_method_keeps_its_colour_whatever_stands_beside_it():
    alone = marks(panels(figures.levels(scores("FT-M")))["Original"])[0][2]
    beside = marks(panels(figures.levels(scores("LoRA", "FT-L", "FT-M")))["Original"])
    assert alone == beside[2][2] and len({colour for _, _, colour in beside}) == 3
    assert len(set(figures.looks(f"level {place}" for place in range(6)).values())) == 6


def test_a_kind_without_rows_for_a_method_shows_a_dash():
    frame = scores("FT-L", "FT-M")
    frame = frame[(frame["method"] == "FT-L") | (frame["kind"] != "general")]
    ax = panels(figures.levels(frame))["General skill"]
    assert len(marks(ax)) == 1 and "–" in [text.get_text() for text in ax.texts]


def test_levels_within_a_method_are_dodged_and_not_drawn_over_each_other():
    frame = pd.concat([scores("FT-M", "LoRA").assign(level=level) for level in ("single", "all")])
    ax = panels(figures.levels(frame, by="level", within="method"))["Original"]
    assert len({place for _, place, _ in marks(ax)}) == 4


def test_an_edit_that_stopped_early_still_counts_in_the_curve():
    steps = [("a", step, 1.0) for step in range(2)] + [("b", step, 3.0) for step in range(4)]
    frame = pd.DataFrame(steps, columns=["edit", "step", "loss"]).assign(method="FT-M")
    line = max(figures.curves(frame).axes[0].get_lines(), key=lambda each: len(each.get_xdata()))
    assert line.get_xdata().tolist() == [0, 1, 2, 3] and line.get_ydata().tolist() == [2.0] * 4


def test_names_of_lines_that_end_together_do_not_overlap():
    rows = [
        (method, step, 1.0 + step)
        for method in ("FT-L", "FT-M", "FT-A", "LoRA")
        for step in range(3)
    ]
    ax = figures.curves(pd.DataFrame(rows, columns=["method", "step", "loss"])).axes[0]
    heights = sorted(text.xyann[1] for text in ax.texts)
    assert len(heights) == 4 and min(np.diff(heights)) > 0.07 and heights[-1] < 1.05


def test_bars_of_knowledge_reach_the_mean_and_mark_what_was_asked_for():
    frame = scores("FT-M").assign(target=lambda each: each["kind"].map({"original": 0.98}))
    ax = figures.knowledge(frame).axes[0]
    means = frame.groupby("kind")["score"].mean()
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx(sorted(means))
    upright = [
        segment
        for lines in ax.collections
        for segment in lines.get_segments()
        if segment[0][0] == segment[1][0] == 0.98
    ]
    assert len(upright) == 1


def test_every_answer_is_counted_in_the_histogram_of_lengths():
    frame = pd.DataFrame(
        {"dataset": ["long"] * 40 + ["short"] * 5, "length": [*range(60, 100), 0, 1, 2, 3, 3]}
    )
    axes = figures.lengths(frame).axes
    assert [sum(ax.patches[0].get_data().values) for ax in axes] == [40, 5]
    assert [ax.get_title(loc="right") for ax in axes] == ["median 80, n = 40", "median 2, n = 5"]


@pytest.mark.parametrize(
    ("draw", "column"),
    [
        (figures.levels, "kind"),
        (figures.curves, "step"),
        (figures.knowledge, "score"),
        (figures.lengths, "length"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest_one(draw, column):
    frame = pd.DataFrame(
        {
            name: [1.0]
            for name in ("method", "kind", "edit", "score", "step", "loss", "dataset", "length")
        }
    ).rename(columns={column: column + "x"})
    with pytest.raises(InputError, match=f"no column '{column}'; did you mean '{column}x'"):
        draw(frame)


LOSSES = pd.DataFrame({"method": "FT-M", "step": range(5), "loss": [4.0, 2.0, 1.0, 0.5, 0.1]})
DRAW = """
import json, sys
import pandas as pd
from uke import figures, report
frame = pd.read_json(sys.argv[1] + "/losses.json")
figures.save(figures.curves(frame), sys.argv[1], "losses")
json.dump(sorted(sys.modules), open(sys.argv[1] + "/modules.json", "w"))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Folder in which a process with another hash seed has drawn LOSSES and listed the modules it loaded."""
    folder = tmp_path_factory.mktemp("elsewhere")
    LOSSES.to_json(folder / "losses.json")
    environment = {
        "PYTHONHASHSEED": "99",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "HOME": str(folder),
    }
    subprocess.run([sys.executable, "-c", DRAW, str(folder)], check=True, env=environment)
    return folder


def test_a_redraw_gives_the_same_bytes_in_another_process(elsewhere, tmp_path):
    saved = figures.save(figures.curves(LOSSES), tmp_path, "losses")
    assert [path.name for path in saved] == ["losses.pdf", "losses.png"]
    for path in saved:
        assert path.read_bytes() == (elsewhere / path.name).read_bytes()
    assert b"CreationDate" not in saved[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.pdf", "losses.png"]


def test_drawing_and_reporting_need_no_torch(elsewhere):
    loaded = json.loads((elsewhere / "modules.json").read_text(encoding="utf-8"))
    assert "uke.report.section" in loaded and "torch" not in loaded and "transformers" not in loaded


def test_ten_kinds_of_five_levels_in_two_methods_fit_on_a_page():
    """Drawn in three columns they ran off the top of it."""
    kinds = (
        "original",
        "paraphrase",
        "detail",
        "multi_hop",
        "rel_doc",
        "rand_doc",
        "struct_trip",
        "near_triple",
        "general",
        "average",
    )
    rows = [
        (level, method, kind, 0.5, 0.4, 0.6)
        for level in "abcde"
        for method in ("FT-M", "LoRA")
        for kind in kinds
    ]
    fig = figures.levels(
        pd.DataFrame(rows, columns=["level", "method", "kind", "mean", "low", "high"]),
        by="level",
        within="method",
    )
    assert fig.get_figheight() < 9.2 and len(fig.axes) == 12


def test_a_loss_that_falls_less_than_a_hundredfold_still_has_ticks_to_read_it_by():
    fig = figures.curves(
        pd.DataFrame({"method": "FT-M", "step": range(5), "loss": [5.0, 2.0, 1.0, 0.5, 0.2]})
    )
    low, high = fig.axes[0].get_ylim()
    assert (
        fig.axes[0].get_yscale() == "log"
        and sum(low <= tick <= high for tick in fig.axes[0].get_yticks()) >= 3
    )
