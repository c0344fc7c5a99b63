"""Two texts share a fact: every such pair is found, and nothing but a fact counts as one."""

import itertools
import os
import time
from pathlib import Path

import pytest
from uke.data.edits import Edit
from uke.data.formats import load
from uke.locality.facts import edit_facts, facts, names, normal, shared, union

AKEW = ("akew-mquake", "akew/MQuAKE-CF_first177.json")
UNKEBENCH = ("unkebench", "unkebench/final_data_v2_first500.json")


def stated(text):
    return facts(text, names(text))


def common(one, other):
    return shared(stated(one), stated(other))


def benchmark(dataset, file):
    """Load the edits of a real file; skip the test where it is not at hand."""
    folder = os.environ.get("UKE_DATA")
    if not folder or not (Path(folder) / file).is_file():
        pytest.skip(f"UKE_DATA is unset or has no {file}")
    return load(dataset, Path(folder) / file)


NO_NAMES = (
    "—,the,In,us,It,His,May,may,In May,on Monday,5 May,May 5th,the first,2nd,1,25,3.5,1000,two,"
    "over a decade,25 years,the 16th century,H,The city,Prime Minister,Yes,World,43 BC,"
)


@pytest.mark.parametrize("name", NO_NAMES.split(","))
def test_what_names_nothing_is_no_name(name):
    assert normal(name) == ""


FORMS = (
    "The United  States=united states|U.S.=united states|US=united states|"
    "World War II=world war ii|Ellie Kemper's=ellie kemper|Theresa May=theresa may|"
    "April Smith=april smith|the UK=united kingdom|Saint-Denis=saint denis|"
    "“The Last Stand.”=last stand|Dr. Rosa Luz=rosa luz|Professor X=professor x|"
    "Of Mice and Men=of mice and men|In 2016=2016|President Obama=Obama|São Paulo=sao paulo|"
    "On June 12th, 1985=june 12 1985|ＮＡＳＡ=Nasa|Łódź=Lodz|O’Brien=Obrien|"
    "J. R. R. Tolkien=jrr tolkien|300 aircraft=300 aircraft|1,613=1613|cricket=cricket|"
    "Cricket=Cricket|iPhone=Iphone|东京=东京"
)


@pytest.mark.parametrize("pair", FORMS.split("|"))
def test_normal_form(pair):
    name, form = pair.split("=")
    assert normal(name) == form


# Ways of writing one name, the first as the edit has it.
SAME = [
    "Ellie Kemper|Ellie Kemper's|ELLIE KEMPER|“Ellie Kemper”|(Ellie Kemper)|Miss Ellie Kemper",
    "Łukasz Żółć|Lukasz Zolc|Łukasz\u00a0Żółć",
    "J. R. R. Tolkien|J.R.R. Tolkien",
    "the United States|the U.S.|the USA",
    "Patrick O'Brien|Patrick O’Brien|O'Brien",
    "Theresa May|Theresa May's",
    "The Secret Life of the American Teenager|“The Secret Life of the American Teenager”",
    "Friedrich Carl von Savigny|Savigny",
    "High Court|the High Court",
    "Seven Silent Copper Machines Dream Alone|“Seven Silent Copper Machines Dream Alone”",
    "Ó hUiginn|O hUiginn",
]
STATED = ["In 1903 {} won a prize for chess.", "{}, a baker, was praised by critics."]
REWORDED = ["Few recall that {} lived through the flood.", "A street is named after {}."]
REWORDED += ["{} is said twice.", "Rivals of {}, they lost."]


@pytest.mark.parametrize("forms", SAME)
def test_a_name_is_found_in_other_words(forms):
    name, *others = forms.split("|")
    for other, first, second in itertools.product([name, *others], STATED, REWORDED):
        assert common(first.format(name), second.format(other)), (other, first, second)


def test_a_date_is_found_in_other_orders():
    for other in ("June 12, 1985", "12 June 1985", "June 12th, 1985", "12th of June, 1985", "1985"):
        assert common("Ada was born on June 12, 1985.", f"The bridge fell in {other}, in fog.")


def test_a_common_noun_counts_where_it_is_given_as_a_name():
    passage = stated("The rules of cricket changed slowly.")
    text = "Balmora Club plays cricket."
    assert shared(facts(text, names(text), ["cricket"]), passage) == {"cricket"}
    assert not shared(facts(text, names(text)), passage)


def test_an_answer_is_written_as_its_text_writes_it():
    text = "He often speaks about political issues."
    answers = facts(text, (), ["Political issues.", "Genetics"])
    assert {"political issues", "Genetics"} <= answers.names
    brown = facts("He left Yale for Brown; his hair is brown.", (), ["Brown"])
    assert not shared(brown, stated("It has brown hair."))
    assert common("Croatia is home to many.", "nq question: who governs croatia")  # uncased


def test_of_a_clause_only_the_names_count():
    clause = "her roles in popular television shows and films in Helsinki, Finland"
    found = facts("", (), [clause]).names
    assert {"Helsinki", "Finland"} <= found
    assert max(len(name.split()) for name in found) <= 5


def test_every_name_of_a_text_is_a_name_of_its_facts():
    text = (
        'Ovid, born in Sulmona, wrote "Metamorphoses" and moved to Tomis in 8 AD. Horace of Venosa?'
        " Pliny the Elder and Livia Drusilla knew him. Bank of Rome: 12,345 coins. With Simon & "
        "Garfunkel, Jay-Z, and Boeing 737 MAX he has no ties; nor with E.T. or eBay."
    )
    expected = "Ovid|Sulmona|Metamorphoses|Tomis|Horace of Venosa|Venosa|Pliny|Elder|Livia Drusilla"
    expected += "|Bank of Rome|12,345|Simon|Garfunkel|Jay-Z|Boeing 737 MAX|E.T.|eBay"
    assert set(map(normal, expected.split("|"))) <= stated(text).names


APART = """
Theresa May resigned in Marlow. | It rained in May and may rain again. May is warm.
However, the U.S. Senate met. The US voted. | They told us, and us only.
In the beginning, Ada sang. The song was long. | In the end, the river rose. The bank was lost.
Critics praised Ada Quist. Finally, critics left. | Finally, the critics left. Critics are many.
Ann Rome opened a shop. | Anna and Romeo met in romantic Annapolis.
Gordon Brown spoke. Brown smiled. | The brown bear has brown fur.
Ada Quist won the first prize on Monday, 1 of 25. | The first Monday brought 1 of 25 boats, in May.
Ada Quist served the city for over two decades. | The city grew for over two decades.
Ada Quist is a member of the council. | She was a member of the council.
She was the President of Balmora University. | The President of the University left.
Bram gave money away. It is on the free Sunday. | Ada gave money away. Each free Sunday is long.
The American writer Ada Quist wrote. | An American bear is black.
Ada Quist lives in Balmora. | Petra Vik was born in Seyda.
"""


@pytest.mark.parametrize("pair", APART.strip().splitlines())
def test_no_fact_is_shared(pair):
    assert not common(*pair.split(" | "))


def test_a_union_shares_what_its_parts_share():
    one, other = stated("Ellie Kemper lives in Croatia."), stated("Kemper left Kansas in 1998.")
    flood = stated("The flood of 1998 reached Croatia.")
    both = shared(union([one, other]), flood), shared(flood, union([other, one]))
    assert both == ({"Croatia", "1998"}, {"Croatia", "1998"})


def test_the_kinds_of_names_in_their_order():
    text = 'However, "Some Title" by Ann Lee cost 300 coins in May 1998. "Old Rome fell," he said.'
    assert names(text) == ["Some Title", "Ann Lee", "300 coins", "May 1998", "Old Rome"]


def test_a_very_long_text_takes_no_longer_than_its_length_asks():
    start = time.process_time()
    stated("Bram Vik visited " + ", ".join(f"City{number}" for number in range(5000)))
    stated("Ada " * 10000)
    stated('a "' * 10000)
    assert time.process_time() - start < 8


def test_an_edit_states_its_facts_and_names_its_details():
    edit = Edit(
        id="1",
        question="What does Balmora Club play?",
        answer="Balmora Club plays cricket in Seyda.",
        facts=({"subject": "Balmora Club", "relation": "{} plays", "object": "cricket"},),
        details=({"question": "Where?", "answer": "In a large meadow."},),
    )
    assert {"balmora club", "cricket", "Seyda", "large meadow"} <= edit_facts(edit).names
    assert not {"cricket", "large meadow"} & edit_facts(edit, stated=False).names


def test_every_question_of_unkebench_shares_a_fact_with_its_answer():
    for edit in benchmark(*UNKEBENCH):
        answer = stated(edit.answer)
        for question in filter(None, (edit.question, edit.paraphrase)):
            assert shared(answer, stated(question)), (edit.id, question)
