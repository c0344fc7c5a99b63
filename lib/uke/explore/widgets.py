"""The widgets of notebooks/explore.ipynb: pass a person's choices on, show what comes back."""

import contextvars
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as w
from IPython import get_ipython

from uke.data.edits import Edit
from uke.errors import InputError
from uke.explore import bench as benches
from uke.explore import html
from uke.explore.bench import WRITING, Bench, Refused, Task, own_edit, refused
from uke.files import read_yaml
from uke.methods.catalog import changed
from uke.methods.method import Method
from uke.methods.recipes import FACTORS, SINGLE_BLOCKS, vary
from uke.models.model import blocks, layer_index

WORDS = read_yaml(Path(__file__).with_name("words.yaml"))
LABELS: dict[str, tuple[str, dict[str, str]]] = WORDS["factors"]
FIELDS = ("model", "question", "answer", "details", "layers", "learning_rate", "steps", "chat")
FIELDS += ("keep", "action", "ask")  # what may be refused, with a note beside its control


def attended(widgets: str = "auto") -> bool:
    """Return whether a person works the notebook in a browser, or what `always` and `never` say."""
    # Jupyter's server tells its kernels the name of their session; papermill does not.
    return widgets == "always" or (widgets == "auto" and "JPY_SESSION_NAME" in os.environ)


def show(bench: Bench, runs: Sequence[Mapping[str, Any]], widgets: str = "auto") -> Any:
    """Return the panel, or where nobody attends the static page of these runs, each undone."""
    tasks = [benches.to_task(run, bench.library, bench.methods) for run in runs]
    if attended(widgets):
        return Panel(bench, tasks[0].edit)
    for task in tasks:
        bench.write(task)
        bench.undo()
    compared = benches.comparison(bench.trials)
    return html.Page(html.show.page(html.STYLE, bench.trials, compared))


def output(text: str = "") -> w.HTML:
    """Return a place for HTML with the explorer's style."""
    return w.HTML(text).add_class("uke")


class Levels(w.HBox):
    """The levels of one factor as buttons, one of them chosen (✓); the others may be greyed out."""

    def __init__(self, factor: str, chosen: Callable[[], None]) -> None:
        self.factor, self._chosen, self.why = factor, chosen, output()
        self.own = self.value = ""  # the level of the method, and the chosen one
        self.buttons = {level: w.ToggleButton() for level in FACTORS[factor].levels}
        for level, button in self.buttons.items():
            button.observe(partial(self._click, level), "value")
        label = output(html.show.fine(LABELS[factor][0], "uke-name"))
        super().__init__([label, w.HBox([*self.buttons.values(), self.why])])
        self.add_class("uke-levels")

    def refresh(self, bench: Bench, method: Method) -> None:
        """Mark the chosen level, grey out those that do not go with the method and say why."""
        names_by_reason: dict[str, list[str]] = defaultdict(list)
        (label, labels), depth = LABELS[self.factor], len(blocks(bench.modules))
        for level, button in self.buttons.items():
            name = labels.get(level, level.replace("_", " "))
            if level in SINGLE_BLOCKS:
                name = f"block {layer_index(*FACTORS[self.factor].levels[level], depth)}"
            reason = bench.why_not(method, self.factor, level)
            button.disabled, button.value = bool(reason), level == self.value and not reason
            button.description = f"✓ {name}" if button.value else name
            button.tooltip = f"{label}: {name}" + (f" (not here: {reason})" if reason else "")
            names_by_reason[reason].append(name)
        # A reason that holds for every level holds for every factor: the form says it once.
        some = names_by_reason.pop("", None)
        reasons = (f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items())
        self.why.value = html.show.fine("; ".join(reasons) if some else "", "uke-why")

    def _click(self, level: str, change: Mapping[str, Any]) -> None:
        if change["new"] != (level == self.value) and not self.buttons[level].disabled:
            # A second click goes back to the method's own level.
            self.value = level if change["new"] else self.own
            self._chosen()


class Form(w.HBox):
    """What to write and how; `task()` reads it."""

    def __init__(self, bench: Bench, notes: Mapping[str, w.HTML]) -> None:
        words, optional = "words of a question or answer", "optional, one on a line"
        self.search = w.Text(description="Search edits", placeholder=words)
        self.picked = w.Select(description="Edit", rows=4)
        self.own = w.Button(description="Write your own", tooltip="Empty the form below")
        self.found, self.why = output(), output()
        self.question = w.Text(description="Question")
        self.answer = w.Textarea(description="New answer", rows=5)
        self.paraphrases = w.Textarea(description="Paraphrases", rows=2, placeholder=optional)
        example = f"{optional}: When was he born? | 1802"
        self.details = w.Textarea(description="Details", rows=4, placeholder=example)
        self.method = w.Dropdown(description="Method")
        self.levels = {factor: Levels(factor, self._refresh) for factor in FACTORS}
        place = "optional, in place of the above: 2, 5 or 0.5"
        self.numbers = {
            "layers": w.Text(description="Own blocks", placeholder=place),
            "learning_rate": w.Text(description="Learning rate"),
            "steps": w.Text(description="Steps, at most"),
        }
        through = {"chat template": (None,), "raw prompt": (False,)}  # None alone: no choice
        self.chat = w.Dropdown(description="Asked through", options=through)
        self.own.on_click(lambda _: self.fill(Edit.model_construct(question="", answer="")))
        self.search.observe(lambda _: self._list(), "value")
        self.picked.observe(lambda change: change["new"] and self.fill(change["new"]), "value")
        self.method.observe(lambda change: change["new"] and self._reset(), "value")
        what = [output(html.show.heading("1. What to write")), self.search, self.picked]
        what += [w.HBox([self.own, self.found]), self.question, notes["question"], self.answer]
        what += [notes["answer"], self.paraphrases, self.details, notes["details"]]
        how = [output(html.show.heading("2. How to write it")), self.method, self.why]
        how += [*self.levels.values(), notes["layers"]]
        for field, box in {**self.numbers, "chat": self.chat}.items():
            how += [box] if field == "layers" else [box, notes[field]]
        super().__init__([w.VBox(what), w.VBox(how)])
        self.add_class("uke-form")
        self.offer(bench)

    def offer(self, bench: Bench) -> None:
        """Offer the edits of this bench's library and the methods of its model."""
        self.bench, self.method.options = bench, list(bench.methods)
        self.method.value = "FT-UKE"
        self._reset()
        self._list()

    def fill(self, edit: Edit) -> None:
        """Put an edit into the form, where it can be changed."""
        self.picked.value = self.picked.value if edit.question else ""
        self.question.value, self.answer.value = edit.question, edit.answer
        self.paraphrases.value = edit.paraphrase or ""
        self.details.value = "\n".join(f"{one.question} | {one.answer}" for one in edit.details)

    def task(self) -> Task:
        """Read the form; Refused, naming the field, if it cannot be done."""
        first, *more = [*filter(None, map(str.strip, self.paraphrases.value.splitlines())), None]
        details = []
        for number, line in enumerate(filter(str.strip, self.details.value.splitlines()), 1):
            question, _, answer = (part.strip() for part in line.partition("|"))
            if not (question and answer):
                expected = "expected a question, a bar and its answer: When was he born? | 1802"
                raise Refused("details", f"Details, line {number}: {expected}")
            details.append({"question": question, "answer": answer})
        fields: dict[str, Any] = {"paraphrase": first, "details": details}
        fields |= {name: getattr(self, name).value.strip() for name in ("question", "answer")}
        edit, method = own_edit(**fields), self._method()
        self.bench.check(edit, method)
        hidden = {"id": edit.id, "facts": (), "extra": ()}  # what the form does not show
        edits = self.bench.library.edits
        same = (known for known in edits if edit == known.model_copy(update=hidden))
        return Task(next(same, edit), method, tuple(more[:-1]), *self.chat.value)

    def _method(self) -> Method:
        chosen = {factor: levels.value for factor, levels in self.levels.items() if levels.value}
        method = vary(self.bench.methods[self.method.value], chosen)
        for field, box in self.numbers.items():
            if box.disabled or (field == "layers" and not box.value.strip()):
                continue
            try:
                numbers = json.loads(f"[{box.value or 'empty'}]")
            except ValueError:
                text = f"{box.description}: expected a number, found {box.value!r}"
                raise Refused(field, text) from None
            with refused(field):
                value = numbers if field == "layers" else numbers[0]
                method = changed(method, {field: value}, box.description)
        return method

    def _list(self) -> None:
        found, every = self.bench.library.search(self.search.value), self.bench.library.edits
        options = [(edit.question, edit) for edit in found]
        self.picked.options = [("– choose one, or write your own –", ""), *options]
        self.found.value = html.show.fine(f"{len(found)} of {len(every)} edits", "", "status")

    def _reset(self) -> None:
        """Show the levels and numbers that the method has."""
        method = self.bench.methods[self.method.value]
        for field, box in self.numbers.items():
            value = getattr(method, field, None)
            box.disabled = value is None or (field == "layers" and not method.factors)
            box.value = "" if field == "layers" or value is None else f"{value:g}"
        for factor, levels in self.levels.items():
            offered = levels.buttons if factor in method.factors else ()
            same = (level for level in offered if vary(method, {factor: level}) == method)
            levels.own = levels.value = next(same, "")
        self._refresh()

    def _refresh(self) -> None:
        method = self.bench.methods[self.method.value]
        reason = "" if method.factors else self.bench.why_not(method, "layers", "all")
        if method.name in self.bench.untuned:
            reason = f"Not tuned for this model: try rates and steps of your own. {reason}"
        self.why.value = html.show.fine(reason)
        for levels in self.levels.values():
            levels.refresh(self.bench, method)


class Panel(w.VBox):
    """Everything a person can do with one edit; what was begun ends with `thread`."""

    def __init__(self, bench: Bench, first: Edit) -> None:
        self.bench, self.busy, self.thread = bench, False, threading.Thread()
        self.notes = {field: output() for field in FIELDS}
        self.form = Form(bench, self.notes)
        self.form.fill(first)
        bench.library.probes(first)  # reads facts of documents, for which only the first edit waits
        self.model = w.Text(description="Model", value=bench.name)
        own = "a question of your own, answered without and with the edit"
        self.free = w.Text(description="Ask anything", placeholder=own)
        self.name = w.Text(description="Keep as", value=bench.free_name()).add_class("uke-narrow")
        self.curve, self.kept, self.reply, self.shown = (output() for _ in range(4))
        self.compared, self.exported = output(), output()
        self.buttons = {}
        for name, text in WORDS["actions"].items():
            self.buttons[name] = w.Button(description=name, tooltip=text)
            self.buttons[name].on_click(partial(self._click, name))
        self.buttons["Edit"].button_style = "primary"
        notes, (load, edit, stop, undo, keep, ask, export) = self.notes, self.buttons.values()
        rows = [output(f"<style>{html.STYLE}</style>"), w.HBox([self.model, load]), notes["model"]]
        rows += [self.form, output(html.show.heading("3. Before and after"))]
        rows += [w.HBox([edit, stop, undo, self.name, keep]), notes["keep"], self.kept]
        rows += [notes["action"], self.curve]
        rows += [w.HBox([self.free, ask]), notes["ask"], self.reply, self.shown]
        rows += [output(html.show.heading("4. The edits of this session")), self.compared]
        super().__init__([*rows, w.HBox([export]), self.exported])
        self.add_class("uke-panel")
        self._refresh()
        if kernel := getattr(get_ipython(), "kernel", None):
            # What the kernel does on an interrupt after this cell, instead of ignoring it.
            kernel.saved_sigint_handler = lambda *_: self._stop()

    def say(self, field: str, text: str, role: str = "status") -> None:
        """Show a line beside the control of a field, and let screen readers say it."""
        self.notes.get(field, self.notes["action"]).value = html.show.message(text, role)

    def _click(self, name: str, _: Any) -> None:
        """Begin what a button stands for in a thread, so that Stop and an interrupt are heard."""
        if name == "Stop":
            return self._stop()
        if self.busy:
            busy = "Still at work on what was asked before: press Stop to end it."
            return self.say("action", busy, "alert")
        self.busy = True
        for field in FIELDS:
            self.say(field, "")
        self.say("action", "At work. Stop ends it and leaves the model as it was.")
        self._refresh()
        act = getattr(self, f"_{name.split()[0].lower()}")
        # Widgets report to the cell or click that they were called from, which the context knows.
        run = partial(contextvars.copy_context().run, self._run, act)
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def _run(self, act: Callable[[], str | None]) -> None:
        """Do it and say last how it ended; whatever happens, the widgets go on."""
        time.sleep(0.15)  # what was typed last reaches the kernel: a click may overtake it
        field, role = "action", "status"
        try:
            text = act() or ""
        except benches.Stopped:
            text = "Stopped: the model is as it was before the edit."
        except Exception as error:
            known = isinstance(error, InputError | FloatingPointError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            field, role = getattr(error, "field", "action"), "alert"
        self.busy = False
        self._refresh()
        self.say("action", "")
        self.say(field, text, role)

    def _stop(self) -> None:
        if self.busy:
            self.bench.stop()
            self.say("action", "Stopping …")

    def _refresh(self) -> None:
        """Show buttons and the table of the session as things stand."""
        trials, edited = self.bench.trials, self.bench.edited is not None
        for name, button in self.buttons.items():
            impossible = name in ("Undo", "Keep") and not edited
            button.disabled = impossible or self.busy != (name == "Stop")
        caption = "Mean score of each kind after the edit, from 0 to 1."
        self.compared.value = html.show.table(benches.comparison(trials), caption) if trials else ""
        self.buttons["Export session"].layout.display = None if trials else "none"

    def _load(self) -> str:
        with refused("model"):
            if not (name := self.model.value.strip()):
                raise InputError("No model is named; expected embedded, a directory or a hub name.")
            bench = Bench(name, self.bench.library.suiting(name))
        other = bench.library is not self.bench.library
        self.bench = bench
        self.form.offer(bench)
        if other:
            self.form.fill(bench.library.edits[0])
        for outcome in (self.shown, self.curve, self.reply, self.kept, self.exported):
            outcome.value = ""
        return f"{name} is loaded; a new session begins."

    def _edit(self) -> str:
        task = self.form.task()
        self._losses, self._drawn, self.kept.value, self.reply.value = [], 0.0, "", ""
        started = time.perf_counter()
        trial = self.bench.write(task, partial(self._watch, task.method))
        took, name = f"{time.perf_counter() - started:.1f} s", f"Edit {trial.number}"
        self.curve.value = ""
        self.shown.value = html.show.result(trial, f"{name}: {task.method.name}")
        return f"{name} is in the weights, written and asked in {took}. Undo takes it out again."

    def _watch(self, method: Method, phase: str, steps: int, loss: float) -> None:
        """Draw the loss so far as a curve, and how many of the steps are done."""
        self._losses += [loss] if steps else []
        writing = phase == WRITING
        if writing and time.perf_counter() - self._drawn < 0.1:
            return
        self._drawn, most = time.perf_counter(), getattr(method, "steps", 0)
        text = f"step {steps} of at most {most}" if writing and steps <= most else phase
        share = min(1.0, len(self._losses) / max(1, most))
        curve = html.show.curve(self._losses, getattr(method, "stop_loss", 0.0))
        self.curve.value = html.show.meter("Training", share, text) + curve

    def _undo(self) -> str:
        self.bench.undo()
        task = self.bench.trials[-1].task
        now, _ = self.bench.ask(task.edit.question, task.chat)
        self.shown.value = html.show.undone(task.edit.question, now)
        return "The edit is out of the weights: the model is as it was, bit for bit."

    def _keep(self) -> None:
        lines = self.bench.keep(self.name.value)
        self.kept.value = html.show.code("Kept. These two lines load it elsewhere:", lines)
        self.name.value = self.bench.free_name()

    def _ask(self) -> None:
        question = self.free.value.strip()
        answers = self.bench.ask(question, *self.form.chat.value)
        self.reply.value = html.show.reply(question, *answers)

    def _export(self) -> None:
        number = 1 + len(list(self.bench.folder.glob("session-*.yaml")))
        path = benches.export(self.bench, self.bench.folder / f"session-{number}.yaml")
        command = f"papermill -f {path} notebooks/explore.ipynb {path.with_suffix('.ipynb')}"
        introduction = f"Written to {path}. In the project's folder this repeats it:"
        self.exported.value = html.show.code(introduction, command)
