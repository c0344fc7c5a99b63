"""The form of one edit by hand: an edit of the dataset or one's own, a method, the level of each factor, rate and steps."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import ipywidgets as w

from uke.data.edits import Edit
from uke.explore import choices
from uke.explore import html as markup
from uke.explore.bench import Bench, Task
from uke.explore.choices import Refused
from uke.explore.surroundings import detail_lines, own_edit
from uke.methods.recipes import FACTORS, combined

# Mappings, so that every widget has a layout of its own.
WIDE = {"width": "98%", "max_width": "44rem"}
BESIDE = {
    "display": "grid",
    "grid_template_columns": "repeat(auto-fit, minmax(min(100%, 24rem), 1fr))",
    "grid_gap": "0.2rem 2rem",
    "max_width": "72rem",
}
ROW = {"flex_flow": "row wrap", "align_items": "center"}
LABEL = {"description_width": "7.5rem"}
ASKED = {"chat template": None, "raw prompt": False}  # as `Generation.chat` has it

line = partial(w.Text, layout=WIDE, style=LABEL)
area = partial(w.Textarea, layout=WIDE, style=LABEL)
choice = partial(w.Dropdown, layout=WIDE, style=LABEL)


def heading(text: str) -> w.HTML:
    """A heading between controls."""
    return w.HTML(f'<div class="uke"><h4>{text}</h4></div>')


class Notes:
    """A line beside each of several controls, for what is wrong with what they were given; said aloud by screen readers."""

    def __init__(self, fields: Iterable[str], other: str) -> None:
        self.lines = {field: w.HTML() for field in fields}
        self.other = other

    def __getitem__(self, field: str) -> w.HTML:
        return self.lines[field]

    def say(self, field: str, text: str, kind: str = "status") -> None:
        """Show the text beside the control of that field, or where there is none beside the `other` one."""
        self.lines[field if field in self.lines else self.other].value = markup.message(text, kind)

    def clear(self) -> None:
        for one in self.lines.values():
            one.value = ""


class Levels:
    """The levels of one factor as buttons, of which one is chosen (✓); those that cannot be are grey, with the reason."""

    def __init__(self, factor: str, chosen: Callable[[], None]) -> None:
        self.factor, self.value, self._chosen = factor, "", chosen
        self.buttons = {
            level: w.ToggleButton(layout=w.Layout(width="auto"))
            for level in ("", *FACTORS[factor].levels)
        }
        for level, button in self.buttons.items():
            button.observe(partial(self._clicked, level), "value")
        self.why = w.HTML()
        name = w.HTML(
            f'<span class="uke-name">{choices.NAMES[factor]}</span>',
            layout=w.Layout(flex="0 0 7.5rem"),
        )
        self.box = w.VBox(
            [
                w.HBox(
                    [
                        name,
                        w.HBox(
                            [*self.buttons.values(), self.why],
                            layout=w.Layout(flex_flow="row wrap", flex="1 1 0"),
                        ),
                    ]
                )
            ]
        )

    def show(self, names: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        """Mark the chosen level ("": the method's own, where it has a name) and grey out those with a reason."""
        for level, button in self.buttons.items():
            reason, said = reasons.get(level, ""), names[level]
            chosen = level == self.value and not reason
            button.disabled, button.value, button.description = (
                bool(reason),
                chosen,
                ("✓ " if chosen and said else "") + said,
            )
            button.tooltip = f"{choices.NAMES[self.factor]}: {said}" + (
                f" (not here: {reason})" if reason else ""
            )
            button.layout.display = None if said else "none"
        grey = {
            reason: [names[level] for level in reasons if reasons[level] == reason]
            for reason in reasons.values()
            if reason
        }
        said = "; ".join(
            f"{', '.join(levels)}: {reason}"
            for reason, levels in grey.items()
            if len(levels) < len(reasons)
        )
        self.why.value = markup.framed(f'<p class="uke-fine uke-why">{said}</p>') if said else ""

    def _clicked(self, level: str, change: Any) -> None:
        if change["new"] != (level == self.value) and not self.buttons[level].disabled:
            self.value = level if change["new"] else self.value
            self._chosen()


class Form(w.HBox):
    """What to write and how; `task()` reads it."""

    def __init__(self, bench: Bench, notes: Notes) -> None:
        self.notes = notes
        self.search = w.Text(
            description="Search edits",
            layout=WIDE,
            style=LABEL,
            placeholder="words of a question or answer",
        )
        self.picked = w.Select(description="Edit", rows=4, layout=WIDE, style=LABEL)
        self.found, self.own = (
            w.HTML(),
            w.Button(
                description="Write your own",
                tooltip="Empty the form below",
                layout=w.Layout(width="auto"),
            ),
        )
        self.why = w.HTML()
        self.own.on_click(lambda _: self.clear())
        self.question, self.answer = (
            line(description="Question"),
            area(description="New answer", rows=5),
        )
        self.paraphrases = area(
            description="Paraphrases", rows=2, placeholder="optional, one on a line"
        )
        self.details = area(
            description="Details",
            rows=4,
            placeholder="optional, one on a line: When was he born? | 1802",
        )
        self.method = choice(description="Method")
        self.levels = {factor: Levels(factor, self._show) for factor in FACTORS}
        self.blocks = line(
            description="Own blocks", placeholder="optional, in place of the above: 2, 5 or 0.5"
        )
        self.rate, self.steps = (
            line(description="Learning rate"),
            line(description="Steps, at most"),
        )
        self.asking = choice(description="Asked through", options=list(ASKED))
        self.search.observe(lambda _: self._list(), "value")
        self.picked.observe(
            lambda change: change["new"] and self.fill(self.bench.library.find(change["new"])),
            "value",
        )
        self.method.observe(lambda change: change["new"] and self._reset(), "value")
        note = notes.lines.get
        text = [
            heading("1. What to write"),
            self.search,
            self.picked,
            w.HBox([self.own, self.found], layout=ROW),
            self.question,
            note("question"),
            self.answer,
            note("answer"),
            self.paraphrases,
            self.details,
            note("details"),
        ]
        how = [
            heading("2. How to write it"),
            self.method,
            note("method"),
            self.why,
            *(levels.box for levels in self.levels.values()),
            note("layers"),
            self.blocks,
            self.rate,
            note("learning_rate"),
            self.steps,
            note("steps"),
            self.asking,
            note("chat"),
        ]
        super().__init__([w.VBox(text), w.VBox(how)], layout=BESIDE)
        self.take(bench)

    def take(self, bench: Bench) -> None:
        """Offer the edits of this bench's library and the methods of its model."""
        self.bench = bench
        self.method.options = list(bench.methods)
        self.method.value = "FT-UKE" if "FT-UKE" in bench.methods else self.method.options[0]
        self._reset()
        self._list()

    @property
    def chat(self) -> bool | None:
        return ASKED[self.asking.value]

    def clear(self) -> None:
        """Empty what is to be written, for an edit of one's own."""
        self.picked.value = ""
        for box in (self.question, self.answer, self.paraphrases, self.details):
            box.value = ""

    def fill(self, edit: Edit) -> None:
        """Write an edit into the form, where it can be changed."""
        self.question.value, self.answer.value, self.paraphrases.value = (
            edit.question,
            edit.answer,
            edit.paraphrase or "",
        )
        self.details.value = "\n".join(
            f"{detail.question} | {detail.answer}" for detail in edit.details
        )

    def task(self, question: str = "") -> Task:
        """What the form asks for, with a free question; Refused, naming the field, where it cannot be done."""
        first, *more = [*filter(None, map(str.strip, self.paraphrases.value.splitlines())), ""]
        own = own_edit(
            self.question.value, self.answer.value, first, detail_lines(self.details.value)
        )
        same = [
            edit
            for edit in self.bench.library.edits
            if edit.model_dump(include=WRITTEN) == own.model_dump(include=WRITTEN)
        ]
        asked = (question.strip(),) if question.strip() else ()
        task = Task((*same, own)[0], self._method(), tuple(filter(None, more)), asked, self.chat)
        self.bench.check(task)
        return task

    def _method(self) -> Any:
        method, changed = self.bench.methods[self.method.value], {}
        if method.factors:
            method = combined(
                method,
                {factor: levels.value for factor, levels in self.levels.items() if levels.value},
            )
            changed = (
                {"layers": choices.blocks(self.blocks.value)} if self.blocks.value.strip() else {}
            )
        for field, box in (("learning_rate", self.rate), ("steps", self.steps)):
            try:
                changed[field] = float(box.value) if field == "learning_rate" else int(box.value)
            except ValueError:
                raise Refused(
                    field, f"{box.description}: expected a number, found {box.value.strip()!r}."
                ) from None
        return choices.composed(method, changed)

    def _list(self) -> None:
        found = self.bench.library.search(self.search.value)
        self.picked.options = [
            ("– choose one, or write your own –", ""),
            *((edit.question, edit.id) for edit in found),
        ]
        self.found.value = markup.framed(
            f'<p class="uke-fine" role="status">{len(found)} of {len(self.bench.library.edits)} edits</p>'
        )

    def _reset(self) -> None:
        """The factors, rate and steps as the method has them."""
        method = self.bench.methods[self.method.value]
        self.rate.value, self.steps.value, self.blocks.value = (
            f"{method.learning_rate:g}",
            str(method.steps),
            "",
        )
        self.blocks.disabled = not method.factors
        for factor, levels in self.levels.items():
            levels.value = choices.level_of(method, factor) or ""
        self._show()

    def _show(self) -> None:
        method = self.bench.methods[self.method.value]
        # Where no factor can be chosen the reason is the same for all, and said once.
        said = "" if method.factors else choices.without_factors(method)
        self.why.value = markup.framed(f'<p class="uke-fine">{said}</p>') if said else ""
        for factor, levels in self.levels.items():
            own = (
                ""
                if choices.level_of(method, factor) or not method.factors
                else "as the method has it"
            )
            names = {
                level: choices.named(self.bench.frame, factor, level)
                for level in FACTORS[factor].levels
            }
            levels.show(
                names | {"": own},
                choices.reasons(self.bench.frame, self.bench.tokenizer, method, factor),
            )


WRITTEN = {"question", "answer", "paraphrase", "details"}  # what the form holds of an edit
