"""Train the retriever of locality sets, as dense passage retrieval is, and compare it.

    python tools/train_retriever.py results/retriever squad.json texts.jsonl

writes an ordinary sentence encoder, which `retriever: results/retriever` in params/locality.yaml
then uses, and prints how well BM25, MiniLM and MiniLM trained on half of the titles find the
passages of questions on the other half. Source: Karpukhin et al. 2020, though here questions and
passages share their weights.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device
from transformers import get_linear_schedule_with_warmup
from uke.data.documents import Document, gather
from uke.errors import InputError
from uke.files import replacing
from uke.locality.retrieval import bm25, build, passage, ranking
from uke.results.metrics import encoder_folder, open_encoder
from uke.results.stats import interval


@dataclass(frozen=True)
class Training:
    """Every choice of the training.

    Chosen by three-fold cross-validation over the titles that a comparison trains on, never on
    those it reports.
    """

    steps: int = 60  # they bound the time, whatever the number of questions
    batch: int = 16  # questions of a step
    rate: float = 5e-5  # peak of AdamW's learning rate, which then falls to 0 in a line
    warm_up: int = 6  # steps before the peak
    depth: int = 20  # hard negatives are drawn from the first that BM25 finds
    length: int = 64  # word pieces read of a text
    frozen: int = 3  # blocks of the encoder below the trained ones, embeddings included
    seed: int = 1


class Pair(NamedTuple):
    """A question, the index of the passage that answers it, and indices of its hard negatives."""

    question: str
    own: int
    negatives: np.ndarray


def train(documents: Sequence[Document], folder: Path, settings: Training = Training()) -> Path:
    """Train MiniLM as a dual encoder on the questions that documents bring; return its directory.

    Positives are the questions' own documents, negatives the others of a batch and one that BM25
    confuses with it. The directory is written whole or not at all.
    """
    pairs = hard_negatives(documents, settings.depth)
    if not any(len(pair.negatives) for pair in pairs):
        raise InputError("documents: none has a question to train on")
    model = open_encoder(encoder_folder()).eval()  # no dropout
    longest, model.max_seq_length = model.max_seq_length, settings.length
    network = model[0].auto_model
    for part in (network.embeddings, *network.encoder.layer[: settings.frozen]):
        part.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.rate)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warm_up, settings.steps)
    criterion = MultipleNegativesRankingLoss(model)
    for batch in draw_batches(pairs, settings):
        columns = (
            [pair.question for pair, _ in batch],
            [passage(documents[pair.own]) for pair, _ in batch],
            [passage(documents[negative]) for _, negative in batch],
        )
        features = [batch_to_device(model.preprocess(texts), model.device) for texts in columns]
        optimizer.zero_grad()
        criterion(features, labels=None).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.max_seq_length = longest
    with replacing(folder) as part:
        model.save(str(part), create_model_card=False)
    return folder


def hard_negatives(documents: Sequence[Document], depth: int) -> list[Pair]:
    """Pair every question with its document and up to `depth` others that BM25 confuses with it.

    Documents of the same title and those that hold the question's short answer are left out.
    """
    score = bm25(list(map(passage, documents)))
    texts = [document.text.casefold() for document in documents]
    pairs = []
    for own, document in enumerate(documents):
        for question, answer in document.questions:
            found = ranking(score([question])[0])[: 4 * depth]
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
        chosen = {usable[index].own: usable[index] for index in generator.permutation(len(usable))}
        batch = list(chosen.values())[: settings.batch]
        yield [(pair, int(generator.choice(pair.negatives))) for pair in batch]


def compare(
    documents: Sequence[Document], settings: Training = Training(), seed: int = 2024
) -> pd.DataFrame:
    """Rank the passages of questions on titles that no training saw, by every retriever.

    Titles are split by chance into halves, the encoder is trained on the first, the larger one, and
    the questions of the second are searched among all documents. One row for each question: title
    (a number) and the rank, from 1, that each retriever gives to its passage.
    """
    names = sorted({document.title for document in documents if document.questions})
    if len(names) < 2:
        raise InputError(f"titles: expected two or more with questions, found {len(names)}")
    order = np.random.default_rng(seed).permutation(len(names))
    titles = sorted(names[index] for index in order[(len(names) + 1) // 2 :])
    asked = [
        (titles.index(document.title), question, index)
        for index, document in enumerate(documents)
        if document.title in titles
        for question, _ in document.questions
    ]
    numbers, questions, own = zip(*asked, strict=True)
    frame = pd.DataFrame({"title": numbers})
    with tempfile.TemporaryDirectory() as folder:
        seen = [document for document in documents if document.title not in titles]
        trained = train(seen, Path(folder) / "trained", settings)
        for name in ("bm25", "dense", str(trained)):
            score = build(name, list(map(passage, documents)))
            best = ranking(score(questions))
            frame[Path(name).name] = 1 + (best == np.array(own)[:, None]).argmax(axis=1)
    return frame


def summarise(ranks: pd.DataFrame) -> pd.DataFrame:
    """Average 1 / rank and the share of ranks up to 1 and 10, with 95 % intervals over titles.

    Questions of a title stand or fall together.
    """
    rows = []
    for name in ("bm25", "dense", "trained"):
        measures = {f"recall at {k}": (ranks[name] <= k).to_numpy(float) for k in (1, 10)}
        measures["reciprocal rank"] = (1 / ranks[name]).to_numpy()
        for metric, values in measures.items():
            rows.append((name, metric, *interval(values, ranks["title"]), len(ranks)))
    columns = ["retriever", "metric", "mean", "low", "high", "titles", "questions"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the retriever of locality sets.")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("documents", nargs="+", help="files of documents that bring questions")
    given = parser.parse_args()
    documents = gather(given.documents)
    print(summarise(compare(documents)).round(3).to_string(index=False))
    print(f"trained on all titles: {train(documents, given.out)}")


if __name__ == "__main__":
    main()
