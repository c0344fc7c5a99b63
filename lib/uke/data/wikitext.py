"""WikiText files (Merity et al., arXiv 1609.07843): their headings, and their published spacing undone.

WikiText is published as tokens with a space between any two: `the dog 's tail ( 3 @.@ 5 in ) is " short " .` A probe
asks a model that has read ordinary text, so the spaces that no writer would put are taken out again.
"""

import re
from collections.abc import Iterator
from itertools import chain, islice, tee
from pathlib import Path
from typing import NamedTuple

from uke.data.streams import lines

# A heading has as many marks on either side as its depth, and stands between blank lines.
HEADING = re.compile(r"((?:= )+)(\S.*?)((?: =)+)")

CONTRACTED = [
    (
        re.compile(r"(?<=\S) (?='\w)"),
        "",
    ),  # "dog 's", "isn 't", "O 'Neil": an opening mark has a space on both sides
    (re.compile(r"(?<=\S) ' (?=s )"), "'"),  # "the U.S. ' s"
    (re.compile(r" ' n (' )?"), lambda found: " 'n' " if found[1] else " 'n "),  # "rock ' n ' roll"
]
# In this order, once the quotation marks are closed up.
CLOSED_UP = [
    (re.compile(r" @([-,.])@(?: |$)"), r"\1"),
    (re.compile(r"(?<=\d) ([:–]) (?=\d)|(?<=\d) (–) (?=present\b)"), r"\1\2"),
    (re.compile(r" ([/—‑⁄]) "), r"\1"),
    (re.compile(r"\b([A-Z]) & (?=[A-Z]\b)"), r"\1&"),
    (re.compile(r"\b([A-F]) \+(?! ?[\d@])"), r"\1+"),
    (re.compile(r"(?<=[\d>½]) (?=[°′″](?! [CF]\b))"), ""),
    (re.compile(r"(?<=[°′″]) (?=[\dCFNESW]\b|\d)"), ""),
    (re.compile(r"(?:(?<=\s)|(?<=\()|^)([−+$£€¥₤#]) (?=[\d<.])"), r"\1"),
    (re.compile(r"([(\[“‘]) "), r"\1"),
    (re.compile(r" (?=[,;:!?%)\]”♭♯]|\.(?!\.))"), ""),
    (re.compile(r" ’ (?=(?:s|t|d|m|ll|re|ve)\b)"), "’"),
    (re.compile(r" (?=’)"), ""),
]
CLOSERS = frozenset(",.;:!?)]")
# Words that end in s and own nothing: an apostrophe after them opens a quotation.
OWNERLESS = frozenset(
    "as is was has does its his this thus says calls called states means us yes".split()
)


class Passage(NamedTuple):
    """A paragraph of a WikiText file: its line (from 1), title, innermost section ("" in the lead), and text."""

    line: int
    title: str
    section: str
    text: str


def passages(path: Path) -> Iterator[Passage]:
    """The paragraphs of a WikiText file, streamed; the title is "" for those that stand before the first title."""
    title = section = ""
    rows = tee(chain([(0, "")], lines(path), [(0, "")]), 3)
    for place, row in enumerate(rows):
        next(islice(row, place, place), None)
    for (_, before), (number, line), (_, after) in zip(*rows):
        heading = (
            HEADING.fullmatch(line.strip()) if not before.strip() and not after.strip() else None
        )
        if heading and len(heading[1]) == len(heading[3]):
            section = "" if len(heading[1]) == 2 else close_up(heading[2])
            title = close_up(heading[2]) if len(heading[1]) == 2 else title
        elif line.strip():
            yield Passage(number, title, section, close_up(line))


def close_up(text: str) -> str:
    """A line of WikiText as it was before it was split into tokens, as far as that can be told; `<unk>` stays."""
    for pattern, closed in CONTRACTED:
        text = pattern.sub(closed, text)
    text = _close_quotes(text.split())
    for pattern, closed in CLOSED_UP:
        text = pattern.sub(closed, text)
    return text.strip()


def _close_quotes(tokens: list[str]) -> str:
    """Tokens joined by spaces, each quotation mark closed up with the word that it opens or closes."""
    pieces: list[str] = []
    space, open_quotes, single, singles = "", 0, False, tokens.count("'")
    for place, token in enumerate(tokens):
        before, after = (
            tokens[place - 1] if place else "",
            tokens[place + 1] if place + 1 < len(tokens) else "",
        )
        opens = False
        if token in ('"', "''"):
            opens = _opens(before, after, open_quotes > 0)
            open_quotes = open_quotes + 1 if opens else max(open_quotes - 1, 0)
        elif token == "'":
            opens, single = _apostrophe(before, after, single, singles)
            singles -= 1
        else:
            pieces.append(space + token)
            space = " "
            continue
        pieces.append(space + token if opens else token)
        space = "" if opens else " "
    return "".join(pieces)


def _opens(before: str, after: str, inside: bool) -> bool:
    """Whether a double mark opens a quotation; a mark too many, which real text has, does not turn the rest around."""
    if not before or before in "([":
        return True
    return not inside and bool(after) and after not in CLOSERS


def _apostrophe(before: str, after: str, inside: bool, left: int) -> tuple[bool, bool]:
    """Whether a lone apostrophe joins the next word, and whether a quotation is open after it.

    `left` counts the paragraph's lone apostrophes from this one on: a quotation needs a second one.
    """
    if inside:
        return False, False
    if re.fullmatch(r"\d\ds?", after) and not before.endswith("s"):
        return True, False  # the '70s
    owner = before.endswith("s") and before.isalpha() and before.lower() not in OWNERLESS
    if owner or (before == "<unk>" and left % 2):
        return False, False
    return True, left > 1
