"""Runs a study unit by unit: ask before, edit, ask after, score, append rows; a unit that has fresh rows is skipped."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from uke import edits as edit_files
from uke import locality_files, moments, rows, world_files
from uke.asking import ask, beside, room
from uke.editing import edited
from uke.edits import Edit, Probe
from uke.errors import InputError, nearest
from uke.metrics import HEADLINE, METRICS, Encoder, load_encoder
from uke.finetune import prepare
from uke.locate import by_window, locate
from uke.memory import Peak
from uke.methods import Method
from uke.models import blocks, fingerprint, load
from uke.peers import PEERS, Peer
from uke.pretraining import CARD, card

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit


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
        probes = {edit: tuple(probe for probe in every if probe.kind in kinds) for edit, every in self.probes.items()}
        return replace(self, probes=probes, fingerprint=self._marked(str(sorted(kinds))))

    def _marked(self, change: str) -> str:
        return hashlib.sha256(f"{self.fingerprint} {change}".encode()).hexdigest()[:16]


def gather(paths: rows.Paths, split: str, limit: int, data_file: str = "", seed: int = 1) -> Material:
    """The first `limit` edits of a split of the world, or of a benchmark's file, with their probes.

    The world comes with its locality set, built where it is missing; a benchmark's file with the one that `make locality` has
    built for this run, if it has, beside the probes of its own records. Of a benchmark every fourth edit, told by a hash of
    the id, is a development edit. Raises InputError for an unknown split or dataset, a limit below 1, or a file with bad records.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least one edit")
    if split not in edit_files.SPLITS:
        raise InputError(f"split: unknown split '{split}'{nearest(split, edit_files.SPLITS)}")
    if paths.data == "world":
        every, around = of_world(paths, split, seed)
    else:
        every, around = edit_files.load(paths.data, data_file), ()
        if (built := locality_files.built(paths)).is_file():
            locality_files.check_made_for(built, Path(data_file))
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


def of_world(paths: rows.Paths, split: str, seed: int) -> tuple[tuple[Edit, ...], tuple[Probe, ...]]:
    """All edits of a split of a world, and the probes around them: its locality set, and exercises of a general skill."""
    folder = world_files.ensure(paths.home / "results", seed)
    order = locality_files.of_world(folder, split)
    every = edit_files.load(order.dataset, order.edit_file)
    built = locality_files.ensure(order, locality_files.settings(paths.home, "world"), folder / split / "locality")
    exercises = edit_files.load_locality(folder / split / world_files.GENERAL, every)
    return every, (*edit_files.load_locality(built, every), *exercises)


@dataclass
class Study:
    """One study of one model on one material; `labels` (split and the like) stand in every row it writes.

    `windows`: the target's log-probability is read before and after every edit, by windows of so many tokens.
    """

    name: str
    paths: rows.Paths
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    material: Material
    encoder: Encoder | None = None
    max_new_tokens: int = 160
    windows: int | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    units: list[str] = field(default_factory=list, init=False)

    @classmethod
    def start(cls, name: str, paths: rows.Paths, model: str, material: Material, **more: Any) -> "Study":
        """A study on the model of this name or directory, scored with the sentence encoder where there is one.

        What the embedded model must keep under a locate-then-edit method is measured on its own world where it is not yet.
        """
        loaded, tokenizer = load(model)
        if model == "embedded":
            moments.measure(loaded, tokenizer, moments.world_texts(), range(len(blocks(loaded))))
        return cls(name, paths, loaded, tokenizer, material, **(more if "encoder" in more else {"encoder": load_encoder(), **more}))

    @cached_property
    def mark(self) -> str:
        """16 hex digits of what decides an answer beside the edit: weights, tokenizer, template, precision."""
        said = [fingerprint(self.model), self.tokenizer.chat_template, sorted(self.tokenizer.get_vocab().items()), str(self.model.dtype)]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        return self.labels | {"tokens": self.max_new_tokens, "similarity": self.encoder is not None}

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device."""
        marks = {"model": self.mark, "data": self.material.fingerprint, "code": rows.code_fingerprint()}
        return marks | {"device": str(self.model.device), "torch": torch.__version__, "transformers": transformers.__version__}

    def wiring_only(self) -> bool:
        """Whether model and data do not belong together, so that scores show the machinery and no more."""
        made = Path(self.model.config.name_or_path) / CARD
        knows = card(made.parent)["settings"]["world_seed"] if made.is_file() else None
        return knows != self.material.world_seed

    def run(self, method: Method, batch_size: int = 1, limit: int | None = None, **labels: Any) -> None:
        """Write rows for every batch of the first `limit` edits under this method, each written into the unedited weights."""
        choices = self.labels | labels | {"batch_size": batch_size, "learning_rate": method.learning_rate, "seed": method.seed}
        marks = {"model": self.mark, "data": self.material.fingerprint, "recipe": method.fingerprint}
        kept = moments.digest(self.model) if isinstance(method, Peer) else None
        prepare(self.model, self.tokenizer, self.material.edits, method)  # an edit too long is said before any is written
        todo = []
        for number, batch in enumerate(batched(self.material.edits[:limit], batch_size)):
            unit = rows.unit_key(method.name, batch=number, size=batch_size, texts=kept, **self.conditions, **labels, **marks)
            self.units.append(unit)
            if not rows.done(self.paths, self.name, unit, marks):
                todo.append((number, batch, unit))
        for number, batch, unit in tqdm(todo, desc=f"{self.name}: {method.name}", mininterval=5) if todo else ():
            frame = self.write_in(method, batch)
            self.append(unit, frame.assign(method=method.name, batch=number, **choices, **marks))

    def attempt(self, method: Method, batch_size: int = 1, limit: int | None = None, **labels: Any) -> str | None:
        """`run`, for a trial that may come to nothing: what went wrong, or None; a failed trial has no rows to read."""
        asked = len(self.units)
        try:
            self.run(method, batch_size, limit, **labels)
        except (FloatingPointError, InputError) as error:
            del self.units[asked:]
            return str(error)
        return None

    def write_in(self, method: Method, batch: Sequence[Edit]) -> pd.DataFrame:
        """Rows after one batch of edits, the course of the training in the first; the model is as before when it returns."""
        probes = [probe for edit in batch for probe in self.material.probes[edit.id]]
        before, memory = self.by_window(batch), Peak(self.model.device)
        started = time.perf_counter()
        with edited(self.model, self.tokenizer, batch, method) as m:
            record, highest, between = m.edit_record, memory.mib(), time.perf_counter()
            frame = self.ask(m, probes)
            seconds = {"train_seconds": between - started, "answer_seconds": time.perf_counter() - between}
            windows = [] if hasattr(m, "passages") else list(zip(before, self.by_window(batch), strict=True))
        norm = sum(record.change_norm.values()) / max(1, len(record.change_norm))  # in context nothing changes
        course = {"stopped": record.stopped, "losses": record.losses, "norms": record.change_norm, "windows": windows}
        frame = beside(frame, self.before).assign(phase="after", steps=record.steps, change_norm=norm, peak_mib=highest, **seconds)
        frame["course"] = [json.dumps(_short(course))] + [None] * (len(frame) - 1)
        return frame.assign(notes="; ".join(record.notes) or None)

    def by_window(self, batch: Sequence[Edit]) -> list[list[float]]:
        """Of each edit, the mean log-probability (nats) of a token of each window of its answer; none where none is asked for."""
        if not self.windows:
            return []
        rule = PEERS["anyedit_memit"].model_copy(update={"window": self.windows})
        return by_window(self.model, locate(self.model, prepare(self.model, self.tokenizer, batch, rule), rule))

    @cached_property
    def before(self) -> pd.DataFrame:
        """Answers of the unedited model to every probe, read from its rows or asked now; shared by all studies of a run."""
        marks = {"model": self.mark, "data": self.material.fingerprint, "recipe": None}
        unit = rows.unit_key(UNEDITED, edits=len(self.material.edits), **self.conditions, **marks)
        if not rows.done(self.paths, UNEDITED, unit, marks):
            started = time.perf_counter()
            frame = self.ask(self.model, self.material.every_probe)
            frame = frame.assign(method=UNEDITED, batch=0, phase="before", answer_seconds=time.perf_counter() - started, **self.labels)
            rows.append(self.paths, UNEDITED, unit, frame.assign(**marks))
        return rows.read(self.paths, UNEDITED, marks, units=[unit]).assign(before=lambda frame: frame["answer"])

    def ask(self, model: nn.Module, probes: Sequence[Probe]) -> pd.DataFrame:
        """Answers and scores against the reference: one row per probe, in order."""
        return ask(model, self.tokenizer, probes, self.room, self.encoder)

    def room(self, probe: Probe) -> int:
        """Tokens an answer may have."""
        return room(probe, self.tokenizer, self.max_new_tokens, short=self.material.world_seed is not None)

    def append(self, unit: str, frame: pd.DataFrame) -> None:
        """Write one unit's rows; InputError naming the first edit of which a score is not finite."""
        finite = np.isfinite(frame[[name for name in METRICS if name != "similarity"]]).all(axis=1)
        finite &= np.isfinite(frame["log_probability"].fillna(0)) & np.isfinite(frame.get("change_norm", 0.0))
        if not finite.all():
            first = frame[~finite].iloc[0]
            raise InputError(f"study {self.name}: {first['method']}, edit {first['edit']!r}, {first['kind']} {first['number']}: a score is not finite")
        rows.append(self.paths, self.name, unit, frame)

    def read(self) -> pd.DataFrame:
        """The rows of every unit that `run` was asked for, and of no other; InputError where there is none."""
        if not self.units:
            raise InputError(f"study {self.name}: nothing was run, or every trial failed")
        return rows.read(self.paths, self.name, units=self.units)


def _short(value: Any) -> Any:
    """Numbers with six digits, however deep they lie."""
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def batched(edits: Sequence[Edit], size: int) -> Iterator[Sequence[Edit]]:
    """Consecutive batches of `size` edits; a rest that does not fill one is left out, so that all batches compare."""
    return (edits[start : start + size] for start in range(0, len(edits) - size + 1, size))


def compared(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Headline scores of every method with those of the unedited model under the name `before the edit`.

    Locality before the edit is 1 by definition. Columns: method, edit, kind, score.
    """
    start = rows.headline(before, phase="before").assign(method="before the edit")
    return pd.concat([rows.headline(after), start])[["method", "edit", "kind", "score"]]


def leading(averages: pd.DataFrame, batch_size: int, count: int) -> set[tuple[str, str]]:
    """Method and level of the `count` levels of each method with the best mean score at a batch size."""
    means = averages[averages["batch_size"] == batch_size].groupby(["method", "level"])["score"].mean()
    return {place for _, own in means.groupby("method") for place in own.nlargest(count).index}
