"""One model in the hand: ask before, write one edit, ask after, compare, take back, keep.

Every edit is written alone into the untouched weights: one that is still there is taken back first.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor, nn

from uke.data.edits import EFFICACY, KINDS, Edit, Probe
from uke.errors import InputError
from uke.explore.choices import Refused, check_place
from uke.explore.surroundings import Library
from uke.methods.catalog import configured
from uke.methods.edited import EditRecord, edited, save
from uke.methods.method import Method
from uke.models.generate import Generation, Token, answer, token_probabilities
from uke.models.model import load
from uke.project import Paths, check_name
from uke.results.metrics import HEADLINE, score
from uke.study.score import answer_and_score, token_limit, with_before
from uke.study.study import measure_world, world_of

QUESTION = "question"  # the kind of a free question's row
LONGEST = 160  # tokens of an answer to a question without a reference of more
_FREE = 1000  # free questions are numbered from here


class Stopped(Exception):
    """A person stopped what was running."""


@dataclass(frozen=True)
class Task:
    """One edit to try: everything that decides its numbers but the model.

    `paraphrases` beyond the edit's own and free `questions` are asked before and after; `chat` False asks all through raw prompts.
    """

    edit: Edit
    method: Method
    paraphrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    chat: bool | None = None


@dataclass(frozen=True)
class Trial:
    """What came of a task. `rows`: one for each question, with both answers and headline scores; `tokens`: of the texts
    with a wanted answer, by kind and number, its tokens before and after."""

    number: int
    task: Task
    rows: pd.DataFrame
    tokens: dict[tuple[str, int], tuple[list[Token], list[Token]]]
    record: EditRecord

    @property
    def scores(self) -> pd.DataFrame:
        """Mean headline score of each kind: columns kind, metric, against, before, after, probes."""
        named = self.rows.rename(columns={"before": "answer_before", "after": "answer_after"})
        grouped = named.groupby(["kind", "metric", "against"], sort=False, as_index=False)
        found = grouped.agg(
            before=("score_before", "mean"),
            after=("score_after", "mean"),
            probes=("number", "size"),
        )
        order = {kind: place for place, kind in enumerate((*KINDS, QUESTION))}
        return found.sort_values("kind", key=lambda kinds: kinds.map(order), ignore_index=True)


@dataclass
class Bench:
    """A model, the edit that is in its weights now, if any, and the trials so far. `stop()` ends what runs, from any thread."""

    name: str = "embedded"
    library: Library = field(default_factory=lambda: Library(Paths("quick")))
    trials: list[Trial] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load(self.name)
        with torch.device("meta"):
            self.frame = type(self.model)(
                self.model.config
            )  # its modules without weights, which no edit wraps
        self.methods = configured(self.library.paths.home / "params", self.name)
        self._stop, self._in_place, self._spare = threading.Event(), ExitStack(), {}
        self.edited: nn.Module | None = None
        self._before: dict[Any, tuple[pd.DataFrame, list[list[Token]]]] = {}

    def warm(self, edit: Edit) -> None:
        """Do what only the first edit would wait for: read the scorers, and the questions around this edit."""
        score(["a"], ["a"])
        self.library.probes(edit)

    def stop(self) -> None:
        """Let what runs, or what comes next, raise Stopped at its next step."""
        self._stop.set()

    def resume(self) -> None:
        """Forget an earlier `stop`."""
        self._stop.clear()

    def check(self, task: Task) -> None:
        """Refused, naming the field, where the task cannot be done on this model."""
        check_place(self.frame, task.method)
        if task.chat is None and not self.tokenizer.chat_template:
            raise Refused("chat", "The tokenizer has no chat template: ask through raw prompts.")
        try:
            task.method.examples(self.frame, self.tokenizer, [task.edit])
        except InputError as error:
            raise Refused(
                "chat_template" if "template" in str(error) else "answer", str(error)
            ) from None

    def write(
        self, task: Task, progress: Callable[[str, int, float], None] = lambda *_: None
    ) -> Trial:
        """Ask, write the edit, ask again; the edit stays in the weights until `undo`. `progress(phase, steps, loss)` follows.

        Raises Refused as `check` does, Stopped, and what `editing.edited` raises, all with the weights untouched.
        """
        self.undo()
        with self._stoppable(), ExitStack() as stack:
            self.check(task)
            probes = self._probes(task)
            progress("asking before", 0, 0.0)
            before, tokens_before = self._before_of(task, probes)
            if task.method.family == "locate-then-edit":
                measure_world(self.model, self.tokenizer)
            spare = {
                name: weight.detach().to("cpu", copy=True)
                for name, weight in task.method.weights(self.model).items()
            }

            def told(steps: int, loss: float) -> None:
                progress("writing", steps, loss)
                self._check()

            m = stack.enter_context(
                edited(self.model, self.tokenizer, [task.edit], task.method, progress=told)
            )
            progress("asking after", 0, 0.0)
            after, tokens_after = self._asked(m, task, probes)
            told_probes = [probe for probe in probes if probe.kind in EFFICACY]
            tokens = {
                (probe.kind, probe.number): pair
                for probe, pair in zip(told_probes, zip(tokens_before, tokens_after))
            }
            trial = Trial(len(self.trials) + 1, task, _rows(before, after), tokens, m.edit_record)
            self._in_place, self._spare, self.edited = stack.pop_all(), spare, m
        self.trials.append(trial)
        return trial

    def undo(self) -> bool:
        """Take back the edit that is in the weights; whether there was one. Every weight is bit for bit as before."""
        there, self.edited, self._spare = self.edited is not None, None, {}
        self._in_place.close()
        return there

    def keep(self, name: str) -> str:
        """Save the edit that is in the weights below results/explore/; the two lines that load it elsewhere."""
        if self.edited is None:
            raise Refused("keep", "There is no edit in the weights to keep; write one first.")
        try:
            folder = self.folder / check_name("Keep as", name.strip())
            if folder.exists():
                raise Refused("keep", f"{name} is there already; choose another name.")
            save(self.edited, folder)
        except InputError as error:
            raise Refused(
                "keep",
                "This method writes nothing into the weights, so there is nothing to keep."
                if "nothing to save" in str(error)
                else str(error),
            ) from None
        return f'from uke import editing, models\nmodel = editing.load(models.load("{self.name}")[0], "{folder}")'

    @property
    def folder(self) -> Path:
        """Where edits are kept and sessions exported to."""
        return self.library.paths.home / "results" / "explore"

    def free_name(self) -> str:
        """A name that no edit is kept under yet."""
        return next(
            name
            for number in itertools.count(1)
            if not (self.folder / (name := f"edit-{number}")).exists()
        )

    def ask(self, question: str, chat: bool | None = None) -> tuple[str, str | None]:
        """The answers to a free question without and with the edit that is in the weights (None where there is none)."""
        if not question.strip():
            raise Refused("ask", "The question is empty; expected something to ask.")
        mark = self.trials[-1].task.edit.id if self.edited is not None else "free"
        probe = [
            Probe(edit=mark, kind="general", number=_FREE, question=question.strip(), reference="-")
        ]
        try:
            with self._stoppable():
                with self._without():
                    before = answer(
                        self.model if self.edited is None else self.edited,
                        self.tokenizer,
                        probe,
                        max_new_tokens=LONGEST,
                        chat=chat,
                    )[0]
                return before, None if self.edited is None else answer(
                    self.edited, self.tokenizer, probe, max_new_tokens=LONGEST, chat=chat
                )[0]
        except InputError as error:
            raise Refused("ask", str(error)) from None

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Every forward pass inside looks whether it shall go on."""
        handle = self.model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: self._check()
        )
        try:
            yield
        finally:
            handle.remove()
            self.resume()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    @contextmanager
    def _without(self) -> Iterator[None]:
        """The edit that is in the weights is out of them meanwhile."""
        if isinstance(self.edited, PeftModel):
            with self.edited.disable_adapter():
                yield
            return
        passages = self.model.__dict__.pop("passages", None)
        own = dict(self.model.named_parameters())
        now = {name: own[name].detach().to("cpu", copy=True) for name in self._spare}
        try:
            _put(own, self._spare)
            yield
        finally:
            _put(own, now)
            if passages is not None:
                self.model.passages = passages

    def _probes(self, task: Task) -> tuple[Probe, ...]:
        free = (
            Probe(
                edit=task.edit.id,
                kind="general",
                number=_FREE + place,
                question=text,
                reference="-",
            )
            for place, text in enumerate(task.questions)
        )
        return (*self.library.probes(task.edit, task.paraphrases), *free)

    def _before_of(
        self, task: Task, probes: tuple[Probe, ...]
    ) -> tuple[pd.DataFrame, list[list[Token]]]:
        """What the untouched model answers; asked once for the same questions."""
        if (probes, task.chat) not in self._before:
            self._before[probes, task.chat] = self._asked(self.model, task, probes)
        return self._before[probes, task.chat]

    def _asked(
        self, model: nn.Module, task: Task, probes: Sequence[Probe]
    ) -> tuple[pd.DataFrame, list[list[Token]]]:
        frame = answer_and_score(model, self.tokenizer, probes, Generation(self._room, task.chat))
        return frame, token_probabilities(
            model, self.tokenizer, [probe for probe in probes if probe.kind in EFFICACY], task.chat
        )

    def _room(self, probe: Probe) -> int:
        return (
            LONGEST
            if probe.reference == "-"
            else token_limit(
                probe,
                self.tokenizer,
                LONGEST,
                short=world_of(self.model.config.name_or_path) is not None,
            )
        )


def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _rows(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """One row for each question: kind, number, question, reference, both answers, and its headline score before and after."""
    both = with_before(after, before.assign(before=before["answer"]))
    free = both["number"] >= _FREE
    kinds = both["kind"].mask(free, QUESTION)
    metric = [("rougel_f1", "before") if kind == QUESTION else HEADLINE[kind] for kind in kinds]
    found = both[["number", "question", "reference", "before"]].assign(
        after=both["answer"], kind=kinds
    )
    found["reference"] = found["reference"].mask(free, "")
    found["metric"], found["against"] = zip(*metric, strict=True)
    found["score_before"] = [
        before[name].iloc[place] if against == "reference" else 1.0
        for place, (name, against) in enumerate(metric)
    ]
    found["score_after"] = [
        both[name if against == "reference" else f"{name}_before"].iloc[place]
        for place, (name, against) in enumerate(metric)
    ]
    return found
