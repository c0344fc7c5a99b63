"""Run a study unit by unit: answer, edit, answer again, score, store rows.

A unit (a batch of edits under a method) that has rows is not run again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from uke.data.documents import gather, reserved
from uke.data.edits import AVERAGE, Edit, Probe
from uke.data.find import find_files
from uke.errors import Diverged, InputError
from uke.locality.build import question_for
from uke.methods.edited import edited, edited_each, lane_mib
from uke.methods.locate_edit import covariance
from uke.methods.method import EditRecord, Method
from uke.models.divergence import Expected, divergences, expected
from uke.models.generate import AnswerCache, Generation
from uke.models.model import blocks, fingerprint, load
from uke.project import Paths, code_fingerprint, unit_key
from uke.results import compare, rows
from uke.results.metrics import Encoder, load_encoder
from uke.study.committed import Committed
from uke.study.dataset import Dataset
from uke.study.memory import Peak, free_mib
from uke.study.score import COMPARED, answer_and_score, leakages, token_limit, with_before
from uke.world.files import world_of

logger = logging.getLogger(__name__)

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit


class Subject:
    """The model under study, by name or as a loaded pair; a name is loaded when first needed."""

    def __init__(self, model: str | tuple[nn.Module, PreTrainedTokenizerBase]) -> None:
        self.name = model if isinstance(model, str) else model[0].config.name_or_path
        if not isinstance(model, str):
            self.loaded = model

    @cached_property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load(self.name)
        measure_world(model, tokenizer)
        return model, tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, for which no weights are read."""
        loaded = "loaded" in vars(self)
        return (self.loaded if loaded else load(self.name, device="meta"))[1]

    def fingerprint(self) -> str:
        """Return 16 hex digits of all that decides an answer, as it is now."""
        model, tokenizer = self.loaded
        vocabulary = sorted(tokenizer.get_vocab().items())
        whole = repr([fingerprint(model), tokenizer.chat_template, vocabulary, str(model.dtype)])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


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
    prompt, before and after. `max_new_tokens` cuts every answer shorter than its kind is. `lanes`:
    at most so many single edits are written side by side; they are halved where memory runs out.
    `strengths`: shares of a single edit's change that answer the six kinds of the average too, with
    the factor `strength`.

    With UKE_ROWS=committed in the environment `run` and `before` take their rows from the committed
    file of the study, whatever code wrote them, and no model is loaded.
    """

    name: str
    dataset: Dataset
    subject: Subject | str | tuple[nn.Module, PreTrainedTokenizerBase] = "embedded"
    similarity: bool = True
    max_new_tokens: int | None = None
    chat: bool | None = None
    lanes: int = 16
    strengths: Sequence[float] = ()
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
    def encoder(self) -> Encoder | None:
        return installed_encoder() if self.similarity else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells rows of this model and dataset from those of others."""
        return {"model": self.subject.fingerprint(), "data": self.dataset.fingerprint}

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        limits = {"tokens": self.max_new_tokens, "similarity": self.encoder is not None}
        return {"split": self.dataset.split, "chat": self.chat} | limits

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device, versions."""
        if self.committed:
            made = self.committed.fingerprints | {"device": "none: drawn from committed rows"}
        else:
            device = str(self.model.device)
            made = self.fingerprints | {"code": code_fingerprint(), "device": device}
        return made | {"torch": torch.__version__, "transformers": transformers.__version__}

    def smoke_run(self) -> bool:
        """Whether a model that knows one world alone is asked of anything else: it says nothing."""
        return world_of(self.subject.name) not in (None, self.dataset.world_seed)

    def unchanged(self) -> bool:
        """Whether every weight of the model is as it was before the first edit."""
        return bool(self.committed) or self.subject.fingerprint() == self.fingerprints["model"]

    def with_rows(self, names: Sequence[str], column: str = "method", **own: str) -> list[str]:
        """Return the methods, or levels, that can be drawn: rows are committed as they come."""
        found = set(self.committed.matching(own)[column] if self.committed else names)
        return [name for name in names if name in found]

    def run(
        self,
        method: Method,
        batch_size: int = 1,
        limit: int | None = None,
        factor: str | None = None,
        level: str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Store rows for every full batch of the first `limit` edits, each written on its own.

        `part` (2, 8) is the third eighth of the batches, for one of eight jobs side by side. Units
        with rows are skipped. Single edits that diverge have no rows; Diverged names them
        when all others are done, and `read` then leaves this run out.
        """
        edits = self.dataset.edits[:limit]
        starts = range(0, len(edits) - batch_size + 1, batch_size)
        batches = [edits[start : start + batch_size] for start in starts]
        labels = {"method": method.name, "factor": factor, "level": level}
        labels |= {"batch_size": batch_size, "split": self.dataset.split}
        if self.committed:
            self.taken.append(self.committed.take(labels, dict(enumerate(batches))))
            if self.strengths:
                self.taken.append(self.committed.weaker(self.taken[-1]))
            return
        fingerprints = self.fingerprints | {"recipe": method.fingerprint}
        labels |= fingerprints | {"learning_rate": method.learning_rate, "seed": method.seed}
        measure_for(method, self.model, self.tokenizer)
        work = self.conditions | labels | {"texts": method.depends_on(self.model)}
        units = [
            Unit(unit_key(batch=index, **work), edits, labels | {"batch": index})
            for index, edits in enumerate(batches)
        ]
        first, last = (len(units) * (part[0] + step) // part[1] for step in (0, 1))
        units = units[first:last]
        place = self.paths, self.name
        shares = self.strengths if method.moves_weights and batch_size == 1 else ()
        needed = fingerprints, [f"{share:g}" for share in shares]
        todo = [unit for unit in units if not rows.done(*place, unit.key, *needed)]
        if todo:
            # An edit too long is reported before any is written.
            method.examples(self.model, self.tokenizer, self.dataset.edits)
            self._write_all(method, todo)
        self.units += [unit.key for unit in units]

    def _write_all(self, method: Method, todo: list[Unit]) -> None:
        """Write these units, as many at once as fit into memory."""
        failed: dict[str, str] = {}
        desc = f"{self.name}: {method.name}"
        with tqdm(total=len(todo), desc=desc, mininterval=5, delay=5) as bar:
            while todo:
                at_once = self.lanes_at_once(method) if len(todo[0].edits) == 1 else 1
                group = todo[:at_once]
                try:
                    failed |= self.write(method, group)
                except torch.OutOfMemoryError:
                    if len(group) == 1:
                        fault = f"{method.name}: no memory for an edit beside the model"
                        raise InputError(f"{fault}; expected a larger GPU, or several") from None
                    self.lanes = len(group) // 2
                    change = f"{len(group)} edits side by side; going on with {self.lanes}"
                    logger.warning("%s: %s: out of memory with %s", self.name, method.name, change)
                    continue
                bar.update(len(group))
                del todo[: len(group)]
        if failed:
            raise Diverged("; ".join(dict.fromkeys(failed.values())), failed)

    def lanes_at_once(self, method: Method) -> int:
        """Return how many single edits are written at once: at most what fits half of memory."""
        fitting = free_mib(self.model.device) / 2 / lane_mib(self.model, method)
        return max(1, int(min(self.lanes, fitting)))

    def write(self, method: Method, group: Sequence[Unit]) -> dict[str, str]:
        """Write one batch of edits, or several single edits side by side, and store their rows.

        Returns why edits failed, by id. Seconds and memory are equal shares.
        """
        edits = [edit for unit in group for edit in unit.edits]
        alone, share = len(group[0].edits) == 1, 1 / len(group)
        unedited = self.before, self.expected  # answered without any edit
        write = edited_each if alone else edited
        peak, started = Peak(self.model.device), time.perf_counter()
        with write(self.model, self.tokenizer, edits, method) as m:
            cost = {"train_seconds": (time.perf_counter() - started) * share}
            cost["peak_mib"] = (highest := peak.mib()) and highest * share
            ids = [edit.id for edit in edits]
            records = m.edit_records if alone else dict.fromkeys(ids, m.edit_record)
            failed = m.failed if alone else {}
            probes = [probe for id in ids if id in records for probe in self.dataset.probes[id]]
            written = {edit.id: [edit] if alone else edits for edit in edits}
            frame = self.scored(m, probes, unedited, written, share).assign(**cost)
            weaker = {}
            for strength in self.strengths if method.moves_weights and alone else ():
                asked = [probe for probe in probes if probe.kind in AVERAGE]
                with m.lanes.at(strength):
                    weaker[f"{strength:g}"] = self.scored(m, asked, unedited, written, share)
        for unit in group:
            own = frame[frame["edit"].isin([edit.id for edit in unit.edits])]
            if len(own):
                own = self.recorded(own.assign(**unit.columns), records[unit.edits[0].id])
                others = [
                    each[each["edit"].isin(own["edit"])].assign(
                        **unit.columns | {"factor": compare.STRENGTH, "level": level}
                    )
                    for level, each in weaker.items()
                ]
                rows.append(self.paths, self.name, unit.key, pd.concat([own, *others]))
        return failed

    def scored(
        self,
        m: nn.Module,
        probes: Sequence[Probe],
        unedited: tuple[pd.DataFrame, Mapping[Probe, Expected]],
        written: Mapping[str, Sequence[Edit]],
        share: float = 1,
    ) -> pd.DataFrame:
        """Return the rows of an edited model on these probes, with a share of the seconds.

        `unedited`: `before` and `expected`, both made before the edit. `written`: the edits that
        answer the probes of each edit, by its id.
        """
        started, (before, expectations) = time.perf_counter(), unedited
        own = before[before["edit"].isin({probe.edit for probe in probes})]  # a few of very many
        frame = with_before(self.answer_and_score(m, probes), own)
        compared = [probe in expectations for probe in probes]
        some = [probe for probe in probes if probe in expectations]
        along = [expectations[probe] for probe in some]
        frame.loc[compared, "divergence"] = divergences(
            m, self.tokenizer, some, along, chat=self.chat
        )
        frame["leakage"] = leakages(frame, written)
        return frame.assign(phase="after", answer_seconds=(time.perf_counter() - started) * share)

    @cached_property
    def cache(self) -> AnswerCache:
        """The unedited model's answers on disk."""
        return AnswerCache(self.paths.answers(self.fingerprints["model"]))

    @cached_property
    def expected(self) -> dict[Probe, Expected]:
        """What the unedited model expects along its answers, where others are compared with it."""
        probes = [probe for probe in self.dataset.every_probe if probe.kind in COMPARED]
        options = Generation(max_new_tokens=self.token_limit, chat=self.chat, cache=self.cache)
        found = expected(self.model, self.tokenizer, probes, **vars(options))
        return dict(zip(probes, found, strict=True))

    def prepare(self, methods: Sequence[Method]) -> None:
        """Store what every job of a cluster needs: answers before any edit, statistics of keys."""
        for method in methods:
            measure_for(method, self.model, self.tokenizer)
        _ = self.before, self.expected

    @cached_property
    def before(self) -> pd.DataFrame:
        """The unedited model's answers to every probe with their scores, shared in a run."""
        if self.committed:
            return self.committed.unedited(self.dataset.every_probe)
        fingerprints = self.fingerprints | {"recipe": None}
        conditions = self.conditions | {"edits": len(self.dataset.edits)}
        unit = unit_key(UNEDITED, **conditions, **fingerprints)
        if not rows.done(self.paths, UNEDITED, unit, fingerprints):
            started = time.perf_counter()
            frame = self.answer_and_score(self.model, self.dataset.every_probe, self.cache)
            labels = {"method": UNEDITED, "batch": 0, "phase": "before"}
            labels |= {"split": self.dataset.split, "answer_seconds": time.perf_counter() - started}
            labels |= {"floor": compare.floors(frame)}
            rows.append(self.paths, UNEDITED, unit, frame.assign(**labels, **fingerprints))
        return rows.read(self.paths, UNEDITED, [unit])

    def answer_and_score(
        self, model: nn.Module, probes: Sequence[Probe], known: AnswerCache | None = None
    ) -> pd.DataFrame:
        """Answer the probes and score them against the reference: one row per probe, in order."""
        options = Generation(max_new_tokens=self.token_limit, chat=self.chat, cache=known)
        return answer_and_score(model, self.tokenizer, probes, options, self.encoder)

    def token_limit(self, probe: Probe) -> int:
        """Return the tokens an answer may have."""
        limit = token_limit(probe, self.tokenizer)
        return min(limit, self.max_new_tokens or limit)

    def recorded(self, frame: pd.DataFrame, record: EditRecord) -> pd.DataFrame:
        """Return the rows with the record of their edit, the loss curve in the first of them.

        InputError where the edit left weights that are not finite.
        """
        norms = record.change_norm
        norm = sum(norms.values()) / max(1, len(norms))  # in context nothing changes
        if not np.isfinite(norm) or np.isinf(frame["log_probability"]).any():
            edits = ", ".join(frame["edit"].unique())
            raise InputError(f"study {self.name}: edits {edits}: what was written is not finite")
        ends = {} if record.target_loss is None else {"target_loss": record.target_loss}
        curve = json.dumps(rows.shortened({"losses": record.losses, "norms": norms} | ends, 6))
        return frame.assign(
            steps=record.steps, change_norm=norm, curve=[curve] + [None] * (len(frame) - 1)
        )

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
        return rows.export(self.paths, self.name, pd.concat([frame, self.before]))


@cache
def installed_encoder() -> Encoder | None:
    """Load the sentence encoder, once for all studies; None where it is not installed."""
    transformers.utils.logging.disable_progress_bar()  # no bars of weights in a notebook
    return load_encoder()


def measure_world(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure the key covariance of a world's own model on that world, if it is not yet."""
    if (seed := world_of(model.config.name_or_path)) is not None:
        texts = covariance.world_texts(seed)
        covariance.measure(model, tokenizer, texts, range(len(blocks(model))))


def measure_for(method: Method, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure what a method must keep, where the model was not measured for it.

    The corpus of a model of the real world is that of before, if any, else the documents that are
    reserved for it, as questions and answers; where there are none, the method says what it lacks.
    """
    if method.measured is None or world_of(model.config.name_or_path) is not None:
        return
    if covariance.digest(model):
        texts = covariance.preservation(model)
    else:
        texts = reserved_texts()
    if texts:
        covariance.measure(model, tokenizer, texts, method.measured)


def reserved_texts() -> list[covariance.Entry]:
    """Return the documents that are reserved for second moments, as questions and answers."""
    files = find_files("documents")
    kept = filter(reserved, gather(files) if files else ())
    return [{"question": question_for(one)[0], "answer": one.text} for one in kept]
