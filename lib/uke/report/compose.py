"""Make the report: numbers.json, and one Markdown text that pandoc turns into HTML and PDF.

compose(Paths("quick"))     # figures/quick/numbers.json, report.html, report.pdf
"""

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

from uke.errors import InputError, nearest
from uke.files import write_atomic
from uke.project import Paths
from uke.report.section import Section, prose, table_markdown
from uke.report.tables import number

TITLE = "Fine-tuning for unstructured knowledge editing: a reconstruction"
SUBTITLE = (
    "of arXiv 2506.09672, “Is Fine-Tuning an Effective Solution? "
    "Reassessing Knowledge Editing for Unstructured Data”"
)
FOURTH_FACTOR = "fourth factor: our choice; the paper's was not available to us"
SMOKE_RUN = "This run shows that loading, generating and scoring work. It supports no verdict."
NOTE = (
    "Brackets are 95 % bootstrap intervals; n counts what was drawn: edits, or batches where edits "
    f"share a training. This study is a reconstruction ({FOURTH_FACTOR})."
)
FIRST, APPENDIX = "11_verdicts", ("run", "tuning", "tuning_levels")  # sections out of turn
_TEMPLATES = Path(__file__).with_name("templates")
_DATED = datetime(2025, 6, 11, tzinfo=UTC)  # the day of the paper: the same bytes whenever composed
_FORMAT = "markdown-smart-auto_identifiers-citations-tex_math_dollars-raw_tex"
_QUOTED = re.compile(r"<!-- (number|word): ([a-z0-9_.]+) -->(.*?)<!-- -->")
_SHOWN = {"number": "said", "word": "unit"}
_TYPST_ATTRIBUTE = re.compile(r' typst:[\w:]+="[^"]*"')
_NEEDED = {"notebook", "title", "numbers", "body"}


def compose(
    paths: Paths, expected: Iterable[str] = (), runs: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write numbers.json, report.html and report.pdf from a run's sections; return their paths.

    Notebooks in `expected` without a section, failed `runs` (each with notebook, status, machine)
    and missing figures become warnings. Raises InputError where there is no section or one is
    unreadable, or where two say the same number or have a figure or table of the same name.
    """
    sections = read_sections(paths)
    numbers = _merge_numbers(sections)
    text = markdown(paths, sections, expected, runs)
    paths.figures.mkdir(parents=True, exist_ok=True)
    contents = {
        "numbers.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "report.html": _html(paths, text),
        "report.pdf": _pdf(paths, text),
    }
    return [write_atomic(paths.figures / name, content) for name, content in contents.items()]


def read_sections(paths: Paths) -> list[dict]:
    """Return the sections of a run in the order of the report."""
    files = sorted(paths.sections.glob("*.json"))
    if not files:
        raise InputError(f"{paths.sections}: no sections; run the notebooks of this profile first")
    sections = []
    for path in files:
        try:
            section = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not a section ({error}); run its notebook again") from None
        if not isinstance(section, dict) or not _NEEDED <= set(section):
            names = ", ".join(sorted(_NEEDED))
            raise InputError(f"{path}: not a section: expected {names}; run its notebook again")
        sections.append(section)
    order = [FIRST, *(each["notebook"] for each in sections)]
    return sorted(sections, key=lambda each: order.index(each["notebook"]))


def _merge_numbers(sections: Sequence[Mapping]) -> dict[str, dict]:
    """Return all numbers, sorted by key; InputError for what two sections name alike."""
    owners: dict[tuple[str, str], str] = {}
    for section in sections:
        named = [(block["type"], block["name"]) for block in section["body"] if "name" in block]
        for what, name in [("number", key) for key in section["numbers"]] + named:
            owner = owners.setdefault((what, name), section["notebook"])
            if owner != section["notebook"]:
                raise InputError(
                    f"{what} {name} is in two sections: {owner} and {section['notebook']}"
                )
    numbers = {key: entry for each in sections for key, entry in each["numbers"].items()}
    return dict(sorted(numbers.items()))


def markdown(
    paths: Paths,
    sections: Sequence[Mapping],
    expected: Iterable[str] = (),
    runs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the report as Markdown: answers, sections, methods, limits, appendix."""
    present = {section["notebook"] for section in sections}
    missing = [
        f"Notebook `{name}` has no section: it has not been run on this profile."
        for name in dict.fromkeys(expected)
        if name not in present
    ]
    missing += [
        f"The last run of notebook `{run['notebook']}` failed: its section is of an earlier run."
        for run in runs
        if run.get("status") == "failed"
    ]
    answers = [
        f"- [**{prose(each['title'])}.**](#{each['notebook']}) {prose(each['answer'])}"
        for each in sections
        if each["answer"] and each["notebook"] not in APPENDIX
    ]
    smoke = any(section["smoke_run"] for section in sections)
    about = f"Profile {paths.profile}, data {paths.data}. {FOURTH_FACTOR.capitalize()}."
    parts = [
        f"::: {{#about}}\n{prose(about)}\n:::",
        *([_box("warning", "Smoke run.", SMOKE_RUN)] if smoke else []),
        *(_box("warning", "Warning.", each) for each in missing),
        "# Answers {#abstract}",
        *answers,
        prose(NOTE),
        *(_section(paths, each) for each in sections if each["notebook"] not in APPENDIX),
        *_methods(sections),
        "# Limits {#limits}",
        *_limits(sections),
        *(_section(paths, each) for each in sections if each["notebook"] in APPENDIX),
        *_environment(sections, runs),
    ]
    return "\n\n".join(parts) + "\n"


def _section(paths: Paths, section: Mapping) -> str:
    warnings, body = list(section["warnings"]), []
    for block in section["body"]:
        if block["type"] == "figure" and not (paths.figures / f"{block['name']}.svg").is_file():
            warnings.append(f"The figure `{block['name']}` is missing from the directory.")
        else:
            body.append(block["markdown"])
    checks = [f"{'✓' if each['ok'] else '✗'} {prose(each['text'])}" for each in section["checks"]]
    parts = [
        f"# {prose(section['title'])} {{#{section['notebook']}}}",
        *([f"*{prose(section['question'])}*"] if section["question"] else []),
        *([_box("answer", "Answer.", section["answer"])] if section["answer"] else []),
        *(_box("warning", "Warning.", each) for each in warnings),
        *body,
        *(["\\\n".join(["**Checks**", *checks])] if checks else []),
    ]
    return "\n\n".join(parts)


def _box(kind: str, label: str, text: str) -> str:
    """Return a text in a box; its look in the PDF is attributes (pandoc's Typst properties)."""
    fill, edge = {
        "answer": ((232, 241, 247), (11, 74, 117)),
        "warning": ((253, 241, 222), (163, 90, 0)),
    }[kind]
    look = f'typst:fill="rgb{fill}" typst:stroke="(left: 2.5pt + rgb{edge})"'
    look += ' typst:inset="9pt" typst:width="100%" typst:breakable="false"'
    return f"::: {{.box .{kind} {look}}}\n**{label}** {prose(text)}\n:::"


def _limits(sections: Iterable[Mapping]) -> list[str]:
    return [
        f"**{prose(each['title'])}**\n\n" + "\n".join(f"- {prose(text)}" for text in each["limits"])
        for each in sections
        if each["limits"]
    ]


def _methods(sections: Iterable[Mapping]) -> list[str]:
    """Return a table of every recipe: the first one of a method in full, others as differences."""
    methods: dict[str, dict[str, dict]] = {}
    for section in sections:
        for recipe in section["recipes"]:
            own = {key: value for key, value in recipe.items() if key not in ("name", "batch")}
            variants = methods.setdefault(str(recipe.get("name", "unnamed")), {})
            settings = json.dumps(own, sort_keys=True)
            variant = variants.setdefault(settings, {"own": own, "batches": {}, "used": {}})
            variant["batches"] |= {recipe["batch"]: None} if "batch" in recipe else {}
            variant["used"][section["notebook"]] = None
    rows = []
    for name, variants in methods.items():
        base: Mapping[str, Any] = {}
        for each in variants.values():
            changed = {key: value for key, value in each["own"].items() if value != base.get(key)}
            base = base or each["own"]
            settings = [
                f"{key.replace('_', ' ')} {_value(value)}" for key, value in changed.items()
            ]
            batches = ", ".join(str(size) for size in sorted(each["batches"]))
            rows.append((name, "; ".join(settings), batches, ", ".join(each["used"])))
    if not rows:
        return []
    frame = pd.DataFrame(rows, columns=["method", "settings", "batches of", "used in"])
    caption = "Every recipe: the first of a method in full, the others by what differs from it."
    return ["# Methods {#methods}", table_markdown(frame, "recipes_as_run", caption, files=False)]


def _environment(sections: Iterable[Mapping], runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a table of model, data and code fingerprints, device and versions."""
    facts: dict[str, dict[str, list[str]]] = {}
    for section in sections:
        for key, value in section["environment"].items():
            facts.setdefault(key, {}).setdefault(_value(value), []).append(section["notebook"])
    for run in runs:
        for key, value in _machine(run).items():
            facts.setdefault(key, {_value(value): []})
    if not facts:
        return []
    rows = [
        (key.replace("_", " "), value, ", ".join(notebooks) if len(values) > 1 else "")
        for key, values in facts.items()
        for value, notebooks in values.items()
    ]
    frame = pd.DataFrame(rows, columns=["what", "value", "notebooks"])
    caption = "Model, data and code (fingerprints), device and versions."
    table = table_markdown(frame, "environment", caption, files=False)
    return ["# Environment {#environment}", table]


def _machine(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a run was made."""
    return {key: run[key] for key in run if key not in ("notebook", "status", "seconds")}


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
    text = _TYPST_ATTRIBUTE.sub("", text)
    arguments = ["--standalone", "--embed-resources", "--toc", "--toc-depth=1"]
    arguments += [f"--template={_TEMPLATES / 'report.html'}", f"--metadata=subtitle:{SUBTITLE}"]
    page = _pandoc(paths, text, "html5", arguments)
    page = page.replace(' style="text-align: left;"', "")
    return page.replace(' style="text-align: right;"', ' class="r"')


def _pdf(paths: Paths, text: str) -> bytes:
    """Return the report as a PDF, byte-identical for the same sections and figures."""
    arguments = ["--standalone", f"--template={_TEMPLATES / 'report.typ'}"]
    arguments += [f"--metadata=subtitle:{SUBTITLE}", f"--metadata=profile:{paths.profile}"]
    source = _pandoc(paths, text, "typst", arguments)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    compiler = typst.Compiler(
        source.encode(), root=paths.figures, font_paths=[str(fonts)], ignore_system_fonts=True
    )
    return compiler.compile(format="pdf", timestamp=_DATED, pdf_tags=False)


def _pandoc(paths: Paths, text: str, form: str, arguments: list[str]) -> str:
    shared = [f"--metadata=title:{TITLE}", "--columns=100000", "--wrap=none", "--metadata=lang:en"]
    shared.append(f"--resource-path={paths.figures}")
    return pypandoc.convert_text(text, form, format=_FORMAT, extra_args=[*shared, *arguments])


def account(paths: Paths, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write section `run`: how long the notebooks took. `runs` have notebook, seconds and where."""
    if not runs:
        return
    section = Section("run", paths, "Cost of the run", "How long did the study take?")
    # Kept with the section, since a report that is composed again elsewhere knows no runs.
    section.environment = {key: run[key] for run in reversed(runs) for key in _machine(run)}
    frame = pd.DataFrame([{key: run[key] for key in ("notebook", "seconds")} for run in runs])
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

    `word: KEY` quotes the unit alone. Raises InputError for a key that is not there.
    """
    if not page.is_file():
        return
    numbers = json.loads((paths.figures / "numbers.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    if unknown := [key for _, key, _ in _QUOTED.findall(text) if key not in numbers]:
        hint = nearest(unknown[0], numbers)
        raise InputError(
            f"{page}: number {unknown[0]}: not in {paths.figures / 'numbers.json'}{hint}"
        )
    write_atomic(page, _QUOTED.sub(lambda match: _quoted(match, numbers), text))


def _quoted(match: re.Match, numbers: Mapping[str, Mapping]) -> str:
    what, key, _ = match.groups()
    return f"<!-- {what}: {key} -->{numbers[key][_SHOWN[what]]}<!-- -->"
