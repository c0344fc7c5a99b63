"""Rows are written whole or not at all, skipped only while fresh, and never averaged over gaps."""

import itertools
import multiprocessing
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from uke.data.edits import AVERAGE
from uke.data.edits import KINDS as TABLE
from uke.errors import InputError
from uke.project import code_fingerprint, unit_key
from uke.results import rows
from uke.results.metrics import METRICS
from uke.results.rows import COLUMNS, Paths

MARKS = {"model": "m" * 16, "data": "d" * 16, "recipe": "r" * 16}
KINDS = {
    "original": 1,
    "paraphrase": 1,
    "detail": 3,
    "rel_doc": 1,
    "rand_doc": 1,
    "struct_trip": 2,
    "general": 1,
}


def unit(method="FT-M", edits=("e1", "e2"), kinds=KINDS, phase="after", **changes):
    """Rows of one unit: every probe of some edits, with scores that differ from probe to probe."""
    probes = [
        (edit, kind, number)
        for edit in edits
        for kind, count in kinds.items()
        for number in range(count)
    ]
    frame = pd.DataFrame(probes, columns=["edit", "kind", "number"])
    steps = np.linspace(0.1, 0.9, len(frame))
    texts = [f"{method} {edit} {kind} {number}" for edit, kind, number in probes]
    known = {
        "question": "Who?",
        "reference": "Ada was born in London.",
        "answer": texts,
        "before": "Someone.",
    }
    known |= {name: steps for name in METRICS} | {f"{name}_before": 1 - steps for name in METRICS}
    fixed = {
        "method": method,
        "level": "all",
        "batch": 0,
        "batch_size": 1,
        "phase": phase,
        "seed": 2024,
    }
    return frame.assign(**known, **fixed, **MARKS, learning_rate=5e-4, steps=25).assign(**changes)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("smoke")


def read(paths):
    """All units of the study `s`."""
    return rows.read(paths, "s", [path.stem for path in paths.rows("s").glob("*.parquet")])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- paths and names ------------------------------------------------------------------------------


def test_runs_on_other_data_write_into_the_same_folders(here, tmp_path):
    other = Paths("quick", "unkebench")
    assert (
        here.figures == tmp_path / "figures" / "smoke"
        and here.results == tmp_path / "results" / "smoke"
    )
    assert other.figures == tmp_path / "figures" / "unkebench-quick"
    assert other.results == tmp_path / "results" / "quick-unkebench"


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "a b", None])
def test_names_leave_the_folder(here, name):
    for call in (
        lambda: Paths(name),
        lambda: here.rows(name),
        lambda: rows.append(here, "s", name, unit()),
    ):
        with pytest.raises(InputError, match="expected a name"):
            call()


def test_home_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("UKE_HOME", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="UKE_HOME"):
        Paths("smoke").results


def test_unit_keys_collide_or_wander():
    choices = {"level": ["all", "last", None], "batch": [1, 12], "learning_rate": [5e-4, 5e-3]}
    keys = {
        unit_key(method, **dict(zip(choices, values)))
        for method in ("FT-M", "FT M")
        for values in itertools.product(*choices.values())
    }
    assert len(keys) == 2 * 12
    assert unit_key("FT-M", batch=3, level="all") == unit_key(
        "FT-M", level="all", batch=np.int64(3)
    )
    assert unit_key("FT-M", batch=3).startswith("ft-m-batch-3-")
    assert len(unit_key("x" * 500, **{"y" * 300: "é/.."})) < 120


# --- append, done, read ---------------------------------------------------------------------------


def test_what_is_read_differs_from_what_was_written(here):
    frame = unit().sample(frac=1, random_state=1)
    rows.append(here, "s", "one", frame)
    found = read(here)
    assert list(found) == list(COLUMNS) and len(found) == len(frame)
    keys = ["edit", "kind", "number"]
    expected = frame.sort_values(keys, ignore_index=True)
    for name in frame:
        assert found[name].tolist() == expected[name].tolist(), name
    assert found["log_probability"].isna().all() and (found["study"] == "s").all()
    assert (found["code"] == code_fingerprint()).all()


def test_equal_frames_give_unequal_bytes(here):
    frame = unit()
    first = rows.append(here, "s", "one", frame).read_bytes()
    disguised = frame[frame.columns[::-1]].astype(
        {"kind": "category", "edit": object, "batch": float}
    )
    assert (
        rows.append(here, "s", "two", disguised.set_index(np.arange(len(frame)) + 7)).read_bytes()
        == first
    )
    assert b"pandas" not in first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rouge_f1": 1.0}, "unknown column 'rouge_f1'; did you mean 'rougel_f1'"),
        ({"kind": "detials"}, "column 'kind': unknown 'detials'; did you mean 'detail'"),
        ({"phase": "during"}, "column 'phase': unknown 'during'"),
        ({"study": "other"}, "column 'study': unknown 'other'"),
        ({"answer": None}, "column 'answer': a value is missing"),
        ({"level": 7}, "column 'level': expected string"),
        ({"steps": 2.5}, "column 'steps': expected int32"),
        ({"exact": "yes"}, "column 'exact': expected double"),
        ({"number": 0}, "the same probe twice"),
        ({"model": [*"ab" * 10]}, "column 'model': expected one fingerprint"),
    ],
)
def test_bad_rows_are_half_written(here, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        rows.append(here, "s", "one", unit().assign(**changes))
    assert files(tmp_path) == []


def test_frame_without_rows_or_fingerprint_counts_as_done(here):
    with pytest.raises(InputError, match="at least one row"):
        rows.append(here, "s", "one", unit().head(0))
    with pytest.raises(InputError, match="column 'model'"):
        rows.append(here, "s", "one", unit().drop(columns="model"))
    assert not rows.done(here, "s", "one", MARKS)


@pytest.mark.parametrize("moment", ["write_table", "replace"])
def test_interrupted_write_leaves_something(here, monkeypatch, tmp_path, moment):
    rows.append(here, "s", "one", unit())
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    real = pq.write_table

    def interrupt(table, path, **options):
        real(table.slice(0, 1), path, **options)
        raise KeyboardInterrupt

    if moment == "write_table":
        monkeypatch.setattr(pq, "write_table", interrupt)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("one", "two"):
        with pytest.raises((KeyboardInterrupt, OSError)):
            rows.append(here, "s", name, unit(method="LoRA"))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert rows.done(here, "s", "one", MARKS) and not rows.done(here, "s", "two", MARKS)


def test_stale_unit_is_skipped(here, monkeypatch):
    rows.append(here, "s", "one", unit())
    assert rows.done(here, "s", "one", MARKS) and rows.done(here, "s", "one", {})
    for name in MARKS:
        assert not rows.done(here, "s", "one", MARKS | {name: "0" * 16})
    assert not rows.done(here, "s", "other", MARKS) and not rows.done(here, "t", "one", MARKS)
    with pytest.raises(InputError, match="did you mean 'model'"):
        rows.done(here, "s", "one", {"modle": "x"})
    monkeypatch.setattr(rows, "code_fingerprint", lambda: "new")
    assert not rows.done(here, "s", "one", MARKS)
    with pytest.raises(InputError, match="written by other code"):
        read(here)


def test_truncated_file_counts_as_done(here):
    path = rows.append(here, "s", "one", unit())
    path.write_bytes(path.read_bytes()[:500])
    assert not rows.done(here, "s", "one", MARKS)
    with pytest.raises(InputError, match="one.parquet: expected a parquet file"):
        read(here)
    rows.append(here, "s", "one", unit())
    assert len(read(here)) == len(unit())


@pytest.mark.parametrize("name", ["model", "data"])
def test_rows_of_several_worlds_are_mixed_silently(here, name):
    rows.append(here, "s", "one", unit())
    rows.append(here, "s", "two", unit(method="LoRA", **{name: "other"}))
    with pytest.raises(InputError, match=f"several '{name}' fingerprints"):
        read(here)
    assert set(rows.read(here, "s", ["two"])["method"]) == {"LoRA"}


def test_rows_of_an_old_recipe_join_those_of_the_new(here):
    rows.append(here, "s", "one", unit())
    rows.append(here, "s", "two", unit(batch=1, recipe="changed"))
    with pytest.raises(InputError, match="FT-M: rows of several recipes"):
        read(here)


def _append_many(home, worker):
    os.environ["UKE_HOME"] = home
    for number in range(6):
        rows.append(
            Paths("smoke"), "s", f"unit-{worker}-{number}", unit(method=f"M{worker}", batch=number)
        )
        rows.append(Paths("smoke"), "s", "shared", unit(method="shared"))


def test_two_processes_lose_each_others_rows(here, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=_append_many, args=(str(tmp_path), number)) for number in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = read(here)
    assert len(found) == 13 * len(unit())
    assert found.groupby("method")["batch"].nunique().to_dict() == {"M0": 6, "M1": 6, "shared": 1}
    assert all(name.endswith(".parquet") for name in files(here.rows("s")))


# --- the committed form ---------------------------------------------------------------------------


def test_export_commits_every_generated_text(here):
    edits = [f"e{number:02}" for number in range(9)]
    for method, batch in itertools.product(("FT-M", "LoRA"), (0, 1)):
        own = edits[:7] if method == "FT-M" else edits[2:]
        rows.append(here, "s", f"{method}-{batch}", unit(method=method, edits=own, batch=batch))
    path = rows.export(here, "s", read(here))
    assert path == here.figures / "rows" / "s.parquet"
    found, full = pq.read_table(path).to_pandas(), read(here)
    with_text = found[found["answer"].notna() & found["before"].notna()]
    assert set(with_text.loc[with_text["method"] == "FT-M", "edit"]) == set(edits[:5])
    assert set(with_text.loc[with_text["method"] == "LoRA", "edit"]) == set(edits[2:7])
    assert found["answer"].isna().eq(found["before"].isna()).all() and found["answer"].isna().any()
    others = [name for name in COLUMNS if name not in ("answer", "before")]
    pd.testing.assert_frame_equal(found[others], full[others])


def test_column_added_later_makes_old_rows_unreadable(here):
    path = rows.append(here, "s", "one", unit())
    pq.write_table(pq.read_table(path).drop_columns(["repetition"]), path)
    found = read(here)
    assert (
        list(found) == list(COLUMNS)
        and found["repetition"].isna().all()
        and found["exact"].notna().all()
    )


# --- primary and average -------------------------------------------------------------------------


def test_primary_takes_the_wrong_column(here):
    frame = unit(
        edits=("e1",), kinds=dict.fromkeys(TABLE, 1), study="s", factor=None, split="test", code="c"
    )
    for place, name in enumerate(METRICS):
        frame[name], frame[f"{name}_before"] = 100.0 + place, 200.0 + place
    found = rows.primary(frame).set_index("kind")["score"]
    for kind, (_, _, metric, against, _) in TABLE.items():
        assert found[kind] == (100 if against == "reference" else 200) + list(METRICS).index(
            metric
        ), kind
    before = rows.primary(frame.assign(phase="before"), phase="before").set_index("kind")["score"]
    assert before["rel_doc"] == before["general"] == 1 and before["original"] > 100


def test_details_weigh_more_than_the_original(here):
    frame = unit(edits=("e1",), study="s", factor=None, split="test", code="c")
    frame["rougel_f1"], frame["rougel_f1_before"], frame["exact_before"] = 1.0, 0.5, 0.0
    frame["exact"] = frame["number"].eq(0).astype(float)  # one detail of three
    scores = rows.primary(frame)
    assert scores.set_index("kind").loc["detail", ["score", "probes"]].tolist() == [
        pytest.approx(1 / 3),
        3,
    ]
    assert rows.average(scores)["score"].item() == pytest.approx(
        (1 + 1 + 1 / 3 + 0.5 + 0.5 + 0) / 6
    )
    assert rows.average(scores)["kinds"].item() == len(AVERAGE) == 6


@pytest.mark.parametrize(
    "column", ["level", "learning_rate", "batch", "batch_size", "seed", "recipe"]
)
def test_different_runs_are_pooled(here, column):
    frame = unit(study="s", factor=None, split=None, code="c")
    other = frame.assign(
        **{column: "other" if isinstance(frame[column][0], str) else frame[column] + 1}
    )
    together = rows.primary(pd.concat([frame, other], ignore_index=True))
    assert len(together) == 2 * len(rows.primary(frame)) and (together["probes"] <= 3).all()


def both(*frames):
    together = pd.concat(frames, ignore_index=True)
    return rows.primary(together.assign(study="s", factor="loss_scope", split="test", code="c"))


def test_average_over_fewer_edits_than_the_baseline(here):
    scores = both(
        unit(edits=("e1", "e2", "e3")), unit(method="FT-L", level="last", edits=("e1", "e3"))
    )
    with pytest.raises(InputError, match="FT-L last lacks 1 of the 3 edits beside it \\('e2'\\)"):
        rows.average(scores)
    assert rows.average(scores, partial=True).groupby("method").size().to_dict() == {
        "FT-L": 2,
        "FT-M": 3,
    }


def test_average_over_fewer_kinds(here):
    frame = unit()
    holes = both(frame[~((frame["edit"] == "e2") & frame["kind"].isin(["rel_doc", "paraphrase"]))])
    with pytest.raises(InputError, match="FT-M, edit 'e2': no paraphrase, rel_doc"):
        rows.average(holes)
    assert rows.average(holes, partial=True).set_index("edit")["kinds"].to_dict() == {
        "e1": 6,
        "e2": 4,
    }
    assert len(rows.average(holes, kinds=("original", "detail"))) == 2
    with pytest.raises(InputError, match="no rows of near_triple"):
        rows.average(holes, kinds=("near_triple",))


def test_missing_score_is_averaged_away(here):
    frame = unit(study="s", factor=None, split=None, code="c")
    frame.loc[
        (frame["kind"] == "detail") & (frame["number"] == 2) & (frame["edit"] == "e2"), "exact"
    ] = None
    with pytest.raises(
        InputError, match="FT-M, edit 'e2', detail 2: no exact against the reference"
    ):
        rows.primary(frame)


def test_probe_counted_twice(here):
    frame = unit(study="s", factor=None, split=None, code="c")
    with pytest.raises(InputError, match="the same probe twice"):
        rows.primary(pd.concat([frame, frame.head(1)], ignore_index=True))


def test_rows_are_made_once_and_read_again_where_they_are_committed(tmp_path, monkeypatch):
    frame, path = pd.DataFrame({"kind": ["rel_doc"]}), tmp_path / "rows" / "a.parquet"
    assert rows.stored(path, lambda: frame).equals(frame)
    monkeypatch.setenv("UKE_ROWS", "committed")
    assert rows.stored(path, lambda: pytest.fail("made again")).equals(frame)
    with pytest.raises(InputError, match="b.parquet: no committed rows"):
        rows.stored(tmp_path / "b.parquet", lambda: frame)
