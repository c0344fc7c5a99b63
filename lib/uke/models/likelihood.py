"""How probable each token of a wanted text is after its question: where in the text an edit took."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Probe
from uke.errors import InputError
from uke.models.generate import asked, read_as
from uke.models.model import Example, collate, example, max_context
from uke.models.padding import TOKENS


class Token(NamedTuple):
    """A token as it reads in its text, and its probability (0 to 1) after everything before it."""

    text: str
    probability: float


@torch.no_grad()
def token_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    chat: bool | None = None,
) -> list[list[Token]]:
    """Of each probe, in order, the tokens of its reference, read after its question; their texts joined are the reference.

    `chat` as in `answering.Asking`; the token that ends a turn is not counted. Raises InputError where question and
    reference exceed the context.
    """
    examples = []
    for probe in probes:
        one = example(
            tokenizer, asked(model, probe), probe.reference, probe.chat and chat is not False, False
        )
        if len(one.ids) > max_context(model):
            raise InputError(
                f"{probe.kind} {probe.number}: question and wanted answer are {len(one.ids)} tokens; the model's context holds {max_context(model)}"
            )
        examples.append(one)
    found: list[list[Token]] = []
    size = max(1, TOKENS // max((len(one.ids) for one in examples), default=1))
    for start in range(0, len(examples), size):
        read_as(model, [probe.edit for probe in probes[start : start + size]])
        found += _read(model, tokenizer, examples[start : start + size])
    return found


def _read(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[list[Token]]:
    device = model.get_input_embeddings().weight.device
    ids = collate(examples, pad_id=0)["input_ids"].to(device)  # (B, T)
    first = min(one.prompt_length for one in examples)
    # Padding stands to the right, so causality alone keeps it from what is read: no mask to build.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits[
        :, :-1
    ]  # (B, S, V)
    wanted = ids[:, first:]  # (B, S)
    probabilities = (
        logits.float().softmax(-1).gather(-1, wanted[..., None])[..., 0].tolist()
    )  # (B, S)
    return [
        [
            Token(text, row[place])
            for text, place in zip(
                _pieces(tokenizer, one.ids[one.prompt_length :]),
                range(one.prompt_length - first, len(row)),
            )
        ]
        for one, row in zip(examples, probabilities, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; of a letter that takes several tokens the last adds it."""
    pieces, so_far = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(so_far) :])
        so_far = whole
    return pieces
