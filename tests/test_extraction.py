"""Whether two texts share a fact: every such pair is found, and nothing else than a fact counts as one."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest
from uke.data import edits, formats
from uke.errors import InputError
from uke.locality.facts import (
    EXTRACTORS,
    Triple,
    agreement,
    edit_facts,
    facts,
    normal,
    shared,
    spoken,
    stated,
    union,
)

offline = EXTRACTORS["offline"]()
AKEW = "akew/MQuAKE-CF_first177.json"
UNKEBENCH = "unkebench/final_data_v2_first500.json"


def told(text, names=()):
    return facts(text, offline(text), names)


def common(one, other):
    return shared(told(one), told(other))


def benchmark(dataset, file):
    """The edits of a real file; the test is skipped where it is not at hand."""
    folder = os.environ.get("UKE_DATA")
    if not folder:
        pytest.skip("UKE_DATA is unset: no real benchmark files to read")
    if not (Path(folder) / file).is_file():
        pytest.skip(f"no {file} under UKE_DATA")
    return formats.load(dataset, Path(folder) / file)


# What is a name.


@pytest.mark.parametrize(
    "name",
    [
        "",
        "—",
        "the",
        "In",
        "us",
        "It",
        "His",
        "May",
        "may",
        "In May",
        "on Monday",
        "5 May",
        "May 5th",
        "the first",
        "2nd",
        "1",
        "25",
        "3.5",
        "1000",
        "two",
        "over a decade",
        "25 years",
        "the 16th century",
        "H",
        "The city",
        "Prime Minister",
        "Yes",
        "World",
        "43 BC",
    ],
)
def test_what_names_nothing_is_no_name(name):
    assert normal(name) == ""


@pytest.mark.parametrize(
    "name, form",
    [
        ("The United  States", "united states"),
        ("U.S.", "united states"),
        ("US", "united states"),
        ("World War II", "world war ii"),
        ("Ellie Kemper's", "ellie kemper"),
        ("Theresa May", "theresa may"),
        ("April Smith", "april smith"),
        ("the UK", "united kingdom"),
        ("Saint-Denis", "saint denis"),
        ("“The Last Stand.”", "last stand"),
        ("Dr. Rosa Luz", "rosa luz"),
        ("Professor X", "professor x"),
        ("Of Mice and Men", "of mice and men"),
        ("In 2016", "2016"),
        ("President Obama", "Obama"),
        ("São Paulo", "sao paulo"),
        ("On June 12th, 1985", "june 12 1985"),
        ("ＮＡＳＡ", "Nasa"),
        ("Łódź", "Lodz"),
        ("O’Brien", "Obrien"),
        ("J. R. R. Tolkien", "jrr tolkien"),
        ("300 aircraft", "300 aircraft"),
        ("1,613", "1613"),
        ("cricket", "cricket"),
        ("Cricket", "Cricket"),
        ("iPhone", "Iphone"),
        ("东京", "东京"),
    ],
)
def test_normal_form(name, form):
    assert normal(name) == form


# What is found: the same names in other words.

SAME = {
    "Ellie Kemper": [
        "Ellie Kemper",
        "Ellie Kemper's",
        "ELLIE KEMPER",
        "“Ellie Kemper”",
        "(Ellie Kemper)",
        "Miss Ellie Kemper",
    ],
    "Łukasz Żółć": ["Łukasz Żółć", "Lukasz Zolc", "Łukasz\u00a0Żółć"],
    "J. R. R. Tolkien": ["J. R. R. Tolkien", "J.R.R. Tolkien"],
    "the United States": ["the United States", "the U.S.", "the USA"],
    "Patrick O'Brien": ["Patrick O'Brien", "Patrick O’Brien", "O'Brien"],
    "Theresa May": ["Theresa May", "Theresa May's"],
    "The Secret Life of the American Teenager": ["“The Secret Life of the American Teenager”"],
    "Friedrich Carl von Savigny": ["Friedrich Carl von Savigny", "Savigny"],
    "High Court": ["the High Court"],
    "Seven Silent Copper Machines Dream Alone": ["“Seven Silent Copper Machines Dream Alone”"],
    "Ó hUiginn": ["Ó hUiginn", "O hUiginn"],
}
STATED = ["In 1903 {} won a prize for chess.", "{}, a baker, was praised by critics."]
REWORDED = [
    "Few recall that {} lived through the flood.",
    "A street is named after {}.",
    "{} is said twice.",
    "Rivals of {}, they lost.",
]


@pytest.mark.parametrize(
    "name, other", [(name, other) for name, others in SAME.items() for other in others]
)
def test_a_name_is_found_in_other_words(name, other):
    for first, second in itertools.product(STATED, REWORDED):
        assert common(first.format(name), second.format(other)), (first, second)


@pytest.mark.parametrize(
    "other", ["June 12, 1985", "12 June 1985", "June 12th, 1985", "12th of June, 1985", "1985"]
)
def test_a_date_is_found_in_other_orders(other):
    assert common(
        "Ada Quist was born on June 12, 1985.",
        f"The bridge fell on {other}, in fog." if other != "1985" else "It fell in 1985.",
    )


def test_a_common_noun_counts_where_it_is_given_as_a_name():
    passage = told("The rules of cricket changed slowly.")
    stating = [Triple("Balmora Club", "plays", "cricket")]
    assert shared(facts("Balmora Club plays cricket.", stating, ["cricket"]), passage) == {
        "cricket"
    }
    assert not shared(facts("Balmora Club plays cricket.", stating), passage)


def test_an_answer_is_written_as_its_text_writes_it():
    answers = facts(
        "He often speaks about political issues.", (), ["Political issues.", "Genetics"]
    )
    assert "political issues" in answers.names and "Genetics" in answers.names
    assert not shared(
        facts("He left Yale for Brown; his hair is brown.", (), ["Brown"]),
        told("It has brown hair."),
    )


def test_an_uncased_question_names_all_the_same():
    assert shared(told("Croatia is home to many."), told("nq question: who governs croatia"))


def test_the_parts_of_a_clause_are_names_and_the_clause_is_a_pair():
    stating = facts(
        "",
        [
            Triple(
                "Kemper",
                "is known for",
                "her roles in popular television shows and films in Helsinki, Finland",
            )
        ],
    )
    assert {"Helsinki", "Finland", "Kemper"} <= stating.names and max(
        len(name.split()) for name in stating.names
    ) <= 5
    again = facts(
        "",
        [
            Triple(
                "Someone",
                "was well known for",
                "Her roles in popular television shows and films in Helsinki, Finland",
            )
        ],
    )
    assert any(isinstance(one, tuple) for one in shared(stating, again))


def test_every_name_of_a_text_is_a_name_of_its_facts():
    text = (
        'Ovid, born in Sulmona, wrote "Metamorphoses" and moved to Tomis in 8 AD. Horace of Venosa? Pliny the Elder and Livia Drusilla '
        "knew him. Bank of Rome: 12,345 coins. With Simon & Garfunkel, Jay-Z, and Boeing 737 MAX he has no ties; nor with E.T. or eBay."
    )
    expected = {
        "Ovid",
        "Sulmona",
        "Metamorphoses",
        "Tomis",
        "Horace of Venosa",
        "Venosa",
        "Pliny",
        "Elder",
        "Livia Drusilla",
    }
    expected |= {
        "Bank of Rome",
        "12,345",
        "Simon",
        "Garfunkel",
        "Jay-Z",
        "Boeing 737 MAX",
        "E.T.",
        "eBay",
    }
    assert {normal(name) for name in expected} <= told(text).names


# What is not found: a filter that rejects for these would leave no document.


@pytest.mark.parametrize(
    "one, other",
    [
        ("Theresa May resigned in Marlow.", "It rained in May and may rain again. May is warm."),
        ("However, the U.S. Senate met. The US voted.", "They told us, and us only."),
        (
            "In the beginning, Ada Quist sang. The song was long.",
            "In the end, the river rose. The bank was lost.",
        ),
        (
            "Critics praised Ada Quist. Finally, critics left.",
            "Finally, the critics of the plan left. Critics are many.",
        ),
        ("Ann Rome opened a shop.", "Anna and Romeo met in romantic Annapolis."),
        ("Gordon Brown spoke. Brown smiled.", "The brown bear has brown fur."),
        (
            "Ada Quist won the first prize on Monday, 1 of 25.",
            "The first Monday brought 1 of the 25 boats, in March.",
        ),
        ("Ada Quist served the city for over two decades.", "The city grew for over two decades."),
        ("Ada Quist is a member of the council.", "She was a member of the council."),
        ("She was the President of Balmora University.", "The President of the University left."),
        (
            "Bram Vik gave money away. It is on the free Sunday.",
            "Ada Quist gave money away. Each free Sunday is long.",
        ),
        ("The American writer Ada Quist wrote.", "An American bear is black."),
        ("Ada Quist lives in Balmora.", "Petra Vik was born in Seyda."),
    ],
)
def test_no_fact_is_shared(one, other):
    assert not common(one, other), common(one, other)


def test_texts_without_names_share_nothing():
    empty = told("")
    for text in (
        "",
        " \n ",
        "...",
        "it rained and it may rain again.",
        "\"\"'''((",
        "Ada Quist lives in Balmora.",
    ):
        assert not shared(told(text), empty) and not shared(empty, told(text))
    assert told("it rained and it may rain again.").names == frozenset()
    assert offline("") == [] and union([]) == empty


TEXTS = [
    "Croatia, a country in Europe, is home to Ellie Kemper.",
    "Kemper was born in Kansas City, Missouri.",
    "Missouri borders Kansas. In 1998 it flooded.",
    "The flood of 1998 is unforgotten in Europe.",
    "It rained.",
]


def test_sharing_is_symmetric_and_a_union_shares_what_its_parts_share():
    every = [told(text) for text in TEXTS]
    for one, other in itertools.product(every, every):
        assert shared(one, other) == shared(other, one)
    for one in every:
        assert shared(union(every[:3]), one) == frozenset().union(
            *(shared(part, one) for part in every[:3])
        )
    assert [bool(shared(every[0], one)) for one in every] == [True, True, False, True, False]


# The triples themselves.


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "Marc Cherry, a renowned writer, was born in Long Beach.",
            ("Marc Cherry", "was born in", "Long Beach"),
        ),
        (
            "Marc Cherry, a renowned writer, was born in Long Beach.",
            ("Marc Cherry", "is", "a renowned writer"),
        ),
        (
            "Marc Cherry wrote plays. He is best known for creating a series.",
            ("Marc Cherry", "is best known for creating", "a series"),
        ),
        (
            "LATAM Chile flies. Founded in 1929, the airline has grown.",
            ("LATAM Chile", "Founded in", "1929"),
        ),
        (
            "Ray began. Despite his illness, Ray continues to direct films in India.",
            ("Ray", "continues to direct", "films in India"),
        ),
        ("Leo lives in Rome, which was founded by Romulus.", ("Rome", "was founded by", "Romulus")),
        (
            "Ada Quist worked as a political figure.",
            ("Ada Quist", "worked as", "a political figure"),
        ),
        (
            "The sport of cricket has its origins in Dutch towns.",
            ("The sport of cricket", "has", "its origins in Dutch towns"),
        ),
        ("A fleet, e.g. that of Ada Quist.", ("Ada Quist", "", "Ada Quist")),
    ],
)
def test_offline_triples(text, expected):
    assert Triple(*expected) in offline(text)


LONG = {
    "sentences": "Ada Quist met Bram Vik in Balmora. " * 4000,
    "list": "Bram Vik visited " + ", ".join(f"City{number}" for number in range(20000)),
    "names": "Ada " * 50000,
    "quotes": 'a "' * 50000,
    "words": "of " * 50000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_very_long_text_takes_no_longer_than_its_length_asks(text):
    start = time.process_time()
    facts(text, offline(text))
    assert time.process_time() - start < 10


def test_many_passages_are_quick():
    passage = "In {0}, Ada Quist{0} moved from Balmora{0} to Seyda and founded a school. "
    passages = [passage.format(1000 + number) * 7 for number in range(250)]
    start = time.process_time()
    many = [told(passage) for passage in passages]
    together = union(many[:60])
    assert sum(bool(shared(together, one)) for one in many) == 250
    assert (
        time.process_time() - start < 5
    )  # 250 of the 2,500 texts of a real run, for which 5 s is the aim, on a slow machine


# Agreement with reference triples.


def test_agreement_counts_triples_and_phrases():
    reference = [
        [
            Triple("Ellie Kemper", "is a citizen of", "Croatia"),
            Triple("Ellie Kemper", "was born in", "Kansas City, Missouri"),
        ],
        [],
    ]
    predicted = [
        [
            Triple("Kemper", "born in", "Kansas City"),
            Triple("Missouri", "is", "a state"),
            Triple("Ellie Kemper", "", "Croatia"),
        ],
        [Triple("Ovid", "wrote", "poems")],
    ]
    found = agreement(predicted, reference)
    assert found["precision"].mean == pytest.approx(
        1 / 3
    )  # of three with a relation, the first: 2 of 3 words, F1 0.8
    assert found["recall"].mean == pytest.approx(1 / 2)
    assert found["entity_recall"].mean == 1  # Ellie Kemper, Croatia, Kansas City Missouri
    # Of Kemper, Kansas City, Missouri, a state, Ellie Kemper, Croatia, Ovid, poems: Kemper (F1 2/3), Kansas City, Missouri (1/2), ...
    assert found["entity_precision"].mean == pytest.approx(5 / 8)
    assert found["precision"].n == 2 and found["recall"].n == 1
    assert agreement(reference[:1], reference[:1])["precision"].mean == 1
    with pytest.raises(ValueError):
        agreement(predicted, reference[:1])


def test_an_edit_states_its_facts_and_names_its_details():
    edit = edits.Edit(
        id="1",
        question="What does Balmora Club play?",
        answer="Balmora Club plays cricket in Seyda.",
        subject="Balmora Club",
        facts=(
            {"subject": "Balmora Club", "relation": "{} is associated with", "object": "cricket"},
        ),
        details=({"question": "Where?", "answer": "In a large meadow."},),
    )
    assert stated(edit) == [Triple("Balmora Club", "is associated with", "cricket")]
    found = edit_facts(edit, offline)
    assert {"balmora club", "cricket", "Seyda", "large meadow"} <= found.names and (
        "balmora club",
        "associated with",
    ) in found.pairs


# spaCy: the rules on parsed texts; the model itself is the user's.


def parsed(rows, entities=()):
    """A real Doc from (word, head, dependency, part of speech) rows."""
    tokens = pytest.importorskip("spacy.tokens")
    vocab = pytest.importorskip("spacy.vocab").Vocab()
    text, heads, deps, pos = zip(*rows)
    doc = tokens.Doc(vocab, words=list(text), heads=list(heads), deps=list(deps), pos=list(pos))
    doc.ents = [tokens.Span(doc, start, end, label="NAME") for start, end in entities]
    return doc


def test_spacy_triples_of_a_passive_with_apposition_and_coordination():
    doc = parsed(
        [
            ("Marie", 1, "compound", "PROPN"),
            ("Curie", 7, "nsubjpass", "PROPN"),
            (",", 1, "punct", "PUNCT"),
            ("a", 4, "det", "DET"),
            ("physicist", 1, "appos", "NOUN"),
            (",", 1, "punct", "PUNCT"),
            ("was", 7, "auxpass", "AUX"),
            ("born", 7, "ROOT", "VERB"),
            ("in", 7, "prep", "ADP"),
            ("Warsaw", 8, "pobj", "PROPN"),
            ("and", 7, "cc", "CCONJ"),
            ("discovered", 7, "conj", "VERB"),
            ("polonium", 11, "dobj", "NOUN"),
            ("and", 12, "cc", "CCONJ"),
            ("radium", 12, "conj", "NOUN"),
            (".", 7, "punct", "PUNCT"),
        ],
        [(0, 2), (9, 10)],
    )
    expected = [
        ("is", "a physicist"),
        ("was born in", "Warsaw"),
        ("discovered", "polonium"),
        ("discovered", "radium"),
    ]
    assert spoken(doc) == [Triple("Marie Curie", *rest) for rest in expected]


def test_spacy_triples_of_pronouns_relative_clauses_and_agents():
    doc = parsed(
        [
            ("Ada", 1, "nsubj", "PROPN"),
            ("sang", 1, "ROOT", "VERB"),
            (".", 1, "punct", "PUNCT"),
            ("She", 5, "nsubj", "PRON"),
            ("has", 5, "aux", "AUX"),
            ("worked", 5, "ROOT", "VERB"),
            ("for", 5, "prep", "ADP"),
            ("Vivec", 8, "compound", "PROPN"),
            ("Works", 6, "pobj", "PROPN"),
            (",", 8, "punct", "PUNCT"),
            ("which", 12, "nsubjpass", "PRON"),
            ("was", 12, "auxpass", "AUX"),
            ("founded", 8, "relcl", "VERB"),
            ("by", 12, "agent", "ADP"),
            ("Bram", 13, "pobj", "PROPN"),
            (".", 5, "punct", "PUNCT"),
            ("Oslo", 16, "ROOT", "PROPN"),
            (".", 16, "punct", "PUNCT"),
        ],
        [(0, 1), (7, 9), (14, 15), (16, 17)],
    )
    assert set(spoken(doc)) == {
        Triple("Ada", "has worked for", "Vivec Works"),
        Triple("Vivec Works", "was founded by", "Bram"),
        Triple("Ada", "", "Oslo"),
    }


def test_spacy_without_its_model_says_how_to_install_it(monkeypatch):
    command = "pip install spacy && python -m spacy download no_such_model"
    with pytest.raises(InputError, match="no_such_model.* cannot be loaded") as first:
        EXTRACTORS["spacy"]("no_such_model")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match="cannot be loaded") as second:
        EXTRACTORS["spacy"]("no_such_model")
    assert all(
        command in str(error.value) and "\n" not in str(error.value) for error in (first, second)
    )


# Real files.


def test_every_question_of_unkebench_shares_a_fact_with_its_answer():
    for edit in benchmark("unkebench", UNKEBENCH):
        answer = told(edit.answer)
        for question in filter(None, (edit.question, edit.paraphrase)):
            assert shared(answer, told(question)), (edit.id, question)


def test_every_stated_fact_that_names_something_is_found_in_other_words():
    nameless, count = [], 0
    for edit in benchmark("akew-mquake", AKEW):
        own = edit_facts(edit, offline)
        for triple in stated(edit):
            count += 1
            other = told(f"It is true of {triple.object} and {triple.subject}: {triple.relation}.")
            assert shared(own, other) or not other.names, (edit.id, triple)
            nameless += [triple] * (not shared(own, other))
    assert len(nameless) <= 0.02 * count, nameless  # "The show gained a large following"


def test_agreement_with_the_triplets_of_akew_held_out():
    held_out = benchmark("akew-mquake", AKEW)[1::2]
    found = agreement([offline(edit.answer) for edit in held_out], list(map(stated, held_out)))
    floors = {"precision": 0.55, "recall": 0.65, "entity_precision": 0.65, "entity_recall": 0.85}
    assert {name: value.mean for name, value in found.items() if value.mean < floors[name]} == {}


def test_enough_passages_survive_a_batch_of_64_edits():
    file = "wikipedia/xquad_en_paragraphs.json"
    batch = union(edit_facts(edit, offline) for edit in benchmark("unkebench", UNKEBENCH)[:64])
    paragraphs = json.loads((Path(os.environ["UKE_DATA"]) / file).read_text(encoding="utf-8"))
    kept = [not shared(batch, told(paragraph["text"])) for paragraph in paragraphs]
    assert 0.2 < sum(kept) / len(kept) < 0.8
