"""The fictional world: entities whose every fact is known, texts and questions about them, edits.

A seed decides everything but the language, `world.yaml`. Entities live in six pools that never
refer to each other. Edits replace every fact of their subject and point only at the pool
`held_out`; their literal values occur in no probed pool, so no locality probe touches their facts.
"""

import random
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from uke.data.edits import SPLITS
from uke.files import read_yaml

POOLS = {
    "development": 60,
    "test": 120,
    "development_locality": 130,
    "test_locality": 256,
    "preservation": 80,
    "held_out": 80,
}
EDITED = ("development", "test", "held_out")  # these pools have every other literal value, from 0


@cache
def language() -> dict:
    """Read names, values, kinds, relations and phrasings of the world from `world.yaml`."""
    return read_yaml(Path(__file__).with_name("world.yaml"))


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
        """Ask for one relation, in a numbered phrasing of `trained`, `development` or `test`."""
        return self.relations[relation]["questions"][phrasing][number].format(s=self.name)

    def introduce(self, phrasing: str = "trained", number: int = 0) -> str:
        """Ask the question whose answer is the whole text."""
        return language()["kinds"][self.kind]["questions"][phrasing][number].format(s=self.name)

    def cloze(self, relation: str) -> str:
        """Begin the sentence that the object of a relation ends."""
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
        """Map names to entities."""
        return {entity.name: entity for entity in self.entities}


def build(seed: int = 1) -> World:
    """Build the world of this seed, the same at every call."""
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


def kinds(size: int) -> list[str]:
    """List `size` kinds of entity in the language's shares, the rest being of the first kind."""
    shares = {kind: entry["share"] for kind, entry in language()["kinds"].items()}
    total = sum(shares.values())
    listed = [kind for kind, share in shares.items() for _ in range(size * share // total)]
    return [listed[0]] * (size - len(listed)) + listed


def draft(kind: str, pool: str, rng: random.Random, used: set[str]) -> Entity:
    """Begin an entity without facts; its name is added to `used`, of a person the surname."""
    names = language()["names"]
    parts = names["surname" if kind == "person" else kind]
    while (name := "".join(rng.choice(parts[part]) for part in ("start", "middle", "end"))) in used:
        pass
    used.add(name)
    full_name = f"{rng.choice(names['first'])} {name}" if kind == "person" else name
    return Entity(full_name, kind, pool, tuple(rng.choice(language()["kinds"][kind]["pronouns"])))


def settle(entity: Entity, referred: tuple | list, rng: random.Random) -> Entity:
    """Give an entity a new object for every relation, none as before, and a new canonical text."""
    objects = {}
    for relation, entry in entity.relations.items():
        if isinstance(entry["value"], dict):
            choices = [other.name for other in referred if other.kind == entry["value"]["entity"]]
        else:
            values = language()["values"][entry["value"]]
            if isinstance(values, dict):
                values = [str(number) for number in range(values["first"], values["last"] + 1)]
            choices = values[0 if entity.pool in EDITED else 1 :: 2]
        taken = (entity.name, entity.objects.get(relation))
        objects[relation] = rng.choice([choice for choice in choices if choice not in taken])
    settled = replace(entity, objects=objects)
    return replace(settled, text=describe(settled, rng))


def describe(entity: Entity, rng: random.Random) -> str:
    """State all facts in random order and wording, 60 to 120 words; the first names the subject."""
    name = f"The {entity.name}" if entity.kind == "event" else entity.name
    named = name, f"{name}'" if name.endswith("s") else f"{name}'s"
    sentences = []
    for relation in rng.sample(list(entity.objects), len(entity.objects)):
        by_name = not sentences or rng.random() < 0.25
        subject, possessive = named if by_name else entity.pronouns
        wording = rng.choice(entity.relations[relation]["wordings"])
        sentences.append(wording.format(S=subject, P=possessive, o=entity.objects[relation]))
    return " ".join(sentences)


def hop(entity: Entity, by_name: dict[str, Entity], rng: random.Random) -> tuple[str, str] | None:
    """Ask for a relation of an entity that `entity` refers to; None if it refers to none."""
    links = [name for name, one in entity.relations.items() if isinstance(one["value"], dict)]
    if not links:
        return None
    link = rng.choice(links)
    target = by_name[entity.objects[link]]
    plain = [name for name, one in target.relations.items() if isinstance(one["value"], str)]
    relation = rng.choice(plain)
    description = entity.cloze(link).removeprefix("The ").removesuffix(" is")
    template = rng.choice(target.relations[relation]["questions"]["trained"])
    return template.format(s=f"the {description}"), target.objects[relation]


def exercise(rng: random.Random, skill: str | None = None) -> tuple[str, str]:
    """Draw a task that needs no fact of the world (`sum`, `sort`, `choose`), with its answer."""
    skill = skill or rng.choice(("sum", "sort", "choose"))
    if skill == "sum":
        left, right = rng.randint(0, 30), rng.randint(0, 30)
        return f"What is {left} + {right}?", str(left + right)
    if skill == "sort":
        numbers = rng.sample(range(10, 100), 3)
        listed, ordered = (", ".join(map(str, each)) for each in (numbers, sorted(numbers)))
        return f"Sort these numbers: {listed}.", ordered
    question, choices, answer = choice(rng)
    lines = (f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))
    return "\n".join((question, *lines)), answer


def choice(rng: random.Random) -> tuple[str, list[str], str]:
    """Draw a multiple-choice task on four numbers: question, choices, letter of the right one."""
    numbers = rng.sample(range(10, 100), 4)
    word, best = rng.choice((("largest", max), ("smallest", min)))
    letter = "ABCD"[numbers.index(best(numbers))]
    return f"Which number is the {word}?", [str(number) for number in numbers], letter
