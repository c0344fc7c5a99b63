"""The widgets of notebooks/explore.ipynb: they pass on what a person chooses (`workbench`) and show what comes back (`markup`)."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets as w
import torch

from uke.errors import InputError
from uke.explore import choices, sessions
from uke.explore import html as markup
from uke.explore.bench import Bench, Stopped, Task, Trial
from uke.explore.choices import Refused
from uke.explore.controls import ROW, Form, Notes, heading, line
from uke.explore.errands import Errands
from uke.methods.recipes import FACTORS, levels, vary

FIELDS = (
    "model",
    "question",
    "answer",
    "details",
    "method",
    "layers",
    "learning_rate",
    "steps",
    "chat",
    "action",
    "keep",
    "ask",
    "export",
)
ELSEWHERE = {
    "components": "layers",
    "chat_template": "layers",
}  # fields whose control has its line there
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
AT_WORK = "At work. Stop ends it and leaves the model as it was."
BUSY = "Still at work on what was asked before: press Stop to end it."
STOPPED = "Stopped: the model is as it was before the edit."
EVERY = 0.1  # seconds between two drawings of the loss
SETTLE = 0.15  # seconds in which what was typed last comes in: a click may overtake it on its way to the kernel


def attended(choice: str = "auto") -> bool:
    """Whether a person works the notebook in a browser, as Jupyter's server says to its kernels; `always` and `never` overrule that."""
    return choice == "always" or (choice == "auto" and "JPY_SESSION_NAME" in os.environ)


def show(
    bench: Bench, runs: Sequence[Mapping[str, Any]], widgets: str = "auto"
) -> "Panel | markup.Page":
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
        self.model = line(
            description="Model", value=bench.name, placeholder="embedded, a directory or a hub name"
        )
        self.free = line(
            description="Ask anything",
            placeholder="a question of your own, answered without and with the edit",
        )
        self.name = w.Text(
            description="Keep as",
            value=bench.free_name(),
            style={"description_width": "4rem"},
            layout=w.Layout(width="14rem"),
        )
        self.repeated, self.level = (
            w.Dropdown(
                description=text,
                layout=w.Layout(width="auto"),
                style={"description_width": "initial"},
            )
            for text in ("Repeat edit", "with")
        )
        self.course, self.kept, self.reply, self.shown, self.compared, self.exported = (
            w.HTML() for _ in range(6)
        )
        self.buttons = {
            name: w.Button(
                description=name, tooltip=said, layout=w.Layout(width="auto", min_width="5rem")
            )
            for name, said in ACTIONS.items()
        }
        self.buttons["Edit"].button_style = "primary"
        for name, button in self.buttons.items():
            button.on_click(partial(self._clicked, name))
            button.add_class("uke-action")
        self.repeated.observe(lambda change: change["new"] and self._offer(), "value")
        self.again = w.HBox(
            [self.repeated, self.level, self.buttons["Repeat"], self.buttons["Export session"]],
            layout=ROW,
        )
        super().__init__([w.HTML(f"<style>{markup.STYLE}</style>"), *self._rows()])
        self.add_class("uke-panel")
        self._refresh()

    def _rows(self) -> list[w.Widget]:
        note, b = self.notes, self.buttons
        return [
            w.HBox([self.model, b["Load"]], layout=ROW),
            note["model"],
            self.form,
            heading("3. Before and after"),
            w.HBox([b["Edit"], b["Stop"], b["Undo"], self.name, b["Keep"]], layout=ROW),
            note["keep"],
            self.kept,
            note["action"],
            self.course,
            w.HBox([self.free, b["Ask"]], layout=ROW),
            note["ask"],
            self.reply,
            self.shown,
            heading("4. The edits of this session"),
            self.compared,
            self.again,
            note["export"],
            self.exported,
        ]

    def wait(self, seconds: float | None = None) -> None:
        self.errands.wait(seconds)

    def _clicked(self, name: str, _: Any) -> None:
        """Begin what a button stands for beside the kernel, the others grey meanwhile; it returns what to say when it is done."""
        if name == "Stop":
            return self._stop()
        act, outcome = getattr(self, f"_{name.split()[0].lower()}"), []

        def run() -> None:
            try:
                time.sleep(SETTLE)
                outcome.append(act())
            except BaseException as error:  # whatever it is, the widgets go on
                outcome.append(error)

        def ended() -> None:
            # Said last, so that who hears it can go on at once.
            self._refresh()
            said = outcome[0]
            self._explain(said) if isinstance(said, BaseException) else self.notes.say(
                "action", said
            )

        if not self.errands.start(run, ended, begin=self._starting):
            self.notes.say("action", BUSY, "alert")

    def _starting(self) -> None:
        self.bench.resume()
        self.notes.clear()
        self.notes.say("action", AT_WORK)
        self._enable(busy=True)

    def _explain(self, error: BaseException) -> None:
        field = ELSEWHERE.get(getattr(error, "field", ""), getattr(error, "field", "action"))
        self.notes.say("action", "")
        if isinstance(error, Stopped):
            return self.notes.say("action", STOPPED)
        text = (
            str(error)
            if isinstance(error, (InputError, FloatingPointError))
            else f"{type(error).__name__}: {error}"
        )
        text = (
            "Out of memory; choose fewer weights."
            if isinstance(error, torch.OutOfMemoryError)
            else text
        )
        self.notes.say(field, text, "alert")

    def _enable(self, busy: bool = False) -> None:
        there, some = self.bench.edited is not None, bool(self.bench.trials)
        needs = {"Undo": there, "Keep": there, "Repeat": some, "Export session": some}
        for name, button in self.buttons.items():
            button.disabled = not busy if name == "Stop" else busy or not needs.get(name, True)

    def _refresh(self) -> None:
        """Buttons and the table of the session, as things stand."""
        trials = self.bench.trials
        self.compared.value = (
            markup.framed(
                markup.table(
                    sessions.compared(trials),
                    "Mean score of each kind after the edit, from 0 to 1.",
                )
            )
            if trials
            else ""
        )
        numbers = [(f"{trial.number}: {trial.task.method.name}", trial.number) for trial in trials]
        if tuple(numbers) != self.repeated.options:
            self.repeated.options = numbers
            self.repeated.value = trials[-1].number if trials else None
        self.again.layout.display = None if trials else "none"
        self._enable(self.errands.busy)

    def _offer(self) -> None:
        """What the chosen edit of the session can be repeated with."""
        method = self.bench.trials[self.repeated.value - 1].task.method
        reasons = {
            factor: choices.reasons(self.bench.frame, self.bench.tokenizer, method, factor)
            for factor in FACTORS
        }
        offered = [
            (
                f"{choices.NAMES[factor]}: {choices.named(self.bench.frame, factor, level)}",
                (factor, level),
            )
            for factor in method.factors
            for level in levels(method, factor)
            if level != choices.level_of(method, factor) and not reasons[factor][level]
        ]
        self.level.options = offered
        self.level.value = offered[0][1] if offered else None

    def _load(self) -> str:
        name = self.model.value.strip()
        if not name:
            raise Refused(
                "model", "No model is named; expected embedded, a model directory or a hub name."
            )
        try:
            bench = Bench(name, self.bench.library)
        except InputError as error:
            raise Refused("model", str(error)) from None
        self.bench.undo()
        self.bench = bench
        self.form.take(bench)
        for html in (self.shown, self.course, self.reply, self.kept, self.exported):
            html.value = ""
        return f"{name} is loaded; a new session begins."

    def _edit(self) -> str:
        return self._write(self.form.task(self.free.value))

    def _repeat(self) -> str:
        if not self.level.value:
            raise Refused(
                "export", "A method that finds its place itself has no factors to change."
            )
        task = self.bench.trials[self.repeated.value - 1].task
        return self._write(replace(task, method=vary(task.method, *self.level.value)))

    def _write(self, task: Task) -> str:
        self._course, self.kept.value, self.reply.value = (0.0, []), "", ""
        started = time.perf_counter()
        trial = self.bench.write(task, partial(self._watch, task))
        self._show(trial)
        return f"Edit {trial.number} is in the weights, written and asked in {time.perf_counter() - started:.1f} s. Undo takes it out again."

    def _watch(self, task: Task, phase: str, steps: int, loss: float) -> None:
        """The loss so far as a curve, and how many of the steps are done."""
        drawn, losses = self._course
        losses += [loss] if steps else []
        if phase == "writing" and time.perf_counter() - drawn < EVERY:
            return
        self._course = (time.perf_counter(), losses)
        most = task.method.steps
        done = 1.0 if phase == "asking after" else min(1.0, steps / most)
        said = {
            "asking before": "asking the untouched model",
            "asking after": f"{len(losses)} steps; asking the edited model",
        }
        bar = markup.meter(
            "Training",
            done,
            said.get(
                phase, f"step {steps} of at most {most}" if steps <= most else f"step {steps}"
            ),
        )
        self.course.value = bar + markup.framed(markup.curve(losses, task.method.stop_loss))

    def _show(self, trial: Trial) -> None:
        self.course.value = ""
        self.shown.value = markup.framed(
            markup.result(trial, f"Edit {trial.number}: {trial.task.method.name}")
        )

    def _stop(self) -> None:
        if self.errands.busy:
            self.bench.stop()
            self.notes.say("action", "Stopping …")

    def _undo(self) -> str:
        self.bench.undo()
        asked = self.bench.trials[-1].task
        self.shown.value = markup.framed(
            markup.taken_back(
                asked.edit.question, self.bench.ask(asked.edit.question, asked.chat)[0]
            )
        )
        return "The edit is out of the weights: the model is as it was, bit for bit."

    def _keep(self) -> str:
        lines = self.bench.keep(self.name.value)
        self.kept.value = markup.framed(
            f"<p>Kept. These two lines load it elsewhere:</p>{markup.code(lines)}"
        )
        self.name.value = self.bench.free_name()
        return ""

    def _ask(self) -> str:
        question = self.free.value.strip()
        self.reply.value = markup.framed(
            markup.reply(question, *self.bench.ask(question, self.form.chat))
        )
        return ""

    def _export(self) -> str:
        number = 1 + sum(1 for _ in self.bench.folder.glob("session-*.yaml"))
        path = sessions.export(self.bench, self.bench.folder / f"session-{number}.yaml")
        command = f"papermill -f {path} notebooks/explore.ipynb {path.with_suffix('.ipynb')}"
        self.exported.value = markup.framed(
            f"<p>Written to {path}. In the project's folder this repeats it:</p>{markup.code(command)}"
        )
        return ""
