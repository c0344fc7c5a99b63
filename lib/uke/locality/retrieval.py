"""Rank passages by relevance to questions, by BM25 or by a sentence encoder.

    >>> score = build("bm25", ["Bread is baked at dawn.", "Ice fills the valley."])
    >>> ranking(score(["When is bread baked?"]))
    array([[0, 1]])

The search is exact. Scores are whole numbers or rounded, and equal ones are ordered by index, so
that neither batches nor threads decide a rank.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from uke.data.documents import Document
from uke.errors import InputError
from uke.files import replacing, sha256
from uke.project import Paths, digest
from uke.results.metrics import encode_once, encoder_folder, open_encoder

PART = 1024  # texts that are embedded and kept together
SCALE = 4000  # of vectors: products of their whole numbers stay below 2^24, exact in float32
Score = Callable[[Sequence[str]], np.ndarray]  # Q questions to the scores (Q, N) of N passages

_open = functools.lru_cache(maxsize=2)(open_encoder)


def ranking(scores: np.ndarray) -> np.ndarray:
    """Order passages by their scores (..., N), best first: indices (..., N)."""
    return np.argsort(-scores, axis=-1, kind="stable")


def build(retriever: str, texts: Sequence[str]) -> Score:
    """Index N passages by "bm25", "dense" (MiniLM) or an encoder's directory, else InputError."""
    if retriever == "bm25":
        return bm25(texts)
    model = encoder_folder() if retriever == "dense" else Path(retriever)
    if not (model / "model.safetensors").is_file():
        expected = "expected bm25, dense or a directory of tools/train_retriever.py"
        raise InputError(f"retriever: {model}: no sentence encoder; {expected}")
    return dense(texts, model)


def bm25(texts: Sequence[str]) -> Score:
    """Score by BM25 in Lucene's form over lower-cased words without English stop words.

    Nothing is stemmed: the published hard negatives come from plain BM25 too. Source: Robertson and
    Zaragoza 2009.
    """
    import bm25s

    tokenize = functools.partial(bm25s.tokenize, show_progress=False)
    words = tokenize(list(texts))
    if not words.vocab:  # no passage has a word
        return lambda queries: np.zeros((len(queries), len(texts)), dtype=np.float32)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(words, show_progress=False)

    def score(queries: Sequence[str]) -> np.ndarray:
        ids = map(index.get_tokens_ids, tokenize(list(queries), return_ids=False))
        scores = np.array([index.get_scores_from_ids(query) for query in ids], dtype=np.float32)
        # Rounded, so that the order in which the words of a query are summed decides nothing.
        return np.round(scores, 4)

    return score


def dense(texts: Sequence[str], model: Path) -> Score:
    """Score by cosines of sentence embeddings, whole numbers of 1 / SCALE."""
    vectors = _vectors(tuple(texts), model).astype(np.float32)
    return lambda queries: _encode(queries, model).astype(np.float32) @ vectors.T / SCALE**2


@functools.lru_cache(maxsize=8)
def _vectors(texts: tuple[str, ...], model: Path) -> np.ndarray:
    """Embed texts once for all sets and runs."""
    return encode_once(texts, functools.partial(_kept, model=model))


def _kept(texts: Sequence[str], model: Path) -> np.ndarray:
    """Embed texts, or read what is kept of them below `results/embeddings`.

    PART texts at a time, so that a collection of many thousands resumes where it was stopped.
    """
    weights, parts = sha256(model / "model.safetensors"), []
    starts = range(0, len(texts), PART)
    for start in tqdm(starts, desc="embedding", disable=len(starts) < 2, mininterval=5):
        own = texts[start : start + PART]
        name = digest(weights, texts=own)
        path = Paths("embedded").home / "results" / "embeddings" / f"{name}.npy"
        if not path.is_file():
            with replacing(path) as part, part.open("wb") as file:
                np.save(file, _encode(own, model))
        parts.append(np.load(path))
    return np.concatenate(parts)


def _encode(texts: Sequence[str], model: Path) -> np.ndarray:
    vectors = _open(model).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.round(vectors * SCALE).astype(np.int16)


def passage(document: Document) -> str:
    """Write a document as retrievers read it: title, section and text (as DPR does)."""
    section = f": {document.section}" if document.section else ""
    return f"{document.title}{section}. {document.text}"
