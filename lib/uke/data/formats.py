"""The benchmarks' files: read JSON records, check them field by field and turn them into edits.

One model for each format names the fields of its records; other keys are ignored. White space
around a text is trimmed, nothing inside it is changed. An id is `id`, else `case_id`, else the
position in the file.
Mappings: arXiv 2506.09672 and the published code of UnKE, AnyEdit and EasyEdit.
"""

import json
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from uke.data.edits import Cloze, Detail, Edit, Fact, Item, Probe
from uke.errors import InputError, nearest

LETTERS = string.ascii_uppercase
DETAILS = 5  # triplets of AKEW that the published protocol asks, the first ones
# Where a benchmark's file lies below the folder UKE_DATA; "world" is generated and needs none.
DATA_FILES = {
    "unkebench": "unkebench/final_data_v*.json",
    "akew-counterfact": "akew/CounterFact*.json",
    "akew-mquake": "akew/MQuAKE-CF*.json",
    "akew-wikiupdate": "akew/WikiUpdate*.json",
    "editeverything": "editeverything/editevery*.json",
}
PROBLEMS = {  # pydantic's kinds of error in the words of a message
    "string_type": "expected text, found {}",
    "list_type": "expected a list, found {}",
    "tuple_type": "expected a list, found {}",
    "model_type": "expected an object, found {}",
    "int_type": "expected a whole number, found {}",
    "bool_type": "expected true or false, found {}",
    "string_pattern_mismatch": "is empty; expected text",
    "string_too_short": "is empty; expected text",
    "string_unicode": "holds half a character (a lone surrogate); expected valid Unicode text",
    "too_short": "is empty; expected at least one item",
}
Made = TypeVar("Made", bound=BaseModel)


def read_json(path: Path) -> Any:
    """Read one JSON value from a UTF-8 file; InputError names the line of what is wrong."""
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); expected one JSON file"
        raise InputError(f"{path}: {problem}") from None
    return parse(content, str(path))


def parse(content: bytes, place: str, line: int = 1) -> Any:
    """Read one JSON value, which begins at a line of a file; InputError says what is wrong."""
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; expected JSON text"
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1} column {error.colno}"
        cut = error.msg.startswith("Unterminated") or not text[error.pos :].strip()
        problem = f"not valid JSON at {where}: {error.msg}"
        problem += "; is the file truncated?" if cut else ""
        problem = problem if text.strip() else "is empty"
    except (ValueError, RecursionError) as error:
        problem = f"not usable JSON: {error}"
    raise InputError(f"{place}: {problem}")


def read_list(path: str | Path) -> list:
    """Read a JSON list of at least one record; InputError otherwise."""
    items = read_json(path)
    if type(items) is not list:
        raise InputError(f"{path}: expected a list of records, found {short(items)}")
    if not items:
        raise InputError(f"{path}: the list is empty; expected at least one record")
    return items


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Build a JSON object; Python's own reader would silently keep the last of two equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {repeated!r} more than once")
    return content


@contextmanager
def located(place: str, fields: Iterable[str] = ()) -> Iterator[None]:
    """Turn the first thing that pydantic finds wrong into an InputError of one line."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{key}]" if type(key) is int else f".{key}" for key in first["loc"])
        where = f"{place}, field '{path.lstrip('.')}'" if path else place
        raise InputError(" ".join(f"{where}: {_problem(first, fields)}".split())) from None


def _problem(error: Mapping[str, Any], fields: Iterable[str]) -> str:
    """Say what is wrong with a field, from pydantic's description of it."""
    message, value = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "missing":
        return f"is missing; the fields are {', '.join(map(repr, value)) or 'no field'}"
    if error["type"] == "extra_forbidden":
        return message + nearest(str(error["loc"][-1]), fields)
    if error["type"] == "literal_error":
        return f"is {value!r}" + nearest(str(value), re.findall("'(.+?)'", message))
    known = PROBLEMS.get(error["type"])
    return known.format(short(value)) if known else message


def as_text(value: Any) -> Any:
    """Turn a whole number, as which files may give an id, into text."""
    return str(value) if type(value) is int else value


def _flatten(value: Any) -> tuple[str, ...]:
    """Collect acceptable answers, each once: a text, a list of texts or lists of aliases."""
    if isinstance(value, (list, tuple)):
        return tuple(dict.fromkeys(answer for one in value for answer in _flatten(one)))
    if value is not None and type(value) is not str:
        raise ValueError(f"expected text, found {short(value)}")
    return (value.strip(),) if value and value.strip() else ()


def as_many_as(other: str) -> AfterValidator:
    """Require a list to be as long as the list of the field `other`, which stands above it."""

    def check(items: list, info: ValidationInfo) -> list:
        expected = len(info.data.get(other, items))
        if len(items) != expected:
            counts = f"has {len(items)} items; expected {expected}"
            raise ValueError(f"{counts}, as many as '{other}'")
        return items

    return AfterValidator(check)


OrEmpty = BeforeValidator(lambda value: [] if value is None else value)
OrSingle = BeforeValidator(lambda value: [value] if type(value) is dict else value)
Named = BeforeValidator(lambda value: value.get("str") if type(value) is dict else value)
Trimmed = Annotated[str, StringConstraints(strict=True, strip_whitespace=True)]
Text = Annotated[Trimmed, StringConstraints(min_length=1)]
Name = Annotated[Text, BeforeValidator(as_text)]
Texts = Annotated[list[Text], OrEmpty]
Answers = Annotated[tuple[Text, ...], BeforeValidator(_flatten)]
Choices = Annotated[list[Text], Field(min_length=2, max_length=len(LETTERS))]


class Source(BaseModel):
    """A record, or a part of one, as it was published; fields without a name here are ignored."""

    model_config = ConfigDict(frozen=True, validate_default=True)


class EditEverything(Source):
    """EditEverything: question, answer and one of its categories."""

    id: Name
    question: Text
    answer: Text
    category: Text

    def edit(self) -> Edit:
        return Edit(**dict(self))


class MultiHop(Source):
    """A record with MQuAKE's questions about what follows from the edit, one answer for all."""

    id: Name
    questions: Texts = []
    new_answer: Text | None = None
    new_answer_alias: Answers = ()

    @field_validator("new_answer")
    @classmethod
    def _check_answer(cls, answer: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("questions") and answer is None:
            raise ValueError("is missing; expected the answer to 'questions'")
        return answer

    def hops(self) -> tuple[Probe, ...]:
        aliases = tuple(alias for alias in self.new_answer_alias if alias != self.new_answer)
        answer = {"reference": self.new_answer, "aliases": aliases}
        return tuple(
            Probe(edit=self.id, kind="multi_hop", number=number, question=question, **answer)
            for number, question in enumerate(self.questions)
        )


class UnKEBench(MultiHop):
    """UnKEBench v2, and v3 with its `mmlu_*` lists; may carry MQuAKE's multi-hop keys too."""

    question: Text
    para_question: Text
    answer: Text
    sub_question: list[Text]
    sub_answer: Annotated[list[Text], as_many_as("sub_question")]
    mmlu_questions: Texts = []
    mmlu_choices: Annotated[list[Choices], OrEmpty, as_many_as("mmlu_questions")] = []
    mmlu_answer: Annotated[list, OrEmpty, as_many_as("mmlu_questions")] = []

    @field_validator("mmlu_answer")
    @classmethod
    def _letter(cls, answers: list, info: ValidationInfo) -> list[str]:
        """Turn right choices, which files give as letter, index from 0 or text, into letters."""
        letters = []
        for answer, choices in zip(answers, info.data.get("mmlu_choices", ()), strict=False):
            offered = LETTERS[: len(choices)]
            keys = (*choices, *map(str, range(len(offered))), *offered)
            names = dict(zip(keys, offered * 3, strict=True))
            letter = names.get(str(answer).strip()) if type(answer) in (int, str) else None
            if letter is None:
                expected = f"one of {', '.join(offered)}, or its index from 0"
                raise ValueError(f"item {len(letters)} is {answer!r}; expected {expected}")
            letters.append(letter)
        return letters

    def exercises(self) -> Iterator[Probe]:
        """Yield the multiple-choice questions; the reference is the letter of the right choice."""
        lists = (self.mmlu_questions, self.mmlu_choices, self.mmlu_answer)
        for number, (question, choices, letter) in enumerate(zip(*lists, strict=True)):
            lines = [f"{name}. {text}" for name, text in zip(LETTERS, choices, strict=False)]
            yield Probe(
                edit=self.id,
                kind="general",
                number=number,
                question="\n".join((question, *lines)),
                reference=letter,
                aliases=(lines[LETTERS.index(letter)],),
            )

    def edit(self) -> Edit:
        pairs = zip(self.sub_question, self.sub_answer, strict=True)
        return Edit(
            id=self.id,
            question=self.question,
            answer=self.answer,
            paraphrase=self.para_question,
            details=tuple(Detail(question=asked, answer=answer) for asked, answer in pairs),
            extra=(*self.hops(), *self.exercises()),
        )


class Triplet(Source):
    """A triplet that a paragraph of AKEW states."""

    subject: Text
    prompt: Text
    target: Text


class Rewrite(Source):
    """A rewrite of AKEW: the edited fact, the paragraph that states it, and its triplets."""

    subject: Text
    prompt: Text
    fact_new_uns: Text
    unsfact_triplets_GPT: list[Triplet]
    target: Annotated[Text, Named] = Field(
        validation_alias=AliasChoices("target_new", "answer_new")
    )
    asked: Text | None = Field(None, validation_alias="prompt_full")


class ClozeRewrite(Rewrite):
    """The rewrite of CounterFact."""

    asked: Text = Field(validation_alias="prompt_full")


class QuestionRewrite(Rewrite):
    """The rewrite of WikiUpdate."""

    asked: Text = Field(validation_alias="question")


class Akew(MultiHop):
    """AKEW MQuAKE-CF, and what AKEW's files share: a record's first rewrite, a locality question.

    As published, also where a record has several rewrites and its answer may need them all.
    """

    requested_rewrite: Annotated[list[Rewrite], OrSingle, Field(min_length=1)]
    paraphrase_prompts: Texts = []
    loc: Text | None = None
    loc_ans: Answers = ()

    def locality(self) -> Iterator[Probe]:
        if self.loc and self.loc_ans:
            yield Probe(
                edit=self.id,
                kind="struct_trip",
                question=self.loc,
                reference=self.loc_ans[0],
                aliases=self.loc_ans[1:],
                chat=is_question(self.loc),
            )
        elif self.loc:
            place = f"record with id '{self.id}', field 'loc_ans'"
            warnings.warn(f"{place}: the question has no answer and makes no probe", stacklevel=5)

    def edit(self) -> Edit:
        first = self.requested_rewrite[0]
        triplets = first.unsfact_triplets_GPT
        # A relation without exactly one place for its subject states no fact.
        stated = [one for one in (first, *triplets) if one.prompt.count("{}") == 1]
        return Edit(
            id=self.id,
            question=first.asked or first.prompt.replace("{}", first.subject),
            answer=first.fact_new_uns,
            paraphrase=next(iter(self.paraphrase_prompts), None),
            subject=first.subject,
            details=tuple(
                Detail(question=one.prompt.replace("{}", one.subject), answer=one.target)
                for one in triplets[:DETAILS]
            ),
            facts=tuple(
                Fact(subject=one.subject, relation=one.prompt, object=one.target) for one in stated
            ),
            extra=(*self.hops(), *self.locality()),
        )


class AkewCounterFact(Akew):
    """AKEW CounterFact: a cloze asks for the paragraph; `neighborhood_prompts` are not used."""

    requested_rewrite: Annotated[list[ClozeRewrite], OrSingle, Field(min_length=1)]
    paraphrase_prompts: Annotated[list[Text], Field(min_length=1)]


class AkewWikiUpdate(Akew):
    """AKEW WikiUpdate: a real question, a paragraph of Wikipedia, no paraphrase."""

    requested_rewrite: Annotated[list[QuestionRewrite], OrSingle, Field(min_length=1)]


FORMATS: dict[str, type[Source]] = {
    "unkebench": UnKEBench,
    "akew-counterfact": AkewCounterFact,
    "akew-mquake": Akew,
    "akew-wikiupdate": AkewWikiUpdate,
    "editeverything": EditEverything,
}


class Triple(Source):
    """A record of a structured set (ZsRE, CounterFact, WikiBigEdit, KnowEdit) with its true object.

    True is `ground_truth` (KnowEdit, CounterFact), `answers` (ZsRE), and `target_new` where a set
    of real updates has nothing else (WikiBigEdit).
    """

    id: Name
    subject: Text
    prompt: Text = Field(validation_alias=AliasChoices("prompt", "src"))
    answers: Answers = Field(validation_alias=AliasChoices("ground_truth", "answers", "target_new"))
    rephrased: Text | None = Field(
        None, validation_alias=AliasChoices("rephrase_prompt", "rephrase")
    )

    @property
    def question(self) -> str | None:
        asked = (prompt for prompt in (self.prompt, self.rephrased) if prompt)
        return next(filter(is_question, asked), None)


def is_question(prompt: str) -> bool:
    """Return whether a short prompt is a question, asked through the chat template, and no cloze.

    ZsRE's locality prompts come from Natural Questions, marked so and without a question mark.
    """
    return prompt.endswith("?") or prompt.startswith("nq question:")


def _placed(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict]]:
    """Yield the records of a file, which must be objects, each with its place in words."""
    for position, values in enumerate(read_list(path)[:limit]):
        place = f"{path}: record {position}"
        if type(values) is not dict:
            raise InputError(f"{place}: expected an object, found {short(values)}")
        yield place, values


def _records(path: str | Path, model: type[Made], limit: int | None = None) -> Iterator[Made]:
    """Yield the checked records of a file, whose ids must differ."""
    seen: dict[str, int] = {}
    for position, (place, values) in enumerate(_placed(path, limit)):
        id = values.get("id", values.get("case_id", position))
        place += f" (id '{id}')" if type(id) in (int, str) and id != "" else ""
        with located(place):
            record = model.model_validate(values | {"id": id})
        if record.id in seen:
            raise InputError(f"{place}: record {seen[record.id]} has this id too; expected it once")
        seen[record.id] = position
        yield record


def load(dataset: str, path: str | Path, limit: int | None = None) -> tuple[Edit, ...]:
    """Load the first `limit` edits (None: all) of a benchmark's file, in its order.

        edits = load("unkebench", "final_data_v2.json", limit=100)

    `dataset` is a key of `FORMATS`. No record is left out, and two may ask the same question, as in
    real files. Raises InputError, naming file, record and field, for an unknown dataset, an
    unreadable file, a record that lacks or misuses a field, or an id that occurs twice. Warns of
    locality questions without an answer, which make no probe.
    """
    if dataset not in FORMATS:
        raise InputError(f"unknown dataset {dataset!r}{nearest(str(dataset), FORMATS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1, or None for all")
    return tuple(record.edit() for record in _records(path, FORMATS[dataset], limit))


def load_clozes(path: str | Path) -> tuple[Cloze, ...]:
    """Load the triples of a structured set in the file's order, with ids `<file>-<id>`.

    Raises InputError as `load` does; warns of records without an answer, which are left out.
    """
    triples = list(_records(path, Triple))
    without = [triple.id for triple in triples if not triple.answers]
    if without:
        count = f"{len(without)} triples have no answer and are left out"
        warnings.warn(f"{path}: {count}; the first has the id '{without[0]}'", stacklevel=2)
    return tuple(
        Cloze(
            id=f"{Path(path).stem}-{triple.id}",
            question=triple.question,
            **triple.model_dump(include={"subject", "prompt", "answers"}),
        )
        for triple in triples
        if triple.answers
    )


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
        if "edit" in values:
            values = values | {"edit": as_text(values["edit"])}
        with located(place, Item.model_fields):
            item = Item.model_validate(values)
        key = (item.edit, item.kind, item.number)
        if key in taken:
            twin = f"edit {item.edit!r} has a probe of kind '{item.kind}' with this number already"
            problem = f"is {item.number}, but {twin}; expected another number"
            raise InputError(f"{place}, field 'number': {problem}")
        taken.add(key)
        items.append(item)
    wanted = {edit.id for edit in edits}
    if without := sorted(wanted - {item.edit for item in items}):
        names = ", ".join(map(repr, without[:3])) + (" ..." if len(without) > 3 else "")
        lacking = f"no probe for {len(without)} of {len(wanted)} edits ({names})"
        raise InputError(f"{path}: {lacking}; expected the same ids")
    return tuple(item for item in items if item.edit in wanted)


def find_data(data: str, data_file: str = "") -> str:
    """Return the absolute path of the file of the benchmark `data`; "" for the generated world.

    It is `data_file` if given, else the one file of its name in the folder named by the environment
    variable UKE_DATA.
    """
    if data == "world" and data_file:
        raise InputError(f"data_file: {data_file}: name the benchmark that it is of with DATA=")
    if data == "world":
        return ""
    if data_file and not Path(data_file).is_file():
        raise InputError(f"data_file: {data_file}: no such file")
    if data_file:
        return str(Path(data_file).resolve())
    folder = os.environ.get("UKE_DATA", "")
    if not folder or not Path(folder).is_dir():
        reason = f"UKE_DATA names no folder: '{folder}'" if folder else "UKE_DATA is not set"
        advice = "set it, or give the file itself as DATA_FILE"
        raise InputError(f"data: {data} needs a file, and {reason}; {advice}")
    files = sorted(Path(folder).glob(DATA_FILES[data]))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        expected = f"expected one file {DATA_FILES[data]}, found {names}"
        raise InputError(f"{folder}: data: {data}: {expected}; name it with DATA_FILE")
    return str(files[0].resolve())
