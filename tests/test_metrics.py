"""Scores agree with hand-computed and published values, and with the packages the papers used."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from uke.errors import InputError
from uke.results import metrics
from uke.results.metrics import METRICS, score
from uke.results.stats import holm, interval, p_value

PERFECT = [name for name in METRICS if name not in ("similarity", "length_ratio")]


def one(name, prediction, reference, aliases=()):
    return score([prediction], [reference], [aliases])[name].item()


def test_rows_are_read_without_heavy_packages():
    code = "import sys, uke.results.rows as _; heavy = {'torch', 'nltk', 'transformers', 'scipy'}"
    code += "; print(heavy & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


# --- Published metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        # "abcd " against "abcde": precisions 4/5, 3/4, 2/3, 1/2 and equal lengths.
        ("bleu_char", "abcd", "abcde", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("bleu_char", "a bcd", "a bcd efgh", math.exp(1 - 10 / 5)),  # brevity penalty
        # Common subsequence "the cat the mat": 4 of 6 predicted and 4 of 5 wanted words.
        ("rougel_f1", "The cat is on the mat", "the cat, near the mat", 2 * 4 / (6 + 5)),
        ("lcs_recall", "In Lisbon, in 1755.", "Lisbon 1755 fire", 2 / 3),  # commas are no letters
        # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples; no common four words: smoothing gives 1 / 2.
        ("bleu_token", "the big red dog", "the big red cat", (3 / 4 * 2 / 3 * 1 / 2 / 2) ** 0.25),
        ("bleu_token", "Paris", "Paris", 1),  # effective order: no four-grams needed
        # Five of seven distinct words; two of six pairs: "cat sat" and "sat on".
        ("rouge1_recall", "the cat sat on a mat", "the small cat sat on one mat", 5 / 7),
        ("rouge2_recall", "the cat sat on a mat", "the small cat sat on one mat", 2 / 6),
        ("rougel_recall", "the cat sat on a mat", "the small cat sat on one mat", 5 / 7),
        ("rougel_recall", "again " * 1000, "again and " * 100, 1 / 2),  # long and repetitive
    ],
)
def test_scores_by_hand(name, prediction, reference, expected):
    assert one(name, prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Родился в Лондоне в 1815", "Умер при Париже в 1815", 2 * 2 / (5 + 5)),  # "в", "1815"
        ("она родилась", "Она родилась.", 1),
        ("伦敦人", "巴黎人", 1 / 3),  # no space between words: letter by letter
        ("हिन्दी भाषा", "हिन्दू भाषा", 1 / 2),  # a vowel sign is no gap
        ("the Cafe\u0301 Gödel", "the Café Gödel", 1),
        ("about Göteborg", "about Gödel", 2 * 2 / (3 + 3)),  # most letters a-z: as published
    ],
)
def test_words_of_every_script_are_seen(prediction, reference, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert one("rougel_f1", prediction, reference) == pytest.approx(expected)
        assert one("lcs_recall", prediction, reference) == pytest.approx(expected)
    for name in ("exact", "mention"):
        assert one(name, "Cafe\u0301.", "café") == 1
    assert metrics.leakage("Cafe\u0301", ["café"], [""]) == 1


def test_a_text_that_published_metrics_cannot_see_is_warned_of():
    with pytest.warns(UserWarning, match="rouge1_recall, .* take a text without spaces for one"):
        score(["伦敦"], ["巴黎"])


# --- Metrics of this project ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("exact", "  new   YORK. ", 1),
        ("exact", "New York..", 0),
        ("exact", "NewYork", 0),
        ("exact", "New York City", 0),
        ("exact", "", 0),
        ("exact", "The Big Apple", 1),
        ("mention", "She was born in new york, USA.", 1),
        ("mention", "A New Yorker", 0),
        ("mention", "The big apple, they say", 1),
        ("mention", "", 0),
    ],
)
def test_exact_and_mention_normalise_what_they_say_and_no_more(name, prediction, expected):
    assert one(name, prediction, "New York.", ("The Big Apple",)) == expected


def test_aliases_count_for_short_answers_and_patterns_are_literal():
    frame = score(["Lutetia"], ["Paris"], [("Lutetia",)]).iloc[0]
    assert frame["exact"] == 1 and frame["rougel_f1"] == 0
    assert one("mention", "It runs C++ (fast)", "C++") == 1 and one("mention", "abc", "a.c") == 0


RIGHT = ["B", "b", "(B)", "B.", "B. Paris", "B) Paris", "**B**", "**B. Paris**", "B - Paris"]
RIGHT += ["B is correct.", "B\n\nA reason", "The answer is B", "The correct answer is: (B) Paris."]
RIGHT += ["the answer is **B**, not A", "Answer: B", "Option B", "I would choose (B).", "Paris"]
RIGHT += ["A city is asked for, so B."]
WRONG = ["", "...", "Berlin", "A. Paris", "The answer is A, not B.", "A big town", "I do not know"]
WRONG += ["U.S. law", "It is in Bavaria", "B.B. King"]


@pytest.mark.parametrize(("predictions", "expected"), [(RIGHT, 1), (WRONG, 0)])
def test_a_choice_is_read_however_it_is_stated(predictions, expected):
    for prediction in predictions:
        assert one("choice", prediction, "B", ("B. Paris",)) == expected, prediction
        if expected:
            assert one("choice", prediction, "C", ("C. Rome",)) == 0, prediction


# --- Similarity -----------------------------------------------------------------------------------


def test_similarity_pairs_padded_predictions_with_references():
    half = math.sqrt(0.5)
    vectors = {"north ": (1, 0), "north": (1, 0), "east": (0, 1), "north east": (half, half)}

    def encode(texts):
        return np.array([vectors[text] for text in texts], dtype=float)

    frame = score(["north", "north east", "north"], ["north", "east", "east"], encoder=encode)
    assert frame["similarity"].tolist() == pytest.approx([1, half, 0])
    assert list(frame) == list(METRICS) and "similarity" not in score(["a"], ["a"])


def test_an_absent_encoder_is_warned_of_and_one_of_other_weights_refused(monkeypatch, tmp_path):
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "__init__.py").touch()
    (tmp_path / "other" / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metrics, "ENCODER_PACKAGE", "other")
    with pytest.raises(InputError, match="expected the weights with SHA-256 53aa5117"):
        metrics.encoder_folder()
    monkeypatch.setattr(metrics, "ENCODER_PACKAGE", "no_such_package")
    with pytest.warns(UserWarning, match="similarity is left out"):
        assert metrics.load_encoder() is None


# --- Intervals and tests --------------------------------------------------------------------------


def test_groups_are_drawn_as_wholes_and_leave_the_mean():
    values, batches = [0.0] * 10 + [1.0] * 10, [1] * 10 + [2] * 10
    single, grouped = interval(values), interval(values, groups=batches)
    half = 12.7062 * 0.5  # t of one degree of freedom: a percentile of two batches is none
    assert grouped == pytest.approx((0.5, 0.5 - half, 0.5 + half, 2), abs=1e-4) and single.n == 20
    assert single.mean == grouped.mean == 0.5 and 0.2 < single.low < 0.5 < single.high < 0.8
    assert interval([1, 1, 1, 5], groups=["a", "a", "a", "b"]).mean == 2
    assert interval(values) == single


def test_a_single_unit_has_no_interval():
    found = interval([0.7])
    assert found.mean == 0.7 and found.n == 1 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_missing_values_are_refused(values):
    with pytest.raises(InputError, match="expected finite values"):
        interval(values)


def test_sign_flip_p_by_hand():
    # All four differences positive: 2 of the 16 sign patterns are as extreme.
    assert p_value([0.1, 0.2, 0.1, 0.2]) == pytest.approx(2 / 16)
    assert p_value([0, 0]) == p_value([1]) == 1 and p_value(np.linspace(1, 2, 12)) < 0.01


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []
