"""The report as a document: sections arranged and numbered, recipes put into words, set as HTML and as PDF."""

import base64
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import typst
from markupsafe import Markup, escape

from uke.cli import manifests
from uke.report import abstract, arrangement
from uke.report.numerals import number

TITLE = "Fine-tuning for unstructured knowledge editing: a reconstruction"
SUBTITLE = (
    "of arXiv 2506.09672, “Is Fine-Tuning an Effective Solution? "
    "Reassessing Knowledge Editing for Unstructured Data”"
)
FOURTH_FACTOR = "fourth factor: our choice; the paper's was not available to us"
SMOKE_RUN = (
    "This run shows that loading, asking and scoring work on these data. It supports no verdict."
)
_TEMPLATES = Path(__file__).parent / "templates"
# A fixed day, the paper's, so that the same sections give the same bytes.
_DATED = datetime(2025, 6, 11, tzinfo=UTC)
_SCOPES = {
    "target_tokens": "every target token, teacher-forced",
    "last_prompt_token": "the last prompt token only",
}
COMPARISON = (
    "07_recipe"  # the notebook whose recipes are described; the others are told as differences
)
_ADAPTERS = {"lora": "LoRA", "adalora": "AdaLoRA"}


def arrange(paths: Any, sections: list[dict], expected: Iterable[str] = ()) -> dict:
    """Everything both forms of the report show, as JSON; what stands where is decided by `arrangement`.

    Notebooks of `expected` without a section, failed runs and missing figures become warnings.
    """
    ran = manifests.read(paths)
    present = {section["notebook"] for section in sections}
    absent = [name for name in dict.fromkeys(expected) if name not in present]
    failed = sorted(manifest["notebook"] for manifest in ran if manifest.get("status") == "failed")
    warnings = [
        f"Notebook `{name}` has no section: it has not been run on this profile." for name in absent
    ]
    warnings += [
        f"The last run of notebook `{name}` failed: what it shows is of an earlier run."
        for name in failed
    ]
    methods = _methods(sections)
    # Before the widths of columns are found, since what holds together cannot be broken.
    verdicts, main, appendix = arrangement.split(
        arrangement.hold_together([*sections, *_recipes(methods)]), Path(paths.figures)
    )
    arranged = {
        "abstract": abstract.write(sections),
        "verdicts": verdicts,
        "sections": main,
        "appendix": appendix,
        "limits": [
            [section["title"], section["limits"]] for section in sections if section["limits"]
        ],
        "numbers": [
            [key, said["said"]] for section in sections for key, said in section["numbers"].items()
        ],
        "methods": [[name, describe(variants[0]["own"])] for name, variants in methods],
    }
    return arrangement.hold_together(arranged) | {
        "title": TITLE,
        "subtitle": SUBTITLE,
        "profile": str(getattr(paths, "profile", None) or Path(paths.figures).name),
        "data": str(getattr(paths, "data", None) or ""),
        "fourth_factor": FOURTH_FACTOR,
        "smoke_run": SMOKE_RUN if any(section["smoke_run"] for section in sections) else "",
        "warnings": warnings,
        "environment": _environment(sections, ran),
    }


def html(data: dict, directory: Path) -> str:
    """The report as one self-contained HTML page; figures are read from `directory`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "prose": _prose,
        "picture": lambda name: _data_uri(directory / f"{name}.png"),
    }
    return environment.get_template("report.html.j2").render(data)


def pdf(data: dict, directory: Path) -> bytes:
    """The report as a PDF, byte for byte the same for the same data and figures.

    The template reads `data` as JSON, so no text of it is ever read as markup.
    """
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    with tempfile.TemporaryDirectory() as root:
        for section in [*data["sections"], *data["appendix"]]:
            for block in section["blocks"]:
                if block["type"] == "figure":
                    shutil.copy(directory / f"{block['name']}.pdf", root)
        shutil.copy(_TEMPLATES / "report.typ", root)
        (Path(root) / "report.json").write_text(json.dumps(data), encoding="utf-8")
        compiler = typst.Compiler(
            str(Path(root) / "report.typ"),
            root=root,
            font_paths=[str(fonts)],
            ignore_system_fonts=True,
        )
        return compiler.compile(format="pdf", timestamp=_DATED)


def _environment(sections: list[dict], ran: list[dict]) -> list[list[str]]:
    """Names and values; where notebooks differ, one line each. Manifests fill in what no section says.

    The commit is left out: a committed report would change with every commit of itself. Fingerprints identify the code.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for section in sections:
        for key, value in section["environment"].items():
            found.setdefault(key, {}).setdefault(_value(value), []).append(section["notebook"])
    for manifest in ran:
        for key, value in manifests.machine(manifest).items():
            found.setdefault(key, {_value(value): []})
    lines = []
    for key, values in found.items():
        for value, notebooks in values.items():
            lines.append(
                [key.replace("_", " "), value, ", ".join(notebooks) if len(values) > 1 else ""]
            )
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)


def _methods(sections: list[dict]) -> list[tuple[str, list[dict]]]:
    """Each method with its recipes, the one of single edits (else the first) in front: `own` (fields), `batches` (sizes), `used` (notebooks)."""
    found: dict[str, dict[str, dict]] = {}
    for section in sorted(sections, key=lambda section: section["notebook"] != COMPARISON):
        for recipe in section["recipes"]:
            own = {key: value for key, value in recipe.items() if key not in ("name", "batch")}
            variants = found.setdefault(str(recipe.get("name", "unnamed")), {})
            variant = variants.setdefault(
                json.dumps(own, sort_keys=True), {"own": own, "batches": set(), "used": set()}
            )
            variant["batches"] |= {recipe["batch"]} if "batch" in recipe else set()
            variant["used"].add(section["notebook"])
    return [(name, list(variants.values())) for name, variants in found.items()]


def _recipes(methods: list[tuple[str, list[dict]]]) -> list[dict]:
    """A section of the appendix with one table: every recipe as it differs from the one that Methods describe; none where none was used."""
    head = ["Method", "Settings", "Batches of", "Used in"]
    rows = []
    for name, variants in methods:
        for each in variants:
            batches = ", ".join(str(size) for size in sorted(each["batches"]))
            texts = (
                name,
                _changes(variants[0]["own"], each["own"]),
                batches,
                ", ".join(sorted(each["used"])),
            )
            rows.append([{"text": text, "note": "", "best": False} for text in texts])
    caption = "Every recipe: how it differs from the one described under Methods, sizes of its batches where edits are written together, and where it was used."
    block = {
        "type": "table",
        "name": "every_recipe",
        "caption": caption,
        "head": head,
        "numeric": [False] * 4,
        "rows": rows,
        "unsaved": True,
    }
    empty = {"question": "", "answer": "", "blocks": [block], "warnings": [], "checks": []}
    return [{"notebook": arrangement.RECIPES, "title": "Recipes as run"} | empty] if rows else []


def _changes(base: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two recipes, in a few words; "as described" where nothing does."""
    keys = [key for key in other if other[key] != base.get(key)]
    words = {
        "layers": _say_layers,
        "loss": lambda loss: _SCOPES.get(loss, loss),
        "learning_rate": lambda rate: number(float(rate)),
    }
    return (
        "; ".join(f"{key.replace('_', ' ')} {words.get(key, _value)(other[key])}" for key in keys)
        or "as described"
    )


def describe(recipe: Mapping[str, Any]) -> str:
    """A recipe (its fields) in sentences; fields that have no sentence of their own are listed as they are."""
    rest = {key: value for key, value in recipe.items() if key != "name"}
    sentences = [write(rest) for fields, write in _SENTENCES if fields <= set(rest)]
    left = [
        f"{key.replace('_', ' ')} {_value(value)}"
        for key, value in rest.items()
        if value is not None
    ]
    return " ".join([*sentences, f"Further: {'; '.join(left)}." if left else ""]).strip()


def _say_weights(rest: dict) -> str:
    adapter, rank, alpha = (rest.pop(key, None) for key in ("adapter", "rank", "alpha"))
    what = f"{', '.join(f'`{name}`' for name in _several(rest.pop('components')))} in {_say_layers(rest.pop('layers'))}"
    if adapter:
        return (
            f"{_ADAPTERS.get(adapter, adapter)} adapters (rank {rank}, alpha {alpha:g}) on {what}."
        )
    return f"Trains the weights of {what}."


def _say_layers(layers: Any) -> str:
    if isinstance(layers, str):
        return {"all": "all blocks"}.get(layers, f"the {layers.replace('_', ' ')} of the blocks")
    words = [
        f"block {one}" if isinstance(one, int) else f"the block at {one:.0%} of the depth"
        for one in _several(layers)
    ]
    return ", ".join(words)


def _say_loss(rest: dict) -> str:
    loss = rest.pop("loss")
    return f"The loss is read from {_SCOPES.get(loss, loss)}."


def _say_prompt(rest: dict) -> str:
    form = "through the chat template" if rest.pop("chat_template") else "on the raw prompt"
    return f"Trained {form}, {'with' if rest.pop('end_of_turn') else 'without'} the end-of-turn token in the target."


def _say_training(rest: dict) -> str:
    batch, stop, decay = (
        rest.pop("batch_size", None),
        rest.pop("stop_loss", None),
        rest.pop("weight_decay", None),
    )
    unit = (
        f"passes in minibatches of {batch} edits"
        if batch
        else "steps, each over all edits of the batch"
    )
    words = [
        f"Adam at a learning rate of {number(float(rest.pop('learning_rate')))}",
        f"at most {rest.pop('steps')} {unit}",
    ]
    words += [f"weight decay {number(float(decay))}"] if decay else []
    words += (
        [f"stopped below a loss of {number(float(stop), 2 if stop >= 0.01 else None)}"]
        if stop
        else []
    )
    return ", ".join(words) + "."


def _say_peer(rest: dict) -> str:
    """A locate-then-edit method; settings of solvers and anchor rules that it does not use are left out."""
    own = {key: rest.pop(key) for key in PEER_FIELDS & set(rest)}
    solver, anchors = own["solver"], own["anchors"]
    if solver == "in_context":
        return "The text stands in the prompt before every question; no weight changes."
    place, blocks = _ANCHORS[anchors].format(**own), _say_layers(own["layers"])
    values = f"Adam at a learning rate of {own['learning_rate']:g}, at most {own['steps']} steps, stopped below a loss of {own['stop_loss']:g}, within {own['clamp']:g} times the state's norm"
    keeps = (
        " The keys of the other positions are kept."
        if solver == "memit" and own["keep_keys"]
        else ""
    )
    defect = " As published, with the layers' counter overwritten." if own["as_published"] else ""
    return f"Target values for {place} after {_say_layers(own['layers'][-1:])}: {values}. {_SOLVERS[solver].format(blocks=blocks, **own)}{keeps}{defect}"


PEER_FIELDS = {
    "solver",
    "anchors",
    "window",
    "weighting",
    "layers",
    "learning_rate",
    "steps",
    "stop_loss",
    "clamp",
    "decay",
    "memit_lambda",
    "keep_keys",
    "alphaedit_l2",
    "null_threshold",
    "unke_steps",
    "unke_rate",
    "unke_decay",
    "preservation",
    "as_published",
    "chat_template",
    "end_of_turn",
    "seed",
}
_ANCHORS = {
    "last": "the last prompt token",
    "windows": "the position before each window of {window} tokens",
    "surprisal": "the position before each window that begins where surprisal peaks, about {window} tokens each",
    "nested": "the position before each window of {window} tokens, each answering for all later windows too (weighted by {weighting})",
}
_SOLVERS = {
    "memit": "Written into the `down_proj` of {blocks} by least squares with a ridge of {memit_lambda:g} times the second moment.",
    "alphaedit": "Written into the `down_proj` of {blocks} by least squares on directions whose second moment is below {null_threshold:g}, with a ridge of {alphaedit_l2:g}.",
    "unke": "Written into the whole block by {unke_steps} steps of AdamW at {unke_rate:g}, held to {preservation} other texts.",
}
_SENTENCES = (
    ({"solver", "anchors"}, _say_peer),
    ({"components", "layers"}, _say_weights),
    ({"loss"}, _say_loss),
    ({"chat_template", "end_of_turn"}, _say_prompt),
    ({"learning_rate", "steps"}, _say_training),
    ({"seed"}, lambda rest: f"Seed {rest.pop('seed')}."),
)


def _several(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _prose(text: str) -> Markup:
    """Plain text as HTML; words between backticks are code, a lone backtick is one."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part
        for place, part in enumerate(parts)
    )


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
