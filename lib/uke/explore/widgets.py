"""The widgets of notebooks/explore.ipynb: pass a person's choices to the bench, show the outcome."""

import contextvars
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets as w
import torch
from IPython import get_ipython

from uke.data.edits import Edit
from uke.errors import InputError
from uke.explore import html
from uke.explore.bench import (
    Bench,
    Refused,
    Stopped,
    Task,
    comparison,
    export,
    own_edit,
    refused,
    to_task,
)
from uke.methods.catalog import changed
from uke.methods.method import Method
from uke.methods.recipes import FACTORS, combined, vary
from uke.models.model import layer_index
from uke.results.metrics import score

# Of each factor its label, and the labels of levels whose names do not explain themselves.
LABELS: dict[str, tuple[str, dict[str, str]]] = {
    "loss_scope": ("Loss from", {"target_tokens": "all target tokens"}),
    "layers": ("Blocks", {"all": "all blocks"}),
    "components": (
        "Weights",
        {
            "down_proj": "down projection",
            "mlp": "feed-forward",
            "both": "attention and feed-forward",
            "query_value": "query and value",
        },
    ),
    "chat_template": ("Trained through", {"with": "chat template", "without": "raw prompt"}),
    "end_of_turn": ("End of turn", {"with": "learnt", "without": "left out"}),
}
CHAT = {"chat template": None, "raw prompt": False}  # as `Generation.chat` has it
FIELDS = ("model", "question", "answer", "details", "layers", "learning_rate", "steps", "chat")
FIELDS += ("keep", "action", "ask", "export")
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
WORKING = "At work. Stop ends it and leaves the model as it was."
BUSY = "Still at work on what was asked before: press Stop to end it."
STOPPED = "Stopped: the model is as it was before the edit."
EVERY = 0.1  # seconds between two drawings of the loss
SETTLE = 0.15  # seconds in which what was typed last reaches the kernel: a click may overtake it

# Mappings, so that every widget has a layout of its own.
WIDE = {"layout": {"width": "98%", "max_width": "44rem"}, "style": {"description_width": "7.5rem"}}
COLUMNS = {
    "display": "grid",
    "grid_template_columns": "repeat(auto-fit, minmax(min(100%, 24rem), 1fr))",
    "grid_gap": "0.2rem 2rem",
    "max_width": "72rem",
}
ROW = {"flex_flow": "row wrap", "align_items": "center"}


def attended(widgets: str = "auto") -> bool:
    """Return whether a person works the notebook in a browser, or what `always` and `never` say."""
    # Jupyter's server tells its kernels the name of their session; papermill does not.
    return widgets == "always" or (widgets == "auto" and "JPY_SESSION_NAME" in os.environ)


def show(bench: Bench, runs: Sequence[Mapping[str, Any]], widgets: str = "auto") -> Any:
    """Return the panel, or where nobody attends the static page of these runs, each undone."""
    tasks = [to_task(run, bench.library, bench.methods) for run in runs]
    if attended(widgets):
        return Panel(bench, tasks[0].edit)
    for task in tasks:
        bench.write(task)
        bench.undo()
    return html.several(bench.trials, comparison(bench.trials))


class Levels(w.HBox):
    """The levels of one factor as buttons, one of them chosen (✓); the others may be greyed out."""

    def __init__(self, factor: str, chosen: Callable[[], None]) -> None:
        self.factor, self._chosen = factor, chosen
        self.own = self.value = ""  # the level of the method, and the chosen one
        self.label, self.names = LABELS.get(factor, (factor.replace("_", " "), {}))
        self.why = w.HTML()
        self.buttons = {
            level: w.ToggleButton(layout={"width": "auto"}) for level in FACTORS[factor].levels
        }
        for level, button in self.buttons.items():
            button.observe(partial(self._click, level), "value")
        label = w.HTML(f'<span class="uke-name">{self.label}</span>', layout={"flex": "0 0 7.5rem"})
        row = {"flex_flow": "row wrap", "flex": "1 1 0"}
        super().__init__([label, w.HBox([*self.buttons.values(), self.why], layout=row)])

    def name(self, level: str, depth: int) -> str:
        """Return a level as a person reads it; one that trains a single block says which."""
        layers = FACTORS[self.factor].levels[level].get("layers")
        if isinstance(layers, float):
            return f"block {layer_index(layers, depth)}"
        return self.names.get(level, level.replace("_", " "))

    def refresh(self, bench: Bench, method: Method) -> None:
        """Mark the chosen level, grey out those that do not go with the method and say why."""
        reasons = {level: bench.why_not(method, self.factor, level) for level in self.buttons}
        texts: dict[str, list[str]] = {}
        for level, button in self.buttons.items():
            name, reason = self.name(level, bench.depth), reasons[level]
            chosen = level == self.value and not reason
            button.disabled, button.value = bool(reason), chosen
            button.description = f"✓ {name}" if chosen else name
            button.tooltip = f"{self.label}: {name}" + (f" (not here: {reason})" if reason else "")
            texts.setdefault(reason, []).append(name)
        # A reason that holds for every level of every factor is said once, above them.
        said = [f"{', '.join(names)}: {why}" for why, names in texts.items() if why]
        self.why.value = html.framed(
            html.show.fine("; ".join(said), "uke-why") if said and "" in texts else ""
        )

    def _click(self, level: str, change: Mapping[str, Any]) -> None:
        if change["new"] != (level == self.value) and not self.buttons[level].disabled:
            # A second click goes back to the method's own level.
            self.value = level if change["new"] else self.own
            self._chosen()


class Form(w.HBox):
    """What to write and how; `task()` reads it."""

    def __init__(self, bench: Bench, notes: Mapping[str, w.HTML]) -> None:
        self.search = w.Text(
            description="Search edits", placeholder="words of a question or answer", **WIDE
        )
        self.picked = w.Select(description="Edit", rows=4, **WIDE)
        self.own = w.Button(description="Write your own", tooltip="Empty the form below")
        self.found, self.why = w.HTML(), w.HTML()
        self.question = w.Text(description="Question", **WIDE)
        self.answer = w.Textarea(description="New answer", rows=5, **WIDE)
        optional = "optional, one on a line"
        self.paraphrases = w.Textarea(
            description="Paraphrases", rows=2, placeholder=optional, **WIDE
        )
        example = f"{optional}: When was he born? | 1802"
        self.details = w.Textarea(description="Details", rows=4, placeholder=example, **WIDE)
        self.method = w.Dropdown(description="Method", **WIDE)
        self.levels = {factor: Levels(factor, self._refresh) for factor in FACTORS}
        self.numbers = {
            "layers": w.Text(
                description="Own blocks",
                placeholder="optional, in place of the above: 2, 5 or 0.5",
                **WIDE,
            ),
            "learning_rate": w.Text(description="Learning rate", **WIDE),
            "steps": w.Text(description="Steps, at most", **WIDE),
        }
        self.chat = w.Dropdown(description="Asked through", options=CHAT, **WIDE)
        self.own.on_click(lambda _: self.fill(None))
        self.search.observe(lambda _: self._list(), "value")
        self.picked.observe(lambda change: change["new"] and self._pick(change["new"]), "value")
        self.method.observe(lambda change: change["new"] and self._reset(), "value")
        text = [heading("1. What to write"), self.search, self.picked]
        text += [w.HBox([self.own, self.found], layout=ROW)]
        text += [self.question, notes["question"], self.answer, notes["answer"]]
        text += [self.paraphrases, self.details, notes["details"]]
        how = [heading("2. How to write it"), self.method, self.why, *self.levels.values()]
        for field, box in self.numbers.items():
            how += [notes[field], box] if field == "layers" else [box, notes[field]]
        how += [self.chat, notes["chat"]]
        super().__init__([w.VBox(text), w.VBox(how)], layout=COLUMNS)
        self.offer(bench)

    def offer(self, bench: Bench) -> None:
        """Offer the edits of this bench's library and the methods of its model."""
        self.bench = bench
        self.method.options = list(bench.methods)
        self.method.value = "FT-UKE"
        self._reset()
        self._list()

    def fill(self, edit: Edit | None) -> None:
        """Put an edit into the form, where it can be changed; None empties it."""
        if edit is None:
            self.picked.value = ""
        self.question.value, self.answer.value = (edit.question, edit.answer) if edit else ("", "")
        self.paraphrases.value = (edit.paraphrase or "") if edit else ""
        pairs = [f"{one.question} | {one.answer}" for one in (edit.details if edit else ())]
        self.details.value = "\n".join(pairs)

    def task(self, question: str = "") -> Task:
        """Read the form, with a free question; Refused, naming the field, where it cannot be done."""
        first, *more = [*filter(None, map(str.strip, self.paraphrases.value.splitlines())), None]
        edit = own_edit(
            question=self.question.value.strip(),
            answer=self.answer.value.strip(),
            paraphrase=first,
            details=detail_lines(self.details.value),
        )
        fields = {"question", "answer", "paraphrase", "details"}
        for known in self.bench.library.edits:
            if edit.model_dump(include=fields) == known.model_dump(include=fields):
                edit = known
        method = self._method()
        self.bench.check(edit, method)
        questions = (question.strip(),) if question.strip() else ()
        return Task(edit, method, tuple(filter(None, more)), questions, self.chat.value)

    def _method(self) -> Method:
        method = self.bench.methods[self.method.value]
        if method.factors:
            chosen = {factor: one.value for factor, one in self.levels.items() if one.value}
            method = combined(method, chosen)
        for field, box in self.numbers.items():
            text = box.value.strip()
            if box.disabled or (field == "layers" and not text):
                continue
            try:
                first, *others = json.loads(f"[{text}]")
            except ValueError:
                text = f"{box.description}: expected a number, found {text!r}"
                raise Refused(field, text) from None
            value = (first, *others) if field == "layers" else first
            with refused(field):
                method = changed(method, {field: value}, box.description)
        return method

    def _pick(self, name: str) -> None:
        self.fill(self.bench.library.find(name))

    def _list(self) -> None:
        found = self.bench.library.search(self.search.value)
        options = [("– choose one, or write your own –", "")]
        self.picked.options = options + [(edit.question, edit.id) for edit in found]
        text = f"{len(found)} of {len(self.bench.library.edits)} edits"
        self.found.value = html.framed(html.show.fine(text))

    def _reset(self) -> None:
        """Show the levels and numbers that the method has."""
        method = self.bench.methods[self.method.value]
        for field, box in self.numbers.items():
            value = getattr(method, field, None)
            box.disabled = value is None or (field == "layers" and not method.factors)
            box.value = "" if field == "layers" or value is None else f"{value:g}"
        for factor, buttons in self.levels.items():
            levels = FACTORS[factor].levels if factor in method.factors else ()
            same = (level for level in levels if vary(method, factor, level) == method)
            buttons.own = buttons.value = next(same, "")
        self._refresh()

    def _refresh(self) -> None:
        method = self.bench.methods[self.method.value]
        said = "" if method.factors else self.bench.why_not(method, *("layers", "all"))
        self.why.value = html.framed(html.show.fine(said) if said else "")
        for levels in self.levels.values():
            levels.refresh(self.bench, method)


class Panel(w.VBox):
    """Everything a person can do with one edit; `wait()` returns when what was begun has ended."""

    def __init__(self, bench: Bench, first: Edit) -> None:
        self.bench, self.busy, self._thread = bench, False, threading.Thread()
        self.notes = {field: w.HTML() for field in FIELDS}
        self.form = Form(bench, self.notes)
        self.form.fill(first)
        # What only the first edit would wait for: the scorers, the questions around the edit.
        score(["a"], ["a"])
        bench.library.probes(first)
        self.model = w.Text(description="Model", value=bench.name, **WIDE)
        self.free = w.Text(
            description="Ask anything",
            placeholder="a question of your own, answered without and with the edit",
            **WIDE,
        )
        narrow = {"layout": {"width": "14rem"}, "style": {"description_width": "4rem"}}
        self.name = w.Text(description="Keep as", value=bench.free_name(), **narrow)
        fitted = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self.repeated = w.Dropdown(description="Repeat edit", **fitted)
        self.level = w.Dropdown(description="with", **fitted)
        self.curve, self.kept, self.reply, self.shown = (w.HTML() for _ in range(4))
        self.compared, self.exported = w.HTML(), w.HTML()
        self.buttons = {
            name: w.Button(description=name, tooltip=text, layout={"min_width": "5rem"})
            for name, text in ACTIONS.items()
        }
        self.buttons["Edit"].button_style = "primary"
        for name, button in self.buttons.items():
            button.on_click(partial(self._click, name))
        self.repeated.observe(lambda change: change["new"] and self._offer_levels(), "value")
        super().__init__(self._rows())
        self.add_class("uke-panel")
        self._refresh()
        if kernel := getattr(get_ipython(), "kernel", None):
            # What the kernel does on an interrupt after this cell, instead of ignoring it.
            kernel.saved_sigint_handler = lambda *_: self._stop()

    def _rows(self) -> list[w.Widget]:
        notes, buttons = self.notes, self.buttons
        write = [buttons[name] for name in ("Edit", "Stop", "Undo")]
        again = [self.repeated, self.level, buttons["Repeat"], buttons["Export session"]]
        self.again = w.HBox(again, layout=ROW)
        return [
            w.HTML(f"<style>{html.STYLE}</style>"),
            w.HBox([self.model, buttons["Load"]], layout=ROW),
            notes["model"],
            self.form,
            heading("3. Before and after"),
            w.HBox([*write, self.name, buttons["Keep"]], layout=ROW),
            notes["keep"],
            self.kept,
            notes["action"],
            self.curve,
            w.HBox([self.free, buttons["Ask"]], layout=ROW),
            notes["ask"],
            self.reply,
            self.shown,
            heading("4. The edits of this session"),
            self.compared,
            self.again,
            notes["export"],
            self.exported,
        ]

    def say(self, field: str, text: str, role: str = "status") -> None:
        """Show a line beside the control of a field, which screen readers say; `alert` for a refusal."""
        note = self.notes.get(field, self.notes["action"])
        note.value = html.framed(html.show.message(text, role)) if text else ""

    def wait(self, seconds: float | None = None) -> None:
        """Return when what was begun has ended."""
        if self._thread.ident:
            self._thread.join(seconds)

    def _click(self, name: str, _: Any) -> None:
        """Begin what a button stands for in a thread, so that Stop and an interrupt are heard."""
        if name == "Stop":
            return self._stop()
        if self.busy:
            return self.say("action", BUSY, "alert")
        self.busy = True
        for field in FIELDS:
            self.say(field, WORKING if field == "action" else "")
        self._enable()
        act = getattr(self, f"_{name.split()[0].lower()}")
        # Widgets report to the cell or click that they were called from, which the context knows.
        run = partial(contextvars.copy_context().run, self._run, act)
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _run(self, act: Callable[[], str]) -> None:
        """Do it and say last how it ended; whatever happens, the widgets go on."""
        time.sleep(SETTLE)
        field, role = "action", "status"
        try:
            text = act()
        except Stopped:
            text = STOPPED
        except torch.OutOfMemoryError:
            text, role = "Out of memory; choose fewer weights.", "alert"
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

    def _enable(self) -> None:
        edited, trials = self.bench.edited is not None, bool(self.bench.trials)
        needs = {"Undo": edited, "Keep": edited, "Repeat": trials, "Export session": trials}
        for name, button in self.buttons.items():
            button.disabled = self.busy != (name == "Stop") or not needs.get(name, True)

    def _refresh(self) -> None:
        """Show buttons and the table of the session as things stand."""
        trials = self.bench.trials
        caption = "Mean score of each kind after the edit, from 0 to 1."
        table = html.table(comparison(trials), caption) if trials else ""
        self.compared.value = html.framed(table)
        options = [(f"{trial.number}: {trial.task.method.name}", trial.number) for trial in trials]
        if tuple(options) != self.repeated.options:
            self.repeated.options = options
            self.repeated.value = trials[-1].number if trials else None
        self.again.layout.display = None if trials else "none"
        self._enable()

    def _offer_levels(self) -> None:
        """Offer what the chosen edit of the session can be repeated with."""
        method = self.bench.trials[self.repeated.value - 1].task.method
        self.level.options = [
            (f"{levels.label}: {levels.name(level, self.bench.depth)}", (factor, level))
            for factor, levels in self.form.levels.items()
            for level in levels.buttons
            if not self.bench.why_not(method, factor, level)
            and vary(method, factor, level) != method
        ]
        self.level.index = 0 if self.level.options else None

    def _load(self) -> str:
        with refused("model"):
            if not (name := self.model.value.strip()):
                raise InputError("No model is named; expected embedded, a directory or a hub name.")
            bench = Bench(name, self.bench.library)
        self.bench.undo()
        self.bench = bench
        self.form.offer(bench)
        for outcome in (self.shown, self.curve, self.reply, self.kept, self.exported):
            outcome.value = ""
        return f"{name} is loaded; a new session begins."

    def _edit(self) -> str:
        return self._write(self.form.task(self.free.value))

    def _repeat(self) -> str:
        if not self.level.value:
            raise Refused("export", "This method has no factor to change.")
        task = self.bench.trials[self.repeated.value - 1].task
        return self._write(replace(task, method=vary(task.method, *self.level.value)))

    def _write(self, task: Task) -> str:
        self._losses, self._drawn, self.kept.value, self.reply.value = [], 0.0, "", ""
        started = time.perf_counter()
        trial = self.bench.write(task, partial(self._watch, task.method))
        seconds = time.perf_counter() - started
        self.curve.value = ""
        heading = f"Edit {trial.number}: {task.method.name}"
        self.shown.value = html.framed(html.result(trial, heading))
        return (
            f"Edit {trial.number} is in the weights, written and asked in {seconds:.1f} s. "
            "Undo takes it out again."
        )

    def _watch(self, method: Method, phase: str, steps: int, loss: float) -> None:
        """Draw the loss so far as a curve, and how many of the steps are done."""
        self._losses += [loss] if steps else []
        if phase == "writing" and time.perf_counter() - self._drawn < EVERY:
            return
        self._drawn = time.perf_counter()
        most = getattr(method, "steps", steps)
        texts = {
            "asking before": "asking the untouched model",
            "writing": f"step {steps}" + (f" of at most {most}" if steps <= most else ""),
            "asking after": f"{len(self._losses)} steps; asking the edited model",
        }
        done = 1.0 if phase == "asking after" else min(1.0, steps / max(1, most))
        meter = html.show.meter("Training", done, texts[phase])
        curve = html.curve(self._losses, getattr(method, "stop_loss", 0.0))
        self.curve.value = html.framed(f"{meter}{curve}")

    def _undo(self) -> str:
        self.bench.undo()
        task = self.bench.trials[-1].task
        question = task.edit.question
        self.shown.value = html.framed(
            html.undone(question, self.bench.ask(question, task.chat)[0])
        )
        return "The edit is out of the weights: the model is as it was, bit for bit."

    def _keep(self) -> str:
        lines = self.bench.keep(self.name.value)
        introduction = "Kept. These two lines load it elsewhere:"
        self.kept.value = html.framed(html.show.code(introduction, lines))
        self.name.value = self.bench.free_name()
        return ""

    def _ask(self) -> str:
        question = self.free.value.strip()
        answers = self.bench.ask(question, self.form.chat.value)
        self.reply.value = html.framed(html.reply(question, *answers))
        return ""

    def _export(self) -> str:
        number = 1 + len(list(self.bench.folder.glob("session-*.yaml")))
        path = export(self.bench, self.bench.folder / f"session-{number}.yaml")
        command = f"papermill -f {path} notebooks/explore.ipynb {path.with_suffix('.ipynb')}"
        introduction = f"Written to {path}. In the project's folder this repeats it:"
        self.exported.value = html.framed(html.show.code(introduction, command))
        return ""


def heading(text: str) -> w.HTML:
    """Return a heading between controls."""
    return w.HTML(html.framed(html.show.heading(text)))


def detail_lines(text: str) -> list[dict[str, str]]:
    """Read details written one on a line as `question | answer`; Refused for any other line."""
    details = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        question, _, answer = (part.strip() for part in line.partition("|"))
        if not (question and answer):
            example = "When was he born? | 1802"
            raise Refused(
                "details",
                f"Details, line {number}: expected a question, a bar and its answer, as in: {example}",
            )
        details.append({"question": question, "answer": answer})
    return details
