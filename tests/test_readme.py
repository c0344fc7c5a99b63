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
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_quoted_number_is_the_committed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(ROOT))
    page = tmp_path / "README.md"
    page.write_text(README, encoding="utf-8")
    compose.quote(page, Paths("embedded"))
    assert page.read_text(encoding="utf-8") == README and README.count("<!-- number: ") >= 8


def test_no_other_result_stands_in_its_prose():
    """A score typed by hand would survive every change of the rows."""
    prose = re.sub(r"<!-- \w+: .*? -->.*?<!-- -->", "", README.split("## What is here")[0])
    assert re.findall(r"(?<![\w.])0?\.\d\d\b", prose) == []


def test_the_names_it_promises_exist():
    assert all(name in README for name in METHODS)
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"`(\w+)`", README))


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
    numbers.write_text(json.dumps({"a.b": {"said": "0.93, n = 4", "unit": "holds"}}))
    for what, text in {"number": "0.93, n = 4", "word": "holds", "cell": "0.93"}.items():
        assert renewed(what, "a.b") == quoted(what, "a.b", text)
    with pytest.raises(InputError, match=f"a.c: not in .*{run}/numbers.json; did you mean 'a.b'"):
        renewed("number", "a.c")
