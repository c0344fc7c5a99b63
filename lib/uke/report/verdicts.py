"""Judge each claim of the paper by the numbers that decide it.

claims, settings = verdicts.claims("params/claims.yaml"), verdicts.settings(paths)
judged = {at: [verdicts.judge(each, runs) for each in claims] for at, runs in settings.items()}
section.table(verdicts.table(judged), "verdicts", "Each claim in each setting.", half=True)
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, FiniteFloat, StrictStr, conlist, model_validator

from uke.errors import located
from uke.files import read_yaml, record
from uke.project import Paths
from uke.report.section import read_sections
from uke.report.tables import MISSING

HOLDS, IN_PART, NOT_SHOWN = "holds", "holds in part", "not shown"
FAILS, UNTESTABLE = "does not hold", "not testable here"
WORDS = {HOLDS: 1, IN_PART: 0.5, NOT_SHOWN: 0, FAILS: -1, UNTESTABLE: None}  # as numbers
MARGIN = 3.0  # points: a whole interval within them is a difference of nothing
NOTEBOOK = "11_verdicts"
NOT_RUN, OTHER_DATA = "not run", "a claim on other data"  # how a reason begins
SETTINGS = {  # models and data by folder of `figures`, as readers see them
    "embedded": "embedded model, its world",
    "embedded-world-*": "other worlds",
    "smollm2": "SmolLM2, the world",
    "smollm2-unkebench": "SmolLM2, UnKEBench",
    "smollm2-akew-mquake": "SmolLM2, AKEW (MQuAKE-CF)",
}
_VALUE = {"percent": FiniteFloat, "ours": (StrictStr, ""), "source": StrictStr}
PAPER = record(  # what params/paper.yaml has
    "",
    published=conlist(record("set model method metric question", **_VALUE), min_length=1),
    correspondence=conlist(record("paper shows notebook"), min_length=1),
)
_ENDS = ("low", "high")
Numbers = Mapping[str, Mapping[str, Any]]  # as numbers.json: key -> value, low, high, n, said


class Claim(BaseModel, extra="forbid", frozen=True):
    """A statement of the paper that one number decides, or the reason why none does.

    `number` is its key; `*` stands for any part, and then every number that matches must agree.
    `sign`: "+" or "-", above or below `than` (a value, or the key of another number); "either", a
    difference in any direction; "opposite", `number` and the number `than` differ in sign. `data`:
    the benchmark that it is about, if one. `ours`: a statement of this study, not of the paper.
    `could_fail`: whether it could have failed, in words, or words by pattern of a run's name.
    """

    key: str
    claim: StrictStr
    label: StrictStr = ""
    paper: StrictStr = ""
    number: StrictStr = ""
    sign: Literal["", "+", "-", "either", "opposite"] = ""
    than: FiniteFloat | StrictStr = 0.0
    untestable: StrictStr = ""
    could_fail: StrictStr | dict[str, StrictStr] = ""
    data: Literal["", "unkebench", "akew"] = ""
    ours: bool = False

    @model_validator(mode="after")
    def _decided(self) -> Self:
        if bool(self.number) == bool(self.untestable) or bool(self.number) != bool(self.sign):
            raise ValueError("expected a number and its sign, or the reason why it is untestable")
        if self.sign == "opposite" and not isinstance(self.than, str):
            raise ValueError(f"than: expected the key of another number, found {self.than!r}")
        return self

    def key_in(self, run: str) -> str:
        """Return the key of the number in a run; empty where the run is of other data.

        The world has edits in the form of either benchmark, AKEW's numbers under `akew.`; a run of
        AKEW itself has them without.
        """
        of = next((data for data in ("unkebench", "akew") if f"-{data}" in run), self.data)
        if self.data and of != self.data:
            return ""
        return self.number.removeprefix("akew.") if "-akew" in run else self.number

    def could_fail_in(self, run: str) -> str:
        """Return whether it could have failed in a run, by the first pattern that fits its name."""
        given = {"*": self.could_fail} if isinstance(self.could_fail, str) else self.could_fail
        return next((text for pattern, text in given.items() if fnmatchcase(run, pattern)), "")


def claims(path: str | Path) -> list[Claim]:
    """Read the claims of a file, in its order; InputError naming claim and key."""
    found = []
    for name, given in read_yaml(Path(path)).items():
        with located(f"{path}: {name}", Claim.model_fields):
            found.append(Claim(**given, key=name))
    return found


class Evidence(NamedTuple):
    """A number that counts for a claim, as it is said in the report.

    `state`: 1 or -1 if the interval is on one side of zero, 0 if it is within MARGIN, else NaN.
    """

    world: str
    key: str
    said: str
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

    *holds*: every interval is on the claim's side of zero. *holds in part*: some are. *does not
    hold*: every one is on the other side, or within MARGIN of zero. *not shown*: none is on the
    claim's side, and one includes zero, or is missing. "either" takes the side of the first that
    excludes zero. Two numbers differ if their intervals do not overlap. A world in which a number
    that the claim needs is void does not count either.
    """
    void = {world: _void(claim, world, numbers) for world, numbers in worlds.items()}
    sound = {world: numbers for world, numbers in worlds.items() if not void[world]}
    evidence = () if claim.untestable else tuple(_evidence(claim, sound))
    if not evidence:
        reason = " ".join(dict.fromkeys(filter(None, void.values())))
        other = worlds and not any(map(claim.key_in, worlds))
        reason = reason or (OTHER_DATA if other else f"{NOT_RUN}: no number `{claim.number}`")
        return Verdict(claim, UNTESTABLE, claim.untestable or reason, ())
    states = [each.state for each in evidence]
    side = next((each for each in states if abs(each) == 1), 1) if claim.sign == "either" else 1
    word = HOLDS if all(each == side for each in states) else IN_PART
    if side not in states:
        word = NOT_SHOWN if np.isnan(states).any() else FAILS
    return Verdict(claim, word, "", evidence)


def _void(claim: Claim, world: str, numbers: Numbers) -> str:
    """Return why numbers that a claim needs are void; empty where none is."""
    keys = (*_matching(numbers, claim.key_in(world)), claim.than)
    needed = [numbers.get(key, {}) for key in keys]
    return " ".join(dict.fromkeys(each["void"] for each in needed if each.get("void")))


def _evidence(claim: Claim, worlds: Mapping[str, Numbers]) -> Iterator[Evidence]:
    """Yield the numbers of each world that decide a claim."""
    bound = None if isinstance(claim.than, str) else dict.fromkeys(_ENDS, claim.than)
    turn = -1 if claim.sign == "-" else 1
    for world, numbers in worlds.items():
        other = bound or numbers.get(claim.than)
        for key in _matching(numbers, claim.key_in(world)) if other else ():
            own = numbers[key]
            if claim.sign == "opposite":
                zero = dict.fromkeys(_ENDS, 0)
                states = [_state(each, zero) for each in (own, other)]
                state = 0.0 if 0 in states else -states[0] * states[1]
                yield Evidence(world, key, own["said"], state)
                yield Evidence(world, claim.than, other["said"], state)
            else:
                against = "" if bound else f" (against {other['said']})"
                yield Evidence(world, key, own["said"] + against, turn * _state(own, other))


def _state(own: Mapping, other: Mapping) -> float:
    """Judge own minus other; intervals that overlap include zero."""
    ends = np.array([[own[end], other[end]] for end in _ENDS], dtype=float)
    low, high = ends[0, 0] - ends[1, 1], ends[1, 0] - ends[0, 1]
    margin = MARGIN if own["unit"].startswith("points") else MARGIN / 100
    return 1.0 if low > 0 else -1.0 if high < 0 else 0.0 if max(-low, high) <= margin else np.nan


def _matching(numbers: Numbers, pattern: str) -> list[str]:
    """Return the keys that a pattern matches part by part: batch.8 comes before batch.24."""
    keys = [key for key in numbers if fnmatchcase(key, pattern)]
    keys = [key for key in keys if key.count(".") == pattern.count(".")]
    return sorted(keys, key=lambda key: [p.zfill(9) if p.isdigit() else p for p in key.split(".")])


def settings(paths: Paths) -> dict[str, dict[str, Numbers]]:
    """Return the numbers of each setting by run: this run first, then what `figures` has.

    This run's are read from its sections (else from numbers.json), without its verdicts.
    """
    own, folder = paths.figures.name, paths.figures.parent
    if sections := read_sections(paths):
        counted = [section["numbers"] for section in sections if section["notebook"] != NOTEBOOK]
        numbers = {key: entry for each in counted for key, entry in each.items()}
    else:
        numbers = read_numbers(folder, own).get(own, {})
    found = {SETTINGS.get(own, own): {own: numbers}}
    for pattern, name in SETTINGS.items():
        if others := {
            run: each for run, each in read_numbers(folder, pattern).items() if run != own
        }:
            found[name] = others
    return found


def read_numbers(folder: Path, pattern: str) -> dict[str, Numbers]:
    """Return the numbers of every run whose folder of figures fits a pattern, by its name."""
    files = sorted(folder.glob(f"{pattern}/numbers.json"))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def counts(verdicts: Iterable[Verdict], ours: bool = False) -> dict[str, int]:
    """Return how many statements of the paper (or of ours) got each verdict, as in WORDS."""
    words = [each.word for each in verdicts if each.claim.ours == ours]
    return {word: words.count(word) for word in WORDS}


def table(judged: Mapping[str, Iterable[Verdict]], ours: bool = False) -> pd.DataFrame:
    """Return a row per claim of the paper (or of ours): verdicts by setting, why one is void."""
    chosen = {name: [v for v in own if v.claim.ours == ours] for name, own in judged.items()}
    words = {name: [_cell(verdict) for verdict in own] for name, own in chosen.items()}
    each = [*zip(*chosen.values(), strict=True)]
    words |= {"why not testable": [next(filter(None, map(_brief, own)), "") for own in each]}
    return pd.DataFrame({"claim": [own[0].claim.claim for own in each]} | words)


def _brief(verdict: Verdict) -> str:
    """Return the beginning of the reason for which a setting that has the number is void."""
    skipped = verdict.reason.startswith((NOT_RUN, OTHER_DATA))
    return "" if skipped else re.split(r"[:;(,.]", verdict.reason)[0].strip()


def _cell(verdict: Verdict) -> str:
    """Return a verdict in few words that stay on one line."""
    word = NOT_RUN if verdict.reason.startswith(NOT_RUN) else verdict.word.removesuffix(" here")
    return MISSING if verdict.reason == OTHER_DATA else word.replace(" ", "\u00a0")


def evidence(judged: Mapping[str, Iterable[Verdict]]) -> pd.DataFrame:
    """Return a row for each verdict: the numbers that decide it, and if it could have failed there.

    Without numbers a verdict has a row where there is a reason: they are void, or it has none ever.
    """
    rows, own = [], next(iter(judged))
    for each in zip(*judged.values(), strict=True):
        for setting, verdict in zip(judged, each, strict=True):
            claim, never = verdict.claim, bool(verdict.claim.untestable)
            if verdict.reason.startswith((NOT_RUN, OTHER_DATA)) or (never and setting != own):
                continue
            runs = {seen.world for seen in verdict.evidence}
            words = dict.fromkeys(claim.could_fail_in(run) for run in sorted(runs))
            rows += [
                {
                    "claim": claim.label or claim.claim,
                    "the paper": claim.paper,
                    "model and data": "any" if never else setting,
                    "verdict": verdict.word,
                    "ours, or why none": verdict.reason
                    or "; ".join(_distinction(verdict, s) + s.said for s in verdict.evidence),
                    "could it have failed there": " ".join(words),
                }
            ]
    return pd.DataFrame(rows)


def _distinction(verdict: Verdict, each: Evidence) -> str:
    """Return what tells a number from the others of its verdict: world and parts of keys."""
    keys = zip(*(one.key.split(".") for one in verdict.evidence), strict=False)
    parts = zip(each.key.split("."), keys, strict=False)
    words = [each.world] if verdict.worlds > 1 else []
    words += [part for part, others in parts if len(set(others)) > 1]
    return f"{', '.join(words)}: " if words else ""
