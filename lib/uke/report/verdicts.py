"""Judge each claim of the paper by the numbers that decide it; set published values beside ours.

claims = verdicts.claims("params/claims.yaml")
judged = [verdicts.judge(claim, verdicts.gather(paths)) for claim in claims]
section.table(verdicts.table(judged), "verdicts", "Each claim, our number and the verdict.")
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, FiniteFloat, StrictStr, ValidationError, model_validator

from uke.data.edits import KINDS
from uke.errors import InputError, nearest
from uke.files import read_yaml
from uke.project import Paths, number_key
from uke.report.section import read_sections
from uke.report.tables import absent, bracket, number, places
from uke.results.compare import label
from uke.results.metrics import METRICS

HOLDS, IN_PART, FAILS, UNTESTABLE = "holds", "in part", "does not hold", "not testable here"
WORDS = {HOLDS: 1, IN_PART: 0.5, FAILS: 0, UNTESTABLE: None}  # a verdict as a number
NOTEBOOK = "11_verdicts"
METRIC_NAMES = {
    "similarity": "BERT score (MiniLM cosine)",
    "bleu_char": "BLEU (characters)",
    "rougel_recall": "ROUGE-L recall",
}
_ZERO = {"value": 0.0, "low": 0.0, "high": 0.0}
Numbers = Mapping[str, Mapping[str, Any]]  # as numbers.json: key -> value, low, high, n, said


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(_Entry):
    """A statement of the paper that one number decides, or the reason why none does.

    `number` is its key; `*` stands for any part, and then every number that matches must agree.
    `sign`: "+" or "-", above or below `than` (a bound, or the key of another number); "either", a
    difference in any direction; "opposite", `number` and the number `than` differ in sign.
    """

    key: str
    claim: StrictStr
    label: StrictStr = ""
    paper: StrictStr = ""
    number: StrictStr = ""
    sign: Literal["", "+", "-", "either", "opposite"] = ""
    than: FiniteFloat | StrictStr = 0.0
    untestable: StrictStr = ""

    @model_validator(mode="after")
    def _decided(self) -> Self:
        if bool(self.number) == bool(self.untestable) or bool(self.number) != bool(self.sign):
            raise ValueError("expected a number and its sign, or the reason why it is untestable")
        if self.sign == "opposite" and not isinstance(self.than, str):
            raise ValueError(f"than: expected the key of another number, found {self.than!r}")
        return self


class Published(_Entry):
    """Published values in percent, of one set, model and metric, and where they are from."""

    set: str
    model: str
    metric: Literal[*METRICS, "lead"]
    source: str
    batch: Literal["", "smallest", "largest"] = ""
    cells: dict[str, dict[Literal[*KINDS, "average"], FiniteFloat]]


class Paper(_Entry):
    """What others have published: `params/paper.yaml`."""

    published: list[Published] = []
    correspondence: list[dict[str, str]] = []  # where the paper shows what, and our notebook


_FIELDS = {name for each in _Entry.__subclasses__() for name in each.model_fields}
Model = TypeVar("Model", bound=BaseModel)


def _valid(model: type[Model], place: str, content: Any) -> Model:
    """Validate; InputError with file, entry and key for the first thing that is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as failure:
        # A misspelt key is the reason why another one is missing.
        error = min(failure.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = [f"entry {part + 1}" if isinstance(part, int) else part for part in error["loc"]]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key{nearest(where[-1], _FIELDS)}"
    elif error["type"] not in ("value_error", "missing"):
        message += f", found {error['input']!r}"
    raise InputError(": ".join([place, *where, message])) from None


def claims(path: str | Path) -> list[Claim]:
    """Return the claims of a file, in its order; InputError naming claim and key."""
    return [
        _valid(Claim, f"{path}: {name}", {"key": name} | given if type(given) is dict else given)
        for name, given in read_yaml(Path(path)).items()
    ]


def paper(path: str | Path) -> Paper:
    """Return what others have published; InputError naming entry and key for whatever is wrong."""
    return _valid(Paper, str(path), read_yaml(Path(path)))


class Evidence(NamedTuple):
    """A number that counts for a claim; `state` is 1 or -1 if its interval excludes `against`."""

    world: str
    key: str
    value: float
    low: float | None
    high: float | None
    text: str
    against: float
    state: float


class Verdict(NamedTuple):
    """What became of a claim: a word of WORDS, why it is not testable, the evidence."""

    claim: Claim
    word: str
    reason: str
    evidence: tuple[Evidence, ...]

    @property
    def worlds(self) -> int:
        return len({each.world for each in self.evidence})


def judge(claim: Claim, worlds: Mapping[str, Numbers]) -> Verdict:
    """Judge a claim by the numbers of each world run; a world without the number does not count.

    *holds*: the paper's sign, with an interval that excludes zero, in every world. *in part*: its
    sign, but an interval includes or touches zero or is missing, or not in every world. *does not
    hold*: the other sign, or zero, in every world. A bound is met when it is reached. "either" has
    no sign of its own: it holds if every interval excludes zero on the same side, in part if some
    does, else not. Two numbers differ if their intervals do not overlap.
    """
    evidence = () if claim.untestable else tuple(_evidence(claim, worlds))
    if not evidence:
        reason = f"no number `{claim.number}`: its study was not run, or only as a smoke run"
        return Verdict(claim, UNTESTABLE, claim.untestable or reason, ())
    states = {each.state for each in evidence}
    sure, hinted = [{1}], max(states) > 0
    if claim.sign == "either":
        sure, hinted = [{1}, {-1}], bool({1, -1} & states)
    return Verdict(claim, HOLDS if states in sure else IN_PART if hinted else FAILS, "", evidence)


def _evidence(claim: Claim, worlds: Mapping[str, Numbers]) -> Iterator[Evidence]:
    """Yield the numbers of each world that decide a claim; none where one is not finite."""
    named = isinstance(claim.than, str)
    for world, numbers in worlds.items():
        other = numbers.get(claim.than, {}) if named else dict.fromkeys(_ZERO, claim.than)
        for key in _matching(numbers, claim.number) if _finite(other.get("value")) else ():
            own, against = numbers[key], other["value"]
            if claim.sign == "opposite":
                state = -_state(own, _ZERO) * _state(other, _ZERO)
                yield Evidence(world, key, *_ends(own), own["said"], 0, state)
                yield Evidence(world, claim.than, *_ends(other), other["said"], 0, state)
                continue
            state = _state(own, other, bound=not named and claim.than != 0)
            state = -state if claim.sign == "-" else state
            text = own["said"] + (f" (against {other['said']})" if named else "")
            yield Evidence(world, key, *_ends(own), text, against, state)


def _ends(entry: Mapping) -> tuple:
    return entry["value"], entry.get("low"), entry.get("high")


def _matching(numbers: Numbers, pattern: str) -> list[str]:
    """Return the keys of finite numbers that a pattern matches: batch.8 comes before batch.24."""
    keys = [
        key
        for key, own in numbers.items()
        if fnmatchcase(key, pattern) and key.count(".") == pattern.count(".")
        if _finite(own.get("value"))
    ]
    return sorted(
        keys, key=lambda key: [(len(p) if p.isdigit() else 99, p) for p in key.split(".")]
    )


def _state(own: Mapping, other: Mapping, bound: bool = False) -> float:
    """Return the direction of own minus other: 1 or -1 if intervals are disjoint, else half.

    A `bound` is passed when it is reached.
    """
    ahead = own["value"] - other["value"]
    direction = 1 if ahead > 0 or (bound and ahead == 0) else -1 if ahead < 0 else 0
    near, far = ("low", "high") if direction > 0 else ("high", "low")
    if not direction or not _finite(own.get(near)) or not _finite(other.get(far)):
        return direction / 2
    gap = direction * (own[near] - other[far])
    return float(direction) if gap > 0 or (bound and gap == 0) else direction / 2


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def gather(paths: Paths) -> dict[str, Numbers]:
    """Return the numbers of this run and of the same study on other worlds, by the run's name.

    This run's are read from its sections (else from numbers.json), without verdicts and
    smoke runs, those of `figures/<run>-world-*` from their numbers.json.
    """
    own = paths.figures.name
    folders = [paths.figures, *sorted(paths.figures.parent.glob(f"{own}-world-*"))]
    files = [folder / "numbers.json" for folder in folders if (folder / "numbers.json").is_file()]
    worlds = {own: {}}
    worlds |= {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if sections := read_sections(paths):
        counted = [s for s in sections if s["notebook"] != NOTEBOOK and not s["smoke_run"]]
        worlds[own] = {key: entry for s in counted for key, entry in s["numbers"].items()}
    return worlds


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return how many claims got each verdict, in the order of WORDS."""
    words = [each.word for each in verdicts]
    return {word: words.count(word) for word in WORDS}


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Return a row for each claim: claim, the paper, ours, verdict, worlds."""
    rows = [
        {
            "claim": each.claim.claim,
            "the paper": each.claim.paper,
            "ours": "; ".join(_distinction(each, seen) + seen.text for seen in each.evidence),
            "verdict": f"{each.word}: {each.reason}" if each.reason else each.word,
            "worlds": each.worlds,
        }
        for each in verdicts
    ]
    return pd.DataFrame(rows)


def _distinction(verdict: Verdict, each: Evidence) -> str:
    """Return what tells a number from the others of its verdict: world and parts of keys."""
    keys = zip(*(one.key.split(".") for one in verdict.evidence), strict=False)
    parts = zip(each.key.split("."), keys, strict=False)
    words = [each.world] if verdict.worlds > 1 else []
    words += [part for part, others in parts if len(set(others)) > 1]
    return f"{', '.join(words)}: " if words else ""


def points(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Return a row for each number that decides a claim, for `figures.claims`.

    Columns: claim (its label), verdict, value, low, high (the distance from what it is compared
    with, in the direction of the claim) and text. Claims without a number have no row.
    """
    rows = []
    for verdict in verdicts:
        claim, evidence = verdict.claim, verdict.evidence
        unsigned = claim.sign in ("either", "opposite")
        turn = -1 if claim.sign == "-" or (unsigned and evidence and evidence[0].value < 0) else 1
        for each in evidence:
            low, high = (each.value if absent(end) else end for end in (each.low, each.high))
            value, *ends = (turn * (end - each.against) for end in (each.value, low, high))
            decimals = places(each.value, each.low, each.high)
            text = _distinction(verdict, each) + number(float(each.value), decimals)
            text += "" if absent(each.low) else f" {bracket(each.low, each.high, decimals)}"
            rows.append((claim.label or claim.key, verdict.word, value, *sorted(ends), text))
    return pd.DataFrame(rows, columns=["claim", "verdict", "value", "low", "high", "text"])


def beside(published: Iterable[Published], numbers: Numbers) -> pd.DataFrame:
    """Return published values beside ours of the same kind, in percent; None where we have none.

    A published ROUGE-L recall stands beside our ROUGE-L F1, and a lead beside ours at the smallest
    or the largest batch.
    """
    rows = [
        {
            "set": entry.set,
            "model": entry.model,
            "method": method,
            "metric": METRIC_NAMES.get(entry.metric, entry.metric),
            "question": f"{entry.batch} batch" if entry.batch else label(kind),
            "published": f"{value:g}",
            "ours": _ours(entry, method, kind, numbers),
            "source": entry.source,
        }
        for entry in published
        for method, values in entry.cells.items()
        for kind, value in values.items()
    ]
    return pd.DataFrame(rows)


def _ours(entry: Published, method: str, kind: str, numbers: Numbers) -> str | None:
    prefix = "akew." if entry.set.upper().startswith("AKEW") else ""
    if entry.metric == "lead":
        keys = _matching(numbers, f"{prefix}batch.*.lead_relative")
        return numbers[keys[-1 if entry.batch == "largest" else 0]]["said"] if keys else None
    key = f"{prefix}single.{number_key(method)}.{kind}"
    same = numbers.get(key, {}) if entry.metric == "rougel_recall" else {}
    own = numbers.get(f"{key}.{entry.metric}", same)
    if not _finite(own.get("value")):
        return None
    ends = "" if absent(own.get("low")) else f" {bracket(100 * own['low'], 100 * own['high'], 1)}"
    return number(100.0 * own["value"], 1) + ends
