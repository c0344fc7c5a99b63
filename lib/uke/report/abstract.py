"""The abstract: one paragraph of the numbers that a run has, so that it is right for every profile."""

from collections.abc import Iterable, Mapping
from typing import Any

from uke.report.numerals import number

OPENING = (
    "Is fine-tuning an effective way to write a long, free-form text into a language model? The paper arXiv 2506.09672 answers yes, "
    "if the choices behind it are made well; this report is a reconstruction of its study."
)
FEW = 30  # edits; below, the abstract says that little can be decided
# Effects of a factor, `effect.<factor>.<method>.average`, in the words of the abstract.
EFFECTS = {
    "loss_scope": "a loss over all target tokens instead of the last prompt token",
    "chat_template": "training through the chat template, which stands for the fourth factor,",
    "layers": "all blocks instead of the best single one",
    "components": "the feed-forward part instead of attention",
}
METHODS = {"FT-M (trained weights)": "ft_m", "LoRA": "lora"}
VERDICTS = {
    "holds": ("holds", "hold"),
    "in_part": ("holds in part", "hold in part"),
    "does_not_hold": ("does not hold", "do not hold"),
    "not_testable_here": ("is not testable here", "are not testable here"),
}

Numbers = Mapping[
    str, Mapping[str, Any]
]  # as sections say them: dotted key -> value, low, high, n, said


def write(sections: Iterable[Mapping[str, Any]]) -> str:
    """One paragraph: question, what was done, the main numbers, verdicts, limits. A clause without its number is left out.

    Where no number of the study is there, the answers of the sections stand for them; a run that shows the wiring only has none.
    """
    sections = list(sections)
    numbers = {key: said for section in sections for key, said in section["numbers"].items()}
    if any(section["smoke_run"] for section in sections):
        return _join(
            OPENING,
            _material(numbers),
            "Model and texts of this run do not belong together: it shows that loading, editing, asking and scoring work, and its numbers support no verdict.",
        )
    results = [_effects(numbers), _single(numbers), _batches(numbers), _sequence(numbers)]
    if not any(results):
        return _join(OPENING, _material(numbers), *(section["answer"] for section in sections))
    return _join(OPENING, _material(numbers), *results, _verdicts(numbers), _limits(numbers))


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _said(numbers: Numbers, key: str, unit: str = "") -> str:
    """A number with its interval, without its n and its own unit; nothing where there is none."""
    if key not in numbers:
        return ""
    said = (
        numbers[key]["said"]
        .partition(", n = ")[0]
        .removesuffix(f" {numbers[key].get('unit') or ''}")
    )
    return f"{said} {unit}" if unit else said


def _named(numbers: Numbers, form: str, key: str, unit: str = "") -> str:
    """`form` with the number in the place of {}; nothing where there is none."""
    said = _said(numbers, key, unit)
    return form.format(said) if said else ""


def _listed(parts: Iterable[str], last: str = " and ") -> str:
    parts = [part for part in parts if part]
    return last.join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _material(numbers: Numbers) -> str:
    model = (
        "a small model trained on a fictional world"
        if any(key.startswith("embedded.") for key in numbers)
        else ""
    )
    edits = _named(numbers, "{} texts", "edits.count")
    if edits and "edits.words" in numbers:
        edits += f" of {number(float(numbers['edits.words']['value']), 0)} words on average"
    probes = _named(
        numbers, "with {} probes of what must be learnt and what must stay", "edits.probes"
    )
    if not edits:
        return f"The model edited is {model}." if model else ""
    return (
        " ".join(
            filter(
                None,
                [
                    "Here",
                    edits,
                    probes,
                    f"are written into {model}" if model else "are written into a model",
                ],
            )
        )
        + "."
    )


def _effects(numbers: Numbers) -> str:
    """One sentence; the first factor names the metric and the methods, the others follow in the same order."""
    found = []
    for factor, words in EFFECTS.items():
        ends = {
            name: _said(numbers, f"effect.{factor}.{method}.average")
            for name, method in METHODS.items()
        }
        ends = {name: said for name, said in ends.items() if said}
        if ends and not found:
            methods, said = (
                list(ends),
                _listed([f"{said} points with {name}" for name, said in ends.items()]),
            )
            found.append(f"{words[:1].upper()}{words[1:]} changes the average metric by {said}")
        elif ends:
            alone = (
                ""
                if list(ends) == methods
                else f" with {_listed(name.partition(' (')[0] for name in ends)} alone"
            )
            found.append(f"{words} by {_listed(ends.values())}{alone}")
    return f"{'; '.join(found)}." if found else ""


def _single(numbers: Numbers) -> str:
    score = _named(numbers, "has an average metric of {} on single edits", "single.ft_uke.average")
    others = _listed(
        [
            _named(numbers, "{} without an edit", "single.before.average"),
            _named(numbers, "{} for FT-M", "single.ft_m.average"),
        ]
    )
    score += f" ({others})" if score and others else ""
    lead = _named(numbers, "its lead over the best earlier method is {}", "single.lead", "points")
    lead += _named(numbers, ", on AKEW {}", "akew.single.lead") if lead else ""
    if not score and not lead:
        return ""
    return (
        f"FT-UKE, the recipe that a rule chose on development edits, {score}; {lead}."
        if score and lead
        else f"FT-UKE {score}."
        if score
        else f"On single edits, {lead.replace('its lead', 'the lead of FT-UKE')}."
    )


def _sizes(numbers: Numbers, prefix: str, ending: str) -> list[int]:
    """The whole numbers between prefix and ending in the keys, smallest first."""
    middles = [
        key[len(prefix) : -len(ending)]
        for key in numbers
        if key.startswith(prefix) and key.endswith(ending)
    ]
    return sorted(int(middle) for middle in middles if middle.isdigit())


def _batches(numbers: Numbers) -> str:
    sizes = _sizes(numbers, "batch.", ".lead")
    if not sizes:
        return ""
    lead = (
        "this lead"
        if "single.lead" in numbers
        else "the lead of FT-UKE over the best earlier method"
    )
    ends = [
        f"{_said(numbers, f'batch.{size}.lead')} points {'on single edits' if size == 1 else f'in batches of {size}'}"
        for size in (sizes[0], sizes[-1])
    ]
    text = (
        f"With the number of texts written together, {lead} goes from {ends[0]} to {ends[1]}"
        if len(sizes) > 1
        else f"Where texts are written together, {lead} is {ends[0]}"
    )
    trends = _listed(
        [_named(numbers, "{}", "batch.trend"), _named(numbers, "{} on AKEW", "akew.batch.trend")]
    )
    return f"{text}, changing by {trends} with every doubling." if trends else f"{text}."


def _sequence(numbers: Numbers) -> str:
    counts = _sizes(numbers, "sequential.ft_uke.", ".average")
    if not counts or counts[-1] < 2:
        return ""
    text = f"After {counts[-1]} texts written one after another FT-UKE is left with {_said(numbers, f'sequential.ft_uke.{counts[-1]}.average')}"
    return (
        text
        + _named(
            numbers, ", written at once with {}", f"sequential.ft_uke_at_once.{counts[-1]}.average"
        )
        + "."
    )


def _verdicts(numbers: Numbers) -> str:
    counts = {
        word: int(numbers[f"verdicts.{word}"]["value"])
        for word in VERDICTS
        if f"verdicts.{word}" in numbers
    }
    if not sum(counts.values()):
        return ""
    parts = [f"{count} {VERDICTS[word][count != 1]}" for word, count in counts.items() if count]
    worlds = int(numbers.get("verdicts.worlds", {}).get("value") or 0)
    tried = f", tried in {'one world' if worlds == 1 else f'{worlds} worlds'}" if worlds else ""
    return f"Of {sum(counts.values())} statements of the paper, {_listed(parts)}{tried}."


def _limits(numbers: Numbers) -> str:
    small = any(key.startswith("embedded.") for key in numbers)
    few = "edits.count" in numbers and numbers["edits.count"]["value"] < FEW
    return _join(
        "Brackets are 95 % intervals, over edits or batches.",
        "With so few edits they are wide, and little can be decided." if few else "",
        "The model is small and its world narrow, so signs and trends may be compared with the paper's, sizes may not."
        if small
        else "",
        "The paper's fourth factor was not available to us.",
    )
