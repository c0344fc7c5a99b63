"""The shipped model knows its world, and is what its card says."""

from hashlib import sha256

import pytest
from uke.models import model as models
from uke.models.prompts import end_of_turn
from uke.study import knowledge, pretraining
from uke.world import generate as world

ENTITIES = 40


@pytest.fixture(scope="module")
def shipped():
    return models.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def found(shipped):
    return knowledge.examine(
        *shipped, world.build(pretraining.card(models.EMBEDDED)["settings"]["world_seed"]), ENTITIES
    )


@pytest.mark.parametrize(
    "name", [name for name, (_, least) in knowledge.EXAMINATIONS.items() if least]
)
def test_it_knows_its_world(found, name):
    scores = found[found["examination"] == name]["score"]
    assert len(scores) >= ENTITIES and scores.mean() >= knowledge.EXAMINATIONS[name][1]


def test_what_it_cannot_know_it_does_not_answer(shipped, found):
    """Another world's facts are not in it: otherwise the examination would pass whatever the model knew."""
    other = knowledge.examine(*shipped, world.build(99), 6)
    assert other[other["examination"].isin(("detail", "struct_trip"))]["score"].mean() < 0.2


def test_it_is_as_small_as_promised_and_what_its_card_says(shipped):
    model, tokenizer = shipped
    weights = models.EMBEDDED / "model.safetensors"
    made = pretraining.card(models.EMBEDDED)
    assert weights.stat().st_size <= 16 * 2**20
    assert model.num_parameters() == made["parameters"] <= 6_000_000
    assert sha256(weights.read_bytes()).hexdigest() == made["sha256"]
    assert models.max_context(model) == 1024 and len(models.blocks(model)) == 8
    assert tokenizer.chat_template and end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(
        "<|end|>"
    )
