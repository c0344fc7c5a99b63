"""Run a study unit by unit: answer, edit, answer again, score, store rows.

A unit (a batch of edits under a method) that has rows is not run again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
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
from uke.methods.method import EditRecord, Method
from uke.models.generate import AnswerCache, Generation
from uke.models.model import blocks, fingerprint, load
from uke.project import EMBEDDED, Paths, code_fingerprint, unit_key
from uke.results import rows
from uke.results.metrics import METRICS, Encoder, load_encoder
from uke.study.committed import Committed, MissingRows
from uke.study.dataset import Dataset, batched
from uke.study.memory import Peak, checkpointed, free_mib
from uke.study.score import answer_and_score, token_limit, with_before
from uke.world.files import CARD, card

logger = logging.getLogger(__name__)

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit
CHECKPOINTED = "activations are computed again where no cache is read"


class Subject:
    """The model under study, by name or as a loaded pair; a name is loaded when first needed.

    `checkpointing`: trainings compute activations again, since memory ran out.
    """

    def __init__(self, model: str | tuple[nn.Module, PreTrainedTokenizerBase]) -> None:
        if isinstance(model, str):
            self.name = model
        else:
            self.name, self.loaded = model[0].config.name_or_path, model
        self.directory = EMBEDDED if self.name == "embedded" else Path(self.name)
        self.checkpointing = False

    @cached_property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load(self.name)
        measure_world(model, tokenizer)
        return model, tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides an answer, when first asked for."""
        return self.fingerprint_now()

    def fingerprint_now(self) -> str:
        model, tokenizer = self.loaded
        vocabulary = sorted(tokenizer.get_vocab().items())
        whole = repr([fingerprint(model), tokenizer.chat_template, vocabulary, str(model.dtype)])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def trainable(self) -> AbstractContextManager[None]:
        """Return the context in which its trainings fit into memory."""
        return checkpointed(self.loaded[0]) if self.checkpointing else nullcontext()

    @property
    def notes(self) -> list[str]:
        """What the record of an edit says of memory."""
        return [f"memory was short: {CHECKPOINTED}"] if self.checkpointing else []


class Unit(NamedTuple):
    """A batch of edits under a method: the name of its file, and what stands in every row."""

    key: str
    edits: tuple[Edit, ...]
    columns: dict[str, Any]


@dataclass
class Study:
    """One study of one model on one dataset, its rows stored unit by unit.

        study = Study("trial", dataset.load("quick", limit=4), "embedded")
        study.run(METHODS["FT-M"])
        scores = rows.average(rows.primary(study.read()))

    `subject`: a model's name, or model and tokenizer. `chat` False asks every probe through a raw
    prompt, before and after. `lanes`: at most so many single edits are written side by side; they
    are halved where memory runs out.

    With UKE_ROWS=committed in the environment `run` and `before` take their rows from the committed
    file of the study, whatever code wrote them, and no model is loaded.
    """

    name: str
    dataset: Dataset
    subject: Subject | str | tuple[nn.Module, PreTrainedTokenizerBase] = "embedded"
    similarity: bool = True
    max_new_tokens: int = 160
    chat: bool | None = None
    lanes: int = 16
    units: list[str] = field(default_factory=list, init=False)
    taken: list[pd.DataFrame] = field(default_factory=list, init=False)  # of committed rows

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Subject):
            self.subject = Subject(self.subject)
        self.committed = Committed(self.paths, self.name) if rows.use_committed() else None

    @property
    def model(self) -> nn.Module:
        return self.subject.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.subject.loaded[1]

    @property
    def paths(self) -> Paths:
        return self.dataset.paths

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells rows of this model and dataset from those of others."""
        return {"model": self.subject.fingerprint, "data": self.dataset.fingerprint}

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        similarity = self.similarity and encoder() is not None
        limits = {"tokens": self.max_new_tokens, "similarity": similarity}
        return {"split": self.dataset.split, "chat": self.chat} | limits

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device, versions."""
        if self.committed:
            made = self.committed.fingerprints | {"device": "none: drawn from committed rows"}
        else:
            made = self.fingerprints | {"code": code_fingerprint()}
            made["device"] = str(self.model.device)
        return made | {"torch": torch.__version__, "transformers": transformers.__version__}

    def smoke_run(self) -> bool:
        """Whether the model does not know this data's world, so that scores say nothing."""
        return world_of(self.subject.directory) != self.dataset.world_seed

    def unchanged(self) -> bool:
        """Whether every weight of the model is as it was before the first edit."""
        return bool(self.committed) or self.subject.fingerprint_now() == self.subject.fingerprint

    def run(
        self,
        method: Method,
        batch_size: int = 1,
        limit: int | None = None,
        factor: str | None = None,
        level: str | None = None,
    ) -> None:
        """Store rows for every batch of the first `limit` edits, each written on its own.

        Units with rows are skipped. Single edits that diverge have no rows; Diverged names them
        when all others are done.
        """
        batches = list(batched(self.dataset.edits[:limit], batch_size))
        labels = {"method": method.name, "factor": factor, "level": level}
        labels |= {"batch_size": batch_size, "split": self.dataset.split}
        if self.committed:
            self.taken.append(self.committed.take(labels, dict(enumerate(batches))))
            return
        fingerprints = self.fingerprints | {"recipe": method.fingerprint}
        labels |= fingerprints | {"learning_rate": method.learning_rate, "seed": method.seed}
        work = self.conditions | labels | {"texts": method.depends_on(self.model)}
        units = [
            Unit(unit_key(batch=index, **work), edits, labels | {"batch": index})
            for index, edits in enumerate(batches)
        ]
        place = self.paths, self.name
        todo = [unit for unit in units if not rows.done(*place, unit.key, fingerprints)]
        if todo:  # an edit too long is reported before any is written
            method.examples(self.model, self.tokenizer, self.dataset.edits)
        self.units += [unit.key for unit in units]
        failed: dict[str, str] = {}
        name = f"{self.name}: {method.name}"
        with tqdm(total=len(todo), desc=name, mininterval=5, disable=not todo or None) as bar:
            while todo:
                group = todo[: self.lanes_at_once(method)] if batch_size == 1 else todo[:1]
                try:
                    frames, diverged = self.write(method, group)
                except torch.OutOfMemoryError:
                    if not self.take_less_memory(method, len(group)):
                        raise
                    continue
                for unit, frame in frames:
                    self.append(unit.key, frame.assign(**unit.columns))
                failed |= diverged
                bar.update(len(group))
                del todo[: len(group)]
        if failed:
            raise Diverged("; ".join(dict.fromkeys(failed.values())), failed)

    def attempt(self, method: Method, *options: Any, **labels: Any) -> str | None:
        """Like `run`, but return the error message of a trial that fails (None on success).

        A failed trial contributes no rows to `read`. Committed rows that are missing still raise.
        """
        count = len(self.units)
        try:
            self.run(method, *options, **labels)
        except MissingRows:
            raise
        except (FloatingPointError, InputError) as error:
            del self.units[count:]
            return str(error)
        return None

    def lanes_at_once(self, method: Method) -> int:
        """Return how many single edits are written at once: at most what fits half of memory."""
        fitting = free_mib(self.model.device) / 2 / lane_mib(self.model, method)
        return max(1, int(min(self.lanes, fitting)))

    def take_less_memory(self, method: Method, at_once: int) -> bool:
        """Halve the edits written at once, or enable checkpointing; False where both are done."""
        if at_once > 1:
            self.lanes = at_once // 2
            change = f"{at_once} edits side by side; going on with {self.lanes}"
        elif not self.subject.checkpointing:
            self.subject.checkpointing = True
            change = f"all activations stored; from here on {CHECKPOINTED}"
        else:
            return False
        logger.warning("%s: %s: out of memory with %s", self.name, method.name, change)
        return True

    def write(
        self, method: Method, group: Sequence[Unit]
    ) -> tuple[list[tuple[Unit, pd.DataFrame]], dict[str, str]]:
        """Write one batch of edits, or several single edits side by side, and score all probes.

        Returns the rows of each unit, and why others failed, by the edit's id. Seconds and memory
        are equal shares.
        """
        edits = [edit for unit in group for edit in unit.edits]
        alone, share = len(group[0].edits) == 1, 1 / len(group)
        before, write = self.before, edited_each if alone else edited  # answered without any edit
        peak, started = Peak(self.model.device), time.perf_counter()
        with self.subject.trainable(), write(self.model, self.tokenizer, edits, method) as m:
            cost = {"train_seconds": (time.perf_counter() - started) * share}
            cost["peak_mib"] = (highest := peak.mib()) and highest * share
            ids = [edit.id for edit in edits]
            records = m.edit_records if alone else dict.fromkeys(ids, m.edit_record)
            failed = m.failed if alone else {}
            written = [self.dataset.probes[edit] for edit in ids if edit in records]
            frame = self.scored(m, list(chain(*written)), before, share).assign(**cost)
        frames = []
        for unit in group:
            if record := records.get(unit.edits[0].id):
                record = replace(record, notes=[*record.notes, *self.subject.notes])
                own = frame["edit"].isin([edit.id for edit in unit.edits])
                frames.append((unit, with_record(frame[own].reset_index(drop=True), record)))
        return frames, failed

    def scored(
        self, m: nn.Module, probes: Sequence[Probe], before: pd.DataFrame, share: float = 1
    ) -> pd.DataFrame:
        """Return the rows of an edited model on these probes, with a share of the seconds."""
        started = time.perf_counter()
        frame = with_before(self.answer_and_score(m, probes), before)
        return frame.assign(phase="after", answer_seconds=(time.perf_counter() - started) * share)

    @cached_property
    def before(self) -> pd.DataFrame:
        """The unedited model's answers to every probe with their scores, shared in a run."""
        if self.committed:
            return self.committed.before(self.dataset.every_probe)
        fingerprints = self.fingerprints | {"recipe": None}
        conditions = self.conditions | {"edits": len(self.dataset.edits)}
        unit = unit_key(UNEDITED, **conditions, **fingerprints)
        if not rows.done(self.paths, UNEDITED, unit, fingerprints):
            started = time.perf_counter()
            known = AnswerCache(self.paths.answers(self.fingerprints["model"]))
            frame = self.answer_and_score(self.model, self.dataset.every_probe, known)
            frame = frame.assign(
                method=UNEDITED,
                batch=0,
                phase="before",
                split=self.dataset.split,
                answer_seconds=time.perf_counter() - started,
                **fingerprints,
            )
            rows.append(self.paths, UNEDITED, unit, frame)
        return rows.read(self.paths, UNEDITED, [unit]).assign(before=lambda frame: frame["answer"])

    def answer_and_score(
        self, model: nn.Module, probes: Sequence[Probe], known: AnswerCache | None = None
    ) -> pd.DataFrame:
        """Answer the probes and score them against the reference: one row per probe, in order."""
        options = Generation(self.token_limit, self.chat, cache=known)
        scorer = encoder() if self.similarity else None
        return answer_and_score(model, self.tokenizer, probes, options, scorer)

    def token_limit(self, probe: Probe) -> int:
        """Return the tokens an answer may have."""
        short = self.dataset.world_seed is not None
        return token_limit(probe, self.tokenizer, self.max_new_tokens, short)

    def append(self, unit: str, frame: pd.DataFrame) -> None:
        """Store one unit's rows; InputError naming the first probe with a score not finite."""
        needed = [*(name for name in METRICS if name != "similarity"), "change_norm"]
        likely = frame["log_probability"].fillna(0)
        finite = np.isfinite(frame[needed].assign(likely=likely)).all(axis=1)
        for row in frame[~finite].itertuples():
            probe = f"edit {row.edit!r}, {row.kind} {row.number}"
            raise InputError(f"study {self.name}: {row.method}, {probe}: a score is not finite")
        rows.append(self.paths, self.name, unit, frame)

    def read(self) -> pd.DataFrame:
        """Return the rows of every unit that `run` was asked for; InputError for none."""
        if not self.units and not self.taken:
            raise InputError(f"study {self.name}: nothing was run, or every trial failed")
        if self.committed:
            found = pd.concat(self.taken)
            return found[~found.index.duplicated()].reset_index(drop=True)  # asked for twice
        return rows.read(self.paths, self.name, self.units)

    def export(self, frame: pd.DataFrame) -> Path:
        """Write the committed rows: `frame` (what `read` gives) and the unedited model's."""
        if self.committed:
            return self.paths.exported(self.name)
        return rows.export(self.paths, self.name, pd.concat([frame, self.before]))


@cache
def encoder() -> Encoder | None:
    """Load the sentence encoder, once for all studies; None where it is not installed."""
    transformers.utils.logging.disable_progress_bar()  # no bars of weights in a notebook
    return load_encoder()


def world_of(directory: str | Path) -> int | None:
    """Return the seed of the world that a model was trained on; None for any other model."""
    directory = Path(directory)
    return card(directory)["settings"]["world_seed"] if (directory / CARD).is_file() else None


def measure_world(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure the key covariance of a world's own model on that world, if it is not yet."""
    if (seed := world_of(model.config.name_or_path)) is not None:
        texts = covariance.world_texts(seed)
        covariance.measure(model, tokenizer, texts, range(len(blocks(model))))


def with_record(frame: pd.DataFrame, record: EditRecord) -> pd.DataFrame:
    """Add an edit's record to the rows of one unit, its loss curve to the first of them."""
    norms = record.change_norm
    curve = {"losses": record.losses, "norms": norms}
    text = json.dumps(rows.shortened(curve, 6))
    return frame.assign(
        steps=record.steps,
        change_norm=sum(norms.values()) / max(1, len(norms)),  # in context nothing changes
        notes="; ".join(record.notes) or None,
        curve=[text] + [None] * (len(frame) - 1),
    )
