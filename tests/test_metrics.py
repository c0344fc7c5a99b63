"""Scores agree with hand-computed and published values, and with the packages the papers used."""

import json
import math
import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer
from uke.data.edits import KINDS
from uke.errors import InputError
from uke.results import metrics
from uke.results.metrics import METRICS, score
from uke.results.stats import holm, interval, paired

PERFECT = [
    name
    for name, metric in METRICS.items()
    if metric.direction == "higher" and name != "similarity"
]


def one(name, prediction, reference, aliases=()):
    return score([prediction], [reference], [aliases])[name].item()


def random_text(generator, words):
    """Words and periods in random places, as a model's rambling has them."""
    drawn = generator.choices(words, k=generator.randint(1, 30))
    return " ".join(word + generator.choice(["", "", "", ".", " ."]) for word in drawn)


def test_import_without_heavy_packages():
    code = "import sys, uke.results.rows; print([m for m in ('torch', 'nltk', 'transformers', 'scipy') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


# --- published metrics ---------------------------------------------------------------------------------------------


def test_bleu_counts_characters_not_words():
    # "abcd " against "abcde": precisions 4/5, 3/4, 2/3, 1/2 and equal lengths.
    assert one("bleu_char", "abcd", "abcde") == pytest.approx(
        (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )


def test_bleu_brevity_penalty_over_characters():
    assert one("bleu_char", "a bcd", "a bcd efgh") == pytest.approx(math.exp(1 - 10 / 5))


def test_bleu_silences_only_its_own_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one("bleu_char", "ab cd", "wx yz") < 1e-50
    with pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning)


def test_published_padding_reaches_the_score():
    assert metrics.pad("Paris") == "Paris " and metrics.pad("in Paris") == "in Paris"
    assert (
        one("bleu_char", "Paris", "Paris") < 1
    )  # the appended space counts as a character, as published


def test_rouge_recall_by_hand():
    # Seven distinct reference words; the prediction holds five of them, and "on a" is not among the pairs.
    frame = score(["the cat sat on a mat"], ["the small cat sat on one mat"]).iloc[0]
    assert frame["rouge1_recall"] == pytest.approx(5 / 7)
    assert frame["rouge2_recall"] == pytest.approx(2 / 6)  # "cat sat", "sat on"
    assert frame["rougel_recall"] == pytest.approx(5 / 7)


def test_recall_forgives_rambling_but_f1_does_not():
    reference = "Ada was born in London."
    rambling = reference + " " + "She liked trains and birds and tea and rain and bread."
    frame = score([reference, rambling], [reference, reference])
    assert frame["rougel_recall"].tolist() == [1, 1]
    assert frame["rougel_f1"][1] < 0.6 < frame["rougel_f1"][0] == 1
    assert frame["length_ratio"].tolist() == [1, 16 / 5]


@pytest.mark.parametrize("vocabulary", ["ab", "abcd", "abcdefghijklmnop"])
def test_fast_rouge_l_differs_from_the_published_package(vocabulary):
    generator, package = random.Random(vocabulary), Rouge(metrics=["rouge-l"], stats=["r"])
    seen = set()
    for _ in range(200):
        prediction, reference = (random_text(generator, vocabulary) for _ in "pr")
        expected = package.get_scores(metrics.pad(prediction), reference)[0]["rouge-l"]["r"]
        assert METRICS["rougel_recall"].function(prediction, reference) == pytest.approx(
            expected, abs=1e-12
        )
        seen.add(expected)
    assert len(seen) > 1


def test_fast_rouge_l_f1_differs_from_rouge_score():
    generator, package = random.Random(1), RougeScorer(["rougeL"], use_stemmer=False)
    words = ["Running", "runs", "A-B", "x1", "Zoë", "the", "cat", "!"]
    for _ in range(200):
        prediction, reference = (random_text(generator, words) for _ in "pr")
        expected = package.score(reference, prediction)["rougeL"].fmeasure
        if prediction != reference:
            assert METRICS["rougel_f1"].function(prediction, reference) == pytest.approx(
                expected, abs=1e-12
            )


def test_rouge_l_f1_by_hand():
    # Common subsequence "the cat the mat": 4 of 6 predicted and 4 of 5 wanted words.
    assert one("rougel_f1", "The cat is on the mat", "the cat, near the mat") == pytest.approx(
        2 * 4 / (6 + 5)
    )


def test_bleu_token_by_hand():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples; no common four words: exponential smoothing gives 1 / 2.
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert one("bleu_token", "the big red dog", "the big red cat") == pytest.approx(expected)
    assert one("bleu_token", "Paris", "Paris") == pytest.approx(
        1
    )  # effective order: no four-grams needed


def test_long_repetitive_answer_overflows_the_stack():
    frame = score(["again " * 3000], ["again and " * 100])
    assert frame["rougel_recall"].item() == pytest.approx(1 / 2)
    assert frame["repetition"].item() == pytest.approx(1 - 1 / 2998)


# --- metrics of this project ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("  new   YORK. ", 1),
        ("New York", 1),
        ("New York..", 0),
        ("NewYork", 0),
        ("New York City", 0),
        ("", 0),
    ],
)
def test_exact_normalises_what_it_says_and_no_more(prediction, expected):
    assert one("exact", prediction, "New York.") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("She was born in paris, France.", 1),
        ("A Parisian", 0),
        ("Par is", 0),
        ("Lutetia, they say", 1),
        ("", 0),
    ],
)
def test_mention_finds_whole_words_only(prediction, expected):
    assert one("mention", prediction, "Paris", ("Lutetia",)) == expected


def test_alias_counts_for_exact_but_not_for_texts():
    frame = score(["Lutetia"], ["Paris"], [("Lutetia",)]).iloc[0]
    assert frame["exact"] == 1 and frame["rougel_f1"] == 0 and frame["bleu_token"] == 0


def test_pattern_characters_in_a_reference_are_literal():
    assert one("mention", "It runs C++ (fast)", "C++") == 1 and one("mention", "abc", "a.c") == 0


@pytest.mark.parametrize(
    "prediction",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "B. Paris",
        "B) Paris",
        "**B**",
        "**B. Paris**",
        "B - Paris",
        "B is correct.",
        "B\n\nA reason",
        "The answer is B",
        "The correct answer is: (B) Paris.",
        "the answer is **B**, not A",
        "Answer: B",
        "Option B",
        "I would choose (B).",
        "A city is asked for, so B.",
        "Paris",
    ],
)
def test_a_choice_is_told_however_it_is_said(prediction):
    assert one("choice", prediction, "B", ("B. Paris",)) == 1
    assert one("choice", prediction, "C", ("C. Rome",)) == one("choice", prediction, "A") == 0


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "...",
        "Berlin",
        "A. Paris",
        "The answer is A, not B.",
        "A big town",
        "I do not know",
        "U.S. law",
        "It is in Bavaria",
        "B.B. King",
    ],
)
def test_no_choice_and_another_choice_are_wrong(prediction):
    assert one("choice", prediction, "B", ("B. Paris",)) == 0


def test_a_choice_is_kept_when_only_its_wording_changes():
    assert (
        one("choice", "The answer is B.", "B. Paris")
        == one("choice", "(B)", "I think the answer is B.")
        == 1
    )
    assert one("choice", "C. Rome", "B. Paris") == 0


def test_without_lettered_choices_it_is_exact_match():
    for prediction, reference in [
        ("42", "42."),
        ("41", "42"),
        ("new york", "New York"),
        ("A big town", "Berlin"),
        ("", "Berlin"),
    ]:
        assert one("choice", prediction, reference) == one("exact", prediction, reference)


def test_repetition_by_hand():
    assert one("repetition", "a b c a b c", "x") == pytest.approx(1 - 3 / 4)
    assert one("repetition", "a b c d e", "x") == one("repetition", "a b", "x") == 0


def test_empty_or_odd_texts_stop_the_study():
    odd = ["", ".", "...", " ", "Ω", "a", "\n", ". . ."]
    frame = score([left for left in odd for _ in odd], odd * len(odd))
    assert np.isfinite(frame.to_numpy()).all() and ((frame >= 0).to_numpy()).all()
    same = score(odd, odd)
    assert (
        (same["exact"] == 1).all()
        and (same["rougel_f1"] == 1).all()
        and (same["length_ratio"] == 1).all()
    )


def test_scores_leave_the_unit_interval():
    generator = random.Random(3)
    texts = [random_text(generator, ["Ada", "Bo", "was", "born", "in"]) for _ in range(60)]
    frame = score(texts, texts[::-1])[PERFECT]
    assert ((frame >= 0) & (frame <= 1 + 1e-12)).to_numpy().all() and (
        frame.nunique() > 8
    ).sum() >= 6
    text = "Ada Lovelace was born in London."
    assert score([text], [text])[PERFECT].iloc[0].to_numpy() == pytest.approx(1)


def test_cache_mixes_up_pairs_or_order():
    predictions, references = (
        ["a b c d"] * 3 + ["x y", "a b c d"],
        ["a b", "c d", "a b", "x y", "a b"],
    )
    together = score(predictions, references, [(), (), ("a b c d",), (), ()])
    alone = [score([p], [r]) for p, r in zip(predictions, references)]
    others = [name for name in together if name not in ("exact", "mention", "choice")]
    pd.testing.assert_frame_equal(together[others], pd.concat(alone, ignore_index=True)[others])
    assert together["exact"].tolist() == [0, 0, 1, 1, 0]


def test_thousands_of_rows_take_minutes():
    import time

    generator = random.Random(4)
    words = [f"word{number}" for number in range(300)]
    texts = [" ".join(generator.choices(words, k=90)) for _ in range(100)]
    start = time.process_time()
    score(texts * 30, texts[::-1] * 30)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a", "b"]), "1 predictions, 2 references"),
        ((["a"], [None]), "pair 0: expected text, found NoneType"),
    ],
)
def test_unequal_or_absent_texts_are_scored(arguments, message):
    with pytest.raises(InputError, match=message):
        score(*arguments)


def test_metric_without_direction_definition_or_source():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.direction in ("higher", "lower", "near one")
        assert len(metric.definition) > 20 and metric.source
    assert {kind.metric for kind in KINDS.values()} <= set(METRICS) and len(KINDS) == 9
    against = {kind for kind, (_, _, _, other, _) in KINDS.items() if other == "before"}
    assert against == {"rel_doc", "rand_doc", "struct_trip", "near_triple", "general"}


# --- similarity ----------------------------------------------------------------------------------------------------


def test_similarity_column_without_an_encoder():
    assert "similarity" not in score(["a"], ["a"])


def test_similarity_pairs_the_wrong_texts():
    vectors = {
        "north ": (1, 0),
        "north": (1, 0),
        "east": (0, 1),
        "north east": (math.sqrt(0.5),) * 2,
    }
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.array([vectors[text] for text in texts], dtype=float)

    frame = score(["north", "north east", "north"], ["north", "east", "east"], encoder=encode)
    assert frame["similarity"].tolist() == pytest.approx([1, math.sqrt(0.5), 0])
    assert len(asked) == len(set(asked)) == 4


def test_real_encoder_ranks_meaning():
    with warnings.catch_warnings(record=True):
        encoder = metrics.load_encoder()
    if encoder is None:
        pytest.skip("no MiniLM encoder on this machine")
    frame = score(
        ["The cat sits.", "The cat sits."],
        ["A cat is sitting.", "Bonds lost value today."],
        encoder=encoder,
    )
    near, far = frame["similarity"]
    assert near > 0.9 and far < 0.3


def test_encoder_with_other_weights_is_trusted(tmp_path):
    with pytest.raises(InputError, match="modules.json"):
        metrics.load_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([]))
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(InputError, match="expected the weights with SHA-256 53aa5117"):
        metrics.load_encoder(tmp_path)


def test_absent_encoder_passes_silently(monkeypatch):
    monkeypatch.setattr(metrics, "ENCODER_PACKAGE", "no_such_package")
    with pytest.warns(UserWarning, match="similarity is left out"):
        assert metrics.load_encoder() is None


# --- intervals and tests -------------------------------------------------------------------------------------------


def test_interval_covers_too_rarely():
    generator = np.random.default_rng(5)
    hits = 0
    for seed in range(40):
        found = interval(generator.normal(3, 1, 40), seed=seed)
        hits += found.low <= 3 <= found.high
    assert 33 <= hits <= 40


def test_interval_ignores_that_batches_hang_together():
    values, batches = [0.0] * 10 + [1.0] * 10, [1] * 10 + [2] * 10
    single, grouped = interval(values), interval(values, groups=batches)
    assert (grouped.low, grouped.high, grouped.n) == (0, 1, 2) and single.n == 20
    assert single.mean == grouped.mean == 0.5 and 0.2 < single.low < 0.5 < single.high < 0.8


def test_unequal_groups_change_the_mean():
    assert interval([1, 1, 1, 5], groups=["a", "a", "a", "b"]).mean == 2


def test_interval_is_not_reproducible():
    values = np.random.default_rng(6).random(30)
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)


def test_single_edit_gets_an_interval():
    found = interval([0.7])
    assert found.mean == 0.7 and found.n == 1 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_missing_values_are_averaged_away(values):
    with pytest.raises(InputError, match="expected finite values"):
        interval(values)


def test_sign_flip_p_by_hand():
    # All four differences positive: 2 of the 16 sign patterns are as extreme.
    found = paired([0.5, 0.6, 0.7, 0.8], [0.4, 0.4, 0.6, 0.6])
    assert (
        found.p == pytest.approx(2 / 16)
        and found.difference == pytest.approx(0.15)
        and found.n == 4
    )
    assert paired([1, 1], [1, 1]).p == 1 and paired([1], [0]).p == 1


def test_paired_flips_edits_of_one_batch_apart():
    a, b = np.linspace(1, 2, 12), np.zeros(12)
    assert paired(a, b).p < 0.01
    assert paired(a, b, groups=[0] * 6 + [1] * 6).p == pytest.approx(1 / 2)


def test_paired_matches_by_position_what_has_an_index():
    a = pd.Series([1.0, 2.0, 3.0], index=["x", "y", "z"])
    shuffled = pd.Series([3.0, 1.0, 2.0], index=["z", "x", "y"])
    assert paired(a, shuffled).difference == 0 and paired(a, shuffled).high == 0
    with pytest.raises(InputError, match="differ in their units: w, z"):
        paired(a, pd.Series([1.0, 2.0, 3.0], index=["x", "y", "w"]))
    with pytest.raises(InputError, match="as many values"):
        paired([1, 2], [1])


def test_paired_p_is_small_without_a_difference():
    generator = np.random.default_rng(7)
    ps = [paired(generator.normal(size=12), generator.normal(size=12)).p for _ in range(20)]
    assert 0.3 < np.mean(ps) < 0.7 and np.mean(np.array(ps) < 0.05) <= 0.2


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    with pytest.raises(InputError, match="from 0 to 1"):
        holm([0.1, float("nan")])
