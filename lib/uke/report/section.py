"""The report: sections say numbers and collect figures and tables; `compose` makes numbers.json, HTML and PDF of them.

`redraw` draws the figures and tables again, without the notebooks.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from uke.cli import manifests
from uke.errors import InputError, nearest
from uke.files import write_atomic
from uke.report import compose as typesetting
from uke.report import redrawing
from uke.report.numerals import absent, bracket, number, places

_KEY = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_QUOTED = re.compile(r"<!-- (number|word): ([a-z0-9_.]+) -->(.*?)<!-- -->")
_SHOWN = {"number": "said", "word": "unit"}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_BLANK = {"question": "", "answer": "", "smoke_run": False, "environment": {}} | {
    part: [] for part in ("blocks", "checks", "limits", "warnings", "recipes")
}


class Section:
    """What one notebook contributes to the report; `paths.figures` is the directory everything is written to.

    `environment` (a dict) and `smoke_run` (a flag) may be set; the rest is collected by the methods. Texts are plain,
    words between backticks are code. A notebook shows figures, tables, findings and warnings where they are placed, also
    within an `if` or a loop. Raises InputError for a bad key or name, a repeated one, or a number that is none.
    """

    def __init__(self, notebook: str, paths: Any, title: str, question: str):
        self.notebook, self.title, self.question = notebook, title, question
        self.directory = Path(paths.figures)
        self.environment: dict[str, Any] = {}
        self.smoke_run = False
        self.recipes: list[dict] = []
        self._numbers: dict[str, dict] = {}
        self._parts: dict[str, Any] = {"answer": ""} | {
            part: [] for part in ("blocks", "checks", "limits", "warnings")
        }

    def say(
        self, key, value, low=None, high=None, n=None, unit=""
    ) -> str:  # as a metrics.interval is spread
        """Record a number under its dotted key; its prose, as in `0.93 [0.90, 0.96], n = 40`.

        Missing ends mean no interval; `n` counts the units behind the number, `unit` is a word set behind it.
        """
        if not _KEY.fullmatch(key):
            raise InputError(
                f"{self.notebook}: number '{key}': expected lower-case words joined by dots"
            )
        if key in self._numbers:
            raise InputError(f"{self.notebook}: number {key} is said twice")
        value, low, high = (
            _plain(each, f"{self.notebook}: number {key}") for each in (value, low, high)
        )
        if value is None or (low is None) != (high is None) or (low is not None and low > high):
            raise InputError(
                f"{self.notebook}: number {key}: expected a value, and both ends of its interval or none"
            )
        said = _say(value, low, high, unit) + (f", n = {number(int(n))}" if n is not None else "")
        n = None if n is None else int(n)
        self._numbers[key] = {
            "value": value,
            "low": low,
            "high": high,
            "n": n,
            "unit": unit,
            "said": said,
        }
        return said

    def figure(
        self,
        draw: Callable[..., Figure],
        frame: pd.DataFrame,
        name: str,
        caption: str,
        alt: str,
        **options: Any,
    ) -> None:
        """Draw a figure (PDF, PNG) with a function of `uke.report.figures` or `uke.report.diagrams` and place it here in the section.

        Its data (`data/<name>.parquet`) and the options are stored, so that `redraw` gives the same bytes. `alt` says what
        it shows to who cannot see it.
        """
        self._check_name("figure", name, caption)
        if not alt.strip():
            raise InputError(
                f"{self.notebook}: figure {name}: expected a text for readers who cannot see it (alt)"
            )
        drawn = {"draw": redrawing.named(draw), "options": redrawing.plain(options)}
        self._place({"type": "figure", "name": name, "caption": caption, "alt": alt} | drawn, frame)
        _show(self.directory / f"{name}.png")

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> None:
        """Save a table (CSV, LaTeX, Markdown) and place it here in the section.

        Its cells are stored (`data/<name>.table.parquet`), so that `redraw` gives the same bytes.
        """
        self._check_name("table", name, caption)
        self._place({"type": "table", "name": name, "caption": caption}, frame)
        _show(frame)

    def answer(self, text: str) -> str:
        """The answer to the section's question, in a sentence or two; it also goes into the abstract."""
        self._parts["answer"] = text
        return text

    def observe(self, text: str, expected: bool | None = None) -> str:
        """Say here what a figure or a table shows, and whether that is as expected.

        `expected` puts "As expected:" or "Not as expected:" in front of the sentence.
        """
        prefix = {None: "", True: "As expected: ", False: "Not as expected: "}
        text = prefix[None if expected is None else bool(expected)] + text
        self._parts["blocks"].append({"type": "finding", "text": text})
        _show(text)
        return text

    def check(self, ok: bool, text: str) -> str:
        """Record that a condition holds; raise InputError where it does not, since then the conclusion is void."""
        self._parts["checks"].append({"ok": bool(ok), "text": text})
        if not ok:
            raise InputError(f"{self.notebook}: check failed, so the conclusion is void: {text}")
        return text

    def limit(self, text: str) -> str:
        """A limit of what the section shows; the report gathers all of them."""
        self._parts["limits"].append(text)
        return text

    def warn(self, text: str) -> None:
        """Something the reader must know before believing the section, in a box."""
        self._parts["warnings"].append(text)
        _show(f"Warning: {text}")

    def method(self, recipe: Mapping[str, Any]) -> None:
        """A recipe (its fields) that the section used, for the report's methods."""
        self.recipes.append(json.loads(json.dumps(dict(recipe), default=str)))

    def save(self) -> Path:
        """Write `sections/<notebook>.json` whole; its path."""
        head = {
            "notebook": self.notebook,
            "title": self.title,
            "question": self.question,
            "smoke_run": self.smoke_run,
        }
        rest = {"numbers": self._numbers, "recipes": self.recipes, "environment": self.environment}
        return _write_section(self.directory, head | self._parts | rest)

    def _place(self, block: dict, frame: pd.DataFrame) -> None:
        """Draw from the data as they are read back, so that a redraw has the same; nothing is stored if that fails."""
        content = redrawing.stored(frame)
        self._parts["blocks"].append(
            redrawing.place(self.directory, block, redrawing.read(content))
        )
        write_atomic(redrawing.data_path(self.directory, block), content)

    def _check_name(self, what: str, name: str, caption: str) -> None:
        if not _NAME.fullmatch(name) or not caption.strip():
            raise InputError(
                f"{self.notebook}: {what} '{name}': expected a name of a-z, 0-9, _ and -, and a caption"
            )
        if any(
            (block["type"], block.get("name")) == (what, name) for block in self._parts["blocks"]
        ):
            raise InputError(f"{self.notebook}: there is an earlier {what} called '{name}'")


def _show(what: pd.DataFrame | Path | str) -> None:
    """A table, a picture's file or a text, shown by the notebook that runs this; nothing outside of one."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        shown = sys.modules["IPython"].display  # of the notebook, not a package that a report needs
        text, picture = isinstance(what, str), isinstance(what, Path)
        shown.display(
            {"text/plain": what} if text else shown.Image(filename=what) if picture else what,
            raw=text,
        )


def compose(paths: Any, expected: Iterable[str] = ()) -> list[Path]:
    """Write numbers.json, report.html and report.pdf from the sections in `paths.figures`; their paths.

    Notebooks in `expected` without a section, failed runs (manifests in `paths.results`, where there are any) and missing
    figures become warnings. Raises InputError where there is no section, one is unreadable, or a number key or the name of
    a figure or of a table is used by two.
    """
    directory = Path(paths.figures)
    sections = _read_sections(directory / "sections")
    numbers = _merge_numbers(sections)
    data = typesetting.arrange(paths, sections, expected)
    page, pdf = typesetting.html(data, directory), typesetting.pdf(data, directory)
    contents = {
        "numbers.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "report.html": page,
    }
    written = [write_atomic(directory / name, text.encode()) for name, text in contents.items()]
    return [*written, write_atomic(directory / "report.pdf", pdf)]


def redraw(paths: Any) -> list[str]:
    """Draw every figure and table of the sections in `paths.figures` again, from their stored data alone; their names.

    Raises InputError naming the file where data are missing, before anything is drawn.
    """
    directory = Path(paths.figures)
    sections = _read_sections(directory / "sections")
    _merge_numbers(sections)  # two figures of one name would draw over each other
    shown = [[block for block in section["blocks"] if "name" in block] for section in sections]
    frames = [
        [redrawing.load(directory, block, section["notebook"]) for block in blocks]
        for section, blocks in zip(sections, shown)
    ]
    for section, blocks, data in zip(sections, shown, frames):
        drawn = [redrawing.place(directory, block, frame) for block, frame in zip(blocks, data)]
        if drawn != blocks:
            renewed = iter(drawn)
            _write_section(
                directory,
                section
                | {
                    "blocks": [
                        next(renewed) if "name" in block else block for block in section["blocks"]
                    ]
                },
            )
    return [block["name"] for blocks in shown for block in blocks]


def _write_section(directory: Path, section: dict) -> Path:
    text = json.dumps(section, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    return write_atomic(
        directory / "sections" / f"{section['notebook']}.json", (text + "\n").encode()
    )


def _plain(value: Any, where: str) -> float | int | None:
    """A number as JSON has it; None where there is none."""
    if absent(value):
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, found {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def _say(value: float, low: float | None, high: float | None, unit: str) -> str:
    decimals = None if isinstance(value, int) or low is None else places(value, low, high)
    text = number(value, decimals) + ("" if low is None else f" {bracket(low, high, decimals)}")
    return text + (unit if unit == "%" else f" {unit}" if unit else "")


def _read_sections(directory: Path) -> list[dict]:
    files = sorted(directory.glob("*.json"))
    if not files:
        raise InputError(f"{directory}: no sections; run the notebooks of this profile first")
    sections = []
    for path in files:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a section ({error}); run its notebook again") from None
        if not isinstance(found, dict) or not {"notebook", "title", "numbers"} <= set(found):
            raise InputError(
                f"{path}: not a section: expected notebook, title and numbers; run its notebook again"
            )
        sections.append(found | {key: value for key, value in _BLANK.items() if key not in found})
    return sorted(sections, key=lambda section: section["notebook"])


def _merge_numbers(sections: list[dict]) -> dict[str, dict]:
    said, made = {}, {}
    for section in sections:
        shown = [(block["type"], block["name"]) for block in section["blocks"] if "name" in block]
        for what, name in [("number", key) for key in section["numbers"]] + shown:
            owners = said if what == "number" else made
            place = name if what == "number" else (what, name)
            if other := owners.get(place):
                raise InputError(
                    f"{what} {name} is in two sections: {other['notebook']} and {section['notebook']}"
                )
            owners[place] = section
    return {key: said[key]["numbers"][key] for key in sorted(said)}


def account(paths: Any, notebooks: Iterable[str]) -> None:
    """Section `run`: what the notebooks' work took, from their manifests; nothing where they were never run here."""
    found = [
        manifest for manifest in manifests.read(paths) if manifest["notebook"] in set(notebooks)
    ]
    if not found:
        return
    section = Section("run", paths, "Cost of the run", "How long did the study take?")
    # Kept with the figures, since a report that is composed again elsewhere has no manifests.
    section.environment = {"cores": os.cpu_count()} | {
        key: value
        for manifest in reversed(found)
        for key, value in manifests.machine(manifest).items()
    }
    seconds = [
        max(float(each["work_seconds"]), _row_seconds(paths.exported(each["notebook"])))
        for each in found
    ]
    frame = pd.DataFrame({"notebook": [each["notebook"] for each in found], "seconds": seconds})
    section.table(
        frame,
        "run",
        "Seconds of each notebook, its kernel's start included, or what its rows say they took where another process made them; two notebooks run at once.",
    )
    said = section.say("cost.study_seconds", frame["seconds"].sum(), n=len(frame), unit="s")
    section.answer(
        f"All notebooks together took {said}, added up over notebooks, of which two run at once."
    )
    section.save()


def _row_seconds(path: Path) -> float:
    """Seconds of editing and asking that the rows of a study record, once for each unit; 0 where it has none."""
    if not path.is_file():
        return 0.0
    frame = pd.read_parquet(path)
    units = frame.drop_duplicates(
        ["method", "factor", "level", "batch_size", "batch", "recipe", "phase"]
    )
    return float(units[["train_seconds", "answer_seconds"]].sum().sum())


def quote(page: Path, paths: Any) -> None:
    """Renew what a Markdown page quotes from the run's numbers.json: `<!-- number: KEY -->text<!-- -->`, or `word: KEY`, its unit alone."""
    if not page.is_file():
        return
    numbers = json.loads((Path(paths.figures) / "numbers.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    if unknown := [key for _, key, _ in _QUOTED.findall(text) if key not in numbers]:
        raise InputError(
            f"{page}: number {unknown[0]}: not in {paths.figures}/numbers.json{nearest(unknown[0], numbers)}"
        )
    renewed = _QUOTED.sub(
        lambda found: (
            f"<!-- {found[1]}: {found[2]} -->{numbers[found[2]][_SHOWN[found[1]]]}<!-- -->"
        ),
        text,
    )
    if renewed != text:
        write_atomic(page, renewed.encode())
