"""The report's figures. Each function returns a matplotlib Figure, or None where the results hold nothing for it.

`data` is `report.frame`'s, one row per (method, seed, checkpoint); `lines` are those of results.jsonl. Curves are means over seeds,
bands one standard error. Figures are made without pyplot: nothing is shown, and no state is left behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from ..scores.table import FREE, NATURAL, table, with_tasks

UNEDITED = "unedited"
# Okabe and Ito's colours, told apart by colour-blind readers; wine in place of their yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (3, 1.2)), ":")
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
WIDTH = 11.5  # inches


def style(index: int) -> dict:
    """Colour, marker and dashes of the method at this place of the file: 24 different ones, told apart without a line too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


@rc_context(RC)
def curves(data: pd.DataFrame, methods: Sequence[str]) -> Figure | None:
    """Every score against the number of edits, those by free generation first; the unedited model as a dashed line."""
    edited, unedited = data[data.method != UNEDITED], data[data.method == UNEDITED]
    rows = with_tasks(data)
    shown = [name for name, row in rows.items() if row.curve and name in edited and edited[name].notna().any()]
    shown.sort(key=lambda name: rows[name].protocol not in (FREE, NATURAL))
    if not shown:
        return None
    ticks = sorted(edited.checkpoint.unique())
    height, width = math.ceil(len(shown) / 4), min(4, len(shown))
    figure = Figure((WIDTH, 2.1 * height + 0.9), layout="constrained")
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for ax, name in zip(axes, shown, strict=False):
        _against_edits(ax, edited, name, methods, ticks)
        if rows[name].baseline and name in unedited and unedited[name].notna().any():
            ax.axhline(unedited[name].mean(), color="#666666", linestyle=(0, (5, 3)), linewidth=1.2, label=UNEDITED)
        ax.set_title(f"{rows[name].title} {rows[name].arrow}")
        if rows[name].share:
            _share_range(ax)
    for ax in axes[len(shown) :]:
        ax.remove()
    _legend(figure)
    return figure


@rc_context(RC)
def frontier(data: pd.DataFrame, methods: Sequence[str]) -> Figure | None:
    """Rel against Loc: a path per method, a point per checkpoint (the larger, the more edits), the last one named."""
    paths = data[data.method != UNEDITED].groupby(["method", "checkpoint"])[["loc", "rel"]].mean().dropna()
    if paths.empty:
        return None
    figure = Figure((7.6, 5.4), layout="constrained")
    ax = figure.subplots()
    ticks = sorted(paths.index.unique("checkpoint"))
    sizes = dict(zip(ticks, np.linspace(70, 12, len(ticks))[::-1], strict=True))
    ends = {}
    for i, method in enumerate(methods):
        if method not in paths.index:
            continue
        path, look = paths.loc[method], style(i)
        ax.plot(path["loc"], path["rel"], color=look["color"], linestyle=look["linestyle"], linewidth=1.1, alpha=0.6)
        area = [sizes[t] for t in path.index]
        ax.scatter(path["loc"], path["rel"], area, color=look["color"], marker=look["marker"], linewidths=0, zorder=3)
        name = method if path.index[-1] == ticks[-1] else f"{method} (T = {path.index[-1]})"
        ends[name] = path.iloc[-1], look["color"]
    _share_range(ax)
    _share_range(ax, "x")
    ax.set(xlabel="Loc: what should have stayed as it was ↑", ylabel="Rel: the new answer to the edited prompt ↑")
    _name_points(figure, ax, ends, [paths.loc[method].to_numpy() for method in methods if method in paths.index])
    return figure


def _name_points(figure: Figure, ax, ends: Mapping[str, tuple], paths: Sequence[np.ndarray]) -> None:
    """Write each name near its (x, y), at the nearest place where it covers no other name and no path [points, 2]."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are found for the axes as they are now
    steps = np.linspace(0, 1, 40)[:, None]
    spots = [path[:1] for path in paths] + [a + steps * (b - a) for path in paths for a, b in pairwise(path)]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(np.concatenate(spots))]
    inside = ax.get_window_extent()
    circle = [(math.cos(angle), math.sin(angle)) for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False)]
    for name, (point, colour) in ends.items():
        note = ax.annotate(
            name, tuple(point), (0, 0), textcoords="offset points", color=colour, fontweight="bold", ha="center", va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4},
            path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5,
        )  # fmt: skip
        x, y = ax.transData.transform(tuple(point))
        size = note.get_window_extent()
        for radius, (dx, dy) in product(range(10, 400, 5), circle):
            right, up = dx * (radius + size.width / 2), dy * (radius + size.height / 2)
            box = Bbox.from_bounds(x + right - size.width / 2, y + up - size.height / 2, size.width, size.height)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not box.count_overlaps(taken):
                break
        note.xyann = 72 / figure.dpi * right, 72 / figure.dpi * up
        note.arrow_patch.set_visible(radius > 15)
        taken.append(box)


@rc_context(RC)
def retention(lines: Sequence[Mapping], methods: Sequence[str], checkpoint: int) -> Figure | None:
    """Rel and Gen over tenths of the edits' age at a checkpoint, oldest first."""
    rows = [
        {"method": line["method"], "score": score, "tenth": i + 1, "value": value}
        for line in lines
        if line["checkpoint"] == checkpoint
        for score in ("rel", "gen")
        for i, value in enumerate((line.get("retention") or {}).get(score) or [])
        if value is not None
    ]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    shown = [score for score in ("rel", "gen") if (data.score == score).any()]
    figure = Figure((WIDTH, 3.6), layout="constrained")
    for ax, score in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        for i, method in enumerate(methods):
            _band(ax, data[(data.score == score) & (data.method == method)], "tenth", "value", method, style(i))
        ax.set_title(f"{table()[score].title} ↑")
        ax.set(xticks=range(1, 11), xlim=(0.7, 10.3), xlabel="tenth of the edits:  1 oldest … 10 newest")
        _share_range(ax)
    _legend(figure)
    return figure


@rc_context(RC)
def drift(lines: Sequence[Mapping], methods: Sequence[str], checkpoint: int) -> Figure | None:
    """A column per edited layer: size of the change and of the weights over edits, and what single neurons changed by."""
    rows = [
        {"method": line["method"], "checkpoint": line["checkpoint"], "layer": layer, "frobenius": entry.get("frobenius"),
         "norm": entry["norm"] / entry["norm_before"] if entry.get("norm") and entry.get("norm_before") else None,
         "histogram": entry.get("histogram")}
        for line in lines for layer, entry in (line.get("drift") or {}).items()
    ]  # fmt: skip
    if not rows:
        return None
    data = pd.DataFrame(rows).astype({"frobenius": float, "norm": float})
    layers, ticks = sorted(data.layer.unique(), key=lambda name: (len(name), name)), sorted(data.checkpoint.unique())
    figure = Figure((max(WIDTH, 1.9 * len(layers)), 7.6), layout="constrained")
    grid = figure.subplots(3, len(layers), squeeze=False, sharey="row")
    for column, layer in enumerate(layers):
        here = data[data.layer == layer]
        for ax, score in zip(grid[:2, column], ("frobenius", "norm"), strict=True):
            _against_edits(ax, here, score, methods, ticks)
        for i, method in enumerate(methods):
            now = here[(here.method == method) & (here.checkpoint == checkpoint)]
            _neurons(grid[2, column], [entry for entry in now.histogram if entry], method, style(i))
        grid[0, column].set_title(f"layer {layer}")
        grid[2, column].set_xlabel("log₁₀ |Δv| / |v|")
    grid[0, 0].set_ylabel("relative change\n(Frobenius norm)")
    if (data.frobenius > 0).any():
        grid[0, 0].set_yscale("log")
        grid[0, 0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    grid[1, 0].set_ylabel("norm, now / before")
    grid[2, 0].set_ylabel(f"share of neurons\nper bin, T = {checkpoint}")
    _legend(figure)
    return figure


def _neurons(ax, histograms: Sequence[Mapping], name: str, look: Mapping) -> None:
    """The share of neurons per bin, seeds pooled; bins that differ between seeds are brought to the first seed's width."""
    if not histograms:
        return
    first = np.asarray(histograms[0]["edges"], float)
    ends = [np.asarray(entry["edges"], float)[[0, -1]] for entry in histograms]
    edges = first if np.ptp(ends, axis=0).max() == 0 else np.linspace(np.min(ends), np.max(ends), len(first))
    pooled = np.zeros(len(edges) - 1)
    for entry in histograms:
        below = np.concatenate([[0], np.cumsum(entry["counts"])])
        pooled += np.diff(np.interp(edges, entry["edges"], below))
    if pooled.any():
        first, last = np.flatnonzero(pooled)[[0, -1]]
        used = slice(max(first - 1, 0), last + 2)  # with an empty bin on either side
        ax.plot(((edges[1:] + edges[:-1]) / 2)[used], (pooled / pooled.sum())[used], label=name, markevery=0.15, **look)


@rc_context(RC)
def timing(lines: Sequence[Mapping], methods: Sequence[str], checkpoint: int) -> Figure | None:
    """Seconds per edit, stacked by phase; what no phase accounts for is `other`."""
    rows = {}
    for method in methods:
        mine = [line for line in lines if (line["method"], line["checkpoint"]) == (method, checkpoint)]
        spent = [line["seconds"] for line in mine if line.get("seconds")]
        if spent and checkpoint:
            rows[method] = pd.DataFrame(spent).astype(float).mean() / checkpoint
    if not rows:
        return None
    data = pd.DataFrame(rows).T.fillna(0.0)
    total = data.pop("total") if "total" in data else data.sum(axis=1)
    data["other"] = (total - data.sum(axis=1)).clip(lower=0)
    data = data.loc[:, data.sum() > 0.005 * total.sum()]
    figure = Figure((WIDTH, 0.36 * len(rows) + 1.3), layout="constrained")
    ax = figure.subplots()
    left, colours = np.zeros(len(data)), colormaps["cividis"](np.linspace(0.05, 0.9, data.shape[1]))
    if "other" in data:
        colours[-1] = to_rgba("#d0d0d0")
    for phase, colour in zip(data, colours, strict=True):
        ax.barh(list(data.index), data[phase], left=left, height=0.66, color=colour, label=phase, edgecolor="white", linewidth=0.5)
        left += data[phase].to_numpy()
    for y, seconds in enumerate(total):
        ax.annotate(f"{seconds:.3g} s", (max(seconds, left[y]), y), (4, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="seconds per edit ↓", xlim=(0, 1.08 * max(total.max(), left.max())))
    _legend(figure)
    return figure


def _against_edits(ax, data: pd.DataFrame, score: str, methods: Sequence[str], ticks: Sequence[int]) -> None:
    """Curves over evenly spaced checkpoints, which 1, 25, ... 400 edits would not be; one checkpoint becomes a place per method."""
    places = {t: float(i) for i, t in enumerate(ticks)}
    for i, method in enumerate(methods):
        one = data[data.method == method]
        alone = [float(i)] * len(one)
        _band(ax, one.assign(place=one.checkpoint.map(places) if len(ticks) > 1 else alone), "place", score, method, style(i))
    if len(ticks) == 1:
        ax.set(xticks=[], xlim=(-0.6, len(methods) - 0.4), xlabel=f"T = {ticks[0]}")
        return
    ax.set(xlim=(-0.15, len(ticks) - 0.85), xlabel="edits")
    step = 1 if len(ticks) < 8 else math.ceil(len(ticks) / 5)
    shown = range((len(ticks) - 1) % step, len(ticks), step)  # the last one always
    ax.set_xticks(shown, [f"{t / 1000:g}k" if t >= 1000 else str(t) for t in (ticks[place] for place in shown)])


def _band(ax, data: pd.DataFrame, x: str, y: str, name: str, look: Mapping) -> None:
    """Mean of y over rows of the same x, with a band of one standard error (an error bar where there is one x)."""
    means = data.groupby(x)[y].agg(["mean", "sem"]).dropna(subset="mean")
    if means.empty:
        return
    low, high = means["mean"] - means["sem"].fillna(0), means["mean"] + means["sem"].fillna(0)
    ax.plot(means.index, means["mean"], label=name, **look)
    if len(means) > 1:
        ax.fill_between(means.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
    else:
        ax.vlines(means.index, low, high, color=look["color"])


def _share_range(ax, axis: str = "y") -> None:
    """Limits on tenths around the data and within 0..1, with room for markers at either end."""
    low, high = getattr(ax.dataLim, f"interval{axis}")
    low, high = max(0.0, math.floor(10 * low + 1e-9) / 10), min(1.0, math.ceil(10 * high - 1e-9) / 10)
    room = 0.03 * max(high - low, 0.1)
    getattr(ax, f"set_{axis}lim")(low - room, max(high, low + 0.1) + room)
    getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _legend(figure: Figure) -> None:
    """One legend above all panels, every name once, in the order of the panels' curves."""
    found = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for columns in range(min(8, len(found)), 0, -1):  # as many as there is room for
        legend = figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, handlelength=2.6)
        if columns == 1 or legend.get_window_extent().width <= 0.98 * figure.bbox.width:  # with its margins
            break
        legend.remove()
