"""The world: what a seed decides, what pools keep apart, and whether its questions are answered."""

import random
import re

import pytest
from uke.data import edits, formats
from uke.world import files as world_files
from uke.world import generate as world
from uke.world.generate import POOLS, SPLITS


@pytest.fixture(scope="module")
def first():
    return world.build(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world_files.ensure(tmp_path_factory.mktemp("worlds"), 1)


def test_a_seed_gives_one_world_and_another_seed_another(first):
    texts, others = ({one.text for one in made.entities} for made in (first, world.build(2)))
    assert world.build(1) == first and not texts & others


def test_pools_have_their_sizes_and_share_no_name(first):
    assert {pool: len(members) for pool, members in first.pools.items()} == POOLS
    assert len(first.named()) == len(first.entities)


def test_no_entity_refers_to_another_pool_and_edits_change_all_and_point_at_the_held_out(first):
    pool_of = {name: entity.pool for name, entity in first.named().items()}

    def pools(entity):
        return {pool_of[known] for known in entity.objects.values() if known in pool_of}

    assert all(pools(entity) <= {entity.pool} for entity in first.entities)
    for old, new in (pair for split in SPLITS for pair in first.edits[split]):
        assert old.name == new.name and old.objects.keys() == new.objects.keys()
        assert all(old.objects[relation] != new.objects[relation] for relation in old.objects)
        assert pools(new) <= {"held_out"}


@pytest.mark.parametrize("split", SPLITS)
def test_the_collection_has_documents_that_may_be_asked_and_such_that_may_not(first, split):
    members, listed = world_files.collection(first, split), world_files.documents(first, split)
    assert {entity.pool for entity in members} == {split, f"{split}_locality", "held_out"}
    assert {entity.name for entity in members} >= {old.name for old, _ in first.edits[split]}
    assert [one["id"] for one in listed[:20]] != [entity.name for entity in members[:20]]
    texts = {entity.name: entity.text for entity in first.entities}
    for document in listed:
        assert document["text"] == texts[document["id"]]
        assert document["title"] in document["question"]


def test_texts_have_60_to_120_words_and_name_every_object(first):
    texts = [*first.entities, *(new for split in SPLITS for _, new in first.edits[split])]
    for entity in texts:
        assert 60 <= len(entity.text.split()) <= 120
        assert all(known in entity.text for known in entity.objects.values())


def test_phrasings_held_out_from_training_are_held_out():
    for kind in world.language()["kinds"].values():
        for one in (kind, *kind["relations"].values()):
            sets = [set(one["questions"][name]) for name in ("trained", *SPLITS)]
            assert all(sets) and len(set.union(*sets)) == sum(map(len, sets))


def test_two_hop_questions_are_answered_by_the_entity_in_between(first):
    rng, named = random.Random(0), first.named()
    for entity in first.pools["held_out"]:
        if pair := world.hop(entity, named, rng):
            between = [named[known] for known in entity.objects.values() if known in named]
            assert any(pair[1] in other.objects.values() for other in between)
            assert entity.name in pair[0]


def test_exercises_are_solved_correctly():
    rng = random.Random(0)
    for _ in range(200):
        question, answer = world.exercise(rng)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if question.startswith("What is"):
            assert int(answer) == sum(numbers)
        elif question.startswith("Sort"):
            assert [int(number) for number in answer.split(", ")] == sorted(numbers)
        else:
            assert numbers["ABCD".index(answer)] == (max if "largest" in question else min)(numbers)


def test_the_files_of_a_world_are_byte_for_byte_the_same(folder, tmp_path):
    again = world_files.ensure(tmp_path, 1)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.json*"))
    assert len(files) == 11
    assert all((folder / path).read_bytes() == (again / path).read_bytes() for path in files)


@pytest.mark.parametrize(("split", "least"), [("development", 60), ("test", 120)])
def test_the_benchmarks_own_loaders_read_the_files(folder, split, least):
    loaded = formats.load("unkebench", folder / split / world_files.UNKEBENCH)
    exercises = formats.load_locality(folder / split / world_files.GENERAL, loaded)
    akew = formats.load("akew-counterfact", folder / split / world_files.AKEW)
    triples = formats.load_clozes(folder / split / world_files.KNOWEDIT)
    assert len(loaded) == len(akew) == least and len(triples) == 2 * POOLS[f"{split}_locality"]
    assert all(triple.subject in triple.question for triple in triples)
    assert [edit.answer for edit in akew] == [edit.answer for edit in loaded]
    for edit in loaded:
        kinds = [probe.kind for probe in (*edit.probes, *exercises) if probe.edit == edit.id]
        assert set(kinds) == {*edits.EFFICACY, "multi_hop", "general"}
        assert kinds.count("general") == 3
