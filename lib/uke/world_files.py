"""Writes a world in the formats of the real benchmarks, so that the default run goes through the same loaders.

Per split: edits as UnKEBench (v3, with `mmlu_*`) and as AKEW CounterFact, triples as KnowEdit, locality probes made
from the world's known facts; and the texts of the preservation pool.
"""

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from uke.world import SPLITS, Entity, World, build, choice, exercise, hop

UNKEBENCH, AKEW, KNOWEDIT, LOCALITY = "UnKEBench.json", "AKEW-CounterFact.json", "KnowEdit.json", "locality.json"
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
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("world.py", "world.yaml", "world_files.py")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def shuffled(world: World, split: str) -> list[tuple[str, Entity, Entity]]:
    """The edits of a split as (id, entity as trained, as edited), the kinds mixed, so that any first few are a fair sample."""
    pairs = random.Random(f"order-{world.seed}-{split}").sample(world.edits[split], len(world.edits[split]))
    return [(f"{split}-{number}", old, new) for number, (old, new) in enumerate(pairs)]


def write(world: World, folder: Path) -> None:
    """Every file of a world below `folder`, a subfolder per split; the same world gives the same bytes."""
    for split in SPLITS:
        contents = {UNKEBENCH: unkebench(world, split), AKEW: akew(world, split), KNOWEDIT: knowedit(world, split), LOCALITY: locality(world, split)}
        for name, records in contents.items():
            save(records, folder / split / name)
    texts = [{"question": entity.introduce(), "answer": entity.text} for entity in world.pools["preservation"]]
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
    triplets = [{"subject": new.name, "prompt": prompts[name], "target": new.objects[name]} for name in new.objects]
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
    return {"case_id": int(number), "pararel_idx": int(number), "requested_rewrite": rewrite, "paraphrase_prompts": [new.ask(relation, split)], "neighborhood_prompts": []}


def knowedit(world: World, split: str) -> list[dict]:
    """One triple of every probed entity in the format of KnowEdit: what StructTrip draws from."""
    rng = random.Random(f"knowedit-{world.seed}-{split}")
    records = []
    for entity in world.pools[f"{split}_locality"]:
        relation = rng.choice(list(entity.objects))
        records.append({"subject": entity.name, "prompt": entity.cloze(relation), "target_new": entity.objects[relation],
                        "ground_truth": [entity.objects[relation]], "portability": {}, "locality": {}})
    return records


def locality(world: World, split: str) -> list[dict]:
    """For every edit one probe of each locality kind, about entities that share no fact with any edit, and two exercises."""
    rng, pool = random.Random(f"locality-{world.seed}-{split}"), apart(world, split)
    return [probe for name, _, new in shuffled(world, split) for probe in locality_probes(pool, name, new, rng)]


def apart(world: World, split: str) -> list[Entity]:
    """The probed entities whose text names no subject and no object, old or new, of any edit of the split.

    Values are apart by construction, but one may be a word of another: the colour silver, a silver saddle.
    """
    edited = {text for pair in world.edits[split] for entity in pair for text in (entity.name, *entity.objects.values())}
    named = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, edited)) + r")(?!\w)")
    return [entity for entity in world.pools[f"{split}_locality"] if not named.search(entity.text)]


def locality_probes(pool: list[Entity], edit: str, new: Entity, rng: random.Random) -> Iterator[dict]:
    near, neighbour = rng.sample([entity for entity in pool if entity.kind == new.kind], 2)
    far, other = rng.sample([entity for entity in pool if entity.kind != new.kind], 2)
    yield {"edit": edit, "kind": "rel_doc", "question": near.introduce(number=rng.randrange(6)), "reference": near.text}
    yield {"edit": edit, "kind": "rand_doc", "question": far.introduce(number=rng.randrange(6)), "reference": far.text}
    relation = rng.choice(list(other.objects))
    yield {"edit": edit, "kind": "struct_trip", "question": other.cloze(relation), "reference": other.objects[relation], "chat": False}
    relation = rng.choice(list(neighbour.objects))
    yield {"edit": edit, "kind": "near_triple", "question": neighbour.ask(relation), "reference": neighbour.objects[relation]}
    for number, skill in enumerate(("sum", "sort"), start=1):
        question, answer = exercise(rng, skill)
        yield {"edit": edit, "kind": "general", "number": number, "question": question, "reference": answer}
