"""Trains the retriever: MiniLM as a dual encoder on question-passage pairs, with in-batch and hard BM25 negatives.

Source: dense passage retrieval (Karpukhin et al. 2020). Unlike there, questions and passages share their weights, as in
MiniLM itself. The lower blocks are frozen, and what they make of each text is computed once.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from uke.errors import InputError
from uke.locality.embedding import Encoder, batches, digest, opened, pooled
from uke.locality.ranking import Words, check_texts
from uke.project import code_fingerprint

CARD = "training.json"


class Pair(NamedTuple):
    """A question, the place of the passage that answers it, and the short answer where it is known."""

    question: str
    place: int
    answer: str = ""


@dataclass(frozen=True)
class Settings:
    """Every choice of the training.

    `steps` of `batch` questions each, in shuffled rounds over the pairs: time is bounded whatever the number of pairs.
    `rate`: peak of AdamW's learning rate, reached after a share `warm_up` of the steps, then falling to 0 in a line.
    `scale`: factor of the cosines in the softmax (1 / temperature). `negatives`: hard ones per question and step, drawn
    from the first `depth` that BM25 finds. `length`: word pieces of a passage, `question_length` of a question.
    `frozen`: blocks below the trained ones (of 6), embeddings included. `decay`: weight decay of matrices.

    Chosen by three-fold cross-validation over the titles that the notebook `locality_benchmarks` trains on, never on those it
    reports: twice the steps, three times the rate, or sentences as further questions gained nothing or lost.
    """

    steps: int = 60
    batch: int = 16
    rate: float = 5e-5
    warm_up: float = 0.1
    scale: float = 20.0
    negatives: int = 1
    depth: int = 20
    length: int = 64
    question_length: int = 48
    frozen: int = 3
    decay: float = 0.01
    seed: int = 1

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch": 2,
            "negatives": 0,
            "depth": 1,
            "length": 8,
            "question_length": 8,
            "frozen": 0,
            "seed": 0,
        }
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name in least
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or value < least.get(field.name, 0)
            ):
                kind = f"a whole number from {least[field.name]}" if whole else "a number from 0"
                raise InputError(f"dual_encoder, {field.name}: expected {kind}, found {value!r}")
        if self.warm_up >= 1:
            raise InputError(
                f"dual_encoder, warm_up: expected a share below 1, found {self.warm_up!r}"
            )


class Material(NamedTuple):
    """What a training is made from; `negatives[i]` are the places of pair i's hard negatives, best first."""

    pairs: Sequence[Pair]
    passages: Sequence[str]
    negatives: list[np.ndarray]


def train(
    pairs: Sequence[Pair],
    passages: Sequence[str],
    settings: Settings,
    folder: str | Path,
    titles: Sequence[str] = (),
) -> Path:
    """Directory of MiniLM trained on `pairs`, in `folder`: an ordinary sentence encoder, with its losses in training.json.

    Named by the fingerprint of everything that decides it, and made where it is missing, whole or not at all; the same
    input gives the same weights on one machine with one number of threads. `titles`, one for each passage, keep passages of
    one document from being negatives of each other's questions. Raises InputError for unfit pairs, or fewer passages than a
    batch.
    """
    from uke.results.similarity import encoder_folder

    _check(pairs, passages, settings, titles)
    base = encoder_folder()
    code = code_fingerprint(("locality.embedding", "locality.dual_encoder"))
    parts = [
        Encoder(base).fingerprint,
        json.dumps([asdict(settings), [list(pair) for pair in pairs], list(titles), code]),
        *passages,
    ]
    made = (
        Path(folder)
        / f"dual-encoder-{digest(part.encode('utf-8', 'surrogatepass') for part in parts)[:24]}"
    )
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not made.is_dir():
            _write(
                base,
                Material(pairs, passages, hard_negatives(pairs, passages, settings.depth, titles)),
                settings,
                made,
            )
    return made


def hard_negatives(
    pairs: Sequence[Pair], passages: Sequence[str], depth: int, titles: Sequence[str] = ()
) -> list[np.ndarray]:
    """For every pair up to `depth` places of the passages BM25 finds first that are no answer to it.

    Left out: the pair's own passage, those that hold its short answer, and those of the same title.
    """
    index = Words(passages)
    found, _ = index.top(
        [pair.question for pair in pairs], min(len(passages), 4 * depth)
    )  # (pairs, at most 4 * depth)
    plain = [" ".join(passage.casefold().split()) for passage in passages]
    kept = []
    for pair, places in zip(pairs, found):
        answer = " ".join(pair.answer.casefold().split())
        wrong = [
            place
            for place in places
            if place != pair.place
            and not (answer and answer in plain[place])
            and not (titles and titles[place] == titles[pair.place])
        ]
        kept.append(np.array(wrong[:depth], dtype=np.int64))
    return kept


def _check(
    pairs: Sequence[Pair], passages: Sequence[str], settings: Settings, titles: Sequence[str]
) -> None:
    check_texts("passages", passages, 1)
    if not pairs:
        raise InputError("pairs: expected questions with the places of their passages, found none")
    check_texts("questions", [pair[0] for pair in pairs])
    wrong = next(
        (
            pair
            for pair in pairs
            if isinstance(pair.place, bool) or not 0 <= pair.place < len(passages)
        ),
        None,
    )
    if wrong:
        raise InputError(
            f"pairs: question {wrong.question!r} names passage {wrong.place}; expected 0 to {len(passages) - 1}"
        )
    if min(len(pairs), len(passages)) < settings.batch:
        raise InputError(
            f"dual_encoder, batch: {settings.batch} is more than {len(pairs)} pairs or {len(passages)} passages; expected fewer"
        )
    if titles and len(titles) != len(passages):
        raise InputError(
            f"titles: expected one for each of {len(passages)} passages, found {len(titles)}"
        )


def _write(base: Path, material: Material, settings: Settings, made: Path) -> None:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=made.parent) as room:
        whole = Path(room) / "model"
        shutil.copytree(base, whole, copy_function=shutil.copyfile)
        weights, losses = _learn(base, material, settings)
        save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
        card = {
            "settings": asdict(settings),
            "pairs": len(material.pairs),
            "passages": len(material.passages),
            "losses": losses,
        }
        (whole / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        os.replace(whole, made)


def _learn(base: Path, material: Material, settings: Settings) -> tuple[dict, list[float]]:
    """All weights after the training, by name, and the loss of each step."""
    import torch

    opened.cache_clear()  # the trained blocks would otherwise be those of an encoder in use
    network, _ = opened(base)
    opened.cache_clear()
    try:
        lower, upper = split(network, settings.frozen)
    except AttributeError as error:
        raise InputError(
            f"{base}: expected a BERT encoder, whose lower blocks can be frozen ({error})"
        ) from None
    states = _States(base, lower, material, settings)
    matrices = [weight for weight in upper.parameters() if weight.ndim > 1]
    rest = [weight for weight in upper.parameters() if weight.ndim < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=settings.rate,
    )
    losses = []
    for step, (chosen, negatives) in enumerate(draws(material, settings)):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * rate_at(step, settings)
        loss = _loss(upper, states, material, (chosen, negatives), settings.scale)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(upper.parameters(), 1.0)
        optimiser.step()
        losses.append(round(loss.item(), 4))
    return {
        name: weight.detach().cpu().contiguous() for name, weight in network.state_dict().items()
    }, losses


def rate_at(step: int, settings: Settings) -> float:
    """Share of the peak rate at a step: a line up over the warm-up, a line down to 0 after it."""
    warm = settings.warm_up * settings.steps
    return (
        (step + 1) / (warm + 1)
        if step < warm
        else (settings.steps - step) / (settings.steps - warm)
    )


def draws(material: Material, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step the numbers of its pairs and the places of their hard negatives."""
    generator = np.random.default_rng(settings.seed)
    waiting = np.empty(0, dtype=np.int64)
    for _ in range(settings.steps):
        if len(waiting) < settings.batch:
            waiting = np.concatenate([waiting, generator.permutation(len(material.pairs))])
        chosen, waiting = waiting[: settings.batch], waiting[settings.batch :]
        drawn = [
            generator.permutation(material.negatives[pair])[: settings.negatives] for pair in chosen
        ]
        yield chosen, np.concatenate(drawn)


def split(network, frozen: int) -> tuple:
    """The frozen lower part of a BERT (ids -> states) and the trained upper part (states -> states), sharing its weights."""
    import torch

    class Given(torch.nn.Module):
        def forward(self, inputs_embeds=None, **_):
            return inputs_embeds

    blocks = network.encoder.layer
    if frozen > len(blocks) - 1:
        raise InputError(
            f"dual_encoder, frozen: expected at most {len(blocks) - 1} of {len(blocks)} blocks, found {frozen}"
        )
    parts = []
    for chosen, embeddings in ((blocks[:frozen], network.embeddings), (blocks[frozen:], Given())):
        with torch.random.fork_rng():
            part = type(network)(network.config, add_pooling_layer=False).to(network.device).eval()
        part.encoder.layer, part.embeddings = chosen, embeddings
        parts.append(part)
    return tuple(parts)


class _States:
    """What the frozen part makes of texts: computed once, kept up to `MOST` texts."""

    MOST = 16384

    def __init__(self, base: Path, lower, material: Material, settings: Settings):
        self.lower, self.material, self.kept = lower, material, {}
        self.encoders = {
            "passages": Encoder(base, settings.length),
            "pairs": Encoder(base, settings.question_length),
        }

    def __call__(self, kind: str, places: Sequence[int]) -> tuple:
        """States (n, L, width) and mask (n, L) of these passages, or of these pairs' questions."""
        import torch

        if len(self.kept) > self.MOST:
            self.kept.clear()
        missing = [place for place in places if (kind, place) not in self.kept]
        texts = [
            self.material.passages[place]
            if kind == "passages"
            else self.material.pairs[place].question
            for place in missing
        ]
        for chosen, ids, mask in batches(self.encoders[kind].pieces(texts), 64):
            with torch.no_grad():
                states = self.lower(
                    input_ids=ids.to(self.lower.device), attention_mask=mask.to(self.lower.device)
                ).last_hidden_state
            for row, (number, count) in enumerate(zip(chosen, mask.sum(1).tolist())):
                self.kept[kind, missing[number]] = states[row, :count].clone()
        rows = [self.kept[kind, place] for place in places]
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows],
            batch_first=True,
        )
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def _loss(
    upper, states: _States, material: Material, drawn: tuple[np.ndarray, np.ndarray], scale: float
):
    """Cross-entropy of each question's own passage among all passages of the batch, each of them there once."""
    import torch

    pairs, negatives = drawn
    own = np.array([material.pairs[pair].place for pair in pairs])
    passages, target = np.unique(np.concatenate([own, negatives]), return_inverse=True)
    sides = []
    for given, mask in (states("pairs", pairs.tolist()), states("passages", passages.tolist())):
        sides.append(pooled(upper(inputs_embeds=given, attention_mask=mask), mask))
    cosines = sides[0] @ sides[1].T  # (questions, passages)
    return torch.nn.functional.cross_entropy(
        scale * cosines, torch.from_numpy(target[: len(own)]).to(cosines.device)
    )
