"""Read and write whole files: atomic writing, strict YAML, digests."""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, StrictStr, TypeAdapter, create_model

from uke.errors import InputError, located, nearest


class StrictLoader(yaml.SafeLoader):
    """Read decimal numbers, true, false and null alone; all else is text (`010`, `1:30`, `no`)."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        for key, value in node.value:
            if key.value == "pairs":  # of facts: subjects and answers are texts, 1802 too
                _as_text(value)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            fault = f"key '{repeated[0]}' is written twice"
            raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node):
        if re.search("[\ud800-\udfff]", text := super().construct_scalar(node)):
            fault = "a lone surrogate, which is half of a character"
            raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
        return text


def _as_text(node: yaml.Node) -> None:
    """Have every number, true and false at or below the node read as the text that it is."""
    if isinstance(node, yaml.ScalarNode):
        node.tag = node.tag if node.tag.endswith(":null") else "tag:yaml.org,2002:str"
        return
    for part in node.value:
        for one in part if isinstance(part, tuple) else (part,):
            _as_text(one)


for _tag, _form in {
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?",
    "bool": "[tT]rue|[fF]alse",
    "null": "~|null|",
}.items():
    _pattern = re.compile(f"({_form})$")
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file or folder that replaces `path` once the block succeeds.

        with replacing(folder / "weights.safetensors") as part:
            save_file(tensors, part)

    After an exception nothing has changed, so a reader never finds half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}-{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            advice = f"{error.strerror}; make room and start it again: what is whole is kept"
            raise OSError(errno.ENOSPC, advice, str(path)) from None
        raise
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write a file whole or not at all, text as UTF-8; return its path."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def record(texts: str, **others: Any) -> type[BaseModel]:
    """Return the type of records with these fields and no more, texts but for the others."""
    fields = dict.fromkeys(texts.split(), StrictStr) | others
    return create_model("record", __config__=ConfigDict(extra="forbid"), **fields)


def read_yaml(path: Path, kind: Any = dict[str, Any]) -> Any:
    """Read a YAML file of one mapping of names to values, or nothing, as `kind`; or InputError."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=StrictLoader)
    except FileNotFoundError:
        hint = nearest(path.stem, (other.stem for other in path.parent.glob("*.yaml")))
        raise InputError(f"{path}: no such file{hint}") from None
    except Exception as error:  # PyYAML fails at a value in as many ways as there are types
        start = getattr(error, "problem_mark", None)
        place = f", line {start.line + 1}" if start else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{place}: not valid YAML: {problem}") from None
    with located(f"{path}"):
        return TypeAdapter(kind).validate_python({} if content is None else content)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
