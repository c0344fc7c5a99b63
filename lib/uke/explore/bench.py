"""Write one edit by hand: ask before, edit, ask after, undo, keep, and repeat a whole session.

    bench = Bench("embedded", Library(Paths("quick")))
    trial = bench.write(Task(bench.library.edits[0], bench.methods["FT-UKE"]))
    print(trial.scores, bench.ask("Who is Ansel Dorowick?"))
    bench.undo()

Every edit is written alone into the untouched weights: an earlier one is undone first.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import Tensor, nn

from uke.data import formats
from uke.data.documents import Document, gather
from uke.data.edits import EFFICACY, KINDS, SPLITS, Cloze, Edit, Probe, in_group
from uke.data.find import find_files
from uke.errors import InputError, nearest
from uke.files import read_yaml, write_atomic
from uke.locality import card, retrieval
from uke.locality.build import Builder, Settings, Sources
from uke.methods import catalog
from uke.methods.edited import edited, save
from uke.methods.method import EditRecord, Method
from uke.methods.recipes import levels, vary
from uke.models.generate import answer, token_probabilities
from uke.models.model import kept, load, source
from uke.project import Paths, check_name
from uke.study import dataset
from uke.study.score import scored, token_limit, with_before
from uke.study.study import measure_for, measure_world
from uke.world import files as world_files
from uke.world.files import world_of

OWN_ID = "mine"
AROUND = in_group("locality", "nearby")  # the kinds of probes chosen for an edit that brings none
REAL = Path(__file__).with_name("real.yaml")  # our own edits and subjects of the real world
NEAR, STRIDE = 100, 50  # documents looked at around an edit: the best, and one in so many below
QUICK = 40  # tokens of an answer of a model of the real world to what must not change
MAX_NEW_TOKENS = 160  # of the answer to a free question
ASKING_BEFORE, WRITING, ASKING_AFTER = "asking the untouched model", "writing", "asking the edited"


class Refused(InputError):
    """Bad input of one field of the form."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


@contextmanager
def refused(field: str) -> Iterator[None]:
    """Say which field of the form bad input inside belongs to."""
    try:
        yield
    except InputError as error:
        raise error if isinstance(error, Refused) else Refused(field, str(error)) from None


class Stopped(Exception):
    """A person stopped what was running."""


@dataclass(frozen=True)
class Task:
    """One edit to try: everything but the model that decides its numbers.

    `paraphrases` are asked beside the edit's own. `chat` False asks without the chat template.
    """

    edit: Edit
    method: Method
    paraphrases: tuple[str, ...] = ()
    chat: bool | None = None


@dataclass(frozen=True)
class Trial:
    """The outcome of a task: `rows` has each question with both answers and their primary scores.

    `tokens_before` and `tokens_after` are those of the wanted answer, where there is one.
    """

    number: int
    task: Task
    rows: pd.DataFrame
    record: EditRecord

    @property
    def scores(self) -> pd.DataFrame:
        """Mean score of each kind: columns kind, before, after, probes."""
        means = {side: (f"score_{side}", "mean") for side in ("before", "after")}
        scores = self.rows.groupby("kind").agg(**means, probes=("number", "size"))
        return scores.loc[[kind for kind in KINDS if kind in scores.index]].reset_index()


class Library:
    """The edits of a model's world or of a benchmark's file, and the probes around each of them.

    `real`: the model is of the real world, so are our own edits and what is asked around them; else
    both are of a fictional world's split. An edit that brings no locality probes gets some: a
    related and a random document, an unrelated and a near triple, none of which shares a fact with
    it. An edit of a person's own in the fictional world gets exercises of a general skill too.
    Raises InputError as `dataset.load` does.
    """

    def __init__(
        self,
        paths: Paths,
        split: str = "test",
        data_file: str = "",
        world_seed: int = 1,
        real: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split: unknown split '{split}'{nearest(split, SPLITS)}")
        self.paths, self.real, self._exercises = paths, real, ()
        self.parameters = {"data_file": data_file, "split": split, "world_seed": world_seed}
        if real:
            self.edits, self._documents, self._clozes = _real()
        else:
            world = world_files.ensure(paths.home / "results", world_seed)
            sources = card.of_world(world, split).sources()
            self.edits, self._clozes = sources.edits, sources.clozes
            self._documents = sources.documents
            general = world / split / world_files.GENERAL
            self._exercises = formats.load_locality(general, self.edits)
        self._probes = {edit.id: [*edit.probes] for edit in self.edits}
        for probe in self._exercises:
            self._probes[probe.edit].append(probe)
        if paths.data != "world":
            found = dataset.load(paths.profile, paths.data, split, data_file=data_file)
            self.edits, self._probes = found.edits, found.probes

    def suiting(self, model: str) -> "Library":
        """Return this library, or the like one of a model's other world."""
        real = world_of(model) is None
        return self if real == self.real else Library(self.paths, **self.parameters, real=real)

    def find(self, name: str) -> Edit:
        """Return the edit of this id; InputError naming the nearest one."""
        by_id = {edit.id: edit for edit in self.edits}
        if name not in by_id:
            raise InputError(f"edit: unknown edit '{name}'{nearest(str(name), by_id)}")
        return by_id[name]

    def search(self, words: str) -> list[Edit]:
        """Return the edits whose id, question or answer holds every one of these words."""
        texts = {edit: f"{edit.id} {edit.question} {edit.answer}".casefold() for edit in self.edits}
        wanted = words.casefold().split()
        return [edit for edit, text in texts.items() if all(word in text for word in wanted)]

    def probes(self, edit: Edit, paraphrases: Sequence[str] = ()) -> tuple[Probe, ...]:
        """Return every question about an edit; further paraphrases are asked like the first."""
        own = self._probes[edit.id] if edit in self.edits else edit.probes
        shared = {"edit": edit.id, "kind": "paraphrase", "reference": edit.answer}
        more = [
            Probe(number=number, question=text, **shared)
            for number, text in enumerate(paraphrases, start=1 if edit.paraphrase else 0)
        ]
        has_locality = any(probe.kind in AROUND for probe in own)
        return (*own, *more, *(() if has_locality else self._around(edit)))

    @cached_property
    def _relevance(self) -> retrieval.Score:
        return retrieval.build("bm25", [*map(retrieval.passage, self._documents)])

    def _around(self, edit: Edit) -> tuple[Probe, ...]:
        (ranked,) = retrieval.ranking(self._relevance([edit.question]))
        looked_at = [self._documents[index] for index in (*ranked[:NEAR], *ranked[NEAR::STRIDE])]
        alone = Sources(((edit,),), tuple(looked_at), self._clozes)
        floor = min(NEAR, len(self._documents) // 4)
        builder = Builder(alone, Settings(retriever="bm25", floor=floor), asked=self.real)
        builder.words = 60  # as the world's texts, however short the edit is
        found = [*builder.block((edit,))]
        if edit not in self.edits:
            lent = (one for one in self._exercises if one.edit == self._exercises[0].edit)
            found += (probe.model_copy(update={"edit": edit.id}) for probe in lent)
        return tuple(found)


def _real() -> tuple[tuple[Edit, ...], tuple[Document, ...], tuple[Cloze, ...]]:
    """Return our own edits of the real world; documents to ask for, and facts."""
    own, leads = read_yaml(REAL), find_files("documents")
    edits = tuple(Edit(id=name, **fields) for name, fields in own["edits"].items())
    documents = gather(leads) if leads else []
    for topic, texts in () if leads else own["subjects"].items():
        documents += [Document(title, title, text, topic=topic) for title, text in texts.items()]
    return edits, tuple(documents), formats.load_clozes(card.GENERAL_FACTS)


def at_hand() -> str:
    """Return the model to begin with: smollm2 where `make model` has made it, else embedded."""
    try:
        source("smollm2")
    except InputError:
        return "embedded"
    return "smollm2"


def starting(folder: Path, model: str) -> tuple[dict[str, Method], set[str]]:
    """Return every method as tuned for the model, and the names of those that are not tuned.

    Where nothing is tuned for it yet, REAL may have settings to start from.
    """
    methods, name = catalog.configured(folder, model), catalog.own_name(model)
    tuned = {method for method, one in catalog.catalog(folder).items() if name in one.file.tuned}
    for method, own in read_yaml(REAL)["start"].get(name, {}).items():
        if method not in tuned:
            methods[method] = catalog.changed(methods[method], own, f"{REAL}: start: {method}")
    return methods, {*catalog.catalog(folder)} - tuned


def own_edit(**fields: Any) -> Edit:
    """Make an edit of a person's own; Refused, naming the field, where one is empty."""
    for name in ("question", "answer"):
        if not str(fields.get(name, "")).strip():
            raise Refused(name, f"The {name} is empty; expected a text.")
    return Edit(**{**fields, "id": OWN_ID})


class Bench:
    """A model, the edit in its weights if there is one, and the trials so far."""

    def __init__(self, name: str, library: Library) -> None:
        self.name, self.library = name, library
        self.model, self.tokenizer = load(name)
        self.modules, _ = load(name, device="meta")  # the same without weights, which none wraps
        self.methods, self.untuned = starting(library.paths.home / "params", name)
        self.folder = library.paths.home / "results" / "explore"
        self.trials: list[Trial] = []
        self.edited: nn.Module | None = None
        self._stop, self._undo = threading.Event(), ExitStack()
        self._untouched: list[tuple[nn.Parameter, Tensor]] = []  # with their values before
        self._before: dict[Any, pd.DataFrame] = {}  # by questions, what the untouched model says

    def stop(self) -> None:
        """Let what runs raise Stopped at its next step, from any thread."""
        self._stop.set()

    def check(self, edit: Edit, method: Method) -> None:
        """Refuse, naming the field, an edit that the method cannot write into this model."""
        with refused("layers"):
            method.weights(self.modules)
        with refused("answer"):
            method.examples(self.modules, self.tokenizer, [edit])

    def why_not(self, method: Method, factor: str, level: str) -> str:
        """Say why a level does not go with the method on this model; empty if it does."""
        if factor not in method.factors:
            return f"{method.name} ({method.family}) has no such choice"
        if level not in levels(method)[factor]:
            return "a choice of adapters only (LoRA, AdaLoRA)"
        try:
            self.check(self.library.edits[0], vary(method, {factor: level}))
        except InputError as error:
            return str(error)
        return ""

    def write(
        self, task: Task, progress: Callable[[str, int, float], None] = lambda *_: None
    ) -> Trial:
        """Ask, write the edit, ask again; the edit stays in the weights until `undo`.

        `progress(phase, steps, loss)` follows. Raises Refused as `check` does, Stopped, and what
        `edited` raises, all with the weights untouched.
        """
        self.undo()
        self._stop.clear()
        if task.chat is None and not self.tokenizer.chat_template:
            raise Refused("chat", "The tokenizer has no chat template: ask with raw prompts.")
        self.check(task.edit, task.method)
        questions = self.library.probes(task.edit, task.paraphrases), task.chat

        def report(steps: int, loss: float, phase: str = WRITING) -> None:
            progress(phase, steps, loss)
            if self._stop.is_set():
                raise Stopped

        report(0, 0.0, ASKING_BEFORE)
        if questions not in self._before:
            self._before[questions] = self._ask(self.model, *questions)
        if task.method.measured is not None:
            measure_world(self.model, self.tokenizer)
            measure_for(task.method, self.model, self.tokenizer)
        weights = task.method.weights(self.model).values()
        untouched = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
        report(0, 0.0)
        with ExitStack() as stack:
            written = edited(self.model, self.tokenizer, [task.edit], task.method, report)
            m = stack.enter_context(written)
            report(0, 0.0, ASKING_AFTER)
            rows = _side_by_side(self._before[questions], self._ask(m, *questions))
            report(0, 0.0, "done")
            self.trials.append(Trial(len(self.trials) + 1, task, rows, m.edit_record))
            self._undo, self._untouched, self.edited = stack.pop_all(), untouched, m
        return self.trials[-1]

    def undo(self) -> None:
        """Undo the edit in the weights, if there is one, bit for bit."""
        self.edited, self._untouched = None, []
        self._undo.close()

    def keep(self, name: str) -> str:
        """Save the edit in the weights below results/explore/; return the lines that load it."""
        with refused("keep"):
            folder = self.folder / check_name("Keep as", name.strip())
            if folder.exists():
                raise InputError(f"{name} is there already; choose another name.")
            save(self.model if self.edited is None else self.edited, folder)
        base = f'models.load("{self.name}")[0]'
        return f'from uke import methods, models\nmodel = methods.load({base}, "{folder}")'

    def free_name(self) -> str:
        """Propose a name to keep the edit under."""
        return f"edit-{1 + len(list(self.folder.glob('edit-*')))}"

    def ask(self, question: str, chat: bool | None = None) -> tuple[str, str | None]:
        """Answer a free question without the edit in the weights, and with it (None if none is)."""
        if not question.strip():
            raise Refused("ask", "The question is empty; expected something to ask.")
        edit = self.trials[-1].task.edit.id if self.edited is not None else OWN_ID
        probe = Probe(edit=edit, kind="general", question=question.strip(), reference="-")
        model = self.model if self.edited is None else self.edited
        options = {"max_new_tokens": MAX_NEW_TOKENS, "chat": chat}
        ask = partial(answer, model, self.tokenizer, [probe], **options)
        with refused("ask"):
            with ExitStack() as stack:  # the edit is out of the model, whatever form it has
                if hasattr(self.edited, "peft_config"):
                    stack.enter_context(self.edited.disable_adapter())
                if passages := vars(self.model).pop("passages", None):
                    stack.callback(setattr, self.model, "passages", passages)
                weights = {str(number): pair[0] for number, pair in enumerate(self._untouched)}
                stack.enter_context(kept(self.model, weights))
                for weight, value in self._untouched:
                    weight.data.copy_(value)
                (before,) = ask()
            return before, None if self.edited is None else ask()[0]

    def _ask(self, model: nn.Module, probes: Sequence[Probe], chat: bool | None) -> pd.DataFrame:
        """Answer and score all probes; read the tokens of those whose reference is wanted."""
        answers = answer(model, self.tokenizer, probes, max_new_tokens=self._limit, chat=chat)
        wanted = [probe for probe in probes if probe.kind in EFFICACY]
        tokens = iter(token_probabilities(model, self.tokenizer, wanted, chat=chat))
        read = [next(tokens) if one.kind in EFFICACY else [] for one in probes]
        return scored(probes, answers).assign(tokens=read)

    def _limit(self, probe: Probe) -> int:
        """Return an answer's tokens: those of its kind; around an edit of a large model fewer."""
        most = token_limit(probe, self.tokenizer)
        return min(most, QUICK) if self.library.real and probe.kind not in EFFICACY else most


def _side_by_side(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Return one row a question: both answers, and the primary score of its kind for each."""
    rows = with_before(after, before).rename(columns={"answer": "after", "tokens": "tokens_after"})
    scores = []
    for old, new in zip(before.to_dict("records"), rows.to_dict("records"), strict=True):
        kind = KINDS[new["kind"]]
        correct = (old[kind.metric], new[kind.metric])
        unchanged = (1.0, new[f"{kind.metric}_before"])
        scores.append(correct if kind.against == "reference" else unchanged)
    rows[["score_before", "score_after"]] = scores
    rows["tokens_before"] = before["tokens"]
    pairs = [f"{name}_{side}" for name in ("tokens", "score") for side in ("before", "after")]
    return rows[["kind", "number", "question", "reference", "before", "after", *pairs]]


def to_run(task: Task, library: Library) -> dict[str, Any]:
    """Return a task as plain values: one of the notebook's parameter `runs`."""
    edit, name = task.edit, task.method.name
    own = edit.model_dump(mode="json", exclude={"id"}, exclude_defaults=True)
    return {
        "edit": edit.id if edit in library.edits else own,
        "method": name,
        "changes": catalog.changes(task.method, catalog.METHODS.get(name, task.method)),
        "paraphrases": list(task.paraphrases),
        "chat": task.chat,
    }


def to_task(run: Mapping[str, Any], library: Library, methods: Mapping[str, Method]) -> Task:
    """Return the task of one of the notebook's `runs`; InputError for what is unknown in it.

    `edit` is an id, or the fields of an edit of one's own. `changes` are those from the published
    method; without them the method is as tuned for the model.
    """
    fields = ("edit", "method", "changes", "paraphrases", "chat")
    for name in run:
        if name not in fields:
            raise InputError(f"runs: unknown field '{name}'{nearest(str(name), fields)}")
    edit = run.get("edit", "")
    edit = own_edit(**edit) if isinstance(edit, Mapping) else library.find(edit)
    method = catalog.find(run.get("method", "FT-UKE"), methods, "runs: ")
    if "changes" in run:
        published = catalog.METHODS.get(method.name, method)
        method = catalog.changed(published, run["changes"], f"runs: {method.name}")
    return Task(edit, method, tuple(run.get("paraphrases", ())), run.get("chat"))


def export(bench: Bench, path: Path) -> Path:
    """Write the session as a parameter file with which papermill repeats it; return its path."""
    session = {"model": bench.name, "data": bench.library.paths.data, "widgets": "never"}
    session |= bench.library.parameters
    session["runs"] = [to_run(trial.task, bench.library) for trial in bench.trials]
    return write_atomic(path, yaml.safe_dump(session, sort_keys=False, allow_unicode=True))


def comparison(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return one row a trial: edit, method, settings, mean score of each kind after it, steps."""
    rows = []
    for trial in trials:
        method, means = trial.task.method, trial.scores.set_index("kind")["after"]
        row = {"number": trial.number, "edit": trial.task.edit.question, "method": method.name}
        row["settings"] = catalog.differences(method, catalog.METHODS.get(method.name, method))
        rows.append(row | means.to_dict() | {"steps": trial.record.steps})
    return pd.DataFrame(rows)
