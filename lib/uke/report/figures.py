"""Draw one kind of figure per function: a tidy table in, a matplotlib figure out.

    section.figure(figures.scores, scores, "layers", caption, alt, x="level", by="method")

Frames have a row per observation. `by` names what has a colour: a method has the same one in every
figure. Rows called `no edit` are a dashed line.
"""

from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from uke.data.edits import KINDS
from uke.report import style
from uke.report.style import FULL, Look, label_ends, label_points, looks, styled
from uke.report.tables import REFERENCES, number, printed_score
from uke.results.compare import label
from uke.results.stats import Score, ordered, summarise

NO_EDIT = REFERENCES[0]
LEAST_LOSS = 1e-3  # nats per token; smaller losses are drawn as this, so that a log axis ends


@styled
def scores(
    frame: pd.DataFrame,
    x: str | None = None,
    by: str = "method",
    within: str | None = None,
    panel: str = "kind",
    row: str | None = None,
    separate: Sequence[str] = (),
) -> Figure:
    """Draw mean scores with 95 % intervals, a panel for each kind of probe.

        scores(frame)                                a line per method, references behind them
        scores(frame, by="level", within="method")   lines per level, coloured by method
        scores(frame, x="level", separate=["all"])   levels along an axis, all but "all" joined

    `frame` has the columns named and edit, score (and batch).
    """
    columns = dict.fromkeys(filter(None, [x, by, within, panel, row]))
    summary = summarise(frame, list(columns))
    shown = summary[summary[by] != NO_EDIT]
    if x is None:
        return _forest(summary, shown, by, within or by, panel)
    titles = ordered(summary[panel], KINDS)
    levels = sorted(ordered(shown[x]), key=lambda level: level in separate)
    places = pd.Series({level: at + 0.6 * (level in separate) for at, level in enumerate(levels)})
    joined = [level for level in levels if level not in separate]
    rows, look = ordered(shown[row]) if row else [""], looks(shown[by])
    fig = Figure(figsize=(FULL, 0.75 + 1.6 * len(rows)))
    axes = fig.subplots(len(rows), len(titles), sharex=True, sharey="col", squeeze=False)
    for (line, column), ax in np.ndenumerate(axes):
        name, title = rows[line], titles[column]
        own = summary[(summary[panel] == title) & ((summary[row] == name) if row else True)]
        ends = {}
        for mean in own.loc[own[by] == NO_EDIT, "mean"]:
            ax.axhline(mean, **style.REFERENCE)
            ends[NO_EDIT] = (places.max() + 0.5, mean, style.GREY)
        for turn, (each, (colour, marker, _)) in enumerate(look.items()):
            cells = own[own[by] == each].set_index(x).reindex(levels)
            where = places + 0.14 * (turn - (len(look) - 1) / 2)  # names side by side
            ax.vlines(where, cells["low"], cells["high"], color=colour, lw=1.2, alpha=0.6)
            ax.plot(where[joined], cells.loc[joined, "mean"], color=colour, lw=1)
            _mark(ax, where, cells["mean"], Look(colour, marker), 4)
            for last in cells["mean"].dropna().index[-1:]:
                ends[each] = (where[last], cells.loc[last, "mean"], colour)
        ax.set_title(f"{label(name)}: {label(title)}" if row else label(title), fontsize=7)
        ax.set_xticks(places, [*map(label, levels)], rotation=90 if len(levels) > 3 else 0)
        ax.set_xlim(-0.5, places.max() + 0.5)
        ax.grid(axis="y")
        if ax is axes[-1, -1]:  # when all limits are set
            label_ends(ax, ends)
    _titles(fig, y="score, mean and 95 % interval")
    return fig


def _forest(summary: pd.DataFrame, shown: pd.DataFrame, by: str, within: str, panel: str) -> Figure:
    """Draw a point with its interval on a line of its own for each `by` and `within`."""
    look, names = looks(shown[within]), ordered(shown[by])
    pairs = set(zip(shown[by], shown[within], strict=True))
    lines = [(name, each) for name in names for each in look if (name, each) in pairs]
    gap = 0.6 if len(lines) > len(names) else 0.0  # between groups of several lines
    heights = pd.Series({line: at + gap * names.index(line[0]) for at, line in enumerate(lines)})
    height = 0.55 + 0.19 * max(1 + heights.max(), 2)
    columns = 3 if summary[panel].nunique() < 8 else 4
    fig, parts = _panels(summary, panel, columns, height, sharex=True, sharey=True)
    for ax, own in parts:
        for mean in own.loc[own[by] == NO_EDIT, "mean"]:
            ax.axvline(mean, **style.REFERENCE)
        cells = own.set_index([by, within])[["mean", "low", "high"]].astype(float).reindex(lines)
        for (line, at), (mean, low, high) in zip(heights.items(), cells.to_numpy(), strict=True):
            ax.hlines(at, low, high, color=look[line[1]].colour, lw=1.5, zorder=3)
            _mark(ax, mean, at, look[line[1]])
            _say(ax, at, mean)
        ax.set_yticks([heights[name].mean() for name in names], map(label, names))
        ax.set_ylim(heights.max() + 0.6, -0.6)
        ax.tick_params(left=False)
        ax.grid(axis="x")
    ax.set_xlim(-0.03, 1.03)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    reference = (
        {NO_EDIT: style.LOOKS[NO_EDIT]._replace(marker="")} if NO_EDIT in {*summary[by]} else {}
    )
    _explain(fig, (look if within != by else {}) | reference)
    _titles(fig, x="score, mean and 95 % interval")
    return fig


@styled
def curves(frame: pd.DataFrame, by: str = "method") -> Figure:
    """Draw the loss (nats per token) over steps: the median of edits and the range of 80 % of them.

    An edit whose training ended keeps its last value.
    """
    edits = frame.assign(edit=frame.get("edit", 0), loss=frame["loss"].clip(lower=LEAST_LOSS))
    steps = edits.pivot_table(index=[by, "step"], columns="edit", values="loss")
    going = steps.groupby(by).ffill().stack().rename("loss").reset_index()
    look = looks(ordered(frame[by], KINDS))
    fig = Figure(figsize=(FULL, 2.65))
    ax = fig.subplots()
    colours = {name: each.colour for name, each in look.items()}
    options = {"hue": by, "hue_order": list(look), "palette": colours, "legend": False, "ax": ax}
    summary = {"estimator": "median", "errorbar": ("pi", 80), "err_kws": {"alpha": 0.15, "lw": 0}}
    sns.lineplot(going, x="step", y="loss", **options, **summary)
    ax.set(xlabel="", ylabel="")
    lines = zip(look, ax.lines, strict=True)
    ends = {name: (*line.get_xydata()[-1], colours[name]) for name, line in lines}
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=9)
    ax.grid(axis="y")
    _log_if_wide(ax.yaxis, edits["loss"])
    ax.margins(x=0)
    label_ends(ax, ends)
    _titles(fig, "training step", "loss (nats per token)")
    return fig


@styled
def trend(
    frame: pd.DataFrame,
    x: str = "batch_size",
    y: str = "score",
    by: str = "method",
    panel: str | None = None,
    baseline: float | None = None,
    label_y: str = "",
    names: Mapping[float, str] | None = None,
    columns: int = 4,
    faint: Collection[str] = (),
) -> Figure:
    """Draw the mean of `y` over the rows at each number `x`.

        trend(averages)                            lines named at their ends
        trend(costs, x="tokens", panel="panel")    a panel for each quantity
        trend(leads, y="mean", baseline=0, label_y="lead (points)")   with intervals

    `baseline` is dashed; `names` stand below `x`; `faint` lines are grey; a lone one has numbers.
    """
    look = looks(ordered(frame[by]))
    look |= {name: look[name]._replace(colour=style.FAINT) for name in faint if name in look}
    alone = len(look) == 1 and not panel
    height = max(2.0, 0.1 + 0.16 * len(look)) if panel else 2.2 if alone else 3.4
    fig, parts = _panels(frame, panel, columns, height)
    fig.set_figwidth(style.COLUMN if alone else FULL)
    for ax, own in parts:
        means = own.groupby([by, x], sort=False)[y].mean()
        if baseline is not None:
            ax.axhline(baseline, **style.REFERENCE)
        if {"low", "high"} <= set(own.columns):
            colours = [look[name].colour for name in own[by]]
            ax.vlines(own[x], own["low"], own["high"], colours, lw=1.4)
        ends = {}
        for name in means.index.unique(by):
            line, each = means[name].sort_index(), look[name]
            ax.plot(line.index, line, color=each.colour, ls=each.dashes, zorder=3)
            _mark(ax, line.index, line, each)
            ends[name] = (line.index[-1], line.iloc[-1], each.colour)
        if means.between(0, 1).all():
            ax.set(**{"ylim": (0, 1.03), "yticks": [0, 0.5, 1]} if panel else {})
        elif not _log_if_wide(ax.yaxis, means) and baseline is None:
            ax.set_ylim(0, means.max() * 1.1)
        _sizes(ax, sorted(frame[x].unique()), names or {})
        ax.grid(axis="y")
    if alone:
        ax.margins(x=0.13, y=0.15)  # space for the number beside the first mark
        for point in line.items():
            _beside(ax, number(float(point[1]), 1), point, (-5, 5))
    if set(ends) == set(look):  # the last panel has every line
        label_ends(ax, ends)
    else:
        _explain(fig, look)
    _titles(fig, x.replace("_", " "), label_y or ("" if panel else f"mean {y.replace('_', ' ')}"))
    return fig


@styled
def tuning(
    frame: pd.DataFrame, by: str = "method", panel: str = "batch_size", colour: str = ""
) -> Figure:
    """Draw a point for the mean score of every trial; the chosen one is ringed and its score said.

    `frame` has one row per trial: `by`, `panel`, score, chosen and `before`, a dashed line.
    """
    look = looks(ordered(frame[by]))
    fig, parts = _panels(frame, panel, 9, 0.3 + 0.19 * len(look), sharey=True, sharex=True)
    for ax, own in parts:
        ax.axvline(own["before"].iloc[0], **style.REFERENCE)
        for at, (name, each) in enumerate(look.items()):
            trials, shade = own[own[by] == name], colour or each.colour
            ax.scatter(trials["score"], [at] * len(trials), s=10, color=shade, alpha=0.6)
            for value in trials.loc[trials["chosen"].astype(bool), "score"]:
                ax.plot(value, at, "o", mfc="none", mec=shade, mew=1.2, ms=7, zorder=4)
                _say(ax, at, value)
        ax.set_yticks(range(len(look)), map(label, look))
        ax.set_ylim(len(look) - 0.5, -0.5)
        ax.tick_params(left=False)
        ax.grid(axis="x")
    _titles(fig, "mean score on development edits")
    return fig


@styled
def distribution(
    frame: pd.DataFrame,
    value: str = "score",
    by: str = "kind",
    panel: str | None = None,
    floor: float | None = None,
    label_x: str = "",
) -> Figure:
    """Draw the share of items up to each value, a line for each `by`; the medians are said.

    `floor` is a vertical line; `label_x` names the values.
    """
    look = looks(ordered(frame[by], KINDS))
    colours = {name: each.colour for name, each in look.items()}
    fig, parts = _panels(frame, panel, 2, 2.0, sharey=True)
    fig.set_figwidth(FULL if len(parts) > 1 else style.COLUMN)
    for ax, own in parts:
        sns.ecdfplot(own, x=value, hue=by, palette=colours, legend=False, ax=ax)
        ax.set(xlabel="", ylabel="")
        for turn, (name, median) in enumerate(
            own.groupby(by)[value].median().sort_values().items()
        ):
            _mark(ax, median, 0.5, look[name])
            _beside(ax, number(float(median)), (median, 0.5), (4, -6) if turn else (-4, 3))
        if floor is not None:
            ax.axvline(floor, **style.REFERENCE)
            _beside(ax, f"floor {floor:g}", (floor, 0.03), (-3, 0))
        _log_if_wide(ax.xaxis, own[value])
        ax.grid(axis="y")
    _explain(fig, look if len(look) > 1 else {}, parts[0][0])
    _titles(fig, label_x or value.replace("_", " "), "share of items")
    return fig


@styled
def plane(frame: pd.DataFrame) -> Figure:
    """Draw efficacy against locality, a point for each method; dashed lines are of equal balance.

    `frame` has method, efficacy and locality; the row called `no edit` is a cross. The points of a
    method that has several, one for each `level`, are joined in that order.
    """
    fig = Figure(figsize=(FULL, 3.2))
    ax = fig.subplots()
    for equal in np.arange(0.1, 1, 0.1):
        kept = np.linspace(equal / 2 + 1e-3, 1, 99)
        wanted = equal * kept / (2 * kept - equal)
        ax.plot(kept, wanted, color=style.GREY, lw=0.4, ls=(0, (1, 6)), zorder=0)
    look, ends, marks = looks(frame["method"]), {}, []
    for name, own in frame.groupby("method"):
        if len(own) > 1:
            own = own.sort_values("level", key=lambda level: level.astype(float))
            ax.plot(own["locality"], own["efficacy"], color=look[name].colour, lw=0.8)
        ends[name] = (*own[["locality", "efficacy"]].to_numpy()[-1], look[name].colour)
        at, places = np.linspace(0, 1, 40), np.linspace(0, 1, len(own))
        along = (np.interp(at, places, own[side]) for side in ("locality", "efficacy"))
        marks += zip(*along, strict=True)  # no name lies on a line
        for method in own.itertuples():
            _mark(ax, method.locality, method.efficacy, look[name], 6 if len(own) == 1 else 4)
    ax.set(xlabel="Locality (mean score)", ylabel="Efficacy (mean share)")
    ax.set_xlim(max(0, frame["locality"].min() - 0.05), 1.01)
    ax.set_ylim(min(0, frame["efficacy"].min() - 0.02), max(0.5, frame["efficacy"].max() + 0.05))
    label_points(ax, ends, marks)
    return fig


def _panels(
    frame: pd.DataFrame, panel: str | None, columns: int, height: float, **shared: Any
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Make a figure with a panel for each value of a column, or one; return panels and rows."""
    titles = ordered(frame[panel], KINDS) if panel else [""]
    columns, count = min(columns, len(titles)), len(titles)
    rows = ceil(count / columns)
    fig = Figure(figsize=(FULL, 0.3 + rows * height))
    axes = list(fig.subplots(rows, columns, squeeze=False, **shared).flat)
    for title, ax in zip(titles, axes, strict=False):
        text = label(title) if isinstance(title, str) else f"{label(panel)} {title}"
        ax.set_title(text, fontsize=7 if columns > 2 else 8)
    for spare in axes[count:]:
        spare.set_axis_off()
    for ax in axes[max(0, count - columns) : count]:
        ax.tick_params(labelbottom=True)  # the panel below, which would have them, may be off
    parts = [frame[frame[panel] == title] for title in titles] if panel else [frame]
    return fig, list(zip(axes, parts, strict=False))


def _mark(ax: Axes, x: Any, y: Any, look: Look, size: float = 4.4) -> None:
    """Set the marks of one look; they have a white edge, a star is larger, a cross is thicker."""
    edge = {"mew": 1.4} if look.marker == "x" else {"mec": "white", "mew": 0.45}
    star = look.marker == "*"
    edge |= {"ms": size + 3 * star, "zorder": 4 + star, "clip_on": False}
    ax.plot(x, y, look.marker, ls="", color=look.colour, **edge)


def _say(ax: Axes, at: float, value: float) -> None:
    """Write a value right of its line, as a table says it."""
    where = {"transform": ax.get_yaxis_transform(), "va": "center"}
    text = printed_score(Score(value)).text
    ax.text(1.02, at, text, fontsize=6.5, color=style.GREY, **where)


def _beside(ax: Axes, text: str, point: tuple, offset: tuple) -> None:
    """Write a text left of a point, or right of it where the offset is."""
    where = {"textcoords": "offset points", "ha": "right" if offset[0] < 0 else "left"}
    ax.annotate(text, point, xytext=offset, **where, fontsize=6.5, color=style.GREY)


def _titles(fig: Figure, x: str = "", y: str = "") -> None:
    """Say below and left of all panels what their axes show."""
    fig.supxlabel(x, fontsize=7.5, color=style.GREY)
    fig.supylabel(y, fontsize=7.5, color=style.GREY)


def _explain(fig: Figure, look: dict[str, Look], ax: Axes | None = None) -> None:
    """Explain colours and marks in a panel, or where it has one, in an empty place of the grid."""
    handles = [
        Line2D([], [], color=each.colour, marker=each.marker, ls=each.dashes, label=label(name))
        for name, each in look.items()
    ]
    spare = next((each for each in fig.axes if not each.axison), ax)
    if handles and spare:
        spare.legend(handles=handles, loc="best" if spare is ax else "center left")
    elif handles:
        fig.legend(handles=handles, loc="outside right center")


def _sizes(ax: Axes, values: list[float], names: Mapping[float, str]) -> None:
    """Set ticks at these values, with names, on a log axis where each is a like multiple."""
    ratios = np.divide(values[1:], values[:-1]) if values[0] > 0 else np.array([])
    if len(ratios) > 1 and ratios.min() >= 1.5 and ratios.max() <= 1.75 * ratios.min():
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(values, [f"{value:,.0f}\n{names.get(value, '')}".strip() for value in values])


def _log_if_wide(axis: Axis, values: pd.Series) -> bool:
    """Set a log axis with plain numbers if values span a factor over 20; return whether they do."""
    if not 0 < 20 * values.min() < values.max():
        return False
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if values.max() < 300 * values.min():  # few decades: ticks at 3, 30 ... too
        axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:,g}")
    axis.axes.minorticks_off()
    return True
