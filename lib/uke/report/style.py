"""The style of all figures: fixed colours and marks, names beside their lines, byte-identical files."""

import functools
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uke.files import write_atomic
from uke.results.compare import label

COLUMN, FULL = 3.4, 6.8  # widths in inches of a figure in one column and across a page
INK, GREY, PALE, BLUE, RED = "#1b1b1b", "#6f6f6f", "#e4e4e4", "#0072b2", "#d55e00"
DASHES = (0, (3, 2))
VARIANT = " (at once)"  # after the name of a method that the same figure also shows without it


class Look(NamedTuple):
    """How one name is drawn in every figure."""

    colour: str
    mark: str = "o"
    dashes: str | tuple = "-"

    @property
    def size(self) -> float:
        return 7.5 if self.mark == "*" else 4.4


# One colour and mark per method for the whole study, after Okabe and Ito (2008) and Tol (2021):
# safe for colour-blind readers within a family, and the mark tells families apart in print.
LOOKS = {
    "FT-UKE": Look("#1b1b1b", "*"),
    "FT-L": Look("#d55e00"),
    "FT-M": Look("#0072b2"),
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
    "last_prompt_token": Look("#d55e00"),
    "target_tokens": Look("#0072b2"),
    "no edit": Look(GREY, "x", DASHES),
    "before the edit": Look(GREY, "x", DASHES),
}
_OTHERS = tuple(
    Look(colour, mark)
    for colour, mark in zip(
        ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"), "os^DvP", strict=False
    )
)
RC = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "font.family": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 7.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7.5,
    "xtick.color": "#4d4d4d",
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.borderpad": 0,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.dpi": 220,
    "svg.hashsalt": "uke",
    "svg.fonttype": "path",
}


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
    found, others = {}, iter(_OTHERS * (1 + len(names := list(dict.fromkeys(names))) // 6))
    for name in names:
        method = name.removesuffix(VARIANT)
        found[name] = LOOKS.get(method) or found.get(method) or next(others)
        if method != name:
            found[name] = found[name]._replace(dashes="--")
    return found


def label_ends(ax: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Name lines that end at (x, y) in a colour, right of the axes, apart where names would overlap."""
    ax.get_xlim(), ax.get_ylim()  # makes the limits follow what was drawn last
    to_axes = ax.transData + ax.transAxes.inverted()
    points = {name: to_axes.transform((x, y)) for name, (x, y, _) in ends.items()}
    order = sorted(points, key=lambda name: points[name][1])
    gap = 0.14 / (0.75 * ax.figure.get_figheight())  # inches of a name as a share of the axes
    heights, above = {}, 1.05
    for name in order:
        heights[name] = max(points[name][1], *(height + gap for height in heights.values()), -1)
    for name in reversed(order):
        heights[name] = above = min(heights[name], above - gap)
        colour = ends[name][2]
        ax.annotate(
            label(name),
            xy=points[name],
            xytext=(1.06, heights[name]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


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
