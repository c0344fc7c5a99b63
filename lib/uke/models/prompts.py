"""Turn questions and answers into token ids: chat templates, labels, padding, batches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from uke.errors import InputError

IGNORED = -100  # label of a token that carries no loss
PLACEHOLDER = "uke0mark"
# Before templates that write today's date: a resumed study must not mix days.
DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
# Limits of one forward pass: tokens, padding included, and the share of them that may be padding.
PASS_TOKENS, PADDING = 8192, 0.15
TRAINING_TOKENS = 1024  # where a CPU keeps every activation; larger passes were slower


class Example(NamedTuple):
    """One prompt with the answer to learn: T token ids, T labels (-100 on the prompt)."""

    ids: list[int]
    labels: list[int]
    prompt_length: int


def render(tokenizer: PreTrainedTokenizerBase, question: str, chat: bool, answer: str = "") -> str:
    """Return the prompt as text: the chat template up to the answer, or the question itself.

    With an `answer` it is the template's whole conversation. Reasoning is closed at once, and the
    date is always the same. InputError for a template that fails or changes a text, and for a text
    that spells a special token, which would be read as that token.
    """
    special = [one.content for one in tokenizer.added_tokens_decoder.values() if one.special]
    if spelt := [one for one in special if one in question or one in answer]:
        raise InputError(f"expected plain text, found the special token {spelt[0]!r}")
    if not chat:
        return question
    name = tokenizer.name_or_path or "tokenizer"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns = turns if answer else turns[:1]
    options = {"add_generation_prompt": not answer, "enable_thinking": False}
    try:
        template = tokenizer.get_chat_template()
        options["chat_template"] = DATE * ("strftime_now" in template) + template
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template can fail in any way that code can
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: no chat template works ({reason}); use chat: false") from None
    for turn in turns:
        if turn["content"].strip() not in text:
            raise InputError(f"{name}: its chat template changes what the {turn['role']} says")
    return text + "\n</think>\n\n" * text.endswith(("<think>", "<think>\n"))


def encode(tokenizer: PreTrainedTokenizerBase, question: str, chat: bool) -> list[int]:
    """Return the token ids of the prompt, with one beginning-of-text token."""
    # A chat template writes its own special tokens.
    ids = _tokenize(tokenizer, render(tokenizer, question, chat), special=not chat)
    if not ids:
        raise InputError("question: empty; expected at least one token")
    return ids


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def example(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, chat: bool, end_of_turn: bool
) -> Example:
    """Join prompt and answer into one sequence whose labels are the answer.

    With `end_of_turn` the token that ends a turn is learned too. A raw prompt is continued after
    one space, one of the chat template after the white space that it puts there; what it puts
    between the answer and the end of the turn is learned with that.
    """
    prompt, text = encode(tokenizer, question, chat), render(tokenizer, question, chat)
    space = "" if chat or text[-1:].isspace() or answer[:1].isspace() else " "
    if answer:
        before = render(tokenizer, question, chat, answer).removeprefix(text).partition(answer)[0]
        space = before if chat and before.isspace() else space
    # Tokenizing both together spares the answer the word-start mark that some tokenizers put before
    # any text. Where the two would merge into one token, the answer is tokenized alone.
    gap, end = ending(tokenizer) if end_of_turn else ("", None)
    said = space + answer + gap * chat
    together = _tokenize(tokenizer, text + said, special=not chat)
    if together[: len(prompt)] == prompt:
        target = together[len(prompt) :]
    else:
        target = _tokenize(tokenizer, said, special=False)
    target += [end] * end_of_turn
    return Example(prompt + target, [IGNORED] * len(prompt) + target, len(prompt))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a turn in the chat template, or else the text."""
    return ending(tokenizer)[1]


def ending(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the white space before the end of a turn, and the id of the token that ends it."""
    if tokenizer.chat_template:
        after = render(tokenizer, PLACEHOLDER, True, PLACEHOLDER).rpartition(PLACEHOLDER)[2]
        closing = after.lstrip()
        ids = _tokenize(tokenizer, closing, special=False)
        added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        if ids and ids[0] in added:
            return after.removesuffix(closing), ids[0]
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or "tokenizer"
        raise InputError(f"{name}: no token ends a turn; expected an eos_token")
    return "", tokenizer.eos_token_id


def collate(examples: Sequence[Example], pad: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each (B, T), padded on `side`."""
    return {
        "input_ids": padded([one.ids for one in examples], pad, side),
        "attention_mask": padded([[1] * len(one.ids) for one in examples], 0, side),
        "labels": padded([one.labels for one in examples], IGNORED, side),
    }


def padded(rows: Sequence[Sequence[int]], value: int = 0, side: str = "right") -> torch.Tensor:
    """Return rows of token ids as (B, T), with `value` where one is shorter than the longest."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def group_by_length(lengths: Sequence[int], tokens: float = math.inf) -> list[list[int]]:
    """Split row indices into passes of similar length and little padding, longest first.

    A pass holds one row, or at most `tokens` and PASS_TOKENS tokens, padding included.
    """
    tokens = min(tokens, PASS_TOKENS)
    passes: list[list[int]] = []
    longest = real = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rows = len(passes[-1]) + 1 if passes else 0
        full = rows * longest > tokens
        if not rows or full or real + lengths[row] < (1 - PADDING) * rows * longest:
            passes.append([])
            longest, real = lengths[row], 0
        passes[-1].append(row)
        real += lengths[row]
    return passes
