"""The benchmarks' file formats: one parser per dataset, from a record to the fields of an edit.

A parser takes a `Record` and returns a plain dict, which `uke.data.edits.Edit` validates. What holds for all:
white space around a text is trimmed, nothing inside it is changed; an id is `id`, else `case_id`, else
the record's position in the file, always as text; keys that the protocol does not use are ignored;
a locality or portability item without an answer cannot be scored: it is noted in `Record.unanswered`.
Mappings: arXiv 2506.09672 and the published code of UnKE, AnyEdit and EasyEdit.
"""

import string
from collections import Counter
from collections.abc import Callable, Iterable

from uke.data.records import Record

DETAILS = 5  # triplets of AKEW that the published protocol asks, the first ones


def is_question(prompt: str) -> bool:
    """Whether a short prompt is a question, to be asked through the chat template, and no cloze.

    ZsRE's locality prompts come from Natural Questions, marked so and without a question mark.
    """
    return prompt.endswith("?") or prompt.startswith("nq question:")


def multiple_choice(question: str, choices: Iterable[str]) -> str:
    """A question with its choices, lettered from A, one a line."""
    lines = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices))
    return "\n".join((question, *lines))


def _item(kind: str, record: Record, question: str, answer: str) -> Iterable[dict]:
    """The probe a locality or portability item makes: none, but a note, if it has no answer."""
    prompt, answers = record.text(question), record.answers(answer)
    if not answers:
        record.unanswered.append(f"{record.place}, field '{record.path}{answer}'")
        return
    rest = dict(reference=answers[0], aliases=tuple(answers[1:]), chat=is_question(prompt))
    yield dict(kind=kind, question=prompt, **rest)


def _items(kind: str, record: Record, question: str, answer: str) -> Iterable[dict]:
    """The probes of a pair of fields: two single values, or two lists of equal length."""
    if type(record.values.get(question)) is not list:
        yield from _item(kind, record, question, answer)
        return
    record.equal(question, answer)
    for place, pair in enumerate(zip(record.values[question], record.values[answer])):
        names = (f"{question}[{place}]", f"{answer}[{place}]")
        yield from _item(kind, record.beside(dict(zip(names, pair))), *names)


def _optional(kind: str, record: Record, question: str, answer: str) -> Iterable[dict]:
    """The same for fields that a record may lack, but not one without the other."""
    if not (record.has(question) or record.has(answer)):
        return []
    return _items(kind, record, question, answer)


def _locality(record: Record) -> Iterable[dict]:
    """`loc` with `loc_ans`, where a record has them."""
    return _optional("struct_trip", record, "loc", "loc_ans")


def _group(kind: str, record: Record, field: str) -> Iterable[dict]:
    """The probes of KnowEdit's `locality` or `portability`: group name -> list of items, or null."""
    if record.has(field):
        groups = record.inner(record.values[field], field)
        for name in filter(groups.has, groups.values):
            for item in groups.records(name):
                yield from _item(kind, item, "prompt", "ground_truth")


def _multi_hop(record: Record) -> Iterable[dict]:
    """MQuAKE's questions about what follows from the edit, one answer for all."""
    if record.has("questions"):
        answer = record.text("new_answer")
        known = record.answers("new_answer_alias") if record.has("new_answer_alias") else []
        aliases = tuple(alias for alias in known if alias != answer)
        for question in record.texts("questions"):
            yield dict(kind="multi_hop", question=question, reference=answer, aliases=aliases)


def _general(record: Record) -> Iterable[dict]:
    """UnKEBench v3's MMLU questions with their choices; the reference is the right one's letter."""
    fields = ("mmlu_questions", "mmlu_choices", "mmlu_answer")
    if not any(record.has(field) for field in fields):
        return
    questions, choices, answers = (record.value(field, list) for field in fields)
    record.equal("mmlu_questions", "mmlu_choices")
    record.equal("mmlu_questions", "mmlu_answer")
    for place, question in enumerate(record.texts("mmlu_questions")):
        field = f"mmlu_choices[{place}]"
        offered = record.beside({field: choices[place]}).texts(field)
        if not 2 <= len(offered) <= len(string.ascii_uppercase):
            record.fail(
                field, f"has {len(offered)} items; expected 2 to {len(string.ascii_uppercase)}"
            )
        letter = _letter(record, f"mmlu_answer[{place}]", answers[place], offered)
        named = f"{letter}. {offered[string.ascii_uppercase.index(letter)]}"
        asked = multiple_choice(question, offered)
        yield dict(kind="general", question=asked, reference=letter, aliases=(named,))


def _letter(record: Record, field: str, answer: object, offered: list[str]) -> str:
    """The letter of the right choice, which files give as a letter, an index from 0 or its text."""
    letters = string.ascii_uppercase[: len(offered)]
    names = dict(zip(offered, letters)) | dict(zip(map(str, range(len(letters))), letters))
    names |= dict(zip(letters, letters))
    found = names.get(str(answer).strip()) if type(answer) in (int, str) else None
    if found is None:
        record.fail(
            field, f"is {answer!r}; expected one of {', '.join(letters)}, or its index from 0"
        )
    return found


def _edit(record: Record, fields: dict, extra: Iterable[dict] = ()) -> dict:
    """All fields of an edit: its id, and its extra probes numbered within each kind."""
    count: Counter = Counter()
    numbered = []
    for probe in extra:
        numbered.append(probe | dict(edit=record.id, number=count[probe["kind"]]))
        count[probe["kind"]] += 1
    return fields | dict(id=record.id, extra=tuple(numbered))


def _facts(triples: Iterable[tuple[str, str, str]]) -> tuple[dict, ...]:
    """Source facts; a triple whose relation does not have exactly one place for its subject is none."""
    return tuple(dict(subject=s, relation=r, object=o) for s, r, o in triples if r.count("{}") == 1)


def _akew(record: Record, rewrite: Record, question: str, extra: Iterable[dict]) -> dict:
    """What AKEW's three files share: the paragraph, its triplets, the edited fact."""
    triplets = rewrite.records("unsfact_triplets_GPT")
    triples = [tuple(map(triplet.text, ("subject", "prompt", "target"))) for triplet in triplets]
    subject, relation = rewrite.text("subject"), rewrite.text("prompt")
    if type(rewrite.values.get("target_new")) is dict:
        target = rewrite.inner(rewrite.values["target_new"], "target_new").text("str")
    else:
        target = rewrite.text("target_new" if rewrite.has("target_new") else "answer_new")
    asked = [dict(question=r.replace("{}", s), answer=o) for s, r, o in triples[:DETAILS]]
    fields = dict(
        question=question,
        answer=rewrite.text("fact_new_uns"),
        subject=subject,
        details=tuple(asked),
    )
    facts = _facts([(subject, relation, target), *triples])
    return _edit(record, fields | dict(facts=facts), extra)


def akew_counterfact(record: Record) -> dict:
    """AKEW CounterFact: a cloze asks for the paragraph; the protocol has no use for `neighborhood_prompts`."""
    rewrite = record.inner(record.value("requested_rewrite", dict), "requested_rewrite")
    fields = _akew(record, rewrite, rewrite.text("prompt_full"), _locality(record))
    paraphrases = record.texts("paraphrase_prompts")
    if not paraphrases:
        record.fail("paraphrase_prompts", "is empty; expected at least one text")
    return fields | dict(paraphrase=paraphrases[0])


def akew_mquake(record: Record) -> dict:
    """AKEW MQuAKE-CF: a record's first rewrite, without paraphrase, and the record's multi-hop questions.

    As published, also where a record has several rewrites and its multi-hop answer may need them all.
    """
    rewrites = record.records("requested_rewrite")
    if not rewrites:
        record.fail("requested_rewrite", "is empty; expected at least one object")
    first = rewrites[0]
    filled = first.text("prompt").replace("{}", first.text("subject"))
    question = first.text("prompt_full") if first.has("prompt_full") else filled
    return _akew(record, first, question, [*_multi_hop(record), *_locality(record)])


def akew_wikiupdate(record: Record) -> dict:
    """AKEW WikiUpdate: a real question, a paragraph of Wikipedia, no paraphrase."""
    rewrite = record.inner(record.value("requested_rewrite", dict), "requested_rewrite")
    return _akew(record, rewrite, rewrite.text("question"), _locality(record))


def unkebench(record: Record) -> dict:
    """UnKEBench v2, and v3 with its `mmlu_*` lists; a record may carry MQuAKE's multi-hop keys too."""
    details = tuple(
        dict(question=q, answer=a) for q, a in record.pairs("sub_question", "sub_answer")
    )
    fields = dict(question=record.text("question"), answer=record.text("answer"), details=details)
    paraphrase = record.text("para_question")
    return _edit(
        record, fields | dict(paraphrase=paraphrase), [*_multi_hop(record), *_general(record)]
    )


def editeverything(record: Record) -> dict:
    """EditEverything: question, answer and one of its categories."""
    return _edit(
        record, {field: record.text(field) for field in ("question", "answer", "category")}
    )


def _structured(record: Record, question: str, answer: str, paraphrase: str | None) -> dict:
    """A short edit about one subject; the fact is known where the question names the subject."""
    fields = dict(
        question=record.text(question), answer=record.text(answer), subject=record.text("subject")
    )
    relation = fields["question"].replace(fields["subject"], "{}", 1)
    facts = _facts([(fields["subject"], relation, fields["answer"])])
    return fields | dict(facts=facts, paraphrase=record.text(paraphrase) if paraphrase else None)


def zsre(record: Record) -> dict:
    """ZsRE: `alt` is the new answer; the locality question comes from Natural Questions."""
    extra = _items("struct_trip", record, "loc", "loc_ans")
    return _edit(record, _structured(record, "src", "alt", "rephrase"), extra)


def counterfact(record: Record) -> dict:
    """CounterFact and WikiBigEdit, flat: one locality prompt, and one portability prompt where it is given."""
    hops = _optional("multi_hop", record, "portability_prompt", "portability_ground_truth")
    extra = [*_items("struct_trip", record, "locality_prompt", "locality_ground_truth"), *hops]
    return _edit(record, _structured(record, "prompt", "target_new", "rephrase_prompt"), extra)


def knowedit(record: Record) -> dict:
    """KnowEdit (ZsRE, WikiRecent, WikiCounterfact): groups of locality and portability items."""
    paraphrase = next(
        (field for field in ("rephrase_prompt", "rephrase") if record.has(field)), None
    )
    extra = [
        *_group("struct_trip", record, "locality"),
        *_group("multi_hop", record, "portability"),
    ]
    extra += _optional("struct_trip", record, "locality_prompt", "locality_ground_truth")
    return _edit(record, _structured(record, "prompt", "target_new", paraphrase), extra)


PARSERS: dict[str, Callable[[Record], dict]] = {
    "unkebench": unkebench,
    "akew-counterfact": akew_counterfact,
    "akew-mquake": akew_mquake,
    "akew-wikiupdate": akew_wikiupdate,
    "editeverything": editeverything,
    "zsre": zsre,
    "counterfact": counterfact,
    "wikibigedit": counterfact,
    "knowedit": knowedit,
}


def cloze(record: Record) -> dict | None:
    """A record of a structured set as a triple with its *true* object, to be asked before and after an edit elsewhere.

    True is `ground_truth` (KnowEdit, CounterFact), `answers` (ZsRE), and `target_new` where a set of real updates has
    nothing else (WikiBigEdit). None, with a note in `Record.unanswered`, where the object is empty.
    """
    prompt, new = ("src", "alt") if record.has("src") else ("prompt", "target_new")
    field = next((field for field in ("ground_truth", "answers") if record.has(field)), new)
    answers = record.answers(field)
    if not answers:
        record.unanswered.append(f"{record.place}, field '{field}'")
        return None
    others = (record.text(name) for name in ("rephrase_prompt", "rephrase") if record.has(name))
    question = next((asked for asked in (record.text(prompt), *others) if is_question(asked)), None)
    return dict(
        id=record.id,
        subject=record.text("subject"),
        prompt=record.text(prompt),
        answers=tuple(answers),
        question=question,
    )
