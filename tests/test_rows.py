"""Rows: written whole or not at all, stale or foreign ones refused, averages over what compares."""

import itertools

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from uke.data.edits import AVERAGE
from uke.data.edits import KINDS as TABLE
from uke.errors import InputError
from uke.project import Paths, code_fingerprint, unit_key
from uke.results import rows
from uke.results.metrics import METRICS
from uke.results.rows import COLUMNS

MARKS = {"model": "m" * 16, "data": "d" * 16, "recipe": "r" * 16}
KINDS = dict.fromkeys(("original", "paraphrase", "rel_doc", "rand_doc", "general"), 1)
KINDS |= {"detail": 3, "struct_trip": 2}
READ = {"study": "s", "factor": None, "split": None, "code": "c"}  # what `read` fills in


def unit(method="FT-M", edits=("e1", "e2"), kinds=KINDS, phase="after", **changes):
    """Rows of one unit: every probe of some edits, with scores that differ from probe to probe."""
    numbers = [(kind, number) for kind, count in kinds.items() for number in range(count)]
    probes = [(edit, *number) for edit in edits for number in numbers]
    frame = pd.DataFrame(probes, columns=["edit", "kind", "number"])
    steps = np.linspace(0.1, 0.9, len(frame))
    known = {name: steps for name in METRICS} | {f"{name}_before": 1 - steps for name in METRICS}
    known |= {"question": "Who?", "reference": "Ada was born in London.", "before": "Someone."}
    known |= {"answer": [f"{method} {edit} {kind} {number}" for edit, kind, number in probes]}
    known |= {"method": method, "level": "all", "batch": 0, "batch_size": 1, "phase": phase}
    known |= {"seed": 2024, "learning_rate": 5e-4, "steps": 25}
    return frame.assign(**known, **MARKS).assign(**changes)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("smoke")


def read(paths):
    """All units of the study `s`."""
    return rows.read(paths, "s", [path.stem for path in paths.rows("s").glob("*.parquet")])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_runs_on_other_data_have_other_folders(here, tmp_path):
    other = Paths("quick", "unkebench")
    assert here.figures == tmp_path / "figures" / "smoke"
    assert here.results == tmp_path / "results" / "smoke"
    assert other.figures == tmp_path / "figures" / "quick-unkebench"
    assert other.results == tmp_path / "results" / "quick-unkebench"


def test_unit_keys_are_equal_for_equal_choices_only():
    choices = {"level": ["all", "last", None], "batch": [1, 12], "learning_rate": [5e-4, 5e-3]}
    every = [dict(zip(choices, own, strict=True)) for own in itertools.product(*choices.values())]
    assert len({unit_key(name, **own) for name in ("FT-M", "FT M") for own in every}) == 2 * 12
    plain = unit_key("FT-M", batch=3, level="all")
    assert plain == unit_key("FT-M", level="all", batch=np.int64(3))
    assert plain.startswith("ft-m-batch-3-")
    assert len(unit_key("x" * 500, **{"y" * 300: "é/.."})) < 120


def test_what_is_read_is_what_was_written(here):
    frame = unit().sample(frac=1, random_state=1)
    rows.append(here, "s", "one", frame)
    found, expected = read(here), frame.sort_values(["edit", "kind", "number"])
    assert list(found) == list(COLUMNS) and len(found) == len(frame)
    for name in frame:
        assert found[name].tolist() == expected[name].tolist(), name
    assert found["log_probability"].isna().all() and (found["study"] == "s").all()
    assert (found["code"] == code_fingerprint()).all()


def test_equal_frames_give_equal_bytes(here):
    frame = unit()
    first = rows.append(here, "s", "one", frame).read_bytes()
    kinds = {"kind": "category", "edit": object, "batch": float}
    other = frame[frame.columns[::-1]].astype(kinds).set_index(np.arange(len(frame)) + 7)
    assert rows.append(here, "s", "two", other).read_bytes() == first
    assert b"pandas" not in first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rouge_f1": 1.0}, "unknown column 'rouge_f1'; did you mean 'rougel_f1'"),
        ({"answer": None}, "column 'answer': a value is missing"),
        ({"model": None}, "column 'model': a value is missing"),
        ({"level": 7}, "Conversion failed for column level"),
        ({"steps": 2.5}, "Conversion failed for column steps"),
        ({"exact": "yes"}, "Conversion failed for column exact"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(here, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        rows.append(here, "s", "one", unit().assign(**changes))
    assert files(tmp_path) == []


def test_rows_of_another_fingerprint_or_code_are_stale(here, monkeypatch):
    rows.append(here, "s", "one", unit())
    assert rows.done(here, "s", "one", MARKS)
    for name in MARKS:
        assert not rows.done(here, "s", "one", MARKS | {name: "0" * 16})
    assert not rows.done(here, "s", "other", MARKS) and not rows.done(here, "t", "one", MARKS)
    monkeypatch.setattr(rows, "code_fingerprint", lambda: "new")
    assert not rows.done(here, "s", "one", MARKS)


def test_a_truncated_file_is_not_done_and_one_without_a_new_column_is_read(here):
    path = rows.append(here, "s", "one", unit())
    pq.write_table(pq.read_table(path).drop_columns(["mention"]), path)
    found = read(here)
    assert list(found) == list(COLUMNS) and found["mention"].isna().all()
    path.write_bytes(path.read_bytes()[:500])
    assert not rows.done(here, "s", "one", MARKS)
    with pytest.raises(InputError, match="one.parquet: expected a parquet file"):
        read(here)


def test_export_keeps_all_scores_and_texts_of_five_edits_of_each_method_in_the_world(here):
    edits = [f"e{number:02}" for number in range(9)]
    for method, batch in itertools.product(("FT-M", "LoRA"), (0, 1)):
        own = edits[:7] if method == "FT-M" else edits[2:]
        rows.append(here, "s", f"{method}-{batch}", unit(method=method, edits=own, batch=batch))
    full = read(here)
    path = rows.export(here, "s", full)
    assert path == here.figures / "rows" / "s.parquet"
    found = pq.read_table(path).to_pandas()
    shown = found[found["answer"].notna()].groupby("method")["edit"].agg(set)
    assert shown.to_dict() == {"FT-M": set(edits[:5]), "LoRA": set(edits[2:7])}
    assert found["answer"].isna().eq(found["before"].isna()).all()
    others = [name for name in COLUMNS if name not in ("answer", "before")]
    pd.testing.assert_frame_equal(found[others], full[others])
    texts = ["question", "reference", "answer", "before"]
    (here.results / "locality").mkdir()  # of documents that are not the world's
    for paths in (here, Paths("smoke", "unkebench")):
        found = pq.read_table(rows.export(paths, "s", full)).to_pandas()
        assert found[texts].isna().all(axis=None)
        pd.testing.assert_frame_equal(found.drop(columns=texts), full.drop(columns=texts))


def test_primary_takes_the_metric_of_each_kind():
    frame = unit(edits=("e1",), kinds=dict.fromkeys(TABLE, 1), **READ)
    names = [*METRICS, "likelihood"]
    for place, name in enumerate(names):
        frame[name], frame[f"{name}_before"] = 100.0 + place, 200.0 + place
    found = rows.primary(frame).set_index("kind")["score"]
    for name, kind in TABLE.items():
        base = 100 if kind.against == "reference" else 200
        assert found[name] == base + names.index(kind.metric), name
    before = rows.primary(frame.assign(phase="before"), phase="before").set_index("kind")["score"]
    assert before["rel_doc"] == before["general"] == 1 and before["original"] > 100


def test_details_weigh_no_more_than_the_original():
    frame = unit(edits=("e1",), **READ)
    frame["rougel_f1"], frame["rougel_f1_before"] = 1.0, 0.5
    frame["lcs_recall"] = frame["number"].eq(0).astype(float)  # one detail of three
    scores = rows.primary(frame)
    detail = scores.set_index("kind").loc["detail", ["score", "probes"]].tolist()
    assert detail == [pytest.approx(1 / 3), 3] and len(AVERAGE) == 6
    mean = (1 + 1 + 1 / 3 + 0.5 * 3) / 6
    assert rows.average(scores)["score"].item() == pytest.approx(mean)


@pytest.mark.parametrize("column", ["level", "learning_rate", "batch", "batch_size", "recipe"])
def test_different_runs_are_not_pooled(column):
    frame = unit(**READ)
    value = "other" if isinstance(frame[column][0], str) else frame[column] + 1
    together = rows.primary(pd.concat([frame, frame.assign(**{column: value})]))
    assert len(together) == 2 * len(rows.primary(frame)) and (together["probes"] <= 3).all()


def test_an_average_needs_the_same_edits_side_by_side_and_all_kinds():
    short = unit(method="FT-L", level="last", edits=("e1", "e3"))
    both = pd.concat([unit(edits=("e1", "e2", "e3")), short], ignore_index=True).assign(**READ)
    message = r"FT-L last lacks 1 of the 3 edits beside it \(e2\)"
    with pytest.raises(InputError, match=message):
        rows.average(rows.primary(both))
    frame = unit(**READ)
    holes = (frame["edit"] == "e2") & frame["kind"].isin(["rel_doc", "paraphrase"])
    scores = rows.primary(frame[~holes])
    with pytest.raises(InputError, match="FT-M, edit 'e2': no paraphrase, rel_doc"):
        rows.average(scores)
    assert len(rows.average(scores, kinds=("original", "detail"))) == 2
    with pytest.raises(InputError, match="no rows of near_triple"):
        rows.average(scores, kinds=("near_triple",))


def test_a_missing_score_and_a_repeated_probe_are_named():
    frame = unit(**READ)
    probe = (frame["kind"] == "detail") & (frame["number"] == 2) & (frame["edit"] == "e2")
    message = "FT-M, edit 'e2', detail 2: no lcs_recall against the reference"
    with pytest.raises(InputError, match=message):
        rows.primary(frame.assign(lcs_recall=frame["lcs_recall"].mask(probe)))
    with pytest.raises(InputError, match="the same probe twice"):
        rows.primary(pd.concat([frame, frame.head(1)], ignore_index=True))
