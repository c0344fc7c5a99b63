"""Greedy answers of an unedited model, kept on disk by their prompt: asked once, whatever study or profile asks again."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from uke.errors import InputError
from uke.files import write_atomic

Prompt = tuple[int, ...]
Found = tuple[list[int], int]  # token ids of an answer, and how many it could have had


class Recall:
    """Answers of one model in a folder of its own: small JSON files, each written whole or not at all, never changed.

    So several processes may add to a folder at once. Whoever makes it sees to it that the folder's name says what
    decides an answer beside the prompt: weights, precision, code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _known(self) -> dict[Prompt, Found]:
        known: dict[Prompt, Found] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                found = {
                    tuple(map(int, prompt.split())): (list(map(int, ids)), int(limit))
                    for prompt, ids, limit in json.loads(path.read_text("utf-8"))
                }
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}: no file of answers ({error}); expected [prompt, ids, limit] each; delete it and they are asked again"
                ) from None
            _learn(known, found)
        return known

    def look(self, prompt: Prompt, limit: int) -> list[int] | None:
        """The answer of at most `limit` tokens, None where none is known that is as long: greedy answers begin alike."""
        ids, had = self._known.get(prompt, ([], -1))
        return ids[:limit] if had >= limit or len(ids) < had else None

    def add(self, found: Mapping[Prompt, Found]) -> None:
        """Keep these answers."""
        if not found:
            return
        _learn(self._known, found)
        content = json.dumps(
            [[" ".join(map(str, prompt)), ids, limit] for prompt, (ids, limit) in found.items()]
        ).encode()
        write_atomic(self.folder / f"{hashlib.sha256(content).hexdigest()[:16]}.json", content)


def _learn(known: dict[Prompt, Found], found: Mapping[Prompt, Found]) -> None:
    for prompt, (ids, limit) in found.items():
        if prompt not in known or known[prompt][1] < limit:
            known[prompt] = ids, limit
