"""Plots of the report as matplotlib figures: rows, sequence lengths, codebook use, loss, metrics beside the baselines."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "model": "#c1440e",
    "popularity": "#9aa5b1",
    "itemknn": "#52606d",
    "sasrec": "#1f77b4",
    "sasrec_itemknn": "#7048a0",
    "oracle": "#2f9e44",
}
INK = "#323f4b"
OTHER = "#829ab1"
ACCENT = "#c1440e"
FAINT = "#bcccdc"
LEVELS = ("#102a43", "#486581", "#c1440e", "#829ab1")


def canvas(width: float = 7.0, height: float = 3.4, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: neither a display nor global state
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
    return figure, axes


def funnel(counts: Sequence[tuple[str, int]]) -> Figure:
    """Rows at each step, from what was read to what trains."""
    figure, axis = canvas(height=0.42 * len(counts) + 0.6)
    names, values = [name for name, _ in counts], [value for _, value in counts]
    axis.barh(names, values, color="#486581", height=0.62)
    axis.invert_yaxis()
    axis.set_xlim(0, max([*values, 1]) * 1.18)
    for place, value in enumerate(values):
        axis.text(value, place, f"  {value:,}", va="center", fontsize=8, color=INK)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    return figure


def histogram(lengths: Mapping[str, np.ndarray]) -> Figure:
    """Distributions of lengths, one panel a name, logarithmic counts."""
    figure, axes = canvas(width=7.0, height=2.8, columns=len(lengths))
    for axis, (name, values) in zip(np.atleast_1d(axes), lengths.items(), strict=True):
        top = max(int(values.max(initial=1)), 1)
        axis.hist(values, bins=np.linspace(0, top, min(top, 40) + 1), color="#486581")
        axis.set_yscale("log")
        axis.set_title(f"{name}\nmedian {np.median(values):.0f}, mean {values.mean():.1f}", fontsize=9, color=INK)
    return figure


def codebook_use(codes: np.ndarray, sizes: Sequence[int]) -> Figure:
    """Items a code by rank, a panel a level; codes int [N, L], of `sizes` codes a level. The dashed line is even use."""
    figure, axes = canvas(columns=codes.shape[1], height=2.6)
    for level, (axis, k) in enumerate(zip(np.atleast_1d(axes), sizes, strict=True)):
        counts = np.sort(np.bincount(codes[:, level], minlength=k))[::-1]
        axis.fill_between(np.arange(k + 1), np.append(counts, counts[-1]), step="post", color="#486581")
        axis.axhline(len(codes) / k, color=ACCENT, linewidth=1, linestyle="--")
        axis.set_title(f"level {level + 1}: {np.count_nonzero(counts):,} of {k:,} codes", fontsize=9, color=INK)
        axis.set_xlabel("code, most used first", fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("items", fontsize=8)
    return figure


def items_a_prefix(sizes: Sequence[np.ndarray]) -> Figure:
    """How many items a prefix holds: the share of the items in prefixes of at least so many, a line a length. `sizes` are
    the items of each used prefix, by length."""
    figure, axis = canvas(height=2.8)
    for length, counts in enumerate(sizes, 1):
        ordered = np.sort(counts)[::-1]
        share = np.cumsum(ordered) / ordered.sum()
        name = f"first {length} codes" if length > 1 else "first code"
        axis.plot(ordered, share, drawstyle="steps-post", label=name, color=LEVELS[(length - 1) % len(LEVELS)])
    axis.set_xscale("log")
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("items that share the prefix, at least", fontsize=8)
    axis.set_ylabel("share of items", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    return figure


def entropy_by_level(entropies: Sequence[float], conditional: Sequence[tuple[float, float]]) -> Figure:
    """Nats of each level, and given the codes before it beside the most that the items would allow (`conditional`)."""
    values = [entropies, [own for own, _ in conditional], [most for _, most in conditional]]
    names = ["entropy", "given the codes before", "the most it could be"]
    return level_bars(values, names, ["#486581", ACCENT, FAINT], "nats")


def purity_by_level(cells: Sequence[tuple[float, float]]) -> Figure:
    """Share of the items that have their prefix's commonest tag, beside chance."""
    values = [[share for share, _ in cells], [chance for _, chance in cells]]
    figure = level_bars(
        values, ["share with the commonest tag", "with tags shuffled"], ["#486581", FAINT], "share of items"
    )
    figure.axes[0].set_ylim(0, 1.03)
    return figure


def level_bars(values: Sequence[Sequence[float]], names: Sequence[str], colours: Sequence[str], unit: str) -> Figure:
    """Bars side by side for each level; a row of `values` for each name."""
    figure, axis = canvas(height=2.8)
    width = 0.8 / len(names)
    places = np.arange(len(values[0]))
    for place, (name, row, colour) in enumerate(zip(names, values, colours, strict=True)):
        bar = axis.bar(places + (place - (len(names) - 1) / 2) * width, row, width * 0.92, label=name, color=colour)
        axis.bar_label(bar, fmt="%.2f", fontsize=7, color=INK)
    axis.set_xticks(places, [f"level {level + 1}" for level in places])
    axis.set_ylabel(unit, fontsize=8)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    return figure


def curves(series: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Loss by step, one line a name."""
    figure, axis = canvas(height=3.2)
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        alone = len(points) < 12
        faint = 1.0 if alone or name == "loss" else 0.45  # the levels behind their mean
        style = {"marker": "o", "markersize": 4} if alone else {}
        axis.plot(steps, values, label=name.replace("_", " "), linewidth=1.6, alpha=faint, **style)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("nats a code", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    return figure


def metric_bars(metrics: Mapping[str, Mapping[str, Mapping[str, float]]], kind: str) -> Figure:
    """`kind` ("recall" or "ndcg") at each cut-off that both kinds share, for each system, with its interval."""
    known = next(iter(metrics.values()))
    cutoffs = [name.partition("@")[2] for name in known if name.startswith("ndcg@")]
    names = [f"{kind}@{cutoff}" for cutoff in cutoffs]
    figure, axis = canvas()
    width = 0.8 / max(len(metrics), 1)
    for place, (system, values) in enumerate(metrics.items()):
        kept = [(i, values[name]) for i, name in enumerate(names) if name in values]
        bars(axis, kept, (place - (len(metrics) - 1) / 2) * width, width, system)
    axis.set_xticks(range(len(names)), [name.replace("recall", "Recall").replace("ndcg", "NDCG") for name in names])
    axis.legend(frameon=False, fontsize=8)
    return figure


def bars(axis: Axes, cells: Sequence[tuple[int, Mapping[str, float]]], shift: float, width: float, system: str) -> None:
    centres = np.array([i for i, _ in cells]) + shift
    heights = np.array([cell["value"] for _, cell in cells])
    low = heights - np.array([cell.get("low", cell["value"]) for _, cell in cells])
    high = np.array([cell.get("high", cell["value"]) for _, cell in cells]) - heights
    errors = np.maximum(np.stack([low, high]), 0)
    axis.bar(
        centres, heights, width * 0.92, yerr=errors, label=system, color=COLOURS.get(system, OTHER), ecolor=INK, capsize=2
    )


def save_svg(figure: Figure, file: Path) -> None:
    """The figure as a small text file, the same at every call: words stay words, and no date."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.name, "font.family": "sans-serif"}):
        figure.savefig(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def as_image(figure: Figure) -> str:
    """The figure as a data URI, so that the report is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
