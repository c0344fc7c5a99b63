"""Generate greedy answers to many probes at once, read log-probabilities, and keep answers on disk.

Prompts are sorted by length and padded left; rows that have ended are dropped from the batch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from uke.data.edits import Probe, Probes
from uke.errors import InputError, Told, about, located, typed
from uke.files import write_atomic
from uke.models.model import max_context, wide
from uke.models.prompts import Example, encode, end_of_turn_id, example, group_by_length, padded

# Dropping finished rows copies the cache, so it waits until this share of the batch has finished.
DROP_SHARE = 1 / 8

Prompt = tuple[int, ...]
CachedAnswer = tuple[list[int], int]  # token ids of an answer, and its limit of tokens


class AnswerCache:
    """Greedy answers of one unedited model by prompt, kept in a folder of small JSON files.

    A file is written atomically and never changed, so several processes may add to a folder at
    once. The folder's name must say what else decides an answer: weights, precision and code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._known = folder, {}
        for path in sorted(folder.glob("*.json")):
            with located(f"{path}: expected cached answers; delete it to generate them again"):
                for prompt, ids, limit in json.loads(path.read_text("utf-8")):
                    self._keep_longer(tuple(prompt), (ids, limit))

    def _keep_longer(self, prompt: Prompt, new: CachedAnswer) -> None:
        if self._known.get(prompt, ([], -1))[1] < new[1]:
            self._known[prompt] = new

    def look_up(self, prompt: Prompt, limit: int) -> list[int] | None:
        """Return the answer of at most `limit` tokens, or None where none is that long."""
        ids, known_limit = self._known.get(prompt, ([], -1))
        # Greedy answers are prefixes of each other, and one below its own limit has ended.
        return ids[:limit] if known_limit >= limit or len(ids) < known_limit else None

    def add(self, answers: Mapping[Prompt, CachedAnswer]) -> None:
        """Keep these answers, in memory and on disk."""
        for prompt, new in answers.items():
            self._keep_longer(prompt, new)
        if answers:
            content = json.dumps([[prompt, *new] for prompt, new in answers.items()])
            name = hashlib.sha256(content.encode()).hexdigest()[:16]
            write_atomic(self.folder / f"{name}.json", content)


def reading(passage: str, question: str) -> str:
    """Return the prompt of a reading task: a passage, then the question about it."""
    return f"Read this text: {passage}\n{question}"


class Generation(BaseModel, metaclass=Told):
    """Options of `answer` and `target_log_probability`.

    `max_new_tokens`: a number, or a function of the probe. `chat`: None follows each probe, False
    asks all without the template. `batch_tokens`: tokens of prompts and answers decoded together.
    `cache`: answers of this very model, read before decoding and added to afterwards.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )

    max_new_tokens: int | Callable[[Probe], int] = 160
    chat: bool | None = None
    batch_tokens: int = 65536
    cache: AnswerCache | None = None

    def prompt(self, model: nn.Module, probe: Probe) -> tuple[str, bool]:
        """Return what is asked, below the passage of an edit in context, and whether by chat."""
        passage = getattr(model, "passages", {}).get(probe.edit)
        text = probe.question if passage is None else reading(passage, probe.question)
        return text, probe.chat and self.chat is not False


class Query(NamedTuple):
    """Token ids of a prompt, and the edit whose lane answers it (None in a model without lanes)."""

    lane: str | None
    prompt: Prompt


@typed
def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Probes, **options
) -> list[str]:
    """Answer every probe greedily, in order; special tokens and outer white space are stripped.

        model, tokenizer = load("embedded")
        answer(model, tokenizer, edit.probes, max_new_tokens=80)

    `options` are the fields of `Generation`. Each distinct prompt is decoded once. An answer ends
    at the token that ends a turn or the text, at its limit of tokens, or at the end of the context.
    Raises InputError for a prompt that fills the context.
    """
    return [
        tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in answer_ids(model, tokenizer, probes, Generation(**options))
    ]


def answer_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    chosen: Generation,
) -> list[list[int]]:
    """Return the token ids of what `answer` returns, without the token that ends an answer."""
    has_lanes, context = hasattr(model, "lanes"), max_context(model)
    given = chosen.max_new_tokens
    wanted = [given(probe) if callable(given) else given for probe in probes]
    queries, limits = [], {}
    for probe, most in zip(probes, wanted, strict=True):
        with about(f"edit {probe.edit}, {probe.kind} {probe.number}"):
            prompt = tuple(encode(tokenizer, *chosen.prompt(model, probe)))
            _check_length(len(prompt) + 1, context)
        queries.append(Query(probe.edit if has_lanes else None, prompt))
        limit = min(most, context - len(prompt))
        limits[queries[-1]] = max(limits.get(queries[-1], 0), limit)
    look_up = chosen.cache.look_up if chosen.cache else lambda *_: None
    answers = {query: look_up(query.prompt, limit) for query, limit in limits.items()}
    missing = {query: limit for query, limit in limits.items() if answers[query] is None}
    endings = end_tokens(model, tokenizer)
    for batch in _batches(missing, chosen.batch_tokens):
        rows = _decode(model, batch, [limits[query] for query in batch], endings)
        answers.update(zip(batch, rows, strict=True))
    if chosen.cache:
        new = {query.prompt: (answers[query], limit) for query, limit in missing.items()}
        chosen.cache.add(new)
    # A prompt may occur with two limits: greedy answers are prefixes of each other.
    return [answers[query][:most] for query, most in zip(queries, wanted, strict=True)]


def select_lanes(model: nn.Module, edits: Sequence[str | None]) -> None:
    """Let a model with lanes read its next rows with the weights of these edits, one id per row."""
    if hasattr(model, "lanes"):
        model.lanes.read(edits)


def _check_length(needed: int, context: int) -> None:
    if needed > context:
        raise InputError(f"{needed} tokens; expected at most {context}, the context")


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end an answer: of a turn or of the text."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {end_of_turn_id(tokenizer), tokenizer.eos_token_id, *configured} - {None}


def _batches(limits: Mapping[Query, int], tokens: int) -> list[list[Query]]:
    """Group prompts of similar length: at most `tokens` with their answers, but one prompt."""
    batches: list[list[Query]] = []
    longest = 0
    # Longest first: a batch that does not fit in memory fails at once.
    by_size = sorted(limits, key=lambda one: (len(one.prompt), limits[one], one), reverse=True)
    for query in by_size:
        needed = len(query.prompt) + limits[query]
        longest = max(longest, needed)
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = needed
        batches[-1].append(query)
    return batches


# Not inference mode: rotary embeddings of some models renew buffers while reading, which training
# then needs.
@torch.no_grad()
def _decode(
    model: nn.Module, queries: list[Query], limits: list[int], endings: set[int]
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, without the token that ended it."""
    answers: list[list[int]] = [[] for _ in queries]
    rows = list(range(len(queries)))
    running, cache = set(rows), DynamicCache(config=model.config)
    ids = padded([query.prompt for query in queries], side="left").to(model.device)  # (B, T)
    mask = padded([[1] * len(query.prompt) for query in queries], side="left").to(model.device)
    # Every prompt counts its positions from 0, whatever padding stands before it.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
    select_lanes(model, [query.lane for query in queries])
    while True:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1].argmax(-1)  # of (B, 1, V) to (B,)
        positions = positions[:, -1:]  # (B, 1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in running and token not in endings:
                answers[row].append(token)
            if token in endings or len(answers[row]) >= limits[row]:
                running.discard(row)
        if not running:
            return answers
        if len(rows) - len(running) >= len(rows) * DROP_SHARE:
            left = torch.tensor([row in running for row in rows]).nonzero().squeeze(1)
            rows = [row for row in rows if row in running]
            select_lanes(model, [queries[row].lane for row in rows])
            cache.batch_select_indices(left)
            mask, tokens, positions = mask[left], tokens[left], positions[left]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids, positions = tokens[:, None], positions + 1


@torch.no_grad()
def teacher_forced(
    model: nn.Module,
    examples: Sequence[Example],
    edits: Sequence[str | None],
    tokens: float = math.inf,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each example's place and the logits that predict its T target tokens (T, V), float32.

    The longest comes first. `edits` names each example's lane, in a model with lanes; `tokens`
    limits one forward pass.
    """
    for rows in group_by_length([len(one.ids) for one in examples], tokens):
        select_lanes(model, [edits[row] for row in rows])
        ids = padded([examples[row].ids for row in rows]).to(model.device)  # (B, T)
        first = min(examples[row].prompt_length for row in rows)
        # Padding stands to the right: causality alone keeps it from what is read, without a mask.
        logits = model(
            input_ids=ids[:, :-1], use_cache=False, logits_to_keep=ids.shape[1] - first
        ).logits  # (B, S, V), each predicting the label at its place
        for row, values in zip(rows, logits, strict=True):
            start, stop = examples[row].prompt_length, len(examples[row].ids)
            yield row, wide(values[start - first : stop - first])


def surprisals(
    model: nn.Module,
    examples: Sequence[Example],
    edits: Sequence[str | None],
    tokens: float = math.inf,
) -> list[Tensor]:
    """Return -log p (nats) of each example's target tokens, shape (its tokens,)."""
    surprisal_of: dict[int, Tensor] = {}
    for row, logits in teacher_forced(model, examples, edits, tokens):
        one = examples[row]
        target = torch.tensor(one.ids[one.prompt_length :], device=logits.device)
        surprisal_of[row] = F.cross_entropy(logits, target, reduction="none")
    return [surprisal_of[row] for row in range(len(examples))]


def _reference_surprisals(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> tuple[list[Example], list[Tensor]]:
    """Return each probe as an example with its reference, and the surprisals of its tokens."""
    chosen, examples = Generation(**options), []
    for probe in probes:
        text, chat = chosen.prompt(model, probe)
        with about(f"edit {probe.edit}, {probe.kind} {probe.number}"):
            examples.append(example(tokenizer, text, probe.reference, chat, False))
            _check_length(len(examples[-1].ids), max_context(model))
    edits = [probe.edit for probe in probes]
    return examples, surprisals(model, examples, edits, chosen.batch_tokens)


def target_log_probability(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[float]:
    """Return, in order, the mean log-probability (nats) of a token of each probe's reference.

    `options` are the fields of `Generation`; the token that ends a turn is not counted. Raises
    InputError where prompt and reference exceed the context.
    """
    _, values = _reference_surprisals(model, tokenizer, probes, **options)
    return [-float(value.mean()) for value in values]


class Token(NamedTuple):
    """A token as it reads in its text, and its probability (0 to 1) after everything before it."""

    text: str
    probability: float


def token_probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[list[Token]]:
    """Return the tokens of each probe's reference, whose texts joined are the reference.

    Options and errors are those of `target_log_probability`.
    """
    examples, values = _reference_surprisals(model, tokenizer, probes, **options)
    return [
        list(map(Token, _pieces(tokenizer, one.ids[one.prompt_length :]), (-value).exp().tolist()))
        for one, value in zip(examples, values, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text, the last one where a character has several."""
    texts = [
        tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        for end in range(len(ids) + 1)
    ]
    return [longer[len(shorter) :] for shorter, longer in pairwise(texts)]
