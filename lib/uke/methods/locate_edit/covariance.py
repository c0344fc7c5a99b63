"""What an edit must keep: second moments of a corpus's keys, projectors on their null spaces, preservation texts.

`python -m uke.methods.locate_edit.covariance MODEL TEXTS` makes them below results/moments, once per model; for "embedded" the texts are the
world's preservation pool.
"""

import argparse
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
from uke.files import replacing
from uke.methods.locate_edit.anchors import Site, chunks, look, sites
from uke.models.model import fingerprint, load, max_context
from uke.models.prompts import encode, example
from uke.project import EMBEDDED, Paths
from uke.world import files as world_files
from uke.world.files import card

TEXTS = "texts.json"
# MEMIT's and AlphaEdit's published blocks of 32.
LAYERS = tuple(block / 32 for block in range(4, 9))
# Known by the object, so that a model edited on top of an edit still finds the moments of the model it was.
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()

Text = str | dict[str, str]


def folder(model: nn.Module | str) -> Path:
    """Where the moments of this model lie, by its fingerprint: given, or that of its weights when it was first asked."""
    if isinstance(model, str):
        return Paths("embedded").home / "results" / "moments" / model
    if model not in _KNOWN:
        _KNOWN[model] = fingerprint(model)
    return Paths("embedded").home / "results" / "moments" / _KNOWN[model]


def world_texts(seed: int | None = None) -> list[Text]:
    """The preservation pool of a world, by default the embedded model's own: no locality probe asks about it."""
    seed = card(EMBEDDED)["settings"]["world_seed"] if seed is None else seed
    return read_texts(
        world_files.ensure(Paths("embedded").home / "results", seed) / world_files.PRESERVATION
    )


def read_texts(path: str | Path) -> list[Text]:
    """A corpus: a JSON list of texts, or of objects with `question` and `answer`. InputError for anything else."""
    try:
        texts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a JSON list of texts ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{path}: expected a JSON list of at least one text")
    for number, text in enumerate(texts):
        if not (
            isinstance(text, str)
            and text
            or isinstance(text, dict)
            and {"question", "answer"} <= set(text)
        ):
            raise InputError(
                f"{path}: entry {number}: expected a text, or an object with question and answer"
            )
    return texts


def _ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Tokens of one text, a pair through the chat template; what exceeds the context is cut off."""
    if isinstance(text, str):
        return encode(tokenizer, text, chat=False)[: max_context(model)]
    return example(tokenizer, text["question"], text["answer"], True, True).ids[
        : max_context(model)
    ]


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    layers: Sequence[int | float] = LAYERS,
    every: int = 1000,
) -> Path:
    """Measure E[k k^T] over all tokens of the texts at the `down_proj` of each layer; the folder that holds it.

    Summed in float64 and written every `every` texts, whole or not at all, so that a killed run resumes; what is
    there already, of the same model, layer and tokens, is not measured again. The texts are kept beside it.
    """
    target = folder(model)
    target.mkdir(parents=True, exist_ok=True)
    sequences = [_ids(model, tokenizer, text) for text in texts]
    digest = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16]
    with replacing(target / TEXTS) as part:
        part.write_text(
            json.dumps({"digest": digest, "texts": list(texts)}, ensure_ascii=False),
            encoding="utf-8",
        )
    started = {
        site: _Sum.read(target, site, digest, len(sequences)) for site in sites(model, layers)
    }
    for done in sorted({total.done for total in started.values()} - {len(sequences)}):
        together = {site: total for site, total in started.items() if total.done == done}
        for start in tqdm(range(done, len(sequences), every), desc="second moments", disable=None):
            _add(model, sequences[start : start + every], together)
            for total in together.values():
                total.write()
    return target


class _Sum:
    """The sum of k k^T (W, W) over the first `done` texts of a corpus, and the file that keeps it."""

    def __init__(
        self, path: Path, marks: dict[str, str], value: Tensor, done: int = 0, tokens: int = 0
    ) -> None:
        self.path, self.marks, self.value, self.done, self.tokens = path, marks, value, done, tokens

    @classmethod
    def read(cls, target: Path, site: Site, digest: str, texts: int) -> "_Sum":
        """What is there of this corpus, or nothing yet."""
        path, marks = (
            target / f"{site.name}.safetensors",
            {"texts": str(texts), "digest": digest, "layer": site.name},
        )
        weight = site.projection.weight
        try:
            with safe_open(path, "pt", device=str(weight.device)) as file:
                held = file.metadata() or {}
                if marks.items() <= held.items():
                    return cls(
                        path, marks, file.get_tensor("sum"), int(held["done"]), int(held["tokens"])
                    )
        except (OSError, SafetensorError):  # absent, or cut short when a machine went down
            pass
        return cls(
            path, marks, weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        )

    def write(self) -> None:
        with replacing(self.path) as part:
            save_file(
                {"sum": self.value},
                part,
                metadata=self.marks | {"done": str(self.done), "tokens": str(self.tokens)},
            )


def _add(model: nn.Module, sequences: Sequence[Sequence[int]], together: dict[Site, _Sum]) -> None:
    for rows, ids in chunks(sequences, model.device):
        lengths = torch.tensor([len(sequences[row]) for row in rows], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
        for call, total in zip(
            look(model, ids, [site.projection for site in together]), together.values(), strict=True
        ):
            keys = call.args[0][real].double()  # (tokens, W)
            total.value += keys.T @ keys
            total.tokens += len(keys)
    for total in together.values():
        total.done += len(sequences)


def second_moments(model: nn.Module, places: Sequence[Site]) -> list[Tensor]:
    """E[k k^T] (W, W) of each site in float64 on the model's device; InputError with the command that makes them."""
    return [_moment(*file).to(model.device) for file in _files(model, places)]


def projectors(model: nn.Module, places: Sequence[Site], threshold: float) -> list[Tensor]:
    """Of each site, the projector (W, W) in float64 on the directions whose second moment is below `threshold`.

    InputError where there is none, so that AlphaEdit could write nothing, or where the moments are missing.
    """
    found = [_null(*file, threshold, model.device) for file in _files(model, places)]
    for site, null in zip(places, found, strict=True):
        if not null.any():
            raise InputError(
                f"{site.name}: no direction's second moment is below null_threshold {threshold:g}; expected a larger one"
            )
    return found


def preservation(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[list[int]]:
    """Tokens of `count` texts drawn from those the moments were measured on, as many as there are at most."""
    path = folder(model) / TEXTS
    if not path.is_file():
        raise InputError(_missing(model, "preservation texts"))
    texts = _texts(path, path.stat().st_mtime_ns)["texts"]
    drawn = random.Random(seed).sample(texts, min(count, len(texts)))
    return [_ids(model, tokenizer, text) for text in drawn]


def digest(model: nn.Module | str) -> str | None:
    """16 hex digits of the texts that the moments of this model were measured on; None before that."""
    path = folder(model) / TEXTS
    return _texts(path, path.stat().st_mtime_ns)["digest"] if path.is_file() else None


def _files(model: nn.Module, places: Sequence[Site]) -> list[tuple[Path, int]]:
    """The finished file of each site and when it was written; InputError naming those missing, half done or of other texts."""
    found = {site: folder(model) / f"{site.name}.safetensors" for site in places}
    if missing := [site for site, path in found.items() if not _finished(path)]:
        layers = [re.findall(r"\d+", site.name)[0] for site in missing]
        raise InputError(_missing(model, "second moments", f" --layers {' '.join(layers)}"))
    return [(path, path.stat().st_mtime_ns) for path in found.values()]


def _finished(path: Path) -> bool:
    texts = path.with_name(TEXTS)
    try:
        with safe_open(path, "pt") as file:
            held = file.metadata()
        return (
            held["done"] == held["texts"]
            and held["digest"] == _texts(texts, texts.stat().st_mtime_ns)["digest"]
        )
    except (OSError, SafetensorError, KeyError):
        return False


def _missing(model: nn.Module, what: str, layers: str = "") -> str:
    name = model.config.name_or_path
    asked = "embedded" if name == str(EMBEDDED) else f"{name or 'MODEL'} TEXTS.json"
    return f"{folder(model)}: no {what} of this model; expected what this makes: python -m uke.methods.locate_edit.covariance {asked}{layers}"


@lru_cache(maxsize=16)
def _moment(path: Path, written: int) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("sum") / int(file.metadata()["tokens"])


@lru_cache(maxsize=16)
def _null(path: Path, written: int, threshold: float, device: torch.device) -> Tensor:
    values, vectors = torch.linalg.eigh(_moment(path, written).to(device))  # (W,), (W, W)
    null = vectors[:, values < threshold]
    return null @ null.T


@lru_cache(maxsize=2)
def _texts(path: Path, written: int) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a model's second moments from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uke.methods.locate_edit.covariance",
        description="Second moments and preservation texts of a model.",
    )
    parser.add_argument("model", help="'embedded', a model directory or a hub name")
    parser.add_argument(
        "texts",
        nargs="?",
        help="JSON list of texts or of {question, answer}; for 'embedded' the preservation pool",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=LAYERS,
        type=lambda one: float(one) if "." in one else int(one),
    )
    given = parser.parse_args(arguments)
    if given.texts is None and given.model != "embedded":
        parser.error("texts: expected a JSON file for any model but 'embedded'")
    try:
        texts = read_texts(given.texts) if given.texts else world_texts()
        measure(*load(given.model), texts, given.layers)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
