"""The one style of all figures: fixed colours and marks, names beside their lines, files that redraw byte for byte."""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uke.files import write_atomic
from uke.report.tables import LABELS

COLUMN, FULL = 3.4, 6.8
INK, GREY, PALE = "#1b1b1b", "#6f6f6f", "#e4e4e4"

# One colour and mark per method for the whole study, after Okabe and Ito (2008) and Tol (2021): safe for colour-blind
# readers within a family, and the mark tells the families apart in print.
METHODS = {
    "FT-UKE": ("#1b1b1b", "*"),
    "FT-L": ("#d55e00", "o"),
    "FT-M": ("#0072b2", "o"),
    "FT-A": ("#56b4e9", "o"),
    "LoRA": ("#009e73", "s"),
    "AdaLoRA": ("#7a9a01", "s"),
    "LocFT-BF": ("#882255", "v"),
    "MEMIT": ("#e69f00", "D"),
    "AlphaEdit": ("#a6761d", "D"),
    "UnKE": ("#cc79a7", "D"),
    "AnyEdit (MEMIT)": ("#aa4499", "^"),
    "AnyEdit (AlphaEdit)": ("#8c564b", "^"),
    "AnyEdit (UnKE)": ("#d4619b", "^"),
    "AnyEdit++": ("#5b3fa0", "^"),
    "muKE": ("#b3a000", "^"),
    "in-context": ("#7f7f7f", "P"),
    "last_prompt_token": ("#d55e00", "o"),
    "target_tokens": ("#0072b2", "o"),
}
_OTHERS = (
    ("#0072b2", "o"),
    ("#e69f00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#d55e00", "v"),
    ("#56b4e9", "P"),
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
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "savefig.dpi": 220,
    "pdf.fonttype": 42,
    "svg.hashsalt": "uke",
    "svg.fonttype": "none",
    "axes.unicode_minus": True,
}


def style() -> None:
    """Set the style of every figure of this study for drawings of one's own; the functions below set it themselves."""
    matplotlib.rcParams.update(RC)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each name: fixed for methods, by order of appearance for anything else."""
    names = list(dict.fromkeys(names))
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: METHODS[name] if name in METHODS else next(others) for name in names}


def label_ends(ax: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Names right of the axes for lines that end at (x, y) in a colour, moved apart where they would overlap."""
    ax.get_xlim(), ax.get_ylim()  # asked for, the limits follow what was drawn last
    to_axes = ax.transData + ax.transAxes.inverted()
    points = {name: to_axes.transform((x, y)) for name, (x, y, _) in ends.items()}
    order = sorted(points, key=lambda name: points[name][1])
    gap, heights = (
        0.14 / (0.75 * ax.figure.get_figheight()),
        {},
    )  # inches that a name takes, as a share of the axes
    for name in order:
        heights[name] = max(points[name][1], *(height + gap for height in heights.values()), -1)
    above = 1.05
    for name in reversed(order):
        heights[name] = above = min(heights[name], above - gap)
        ax.annotate(
            LABELS.get(name, name),
            xy=points[name],
            xytext=(1.06, heights[name]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=ends[name][2],
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ends[name][2],
                "lw": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def save(fig: Figure, directory: str | Path, name: str) -> list[Path]:
    """Write `name`.pdf and `name`.png, byte for byte the same on every redraw; the paths."""
    undated = {
        "pdf": dict.fromkeys(("CreationDate", "ModDate", "Producer", "Creator")),
        "png": {"Software": None},
    }
    saved = []
    with matplotlib.rc_context(RC):
        for ending, metadata in undated.items():
            drawn = io.BytesIO()
            fig.savefig(drawn, format=ending, metadata=metadata)
            saved.append(write_atomic(Path(directory) / f"{name}.{ending}", drawn.getvalue()))
    return saved
