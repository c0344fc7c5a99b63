"""Loads a model, renders prompts with its own chat template, masks labels, selects weights and restores them."""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from uke.errors import InputError, nearest
from uke.project import EMBEDDED

logger = logging.getLogger(__name__)
IGNORED, MARK = -100, "uke0mark"


class Example(NamedTuple):
    """One prompt with the answer to learn: T token ids, T labels (-100 on the prompt), prompt length."""

    ids: list[int]
    labels: list[int]
    prompt_length: int


def load(
    name: str, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode and its tokenizer.

    `name` is "embedded" (the model shipped in this package), a directory, or a name on the hub; a directory is read without touching
    the network. Left "auto", `device` is CUDA if there is any, `dtype` its `precision`. InputError where `name` is no complete causal model.
    """
    source, local = _source(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = precision(device) if dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
        )
    # The readers of the files raise classes of their own, SafetensorError among them, with no common base.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{name}: expected a causal language model with its tokenizer; {reason}"
        ) from error
    if report["missing_keys"]:
        raise InputError(
            f"{name}: the weights lack {sorted(report['missing_keys'])[0]}; expected the whole model"
        )
    return model.to(device).eval(), tokenizer


def precision(device: str) -> torch.dtype:
    """What a model is held in: bfloat16 on a CUDA device that has it and does not emulate it, otherwise float32."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return (
        torch.bfloat16
        if torch.cuda.is_bf16_supported(including_emulation=False)
        else _full_precision()
    )


@cache
def _full_precision() -> torch.dtype:
    logger.warning("this GPU has no bfloat16: models are held in float32, in twice the memory")
    return torch.float32


def _source(name: str) -> tuple[str, bool]:
    path = EMBEDDED if name == "embedded" else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no config.json; expected a model directory")
        return str(path), True
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or name == "embedded":
        raise InputError(
            f"{path}: no such directory; expected 'embedded', a model directory or a hub name"
        )
    return name, False


def render(tokenizer: PreTrainedTokenizerBase, question: str, chat: bool) -> str:
    """The prompt as text: through the tokenizer's chat template up to where the answer begins, or as it is."""
    if not chat:
        return question
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path or 'tokenizer'}: no chat template; expected one, or chat: false"
        )
    # Templates of reasoning models read `enable_thinking`; an answer to score begins at once. Others ignore it.
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def encode(tokenizer: PreTrainedTokenizerBase, question: str, chat: bool) -> list[int]:
    """Token ids of the prompt, beginning-of-text token once: a chat template writes its own.

    Raises InputError where chat is asked of a tokenizer without a template, or nothing is left to ask.
    """
    ids = _tokenise(tokenizer, render(tokenizer, question, chat), special=not chat)
    if not ids:
        raise InputError("question: empty; expected at least one token")
    return ids


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def example(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, chat: bool, end_of_turn: bool
) -> Example:
    """Prompt and answer as one sequence, the answer (and, if asked, the token that ends a turn) to be learnt.

    A raw prompt is continued after one space. The prompt's ids are those that `encode` gives.
    """
    prompt = encode(tokenizer, question, chat)
    text = render(tokenizer, question, chat)
    space = "" if chat or text[-1:].isspace() or answer[:1].isspace() else " "
    target = _continuation(tokenizer, (text, prompt), space + answer, special=not chat)
    if end_of_turn:
        target.append(_end_of_turn(tokenizer))
    return Example(prompt + target, [IGNORED] * len(prompt) + target, len(prompt))


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: tuple[str, list[int]], answer: str, special: bool
) -> list[int]:
    text, ids = prompt
    # Tokenising both together spares the answer the word-start mark that some tokenizers put before any text;
    # where the seam would merge, the answer alone is what can follow the prompt.
    together = _tokenise(tokenizer, text + answer, special)
    if together[: len(ids)] == ids:
        return together[len(ids) :]
    return _tokenise(tokenizer, answer, special=False)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends an assistant's turn: read off the chat template, else end of text.

    Raises InputError where the tokenizer has neither.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(MARK)[2].lstrip()
        ids = _tokenise(tokenizer, tail, special=False) if tail else []
        if ids and ids[0] in _marks(tokenizer):
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{tokenizer.name_or_path or 'tokenizer'}: no token ends a turn; expected an eos_token"
        )
    return tokenizer.eos_token_id


_end_of_turn = end_of_turn  # `example` has an option of the same name


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())


def collate(
    examples: Sequence[Example], pad_id: int, side: str = "right"
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), T the longest example; padded on `side`."""
    longest = max(len(one.ids) for one in examples)

    def pad(row: Sequence[int], value: int) -> list[int]:
        filling = [value] * (longest - len(row))
        return [*row, *filling] if side == "right" else [*filling, *row]

    return {
        "input_ids": torch.tensor([pad(one.ids, pad_id) for one in examples]),  # (B, T)
        "attention_mask": torch.tensor([pad([1] * len(one.ids), 0) for one in examples]),  # (B, T)
        "labels": torch.tensor([pad(one.labels, IGNORED) for one in examples]),  # (B, T)
    }


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Decoder blocks with their names, first to last, found in the module tree.

    Raises InputError where no list of modules is as long as the configuration says.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(_part(kind, block) for block in module for kind in ("attention", "mlp"))
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__}: no list of {depth} decoder blocks in the module tree"
        )
    # A model that also sees has blocks of its own for that, and they are the smaller ones.
    name, stack = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]


def _part(kind: str, block: nn.Module) -> list[str]:
    """Names, within the block, of the linear projections of its attention or of its feed-forward part."""
    linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if ("att" in name.partition(".")[0]) == (kind == "attention")]


def _indices(layers, depth: int) -> list[int]:
    if isinstance(layers, str):
        half = depth // 2
        named = {"all": range(depth), "first_half": range(half), "second_half": range(half, depth)}
        if layers not in named:
            raise InputError(f"layers: unknown '{layers}'{nearest(layers, named)}")
        return list(named[layers])
    chosen = layers if isinstance(layers, Iterable) else [layers]
    return sorted({index(layer, depth) for layer in chosen})


def index(layer: int | float, depth: int) -> int:
    """Number of the block that a number or a fraction of the depth (0.0 the first, 1.0 the last) names; InputError out of range."""
    if isinstance(layer, float) and 0 <= layer <= 1:
        return min(int(layer * depth), depth - 1)
    if type(layer) is int and 0 <= layer < depth:
        return layer
    raise InputError(
        f"layers: {layer!r} is out of range; expected a number 0-{depth - 1} or a fraction 0.0-1.0"
    )


def _inside(block: nn.Module, component: str) -> list[str]:
    """Names, within the block, of the modules a component stands for."""
    linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    if component == "all":
        return linear
    if component in ("mlp", "attention"):
        return _part(component, block)
    own = {name.rpartition(".")[2] for name in linear}
    if component not in own:
        raise InputError(
            f"components: unknown '{component}'{nearest(component, own | {'all', 'mlp', 'attention'})}"
        )
    return [name for name in linear if name.rpartition(".")[2] == component]


def module_names(model: nn.Module, layers, components: Sequence[str]) -> list[str]:
    """Names of the linear projections that `layers` and `components` stand for, in the model's order.

    `layers`: "all", "first_half", "second_half", a block's number, a fraction of the depth (0.0 the first block,
    1.0 the last), or a list of numbers and fractions. `components`: "mlp", "attention", "all", or a projection's
    own name such as "down_proj". Raises InputError on a layer out of range, an unknown component (naming those
    that exist), and where nothing is selected.
    """
    found = blocks(model)
    components = [components] if isinstance(components, str) else components
    names = [
        f"{found[i][0]}.{inner}"
        for i in _indices(layers, len(found))
        for inner in dict.fromkeys(
            inner for one in components for inner in _inside(found[i][1], one)
        )
    ]
    if not names:
        raise InputError(
            f"layers {layers!r}, components {list(components)!r}: they select no weight"
        )
    return names


def select(model: nn.Module, layers, components: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters by name that `layers` and `components` stand for: as `module_names`, weights and biases.

    "all" is every parameter of a block, norms included. Raises InputError as `module_names` does.
    """
    prefixes = module_names(model, layers, components)
    if "all" in components:
        found = blocks(model)
        prefixes = [found[i][0] for i in _indices(layers, len(found))]
    wanted = tuple(f"{prefix}." for prefix in prefixes)
    return {name: p for name, p in model.named_parameters() if name.startswith(wanted)}


@contextmanager
def kept(
    model: nn.Module, parameters: dict[str, nn.Parameter] | None = None
) -> Iterator[nn.Module]:
    """On exit, also after an exception, `parameters` (all of them if None) are bit for bit as on entry.

    So are the buffers, `requires_grad` of every parameter and the training mode; gradients are dropped.
    A copy is kept of the given parameters only.
    """
    named = dict(model.named_parameters()) if parameters is None else parameters
    training = {module: module.training for module in model.modules()}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    tensors = [*named.values(), *model.buffers()]
    saved = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]
    try:
        yield model
    finally:
        for tensor, storage, value in saved:
            # Training may have put another tensor, of another dtype, in the parameter's place.
            tensor.data = storage
            tensor.data.copy_(value)
        for parameter, required in wanted:
            parameter.requires_grad_(required).grad = None
        for module, mode in training.items():
            module.training = mode


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any weight and with the configuration, not with where the model lies."""
    config = model.config.to_diff_dict()
    for passing in ("_name_or_path", "architectures", "transformers_version", "dtype"):
        config.pop(passing, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def max_context(model: nn.Module) -> int:
    """Positions the model was made for, in tokens; unbounded where the configuration gives none."""
    return (
        getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        or sys.maxsize
    )
