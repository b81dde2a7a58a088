"""What dictionaries count in layers of known n, and the n at which they count what was observed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import t as student

CONFIDENCE = 0.95
"""Of the interval."""
FLAT = 0.25
"""Growth of the count, in proportion, per growth of n, below which it says nothing of n."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """What the simulated layers of one n gave, one number a layer."""

    n_features: int
    load: float
    """Sum of p ln(1/p) over the features, per neuron."""
    noise_share: float
    """Share of the variance that is noise."""
    stable: tuple[int, ...]
    """Features that two seeds at least have found: `SAECounts.distinct.n_stable`."""
    coverage: tuple[float, ...]
    """Of the same; 0 where nothing was found."""
    effective: tuple[float, ...]
    """e^H, mean over the seeds."""
    fvu: tuple[float, ...]
    """Mean over the seeds."""

    @property
    def shortfall(self) -> float:
        """Share of the features that the dictionaries miss, mean over the layers; below 0 where
        they count more than there are."""
        return 1 - sum(self.stable) / len(self.stable) / self.n_features


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Where on a curve a count was observed."""

    estimate: float
    """Where the curve rises through the count. The first or last n of the rise if it does not."""
    low: float
    """Of the interval; the least n that was simulated if the interval begins below it, and that of
    the peak if it begins past it."""
    high: float
    """Of the interval; infinite if the curve does not rise past the count for certain."""
    is_below: bool
    """Whether the interval begins below the least n that was simulated."""
    slope: float
    """Growth of the count, in proportion, per growth of n, over the interval or what there is."""
    falls_to: float | None
    """The n past the peak where the curve falls back to the count, or near it; None if it does
    not, or does not fall."""


def read_off(curve: Sequence[CurvePoint], stable: int) -> Reading:
    """The n at which layers are counted as `stable`, by monotone interpolation.

    The mean of ln(count) over the layers of an n, up to its peak, is made monotone (isotonic
    regression) and interpolated linearly in ln(n). The interval is where the curve is within

        h = t s sqrt(1 + 1 / m)

    of the observed: s is the pooled standard deviation of ln(count) among the m layers of one n,
    at least that of rounding, t Student's quantile for G (m - 1) degrees of freedom, at G values of
    n up to the peak. The observed layer is one draw with that spread, the curve a mean of m. So
    the interval holds for layers that are like the simulated ones, and does not know in what they
    differ.

    Raises:
        ValueError: Values of n do not ascend, or an n has fewer than 2 layers.
    """
    numbers = [point.n_features for point in curve]
    n_layers = {len(point.stable) for point in curve}
    if len(curve) < 2 or numbers != sorted(set(numbers)) or len(n_layers) > 1 or min(n_layers) < 2:
        raise ValueError(
            "A curve needs 2 values of n at least, in ascending order, and as many layers of each, "
            f"2 or more; got n = {numbers} with {[len(point.stable) for point in curve]} layers."
        )
    (m,) = n_layers
    x = np.log(numbers)
    counts = np.log(np.maximum([point.stable for point in curve], 0.5))
    observed = math.log(max(stable, 0.5))
    means = counts.mean(1)
    peak = int(means.argmax())
    degrees = (peak + 1) * (m - 1)
    spread = math.sqrt(float(counts[: peak + 1].var(1, ddof=1).mean()))
    spread = max(spread, 0.5 / max(stable, 1))
    half = float(student.ppf((1 + CONFIDENCE) / 2, degrees)) * spread * math.sqrt(1 + 1 / m)
    rise_x, rise_y = x[: peak + 1], isotonic_regression(means[: peak + 1]).x
    first, last = _crossing(rise_x, rise_y, observed, "left"), _crossing(rise_x, rise_y, observed)
    low = _crossing(rise_x, rise_y, observed - half, "left")
    high = _crossing(rise_x, rise_y, observed + half)
    middle = (np.clip(first, x[0], x[peak]) + np.clip(last, x[0], x[peak])) / 2
    inside = np.clip([low, high], x[0], x[peak])
    if inside[1] == inside[0]:  # all of the interval is before the curve, or past it
        inside = np.array([x[0], x[peak]])
    rise = np.diff(np.interp(inside, rise_x, rise_y))[0]
    width = inside[1] - inside[0]
    return Reading(
        estimate=math.exp(middle),
        low=math.exp(np.clip(low, x[0], x[peak])),
        high=math.exp(max(high, x[0])),
        is_below=bool(low < x[0]),
        slope=float(rise / width) if width > 0 else 0.0,
        falls_to=_falls_to(x[peak:], means[peak:], observed, half),
    )


def _falls_to(x: np.ndarray, y: np.ndarray, level: float, half: float) -> float | None:
    """Where a line that falls from its first point comes back to a level, or near it."""
    near = [i for i in range(1, len(x)) if y[i] <= level + half]
    if not near:
        return None
    at = near[0]
    if y[at] < level < y[at - 1]:
        share = (y[at - 1] - level) / (y[at - 1] - y[at])
        return math.exp(float(x[at - 1] + share * (x[at] - x[at - 1])))
    return math.exp(float(x[at]))


def range_within(
    curve: Sequence[CurvePoint], name: str, low: float, high: float
) -> tuple[float, float]:
    """Least and largest mean of a number over the layers of an n, for n from `low` to `high`.

    Interpolated linearly in ln(n), and constant outside of the curve.
    """
    means = np.array([np.mean(getattr(point, name)) for point in curve])
    x = np.log([point.n_features for point in curve])
    ends = np.clip(np.log([low, high]), x[0], x[-1])
    inside = means[(x > ends[0]) & (x < ends[1])]
    values = np.concatenate([np.interp(ends, x, means), inside])
    return float(values.min()), float(values.max())


def spread_of(curve: Sequence[CurvePoint], name: str) -> float:
    """The pooled standard deviation of a number among layers of one n."""
    values = np.array([getattr(point, name) for point in curve])
    return math.sqrt(float(values.var(1, ddof=1).mean()))


def _crossing(x: np.ndarray, y: np.ndarray, level: float, side: str = "right") -> float:
    """Where a rising line of straight pieces comes to a level ("left"), or leaves it ("right").

    Minus infinity if it begins above, infinity if it ends below.
    """
    after = int(np.searchsorted(y, level, "left" if side == "left" else "right"))
    if after == 0:
        return float(x[0]) if y[0] == level else -math.inf
    if after == len(x):
        return math.inf
    share = (level - y[after - 1]) / (y[after] - y[after - 1])
    return float(x[after - 1] + share * (x[after] - x[after - 1]))
