"""Locality sets: what is chosen, what is refused, what a file holds, and whether audits see what they are for."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from uke.data import edits, formats
from uke.data.documents import Document
from uke.data.edits import Cloze, Edit
from uke.errors import InputError
from uke.files import sha256
from uke.locality import audit, card
from uke.locality import build as locality
from uke.locality.build import Settings, Sources, build, cut
from uke.world import files as world_files
from uke.world import generate as world

NAMES = [
    f"{start}{end}"
    for start in ("Abel", "Bor", "Cor", "Dan", "Ebb", "Fal")
    for end in ("dale", "ford", "wick", "stow", "holm", "mark", "gate", "bury")
]
BM25 = Settings(retriever="bm25", floor=10)


def town(name: str, **more: str) -> Document:
    text = f"{name} is a quiet town on the river. {more.get('says', 'Its market sells honey and wool to travellers.')}"
    return Document(
        id=name.lower(),
        title=name,
        text=text,
        questions=((f"What is {name}?", ""),) if more.get("own") else (),
    )


@pytest.fixture
def sources() -> Sources:
    """Two edits about Ada Quill and Tom Reed; 48 towns, three documents that leak, each in its own way; triples likewise."""
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
    leaking = [
        town("Zennor"),
        town("Xavia", says="Ada Quill lives there."),
        town("Yarrow", says="The poet came from Polruan."),
    ]
    clozes = [
        Cloze(
            id=f"t{number}",
            subject=name,
            prompt=f"The mayor of {name} is",
            answers=(f"Mayor {name[::-1].title()}",),
        )
        for number, name in enumerate(NAMES)
    ]
    clozes += [
        Cloze(
            id="bad-subject",
            subject="Ada Quill",
            prompt="The teacher of Ada Quill is",
            answers=("Bo",),
        ),
        Cloze(id="bad-object", subject="Ruth", prompt="Ruth was born in", answers=("Polruan",)),
        Cloze(id="near", subject="Eve", prompt="Eve lives in the town", answers=("Nantes",)),
    ]
    documents = leaking + [
        town(name, own="yes" if place % 2 else "") for place, name in enumerate(NAMES)
    ]
    return Sources(((ada, tom),), tuple(documents), tuple(clozes))


def test_every_edit_gets_four_items_and_none_names_what_any_edit_names(sources, tmp_path):
    items = build(sources, BM25, tmp_path)
    assert [(item.edit, item.kind) for item in items] == [
        (edit, kind) for edit in ("ada", "tom") for kind in locality.KINDS
    ]
    assert not {item.source for item in items} & {
        "zennor",
        "xavia",
        "yarrow",
        "bad-subject",
        "bad-object",
    }
    assert {item.source for item in locality.unfiltered(sources, BM25, tmp_path)} & {
        "zennor",
        "xavia",
        "yarrow",
    }


def test_only_edits_that_may_share_a_batch_are_kept_apart(sources, tmp_path):
    # Yarrow names Polruan, which only Tom's edit does: alone, Ada's edit may have it.
    leaks = Sources(
        sources.groups,
        tuple(document for document in sources.documents if document.id in ("yarrow", "zennor"))
        * 1,
        sources.clozes,
    )
    alone = BM25.model_copy(update={"batch": 1, "floor": 1})
    many = Sources(
        leaks.groups,
        (*leaks.documents, *(town(name, says="Nothing of note.") for name in NAMES[:4])),
        leaks.clozes,
    )
    related = {
        item.edit: item.source for item in build(many, alone, tmp_path) if item.kind == "rel_doc"
    }
    together = {
        item.edit: item.source
        for item in build(many, alone.model_copy(update={"batch": 0}), tmp_path)
        if item.kind == "rel_doc"
    }
    assert related["ada"] == "yarrow" and "yarrow" not in (related["tom"], *together.values())


def test_random_documents_stand_below_the_floor_and_related_ones_first(sources, tmp_path):
    items = build(sources, BM25, tmp_path)
    assert all(item.rank > 10 for item in items if item.kind == "rand_doc")
    free = [
        document.id
        for document in sources.documents
        if document.id not in ("zennor", "xavia", "yarrow")
    ]
    builder = locality.Builder(sources, BM25, tmp_path)
    for item in (item for item in items if item.kind == "rel_doc"):
        order = [sources.documents[place].id for place in builder.ranked[item.edit]]
        assert item.source == next(
            name for name in order if name in free
        ) and item.rank == 1 + order.index(item.source)


def test_random_draws_depend_on_the_seed_and_on_no_other_edit(sources, tmp_path):
    def drawn(made, seed=1):
        items = build(made, BM25.model_copy(update={"seed": seed}), tmp_path)
        return [
            (item.kind, item.source)
            for item in items
            if item.edit == "ada" and item.kind in ("rand_doc", "struct_trip")
        ]

    turned = Sources((sources.groups[0][::-1],), sources.documents, sources.clozes)
    assert (
        drawn(sources) == drawn(turned)
        and len({tuple(drawn(sources, seed)) for seed in range(4)}) > 1
    )


def test_a_document_is_asked_its_own_question_else_by_its_title(sources, tmp_path):
    by_id = {document.id: document for document in sources.documents}
    builder = locality.Builder(sources, BM25, tmp_path)
    with_own, without = by_id[NAMES[1].lower()], by_id[NAMES[0].lower()]
    assert builder.asked(with_own) == (f"What is {NAMES[1]}?", ()) and builder.asked(without) == (
        f"Tell me about {NAMES[0]}.",
        (),
    )
    titled = locality.Builder(sources, BM25.model_copy(update={"own_question": False}), tmp_path)
    assert titled.asked(with_own)[0] == f"Tell me about {NAMES[1]}."
    assert (
        builder.asked(Document("x", "Bath", "Text.", section="History"))[0]
        == "Tell me about Bath, in particular: History."
    )
    assert builder.asked(
        Document("x", "Bath", "Text.", questions=(("Who built it?", "Romans"),))
    ) == ("Who built it?", ("Romans",))


def test_a_document_that_cannot_be_asked_for_is_not_taken(sources, tmp_path):
    unnamed = tuple(
        Document(f"u{number}", "The <unk>", document.text)
        for number, document in enumerate(sources.documents)
    )
    items = build(
        Sources(sources.groups, (*unnamed, *sources.documents), sources.clozes), BM25, tmp_path
    )
    assert not any(item.source.startswith("u") for item in items if item.kind.endswith("doc"))


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("One two. Three four. Five six.", 4, "One two. Three four."),
        ("One two three four five six.", 4, "One two three four five six."),
        ("He said “stop.” Then he left. Gone.", 4, "He said “stop.”"),
        (
            "In St. Ives. A long sentence follows here. End.",
            6,
            "In St. Ives. A long sentence follows here.",
        ),
        ("It cost 3.5 million in all. Nobody paid.", 6, "It cost 3.5 million in all."),
        (
            "The historian Frederick W. Mote wrote that. It is so.",
            4,
            "The historian Frederick W. Mote wrote that.",
        ),
        ("No end at all", 2, "No end at all"),
    ],
)
def test_a_reference_ends_with_a_sentence(text, words, kept):
    assert cut(text, words) == kept


def test_references_are_as_long_as_the_answers(sources, tmp_path):
    builder = locality.Builder(sources, BM25, tmp_path)
    assert builder.words == round(
        (len(sources.edits[0].answer.split()) + len(sources.edits[1].answer.split())) / 2
    )


def test_the_near_triple_asks_the_edits_own_relation_of_another_subject(sources, tmp_path):
    near = {
        item.edit: item for item in build(sources, BM25, tmp_path) if item.kind == "near_triple"
    }
    assert (
        near["ada"].source == "near" and near["ada"].chat
    )  # "lives in the town", through the chat template
    assert all(
        item.source != near[item.edit].source
        for item in build(sources, BM25, tmp_path)
        if item.kind == "struct_trip"
    )


def test_items_are_numbered_on_from_the_probes_an_edit_brings(sources, tmp_path):
    ada, tom = sources.edits
    own = [
        {
            "edit": "ada",
            "kind": "struct_trip",
            "number": number,
            "question": "nq question: x",
            "reference": "y",
        }
        for number in (0, 1)
    ]
    ada = Edit(**ada.model_dump(exclude={"extra"}), extra=own)
    items = build(Sources(((ada, tom),), sources.documents, sources.clozes), BM25, tmp_path)
    assert {(item.edit, item.number) for item in items if item.kind == "struct_trip"} == {
        ("ada", 2),
        ("tom", 0),
    }


def test_too_few_documents_for_the_floor_are_said_with_counts(sources, tmp_path):
    with pytest.raises(
        InputError, match="51 documents are too few for the floor 100: .* expected 102 or more"
    ):
        build(sources, Settings(retriever="bm25"), tmp_path)


def test_edits_for_which_every_document_leaks_are_named_with_counts(sources, tmp_path):
    all_leak = tuple(
        Document(f"d{number}", f"Place {number}", "Polruan lies on a river.")
        for number in range(20)
    )
    with pytest.raises(
        InputError, match=r"rel_doc: none of 20 documents is left for 2 of 2 edits \('ada', 'tom'\)"
    ):
        build(Sources(sources.groups, all_leak, sources.clozes), BM25, tmp_path)
    alone = BM25.model_copy(update={"batch": 1})
    with pytest.raises(InputError, match=r"for 1 of 2 edits \('tom'\)"):
        build(Sources(sources.groups, all_leak, sources.clozes), alone, tmp_path)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """The order of the world's development set, with a retriever that needs no model."""
    folder = world_files.ensure(tmp_path_factory.mktemp("worlds"), 1)
    return card.of_world(folder, "development")


QUICK = Settings(retriever="bm25")


@pytest.fixture(scope="module")
def built(ordered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return card.ensure(ordered, QUICK, folder)


def test_a_set_is_written_with_schema_and_card_and_read_by_the_loader(ordered, built):
    every = formats.load(ordered.dataset, ordered.edit_file)
    items = formats.load_locality(built, every)
    assert len(items) == 4 * len(every) == 240
    schema = json.loads(built.with_name("UnKEBench-Loc.schema.json").read_text())
    assert set(schema["items"]["properties"]) == set(edits.Item.model_fields)
    head = card.read_card(built.with_name("UnKEBench-Loc.md"))
    assert (
        head["sha256"] == sha256(built)
        and len(head["sources"]) == 3
        and head["settings"]["retriever"] == "bm25"
    )
    assert {file["licence"] for file in head["sources"]} == {"MIT (generated by this project)"}
    assert [file["sha256"] for file in head["sources"]] == [sha256(path) for path in ordered.files]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(ordered, built, tmp_path):
    again = card.ensure(ordered, QUICK, tmp_path / "again")
    other = card.ensure(ordered, QUICK.model_copy(update={"seed": 2}), tmp_path / "other")
    for suffix in (".json", ".md", ".schema.json"):
        assert built.with_suffix(suffix).read_bytes() == again.with_suffix(suffix).read_bytes()
    assert built.read_bytes() != other.read_bytes()


def test_a_set_is_built_again_only_when_what_decides_it_has_changed(
    ordered, built, tmp_path, monkeypatch
):
    folder = shutil.copytree(built.parent, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(card, "build", lambda *_: pytest.fail("built again"))
        card.ensure(ordered, QUICK, folder)
    for spoil in (
        lambda: (folder / built.name).write_text("[]"),
        lambda: (folder / "UnKEBench-Loc.md").write_text(""),
    ):
        spoil()
        assert card.ensure(ordered, QUICK, folder).read_bytes() == built.read_bytes()
    monkeypatch.setattr(card, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        card.ensure(ordered, QUICK.model_copy(update={"floor": 50}), folder)
    assert (folder / built.name).read_bytes() == built.read_bytes()


def test_a_write_that_fails_leaves_no_part_of_a_set(ordered, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        card.ensure(ordered, QUICK, tmp_path)
    assert not [
        path for path in tmp_path.iterdir() if path.suffix != ".lock" and path.name != "retrieval"
    ]


def test_an_unknown_setting_is_named_with_its_file(tmp_path):
    (tmp_path / "params/locality").mkdir(parents=True)
    (tmp_path / "params/locality/unkebench.yaml").write_text("flor: 5\n")
    with pytest.raises(
        InputError, match="unkebench.yaml: unknown key 'flor'; did you mean 'floor'"
    ):
        card.settings(tmp_path, "unkebench")
    (tmp_path / "params/locality/unkebench.yaml").write_text("floor: many\n")
    with pytest.raises(InputError, match="unkebench.yaml: floor: .*'many'"):
        card.settings(tmp_path, "unkebench")
    assert card.settings(tmp_path, "world") == Settings()


def test_in_the_world_no_item_touches_a_known_fact_of_any_edit(ordered, built):
    sources = ordered.sources()
    items = formats.load_locality(built, sources.edits)
    known, of_documents = audit.known_of_world(1, "development", sources)
    found = audit.leaks(items, sources, 0, known, of_documents)
    assert found.loc[found["kind"] == "rel_doc", "batch"].str.len().eq(0).mean() >= 0.98
    assert found["batch"].str.len().gt(0).sum() <= 2
    careless = audit.leaks(
        locality.unfiltered(sources, QUICK, built.parent / "retrieval"),
        sources,
        0,
        known,
        of_documents,
    )
    assert careless["own"].str.len().gt(0).mean() > 0.5, (
        "the audit sees nothing where nearly everything leaks"
    )


def test_the_audit_sees_a_leak_in_either_direction_and_whole_words_only(sources, tmp_path):
    items = [item for item in build(sources, BM25, tmp_path) if item.kind == "rel_doc"]
    spoiled = [
        items[0].model_copy(update={"source": "xavia"}),
        items[1].model_copy(update={"source": "yarrow"}),
    ]
    known = {"ada": ["Ada Quill", "Zen"], "tom": ["Tom Reed"]}
    found = audit.leaks(spoiled, sources, 0, known)
    assert found["own"].tolist() == [["ada quill"], []] and found["batch"].tolist() == [
        ["ada quill"],
        [],
    ]
    reverse = audit.leaks(spoiled, sources, 0, known, {"yarrow": ["Polruan"]})
    assert reverse["own"].tolist() == [["ada quill"], ["polruan"]]
    assert audit.leaks(spoiled, sources, 1, {"tom": ["Ada Quill"]})["batch"].tolist() == [[], []]
    longer = audit.leaks(
        spoiled,
        sources,
        0,
        {"ada": [], "tom": ["Polruan", "clocks"]},
        {"yarrow": ["Polruan"], "xavia": ["mends", "Polruan, a quiet town"]},
    )
    assert longer["batch"].tolist() == [["mends", "polruan, a quiet town"], ["polruan"]]
    inside = audit.leaks(
        spoiled[:1],
        sources,
        0,
        {"ada": [], "tom": ["Polruan, a quiet town"]},
        {"xavia": ["Polruan"]},
    )
    assert inside["batch"].tolist() == [[]], "a part of a longer name is another name"


def test_related_documents_are_more_like_the_edit_than_random_ones(ordered, built):
    sources = ordered.sources()
    scores = audit.likeness(formats.load_locality(built, sources.edits), sources, None)
    means = scores[scores["measure"] == "overlap"].groupby("kind")["score"].mean()
    assert means["rel_doc"] > means["rand_doc"] > 0


def test_verdicts_hold_for_the_texts_that_were_read_and_no_others(sources, tmp_path):
    items = build(sources, BM25, tmp_path)
    chosen = audit.sample(items, 5)
    assert [item.kind for item in chosen] == [
        "rel_doc",
        "rel_doc",
    ] and "Ada Quill lives in Zennor" in audit.sheet(chosen, sources, "S")
    verdict = {
        "set": "S",
        "edit": "ada",
        "source": chosen[0].source,
        "texts": audit.mark(chosen[0], sources),
        "shares": False,
        "why": "towns",
    }
    path = tmp_path / "hand.yaml"
    path.write_text(
        yaml.safe_dump({"verdicts": [verdict, verdict | {"edit": "tom", "texts": "00000000"}]})
    )
    assert audit.verdicts(path, "S", chosen, sources)["edit"].tolist() == ["ada"]
    path.write_text(yaml.safe_dump({"verdicts": [verdict | {"shares": "no"}]}))
    with pytest.raises(InputError, match=r"hand.yaml: verdict 0: expected .*shares \(bool\)"):
        audit.verdicts(path, "S", chosen, sources)


def test_the_worlds_known_facts_are_those_of_its_texts(tmp_path):
    made = world.build(1)
    folder = world_files.ensure(tmp_path, 1)
    for dataset in ("unkebench", "akew-counterfact"):  # whose ids differ
        sources = card.of_world(folder, "test", dataset).sources()
        known, of_documents = audit.known_of_world(1, "test", sources)
        assert all(name in audit.text_of(edit) for edit in sources.edits for name in known[edit.id])
        assert all(cloze.answers[0] in of_documents[cloze.id] for cloze in sources.clozes)
    entity = random.Random(0).choice(
        [entity for entity in made.pools["test_locality"] if entity.name in of_documents]
    )
    assert of_documents[entity.name] == [entity.name, *entity.objects.values()]
    with pytest.raises(InputError, match="nothing is known of 120 edits"):
        audit.leaks([], sources, 0, {}, of_documents)


real = pytest.mark.skipif(
    not os.environ.get("UKE_DATA"),
    reason="UKE_DATA is unset: no real benchmark files to build from",
)


@real
@pytest.mark.parametrize("data", ["unkebench", "akew-mquake"])
def test_real_files_give_whole_sets_whose_items_share_no_stated_fact(data, tmp_path):
    order = card.of_files(data, "", [], [])
    path = card.ensure(order, Settings(retriever="bm25"), tmp_path)
    sources = order.sources()
    items = formats.load_locality(path, sources.edits)
    assert len(items) == 4 * len(sources.edits) and path.name == f"{card.NAMES[data]}.json"
    found = audit.leaks(items, sources, 0, audit.stated_names(sources.edits))
    assert found["own"].str.len().eq(0).all() and found["batch"].str.len().gt(0).mean() < 0.02
    assert {file["licence"] for file in card.read_card(path.with_suffix(".md"))["sources"]} > {
        "CC BY-SA 4.0 (Wikipedia); by its name"
    }


@real
def test_a_file_in_akews_counterfact_format_makes_its_set(ordered, tmp_path):
    order = card.of_files(
        "akew-counterfact", str(ordered.edit_file.with_name(world_files.AKEW)), [], []
    )
    path = card.ensure(order, Settings(retriever="bm25"), tmp_path)
    assert path.name == "AKEW-Loc-CF.json" and len(json.loads(path.read_text())) == 240


def test_a_set_needs_documents_and_says_how_to_name_them(tmp_path, monkeypatch):
    monkeypatch.delenv("UKE_DATA", raising=False)
    with pytest.raises(
        InputError, match="no file to take documents from; name them with DOCUMENTS="
    ):
        card.of_files("unkebench", "edits.json", [], [])
    (tmp_path / "one.jsonl").write_text('{"title": "A", "text": "A is."}\n')
    with pytest.raises(
        InputError, match="no file to take structured from; name them with STRUCTURED="
    ):
        card.of_files("unkebench", "edits.json", [str(tmp_path / "one.jsonl")], [])


def test_without_questions_to_learn_from_a_trained_retriever_falls_back_and_the_card_says_so(
    ordered, tmp_path
):
    plain = tmp_path / "plain.jsonl"
    lines = [json.loads(line) for line in ordered.documents[0].read_text().splitlines()]
    plain.write_text(
        "".join(json.dumps({key: line[key] for key in ("title", "text")}) + "\n" for line in lines)
    )
    order = card.Order("unkebench", ordered.edit_file, (plain,), ordered.structured)
    shipped = card.settings(Path(__file__).parents[1], "unkebench")
    assert shipped.retriever == "dense-trained"
    with pytest.warns(UserWarning, match="the documents bring 0 questions"):
        assert locality.fitted(shipped, order.sources()).retriever == "dense"
    few = Sources(order.sources().groups, order.sources().documents[:40], order.sources().clozes)
    trained = shipped.model_copy(update={"floor": 5})
    with pytest.warns(UserWarning, match="MiniLM is used as it comes"):
        assert len(locality.unfiltered(few, trained, tmp_path)) == 60
    quick = Settings(retriever="bm25")
    assert locality.fitted(quick, order.sources()) == quick


def test_structured_sets_whose_triples_share_ids_are_refused(sources, tmp_path):
    with pytest.raises(InputError, match="51 triples share an id"):
        build(Sources(sources.groups, sources.documents, sources.clozes * 2), BM25, tmp_path)


def test_a_damaged_card_is_no_card(ordered, built, tmp_path):
    folder = shutil.copytree(built.parent, tmp_path / "set")
    (folder / "UnKEBench-Loc.md").write_text("---\na: [\n---\n")
    assert card.ensure(ordered, QUICK, folder).read_bytes() == built.read_bytes()


def test_two_documents_with_one_id_are_both_named(tmp_path, ordered):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"id": "7", "title": name, "text": "It is."}) + "\n"
        )
    order = card.Order(
        "unkebench",
        ordered.edit_file,
        (tmp_path / "one.jsonl", tmp_path / "two.jsonl"),
        ordered.structured,
    )
    with pytest.raises(InputError, match="two.jsonl.*one.jsonl"):
        card.ensure(order, QUICK, tmp_path / "set")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["UnKEBench-Loc.lock"]
