"""Collect what one notebook contributes to the report: numbers, figures, tables, answer, limits.

    section = Section("04_factor_layers", paths, "Layers", "Which blocks should be trained?")
    section.figure(figures.scores, scores, "layers", "Scores by depth.", "Lines that rise.")
    section.observe("A middle block writes best.", expected=True)
    section.answer(f"All blocks gain {section.say('effect.layers.ft_m', *gain)}.")
    section.save()

Everything is stored as Markdown, which `uke.report.compose` makes a page and a PDF of.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import IPython.display
import pandas as pd

from uke.errors import InputError
from uke.files import write_atomic
from uke.project import Paths
from uke.report import style, tables
from uke.report.tables import Cell, absent, bracket, number, places

_TOGETHER = re.compile(r"\[[−\d.,]+, [−\d.,]+\]|\bn = [\d,]+")  # set without a line break
_LINE = 100  # letters; a wider table scrolls on a narrow screen


class Section:
    """What one notebook contributes to the report.

    Texts are plain, words between backticks are code. `environment`, `smoke_run` (its numbers are
    void) and `untestable` (methods whose rows are grey) may be set. InputError for a bad or
    repeated key or name, or a number that is none.
    """

    def __init__(self, notebook: str, paths: Paths, title: str, question: str):
        self.notebook, self.paths, self.title, self.question = notebook, paths, title, question
        self.environment: dict[str, Any] = {}
        self.smoke_run = False
        self.untestable: dict[str, str] = {}
        self._answer = ""
        self._numbers: dict[str, dict] = {}
        self._body: list[dict[str, str]] = []
        self._lists: dict[str, list] = {"checks": [], "limits": [], "warnings": [], "recipes": []}

    def say(self, key, value, low=None, high=None, n=None, unit="", void="") -> str:
        """Record a number under its dotted key and return its prose: `0.93 [0.90, 0.96], n = 40`.

            section.say("single.lead", *interval, unit="points")

        Missing ends mean no interval. `n` counts the units behind the number. `void` says why no
        verdict may rest on it. It is stored with the notebook and the cell that said it.
        """
        where = f"{self.notebook}: number {key}"
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", key) or key in self._numbers:
            raise InputError(f"{where}: expected new lower-case words joined by dots")
        value, low, high = (_plain(each, where) for each in (value, low, high))
        if value is None or (low is None) != (high is None) or (low is not None and low > high):
            raise InputError(f"{where}: expected a value, and both ends of its interval or none")
        decimals = None if low is None else places(value, low, high)
        text = number(value, decimals) + ("" if low is None else f" {bracket(low, high, decimals)}")
        text += unit if unit == "%" else f" {unit}" if unit else ""
        text += "" if n is None else f", n = {number(int(n))}"
        shell = IPython.get_ipython()
        source = f"{self.notebook}, cell {shell.execution_count}" if shell else self.notebook
        entry = {"value": value, "low": low, "high": high, "n": n if n is None else int(n)}
        self._numbers[key] = entry | {"unit": unit, "said": text, "source": source}
        self._numbers[key] |= {"void": void} if void else {}
        return text

    def figure(self, draw, frame, name, caption, alt, **options) -> None:
        """Draw a frame with a function of `uke.report.figures`, save the SVG and place it here.

        `alt` says what it shows to those who cannot see it.
        """
        self._check_name("figure", name, caption)
        if not alt.strip():
            raise InputError(f"{self.notebook}: figure {name}: expected an alternative text (alt)")
        saved = style.save(draw(frame, **options), self.paths.figures, name)
        alt_text = re.sub(r'([\\"])', r"\\\1", " ".join(alt.split()))
        file = saved.relative_to(self.paths.home).as_posix()
        text = f'![{prose(caption)}]({file}){{#fig-{name} alt="{alt_text}"}}'
        self._body.append({"type": "figure", "name": name, "markdown": text})
        _show(IPython.display.SVG(filename=saved))

    def table(self, frame: pd.DataFrame, name, caption, placed=True, half=False) -> None:
        """Save a table (`tables/<name>.csv`, `.tex`) and place it here, or just name its CSV.

        With `half` its first column has nearly half of the line, the others share the rest.
        """
        self._check_name("table", name, caption)
        saved = tables.save(frame, self.paths.figures / "tables", name, caption, latex=placed)
        grey = [method in self.untestable for method in frame.get("method", ())]
        caption += " Grey: not testable on this model, see the positive control." * any(grey)
        text = prose(f"{caption} It is in `tables/{name}.csv`.")
        text = table_markdown(frame, name, caption, saved, grey, half) if placed else text
        self._body.append({"type": "table", "name": name, "markdown": text})
        shown = tables.printed(frame).set_axis([*map(tables.head, frame)], axis=1).map(_together)
        _show(IPython.display.HTML(shown.to_html(index=False, border=0)))

    def texts(self, frame: pd.DataFrame, name: str, caption: str) -> None:
        """Place a table of questions and answers; where rows have none, a sentence in its stead."""
        if frame["question"].notna().all():
            return self.table(frame, name, caption)
        for file in (self.paths.figures / "tables").glob(f"{name}.*"):
            file.unlink()  # of the run that made the rows
        self.observe(f"Rows are committed without the texts of others: no table `{name}`.")

    def observe(self, text: str, expected: bool | None = None, void: str = "") -> None:
        """Say what a figure or a table shows, and whether that is "As expected: ..." or not, or
        why it decides nothing."""
        if void:
            text = f"{text} That decides nothing: {void}"
        elif expected is not None:
            text = f"{'As' if expected else 'Not as'} expected: {text}"
        self._body.append({"type": "text", "markdown": prose(text)})
        _show(text)

    def answer(self, text: str) -> str:
        """Answer the section's question in a sentence or two, which the abstract repeats."""
        self._answer = text
        return text

    def check(self, ok: bool, text: str) -> str:
        """Record that a condition of the machinery (never of the finding) holds.

        Where not, the conclusion is void: the section has no answer and its numbers decide no
        verdict. The run goes on, or ends by InputError where STRICT is set in the environment.
        """
        self._lists["checks"].append({"ok": bool(ok), "text": text})
        if not ok:
            fault = f"{self.notebook}: check failed, so the conclusion is void: {text}"
            if os.environ.get("STRICT", "0") not in ("", "0"):
                raise InputError(fault)
            _show(fault)
        return text

    def limit(self, text: str) -> str:
        """Record a limit of what the section shows."""
        self._lists["limits"].append(text)
        return text

    def warn(self, text: str) -> None:
        """Say what the reader must know before believing the section, in a box at its top."""
        if text not in self._lists["warnings"]:
            self._lists["warnings"].append(text)
        _show(f"Warning: {text}")

    def method(self, recipe: Mapping[str, Any]) -> None:
        """Record a recipe (its fields) that the section used, for the report's table of methods."""
        self._lists["recipes"].append(json.loads(json.dumps(dict(recipe), default=str)))

    def save(self) -> Path:
        """Write the section whole, as `<notebook>.json` in `paths.sections`; return its path."""
        names = ("notebook", "title", "question", "smoke_run", "environment")
        content = {name: getattr(self, name) for name in names} | self._lists
        content |= {"answer": self._answer, "body": self._body, "numbers": self._numbers}
        void = f"`{self.notebook}` was a smoke run." if self.smoke_run else ""
        if failed := "; ".join(each["text"] for each in content["checks"] if not each["ok"]):
            void = f"A check of `{self.notebook}` failed: {failed}."
            content |= {"answer": "", "void": void}
        if void:
            content["numbers"] = {key: n | {"void": void} for key, n in self._numbers.items()}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        return write_atomic(self.paths.sections / f"{self.notebook}.json", text + "\n")

    def _check_name(self, what: str, name: str, caption: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or not caption.strip():
            expected = "expected a name of a-z, 0-9, _ and -, and a caption"
            raise InputError(f"{self.notebook}: {what} '{name}': {expected}")
        if any((each["type"], each.get("name")) == (what, name) for each in self._body):
            raise InputError(f"{self.notebook}: there is an earlier {what} called '{name}'")


def read_sections(paths: Paths) -> list[dict]:
    """Return the sections of a run by name."""
    files = sorted(paths.sections.glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def _plain(value: Any, where: str) -> float | int | None:
    """Return a number as JSON has it; None where there is none."""
    if absent(value):
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, found {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def _show(what: Any) -> None:
    """Show a figure, a table or a text in the running notebook, if any."""
    if IPython.get_ipython():
        raw = {"text/plain": what, "text/markdown": prose(what)} if isinstance(what, str) else what
        IPython.display.display(raw, raw=isinstance(what, str))


def _together(text: str) -> str:
    """Let no line break fall into an interval or a count."""
    return _TOGETHER.sub(lambda match: match[0].replace(" ", "\u00a0"), text)


def prose(text: str) -> str:
    """Return plain text as Markdown in which only words between backticks are markup."""
    text = re.sub("[ \t\r\n]+", " ", text).strip(" ")  # a no-break space stays
    parts = re.split("`([^`]*)`", _together(text))
    parts[::2] = [re.sub(r"([\\*_{}\[\]<>#$^~|@&`])", r"\\\1", plain) for plain in parts[::2]]
    parts[1::2] = [f"`` {code} ``" for code in parts[1::2]]
    return re.sub(r"^(\d+(?=[.)])|)([-+:%.)])", r"\1\\\2", "".join(parts))


def table_markdown(
    frame: pd.DataFrame,
    name: str,
    caption: str,
    files: Iterable[Path] = (),
    grey: Iterable[bool] = (),
    half: bool = False,
) -> str:
    """Return a table as a pipe table with a caption, in a box of its own; rows may be grey.

    With `half` the first column has nearly half of the line.
    """
    frame = frame.astype(object)
    columns = {tables.head(each): tables.cells(frame[each]) for each in frame}
    aligned = ["---:" if tables.numeric(frame[each]) else ":---" for each in frame]
    below = sum(any(cell.note for cell in cells) for cells in columns.values()) > 4
    printed = ([_cell_markdown(cell, below) for cell in cells] for cells in columns.values())
    pale = '[{}]{{.grey typst:text:fill="luma(150)"}}'.format
    rows = zip(zip(*printed, strict=True), [*grey] or [False] * len(frame), strict=True)
    rows = [map(pale, row) if off else row for row, off in rows]
    lines = [map(prose, columns), aligned, *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    names = {".csv": "CSV", ".tex": "LaTeX"}
    links = (f'<a href="tables/{file.name}">{names[file.suffix]}</a>' for file in files)
    links = f' `<span class="files">{" · ".join(links)}</span>`{{=html}}' if files else ""
    longest = (max(len(h), *(len(c.text + c.note) for c in own), 0) for h, own in columns.items())
    kind = "wide" if sum(longest) > _LINE else "narrow"
    share = f'{{.half typst:columns="(45%,) + (1fr,) * {len(columns) - 1}"}}' if half else ""
    return f"::: {{#tbl-{name} .table .{kind}}}\n{body}\n\n: {prose(caption)}{links} {share}\n:::"


def _cell_markdown(cell: Cell, below: bool) -> str:
    """Return a cell, its interval beside the number or, in a table of many, below it."""
    text = f"**{prose(cell.text)}**" if cell.best else prose(cell.text)
    if not cell.note:
        return text
    line = "`<br>`{=html}`#linebreak()`{=typst}" if below else " "
    return f'{text}{line}[{prose(cell.note)}]{{.note typst:text:size="0.82em"}}'
