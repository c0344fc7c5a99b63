"""The fictional world: entities whose every fact is known, texts and questions about them, edits of them.

A seed decides everything. Entities live in six pools that never refer to each other; edits replace every fact of
their subject and point only at the pool `held_out`, and literal values of edits never occur in a probed pool, so no
locality probe can touch a fact of any edit. The language (names, values, phrasings) is data: `world.yaml`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import yaml

POOLS = {
    "development": 60,
    "test": 120,
    "development_locality": 130,
    "test_locality": 256,
    "preservation": 80,
    "held_out": 80,
}
EDITED = ("development", "test", "held_out")  # pools whose literal values belong to the edits' side
SPLITS = ("development", "test")


@cache
def language() -> dict:
    """Names, values, kinds, relations and phrasings of the world, as written in `world.yaml`."""
    return yaml.safe_load(files("uke.world").joinpath("world.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Entity:
    """One thing of the world: its objects by relation, and the canonical text that describes it."""

    name: str
    kind: str
    pool: str
    pronouns: tuple[str, str]
    objects: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def relations(self) -> dict[str, dict]:
        return language()["kinds"][self.kind]["relations"]

    def ask(self, relation: str, phrasing: str = "trained", number: int = 0) -> str:
        """Question about one relation, in the numbered phrasing of a set (`trained`, `development`, `test`)."""
        return self.relations[relation]["questions"][phrasing][number].format(s=self.name)

    def introduce(self, phrasing: str = "trained", number: int = 0) -> str:
        """Question whose answer is the whole text."""
        return language()["kinds"][self.kind]["questions"][phrasing][number].format(s=self.name)

    def cloze(self, relation: str) -> str:
        return self.relations[relation]["cloze"].format(s=self.name)


@dataclass(frozen=True)
class World:
    """Entities by pool, and for both splits the pairs (entity as trained, entity as edited)."""

    seed: int
    pools: dict[str, tuple[Entity, ...]]
    edits: dict[str, tuple[tuple[Entity, Entity], ...]]

    @property
    def entities(self) -> tuple[Entity, ...]:
        return tuple(entity for pool in self.pools.values() for entity in pool)

    def named(self) -> dict[str, Entity]:
        return {entity.name: entity for entity in self.entities}


def build(seed: int = 1) -> World:
    """World of this seed: every call with the same seed gives the same world."""
    rng = random.Random(f"world-{seed}")
    used: set[str] = set()
    drafts = {
        pool: [draft(kind, pool, rng, used) for kind in kinds(size)] for pool, size in POOLS.items()
    }
    pools = {
        pool: tuple(settle(entity, members, rng) for entity in members)
        for pool, members in drafts.items()
    }
    edits = {
        split: tuple((old, settle(old, pools["held_out"], rng)) for old in pools[split])
        for split in SPLITS
    }
    return World(seed, pools, edits)


def kinds(size: int) -> Iterator[str]:
    """`size` kinds of entity in the shares of the language, the first kind taking what rounding leaves."""
    shares = {kind: entry["share"] for kind, entry in language()["kinds"].items()}
    counts = {kind: size * share // sum(shares.values()) for kind, share in shares.items()}
    counts[next(iter(counts))] += size - sum(counts.values())
    return (kind for kind, count in counts.items() for _ in range(count))


def invent(kind: str, rng: random.Random, used: set[str]) -> str:
    """A name nobody bears yet; `used` learns it. A person's surname is unique, given names repeat."""
    names = language()["names"]
    parts = names["surname" if kind == "person" else kind]
    while (name := "".join(rng.choice(parts[part]) for part in ("start", "middle", "end"))) in used:
        pass
    used.add(name)
    return f"{rng.choice(names['first'])} {name}" if kind == "person" else name


def draft(kind: str, pool: str, rng: random.Random, used: set[str]) -> Entity:
    return Entity(
        invent(kind, rng, used),
        kind,
        pool,
        tuple(rng.choice(language()["kinds"][kind]["pronouns"])),
    )


def literals(value: str, pool: str) -> list[str]:
    """Every literal a pool may use for a kind of value: even places for the edits' side, odd ones for the others."""
    values = language()["values"][value]
    if isinstance(values, dict):
        values = [str(number) for number in range(values["first"], values["last"] + 1)]
    return values[0 if pool in EDITED else 1 :: 2]


def settle(entity: Entity, referred: tuple | list, rng: random.Random) -> Entity:
    """The entity with a fresh object for every relation, none equal to its present one, and a fresh canonical text."""
    objects = {}
    for relation, entry in entity.relations.items():
        value = entry["value"]
        choices = (
            [other.name for other in referred if other.kind == value["entity"]]
            if isinstance(value, dict)
            else literals(value, entity.pool)
        )
        objects[relation] = rng.choice(
            [
                choice
                for choice in choices
                if choice not in (entity.name, entity.objects.get(relation))
            ]
        )
    settled = Entity(entity.name, entity.kind, entity.pool, entity.pronouns, objects)
    return Entity(
        entity.name, entity.kind, entity.pool, entity.pronouns, objects, describe(settled, rng)
    )


def describe(entity: Entity, rng: random.Random) -> str:
    """All facts in random order and wording: 60 to 120 words; the first sentence names the subject."""
    relations = rng.sample(list(entity.objects), len(entity.objects))
    return " ".join(
        sentence(entity, relation, rng, first=place == 0)
        for place, relation in enumerate(relations)
    )


def sentence(entity: Entity, relation: str, rng: random.Random, first: bool) -> str:
    name = f"The {entity.name}" if entity.kind == "event" else entity.name
    subject, possessive = (
        (name, f"{name}'" if name.endswith("s") else f"{name}'s")
        if first or rng.random() < 0.25
        else entity.pronouns
    )
    wording = rng.choice(entity.relations[relation]["wordings"])
    return wording.format(S=subject, P=possessive, o=entity.objects[relation])


def stranger(rng: random.Random, known: set[str], subject: Entity | None = None) -> Entity:
    """An entity of no pool, all its names fresh (or a known subject with fresh facts): what reading is judged on."""
    used = set(known)
    pool = rng.choice(list(POOLS))
    crowd = [draft(kind, pool, rng, used) for kind in ("person", "town", "company")]
    return settle(
        subject or draft(rng.choice(list(language()["kinds"])), pool, rng, used), crowd, rng
    )


def hop(entity: Entity, by_name: dict[str, Entity], rng: random.Random) -> tuple[str, str] | None:
    """A two-hop question and its answer: a relation of an entity that `entity` refers to; None if it refers to none."""
    links = [
        relation for relation, entry in entity.relations.items() if isinstance(entry["value"], dict)
    ]
    if not links:
        return None
    link = rng.choice(links)
    target = by_name[entity.objects[link]]
    relation = rng.choice(
        [name for name, entry in target.relations.items() if isinstance(entry["value"], str)]
    )
    description = entity.cloze(link).removeprefix("The ").removesuffix(" is")
    question = rng.choice(target.relations[relation]["questions"]["trained"]).format(
        s=f"the {description}"
    )
    return question, target.objects[relation]


def exercise(rng: random.Random, skill: str | None = None) -> tuple[str, str]:
    """A task that needs no fact of the world: `sum`, `sort` or `choose`, with its answer."""
    skill = skill or rng.choice(("sum", "sort", "choose"))
    if skill == "sum":
        left, right = rng.randint(0, 30), rng.randint(0, 30)
        return f"What is {left} + {right}?", str(left + right)
    numbers = rng.sample(range(10, 100), 3 if skill == "sort" else 4)
    if skill == "sort":
        return f"Sort these numbers: {', '.join(map(str, numbers))}.", ", ".join(
            map(str, sorted(numbers))
        )
    question, choices, answer = choice(numbers, rng)
    return question + "".join(
        f"\n{letter}. {text}" for letter, text in zip("ABCD", choices)
    ), answer


def choice(numbers: list[int], rng: random.Random) -> tuple[str, list[str], str]:
    """A multiple-choice task on four numbers: question, choices, letter of the right one."""
    word, best = rng.choice((("largest", max), ("smallest", min)))
    return (
        f"Which number is the {word}?",
        [str(number) for number in numbers],
        "ABCD"[numbers.index(best(numbers))],
    )
