"""README and docs quote the committed numbers, and name what exists."""

import json
import re
from pathlib import Path

import pytest
from uke.errors import InputError
from uke.methods import METHODS
from uke.project import Paths
from uke.report import compose

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
README = PAGES.setdefault(ROOT / "README.md", (ROOT / "README.md").read_text(encoding="utf-8"))
EVERYTHING = "\n".join(PAGES.values())


def test_every_quoted_number_is_the_committed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(ROOT))
    for path, text in PAGES.items():
        page = tmp_path / path.name
        page.write_text(text, encoding="utf-8")
        compose.quote(page, Paths("embedded"))
        assert page.read_text(encoding="utf-8") == text, path
    assert README.count("<!-- mean: ") >= 20 and EVERYTHING.count("<!-- number: ") >= 20


def test_no_other_result_stands_in_its_prose():
    """A score typed by hand would survive every change of the rows."""
    results = README.split("## What is here")[0] + PAGES[ROOT / "docs" / "results.md"]
    prose = re.sub(r"<!-- \w+: .*? -->.*?<!-- -->", "", results)
    assert re.findall(r"(?<![\w.])0?\.\d\d\b", prose) == []


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for path, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_names_it_promises_exist():
    assert all(name in EVERYTHING for name in METHODS)
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"`(\w+)`", EVERYTHING))


@pytest.mark.parametrize("run", ["embedded", "smollm2-unkebench"])
def test_quoting_renews_a_stale_number_and_refuses_an_unknown_one(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    page, numbers = tmp_path / "README.md", tmp_path / "figures" / run / "numbers.json"
    key = "" if run == "embedded" else f"{run}/"
    quoted = f"x <!-- {{}}: {key}{{}} -->{{}}<!-- --> y\n".format

    def renewed(*which):
        page.write_text(quoted(*which, "old"))
        compose.quote(page, Paths("embedded"))
        return page.read_text()

    with pytest.raises(InputError, match=f"{run}/numbers.json: no such numbers"):
        renewed("number", "a.b")
    assert page.read_text() == quoted("number", "a.b", "old")
    numbers.parent.mkdir(parents=True)
    said = "0.93 [0.90, 0.96], n = 4"
    numbers.write_text(json.dumps({"a.b": {"value": 0.934, "said": said, "unit": "holds"}}))
    texts = {"number": said, "word": "holds", "cell": "0.93 [0.90, 0.96]", "mean": "0.93"}
    for what, text in texts.items():
        assert renewed(what, "a.b") == quoted(what, "a.b", text)
    with pytest.raises(InputError, match=f"a.c: not in .*{run}/numbers.json; did you mean 'a.b'"):
        renewed("number", "a.c")
