"""Figures of data and of cost: how values spread, how a cost grows. Style and saving are those of `drawing`."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from uke.drawing import COLUMN, GREY, INK, RC, looks
from uke.tables import LABELS, KIND_ORDER, number, ordered, require


def spread(frame: pd.DataFrame, by: str = "kind", panel: str = "measure", width: float = COLUMN) -> Figure:
    """Every score as a point, one line for each `by`, one panel for each `panel`; the median is marked and said.

    `frame` has the columns by, panel and score. Raises InputError for a missing column.
    """
    require(frame, [by, panel, "score"], "spread")
    names, panels = ordered(frame[by], KIND_ORDER), ordered(frame[panel])
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, len(panels) * (0.5 + 0.26 * len(names))), layout="constrained")
        axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, title in zip(axes, panels):
            own = frame[frame[panel] == title]
            ax.set_title(LABELS.get(title, title))
            for place, (name, (colour, _)) in enumerate(looks(names).items()):
                _cloud(ax, place, own.loc[own[by] == name, "score"].to_numpy(float), colour)
            ax.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.tick_params(left=False)
            ax.grid(axis="x")
    return fig


def _cloud(ax: Axes, place: int, values: np.ndarray, colour: str) -> None:
    """The values of one line as points, shifted a little so that they do not hide each other, always in the same way."""
    shifts = np.random.default_rng(place).uniform(-0.28, 0.28, len(values))
    ax.scatter(values, place + shifts, s=5, color=colour, alpha=0.35, lw=0)
    if len(values):
        middle = float(np.median(values))
        ax.vlines(middle, place - 0.36, place + 0.36, color=INK, lw=1.4, zorder=4)
        ax.text(1.02, place, number(middle, 2), transform=ax.get_yaxis_transform(), va="center", fontsize=6.5, color=GREY)


def growth(frame: pd.DataFrame, x: str, panels: Mapping[str, str], width: float = COLUMN) -> Figure:
    """How costs grow with `x`: a panel for each column of `panels` (column -> label), both axes from zero."""
    require(frame, [x, *panels], "growth")
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 1.9), layout="constrained")
        axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for ax, (column, label) in zip(axes, panels.items()):
            ax.plot(frame[x], frame[column], color="#0072b2", marker="o", clip_on=False)
            ax.set(xlabel=x, title=label, xlim=(0, None), ylim=(0, frame[column].max() * 1.15))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            ax.locator_params(axis="x", nbins=3)
            ax.grid(axis="y")
    return fig


def ranks(frame: pd.DataFrame, by: str = "kind", floor: int | None = None, width: float = COLUMN) -> Figure:
    """At which rank, by relevance, the chosen documents stand: the share of items up to each rank, one line for each `by`.

    `frame` has the columns by and rank (from 1); `floor` is drawn where one is given. The axis of ranks is logarithmic.
    """
    require(frame, [by, "rank"], "ranks")
    names = ordered(frame[by], KIND_ORDER)
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 2.0), layout="constrained")
        ax = fig.subplots()
        for name, (colour, _) in looks(names).items():
            found = np.sort(frame.loc[frame[by] == name, "rank"].to_numpy(float))
            ax.step([1, *found, frame["rank"].max()], [0, *np.arange(1, len(found) + 1) / len(found), 1], where="post", color=colour, label=LABELS.get(name, name))
        if floor is not None:
            ax.axvline(floor, color=GREY, lw=1, ls=(0, (3, 2)))
            ax.annotate(f"floor {floor}", (floor, 0.5), xytext=(-3, 0), textcoords="offset points", ha="right", fontsize=6.5, color=GREY)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="rank by relevance to the edit", ylabel="share of items", xlim=(1, frame["rank"].max()), ylim=(0, 1.02))
        ax.grid(axis="y")
        fig.legend(loc="outside upper right", ncols=len(names))
    return fig
