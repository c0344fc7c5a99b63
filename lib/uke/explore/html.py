"""HTML of one edit: changed words marked, a heat line over the wanted text, scores with their direction, a map of the weights that moved.

Colours are those of the JupyterLab theme, light or dark, and of the reader's own page elsewhere; nothing is said by colour alone.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from uke.data.edits import KINDS as KIND_ORDER
from uke.results.compare import LABELS

OWN = ("original", "paraphrase", "detail", "multi_hop")
GROUPS = (
    ("What was written: the answers should become the new text", OWN),
    (
        "What must not change: the answers should stay",
        tuple(kind for kind in KIND_ORDER if kind not in OWN),
    ),
    ("Your questions", ("question",)),
)
KINDS = LABELS | {
    "detail": "Detail",
    "rel_doc": "Related document",
    "rand_doc": "Random document",
    "struct_trip": "Unrelated triple",
    "near_triple": "Near triple",
    "question": "Your question",
}
SHORT = 60  # letters of an answer that stands beside its question
METRICS = {"rougel_f1": "ROUGE-L F1", "exact": "exact match"}
STYLE = (Path(__file__).parent / "explore.css").read_text(encoding="utf-8")


class Page(str):
    """HTML that a notebook shows as such."""

    def _repr_html_(self) -> str:
        return str(self)

    def alone(self, title: str) -> str:
        """The page as a file of its own, light or dark as its reader has it."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body><h1 style="font-family: system-ui, sans-serif">{escape(title)}</h1>{self}</body></html>\n'


def page(*parts: str) -> Page:
    """The parts in one frame, with the style that they need."""
    return Page(f'<style>{STYLE}</style><div class="uke">{"".join(parts)}</div>')


def framed(html: str) -> str:
    """HTML for a widget that stands beside one with the STYLE."""
    return f'<div class="uke">{html}</div>' if html else ""


def message(text: str, kind: str = "status") -> str:
    """A line that a screen reader says when it appears: `status`, or `alert` where something is refused."""
    return (
        framed(
            f'<p class="uke-{kind}" role="{kind}">{"⚠ " if kind == "alert" else ""}{escape(text)}</p>'
        )
        if text
        else ""
    )


def meter(label: str, done: float, said: str) -> str:
    """A progress bar, `done` from 0 to 1."""
    return framed(
        f'<label class="uke-meter">{escape(label)} <progress max="1" value="{done:.3f}" aria-label="{escape(label)}"></progress> <span>{escape(said)}</span></label>'
    )


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML: words that only the first has as deleted, words that only the second has as inserted."""
    old, new = (re.findall(r"\S+\s*", text) for text in (before, after))
    left, right = [], []
    for what, a, b, c, d in difflib.SequenceMatcher(
        None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False
    ).get_opcodes():
        for side, words, tag in ((left, old[a:b], "del"), (right, new[c:d], "ins")):
            text = "".join(words)
            side.append(
                escape(text)
                if what == "equal" or not text
                else f"<{tag}>{escape(text.rstrip())}</{tag}>{escape(text[len(text.rstrip()) :])}"
            )
    return "".join(left), "".join(right)


def heat(tokens: Sequence[tuple[str, float]]) -> str:
    """The tokens of a text, each the stronger coloured the more probable it is; its probability on pointing at it."""
    spans = (
        f'<span style="--p:{probability:.2f}" title="{escape(text.strip() or "space")}: {probability:.2f}">{escape(text)}</span>'
        for text, probability in tokens
    )
    return f'<span class="uke-heat">{"".join(spans)}</span>'


def mean(tokens: Sequence[tuple[str, float]]) -> str:
    """Geometric mean of the probabilities of the tokens, in print."""
    return f"{math.exp(sum(math.log(max(probability, 1e-9)) for _, probability in tokens) / max(1, len(tokens))):.2g}"


def curve(losses: Sequence[float], stop: float = 0.0, width: int = 300, height: int = 90) -> str:
    """The loss (nats per token, logarithmic) after each step as a line; the dashed one is where training ends by itself."""
    if not losses:
        return ""
    floor = max(1e-4, min([*losses, *([stop] if stop else [])]) * 0.7)
    low, high = math.log(floor), math.log(max(*losses, floor * 10))
    spots = [
        (34 + (width - 44) * place / max(1, len(losses) - 1), _height(loss, low, high, height))
        for place, loss in enumerate(losses)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = (
        "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in spots)
        if len(spots) <= 40
        else ""
    )
    end = (
        f'<line class="uke-stop" x1="34" x2="{width - 10}" y1="{_height(stop, low, high, height):.1f}" y2="{_height(stop, low, high, height):.1f}"/>'
        if stop
        else ""
    )
    said = f"Loss after each step: {losses[0]:.2f} at first, {losses[-1]:.3g} after {len(losses)}."
    labels = f'<text x="30" y="14">{math.exp(high):.2g}</text><text x="30" y="{height - 14}">{floor:.1g}</text>'
    return (
        f'<figure class="uke-curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">{labels}{end}'
        f'<polyline points="{line}"/>{dots}</svg><figcaption>{said} Nats per token, logarithmic.</figcaption></figure>'
    )


def _height(loss: float, low: float, high: float, height: int) -> float:
    return 10 + (height - 24) * (high - math.log(max(loss, math.exp(low)))) / (high - low)


def weight_map(norms: Mapping[str, float]) -> str:
    """Layer by component, how far each weight moved relative to its size; stronger colour is further."""
    cells: dict[str, dict[int, list[float]]] = {}
    for name, norm in norms.items():
        found = re.search(r"\.(\d+)\.(.+?)(\.base_layer)?\.(weight|bias)$", name)
        if found:
            cells.setdefault(found[2].rpartition(".")[2], {}).setdefault(int(found[1]), []).append(
                norm
            )
    if not cells:
        return '<p class="uke-fine">No weight moved.</p>'
    depth = 1 + max(layer for row in cells.values() for layer in row)
    highest = max(filter(math.isfinite, norms.values()), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{layer}</th>' for layer in range(depth))
    rows = "".join(
        f'<tr><th scope="row">{escape(component)}</th>{"".join(_moved(row.get(layer), highest) for layer in range(depth))}</tr>'
        for component, row in cells.items()
    )
    return (
        '<div class="uke-scroll"><table class="uke-map"><caption>Which weights moved: change by block and projection, in % of the weight’s norm; '
        f'· is untouched.</caption><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _moved(norms: list[float] | None, highest: float) -> str:
    if norms is None:
        return '<td class="uke-none">·</td>'
    norm = max(norms)
    return f'<td style="--p:{min(1.0, norm / highest):.2f}">{100 * norm:.2g}</td>'


def scores(frame: pd.DataFrame) -> str:
    """A table of the mean score of each kind before and after, with direction; columns kind, metric, against, before, after."""
    rows = "".join(
        f'<tr><th scope="row">{KINDS.get(row.kind, row.kind)}{f" ({row.probes})" if row.probes > 1 else ""}</th><td>{row.before:.2f}</td><td>{row.after:.2f}</td><td>{_direction(row.before, row.after)}</td>'
        f'<td class="uke-fine">{METRICS.get(row.metric, row.metric)}, {"wanted answer" if row.against == "reference" else "answer before"}</td></tr>'
        for row in frame.itertuples()
    )
    return (
        '<div class="uke-scroll"><table class="uke-scores"><caption>Scores, from 0 to 1; higher is better in every row.</caption><thead><tr><th scope="col">kind</th>'
        f'<th scope="col">before</th><th scope="col">after</th><th scope="col">change</th><th scope="col">score, against</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _direction(before: float, after: float) -> str:
    if abs(after - before) < 5e-3:
        return '<span class="uke-same">= unchanged</span>'
    return (
        '<span class="uke-up">▲ better</span>'
        if after > before
        else '<span class="uke-down">▼ worse</span>'
    )


def side_by_side(
    rows: pd.DataFrame, tokens: Mapping[tuple[str, int], tuple[Sequence, Sequence]] | None = None
) -> str:
    """Every question with its answers before and after, by what should happen to them; see `workbench.Trial` for both arguments."""
    parts = []
    for title, kinds in GROUPS:
        own = [row for kind in kinds for row in rows[rows["kind"] == kind].itertuples()]
        if own:
            parts.append(
                f"<h4>{title}</h4>"
                + "".join(_question(row, (tokens or {}).get((row.kind, row.number))) for row in own)
            )
    return "".join(parts)


def _question(row: Any, tokens: tuple[Sequence, Sequence] | None) -> str:
    left, right = marked(row.before, row.after)
    head = f'<span class="uke-kind">{KINDS.get(row.kind, row.kind)}</span> <strong>{escape(row.question)}</strong>'
    told = f"{METRICS.get(row.metric, row.metric)} {row.score_before:.2f} → {row.score_after:.2f} {_direction(row.score_before, row.score_after)}"
    wanted = f" · wanted: {escape(row.reference)}" if row.kind == "multi_hop" else ""
    pair = "".join(
        f'<div class="uke-answer"><span class="uke-when">{when}</span><p>{text or "<em>(nothing)</em>"}</p>{_heated(row.kind, heated)}</div>'
        for when, text, heated in (
            ("Before", left, tokens and tokens[0]),
            ("After", right, tokens and tokens[1]),
        )
    )
    short = " uke-short" if max(map(len, (row.before, row.after))) < SHORT else ""
    return f'<article class="uke-probe{short}" data-kind="{row.kind}"><header>{head}<span class="uke-told">{told}{wanted}</span></header><div class="uke-pair">{pair}</div></article>'


def _heated(kind: str, tokens: Sequence | None) -> str:
    if not tokens:
        return ""
    if kind == "detail":
        return f'<p class="uke-fine">wanted: {heat(tokens)}, probability {mean(tokens)}</p>'
    return (
        f"<details{' open' if kind == 'original' else ''}><summary>how probable the wanted text is, token by token</summary><p>{heat(tokens)}</p>"
        f'<p class="uke-fine">probability of a token: {mean(tokens)} (geometric mean)</p></details>'
    )


def table(frame: pd.DataFrame, caption: str) -> str:
    """Any frame as a table: floats with two decimals, a dash where there is nothing."""
    head = "".join(
        f'<th scope="col">{escape(KINDS.get(name, str(name).replace("_", " ")))}</th>'
        for name in frame
    )
    rows = "".join(
        f"<tr>{''.join(_cell(value) for value in row)}</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<div class="uke-scroll"><table class="uke-scores uke-compared"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "<td>–</td>" if math.isnan(value) else f"<td>{value:.2f}</td>"
    return f"<td{' class=uke-long' if len(str(value)) > 24 else ''}>{escape(str(value))}</td>"


def code(text: str) -> str:
    """Lines of code, to be copied."""
    return f"<pre>{escape(text)}</pre>"


def result(trial: Any, heading: str = "") -> str:
    """All of a trial: scores, which weights moved, the course of the training, and every answer before and after."""
    notes = "".join(f'<p class="uke-fine">{escape(note)}</p>' for note in trial.record.notes)
    losses, stop = trial.record.losses, trial.task.method.stop_loss
    return (
        f"<h3>{escape(heading)}</h3>" * bool(heading)
        + f'<div class="uke-columns">{scores(trial.scores)}<div>{weight_map(trial.record.change_norm)}{curve(losses, stop)}{notes}</div></div>'
        + LEGEND
        + side_by_side(trial.rows, trial.tokens)
    )


def taken_back(question: str, answer: str) -> str:
    """What stands in place of a result when the edit is out of the weights again."""
    return f'<h3>The edit is undone</h3><article class="uke-probe" data-kind="undone"><header><strong>{escape(question)}</strong></header><div class="uke-answer"><span class="uke-when">Now</span><p>{escape(answer)}</p></div></article>'


def reply(question: str, before: str, after: str | None) -> str:
    """A free question with its answer, or where an edit is in the weights both answers."""
    pair = (
        [("Without an edit", escape(before))]
        if after is None
        else list(zip(("Without the edit", "With the edit"), marked(before, after)))
    )
    columns = "".join(
        f'<div class="uke-answer"><span class="uke-when">{when}</span><p>{text}</p></div>'
        for when, text in pair
    )
    return f'<article class="uke-probe" data-kind="free"><header><strong>{escape(question)}</strong></header><div class="uke-pair">{columns}</div></article>'


LEGEND = (
    '<p class="uke-fine"><del>only before</del> <ins>only after</ins> · token probability: <span class="uke-heat uke-scale">'
    + "".join(f'<span style="--p:{step / 4}">{step / 4:g}</span>' for step in range(5))
    + "</span></p>"
)


def several(trials: Iterable[Any], table_of: pd.DataFrame) -> Page:
    """A static page of several trials, the comparison first where there is more than one."""
    trials = list(trials)
    first = (
        [table(table_of, "The edits of this session, mean score of each kind after the edit.")]
        if len(trials) > 1
        else []
    )
    return page(
        *first,
        *(
            result(trial, f"{trial.number}. {trial.task.method.name}: {trial.task.edit.question}")
            for trial in trials
        ),
    )
