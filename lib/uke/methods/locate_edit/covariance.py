"""Measure what an edit must keep: covariances of a corpus's keys, null spaces, preservation texts.

    model, tokenizer = load("embedded")
    measure(model, tokenizer, world_texts())    # once per model, below results/covariance
    covariances(model, sites(model, [3]))       # E[k k^T] of block 3

`python -m uke covariance MODEL TEXTS` does the same from the command line.
"""

import hashlib
import json
import random
import re
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from uke.errors import InputError
from uke.files import replacing, write_atomic
from uke.methods.locate_edit.anchors import Site, chunks, look, sites
from uke.models.model import fingerprint, max_context
from uke.models.prompts import encode, example
from uke.project import EMBEDDED, Paths
from uke.world import files as world_files
from uke.world.files import card

TEXTS = "texts.json"
LAYERS = tuple(block / 32 for block in range(4, 9))  # published blocks of MEMIT and AlphaEdit
AT_ONCE = 1000  # texts that are sorted by length together
# By object, so that a model edited on top of an edit still finds the files of the unedited model.
_FINGERPRINTS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()

Text = str | dict[str, str]


def folder(model: nn.Module | str) -> Path:
    """Return the folder of a model's files, by its fingerprint, or that of the model given."""
    name = model if isinstance(model, str) else _FINGERPRINTS.get(model)
    if name is None:
        name = _FINGERPRINTS[model] = fingerprint(model)
    return Paths("embedded").home / "results" / "covariance" / name


def world_texts(seed: int | None = None) -> list[Text]:
    """Return the preservation pool of a world, by default of that of the embedded model.

    No locality probe asks about it.
    """
    seed = card(EMBEDDED)["settings"]["world_seed"] if seed is None else seed
    world = world_files.ensure(Paths("embedded").home / "results", seed)
    return read_texts(world / world_files.PRESERVATION)


def read_texts(path: str | Path) -> list[Text]:
    """Read a corpus: a JSON list of texts, or of objects with `question` and `answer`."""
    try:
        texts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected a JSON list of texts ({reason})") from None
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{path}: expected a JSON list of at least one text")
    for number, text in enumerate(texts):
        pair = isinstance(text, dict) and {"question", "answer"} <= set(text)
        if not pair and not (isinstance(text, str) and text):
            raise InputError(
                f"{path}: entry {number}: expected a text, or an object with question and answer"
            )
    return texts


def _ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Return the tokens of one text, cut off at the context; a pair uses the chat template."""
    if isinstance(text, str):
        ids = encode(tokenizer, text, chat=False)
    else:
        ids = example(tokenizer, text["question"], text["answer"], True, True).ids
    return ids[: max_context(model)]


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    layers: Sequence[int | float] = LAYERS,
) -> Path:
    """Measure E[k k^T] over all tokens of the texts at the `down_proj` of each layer.

    A layer that was measured on the same tokens is not measured again. Returns the folder, which
    also keeps the texts.
    """
    target = folder(model)
    sequences = [_ids(model, tokenizer, text) for text in texts]
    digest = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16]
    content = {"digest": digest, "texts": list(texts)}
    write_atomic(target / TEXTS, json.dumps(content, ensure_ascii=False))
    lacking = [site for site in sites(model, layers) if not _measured(_path(model, site))]
    if not lacking:
        return target
    weights = [site.projection.weight for site in lacking]  # (D, W)
    sums = [one.new_zeros(one.shape[1], one.shape[1], dtype=torch.float64) for one in weights]
    for start in tqdm(range(0, len(texts), AT_ONCE), desc="covariance", disable=None):
        _add(model, sequences[start : start + AT_ONCE], lacking, sums)
    labels = {"digest": digest, "tokens": str(sum(map(len, sequences)))}
    for site, total in zip(lacking, sums, strict=True):
        with replacing(_path(model, site)) as part:
            save_file({"sum": total}, part, metadata=labels | {"layer": site.name})
    return target


def _add(
    model: nn.Module, sequences: Sequence[Sequence[int]], chosen: Sequence[Site], sums: list[Tensor]
) -> None:
    projections = [site.projection for site in chosen]
    for rows, ids in chunks(sequences, model.device):
        lengths = torch.tensor([len(sequences[row]) for row in rows], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
        for call, total in zip(look(model, ids, projections), sums, strict=True):
            keys = call.args[0][real].double()  # (tokens, W)
            total += keys.T @ keys


def covariances(model: nn.Module, chosen: Sequence[Site]) -> list[Tensor]:
    """Return E[k k^T] (W, W) of each site in float64 on the model's device.

    InputError, with the command that measures them, where one is missing.
    """
    return [_covariance(*file).to(model.device) for file in _files(model, chosen)]


def projectors(model: nn.Module, chosen: Sequence[Site], threshold: float) -> list[Tensor]:
    """Return, for each site, the projector (W, W) on directions of a variance below `threshold`.

    In float64. InputError where there is no such direction, so that AlphaEdit could write nothing,
    and where a covariance is missing.
    """
    found = [_null_space(*file, threshold, model.device) for file in _files(model, chosen)]
    for site, projector in zip(chosen, found, strict=True):
        if not projector.any():
            raise InputError(
                f"{site.name}: no direction has a variance below null_threshold {threshold:g}; "
                "expected a larger one"
            )
    return found


def preservation(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[list[int]]:
    """Draw `count` of the texts that the covariance was measured on, as token ids; all if fewer."""
    path = folder(model) / TEXTS
    if not path.is_file():
        raise InputError(_missing(model, "preservation texts"))
    texts = _texts(path, path.stat().st_mtime_ns)["texts"]
    drawn = random.Random(seed).sample(texts, min(count, len(texts)))
    return [_ids(model, tokenizer, text) for text in drawn]


def digest(model: nn.Module | str) -> str | None:
    """Return 16 hex digits of the texts that this model was measured on; None before that."""
    path = folder(model) / TEXTS
    return _texts(path, path.stat().st_mtime_ns)["digest"] if path.is_file() else None


def _path(model: nn.Module, site: Site) -> Path:
    return folder(model) / f"{site.name}.safetensors"


def _files(model: nn.Module, chosen: Sequence[Site]) -> list[tuple[Path, int]]:
    """Return the file of each site and its time of writing; InputError if missing."""
    paths = {site: _path(model, site) for site in chosen}
    if missing := [site for site, path in paths.items() if not _measured(path)]:
        layers = [re.findall(r"\d+", site.name)[0] for site in missing]
        raise InputError(_missing(model, "covariance", f" --layers {' '.join(layers)}"))
    return [(path, path.stat().st_mtime_ns) for path in paths.values()]


def _measured(path: Path) -> bool:
    """Whether the file is whole, and of the texts beside it."""
    texts = path.with_name(TEXTS)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["digest"] == _texts(texts, texts.stat().st_mtime_ns)["digest"]
    except (OSError, SafetensorError, KeyError):
        return False


def _missing(model: nn.Module, what: str, layers: str = "") -> str:
    name = model.config.name_or_path
    arguments = "embedded" if name == str(EMBEDDED) else f"{name or 'MODEL'} TEXTS.json"
    command = f"python -m uke covariance {arguments}{layers}"
    return f"{folder(model)}: no {what} of this model; expected what this makes: {command}"


@lru_cache(maxsize=16)
def _covariance(path: Path, written: int) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("sum") / int(file.metadata()["tokens"])


@lru_cache(maxsize=16)
def _null_space(path: Path, written: int, threshold: float, device: torch.device) -> Tensor:
    variances, directions = torch.linalg.eigh(_covariance(path, written).to(device))
    null = directions[:, variances < threshold]
    return null @ null.T


@lru_cache(maxsize=2)
def _texts(path: Path, written: int) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
