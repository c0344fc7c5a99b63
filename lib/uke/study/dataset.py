"""The dataset of a study: the first edits of a split of the world or a benchmark, with probes."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from uke.data import formats
from uke.data.edits import SPLITS, Edit, Probe, fingerprint, in_split
from uke.data.formats import load_locality
from uke.errors import InputError, nearest
from uke.locality import card
from uke.project import Paths
from uke.results import control, rows
from uke.world import files as world_files

NO_TEXT = "not in the repository"


@dataclass(frozen=True)
class Dataset:
    """The edits of a run, in order, and the probes of each by the edit's id.

    `fingerprint` is that of all edits and probes of the split, so that a run of more edits adds
    rows to those of fewer. `paths`: where the run reads and writes. `world_seed` is None where the
    edits are of the real world.
    """

    edits: tuple[Edit, ...]
    probes: dict[str, tuple[Probe, ...]]
    fingerprint: str
    paths: Paths
    split: str = "test"
    world_seed: int | None = None

    @property
    def every_probe(self) -> list[Probe]:
        return [probe for edit in self.edits for probe in self.probes[edit.id]]

    def first(self, limit: int | None) -> "Dataset":
        """Return the first `limit` edits (None: all) with their probes."""
        return replace(self, edits=self.edits[:limit])

    def only(self, kinds: Sequence[str]) -> "Dataset":
        """Return the same edits with probes of these kinds alone, a dataset of its own."""
        probes = {
            edit: tuple(probe for probe in every if probe.kind in kinds)
            for edit, every in self.probes.items()
        }
        changed = hashlib.sha256(f"{self.fingerprint} {sorted(kinds)}".encode()).hexdigest()[:16]
        return replace(self, probes=probes, fingerprint=changed)

    def cut(self, tokens: int, tokenizer: Any = None) -> "Dataset":
        """Return the edits with their first words of at most so many tokens, and their own question
        alone: a dataset of other edits.

        Without a tokenizer answers stay whole, which is enough for committed rows.
        """
        edits = [
            Edit(
                id=f"{edit.id}.{tokens}",
                question=edit.question,
                answer=_first_words(edit.answer, tokens, tokenizer),
            )
            for edit in self.edits
        ]
        changed = hashlib.sha256(f"{self.fingerprint} {tokens} tokens".encode()).hexdigest()[:16]
        probes = {edit.id: edit.probes for edit in edits}
        return replace(self, edits=tuple(edits), probes=probes, fingerprint=changed)


def _first_words(text: str, tokens: int, tokenizer: Any) -> str:
    """Return as many words of a text as have at most so many tokens, at least one."""
    if tokenizer is None:
        return text
    parts = [text[: word.end()] for word in re.finditer(r"\S+", text)]

    def length(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False)["input_ids"])

    return parts[max(bisect_right(parts, tokens, key=length), 1) - 1]


def load(
    profile: str,
    data: str = "world",
    split: str = "test",
    limit: int | None = None,
    data_file: str = "",
    world_seed: int = 1,
    *,
    form: str = "unkebench",
) -> Dataset:
    """Load the first `limit` edits (None: all) of a split, with their probes.

        edits = dataset.load("quick", limit=4)  # four test edits of world 1
        edits = dataset.load("quick", "unkebench", "test", 4, "UnKE.json")

    The world's edits come in the format of a benchmark (`form`: `unkebench`, `akew-counterfact`)
    and with their locality set, which is built where it is missing. A benchmark's file comes with
    the set that `make locality` has built for this run, if any, beside the probes of its records;
    a model of the real world has such a set of its own for the world's edits too.
    With UKE_ROWS=committed a benchmark's edits are those of the committed rows, without texts: so
    its figures are drawn again where its file is not.
    InputError for an unknown split or benchmark, a limit below 1, or a file with bad records.
    """
    paths = Paths(profile, data)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least one edit")
    if split not in SPLITS:
        raise InputError(f"split: unknown split '{split}'{nearest(split, SPLITS)}")
    if data != "world" and rows.use_committed():
        return _of_rows(paths, split).first(limit)
    if data == "world":
        folder = world_files.ensure(paths.home / "results", world_seed)
        order = card.of_world(folder, split, form)
        edits, edit_file = formats.load(order.dataset, order.edit_file), order.edit_file
    else:
        edits, edit_file = formats.load(data, data_file), Path(data_file)
        edits = tuple(edit for edit in edits if in_split(edit.id, split))
    built, locality = card.built(paths, split, form), ()
    if built.is_file():
        most = card.check_made_for(built, edit_file)
        if most and len(edits[:limit]) > most:
            fault = f"{built}: it has the first {most} edits of a split, not {len(edits[:limit])}"
            raise InputError(f"{fault}; make it again with `make locality` and a larger LIMIT")
        locality = load_locality(built, edits[:most])
    elif data == "world":
        settings = card.settings(paths.home, "world")
        built = card.ensure(order, settings, folder / split / "locality")
        locality = load_locality(built, edits)
    if data == "world" and form == "unkebench":
        locality += load_locality(folder / split / world_files.GENERAL, edits)
    probes: dict[str, list[Probe]] = {edit.id: list(edit.probes) for edit in edits}
    for probe in locality:
        probes[probe.edit].append(probe)
    return Dataset(
        edits[:limit],
        {edit: tuple(every) for edit, every in probes.items()},
        fingerprint(edits, locality),
        paths,
        split,
        world_seed if data == "world" else None,
    )


def _of_rows(paths: Paths, split: str) -> Dataset:
    """Return the edits and probes that committed rows are of, in their order, without texts."""
    folder = paths.exported(control.STUDY).parent  # a control's own edits are cut
    names = [path.stem for path in sorted(folder.glob("*.parquet")) if path.stem != control.STUDY]
    frames = [rows.committed(paths, name, None) for name in names]
    found = [frame[frame["split"] == split] for frame in frames]
    if not any(map(len, found)):
        raise InputError(f"{folder}: no rows of {split} edits; run {paths.command('07_recipe')}")
    every = pd.concat(found).sort_values(["batch_size", "batch"], kind="stable")
    probes: dict[str, tuple[Probe, ...]] = dict.fromkeys(every["edit"], ())
    asked = every[["edit", "kind", "number"]].drop_duplicates().sort_values(["kind", "number"])
    for row in asked.to_dict("records"):
        probes[row["edit"]] += (Probe(**row, question=NO_TEXT, reference=NO_TEXT),)
    edits = tuple(Edit(id=edit, question=NO_TEXT, answer=NO_TEXT) for edit in probes)
    return Dataset(edits, probes, every["data"].iloc[0], paths, split)
