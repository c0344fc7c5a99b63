"""Figures, tables and report come back byte for byte from what a section has stored, without a model or a notebook."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from uke.cli import run
from uke.errors import InputError
from uke.report import diagrams, figures, redrawing, tables
from uke.report import section as report
from uke.results import rows

ROOT = Path(__file__).parents[1]
DRAWN = (".png", ".pdf", ".csv", ".tex", ".md", ".html")
REDRAW = "import sys\nfrom uke import run\nstatus = run.main(['--redraw', '--profile', sys.argv[1]])\nloaded = {'torch', 'transformers'} & set(sys.modules)\n"
REDRAW += "assert not loaded, loaded\nsys.exit(status)"


def files(folder: Path) -> dict[str, bytes]:
    """Everything drawn or composed in a folder of figures."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in DRAWN or path.name == "numbers.json"
    }


def scored() -> pd.DataFrame:
    drawn = np.random.default_rng(3)
    lines = [
        (method, kind, f"e{edit}", drawn.uniform())
        for method in ("FT-M", "LoRA", "no edit")
        for kind in ("original", "detail", "rel_doc")
        for edit in range(5)
    ]
    return pd.DataFrame(lines, columns=["method", "kind", "edit", "score"])


def fill(section: report.Section) -> None:
    frame = scored()
    section.figure(figures.levels, frame[frame["kind"] != "detail"], "scores", "Scores.", "Points.")
    section.figure(
        diagrams.spread,
        frame.assign(measure="overlap", n=None),
        "cloud",
        "Cloud.",
        "A cloud.",
        by="method",
    )
    costs = pd.DataFrame({"pages": np.array([10, 20]), "file": [1.0, 2.5]}, index=[7, 3])
    section.figure(
        diagrams.growth,
        costs,
        "costs",
        "Costs.",
        "A line.",
        x="pages",
        panels={"file": "File (MiB)"},
    )
    section.figure(
        diagrams.ranks,
        pd.DataFrame({"kind": pd.Categorical(["rel_doc", "rand_doc"]), "rank": [3, 400]}),
        "ranks",
        "Ranks.",
        "Steps.",
        floor=np.int64(100),
    )
    section.table(tables.scores(frame, expected=["FT-M", "MEMIT"]), "scores", "Scores.")
    mixed = pd.DataFrame(
        {
            "setting": ["on", "count", "rate", "text", "none", "list"],
            "value": [True, 3, 5e-4, "a | `b` ü", None, [1, 2]],
        }
    )
    section.table(mixed, "mixed", "Settings.")
    section.table(
        frame.pivot_table(index="method", columns="kind", values="score").assign(
            edits=5, tuned=[True, False, True]
        ),
        "wide",
        "An index of methods.",
    )
    section.say("a.b", 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project whose profile smoke has one section, composed."""
    home = tmp_path_factory.mktemp("made")
    for folder in ("profiles", "studies"):
        (home / "params" / folder).mkdir(parents=True)
    (home / "params/profiles/smoke.yaml").write_text("limit: 2\n")
    paths = SimpleNamespace(figures=home / "figures" / "smoke", profile="smoke", data="world")
    section = report.Section("01_edits", paths, "Edits", "What?")
    fill(section)
    section.save()
    report.compose(paths)
    return home


@pytest.fixture
def paths(made, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    monkeypatch.delenv("UKE_DATA", raising=False)
    return rows.Paths("smoke")


def section_file(paths) -> Path:
    return paths.figures / "sections" / "01_edits.json"


def change(paths, name: str, **fields) -> None:
    """Change fields of one block in the section; those given as None are dropped."""
    section = json.loads(section_file(paths).read_text(encoding="utf-8"))
    for block in section["blocks"]:
        if block["name"] == name:
            block.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                del block[field]
    section_file(paths).write_text(json.dumps(section), encoding="utf-8")


def test_what_was_deleted_is_drawn_again_with_the_same_bytes(paths):
    before, section = files(paths.figures), section_file(paths).read_bytes()
    assert len(before) == 4 * 2 + 3 * 3 + 3
    for name in before:
        (paths.figures / name).unlink()
    assert run.main(["--redraw", "--profile", "smoke"]) == 0
    assert files(paths.figures) == before and section_file(paths).read_bytes() == section


def test_a_redraw_loads_neither_torch_nor_a_kernel(paths):
    before = files(paths.figures)
    done = subprocess.run(
        [sys.executable, "-c", REDRAW, "smoke"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONHASHSEED": "99"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert files(paths.figures) == before


def test_changed_data_are_drawn_and_told(paths):
    """The files follow the data and not what was drawn once; so does the report."""
    path = paths.figures / "data" / "wide.table.parquet"
    path.write_bytes(redrawing.stored(redrawing.read(path).assign(edits=77)))
    report.redraw(paths)
    report.compose(paths)
    assert ",77," in (paths.figures / "wide.csv").read_text() and ">77<" in (
        paths.figures / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["figure", "table"])
def test_missing_data_are_named_and_nothing_is_drawn(paths, caplog, kind):
    lost = paths.figures / "data" / ("ranks.parquet" if kind == "figure" else "wide.table.parquet")
    lost.unlink()
    (paths.figures / "scores.png").unlink()
    assert run.main(["--redraw", "--profile", "smoke"]) == 2
    assert (
        caplog.messages[-1].startswith(
            f"{lost}: no such file: the data of {kind} {lost.name.split('.')[0]}"
        )
        and "\n" not in caplog.messages[-1]
    )
    assert not (paths.figures / "scores.png").exists()


@pytest.mark.parametrize(
    "fields, expected",
    [
        (
            {"draw": None},
            "01_edits.json: figure ranks: not stored with what draws it; run notebook 01_edits again",
        ),
        ({"draw": "diagrams.rank"}, "no function 'diagrams.rank'; did you mean 'diagrams.ranks'"),
        ({"draw": "diagrams.looks"}, "no function 'diagrams.looks'"),
        ({"options": {"flor": 3}}, "diagrams.ranks has no option 'flor'; did you mean 'floor'"),
    ],
)
def test_a_section_that_cannot_be_drawn_again_says_why(paths, fields, expected):
    change(paths, "ranks", **fields)
    with pytest.raises(InputError, match=expected):
        report.redraw(paths)


def test_data_cut_off_or_of_another_kind_are_named(paths):
    path = paths.figures / "data" / "ranks.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="ranks.parquet: not the data of figure ranks"):
        report.redraw(paths)
    scored().to_parquet(path)
    with pytest.raises(InputError, match="ranks.parquet: not the data of figure ranks"):
        report.redraw(paths)


def test_only_a_function_of_the_two_rooms_draws(paths):
    section = report.Section("02_locality", paths, "Locality", "What?")
    for draw in (partial(figures.curves), figures.looks, figures._grid, scored, None):
        with pytest.raises(
            InputError, match="expected a function of uke.report.figures or uke.report.diagrams"
        ):
            section.figure(draw, scored(), "some", "Caption.", "Alt.")
    with pytest.raises(InputError, match="options: expected texts, numbers"):
        section.figure(diagrams.spread, scored(), "some", "Caption.", "Alt.", by={1, 2})
    with pytest.raises(InputError, match="no option 'bye'; did you mean 'by'"):
        section.figure(diagrams.spread, scored(), "some", "Caption.", "Alt.", bye="kind")
    assert not (paths.figures / "data" / "some.parquet").exists()


def test_every_kind_of_column_comes_back_as_it_was():
    frame = pd.DataFrame(
        {
            "z": ["b", "a", "ü"],
            "text": pd.Series(["a", None, "c"], dtype=object),
            "whole": np.array([1, 2, 3], dtype=np.int32),
            "share": [0.1 + 0.2, np.nan, 1e-300],
            "flag": [True, False, True],
            "some": pd.array([1, None, 3], dtype="Int64"),
            "group": pd.Categorical(["y", "x", "y"], categories=["y", "x", "w"]),
            "mixed": pd.Series([1, 2.0, None], dtype=object),
            "score": pd.Series(
                [tables.Score(0.5), tables.Score(0.25, 0.1, 0.3, True), None], dtype=object
            ),
        }
    )
    read = redrawing.read(redrawing.stored(frame))
    pd.testing.assert_frame_equal(read, frame)
    assert [type(value) for value in read["mixed"]] == [int, float, type(None)] and read["text"][
        1
    ] is None
    assert redrawing.stored(read) == redrawing.stored(frame)
    assert redrawing.read(redrawing.stored(frame[:0])).columns.tolist() == frame.columns.tolist()


def test_the_committed_figures_tables_and_report_are_what_a_redraw_gives(tmp_path):
    committed = ROOT / "figures" / "embedded"
    here = tmp_path / "figures" / "embedded"
    shutil.copytree(committed, here)
    for name in files(here):
        (here / name).unlink()
    (tmp_path / "params").symlink_to(ROOT / "params")
    environment = {key: value for key, value in os.environ.items() if key != "UKE_DATA"} | {
        "UKE_HOME": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", REDRAW, "embedded"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found, expected = files(here), files(committed)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    for path in (here / "sections").iterdir():
        assert path.read_bytes() == (committed / "sections" / path.name).read_bytes()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_a_committed_table_does_not_compile_in_a_paper(tmp_path):
    tables = sorted((ROOT / "figures" / "embedded").glob("*.tex"))
    inputs = "\n".join(rf"\clearpage{{\tiny\input{{{path}}}}}" for path in tables)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage{booktabs}\n\\begin{document}\n"
        + inputs
        + "\n\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert tables and done.returncode == 0, done.stdout[-800:]
