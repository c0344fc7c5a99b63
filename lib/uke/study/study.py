"""Runs a study unit by unit: ask before, edit, ask after, score, append rows; a unit that has fresh rows is skipped."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from uke.data.edits import Edit, Probe
from uke.errors import Diverged, InputError
from uke.methods.edited import edited, edited_each, lane_mib
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import by_window, locate
from uke.methods.method import EditRecord, Method
from uke.methods.recipes import BASELINES
from uke.models.generate import AnswerCache, Generation
from uke.models.model import blocks, fingerprint, load
from uke.results import rows
from uke.results.metrics import METRICS, Encoder, load_encoder
from uke.results.rows import shortened
from uke.study.dataset import Dataset, batched
from uke.study.memory import Peak, Thrift, free_mib
from uke.study.pretraining import CARD, card
from uke.study.score import ask, beside, room

logger = logging.getLogger(__name__)

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit


class Unit(NamedTuple):
    """A batch of edits under a method in a study: the name of its rows' file, the edits, what every row says, whether there are rows."""

    key: str
    edits: tuple[Edit, ...]
    said: dict[str, Any]
    done: bool


class Subject:
    """The model under study, by name or already loaded: loaded when it is first needed (see `measure_world`)."""

    def __init__(self, model: str | tuple[nn.Module, PreTrainedTokenizerBase]) -> None:
        self.name = model if isinstance(model, str) else model[0].config.name_or_path
        if not isinstance(model, str):
            self.loaded = model

    @cached_property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load(self.name)
        measure_world(model, tokenizer)
        return model, tokenizer


Written = tuple[
    tuple[Unit, ...], list[pd.DataFrame]
]  # a batch's unit in each study that asks, and the rows of each


@dataclass
class Study:
    """One study of one model, by name or loaded, on one dataset.

    `windows`: the target's log-probability is read before and after every edit, by windows of so many tokens. `chat` False asks
    every probe through a raw prompt, before and after. `lanes`: so many single edits at most are written side by side.
    """

    name: str
    dataset: Dataset
    subject: "Subject | str | tuple[nn.Module, PreTrainedTokenizerBase]" = "embedded"
    similarity: bool = True
    max_new_tokens: int = 160
    windows: int | None = None
    chat: bool | None = None
    lanes: int = 16
    units: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Subject):
            self.subject = Subject(self.subject)

    @property
    def model(self) -> nn.Module:
        return self.subject.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.subject.loaded[1]

    @property
    def labels(self) -> dict[str, str]:
        """What stands in every row."""
        return {"split": self.dataset.split}

    @property
    def paths(self) -> rows.Paths:
        return self.dataset.paths

    @cached_property
    def encoder(self) -> Encoder | None:
        return load_encoder() if self.similarity else None

    @cached_property
    def thrift(self) -> Thrift:
        """How its trainings take less memory, since it ran out."""
        return Thrift(self.model)

    @cached_property
    def mark(self) -> str:
        """16 hex digits of what decides an answer beside the edit: weights, tokenizer, template, precision."""
        said = [
            fingerprint(self.model),
            self.tokenizer.chat_template,
            sorted(self.tokenizer.get_vocab().items()),
            str(self.model.dtype),
        ]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def unchanged(self) -> bool:
        """Whether the model still is bit for bit what it was before the first edit."""
        before = self.mark
        del self.mark  # so that it is taken anew
        return self.mark == before

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        asked = {} if self.chat is None else {"chat": self.chat}
        return (
            self.labels
            | asked
            | {"tokens": self.max_new_tokens, "similarity": self.encoder is not None}
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device."""
        marks = {
            "model": self.mark,
            "data": self.dataset.fingerprint,
            "code": rows.code_fingerprint(),
        }
        return marks | {
            "device": str(self.model.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def smoke_run(self) -> bool:
        """Whether model and data do not belong together, so that scores show the machinery and no more."""
        return world_of(self.model) != self.dataset.world_seed

    def run(
        self,
        method: Method,
        batch_size: int = 1,
        limit: int | None = None,
        also: Sequence["Study"] = (),
        **labels: Any,
    ) -> None:
        """Write rows for every batch of the first `limit` edits under this method, each written into the unedited weights.

        The studies `also` ask what is written here in another way and keep rows of their own. Rows that this run has of the
        same work, under whatever labels, are taken over. Single edits that diverge have no rows; Diverged names them when all
        others are done.
        """
        studies = (self, *also)
        method.examples(
            self.model, self.tokenizer, self.dataset.edits
        )  # an edit too long is said before any is written
        batches = zip(
            *[study.plan(method, batch_size, limit, labels) for study in studies], strict=True
        )
        todo = [units for units in batches if not all(unit.done for unit in units)]
        with tqdm(
            total=len(todo),
            desc=f"{self.name}: {method.name}",
            mininterval=5,
            disable=not todo or None,
        ) as bar:
            failed: dict[str, str] = {}
            while todo:
                group = todo[: self.abreast(method)] if batch_size == 1 else todo[:1]
                try:
                    frames, broken = self.write_in(method, group, also)
                except torch.OutOfMemoryError:
                    if not self.spare(method, len(group)):
                        raise
                    continue
                for units, found in frames:
                    for study, unit, frame in zip(studies, units, found, strict=True):
                        study.append(unit.key, frame.assign(**unit.said))
                failed |= broken
                bar.update(len(group))
                del todo[: len(group)]
        if failed:
            raise Diverged("; ".join(dict.fromkeys(failed.values())), failed)

    def plan(
        self, method: Method, batch_size: int, limit: int | None, labels: Mapping[str, Any]
    ) -> list[Unit]:
        """The units of every batch of the first `limit` edits, those taken over among them; `read` reads them from now on."""
        marks = {"model": self.mark, "data": self.dataset.fingerprint, "recipe": method.fingerprint}
        said = {
            "method": method.name,
            "batch_size": batch_size,
            "learning_rate": method.learning_rate,
            "seed": method.seed,
        }
        texts = method.depends_on(self.model)
        known, planned = rows.by_work(self.paths), []
        for number, batch in enumerate(batched(self.dataset.edits[:limit], batch_size)):
            choices = (
                self.conditions | {"batch": number, "size": batch_size, "texts": texts} | marks
            )
            work = rows.digest("work", windows=self.windows, **choices)
            key, columns = (
                f"{rows.unit_key(method.name, **choices, **labels)}-{work}",
                self.labels | labels | said | {"batch": number} | marks,
            )
            done = rows.done(self.paths, self.name, key, marks) or self.take_over(
                key, columns, known.get(work), marks
            )
            self.units.append(key)
            planned.append(Unit(key, tuple(batch), columns, done))
        return planned

    def take_over(
        self,
        unit: str,
        said: Mapping[str, Any],
        place: tuple[str, str] | None,
        marks: Mapping[str, str],
    ) -> bool:
        """Whether the study and unit at `place` have fresh rows, which are then written as this unit's."""
        if place is None or not rows.done(self.paths, *place, marks):
            return False
        found = rows.read(self.paths, place[0], units=[place[1]])
        self.append(unit, found.drop(columns=["study", "factor", "level"]).assign(**said))
        return True

    def abreast(self, method: Method) -> int:
        """How many single edits are written side by side: `lanes`, or as many as half of the free memory holds."""
        return max(
            1, int(min(self.lanes, free_mib(self.model.device) / 2 / lane_mib(self.model, method)))
        )

    def spare(self, method: Method, abreast: int) -> bool:
        """After an end of memory: from here on half as many side by side; one alone in a way that takes less; False where none is left."""
        if abreast > 1:
            self.lanes, said = (
                abreast // 2,
                f"{abreast} edits side by side; going on with {abreast // 2}",
            )
        elif way := self.thrift.more():
            said = f"activations kept; from here on {way}"
        else:
            return False
        logger.warning("%s: %s: out of memory with %s", self.name, method.name, said)
        return True

    def attempt(
        self,
        method: Method,
        batch_size: int = 1,
        limit: int | None = None,
        also: Sequence["Study"] = (),
        **labels: Any,
    ) -> str | None:
        """`run`, for a trial that may come to nothing: what went wrong, or None; a failed trial has no rows to read."""
        asked = [(study, len(study.units)) for study in (self, *also)]
        try:
            self.run(method, batch_size, limit, also, **labels)
        except (FloatingPointError, InputError) as error:
            for study, count in asked:
                del study.units[count:]
            return str(error)
        return None

    def write_in(
        self, method: Method, group: Sequence[tuple[Unit, ...]], also: Sequence["Study"] = ()
    ) -> tuple[list[Written], dict[str, str]]:
        """Rows after one batch of edits, or after each of several single edits, and why others failed, by the edit's id.

        `group` has for each batch its unit in this study and in each of `also`. The model is as before when it returns.
        """
        edits = [edit for units in group for edit in units[0].edits]
        apart = len(group) > 1 or len(edits) == 1
        before, memory = (
            dict(zip([edit.id for edit in edits], self.by_window(edits))),
            Peak(self.model.device),
        )
        started = time.perf_counter()
        with (
            self.thrift.used(),
            (edited_each if apart else edited)(self.model, self.tokenizer, edits, method) as m,
        ):
            cost = {
                "train_seconds": (time.perf_counter() - started) / len(group),
                "peak_mib": (highest := memory.mib()) and highest / len(group),
            }
            records, failed = (
                (m.edit_records, m.failed)
                if apart
                else (dict.fromkeys([edit.id for edit in edits], m.edit_record), {})
            )
            records = {
                edit: replace(one, notes=[*one.notes, *self.thrift.notes])
                for edit, one in records.items()
            }
            written = [edit for edit in edits if edit.id in records]
            asked = [
                study.ask_after(m, written, len(group)).assign(**cost) for study in (self, *also)
            ]
            after = (
                {}
                if hasattr(m, "passages")
                else dict(zip([edit.id for edit in written], self.by_window(written)))
            )
        answered = [
            beside(frame, study.before) for study, frame in zip((self, *also), asked, strict=True)
        ]
        found = []
        for units in group:
            ids = [edit.id for edit in units[0].edits]
            if set(ids) <= set(records):
                course = (
                    records[ids[0]],
                    [(before[edit], after[edit]) for edit in ids if edit in after],
                )
                found.append(
                    (
                        units,
                        [
                            with_record(
                                frame[frame["edit"].isin(ids)].reset_index(drop=True), *course
                            )
                            for frame in answered
                        ],
                    )
                )
        return found, failed

    def ask_after(self, model: nn.Module, edits: Sequence[Edit], shares: int) -> pd.DataFrame:
        """Answers and scores while these edits are in the weights; the seconds are an equal share for each of so many units."""
        started = time.perf_counter()
        frame = self.ask(model, [probe for edit in edits for probe in self.dataset.probes[edit.id]])
        return frame.assign(phase="after", answer_seconds=(time.perf_counter() - started) / shares)

    def by_window(self, batch: Sequence[Edit]) -> list[list[float]]:
        """Of each edit, the mean log-probability (nats) of a token of each window of its answer; none where none is asked for."""
        if not self.windows:
            return []
        rule = BASELINES["anyedit_memit"].model_copy(update={"window": self.windows})
        return by_window(
            self.model, locate(self.model, rule.examples(self.model, self.tokenizer, batch), rule)
        )

    @cached_property
    def before(self) -> pd.DataFrame:
        """Answers of the unedited model to every probe, read from its rows or asked now; shared by all studies of a run."""
        marks = {"model": self.mark, "data": self.dataset.fingerprint, "recipe": None}
        unit = rows.unit_key(UNEDITED, edits=len(self.dataset.edits), **self.conditions, **marks)
        if not rows.done(self.paths, UNEDITED, unit, marks):
            started = time.perf_counter()
            frame = self.ask(
                self.model, self.dataset.every_probe, AnswerCache(self.paths.answers(self.mark))
            )
            frame = frame.assign(
                method=UNEDITED,
                batch=0,
                phase="before",
                answer_seconds=time.perf_counter() - started,
                **self.labels,
            )
            rows.append(self.paths, UNEDITED, unit, frame.assign(**marks))
        return rows.read(self.paths, UNEDITED, marks, units=[unit]).assign(
            before=lambda frame: frame["answer"]
        )

    def ask(
        self, model: nn.Module, probes: Sequence[Probe], known: AnswerCache | None = None
    ) -> pd.DataFrame:
        """Answers and scores against the reference: one row per probe, in order."""
        return ask(
            model,
            self.tokenizer,
            probes,
            Generation(self.room, self.chat, cache=known),
            self.encoder,
        )

    def room(self, probe: Probe) -> int:
        """Tokens an answer may have."""
        return room(
            probe, self.tokenizer, self.max_new_tokens, short=self.dataset.world_seed is not None
        )

    def append(self, unit: str, frame: pd.DataFrame) -> None:
        """Write one unit's rows; InputError naming the first edit of which a score is not finite."""
        finite = np.isfinite(frame[[name for name in METRICS if name != "similarity"]]).all(axis=1)
        finite &= np.isfinite(frame["log_probability"].fillna(0)) & np.isfinite(
            frame.get("change_norm", 0.0)
        )
        if not finite.all():
            first = frame[~finite].iloc[0]
            raise InputError(
                f"study {self.name}: {first['method']}, edit {first['edit']!r}, {first['kind']} {first['number']}: a score is not finite"
            )
        rows.append(self.paths, self.name, unit, frame)

    def read(self) -> pd.DataFrame:
        """The rows of every unit that `run` was asked for, and of no other; InputError where there is none."""
        if not self.units:
            raise InputError(f"study {self.name}: nothing was run, or every trial failed")
        return rows.read(self.paths, self.name, units=self.units)


def world_of(model: nn.Module) -> int | None:
    """The seed of the world that a model was made on, as its directory says; None for any other model."""
    made = Path(model.config.name_or_path) / CARD
    return card(made.parent)["settings"]["world_seed"] if made.is_file() else None


def measure_world(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a world's own model must keep under a locate-then-edit method, measured on that world where it is not yet."""
    if (seed := world_of(model)) is not None:
        covariance.measure(
            model, tokenizer, covariance.world_texts(seed), range(len(blocks(model)))
        )


def with_record(
    frame: pd.DataFrame, record: EditRecord, windows: Sequence[tuple] = ()
) -> pd.DataFrame:
    """The rows of one unit with what its edit record holds, the course of the training in the first of them."""
    norm = sum(record.change_norm.values()) / max(
        1, len(record.change_norm)
    )  # in context nothing changes
    course = {
        "stopped": record.stopped,
        "losses": record.losses,
        "norms": record.change_norm,
        "windows": windows,
    }
    frame = frame.assign(
        steps=record.steps, change_norm=norm, notes="; ".join(record.notes) or None
    )
    frame["curve"] = [json.dumps(shortened(course, 6))] + [None] * (len(frame) - 1)
    return frame
