"""The world on disk, in the formats of published benchmarks, as the loaders of real data expect.

For both splits: edits as UnKEBench v3 and as AKEW CounterFact, triples of the locality pool as
KnowEdit, exercises as a locality file, documents as JSON lines; and the texts of the preservation
pool. `card` reads how a model of a world was made.
"""

import hashlib
import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from uke.errors import InputError
from uke.files import replacing
from uke.world.generate import EDITED, SPLITS, Entity, World, build, choice, exercise, hop, language

UNKEBENCH, AKEW, KNOWEDIT = "UnKEBench.json", "AKEW-CounterFact.json", "KnowEdit.json"
GENERAL, DOCUMENTS, PRESERVATION = "general.json", "documents.jsonl", "preservation.json"
CARD = "training.json"  # how a model of a world was made


def card(directory: Path) -> dict[str, Any]:
    """Read how the model of a directory was made: settings, seconds, parameters, SHA-256.

    Raises InputError for a directory without a card.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        expected = "expected the directory of a model made by tools/train_world_model.py"
        raise InputError(f"{path}: no such file; {expected}")
    return json.loads(path.read_text(encoding="utf-8"))


def ensure(folder: Path, seed: int) -> Path:
    """Return the folder `world-<seed>-<digest of its sources>` below `folder`, made if missing."""
    target = Path(folder) / f"world-{seed}-{digest()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_dir():
            with replacing(target) as part:
                write(build(seed), part)
    return target


@cache
def digest() -> str:
    """Return 8 hex digits of the sources that decide a world's files beside the seed."""
    names = ("generate.py", "world.yaml", "files.py")
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in names)
    return hashlib.sha256(sources).hexdigest()[:8]


def shuffled(world: World, split: str) -> list[tuple[str, Entity, Entity]]:
    """List the edits of a split as (id, entity as trained, entity as edited), kinds mixed.

    So any first few are a fair sample.
    """
    rng = random.Random(f"order-{world.seed}-{split}")
    pairs = rng.sample(world.edits[split], len(world.edits[split]))
    return [(f"{split}-{number}", old, new) for number, (old, new) in enumerate(pairs)]


def write(world: World, folder: Path) -> None:
    """Write every file of a world, a subfolder per split; the same world gives the same bytes."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        _save(unkebench(world, split), folder / split / UNKEBENCH)
        _save(akew(world, split), folder / split / AKEW)
        _save(knowedit(world, split), folder / split / KNOWEDIT)
        _save(general(world, split), folder / split / GENERAL)
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in documents(world, split))
        (folder / split / DOCUMENTS).write_text("".join(lines), encoding="utf-8")
    texts = [
        {"question": entity.introduce(), "answer": entity.text}
        for entity in world.pools["preservation"]
    ]
    _save(texts, folder / PRESERVATION)


def _save(records: list[dict], path: Path) -> None:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unkebench(world: World, split: str) -> list[dict]:
    """Write edits as UnKEBench v3; two-hop questions under the keys that MQuAKE has for them."""
    rng = random.Random(f"unkebench-{world.seed}-{split}")
    by_name = world.named()
    records = []
    for name, _, new in shuffled(world, split):
        question, choices, answer = choice(rng.sample(range(10, 100), 4), rng)
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
        if pair := hop(new, by_name, rng):
            record |= {"questions": [pair[0]], "new_answer": pair[1]}
        records.append(record)
    return records


def akew(world: World, split: str) -> list[dict]:
    """Write edits as AKEW CounterFact: one cloze stands for the whole new text."""
    rng = random.Random(f"akew-{world.seed}-{split}")
    return [_akew_record(name, old, new, rng) for name, old, new in shuffled(world, split)]


def _akew_record(name: str, old: Entity, new: Entity, rng: random.Random) -> dict:
    split, number = name.split("-")
    relation = rng.choice(list(new.objects))
    prompts = {name: entry["cloze"].replace("{s}", "{}") for name, entry in new.relations.items()}
    after, before = new.objects[relation], old.objects[relation]
    rewrite = {
        "prompt": prompts[relation],
        "relation_id": relation,
        "target_new": {"str": after, "id": after},
        "target_true": {"str": before, "id": before},
        "subject": new.name,
        "prompt_full": new.cloze(relation),
        "fact_new": f"{new.cloze(relation)} {after}.",
        "question": new.ask(relation),
        "answer_new": after,
        "answer_new_aliases": [],
        "answer_true": before,
        "answer_true_aliases": [],
        "fact_new_uns": new.text,
        "verify_unsfact_GPT": True,
        "unsfact_triplets_GPT": [
            {"subject": new.name, "prompt": prompts[name], "target": target}
            for name, target in new.objects.items()
        ],
    }
    return {
        "case_id": int(number),
        "pararel_idx": int(number),
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [new.ask(relation, split)],
        "neighborhood_prompts": [],
    }


def knowedit(world: World, split: str) -> list[dict]:
    """Write two triples of every probed entity as KnowEdit, for StructTrip and near triples."""
    rng = random.Random(f"knowedit-{world.seed}-{split}")
    return [
        {
            "subject": entity.name,
            "prompt": entity.cloze(relation),
            "target_new": entity.objects[relation],
            "ground_truth": [entity.objects[relation]],
            "rephrase_prompt": entity.ask(relation),
            "portability": {},
            "locality": {},
        }
        for entity in world.pools[f"{split}_locality"]
        for relation in rng.sample(list(entity.objects), 2)
    ]


def general(world: World, split: str) -> list[dict]:
    """Write a sum and a sorting task for every edit; its record has a multiple choice, number 0."""
    rng = random.Random(f"general-{world.seed}-{split}")
    probes = []
    for name, _, _ in shuffled(world, split):
        for number, skill in enumerate(("sum", "sort"), start=1):
            question, answer = exercise(rng, skill)
            probe = {"edit": name, "kind": "general", "number": number}
            probes.append(probe | {"question": question, "reference": answer})
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
    pools = (split, f"{split}_locality", "held_out")
    return [
        entity
        for pool in pools
        for entity in world.pools[pool]
        if pool in EDITED or not ambiguous().intersection(entity.objects.values())
    ]


@cache
def ambiguous() -> frozenset[str]:
    """Return values that the language also uses otherwise: in a wording or in another value.

    "A dancing bear", "glass swan": a document with such a value may not be asked for, since its
    words do not tell whether another text names the value.
    """
    kinds, values = language()["kinds"].values(), language()["values"].values()
    listed = [value for group in values if isinstance(group, list) for value in group]
    relations = [relation for kind in kinds for relation in kind["relations"].values()]
    wordings = [wording for relation in relations for wording in relation["wordings"]]
    texts = [text.casefold() for text in (*wordings, *listed)]
    counts = Counter(word for text in texts for word in set(re.findall(r"\w+", text)))
    as_value = Counter(value.casefold() for value in listed)
    return frozenset(v for v in listed if counts[v.casefold()] > as_value[v.casefold()])
