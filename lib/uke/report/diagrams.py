"""Figures of data, of cost, of tuning and of mechanisms. Style and saving are those of `drawing`."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import comb

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from uke.report import panels, tables
from uke.report.style import COLUMN, FULL, GREY, INK, RC, label_ends, looks
from uke.report.tables import KIND_ORDER, LABELS, number, ordered, require, summarise


def spread(
    frame: pd.DataFrame, by: str = "kind", panel: str = "measure", width: float = COLUMN
) -> Figure:
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
        ax.text(
            1.02,
            place,
            number(middle, 2),
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=6.5,
            color=GREY,
        )


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


def ranks(
    frame: pd.DataFrame, by: str = "kind", floor: int | None = None, width: float = COLUMN
) -> Figure:
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
            ax.step(
                [1, *found, frame["rank"].max()],
                [0, *np.arange(1, len(found) + 1) / len(found), 1],
                where="post",
                color=colour,
                label=LABELS.get(name, name),
            )
        if floor is not None:
            ax.axvline(floor, color=GREY, lw=1, ls=(0, (3, 2)))
            ax.annotate(
                f"floor {floor}",
                (floor, 0.5),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                fontsize=6.5,
                color=GREY,
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(
            xlabel="rank by relevance to the edit",
            ylabel="share of items",
            xlim=(1, frame["rank"].max()),
            ylim=(0, 1.02),
        )
        ax.grid(axis="y")
        fig.legend(loc="outside upper right", ncols=len(names))
    return fig


def trials(
    frame: pd.DataFrame,
    by: str = "method",
    panel: str = "batch_size",
    width: float = FULL,
    colour: str = "",
) -> Figure:
    """The mean score of every trial as a point, one line for each `by`, one panel for each `panel`; the chosen one is ringed.

    `frame` has one row per trial: by, panel, score and chosen; with `before`, the score without any edit is a dashed line.
    All lines have one `colour` where one is given.
    """
    require(frame, [by, panel, "score", "chosen"], "trials")
    names, panels = ordered(frame[by]), ordered(frame[panel])
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 0.6 + 0.19 * len(names)), layout="constrained")
        axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for ax, title in zip(axes, panels):
            own = frame[frame[panel] == title]
            ax.set_title(f"{LABELS.get(panel, panel).replace('_', ' ')} {title}")
            if "before" in frame:
                ax.axvline(own["before"].iloc[0], color=GREY, lw=1, ls=(0, (3, 2)), zorder=1)
            for place, (name, (own_colour, _)) in enumerate(looks(names).items()):
                _tried(ax, place, own[own[by] == name], colour or own_colour)
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.tick_params(left=False)
            ax.grid(axis="x")
        fig.supxlabel("mean score on development edits", fontsize=7.5, color=GREY)
    return fig


def _tried(ax: Axes, place: int, own: pd.DataFrame, colour: str) -> None:
    ax.scatter(own["score"], [place] * len(own), s=10, color=colour, alpha=0.6, lw=0, zorder=3)
    best = own[own["chosen"].astype(bool)]["score"]
    ax.plot(best, [place] * len(best), "o", mfc="none", mec=colour, mew=1.2, ms=7, zorder=4)
    for value in best:
        ax.text(
            1.02,
            place,
            number(value, 2),
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=6.5,
            color=GREY,
        )


def budget(
    frame: pd.DataFrame, by: str = "method", panel: str = "batch_size", width: float = FULL
) -> Figure:
    """The best score to be expected of k trials, one line for each `by`, one panel for each `panel`.

    `frame` has one row per trial: by, panel and score. The trials are drawn from those made, without replacement.
    """
    require(frame, [by, panel, "score"], "budget")
    panels, ends = ordered(frame[panel]), {}
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 2.9), layout="constrained")
        axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, title in zip(axes, panels):
            for name, (colour, mark) in looks(frame[by]).items():
                curve = best_of(frame.loc[(frame[panel] == title) & (frame[by] == name), "score"])
                ax.plot(
                    range(1, len(curve) + 1),
                    curve,
                    color=colour,
                    marker=mark,
                    mec="white",
                    mew=0.5,
                    ms=3.6,
                    label=name,
                )
                if ax is axes[-1] and curve:
                    ends[name] = (len(curve), curve[-1], colour)
            ax.set(
                title=f"{LABELS.get(panel, panel).replace('_', ' ')} {title}",
                xlabel="trials made (k)",
            )
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y")
        axes[0].set_ylabel("expected best mean score")
        shown = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels())}
        if set(ends) == set(shown):
            label_ends(axes[-1], ends)
        else:  # a line that the last panel lacks has no end there
            fig.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=5)
    return fig


def best_of(scores: Sequence[float]) -> list[float]:
    """Expected best score of k trials drawn without replacement, for k = 1 .. N (N,)."""
    ranked = sorted(scores)
    count = len(ranked)
    return [
        sum(score * comb(place, k - 1) for place, score in enumerate(ranked)) / comb(count, k)
        for k in range(1, count + 1)
    ]


def windows(frame: pd.DataFrame, by: str = "method", width: float = FULL) -> Figure:
    """Where in the answer an edit took: log-probability of its tokens by window, before and after, a panel for each `by`.

    `frame` has the columns by, edit, window (from 1), before and after (nats per token): median and middle half over edits.
    """
    require(frame, [by, "edit", "window", "before", "after"], "windows")
    names = ordered(frame[by])
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, max(1.9, 0.4 + 1.05 * lines)), layout="constrained")
        axes = list(fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
        for ax, (name, (colour, _)) in zip(axes, looks(names).items()):
            own = frame[frame[by] == name].groupby("window")
            for phase, shade, dashes in (("before", GREY, (0, (3, 2))), ("after", colour, "-")):
                low, middle, high = (own[phase].quantile(share) for share in (0.25, 0.5, 0.75))
                ax.plot(middle.index, middle, color=shade, ls=dashes)
                ax.fill_between(middle.index, low, high, color=shade, alpha=0.15, lw=0)
            ax.set_title(name, fontsize=7)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y")
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        (
            fig.supxlabel("window of the answer", fontsize=7.5, color=GREY),
            fig.supylabel("log-probability (nats per token)", fontsize=7.5, color=GREY),
        )
    return fig


def plane(
    frame: pd.DataFrame,
    by: str = "method",
    x: str = "kept",
    y: str = "written",
    width: float = FULL,
) -> Figure:
    """One score against another, a point for each `by`; on a dashed line the mean of both is the same.

    `frame` has one row for each `by`; the row called `no edit` is drawn as a cross.
    """
    require(frame, [by, x, y], "plane")
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 3.2), layout="constrained")
        ax = fig.subplots()
        for total in np.arange(0.1, 2, 0.1):
            ax.axline((0, total), slope=-1, color=GREY, lw=0.5, ls=(0, (2, 4)), zorder=0)
        for name, (colour, mark) in looks(frame[by]).items():
            colour, mark = (INK, "x") if name in tables.REFERENCES else (colour, mark)
            row = frame[frame[by] == name]
            ax.plot(
                row[x],
                row[y],
                mark,
                color=colour,
                ms=9 if mark == "*" else 6,
                mec=colour if mark == "x" else "white",
                mew=1.4 if mark == "x" else 0.5,
                label=LABELS.get(name, name),
                clip_on=False,
                zorder=3,
            )
        ax.set(
            xlabel=f"{x} (mean score)",
            ylabel=f"{y} (mean score)",
            xlim=(max(0, frame[x].min() - 0.05), 1.01),
            ylim=(0, max(0.5, frame[y].max() + 0.05)),
        )
        fig.legend(loc="outside right center", ncols=1)
    return fig


def across(
    frame: pd.DataFrame,
    x: str = "level",
    by: str = "method",
    panel: str = "kind",
    *,
    alone: Sequence[str] = (),
    row: str = "",
) -> Figure:
    """Mean score with its 95% interval at each level of `x`, a line for each `by`, a column of panels for each `panel`, a row for each `row`.

    `frame` has the columns x, by, panel, (row,) edit and score, in the order of the levels. Levels that are `alone` stand beside
    the line and not on it. Rows whose `by` is `no edit` become a dashed line, their level does not count.
    """
    row = row or panel
    summary = summarise(frame, dict.fromkeys((x, by, panel, row)), "across")
    shown = summary[~summary[by].isin(tables.REFERENCES)]
    levels = sorted(ordered(shown[x]), key=lambda level: level in alone)
    places = {level: place + 0.6 * (level in alone) for place, level in enumerate(levels)}
    rows, columns = (
        ordered(shown[row]) if row != panel else [None],
        ordered(shown[panel], KIND_ORDER),
    )
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(FULL, 0.75 + 1.6 * len(rows)), layout="constrained")
        axes = fig.subplots(len(rows), len(columns), sharex=True, sharey="col", squeeze=False)
        for (line, name), ax in zip(product(rows, columns), axes.flat, strict=True):
            own = summary[(summary[panel] == name) & ((summary[row] == line) | (line is None))]
            _across(
                ax, own.rename(columns={x: "place", by: "name"}), places, looks(shown[by]), alone
            )
            ax.set_title(
                LABELS.get(name, name) if line is None else f"{line}: {LABELS.get(name, name)}",
                fontsize=7,
            )
            ax.set_xticks(
                list(places.values()),
                [LABELS.get(level, level) for level in places],
                rotation=45 if len(places) > 3 else 0,
                ha="right" if len(places) > 3 else "center",
            )
            ax.set_xlim(-0.5, max(places.values()) + 0.5)
            ax.grid(axis="y")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=5)
        fig.supylabel("score, mean and 95% interval", fontsize=7.5, color=GREY)
    return fig


def _across(
    ax: Axes, own: pd.DataFrame, places: Mapping[str, float], look: Mapping, alone: Sequence[str]
) -> None:
    """One panel: a line for each name over the levels in their places, names side by side."""
    for mean in own.loc[own["name"] == "no edit", "mean"]:
        ax.axhline(mean, color=GREY, lw=1, ls=(0, (3, 2)), zorder=1, label="no edit")
    for turn, (name, (colour, mark)) in enumerate(look.items()):
        found = own[own["name"] == name].set_index("place").reindex(list(places))
        where = pd.Series(places) + 0.14 * (turn - (len(look) - 1) / 2)
        ax.vlines(where, found["low"], found["high"], color=colour, lw=1.2, alpha=0.6)
        ax.plot(
            where,
            found["mean"],
            mark,
            color=colour,
            ms=4,
            mec="white",
            mew=0.4,
            label=LABELS.get(name, name),
            zorder=3,
        )
        joined = [level for level in places if level not in alone]
        ax.plot(where[joined], found.loc[joined, "mean"], color=colour, lw=1)


def specification(frame: pd.DataFrame, factors: Sequence[str]) -> Figure:
    """Every combination of levels by its score, the best first, with its 95% interval; below, which level of each factor it has.

    `frame` has one row for each combination: the factors, mean, low, high, and chosen, which is ringed.
    """
    require(frame, [*factors, "mean", "low", "high", "chosen"], "specification")
    frame = frame.sort_values("mean", ascending=False, kind="stable", ignore_index=True)
    lines = [(factor, level) for factor in factors for level in ordered(frame[factor])]
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(FULL, 1.8 + 0.17 * len(lines)), layout="constrained")
        top, below = fig.subplots(2, 1, sharex=True, height_ratios=[1.5, 0.17 * len(lines)])
        colours = ["#d55e00" if chosen else "#0072b2" for chosen in frame["chosen"]]
        top.vlines(frame.index, frame["low"], frame["high"], color=colours, lw=1.4)
        top.scatter(frame.index, frame["mean"], color=colours, s=20, zorder=3)
        top.plot(
            frame.index[frame["chosen"]],
            frame.loc[frame["chosen"], "mean"],
            "o",
            mfc="none",
            mec="#d55e00",
            ms=9,
            label="what choosing one factor at a time gives",
        )
        top.set_ylabel("average metric")
        top.grid(axis="y")
        for place, (factor, level) in enumerate(lines):
            has = frame[factor] == level
            below.scatter(
                frame.index,
                [place] * len(frame),
                s=14,
                color=[INK if one else "#e4e4e4" for one in has],
                lw=0,
            )
        below.set_yticks(
            range(len(lines)),
            [f"{factor.replace('_', ' ')}: {LABELS.get(level, level)}" for factor, level in lines],
            fontsize=6.5,
        )
        below.set(ylim=(len(lines) - 0.5, -0.5), xticks=[])
        below.tick_params(left=False)
        fig.legend(loc="outside upper right")
    return fig


def trends(
    frame: pd.DataFrame, x: str, by: str = "method", panel: str = "panel", width: float = FULL
) -> Figure:
    """How something moves with `x`: mean of `score` over the rows at each x, a line for each `by`, a panel for each `panel`.

    `frame` has the columns by, panel, x and score. Panels whose values all lie from 0 to 1 show that range; values that differ
    more than twentyfold get a log axis, all others one from zero.
    """
    require(frame, [by, panel, x, "score"], "trends")
    return panels.lines(frame, x, (by, panel), width)


def heat(
    frame: pd.DataFrame,
    x: str = "layer",
    by: str = "method",
    value: str = "norm",
    label: str = "relative norm of the change",
) -> Figure:
    """Mean of `value` for each `by` (a line) and `x` (a column) as a shade and in digits; where there is none, nothing."""
    require(frame, [by, x, value], "heat")
    means = frame.groupby([by, x])[value].mean().unstack(x)
    return panels.shades(
        means.reindex(index=ordered(frame[by]), columns=sorted(means.columns)), label
    )


def claims(frame: pd.DataFrame, width: float = FULL) -> Figure:
    """The numbers that decide claims, a row each: claim, verdict, value, low and high (distances in the claim's direction), and said."""
    require(frame, ["claim", "verdict", "value", "low", "high", "said"], "claims")
    return panels.distances(frame, width)


def descents(
    frame: pd.DataFrame, by: str = "method", y: str = "loss", width: float = FULL
) -> Figure:
    """`y` (nats per token) over the steps of its training in a panel for each `by`; `frame` has the columns by, edit, step and y."""
    require(frame, [by, "edit", "step", y], "descents")
    return panels.descents(frame, (by, y), width)
