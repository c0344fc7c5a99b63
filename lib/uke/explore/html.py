"""Show an edit as HTML: answers side by side, a heat line over the wanted text, scores, weights.

The macros of `templates/explore.html` do it, from trials and what this module reads from them; they
escape every text. Colours are those of the JupyterLab theme, or those of the reader's page.
"""

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from uke.data.edits import KINDS, in_group
from uke.models.generate import Token

STYLE = (Path(__file__).parent / "explore.css").read_text(encoding="utf-8")


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


def points(losses: Sequence[float], stop: float, width: int, height: int) -> dict[str, Any]:
    """Place the losses (nats per token, logarithmic) by step, and the line of the stop loss."""
    floor = max(1e-4, 0.7 * min([*losses, stop or math.inf]))
    low, high = math.log(floor), math.log(max(*losses, floor * 10))

    def y(loss: float) -> float:
        share = (high - math.log(max(loss, floor))) / (high - low)
        return round(10 + (height - 24) * share, 1)

    step = (width - 44) / max(1, len(losses) - 1)
    placed = [(round(34 + step * index, 1), y(loss)) for index, loss in enumerate(losses)]
    return {"points": placed, "stop": stop and y(stop), "high": math.exp(high), "low": floor}


def moved(norms: Mapping[str, float]) -> tuple[int, dict[str, dict[int, dict[str, float]]]]:
    """Sort relative changes of weights by projection and block; return the depth and the cells."""
    components: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    largest = max(filter(math.isfinite, norms.values()), default=0.0) or 1.0
    for name, norm in norms.items():
        if found := re.search(r"\.(\d+)\.(.+?)(\.base_layer)?\.(weight|bias)$", name):
            cells, layer = components[found[2].rpartition(".")[2]], int(found[1])
            if layer not in cells or cells[layer]["percent"] < 100 * norm:
                cells[layer] = {"percent": 100 * norm, "share": min(1.0, norm / largest)}
    depth = 1 + max((layer for cells in components.values() for layer in cells), default=0)
    return depth, components


def mean_probability(tokens: Sequence[Token]) -> float:
    """Return the geometric mean."""
    return geometric_mean(max(probability, 1e-9) for _, probability in tokens)


_templates = FileSystemLoader(Path(__file__).with_name("templates"))
_options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
_environment = Environment(loader=_templates, undefined=StrictUndefined, **_options)
_environment.globals |= {"kinds": KINDS, "written": in_group("efficacy", "portability")}
_environment.globals |= {each.__name__: each for each in (marked, points, moved, mean_probability)}
# Each macro of the template is a function: show.message("...", "alert").
show = _environment.get_template("explore.html").module
