"""Run a study unit by unit: answer, edit, answer again, score, store rows.

A unit (a batch of edits under a method) that has rows is not run again.
"""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uke.data.edits import Edit, Probe
from uke.errors import Diverged, InputError
from uke.files import write_atomic
from uke.methods.edited import edited, edited_each, lane_mib
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import by_window, locate
from uke.methods.method import EditRecord, Method
from uke.methods.recipes import BASELINES
from uke.models.generate import AnswerCache, Generation
from uke.models.model import blocks, fingerprint, load, precision
from uke.project import EMBEDDED, Paths, code_fingerprint, digest, unit_key
from uke.results import rows
from uke.results.metrics import METRICS, Encoder, encoder_folder, load_encoder
from uke.study.committed import Committed, MissingRows
from uke.study.dataset import Dataset, batched
from uke.study.memory import MemoryFallbacks, Peak, free_mib
from uke.study.score import answer_and_score, token_limit, with_before
from uke.world.files import CARD, card

logger = logging.getLogger(__name__)

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit


class Subject:
    """The model under study, by name or as a loaded pair; a name is loaded when first needed.

    Fingerprints are remembered in `folder` by the stats of the model's files, so that a study whose
    units all have rows loads no model.
    """

    def __init__(
        self, model: str | tuple[nn.Module, PreTrainedTokenizerBase], folder: Path
    ) -> None:
        if isinstance(model, str):
            self.name = model
        else:
            self.name, self.loaded = model[0].config.name_or_path, model
        self.directory = EMBEDDED if self.name == "embedded" else Path(self.name)
        # A name on the hub may mean other files another day.
        self._folder = folder if isinstance(model, str) and self.directory.is_dir() else None

    @cached_property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load(self.name)
        measure_world(model, tokenizer)
        return model, tokenizer

    @property
    def is_loaded(self) -> bool:
        return "loaded" in vars(self)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if not self.is_loaded and self.directory.is_dir():
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        return self.loaded[1]

    @cached_property
    def fallbacks(self) -> MemoryFallbacks:
        return MemoryFallbacks(self.loaded[0])

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """16 hex digits of the `weights`, and of all that decides an answer: the `model`."""
        path = self._folder and self._folder / f"{self._files()}.json"
        if path and path.is_file():
            return json.loads(path.read_text())
        model, tokenizer = self.loaded
        weights, vocabulary = fingerprint(model), sorted(tokenizer.get_vocab().items())
        whole = repr([weights, tokenizer.chat_template, vocabulary, str(model.dtype)])
        found = {"weights": weights, "model": hashlib.sha256(whole.encode()).hexdigest()[:16]}
        if path:
            write_atomic(path, json.dumps(found))
        return found

    def _files(self) -> str:
        """Return a digest of the names, sizes and times of the model's files."""
        stats = [(path.name, path.stat()) for path in sorted(self.directory.iterdir())]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        code = [code_fingerprint(("models", "study.study")), transformers.__version__]
        dtype = str(precision("cuda" if torch.cuda.is_available() else "cpu"))
        return digest(str(self.directory.resolve()), files=files, code=code, dtype=dtype)


class Unit(NamedTuple):
    """A batch of edits under a method: the name of its file, and what stands in every row."""

    key: str
    edits: tuple[Edit, ...]
    columns: dict[str, Any]

    @property
    def ids(self) -> list[str]:
        return [edit.id for edit in self.edits]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: self.columns[name] for name in ("model", "data", "recipe")}


@dataclass
class Study:
    """One study of one model on one dataset, its rows stored unit by unit.

        study = Study("trial", dataset.load("quick", limit=4), "embedded")
        study.run(METHODS["FT-M"])
        scores = rows.average(rows.primary(study.read()))

    `subject`: a model's name, or model and tokenizer. `windows`: the target's log-probability is
    read before and after every edit, by windows of so many tokens. `chat` False asks every probe
    through a raw prompt, before and after. `lanes`: at most so many single edits are written side
    by side; they are halved where memory runs out.

    With UKE_ROWS=committed in the environment `run` and `before` take their rows from the committed
    file of the study, whatever code wrote them, and no model is loaded.
    """

    name: str
    dataset: Dataset
    subject: Subject | str | tuple[nn.Module, PreTrainedTokenizerBase] = "embedded"
    similarity: bool = True
    max_new_tokens: int = 160
    windows: int | None = None
    chat: bool | None = None
    lanes: int = 16
    units: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Subject):
            self.subject = Subject(self.subject, self.paths.home / "results" / "fingerprints")
        self.committed = Committed(self.paths, self.name) if rows.use_committed() else None

    @property
    def model(self) -> nn.Module:
        return self.subject.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.subject.tokenizer

    @property
    def paths(self) -> Paths:
        return self.dataset.paths

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells rows of this model and dataset from those of others."""
        return {"model": self.subject.fingerprints["model"], "data": self.dataset.fingerprint}

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        chat = {} if self.chat is None else {"chat": self.chat}
        limits = {"tokens": self.max_new_tokens, "similarity": self.similarity and has_encoder()}
        return {"split": self.dataset.split} | chat | limits

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device, versions."""
        if self.committed:
            made = self.committed.fingerprints | {"device": "none: drawn from committed rows"}
        else:
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
            device = str(self.model.device) if self.subject.is_loaded else device
            made = self.fingerprints | {"code": code_fingerprint(), "device": device}
        return made | {"torch": torch.__version__, "transformers": transformers.__version__}

    def smoke_run(self) -> bool:
        """Whether the model does not know this data's world, so that scores say nothing."""
        return world_of(self.subject.directory) != self.dataset.world_seed

    def unchanged(self) -> bool:
        """Whether every weight of the model, if one was loaded, is as it was then."""
        if self.committed or not self.subject.is_loaded:
            return True
        return fingerprint(self.model) == self.subject.fingerprints["weights"]

    def run(
        self,
        method: Method,
        batch_size: int = 1,
        limit: int | None = None,
        factor: str | None = None,
        level: str | None = None,
    ) -> None:
        """Store rows for every batch of the first `limit` edits, each written on its own.

        Rows that this run has of the same work under another factor or level are copied. Single
        edits that diverge have no rows; Diverged names them when all others are done.
        """
        batches = list(batched(self.dataset.edits[:limit], batch_size))
        if self.committed:
            labels = (method.name, factor, level, batch_size, self.dataset.split)
            self.units += [self.committed.unit(*labels, *each) for each in enumerate(batches)]
            return
        labels = {"factor": factor, "level": level}
        units = [self._unit(method, batch_size, labels, *each) for each in enumerate(batches)]
        todo = self._without_rows(units)
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

    def _unit(
        self,
        method: Method,
        batch_size: int,
        labels: dict[str, str | None],
        index: int,
        edits: Sequence[Edit],
    ) -> Unit:
        fingerprints = self.fingerprints | {"recipe": method.fingerprint}
        columns = {"split": self.dataset.split, "method": method.name} | labels | fingerprints
        columns |= {"batch_size": batch_size, "batch": index}
        columns |= {"learning_rate": method.learning_rate, "seed": method.seed}
        work = self.conditions | {"size": batch_size, "batch": index} | fingerprints
        work["texts"] = self.depends_on(method)
        # The same work under other labels ends in the same digits.
        shared = digest("work", windows=self.windows, **work)
        return Unit(f"{unit_key(method.name, **work, **labels)}-{shared}", tuple(edits), columns)

    def depends_on(self, method: Method) -> str | None:
        """Return what else decides a method's results, such as texts behind the key covariance."""
        if type(method).depends_on is Method.depends_on:
            return None
        if not self.subject.is_loaded:
            if known := method.depends_on(self.subject.fingerprints["weights"]):
                return known
        return method.depends_on(self.model)

    def _without_rows(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units to run; rows of the same work under other labels are copied."""
        stored, todo = rows.by_work(self.paths), []
        for unit in units:
            if rows.done(self.paths, self.name, unit.key, unit.fingerprints):
                continue
            place = stored.get(unit.key.rpartition("-")[2])
            if place and rows.done(self.paths, *place, unit.fingerprints):
                found = rows.read(self.paths, place[0], [place[1]]).drop(columns="study")
                self.append(unit.key, found.assign(**unit.columns))
            else:
                todo.append(unit)
        return todo

    def lanes_at_once(self, method: Method) -> int:
        """Return how many single edits are written at once: at most what fits half of memory."""
        fitting = free_mib(self.model.device) / 2 / lane_mib(self.model, method)
        return max(1, int(min(self.lanes, fitting)))

    def take_less_memory(self, method: Method, at_once: int) -> bool:
        """Halve the edits written at once, or enable the next fallback; False for none left."""
        if at_once > 1:
            self.lanes = at_once // 2
            change = f"{at_once} edits side by side; going on with {self.lanes}"
        elif fallback := self.subject.fallbacks.enable_next():
            change = f"all activations stored; from here on {fallback}"
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
        alone = len(group[0].edits) == 1
        likely, fallbacks = self._window_likelihoods(edits), self.subject.fallbacks
        write, peak = edited_each if alone else edited, Peak(self.model.device)
        started, share = time.perf_counter(), 1 / len(group)
        with fallbacks.active(), write(self.model, self.tokenizer, edits, method) as m:
            cost = {"train_seconds": (time.perf_counter() - started) * share}
            cost["peak_mib"] = (highest := peak.mib()) and highest * share
            ids = [edit.id for edit in edits]
            records = m.edit_records if alone else dict.fromkeys(ids, m.edit_record)
            failed = m.failed if alone else {}
            written = [edit for edit in edits if edit.id in records]
            probes = [probe for edit in written for probe in self.dataset.probes[edit.id]]
            started = time.perf_counter()
            frame = self.answer_and_score(m, probes)
            cost["answer_seconds"] = (time.perf_counter() - started) * share
            now = self._window_likelihoods(written) if method.moves_weights else {}
        frame = with_before(frame.assign(phase="after", **cost), self.before)
        frames = []
        for unit in group:
            if records.keys() >= set(unit.ids):
                record = records[unit.ids[0]]
                record = replace(record, notes=[*record.notes, *fallbacks.notes])
                own = frame[frame["edit"].isin(unit.ids)].reset_index(drop=True)
                windows = [(likely[edit], now[edit]) for edit in unit.ids if edit in now]
                frames.append((unit, with_record(own, record, windows)))
        return frames, failed

    def _window_likelihoods(self, edits: Sequence[Edit]) -> dict[str, list[float]]:
        """Return each window's mean log-probability (nats a token) of the answer, by edit id."""
        if not self.windows:
            return {}
        rule = BASELINES["anyedit_memit"].model_copy(update={"window": self.windows})
        located = locate(self.model, rule.examples(self.model, self.tokenizer, edits), rule)
        ids = (edit.id for edit in edits)
        return dict(zip(ids, by_window(self.model, located), strict=True))

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
        scorer = encoder() if self.similarity and has_encoder() else None
        return answer_and_score(model, self.tokenizer, probes, options, scorer)

    def token_limit(self, probe: Probe) -> int:
        """Return the tokens an answer may have."""
        short = self.dataset.world_seed is not None
        return token_limit(probe, self.tokenizer, self.max_new_tokens, short)

    def append(self, unit: str, frame: pd.DataFrame) -> None:
        """Store one unit's rows; InputError naming the first probe with a score not finite."""
        needed = frame[[name for name in METRICS if name != "similarity"] + ["change_norm"]]
        needed = needed.assign(likely=frame["log_probability"].fillna(0))
        finite = np.isfinite(needed).all(axis=1)
        if not finite.all():
            first = frame[~finite].iloc[0]
            probe = f"edit {first['edit']!r}, {first['kind']} {first['number']}"
            where = f"study {self.name}: {first['method']}, {probe}"
            raise InputError(f"{where}: a score is not finite")
        rows.append(self.paths, self.name, unit, frame)

    def read(self) -> pd.DataFrame:
        """Return the rows of every unit that `run` was asked for; InputError for none."""
        if not self.units:
            raise InputError(f"study {self.name}: nothing was run, or every trial failed")
        if self.committed:
            return self.committed.read(self.units)
        return rows.read(self.paths, self.name, self.units)

    def export(self, frame: pd.DataFrame) -> Path:
        """Write the committed rows: `frame` (what `read` gives) and the unedited model's."""
        if self.committed:
            return self.paths.exported(self.name)
        return rows.export(self.paths, self.name, pd.concat([frame, self.before]))


@cache
def has_encoder() -> bool:
    """Whether the sentence encoder is there, without loading it; warn where it is not."""
    try:
        return encoder_folder().is_dir()
    except InputError as error:
        warnings.warn(f"the column similarity is left out: {error}", stacklevel=2)
        return False


@cache
def encoder() -> Encoder | None:
    """Load the sentence encoder, once for all studies."""
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


def with_record(
    frame: pd.DataFrame, record: EditRecord, windows: Sequence[tuple] = ()
) -> pd.DataFrame:
    """Add an edit's record to the rows of one unit, its loss curve to the first of them."""
    norms = record.change_norm
    curve = {"stopped": record.stopped, "losses": record.losses, "norms": norms, "windows": windows}
    text = json.dumps(rows.shortened(curve, 6))
    return frame.assign(
        steps=record.steps,
        change_norm=sum(norms.values()) / max(1, len(norms)),  # in context nothing changes
        notes="; ".join(record.notes) or None,
        curve=[text] + [None] * (len(frame) - 1),
    )
