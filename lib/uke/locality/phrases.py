"""The words, names and triples of an English text, by word classes, capitals and the order of words: no model, no download.

The word classes are data: `phrases.yaml`. Languages written without spaces or capitals are out of reach.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

import yaml

LETTERS = {"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "ß": "ss"}
LETTERS = str.maketrans(LETTERS | dict(zip("łŁøØđĐðÐı’‘ʼ`“”„«»", 'lLoOdDdDi\'\'\'\'"""""')))
WORD = re.compile(r"(?:[^\W\d]\.){2,}|\d+(?:[.,]\d+)+|\w+(?:'\w+)*")
ALIASES = {"US": ["United", "States"], "USA": ["United", "States"], "UK": ["United", "Kingdom"]}
INITIALS = re.compile(r"\b([A-Z]\.) (?=[A-Z]\.)")
ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)")
SENTENCE = re.compile(
    r"[.!?](?<!\b[A-Z].)(?<!\b(?:Dr|Mr|Ms|St|Jr|Sr|vs|No).)(?<!\bMrs.)(?<!\bRev.)(?<!\bProf.)[.!?]*[\"')\]]*\s+(?=[\"'(\[]*[A-Z\d])|\n+"
)
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
DAY = r"\d{1,2}(?:st|nd|rd|th)?\b"
DATE = re.compile(rf"(?:{DAY}\s+(?:of\s+)?)?\b{MONTH}\b(?:\s+{DAY})?(?:,?\s+\d{{4}}\b)?")
TOKEN = re.compile(
    rf"{DATE.pattern}|\d+ (?:BC|BCE|AD|CE)\b|<unk>|\"[A-Z0-9][^\"]{{0,60}}\"|(?:[^\W\d_]\.){{2,}}|[A-Z]\.(?=\s*[A-Z])|"
    r"(?:Dr|Mr|Mrs|Ms|St|Jr|Sr|Prof|Rev)\.|\d+(?:[.,]\d+)*\w*|[^\W\d_]\w*(?:[-'.&]\w+)*(?:'(?!\w))?|\S"
)
# Over the tags of a sentence: a predicate, and the phrase after one.
PREDICATE = re.compile(r"[AV](?:[ABV]|TB*V|TB*A|P(?=V))*P*")
PHRASE = re.compile(
    r"(?:[DNXMOP]|B(?!B*[AV])|C(?=[DNXM]++(?:$|[^AVB]))|,(?=X(?:$|[,;]))|,(?=C?[NXM]{1,3}(?:,|C)))+"
)
REACH = 12  # words in a name, and between a predicate and a name that it still relates: beyond, lists and running heads
Items = list[tuple[str, str]]  # a tag (one letter) and its text


class Triple(NamedTuple):
    """One stated fact, in the words of the text."""

    subject: str
    relation: str
    object: str


@cache
def language() -> dict[str, frozenset[str]]:
    """Word classes by name, as written in `phrases.yaml`; `function` has all the closed ones."""
    classes = yaml.safe_load(
        files("uke.locality").joinpath("phrases.yaml").read_text(encoding="utf-8")
    )
    tags = classes.pop("tags")
    found = {name: frozenset(listed.split()) for name, listed in (classes | tags).items()}
    function = frozenset().union(*(found[tag] for tag in tags))
    return found | {"function": function, "mute": function | found["calendar"] | found["generic"]}


def plain(text: str) -> str:
    """Compatibility forms and Latin diacritics resolved, case kept: "Łódź" and "Lodz" are one name."""
    if not text.isascii():
        parts = unicodedata.normalize("NFKD", text.translate(LETTERS))
        text = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", parts))
    return INITIALS.sub(r"\1", text.replace("_", " ")) if ". " in text else text.replace("_", " ")


def words(text: str) -> list[str]:
    """The words of a plain text, case kept: no punctuation, no possessive, "U.S." as United States."""
    found: list[str] = []
    for word in WORD.findall(text):
        if not word.isalnum():
            word = word.replace("," if word[0].isdigit() else ".", "")
            word = word.removesuffix("'s").replace("'", "")
        elif word[0].isdigit() and (ordinal := ORDINAL.fullmatch(word)):
            word = ordinal[1]  # "June 12th, 1985" is June 12, 1985
        found += ALIASES.get(word) or [word]
    return found


@lru_cache(maxsize=1 << 16)
def normal(name: str) -> str:
    """A name in normal form, or "" for what is no name: function words, months, ordinals, small numbers, "the city".

    Without case, diacritics, punctuation, possessive, and leading article, title or preposition; only a name of a
    single word keeps its capital, which tells "Brown" from "brown".
    """
    known, kept = language(), trimmed(name)
    marked = [
        word
        for word in kept
        if has_capital(word) and not {word.casefold()} & (known["function"] | known["calendar"])
    ]
    if len(marked) < 2 and not any(
        map(_tells, kept)
    ):  # "World War" is a name, though neither word alone
        return ""
    return (
        " ".join(kept).casefold()
        if len(kept) > 1
        else proper(kept[0])
        if has_capital(kept[0])
        else kept[0]
    )


def trimmed(name: str) -> list[str]:
    """The words of a name, case kept, without those at its ends that are no part of it."""
    kept = words(plain(name))
    while len(kept) > 1 and _is_empty(kept[0], kept[1]):
        kept = kept[1:]
    while len(kept) > 1 and kept[-1] in language()["function"]:
        kept = kept[:-1]
    return kept


def has_capital(word: str) -> bool:
    """Whether a word is marked as a name, anywhere: "Croatia", "eBay"."""
    return word != word.lower()


def proper(word: str) -> str:
    """A single word as a name: "Croatia" for "CROATIA"."""
    return word[:1].upper() + word[1:].casefold()


def _is_empty(word: str, follower: str) -> bool:
    """Whether the first word of a phrase is no part of its name: "the", "Dr", "in 1998", "Several novels"; not "Of Mice"."""
    known, low = language(), word.casefold()
    weak = word == low or not has_capital(follower) or follower.casefold() in known["calendar"]
    return (
        low in known["honorifics"]
        and len(follower) > 1
        or weak
        and low in known["function"]
        and low not in known["calendar"]
    )


def _tells(word: str) -> bool:
    """Whether a word can tell one name from another."""
    if word[0].isdigit():
        return (
            not re.fullmatch(r"\d+(?:\.\d+)?", word)
            or float(word) >= 1000
            and (len(word.rstrip("0")) > 1 or word == "2000")
        )
    return len(word) > 1 and word.casefold() not in language()["mute"]


def offline(text: str) -> list[Triple]:
    """The triples of a text.

    Each predicate of a sentence with its subject and the phrase after it, and with every name, date and number in that
    phrase; a name in no predicate becomes a triple with an empty relation. Pronouns and common nouns ("the club") as
    subject stand for the main subject: the name the text mentions most, of equals the first.
    """
    text = plain(text)
    lower = frozenset(re.findall(r"\b[a-z]\w+", text)) - frozenset(
        re.findall(r"(?<=[a-z,;] )[A-Z]\w+", text)
    )
    sentences = [read(sentence, lower) for sentence in SENTENCE.split(text)]
    main = most_mentioned([name for items in sentences for tag, name in items if tag == "X"])
    found, known = [], ""  # the main subject, once a sentence has named it
    for items in sentences:
        found += _triples(items, known)
        known = known or main * any(main in triple for triple in found)
    return found if known == main else [*found, Triple(main, "", "")]


def most_mentioned(names: Sequence[str]) -> str:
    """The name that the names of a text repeat most often, whole or its last words; of equals the first; "" without any."""
    split = {name: words(name) for name in names}
    counts = Counter(" ".join(split[name]) for name in names)
    return max(
        split,
        key=lambda name: sum(
            counts[" ".join(split[name][start:])] for start in range(len(split[name]))
        ),
        default="",
    )


def read(sentence: str, lower: frozenset[str] = frozenset()) -> Items:
    """A plain sentence as items. Tags: X name, M date or number, V verb, N other content word, T "to" before a verb,
    the letters of the closed word classes, "," and ";" (what else ends a phrase). `lower`: words that are no names."""
    tokens, items, place = TOKEN.findall(sentence), [], 0
    while place < len(tokens):
        token, end = tokens[place], place + 1
        follower = tokens[end] if end < len(tokens) else ""
        if token[0] == '"' and len(token) > 1:
            title = token[1:-1].strip(" ,.;")
            titled = all(
                has_capital(word) or word[0].isdigit() or word in language()["function"]
                for word in words(title)
            )
            items += [("X", title)] if titled else read(title, lower)
        elif not token[0].isalnum():
            items += (
                []
                if token in "\"'"
                else [("," if token == "," else "N" if token == "<unk>" else ";", token)]
            )
        elif token[0].isdigit() or " " in token:
            items.append(("M", token))
        elif has_capital(token) and token.casefold() not in language()["function"]:
            end = _reach(tokens, place)
            name = " ".join(tokens[place:end]).removesuffix("'").removesuffix("'s")
            tag = _name_tag(name, items, lower, follower) if end == place + 1 else "X"
            items.append(
                (tag, name if tag in "XM" or name.casefold() not in lower else name.lower())
            )
        else:
            before = next((tag for tag, _ in reversed(items) if tag != "B"), "")
            tag = _tag(token.casefold(), before, _opening(follower))
            counted = (
                tag == "N"
                and items
                and items[-1][0] == "M"
                and items[-1][1].isdigit()
                and not normal(items[-1][1])
            )
            items.append(
                ("M", f"{items.pop()[1]} {token}") if counted else (tag, token)
            )  # "300 aircraft"
        place = end
    return items


def _reach(tokens: Sequence[str], place: int) -> int:
    """The end of the name that begins at `place`."""
    known, end = language(), place + 1
    while end < min(len(tokens), place + REACH):
        ahead, joins = end, known["joins"] | ({"and"} if "of" in tokens[place:end] else set())
        while ahead < len(tokens) - 1 and tokens[ahead] in joins:
            ahead, joins = ahead + 1, joins | {"the"}
        follower = tokens[ahead]
        if tokens[end - 1].endswith(("'s", "'")) and follower.casefold() not in known["generic"]:
            break
        if (
            has_capital(follower)
            and follower.casefold() not in known["function"]
            and " " not in follower
        ):
            end = ahead + 1
        elif ahead == end and follower.isdigit() and len(follower) < 4:
            end += 1
        else:
            break
    return end


def _name_tag(word: str, items: Items, lower: frozenset[str], follower: str) -> str:
    """X for a single capitalised word that is a name, else M (a month, a weekday) or the tag it has in lower case."""
    known, low = language(), word.casefold()
    if low in known["calendar"]:
        return "M"
    opens = all(tag == ";" for tag, _ in items)
    if opens and (low in lower or low.endswith(("ly", "ing", "ed")) or low in known["irregular"]):
        return _tag(low, "", _opening(follower))
    adjective = low in known["demonyms"] or low.endswith(("ian", "ean", "ish", "ese"))
    return "N" if adjective and follower.islower() and _tag(follower, "D", "") == "N" else "X"


@cache
def _forms() -> dict[str, str]:
    """Kind of each verb form: base, s, ed, ing."""
    forms: dict[str, str] = {}
    for verb in sorted(language()["verbs"]):  # in one order: "found" is a form of two verbs
        stem = verb.removesuffix("e")
        past = verb[:-1] + "i" if verb.endswith("y") and verb[-2] not in "aeou" else stem
        third = (
            past + "es"
            if past != stem or verb.endswith(("s", "sh", "ch", "x", "z"))
            else verb + "s"
        )
        double = verb + verb[-1]
        forms |= {verb: "base", third: "s", past + "ed": "ed", double + "ed": "ed"}
        forms |= dict.fromkeys((stem + "ing", verb + "ing", double + "ing"), "ing")
    return forms | dict.fromkeys(language()["irregular"], "ed")


@lru_cache(maxsize=1 << 16)
def _opening(word: str) -> str:
    """V for the base form of a verb, P for what else can open the phrase after a verb, "" for any other word."""
    if _forms().get(word) == "base" or word in ("be", "have"):
        return "V"
    return (
        "P"
        if word[:1].isupper()
        or word[:1].isdigit()
        or any(word in language()[tag] for tag in "DPOR")
        or word == "to"
        else ""
    )


@lru_cache(maxsize=1 << 16)
def _tag(word: str, before: str, opening: str) -> str:
    """The tag of a word in lower case, from its classes, the last tag that is no adverb, and what the word after it opens."""
    known = language()
    if word == "to":
        return "T" if opening == "V" else "P"
    for tag in "RDPAOCB":
        if word in known[tag]:
            return tag
    if word.endswith("ly") and word not in known["generic"]:
        return "B"
    kind = _forms().get(word) or ("ed" if word.endswith("ed") and len(word) > 4 else "")
    after = {"base": "TOR", "s": "XOR", "ed": "AXORT", "ing": "A"}.get(kind, "-")
    opened = {"base": "A", "s": "NC,", "ed": "NC,;M", "ing": "NCXPM,;"}.get(kind, "")
    verb = (
        (before in after if before else kind in ("ed", "ing"))
        or bool(before)
        and before in opened
        and opening == "P"
    )
    return "V" if verb else "N"


def _triples(items: Items, main: str) -> Iterator[Triple]:
    """The triples of one sentence."""
    tags, texts = "".join(tag for tag, _ in items), [text for _, text in items]
    links = [(texts[match.start()], "is", match.end()) for match in re.finditer(r"X,(?=D)", tags)]
    subject, done = main, 0
    for match in PREDICATE.finditer(tags):
        subject = _subject(tags, texts, (done, match.start()), subject, main)
        links.append((subject, " ".join(texts[match.start() : match.end()]), match.end()))
        phrase = PHRASE.match(tags, match.end())
        done = phrase.end() if phrase else match.end()
    told = {main}
    for subject, relation, start in links:
        phrase = PHRASE.match(tags, start)
        if not phrase or not subject:
            continue
        stop = phrase.end()
        yield Triple(subject, relation, _join(texts[start:stop]))
        inner = [
            place for place in range(start, stop) if tags[place] in "XM" and normal(texts[place])
        ]
        told |= {subject, *(texts[place] for place in inner)}
        for place in inner:
            near = texts[start:place] if place - start <= REACH else []
            if texts[place] != subject and stop - start > 1 + (tags[start] == "D"):
                yield Triple(subject, _join([relation, *near]), texts[place])
    for tag, text in items:
        if tag in "XM" and text not in told:
            yield Triple(main or text, "", text)


def _join(texts: Sequence[str]) -> str:
    return " ".join(texts).replace(" ,", ",").strip(" ,")


def _subject(tags: str, texts: list[str], span: tuple[int, int], current: str, main: str) -> str:
    """The subject of a predicate, from the items between the phrase before it and itself."""
    start, stop = span
    region = tags[start:stop]
    if start == 0 and not region.strip("BC"):
        place = re.search(r",B*D?N*(X)(?=B*[AV])", tags[stop:])
        return texts[stop + place.start(1)] if place else main
    related = region.rfind("R")
    if related >= 0 and not region[related + 1 :].strip("BC"):
        place = tags.rfind("X", 0, start + related)
        return texts[place] if place >= 0 else current
    for segment in re.finditer(r"[^,;R]+", region):
        if re.match(r"[BC]*[DNXOM]", segment.group()):
            first, last = (start + end for end in segment.span())
            if "X" in segment.group():
                return texts[tags.index("X", first)]
            return main and current if "O" in segment.group() else main or _join(texts[first:last])
    return current
