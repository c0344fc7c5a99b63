"""Documents: what each form of file becomes, and how a broken file is reported."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from uke.data import documents
from uke.data.documents import Document
from uke.errors import InputError

ADA = {"title": "Ada  Moor", "text": " She paints.\nShe sings. ", "url": "ignored", "question": " "}
BRELEN = {"id": 7, "title": "Brelen", "text": "A town.", "section": "Roads", "question": "What?"}
GOOD = b'{"title": "a", "text": "b"}\n'


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def complaint(path):
    """Return the one line that a file is refused with."""
    with pytest.raises(InputError) as caught:
        documents.gather([path])
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path))
    return line.removeprefix(f"{path}: ")


EXPECTED = [
    Document("town-0", "Ada Moor", "She paints.\nShe sings."),
    Document("7", "Brelen", "A town.", "Roads", (("What?", ""),)),
]


def test_parquet_reads_as_json_lines_do(tmp_path):
    lines = f"\ufeff{json.dumps(ADA)}\n\n{json.dumps(BRELEN)}"
    assert documents.gather([written(tmp_path, "town.jsonl", lines)]) == EXPECTED
    path = tmp_path / "town.parquet"
    pd.DataFrame([ADA, BRELEN | {"id": "7"}]).to_parquet(path)
    assert documents.gather([path]) == EXPECTED


def test_a_record_without_a_text_is_left_out_with_a_warning(tmp_path):
    redirect = '{"id": "5", "title": "Redirect", "text": ""}\n'
    path = written(tmp_path, "wiki_00.jsonl", redirect + GOOD.decode())
    with pytest.warns(UserWarning, match="documents: 1 have no text and are left out"):
        assert [document.title for document in documents.gather([path])] == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"title": "a"}', "line 2: field 'text' is missing"),
        (b'{"title": " ", "text": "b"}', "line 2, field 'title': String should have at least 1"),
        (b'{"title": "a", "text": ["b"]}', "line 2, field 'text': Input should be a valid string"),
        (b'{"title": "a", "text": "b", "id": ""}', "line 2, field 'id': String should have"),
        (b'{"title": "\\ud800", "text": "b"}', "line 2, field 'title': "),
        (b'["a"]', "line 2: not of the expected form"),
        (b"nonsense", "line 2: not valid JSON: Expecting value"),
        (b'{"a":' * 100_000, "line 2: not valid JSON: maximum recursion"),
        (b'{"title": "\xff"}', "line 2: not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    assert message in complaint(written(tmp_path, "a.jsonl", GOOD + line + b"\n" + GOOD))


DUMP = '<mediawiki version="0.11"><page><title>A</title></page></mediawiki>'
SQUAD = b'{"data": [{"title": "a", "paragraphs": [{"context": "b"}]}]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wiki.xml", DUMP, "of a MediaWiki dump by `wikiextractor --json`"),
        ("wiki2.txt", " \n = Ada = \n \n She paints . \n", "Parquet with title and text, or SQuAD"),
        ("spoilt.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("a.json", b'[{"title": "a"}]', "record 0: field 'text' is missing"),
        ("a.json", b'[{"title": "a", "text": "b", "questions": [{}]}]', "'question' is missing"),
        ("a.json", SQUAD, "expected SQuAD's layout: field 'qas' is missing"),
        ("a.json", b"5", "expected SQuAD's layout: not of the expected form"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, message):
    assert message in complaint(written(tmp_path, name, content))


def test_missing_files_and_columns_and_no_document_at_all_are_named(tmp_path):
    assert "no such file" in complaint(tmp_path / "no.jsonl")
    pd.DataFrame([{"title": "a", "body": "b"}]).to_parquet(tmp_path / "a.parquet")
    assert "row 0: field 'text' is missing" in complaint(tmp_path / "a.parquet")
    for paths in ([], [written(tmp_path, "a.jsonl", "")]):
        with pytest.raises(InputError, match="documents: found none in . files"):
            documents.gather(paths)


def test_both_layouts_of_squad_give_paragraphs_with_questions(tmp_path):
    questions = [{"question": "How many\npoints?", "answer": "308"}]
    flat = [{"title": "Super Bowl 50", "text": "It was 308.", "questions": questions}]
    expected = (("How many points?", "308"),)
    (found,) = documents.gather([written(tmp_path, "flat.json", json.dumps(flat))])
    assert found == Document("flat-0", "Super Bowl 50", "It was 308.", "", expected)
    asked = {"question": "How many points?", "answers": [{"text": "308"}, {"text": "308."}]}
    paragraph = {"context": "It was 308.", "qas": [asked, {"question": "Why?", "answers": []}]}
    article = {"title": "Beyonc%C3%A9_Knowles", "paragraphs": [paragraph] * 2}
    squad = json.dumps({"version": "1.1", "data": [article, article]}, indent=1)
    found = documents.gather([written(tmp_path, "squad.json", squad)])
    assert [one.id for one in found] == ["squad-0", "squad-1", "squad-2", "squad-3"]
    assert found[0] == Document("squad-0", "Beyoncé Knowles", "It was 308.", "", expected)


def test_files_gather_in_order_and_ids_must_differ(tmp_path):
    one = written(tmp_path, "one.jsonl", GOOD)
    two = written(tmp_path, "two.jsonl", '{"id": "x", "title": "a", "text": "b"}\n')
    assert [found.id for found in documents.gather([two, str(one)])] == ["x", "one-0"]
    again = written(tmp_path, "three.jsonl", '{"id": "x", "title": "a", "text": "b"}\n')
    with pytest.raises(InputError) as caught:
        documents.gather([two, again])
    assert str(caught.value) == f"{again}: line 1: the id 'x' is taken; expected it once"


@pytest.mark.skipif("UKE_DATA" not in os.environ, reason="UKE_DATA is unset: no real documents")
def test_real_paragraphs_come_with_their_questions(tmp_path):
    folder = Path(os.environ["UKE_DATA"]) / "wikipedia"
    found = documents.gather([folder / "xquad_en_paragraphs.json"])
    assert len(found) == 120 and len({one.title for one in found}) == 48
    assert found[0].questions[0] == ("How many points did the Panthers defense surrender?", "308")
    assert all(answer in one.text for one in found for _, answer in one.questions)
    with pytest.raises(InputError, match="expected JSON lines"):
        documents.gather([folder / "wikitext2_valid.txt"])
    shutil.copy(folder / "xquad_en_paragraphs.json", tmp_path / "again.json")
    assert len(documents.gather([*folder.glob("xquad*"), tmp_path / "again.json"])) == 240
