"""Figures of many methods at once: lines over a number, courses of trainings, a grid of shades."""

from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from uke.report.style import COLUMN, GREY, INK, RC, looks
from uke.report.tables import LABELS, number, ordered

MOST = 4  # panels side by side
LEAST = 1e-3  # nats per token; a smaller loss is drawn as this, so that the axis of orders of magnitude ends
VARIANT = " (at once)"  # behind the name of a method that is also there without it


def lines(frame: pd.DataFrame, x: str, columns: tuple[str, str], width: float) -> Figure:
    """Mean `score` over the rows at each `x`; `columns`: that of the lines and that of the panels."""
    by, panel = columns
    titles, look = ordered(frame[panel]), _looks(frame[by])
    height = -(-len(titles) // MOST)
    with matplotlib.rc_context(RC):
        fig = Figure(
            figsize=(width, max(0.5 + 2.0 * height, 0.4 + 0.16 * len(look))), layout="constrained"
        )
        axes = list(fig.subplots(height, min(MOST, len(titles)), squeeze=False).flat)
        for ax, title in zip(axes, titles):
            _lines(
                ax, frame[frame[panel] == title].groupby([by, x], sort=False)["score"].mean(), look
            )
            ax.set_title(LABELS.get(title, title), fontsize=7 if len(titles) > 2 else None)
            _places(ax, sorted(frame[x].unique()))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for ax in axes[len(titles) :]:
            ax.set_axis_off()
        handles = [
            Line2D([], [], color=colour, marker=mark, ls=dashes, label=LABELS.get(name, name))
            for name, (colour, mark, dashes) in look.items()
        ]
        fig.legend(handles=handles, loc="outside right center", ncols=1)
        fig.supxlabel(x.replace("_", " "), fontsize=7.5, color=GREY)
    return fig


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, mark and dashes of each name; a method that stands in the figure twice is the same, dashed."""
    found = looks(name.removesuffix(VARIANT) for name in names)
    return {
        name: (*found[name.removesuffix(VARIANT)], "--" if name.endswith(VARIANT) else "-")
        for name in ordered(names)
    }


def _lines(ax: Axes, means: pd.Series, look: dict[str, tuple[str, str, str]]) -> None:
    """A line for each name that has values here; the star lies above the others."""
    for name, (colour, mark, dashes) in look.items():
        if name in means.index:
            own, star = means[name].sort_index(), mark == "*"
            ax.plot(
                own.index,
                own,
                color=colour,
                marker=mark,
                ls=dashes,
                mec="white",
                mew=0.5,
                ms=7 if star else 4.2,
                clip_on=False,
                zorder=5 if star else 3,
            )
    _scale(ax, means)
    ax.grid(axis="y")


def _places(ax: Axes, values: list[float]) -> None:
    """Ticks at these values; an axis of powers where each is about the same multiple of the one before, else small ones would lie on each other."""
    ratios = [after / before for before, after in zip(values, values[1:]) if before > 0]
    if len(ratios) > 2 and 1.5 <= min(ratios) and max(ratios) <= 1.75 * min(ratios):
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(values)


def _scale(ax: Axes, values: pd.Series) -> None:
    """The axis of scores, of what grows by orders of magnitude, or one from zero."""
    if values.between(0, 1).all():
        ax.set(ylim=(0, 1.03), yticks=[0, 0.5, 1])
    elif values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, max(values.max() * 1.1, 1e-9))


def shades(means: pd.DataFrame, label: str, width: float = COLUMN) -> Figure:
    """A table of numbers as shades and in digits, darker for more; `label` names them."""
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 0.7 + 0.2 * len(means)), layout="constrained")
        ax = fig.subplots()
        drawn = ax.imshow(means.to_numpy(float), cmap="Blues", vmin=0, aspect="auto")
        for place, column in np.argwhere(means.notna().to_numpy()):
            mean = float(means.iat[place, column])
            dark = mean > 0.55 * means.max(axis=None)
            ax.text(
                column,
                place,
                number(mean, 2),
                ha="center",
                va="center",
                fontsize=5.5,
                color="white" if dark else INK,
            )
        ax.set_xticks(range(means.shape[1]), [str(column) for column in means.columns])
        ax.set_yticks(range(len(means)), [LABELS.get(name, name) for name in means.index])
        ax.set_xlabel(str(means.columns.name))
        ax.tick_params(left=False, bottom=False)
        ax.spines[:].set_visible(False)
        fig.colorbar(drawn, ax=ax, label=label, pad=0.02, aspect=30).outline.set_visible(False)
    return fig


VERDICTS = {
    "holds": ("#009e73", "o"),
    "in part": ("#e69f00", "D"),
    "does not hold": ("#d55e00", "X"),
}


def distances(frame: pd.DataFrame, width: float) -> Figure:
    """A line for each claim: its numbers with their intervals, each claim on a scale of its own around one zero, and what they are."""
    names = ordered(frame["claim"])
    with matplotlib.rc_context(RC):
        fig = Figure(
            figsize=(width, 0.7 + 0.13 * len(frame) + 0.12 * len(names)), layout="constrained"
        )
        ax = fig.subplots()
        ax.axvline(0, color=INK, lw=0.8, zorder=1)
        top, ticks = 0.0, []
        for name in names:
            own = frame[frame["claim"] == name]
            largest = own[["value", "low", "high"]].abs().to_numpy(float).max() or 1.0
            heights = top + np.arange(len(own))
            for height, row in zip(heights, own.itertuples(index=False)):
                colour, mark = VERDICTS[row.verdict]
                ax.hlines(
                    height, row.low / largest, row.high / largest, color=colour, lw=1.6, zorder=2
                )
                ax.plot(
                    row.value / largest,
                    height,
                    mark,
                    color=colour,
                    mec="white",
                    mew=0.5,
                    ms=5.5,
                    zorder=3,
                )
                ax.text(
                    1.02,
                    height,
                    row.said,
                    transform=ax.get_yaxis_transform(),
                    va="center",
                    fontsize=6.5,
                    color=GREY,
                )
            ticks.append(heights.mean())
            top += len(own) + 0.9
        ax.set_yticks(ticks, names)
        ax.set(ylim=(top - 0.9, -1), xlim=(-1.08, 1.08), xticks=[-0.7, 0, 0.7])
        ax.set_xticklabels(["against the claim", "no difference", "as the claim says"])
        ax.tick_params(left=False, bottom=False)
        handles = [
            Line2D([], [], color=colour, marker=mark, ls="", label=word)
            for word, (colour, mark) in VERDICTS.items()
        ]
        fig.legend(handles=handles, loc="outside upper right", ncols=3)
    return fig


def descents(frame: pd.DataFrame, columns: tuple[str, str], width: float) -> Figure:
    """Over the steps, the median over edits and the range of 80 % of them, in a panel each; `columns`: that of the panels, that of the values."""
    by, y = columns
    names = ordered(frame[by])
    height = -(-len(names) // (MOST + 1))
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, max(1.9, 0.4 + 1.15 * height)), layout="constrained")
        axes = list(
            fig.subplots(height, min(MOST + 1, len(names)), sharey=True, squeeze=False).flat
        )
        for ax, (name, (colour, _)) in zip(axes, looks(names).items()):
            edits = (
                frame[frame[by] == name]
                .pivot_table(index="step", columns="edit", values=y)
                .clip(lower=LEAST)
                .ffill()
            )  # an edit that has ended keeps its last value
            low, middle, high = (edits.quantile(share, axis=1) for share in (0.1, 0.5, 0.9))
            ax.fill_between(edits.index, low, high, color=colour, alpha=0.15, lw=0)
            ax.plot(middle.index, middle, color=colour)
            ax.set_title(LABELS.get(name, name), fontsize=7)
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            ax.grid(axis="y")
        _scale(axes[0], frame[y].clip(lower=LEAST))
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        fig.supxlabel("training step", fontsize=7.5, color=GREY)
        fig.supylabel(f"{y.replace('_', ' ')} (nats per token)", fontsize=7.5, color=GREY)
    return fig
