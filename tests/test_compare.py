"""Effects of factors: pairs that do not pair, weights that are no contrast, cells that are absent, averages over fewer kinds."""

import json

import pandas as pd
import pytest
from uke.data.edits import AVERAGE, KINDS
from uke.errors import InputError
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
    return pd.DataFrame(found).assign(**dict.fromkeys(columns), course=None)


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


def test_the_course_of_a_training_is_read_from_its_row():
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
