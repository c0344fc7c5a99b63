"""MediaWiki XML dumps, read page by page: the lead of each article, as plain text.

No more than the pages of one piece of the file is held, so a dump of any size needs the memory of its largest page.
"""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.parsers import expat

import mwparserfromhell
from mwparserfromhell.nodes import Tag, Template, Wikilink
from mwparserfromhell.parser import ParserError
from mwparserfromhell.wikicode import Wikicode

from uke.data.streams import BROKEN, damage, opened
from uke.errors import InputError

STUB_WORDS = 40  # a shorter passage is no probe: answers of the benchmarks have about 90 words
CUT = {
    3,
    5,
    6,
    20,
}  # expat: no element found, unclosed token, partial character, unclosed CDATA section

LONGEST_LEAD = 2**17  # characters of markup; a longer one is a list
DEEPEST = 40  # the parser's own limit, beyond which it takes a text apart again and again
HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<math\b.*?(?:</math>|/>|\Z)", re.DOTALL)
OPENING = re.compile(
    r"(\{\{|\[\[|^\{\||<(?!br|hr|li|p\b|wbr)[a-z]\w*\b[^<>/]*>)|\}\}|\]\]|^\|\}|</[a-z]",
    re.IGNORECASE | re.MULTILINE,
)
HEADING = re.compile(r"^={1,6}[^=\n].*=\s*$", re.MULTILINE)
REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
HATNOTE = re.compile(r"^:+''(?!').*$", re.MULTILINE)
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*")  # [[fr:Titre]] is a link in the margin
# English names of templates; a dump in another language loses its stubs by their length and `__DISAMBIG__`.
STUB = re.compile(r"\{\{(?!\s*sect)[^{}|]*\bstub\s*(?:\|[^{}]*)?\}\}", re.IGNORECASE)
LISTING = re.compile(
    r"__DISAMBIG__|\{\{(?:[^{}|\n]*[\s-])?"
    r"(?:disambig(?:uation)?|dab|hndis|geodis|numberdis|mathdab|roaddis|schooldis|hospitaldis)"
    r"(?:[ _-](?:page|cleanup))?\s*(?:\|[^{}]*)?\}\}",
    re.IGNORECASE,
)
FILES = {
    "-2",
    "6",
    "14",
}  # namespaces of media, files and categories: links there show no words of a sentence
UNREAD = {
    "ref",
    "references",
    "table",
    "gallery",
    "math",
    "chem",
    "syntaxhighlight",
    "source",
    "style",
    "div",
}
# Templates that stand for words of the sentence; every other one is a box, a note or a sound.
SPOKEN = {
    "nowrap": "{1}",
    "nobr": "{1}",
    "lang": "{2}",
    "ill": "{1}",
    "abbr": "{1}",
    "circa": "c. {1}",
    "c.": "c. {1}",
}
SPOKEN |= {
    "convert": "amount",
    "cvt": "amount",
    "snd": " – ",
    "spnd": " – ",
    "spaced ndash": " – ",
    "ndash": "–",
}
RANGE = re.compile(r"[\d.,/+−–±-]+|to|and|or|by|x")
TIDY = [
    (re.compile(r"__[A-Z]+__|\u200b|\ufeff"), ""),
    (re.compile(r"[ \t\xa0]+"), " "),
    (re.compile(r"\n\s+"), "\n"),
    (
        re.compile(r"\(\s*(?:(?:or|and)\b)?[;,:/\s]+"),
        "(",
    ),  # what a pronunciation leaves: "(; born 1815)"
    (re.compile(r"[;,] ?(?=[;,)])"), ""),
    (re.compile(r" ?\(\s*\)| ?\[\s*\]"), ""),
    (re.compile(r" +(?=[,.;:)\n])|(?<=[(\n]) +"), ""),
]
RESIDUE = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]|</?(?:ref|div|table)\b")


class Page(NamedTuple):
    """An article of a dump: its place in the file, its page id and title, and its lead as plain text."""

    place: str
    id: str
    title: str
    lead: str


def pages(path: Path, tally: Counter) -> Iterator[Page]:
    """The articles of a MediaWiki XML dump (any export version; .xml, .xml.bz2, also of many streams), streamed.

    Of each article its lead, the text before the first heading: the question that is made of a title ("Who is X?") is
    answered by the lead, and by no other section. Of several revisions the last counts. Left out, and counted in
    `tally` by reason: other namespaces, redirects, disambiguation pages, stubs (marked so, or a lead of fewer than
    `STUB_WORDS` words), other content than wikitext, and leads whose markup is broken. InputError for a dump that is
    cut or no dump, and for one with a document type: no dump has it, and it may hold entities that grow without bound.
    """
    spaces = {"media": "-2", "file": "6", "image": "6", "category": "14"}
    count = 0
    for element in _children(path):
        for name in element.iterfind("{*}namespaces/{*}namespace"):
            spaces[(name.text or "").lower()] = name.get("key", "0")
        if not _is(element, "page"):
            continue
        count += 1
        title, id, space = (
            (element.findtext(f"{{*}}{name}") or "").strip() for name in ("title", "id", "ns")
        )
        if not title or not id:
            raise InputError(
                f"{path}: page {count} has no {'id' if title else 'title'}; expected a MediaWiki dump"
            )
        space = space or spaces.get(
            title.split(":")[0].lower(), "0"
        )  # dumps before 2011 have no <ns>
        reason, text = (
            _article(element, spaces) if space == "0" else ("pages of other namespaces", "")
        )
        if reason:
            tally[reason] += 1
        else:
            yield Page(f"page {count} (id {id})", id, title, text)


def _children(path: Path) -> Iterator[ET.Element]:
    """Each direct child of a dump's root, once complete; it and all before it are forgotten when the next one is asked for."""
    depth, count, last = 0, 0, ""
    family: dict[int, ET.Element] = {}  # the root and its child, while they are read
    _check_prolog(path)
    try:
        with opened(path) as handle:
            pieces = SimpleNamespace(
                read=handle.read1
            )  # what can still be unpacked of a cut archive is read
            for event, element in ET.iterparse(pieces, ("start", "end")):
                depth += 1 if event == "start" else -1
                if event == "start":
                    if depth <= 2:
                        family[depth] = element
                elif depth == 2 and _is(element, "revision"):
                    # The parser runs ahead of its events, so later revisions may be there already.
                    for earlier in takewhile(
                        lambda one: one is not element, family[2].findall("{*}revision")
                    ):
                        family[2].remove(earlier)
                elif depth == 1:
                    yield element
                    if _is(element, "page"):
                        count, last = (
                            count + 1,
                            " ".join((element.findtext("{*}title") or "").split()),
                        )
                    family[1].clear()
    except (*BROKEN, ET.ParseError) as error:
        read = (
            f"after page '{last}', {count} page{'s' * (count > 1)} read"
            if count
            else "before the first page ends"
        )
        raise damage(path, error, read, cut=getattr(error, "code", None) in CUT) from None


def _is(element: ET.Element, name: str) -> bool:
    return element.tag.rsplit("}", 1)[-1] == name


def _check_prolog(path: Path) -> None:
    """What stands before the root of an XML file must declare no document type, and the root must be a dump's."""

    def refuse(*_: object) -> None:
        raise InputError(
            f"{path}: declares a document type (DOCTYPE), whose entities may grow without bound; expected none"
        )

    roots: list[str] = []
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: roots.append(name)
    try:
        with opened(path) as handle:
            # By few bytes, so that a refusal comes before the entities are read.
            while not roots and (start := handle.read1(64)):
                parser.Parse(start)
    except (*BROKEN, expat.ExpatError) as error:
        raise damage(path, error, "before the first page ends") from None
    if roots and roots[0] != "mediawiki":
        raise InputError(
            f"{path}: is XML with the root <{roots[0]}>; expected the <mediawiki> of a dump"
        )


def _article(page: ET.Element, spaces: dict[str, str]) -> tuple[str, str]:
    """Why a page is no document, or else "" and its lead."""
    source = page.findtext("{*}revision/{*}text") or ""
    if page.find("{*}redirect") is not None or REDIRECT.match(source):
        return "redirects", ""
    if not source.strip() or page.findtext("{*}revision/{*}model") not in (None, "wikitext"):
        return "pages without wikitext", ""
    if LISTING.search(source):
        return "disambiguation pages", ""
    if STUB.search(source):
        return "stubs", ""
    head = _head(source)
    if len(head) > LONGEST_LEAD or _depth(head) > DEEPEST:
        return (
            "pages of broken markup" if len(head) <= LONGEST_LEAD else "lists without a lead"
        ), ""
    try:
        text = lead(source, {name for name, key in spaces.items() if key in FILES})
    except ParserError:
        text = "{{"
    if RESIDUE.search(text):
        return "pages of broken markup", ""
    return ("stubs", "") if len(text.split()) < STUB_WORDS else ("", text)


def _head(source: str) -> str:
    """Wikitext before its first heading, without comments and formulas, whose braces are no markup."""
    return HEADING.split(HIDDEN.sub("", source), maxsplit=1)[0]


def _depth(source: str) -> int:
    """How deep templates, links, tables and tags stand in each other, those that are never closed included."""
    depth = deepest = 0
    for mark in OPENING.finditer(source):
        depth = depth + 1 if mark[1] else max(depth - 1, 0)
        deepest = max(depth, deepest)
    return deepest


def lead(source: str, files: Iterable[str] = ("file", "image", "category")) -> str:
    """The text of wikitext before its first heading, without markup; one line a paragraph.

    Without templates (except those that stand for words, as `nowrap` and `convert`), notes, tables, formulas, and
    links into the namespaces `files` (lower case). What a removed template leaves in brackets goes with it.
    """
    code = mwparserfromhell.parse(HATNOTE.sub("", _head(source)))
    text = _plain(code, frozenset(files))
    for pattern, tidied in TIDY:
        text = pattern.sub(tidied, text)
    return text.strip()


def _plain(code: Wikicode | None, files: frozenset[str]) -> str:
    """What a reader sees of some wikitext; in one pass, where removing nodes one by one would take quadratic time."""
    words = []
    for node in code.nodes if code else ():
        if isinstance(node, Template):
            words.append(_spoken(node, files))
        elif isinstance(node, Wikilink):
            space, colon, _ = str(node.title).partition(":")
            if not colon or not (
                space.strip().lower() in files or (LANGUAGE.fullmatch(space) and not node.text)
            ):
                words.append(_plain(node.text or node.title, files).removeprefix(":"))
        elif isinstance(node, Tag):
            name = str(node.tag).strip().lower()
            words.append(
                " " if name == "br" else "" if name in UNREAD else _plain(node.contents, files)
            )
        else:
            words.append(str(node.__strip__(normalize=True, collapse=False) or ""))
    return "".join(words)


def _spoken(template: Template, files: frozenset[str]) -> str:
    """The words a template stands for, "" if it stands for none."""
    name = str(template.name).strip().lower()
    if name not in SPOKEN:
        return ""
    values = [_plain(one.value, files).strip() for one in template.params if not one.showkey]
    if SPOKEN[name] == "amount":  # {{convert|23|to|38|cm|in}}
        number = list(takewhile(RANGE.fullmatch, values))
        return " ".join(values[: len(number) + 1])
    return SPOKEN[name].format("", *values, "", "")
