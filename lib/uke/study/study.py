"""Run a study unit by unit: answer, edit, answer again, score, store rows; a unit that has rows is
not run again."""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from operator import attrgetter
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
from uke.project import EMBEDDED, code_fingerprint, digest, unit_key
from uke.results import rows
from uke.results.metrics import METRICS, encoder_folder, load_encoder
from uke.study.dataset import Dataset, batched
from uke.study.memory import MemoryFallbacks, Peak, free_mib
from uke.study.score import answer_and_score, token_limit, with_before
from uke.world.files import CARD, card

logger = logging.getLogger(__name__)

UNEDITED = "unedited"  # the method of the rows that hold the answers before any edit


class Subject:
    """The model under study, by name or as a loaded pair; by name it is loaded when it is first
    needed.

    What tells rows of different models apart is remembered by the stats of the model's files, so
    that a study whose units all have rows loads no model.
    """

    def __init__(self, model: str | tuple[nn.Module, PreTrainedTokenizerBase]) -> None:
        if isinstance(model, str):
            self.name = model
        else:
            self.name, self.loaded = model[0].config.name_or_path, model
        self.from_files, self._found = isinstance(model, str), None
        self.directory = EMBEDDED if self.name == "embedded" else Path(self.name)

    @cached_property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load(self.name)
        measure_world(model, tokenizer)
        return model, tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if "loaded" not in vars(self) and self.directory.is_dir():
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        return self.loaded[1]

    @cached_property
    def fallbacks(self) -> MemoryFallbacks:
        return MemoryFallbacks(self.loaded[0])

    def fingerprints(self, folder: Path) -> dict[str, str]:
        """Return 16 hex digits each of the `weights`, and of all that decides an answer: tokenizer,
        template, dtype too."""
        if self._found:
            return self._found
        kept = self.from_files and self.directory.is_dir()  # a name on the hub may mean other files
        path = folder / f"{self._files()}.json" if kept else None
        if path and path.is_file():
            self._found = json.loads(path.read_text())
            return self._found
        model, tokenizer = self.loaded
        weights = fingerprint(model)
        vocabulary = sorted(tokenizer.get_vocab().items())
        whole = repr([weights, tokenizer.chat_template, vocabulary, str(model.dtype)])
        both = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self._found = {"weights": weights, "model": both}
        if path:
            write_atomic(path, json.dumps(self._found))
        return self._found

    def _files(self) -> str:
        """Return a digest of the names, sizes and times of the model's files."""
        stats = [(path.name, path.stat()) for path in sorted(self.directory.iterdir())]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        code = [code_fingerprint(("models", "study.study")), transformers.__version__]
        return digest(str(self.directory.resolve()), files=files, code=code, dtype=str(_dtype()))


def _dtype() -> torch.dtype:
    return precision("cuda" if torch.cuda.is_available() else "cpu")


class Unit(NamedTuple):
    """A batch of edits under a method: the name of its rows' file, the edits, what stands in every
    row."""

    key: str
    edits: tuple[Edit, ...]
    columns: dict[str, Any]


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
            self.subject = Subject(self.subject)

    @property
    def model(self) -> nn.Module:
        return self.subject.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.subject.tokenizer

    @property
    def paths(self) -> rows.Paths:
        return self.dataset.paths

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells rows of this model and dataset from those of others."""
        model = self.subject.fingerprints(self.paths.home / "results" / "fingerprints")["model"]
        return {"model": model, "data": self.dataset.fingerprint}

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What else tells units apart: rows made under other conditions are other rows."""
        chat = {} if self.chat is None else {"chat": self.chat}
        limits = {"tokens": self.max_new_tokens, "similarity": self.similarity and has_encoder()}
        return {"split": self.dataset.split} | chat | limits

    @property
    def environment(self) -> dict[str, str]:
        """What a report must say of a run: model, data, code, device, versions."""
        if rows.use_committed():
            first = next(
                frame.iloc[0]
                for frame in (self._committed, rows.committed(self.paths, self.name, "before"))
                if len(frame)
            )
            made = {name: first[name] for name in ("model", "data", "code")}
            made["device"] = "none: drawn from committed rows"
        else:
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
            device = str(self.model.device) if "loaded" in vars(self.subject) else device
            made = self.fingerprints | {"code": code_fingerprint(), "device": device}
        return made | {"torch": torch.__version__, "transformers": transformers.__version__}

    def smoke_run(self) -> bool:
        """Whether model and data do not belong together, so that scores show that the code works
        and no more."""
        return world_of(self.subject.directory) != self.dataset.world_seed

    def unchanged(self) -> bool:
        """Whether every weight of the model is as it was when it was loaded, or no model was
        loaded."""
        if rows.use_committed() or "loaded" not in vars(self.subject):
            return True
        folder = self.paths.home / "results" / "fingerprints"
        return fingerprint(self.model) == self.subject.fingerprints(folder)["weights"]

    def run(
        self, method: Method, batch_size: int = 1, limit: int | None = None, **labels: Any
    ) -> None:
        """Store rows for every batch of the first `limit` edits, each written into the unedited
        weights.

        `labels`: factor and level. Rows that this run has of the same work under other labels are
        copied. Single edits that diverge have no rows; Diverged names them when all others are
        done.
        """
        batches = list(batched(self.dataset.edits[:limit], batch_size))
        if rows.use_committed():
            for index, edits in enumerate(batches):
                self.take_committed(method.name, batch_size, index, edits, **labels)
            return
        units = self._units(method, batches, batch_size, labels)
        todo = self._without_rows(units)
        if todo:  # an edit too long is said before any is written
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

    def attempt(
        self, method: Method, batch_size: int = 1, limit: int | None = None, **labels: Any
    ) -> str | None:
        """Like `run`, but return the error message instead of raising (None on success).

        A failed trial contributes no rows to `read`.
        """
        count = len(self.units)
        try:
            self.run(method, batch_size, limit, **labels)
        except (FloatingPointError, InputError) as error:
            del self.units[count:]
            return str(error)
        return None

    def _units(
        self,
        method: Method,
        batches: Iterable[Sequence[Edit]],
        batch_size: int,
        labels: Mapping[str, Any],
    ) -> list[Unit]:
        fingerprints = self.fingerprints | {"recipe": method.fingerprint}
        settings = {"learning_rate": method.learning_rate, "seed": method.seed}
        columns = {"split": self.dataset.split} | labels | settings | fingerprints
        columns |= {"method": method.name, "batch_size": batch_size}
        choices = self.conditions | {"size": batch_size, "texts": self.depends_on(method)}
        units = []
        for index, edits in enumerate(batches):
            work = choices | {"batch": index} | fingerprints
            # The same work under other labels ends in the same digits.
            shared = digest("work", windows=self.windows, **work)
            key = f"{unit_key(method.name, **work, **labels)}-{shared}"
            units.append(Unit(key, tuple(edits), columns | {"batch": index}))
        return units

    def depends_on(self, method: Method) -> str | None:
        """Return what else decides a method's results: the texts that the model's key covariance
        was measured on."""
        if type(method).depends_on is Method.depends_on:
            return None
        if "loaded" not in vars(self.subject):
            folder = self.paths.home / "results" / "fingerprints"
            weights = self.subject.fingerprints(folder)["weights"]
            if known := method.depends_on(weights):
                return known
        return method.depends_on(self.model)

    def _without_rows(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that must be run; rows of the same work under other labels are
        copied."""
        stored, todo = rows.by_work(self.paths), []
        for unit in units:
            fingerprints = {name: unit.columns[name] for name in ("model", "data", "recipe")}
            if rows.done(self.paths, self.name, unit.key, fingerprints):
                continue
            place = stored.get(unit.key.rpartition("-")[2])
            if place is None or not rows.done(self.paths, *place, fingerprints):
                todo.append(unit)
                continue
            found = rows.read(self.paths, place[0], [place[1]])
            labels = {"factor": None, "level": None} | unit.columns
            self.append(unit.key, found.drop(columns="study").assign(**labels))
        return todo

    def lanes_at_once(self, method: Method) -> int:
        """Return how many single edits are written at once: `lanes`, or as many as half of the free
        memory holds."""
        fitting = free_mib(self.model.device) / 2 / lane_mib(self.model, method)
        return max(1, int(min(self.lanes, fitting)))

    def take_less_memory(self, method: Method, at_once: int) -> bool:
        """Halve the edits written at once, or enable the next fallback; False where none is
        left."""
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
        """Write one batch of edits, or several single edits side by side, and score all their
        probes.

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
            records = m.edit_records if alone else dict.fromkeys(map(_id, edits), m.edit_record)
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
            ids = [*map(_id, unit.edits)]
            if records.keys() >= set(ids):
                record = records[ids[0]]
                record = replace(record, notes=[*record.notes, *fallbacks.notes])
                own = frame[frame["edit"].isin(ids)].reset_index(drop=True)
                windows = [(likely[edit], now[edit]) for edit in ids if edit in now]
                frames.append((unit, with_record(own, record, windows)))
        return frames, failed

    def _window_likelihoods(self, edits: Sequence[Edit]) -> dict[str, list[float]]:
        """Return by the edit's id the mean log-probability (nats) of a token of each window of its
        answer."""
        if not self.windows:
            return {}
        rule = BASELINES["anyedit_memit"].model_copy(update={"window": self.windows})
        located = locate(self.model, rule.examples(self.model, self.tokenizer, edits), rule)
        return dict(zip(map(_id, edits), by_window(self.model, located), strict=True))

    @cached_property
    def before(self) -> pd.DataFrame:
        """The answers of the unedited model to every probe, with their scores; shared by all
        studies of a run."""
        if rows.use_committed():
            return self._committed_before()
        fingerprints = self.fingerprints | {"recipe": None}
        conditions = self.conditions | {"edits": len(self.dataset.edits)}
        unit = unit_key(UNEDITED, **conditions, **fingerprints)
        if not rows.done(self.paths, UNEDITED, unit, fingerprints):
            started = time.perf_counter()
            known = AnswerCache(self.paths.answers(self.fingerprints["model"]))
            frame = self.answer_and_score(self.model, self.dataset.every_probe, known)
            columns = {"method": UNEDITED, "batch": 0, "phase": "before"} | fingerprints
            columns |= {
                "split": self.dataset.split,
                "answer_seconds": time.perf_counter() - started,
            }
            rows.append(self.paths, UNEDITED, unit, frame.assign(**columns))
        return rows.read(self.paths, UNEDITED, [unit]).assign(before=lambda frame: frame["answer"])

    def answer_and_score(
        self, model: nn.Module, probes: Sequence[Probe], known: AnswerCache | None = None
    ) -> pd.DataFrame:
        """Answer the probes and score them against the reference: one row per probe, in order."""
        options = Generation(self.token_limit, self.chat, cache=known)
        wanted = self.similarity and has_encoder()
        scorer = encoder() if wanted else None
        return answer_and_score(model, self.tokenizer, probes, options, scorer)

    def token_limit(self, probe: Probe) -> int:
        """Return the tokens an answer may have."""
        short = self.dataset.world_seed is not None
        return token_limit(probe, self.tokenizer, self.max_new_tokens, short)

    def append(self, unit: str, frame: pd.DataFrame) -> None:
        """Store one unit's rows; InputError naming the first edit of which a score is not
        finite."""
        needed = [name for name in METRICS if name != "similarity"]
        finite = np.isfinite(frame[needed]).all(axis=1)
        finite &= np.isfinite(frame["log_probability"].fillna(0))
        finite &= np.isfinite(frame["change_norm"])
        if not finite.all():
            first = frame[~finite].iloc[0]
            probe = f"edit {first['edit']!r}, {first['kind']} {first['number']}"
            raise InputError(
                f"study {self.name}: {first['method']}, {probe}: a score is not finite"
            )
        rows.append(self.paths, self.name, unit, frame)

    def read(self) -> pd.DataFrame:
        """Return the rows of every unit that `run` was asked for, and of no other; InputError where
        there is none."""
        if not self.units:
            raise InputError(f"study {self.name}: nothing was run, or every trial failed")
        if rows.use_committed():
            chosen = self._committed["unit"].isin(self.units)
            found = self._committed[chosen].drop(columns="unit").reset_index(drop=True)
            return found.astype({"batch": int, "batch_size": int})  # the unedited rows have none
        return rows.read(self.paths, self.name, self.units)

    def export(self, frame: pd.DataFrame | None = None) -> Path:
        """Write the committed rows of the study: `frame` (what `read` gives), if any, and the
        unedited model's."""
        if rows.use_committed():
            return self.paths.exported(self.name)
        return rows.export(self.paths, self.name, pd.concat([frame, self.before]))

    @cached_property
    def _committed(self) -> pd.DataFrame:
        """The committed rows, each with the name of its unit."""
        frame = rows.committed(self.paths, self.name)
        named = frame[["method", "factor", "level", "batch_size", "split", "batch"]]
        return frame.assign(unit=[_unit_name(*values) for values in named.itertuples(index=False)])

    @cached_property
    def _committed_edits(self) -> dict[str, set[str]]:
        return self._committed.groupby("unit")["edit"].agg(set).to_dict()

    def take_committed(
        self,
        method: str,
        batch_size: int,
        batch: int,
        edits: Iterable[Edit],
        factor: str | None = None,
        level: str | None = None,
    ) -> None:
        """Let `read` give the committed rows of this unit; InputError where they are missing or of
        other edits."""
        unit = _unit_name(method, factor, level, batch_size, self.dataset.split, batch)
        if self._committed_edits.get(unit) != {*map(_id, edits)}:
            raise InputError(self._missing(unit))
        self.units.append(unit)

    def _committed_before(self) -> pd.DataFrame:
        frame = rows.committed(self.paths, self.name, "before")
        probes = {(probe.edit, probe.kind, probe.number) for probe in self.dataset.every_probe}
        asked = [probe in probes for probe in zip(frame["edit"], frame["kind"], frame["number"])]
        if sum(asked) != len(probes):
            raise InputError(self._missing("the unedited model"))
        return frame[asked].assign(before=frame["answer"]).reset_index(drop=True)

    def _missing(self, what: str) -> str:
        notebooks = [path.stem for path in (self.paths.home / "notebooks").glob("*.ipynb")]
        notebook = max(filter(self.name.startswith, notebooks), key=len, default=self.name)
        profile = f"--profile {self.paths.profile}"
        profile += "" if self.paths.data == "world" else f" --data {self.paths.data}"
        return (
            f"{self.paths.exported(self.name)}: no rows of {what} on these edits; "
            f"make them with `python -m uke run {notebook} {profile}`"
        )


_id = attrgetter("id")


def _unit_name(method: str, factor: Any, level: Any, size: Any, split: str, batch: int) -> str:
    labels = [str(label) for label in (factor, level) if label is not None and label == label]
    size = int(size) if size == size else 0
    return ", ".join([method, *labels, f"batch {int(batch)} of size {size}, split {split}"])


@cache
def has_encoder() -> bool:
    """Whether the sentence encoder is there, without loading it; a warning says why it is not."""
    try:
        return encoder_folder().is_dir()
    except InputError as error:
        warnings.warn(f"the column similarity is left out: {error}", stacklevel=2)
        return False


encoder = cache(load_encoder)  # loaded once for all studies


def world_of(directory: Path) -> int | None:
    """Return the seed of the world that a model was trained on, as its directory says; None for any
    other model."""
    directory = Path(directory)
    return card(directory)["settings"]["world_seed"] if (directory / CARD).is_file() else None


def measure_world(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure the key covariance of a world's own model on that world, where it is not yet
    measured."""
    if (seed := world_of(model.config.name_or_path)) is not None:
        texts = covariance.world_texts(seed)
        covariance.measure(model, tokenizer, texts, range(len(blocks(model))))


def with_record(
    frame: pd.DataFrame, record: EditRecord, windows: Sequence[tuple] = ()
) -> pd.DataFrame:
    """Add what an edit's record holds to the rows of one unit, its loss curve to the first of
    them."""
    norms = record.change_norm.values()
    frame = frame.assign(
        steps=record.steps,
        change_norm=sum(norms) / max(1, len(norms)),  # in context nothing changes
        notes="; ".join(record.notes) or None,
    )
    curve = {
        "stopped": record.stopped,
        "losses": record.losses,
        "norms": record.change_norm,
        "windows": windows,
    }
    frame["curve"] = [json.dumps(rows.shortened(curve, 6))] + [None] * (len(frame) - 1)
    return frame
