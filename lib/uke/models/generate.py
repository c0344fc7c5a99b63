"""Generate greedy answers to many probes at once, read log-probabilities, and keep answers on disk.

Prompts are sorted by length and padded left; rows that have ended are dropped from the batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from uke.data.edits import Probe
from uke.errors import InputError
from uke.files import write_atomic
from uke.models.model import max_context, wide
from uke.models.prompts import (
    Example,
    collate,
    encode,
    end_of_turn,
    example,
    group_by_length,
    question_of,
)

# Dropping finished rows copies the cache, so it waits until this share of the batch has finished.
DROP_SHARE = 1 / 8
SPARE_TOKENS = 32  # free positions behind a layer's cached keys and values

Prompt = tuple[int, ...]
CachedAnswer = tuple[list[int], int]  # token ids of an answer, and its limit of tokens


class AnswerCache:
    """Greedy answers of one unedited model by prompt, kept in a folder of small JSON files.

    A file is written atomically and never changed, so several processes may add to a folder at
    once. The folder's name must say what else decides an answer: weights, precision and code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _known(self) -> dict[Prompt, CachedAnswer]:
        known: dict[Prompt, CachedAnswer] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                for prompt, ids, limit in json.loads(path.read_text("utf-8")):
                    ids = list(map(int, ids)), int(limit)
                    _keep_longer(known, tuple(map(int, prompt.split())), ids)
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}: not a file of cached answers ({error}); expected "
                    "[prompt, ids, limit] each; delete it and the answers are generated again"
                ) from None
        return known

    def look_up(self, prompt: Prompt, limit: int) -> list[int] | None:
        """Return the answer of at most `limit` tokens, or None where none is that long."""
        ids, known_limit = self._known.get(prompt, ([], -1))
        # Greedy answers are prefixes of each other, and one below its own limit has ended.
        return ids[:limit] if known_limit >= limit or len(ids) < known_limit else None

    def add(self, answers: Mapping[Prompt, CachedAnswer]) -> None:
        """Keep these answers, in memory and on disk."""
        if not answers:
            return
        for prompt, answer_ids in answers.items():
            _keep_longer(self._known, prompt, answer_ids)
        rows = [[" ".join(map(str, prompt)), *answer_ids] for prompt, answer_ids in answers.items()]
        content = json.dumps(rows)
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        write_atomic(self.folder / f"{name}.json", content)


def _keep_longer(known: dict[Prompt, CachedAnswer], prompt: Prompt, new: CachedAnswer) -> None:
    if prompt not in known or known[prompt][1] < new[1]:
        known[prompt] = new


@dataclass(frozen=True)
class Generation:
    """Options of `answer` and `target_log_probability`.

    `max_new_tokens`: a number, or a function of the probe. `chat`: None follows each probe; False
    asks all of them without the template; cloze probes never use it. `batch_tokens`: tokens of
    prompts and answers decoded together. `cache`: answers of this very model, read before decoding
    and added to afterwards.
    """

    max_new_tokens: int | Callable[[Probe], int] = 160
    chat: bool | None = None
    batch_tokens: int = 65536
    cache: AnswerCache | None = None

    def through_template(self, probe: Probe) -> bool:
        return probe.chat and self.chat is not False

    def limit(self, probe: Probe) -> int:
        return self.max_new_tokens(probe) if callable(self.max_new_tokens) else self.max_new_tokens


class Query(NamedTuple):
    """Token ids of a prompt, and the edit whose lane answers it (None where the model has no
    lanes).
    """

    lane: str | None
    prompt: Prompt


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[str]:
    """Answer every probe greedily, in order; special tokens and surrounding white space are
    stripped.

        model, tokenizer = load("embedded")
        answer(model, tokenizer, edit.probes, max_new_tokens=80)

    `options` are the fields of `Generation`. Each distinct prompt is decoded once. An answer ends
    at the token that ends a turn or the text, at its limit of tokens, or at the end of the context.
    Raises InputError for a prompt that fills the context.
    """
    chosen = Generation(**options)
    has_lanes, context = hasattr(model, "lanes"), max_context(model)
    queries, limits = [], {}
    for probe in probes:
        text, chat = question_of(model, probe), chosen.through_template(probe)
        prompt = tuple(encode(tokenizer, text, chat))
        _check_length(probe, len(prompt) + 1, context)
        queries.append(Query(probe.edit if has_lanes else None, prompt))
        limit = min(chosen.limit(probe), context - len(prompt))
        limits[queries[-1]] = max(limits.get(queries[-1], 0), limit)
    answers = _cached(chosen.cache, limits)
    missing = {query: limit for query, limit in limits.items() if query not in answers}
    endings = end_tokens(model, tokenizer)
    for batch in _batches(missing, chosen.batch_tokens):
        rows = _decode(model, batch, [limits[query] for query in batch], endings)
        answers.update(zip(batch, rows, strict=True))
    if chosen.cache:
        chosen.cache.add(
            {query.prompt: (answers[query], limit) for query, limit in missing.items()}
        )
    # A prompt may occur with two limits: greedy answers are prefixes of each other.
    return [
        tokenizer.decode(answers[query][: chosen.limit(probe)], skip_special_tokens=True).strip()
        for probe, query in zip(probes, queries, strict=True)
    ]


def _cached(cache: AnswerCache | None, limits: Mapping[Query, int]) -> dict[Query, list[int]]:
    if cache is None:
        return {}
    known = {query: cache.look_up(query.prompt, limit) for query, limit in limits.items()}
    return {query: ids for query, ids in known.items() if ids is not None}


def select_lanes(model: nn.Module, edits: Sequence[str | None]) -> None:
    """Let a model with lanes read its next rows with the weights of these edits, one id per row."""
    if hasattr(model, "lanes"):
        model.lanes.read(edits)


def _check_length(probe: Probe, needed: int, context: int) -> None:
    if needed > context:
        raise InputError(
            f"edit {probe.edit}, {probe.kind} {probe.number}: {needed} tokens; "
            f"expected at most {context}, the model's context"
        )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end an answer: of a turn or of the text."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *configured} - {None}


def _batches(limits: Mapping[Query, int], tokens: int) -> Iterator[list[Query]]:
    """Group prompts of similar length: at most `tokens` with their answers, but at least one
    prompt.
    """
    batch: list[Query] = []
    longest = 0

    def size_key(query: Query) -> tuple:
        return len(query.prompt), limits[query], query

    # Longest first: a batch that does not fit in memory fails at once.
    for query in sorted(limits, key=size_key, reverse=True):
        needed = len(query.prompt) + limits[query]
        size = max(longest, needed)
        if batch and size * (len(batch) + 1) > tokens:
            yield batch
            batch, size = [], needed
        batch.append(query)
        longest = size
    if batch:
        yield batch


# Not inference mode: rotary embeddings of some models renew buffers while reading, which training
# then needs.
@torch.no_grad()
def _decode(
    model: nn.Module, queries: list[Query], limits: list[int], endings: set[int]
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, without the token that ended it."""
    answers: list[list[int]] = [[] for _ in queries]
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    if not rows:
        return answers
    step = _Step(model, [queries[row] for row in rows])
    running = set(rows)
    while True:
        for row, token in zip(rows, step.tokens.tolist(), strict=True):
            if row not in running:
                continue
            if token not in endings:
                answers[row].append(token)
            if token in endings or len(answers[row]) == limits[row]:
                running.remove(row)
        if not running:
            return answers
        if len(rows) - len(running) >= len(rows) * DROP_SHARE:
            step.keep([index for index, row in enumerate(rows) if row in running])
            rows = [row for row in rows if row in running]
        step.forward()


class _Step:
    """State of a batch while it is decoded: next tokens, their positions, the mask and the cache.

    Every prompt counts its positions from 0, whatever padding stands before it.
    """

    def __init__(self, model: nn.Module, queries: list[Query]):
        device = model.get_input_embeddings().weight.device
        examples = [Example(list(prompt), list(prompt), len(prompt)) for _, prompt in queries]
        batch = collate(examples, pad_id=0, side="left")
        self.model, self.lanes = model, [query.lane for query in queries]
        select_lanes(model, self.lanes)
        self.mask = batch["attention_mask"].to(device)  # (B, T)
        self.cache = _empty_cache(model)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        self._read(batch["input_ids"].to(device), positions)

    def _read(self, ids: Tensor, positions: Tensor) -> None:
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits  # (B, 1, V)
        self.tokens = logits[:, -1].argmax(-1)  # (B,)
        self.positions = positions[:, -1:]  # (B, 1)

    def forward(self) -> None:
        """Read the chosen tokens and choose the next ones."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self._read(self.tokens[:, None], self.positions + 1)

    def keep(self, indices: list[int]) -> None:
        """Drop every row of the batch but those at `indices`."""
        self.lanes = [self.lanes[index] for index in indices]
        select_lanes(self.model, self.lanes)
        kept = torch.tensor(indices, device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.mask = self.mask[kept]
        self.tokens = self.tokens[kept]
        self.positions = self.positions[kept]


class _SpareLayer(DynamicLayer):
    """Keys and values of one layer with free positions behind them: a token more copies only
    itself.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self.stored = {"keys": self.keys, "values": self.values}
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        old = getattr(self, name)  # (B, H, T, D)
        end = old.shape[-2] + new.shape[-2]
        if self.stored[name].shape[-2] < end:
            self.stored[name] = new.new_empty(*new.shape[:-2], end + SPARE_TOKENS, new.shape[-1])
            self.stored[name][..., : old.shape[-2], :] = old
        self.stored[name][..., old.shape[-2] : end, :] = new
        return self.stored[name][..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, stored in self.stored.items():
            end = getattr(self, name).shape[-2]
            self.stored[name] = stored[indices]
            setattr(self, name, self.stored[name][..., :end, :])


def _empty_cache(model: nn.Module) -> DynamicCache:
    """Return the model's own kind of cache; layers that keep every token get spare positions."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _SpareLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@torch.no_grad()
def surprisals(
    model: nn.Module,
    examples: Sequence[Example],
    edits: Sequence[str | None],
    tokens: int | None = None,
) -> list[Tensor]:
    """Return -log p (nats) of every target token of each example, teacher-forced, shape (tokens of
    its answer,).

    `edits` names the lane that reads each example, where the model has lanes; `tokens` limits one
    forward pass.
    """
    device = model.get_input_embeddings().weight.device
    surprisal_of: dict[int, Tensor] = {}
    for rows in group_by_length([len(one.ids) for one in examples], tokens):
        select_lanes(model, [edits[row] for row in rows])
        ids = collate([examples[row] for row in rows], pad_id=0)["input_ids"].to(device)  # (B, T)
        first = min(examples[row].prompt_length for row in rows)
        # Padding stands to the right, so causality alone keeps it from what is read: no mask to
        # build.
        logits = model(
            input_ids=ids[:, :-1], use_cache=False, logits_to_keep=ids.shape[1] - first
        ).logits  # (B, S, V), each predicting the label at its place
        labels = ids[:, first:]  # (B, S)
        # Flattened, since along another axis than the last the softmax is three times slower.
        surprisal = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none")
        for row, values in zip(rows, surprisal.view_as(labels), strict=True):
            start, stop = examples[row].prompt_length, len(examples[row].ids)
            surprisal_of[row] = values[start - first : stop - first]
    return [surprisal_of[row] for row in range(len(examples))]


def _reference_surprisals(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    options: Mapping[str, Any],
) -> tuple[list[Example], list[Tensor]]:
    """Return each probe with its reference as an example, and the surprisal of the reference's
    tokens.
    """
    chosen = Generation(**options)
    examples: list[Example] = []
    for probe in probes:
        text, chat = question_of(model, probe), chosen.through_template(probe)
        examples.append(example(tokenizer, text, probe.reference, chat, False))
        _check_length(probe, len(examples[-1].ids), max_context(model))
        if examples[-1].prompt_length == len(examples[-1].ids):
            raise InputError(
                f"edit {probe.edit}, {probe.kind} {probe.number}: "
                "reference is empty; expected a text"
            )
    edits = [probe.edit for probe in probes]
    return examples, surprisals(model, examples, edits, chosen.batch_tokens)


def target_log_probability(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[float]:
    """Return the mean log-probability (nats) of a token of each probe's reference after its prompt,
    in order.

    `options` are the fields of `Generation`; the token that ends a turn is not counted. Raises
    InputError where prompt and reference exceed the context, and for an empty reference.
    """
    _, values = _reference_surprisals(model, tokenizer, probes, options)
    return [-float(value.mean()) for value in values]


class Token(NamedTuple):
    """A token as it reads in its text, and its probability (0 to 1) after everything before it."""

    text: str
    probability: float


def token_probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[list[Token]]:
    """Return the tokens of each probe's reference with their probabilities; their texts joined are
    the reference.

    Options and errors are those of `target_log_probability`.
    """
    examples, values = _reference_surprisals(model, tokenizer, probes, options)
    return [
        list(map(Token, _pieces(tokenizer, one.ids[one.prompt_length :]), (-value).exp().tolist()))
        for one, value in zip(examples, values, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text; a character of several tokens is added by the last
    of them.
    """
    pieces, text = [], ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        longer = longer if end == len(ids) else longer.rstrip("\ufffd")
        pieces.append(longer[len(text) :])
        text = longer
    return pieces
