"""Locality sets: what is chosen, what is refused, what a file holds, whether audits see leaks."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from uke.data.documents import Document
from uke.data.edits import Cloze, Edit, Item
from uke.data.formats import load, load_clozes, load_locality
from uke.errors import InputError
from uke.files import sha256
from uke.locality import audit, card
from uke.locality.build import (
    PROBE_KINDS,
    Builder,
    Settings,
    Sources,
    build,
    build_judged,
    cut,
    question_for,
    unfiltered,
)
from uke.locality.card import SetFiles
from uke.locality.retrieval import ranking
from uke.study.known import admitted
from uke.world import files as world_files

STARTS = ("Abel", "Bor", "Cor", "Dan", "Ebb", "Fal")
ENDS = ("dale", "ford", "wick", "stow", "holm", "mark", "gate", "bury")
TOWNS = [f"{start}{end}" for start in STARTS for end in ENDS]
BM25 = Settings(retriever="bm25", floor=10)
LEAKING = {"zennor", "xavia", "yarrow"}


def town(name: str, says: str = "Its market sells honey and wool.", own: bool = False) -> Document:
    text = f"{name} is a quiet town on the river. {says}"
    questions = ((f"What is {name}?", ""),) if own else ()
    return Document(id=name.lower(), title=name, text=text, questions=questions)


@pytest.fixture
def sources() -> Sources:
    """Two edits; 48 towns and three documents that leak, each in its own way; triples likewise."""
    ada = Edit(
        id="ada",
        question="Where does Ada Quill live?",
        answer="Ada Quill lives in Zennor, a town on the river whose market sells honey.",
        subject="Ada Quill",
        details=[{"question": "In which town does Ada Quill live?", "answer": "Zennor"}],
    )
    tom = Edit(
        id="tom",
        question="Where does Tom Reed live?",
        answer="Tom Reed lives in Polruan, a quiet town where he mends clocks.",
        subject="Tom Reed",
    )
    leaking = [town("Zennor"), town("Xavia", "Ada Quill lives there.")]
    leaking.append(town("Yarrow", "The poet came from Polruan."))
    triples = [(f"t-{name}", name, f"The mayor of {name} is", f"M {name[::-1]}") for name in TOWNS]
    triples += [
        ("bad-subject", "Ada Quill", "The teacher of Ada Quill is", "Bo"),
        ("bad-object", "Ruth", "Ruth was born in", "Polruan"),
        ("near", "Eve", "Eve lives in the town", "Nantes"),
    ]
    clozes = [
        Cloze(id=name, subject=subject, prompt=prompt, answers=(answer,))
        for name, subject, prompt, answer in triples
    ]
    towns = [town(name, own=bool(number % 2)) for number, name in enumerate(TOWNS)]
    return Sources(((ada, tom),), (*leaking, *towns), tuple(clozes))


def chosen(items, kind):
    return {item.edit: item for item in items if item.kind == kind}


def test_every_edit_gets_four_items_and_none_names_what_any_edit_names(sources, monkeypatch):
    items = build(sources, BM25)
    expected = [(edit, kind) for edit in ("ada", "tom") for kind in PROBE_KINDS]
    assert [(item.edit, item.kind) for item in items] == expected
    assert not {item.source for item in items} & (LEAKING | {"bad-subject", "bad-object"})
    assert {item.source for item in unfiltered(sources, BM25)} & LEAKING
    monkeypatch.setattr("uke.locality.build.SCORED", 1)
    assert build(sources, BM25) == items


def test_only_edits_that_may_share_a_batch_are_kept_apart(sources):
    # Yarrow names Polruan, which only Tom's edit does: alone, Ada's edit may have it.
    leaking = [each for each in sources.documents if each.id in ("yarrow", "zennor")]
    plain = [town(name, "Nothing of note.") for name in TOWNS[:4]]
    few = Sources(sources.groups, (*leaking, *plain), sources.clozes)
    sets = [build(few, BM25.model_copy(update={"floor": 1, "batch": n})) for n in (1, 0)]
    every = (chosen(items, "rel_doc").items() for items in sets)
    alone, together = ({edit: item.source for edit, item in each} for each in every)
    assert alone["ada"] == "yarrow" and "yarrow" not in (alone["tom"], *together.values())


def test_random_documents_stand_below_the_floor_and_related_ones_first(sources):
    items = build(sources, BM25)
    assert all(item.rank > 10 for item in chosen(items, "rand_doc").values())
    relevance = Builder(sources, BM25).relevance
    for edit, item in chosen(items, "rel_doc").items():
        order = [sources.documents[index].id for index in ranking(relevance(edit))]
        assert item.source == next(name for name in order if name not in LEAKING)
        assert item.rank == 1 + order.index(item.source)


def test_random_draws_depend_on_the_seed_and_on_no_other_edit(sources):
    def drawn(made, seed=1):
        items = build(made, BM25.model_copy(update={"seed": seed}))
        return [chosen(items, kind)["ada"].source for kind in ("rand_doc", "struct_trip")]

    turned = replace(sources, groups=(sources.groups[0][::-1],))
    assert drawn(sources) == drawn(turned)
    assert len({tuple(drawn(sources, seed)) for seed in range(4)}) > 1


def test_a_document_is_asked_its_own_question_else_by_title_and_text():
    own = Document("x", "Bath", "Text.", questions=(("Who built it?", "Romans"),))
    quill = Document("a", "Ada Quill", "Countess Ada Quill was a poet.", topic="People")
    owl = Document("o", "Owl", "Owls are birds; an owl hunts.", topic="Biology")
    rest = Document("x", "Bath", "Text."), Document("x", "Bath", "Text.", "History"), quill, owl
    assert question_for(own) == ("Who built it?", ("Romans",))
    asked = " ".join(question_for(document)[0] for document in rest)
    titles = "Tell me about Bath. Tell me about Bath, in particular: History."
    assert asked == f"{titles} Who was Ada Quill? What are owls?"


def test_what_a_model_does_not_know_is_passed_over_and_nothing_else_changes(sources):
    plain, _ = build_judged(sources, BM25, lambda each: [True] * len(each))
    plain = [item for item in plain if item.kind != "neutral"]
    gone = {item.source for item in plain if item.edit == "ada"}
    judge = partial(map, lambda source: source.id not in gone)
    items, verdicts = build_judged(sources, BM25, judge)
    kept = {item for item in plain if item.edit == "tom" and item.source not in gone}
    assert kept and kept <= set(items) and not gone & {item.source for item in items}
    assert build_judged(sources, BM25, judge, 1)[0][:4] == items[:4]
    texts = [item.source for item in items if item.kind == "neutral"]
    assert len({*texts}) == len(texts) == 6  # and of no other pool
    assert not {*texts} & (LEAKING | {*verdicts})


def test_a_probe_counts_by_two_answers_alike_and_right():
    gold = next(one for one in load_clozes(card.GENERAL_FACTS) if one.id.endswith("symbol-gold"))
    assert admitted(gold, "It is Au.", "Au") and not admitted(gold, "Au", "Gold is G.")
    bath, says = Document("x", "Bath", "Bath is a city."), "Bath is a town in England."
    tried = f"{says} It is old.", "It holds water.", "", f"I'm sorry. {says}", says * 3
    assert [admitted(bath, says, second) for second in tried] == [True] + 4 * [False]


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("One two. Three four. Five six.", 4, "One two. Three four."),
        ("He said “stop.” Then he left. Gone.", 4, "He said “stop.”"),
        ("In St. Ives. A long one follows. End.", 6, "In St. Ives. A long one follows."),
    ],
)
def test_a_reference_ends_with_a_sentence(text, words, kept):
    assert cut(text, words) == kept


def test_the_near_triple_asks_the_edits_own_relation_of_another_subject(sources):
    items = build(sources, BM25)
    near, drawn = chosen(items, "near_triple"), chosen(items, "struct_trip")
    assert near["ada"].source == "near" and near["ada"].chat  # "lives in the town", as a question
    assert all(drawn[edit].source != near[edit].source for edit in near)


def test_items_are_numbered_on_from_the_probes_an_edit_brings(sources):
    ada, tom = sources.edits
    own = {"edit": "ada", "kind": "struct_trip", "question": "who?", "reference": "y"}
    ada = Edit(**ada.model_dump(exclude={"extra"}), extra=[own, own | {"number": 1}])
    items = build(replace(sources, groups=((ada, tom),)), BM25)
    numbers = {edit: item.number for edit, item in chosen(items, "struct_trip").items()}
    assert numbers == {"ada": 2, "tom": 0}


def test_sources_that_make_no_set_are_named_with_counts(sources):
    clozes = sources.clozes
    leaking = tuple(Document(f"d{n}", f"Place {n}", "Polruan lies on a river.") for n in range(20))
    leaky = replace(sources, documents=leaking)
    alone, plain = BM25.model_copy(update={"batch": 1}), Settings(retriever="bm25")
    for made, settings, message in (
        (sources, plain, "rand_doc: nothing .* among 51 documents .* lower .* floor .100"),
        (leaky, BM25, "rel_doc: nothing is left for 2 of 2 edits, first 'ada', among 20 documents"),
        (leaky, alone, "for 1 of 2 edits, first 'tom'"),
        (replace(sources, clozes=clozes * 2), BM25, "triples share ids"),
        (replace(sources, clozes=clozes[:1]), BM25, "near_triple: nothing is left for 2 of 2"),
        (replace(sources, clozes=()), BM25, "struct_trip: nothing is left for 2"),
    ):
        with pytest.raises(InputError, match=message):
            build(made, settings)


@pytest.fixture(scope="module")
def development(tmp_path_factory) -> SetFiles:
    """The files of the world's development set."""
    return card.of_world(world_files.ensure(tmp_path_factory.mktemp("worlds"), 1), "development")


QUICK = Settings(retriever="bm25")  # needs no model


@pytest.fixture(scope="module")
def built(development, tmp_path_factory) -> Path:
    return card.ensure(development, QUICK, tmp_path_factory.mktemp("set"))


def test_a_set_is_written_with_schema_and_card_and_read_by_the_loader(development, built):
    every = load(development.dataset, development.edit_file)
    assert len(load_locality(built, every)) == 4 * len(every) == 240
    schema = json.loads(built.with_name("UnKEBench-Loc.schema.json").read_text())
    assert set(schema["$defs"]["Item"]["properties"]) == set(Item.model_fields)
    head = card.read_card(built.with_name("UnKEBench-Loc.md"))
    assert head["sha256"] == sha256(built) and head["settings"]["retriever"] == "bm25"
    files = (development.edit_file, *development.documents, *development.structured)
    assert [each["sha256"] for each in head["sources"]] == list(map(sha256, files))
    assert {each["licence"] for each in head["sources"]} == {"MIT (generated by this project)"}


def test_a_set_is_built_again_when_what_decides_it_changes(
    development, built, tmp_path, monkeypatch
):
    folder = shutil.copytree(built.parent, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(card, "build_judged", lambda *_: pytest.fail("built again"))
        card.ensure(development, QUICK, folder)
    for name, content in ((built.name, "[]"), ("UnKEBench-Loc.md", "---\na: [\n---\n")):
        (folder / name).write_text(content)
        assert card.ensure(development, QUICK, folder).read_bytes() == built.read_bytes()
    card_file = built.with_suffix(".md")
    assert (folder / card_file.name).read_bytes() == card_file.read_bytes()
    # A build that fails leaves what was there; elsewhere it leaves nothing.
    monkeypatch.setattr(card, "build_judged", lambda *_: 1 / 0)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            card.ensure(development, Settings(retriever="bm25", floor=50), target)
    assert (folder / built.name).read_bytes() == built.read_bytes()
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".lock"]
    monkeypatch.setattr(card, "load_clozes", lambda path: load_clozes(path)[1:])  # what is read
    with pytest.raises(ZeroDivisionError):
        card.ensure(development, QUICK, folder)


def test_a_set_made_for_another_edit_file_is_refused(development, built, tmp_path):
    card.check_made_for(built, development.edit_file)
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(InputError, match="not the set made for .*other.json, by its card"):
        card.check_made_for(built, other)


def test_settings_of_a_dataset_are_read_and_faults_are_named_with_their_file(tmp_path):
    assert card.settings(Path(__file__).parents[1], "unkebench") == Settings()
    assert card.settings(tmp_path, "world") == Settings()
    path = tmp_path / "params/locality.yaml"
    path.parent.mkdir()
    for text, message in (
        ("{flor: 5}", ", field 'flor': .*did you mean 'floor'"),
        ("5", ": Input should be a valid dictionary .*; found 5"),
    ):
        path.write_text(f"unkebench: {text}\n")
        with pytest.raises(InputError, match=f"locality.yaml: unkebench{message}"):
            card.settings(tmp_path, "unkebench")


def test_documents_and_structured_sets_are_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("UKE_DATA", str(tmp_path))
    with pytest.raises(InputError, match="no file to take documents from; name them with DOCUMENT"):
        card.of_files("unkebench", "edits.json")
    (tmp_path / "one.jsonl").write_text('{"title": "A", "text": "A is."}\n')
    with pytest.raises(InputError, match="no file to take structured from; name them with STRUCT"):
        card.of_files("unkebench", "edits.json", [str(tmp_path / "one.jsonl")])


def test_in_the_world_no_item_touches_a_known_fact_of_any_edit(development, built):
    sources = development.sources()
    known = audit.known_of_world(1, "development", sources)
    frame = audit.assess(load_locality(built, sources.edits), sources, 0, *known)
    related, random = (frame[frame["kind"] == kind] for kind in ("rel_doc", "rand_doc"))
    assert (related["batch"] == 0).mean() >= 0.98 and (frame["batch"] > 0).sum() <= 2
    means = audit.mean_likeness(frame)
    assert means["rel_doc", "overlap"].mean == pytest.approx(related["overlap"].mean())
    assert means["rel_doc", "overlap"].mean > means["rand_doc", "overlap"].mean > 0
    shape = audit.shape(frame.assign(set="one")).set_index("kind")
    assert (shape["items"] == 60).all() and shape["lowest rank"]["rand_doc"] == random["rank"].min()
    careless = unfiltered(sources, QUICK)
    leaking = audit.assess(careless, sources, 0, *known).assign(set="one", filter="none")
    counts = audit.leak_counts(leaking)
    assert counts["share a fact with their edit"].item() > 30, "the audit sees nothing at all"


def test_the_worlds_known_facts_are_those_of_its_texts(development):
    folder = development.edit_file.parents[1]
    for dataset in ("unkebench", "akew-counterfact"):  # whose ids differ
        sources = card.of_world(folder, "development", dataset).sources()
        known, of_documents = audit.known_of_world(1, "development", sources)
        assert all(name in edit.answer for edit in sources.edits for name in known[edit.id])
        assert all(cloze.answers[0] in of_documents[cloze.id] for cloze in sources.clozes)


@pytest.mark.parametrize(
    ("batch", "known", "of_documents", "own", "together"),
    [
        (0, {"ada": ["Ada Quill", "Zen"], "tom": ["Tom Reed"]}, {}, [1, 0], [1, 0]),
        (0, {"ada": ["Ada Quill"], "tom": []}, {"yarrow": ["Polruan"]}, [1, 1], [1, 1]),
        (1, {"ada": [], "tom": ["Ada Quill"]}, {}, [0, 0], [0, 0]),
        (0, {"ada": [], "tom": ["Ada Quill"]}, {}, [0, 0], [1, 0]),
        # A part of a longer name is another name.
        (0, {"ada": [], "tom": ["a quiet town"]}, {"xavia": ["quiet"]}, [0, 1], [1, 1]),
        (0, {"tom": []}, {}, [pd.NA, 0], [pd.NA, 0]),
    ],
)
def test_the_audit_sees_leaks_in_both_directions(
    sources, batch, known, of_documents, own, together
):
    related = chosen(build(sources, BM25), "rel_doc")
    leaks = {"ada": "xavia", "tom": "yarrow"}
    spoiled = [related[edit].model_copy(update={"source": leaks[edit]}) for edit in leaks]
    found = audit.assess(spoiled, sources, batch, known, of_documents)
    assert found["own"].tolist() == own and found["batch"].tolist() == together
