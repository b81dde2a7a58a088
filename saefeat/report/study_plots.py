"""Pictures of the equal-parameter study, from plain numbers.

Every function returns a matplotlib figure and touches no global state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive")
"""Of the shapes, in turn."""
BOUND_COLOUR = "tab:red"
"""Of what is no number but a lower bound."""
COUNTED = "counted, with its interval"
AT_LEAST = "beyond the detection limit: at least"
UNTRAINED = "random models"
COLUMNS = 3
"""Panels side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapePoints:
    """Models of one shape."""

    label: str
    width: float
    """d."""
    degrees: Sequence[float]
    """Features per neuron of each model that could be counted,"""
    at_least: Sequence[float]
    """lower bounds of those that could not,"""
    untrained: Sequence[float] = ()
    """and of random models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlopePanel:
    """All shapes, at one site by one instrument."""

    title: str
    shapes: Sequence[ShapePoints]
    slope: tuple[float, float, float] | None
    """beta of ln psi on ln d, and the ends of its interval; None where there is none."""
    theories: Mapping[str, float]
    """The slope by each theory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedLayer:
    """One layer of one model."""

    layer: int
    degree: float
    """Features per neuron."""
    low: float
    high: float | None
    """None where `low` is a lower bound and no more is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPanel:
    """The layers of the models of one shape."""

    title: str
    layers: Sequence[CountedLayer]
    histograms: Mapping[int, tuple[Sequence[float], Sequence[int]]]
    """Edges of bins of log10 density and features in each, by layer."""


def slope_panels(panels: Sequence[SlopePanel]) -> "Figure":
    """Features per neuron against width, both logarithmic; a point is a model.

    The line is the fit, the band the interval of its slope, and the dashed lines are the slopes of
    the theories, all through the mean point: the mean of the shapes' means. Models that could not
    be counted are arrows from their lower bounds, and count for neither.
    """
    from matplotlib.figure import Figure

    n_columns = min(COLUMNS, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(figsize=(5.6 * n_columns, 4.8 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _slope_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _slope_panel(axes: "Axes", panel: SlopePanel) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    widths = [shape.width for shape in panel.shapes]
    ends = np.array([min(widths) / 1.15, max(widths) * 1.15])
    # Where nothing was counted the theories' slopes go through the bounds, to be compared by eye.
    is_counted = any(len(shape.degrees) for shape in panel.shapes)
    drawn = {
        shape.width: _positive(shape.degrees if is_counted else shape.at_least)
        for shape in panel.shapes
    }
    drawn = {width: values for width, values in drawn.items() if len(values)}
    if not drawn:
        nothing = "nothing came back in two seeds"
        axes.text(0.5, 0.5, nothing, ha="center", color="dimgrey", transform=axes.transAxes)
    else:
        x = np.mean(np.log(list(drawn)))
        y = np.mean([np.log(values).mean() for values in drawn.values()])

        def line(slope: float) -> np.ndarray:
            return np.asarray(np.exp(y + slope * (np.log(ends) - x)))

        for name, slope in panel.theories.items():
            axes.plot(ends, line(slope), "--", color="grey", linewidth=1, label=f"_{name}")
            axes.annotate(
                f"{name}: β = {slope:+g}" if slope else f"{name}: β = 0",
                (ends[1], line(slope)[1]),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="dimgrey",
            )
        if panel.slope is not None:
            value, low, high = panel.slope
            fit = f"fit: β = {value:.2f} ({low:.2f} to {high:.2f})"
            axes.plot(ends, line(value), color="black", label=fit)
            axes.fill_between(ends, line(low), line(high), color="black", alpha=0.12, linewidth=0)
    for number, shape in enumerate(panel.shapes):
        colour = COLOURS[number % len(COLOURS)]
        _models(axes, shape.width, shape.degrees, color=colour, label=f"_{shape.label}")
        _models(axes, shape.width, shape.untrained, color="none", edgecolor="grey", label=UNTRAINED)
        lows = _positive(shape.at_least)
        _arrows(axes, _apart(shape.width, len(lows)), lows, 0.2 * lows)
    axes.set_xlim(ends[0] / 1.05, ends[1] * (ends[1] / ends[0]) ** 0.42)
    axes.set_xticks(widths, [f"{shape.width:g}\n{shape.label}" for shape in panel.shapes])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()
    axes.set_xlabel("width d")
    axes.set_ylabel("features per neuron ψ")
    axes.set_title(panel.title, fontsize=10)
    # Several shapes have random models, or models that could not be counted: one entry for each.
    found, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, found, strict=True))
    if entries:
        axes.legend(
            list(entries.values()),
            list(entries),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=2,
            fontsize=8,
        )


def _positive(degrees: Sequence[float]) -> np.ndarray:
    """Those that have a logarithm; a bound of 0 says nothing."""
    values = np.asarray(degrees, dtype=np.float64)
    return values[values > 0]


def _models(
    axes: "Axes", width: float, degrees: Sequence[float], *, color: str, label: str, **style: Any
) -> None:
    if len(degrees):
        places = _apart(width, len(degrees))
        axes.scatter(places, degrees, s=24, alpha=0.8, color=color, label=label, zorder=3, **style)


def _apart(width: float, n: int) -> np.ndarray:
    """Where n models of one width are drawn, so that none hides another: 1.5 % apart."""
    return np.asarray(width * 1.015 ** (np.arange(n) - (n - 1) / 2))


def layer_panels(parts: Mapping[str, Sequence[LayerPanel]]) -> "Figure":
    """Features per neuron of each layer, the shapes side by side; below, how often they are on.

    A point is a layer of a model with its interval; an arrow starts at the lower bound of one that
    could not be counted. Below each layer stands the histogram of the log10 densities of what was
    found in all models together: its width is the share of the features in a bin, on one scale for
    all layers of a part.

    Args:
        parts: By title of the part (a site and an instrument), a panel for each shape.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = list(parts.values())
    # Panels are as wide as they have layers, and not too narrow for a title.
    columns = [max(3, *(len(row[i].histograms) for row in rows)) for i in range(len(rows[0]))]
    n_columns = min(COLUMNS, len(parts))
    n_rows = math.ceil(len(parts) / n_columns)
    size = (n_columns * (2.4 + 0.5 * sum(columns)), 5.2 * n_rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    subfigures = figure.subfigures(n_rows, n_columns, squeeze=False).flatten()
    for subfigure, (title, panels) in zip(subfigures, parts.items(), strict=False):
        subfigure.suptitle(title, fontsize=11)
        grid = subfigure.subplots(
            2,
            len(panels),
            squeeze=False,
            sharex="col",
            sharey="row",
            width_ratios=columns,
            height_ratios=(3, 2),
        )
        tops = [one.degree if one.high is None else one.high for p in panels for one in p.layers]
        highest = max(tops, default=0.0) or 1.0
        shares = [_shares(panel) for panel in panels]
        widest = max((share.max() for one in shares for _, share in one.values()), default=1.0)
        for number, panel in enumerate(panels):
            upper, lower = grid[:, number]
            colour = COLOURS[number % len(COLOURS)]
            _counts(upper, panel.layers, colour, 0.07 * highest)
            for layer, (edges, share) in shares[number].items():
                # The last edge ends the last bin.
                half = 0.42 * np.append(share, share[-1]) / widest
                lower.fill_betweenx(
                    edges, layer - half, layer + half, step="post", color=colour, alpha=0.7
                )
            upper.set_title(panel.title, fontsize=10)
            lower.set_xlabel("layer")
            lower.set_xticks(sorted(panel.histograms))
            if panel.histograms:
                lower.set_xlim(min(panel.histograms) - 0.6, max(panel.histograms) + 0.6)
        grid[0, 0].set_ylim(0, 1.15 * highest or 1)
        grid[0, 0].set_ylabel("features per neuron ψ")
        grid[1, 0].set_ylim(_range(shares))
        grid[1, 0].set_ylabel("log10 density")
    entries = [
        Line2D([], [], marker="o", linestyle="", color="grey", label=COUNTED),
        Line2D([], [], marker="^", linestyle="", color=BOUND_COLOUR, label=AT_LEAST),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _counts(axes: "Axes", layers: Sequence[CountedLayer], colour: str, arrow: float) -> None:
    places = np.array(_side_by_side([one.layer for one in layers]))
    degrees = np.array([one.degree for one in layers])
    lows = np.array([one.low for one in layers])
    highs = np.array([np.nan if one.high is None else one.high for one in layers])
    counted = np.isfinite(highs)
    if counted.any():
        axes.errorbar(
            places[counted],
            degrees[counted],
            yerr=np.stack([degrees - lows, highs - degrees])[:, counted],
            fmt="o",
            markersize=4,
            elinewidth=1,
            color=colour,
            label=COUNTED,
        )
    _arrows(axes, places[~counted], lows[~counted], np.full((~counted).sum(), arrow))


def _side_by_side(numbers: Sequence[int]) -> list[float]:
    """Where layers of these numbers are drawn, those of several models next to each other."""
    places = []
    for i, number in enumerate(numbers):
        n, before = numbers.count(number), numbers[:i].count(number)
        places.append(number + (0.5 * before / (n - 1) - 0.25 if n > 1 else 0.0))
    return places


def _arrows(axes: "Axes", places: np.ndarray, lows: np.ndarray, lengths: np.ndarray) -> None:
    """Lower bounds: a bar, and an arrow upwards from it."""
    if len(lows):
        axes.errorbar(
            places,
            lows,
            yerr=lengths,
            lolims=True,
            fmt="_",
            markersize=8,
            elinewidth=1,
            color=BOUND_COLOUR,
            label=AT_LEAST,
        )


def _shares(panel: LayerPanel) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Edges, and the share of the features in each bin, of the layers in which there are any."""
    return {
        layer: (np.asarray(edges), np.asarray(counts) / sum(counts))
        for layer, (edges, counts) in panel.histograms.items()
        if sum(counts)
    }


def _range(shares: Sequence[Mapping[int, tuple[np.ndarray, np.ndarray]]]) -> tuple[float, float]:
    """From the lowest to the highest bin that holds a feature."""
    used = [
        edge
        for one in shares
        for edges, share in one.values()
        for edge in (edges[:-1][share > 0].min(), edges[1:][share > 0].max())
    ]
    return (min(used) - 0.1, max(used) + 0.1) if used else (-1.0, 0.0)
