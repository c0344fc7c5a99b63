"""What a recipe trains beside the edit's text: questions, and what to expect along answers to them.

All of it is made from the edit's question and answer, the model itself, and the texts that its
covariance was measured on, which are in no other pool: the league `text only`. Only `facts` has
the edit's own triples too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.files import read_yaml
from uke.locality.facts import SENTENCE, names
from uke.methods.lanes import attached
from uke.methods.locate_edit.covariance import preservation
from uke.models.divergence import LIKELIEST, PLACES, Expected, expected
from uke.models.generate import answer
from uke.models.prompts import encode, example

if TYPE_CHECKING:
    from uke.methods.method import Edits, Tokenizer
    from uke.methods.recipes import Recipe

# Of a question and an answer, T tokens together: `input_ids` (T,), the likeliest `tokens` at each
# place and their log-probabilities `logs` (T, K), `weights` (T,) and, of shifts, `position_ids`.
Lesson = dict[str, Tensor]
FURTHEST = 64  # positions by which what follows some token of a text is pushed on
NEVER = -1e4  # log-probability of what is not expected at all
TEXTS = read_yaml(Path(__file__).with_name("lessons.yaml"))


def lessons(
    model: nn.Module, tokenizer: Tokenizer, edits: Edits, recipe: Recipe
) -> dict[str, list[tuple[int, Lesson]]]:
    """Return, by the edit's id, lessons of an unedited model, each with the turn a step has it in.

    A turn has an equal share of each ingredient, one lesson at least, and all of its weight.
    """
    found: dict[str, list[tuple[int, Lesson]]] = {edit.id: [] for edit in edits}
    options = {"chat": recipe.chat_template, "max_new_tokens": PLACES}

    def add(weight: float, asked: Sequence[Probe], passages: Mapping[str, str] | None) -> None:
        """Add an ingredient: references, or what the model says below these passages."""
        if passages is None:
            every = [_certain(tokenizer, one, recipe) for one in asked]
        else:
            with attached(model, passages=passages):
                every = expected(model, tokenizer, asked, **options)
        for edit, lessons_of in found.items():
            own = [pair for pair in zip(asked, every, strict=True) if pair[0].edit == edit]
            for turn in range(recipe.turns if own else 0):
                chosen = own[turn % len(own) :: recipe.turns]
                for one, expectation in chosen:
                    prompt = encode(tokenizer, one.question, recipe.chat_template and one.chat)
                    lesson = _lesson(prompt, expectation, weight / len(chosen))
                    if recipe.shifts:
                        lesson["position_ids"] = _shifted(one, len(prompt), len(lesson["weights"]))
                    lessons_of.append((turn, lesson))

    if recipe.general or recipe.near:
        for asked in _held(model, edits, recipe):
            add(recipe.hold, asked, {})
    for asked in _retold(edits, recipe):
        add(recipe.learn, asked, None)
    if recipe.questions:
        read = {edit.id: edit.answer for edit in edits} if recipe.questions == "reading" else None
        add(recipe.learn, own_questions(model, tokenizer, edits), read)
    return found


def _probe(edit: Edit, question: str, text: str, chat: bool = True) -> Probe:
    return Probe(edit=edit.id, kind="detail", question=question, reference=text, chat=chat)


def _certain(tokenizer: Tokenizer, one: Probe, recipe: Recipe) -> Expected:
    form = recipe.chat_template and one.chat, recipe.end_of_turn and one.chat
    ids, _, start = example(tokenizer, one.question, one.reference, *form)
    target = torch.tensor(ids[start:])
    return Expected(target, target[:, None], torch.zeros(len(target), 1))


def _lesson(prompt: list[int], one: Expected, weight: float) -> Lesson:
    before, (places, kept) = len(prompt), one.tokens.shape
    room = (0, LIKELIEST - kept, before, 0)
    return {
        "input_ids": torch.tensor([*prompt, *one.answer.tolist()]),
        "tokens": F.pad(one.tokens.long(), room),
        "logs": F.pad(one.logs.float(), room, value=NEVER),
        "weights": F.pad(torch.full((places,), weight / places), (before, 0)),
    }


def _shifted(one: Probe, start: int, length: int) -> Tensor:
    """Return positions (T,); of a numbered text those from some token on are pushed further on."""
    positions, drawn = torch.arange(length), random.Random(f"{one.number} {one.edit}")
    if one.number:
        positions[drawn.randrange(start, length) :] += drawn.randint(1, FURTHEST)
    return positions


def _held(model: nn.Module, edits: Edits, recipe: Recipe) -> tuple[list[Probe], list[Probe]]:
    """Ask what the model must go on answering as it does: in general, and of others (`near`)."""
    base = getattr(model, "get_base_model", lambda: model)()
    texts = [one["question"] for one in preservation(base) if not isinstance(one, str)]
    random.Random(recipe.seed).shuffle(texts)
    written = " ".join(f"{edit.question} {edit.answer}" for edit in edits)
    known = [name for one in texts if one.startswith("Who ") for name in names(one)[:1]]
    others = [name for name in dict.fromkeys(known) if name not in written][: recipe.near]
    general, near = [], []
    for edit in edits:
        general += [_probe(edit, one, one) for one in texts[: recipe.general]]
        subject = subject_of(edit)
        asked = [edit.question.replace(subject, name) for name in others] if subject else []
        near += [_probe(edit, one, one) for one in asked or texts[::-1][: recipe.near]]
    return general, near


def _retold(edits: Edits, recipe: Recipe) -> list[list[Probe]]:
    """Ask for the text in other words (`paraphrases`), with its sentences in other orders, after a
    few words of its own alone (`context`), at other positions (`shifts`), and for its `facts`."""
    phrased, mixed, torn, shifted, stated = found = [[], [], [], [], []]
    for edit in edits:
        forms = TEXTS["phrasings"][: recipe.paraphrases]
        phrased += [_probe(edit, form.format(edit.question), edit.answer) for form in forms]
        parts, order = sentences(edit.answer), random.Random(f"{recipe.seed} {edit.id}")
        orders = [order.sample(parts, len(parts)) for _ in range(recipe.orders)]
        mixed += [_probe(edit, edit.question, " ".join(one)) for one in orders]
        for number, one in enumerate(parts[1:] if recipe.context else (), 1):
            before = " ".join(parts[:number]).split()[-recipe.context :]
            torn.append(_probe(edit, " ".join(before), one, False))
        whole = _probe(edit, edit.question, edit.answer)
        shifted += [whole.model_copy(update={"number": n + 1}) for n in range(recipe.shifts)]
        if recipe.facts and not edit.facts:
            raise InputError(f"edit '{edit.id}': no facts; expected triples for {recipe.name}")
        for one in edit.facts if recipe.facts else ():
            triple = TEXTS["triple"].format(one.subject, one.relation.format("…"))
            stated.append(_probe(edit, triple, one.object, False))
    return found


def subject_of(edit: Edit) -> str | None:
    """Return the first name in the question that the answer has too, or else the first name."""
    found = [name for name in names(edit.question) if name in edit.question]
    return next((name for name in found if name in edit.answer), found[0] if found else None)


def own_questions(model: nn.Module, tokenizer: Tokenizer, edits: Edits) -> list[Probe]:
    """Let the model ask about every sentence; return its questions with the sentence."""
    pairs = [(edit, one) for edit in edits for one in sentences(edit.answer)]
    shown = [TEXTS["shown"].format(subject_of(edit) or edit.question, one) for edit, one in pairs]
    asked = [_probe(edit, text, one, False) for (edit, one), text in zip(pairs, shown, strict=True)]
    answers = answer(model, tokenizer, asked, max_new_tokens=PLACES)
    found: dict[tuple[Edit, str], str] = {}
    for (edit, sentence), text in zip(pairs, answers, strict=True):
        if question := re.match(r"[^\n?]+\?", text):
            found.setdefault((edit, question[0]), sentence)
    return [_probe(*one, sentence) for one, sentence in found.items()]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with its mark."""
    ends = [0, *(end.end() for end in SENTENCE.finditer(text)), len(text)]
    return [text[start:end].strip() for start, end in pairwise(ends) if text[start:end].strip()]
