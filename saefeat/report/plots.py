"""Pictures of a report. Every function returns a matplotlib figure and touches no global state."""

import io
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from saefeat.report.record import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def density_histograms(report: Report) -> "Figure":
    """Histograms of log10 density, a panel for each hook, a line for each dictionary.

    Latents that never fired have no logarithm; the panel states how many they are.
    """
    from matplotlib.figure import Figure

    hooks = list(dict.fromkeys(row.hook_name for row in report.rows))
    n_columns = min(3, len(hooks))
    n_rows = math.ceil(len(hooks) / n_columns)
    figure = Figure(figsize=(4 * n_columns, 2.6 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    bins = density_bins(report.n_tokens)
    for panel, hook_name in zip(axes.flat, hooks, strict=False):
        dead = []
        for name, density in report.densities.items():
            if name.rsplit("/", 1)[0] != hook_name:
                continue
            alive = log_densities(density, bins)
            dead.append(f"{len(density) - len(alive)} of {len(density):,}")
            panel.hist(alive, bins=bins, histtype="step", label=name.rsplit("/", 1)[1])
        panel.set_title(hook_name, fontsize=10)
        panel.set_xlabel("log10 density")
        panel.set_ylabel("latents")
        panel.tick_params(labelbottom=True)
        panel.margins(y=0.2)  # room for the note
        note = "never fired: " + (", ".join(dead) if len(dead) <= 2 else f"{len(dead)} counts")
        panel.text(0.03, 0.95, note, transform=panel.transAxes, va="top", fontsize=8)
        if len(dead) > 1:
            panel.legend(fontsize=7, loc="upper right")
    for panel in axes.flat[len(hooks) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"How often latents fire: {report.model or 'activations'}, "
        f"{report.n_tokens:,} held-out tokens",
        fontsize=11,
    )
    return figure


def density_bins(n_tokens: int) -> npt.NDArray[np.float64]:
    """Edges of 39 bins of log10 density, from that of a latent that fired once."""
    return np.linspace(math.log10(1 / max(n_tokens, 10)), 0, 40)


def log_densities(density: Tensor, bins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log10 density of the latents that fired, within the bins."""
    # In float32 a latent that fired once can come out a last digit below the first bin.
    logs: npt.NDArray[np.float64] = density[density > 0].double().log10().numpy()
    return logs.clip(bins[0], bins[-1])


def png_bytes(figure: "Figure", dots_per_inch: int = 120) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()
