"""The benchmarks' files: read JSON records and turn them into edits, triples and locality probes.

Other keys than those named here are ignored. White space around a text is trimmed, nothing inside
it is changed. An id is `id`, else `case_id`, else the position in the file.
Mappings: arXiv 2506.09672 and the published code of UnKE, AnyEdit and EasyEdit.
"""

import json
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

from uke.data.edits import Cloze, Edit, Item, Probe
from uke.errors import InputError, about, located, nearest, typed
from uke.files import read_yaml


def read_json(path: str | Path) -> Any:
    """Read one JSON value from a UTF-8 file; InputError says what is wrong and where."""
    path = Path(path).expanduser()
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); expected one JSON file"
        raise InputError(f"{path}: {problem}") from None


def parse(content: bytes, place: str) -> Any:
    """Read one JSON value; InputError says what is wrong."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}") from None


def edit_everything(record: Mapping) -> Edit:
    """Read EditEverything: question, answer and one of its categories."""
    return Edit(**{name: record[name] for name in ("id", "question", "answer", "category")})


def unkebench(record: Mapping) -> Edit:
    """Read UnKEBench v2, or v3 with its `mmlu_*` lists; may have MQuAKE's multi-hop keys too."""
    details = _together(record, "sub_question", "sub_answer")
    return Edit(
        id=record["id"],
        question=record["question"],
        answer=record["answer"],
        paraphrase=record["para_question"],
        details=[{"question": question, "answer": answer} for question, answer in details],
        extra=(*_hops(record), *_exercises(record)),
    )


def akew(record: Mapping, asks: str = "prompt_full") -> Edit:
    """Read AKEW: a record's first rewrite, whose field `asks` is the question, if it has that.

    As published, also where a record has several rewrites and its answer may need them all. Its
    paragraph is written, its first five triplets are details, and `loc` is a locality question.
    """
    rewrites = record["requested_rewrite"]
    first = rewrites[0] if type(rewrites) is list else rewrites
    target = _first(first, "target_new", "answer_new")
    triplets = first["unsfact_triplets_GPT"]
    own = first | {"target": target["str"] if type(target) is dict else target}
    # A relation without exactly one place for its subject states no fact.
    stated = [one for one in (own, *triplets) if one["prompt"].count("{}") == 1]
    return Edit(
        id=record["id"],
        question=first.get(asks) or _filled(first),
        answer=first["fact_new_uns"],
        paraphrase=next(iter(record.get("paraphrase_prompts", ())), None),
        subject=first["subject"],
        details=[{"question": _filled(one), "answer": one["target"]} for one in triplets[:5]],
        facts=[
            {"subject": one["subject"], "relation": one["prompt"], "object": one["target"]}
            for one in stated
        ],
        extra=(*_hops(record), *_locality(record)),
    )


FORMATS: dict[str, Callable[[Mapping], Edit]] = {
    "unkebench": unkebench,
    "akew-counterfact": akew,
    "akew-mquake": akew,
    "akew-wikiupdate": partial(akew, asks="question"),
    "editeverything": edit_everything,
}


def _hops(record: Mapping) -> Iterator[Probe]:
    """Yield MQuAKE's questions about what follows from the edit, which have one answer."""
    for number, question in enumerate(record.get("questions", ())):
        answer, aliases = record["new_answer"], _flatten(record.get("new_answer_alias"))
        yield Probe(
            edit=record["id"],
            kind="multi_hop",
            number=number,
            question=question,
            reference=answer,
            aliases=[alias for alias in aliases if alias != answer],
        )


def _exercises(record: Mapping) -> Iterator[Probe]:
    """Yield multiple choices, whose answers files give as letter, index from 0, or text."""
    if "mmlu_questions" not in record:
        return
    rows = _together(record, "mmlu_questions", "mmlu_choices", "mmlu_answer")
    for number, (question, choices, answer) in enumerate(rows):
        letters = string.ascii_uppercase[: len(choices)]
        names = (*choices, *map(str, range(len(letters))), *letters)
        letter = dict(zip(names, letters * 3, strict=True)).get(str(answer).strip())
        if letter is None:
            expected = f"expected one of {', '.join(letters)}, or its index from 0"
            raise ValueError(f"'mmlu_answer' has {answer!r}; {expected}")
        lines = [f"{name}. {text}" for name, text in zip(letters, choices, strict=True)]
        yield Probe(
            edit=record["id"],
            kind="general",
            number=number,
            question="\n".join((question, *lines)),
            reference=letter,
            aliases=(lines[letters.index(letter)],),
        )


def _locality(record: Mapping) -> Iterator[Probe]:
    question, answers = record.get("loc"), _flatten(record.get("loc_ans"))
    if question and answers:
        yield Probe(
            edit=record["id"],
            kind="struct_trip",
            question=question,
            reference=answers[0],
            aliases=answers[1:],
            chat=is_question(question),
        )


def _cloze(record: Mapping, stem: str) -> Cloze | None:
    """Read a triple of ZsRE, CounterFact, WikiBigEdit or KnowEdit with its true object.

    True is `ground_truth` (KnowEdit, CounterFact), `answers` (ZsRE), and `target_new` where a set
    of real updates has nothing else (WikiBigEdit). None if the record has no answer.
    """
    answers = _flatten(_first(record, "ground_truth", "answers", "target_new"))
    prompt = _first(record, "prompt", "src")
    asked = (prompt, record.get("rephrase_prompt"), record.get("rephrase"))
    if not answers:
        return None
    return Cloze(
        id=f"{stem}-{record['id']}",
        subject=record["subject"],
        prompt=prompt,
        answers=answers,
        question=next(filter(is_question, filter(None, asked)), None),
    )


def is_question(prompt: str) -> bool:
    """Return whether a short prompt is a question, asked through the chat template, and no cloze.

    ZsRE's locality prompts come from Natural Questions, marked so and without a question mark.
    """
    return prompt.strip().endswith("?") or prompt.startswith("nq question:")


def _first(record: Mapping, *names: str) -> Any:
    """Return the first of these fields that a record has; KeyError for the last of them."""
    return record[next((name for name in names if name in record), names[-1])]


def _filled(triplet: Mapping) -> str:
    return triplet["prompt"].replace("{}", triplet["subject"])


def _flatten(value: Any) -> tuple[str, ...]:
    """Collect acceptable answers, each once: a text, a list of texts or lists of aliases."""
    if isinstance(value, list):
        return tuple(dict.fromkeys(answer for one in value for answer in _flatten(one)))
    return (value.strip(),) if value and value.strip() else ()


def _together(record: Mapping, *names: str) -> Iterator[tuple]:
    """Go through lists of a record that belong together; ValueError if one is shorter."""
    lists = [record[name] for name in names]
    if any(type(items) is not list or len(items) != len(lists[0]) for items in lists):
        raise ValueError(f"expected lists of equal length in {', '.join(map(repr, names))}")
    return zip(*lists, strict=True)


def _placed(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield the records of a file, a JSON list of objects, each with its place in words."""
    records = read_json(path)
    if type(records) is not list or not records:
        raise InputError(f"{path}: expected a list of records, found {short(records)}")
    for position, values in enumerate(records):
        place = f"{path}: record {position}"
        if type(values) is not dict:
            raise InputError(f"{place}: expected an object, found {short(values)}")
        yield place, values


def _records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield the records of a file with their ids, which must differ."""
    seen = set()
    for position, (place, record) in enumerate(_placed(path)):
        id = record.get("id", record.get("case_id", position))
        if type(id) not in (int, str) or id == "" or str(id) in seen:
            problem = "expected a text or whole number that no other record has"
            raise InputError(f"{place}, field 'id': {problem}; found {id!r}")
        seen.add(str(id))
        yield f"{place} (id '{id}')", record | {"id": str(id)}


def _facts(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield the triples of a file of relations as records, each with its place in words."""
    for name, relation in read_yaml(path).items():
        with located(place := f"{path}: {name}"):
            prompt, question = relation["prompt"], relation["question"]
            for subject, answers in relation["pairs"].items():
                yield (
                    f"{place}: {subject}",
                    {
                        "id": f"{name}-{subject}",
                        "subject": subject,
                        "prompt": prompt.replace("{}", subject),
                        "rephrase": question.replace("{}", subject),
                        "ground_truth": answers,
                    },
                )


@typed
def load(dataset: str, path: str | Path) -> tuple[Edit, ...]:
    """Load all edits of a benchmark's file, in its order.

        edits = load("unkebench", "final_data_v2.json")

    `dataset` is a key of `FORMATS`. No record is left out. Raises InputError for an unknown
    dataset, an unreadable file, a field that is missing or wrong, or an id that occurs twice.
    """
    if dataset not in FORMATS:
        raise InputError(f"unknown dataset {dataset!r}{nearest(str(dataset), FORMATS)}")
    edits = []
    for place, record in _records(path):
        with located(place), about(place):
            edits.append(FORMATS[dataset](record))
    return tuple(edits)


def load_clozes(path: str | Path) -> tuple[Cloze, ...]:
    """Load the triples of a structured set in the file's order, with ids `<file>-<id>`.

    A file .yaml has them by relation: `prompt` and `question` with {} for the subject, and `pairs`
    of subject and answers. Raises InputError as `load` does; warns of records without an answer,
    which are left out.
    """
    clozes = []
    for place, record in (_facts if Path(path).suffix == ".yaml" else _records)(path):
        with located(place), about(place):
            clozes.append(_cloze(record, Path(path).stem))
    found = tuple(cloze for cloze in clozes if cloze)
    if without := len(clozes) - len(found):
        warnings.warn(f"{path}: {without} triples have no answer and are left out", stacklevel=2)
    return found


@typed
def load_locality(path: str | Path, edits: Iterable[Edit]) -> tuple[Item, ...]:
    """Load the probes of these edits from a locality file, a JSON list with the fields of `Item`.

    Probes of other edits are checked and left out, so that one file serves every selection of its
    edits. Raises InputError for a field that is wrong, missing or misspelt, for an edit without a
    probe, and for two probes of one edit, kind and number.
    """
    edits = tuple(edits)
    taken = {(probe.edit, probe.kind, probe.number) for edit in edits for probe in edit.extra}
    items: list[Item] = []
    for place, values in _placed(path):
        with located(place, Item.model_fields):
            item = Item.model_validate(values)
        key = (item.edit, item.kind, item.number)
        if key in taken:
            twin = f"edit {item.edit!r} has a probe of kind '{item.kind}' with number {item.number}"
            raise InputError(f"{place}, field 'number': {twin} already; expected another number")
        taken.add(key)
        items.append(item)
    wanted = {edit.id for edit in edits}
    if without := sorted(wanted - {item.edit for item in items}):
        lacking = f"no probe for {len(without)} of {len(wanted)} edits, first {without[0]!r}"
        raise InputError(f"{path}: {lacking}; expected the same ids")
    return tuple(item for item in items if item.edit in wanted)
