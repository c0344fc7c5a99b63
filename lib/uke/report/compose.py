"""Make the report: numbers.json, and one Markdown text that pandoc turns into HTML and PDF.

compose(Paths("quick"))     # figures/quick/numbers.json, report.html, report.pdf, README.md

What it says, and what the main part shows of each notebook, stands in templates/report.md.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pypandoc
import typst
from jinja2 import Environment, FileSystemLoader

from uke.errors import InputError, nearest
from uke.files import write_atomic
from uke.project import Paths
from uke.report.section import Section, prose, read_sections, table_markdown
from uke.report.tables import number, places
from uke.report.verdicts import read_numbers

_TEMPLATES = Path(__file__).with_name("templates")
_TEXTS = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    trim_blocks=True,
    lstrip_blocks=True,
    comment_start_string="<#",
    comment_end_string="#>",
)
_TEXTS.filters["prose"] = prose
_DATED = datetime(2025, 6, 11, tzinfo=UTC)  # the day of the paper: the same bytes whenever composed
_FORMAT = "markdown-smart-auto_identifiers-tex_math_dollars-raw_tex"
_QUOTED = re.compile(r"<!-- (number|word|cell|mean): (?:([\w-]+)/)?([\w.]+) -->.*?<!-- -->")
_WIDTHS = re.compile(r"columns: \d+,(?=\s*align: [^\n]*\s*columns: )")  # given twice, count first


def compose(
    paths: Paths, expected: Iterable[str] = (), runs: Sequence[Mapping] = (), prune: bool = False
) -> list[Path]:
    """Write numbers.json, report.html, report.pdf and a gallery from a run's sections.

    Return their paths. Notebooks in `expected` without a section and failed `runs` are warned of;
    `prune` deletes figures and tables that no section names, if none of those expected is missing.
    InputError where no section is, or where two have a number, figure or table of the same name.
    """
    sections = read_sections(paths)
    if not sections:
        raise InputError(f"{paths.sections}: no sections; make report PROFILE={paths.profile}")
    missing = sorted({*expected}.difference(section["notebook"] for section in sections))
    failed = [run["notebook"] for run in runs if run.get("status") == "failed"]
    make = "Notebook `{}` has no section, so it is missing here. To run it: `{}`."
    warnings = [make.format(name, paths.command(name)) for name in missing]
    warnings += [f"The last run of `{name}` failed: its section is older." for name in failed]
    numbers = _merge_numbers(sections)
    seen = "figures/*/single_strengths.svg", "docs/*.png", "results/*/notebooks/*.html"
    files = [file for pattern in seen for file in paths.home.glob(pattern)]
    text = _TEXTS.get_template("report.md").render(
        paths=paths,
        runs=read_numbers(paths.figures.parent, "*") | {paths.figures.name: numbers},
        drawn=[file.relative_to(paths.home).as_posix() for file in files],
        sections=sections,
        warnings=warnings,
        methods=_methods(sections),
        environment=_environment(sections),
    )
    paths.figures.mkdir(parents=True, exist_ok=True)
    contents = {
        "numbers.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "report.html": _html(paths, text),
        "report.pdf": _pdf(paths, text),
        "README.md": _TEXTS.get_template("gallery.md").render(paths=paths, sections=sections),
    }
    if prune and not missing:
        named = {block.get("name") for section in sections for block in section["body"]}
        for file in [*paths.figures.glob("*.svg"), *paths.figures.glob("tables/*")]:
            if file.stem not in named:
                file.unlink()
    return [write_atomic(paths.figures / name, content) for name, content in contents.items()]


def _merge_numbers(sections: Sequence[Mapping]) -> dict[str, dict]:
    """Return all numbers, sorted by key; InputError for what two sections name alike."""
    owners: dict[tuple[str, str], str] = {}
    for section in sections:
        named = [(block["type"], block["name"]) for block in section["body"] if "name" in block]
        for thing in [*named, *(("number", key) for key in section["numbers"])]:
            owner = owners.setdefault(thing, section["notebook"])
            if owner != section["notebook"]:
                what = " ".join(thing)
                raise InputError(f"{what} is in two sections: {owner} and {section['notebook']}")
    return dict(sorted(entry for section in sections for entry in section["numbers"].items()))


def _methods(sections: Iterable[Mapping]) -> str:
    """Return a table of every recipe, by the settings in which those of its method differ."""
    used = [each | {"notebook": s["notebook"]} for s in sections for each in s["recipes"]]
    rows = []
    for name in dict.fromkeys(recipe["name"] for recipe in used):
        frame = pd.DataFrame([recipe for recipe in used if recipe["name"] == name])
        frame["batch"] = frame.get("batch")
        settings = frame.drop(columns=["name", "batch", "notebook"]).map(_value)
        settings = settings.loc[:, settings.nunique() > 1].to_dict("records")
        frame["differs"] = [
            "; ".join(f"{key.replace('_', ' ')} {each[key]}" for key in each) for each in settings
        ]
        for differs, own in frame.groupby("differs", sort=False):
            batches = sorted(own["batch"].dropna().astype(int).unique())
            found = (batches, dict.fromkeys(own["notebook"]))
            rows.append((name, differs, *(", ".join(map(str, each)) for each in found)))
    if not rows:
        return ""
    frame = pd.DataFrame(rows, columns=["method", "differs in", "batches of", "used in"])
    caption = "Every recipe, by what differs among those of its method. The rest: `params/methods`."
    return table_markdown(frame, "recipes_as_run", caption)


def _environment(sections: Iterable[Mapping]) -> str:
    """Return a table of model, data and code fingerprints, device and versions."""
    facts: dict[tuple[str, str], list[str]] = {}
    for section in sections:
        for key, value in section["environment"].items():
            facts.setdefault((key.replace("_", " "), _value(value)), []).append(section["notebook"])
    if not facts:
        return ""
    keys = [key for key, _ in facts]
    rows = [(*fact, ", ".join(own) * (keys.count(fact[0]) > 1)) for fact, own in facts.items()]
    rows.sort(key=lambda row: keys.index(row[0]))
    frame = pd.DataFrame(rows, columns=["what", "value", "notebooks"])
    caption = "Model, data and code (fingerprints), device and versions."
    return table_markdown(frame, "environment", caption)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return number(value) if isinstance(value, float) else str(value)


def _html(paths: Paths, text: str) -> str:
    """Return one self-contained page, figures embedded."""
    text = re.sub(r' typst:[\w:]+="[^"]*"', "", text)
    page = _pandoc(paths, text, "html5", "report.html", "--embed-resources", "--toc")
    page = page.replace(' style="text-align: left;"', "")
    page = page.replace(' style="text-align: right;"', ' class="r"')
    return re.sub(r"<table.*?</table>", _labelled, page, flags=re.DOTALL)


def _labelled(table: re.Match) -> str:
    """Give each cell of an HTML table its column's name, and let intervals break, for screens."""
    heads = [re.sub('<.*?>|"', "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", table[0])]
    heads, page = itertools.cycle(heads), table[0].replace(",\u00a0", ", ")
    return re.sub(r"<td\b", lambda _: f'<td data-label="{next(heads)}"', page)


def _pdf(paths: Paths, text: str) -> bytes:
    """Return the report as a PDF, byte-identical for the same sections and figures."""
    source = _WIDTHS.sub("", _pandoc(paths, text, "typst", "report.typ"))
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    own_fonts = {"font_paths": [str(fonts)], "ignore_system_fonts": True}
    compiler = typst.Compiler(source.encode(), root=paths.home, **own_fonts)
    return compiler.compile(format="pdf", timestamp=_DATED, pdf_tags=False)


def _pandoc(paths: Paths, text: str, form: str, template: str, *arguments: str) -> str:
    extra = [f"--template={_TEMPLATES / template}", f"--resource-path={paths.home}"]
    extra += ["--citeproc", f"--bibliography={_TEMPLATES / 'references.bib'}"]
    extra += ["--standalone", "--toc-depth=1", "--columns=100000", "--wrap=none", *arguments]
    return pypandoc.convert_text(text, form, format=_FORMAT, extra_args=extra)


def account(paths: Paths, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write section `run`: how long the notebooks took. `runs` have notebook, seconds and where."""
    if not runs:
        return
    section = Section("run", paths, "Cost of the run", "How long did the study take?")
    machine = {key: run[key] for run in reversed(runs) for key in run}
    own = {"notebook", "status", "seconds"}
    section.environment = {key: value for key, value in machine.items() if key not in own}
    frame = pd.DataFrame(runs)[["notebook", "seconds"]]
    section.table(
        frame,
        "run",
        "Seconds of each notebook, its kernel's start included, or what its rows say they took "
        "where another process made them; two notebooks run at once.",
    )
    total = section.say("cost.study_seconds", frame["seconds"].sum(), n=len(frame), unit="s")
    section.answer(f"All notebooks together took {total}, of which two run at once.")
    section.save()


def quote(page: Path, paths: Paths) -> None:
    """Update what a Markdown page quotes from numbers.json: `<!-- number: KEY -->text<!-- -->`.

    `FOLDER/KEY` is of another run in `figures`; `word: KEY` quotes the unit, `cell: KEY` the number
    without its count, `mean: KEY` the bare value. InputError for a key or run that is not there.
    """
    runs = read_numbers(paths.figures.parent, "*")

    def quoted(match: re.Match) -> str:
        what, run, key = match.groups(paths.figures.name)
        source = paths.figures.with_name(run) / "numbers.json"
        if run not in runs:
            raise InputError(f"{page}: {source}: no such numbers; run that study first")
        if key not in runs[run]:
            raise InputError(f"{page}: number {key}: not in {source}{nearest(key, runs[run])}")
        entry = runs[run][key]
        shown = entry["unit" if what == "word" else "said"]
        shown = shown.partition(", n =")[0] if what == "cell" else shown
        shown = number(entry["value"], min(2, places(entry["value"]))) if what == "mean" else shown
        return f"{match[0].split('-->')[0]}-->{shown}<!-- -->"

    write_atomic(page, _QUOTED.sub(quoted, page.read_text(encoding="utf-8")))
