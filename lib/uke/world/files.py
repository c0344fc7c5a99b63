"""The world on disk, in the formats of published benchmarks, as the loaders of real data expect."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock

from uke.data.formats import read_json
from uke.files import replacing, sha256, write_atomic
from uke.project import EMBEDDED, code_fingerprint, digest
from uke.world.generate import SPLITS, Entity, World, build, choice, exercise, hop, language

UNKEBENCH, AKEW, KNOWEDIT = "UnKEBench.json", "AKEW-CounterFact.json", "KnowEdit.json"
GENERAL, DOCUMENTS, PRESERVATION = "general.json", "documents.json", "preservation.json"
CARD = "training.json"  # how tools/train_world_model.py made a model


def card(directory: Path) -> dict[str, Any]:
    """Read how the model of a directory was made; InputError for a directory without a card."""
    return read_json(Path(directory) / CARD)


def world_of(model: str) -> int | None:
    """Return the seed of the world that a model was trained on; None for any other model."""
    directory = EMBEDDED if model == "embedded" else Path(model)
    return card(directory)["settings"]["world_seed"] if (directory / CARD).is_file() else None


def ensure(folder: Path, seed: int) -> Path:
    """Return the folder `world-<seed>-<digest of its sources>` below `folder`, made if missing."""
    words = sha256(Path(__file__).with_name("world.yaml"))
    sources = digest("world", code=code_fingerprint(("world",)), words=words)
    target = Path(folder) / f"world-{seed}-{sources}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_dir():
            with replacing(target) as part:
                write(build(seed), part)
    return target


def edited(world: World, split: str) -> dict[str, Entity]:
    """Map the ids of a split's edits to the entities as edited, kinds mixed by chance."""
    rng = random.Random(f"order-{world.seed}-{split}")
    pairs = rng.sample(world.edits[split], len(world.edits[split]))
    return {f"{split}-{number}": new for number, (_, new) in enumerate(pairs)}


def write(world: World, folder: Path) -> None:
    """Write a world: a subfolder per split and, beside them, the texts of the preservation pool."""
    makers = {UNKEBENCH: unkebench, AKEW: akew, KNOWEDIT: knowedit}
    makers |= {GENERAL: general, DOCUMENTS: documents}
    made = {f"{split}/{name}": makers[name](world, split) for split in SPLITS for name in makers}
    kept = world.pools["preservation"]
    made[PRESERVATION] = [{"question": one.introduce(), "answer": one.text} for one in kept]
    for name, records in made.items():
        write_atomic(folder / name, json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def unkebench(world: World, split: str) -> list[dict]:
    """Write edits as UnKEBench v3; two-hop questions under the keys of MQuAKE."""
    rng = random.Random(f"unkebench-{world.seed}-{split}")
    records = []
    for name, new in edited(world, split).items():
        question, choices, answer = choice(rng)
        record = {
            "id": name,
            "question": new.introduce(number=rng.randrange(6)),
            "para_question": new.introduce(split, rng.randrange(2)),
            "answer": new.text,
            "sub_question": [new.ask(relation, split) for relation in new.objects],
            "sub_answer": list(new.objects.values()),
            "mmlu_questions": [question],
            "mmlu_choices": [choices],
            "mmlu_answer": [answer],
        }
        if pair := hop(new, world.named(), rng):
            record |= {"questions": [pair[0]], "new_answer": pair[1]}
        records.append(record)
    return records


def akew(world: World, split: str) -> list[dict]:
    """Write edits as AKEW CounterFact, without what no loader reads: a cloze asks for the text."""
    rng = random.Random(f"akew-{world.seed}-{split}")
    records = []
    for name, new in edited(world, split).items():
        relation = rng.choice(list(new.objects))
        prompts = {key: new.cloze(key).replace(new.name, "{}") for key in new.objects}
        rewrite = {
            "prompt": prompts[relation],
            "target_new": {"str": new.objects[relation]},
            "subject": new.name,
            "prompt_full": new.cloze(relation),
            "fact_new_uns": new.text,
            "unsfact_triplets_GPT": [
                {"subject": new.name, "prompt": prompts[key], "target": target}
                for key, target in new.objects.items()
            ],
        }
        record = {"case_id": int(name.split("-")[1]), "requested_rewrite": rewrite}
        records.append(record | {"paraphrase_prompts": [new.ask(relation, split)]})
    return records


def knowedit(world: World, split: str) -> list[dict]:
    """Write two triples of every probed entity as KnowEdit, for StructTrip and near triples."""
    rng = random.Random(f"knowedit-{world.seed}-{split}")
    return [
        {
            "subject": entity.name,
            "prompt": entity.cloze(relation),
            "ground_truth": [entity.objects[relation]],
            "rephrase_prompt": entity.ask(relation),
        }
        for entity in world.pools[f"{split}_locality"]
        for relation in rng.sample(list(entity.objects), 2)
    ]


def general(world: World, split: str) -> list[dict]:
    """Write a sum and a sorting task for every edit; its record has a multiple choice, number 0."""
    rng = random.Random(f"general-{world.seed}-{split}")
    probes = []
    for name in edited(world, split):
        for number, skill in enumerate(("sum", "sort"), start=1):
            task = dict(zip(("question", "reference"), exercise(rng, skill), strict=True))
            probes.append({"edit": name, "kind": "general", "number": number, **task})
    return probes


def documents(world: World, split: str) -> list[dict]:
    """Write the collection in random order, each text with a question that it answers."""
    rng = random.Random(f"documents-{world.seed}-{split}")
    entities = collection(world, split)
    return [
        {
            "id": entity.name,
            "title": entity.name,
            "text": entity.text,
            "question": entity.introduce(number=rng.randrange(6)),
        }
        for entity in rng.sample(entities, len(entities))
    ]


def collection(world: World, split: str) -> list[Entity]:
    """List the entities whose texts a split's locality documents are retrieved from.

    Beside the probed pool they are what an encyclopedia would hold and no probe may be made of: the
    stale texts of the very subjects that are edited, and those of the entities that edits point at.
    """
    unclear, probed = ambiguous(), world.pools[f"{split}_locality"]
    clear = [entity for entity in probed if not unclear.intersection(entity.objects.values())]
    return [*world.pools[split], *clear, *world.pools["held_out"]]


def ambiguous() -> set[str]:
    """Return values that the language also uses in a wording or another value ("glass swan").

    The words of a document with such a value do not tell whether another text names the value.
    """
    kinds, values = language()["kinds"].values(), language()["values"].values()
    listed = [value for group in values if isinstance(group, list) for value in group]
    relations = [relation for kind in kinds for relation in kind["relations"].values()]
    texts = [*listed, *(wording for relation in relations for wording in relation["wordings"])]
    counts = Counter(word for text in texts for word in set(re.findall(r"\w+", text.casefold())))
    as_value = Counter(value.casefold() for value in listed)
    return {value for value in listed if counts[value.casefold()] > as_value[value.casefold()]}
