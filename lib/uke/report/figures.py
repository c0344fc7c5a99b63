"""Figures: one style, fixed colours, one function per kind of figure that takes a tidy table and returns a figure.

Widths are those of a paper: COLUMN (3.4 in) and FULL (6.8 in). The kinds of probe, `no edit` and `floor` are
named as in `tables`; colours are those of `drawing`. No figure stays in pyplot's memory.
"""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from uke.errors import InputError
from uke.report import tables
from uke.report.style import COLUMN, FULL, GREY, INK, PALE, RC, label_ends, looks
from uke.report.tables import KIND_ORDER, LABELS, REFERENCES, number, ordered, require, summarise

WRITTEN = ("original", "paraphrase", "detail", "multi_hop")


def levels(
    frame: pd.DataFrame, by: str = "method", within: str | None = None, width: float = FULL
) -> Figure:
    """A panel per kind of probe: mean score with its 95% interval for each `by`, dodged and coloured by `within`.

    `frame` has the columns by, kind, edit, score (within, batch where used), or by, kind, mean, low, high. Rows whose
    `by` is `no edit` or `floor` become a dashed line and a shaded range. Raises InputError for a missing column.
    """
    within = within or by
    summary = summarise(frame, dict.fromkeys((by, within, "kind")), "levels")
    shown = summary[~summary[by].isin(REFERENCES)]
    if shown.empty:
        raise InputError("levels: no rows to show besides the references")
    kinds = ordered(summary["kind"], KIND_ORDER)
    places, count = _grid(kinds, 2 if width < 5 else 3 if len(kinds) < 8 else 4)
    lines = _places(
        [
            (name, one)
            for name in ordered(shown[by])
            for one in ordered(shown.loc[shown[by] == name, within])
        ]
    )
    rows = 1 + max(row for row, _ in places.values())
    with matplotlib.rc_context(RC):
        fig = Figure(
            figsize=(width, 0.3 + rows * (0.55 + 0.19 * max(1 + max(lines.values()), 2))),
            layout="constrained",
        )
        axes = fig.subplots(rows, count, sharex=True, sharey=True, squeeze=False)
        spare = {(row, column) for row in range(rows) for column in range(count)} - set(
            places.values()
        )
        for place in spare:
            axes[place].set_axis_off()
        for kind, (row, column) in places.items():
            ax = axes[row, column]
            ax.set_title(LABELS.get(kind, kind))
            _draw_references(
                ax, summary[(summary["kind"] == kind) & summary[by].isin(REFERENCES)].set_index(by)
            )
            _draw_ranges(
                ax,
                shown[shown["kind"] == kind].set_index([by, within]),
                lines,
                looks(shown[within]),
            )
            # The panel below may be switched off, so its tick labels are shown here.
            last = (row + 1, column) in spare or row + 1 == rows
            ax.tick_params(labelbottom=last, left=False, labelleft=column == 0)
        _name_lines(axes[0, 0], lines)
        _limit(axes[0, 0], summary)
        _explain(fig, summary[by], looks(shown[within]) if within != by else {})
        fig.supxlabel("score, mean and 95% interval", fontsize=7.5, color=GREY)
    return fig


def _places(lines: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Height of each line from the top, with a gap between groups of several."""
    groups = ordered(name for name, _ in lines)
    gap = 0.0 if len(groups) == len(lines) else 0.6
    return {line: place + gap * groups.index(line[0]) for place, line in enumerate(lines)}


def _grid(kinds: Sequence[str], count: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Row and column of each kind's panel: what should be written first, what should be kept on rows of its own."""
    groups = [
        [kind for kind in kinds if kind in WRITTEN],
        [kind for kind in kinds if kind not in WRITTEN],
    ]
    if len(kinds) <= count:
        groups = [list(kinds)]
    places, row = {}, 0
    for group in filter(None, groups):
        places |= {kind: (row + place // count, place % count) for place, kind in enumerate(group)}
        row += -(-len(group) // count)
    return places, min(count, max(len(group) for group in groups))


def _draw_references(ax: Axes, references: pd.DataFrame) -> None:
    if "floor" in references.index:
        ax.axvspan(-9, references.loc["floor", "mean"], color=PALE, alpha=0.75, lw=0, zorder=0)
    if "no edit" in references.index:
        ax.axvline(
            references.loc["no edit", "mean"], color=GREY, lw=1, ls=(0, (3, 2)), zorder=1
        )


def _draw_ranges(
    ax: Axes, found: pd.DataFrame, lines: dict[tuple[str, str], float], look: dict
) -> None:
    ax.grid(axis="x")
    for line, place in lines.items():
        if line not in found.index:
            _value(ax, place, None)
            continue
        mean, low, high = found.loc[line, ["mean", "low", "high"]]
        colour, mark = look[line[1]]
        ax.hlines(place, low, high, color=colour, lw=1.5, zorder=3)
        ax.plot(
            mean,
            place,
            mark,
            color=colour,
            ms=7 if mark == "*" else 4.4,
            mec="white",
            mew=0.4,
            zorder=4,
            clip_on=False,
        )
        _value(ax, place, mean)


def _value(ax: Axes, place: float, value: float | tables.Score | None) -> None:
    text = (
        str(value)
        if isinstance(value, tables.Score)
        else number(value, min(2, tables.places(value)))
    )
    ax.text(
        1.03, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize=6.5, color=GREY
    )


def _name_lines(ax: Axes, lines: dict[tuple[str, str], float]) -> None:
    """One label for each `by`, in the middle of its lines."""
    names = ordered(name for name, _ in lines)
    middles = [
        np.mean([place for (other, _), place in lines.items() if other == name]) for name in names
    ]
    ax.set_yticks(middles, [LABELS.get(name, name) for name in names])
    ax.set_ylim(max(lines.values()) + 0.6, -0.6)


def _limit(ax: Axes, summary: pd.DataFrame) -> None:
    values = summary[["mean", "low", "high"]].astype(float)
    if values.min(axis=None) >= 0 and values.max(axis=None) <= 1:
        ax.set_xlim(-0.03, 1.03)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    else:
        low, high = values.min(axis=None), values.max(axis=None)
        ax.set_xlim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))


def _explain(fig: Figure, names: Iterable[str], look: dict) -> None:
    handles = [
        Line2D([], [], color=colour, marker=mark, label=LABELS.get(name, name))
        for name, (colour, mark) in look.items()
    ]
    if "no edit" in set(names):
        handles.append(Line2D([], [], color=GREY, lw=1, ls=(0, (3, 2)), label="no edit"))
    if "floor" in set(names):
        handles.append(Patch(color=PALE, alpha=0.75, lw=0, label="below the floor"))
    if handles:
        fig.legend(
            handles=handles,
            loc="outside upper right",
            ncols=2 if fig.get_figwidth() < 5 else 5,
            borderpad=0,
        )


def curves(
    frame: pd.DataFrame, y: str = "loss", by: str = "method", width: float = COLUMN
) -> Figure:
    """`y` over training steps for each `by`: the median over edits, and the range that holds 80 % of them.

    `frame` has the columns by, step, y and, where there are several, edit; an edit whose training stopped keeps its last
    value. `y` is `loss` or `target_log_probability` (nats per token). A loss that falls twentyfold gets a log axis.
    """
    require(frame, [by, "step", y], "curves")
    ends = {}
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 2.35), layout="constrained")
        ax = fig.subplots()
        for name, (colour, _) in looks(frame[by]).items():
            found = frame[frame[by] == name]
            wide = (
                found.assign(edit=found.get("edit", 0))
                .pivot_table(index="step", columns="edit", values=y)
                .ffill()
            )
            middle = wide.median(axis=1)
            if wide.shape[1] > 1:
                low, high = wide.quantile(0.1, axis=1), wide.quantile(0.9, axis=1)
                ax.fill_between(wide.index, low, high, color=colour, alpha=0.15, lw=0)
            ax.plot(middle.index, middle, color=colour)
            ax.plot(
                middle.index[-1], middle.iloc[-1], "o", color=colour, ms=3, clip_on=False, zorder=4
            )
            ax.hlines(
                middle.iloc[-1],
                middle.index[-1],
                frame["step"].max(),
                color=colour,
                lw=0.8,
                ls=(0, (1, 2)),
            )
            ends[name] = (frame["step"].max(), middle.iloc[-1], colour)
        values = frame[y].astype(float)
        if values.min() > 0 and values.max() > 20 * values.min():
            ax.set_yscale("log")
            if (
                values.max() < 300 * values.min()
            ):  # so few orders of magnitude that their powers alone would be one or two ticks
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="training step", ylabel=f"{y.replace('_', ' ')} (nats per token)")
        ax.margins(x=0)
        ax.grid(axis="y")
        label_ends(ax, ends)
    return fig


def knowledge(frame: pd.DataFrame, by: str = "kind", width: float = COLUMN) -> Figure:
    """Bars of what a model knows, one for each `by`, with 95% intervals and the values in words.

    `frame` has the columns by, edit, score (see `tables.summarise`) or by, mean, low, high, and where used `target`, the
    least value that was asked for, drawn as a mark.
    """
    summary = summarise(frame, [by], "knowledge")
    names = ordered(summary[by], KIND_ORDER)
    summary = summary.set_index(by).loc[names]
    targets = (
        frame.drop_duplicates(by).set_index(by)["target"]
        if "target" in frame.columns
        else pd.Series(dtype=float)
    )
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 0.5 + 0.24 * len(names)), layout="constrained")
        ax = fig.subplots()
        sns.barplot(
            x=summary["mean"].to_numpy(),
            y=names,
            color="#9cc3dd",
            saturation=1,
            width=0.62,
            ax=ax,
            errorbar=None,
        )
        for place, (name, row) in enumerate(summary.iterrows()):
            ax.hlines(place, row["low"], row["high"], color="#0b3a5c", lw=1.6, zorder=4)
            _value(ax, place, tables.Score(row["mean"], row["low"], row["high"]))
            if not tables.absent(targets.get(name)):
                ax.vlines(
                    targets[name], place - 0.46, place + 0.46, color="#d55e00", lw=1, zorder=3
                )
        ax.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
        ax.set(xlabel="score, mean and 95% interval", ylabel="")
        ax.tick_params(left=False)
        ax.grid(axis="x")
        _limit(
            ax,
            summary.assign(
                low=summary["low"].fillna(summary["mean"]),
                high=summary["high"].fillna(summary["mean"]),
            ),
        )
        ax.set_xlim(left=min(0, ax.get_xlim()[0] + 0.03))
        if not targets.dropna().empty:
            fig.legend(
                handles=[Line2D([], [], color="#d55e00", lw=1.4, label="asked for")],
                loc="outside upper right",
            )
    return fig


def lengths(frame: pd.DataFrame, width: float = COLUMN, unit: str = "words") -> Figure:
    """How long the answers of each dataset are: a histogram per dataset over one axis, its median marked.

    `frame` has the columns dataset and length (in `unit`). Datasets whose medians differ more than eightfold share a log
    axis.
    """
    require(frame, ["dataset", "length"], "lengths")
    medians = frame.groupby("dataset", sort=False)["length"].median()
    log = medians.max() > 8 * max(medians.min(), 1)
    values = frame["length"].clip(lower=1)
    edges = np.geomspace(1, values.max() + 1, 32) if log else np.linspace(0, values.max() + 1, 42)
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 0.45 + 0.5 * len(medians)), layout="constrained")
        axes = fig.subplots(len(medians), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (name, median) in zip(axes, medians.items()):
            own = values[frame["dataset"] == name]
            counts = np.histogram(own, edges)[0]
            ax.stairs(counts, edges, fill=True, color="#9cc3dd", lw=0)
            ax.stairs(counts, edges, color="#0072b2", lw=0.8)
            ax.axvline(median, color=INK, lw=1.1)
            ax.set_title(str(name), fontsize=7.5, pad=2)
            said = f"median {number(float(median), 0)}, n = {len(own):,}"
            ax.set_title(said, loc="right", fontsize=6.5, fontweight="normal", color=GREY, pad=2)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        if log:
            axes[-1].set_xscale("log")
            axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes[-1].xaxis.set_minor_formatter(NullFormatter())
        axes[-1].set_xlabel(f"length of the answer ({unit}{', log axis' if log else ''})")
    return fig


def sizes(
    frame: pd.DataFrame, x: str = "batch_size", by: str = "method", width: float = FULL
) -> Figure:
    """Mean of `score` at each `x`, an axis of powers of two, a line for each `by` with its name at its end.

    `frame` has the columns by, x and score, a row for each edit; a method that was run at few sizes has few marks.
    """
    require(frame, [by, x, "score"], "sizes")
    means = frame.groupby([by, x], sort=False)["score"].mean()
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 3.4), layout="constrained")
        ax = fig.subplots()
        ends = {}
        for name, (colour, mark) in looks(frame[by]).items():
            own = means[name].sort_index()
            ax.plot(
                own.index,
                own,
                color=colour,
                marker=mark,
                mec="white",
                mew=0.5,
                ms=8 if mark == "*" else 4.6,
                zorder=5 if mark == "*" else 3,
                clip_on=False,
            )
            ends[name] = (own.index[-1], own.iloc[-1], colour)
        _powers(ax, sorted(frame[x].unique()))
        ax.set(
            xlabel=x.replace("_", " "),
            ylabel="mean score",
            ylim=(min(0.3, means.min() - 0.03), max(0.8, means.max() + 0.03)),
        )
        label_ends(ax, ends)
    return fig


def ahead(
    frame: pd.DataFrame, x: str = "batch_size", unit: str = "points", width: float = COLUMN
) -> Figure:
    """A lead with its interval at each `x`, an axis of powers of two, and the line of no lead.

    `frame` has the columns x, mean, low and high; a lead without an interval is a mark alone.
    """
    require(frame, [x, "mean", "low", "high"], "ahead")
    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(width, 2.2), layout="constrained")
        ax = fig.subplots()
        ax.axhline(0, color=GREY, lw=1, ls=(0, (3, 2)))
        ax.vlines(frame[x], frame["low"], frame["high"], color=INK, lw=1.4)
        ax.plot(
            frame[x],
            frame["mean"],
            color=INK,
            marker="*",
            ms=9,
            mec="white",
            mew=0.5,
            zorder=4,
            clip_on=False,
        )
        for place, mean in zip(frame[x], frame["mean"]):
            ax.annotate(
                f"{number(float(mean), 1)}",
                (place, mean),
                xytext=(-5, 5),
                textcoords="offset points",
                ha="right",
                fontsize=6.5,
                color=GREY,
            )
        _powers(ax, sorted(frame[x].unique()))
        ax.set(xlabel=x.replace("_", " "), ylabel=f"lead ({unit})")
        ax.margins(x=0.13, y=0.15)  # room for the number beside the first mark
    return fig


def _powers(ax: Axes, values: Sequence[float]) -> None:
    """An axis of powers of two, a tick at each of these values."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:,.0f}" for value in values])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")
