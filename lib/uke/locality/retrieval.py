"""Rank passages by relevance to questions, by BM25, MiniLM or MiniLM trained, and compare them.

    >>> index = build("bm25", ["Bread is baked at dawn.", "Ice fills the valley."], folder)
    >>> index.top(["When is bread baked?"], k=1)[0]
    array([[0]])

The search is exact. Scores are whole numbers or rounded, and equal ones are ordered by index, so
that neither batches nor threads decide a rank.
"""

import functools
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock

from uke.data.documents import Document
from uke.errors import InputError
from uke.files import replacing, sha256
from uke.project import code_fingerprint
from uke.results.metrics import encoder_folder, open_encoder
from uke.results.stats import interval

RETRIEVERS = ("bm25", "dense", "dense-trained")
SCALE = 4000  # of vectors: products of their whole numbers stay below 2^24, exact in float32


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

    def ranks(self, queries: Sequence[str], indices: Sequence[int]) -> np.ndarray:
        """Find the rank (Q,), from 1, that each query gives to the passage at its index."""
        order = np.argsort(-self.scores(queries), axis=1, kind="stable")  # (Q, N)
        return 1 + (order == np.asarray(indices)[:, None]).argmax(axis=1)


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
        self._encode = whole_vectors(model)
        # Each text is embedded once: equal texts get equal vectors, whatever stands beside them.
        distinct = list(dict.fromkeys(texts))
        index = {text: number for number, text in enumerate(distinct)}
        weights = sha256(model / "model.safetensors")
        file = Path(folder) / f"vectors-{_digest([weights, SCALE, distinct])}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                with replacing(file) as part, part.open("wb") as opened:
                    np.save(opened, self._encode(distinct), allow_pickle=False)
        try:
            vectors = np.load(file, allow_pickle=False)  # (N, width) int16
        except (ValueError, OSError) as error:
            raise InputError(f"{file}: not a whole file of vectors ({error}); delete it") from None
        self._vectors = vectors[[index[text] for text in texts]].astype(np.float32)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        return self._encode(queries).astype(np.float32) @ self._vectors.T / SCALE**2


@functools.lru_cache(maxsize=2)
def whole_vectors(model: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Open a sentence encoder: N texts to whole numbers of 1 / SCALE, (N, width)."""
    network = open_encoder(model)

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = network.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.round(vectors * SCALE).astype(np.int16)

    return encode


def build(
    name: str, texts: Sequence[str], folder: str | Path, model: str | Path | None = None
) -> Index:
    """Make an index over N passages by the retriever `name`, one of RETRIEVERS.

    "dense" is MiniLM as it comes, "dense-trained" the encoder in the directory `model` that `train`
    wrote. Vectors are kept in `folder`. Raises InputError for an encoder that is not installed.
    """
    if name == "bm25":
        return Words(texts)
    return Vectors(texts, encoder_folder() if name == "dense" else Path(model), Path(folder))


def passage(document: Document) -> str:
    """Write a document as retrievers read it: its heading, then its text (as DPR does)."""
    return f"{document.heading}. {document.text}"


def over(documents: Sequence[Document], name: str, folder: str | Path) -> Index:
    """Make an index over documents; "dense-trained" is trained on the questions they bring."""
    model = train(documents, folder) if name == "dense-trained" else None
    return build(name, [passage(document) for document in documents], folder, model)


@dataclass(frozen=True)
class Training:
    """Every choice of the training of the retriever.

    `steps` of `batch` questions each bound its time, whatever the number of questions. `rate`: peak
    of AdamW's learning rate, reached after `warm_up` steps, then falling to 0 in a line. Each
    question brings a hard negative, drawn from the first `depth` that BM25 finds. `length`: word
    pieces read of a text. `frozen`: blocks of the encoder below the trained ones, embeddings
    included.

    Chosen by three-fold cross-validation over the titles that the notebook `locality_benchmarks`
    trains on, never on those it reports.
    """

    steps: int = 60
    batch: int = 16
    rate: float = 5e-5
    warm_up: int = 6
    depth: int = 20
    length: int = 64
    frozen: int = 3
    seed: int = 1


class Pair(NamedTuple):
    """A question, the index of the passage that answers it, and indices of its hard negatives."""

    question: str
    own: int
    negatives: np.ndarray


def train(
    documents: Sequence[Document], folder: str | Path, settings: Training | None = None
) -> Path:
    """Train MiniLM as a dual encoder on the questions that documents bring; return its directory.

    The directory is an ordinary sentence encoder, with its losses in `training.json`, named by what
    decides it and made where it is missing, whole or not at all. Positives are the questions' own
    documents, negatives the others of a batch and one that BM25 confuses with it. Source: dense
    passage retrieval (Karpukhin et al. 2020), though here questions and passages share their
    weights.
    """
    settings = settings or Training()
    if not any(document.questions for document in documents):
        raise InputError(
            "retriever 'dense-trained': none of the documents has a question to train on; "
            "expected 'dense' or 'bm25'"
        )
    base, code = encoder_folder(), code_fingerprint(("locality.retrieval",))
    sources = [[passage(document), document.title, document.questions] for document in documents]
    made = Path(folder) / f"dual-encoder-{_digest([asdict(settings), code, sources])}"
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not made.is_dir():
            model, losses = _learn(base, documents, settings)
            with replacing(made) as part:
                model.save(str(part), create_model_card=False)
                card = {"settings": asdict(settings), "losses": losses}
                (part / "training.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    return made


def hard_negatives(documents: Sequence[Document], depth: int) -> list[Pair]:
    """Pair every question with its document and up to `depth` others that BM25 confuses with it.

    Documents of the same title and those that hold the question's short answer are left out.
    """
    index = Words([passage(document) for document in documents])
    texts = [document.text.casefold() for document in documents]
    pairs = []
    for own, document in enumerate(documents):
        for question, answer in document.questions:
            (found,), _ = index.top([question], 4 * depth)
            wrong = [
                other
                for other in found
                if documents[other].title != document.title
                and not (answer and answer.casefold() in texts[other])
            ]
            pairs.append(Pair(question, own, np.array(wrong[:depth], dtype=np.int64)))
    return pairs


def draw_batches(pairs: Sequence[Pair], settings: Training) -> Iterator[list[tuple[Pair, int]]]:
    """Draw for each step questions of different passages, each with one of its hard negatives."""
    generator = np.random.default_rng(settings.seed)
    usable = [pair for pair in pairs if len(pair.negatives)]
    for _ in range(settings.steps):
        # A passage is no negative of its own questions, so a batch has each passage once.
        chosen = {
            usable[number].own: usable[number] for number in generator.permutation(len(usable))
        }
        batch = list(chosen.values())[: settings.batch]
        yield [(pair, int(generator.choice(pair.negatives))) for pair in batch]


def _learn(
    base: Path, documents: Sequence[Document], settings: Training
) -> tuple[Any, list[float]]:
    """Train a fresh copy of the encoder; return it with the loss of every step."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device
    from transformers import get_linear_schedule_with_warmup

    model = open_encoder(base).eval()  # no dropout
    longest, model.max_seq_length = model.max_seq_length, settings.length
    network = model[0].auto_model
    for part in (network.embeddings, *network.encoder.layer[: settings.frozen]):
        part.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.rate)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warm_up, settings.steps)
    criterion, losses = MultipleNegativesRankingLoss(model), []
    for batch in draw_batches(hard_negatives(documents, settings.depth), settings):
        columns = (
            [pair.question for pair, _ in batch],
            [passage(documents[pair.own]) for pair, _ in batch],
            [passage(documents[negative]) for _, negative in batch],
        )
        features = [batch_to_device(model.preprocess(texts), model.device) for texts in columns]
        loss = criterion(features, labels=None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 4))
    model.max_seq_length = longest
    return model, losses


def compare(
    documents: Sequence[Document],
    folder: str | Path,
    settings: Training | None = None,
    seed: int = 2024,
) -> pd.DataFrame:
    """Rank the passages of questions on titles that no training saw, by every retriever.

    Titles are split by chance into halves, the encoder is trained on the first, the larger one, and
    the questions of the second are searched among all documents. One row for each question: title
    (a number), passages, a rank for each retriever, and `<retriever>_seconds` it took in all,
    training included.
    """
    names = sorted({document.title for document in documents if document.questions})
    if len(names) < 2:
        raise InputError(f"titles: expected two or more with questions, found {len(names)}")
    order = np.random.default_rng(seed).permutation(len(names))
    titles = sorted(names[index] for index in order[(len(names) + 1) // 2 :])
    seen = [document for document in documents if document.title not in titles]
    asked = [
        (titles.index(document.title), question, index)
        for index, document in enumerate(documents)
        if document.title in titles
        for question, _ in document.questions
    ]
    numbers, questions, indices = zip(*asked, strict=True)
    frame = pd.DataFrame({"title": numbers, "passages": len(documents)})
    texts = [passage(document) for document in documents]
    for name in RETRIEVERS:
        started = time.perf_counter()
        model = train(seen, folder, settings) if name == "dense-trained" else None
        frame[name] = build(name, texts, folder, model).ranks(questions, indices)
        frame[f"{name}_seconds"] = time.perf_counter() - started
    return frame


def summarise(ranks: pd.DataFrame) -> pd.DataFrame:
    """Summarise the frame of `compare`: one row for each retriever and metric.

    `recall_at_k`: share of ranks up to k; `mrr`: mean of 1 / rank. Intervals are over titles, since
    the questions of a title stand or fall together.
    """
    rows = []
    for name in RETRIEVERS:
        measures = {f"recall_at_{k}": (ranks[name] <= k).to_numpy(float) for k in (1, 10, 100)}
        measures["mrr"] = (1 / ranks[name]).to_numpy()
        shared = {"questions": len(ranks), "seconds": ranks[f"{name}_seconds"].iloc[0]}
        for metric, values in measures.items():
            mean = interval(values, ranks["title"])._asdict()
            rows.append({"retriever": name, "metric": metric} | mean | shared)
    return pd.DataFrame(rows).rename(columns={"n": "titles"})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()[:24]
