"""Writes a world in the formats of the real benchmarks, so that the default run goes through the same loaders.

Per split: edits as UnKEBench (v3, with `mmlu_*`) and as AKEW CounterFact, triples as KnowEdit, exercises as probes, and
the documents that locality probes are retrieved from; and the texts of the preservation pool.
"""

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from uke.world.generate import EDITED, SPLITS, Entity, World, build, choice, exercise, hop, language

UNKEBENCH, AKEW, KNOWEDIT, GENERAL, DOCUMENTS = (
    "UnKEBench.json",
    "AKEW-CounterFact.json",
    "KnowEdit.json",
    "general.json",
    "documents.jsonl",
)
PRESERVATION = "preservation.json"


def ensure(folder: Path, seed: int) -> Path:
    """Folder `world-<seed>-<digest of its sources>` below `folder`, its files written whole or not at all if missing."""
    target = Path(folder) / f"world-{seed}-{digest()}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".world-"))
        try:
            write(build(seed), part)
            part.chmod(0o755)
            os.replace(part, target)
        except OSError:  # a second process was faster: its files are the same
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


@cache
def digest() -> str:
    """8 hex digits of what decides a world's files beside the seed."""
    sources = [
        Path(__file__).with_name(name).read_bytes()
        for name in ("generate.py", "world.yaml", "files.py")
    ]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def shuffled(world: World, split: str) -> list[tuple[str, Entity, Entity]]:
    """The edits of a split as (id, entity as trained, as edited), the kinds mixed, so that any first few are a fair sample."""
    pairs = random.Random(f"order-{world.seed}-{split}").sample(
        world.edits[split], len(world.edits[split])
    )
    return [(f"{split}-{number}", old, new) for number, (old, new) in enumerate(pairs)]


def write(world: World, folder: Path) -> None:
    """Every file of a world below `folder`, a subfolder per split; the same world gives the same bytes."""
    for split in SPLITS:
        contents = {
            UNKEBENCH: unkebench(world, split),
            AKEW: akew(world, split),
            KNOWEDIT: knowedit(world, split),
            GENERAL: general(world, split),
        }
        for name, records in contents.items():
            save(records, folder / split / name)
        lines = [
            json.dumps(document, ensure_ascii=False) + "\n" for document in documents(world, split)
        ]
        (folder / split / DOCUMENTS).write_text("".join(lines), encoding="utf-8")
    texts = [
        {"question": entity.introduce(), "answer": entity.text}
        for entity in world.pools["preservation"]
    ]
    save(texts, folder / PRESERVATION)


def save(records: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unkebench(world: World, split: str) -> list[dict]:
    """Records in the format of UnKEBench v3; two-hop questions under the keys MQuAKE uses for them."""
    rng = random.Random(f"unkebench-{world.seed}-{split}")
    named = world.named()
    return [unkebench_record(name, new, named, rng) for name, _, new in shuffled(world, split)]


def unkebench_record(name: str, new: Entity, named: dict[str, Entity], rng: random.Random) -> dict:
    split = name.split("-")[0]
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
    if pair := hop(new, named, rng):
        record |= {"questions": [pair[0]], "new_answer": pair[1]}
    return record


def akew(world: World, split: str) -> list[dict]:
    """Records in the format of AKEW CounterFact: one cloze stands for the whole new text."""
    rng = random.Random(f"akew-{world.seed}-{split}")
    return [akew_record(name, old, new, rng) for name, old, new in shuffled(world, split)]


def akew_record(name: str, old: Entity, new: Entity, rng: random.Random) -> dict:
    split, number = name.split("-")
    relation = rng.choice(list(new.objects))
    prompts = {name: entry["cloze"].replace("{s}", "{}") for name, entry in new.relations.items()}
    triplets = [
        {"subject": new.name, "prompt": prompts[name], "target": new.objects[name]}
        for name in new.objects
    ]
    rewrite = {
        "prompt": prompts[relation],
        "relation_id": relation,
        "target_new": {"str": new.objects[relation], "id": new.objects[relation]},
        "target_true": {"str": old.objects[relation], "id": old.objects[relation]},
        "subject": new.name,
        "prompt_full": new.cloze(relation),
        "fact_new": f"{new.cloze(relation)} {new.objects[relation]}.",
        "question": new.ask(relation),
        "answer_new": new.objects[relation],
        "answer_new_aliases": [],
        "answer_true": old.objects[relation],
        "answer_true_aliases": [],
        "fact_new_uns": new.text,
        "verify_unsfact_GPT": True,
        "unsfact_triplets_GPT": triplets,
    }
    return {
        "case_id": int(number),
        "pararel_idx": int(number),
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [new.ask(relation, split)],
        "neighborhood_prompts": [],
    }


def knowedit(world: World, split: str) -> list[dict]:
    """Two triples of every probed entity in the format of KnowEdit: what StructTrip and near triples draw from."""
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
    """For every edit two exercises as probes; the one of multiple choice stands in the edit's own record, as number 0."""
    rng = random.Random(f"general-{world.seed}-{split}")
    probes = []
    for name, _, _ in shuffled(world, split):
        for number, skill in enumerate(("sum", "sort"), start=1):
            question, answer = exercise(rng, skill)
            probes.append(
                {
                    "edit": name,
                    "kind": "general",
                    "number": number,
                    "question": question,
                    "reference": answer,
                }
            )
    return probes


def collection(world: World, split: str) -> list[Entity]:
    """The entities whose texts a split's locality documents are retrieved from.

    Beside the probed pool they are what an encyclopedia would hold and no probe may be made of: the stale texts of the
    very subjects that are edited, and those of the entities that the edits point at.
    """
    found = [
        entity for pool in (split, f"{split}_locality", "held_out") for entity in world.pools[pool]
    ]
    return [
        entity
        for entity in found
        if entity.pool in EDITED or not ambiguous().intersection(entity.objects.values())
    ]


@cache
def ambiguous() -> frozenset[str]:
    """Values that the language also uses otherwise: as a word of a wording ("a dancing bear") or of another value ("glass swan").

    A document with such a value may not be asked for: whether another text names the value could not be told from its words.
    """
    kinds, values = language()["kinds"].values(), language()["values"].values()
    listed = [value for each in values if isinstance(each, list) for value in each]
    spoken = [
        wording
        for kind in kinds
        for relation in kind["relations"].values()
        for wording in relation["wordings"]
    ]
    counts = Counter(
        word for text in (*spoken, *listed) for word in set(re.findall(r"\w+", text.casefold()))
    )
    own = Counter(value.casefold() for value in listed)
    return frozenset(value for value in listed if counts[value.casefold()] > own[value.casefold()])


def documents(world: World, split: str) -> list[dict]:
    """The collection in a random order, as JSON lines have it; each with a question that its whole text answers."""
    rng = random.Random(f"documents-{world.seed}-{split}")
    found = collection(world, split)
    return [
        {
            "id": entity.name,
            "title": entity.name,
            "text": entity.text,
            "question": entity.introduce(number=rng.randrange(6)),
        }
        for entity in rng.sample(found, len(found))
    ]
