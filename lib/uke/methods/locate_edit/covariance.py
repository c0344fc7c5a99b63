"""Measure what an edit must keep: covariances of a corpus's keys, null spaces, preservation texts.

    model, tokenizer = load("embedded")
    measure(model, tokenizer, world_texts())    # once per model, below results/covariance
    covariances(model, sites(model, [3]))       # E[k k^T] of block 3

`python -m uke covariance MODEL TEXTS` does the same from the command line.
"""

import hashlib
import json
import re
import shutil
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from uke.data.edits import Text
from uke.data.formats import read_json
from uke.errors import InputError, about, located
from uke.files import write_atomic
from uke.methods.locate_edit.anchors import Site, chunks, look, sites
from uke.models.model import fingerprint, max_context
from uke.models.prompts import encode, example
from uke.project import EMBEDDED, Paths
from uke.world import files as world_files
from uke.world.files import card

TEXTS = "corpus.json"
LAYERS = tuple(block / 32 for block in range(4, 9))  # published blocks of MEMIT and AlphaEdit
# By object, so that a model edited on top of an edit still finds the files of the unedited model.
_FINGERPRINTS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


class Turn(TypedDict):
    """A question of a chat and its answer."""

    question: Text
    answer: Text


Entry = Text | Turn
_CORPUS = TypeAdapter(Annotated[list[Entry], Field(min_length=1)])


def folder(model: nn.Module | str) -> Path:
    """Return the folder of a model's files, by its fingerprint, or that of the model given."""
    name = model if isinstance(model, str) else _FINGERPRINTS.get(model)
    if name is None:
        name = _FINGERPRINTS[model] = fingerprint(model)
    return Paths("embedded").home / "results" / "covariance" / name


def world_texts(seed: int | None = None) -> list[Entry]:
    """Return a world's preservation texts (default: the embedded model's world)."""
    seed = card(EMBEDDED)["settings"]["world_seed"] if seed is None else seed
    world = world_files.ensure(Paths("embedded").home / "results", seed)
    return read_texts(world / world_files.PRESERVATION)


def read_texts(path: str | Path) -> list[Entry]:
    """Read a corpus: a JSON list of texts, or of objects with `question` and `answer`."""
    with located(f"{path}: expected a JSON list of texts, or of objects with question and answer"):
        return _CORPUS.validate_python(read_json(path))


def token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Entry) -> list[int]:
    """Return the tokens of one text, cut off at the context; a pair uses the chat template."""
    with about(f"corpus: {str(text)[:60]!r}"):
        if isinstance(text, str):
            ids = encode(tokenizer, text, chat=False)
        else:
            ids = example(tokenizer, text["question"], text["answer"], True, True).ids
    return ids[: max_context(model)]


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Entry],
    layers: Sequence[int | float] = LAYERS,
) -> None:
    """Measure E[k k^T] over all tokens of the texts at the `down_proj` of each layer.

    The model's folder keeps them with the texts. A layer that was measured on the same tokens is
    not measured again; what was measured on others is removed.
    """
    target = folder(model)
    sequences = [token_ids(model, tokenizer, text) for text in texts]
    content = {"digest": hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16]}
    if digest(model) != content["digest"]:
        shutil.rmtree(target, ignore_errors=True)
        for cached in (_covariance, _projector, _corpus):
            cached.cache_clear()
        content["texts"] = list(texts)
        write_atomic(target / TEXTS, json.dumps(content, ensure_ascii=False))
    wanted = layers and sites(model, layers)  # none where the texts alone are needed
    lacking = [site for site in wanted if not _path(model, site).is_file()]
    if not lacking:
        return
    projections = [site.projection for site in lacking]
    widths = [(projection.weight, projection.weight.shape[1]) for projection in projections]
    sums = [weight.new_zeros(w, w, dtype=torch.float64) for weight, w in widths]
    for _, ids, real in tqdm(chunks(sequences, model.device), desc="covariance"):
        for call, total in zip(look(model, ids, projections), sums, strict=True):
            keys = call.args[0][real.to(total.device)].double()  # (tokens, W)
            total += keys.T @ keys
    for site, total in zip(lacking, sums, strict=True):
        found = {"covariance": total / sum(map(len, sequences))}
        write_atomic(_path(model, site), save(found))


def covariances(model: nn.Module, chosen: Sequence[Site]) -> list[Tensor]:
    """Return E[k k^T] (W, W) of each site in float64; InputError where one was not measured."""
    every = zip(_paths(model, chosen), chosen, strict=True)
    return [_covariance(path).to(site.projection.weight.device) for path, site in every]


def projectors(model: nn.Module, chosen: Sequence[Site], threshold: float) -> list[Tensor]:
    """Return, for each site, the projector (W, W) on directions of a variance below `threshold`.

    In float64. InputError where there is none: AlphaEdit could write nothing.
    """
    every = zip(_paths(model, chosen), chosen, strict=True)
    found = [_projector(path, threshold, site.projection.weight.device) for path, site in every]
    for site, projector in zip(chosen, found, strict=True):
        if not projector.any():
            none = f"no direction has a variance below null_threshold {threshold:g}"
            raise InputError(f"{site.name}: {none}; expected a larger one")
    return found


def preservation(model: nn.Module) -> list[Entry]:
    """Return the texts that the covariance was measured on; InputError where there are none."""
    if digest(model) is None:
        raise InputError(_missing(model, "preservation texts"))
    return _corpus(folder(model) / TEXTS)["texts"]


def digest(model: nn.Module | str) -> str | None:
    """Return 16 hex digits of the texts that this model was measured on; None before that."""
    path = folder(model) / TEXTS
    return _corpus(path)["digest"] if path.is_file() else None


def _path(model: nn.Module, site: Site) -> Path:
    return folder(model) / f"{site.name}.safetensors"


def _paths(model: nn.Module, chosen: Sequence[Site]) -> list[Path]:
    """Return the file of each site; InputError if one is missing."""
    lacking = [site for site in chosen if not _path(model, site).is_file()]
    if lacking:
        layers = " ".join(re.findall(r"\d+", site.name)[0] for site in lacking)
        raise InputError(_missing(model, "covariance", f" --layers {layers}"))
    return [_path(model, site) for site in chosen]


def _missing(model: nn.Module, what: str, layers: str = "") -> str:
    name = model.config.name_or_path
    arguments = "embedded" if name == str(EMBEDDED) else f"{quote(name or 'MODEL')} TEXTS.json"
    command = f"python -m uke covariance {arguments}{layers}"
    command += ", or documents to make it from (`make data`)" * (name != str(EMBEDDED))
    return f"{folder(model)}: no {what} of this model; expected what this makes: {command}"


@lru_cache(maxsize=16)
def _covariance(path: Path) -> Tensor:
    return load_file(path)["covariance"]


@lru_cache(maxsize=16)
def _projector(path: Path, threshold: float, device: torch.device) -> Tensor:
    variances, directions = torch.linalg.eigh(_covariance(path).to(device))
    null = directions[:, variances < threshold]
    return null @ null.T


_corpus = lru_cache(maxsize=2)(read_json)
