"""Set the style of figures: fixed colours and marks, names beside lines, the same bytes."""

import functools
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uke.files import write_atomic
from uke.results.compare import label

COLUMN, FULL = 3.4, 6.8  # widths in inches of a figure in one column and across a page
INK, GREY, PALE, BLUE, RED = "#1b1b1b", "#6f6f6f", "#e4e4e4", "#0072b2", "#d55e00"
DASHES = (0, (3, 2))
VARIANT = " (at once)"  # after the name of a method that the same figure also shows without it
RC = matplotlib.rc_params_from_file(
    Path(__file__).with_name("templates") / "figures.mplstyle", use_default_template=False
)


class Look(NamedTuple):
    """How one name is drawn in every figure."""

    colour: str
    marker: str = "o"
    dashes: str | tuple = "-"


# One colour and mark per method for the whole study, after Okabe and Ito (2008) and Tol (2021):
# safe for colour-blind readers within a family, and the mark tells families apart in print.
LOOKS = {
    "FT-UKE": Look(INK, "*"),
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
    "no edit": Look(GREY, "x", DASHES),
}
OTHERS = [
    Look(*look)
    for look in (
        (BLUE, "o"),
        ("#e69f00", "s"),
        ("#009e73", "^"),
        ("#cc79a7", "D"),
        (RED, "v"),
        ("#56b4e9", "P"),
    )
]


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the style of the study, whatever the caller's own settings are (a decorator)."""

    @functools.wraps(draw)
    def drawn(*arguments, **options):
        with matplotlib.rc_context(RC):
            return draw(*arguments, **options)

    return drawn


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return the look of each name: fixed for methods, by order of appearance for anything else.

    A variant of a method has its colour and is dashed.
    """
    names = list(dict.fromkeys(names))
    others = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    plain = {name: LOOKS.get(name.removesuffix(VARIANT)) or next(others) for name in names}
    return {
        name: look._replace(dashes="--") if name.endswith(VARIANT) else look
        for name, look in plain.items()
    }


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
        above = min(heights[name], above - gap)
        text = {"color": ends[name][2], "fontsize": 7, "va": "center", "annotation_clip": False}
        line = {"arrowstyle": "-", "color": ends[name][2], "lw": 0.5, "alpha": 0.6}
        line |= {"shrinkA": 1, "shrinkB": 1}
        where = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
        point, beside = points[name], (1.06, above)
        ax.annotate(label(name), point, beside, **where, **text, arrowprops=line)


def save(fig: Figure, directory: str | Path, name: str, png: bool = False) -> list[Path]:
    """Write `name`.svg (and `name`.png where wanted), byte-identical for the same figure."""
    undated = {"svg": {"Date": None, "Creator": None}} | (
        {"png": {"Software": None}} if png else {}
    )
    saved = []
    with matplotlib.rc_context(RC):
        for ending, metadata in undated.items():
            drawn = io.BytesIO()
            fig.savefig(drawn, format=ending, metadata=metadata)
            saved.append(write_atomic(Path(directory) / f"{name}.{ending}", drawn.getvalue()))
    return saved
