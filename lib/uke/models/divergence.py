"""Measure how far an edited model's next-token distributions are from the unedited model's.

Both models read the answer that the unedited model gave, so that they are compared at equal places
whatever the edited one would say. Of every distribution the 64 likeliest tokens are kept and the
rest is one: of the full divergence that had 98.9 to 99.9 % on the embedded model (FT-M, FT-UKE,
LoRA) and 84 to 85 % on SmolLM2-135M (FT-M, FT-UKE; 93 % with 256), whose vocabulary is 49,152.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Probe
from uke.errors import InputError
from uke.files import write_atomic
from uke.models.generate import Generation, answer_ids, teacher_forced
from uke.models.model import max_context
from uke.models.prompts import IGNORED, Example, encode, end_of_turn_id

PLACES = 32  # of an answer, at most, its end among them
LIKELIEST = 64  # tokens whose probability is kept at each place; the others are one
PASS_TOKENS = 1024  # in one forward pass: the logits of more fall out of a CPU's caches


class Expected(NamedTuple):
    """What a model expects at T places of its own answer, of the K likeliest tokens at each."""

    answer: Tensor  # (T,) the tokens of the answer, and the one that ends it
    tokens: Tensor  # (T, K)
    logs: Tensor  # (T, K) their log-probabilities in nats


def expected(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], **options
) -> list[Expected]:
    """Return what the unedited model expects along its own answer to each probe, in order.

    `options` are the fields of `Generation`. With a `cache` every prompt has a file beside the
    cached answers, written once and atomically; InputError for a damaged one.
    """
    chosen, end = Generation(**options), end_of_turn_id(tokenizer)
    answers = answer_ids(model, tokenizer, probes, chosen)
    keys = [
        (tuple(encode(tokenizer, *chosen.prompt(model, probe))), tuple([*answer, end][:PLACES]))
        for probe, answer in zip(probes, answers, strict=True)
    ]
    paths = {key: _path(chosen, key) for key in keys}
    found = {key: _read(path) for key, path in paths.items() if path and path.is_file()}
    missing = {key: _example(model, *key) for key in paths if key not in found}
    every, none = list(missing), [None] * len(missing)
    passes = teacher_forced(model, list(missing.values()), none, PASS_TOKENS)
    for row, logits in passes:
        key = every[row]
        logs, tokens = logits.double().log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        target = torch.tensor(key[1][: len(logs)])
        found[key] = Expected(target, tokens.int().cpu(), logs.to(logits.dtype).cpu())
        if path := paths[key]:
            write_atomic(path, save(found[key]._asdict()))
    return [found[key] for key in keys]


def divergences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    before: Sequence[Expected],
    **options,
) -> list[float]:
    """Return the Kullback-Leibler divergence of a model from what was expected `before`, in order.

    That is the mean over the places of sum_x p(x) log(p(x) / q(x)) in nats per token, p the
    unedited and q this model's distribution after the same words of the answer. Tokens beyond the
    K likeliest count as one, which makes it a lower bound (the log sum inequality).
    `options` are the fields of `Generation`.
    """
    chosen, examples = Generation(**options), []
    for probe, one in zip(probes, before, strict=True):
        prompt = encode(tokenizer, *chosen.prompt(model, probe))
        examples.append(_example(model, prompt, one.answer.tolist()))
    edits, result = [probe.edit for probe in probes], [0.0] * len(probes)
    for row, logits in teacher_forced(model, examples, edits, PASS_TOKENS):
        tokens, logs = (one[: len(logits)].to(logits.device) for one in before[row][1:])
        result[row] = float(divergence(tokens, logs, logits.double()).clamp(min=0).mean())
    return result


def divergence(tokens: Tensor, logs: Tensor, logits: Tensor) -> Tensor:
    """Return the divergence at every place (..., V) from the `logs` of its `tokens` (..., K)."""
    q = _with_rest(logits.gather(-1, tokens.long()) - logits.logsumexp(-1, keepdim=True))
    p = _with_rest(logs.to(q))
    return (p.exp() * (p - q)).sum(-1)


def _example(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Join prompt and answer, as far as the context goes."""
    target = list(answer[: max_context(model) - len(prompt)])
    return Example([*prompt, *target], [IGNORED] * len(prompt) + target, len(prompt))


def _with_rest(logs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: (..., K) to (..., K + 1)."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logs.dtype).eps)
    return torch.cat([logs, rest.log()], dim=-1)


def _path(chosen: Generation, key: tuple[tuple[int, ...], tuple[int, ...]]) -> Path | None:
    name = hashlib.sha256(repr((key, LIKELIEST)).encode()).hexdigest()[:24]
    return chosen.cache and chosen.cache.folder / f"{name}.safetensors"


def _read(path: Path) -> Expected:
    try:
        return Expected(**load_file(path))
    except (SafetensorError, TypeError) as error:
        fault = "expected the tensors of Expected; delete it to make it again"
        raise InputError(f"{path}: {fault} ({error})") from None
