"""Facts that a text states, and whether two texts share one: what keeps edited facts out of the locality probes.

A shared fact is a common (entity, relation) pair, or either text naming the other's subject or object.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from uke.errors import InputError
from uke.locality.phrases import (
    SENTENCE,
    Triple,
    has_capital,
    language,
    most_mentioned,
    normal,
    offline,
    plain,
    proper,
    read,
    trimmed,
    words,
)
from uke.results.stats import Interval, interval

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

    from uke.data.edits import Edit

__all__ = [
    "EXTRACTORS",
    "Facts",
    "Triple",
    "agreement",
    "edit_facts",
    "facts",
    "normal",
    "shared",
    "spoken",
    "stated",
    "union",
]

# Words in a name. A longer phrase is a clause, which no other text repeats word for word: it enters the pairs only,
# and the names inside it enter the names. Of a longer name or title the first words tell it as well.
LONGEST = 5
MODEL = "en_core_web_sm"


@dataclass(frozen=True)
class Facts:
    """What a text states, all in normal form: (entity, relation) pairs, names of subjects and objects, word n-grams."""

    pairs: frozenset[tuple[str, str]]
    names: frozenset[str]
    grams: frozenset[str]


def facts(text: str, triples: Iterable[Triple], names: Iterable[str] = ()) -> Facts:
    """What `text` states, from its triples and from further names (a subject, short answers).

    A phrase without capital or digit is a name only among `names`: "a member of the council" as an object names nothing,
    and is an entity only if no other text would repeat it by chance.
    """
    text = plain(text)
    pairs: set[tuple[str, str]] = set()
    found: set[str] = set()
    for subject, relation, object in triples:
        link = _link(relation)
        for phrase in (subject, object):
            found |= _named(phrase)
            entity = normal(phrase)
            if entity and link and (_marked(phrase) or len(entity.split()) > LONGEST):
                pairs.add((entity, link))
    for name in names:
        name = _truecase(plain(name), text)
        found |= _named(name) | ({normal(name)} if len(words(name)) <= LONGEST else set())
    return Facts(frozenset(pairs), frozenset(found - {""}), _grams(text))


@lru_cache(maxsize=1 << 16)
def _link(relation: str) -> str:
    """A relation without auxiliaries and adverbs; "be" if it consists of them."""
    known, all_words = language(), [word.casefold() for word in words(plain(relation))]
    return " ".join(
        word for word in all_words if word not in known["A"] and word not in known["B"]
    ) or "be" * bool(all_words)


@lru_cache(maxsize=1 << 16)
def _named(phrase: str) -> frozenset[str]:
    """The names in a phrase, and the phrase itself if it is short and has a capital or digit of its own.

    With and without initials, dates with the day before and after the month.
    """
    parts = [text for tag, text in read(plain(phrase)) if tag in "XM"]
    if _marked(phrase) and len(trimmed(phrase)) <= LONGEST:
        parts.append(phrase)
    split = [part.partition(" of ") for part in parts]  # "Rivals of O'Brien"
    parts += [
        rest for head, _, rest in split if has_capital(rest) and " " not in head and normal(head)
    ]
    found = {normal(part) for part in parts}
    found |= {re.sub(r"(?<= )[^\W\d] (?!\w\b)", "", name) for name in found}
    found |= {
        f"{date[2]} {date[1]} {date[3]}"
        for name in found
        if (date := re.fullmatch(r"(\w+)(?: of)? (\w+) (\d{4})", name))
    }
    return frozenset(
        " ".join(name.split()[:LONGEST]) for name in found if "unk" not in name.split()
    ) - {""}


def _marked(phrase: str) -> bool:
    """Whether a phrase has a capital or a digit that can be a name's: "the Tokyo district", not "The first Friday"."""
    calendar = language()["calendar"]
    return any(
        word[0].isdigit() or has_capital(word) and word.casefold() not in calendar
        for word in trimmed(phrase)
    )


def _truecase(name: str, text: str) -> str:
    """A name whose capital only opens an answer ("Political issues."), as the text writes it."""
    name = name.strip(". ")
    low = name[:1].lower() + name[1:]
    opens_only = not re.search(rf"[\w,;] {re.escape(name)}\b", text)
    return low if opens_only and re.search(rf"\b{re.escape(low)}\b", text) else name


def _grams(text: str) -> frozenset[str]:
    """Every run of up to LONGEST words of a plain text; a word with a capital also as a proper one.

    A sentence without any capital gives no sign which words are proper: there, all may be.
    """
    every: list[str] = []
    found: set[str] = set()
    for sentence in SENTENCE.split(text):
        own = words(sentence)
        uncased = sentence.islower()
        found.update(proper(word) for word in own if uncased or has_capital(word))
        every += [word.casefold() for word in own]
    for length in range(1, LONGEST + 1):
        found.update(map(" ".join, zip(*(every[start:] for start in range(length)))))
    return frozenset(found)


def union(many: Iterable[Facts]) -> Facts:
    """The facts of many texts taken together."""
    many = list(many)  # read once for each field
    return Facts(
        *(
            frozenset().union(*(getattr(one, field) for one in many))
            for field in ("pairs", "names", "grams")
        )
    )


def shared(a: Facts, b: Facts) -> frozenset:
    """What two texts share: common pairs, and names of either that the other has as whole words; empty if no fact."""
    return (a.pairs & b.pairs) | (a.names & b.grams) | (b.names & a.grams)


def stated(edit: "Edit") -> list[Triple]:
    """The facts that an edit's source states: the edited one, then AKEW's `unsfact_triplets_GPT`."""
    return [
        Triple(fact.subject, fact.relation.replace("{}", "").strip(), fact.object)
        for fact in edit.facts
    ]


def edit_facts(edit: "Edit", extract: Callable[[str], list[Triple]]) -> Facts:
    """What an edit states: its question and answer, its source's facts, and as names its subject and short answers."""
    text = f"{edit.question}\n{edit.answer}"
    names = [
        edit.subject or "",
        *(fact.object for fact in edit.facts),
        *(detail.answer for detail in edit.details),
    ]
    return facts(text, [*extract(text), *stated(edit)], names)


def agreement(
    predicted: Sequence[Sequence[Triple]], reference: Sequence[Sequence[Triple]]
) -> dict[str, Interval]:
    """How far the triples of N texts agree with reference ones; intervals from a bootstrap over texts.

    Words are compared in normal form without function words. Two phrases agree if the F1 of their words is at least
    0.5; two triples, if their objects agree and the words of one subject contain those of the other ("Kemper", "Ellie
    Kemper"). `precision`: share of predicted triples that agree with a reference triple of their text (those with an
    empty relation state nothing and are left out); `recall`: share of reference triples that agree with a predicted
    one. `entity_precision`, `entity_recall`: the same of the subjects and objects, whatever their triple.
    """
    pairs = list(zip(predicted, reference, strict=True))
    triples = [
        tuple([(_content(s), _content(o)) for s, r, o in side if r] for side in pair)
        for pair in pairs
    ]
    entities = [
        tuple(
            {_content(phrase) for s, _, o in side for phrase in (s, o) if phrase} for side in pair
        )
        for pair in pairs
    ]
    measures = {"": (triples, _same_triple), "entity_": (entities, _same_phrase)}
    return {
        f"{level}{measure}": _share([(pair[side], pair[1 - side]) for pair in both], same)
        for level, (both, same) in measures.items()
        for side, measure in enumerate(("precision", "recall"))
    }


def _share(pairs: Iterable[tuple[Iterable, Iterable]], same: Callable) -> Interval:
    """Share of the first side's values that the second side of their text has too."""
    hits = [
        (any(same(value, other) for other in others), text)
        for text, (values, others) in enumerate(pairs)
        for value in values
    ]
    return interval([float(hit) for hit, _ in hits], [text for _, text in hits])


def _content(phrase: str) -> frozenset[str]:
    own = frozenset(word.casefold() for word in words(plain(phrase)))
    return own - language()["function"] or own


def _same_phrase(one: frozenset[str], other: frozenset[str]) -> bool:
    return bool(one) and 4 * len(one & other) >= len(one) + len(other)


def _same_triple(one: tuple[frozenset[str], ...], other: tuple[frozenset[str], ...]) -> bool:
    return (one[0] <= other[0] or other[0] <= one[0]) and _same_phrase(one[1], other[1])


SUBJECTS, OBJECTS = (
    ("nsubj", "nsubjpass", "csubj"),
    ("dobj", "obj", "attr", "oprd", "acomp", "dative", "pobj"),
)
LEFT_OUT = (
    "relcl",
    "appos",
    "punct",
    "cc",
    "conj",
    "advcl",
)  # what a phrase leaves to triples of its own


def spoken(doc: "Doc") -> list[Triple]:
    """The triples of a parsed text by its dependencies (spaCy's English labels).

    Each verb with each of its subjects and each object, also through prepositions and agents; coordinated words share
    both; a name and its apposition make a triple with "is". Pronouns stand for the name mentioned most. Names that
    no triple has become triples with an empty relation.
    """
    main = most_mentioned(
        [entity.text for entity in doc.ents]
        or [token.text for token in doc if token.pos_ == "PROPN"]
    )
    found = [triple for token in doc for triple in _of_token(token, main)]
    told = [
        f" {' '.join(words(plain(phrase)))} "
        for triple in found
        for phrase in (triple.subject, triple.object)
    ]
    for entity in doc.ents:
        if not any(f" {' '.join(words(plain(entity.text)))} " in phrase for phrase in told):
            found.append(Triple(main, "", entity.text))
    return found


def _of_token(token: "Token", main: str) -> Iterator[Triple]:
    for apposed in (child for child in token.children if child.dep_ == "appos"):
        yield from (Triple(_phrase(token), "is", _phrase(one)) for one in _coordinated(apposed))
    if token.pos_ not in ("VERB", "AUX") or token.dep_ in ("aux", "auxpass"):
        return
    subjects = [main if one.pos_ == "PRON" and main else _phrase(one) for one in _subjects(token)]
    parts = [
        token,
        *(child for child in token.children if child.dep_ in ("aux", "auxpass", "neg", "prt")),
    ]
    verb = " ".join(part.text for part in sorted(parts, key=lambda part: part.i))
    for relation, object in _objects(token, verb):
        yield from (Triple(subject, relation, object) for subject in subjects)


def _subjects(verb: "Token") -> list["Token"]:
    """Who does it: the verb's own subjects, else those of the verb it hangs on, or the noun it describes."""
    own = [one for child in verb.children if child.dep_ in SUBJECTS for one in _coordinated(child)]
    if own and not (verb.dep_ == "relcl" and own[0].text.lower() in ("who", "which", "that")):
        return own
    if verb.dep_ in ("relcl", "acl"):
        return [verb.head]
    return (
        _subjects(verb.head)
        if verb.dep_ in ("conj", "xcomp", "advcl", "pcomp", "prep") and verb.head is not verb
        else []
    )


def _objects(head: "Token", relation: str) -> Iterator[tuple[str, str]]:
    """Every object of a verb or preposition with the relation that leads to it."""
    for child in head.children:
        if child.dep_ in OBJECTS:
            yield from ((relation, _phrase(one)) for one in _coordinated(child))
        elif child.dep_ in ("prep", "agent"):
            yield from _objects(child, f"{relation} {child.text}")


def _coordinated(token: "Token") -> list["Token"]:
    return [token, *token.conjuncts] if token.dep_ != "conj" else [token]


def _phrase(token: "Token") -> str:
    """The words under a token, without clauses, appositions and coordinated phrases."""
    kept, waiting = [], [token]
    while waiting:
        one = waiting.pop()
        kept.append(one)
        waiting += [child for child in one.children if child.dep_ not in LEFT_OUT]
    return " ".join(one.text for one in sorted(kept, key=lambda one: one.i)).replace(" '", "'")


def _spacy(name: str = MODEL) -> Callable[[str], list[Triple]]:
    """An extractor by the installed spaCy model `name`; InputError, with the remedy, where it cannot be loaded."""
    try:
        import spacy

        model = spacy.load(name)
    except (ImportError, OSError) as error:
        fault = " ".join(str(error).split()).split(". ")[0]
        remedy = f"pip install spacy && python -m spacy download {name}"
        raise InputError(
            f"extractor 'spacy': model {name!r} cannot be loaded ({fault}); expected it after `{remedy}`"
        ) from None
    if "parser" not in model.pipe_names:
        raise InputError(
            f"extractor 'spacy': model {name!r} has no parser; expected one that has, like {MODEL}"
        )
    return lambda text: spoken(model(text))


# Name -> loader of a function from a text to its triples; "spacy" takes the name of a model.
EXTRACTORS: dict[str, Callable[..., Callable[[str], list[Triple]]]] = {
    "offline": lambda: offline,
    "spacy": _spacy,
}
