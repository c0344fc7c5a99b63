"""Texts as vectors of MiniLM: the same whole numbers in whatever company a text comes; kept in memory-mapped files."""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from uke.errors import InputError
from uke.locality.ranking import check_texts

# A unit vector times SCALE, rounded, has squared length below 2^24 (width 384: at most 4,010^2): float32 sums of products
# of such vectors are exact. A cosine moves by about 1e-4.
SCALE = 4000
UNIT = float(SCALE**2)
STEP = 8  # every text is padded to a multiple of so many word pieces, never to its neighbours'
BATCH = 32  # texts at once through the network
BLOCK = 256  # texts between two marks of progress
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Encoder:
    """The sentence encoder in `folder` (BERT, mean of the last states); a text is cut to its first `length` word pieces.

    Questions and passages go through the same weights. `Encoder(folder)(texts)` are N vectors (N, width) int16 of length
    SCALE. A text's vector does not depend on the texts beside it: it is computed at a padded length of its own.
    """

    folder: Path
    length: int = 256

    def __post_init__(self) -> None:
        if (
            isinstance(self.length, bool)
            or not isinstance(self.length, int)
            or not 8 <= self.length <= 512
        ):
            raise InputError(f"length: expected word pieces from 8 to 512, found {self.length!r}")
        missing = [name for name in FILES if not (Path(self.folder) / name).is_file()]
        if missing:
            raise InputError(
                f"{self.folder}: expected a sentence encoder's directory with {missing[0]}"
            )

    @property
    def width(self) -> int:
        return opened(self.folder)[0].config.hidden_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a vector besides the text: weights, word pieces, length, rounding."""
        return digest(
            [
                *(_digest(Path(self.folder) / name) for name in FILES),
                f"{self.length} {SCALE} {STEP}".encode(),
            ]
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        check_texts("texts", texts)
        network, _ = opened(self.folder)
        made = np.zeros((len(texts), self.width), dtype=np.int16)
        for places, ids, mask in batches(self.pieces(texts), BATCH):
            with torch.inference_mode():
                vectors = pooled(
                    network(
                        input_ids=ids.to(network.device), attention_mask=mask.to(network.device)
                    ),
                    mask,
                )
            made[places] = np.round(vectors.cpu().numpy() * SCALE).astype(np.int16)
        return made

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text's word pieces, between the tokens that begin and end it, cut to `length`."""
        _, tokenizer = opened(self.folder)
        return (
            tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]
            if len(texts)
            else []
        )


@functools.lru_cache(maxsize=2)
def opened(folder: str | Path) -> tuple:
    """Network (eval mode, float32, on CUDA where there is one) and tokenizer of an encoder's directory; InputError if unfit."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # The readers of the files raise classes of their own with no common base.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{folder}: expected a sentence encoder's directory; {reason}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def batches(pieces: Sequence[Sequence[int]], size: int) -> Iterator[tuple]:
    """Places (a list), ids and mask (both (texts, L) tensors) of texts of equal padded length L, at most `size` at once."""
    import torch

    alike: dict[int, list[int]] = {}
    for place, ids in enumerate(pieces):
        alike.setdefault(-(-len(ids) // STEP) * STEP, []).append(place)
    for padded, places in sorted(alike.items()):
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            rows = torch.tensor(
                [[*pieces[place], *[0] * (padded - len(pieces[place]))] for place in chosen]
            )
            counts = torch.tensor([[len(pieces[place])] for place in chosen])
            yield chosen, rows, (torch.arange(padded)[None] < counts).long()


def pooled(output, mask):
    """Mean of the last states (B, L, width) over the word pieces that `mask` (B, L) marks, at unit length, (B, width)."""
    import torch

    marked = mask.to(output.last_hidden_state)[..., None]  # (B, L, 1)
    return torch.nn.functional.normalize(
        (output.last_hidden_state * marked).sum(1) / marked.sum(1), dim=-1
    )


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over parts, told apart by their lengths."""
    made = hashlib.sha256()
    for part in parts:
        made.update(len(part).to_bytes(8, "big") + part)
    return made.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def embed(encoder: Encoder, texts: Sequence[str], folder: str | Path) -> np.ndarray:
    """Vectors (N, width) int16 of N passages, read-only and memory-mapped from a file in `folder`.

    The file is named by the fingerprint of encoder and texts, and made where it is missing: block by block, so that a
    killed run goes on after its last whole block, and under its final name only when whole. A second process waits.
    """
    check_texts("texts", texts, 1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = digest(
        [encoder.fingerprint.encode(), *(text.encode("utf-8", "surrogatepass") for text in texts)]
    )[:24]
    file = folder / f"vectors-{name}.npy"
    if not file.is_file():
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                _fill(encoder, texts, file)
    try:
        vectors = np.load(file, mmap_mode="r")
    except (ValueError, OSError) as error:
        raise InputError(
            f"{file}: not a whole file of vectors ({error}); delete it, and it is made anew"
        ) from None
    if vectors.shape != (len(texts), encoder.width) or vectors.dtype != np.int16:
        raise InputError(
            f"{file}: expected int16 ({len(texts)}, {encoder.width}), found {vectors.dtype} {vectors.shape}; delete it"
        )
    return vectors


def _fill(encoder: Encoder, texts: Sequence[str], file: Path) -> None:
    # Texts of like length stand together, so that blocks hold few padded lengths.
    order = np.argsort([len(text) for text in texts], kind="stable")
    blocks = range(0, len(texts), BLOCK)
    vectors, done = _open_parts(file, (len(texts), encoder.width), len(blocks))
    for number, start in enumerate(
        tqdm(blocks, desc="embedding", mininterval=5, disable=len(blocks) < 8)
    ):
        if done[number]:
            continue
        places = order[start : start + BLOCK]
        vectors[places] = encoder([texts[place] for place in places])
        vectors.flush()  # before the mark, so that no mark outlives its block
        done[number] = True
        done.flush()
    partial, marks = _parts(file)
    del vectors, done
    os.replace(partial, file)
    marks.unlink()


def _parts(file: Path) -> tuple[Path, Path]:
    return file.with_suffix(".partial"), file.with_suffix(".done")


def _open_parts(file: Path, shape: tuple[int, int], blocks: int) -> tuple[np.memmap, np.memmap]:
    """The unfinished file of vectors and its marks, one for each block, as they were left or new."""
    partial, marks = _parts(file)
    try:
        vectors, done = (np.lib.format.open_memmap(path, mode="r+") for path in (partial, marks))
        if vectors.shape == shape and done.shape == (blocks,):
            return vectors, done
    except (ValueError, OSError):
        pass
    marks.unlink(missing_ok=True)
    vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int16, shape=shape)
    try:
        if hasattr(os, "posix_fallocate"):
            with partial.open("r+b") as file:
                # A file with holes would end the process by a signal once the disk is full.
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    except OSError as error:
        raise InputError(
            f"{partial}: no room for {partial.stat().st_size:,} bytes of vectors ({error.strerror})"
        ) from None
    return vectors, np.lib.format.open_memmap(marks, mode="w+", dtype=np.bool_, shape=(blocks,))
