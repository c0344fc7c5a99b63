"""Load a causal language model, name its weights by layer and component, restore it."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from uke.errors import InputError, nearest, typed
from uke.project import EMBEDDED, Paths

PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # of Llama's kind


UNHELD = "the devices do not hold its weights; expected larger ones"


@typed
def load(
    name: str | Path,
    device: str | int | torch.device | Mapping[str, str] = "auto",
    dtype: str | torch.dtype = "auto",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model in eval mode, and its tokenizer.

        model, tokenizer = load("embedded")

    `name` is "embedded" (the model shipped here), "smollm2" (the one that `make model` makes), a
    directory (read without the network), or a name on the hub. By default `device` is CUDA where
    there is any (several GPUs where one is too small) and `dtype` its `precision`; a mapping lays
    modules on devices, and on "meta" no weights are read. Raises InputError where `name` is no
    complete causal model, or the devices do not hold it.
    """
    path, local = source(name)
    split = device if isinstance(device, Mapping) else None
    try:
        for place in (split or {}).values():
            place == "disk" or torch.device(place)
    except RuntimeError as error:
        raise InputError(f"load, field 'device': {str(error).partition('. ')[0]}") from None
    if split or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        split = split or ("auto" if torch.cuda.device_count() > 1 and not _fits_one(path) else None)
    # Code in a model's folder is never run, and nobody is asked to let it.
    given, report = {"local_files_only": local, "trust_remote_code": False}, {}
    try:
        torch.empty(0, device=device)
        dtype = precision(device) if dtype == "auto" else dtype
        tokenizer = AutoTokenizer.from_pretrained(path, **given)
        if device == "meta":
            config = AutoConfig.from_pretrained(path, **given)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            given |= {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
            given["device_map"] = split
            model, report = AutoModelForCausalLM.from_pretrained(path, **given)
    except Exception as error:  # the readers of files raise classes with no common base
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if split and "meta device" in reason:
            raise InputError(f"{name}: {UNHELD}") from None
        expected = "expected a causal language model with its tokenizer, and a device that is there"
        raise InputError(f"{name}: {expected}; {reason}") from error
    for fault, keys in (("lack", "missing_keys"), ("also hold", "unexpected_keys")):
        if names := sorted(report.get(keys, ())):
            raise InputError(f"{name}: the weights {fault} {names[0]}; expected config.json's own")
    if split and any(weight.device.type == "meta" for weight in model.parameters()):
        raise InputError(f"{name}: {UNHELD}")
    # Special tokens that no prompt has, as Gemma's of images, may lie beyond the embedding.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template)
    last = model.get_input_embeddings().num_embeddings - 1
    for token, number in tokenizer.get_vocab().items():
        if number > last and (token not in special or token in str(own)):
            fault = f"the tokenizer's {token!r} has the id {number}"
            raise InputError(f"{name}: {fault}; expected at most {last}, the embedding's last")
    return (model if split else model.to(device)).eval(), tokenizer


def _fits_one(path: str) -> bool:
    """Whether the first GPU has twice the bytes of a local model free, since edits take some."""
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return 2 * size < torch.cuda.mem_get_info(0)[0]


def precision(device: str) -> torch.dtype:
    """Return the dtype that models are loaded in: bfloat16 where a GPU has it, else float32."""
    on_gpu = torch.device(device).type == "cuda"
    has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def source(name: str | Path) -> tuple[str, bool]:
    """Return what `from_pretrained` reads, and whether it is a local directory."""
    path = EMBEDDED if name == "embedded" else Path(name := str(name)).expanduser()
    if name == "smollm2":
        path = Paths("embedded").home / "results" / "models" / name
        if not path.is_dir():
            raise InputError(f"{name}: no directory {path}; `make model` makes it")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no config.json; expected a model directory")
        return str(path), True
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or name == "embedded":
        expected = "expected 'embedded', 'smollm2', a model directory or a hub name"
        raise InputError(f"{path}: no such directory; {expected}")
    return name, False


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the decoder blocks with their names, first to last; InputError where none is found."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    stacks = [(name, module) for name, module in lists if len(module) == depth]
    if not stacks:
        raise InputError(f"{type(model).__name__}: no list of {depth} decoder blocks")
    # A vision tower has blocks of its own, which are smaller.
    name, stack = max(stacks, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]


Layers = str | int | float | Iterable[int | float]


def _indices(layers: Layers, depth: int) -> list[int]:
    if isinstance(layers, str):
        half = depth // 2
        named = {"all": range(depth), "first_half": range(half), "second_half": range(half, depth)}
        if layers not in named:
            raise InputError(f"layers: unknown '{layers}'{nearest(layers, named)}")
        return list(named[layers])
    chosen = layers if isinstance(layers, Iterable) else [layers]
    return sorted({layer_index(layer, depth) for layer in chosen})


def layer_index(layer: int | float, depth: int) -> int:
    """Return the index of a block from its number or its fraction of the depth (1.0 the last)."""
    if isinstance(layer, float) and 0 <= layer <= 1:
        return min(int(layer * depth), depth - 1)
    if type(layer) is int and 0 <= layer < depth:
        return layer
    expected = f"expected a number 0-{depth - 1} or a fraction 0.0-1.0"
    raise InputError(f"layers: {layer!r} is out of range; {expected}")


def _inside(block: nn.Module, component: str) -> list[str]:
    """Return the names, within the block, of the projections that a component stands for."""
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    matrices = {n.removesuffix(".weight"): w for n, w in block.named_parameters() if w.dim() > 1}
    found: dict[str, list[str]] = {"all": [], "mlp": [], "attention": []}
    for name in dict.fromkeys([*names, *matrices]):
        part = "attention" if "att" in name.partition(".")[0] else "mlp"
        for own in ("all", part, name.rpartition(".")[2]):
            found.setdefault(own, []).append(name)
    if component not in (*found, *PROJECTIONS):
        raise InputError(f"components: unknown '{component}'{nearest(component, found)}")
    if lacking := [name for name in found.get(component, [component]) if name not in names]:
        expected = "expected a model of Llama, Qwen2, Qwen3, Mistral or Gemma type"
        raise InputError(f"components: '{component}': {lacking[0]} is no linear layer; {expected}")
    return found[component]


def refuse_adapter(model: nn.Module) -> None:
    """Refuse a model with an adapter: an edit would move its weights, or be saved in no file."""
    if any(hasattr(one, own) for one in model.modules() for own in ("base_layer", "peft_config")):
        raise InputError("the model already carries an adapter; expected it merged or taken off")


def module_names(model: nn.Module, layers: Layers, components: str | Sequence[str]) -> list[str]:
    """Return the names of the linear projections that are selected, in the model's order.

    `layers`: "all", "first_half", "second_half", a block's number, a fraction of the depth, or a
    list of both. `components`: "mlp", "attention", "all", or a projection such as "down_proj".
    Raises InputError for a layer out of range, an unknown component, and a selection of nothing.
    """
    refuse_adapter(model)
    decoder, names = blocks(model), []
    components = [components] if isinstance(components, str) else components
    for i in _indices(layers, len(decoder)):
        prefix, block = decoder[i]
        inside = dict.fromkeys(name for one in components for name in _inside(block, one))
        names += [f"{prefix}.{name}" for name in inside]
    if not names:
        raise InputError(f"layers {layers!r}, components {components!r}: they select no weight")
    return names


def select(
    model: nn.Module, layers: Layers, components: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    """Return weights and biases, by name, of what `module_names` selects, with its errors.

    The component "all" stands for every parameter of a block, norms included.
    """
    prefixes = module_names(model, layers, components)
    if "all" in components:
        decoder = blocks(model)
        prefixes = [decoder[i][0] for i in _indices(layers, len(decoder))]
    wanted = tuple(f"{prefix}." for prefix in prefixes)
    return {name: p for name, p in model.named_parameters() if name.startswith(wanted)}


@contextmanager
def kept(
    model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield copies of `parameters` (all if None); restore them bit for bit on exit.

    Buffers, `requires_grad` of every parameter and the training mode are restored too, also after
    an exception, and gradients are dropped.
    """
    named = dict(model.named_parameters()) if parameters is None else parameters
    training = {module: module.training for module in model.modules()}
    required = [(p, p.requires_grad) for p in model.parameters()]
    tensors = {**named, **dict(model.named_buffers())}
    storages = {name: tensor.data for name, tensor in tensors.items()}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield copies
    finally:
        for name, tensor in tensors.items():
            # Training may have put another tensor, of another dtype, in the parameter's place.
            tensor.data = storages[name]
            tensor.data.copy_(copies[name])
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad).grad = None
        for module, mode in training.items():
            module.training = mode


def fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits of the weights and the configuration, not of the model's path."""
    config = model.config.to_diff_dict()
    for passing in ("_name_or_path", "architectures", "transformers_version", "dtype"):
        config.pop(passing, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def max_context(model: nn.Module) -> int:
    """Return the positions the model was made for, in tokens; unbounded where it says none."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
