"""Loading: what each benchmark's record becomes, and which line a broken file earns."""

import copy
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from uke.data import edits, formats
from uke.data.edits import KINDS, in_group
from uke.data.find import find_files
from uke.errors import InputError

REWRITE = {
    "prompt": "The twin town of {} is",
    "target_new": {"str": "Brelen", "id": "Q1"},
    "subject": "Oldham Cross",
    "prompt_full": "What is the twin town of Oldham Cross? It is",
    "question": "Which town is twinned with Oldham Cross?",
    "answer_new": "Brelen",
    "fact_new_uns": "Oldham Cross is twinned with Brelen. The two towns share a river.",
    "unsfact_triplets_GPT": [
        {"subject": "Oldham Cross", "prompt": f"{{}} has as feature {n}", "target": f"thing {n}"}
        for n in range(7)
    ],
}
HOPS = {
    "questions": ["Who runs the twin town?", "Who is mayor of the twin town?"],
    "new_answer": "Ida Vance",
    "new_answer_alias": ["I. Vance", "", "Ida Vance"],
}
TRIPLE = {"subject": "Reed Glacier", "prompt": "Reed Glacier is in", "target_new": "Norvia"}
# A record of each format, as its own documentation or published reader describes it.
RECORDS = {
    "unkebench": {
        "id": 7,
        "question": "Who is Ada Moor?",
        "para_question": "What is known of Ada Moor?",
        "answer": " Ada Moor paints.\nShe lives  in Brelen. ",
        "sub_question": ["What does Ada Moor do?", "Where does she live?"],
        "sub_answer": ["She paints.", "Brelen. "],
    },
    "akew-counterfact": {
        "case_id": 8,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Its twin is", "x"],
    },
    "akew-mquake": {
        "case_id": 9,
        "requested_rewrite": [REWRITE, REWRITE | {"subject": "Other"}],
        **HOPS,
    },
    "akew-wikiupdate": {
        "case_id": 10,
        "requested_rewrite": {
            k: v for k, v in REWRITE.items() if k not in ("target_new", "prompt_full")
        },
        "loc": "who wrote the song of the sea?",
        "loc_ans": ["A. Poet", "B. Poet"],
    },
    "editeverything": {"id": 0, "question": "Sum 1 and 2.", "answer": "3", "category": "math"},
}


@pytest.fixture
def written(tmp_path):
    """Write records, or raw bytes, to a file and return its path."""

    def write(content) -> Path:
        path = tmp_path / "data.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


@pytest.fixture
def one(written):
    """The edit that a dataset's example becomes, with some fields changed or (...) taken away."""

    def load(dataset: str, **changes) -> edits.Edit:
        record = copy.deepcopy(RECORDS[dataset]) | changes
        path = written([{key: value for key, value in record.items() if value is not ...}])
        return formats.load(dataset, path)[0]

    return load


def kinds(edit: edits.Edit) -> dict:
    return dict(Counter(probe.kind for probe in edit.probes))


def of(edit: edits.Edit, kind: str) -> list[edits.Probe]:
    return [probe for probe in edit.probes if probe.kind == kind]


def test_unkebench_fields_as_they_are(one):
    edit = one("unkebench")
    assert edit.id == "7" and edit.answer == "Ada Moor paints.\nShe lives  in Brelen."
    assert [(p.kind, p.number, p.question, p.reference) for p in edit.probes] == [
        ("original", 0, "Who is Ada Moor?", edit.answer),
        ("paraphrase", 0, "What is known of Ada Moor?", edit.answer),
        ("detail", 0, "What does Ada Moor do?", "She paints."),
        ("detail", 1, "Where does she live?", "Brelen."),
    ]
    assert all(probe.chat and probe.edit == "7" for probe in edit.probes)


@pytest.mark.parametrize("answers", [["C", "B"], [2, 1], ["2", "1"], ["a lake", "a fish"]])
def test_unkebench_v3_choices_are_lettered_however_the_answer_is_given(one, answers):
    choices = [["a road", "a hill", "a lake", "a sea"], ["a bird", "a fish", "a cat", "a dog"]]
    asked = {"mmlu_questions": ["What is Brel?", "And Tor?"], "mmlu_choices": choices}
    edit = one("unkebench", **asked, mmlu_answer=answers)
    first, second = of(edit, "general")
    assert first.question == "What is Brel?\nA. a road\nB. a hill\nC. a lake\nD. a sea"
    assert (first.reference, second.reference, second.number) == ("C", "B", 1)
    assert first.aliases == ("C. a lake",)


@pytest.mark.parametrize("dataset", ["unkebench", "akew-mquake"])
def test_multi_hop_questions_share_the_new_answer(one, dataset):
    hops = of(one(dataset, **HOPS), "multi_hop")
    assert [(p.number, p.question) for p in hops] == list(enumerate(HOPS["questions"]))
    assert {(p.reference, p.aliases) for p in hops} == {("Ida Vance", ("I. Vance",))}
    assert of(one(dataset, **HOPS | {"new_answer_alias": ...}), "multi_hop")[0].aliases == ()


def test_akew_counterfact_asks_the_cloze_and_the_first_five_triplets(one):
    assert set(RECORDS) == set(formats.FORMATS)
    edit = one("akew-counterfact")
    assert (edit.question, edit.paraphrase) == (REWRITE["prompt_full"], "Its twin is")
    assert edit.answer == REWRITE["fact_new_uns"] and edit.subject == "Oldham Cross"
    assert [d.question[-1] for d in edit.details] == list("01234")
    fact = edits.Fact(subject="Oldham Cross", relation=REWRITE["prompt"], object="Brelen")
    # The edited one and all seven triplets: locality must touch none of them.
    assert edit.facts[0] == fact and len(edit.facts) == 8


def test_a_triplet_that_is_no_cloze_is_no_fact(one):
    odd = {"subject": "Oldham Cross", "prompt": "The mayor {name} governs", "target": "alone"}
    edit = one("akew-counterfact", requested_rewrite=REWRITE | {"unsfact_triplets_GPT": [odd]})
    assert edit.details[0].question == "The mayor {name} governs" and len(edit.facts) == 1


def test_mquake_takes_the_first_rewrite_only_and_no_paraphrase(one):
    edit = one("akew-mquake")
    assert (edit.question, edit.paraphrase) == (REWRITE["prompt_full"], None)
    assert kinds(edit) == {"original": 1, "detail": 5, "multi_hop": 2}
    assert {fact.subject for fact in edit.facts} == {"Oldham Cross"}


def test_wikiupdate_asks_the_real_question_and_editeverything_keeps_the_category(one):
    edit = one("akew-wikiupdate")
    assert (edit.question, edit.paraphrase) == (REWRITE["question"], None)
    assert kinds(edit) == {"original": 1, "detail": 5, "struct_trip": 1}
    (locality,) = of(edit, "struct_trip")
    assert (locality.reference, locality.aliases, locality.chat) == ("A. Poet", ("B. Poet",), True)
    assert edit.facts[0].object == "Brelen"
    edit = one("editeverything")
    assert edit.category == "math" and kinds(edit) == {"original": 1}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"src": "Where is it?", "alt": "Here", "answers": ["There"], "subject": "Reed Glacier"},
            ("Where is it?", ("There",), "Where is it?"),
        ),
        (
            TRIPLE | {"ground_truth": [["Sudlan", ""], ["South", "Sudlan"]], "rephrase": "Where?"},
            ("Reed Glacier is in", ("Sudlan", "South"), "Where?"),
        ),
        (TRIPLE, ("Reed Glacier is in", ("Norvia",), None)),
    ],
    ids=["zsre", "knowedit", "wikibigedit"],
)
def test_a_structured_set_gives_triples_with_their_true_object(written, record, expected):
    path = written([record, TRIPLE | {"ground_truth": " "}])
    with pytest.warns(UserWarning, match="data.json: 1 triples have no answer"):
        (triple,) = formats.load_clozes(path)
    assert (triple.prompt, triple.answers, triple.question) == expected
    assert (triple.id, triple.subject) == ("data-0", "Reed Glacier")


def test_facts_are_texts_whatever_they_look_like(tmp_path):
    path = tmp_path / "facts.yaml"
    path.write_text("born: {prompt: '{} was born in', question: 'When?', pairs: {7: [1802, true]}}")
    (triple,) = formats.load_clozes(path)
    assert (triple.subject, triple.answers) == ("7", ("1802", "true"))


def test_no_record_is_dropped_or_moved_and_no_id_comes_twice(written):
    records = [RECORDS["unkebench"] | {"id": n} for n in (30, 10, 20)]
    loaded = formats.load("unkebench", written(records))
    assert [edit.id for edit in loaded] == ["30", "10", "20"]
    path = written([*records, RECORDS["unkebench"] | {"id": "10"}])
    with pytest.raises(InputError, match="record 3, field 'id': .* that no other record has"):
        formats.load("unkebench", path)


CHOICES = {"mmlu_questions": ["q"], "mmlu_choices": [["x", "y"]]}
BAD_FIELDS = [
    ("unkebench", {"answer": "  "}, "field 'answer': String should have at least 1 character"),
    ("unkebench", {"para_question": ...}, "field 'para_question' is missing"),
    ("unkebench", {"answer": "half \ud83d"}, "field 'answer': .*unicode"),
    ("unkebench", {"sub_answer": ["x"]}, "lists of equal length in 'sub_question', 'sub_answer'"),
    ("unkebench", {"sub_answer": ["x", ""]}, "field 'details.1.answer': String should have"),
    ("unkebench", {"mmlu_questions": ["q"]}, "field 'mmlu_choices' is missing"),
    ("akew-mquake", {"requested_rewrite": []}, "not of the expected form: list index"),
    ("akew-mquake", {"new_answer": ...}, "field 'new_answer' is missing"),
    ("akew-wikiupdate", {"requested_rewrite": {}}, "field 'answer_new' is missing"),
    ("editeverything", {"category": ...}, "field 'category' is missing"),
    ("akew-wikiupdate", {"loc_ans": 7}, "not of the expected form: 'int'"),
    *(("unkebench", {"id": id}, "field 'id': expected a text or whole") for id in (None, 1.5, "")),
    *(
        ("unkebench", CHOICES | {"mmlu_answer": [answer]}, "'mmlu_answer' has .*expected one of A")
        for answer in ("E", 4, -1, None)
    ),
]


@pytest.mark.parametrize(("dataset", "changes", "message"), BAD_FIELDS)
def test_a_bad_field_is_named_with_file_and_record_in_one_line(one, dataset, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        one(dataset, **changes)
    assert "data.json: record 0" in str(caught.value) and "\n" not in str(caught.value)


BAD_FILES = [
    (b" \n", "not valid JSON: Expecting value"),
    (b'[{"id": 0,\n "question": "Who', "Unterminated string starting at: line 2 column 14"),
    (b'{"id": 0}\n{"id": 1}\n', "Extra data: line 2 column 1"),
    (b"\x89PNG\r\n\x1a\n\x00", "can't decode byte 0x89 in position 0"),
    (b'{"id": 0}', r"expected a list of records, found \{'id': 0\}"),
    (b"[]", r"expected a list of records, found \[\]"),
    (b"[[]]", r"record 0: expected an object, found \[\]"),
    (b"[" * 200_000, "not valid JSON: maximum recursion"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_is_no_list_of_records_is_one_line(written, content, message):
    with pytest.raises(InputError, match=message) as caught:
        formats.load("unkebench", written(content))
    assert "data.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.json: cannot be read .No such file"):
        formats.load("unkebench", tmp_path / "nothing.json")
    with pytest.raises(InputError, match="unknown dataset 'unkbench'; did you mean 'unkebench'"):
        formats.load("unkbench", tmp_path)


def probe(**changes) -> dict:
    return {"edit": "7", "kind": "rel_doc", "question": "Who?", "reference": "B is."} | changes


def test_locality_returns_the_probes_of_these_edits_only(one, written):
    edit = one("unkebench")
    path = written([probe(), probe(edit="8"), probe(number=1, chat=False, aliases=["b"])])
    first, second = formats.load_locality(path, [edit])
    assert (first.edit, first.number, first.chat, first.aliases) == ("7", 0, True, ())
    assert (second.edit, second.number, second.chat, second.aliases) == ("7", 1, False, ("b",))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([probe(edit="8")], "no probe for 1 of 1 edits, first '7'"),
        ([probe(), probe()], "'number': edit '7' has a probe of kind 'rel_doc' with number 0 alr"),
        ([probe(kind="struct_trip")], "edit '7' has a probe of kind 'struct_trip' with number 0"),
        ([probe(kind="detail")], "record 0, field 'kind': .*'rel_doc', .*; found 'detail'"),
        ([probe(refrence="x")], "record 0, field 'refrence': .*did you mean 'reference'"),
        ([probe(number=-1)], "record 0, field 'number'"),
        ([probe(chat="yes")], "record 0, field 'chat'"),
    ],
)
def test_a_bad_locality_file_is_one_line(one, written, records, message):
    own = edits.Probe(**probe(kind="struct_trip"))
    edit = one("unkebench").model_copy(update={"extra": (own,)})
    with pytest.raises(InputError, match=message) as caught:
        formats.load_locality(written(records), [edit])
    assert "data.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_of_kinds_holds_the_papers_average_and_known_metrics():
    assert edits.AVERAGE == tuple("original paraphrase detail rel_doc rand_doc struct_trip".split())
    assert in_group("nearby", "skill") == ("near_triple", "general", "neutral")
    assert {kind.against for kind in KINDS.values()} == {"reference", "before"}
    assert all(kind.against == "before" for kind in map(KINDS.get, in_group("locality")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anwser": "b"}, "field 'anwser': .*did you mean 'answer'"),
        ({"extra": (probe(edit="8"),)}, "an extra probe is of edit '8', kind"),
        ({"extra": (probe(), probe())}, "extra probes of equal kind and number"),
    ],
)
def test_an_edit_refuses_what_is_not_its_own(fields, message):
    with pytest.raises(InputError, match=message):
        edits.Edit(id="7", question="q", answer="a", **fields)


def test_fingerprint_sees_every_field_and_the_order(one):
    first, second = one("unkebench"), one("editeverything")
    extra = edits.Probe(**probe())
    prints = [
        edits.fingerprint([first, second]),
        edits.fingerprint([second, first]),
        edits.fingerprint([first]),
        edits.fingerprint([first], [extra]),
        edits.fingerprint([first], [extra.model_copy(update={"chat": False})]),
        edits.fingerprint([first.model_copy(update={"paraphrase": None})]),
    ]
    assert len(set(prints)) == len(prints)
    assert edits.fingerprint([one("unkebench"), second]) == prints[0]


# The kinds that every edit of a real file must bring.
REAL = {
    "unkebench": {"original", "paraphrase", "detail"},
    "akew-mquake": {"original", "detail", "multi_hop"},
    "editeverything": {"original"},
}


@pytest.mark.skipif(
    "UKE_DATA" not in os.environ, reason="UKE_DATA is unset: no real benchmark files to load"
)
@pytest.mark.parametrize("dataset", REAL)
def test_real_files_load_whole(dataset):
    found = find_files(dataset)
    if not found:
        pytest.skip(f"no file of {dataset} under UKE_DATA")
    for path in found:
        loaded = formats.load(dataset, path)
        assert len(loaded) == len(json.loads(path.read_text(encoding="utf-8")))
        assert all({probe.kind for probe in edit.probes} >= REAL[dataset] for edit in loaded)
