"""The verdicts: each claim of the paper beside the numbers that decide it in every world run; published figures beside ours."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from uke.data.edits import KINDS as KIND_ORDER
from uke.errors import InputError, nearest
from uke.files import read_yaml
from uke.methods.catalog import key as method_key
from uke.report.tables import absent, bracket, number, places
from uke.results.compare import LABELS
from uke.results.metrics import METRICS

HOLDS, IN_PART, FAILS, UNTESTABLE = "holds", "in part", "does not hold", "not testable here"
WORDS = {HOLDS: 1, IN_PART: 0.5, FAILS: 0, UNTESTABLE: None}  # a verdict as a number
SIGNS = ("+", "-", "either", "opposite")
NOTEBOOK = "11_verdicts"

ZERO = {"value": 0.0, "low": 0.0, "high": 0.0}
Numbers = Mapping[
    str, Mapping[str, Any]
]  # as sections say them: dotted key -> value, low, high, n, said


@dataclass(frozen=True)
class Claim:
    """A statement that one number decides, `number` with `*` for any part: then every number that matches must agree.

    `sign`: "+" or "-", above or below `than` (a bound, or the key of another number); "either", a difference in any
    direction; "opposite", number and the number `than` have different signs. Or `untestable`, the reason why none decides it.
    """

    key: str
    claim: str
    label: str = ""
    paper: str = ""
    number: str = ""
    sign: str = ""
    than: float | str = 0.0
    untestable: str = ""


class Seen(NamedTuple):
    """A number that counted for a claim: where, what it was, what it is compared with; `state` is 1 or -1 where the interval is clear of that."""

    world: str
    key: str
    value: float
    low: float | None
    high: float | None
    said: str
    against: float
    state: float


class Verdict(NamedTuple):
    """What became of a claim: a word of WORDS, the reason where it is not testable, the numbers, and the worlds that have them."""

    claim: Claim
    word: str
    reason: str
    seen: tuple[Seen, ...]

    @property
    def worlds(self) -> int:
        return len({each.world for each in self.seen})


def claims(path: str | Path) -> list[Claim]:
    """The claims of a file, in its order; InputError naming file, claim and key for whatever is wrong."""
    return [_claim(f"{path}: {name}", name, given) for name, given in read_yaml(Path(path)).items()]


def _claim(place: str, name: str, given: Any) -> Claim:
    _strict(place, given, [field.name for field in fields(Claim)][1:], ("claim",))
    for field, value in given.items():
        if not isinstance(value, str) and not (field == "than" and _finite(value)):
            raise InputError(
                f"{place}: {field}: expected a text{' or a number' if field == 'than' else ''}, found {value!r}"
            )
    found = Claim(key=name, **given)
    if bool(found.number) == bool(found.untestable):
        raise InputError(
            f"{place}: expected a number that decides it, or the reason why it is untestable"
        )
    if found.number:
        _one_of(f"{place}: sign", found.sign, SIGNS)
    if found.sign == "opposite" and not isinstance(found.than, str):
        raise InputError(
            f"{place}: than: expected the key of the number whose sign is another one, found {found.than!r}"
        )
    return found


def judge(claim: Claim, worlds: Mapping[str, Numbers]) -> Verdict:
    """The verdict on a claim from the numbers of each world run; those without the number do not count.

    *holds*: the paper's sign, with an interval that excludes zero, in every world. *in part*: its sign, but an interval
    includes zero (or touches it, or is missing), or not in every world. *does not hold*: the other sign, or zero, in
    every world. A bound is met when it is reached. "Either" direction has no sign of its own: it holds if every interval excludes
    zero on the same side, in part if some interval excludes zero, else not. Two numbers differ if their intervals do not overlap.
    """
    if claim.untestable:
        return Verdict(claim, UNTESTABLE, claim.untestable, ())
    seen = tuple(each for world, numbers in worlds.items() for each in _look(claim, world, numbers))
    if not seen:
        return Verdict(
            claim,
            UNTESTABLE,
            f"no number `{claim.number}`: its study was not run, or its data show the wiring only",
            (),
        )
    states = [each.state for each in seen]
    sure, hinted = [{1}], max(states) > 0
    if claim.sign == "either":
        sure, hinted = [{1}, {-1}], bool({1, -1} & set(states))
    return Verdict(claim, HOLDS if set(states) in sure else IN_PART if hinted else FAILS, "", seen)


def _look(claim: Claim, world: str, numbers: Numbers) -> Iterable[Seen]:
    """The numbers of one world that decide a claim; none where one is missing or is no number."""
    named = isinstance(claim.than, str)
    other = (
        numbers.get(claim.than, {})
        if named
        else dict.fromkeys(("value", "low", "high"), claim.than)
    )
    matching = [
        key
        for key, own in numbers.items()
        if fnmatchcase(key, claim.number)
        and key.count(".") == claim.number.count(".")
        and _finite(own.get("value"))
    ]
    for key in sorted(matching, key=_natural) if _finite(other.get("value")) else ():
        own = numbers[key]
        if claim.sign == "opposite":
            both = -_state(own, ZERO) * _state(other, ZERO)
            yield from (
                Seen(
                    world,
                    name,
                    each["value"],
                    each.get("low"),
                    each.get("high"),
                    each["said"],
                    0,
                    both,
                )
                for name, each in ((key, own), (claim.than, other))
            )
            continue
        state = _state(own, other, bound=not named and claim.than != 0) * (
            -1 if claim.sign == "-" else 1
        )
        said = own["said"] + (f" (against {other['said']})" if named else "")
        yield Seen(
            world, key, own["value"], own.get("low"), own.get("high"), said, other["value"], state
        )


def _state(own: Mapping, other: Mapping, bound: bool = False) -> float:
    """Direction of own minus other: 1 or -1 if the intervals tell them apart, else half of it; a `bound` is passed when it is reached."""
    ahead = own["value"] - other["value"]
    direction = 1 if ahead > 0 or (bound and ahead == 0) else -1 if ahead < 0 else 0
    near, far = ("low", "high") if direction > 0 else ("high", "low")
    if not direction or not _finite(own.get(near)) or not _finite(other.get(far)):
        return direction / 2
    gap = direction * (own[near] - other[far])
    return float(direction) if gap > 0 or (bound and gap == 0) else direction / 2


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _natural(key: str) -> list:
    """Numbers within a key by their size: batch.8 comes before batch.24."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def gather(paths: Any) -> dict[str, dict]:
    """The numbers of this run, and of the same study on other worlds, `figures/<run>-world-*` beside it, by folder."""
    own = Path(paths.figures)
    others = sorted(own.parent.glob(f"{own.name}-world-*"))
    return {own.name: read(own)} | {
        folder.name: found for folder in others if (found := read(folder))
    }


def read(folder: Path) -> dict[str, dict]:
    """All numbers of a run: of its sections but for the verdicts, of `numbers.json` where it has none. What is wiring only is left out."""
    sections = sorted((folder / "sections").glob("*.json"))
    if not sections:
        return _json(folder / "numbers.json") if (folder / "numbers.json").is_file() else {}
    held = [_json(path) for path in sections if path.stem != NOTEBOOK]
    return {
        key: each
        for section in held
        if not section.get("smoke_run")
        for key, each in section.get("numbers", {}).items()
    }


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected JSON as the report writes it ({' '.join(str(error).split())})"
        ) from None
    return dict(_mapping(str(path), found))


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row for each claim: claim, the paper, ours, verdict, worlds."""
    rows = [
        (
            each.claim.claim,
            each.claim.paper,
            _ours(each),
            each.word if not each.reason else f"{each.word}: {each.reason}",
            each.worlds,
        )
        for each in verdicts
    ]
    return pd.DataFrame(rows, columns=["claim", "the paper", "ours", "verdict", "worlds"])


def _ours(verdict: Verdict) -> str:
    """The numbers as they were said, those of several worlds one after the other."""
    return "; ".join(f"{_told_apart(verdict, each)}{each.said}" for each in verdict.seen)


def _told_apart(verdict: Verdict, each: Seen) -> str:
    """What tells a number from the others of its verdict: the world, and the parts of the key in which they differ."""
    keys = [one.key.split(".") for one in verdict.seen]
    parts = [part for part, others in zip(each.key.split("."), zip(*keys)) if len(set(others)) > 1]
    words = ([each.world] if verdict.worlds > 1 else []) + parts
    return f"{', '.join(words)}: " if words else ""


def points(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """What a figure shows: a row for each number, its distance from what it is compared with, in the claim's direction.

    Columns: claim (its label), verdict, value, low, high, said. Claims without a number have no row.
    """
    rows = []
    for verdict in verdicts:
        claim = verdict.claim
        turn = (
            -1
            if claim.sign == "-"
            or (claim.sign in ("either", "opposite") and verdict.seen and verdict.seen[0].value < 0)
            else 1
        )
        for each in verdict.seen:
            low, high = (each.value if absent(end) else end for end in (each.low, each.high))
            ends = sorted(turn * (end - each.against) for end in (low, high))
            decimals = places(each.value, each.low, each.high)
            said = number(float(each.value), decimals) + (
                "" if absent(each.low) else f" {bracket(each.low, each.high, decimals)}"
            )
            rows.append(
                (
                    claim.label or claim.key,
                    verdict.word,
                    turn * (each.value - each.against),
                    *ends,
                    _told_apart(verdict, each) + said,
                )
            )
    return pd.DataFrame(rows, columns=["claim", "verdict", "value", "low", "high", "said"])


class Cell(NamedTuple):
    """A published value, in percent, and where it is from."""

    set: str
    model: str
    method: str
    metric: str
    batch: str
    kind: str
    value: float
    source: str


METRIC_NAMES = {
    "similarity": "BERT score (MiniLM cosine)",
    "bleu_char": "BLEU (characters)",
    "rougel_recall": "ROUGE-L recall",
    "lead": "lead",
}


def published(path: str | Path) -> list[Cell]:
    """The published values of a file, in its order; InputError naming file, entry and key for whatever is wrong."""
    found = []
    for place, entry in _entries(path, "published"):
        _strict(
            place,
            entry,
            ("set", "model", "metric", "source", "batch", "cells"),
            ("set", "model", "metric", "source", "cells"),
        )
        batch, metrics, kinds = entry.get("batch", ""), (*METRICS, "lead"), (*KIND_ORDER, "average")
        _one_of(f"{place}: metric", entry["metric"], metrics)
        _one_of(f"{place}: batch", batch, ("", "smallest", "largest"))
        for method, values in _mapping(f"{place}: cells", entry["cells"]).items():
            for kind, value in _mapping(f"{place}: cells: {method}", values).items():
                _one_of(f"{place}: cells: {method}", kind, kinds)
                if not _finite(value):
                    raise InputError(
                        f"{place}: cells: {method}: {kind}: expected a number, found {value!r}"
                    )
                found.append(
                    Cell(
                        *(str(entry[key]) for key in ("set", "model")),
                        str(method),
                        entry["metric"],
                        batch,
                        kind,
                        value,
                        str(entry["source"]),
                    )
                )
    return found


def correspondence(path: str | Path) -> pd.DataFrame:
    """What the paper shows where, and which notebook of ours answers it: columns paper, shows, notebook."""
    entries, names = _entries(path, "correspondence"), ("paper", "shows", "notebook")
    for place, entry in entries:
        _strict(place, entry, names, names)
    return pd.DataFrame(
        [[str(entry[name]) for name in names] for _, entry in entries],
        columns=["the paper", "shows", "ours"],
    )


def beside(cells: Iterable[Cell], numbers: Numbers) -> pd.DataFrame:
    """Published values beside what this run has of the same kind, both in percent; a dash where it has none.

    A published ROUGE-L recall stands beside our ROUGE-L F1, and a lead beside ours at the smallest or the largest batch.
    """
    rows = [
        (
            cell.set,
            cell.model,
            cell.method,
            METRIC_NAMES.get(cell.metric, cell.metric),
            f"{cell.batch} batch" if cell.batch else LABELS.get(cell.kind, cell.kind),
            f"{cell.value:g}",
            _own(cell, numbers),
            cell.source,
        )
        for cell in cells
    ]
    return pd.DataFrame(
        rows,
        columns=["set", "model", "method", "metric", "question", "published", "ours", "source"],
    )


def _own(cell: Cell, numbers: Numbers) -> str | None:
    prefix = "akew." if cell.set.upper().startswith("AKEW") else ""
    if cell.metric == "lead":
        found = [
            key
            for ending in ("lead_relative", "lead")
            for key in sorted(numbers, key=_natural)
            if fnmatchcase(key, f"{prefix}batch.*.{ending}")
        ]
        found = [key for key in found if key.rpartition(".")[2] == found[0].rpartition(".")[2]]
        return numbers[found[-1 if cell.batch == "largest" else 0]]["said"] if found else None
    key = f"{prefix}single.{method_key(cell.method)}.{cell.kind}"
    own = numbers.get(
        f"{key}.{cell.metric}", numbers.get(key, {}) if cell.metric == "rougel_recall" else {}
    )
    if not _finite(own.get("value")):
        return None
    ends = "" if absent(own.get("low")) else f" {bracket(100 * own['low'], 100 * own['high'], 1)}"
    return number(100.0 * own["value"], 1) + ends


def _entries(path: str | Path, part: str) -> list[tuple[str, Mapping]]:
    content = read_yaml(Path(path))
    _strict(str(path), content, ("published", "correspondence"))
    every = content.get(part, [])
    if not isinstance(every, list):
        raise InputError(f"{path}: {part}: expected a list, found {type(every).__name__}")
    return [(f"{path}: {part}, entry {place}", entry) for place, entry in enumerate(every, 1)]


def _strict(place: str, given: Any, valid: Iterable[str], needed: Iterable[str] = ()) -> None:
    """InputError for what is no mapping, has an unknown key, or lacks one."""
    for key in _mapping(place, given):
        _one_of(place, key, valid, "key ")
    if lacking := [key for key in needed if key not in given]:
        raise InputError(f"{place}: {lacking[0]}: missing")


def _mapping(place: str, given: Any) -> Mapping:
    if not isinstance(given, Mapping):
        raise InputError(f"{place}: expected a mapping, found {given!r}")
    return given


def _one_of(place: str, value: Any, valid: Iterable[str], what: str = "") -> None:
    if value not in valid:
        raise InputError(f"{place}: unknown {what}'{value}'{nearest(str(value), valid)}")
