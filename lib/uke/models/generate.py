"""Decodes many prompts at once: length-sorted, padded left, finished rows dropped; and reads log-probabilities."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from uke.data.edits import Probe
from uke.errors import InputError
from uke.models.model import IGNORED, Example, collate, encode, end_of_turn, example, max_context
from uke.models.padding import TOKENS, parts
from uke.models.recall import Prompt, Recall
from uke.world.generate import reading

# Dropping finished rows copies the cache, so it waits until this share of the batch can go.
DROP_SHARE = 1 / 8
ROOM = 32  # tokens that a cache can take before it is copied to a larger place


class Question(NamedTuple):
    """Token ids of a prompt, and the edit whose lane of the model answers it (None where the model has no lanes)."""

    lane: str | None
    prompt: Prompt


@dataclass(frozen=True)
class Asking:
    """How to ask: tokens an answer may have, template or not, tokens of prompts and answers held at once, answers known.

    `max_new_tokens` is a number or a function of the probe. `chat` None asks as each probe says; True or False
    overrules the probes that ask through the template, never those that are cloze prompts. `known` are answers of this
    very model: what it holds is not decoded again, and what is decoded is added.
    """

    max_new_tokens: int | Callable[[Probe], int] = 160
    chat: bool | None = None
    batch_tokens: int = 65536
    known: Recall | None = None

    def through_template(self, probe: Probe) -> bool:
        return probe.chat and self.chat is not False

    def limit(self, probe: Probe) -> int:
        return self.max_new_tokens(probe) if callable(self.max_new_tokens) else self.max_new_tokens


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **asking
) -> list[str]:
    """Greedy answers in the order of the probes, special tokens and outer white space stripped.

    Options: the fields of `Asking`. A prompt asked twice is decoded once. An answer ends before the token that
    ends a turn or the text, at its limit of tokens, or where the model's context ends. Raises InputError for a
    prompt that leaves no room in the context.
    """
    options = Asking(**asking)
    laned = hasattr(model, "lanes")
    questions = [
        Question(
            probe.edit if laned else None,
            tuple(encode(tokenizer, asked(model, probe), options.through_template(probe))),
        )
        for probe in probes
    ]
    room = max_context(model)
    limits: dict[Question, int] = {}
    for probe, question in zip(probes, questions, strict=True):
        _check_room(probe, len(question.prompt) + 1, room)
        limits[question] = max(
            limits.get(question, 0), min(options.limit(probe), room - len(question.prompt))
        )
    ends = endings(model, tokenizer)
    decoded = {
        question: ids
        for question, limit in limits.items()
        if options.known and (ids := options.known.look(question.prompt, limit)) is not None
    }
    asked_now = {question: limit for question, limit in limits.items() if question not in decoded}
    for batch in _batches(asked_now, options.batch_tokens):
        rows = _decode(model, batch, [limits[question] for question in batch], ends)
        decoded.update(zip(batch, rows, strict=True))
    if options.known:
        options.known.add(
            {question.prompt: (decoded[question], limit) for question, limit in asked_now.items()}
        )
    # The same prompt may be asked with two limits: greedy answers are prefixes of each other.
    texts = (
        decoded[question][: options.limit(probe)]
        for probe, question in zip(probes, questions, strict=True)
    )
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts]


def read_as(model: nn.Module, edits: Sequence[str | None]) -> None:
    """A model with lanes reads its next rows as these edits have it."""
    if hasattr(model, "lanes"):
        model.lanes.read(edits)


def asked(model: nn.Module, probe: Probe) -> str:
    """The probe's question, after the passage that an in-context edit (`editing.edited`) has this model read for it."""
    passages = getattr(model, "passages", {})
    return (
        reading(passages[probe.edit], probe.question) if probe.edit in passages else probe.question
    )


def _check_room(probe: Probe, needed: int, room: int) -> None:
    if needed > room:
        place = f"edit {probe.edit}, {probe.kind} {probe.number}"
        raise InputError(f"{place}: {needed} tokens; expected at most {room}, the model's context")


def endings(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an answer: of a turn or of the text."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *own} - {None}


def _batches(limits: dict[Question, int], tokens: int) -> Iterator[list[Question]]:
    """Prompts of similar length together, as many as `tokens` hold with their answers, but at least one."""
    batch: list[Question] = []
    longest = 0
    # Longest first: a batch that does not fit in memory fails at once.
    for question in sorted(
        limits, key=lambda one: (len(one.prompt), limits[one], one), reverse=True
    ):
        size = max(longest, len(question.prompt) + limits[question])
        if batch and size * (len(batch) + 1) > tokens:
            yield batch
            batch, size = [], len(question.prompt) + limits[question]
        batch.append(question)
        longest = size
    if batch:
        yield batch


# Not inference mode: rotary embeddings of some models renew buffers while reading, which training then needs.
@torch.no_grad()
def _decode(
    model: nn.Module, questions: list[Question], limits: list[int], ends: set[int]
) -> list[list[int]]:
    """Greedy continuation of each prompt, without the token that ended it."""
    written: list[list[int]] = [[] for _ in questions]
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    if not rows:
        return written
    step = _Step(model, [questions[row] for row in rows])
    going = set(rows)
    while True:
        tokens = step.tokens.tolist()
        for row, token in zip(rows, tokens, strict=True):
            if row not in going:
                continue
            if token not in ends:
                written[row].append(token)
            if token in ends or len(written[row]) == limits[row]:
                going.remove(row)
        if not going:
            return written
        if len(rows) - len(going) >= len(rows) * DROP_SHARE:
            step.keep([place for place, row in enumerate(rows) if row in going])
            rows = [row for row in rows if row in going]
        step.forward()


class _Step:
    """State of a batch while it is decoded: next tokens, their positions, the mask and the cache.

    Every prompt counts its positions from 0, whatever padding stands before it.
    """

    def __init__(self, model: nn.Module, questions: list[Question]):
        device = model.get_input_embeddings().weight.device
        batch = collate(
            [Example(list(p), list(p), len(p)) for _, p in questions], pad_id=0, side="left"
        )
        self.model, self.lanes = model, [question.lane for question in questions]
        read_as(model, self.lanes)
        self.mask = batch["attention_mask"].to(device)  # (B, T)
        self.cache = _cache(model)
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
        """Reads the chosen tokens and chooses the next ones."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self._read(self.tokens[:, None], self.positions + 1)

    def keep(self, places: list[int]) -> None:
        """Drops every row of the batch but those at `places`."""
        kept = torch.tensor(places, device=self.mask.device)
        self.lanes = [self.lanes[place] for place in places]
        read_as(self.model, self.lanes)
        self.cache.batch_select_indices(kept)
        self.mask, self.tokens, self.positions = (
            self.mask[kept],
            self.tokens[kept],
            self.positions[kept],
        )


class _Roomy(DynamicLayer):
    """Keys and values of one layer with free room behind them: one token more copies that token, not all before it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self.held = {"keys": self.keys, "values": self.values}
        self.keys, self.values = (
            self._longer("keys", key_states),
            self._longer("values", value_states),
        )
        return self.keys, self.values

    def _longer(self, name: str, new: Tensor) -> Tensor:
        old = getattr(self, name)  # (B, H, T, D)
        end = old.shape[-2] + new.shape[-2]
        if self.held[name].shape[-2] < end:
            self.held[name] = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            self.held[name][..., : old.shape[-2], :] = old
        self.held[name][..., old.shape[-2] : end, :] = new
        return self.held[name][..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, held in self.held.items():
            end = getattr(self, name).shape[-2]
            self.held[name] = held[indices]
            setattr(self, name, self.held[name][..., :end, :])


def _cache(model: nn.Module) -> DynamicCache:
    """The model's own kind of cache; layers that keep every token have room."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def target_log_probability(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **asking
) -> list[float]:
    """Mean log-probability (nats) of a token of each probe's reference after its prompt, in the probes' order.

    Options: the fields of `Asking`; the token that ends a turn is not counted. Raises InputError where prompt
    and reference exceed the context, or the reference is empty.
    """
    options = Asking(**asking)
    examples: list[Example] = []
    for probe in probes:
        one = example(
            tokenizer, asked(model, probe), probe.reference, options.through_template(probe), False
        )
        _check_room(probe, len(one.ids), max_context(model))
        if one.prompt_length == len(one.ids):
            raise InputError(
                f"edit {probe.edit}, {probe.kind} {probe.number}: reference is empty; expected a text"
            )
        examples.append(one)
    found: dict[int, float] = {}
    for batch in parts([len(one.ids) for one in examples], min(options.batch_tokens, TOKENS)):
        read_as(model, [probes[i].edit for i in batch])
        found.update(
            zip(batch, _mean_log_probability(model, [examples[i] for i in batch]), strict=True)
        )
    return [found[i] for i in range(len(examples))]


def _mean_log_probability(model: nn.Module, examples: list[Example]) -> list[float]:
    device = model.get_input_embeddings().weight.device
    batch = {name: tensor.to(device) for name, tensor in collate(examples, pad_id=0).items()}
    first = min(one.prompt_length for one in examples)
    labels = batch["labels"][
        :, first:
    ]  # (B, S), from the first position that is a target in any row
    # Padding stands to the right, so causality alone keeps it from what is read: no mask to build.
    out = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=labels.shape[1] + 1)
    logits = out.logits[:, :-1]  # (B, S, V), each predicting the label after it
    targets = labels != IGNORED
    nll = torch.nn.functional.cross_entropy(
        logits[targets].float(), labels[targets], reduction="none"
    )
    sums = torch.zeros(len(examples), device=device).index_add_(0, targets.nonzero()[:, 0], nll)
    return (-sums / targets.sum(-1)).tolist()
