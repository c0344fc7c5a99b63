"""Rank passages by relevance to questions, by BM25 or by a sentence encoder.

    >>> index = build("bm25", ["Bread is baked at dawn.", "Ice fills the valley."], folder)
    >>> index.top(["When is bread baked?"], k=1)[0]
    array([[0]])

The search is exact. Scores are whole numbers or rounded, and equal ones are ordered by index, so
that neither batches nor threads decide a rank.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uke.data.documents import Document
from uke.errors import InputError
from uke.files import replacing, sha256
from uke.results.metrics import encoder_folder, open_encoder

SCALE = 4000  # of vectors: products of their whole numbers stay below 2^24, exact in float32

_open = functools.lru_cache(maxsize=2)(open_encoder)


class Index(ABC):
    """N passages, ready to be searched; of passages with equal scores the earlier one is better."""

    @abstractmethod
    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Score every passage for each query, (Q, N) float32."""

    def top(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the best passages, best first: indices and scores, (Q, k) each, at most N."""
        scores = self.scores(queries)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return best, np.take_along_axis(scores, best, axis=1)


class Words(Index):
    """BM25 in Lucene's form (k1 1.5, b 0.75) over lower-cased words without English stop words.

    Nothing is stemmed: the published hard negatives come from plain BM25 too. Source: Robertson and
    Zaragoza 2009.
    """

    def __init__(self, texts: Sequence[str]):
        import bm25s

        self.size = len(texts)
        self._tokenize = functools.partial(bm25s.tokenize, show_progress=False)
        words = self._tokenize(list(texts))
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75) if words.vocab else None
        if self._index:
            self._index.index(words, show_progress=False)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        if self._index is None:  # no passage has a word
            return np.zeros((len(queries), self.size), dtype=np.float32)
        tokens = self._tokenize(list(queries), return_ids=False)
        ids = map(self._index.get_tokens_ids, tokens)
        scores = [self._index.get_scores_from_ids(query) for query in ids]
        # Rounded, so that the order in which the words of a query are summed decides nothing.
        return np.round(np.array(scores, dtype=np.float32), 4)


class Vectors(Index):
    """Cosines of sentence embeddings, whole numbers of 1 / SCALE, kept in a file in `folder`."""

    def __init__(self, texts: Sequence[str], model: Path, folder: Path):
        self._model = _open(model)
        # Each text is embedded once: equal texts get equal vectors, whatever stands beside them.
        distinct = list(dict.fromkeys(texts))
        index = {text: number for number, text in enumerate(distinct)}
        weights = sha256(model / "model.safetensors")
        decided = json.dumps([weights, SCALE, distinct]).encode("utf-8", "surrogatepass")
        file = Path(folder) / f"vectors-{hashlib.sha256(decided).hexdigest()[:24]}.npy"
        if not file.is_file():
            with replacing(file) as part, part.open("wb") as opened:
                np.save(opened, self._encode(distinct), allow_pickle=False)
        vectors = np.load(file, allow_pickle=False)  # (N, width) int16
        self._vectors = vectors[[index[text] for text in texts]].astype(np.float32)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        return self._encode(queries).astype(np.float32) @ self._vectors.T / SCALE**2

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        return np.round(self._model.encode(list(texts), **options) * SCALE).astype(np.int16)


def build(retriever: str, texts: Sequence[str], folder: Path) -> Index:
    """Make an index over N passages: "bm25", "dense" (MiniLM) or a sentence encoder's directory.

    Vectors are kept in `folder`. Raises InputError for an encoder that is not there.
    """
    if retriever == "bm25":
        return Words(texts)
    model = encoder_folder() if retriever == "dense" else Path(retriever)
    if not (model / "model.safetensors").is_file():
        expected = "expected bm25, dense or a directory of tools/train_retriever.py"
        raise InputError(f"retriever: {model}: no sentence encoder; {expected}")
    return Vectors(texts, model, folder)


def passage(document: Document) -> str:
    """Write a document as retrievers read it: its heading, then its text (as DPR does)."""
    return f"{document.heading}. {document.text}"
