"""Set the style of figures: fixed colours and marks, names beside lines, small files."""

import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D, Bbox

from uke.files import write_atomic
from uke.results.compare import label

COLUMN, FULL = 3.4, 6.8  # widths in inches of a figure in one column and across a page
INK, GREY, FAINT, BLUE, RED = "#1b1b1b", "#6f6f6f", "#969696", "#0072b2", "#d55e00"
REFERENCE = {"color": GREY, "lw": 1, "ls": (0, (3, 2)), "zorder": 1}  # a line to compare with
VARIANT = " (at once)"  # after the name of a method that the same figure also shows without it
RC = matplotlib.rc_params_from_file(
    Path(__file__).with_name("templates") / "figures.mplstyle", use_default_template=False
)
# What nobody sees in an SVG: its date, names of parts, indentation, digits below 0.01 points.
_LEAN = {
    rb"(?s)<metadata>.*?</metadata>": b"",
    rb' id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"|(?<=\n) +': b"",
    rb'(\.\d\d)\d{2,}(?=[ \n"])': rb"\1",
    rb"<g>\n((?:<(?:use|path) [^>]*/>|<text .*</text>)\n)</g>\n": rb"\1",
    rb"font-family: [^;\"]*;? ?|(?<=[a-z]:) (?=[\w#][^<>]*\")|(?<=;) (?=[^<>]*\")": b"",
    rb"\*\{": b"*{font-family: 'DejaVu Sans', Verdana, sans-serif; ",
}


class Look(NamedTuple):
    """How one name is drawn in every figure."""

    colour: str
    marker: str = "o"
    dashes: str | tuple = "-"


# One colour and mark per method for the whole study, after Okabe and Ito (2008) and Tol (2021):
# safe for colour-blind readers within a family, and the mark tells families apart in print.
LOOKS = {
    "FT-UKE": Look(INK, "*"),
    "FT-UKE+": Look(INK, "h", "--"),
    "FT-L": Look(RED),
    "FT-M": Look(BLUE),
    "FT-A": Look("#56b4e9"),
    "LoRA": Look("#009e73", "s"),
    "AdaLoRA": Look("#7a9a01", "s"),
    "LocFT-BF": Look("#882255", "v"),
    "MEMIT": Look("#e69f00", "D"),
    "AlphaEdit": Look("#a6761d", "D"),
    "UnKE": Look("#cc79a7", "D"),
    "AnyEdit (MEMIT)": Look("#aa4499", "^"),
    "AnyEdit (AlphaEdit)": Look("#8c564b", "^"),
    "AnyEdit (UnKE)": Look("#d4619b", "^"),
    "AnyEdit++": Look("#5b3fa0", "^"),
    "muKE": Look("#b3a000", "^"),
    "in-context": Look("#7f7f7f", "P"),
    "no edit": Look(GREY, "x", REFERENCE["ls"]),
}
COLOURS = (BLUE, "#e69f00", "#009e73", "#cc79a7", RED, "#56b4e9")
OTHERS = [Look(*each) for each in zip(COLOURS, "os^DvP", strict=True)]
# A decorator: draw with the style of the study, whatever the caller's own settings are.
styled = matplotlib.rc_context(RC)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return the look of each name: fixed for methods, by order of appearance for anything else.

    A variant of a method (`FT-M, all target tokens`) has its colour and is dashed.
    """
    found, others = {}, itertools.cycle(OTHERS)
    for name in dict.fromkeys(names):
        own = name.removesuffix(VARIANT).partition(", ")[0]
        look = LOOKS.get(own) or next(others)
        found[name] = look._replace(dashes="--") if own in LOOKS.keys() - {name} else look
    return found


def label_ends(ax: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Name lines that end at (x, y) in a colour, right of the axes, without overlap."""
    ax.get_xlim(), ax.get_ylim()  # makes the limits follow what was drawn last
    to_axes = ax.transData + ax.transAxes.inverted()
    points = {name: to_axes.transform((x, y)) for name, (x, y, _) in ends.items()}
    order = sorted(points, key=lambda name: points[name][1])
    gap = 0.14 / (0.75 * ax.figure.get_figheight())  # inches of a name as a share of the axes
    heights, above = {}, 1.05
    for name in order:
        heights[name] = max(points[name][1], *(height + gap for height in heights.values()), -1)
    for name in reversed(order):
        above, colour = min(heights[name], above - gap), ends[name][2]
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)}
        text = {"color": colour, "fontsize": 7, "va": "center", "annotation_clip": False}
        text |= {"xycoords": "axes fraction", "textcoords": "axes fraction", "arrowprops": line}
        ax.annotate(label(name), points[name], (1.06, above), **text)


def label_points(ax: Axes, points: dict[str, tuple[float, float, str]], marks: Iterable) -> None:
    """Name points (x, y) in a colour, each beside its mark where no mark or name is yet."""
    ax.figure.draw_without_rendering()  # so that the axes have their place
    scale = Affine2D().scale(1 / ax.figure.dpi)
    inches, frame = ax.transData + scale, ax.get_window_extent().transformed(scale)
    taken = [Bbox.from_bounds(x - 0.04, y - 0.04, 0.08, 0.08) for x, y in inches.transform(marks)]
    for name, (x, y, colour) in sorted(points.items(), key=lambda point: -point[1][0]):
        (left, low), wide = inches.transform((x, y)), 0.062 * len(label(name))
        turns = itertools.product((-0.05, 0.05, -0.17, 0.15, -0.27), (0.09, -0.09 - wide, 0.2))
        boxes = [Bbox.from_bounds(left + dx, low + dy, wide, 0.1) for dy, dx in turns]
        inside = (box for box in boxes if frame.x0 < box.x0 and box.x1 < frame.x1 + 0.1)
        taken.append(next((box for box in inside if not box.count_overlaps(taken)), boxes[0]))
        ax.text(*inches.inverted().transform(taken[-1].p0), label(name), color=colour, size=7)


def save(fig: Figure, directory: str | Path, name: str) -> Path:
    """Write `name`.svg, text as text, `_LEAN` replaced: the same bytes for the same figure."""
    content = io.BytesIO()
    with matplotlib.rc_context(RC):
        fig.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawn = content.getvalue()
    for needless, lean in _LEAN.items():
        drawn = re.sub(needless, lean, drawn)
    return write_atomic(Path(directory) / f"{name}.svg", drawn)
