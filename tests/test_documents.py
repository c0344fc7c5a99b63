"""Documents: what each form of file becomes, what is left out, and which line a broken file earns."""

import bz2
import gzip
import json
import os
import time
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from uke.data import documents
from uke.data.documents import Document
from uke.data.dumps import lead
from uke.data.wikitext import close_up
from uke.errors import InputError

LEAD = " ".join(f"word{n}" for n in range(50)) + "."
PARAGRAPH = " ".join(f"word{n}" for n in range(50)) + " . "


def page(number, text=LEAD, title=None, ns=0, extra=""):
    """One page of a dump; `extra` stands between its id and its revision."""
    space = "" if ns is None else f"<ns>{ns}</ns>"
    return (
        f"<page><title>{title or f'Title {number}'}</title>{space}<id>{number}</id>{extra}<revision><id>9{number}</id>"
        f"<contributor><id>5</id></contributor><model>wikitext</model><text>{escape(text)}</text></revision></page>\n"
    )


def dump(*pages, info=""):
    start = '<?xml version="1.0"?>\n<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">\n'
    return f"{start}<siteinfo>{info}</siteinfo>\n{''.join(pages)}</mediawiki>\n"


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, form=None):
    return [document.text for document in documents.read(path, form)]


def complaint(path, form=None):
    """The one line that a file earns."""
    with pytest.raises(InputError) as caught:
        list(documents.read(path, form))
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path))
    return line.removeprefix(f"{path}: ")


# A document


def test_a_heading_names_title_and_section_and_tells_whether_it_can_be_asked_for():
    whole = Document("1", "Ada Moor", "She paints.")
    part = Document("2", "Ada Moor", "She paints.", "Early life")
    assert (whole.heading, part.heading) == ("Ada Moor", "Ada Moor: Early life")
    assert whole.named and part.named
    assert not Document("3", "Ada <unk>", "x").named
    assert not Document("4", "Ada Moor", "x", "Life in <unk>").named
    assert not Document("5", " ", "x", "Life").named


# JSON lines


def test_json_lines_keep_their_ids_questions_and_sections_and_number_the_rest_from_nought(tmp_path):
    rows = [
        {
            "title": "Ada  Moor",
            "text": " She paints.\nShe sings. ",
            "url": "ignored",
            "section": None,
            "question": " ",
        },
        {
            "id": 7,
            "title": "Brelen",
            "text": "A town.",
            "section": "Roads",
            "question": "What is Brelen?",
        },
    ]
    path = written(tmp_path, "town.jsonl", json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]))
    first, second = documents.read(path)
    assert first == Document("town-0", "Ada Moor", "She paints.\nShe sings.")
    assert second == Document("7", "Brelen", "A town.", "Roads", (("What is Brelen?", ""),))
    third = written(tmp_path, "more.jsonl", "\n\n" + json.dumps(rows[0]))
    assert [document.id for document in documents.read(third)] == ["more-2"]


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_packed_json_lines_read_as_the_plain_ones(tmp_path, pack, suffix):
    plain = "\ufeff" + "".join(
        json.dumps({"title": "Å", "text": f"Text {n}."}, ensure_ascii=False) + "\n"
        for n in range(3)
    )
    found = list(documents.read(written(tmp_path, f"a.jsonl{suffix}", pack(plain.encode()))))
    assert found == list(documents.read(written(tmp_path, "a.jsonl", plain)))
    assert found[2] == Document("a-2", "Å", "Text 2.")


def test_a_damaged_stream_in_the_middle_of_an_archive_is_no_end(tmp_path):
    rows = [
        bz2.compress(json.dumps({"title": "a", "text": f"Text {n}."}).encode() + b"\n")
        for n in range(4)
    ]
    assert len(texts(written(tmp_path, "a.jsonl.bz2", b"".join(rows)))) == 4
    rows[2] = b"BZh9" + bytes(60)
    assert complaint(written(tmp_path, "a.jsonl.bz2", b"".join(rows))).startswith(
        "is damaged (Invalid data stream), after line 2"
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"title": "a"}', "line 2, field 'text': is missing"),
        ('{"title": " ", "text": "b"}', "line 2, field 'title': is empty"),
        ('{"title": "a", "text": ""}', "line 2, field 'text': is empty"),
        ('{"title": "a", "text": ["b"]}', "line 2, field 'text': expected text, found a list"),
        ('{"title": "a", "text": "b", "id": ""}', "line 2, field 'id': is empty"),
        (
            '{"title": "a", "text": "b", "section": 3}',
            "line 2, field 'section': expected text, found a whole number",
        ),
        ('{"title": "a", "text": "\\ud800"}', "line 2, field 'text': holds half a character"),
        ('["a"]', "line 2: expected an object, found a list"),
        ("nonsense", "line 2 column 1 is not valid JSON"),
        (
            '{"title": "a", "te',
            "line 2 column 16 is not valid JSON: Unterminated string starting at; is the file truncated?",
        ),
        ('{"a":' * 100_000, "line 2 is not usable JSON"),
        (b'{"title": "\xff"}', "line 2, byte 11 is not UTF-8"),
        (b'{"title": "\x00"}', "line 2 holds a NUL byte"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, said):
    good = b'{"title": "a", "text": "b"}\n'
    far = b" " * 2**15 + b"\n"  # so that the bad line does not stand in the file's beginning
    line = line if isinstance(line, bytes) else line.encode()
    path = written(tmp_path, "a.jsonl", good + line + b"\n" + good)
    if b"\x00" in line or b"\xff" in line:
        path = written(tmp_path, "a.jsonl", good.strip() + far + line + b"\n" + good)
    assert said in complaint(path)


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("uke.data.streams.LONGEST_LINE", 1000)
    path = written(tmp_path, "a.jsonl", '{"title": "a", "text": "b"}\n' + "x" * 5000)
    assert "line 2 is longer than" in complaint(path)


# MediaWiki


def test_of_a_dump_only_leads_of_articles_are_documents_and_the_rest_is_counted(tmp_path):
    pages = [
        page(12, f"'''A''' is [[b|a b]].<ref>c</ref> {LEAD}\n\n== Life ==\nNot this."),
        page(13, f"{LEAD} {{{{Norway-geo-stub}}}}"),
        page(14, f"{LEAD} {{{{disambiguation|geo}}}}"),
        page(15, f"{LEAD} {{{{Human name disambiguation}}}}"),
        page(16, LEAD, extra='<redirect title="A"/>'),
        page(17, "#redirect [[A]]"),
        page(18, LEAD, title="Talk:A", ns=1),
        page(19, "Short."),
        page(20, ""),
        page(21, f"{LEAD} {{{{open"),
        page(22, "{{a|" * 1000 + LEAD),
        page(
            23,
            f"{LEAD} [[A (disambiguation)]] {{{{disambiguation needed}}}} {{{{Stubborn|a}}}} {{{{sect-stub}}}} stub}}}}",
        ),
        page(24, f"{LEAD} {{{{distinguish|Stub}}}}", title="Stub: a title &amp; more"),
    ]
    tally = Counter()
    path = written(tmp_path, "wiki.xml", dump(*pages))
    found = list(documents.read(path, tally=tally))
    assert found[0] == Document("12", "Title 12", f"A is a b. {LEAD}")
    assert [(one.id, one.title) for one in found[1:]] == [("24", "Stub: a title & more")]
    assert tally == {
        "stubs": 2,
        "disambiguation pages": 2,
        "redirects": 2,
        "pages of other namespaces": 1,
        "pages without wikitext": 1,
        "pages of broken markup": 3,
    }


def test_a_dump_of_many_streams_is_read_to_its_end(tmp_path):
    whole = dump(*(page(n) for n in range(1, 6))).encode()
    parts = [bz2.compress(whole[start : start + 400]) for start in range(0, len(whole), 400)]
    assert len(parts) > 3
    found = [one.id for one in documents.read(written(tmp_path, "wiki.xml.bz2", b"".join(parts)))]
    assert found == ["1", "2", "3", "4", "5"]


def test_the_last_revision_counts_and_a_dump_without_namespace_numbers_has_them_by_name(tmp_path):
    twice = page(1, "Old " + LEAD).replace(
        "</page>", f"<revision><id>2</id><text>New {LEAD}</text></revision></page>"
    )
    info = '<namespaces><namespace key="1">Diskussion</namespace><namespace key="0"/></namespaces>'
    talk = page(2, LEAD, title="Diskussion:A", ns=None)
    other = page(3, LEAD, title="Star Trek: A", ns=None)
    found = list(documents.read(written(tmp_path, "a.xml", dump(twice, talk, other, info=info))))
    assert [(one.id, one.text[:3]) for one in found] == [("1", "New"), ("3", "wor")]


def test_links_to_files_are_known_by_the_names_that_the_dump_gives_them(tmp_path):
    text = f"[[Datei:a.jpg|mini|Ein [[Bild]]]]{LEAD} [[Kategorie:B]]"
    info = '<namespaces><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces>'
    assert texts(written(tmp_path, "a.xml", dump(page(1, text), info=info))) == [LEAD]


@pytest.mark.parametrize(
    "markup, plain",
    [
        ("'''''A''''' ''is'' '''b'''", "A is b"),
        ("a<ref name=x>{{cite|b}}</ref><ref name=y/> c", "a c"),
        ("{{Infobox|a=[[File:x.jpg|20px]]|b={{c|d}}}}\n'''A''' is.", "A is."),
        ("[[File:x.jpg|thumb|A [[b]] c<ref>d</ref>]]A is.", "A is."),
        ("A [[:Category:B|b]] [[Category:C]][[fr:A]] [[doi:10/1|d]] [[wikt:e|e]].", "A b d e."),
        ("A ({{IPA|x}}; {{langx|de|B}}; born 1815) is.", "A (born 1815) is."),
        ("A ({{IPA|x}}) is, ({{a}}, {{b}}) indeed{{efn|c}}.", "A is, indeed."),
        (
            "{{convert|1200|km|mi|abbr=on}}, {{convert|23|to|38|cm|in}}, {{cvt|5|acre}}",
            "1200 km, 23 to 38 cm, 5 acre",
        ),
        ("{{lang|de|''Haus''}} {{nowrap|3 {{nowrap|May}}}} {{circa|1880}}", "Haus 3 May c. 1880"),
        ("a&nbsp;&ndash; b &amp; c<br/>d", "a – b & c d"),
        ("{|\n! a\n|-\n| b\n|}\nA is.", "A is."),
        ("A <math>\\frac{{a}}{b}}</math> b <!-- c\n== d == --> e", "A b e"),
        (
            ":''For the film, see [[A (film)]].''\nA is.\n\n\n* one\n* two\n__TOC__",
            "A is.\none\ntwo",
        ),
        ("A is. [https://a.b c]\n===b===\nd", "A is. c"),
        ("A is. std::b 1 = 2\n== c == <!-- d -->\ne", "A is. std::b 1 = 2"),
    ],
)
def test_a_lead_is_what_a_reader_sees(markup, plain):
    assert lead(markup) == plain


def test_markup_that_would_keep_the_parser_busy_for_minutes_is_left_out_at_once(tmp_path):
    path = written(
        tmp_path,
        "a.xml",
        dump(page(1), page(2, "{{a|" * 6000), page(3, "<b>" * 20_000), page(4, "[[a|" * 20_000)),
    )
    tally = Counter()
    begun = time.perf_counter()
    assert len(list(documents.read(path, tally=tally))) == 1 and tally == {
        "pages of broken markup": 3
    }
    assert time.perf_counter() - begun < 5


def test_a_dump_with_a_document_type_is_refused_before_its_entities_are_read(tmp_path):
    entities = '<!DOCTYPE mediawiki [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefghi", "bcdefghij")
    )
    bomb = (
        dump(page(1))
        .replace('<?xml version="1.0"?>', f'<?xml version="1.0"?>{entities}]>')
        .replace("word1", "&j;")
    )
    assert "declares a document type" in complaint(written(tmp_path, "a.xml", bomb))
    outside = '<!DOCTYPE mediawiki SYSTEM "file:///etc/hostname"><mediawiki></mediawiki>'
    assert "declares a document type" in complaint(written(tmp_path, "a.xml", outside))


@pytest.mark.parametrize("share", [0.3, 0.55, 0.7, 0.99])
def test_a_cut_dump_says_after_which_page(tmp_path, share):
    pages = [page(n) for n in range(1, 9)]
    whole = dump(*pages).encode()
    cut = int(len(whole) * share)
    read = sum(
        whole.index(f"<title>Title {n}<".encode()) + len(pages[0]) - 10 <= cut for n in range(1, 9)
    )
    said = complaint(written(tmp_path, "a.xml", whole[:cut]))
    assert (
        read > 1
        and said
        == f"is cut in the middle, after page 'Title {read}', {read} pages read; expected the whole file"
    )


def test_a_dump_cut_in_its_archive_says_after_which_page(tmp_path):
    streams = dump(page(1), page(2), page(3)).split("<page>")
    whole = bz2.compress(b"<page>").join(bz2.compress(part.encode()) for part in streams)
    assert len(list(documents.read(written(tmp_path, "a.xml.bz2", whole)))) == 3
    said = complaint(written(tmp_path, "a.xml.bz2", whole[:-20]))
    assert (
        said == "is cut in the middle, after page 'Title 2', 2 pages read; expected the whole file"
    )
    assert "before its first document ends" in complaint(written(tmp_path, "b.xml.bz2", whole[:20]))
    check = whole.rindex(b"1AY&SY") + 6  # where the last block's checksum stands
    said = complaint(written(tmp_path, "c.xml.bz2", whole[:check] + bytes(4) + whole[check + 4 :]))
    assert said.startswith("is damaged (Invalid data stream), after page 'Title 2', 2 pages read")


@pytest.mark.parametrize(
    "content, said",
    [
        ("<html><body/></html>", "is XML with the root <html>"),
        (dump(page(1)).replace("<id>1</id>", ""), "page 1 has no id"),
        (dump(page(1), page(2).replace("Title 2", " ")), "page 2 has no title"),
        (
            dump(page(1), "<page><title>&nbsp;</title></page>"),
            "is damaged (undefined entity: line 5",
        ),
        (dump(page(1)) + dump(page(2)), "after page 'Title 1', 1 page read"),
        (
            dump(page(1, "Short."), page(2, "#REDIRECT [[a]]"), page(3, "Short.")),
            "(left out 2 stubs, 1 redirects)",
        ),
        (dump(), "(nothing in it could be one)"),
        ("nonsense", "is damaged (syntax error: line 1, column 0), before the first page ends"),
    ],
)
def test_a_file_that_is_no_dump_says_why(tmp_path, content, said):
    assert said in complaint(written(tmp_path, "a.xml", content))


# WikiText


def test_paragraphs_of_wikitext_carry_title_and_innermost_section(tmp_path):
    lines = [
        PARAGRAPH,
        "",
        " = Homarus gammarus = ",
        " ",
        f" A lobster , {PARAGRAPH}",
        " Too short . ",
        "",
        " = = Life = = ",
        "",
        " = = = Early <unk> = = = ",
        "",
        PARAGRAPH,
        " = no heading below a paragraph = ",
        "",
        " = no heading above a paragraph = ",
        " Too short . ",
        "",
        " = M @-@ 82 ( Michigan highway ) = ",
        "",
        PARAGRAPH,
    ]
    tally = Counter()
    path = written(tmp_path, "wiki.valid.txt", "\n".join(lines))
    found = list(documents.read(path, tally=tally))
    assert [(one.id, one.title, one.section, one.named) for one in found] == [
        ("wiki.valid-4", "Homarus gammarus", "", True),
        ("wiki.valid-11", "Homarus gammarus", "Early <unk>", False),
        ("wiki.valid-19", "M-82 (Michigan highway)", "", True),
    ]
    assert found[0].text.startswith("A lobster, word0 ") and found[0].text.endswith(" word49.")
    assert tally == {"paragraphs before the first title": 1, "paragraphs of fewer than 40 words": 4}


@pytest.mark.parametrize(
    "published, plain",
    [
        (
            "It weighs 0 @.@ 7 – 2 @.@ 2 kg ( 1 @.@ 5 – 4 @.@ 9 lb ) .",
            "It weighs 0.7–2.2 kg (1.5–4.9 lb).",
        ),
        ("20 @,@ 000 red @-@ and @-@ white ; in 1932 @,@ ", "20,000 red-and-white; in 1932,"),
        ('only " lobster red " on cooking .', 'only "lobster red" on cooking.'),
        ('" Was it ( " X " ) ? " " It was . "', '"Was it ("X")?" "It was."'),
        ('race ... " , the report said . " No ! "', 'race ...", the report said. "No!"'),
        ("She isn 't Oldham 's , K 'awiil or d 'état", "She isn't Oldham's, K'awiil or d'état"),
        (
            "the Knights ' 46 – 12 victory , the guests ' comfort",
            "the Knights' 46–12 victory, the guests' comfort",
        ),
        ("known as ' heel @-@ shaped <unk> ' .", "known as 'heel-shaped <unk>'."),
        (
            "( the ' air gap ' ) in the '70s and the ' 80s",
            "(the 'air gap') in the'70s and the '80s",
        ),
        (
            "Amos ' n ' Andy in the U.S. ' s rock ' n ' roll",
            "Amos 'n' Andy in the U.S.'s rock 'n' roll",
        ),
        ("I ’ m sorry , ‘ <unk> de <unk> ’ .", "I’m sorry, ‘<unk> de <unk>’."),
        (
            "$ 25 @,@ <unk> , £ 1 @.@ 7 million , 79 % , R & B , Kress & Co.",
            "$25,<unk>, £1.7 million, 79%, R&B, Kress & Co.",
        ),
        (
            "at 57 ° 53 ′ N 11 ° 32 ′ E , below − 80 ° C ( 90 ° F )",
            "at 57°53′N 11°32′E, below −80 °C (90 °F)",
        ),
        ("on US 131 / M @-@ 46 — at 21 : 30 : [ ... ] so", "on US 131/M-46—at 21:30: [...] so"),
        (
            "Canada – United States , 2010 – present , a C + .",
            "Canada – United States, 2010–present, a C+.",
        ),
        ("<unk> 's <unk> , <unk> @-@ <unk>", "<unk>'s <unk>, <unk>-<unk>"),
    ],
)
def test_published_spacing_is_undone(published, plain):
    assert close_up(published) == plain


# XQuAD


def test_both_layouts_of_xquad_give_paragraphs_with_questions(tmp_path):
    asked = [{"question": "How many\npoints?", "answer": "308"}]
    flat = [
        {"title": "Super Bowl 50", "text": "It was 308.", "questions": asked},
        {"id": "x", "title": "B", "text": "C."},
    ]
    first, second = documents.read(written(tmp_path, "flat.json", json.dumps(flat)))
    assert first == Document(
        "flat-0", "Super Bowl 50", "It was 308.", "", (("How many points?", "308"),)
    )
    assert second == Document("x", "B", "C.")
    questions = [
        {
            "id": "1",
            "question": "How many?",
            "answers": [{"text": "308", "answer_start": 7}, {"text": "308."}],
        },
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    article = {
        "title": "Beyonc%C3%A9_Knowles",
        "paragraphs": [{"context": "It was 308.", "qas": questions}] * 2,
    }
    squad = {"version": "1.1", "data": [article, article]}
    found = list(documents.read(written(tmp_path, "squad.json", json.dumps(squad, indent=1))))
    assert [one.id for one in found] == ["squad-0", "squad-1", "squad-2", "squad-3"]
    assert found[0] == Document(
        "squad-0", "Beyoncé Knowles", "It was 308.", "", (("How many?", "308"),)
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "the list is empty"),
        ('[{"title": "a"}]', "record 0, field 'text': is missing"),
        (
            '[{"title": "a", "text": "b", "questions": [{"question": "c"}]}]',
            "record 0, field 'questions[0].answer': is missing",
        ),
        (
            '{"data": [{"title": "a", "paragraphs": [{"context": " "}]}]}',
            "field 'data[0].paragraphs[0].qas': is missing",
        ),
        ('{"data": [{"title": "a", "paragraphs": [', "is no usable JSON"),
        ('{"data": []}', "holds no document of the form 'xquad'"),
        ('[{"title": "a", "text"', "is the file truncated?"),
    ],
)
def test_a_bad_xquad_file_names_the_place(tmp_path, content, said):
    line = str(
        pytest.raises(
            InputError, lambda: list(documents.read(written(tmp_path, "a.json", content)))
        ).value
    )
    assert said in line and "a.json" in line and "\n" not in line


# Any file


@pytest.mark.parametrize(
    "name, content, form",
    [
        ("a", dump(page(1)), "mediawiki"),
        ("a.bz2", bz2.compress(dump(page(1)).encode()), "mediawiki"),
        ("a", '{"title": "a", "text": "b"}', "jsonl"),
        ("a.json", '{"title": "a", "text": "b"}\n{"title": "a", "text": "b"}', "jsonl"),
        ("a.ndjson.gz", gzip.compress(b'{"title": "a", "text": "b"}', mtime=0), "jsonl"),
        ("a", '\n[{"title": "a", "text": "b"}]', "xquad"),
        (
            "a.json",
            '{ "data": [{"title": "a", "paragraphs": [{"context": "b", "qas": []}]}]}',
            "xquad",
        ),
        ("a", f"\n = A = \n\n{PARAGRAPH}", "wikitext"),
        ("a.tokens", f"{PARAGRAPH}\n\n = A = \n\n{PARAGRAPH}", "wikitext"),
    ],
)
def test_the_form_is_told_by_name_and_beginning(tmp_path, name, content, form):
    path = written(tmp_path, name, content)
    told = list(documents.read(path))
    assert told and told == list(documents.read(path, form))


def test_an_unfit_file_is_refused_at_once(tmp_path):
    for name, content, said in [
        ("empty.jsonl", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.xml.bz2", bz2.compress(b""), "is empty"),
        ("binary.jsonl", bytes(range(256)), "is a binary file"),
        ("latin.txt", "é".encode("latin-1") * 99, "byte 0 is not UTF-8"),
        ("a.xml.bz2", dump(page(1)).encode(), "is no bz2 archive, though named one"),
        ("a.jsonl.gz", bz2.compress(b"{}"), "is no gz archive"),
        (
            "b.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:9],
            "is cut in the middle, before its first document ends",
        ),
        ("prose.md", b"Some prose.", "neither its name nor its beginning tells its form"),
    ]:
        path = written(tmp_path, name, content)
        line = str(pytest.raises(InputError, documents.read, path).value)
        assert line.startswith(f"{path}: ") and said in line and "\n" not in line
    assert "cannot be read (No such file" in str(
        pytest.raises(InputError, documents.read, tmp_path / "no.jsonl").value
    )
    assert "is a directory" in str(pytest.raises(InputError, documents.read, tmp_path).value)
    assert "did you mean 'wikitext'?" in str(
        pytest.raises(InputError, documents.read, path, "wikitxt").value
    )


def test_a_character_on_the_edge_of_the_beginning_is_no_fault(tmp_path):
    for shift in range(4):
        row = json.dumps({"title": "a" * shift, "text": "€" * 9000}, ensure_ascii=False).replace(
            '""', '"b"'
        )
        assert texts(written(tmp_path, "a.jsonl", row)) == ["€" * 9000]


def test_two_documents_with_one_id_are_refused_with_both_places(tmp_path):
    rows = [{"id": id, "title": "a", "text": "b"} for id in ("x", "y", "x")]
    lines = "\n".join(map(json.dumps, rows))
    one, two = (
        written(tmp_path, "one.jsonl", lines),
        written(tmp_path, "two.xml", dump(page(1), page(2))),
    )
    line = str(pytest.raises(InputError, documents.gather, [two, one]).value)
    assert line == f"{one}: line 3: the id 'x' is taken by {one}: line 1; expected ids used once"
    (tmp_path / "b").mkdir()
    again = written(tmp_path / "b", "three.xml", dump(page(3), page(2)))
    line = str(pytest.raises(InputError, documents.gather, [two, again]).value)
    assert f"{again}: page 2 (id 2)" in line and f"{two}: page 2 (id 2)" in line


def test_gathered_documents_stand_in_the_order_of_their_files(tmp_path):
    one = written(tmp_path, "one.jsonl", '{"title": "a", "text": "b"}')
    two = written(tmp_path, "two.xml", dump(page(1), page(2, "Short.")))
    tally = Counter()
    assert [found.id for found in documents.gather([two, str(one)], tally)] == ["1", "one-0"]
    assert tally == {"stubs": 1}
    assert len(documents.gather(str(one))) == 1
    with pytest.raises(InputError, match="expected at least one file"):
        documents.gather([])


@pytest.mark.parametrize("form, few", [("mediawiki", 100), ("jsonl", 100), ("wikitext", 40)])
def test_memory_does_not_grow_with_the_file(tmp_path, form, few):
    found = documents.growth((few, 8 * few), tmp_path, form)
    assert list(found.columns) == ["documents", "file_mib", "peak_mib", "seconds"]
    assert list(found.documents) == [few, 8 * few]
    assert found.file_mib[1] > 7.9 * found.file_mib[0]
    assert found.peak_mib[1] < 1.2 * found.peak_mib[0]
    assert found.peak_mib[1] < found.file_mib[1] / 8
    assert not list(tmp_path.iterdir())


def test_no_file_is_made_up_of_a_form_that_is_read_whole(tmp_path):
    with pytest.raises(InputError, match="'xquad'"):
        documents.growth((1,), tmp_path, "xquad")


# The real files


@pytest.fixture(scope="module")
def wikipedia():
    folder = os.environ.get("UKE_DATA")
    if not folder:
        pytest.skip("UKE_DATA is not set; it names the folder of the benchmark files")
    return Path(folder) / "wikipedia"


def test_real_wikitext_reads_as_prose(wikipedia):
    tally = Counter()
    found = list(documents.read(wikipedia / "wikitext2_valid.txt", tally=tally))
    assert len(found) == 1455 and tally == {"paragraphs of fewer than 40 words": 386}
    assert sum(one.named for one in found) == 621
    # 60 articles, of which several are called "<unk> <unk>" or "<unk>".
    articles = [
        one.title
        for one, before in zip(found, [None, *found])
        if before is None or one.title != before.title
    ]
    assert len(articles) == 60 and len(set(articles)) == 56
    joined = "\n".join(one.text for one in found)
    for trace in (" @-@", "@,@", "@.@", " , ", " . ", " ; ", "( ", " )", " 's ", " 't "):
        assert trace not in joined, trace
    assert 'lobsters are blue, only becoming "lobster red" on cooking.' in found[0].text
    assert (
        found[0].heading == "Homarus gammarus"
        and found[1].heading == "Homarus gammarus: Description"
    )
    assert (
        "2011–12 Michigan Wolverines men's basketball team" in articles
        and "M-82 (Michigan highway)" in articles
    )


def test_real_xquad_paragraphs_come_with_their_questions(wikipedia):
    found = list(documents.read(wikipedia / "xquad_en_paragraphs.json"))
    assert len(found) == 120 and len({one.title for one in found}) == 48
    assert all(one.questions and one.named for one in found)
    assert found[0].questions[0] == ("How many points did the Panthers defense surrender?", "308")
    assert all(answer in one.text for one in found for _, answer in one.questions)


def test_the_real_files_gather_into_one_collection(wikipedia):
    found = documents.gather(
        [wikipedia / "wikitext2_valid.txt", wikipedia / "xquad_en_paragraphs.json"]
    )
    assert len(found) == len({one.id for one in found}) == 1575
