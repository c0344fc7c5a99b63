"""The widgets of notebooks/explore.ipynb: they pass on what a person chooses (`workbench`) and show what comes back (`markup`)."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets as w
import torch

from uke import choices, markup, sessions
from uke.choices import Refused
from uke.controls import ROW, Form, Notes, heading, line
from uke.errands import Errands
from uke.errors import InputError
from uke.recipes import FACTORS, Recipe, levels, vary
from uke.workbench import Bench, Stopped, Task, Trial

FIELDS = ("model", "question", "answer", "details", "method", "layers", "learning_rate", "steps", "chat", "action", "keep", "ask", "export")
ELSEWHERE = {"components": "layers", "chat_template": "layers"}  # fields whose control has its line there
ACTIONS = {
    "Load": "Load this model and begin a new session",
    "Edit": "Ask, write the edit into the weights, ask again",
    "Stop": "End what runs; the model is as before the edit",
    "Undo": "Take the edit out of the weights again",
    "Keep": "Save the edit below results/explore",
    "Ask": "Answer your question without and with the edit",
    "Repeat": "Repeat an edit of this session with one factor at another level",
    "Export session": "Write the edits of this session as a parameter file for papermill",
}
BUSY = "Still at work on what was asked before: press Stop to end it."
STOPPED = "Stopped: the model is as it was before the edit."
EVERY = 0.1  # seconds between two drawings of the loss


def attended(choice: str = "auto") -> bool:
    """Whether a person works the notebook in a browser, as Jupyter's server says to its kernels; `always` and `never` overrule that."""
    return choice == "always" or (choice == "auto" and "JPY_SESSION_NAME" in os.environ)


def show(bench: Bench, runs: Sequence[Mapping[str, Any]], widgets: str = "auto") -> "Panel | markup.Page":
    """The widgets, or where nobody attends the static page of these runs, each written and taken back."""
    tasks = [sessions.read_down(run, bench.library, bench.methods) for run in runs]
    if attended(widgets):
        return Panel(bench, tasks[0] if tasks else None)
    for task in tasks:
        bench.write(task)
        bench.undo()
    return markup.several(bench.trials, sessions.compared(bench.trials))


class Panel(w.VBox):
    """Everything a person can do with one edit; `bench` holds the model, `wait()` returns when what was begun has ended."""

    def __init__(self, bench: Bench, task: Task | None = None) -> None:
        self.bench, self.errands = bench, Errands(lambda: self.bench.stop())
        self.notes, self._course = Notes(FIELDS, other="action"), (0.0, [])
        self.form = Form(bench, self.notes)
        first = task.edit if task else bench.library.edits[0]
        self.form.fill(first)
        bench.warm(first)
        self.model = line(description="Model", value=bench.name, placeholder="embedded, a directory or a hub name")
        self.free = line(description="Ask anything", placeholder="a question of your own, answered without and with the edit")
        self.name = w.Text(description="Keep as", value=bench.free_name(), style={"description_width": "4rem"}, layout=w.Layout(width="14rem"))
        self.repeated, self.level = (w.Dropdown(description=text, layout=w.Layout(width="auto"), style={"description_width": "initial"}) for text in ("Repeat edit", "with"))
        self.course, self.kept, self.reply, self.shown, self.compared, self.exported = (w.HTML() for _ in range(6))
        self.buttons = {name: w.Button(description=name, tooltip=said, layout=w.Layout(width="auto", min_width="5rem")) for name, said in ACTIONS.items()}
        self.buttons["Edit"].button_style = "primary"
        for name, button in self.buttons.items():
            button.on_click(partial(self._clicked, getattr(self, f"_{name.split()[0].lower()}")))
            button.add_class("uke-action")
        self.repeated.observe(lambda change: change["new"] and self._offer(), "value")
        self.again = w.HBox([self.repeated, self.level, self.buttons["Repeat"], self.buttons["Export session"]], layout=ROW)
        super().__init__([w.HTML(f"<style>{markup.STYLE}</style>"), *self._rows()])
        self.add_class("uke-panel")
        self._refresh()

    def _rows(self) -> list[w.Widget]:
        note, b = self.notes, self.buttons
        return [
            w.HBox([self.model, b["Load"]], layout=ROW), note["model"], self.form, heading("3. Before and after"),
            w.HBox([b["Edit"], b["Stop"], b["Undo"], self.name, b["Keep"]], layout=ROW), note["keep"], self.kept, note["action"], self.course,
            w.HBox([self.free, b["Ask"]], layout=ROW), note["ask"], self.reply, self.shown, heading("4. The edits of this session"),
            self.compared, self.again, note["export"], self.exported,
        ]  # fmt: skip

    def wait(self, seconds: float | None = None) -> None:
        self.errands.wait(seconds)

    def _clicked(self, act: Callable[[], None], _: Any) -> None:
        """Do it, or say beside the control what is wrong with what was asked."""
        if act == self._stop:
            return act()
        if self.errands.busy:
            return self.notes.say("action", BUSY, "alert")
        self.notes.clear()
        try:
            act()
        except Exception as error:  # whatever it is, the widgets go on
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        field = ELSEWHERE.get(getattr(error, "field", ""), getattr(error, "field", "action"))
        if isinstance(error, Stopped):
            return self.notes.say("action", STOPPED)
        text = str(error) if isinstance(error, (InputError, FloatingPointError)) else f"{type(error).__name__}: {error}"
        text = "Out of memory; choose fewer weights." if isinstance(error, torch.OutOfMemoryError) else text
        self.notes.say(field, text, "alert")

    def _begin(self, saying: str, errand: Callable[[], str]) -> None:
        """Run an errand beside the kernel, the buttons grey meanwhile; it returns what to say when it is done."""

        def run() -> None:
            try:
                self.notes.say("action", errand())
            except BaseException as error:
                self._explain(error)

        self.notes.say("action", saying)
        self._enable(busy=True)
        if not self.errands.start(run, self._refresh):
            self.notes.say("action", BUSY, "alert")

    def _enable(self, busy: bool = False) -> None:
        there, some = self.bench.edited is not None, bool(self.bench.trials)
        needs = {"Undo": there, "Keep": there, "Repeat": some, "Export session": some}
        for name, button in self.buttons.items():
            button.disabled = not busy if name == "Stop" else busy or not needs.get(name, True)

    def _refresh(self) -> None:
        """Buttons and the table of the session, as things stand."""
        trials = self.bench.trials
        self.compared.value = markup.framed(markup.table(sessions.compared(trials), "Mean score of each kind after the edit, from 0 to 1.")) if trials else ""
        numbers = [(f"{trial.number}: {trial.task.method.name}", trial.number) for trial in trials]
        if tuple(numbers) != self.repeated.options:
            self.repeated.options = numbers
            self.repeated.value = trials[-1].number if trials else None
        self.again.layout.display = None if trials else "none"
        self._enable(self.errands.busy)

    def _offer(self) -> None:
        """What the chosen edit of the session can be repeated with."""
        method = self.bench.trials[self.repeated.value - 1].task.method
        reasons = {factor: choices.reasons(self.bench.frame, self.bench.tokenizer, method, factor) for factor in FACTORS}
        offered = [
            (f"{choices.NAMES[factor]}: {choices.named(self.bench.frame, factor, level)}", (factor, level))
            for factor in (FACTORS if isinstance(method, Recipe) else ())
            for level in levels(method, factor)
            if level != choices.level_of(method, factor) and not reasons[factor][level]
        ]
        self.level.options = offered
        self.level.value = offered[0][1] if offered else None

    def _load(self) -> None:
        name = self.model.value.strip()
        if not name:
            raise Refused("model", "No model is named; expected embedded, a model directory or a hub name.")

        def errand() -> str:
            try:
                bench = Bench(name, self.bench.library)
            except InputError as error:
                raise Refused("model", str(error)) from None
            self.bench.undo()
            self.bench = bench
            self.form.take(bench)
            self.shown.value = self.course.value = self.reply.value = self.kept.value = ""
            return f"{name} is loaded; a new session begins."

        self._begin(f"Loading {name} …", errand)

    def _edit(self) -> None:
        self._write(self.form.task(self.free.value))

    def _repeat(self) -> None:
        if not self.level.value:
            raise Refused("export", "A method that finds its place itself has no factors to change.")
        task = self.bench.trials[self.repeated.value - 1].task
        self._write(replace(task, method=vary(task.method, *self.level.value)))

    def _write(self, task: Task) -> None:
        self._course, self.kept.value, self.reply.value = (0.0, []), "", ""

        def errand() -> str:
            started = time.perf_counter()
            trial = self.bench.write(task, partial(self._watch, task))
            self._show(trial)
            return f"Edit {trial.number} is in the weights, written and asked in {time.perf_counter() - started:.1f} s. Undo takes it out again."

        self._begin("At work. Stop ends it and leaves the model as it was.", errand)

    def _watch(self, task: Task, phase: str, steps: int, loss: float) -> None:
        """The loss so far as a curve, and how many of the steps are done."""
        drawn, losses = self._course
        losses += [loss] if steps else []
        if phase == "writing" and time.perf_counter() - drawn < EVERY:
            return
        self._course = (time.perf_counter(), losses)
        most = task.method.steps
        done = 1.0 if phase == "asking after" else min(1.0, steps / most)
        said = {"asking before": "asking the untouched model", "asking after": f"{len(losses)} steps; asking the edited model"}
        bar = markup.meter("Training", done, said.get(phase, f"step {steps} of at most {most}" if steps <= most else f"step {steps}"))
        self.course.value = bar + markup.framed(markup.curve(losses, task.method.stop_loss))

    def _show(self, trial: Trial) -> None:
        self.course.value = ""
        self.shown.value = markup.framed(markup.result(trial, f"Edit {trial.number}: {trial.task.method.name}"))
        self.name.value = self.bench.free_name()

    def _stop(self) -> None:
        if self.errands.busy:
            self.bench.stop()
            self.notes.say("action", "Stopping …")

    def _undo(self) -> None:
        def errand() -> str:
            self.bench.undo()
            asked = self.bench.trials[-1].task
            self.shown.value = markup.framed(markup.taken_back(asked.edit.question, self.bench.ask(asked.edit.question, asked.chat)[0]))
            return "The edit is out of the weights: the model is as it was, bit for bit."

        self._begin("Taking the edit out …", errand)

    def _keep(self) -> None:
        lines = self.bench.keep(self.name.value)
        self.kept.value = markup.framed(f"<p>Kept. These two lines load it elsewhere:</p>{markup.code(lines)}")

    def _ask(self) -> None:
        question, chat = self.free.value, self.form.chat
        if not question.strip():
            raise Refused("ask", "The question is empty; expected something to ask.")

        def errand() -> str:
            self.reply.value = markup.framed(markup.reply(question.strip(), *self.bench.ask(question, chat)))
            return ""

        self._begin("Asking …", errand)

    def _export(self) -> None:
        folder = self.bench.folder
        number = 1 + sum(1 for _ in folder.glob("session-*.yaml"))
        path = sessions.export(self.bench, folder / f"session-{number}.yaml")
        command = f"papermill -f {path} notebooks/explore.ipynb {path.with_suffix('.ipynb')}"
        self.exported.value = markup.framed(f"<p>Written to {path}. In the project's folder this repeats it:</p>{markup.code(command)}")
