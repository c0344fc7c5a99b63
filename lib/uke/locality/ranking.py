"""Search among N passages, by their words (BM25) or by vectors: exact best k and exact ranks in bounded memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from uke.errors import InputError

BLOCK = 16384  # passages scored at once
CELLS = 2**20  # scores held at once: 8 MB of keys


class Index(Protocol):
    """N passages, ready to be searched."""

    size: int

    def top(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Places (Q, k) int64 and scores (Q, k) float32 of the best passages, best first, equal scores by place.

        More than N asked for is N given. Raises InputError where `k` is no whole number from 1.
        """

    def ranks(self, queries: Sequence[str], places: Sequence[int]) -> np.ndarray:
        """Rank (Q,), from 1, that each query gives to its passage at `places`, in the order of `top`."""


class Exhaustive(ABC):
    """What every index that scores all passages shares; its class gives `blocks` and `own`."""

    size: int
    block = BLOCK  # passages scored at once

    @abstractmethod
    def blocks(self, queries: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Place of a block's first passage and the scores (Q, passages) float32 of the block."""

    @abstractmethod
    def own(self, queries: Sequence[str], places: np.ndarray) -> np.ndarray:
        """Scores (Q,) float32 of the passage at each query's place, equal to those of `blocks`."""

    def top(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        k = _width(queries, k, self.size)
        found = np.empty((len(queries), k), dtype=np.int64)
        for part in self._parts(len(queries)):
            best = np.empty((len(found[part]), 0), dtype=np.int64)
            for first, scores in self.blocks(queries[part]):
                best = largest(np.concatenate([best, largest(keys(scores, first), k)], axis=1), k)
            found[part] = best
        return unlock(-np.sort(-found, axis=1))

    def ranks(self, queries: Sequence[str], places: Sequence[int]) -> np.ndarray:
        places = _places(queries, places, self.size)
        above = np.zeros(len(queries), dtype=np.int64)
        for part in self._parts(len(queries)):
            own = keys(self.own(queries[part], places[part])[:, None], places[part][:, None])
            for first, scores in self.blocks(queries[part]):
                above[part] += (keys(scores, first) > own).sum(axis=1)
        return above + 1

    def _parts(self, queries: int) -> Iterator[slice]:
        step = max(1, CELLS // min(self.size, self.block))
        return (slice(start, start + step) for start in range(0, queries, step))


def keys(scores: np.ndarray, first: int | np.ndarray) -> np.ndarray:
    """Float32 scores (Q, n) of the passages from place `first` on as int64 keys (Q, n), no two of a row alike.

    A key is larger for a better score and, of equal scores, for the earlier place: one order, no ties. The upper half
    holds the bits of the score, put in order as integers; the lower half counts the places down.
    """
    bits = (
        (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    )  # + 0 makes -0 a 0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) - (first + np.arange(scores.shape[1]))


def unlock(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (int64) and scores (float32) that `keys` put together."""
    places = -found & 0xFFFFFFFF
    ordered = (found + places) >> 32
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return places, bits.astype(np.int32).view(np.float32)


def largest(found: np.ndarray, k: int) -> np.ndarray:
    """The `k` largest keys of each row, or all, in any order."""
    left_out = found.shape[1] - k
    return found if left_out <= 0 else np.partition(found, left_out, axis=1)[:, left_out:]


def _width(queries: Sequence[str], k: int, size: int) -> int:
    check_texts("queries", queries)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k: expected a whole number from 1, found {k!r}")
    return min(int(k), size)


def _places(queries: Sequence[str], places: Sequence[int], size: int) -> np.ndarray:
    check_texts("queries", queries)
    places = np.asarray(places)
    if places.shape != (len(queries),):
        raise InputError(
            f"places: expected one for each of {len(queries)} queries, found {places.shape}"
        )
    if len(places) and (places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= size):
        raise InputError(
            f"places: expected whole numbers from 0 to {size - 1}, found {places.min()} to {places.max()}"
        )
    return places.astype(np.int64)


def check_texts(name: str, texts: Sequence[str], least: int = 0) -> None:
    """InputError where `texts` is one text, too short a list, or holds what is no text."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"{name}: expected a list of texts, found {type(texts).__name__}")
    if len(texts) < least:
        raise InputError(f"{name}: expected at least {least}, found {len(texts)}")
    odd = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
    if odd is not None:
        raise InputError(f"{name}[{odd}]: expected text, found {type(texts[odd]).__name__}")


class Words(Exhaustive):
    """BM25 (Robertson and Zaragoza 2009; Lucene's form, k1 1.5, b 0.75) over lower-cased words of two letters or more.

    English stop words are left out and nothing is stemmed: the published hard negatives come from plain BM25 too. Scores
    are rounded to four decimals, so that the order in which a query's words are summed cannot decide a rank.
    """

    def __init__(self, texts: Sequence[str]):
        check_texts("texts", texts, 1)
        bm25s = _package("bm25s", "bm25s")
        self.size = self.block = len(
            texts
        )  # a word's scores come as the list of the passages that have it
        self._tokenize = bm25s.tokenize
        words = self._tokenize(list(texts), show_progress=False)
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75) if words.vocab else None
        if self._index:
            self._index.index(words, show_progress=False)

    def _scores(self, query: str) -> np.ndarray:
        if self._index is None:  # no passage has a word
            return np.zeros(self.size, dtype=np.float32)
        words = self._tokenize([query], return_ids=False, show_progress=False)[0]
        return np.round(self._index.get_scores_from_ids(self._index.get_tokens_ids(words)), 4)

    def blocks(self, queries: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, np.stack([self._scores(query) for query in queries])  # (Q, N)

    def own(self, queries: Sequence[str], places: np.ndarray) -> np.ndarray:
        return np.array(
            [self._scores(query)[place] for query, place in zip(queries, places)], dtype=np.float32
        )


class Vectors(Exhaustive):
    """Dot products of whole-number vectors, divided by `unit`: exact, whatever the blocks, threads or library.

    `vectors` (N, width) int16 may be memory-mapped; `encode` maps Q texts to such vectors (Q, width). No product of two
    of them may exceed 2^24, so that float32 sums of its terms are exact in any order.
    """

    def __init__(
        self, vectors: np.ndarray, encode: Callable[[Sequence[str]], np.ndarray], unit: float
    ):
        self.vectors, self.encode, self.unit = vectors, encode, np.float32(unit)
        self.size = len(vectors)
        self._last: tuple[Sequence[str], np.ndarray] = (
            (),
            np.empty(0),
        )  # ranks need the same queries twice

    def _queries(self, queries: Sequence[str]) -> np.ndarray:
        if list(queries) != list(self._last[0]) or not len(queries):
            self._last = queries, self.encode(queries).astype(np.float32)
        return self._last[1]

    def blocks(self, queries: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        asked = self._queries(queries)  # (Q, width)
        for first in range(0, self.size, BLOCK):
            passages = self.vectors[first : first + BLOCK].astype(np.float32)
            yield first, asked @ passages.T / self.unit  # (Q, passages)

    def own(self, queries: Sequence[str], places: np.ndarray) -> np.ndarray:
        passages = self.vectors[places].astype(np.float32)
        return np.einsum("qd,qd->q", self._queries(queries), passages) / self.unit


class Library(Vectors):
    """Vectors whose best k come from faiss: `flat` finds what the exact search finds, `hnsw` nearly (Malkov 2018).

    Holds float32 copies in memory (1.5 kB a passage of width 384); ranks are exact in both, read from the vectors.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        encode: Callable[[Sequence[str]], np.ndarray],
        unit: float,
        kind: str,
    ):
        super().__init__(vectors, encode, unit)
        faiss = _package("faiss", "faiss-cpu")
        width = vectors.shape[1]
        self._exact = kind == "flat"
        self._index = (
            faiss.IndexFlatIP(width)
            if self._exact
            else faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        )
        threads = faiss.omp_get_max_threads()
        if not self._exact:
            self._index.hnsw.efConstruction = 200
            faiss.omp_set_num_threads(
                1
            )  # several threads would link the graph in an order of chance
        try:
            for first in range(0, self.size, BLOCK):
                self._index.add(
                    np.ascontiguousarray(vectors[first : first + BLOCK], dtype=np.float32)
                )
        finally:
            faiss.omp_set_num_threads(threads)

    def top(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        k = _width(queries, k, self.size)
        found = np.empty((len(queries), k), dtype=np.int64)
        for part in self._parts(len(queries)):
            found[part] = self._best(self._queries(queries[part]), k)
        return unlock(found)

    def _best(self, asked: np.ndarray, k: int) -> np.ndarray:
        wanted = k + 1
        while True:
            wanted = min(wanted, self.size)
            if not self._exact:
                self._index.hnsw.efSearch = max(128, 2 * wanted)
            scores, places = self._index.search(asked, wanted)  # (Q, wanted)
            missed = bool((places < 0).any())
            # Passages as good as the last one found may lie beyond it, at earlier places.
            cut = self._exact and (scores[:, k - 1] == scores[:, -1]).any()
            if wanted == self.size or not (missed or cut):
                break
            wanted *= 2
        if missed:
            raise InputError(
                f"index: the graph reaches too few of {self.size} passages for k {k}; expected a flat one"
            )
        found = np.stack(
            [
                keys(row[:, None] / self.unit, place[:, None])[:, 0]
                for row, place in zip(scores, places)
            ]
        )
        return -np.sort(-found, axis=1)[:, :k]


def _package(name: str, install: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"retriever: the package {install} is not installed; expected it: pip install {install}"
        ) from None
