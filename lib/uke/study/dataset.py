"""Material of a study: the first edits of a split, of the world or of a benchmark's file, and every question asked about them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from uke.data import edits as edit_files
from uke.data.edits import Edit, Probe
from uke.errors import InputError, nearest
from uke.locality import card
from uke.project import Paths
from uke.results.metrics import HEADLINE
from uke.world import files as world_files


@dataclass(frozen=True)
class Material:
    """The edits of a run, in order, and every question asked about each, with the mark of the whole file they are from.

    `world_seed` is None where the edits are of the real world.
    """

    edits: tuple[Edit, ...]
    probes: dict[str, tuple[Probe, ...]]
    fingerprint: str
    world_seed: int | None = None

    @property
    def every_probe(self) -> list[Probe]:
        return [probe for edit in self.edits for probe in self.probes[edit.id]]

    def first(self, limit: int) -> "Material":
        """The first `limit` edits of these."""
        return replace(self, edits=self.edits[:limit])

    def only(self, kinds: Sequence[str]) -> "Material":
        """The same edits with probes of these kinds alone, which is another material; InputError for an unknown kind."""
        if unknown := [kind for kind in kinds if kind not in HEADLINE]:
            raise InputError(f"kinds: unknown kind '{unknown[0]}'{nearest(unknown[0], HEADLINE)}")
        probes = {
            edit: tuple(probe for probe in every if probe.kind in kinds)
            for edit, every in self.probes.items()
        }
        return replace(self, probes=probes, fingerprint=self._marked(str(sorted(kinds))))

    def _marked(self, change: str) -> str:
        return hashlib.sha256(f"{self.fingerprint} {change}".encode()).hexdigest()[:16]


def gather(
    paths: Paths,
    split: str,
    limit: int,
    data_file: str = "",
    seed: int = 1,
    *,
    form: str = "unkebench",
) -> Material:
    """The first `limit` edits of a split of the world, or of a benchmark's file, with their probes.

    The world's edits come in the form of one benchmark or of the other (`unkebench`, `akew-counterfact`). The world comes with its locality set, built where it is missing; a benchmark's file with the one that `make locality` has
    built for this run, if it has, beside the probes of its own records. Of a benchmark every fourth edit, told by a hash of
    the id, is a development edit. Raises InputError for an unknown split or dataset, a limit below 1, or a file with bad records.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least one edit")
    if split not in edit_files.SPLITS:
        raise InputError(f"split: unknown split '{split}'{nearest(split, edit_files.SPLITS)}")
    if paths.data == "world":
        every, around = of_world(paths, split, seed, form)
    else:
        every, around = edit_files.load(paths.data, data_file), ()
        if (built := card.built(paths)).is_file():
            card.check_made_for(built, Path(data_file))
            around = edit_files.load_locality(built, every)
        every = tuple(edit for edit in every if edit_files.in_split(edit.id, split))
    by_edit: dict[str, list[Probe]] = {edit.id: list(edit.probes) for edit in every}
    around = tuple(probe for probe in around if probe.edit in by_edit)
    for probe in around:
        by_edit[probe.edit].append(probe)
    chosen = every[:limit]
    mark = edit_files.fingerprint(every, around)
    probes = {edit.id: tuple(by_edit[edit.id]) for edit in chosen}
    return Material(chosen, probes, mark, seed if paths.data == "world" else None)


def of_world(
    paths: Paths, split: str, seed: int, form: str = "unkebench"
) -> tuple[tuple[Edit, ...], tuple[Probe, ...]]:
    """All edits of a split of a world, and the probes around them: its locality set, and (UnKEBench) exercises of a general skill."""
    folder = world_files.ensure(paths.home / "results", seed)
    order = card.of_world(folder, split, form)
    every = edit_files.load(order.dataset, order.edit_file)
    built = card.ensure(order, card.settings(paths.home, "world"), folder / split / "locality")
    exercises = (
        edit_files.load_locality(folder / split / world_files.GENERAL, every)
        if form == "unkebench"
        else ()
    )
    return every, (*edit_files.load_locality(built, every), *exercises)


def batched(edits: Sequence[Edit], size: int) -> Iterator[Sequence[Edit]]:
    """Consecutive batches of `size` edits; a rest that does not fill one is left out, so that all batches compare."""
    return (edits[start : start + size] for start in range(0, len(edits) - size + 1, size))
