"""Find the names, numbers and dates that a text states, and decide whether two texts share a fact.

    >>> one, other = (facts(text, names(text)) for text in ("Ada lives in Rome.", "Rome is old."))
    >>> shared(one, other)
    frozenset({'Rome'})

Two texts share a fact if either contains, as whole words, something that the other names. Names are
found by capitals, digits and the word classes in `facts.yaml`, without a model; languages written
without spaces or capitals are out of reach.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from uke.data.edits import Edit
from uke.files import read_yaml

# Words of a name that are compared: a longer name is known by its first words. A longer phrase is a
# clause, which no other text repeats word for word: only the names inside it count.
LONGEST = 5
REACH = 12  # words in a name at most: beyond that stand lists and running heads
CLASSES = {
    name: frozenset(listed.split())
    for name, listed in read_yaml(Path(__file__).with_name("facts.yaml")).items()
}
FUNCTION, CALENDAR, GENERIC = (CLASSES[name] for name in ("function", "calendar", "generic"))
UNNAMED = FUNCTION | CALENDAR
MUTE = UNNAMED | GENERIC  # words that alone name nothing

LETTERS = str.maketrans({"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "ß": "ss"})
LETTERS |= str.maketrans("łŁøØđĐðÐı’‘ʼ`“”„«»", "lLoOdDdDi''''" + 5 * '"')
WORD = re.compile(r"(?:[^\W\d]\.){2,}|\d+(?:[.,]\d+)+|\w+(?:'\w+)*")
ALIASES = {"US": ["United", "States"], "USA": ["United", "States"], "UK": ["United", "Kingdom"]}
SENTENCE = re.compile(
    r"[.!?](?<!\b[A-Z].)(?<!\b(?:Dr|Mr|Ms|St|Jr|Sr|vs|No).)(?<!\bMrs.)(?<!\bRev.)(?<!\bProf.)"
    r"[.!?]*[\"')\]]*\s+(?=[\"'(\[]*[A-Z\d])|\n+"
)
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
DAY = r"\d{1,2}(?:st|nd|rd|th)?\b"
DATE = rf"(?:{DAY}\s+(?:of\s+)?)?\b{MONTH}\b(?:\s+{DAY})?(?:,?\s+\d{{4}}\b)?"
TOKEN = re.compile(
    rf"{DATE}|\d+ (?:BC|BCE|AD|CE)\b|<unk>"
    r"|\"[A-Z0-9][^\"]{0,60}\"|(?:[^\W\d_]\.){2,}|[A-Z]\.(?=\s*[A-Z])"
    r"|(?:Dr|Mr|Mrs|Ms|St|Jr|Sr|Prof|Rev)\.|\d+(?:[.,]\d+)*\w*"
    r"|[^\W\d_]\w*(?:[-'.&]\w+)*(?:'(?!\w))?|\S"
)


@dataclass(frozen=True)
class Facts:
    """What a text states: its names in normal form, and its word n-grams to find names in."""

    names: frozenset[str]
    grams: frozenset[str]


def facts(text: str, found: Iterable[str], given: Iterable[str] = ()) -> Facts:
    """Collect what `text` states from names `found` in it and phrases `given` beside it.

    A short phrase among `given`, as a record's subject, counts whether or not it has a capital.
    """
    text = plain(text)
    every = [_forms(plain(phrase)) for phrase in found]
    for phrase in given:
        phrase = _as_written(plain(phrase), text)
        every.append(_forms(phrase))
        if len(words(phrase)) <= LONGEST:
            every.append(frozenset({normal(phrase)}))
    return Facts(frozenset().union(*every) - {""}, _grams(text))


def edit_facts(edit: Edit, stated: bool = True) -> Facts:
    """Collect the names in an edit's text and, if `stated`, what its record states beside it."""
    text = f"{edit.question}\n{edit.answer}"
    if not stated:
        return facts(text, names(text))
    phrases = [phrase for fact in edit.facts for phrase in (fact.subject, fact.object)]
    answers = [fact.object for fact in edit.facts] + [detail.answer for detail in edit.details]
    return facts(text, [*names(text), *phrases], [edit.subject or "", *answers])


def union(many: Iterable[Facts]) -> Facts:
    """Take the facts of many texts together."""
    many = list(many)
    every_name = frozenset().union(*(each.names for each in many))
    return Facts(every_name, frozenset().union(*(each.grams for each in many)))


def shared(one: Facts, other: Facts) -> frozenset[str]:
    """List the names of either text that the other has as whole words."""
    return (one.names & other.grams) | (other.names & one.grams)


def names(text: str) -> list[str]:
    """List the names, titles, dates and counts of a text, in its order, without a model."""
    text = plain(text)
    # Words that open a sentence and stand in lower case elsewhere are no names.
    lower = frozenset(re.findall(r"\b[a-z]\w+", text))
    lower -= frozenset(re.findall(r"(?<=[a-z,;] )[A-Z]\w+", text))
    return [name for sentence in SENTENCE.split(text) for name in _names(sentence, lower)]


def _names(sentence: str, lower: frozenset[str] = frozenset()) -> list[str]:
    tokens, found = TOKEN.findall(sentence), []
    index, opens, number = 0, True, False  # `number`: the last word was a bare number
    while index < len(tokens):
        token, end, counted = tokens[index], index + 1, number
        follower = tokens[end] if end < len(tokens) else ""
        number = False
        if token[0] == '"' and len(token) > 1:
            title = token[1:-1].strip(" ,.;")
            lesser = [word for word in words(title) if word not in FUNCTION and not _marked(word)]
            found += _names(title, lower) if lesser else [title]
        elif token[0].isdigit() or " " in token:
            found.append(token)
            number = token.isdigit() and not normal(token)
        elif token[0].isalnum() and has_capital(token) and token.casefold() not in FUNCTION:
            end = _reach(tokens, index)
            name = " ".join(tokens[index:end]).removesuffix("'").removesuffix("'s")
            if end > index + 1 or _is_name(name, opens, lower, follower):
                found.append(name)
        elif counted and token[0].isalnum() and _is_content(token.casefold()):
            found.append(f"{found.pop()} {token}")  # "300 aircraft"
        opens = opens and not token[0].isalnum() and token not in (",", "<unk>")
        index = end
    return found


def _is_name(word: str, opens: bool, lower: frozenset[str], follower: str) -> bool:
    """Tell whether a single capitalised word is a name; `opens`: whether it opens a sentence."""
    low = word.casefold()
    verb = low.endswith(("ly", "ing", "ed")) or low in CLASSES["past"]
    if low in CALENDAR or opens and (low in lower or verb):
        return False
    adjective = low in CLASSES["demonyms"] or low.endswith(("ian", "ean", "ish", "ese"))
    return not (adjective and follower.islower() and _is_content(follower))


def _is_content(word: str) -> bool:
    """Tell whether a word in lower case is neither a function word nor an adverb."""
    return word not in FUNCTION and (not word.endswith("ly") or word in GENERIC)


def _reach(tokens: list[str], start: int) -> int:
    """Find the end of the name that begins at `start`."""
    end = start + 1
    while end < min(len(tokens), start + REACH):
        joins = CLASSES["joins"] | ({"and"} if "of" in tokens[start:end] else set())
        ahead = end
        while ahead < len(tokens) - 1 and tokens[ahead] in joins:
            ahead, joins = ahead + 1, joins | {"the"}
        token = tokens[ahead]
        if tokens[end - 1].endswith(("'s", "'")) and token.casefold() not in GENERIC:
            break
        if has_capital(token) and token.casefold() not in FUNCTION and " " not in token:
            end = ahead + 1
        elif ahead == end and token.isdigit() and len(token) < 4:
            end += 1
        else:
            break
    return end


def plain(text: str) -> str:
    """Resolve compatibility forms and Latin diacritics: "Łódź" and "Lodz" are one name."""
    if not text.isascii():
        parts = unicodedata.normalize("NFKD", text.translate(LETTERS))
        text = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", parts))
    text = text.replace("_", " ")
    return re.sub(r"\b([A-Z]\.) (?=[A-Z]\.)", r"\1", text) if ". " in text else text


def words(text: str) -> list[str]:
    """Split a plain text into words: no punctuation, no possessive, "U.S." spelled out."""
    found: list[str] = []
    for word in WORD.findall(text):
        if not word.isalnum():
            word = word.replace("," if word[0].isdigit() else ".", "")
            word = word.removesuffix("'s").replace("'", "")
        elif word[0].isdigit():  # "June 12th, 1985" is June 12, 1985
            word = re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word)
        found += ALIASES.get(word) or [word]
    return found


@lru_cache(maxsize=1 << 16)
def normal(name: str) -> str:
    """Bring a name into normal form; "" for what names nothing: function words, months, "the city".

    Without case, diacritics, punctuation, possessive, and leading article, title or preposition.
    Only a name of a single word keeps its capital, which tells "Brown" from "brown".
    """
    kept = trimmed(name)
    capitals = sum(has_capital(word) and word.casefold() not in UNNAMED for word in kept)
    # "World War" is a name, though neither word alone is one.
    if capitals < 2 and not any(map(_tells, kept)):
        return ""
    if len(kept) > 1:
        return " ".join(kept).casefold()
    return kept[0].capitalize() if has_capital(kept[0]) else kept[0]


def trimmed(name: str) -> list[str]:
    """Split a name into words, case kept, without those at its ends that are no part of it."""
    kept = words(plain(name))
    while len(kept) > 1 and _is_empty(kept[0], kept[1]):
        kept = kept[1:]
    while len(kept) > 1 and kept[-1] in FUNCTION:
        kept = kept[:-1]
    return kept


def has_capital(word: str) -> bool:
    """Tell whether a word has a capital anywhere: "Croatia", "eBay"."""
    return word != word.lower()


def _marked(word: str) -> bool:
    return has_capital(word) or word[0].isdigit()


def _is_empty(word: str, follower: str) -> bool:
    """Tell whether the first word of a phrase is no part of its name: "the", "Dr", "in 1998"."""
    low = word.casefold()
    if low in CLASSES["honorifics"] and len(follower) > 1:
        return True
    # "Several novels", but not "Of Mice and Men".
    weak = word == low or not has_capital(follower) or follower.casefold() in CALENDAR
    return weak and low in FUNCTION - CALENDAR


def _tells(word: str) -> bool:
    """Tell whether a word can distinguish one name from another."""
    if not word[0].isdigit():
        return len(word) > 1 and word.casefold() not in MUTE
    if not re.fullmatch(r"\d+(?:\.\d+)?", word):
        return True
    # Round numbers are no years: "1000 soldiers".
    return float(word) >= 1000 and (len(word.rstrip("0")) > 1 or word == "2000")


@lru_cache(maxsize=1 << 16)
def _forms(phrase: str) -> frozenset[str]:
    """List the names in a phrase in every form that another text may use.

    A short phrase with a capital or digit counts itself; names count with and without initials and
    what stands before "of", dates with the day before and after the month.
    """
    parts, kept = _names(phrase), trimmed(phrase)
    # "The Tokyo area", but not "Friday".
    if len(kept) <= LONGEST and any(_marked(w) and w.casefold() not in CALENDAR for w in kept):
        parts.append(phrase)
    split = [part.partition(" of ") for part in parts]  # "Rivals of O'Brien"
    parts += [
        rest for head, _, rest in split if has_capital(rest) and " " not in head and normal(head)
    ]
    found = {normal(part) for part in parts}
    found |= {re.sub(r"(?<= )[^\W\d] (?!\w\b)", "", name) for name in found}
    dates = [re.fullmatch(r"(\w+)(?: of)? (\w+) (\d{4})", name) for name in found]
    found |= {f"{date[2]} {date[1]} {date[3]}" for date in dates if date}
    split_names = [name.split() for name in found]
    return frozenset(" ".join(name[:LONGEST]) for name in split_names if "unk" not in name) - {""}


def _as_written(phrase: str, text: str) -> str:
    """Write a phrase whose capital only opens an answer ("Political issues.") as the text does."""
    phrase = phrase.strip(". ")
    low = phrase[:1].lower() + phrase[1:]
    opens_only = low != phrase and not re.search(rf"[\w,;] {re.escape(phrase)}\b", text)
    return low if opens_only and re.search(rf"\b{re.escape(low)}\b", text) else phrase


def _grams(text: str) -> frozenset[str]:
    """List every run of up to LONGEST words of a plain text; a capitalised word also as a name.

    A sentence without any capital gives no sign which words are names: there, all may be.
    """
    every: list[str] = []
    found: set[str] = set()
    for sentence in SENTENCE.split(text):
        own = words(sentence)
        uncased = sentence.islower()
        found.update(word.capitalize() for word in own if uncased or has_capital(word))
        every += [word.casefold() for word in own]
    for length in range(1, LONGEST + 1):
        found.update(map(" ".join, zip(*(every[start:] for start in range(length)), strict=False)))
    return frozenset(found)
