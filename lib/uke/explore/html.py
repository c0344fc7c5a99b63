"""Show an edit as HTML: answers side by side, a heat line over the wanted text, scores, weights.

The templates escape every text. Colours are those of the JupyterLab theme, light or dark; elsewhere
those of the reader's page.
"""

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from uke.data.edits import KINDS, in_group
from uke.explore.bench import Trial
from uke.models.generate import Token

# One probe is shown at a time, for readers who need not know the field's abbreviations.
LABELS = {name: kind.label for name, kind in KINDS.items()} | {
    "detail": "Detail",
    "rel_doc": "Related document",
    "rand_doc": "Random document",
    "struct_trip": "Unrelated triple",
    "near_triple": "Near triple",
}
WRITTEN = in_group("efficacy", "portability")
GROUPS = {
    "What was written: the answers should become the new text": WRITTEN,
    "What must not change: the answers should stay": [one for one in KINDS if one not in WRITTEN],
}
SHORT = 60  # characters of an answer that stands beside its question
STYLE = (Path(__file__).parent / "explore.css").read_text(encoding="utf-8")

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.globals["labels"] = LABELS
_environment.globals["metrics"] = {"rougel_f1": "ROUGE-L F1", "exact": "exact match"}
# Each macro of the template is a function: show.message("...", "alert").
show = _environment.get_template("explore.html").module


class Page(str):
    """HTML that a notebook displays."""

    def _repr_html_(self) -> str:
        return str(self)

    def alone(self, title: str) -> str:
        """Return the page as a file of its own, light or dark as its reader prefers."""
        return f"{show.document(title, Markup(self))}\n"


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Mark the words that only the first text has as deleted, those of the second as inserted."""
    old, new = (re.findall(r"\S+\s*", text) for text in (before, after))
    words = [[word.strip() for word in side] for side in (old, new)]
    left, right = Markup(), Markup()
    for operation, a, b, c, d in difflib.SequenceMatcher(None, *words, False).get_opcodes():
        same = operation == "equal"
        left += escape("".join(old[a:b])) if same else _tagged("del", "".join(old[a:b]))
        right += escape("".join(new[c:d])) if same else _tagged("ins", "".join(new[c:d]))
    return left, right


def _tagged(tag: str, text: str) -> Markup:
    words = text.rstrip()  # a mark ends with its last word
    return Markup("<{0}>{1}</{0}>{2}").format(tag, words, text[len(words) :]) if text else Markup()


def curve(losses: Sequence[float], stop: float = 0.0, width: int = 300, height: int = 90) -> str:
    """Draw the loss (nats per token, logarithmic) by step; at the dashed line training ends."""
    if not losses:
        return ""
    floor = max(1e-4, 0.7 * min([*losses, stop or math.inf]))
    low, high = math.log(floor), math.log(max(*losses, floor * 10))

    def y(loss: float) -> float:
        share = (high - math.log(max(loss, floor))) / (high - low)
        return round(10 + (height - 24) * share, 1)

    step = (width - 44) / max(1, len(losses) - 1)
    points = [(round(34 + step * index, 1), y(loss)) for index, loss in enumerate(losses)]
    first, last = f"{losses[0]:.2f} at first", f"{losses[-1]:.3g} after {len(losses)}"
    caption = f"Loss after each step: {first}, {last}."
    ends = (f"{math.exp(high):.2g}", f"{floor:.1g}")
    return show.curve(caption, width, height, points, y(stop) if stop else None, *ends)


def weight_map(norms: Mapping[str, float]) -> str:
    """Show by block and projection how far each weight moved relative to its size."""
    components: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    largest = max(filter(math.isfinite, norms.values()), default=0.0) or 1.0
    for name, norm in norms.items():
        if found := re.search(r"\.(\d+)\.(.+?)(\.base_layer)?\.(weight|bias)$", name):
            cells, layer = components[found[2].rpartition(".")[2]], int(found[1])
            if layer not in cells or cells[layer]["percent"] < 100 * norm:
                cells[layer] = {"percent": 100 * norm, "share": min(1.0, norm / largest)}
    depth = 1 + max((layer for cells in components.values() for layer in cells), default=0)
    return show.weight_map(depth, list(components.items()))


def side_by_side(
    rows: pd.DataFrame, tokens: Mapping[tuple[str, int], tuple[list[Token], list[Token]]]
) -> Markup:
    """Show each question with its answers before and after; see `Trial` for both arguments."""
    parts = []
    for title, kinds in GROUPS.items():
        found = [row for kind in kinds for row in rows[rows["kind"] == kind].itertuples()]
        parts += [show.heading(title)] if found else []
        for row in found:
            lines = map(partial(_heat_line, row.kind), tokens.get((row.kind, row.number), ("", "")))
            texts = marked(row.before, row.after)
            answers = map(show.answer, ("Before", "After"), texts, lines)
            short = max(len(row.before), len(row.after)) < SHORT
            parts.append(show.probe(row, short, *answers))
    return Markup().join(parts)


def _heat_line(kind: str, tokens: Sequence[Token]) -> str:
    logs = [math.log(max(probability, 1e-9)) for _, probability in tokens]
    mean = math.exp(sum(logs) / max(1, len(logs)))
    return show.heat_line(kind, tokens, f"{mean:.2g}") if tokens else ""


def result(trial: Trial, heading: str = "") -> str:
    """Show all of a trial: scores, weights that moved, loss curve, answers before and after."""
    losses, stop = trial.record.losses, getattr(trial.task.method, "stop_loss", 0.0)
    moved = weight_map(trial.record.change_norm)
    probes = side_by_side(trial.rows, trial.tokens)
    return show.result(heading, trial, moved, curve(losses, stop), probes)


def undone(question: str, answer: str) -> str:
    """Show what stands in place of a result once the edit is undone."""
    now = show.answer("Now", answer)
    return f"<h3>The edit is undone</h3>{show.reply('undone', question, [now])}"


def reply(question: str, before: str, after: str | None) -> str:
    """Show a free question with its answer, where there is an edit both without and with it."""
    answers = [show.answer("Without an edit", before)]
    if after is not None:
        names = ("Without the edit", "With the edit")
        answers = list(map(show.answer, names, marked(before, after)))
    return show.reply("free", question, answers)


def table(frame: pd.DataFrame, caption: str) -> str:
    """Show any frame: numbers with two decimals, a dash where there is none."""
    return show.table(list(frame), frame.itertuples(index=False), caption)


def several(trials: Sequence[Trial], comparison: pd.DataFrame) -> Page:
    """Show several trials on a static page, the comparison first if there is more than one."""
    caption = "The edits of this session, mean score of each kind after the edit."
    parts = [table(comparison, caption)] if len(trials) > 1 else []
    for trial in trials:
        heading = f"{trial.number}. {trial.task.method.name}: {trial.task.edit.question}"
        parts.append(result(trial, heading))
    return Page(f'<style>{STYLE}</style><div class="uke">{"".join(parts)}</div>')
