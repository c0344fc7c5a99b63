"""What a model knows of a world before any edit: questions about its known facts, asked and scored."""

import random
from collections.abc import Iterator

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Probe
from uke.models.generate import answer
from uke.models.prompts import reading
from uke.results.metrics import Interval, interval, score
from uke.world.generate import Entity, World, exercise, stranger

# The measure of each examination, and the least value the embedded model must reach before it ships.
EXAMINATIONS = {
    "original": ("rougel_recall", 0.98),
    "detail": ("exact", 0.97),
    "struct_trip": ("exact", 0.97),
    "paraphrase": ("rougel_recall", None),
    "detail_held_out": ("exact", None),
    "reading": ("exact", None),
    "general": ("exact", None),
}


def examine(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World, count: int, seed: int = 2024
) -> pd.DataFrame:
    """Scores on `count` entities drawn from all pools, and on as many strangers' texts and exercises.

    Columns: examination, edit (the entity's name: the unit of intervals), question, reference, answer, score.
    `paraphrase` and `detail_held_out` use the phrasings that pretraining never saw; `reading` asks about a text
    in the prompt on an entity that does not exist; the others use trained phrasings.
    """
    rng = random.Random(f"examination-{world.seed}-{seed}")
    entities = rng.sample(world.entities, min(count, len(world.entities)))
    asked = [(name, probe) for entity in entities for name, probe in about(entity, rng)]
    asked += list(beyond(world, len(entities), rng))
    answers = answer(model, tokenizer, [probe for _, probe in asked])
    scores = score(answers, [probe.reference for _, probe in asked])
    columns = {"examination": [name for name, _ in asked], "answer": answers}
    columns |= {
        field: [getattr(probe, field) for _, probe in asked]
        for field in ("edit", "question", "reference")
    }
    return pd.DataFrame(
        columns
        | {
            "score": [
                scores[EXAMINATIONS[name][0]].iloc[row] for row, (name, _) in enumerate(asked)
            ]
        }
    )


def about(entity: Entity, rng: random.Random) -> Iterator[tuple[str, Probe]]:
    """Every examination on one entity's known facts."""
    held_out = rng.choice(("development", "test"))
    yield (
        "original",
        Probe(
            edit=entity.name,
            kind="original",
            question=entity.introduce(number=rng.randrange(6)),
            reference=entity.text,
        ),
    )
    yield (
        "paraphrase",
        Probe(
            edit=entity.name,
            kind="paraphrase",
            question=entity.introduce(held_out, rng.randrange(2)),
            reference=entity.text,
        ),
    )
    for number, (relation, known) in enumerate(entity.objects.items()):
        place = {"edit": entity.name, "number": number, "reference": known}
        yield (
            "detail",
            Probe(kind="detail", question=entity.ask(relation, number=rng.randrange(4)), **place),
        )
        yield (
            "detail_held_out",
            Probe(kind="detail", question=entity.ask(relation, held_out), **place),
        )
        yield (
            "struct_trip",
            Probe(kind="struct_trip", question=entity.cloze(relation), chat=False, **place),
        )


def beyond(world: World, count: int, rng: random.Random) -> Iterator[tuple[str, Probe]]:
    """Texts about strangers with a question each, and exercises."""
    known = {name for entity in world.entities for name in (entity.name, entity.name.split()[-1])}
    for number in range(count):
        other = stranger(rng, known)
        relation = rng.choice(list(other.objects))
        question = reading(other.text, other.ask(relation, number=rng.randrange(4)))
        yield (
            "reading",
            Probe(
                edit=f"stranger {number}",
                kind="detail",
                question=question,
                reference=other.objects[relation],
            ),
        )
        question, solution = exercise(rng)
        yield (
            "general",
            Probe(edit=f"exercise {number}", kind="general", question=question, reference=solution),
        )


def intervals(found: pd.DataFrame) -> dict[str, Interval]:
    """Mean and interval over entities of each examination, from what `examine` gives."""
    means = found.groupby(["examination", "edit"])["score"].mean()
    return {name: interval(means[name].to_numpy()) for name in EXAMINATIONS}
