"""Tables and the report say what was measured, escape what they are given, and never half exist."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pypandoc
import pytest
from uke.data import KINDS
from uke.errors import InputError
from uke.project import Paths
from uke.report import Section, compose, figures, tables, verdicts
from uke.report.section import prose

NASTY = 'a & b < c > #1 $x_1$ 50% {} ~ ^ \\ | "q" `k` *b* [z] @ref //'
LOSSES = pd.DataFrame({"method": "FT-M", "step": range(3), "loss": [3.0, 1.0, 0.1]})
ONE = pd.DataFrame({"x": [1]})


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return Paths("smoke")


def section(paths, notebook="03_factor_loss_scope", key="loss_scope.ft_m.original"):
    made = Section(notebook, paths, f"Title of {notebook}", "Does it work?")
    made.answer(f"It works: {made.say(key, 0.934, 0.901, 0.957, n=40)}.")
    return made


class Reader(HTMLParser):
    """Text, tags and images of a page, as a browser reads them."""

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


def page(paths):
    return (paths.figures / "report.html").read_text(encoding="utf-8")


def words(paths):
    return " ".join("".join(Reader(page(paths)).text).replace("\u00a0", " ").split())


def test_a_number_has_a_proper_minus_and_sensible_decimals():
    values = [0.934, -3.25, 12.34, 5e-4, 0.0, -0.0, 12000, float("nan"), float("-inf")]
    texts = ["0.93", "−3.25", "12.3", "5 × 10⁻⁴", "0.00", "0.00", "12,000", "–", "−∞"]
    assert [tables.number(value) for value in values] == texts


def test_texts_of_a_benchmark_are_shown_where_rows_have_them_and_leave_no_file_after(paths):
    for question in ("Who?", None):
        made = Section("01_edits", paths, "Edits", "What?")
        made.texts(pd.DataFrame({"question": [question], "answer": "Ada."}), "example", "One edit.")
        assert any((paths.figures / "tables").iterdir()) == bool(question)
    assert "no table" in json.loads(made.save().read_text())["body"][0]["markdown"]


def test_an_interval_is_said_with_the_decimals_of_its_number(paths):
    made = Section("01_edits", paths, "Edits", "What?")
    assert made.say("a.b", 0.934, 0.901, 0.957, n=40) == "0.93 [0.90, 0.96], n = 40"
    assert made.say("a.lead", -3.2, -12.3, 0.4, unit="points") == "−3.2 [−12.3, 0.4] points"
    assert made.say("a.share", 12.0, unit="%") == "12.0%"
    assert made.say("a.count", np.int64(1000)) == "1,000"
    assert made.say("a.single", 0.5, float("nan"), float("nan"), 1) == "0.50, n = 1"


def scored():
    scores = [("no edit", "original", 0.9), ("no edit", "detail", 0.1), ("FT-L", "original", 0.3)]
    scores += [("FT-L", "detail", 0.1), ("FT-M", "original", 0.8)]
    rows = [(*cell, f"e{at}", value + 0.01 * at) for *cell, value in scores for at in range(5)]
    return pd.DataFrame(rows, columns=["method", "kind", "edit", "score"])


def test_the_best_method_is_bold_and_no_edit_never_is(tmp_path):
    table = tables.scores(scored())
    assert table["method"].tolist() == ["FT-L", "FT-M", "no edit"]
    assert [cell.best for cell in table["original"]] == [False, True, False]
    csv, tex = tables.save(table, tmp_path, "scores", "Scores.")
    assert r"\bfseries 0.82 [0.80, 0.84]" in tex.read_text(encoding="utf-8")
    read = pd.read_csv(csv).set_index("method").loc["FT-M"]
    assert read["original"] == pytest.approx(0.82) and read["original_high"] > 0.82
    assert tables.printed(table)["original"].tolist()[1] == "0.82 [0.80, 0.84]"


def test_latex_escapes_everything_and_uses_booktabs(tmp_path):
    frame = pd.DataFrame({"a_b": [NASTY, None], "x": [-0.5, 0.25]})
    _, path = tables.save(frame, tmp_path, "some", "Half & 50% of #1")
    text = path.read_text(encoding="utf-8")
    caption = (r"\caption{Half \& 50\% of \#1}", r"\label{tab:some}")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", *caption):
        assert rule in text
    row = next(line for line in text.splitlines() if line.startswith("a \\&"))
    bare = re.sub(r"\\[&%$#_{}\\]|\\text\w+( \\space|\{\})|\$-\$", "", row)
    assert bare.count("&") == 1 and not set("%$#_{}^~<>|") & set(bare)
    assert "– & 0.25" in text and "$-$0.50" in text


def test_a_missing_cell_is_a_dash_and_csv_keeps_plain_numbers(tmp_path):
    frame = pd.DataFrame({"method": ["FT-L", "FT-M"], "score": [0.123456, None]})
    frame = frame.assign(n_edits=[1000, 20])
    assert [tables.head(column) for column in frame] == ["Method", "Score", "N edits"]
    assert tables.printed(frame).values.tolist() == [["FT-L", "0.12", "1,000"], ["FT-M", "–", "20"]]
    read = pd.read_csv(tables.save(frame, tmp_path, "some", "Scores.")[0])
    assert read["score"].isna().tolist() == [False, True] and read["score"][0] == 0.123456


@pytest.mark.parametrize(
    ("key", "value", "low"),
    [("a.b", float("nan"), None), ("a.b", True, None), ("a.b", "0.9", None), ("a.a", 1, None)]
    + [("A b", 1, None), ("a.b", 0.5, 0.4)],
)
def test_bad_keys_and_numbers_and_half_an_interval_are_refused(paths, key, value, low):
    made = Section("01_edits", paths, "Edits", "What?")
    made.say("a.a", 1)
    with pytest.raises(InputError, match="01_edits: number"):
        made.say(key, value, low)


def test_a_figure_needs_a_name_a_caption_and_an_alternative_text(paths):
    made = section(paths)
    for name, caption, alt in (("A", "c", "a"), ("a", " ", "a"), ("a", "c", " ")):
        with pytest.raises(InputError, match="03_factor_loss_scope: figure"):
            made.figure(figures.curves, LOSSES, name, caption, alt)
    assert not paths.figures.exists()


def test_an_observation_says_whether_it_was_expected(paths, monkeypatch):
    made, shown = section(paths), []
    monkeypatch.setattr("uke.report.section._show", shown.append)
    for text, expected in (("it falls.", True), ("it rises.", np.False_), ("It stays.", None)):
        assert made.observe(text, expected) is None  # which a cell that ends with it would repeat
    assert shown == ["As expected: it falls.", "Not as expected: it rises.", "It stays."]


def test_a_failed_check_voids_its_section_in_a_red_box_and_every_verdict_on_it(paths, monkeypatch):
    made = section(paths)
    made.check(True, "weights restored")
    made.check(False, "equal numbers of edits")
    made.save()
    compose.compose(paths)
    text, source = words(paths), page(paths)
    assert "✓ weights restored" in text and "✗ equal numbers of edits" in text
    assert source.count('class="box void"') == 1 and "It works" not in text
    claim = verdicts.Claim(key="c", claim="c", number="loss_scope.*.original", sign="+")
    judged = verdicts.judge(claim, verdicts.settings(paths)["smoke"])
    assert judged.word == verdicts.UNTESTABLE and "failed: equal numbers" in judged.reason
    monkeypatch.setenv("STRICT", "1")
    with pytest.raises(InputError, match="conclusion is void: a trace is left"):
        made.check(False, "a trace is left")


def full(paths, notebook="03_factor_loss_scope"):
    made = section(paths, notebook, f"{notebook}.value")
    made.figure(figures.curves, LOSSES, f"loss_{notebook}", "Loss.", 'Falls from 3 to "0.1".')
    words = pd.DataFrame({"claim": [1], "setting": "does\u00a0not\u00a0hold"})
    made.table(words, f"table_{notebook}", f"Table of {notebook}.", half=True)
    made.table(ONE, f"large_{notebook}", "Every metric.", placed=False)
    made.observe("the loss falls.", expected=True)
    made.limit("One model.")
    made.warn("Few edits.")
    made.environment = {"model": "abc"}
    made.save()


def test_the_report_has_answers_first_then_the_argument_then_the_supplement(paths):
    for notebook in ("tuning", "08_batch_size", "01_edits", "11_verdicts"):
        full(paths, notebook)
    made = section(paths, "controls", "controls.value")
    made.figure(figures.curves, LOSSES, "controls", "Controlled.", "Falls.")  # of the main part
    made.save()
    compose.compose(paths)
    text = words(paths)
    assert text.count("It works: 0.93 [0.90, 0.96], n = 40.") == 9  # tuning is no answer
    order = ["Answers", "Does it work?", "Controlled.", "Related work", "Xiong"]
    order += ["Table of 01", "Table of 08", "Table of 11", "One model.", "Table of tuning"]
    place = text.index("Answers")
    for each in [*order, "Model, data and code"]:
        place = text.index(each, place)
    assert "arXiv 2506.09672" in text and "fourth factor was not available" in text
    for phrase in ("As expected: the loss falls.", "Warning. Few edits."):
        assert text.count(phrase) == 4
    source = page(paths)
    assert source.count('<table class="half">') == source.count("does\u00a0not\u00a0hold") == 4
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids)) and {"fig-loss_01_edits", "tbl-table_01_edits"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', source)) <= set(ids)
    assert (paths.figures / "tables" / "large_01_edits.csv").is_file()
    assert "Every metric. It is in tables/large_01_edits.csv." in text
    assert 'href="tables/table_01_edits.csv"' in source and "large_01_edits.tex" not in source


def test_the_same_sections_give_the_same_bytes_and_a_self_contained_page(paths):
    full(paths)
    first = [path.read_bytes() for path in compose.compose(paths)]
    assert first == [path.read_bytes() for path in compose.compose(paths)]
    assert len(first) == 4 and first[2].startswith(b"%PDF") and b"(loss_03" in first[3]
    assert [path.suffix for path in sorted(paths.figures.glob("loss*"))] == [".svg"]
    read = Reader(page(paths))
    assert [image["alt"] for image in read.images] == ['Falls from 3 to "0.1".']
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in read.images)
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert "prefers-color-scheme: dark" in page(paths) and "width=device-width" in page(paths)


OVERFLOWS = """() => [...document.querySelectorAll('html, main > *, .table, table, td, nav')]
  .filter(node => node.tagName != 'FIGURE' && node.scrollWidth > node.clientWidth + 1)
  .map(node => `${node.tagName} ${node.id} ${node.scrollWidth} > ${node.clientWidth}`)"""


def test_nothing_overflows_on_a_phone_a_tablet_and_a_wide_screen(paths):
    browser = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra test")
    chromium = shutil.which("chromium") or pytest.skip("needs Chromium (apt install chromium)")
    full(paths)
    made = section(paths, "08_batch_size", "batch.lead")
    wide = pd.concat([scored().assign(kind=kind) for kind in [*KINDS][:10]])
    made.table(tables.scores(wide), "kinds", "As many columns as the widest table has.")
    made.save()
    compose.compose(paths)
    with browser.sync_playwright() as driver:
        options = {"executable_path": chromium, "args": ["--no-sandbox"]}
        page = driver.chromium.launch(**options).new_page()
        page.goto(f"file://{paths.figures}/report.html")
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        for width in (390, 820, 1280, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(OVERFLOWS) == [], width
            assert page.locator("nav ul").is_visible() == (width > 1000)  # contents are folded


def test_markup_in_the_data_stays_text_in_page_and_pdf(paths):
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
    compose.compose(paths)
    read = Reader(page(paths))
    assert "script" not in read.tags and "em" in read.tags  # the question
    shown = "".join(read.text).replace("\u00a0", " ")
    assert shown.count(NASTY.replace("`k`", "k")) >= 9 and "<script>alert(1)</script>" in shown
    assert (paths.figures / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "text", [NASTY, "1. first", "- x", "a ` lone tick", "+3 points", "# title", "12) b", ": c"]
)
def test_plain_text_survives_markdown(text):
    back = pypandoc.convert_text(prose(text), "plain", compose._FORMAT, ["--wrap=none"])
    expected = text.replace("`", "") if text.count("`") == 2 else text
    assert back.strip().replace("\u00a0", " ").replace("`", "") == expected.replace("`", "")


def test_a_key_or_a_name_in_two_sections_is_an_error_and_nothing_is_written(paths):
    section(paths, "01_edits").save()
    section(paths, "03_factor_loss_scope").save()
    with pytest.raises(InputError, match="original is in two sections: 01_edits and 03_factor"):
        compose.compose(paths)
    assert not paths.figures.exists()
    for at, notebook in enumerate(("01_edits", "03_factor_loss_scope")):
        made = section(paths, notebook, f"key.of_{at}")
        made.table(ONE, "same", "A table.")
        with pytest.raises(InputError, match="earlier table called 'same'"):
            made.table(ONE, "same", "Another.")
        made.save()
    with pytest.raises(InputError, match="table same is in two sections"):
        compose.compose(paths)


def test_a_smoke_run_says_so_and_no_other_run_does(paths):
    made = section(paths)
    made.save()
    compose.compose(paths)
    assert "Smoke run" not in words(paths)
    made.smoke_run = True
    made.save()
    compose.compose(paths)
    assert words(paths).index("Smoke run.") < words(paths).index("It works")
    numbers = json.loads((paths.figures / "numbers.json").read_text())
    assert all("was a smoke run" in number["void"] for number in numbers.values())


def test_missing_sections_and_failed_runs_are_warned_of_and_one_section_is_needed(paths):
    with pytest.raises(InputError, match="no sections; make report PROFILE=smoke"):
        compose.compose(paths)
    full(paths)
    runs = [{"notebook": "08_batch_size", "status": "failed"}]
    compose.compose(paths, ["02_locality", "03_factor_loss_scope"], runs)
    text = words(paths)
    assert "Notebook 02_locality has no section" in text
    assert "Notebook 03_factor_loss_scope has" not in text
    assert "last run of 08_batch_size failed" in text
    assert "python -m uke run 02_locality --profile smoke --data world" in text


def test_figures_and_tables_that_no_section_names_are_deleted_from_a_whole_run(paths):
    full(paths)
    kept = {file for file in paths.figures.rglob("*") if file.is_file()}
    stale = [paths.figures / name for name in ("old.svg", "tables/old.csv", "tables/old.tex")]
    for file in stale:
        file.write_text("of an earlier run")
    compose.compose(paths, ["02_locality"], prune=True)  # which is missing
    assert all(file.is_file() for file in stale)
    compose.compose(paths, ["03_factor_loss_scope"], prune=True)
    assert not any(file.exists() for file in stale) and all(file.is_file() for file in kept)


def test_recipes_are_listed_once_as_they_differ_and_with_the_sizes_of_their_batches(paths):
    recipe = {"name": "FT-M", "loss": "target_tokens", "learning_rate": 5e-4, "steps": 25}
    made = section(paths, "07_recipe", "key.a")
    made.method(recipe)
    made.method({"name": "LoRA", "rank": 8})
    made.save()
    made = section(paths, "08_batch_size", "key.b")
    for batch, rate in ((40, 5e-4), (8, 5e-4), (40, 1e-3)):
        made.method(recipe | {"batch": batch, "learning_rate": rate})
    made.save()
    compose.compose(paths)
    text = words(paths)
    assert "FT-M learning rate 5 × 10⁻⁴ 8, 40 07_recipe, 08_batch_size" in text
    assert "FT-M learning rate 1 × 10⁻³ 40 08_batch_size LoRA 07_recipe" in text
    assert "target_tokens" not in text


def test_the_cost_of_a_run_is_kept_for_who_composes_without_its_manifests(paths):
    runs = [
        {"notebook": "07_recipe", "status": "done", "seconds": 180.0, "processor": "Pascaline"},
        {"notebook": "01_edits", "status": "done", "seconds": 40.0, "processor": "Pascaline"},
    ]
    compose.account(paths, [])
    assert not paths.sections.exists()
    compose.account(paths, runs)
    compose.compose(paths, runs=runs)
    first = page(paths)
    compose.compose(paths)
    assert "220 s, n = 2" in first.replace("\u00a0", " ") and "Pascaline" in first
    assert page(paths) == first
