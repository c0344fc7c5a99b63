"""README quotes the committed numbers, and names what exists."""

import json
import re
from pathlib import Path

import pytest
from uke.errors import InputError
from uke.methods import METHODS
from uke.project import Paths
from uke.report import compose

ROOT = Path(__file__).parents[1]
QUOTE = re.compile(r"<!-- (number|word): ([a-z0-9_.]+) -->(.*?)<!-- -->")
SHOWN = {"number": "said", "word": "unit"}


def test_every_quoted_number_is_the_committed_one():
    numbers = json.loads(
        (ROOT / "figures" / "embedded" / "numbers.json").read_text(encoding="utf-8")
    )
    quoted = QUOTE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 8
    assert [(key, said) for what, key, said in quoted if numbers[key][SHOWN[what]] != said] == []


def test_no_other_result_stands_in_its_prose():
    """A score typed by hand would survive every change of the rows."""
    prose = QUOTE.sub(
        "", (ROOT / "README.md").read_text(encoding="utf-8").split("## What is here")[0]
    )
    assert re.findall(r"(?<![\w.])0?\.\d\d\b", prose) == []


def test_the_names_it_promises_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(name in text for name in METHODS)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(
        re.findall(r"`(\w+)`", text)
    )


def test_quoting_renews_a_stale_number_and_refuses_an_unknown_one(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    paths = Paths("embedded")
    paths.figures.mkdir(parents=True)
    (paths.figures / "numbers.json").write_text(json.dumps({"a.b": {"said": "0.93"}}))
    page = tmp_path / "README.md"
    page.write_text("x <!-- number: a.b -->old<!-- --> y\n")
    compose.quote(page, paths)
    assert page.read_text() == "x <!-- number: a.b -->0.93<!-- --> y\n"
    (paths.figures / "numbers.json").write_text(
        json.dumps({"a.b": {"said": "1 holds", "unit": "holds"}})
    )
    page.write_text("<!-- word: a.b -->fails<!-- -->")
    compose.quote(page, paths)
    assert page.read_text() == "<!-- word: a.b -->holds<!-- -->"
    page.write_text("<!-- number: a.c -->old<!-- -->")
    with pytest.raises(InputError, match="a.c: not in .*did you mean 'a.b'"):
        compose.quote(page, paths)
