"""Draw one kind of figure per function: a tidy table in, a matplotlib figure out.

    section.figure(figures.scores, scores, "layers", caption, alt, x="level", by="method")

Frames have a row per observation (or `mean`, `low`, `high`). `by` names what has a colour: a method
has the same one in every figure. Rows called `no edit` and `floor` are references: a dashed line
and a shaded range. Every function raises InputError for a missing column or a frame without rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, comb
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from uke.data.edits import KINDS
from uke.errors import InputError
from uke.report.style import (
    BLUE,
    COLUMN,
    DASHES,
    FULL,
    GREY,
    INK,
    LOOKS,
    PALE,
    RED,
    Look,
    label_ends,
    looks,
    styled,
)
from uke.report.tables import REFERENCES, absent, number, printed_score
from uke.results.compare import label
from uke.results.stats import Score, ordered, require, summarise

NO_EDIT = REFERENCES[0]
LEAST_LOSS = 1e-3  # nats per token; smaller losses are drawn as this, so that a log axis ends
VERDICTS = {
    "holds": Look("#009e73", "o", ""),
    "in part": Look("#e69f00", "D", ""),
    "does not hold": Look(RED, "X", ""),
}


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
        scores(frame, x="level", separate=["all"])   levels along an axis, joined by lines

    `frame` has `by`, `panel`, edit, score (also `within`, `x`, `row` and batch where used), or
    mean, low, high. With `x`, levels in `separate` stand beside the line; `row` has rows of panels.
    """
    if x is None:
        return _forest(frame, by, within or by, panel)
    columns = list(dict.fromkeys([x, by, panel, *([row] if row else [])]))
    summary = summarise(frame, columns, "scores")
    shown = summary[~summary[by].isin(REFERENCES)]
    levels = sorted(ordered(shown[x]), key=lambda level: level in separate)
    places = pd.Series({level: at + 0.6 * (level in separate) for at, level in enumerate(levels)})
    joined = [level for level in levels if level not in separate]
    titles, look = ordered(shown[panel], KINDS), looks(shown[by])
    rows = ordered(shown[row]) if row else [None]
    fig = Figure(figsize=(FULL, 0.75 + 1.6 * len(rows)))
    axes = fig.subplots(len(rows), len(titles), sharex=True, sharey="col", squeeze=False)
    for (line, column), ax in np.ndenumerate(axes):
        name, title = rows[line], titles[column]
        own = summary[(summary[panel] == title) & ((summary[row] == name) if row else True)]
        for mean in own.loc[own[by] == NO_EDIT, "mean"]:
            ax.axhline(mean, color=GREY, lw=1, ls=DASHES, zorder=1)
        for turn, (each, (colour, marker, _)) in enumerate(look.items()):
            cells = own[own[by] == each].set_index(x).reindex(levels)
            where = places + 0.14 * (turn - (len(look) - 1) / 2)  # names side by side
            ax.vlines(where, cells["low"], cells["high"], color=colour, lw=1.2, alpha=0.6)
            ax.plot(where[joined], cells.loc[joined, "mean"], color=colour, lw=1)
            _mark(ax, where, cells["mean"], Look(colour, marker), 4)
        ax.set_title(f"{label(name)}: {label(title)}" if row else label(title), fontsize=7)
        turned = {"rotation": 45, "ha": "right"} if len(levels) > 3 else {}
        ax.set_xticks(places, [label(level) for level in levels], **turned)
        ax.set_xlim(-0.5, places.max() + 0.5)
        ax.grid(axis="y")
    _explain(fig, look, summary[by])
    _titles(fig, y="score, mean and 95 % interval")
    return fig


def _forest(frame: pd.DataFrame, by: str, within: str, panel: str) -> Figure:
    """Draw a point with its interval on a line of its own for each `by` and `within`."""
    summary = summarise(frame, list(dict.fromkeys([by, within, panel])), "scores")
    shown = summary[~summary[by].isin(REFERENCES)]
    if shown.empty:
        raise InputError("scores: no rows to show besides the references")
    titles, look, names = ordered(summary[panel], KINDS), looks(shown[within]), ordered(shown[by])
    pairs = set(zip(shown[by], shown[within], strict=True))
    lines = [(name, each) for name in names for each in look if (name, each) in pairs]
    gap = 0.6 if len(lines) > len(names) else 0.0  # between groups of several lines
    heights = {line: at + gap * names.index(line[0]) for at, line in enumerate(lines)}
    columns = 3 if len(titles) < 8 else 4
    height = 0.55 + 0.19 * max(1 + max(heights.values()), 2)
    fig, axes = _panels(titles, columns, (FULL, height), sharex=True, sharey=True)
    for title, ax in axes.items():
        own = summary[summary[panel] == title]
        references = own.drop_duplicates(by).set_index(by)["mean"]
        if "floor" in references:
            ax.axvspan(-9, references["floor"], color=PALE, alpha=0.75, lw=0, zorder=0)
        if NO_EDIT in references:
            ax.axvline(references[NO_EDIT], color=GREY, lw=1, ls=DASHES, zorder=1)
        own = own.set_index([by, within])
        for line, at in heights.items():
            if line not in own.index:
                _say(ax, at, None)
                continue
            mean, low, high = own.loc[line, ["mean", "low", "high"]].astype(float)
            ax.hlines(at, low, high, color=look[line[1]].colour, lw=1.5, zorder=3)
            _mark(ax, mean, at, look[line[1]])
            _say(ax, at, mean)
        middles = [
            np.mean([at for line, at in heights.items() if line[0] == each]) for each in names
        ]
        ax.set_yticks(middles, [label(name) for name in names])
        ax.set_ylim(max(heights.values()) + 0.6, -0.6)
        ax.tick_params(left=False)
        ax.grid(axis="x")
    _limit(next(iter(axes.values())), summary)
    _explain(fig, look if within != by else {}, summary[by])
    _titles(fig, x="score, mean and 95 % interval")
    return fig


@styled
def curves(
    frame: pd.DataFrame,
    x: str = "step",
    y: str = "loss",
    by: str = "method",
    panel: str | None = None,
) -> Figure:
    """Draw `y` (nats per token) over `x`: the median over edits, and the range of 80 % of them.

        curves(losses)                    one panel, names at the lines' ends
        curves(losses, panel="method")    a panel for each method
        curves(windows, x="window", y="log_probability", by="phase", panel="method")

    `frame` has x, y, `by` (and `panel`), and edit where there are several. An edit whose training
    ended keeps its last value. A loss that falls twentyfold has a log axis.
    """
    columns = list(dict.fromkeys([panel or by, by]))
    require(frame, [*columns, x, y], "curves")
    edits = frame.assign(edit=frame["edit"] if "edit" in frame else 0)
    if y == "loss":
        edits[y] = edits[y].clip(lower=LEAST_LOSS)
    log = edits[y].min() > 0 and edits[y].max() > 20 * edits[y].min()
    wide = edits.pivot_table(index=x, columns=[*columns, "edit"], values=y)
    present = set(wide.columns.droplevel("edit"))
    titles, look = ordered(frame[panel]) if panel else [""], looks(ordered(frame[by], KINDS))
    fig, axes = _panels(titles, 5, (FULL, 1.15 if panel else 2.35), least=1.9, sharey=True)
    for title, ax in axes.items():
        ends = {}
        for name, each in look.items():
            key = name if len(columns) == 1 else (title, name)
            if key not in present or (panel == by and name != title):
                continue
            own = wide[key].dropna(how="all").ffill()  # (steps, edits)
            low, middle, high = (own.quantile(share, axis=1) for share in (0.1, 0.5, 0.9))
            ax.fill_between(own.index, low, high, color=each.colour, alpha=0.15, lw=0)
            ax.plot(own.index, middle, color=each.colour, ls=each.dashes)
            ends[name] = (own.index[-1], middle.iloc[-1], each.colour)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=4 if panel else 9)
        ax.grid(axis="y")
        if log:
            _log(ax, "y", edits[y])
    if not panel:
        ax.margins(x=0)
        label_ends(ax, ends)
    elif panel != by:
        _explain(fig, look)
    _titles(fig, f"training {x}" if x == "step" else x, f"{y.replace('_', ' ')} (nats per token)")
    return fig


@styled
def trend(
    frame: pd.DataFrame,
    x: str = "batch_size",
    y: str = "score",
    by: str | None = "method",
    panel: str | None = None,
    baseline: float | None = None,
    label_y: str = "",
) -> Figure:
    """Draw how something moves with a number `x`: the mean of `y` over the rows at each x.

        trend(averages)                            lines named at their ends; no edit is dashed
        trend(costs, x="tokens", panel="panel")    a panel for each quantity
        trend(leads, y="mean", by=None, baseline=0, label_y="lead (points)")   with intervals

    Where `frame` has low and high they are drawn as intervals. `baseline` is a dashed line. Sizes
    that grow by about the same factor have a log axis. `by=None` draws a single line.
    """
    alone = by is None
    frame, by = (frame.assign(line="FT-UKE"), "line") if alone else (frame, by)
    require(frame, [x, y, by, *([panel] if panel else [])], "trend")
    titles, look = ordered(frame[panel]) if panel else [""], looks(ordered(frame[by]))
    size, least = (
        (COLUMN if alone else FULL, 2.0 if panel else 2.2 if alone else 3.4),
        0.4 + 0.16 * len(look),
    )
    fig, axes = _panels(titles, 4, size, least=least if panel else 0)
    for title, ax in axes.items():
        own = frame[frame[panel] == title] if panel else frame
        means = own.groupby([by, x], sort=False)[y].mean()
        if baseline is not None:
            ax.axhline(baseline, color=GREY, lw=1, ls=DASHES)
        if {"low", "high"} <= set(own.columns):
            ax.vlines(own[x], own["low"], own["high"], color=INK, lw=1.4)
        ends = {}
        for name, each in look.items():
            if name in means.index:
                line = means[name].sort_index()
                ax.plot(line.index, line, color=each.colour, ls=each.dashes, zorder=3)
                _mark(ax, line.index, line, each)
                ends[name] = (line.index[-1], line.iloc[-1], each.colour)
        if means.between(0, 1).all():
            ax.set(**{"ylim": (0, 1.03), "yticks": [0, 0.5, 1]} if panel else {})
        elif means.min() > 0 and means.max() > 20 * means.min():
            _log(ax, "y", means)
        elif baseline is None:
            ax.set_ylim(0, max(means.max() * 1.1, 1e-9))
        _sizes(ax, sorted(frame[x].unique()))
        ax.grid(axis="y")
    if panel:
        _explain(fig, look, loc="outside right center")
    elif alone:
        ax.margins(x=0.13, y=0.15)  # space for the number beside the first mark
        for point in line.items():
            _beside(ax, number(float(point[1]), 1), point, (-5, 5))
    else:
        label_ends(ax, ends)
    _titles(fig, x.replace("_", " "), label_y or ("" if panel else f"mean {y.replace('_', ' ')}"))
    return fig


@styled
def tuning(
    frame: pd.DataFrame,
    by: str = "method",
    panel: str = "batch_size",
    expected: bool = False,
    colour: str = "",
) -> Figure:
    """Draw the mean score of every trial, or the best one to be expected of k trials.

        tuning(trials)                   a point per trial, the chosen one ringed and its score said
        tuning(trials, expected=True)    a rising line: k of the trials, drawn without replacement

    `frame` has one row per trial: `by`, `panel`, score, chosen, and `before` for a dashed line at
    the score without any edit. With `colour` all names have that one.
    """
    require(frame, [by, panel, "score", *([] if expected else ["chosen"])], "tuning")
    look, titles = looks(ordered(frame[by])), ordered(frame[panel])
    look = dict.fromkeys(look, Look(colour)) if colour else look
    size = (FULL, 2.6 if expected else 0.3 + 0.19 * len(look))
    fig, axes = _panels(titles, len(titles), size, sharey=True, sharex=not expected)
    for title, ax in axes.items():
        own, ends = frame[frame[panel] == title], {}
        if isinstance(title, (int, np.integer)):
            ax.set_title(f"{label(panel)} {title}")
        if "before" in frame and not expected:
            ax.axvline(own["before"].iloc[0], color=GREY, lw=1, ls=DASHES, zorder=1)
        for at, (name, each) in enumerate(look.items()):
            trials = own[own[by] == name]
            if not expected:
                ax.scatter(trials["score"], [at] * len(trials), s=10, color=each.colour, alpha=0.6)
                for value in trials.loc[trials["chosen"].astype(bool), "score"]:
                    ax.plot(value, at, "o", mfc="none", mec=each.colour, mew=1.2, ms=7, zorder=4)
                    _say(ax, at, value)
            elif len(trials):
                best = best_of(trials["score"])
                ax.plot(range(1, len(best) + 1), best, color=each.colour)
                _mark(ax, range(1, len(best) + 1), best, each, 3.6)
                ends[name] = (len(best), best[-1], each.colour)
        if expected:
            ax.xaxis.get_major_locator().set_params(integer=True)
        else:
            _names(ax, look)
        ax.grid(axis="y" if expected else "x")
    if not expected:
        _titles(fig, "mean score on development edits")
        return fig
    if set(ends) == set(look):
        label_ends(ax, ends)
    else:  # a line that the last panel lacks has no end there
        _explain(fig, look)
    _titles(fig, "trials made (k)", "expected best mean score")
    return fig


def best_of(trials: Iterable[float]) -> list[float]:
    """Return the expected best of k scores drawn without replacement, for k = 1 .. N (N,)."""
    ranked = sorted(trials)
    return [
        sum(score * comb(at, k - 1) for at, score in enumerate(ranked)) / comb(len(ranked), k)
        for k in range(1, len(ranked) + 1)
    ]


@styled
def distribution(
    frame: pd.DataFrame,
    value: str = "score",
    by: str = "kind",
    panel: str | None = None,
    form: str = "points",
    floor: float | None = None,
    label_x: str = "",
) -> Figure:
    """Draw how values are distributed, for each `by`.

        distribution(alike, panel="measure")                              every value; medians said
        distribution(lengths, "length", by="dataset", form="histogram")   histograms over one axis
        distribution(ranks, "rank", form="cumulative", floor=100)         the share up to each value

    Histograms whose medians differ more than eightfold share a log axis, ranks (cumulative) always
    have one. `floor` is a vertical line.
    """
    require(frame, [value, by, *([panel] if panel else [])], "distribution")
    if form not in ("points", "histogram", "cumulative"):
        raise InputError(
            f"distribution: form: expected one of points, histogram, cumulative, found '{form}'"
        )
    frame, look = (
        frame.rename(columns={value: "value", by: "name"}),
        looks(ordered(frame[by], KINDS)),
    )
    height = {"points": 0.5 + 0.26 * len(look), "histogram": 0.5, "cumulative": 2.0}[form]
    titles = list(look) if form == "histogram" else ordered(frame[panel]) if panel else [""]
    fig, axes = _panels(titles, 1, (COLUMN, height), sharex=form != "points")
    if form == "points":
        for title, ax in axes.items():
            _points(ax, frame[frame[panel] == title] if panel else frame, look)
    elif form == "histogram":
        _histograms(axes, frame)
    else:
        ax, palette = axes[""], {name: each.colour for name, each in look.items()}
        options = {"hue_order": list(look), "palette": palette, "legend": False}
        sns.ecdfplot(frame, x="value", hue="name", **options, ax=ax)
        _log(ax, "x", frame["value"])
        ax.set(ylabel="share of items", xlim=(1, frame["value"].max()), ylim=(0, 1.02))
        _explain(fig, {name: each._replace(marker="") for name, each in look.items()})
    ax = list(axes.values())[-1]
    ax.set_xlabel(label_x or ("" if form == "points" else value))
    if floor is not None:
        ax.axvline(floor, color=GREY, lw=1, ls=DASHES)
        _beside(ax, f"floor {floor:g}", (floor, 0.5), (-3, 0))
    return fig


def _points(ax: Axes, own: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """Draw every value, shifted a little (always in the same way) so that none hides another."""
    for at, (name, each) in enumerate(look.items()):
        values = own.loc[own["name"] == name, "value"].to_numpy(float)
        shifts = np.random.default_rng(at).uniform(-0.28, 0.28, len(values))
        ax.scatter(values, at + shifts, s=5, color=each.colour, alpha=0.35, lw=0)
        if len(values):
            ax.vlines(np.median(values), at - 0.36, at + 0.36, color=INK, lw=1.4, zorder=4)
            _say(ax, at, float(np.median(values)))
    _names(ax, look)
    ax.grid(axis="x")


def _histograms(axes: Mapping[str, Axes], frame: pd.DataFrame) -> None:
    medians = frame.groupby("name", sort=False)["value"].median()
    log = medians.max() > 8 * max(medians.min(), 1)
    values = frame["value"].clip(lower=1)
    edges = np.geomspace(1, values.max() + 1, 32) if log else np.linspace(0, values.max() + 1, 42)
    for name, ax in axes.items():
        own = values[frame["name"] == name]
        sns.histplot(x=own, bins=edges, element="step", color="#9cc3dd", lw=0.8, ax=ax)
        ax.axvline(medians[name], color=INK, lw=1.1)
        count = f"median {number(float(medians[name]), 0)}, n = {len(own):,}"
        ax.set_title(count, loc="right", fontsize=6.5, fontweight="normal", color=GREY)
        ax.set(yticks=[], ylabel="")
        ax.spines["left"].set_visible(False)
    if log:
        _log(ax, "x", values)


@styled
def knowledge(frame: pd.DataFrame, by: str = "kind") -> Figure:
    """Draw bars of what a model knows with 95 % intervals, one for each `by`.

    `frame` has by, edit, score or by, mean, low, high; `target`, where used, is the least value
    that was asked for and becomes a mark.
    """
    summary = summarise(frame, [by], "knowledge").set_index(by)
    summary = summary.loc[ordered(summary.index, KINDS)]
    targets = frame.drop_duplicates(by).set_index(by)["target"] if "target" in frame else {}
    fig, ((_, ax),) = _single(COLUMN, 0.5 + 0.24 * len(summary))
    bars = {"y": list(summary.index), "orient": "h", "color": "#9cc3dd", "saturation": 1}
    sns.barplot(x=summary["mean"].to_numpy(), **bars, width=0.62, errorbar=None, ax=ax)
    for at, (name, cells) in enumerate(summary.iterrows()):
        ax.hlines(at, cells["low"], cells["high"], color="#0b3a5c", lw=1.6, zorder=4)
        _say(ax, at, Score(cells["mean"], cells["low"], cells["high"]))
        if not absent(targets.get(name)):
            ax.vlines(targets[name], at - 0.46, at + 0.46, color=RED, lw=1, zorder=3)
    _names(ax, summary.index)
    ax.set(xlabel="score, mean and 95 % interval", ylabel="")
    ax.grid(axis="x")
    _limit(ax, summary)
    if len(targets):
        _explain(fig, {"asked for": Look(RED, "")})
    return fig


@styled
def plane(
    frame: pd.DataFrame, by: str = "method", x: str = "locality", y: str = "efficacy"
) -> Figure:
    """Draw one score against another, a point for each `by`; dashed lines are of equal mean.

    `frame` has one row for each `by`; the row called `no edit` is a cross.
    """
    require(frame, [by, x, y], "plane")
    fig, ((_, ax),) = _single(FULL, 3.2)
    for total in np.arange(0.1, 2, 0.1):
        ax.axline((0, total), slope=-1, color=GREY, lw=0.5, ls=(0, (2, 4)), zorder=0)
    look = {name: each._replace(dashes="") for name, each in looks(frame[by]).items()}
    for name, each in look.items():
        own = frame[frame[by] == name]
        _mark(ax, own[x], own[y], each, 6)
    ax.set(xlabel=f"{label(x)} (mean score)", ylabel=f"{label(y)} (mean score)")
    ax.set_xlim(max(0, frame[x].min() - 0.05), 1.01)
    ax.set_ylim(0, max(0.5, frame[y].max() + 0.05))
    _explain(fig, look, loc="outside right center")
    return fig


@styled
def heat(
    frame: pd.DataFrame,
    x: str = "layer",
    by: str = "method",
    value: str = "norm",
    title: str = "relative norm of the change",
) -> Figure:
    """Draw the mean of `value` for each `by` (a line) and `x` (a column) as shade and number."""
    require(frame, [by, x, value], "heat")
    means = frame.pivot_table(index=by, columns=x, values=value).loc[ordered(frame[by])]
    fig, ((_, ax),) = _single(COLUMN, 0.7 + 0.2 * len(means))
    digits = means.map(lambda mean: "" if absent(mean) else number(float(mean), 2))
    bar = {"label": title, "pad": 0.02, "aspect": 30}
    text = {"annot": digits, "fmt": "", "annot_kws": {"fontsize": 5.5}}
    sns.heatmap(means, vmin=0, cmap="Blues", **text, cbar_kws=bar, ax=ax)
    ax.set(xlabel=x.replace("_", " "), ylabel="")
    ax.tick_params(left=False, bottom=False, rotation=0)
    return fig


@styled
def specification(frame: pd.DataFrame, factors: Sequence[str]) -> Figure:
    """Draw every combination of levels by its score, the best first, and below it its levels.

    `frame` has one row for each combination: the factors, mean, low, high, chosen (is ringed).
    """
    require(frame, [*factors, "mean", "low", "high", "chosen"], "specification")
    frame = frame.sort_values("mean", ascending=False, kind="stable", ignore_index=True)
    lines = [(factor, level) for factor in factors for level in ordered(frame[factor])]
    fig = Figure(figsize=(FULL, 1.8 + 0.17 * len(lines)))
    top, below = fig.subplots(2, 1, sharex=True, height_ratios=[1.5, 0.17 * len(lines)])
    colours = [RED if chosen else BLUE for chosen in frame["chosen"]]
    top.vlines(frame.index, frame["low"], frame["high"], color=colours, lw=1.4)
    top.scatter(frame.index, frame["mean"], color=colours, s=20, zorder=3)
    ring = {"mfc": "none", "mec": RED, "ms": 9, "label": "best levels, one factor at a time"}
    top.plot(frame.index[frame["chosen"]], frame.loc[frame["chosen"], "mean"], "o", **ring)
    top.set_ylabel("average metric")
    top.grid(axis="y")
    for at, (factor, level) in enumerate(lines):
        shades = [INK if has else PALE for has in frame[factor] == level]
        below.scatter(frame.index, [at] * len(frame), s=14, color=shades, lw=0)
    _names(below, [f"{label(factor)}: {label(level)}" for factor, level in lines])
    below.tick_params(labelsize=6.5)
    below.set_xticks([])
    fig.legend(loc="outside upper right")
    return fig


@styled
def claims(frame: pd.DataFrame) -> Figure:
    """Draw the numbers that decide claims around one zero, each claim on a scale of its own.

    `frame` has a row for each number: claim, verdict, value, low, high (distances in the direction
    of the claim) and text.
    """
    require(frame, ["claim", "verdict", "value", "low", "high", "text"], "claims")
    names = ordered(frame["claim"])
    fig, ((_, ax),) = _single(FULL, 0.7 + 0.13 * len(frame) + 0.12 * len(names))
    ax.axvline(0, color=INK, lw=0.8, zorder=1)
    top, ticks = 0.0, []
    for name in names:
        own = frame[frame["claim"] == name]
        largest = own[["value", "low", "high"]].abs().to_numpy(float).max() or 1.0
        heights = top + np.arange(len(own))
        for at, cells in zip(heights, own.itertuples(index=False), strict=True):
            look, ends = VERDICTS[cells.verdict], (cells.low / largest, cells.high / largest)
            ax.hlines(at, *ends, color=look.colour, lw=1.6, zorder=2)
            _mark(ax, cells.value / largest, at, look, 5.5)
            _say(ax, at, cells.text)
        ticks.append(heights.mean())
        top += len(own) + 0.9
    ax.set_yticks(ticks, names)
    ax.set(ylim=(top - 0.9, -1), xlim=(-1.08, 1.08))
    ax.set_xticks([-0.7, 0, 0.7], ["against the claim", "no difference", "as the claim says"])
    ax.tick_params(left=False, bottom=False)
    _explain(fig, VERDICTS)
    return fig


def _panels(
    titles: Sequence[Any],
    columns: int,
    size: tuple[float, float],
    least: float = 0.0,
    **shared: Any,
) -> tuple[Figure, dict[Any, Axes]]:
    """Make a figure with a panel for each title; `size`: its width and a panel's height."""
    columns = min(columns, len(titles))
    rows = ceil(len(titles) / columns)
    fig = Figure(figsize=(size[0], max(least, 0.3 + rows * size[1])))
    axes = list(fig.subplots(rows, columns, squeeze=False, **shared).flat)
    for title, ax in zip(titles, axes, strict=False):
        ax.set_title(label(title), fontsize=7 if columns > 2 else 8)
    for spare in axes[len(titles) :]:
        spare.set_axis_off()
    for ax in axes[max(0, len(titles) - columns) : len(titles)]:
        ax.tick_params(labelbottom=True)  # the panel below, which would have them, may be off
    return fig, dict(zip(titles, axes, strict=False))


def _single(FULL: float, height: float) -> tuple[Figure, Iterable[tuple[str, Axes]]]:
    fig, axes = _panels([""], 1, (FULL, height - 0.3))
    return fig, axes.items()


def _mark(ax: Axes, x: Any, y: Any, look: Look, size: float = 4.4) -> None:
    """Set the marks of one look; they have a white edge, a star is larger, a cross is thicker."""
    edge = {"mew": 1.4} if look.marker == "x" else {"mec": "white", "mew": 0.45}
    star = look.marker == "*"
    edge |= {"ms": size + 3 * star, "zorder": 4 + star, "clip_on": False}
    ax.plot(x, y, look.marker, ls="", color=look.colour, **edge)


def _say(ax: Axes, at: float, value: str | float | Score | None) -> None:
    """Write a value right of its line, as a table says it."""
    if not isinstance(value, str):
        cell = printed_score(value if isinstance(value, Score) else Score(value))
        value = f"{cell.text} {cell.note}".strip()
    where = {"transform": ax.get_yaxis_transform(), "va": "center"}
    ax.text(1.02, at, value, fontsize=6.5, color=GREY, **where)


def _beside(ax: Axes, text: str, point: tuple, offset: tuple) -> None:
    """Write a text left of a point."""
    where = {"textcoords": "offset points", "ha": "right"}
    ax.annotate(text, point, xytext=offset, **where, fontsize=6.5, color=GREY)


def _names(ax: Axes, names: Iterable[str]) -> None:
    """Name the lines of a panel, the first one at the top."""
    names = [label(name) for name in names]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(left=False)


def _titles(fig: Figure, x: str = "", y: str = "") -> None:
    """Say below and left of all panels what their axes show."""
    fig.supxlabel(x, fontsize=7.5, color=GREY)
    fig.supylabel(y, fontsize=7.5, color=GREY)


def _limit(ax: Axes, summary: pd.DataFrame) -> None:
    """Show scores from 0 to 1 on that range, anything else on its own."""
    values = summary[["mean", "low", "high"]].to_numpy(float)
    low, high = np.nanmin(values), np.nanmax(values)
    if low >= 0 and high <= 1:
        ax.set_xlim(-0.03, 1.03)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    else:
        ax.set_xlim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))


def _explain(
    fig: Figure,
    look: Mapping[str, Look],
    names: Iterable[str] = (),
    loc: str = "outside upper right",
) -> None:
    """Explain colours, marks and those references that are among `names`."""
    look = dict(look)
    if NO_EDIT in (names := set(names)):
        look[NO_EDIT] = LOOKS[NO_EDIT]._replace(marker="")
    handles: list = [
        Line2D([], [], color=each.colour, marker=each.marker, ls=each.dashes, label=label(name))
        for name, each in look.items()
    ]
    if "floor" in names:
        handles.append(Patch(color=PALE, alpha=0.75, lw=0, label="below the floor"))
    if handles:
        columns = 1 if "right center" in loc else 2 if fig.get_figwidth() < 5 else 5
        fig.legend(handles=handles, loc=loc, ncols=columns)


def _sizes(ax: Axes, values: list[float]) -> None:
    """Set ticks at these values, on a log axis where each is about the same multiple."""
    ratios = [
        after / before for before, after in zip(values, values[1:], strict=False) if before > 0
    ]
    if len(ratios) > 1 and min(ratios) >= 1.5 and max(ratios) <= 1.75 * min(ratios):
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(values, [f"{value:,.0f}" for value in values])


def _log(ax: Axes, axis: str, values: pd.Series) -> None:
    """Set a log axis whose ticks are plain numbers, also 3, 30 ... where there are few decades."""
    getattr(ax, f"set_{axis}scale")("log")
    ticks = getattr(ax, f"{axis}axis")
    if values.max() < 300 * values.min():
        ticks.set_major_locator(LogLocator(subs=(1, 3)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ticks.set_minor_formatter(NullFormatter())
