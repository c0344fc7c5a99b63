"""Tables and the report say the numbers that were measured, escape what they are given, and never half exist."""

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from uke.errors import InputError
from uke.methods.recipes import BASELINES
from uke.report import abstract, arrangement, figures, tables
from uke.report import compose as typesetting
from uke.report import section as report
from uke.results import rows

NASTY = 'a & b < c > #1 $x_1$ 50% {} ~ ^ \\ | "q" `k` *b* [z] @ref //'
TITLE = "Fine-tuning for unstructured knowledge editing: a reconstruction"


@pytest.fixture
def paths(tmp_path):
    return SimpleNamespace(
        figures=tmp_path / "figures" / "smoke", results=tmp_path / "results", profile="smoke"
    )


def section(paths, notebook="03_factor_loss_scope", key="loss_scope.ft_m.original"):
    made = report.Section(notebook, paths, f"Title of {notebook}", "Does it work?")
    said = made.say(key, 0.934, 0.901, 0.957, n=40)
    made.answer(f"It works: {said}.")
    return made


LOSSES = pd.DataFrame({"method": "FT-M", "step": range(3), "loss": [3.0, 1.0, 0.1]})


def numbers(paths):
    return json.loads((paths.figures / "numbers.json").read_text(encoding="utf-8"))


def page(paths):
    return (paths.figures / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Text, tags and sources of a page, as a browser reads them."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.images, self.skip = [], [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.skip = tag == "style"
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        self.skip = False

    def handle_data(self, data):
        if not self.skip:
            self.text.append(data)


def words(paths):
    return " ".join("".join(Reader(page(paths)).text).replace("\u00a0", " ").split())


def test_numbers_keep_a_proper_minus_and_sensible_decimals():
    said = {
        0.934: "0.93",
        -3.25: "−3.25",
        12.34: "12.3",
        5e-4: "5 × 10⁻⁴",
        0.0: "0.00",
        12000: "12,000",
        -0.0: "0.00",
    }
    assert {value: tables.number(value) for value in said} == said
    assert tables.number(1234.5) in ("1,234", "1,235") and tables.number(float("nan")) == "–"
    assert tables.number(-0.001, 2) == "0.00"


def test_an_interval_is_said_with_the_decimals_of_its_number(paths):
    made = report.Section("01_edits", paths, "Edits", "What?")
    assert made.say("a.b", 0.934, 0.901, 0.957, n=40) == "0.93 [0.90, 0.96], n = 40"
    assert made.say("a.lead", -3.2, -12.3, 0.4, unit="points") == "−3.2 [−12.3, 0.4] points"
    assert made.say("a.share", 12.0, unit="%") == "12.0%"
    assert made.say("a.count", np.int64(1000)) == "1,000"
    assert made.say("a.single", 0.5, float("nan"), float("nan"), 1) == "0.50, n = 1"


def test_numbers_json_holds_what_was_said(paths):
    section(paths).save()
    report.compose(paths)
    assert numbers(paths) == {
        "loss_scope.ft_m.original": {
            "value": 0.934,
            "low": 0.901,
            "high": 0.957,
            "n": 40,
            "unit": "",
            "said": "0.93 [0.90, 0.96], n = 40",
        }
    }
    assert words(paths).count("It works: 0.93 [0.90, 0.96], n = 40.") == 2  # abstract and section


@pytest.mark.parametrize("value", [float("nan"), None, float("inf"), True, "0.9"])
def test_a_number_that_is_none_cannot_be_said(paths, value):
    with pytest.raises(InputError, match="number a.b: expected a"):
        report.Section("01_edits", paths, "Edits", "What?").say("a.b", value)


def test_half_an_interval_a_bad_key_and_a_repeated_one_are_refused(paths):
    made = report.Section("01_edits", paths, "Edits", "What?")
    made.say("a.b", 1)
    for key, value, low in (("a.b", 1, None), ("A b", 1, None), ("a.c", 0.5, 0.4)):
        with pytest.raises(InputError, match="01_edits: number"):
            made.say(key, value, low)


def test_a_key_or_a_name_in_two_sections_is_an_error_and_nothing_is_written(paths):
    section(paths, "01_edits").save()
    section(paths, "03_factor_loss_scope").save()
    with pytest.raises(
        InputError, match="loss_scope.ft_m.original is in two sections: 01_edits and 03_factor"
    ):
        report.compose(paths)
    assert sorted(path.name for path in paths.figures.iterdir()) == ["sections"]
    for place, notebook in enumerate(("01_edits", "03_factor_loss_scope")):
        made = section(paths, notebook, f"key.of_{place}")
        made.table(pd.DataFrame({"x": [1]}), "same", "A table.")
        made.save()
    with pytest.raises(InputError, match="table same is in two sections"):
        report.compose(paths)


def test_a_figure_and_a_table_may_share_a_name_but_not_two_of_a_kind(paths):
    made = section(paths)
    made.figure(figures.curves, LOSSES, "before", "Loss.", "A falling line.")
    made.table(pd.DataFrame({"x": [1]}), "before", "A table.")
    with pytest.raises(InputError, match="earlier table called 'before'"):
        made.table(pd.DataFrame({"x": [2]}), "before", "Another.")
    assert (paths.figures / "before.csv").read_text(encoding="utf-8") == "x\n1\n"
    made.save()
    report.compose(paths)
    ids = re.findall(r' id="([^"]+)"', page(paths))
    assert len(ids) == len(set(ids)) and {"figure-before", "table-before"} <= set(ids)


def test_a_failed_check_stops_the_notebook(paths):
    made = section(paths)
    made.check(True, "weights restored")
    with pytest.raises(InputError, match="conclusion is void: equal numbers of edits"):
        made.check(False, "equal numbers of edits")
    made.save()
    report.compose(paths)
    assert "✓weights restored" in words(paths) and "✗equal numbers of edits" in words(paths)


def test_sections_stand_in_the_order_of_notebooks_and_share_one_numbering(paths):
    for notebook in ("08_batch_size", "01_edits", "03_factor_loss_scope"):
        made = section(paths, notebook, f"{notebook}.value")
        made.figure(
            figures.curves, LOSSES, f"fig_{notebook}", f"Loss in {notebook}.", "A falling line."
        )
        made.table(pd.DataFrame({"x": [1]}), f"tab_{notebook}", f"Table in {notebook}.")
        made.save()
    report.compose(paths)
    text = words(paths)
    for place, notebook in enumerate(("01_edits", "03_factor_loss_scope", "08_batch_size"), 1):
        assert (
            f"Figure {place}. Loss in {notebook}." in text
            and f"Table {place}. Table in {notebook}." in text
        )
    assert (
        text.index("Title of 01_edits")
        < text.index("Title of 03_factor")
        < text.index("Title of 08_batch")
    )


def test_the_table_of_verdicts_stands_right_after_the_abstract_and_once(paths):
    for notebook, names in (("01_edits", ["edits"]), ("11_verdicts", ["verdicts", "more"])):
        made = section(paths, notebook, f"key.of_{notebook}")
        for name in names:
            made.table(pd.DataFrame({"claim": [f"cell of {name}"]}), name, f"Caption of {name}.")
        made.save()
    report.compose(paths)
    text = words(paths)
    for place, name in enumerate(("verdicts", "edits", "more"), 1):
        assert text.count(f"Table {place}. Caption of {name}.") == 1
    assert (
        text.index("Abstract", text.index("Abstract") + 1)
        < text.index("cell of verdicts")
        < text.index("1 Title of 01_edits", text.index("It works:"))
    )
    assert (
        "The verdicts are Table 1, after the abstract." in text
        and text.count("cell of verdicts") == 1
    )


def test_the_page_is_self_contained_and_its_figures_have_a_text(paths):
    made = section(paths)
    made.figure(figures.curves, LOSSES, "losses", "Loss.", "The loss falls from 3 to 0.1.")
    with pytest.raises(InputError, match="alt"):
        made.figure(figures.curves, LOSSES, "other", "Loss.", " ")
    made.save()
    report.compose(paths)
    read = Reader(page(paths))
    assert [image["alt"] for image in read.images] == ["The loss falls from 3 to 0.1."]
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in read.images)
    assert not {"script", "link", "iframe"} & set(read.tags) and "http" not in page(paths)
    assert "prefers-color-scheme: dark" in page(paths) and "width=device-width" in page(paths)


def test_markup_in_the_data_stays_text_in_page_pdf_and_table(paths):
    made = section(paths)
    frame = pd.DataFrame({"answer": [NASTY, "<script>alert(1)</script>"], NASTY: [1.5, None]})
    made.table(frame, "answers", f"Caption {NASTY}")
    for write in (made.observe, made.limit, made.warn, made.answer):
        write(NASTY)
    made.check(True, NASTY)
    made.method({"name": NASTY, "extra_field": NASTY})
    made.environment = {NASTY: NASTY}
    made.title = made.question = NASTY
    made.save()
    report.compose(paths)
    read = Reader(page(paths))
    assert "script" not in read.tags and "b" in read.tags
    cells = "".join(read.text)
    assert NASTY in cells and "<script>alert(1)</script>" in cells
    assert (paths.figures / "report.pdf").read_bytes().startswith(b"%PDF")


def test_latex_escapes_everything_and_uses_booktabs(tmp_path):
    tables.save(
        pd.DataFrame({"a_b": [NASTY, None], "x": [-0.5, 0.25]}),
        tmp_path,
        "some",
        "Half & 50% of #1",
    )
    text = (tmp_path / "some.tex").read_text(encoding="utf-8")
    for rule in (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\caption{Half \& 50\% of \#1}",
        r"\label{tab:some}",
    ):
        assert rule in text
    row = next(line for line in text.splitlines() if line.startswith("a \\&"))
    bare = re.sub(r"\\[&%$#_{}\\]|\\text\w+\{\}|\\ensuremath\{-\}|\{[][]\}|\\linewidth", "", row)
    assert bare.count("&") == 1 and not set("%$#_{}^~<>|") & set(bare)
    assert "– & 0.25" in text and r"\ensuremath{-}0.50" in text


def test_a_missing_cell_is_a_dash_and_csv_keeps_plain_numbers(tmp_path):
    frame = pd.DataFrame(
        {"method": ["FT-L", "FT-M"], "score": [0.123456, None], "edits": [1000, 20]}
    )
    assert tables.cells(frame.rename(columns={"score": "ROUGE-L", "edits": "n_edits"}))["head"][
        1:
    ] == ["ROUGE-L", "N edits"]
    _, _, markdown = (
        path.read_text(encoding="utf-8") for path in tables.save(frame, tmp_path, "some", "Scores.")
    )
    assert "| FT-L | 0.12 | 1,000 |" in markdown and "| FT-M | – | 20 |" in markdown
    read = pd.read_csv(tmp_path / "some.csv")
    assert read["score"].isna().tolist() == [False, True] and read["score"][0] == 0.123456


def test_a_pipe_in_a_text_does_not_break_the_markdown_table(tmp_path):
    tables.save(pd.DataFrame({"answer": ["a | b\nc"], "n": [1]}), tmp_path, "some", "Answers.")
    assert r"| a \| b c | 1 |" in (tmp_path / "some.md").read_text(encoding="utf-8")


def scored():
    rows = [
        (method, kind, f"e{edit}", value + 0.01 * edit)
        for method, values in {
            "no edit": {"original": 0.9, "detail": 0.1},
            "FT-L": {"original": 0.3, "detail": 0.1},
            "FT-M": {"original": 0.8},
        }.items()
        for kind, value in values.items()
        for edit in range(5)
    ]
    return pd.DataFrame(rows, columns=["method", "kind", "edit", "score"])


def test_the_best_method_is_bold_and_the_unedited_model_never_is(tmp_path):
    table = tables.scores(scored())
    assert table["method"].tolist() == ["FT-L", "FT-M", "no edit"]
    assert [cell.best for cell in table["original"]] == [False, True, False]
    tables.save(table, tmp_path, "scores", "Scores.")
    markdown = (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert re.search(r"\| FT-M \| \*\*0\.82\*\* \[0\.81, 0\.83\] \| – \|", markdown)
    assert r"\textbf{0.82}\\[-2pt]{\scriptsize {[}0.81, 0.83{]}}" in (
        tmp_path / "scores.tex"
    ).read_text(encoding="utf-8")
    read = pd.read_csv(tmp_path / "scores.csv").set_index("method")
    assert (
        read.loc["FT-M", "original"] == pytest.approx(0.82)
        and read.loc["FT-M", "original_high"] > 0.82
    )


def test_a_row_that_was_expected_has_dashes_and_the_gaps_of_a_grid_are_said():
    table = tables.scores(scored(), expected=["FT-M", "MEMIT", "FT-L"])
    assert table["method"].tolist() == ["FT-M", "MEMIT", "FT-L", "no edit"]
    assert [cell["text"] for cell in tables.cells(table)["rows"][1]] == ["MEMIT", "–", "–"]
    frame = scored()[["method", "kind", "edit"]].assign(batch_size=8)
    cells = [(method, size) for method in ("FT-M", "MEMIT") for size in (1, 8)]
    assert tables.grid_gaps(frame, ["method", "batch_size"], cells) == [
        "FT-M, batch size 1: no rows, so its cell is a dash.",
        "MEMIT, batch size 1: no rows, so its cell is a dash.",
        "MEMIT, batch size 8: no rows, so its cell is a dash.",
    ]
    assert tables.grid_gaps(frame[frame["kind"] == "original"], "method", ["FT-L", "FT-M"]) == []
    short = frame.drop(frame[(frame["method"] == "FT-M") & (frame["edit"] == "e4")].index)
    assert tables.grid_gaps(short, ["method"], ["FT-L", "FT-M"]) == [
        "FT-M: 4 of 5 edits, so its mean is over fewer edits than those beside it."
    ]
    assert tables.grid_gaps(frame, "method", ["FT-L"], edits=6) == [
        "FT-L: 5 of 6 edits, so its mean is over fewer edits than those beside it."
    ]
    with pytest.raises(InputError, match="grid_gaps: no column 'metod'; did you mean 'method'"):
        tables.grid_gaps(frame, ["metod"], ["FT-L"])


def test_batches_are_drawn_as_wholes_where_edits_share_a_training():
    frame = scored().query("method == 'FT-L' and kind == 'original'").assign(batch=[0, 0, 0, 1, 1])
    assert tables.summarise(frame, ["method", "kind"])["n"].tolist() == [2]
    assert tables.summarise(frame.drop(columns="batch"), ["method", "kind"])["n"].tolist() == [5]


def test_the_same_sections_give_the_same_bytes(paths):
    made = section(paths)
    made.figure(figures.curves, LOSSES, "losses", "Loss.", "A falling line.")
    made.save()
    first = [path.read_bytes() for path in report.compose(paths)]
    second = [path.read_bytes() for path in report.compose(paths)]
    assert first == second and len(first) == 3


def test_the_report_names_the_paper_and_our_choice_of_the_fourth_factor(paths):
    section(paths).save()
    report.compose(paths)
    text = words(paths)
    assert TITLE in text and "arXiv 2506.09672" in text
    assert "fourth factor: our choice; the paper's was not available to us" in text
    assert (
        TITLE.encode("utf-16-be") in (pdf := (paths.figures / "report.pdf").read_bytes())
        or TITLE.encode() in pdf
    )


def test_a_wiring_run_says_so_on_top_and_no_other_run_does(paths):
    made = section(paths)
    made.save()
    report.compose(paths)
    assert "Wiring only" not in words(paths)
    made.smoke_run = True
    made.save()
    report.compose(paths)
    text = words(paths)
    assert text.index("Wiring only") < text.index(TITLE, text.index("Wiring only"))


def test_missing_sections_failed_runs_and_lost_figures_are_warned_of(paths):
    made = section(paths)
    made.figure(figures.curves, LOSSES, "losses", "Loss while training.", "A falling line.")
    made.save()
    (paths.figures / "losses.pdf").unlink()
    manifests = paths.results / "manifests"
    manifests.mkdir(parents=True)
    manifest = {
        "notebook": "08_batch_size",
        "status": "failed",
        "python": "3.11.7",
        "versions": {"numpy": "2.4.6"},
    }
    (manifests / "08_batch_size.json").write_text(json.dumps(manifest), encoding="utf-8")
    report.compose(paths, expected=["02_locality", "03_factor_loss_scope"])
    text = words(paths)
    assert (
        "Notebook 02_locality has no section" in text
        and "Notebook 03_factor_loss_scope has" not in text
    )
    assert "last run of notebook 08_batch_size failed" in text
    assert "The figure losses is missing" in text and "numpy 2.4.6" in text


def test_no_sections_and_a_truncated_one_are_named(paths):
    with pytest.raises(InputError, match="no sections; run the notebooks"):
        report.compose(paths)
    path = section(paths).save()
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    with pytest.raises(InputError, match="03_factor_loss_scope.json: not a section"):
        report.compose(paths)


def test_a_recipe_is_told_in_words_once(paths):
    recipe = {
        "name": "FT-M",
        "loss": "target_tokens",
        "layers": [0.66],
        "components": ["down_proj"],
        "chat_template": True,
        "end_of_turn": False,
        "adapter": None,
        "rank": 8,
        "alpha": 32.0,
        "learning_rate": 5e-4,
        "steps": 25,
        "stop_loss": 0.01,
        "batch_size": None,
        "weight_decay": 0.0,
        "clamp": 4,
    }
    for place, notebook in enumerate(("03_factor_loss_scope", "04_factor_layers")):
        made = section(paths, notebook, f"key.of_{place}")
        made.method(recipe)
        made.save()
    report.compose(paths)
    text = words(paths)
    for phrase in (
        "the block at 66% of the depth",
        "every target token",
        "5 × 10⁻⁴",
        "without the end-of-turn",
        "clamp 4",
    ):
        assert text.count(phrase) == 1
    lora = typesetting.describe(
        recipe | {"adapter": "lora", "layers": "all", "batch_size": 4, "loss": "last_prompt_token"}
    )
    for phrase in (
        "LoRA adapters (rank 8, alpha 32) on `down_proj` in all blocks",
        "minibatches of 4",
        "last prompt token",
    ):
        assert phrase in lora


def test_a_locate_then_edit_method_is_put_into_words_with_the_settings_it_uses_alone():
    said = {
        name: typesetting.describe(peer.model_dump() | {"layers": (2, 3)})
        for name, peer in BASELINES.items()
    }
    assert all("Further" not in text for text in said.values())
    assert (
        "after block 3:" in said["memit"]
        and "`down_proj` of block 2, block 3 by least squares with a ridge of 15000"
        in said["memit"]
    )
    assert (
        "null" not in said["memit"]
        and "below 0.02" in said["alphaedit"]
        and "15000" not in said["alphaedit"]
    )
    assert (
        "before each window of 40 tokens" in said["anyedit_unke"]
        and "20 other texts" in said["anyedit_unke"]
    )
    assert (
        "surprisal" in said["anyedit_pp"]
        and "all later windows" in said["muke"]
        and "no weight changes" in said["in_context"]
    )


def test_rows_made_by_another_process_cost_what_they_record(tmp_path, monkeypatch):
    """A rerun that finds its rows takes seconds: said alone, they would make a study of an hour look free."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    paths = rows.Paths("smoke")
    manifests = paths.results / "manifests"
    manifests.mkdir(parents=True)
    for notebook, work in (("07_recipe", 5.0), ("01_edits", 40.0)):
        told = {
            "notebook": notebook,
            "work_seconds": work,
            "python": "3.11.7",
            "processor": "Pascaline",
            "versions": {"numpy": "2.4.6"},
        }
        (manifests / f"{notebook}.json").write_text(json.dumps(told))
    unit = {
        "method": "FT-M",
        "factor": None,
        "level": None,
        "batch_size": 1,
        "recipe": "a",
        "phase": "after",
        "train_seconds": 60.0,
        "answer_seconds": 30.0,
    }
    paths.exported("07_recipe").parent.mkdir(parents=True)
    pd.DataFrame([unit | {"batch": batch} for batch in (0, 0, 1)]).to_parquet(
        paths.exported("07_recipe")
    )
    report.account(paths, ["07_recipe", "01_edits"])
    said = json.loads((paths.figures / "sections" / "run.json").read_text())["numbers"][
        "cost.study_seconds"
    ]
    assert said["value"] == 180 + 40
    report.compose(paths)
    page = (paths.figures / "report.html").read_text(encoding="utf-8")
    shutil.rmtree(paths.results)  # what a clone lacks
    report.compose(paths)
    assert (
        "Pascaline" in page
        and "numpy 2.4.6" in page
        and page == (paths.figures / "report.html").read_text(encoding="utf-8")
    )


def spoken(**said):
    """Sections as they are stored, with these numbers: key -> (value, low, high); dots of a key are written as double underscores."""
    numbers = {}
    for key, (value, *ends) in said.items():
        text = str(value) + (f" [{ends[0]}, {ends[1]}]" if ends else "") + ", n = 20"
        numbers[key.replace("__", ".")] = {"value": value, "n": 20, "unit": "", "said": text}
    return [
        {"notebook": "07_recipe", "numbers": numbers, "answer": "An answer.", "smoke_run": False}
    ]


STUDY = {
    "embedded__reading": (0.7,),
    "edits__count": (60,),
    "edits__words": (74.4,),
    "effect__loss_scope__ft_m__average": (16.5, 14.0, 19.3),
    "effect__loss_scope__lora__average": (-1.4, -3.2, 0.8),
    "effect__layers__ft_m__average": (0.1, -0.3, 0.4),
    "single__ft_uke__average": (0.69, 0.67, 0.71),
    "single__lead": (4.7, 2.2, 7.3),
    "batch__8__lead": (12.9, 10.7, 15.0),
    "batch__40__lead": (22.0, 18.7, 25.1),
    "batch__trend": (3.0, 2.2, 3.9),
    "verdicts__holds": (12,),
    "verdicts__in_part": (1,),
    "verdicts__does_not_hold": (0,),
    "verdicts__worlds": (1,),
}


def test_the_abstract_says_the_numbers_that_a_run_has_and_no_others():
    text = abstract.write(spoken(**STUDY))
    for phrase in (
        "Here 60 texts of 74 words on average are written into a small model",
        "by 16.5 [14.0, 19.3] points with FT-M (trained weights) and -1.4 [-3.2, 0.8] points with LoRA; ",
        "all blocks instead of the best single one by 0.1 [-0.3, 0.4] with FT-M alone.",
        "from 12.9 [10.7, 15.0] points in batches of 8 to 22.0 [18.7, 25.1] points in batches of 40",
        "Of 13 statements of the paper, 12 hold and 1 holds in part, tried in one world.",
    ):
        assert phrase in text
    assert (
        "n = 20" not in text
        and "AKEW" not in text
        and "one after another" not in text
        and "few edits" not in text
    )
    brackets = re.findall(r"\[[^]]+\]", text)
    assert set(brackets) <= {
        f"[{low}, {high}]" for _, *ends in STUDY.values() if ends for low, high in [ends]
    }


@pytest.mark.parametrize("lost", STUDY)
def test_an_abstract_without_one_of_its_numbers_still_reads_as_sentences(lost):
    text = abstract.write(spoken(**{key: said for key, said in STUDY.items() if key != lost}))
    assert not re.search(r"  | [.,;]|\(\)|\( |None|and \.|by \.|;\.|\.\.", text) and text.endswith(
        "."
    )
    assert all(
        sentence[0].isupper() or sentence[0].isdigit()
        for sentence in re.split(r"(?<=[.?]) (?=\S)", text.replace("arXiv 2506.09672", "arXiv"))
    )


def test_few_edits_and_a_single_size_are_said_as_such():
    few = {
        key: said
        for key, said in STUDY.items()
        if key not in ("batch__40__lead", "embedded__reading")
    } | {"edits__count": (12,)}
    text = abstract.write(spoken(**few))
    assert (
        "this lead is 12.9 [10.7, 15.0] points in batches of 8" in text
        and "With so few edits" in text
        and "The model is small" not in text
    )


def test_the_abstract_of_a_wiring_run_has_no_result_and_one_without_results_has_the_answers():
    wiring = [section | {"smoke_run": True} for section in spoken(**STUDY)]
    assert (
        "support no verdict" in abstract.write(wiring)
        and "16.5" not in abstract.write(wiring)
        and "12 hold" not in abstract.write(wiring)
    )
    assert abstract.write(spoken(locality__items=(960,))).endswith("An answer.")


def test_bulky_tables_and_whole_sections_of_preparation_stand_in_the_appendix_numbered_and_linked(
    paths,
):
    row = pd.DataFrame({"x": [1]})
    names = {
        "08_batch_size": ["batch_lead", "batch_cost", "batch_8", "batch_40", "long"],
        "tuning": ["tuning"],
    }
    for notebook, own in names.items():
        made = section(paths, notebook, f"key.of_{notebook}")
        for name in own:
            made.table(
                row if name != "long" else pd.DataFrame({"x": range(arrangement.LONG + 1)}),
                name,
                f"Caption of {name}.",
            )
        made.save()
    report.compose(paths)
    text = words(paths)
    for label, name in (
        ("1", "batch_lead"),
        ("2", "batch_40"),
        ("A1", "batch_cost"),
        ("A2", "batch_8"),
        ("A3", "long"),
        ("A4", "tuning"),
    ):
        assert text.count(f"Table {label}. Caption of {name}.") == 1
    assert "In the appendix: Tables A1, A2, A3." in text
    assert (
        text.index("Caption of batch_40")
        < text.rindex("Limits")
        < text.index("Caption of batch_cost")
        < text.index("Caption of tuning")
    )
    assert text.count("It works:") == 4  # each section, and the abstract of a run without results
    targets = set(re.findall(r'href="#([^"]+)"', page(paths)))
    assert (
        targets <= set(re.findall(r' id="([^"]+)"', page(paths))) and "table-batch_cost" in targets
    )


def laid_out(frame, **options):
    block = tables.cells(frame)
    return block | arrangement.lay_out(block, **options)


def test_columns_of_texts_share_the_width_by_what_they_hold_and_no_word_is_cut():
    claims = [
        "Training through the chat template that questions are asked through matters when weights are trained directly."
    ] * 20
    ours = ["16.5 [14.0, 19.3] points, n = 20"] * 20
    verdict = ["holds"] * 19 + [
        "not testable here: the model knows one fictional world and answers at chance"
    ]
    block = laid_out(
        pd.DataFrame(
            {
                "claim": claims,
                "the paper": "far better",
                "ours": ours,
                "verdict": verdict,
                "worlds": 1,
            }
        )
    )
    widths = dict(zip(block["head"], block["columns"]))
    assert sum(widths.values()) == pytest.approx(arrangement.ROOM, abs=1) and block["wraps"] >= 1
    assert (
        widths["Claim"] == max(widths.values()) > 2 * widths["The paper"] and widths["Worlds"] < 60
    )
    many = pd.DataFrame(
        {"level": ["template without, asked without"] * 4}
        | {f"long heading {place}": [0.5] * 4 for place in range(14)}
    )
    block = laid_out(many)
    letters = [max(len(word) for word in head.split()) for head in block["head"]]
    assert sum(block["columns"]) <= arrangement.ROOM + 1 and all(
        width > 0.4 * block["size"] * count for width, count in zip(block["columns"], letters)
    )


def test_a_table_that_fits_takes_what_it_needs_and_few_intervals_stand_beside_their_numbers():
    block = laid_out(
        pd.DataFrame({"effect": ["a", "a", "b"], "difference": [tables.Score(1.0, 0.5, 1.5)] * 3})
    )
    assert set(block["columns"]) == {0} and block["inline"] and block["groups"] == [2]
    wide = laid_out(
        pd.DataFrame(
            {"method": ["FT-M"]}
            | {kind: [tables.Score(0.5, 0.4, 0.6)] for kind in tables.KIND_ORDER}
        )
    )
    assert not wide["inline"] and not wide["groups"]


def test_answers_side_by_side_become_lines_that_can_be_read():
    text = "A long answer that would be broken into one word a line if eight of it stood beside each other."
    block = laid_out(
        pd.DataFrame(
            {"kind": ["original", "detail"]}
            | {name: [text, text] for name in ("reference", "before", "FT-M", "LoRA")}
        )
    )
    assert (
        block["head"] == ["Kind", "", "Text"]
        and len(block["rows"]) == 8
        and [cell["text"] for cell in block["rows"][1]] == ["Original", "Before", text]
    )


def test_every_recipe_is_told_once_as_it_differs_and_with_the_sizes_of_its_batches(paths):
    recipe = {
        "name": "FT-M",
        "loss": "target_tokens",
        "learning_rate": 5e-4,
        "steps": 25,
        "seed": 1,
    }
    made = section(paths, "07_recipe", "key.a")
    made.method(recipe)
    made.save()
    made = section(paths, "08_batch_size", "key.b")
    for batch, rate in ((40, 5e-4), (8, 5e-4), (40, 1e-3)):
        made.method(recipe | {"batch": batch, "learning_rate": rate})
    made.save()
    report.compose(paths)
    text = words(paths)
    assert text.count("every target token, teacher-forced") == 1
    assert "FT-M as described 8, 40 07_recipe, 08_batch_size" in text.replace(
        "FT-Mas described8, 4007_recipe", "FT-M as described 8, 40 07_recipe"
    )
    assert "learning rate 1 × 10⁻³" in text


def test_an_interval_that_may_not_be_broken_has_room_in_its_column(paths):
    """Its width was found before it was held together, so it ran into the next column."""
    text = "papers of these methods, table not known, and further words that need all the room there is"
    frame = pd.DataFrame(
        {"ours": ["48.6 [38.3, 58.6] %"] * 3}
        | {name: [text] * 3 for name in ("source", "claim", "reason")}
    )
    made = section(paths)
    made.table(frame, "published", "Caption.")
    made.save()
    data = typesetting.arrange(
        paths,
        [
            json.loads(
                (paths.figures / "sections" / "03_factor_loss_scope.json").read_text(
                    encoding="utf-8"
                )
            )
        ],
    )
    (block,) = [block for each in data["appendix"] for block in each["blocks"]]
    assert "\u00a0" in block["rows"][0][0]["text"] and block["columns"][0] > 0.4 * block[
        "size"
    ] * len("[38.3, 58.6]")
