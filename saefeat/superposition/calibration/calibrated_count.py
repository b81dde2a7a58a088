"""The answer of `calibrate`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from saefeat.superposition.calibration.curve import (
    FLAT,
    CurvePoint,
    range_within,
    read_off,
    spread_of,
)
from saefeat.superposition.estimators import LEAST_COVERAGE
from saefeat.superposition.sae_counts import SAECounts

TOLERANCES = {"coverage": 0.05, "effective": 0.15, "fvu": 0.15}
"""How far the observed may be from the simulated at the same stable count: coverage as it is,
e^H and FVU as a share of the observed; or three spreads of the simulated, if that is more."""
LEAST_FVU = 0.02
"""FVU that differs by less is the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedCount:
    """How many features a layer has if it is like the simulated ones. `print` it.

    Where `identifiable` is False, `estimate` is `low`, the least number that can be said, and
    `high` is infinite. Where coverage is low, `low` is what two seeds have found, of which a part
    may be no features: it is a lower bound only as far as what comes back is one.
    """

    observed: SAECounts
    """What was calibrated."""
    estimate: float
    low: float
    high: float
    """Interval of 95 %, from the spread among simulated layers alone."""
    identifiable: bool
    """Whether the count tells the number of features, and simulated layers look like the layer."""
    reasons: tuple[str, ...]
    """Why not, or what widened the interval."""
    l0: float
    """Features on in a row of the simulated layers."""
    n_tokens: int
    """Rows that each simulated dictionary was trained on."""
    n_layers: int
    """Layers that were simulated, those to choose the noise by included."""
    curve: tuple[CurvePoint, ...]
    """What dictionaries count at each n; empty if nothing was simulated."""

    @property
    def per_neuron(self) -> float:
        """Features per neuron: the degree of superposition."""
        return self.estimate / self.observed.d_in

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        names = ("estimate", "low", "high", "per_neuron", "identifiable", "reasons", "l0")
        facts = {name: getattr(self, name) for name in (*names, "n_tokens", "n_layers")}
        facts["high"] = self.high if self.identifiable else None
        facts["observed"] = asdict(self.observed)
        facts["curve"] = [asdict(point) | {"shortfall": point.shortfall} for point in self.curve]
        return facts

    def __str__(self) -> str:
        seen = self.observed
        if self.identifiable:
            number = (
                f"{self.estimate:,.0f} features (95 %: {self.low:,.0f} to {self.high:,.0f}), "
                f"{self.per_neuron:.2f} per neuron, if it is like the simulated layers"
            )
        else:
            number = (
                f"beyond the detection limit of these dictionaries, at least {self.low:,.0f} "
                f"features ({self.low / seen.d_in:.2f} per neuron)"
            )
        lines = [
            f"{seen.hook_name}: {number}",
            f"  {seen.d_sae:,} latents, {len(seen.seeds)} seeds: {seen.distinct.n_stable:,} found "
            f"in two, coverage {seen.distinct.coverage or 0:.3f}, "
            f"e^H {fmean(seen.effective):,.0f}, FVU {fmean(seen.fvu):.3f}",
            *(f"  {reason}" for reason in self.reasons),
        ]
        if self.curve:
            lines += [
                f"  {self.n_layers} layers simulated, {self.n_tokens:,} rows each, {self.l0:.3g} "
                "features on in a row:",
                "  features  2 x load    found  missed  coverage    e^H    FVU  noise",
            ]
        lines += [
            f"  {point.n_features:8,} {2 * point.load:9.2f} {fmean(point.stable):8,.0f} "
            f"{point.shortfall:7.0%} {fmean(point.coverage):9.3f} {fmean(point.effective):6,.0f} "
            f"{fmean(point.fvu):6.3f} {point.noise_share:6.3f}"
            for point in self.curve
        ]
        return "\n".join(lines)


def conclude(
    observed: SAECounts,
    curve: Sequence[CurvePoint],
    *,
    l0: float,
    n_tokens: int,
    n_tokens_trained: int,
    n_layers: int,
) -> CalibratedCount:
    """Read a count off a curve, and say whether it can be trusted.

    Args:
        observed: The count.
        curve: Simulated layers; none if the count is not to be trusted anyway.
        l0: Features on in a row of theirs.
        n_tokens: Rows that their dictionaries saw.
        n_tokens_trained: Rows that the observed dictionaries saw.
        n_layers: Layers that were simulated.
    """
    stable = observed.distinct.n_stable
    reasons = why_untrusted(observed)
    notes: list[str] = []
    estimate, low, high = float(stable), float(stable), math.inf
    if curve:
        reading = read_off(curve, stable)
        estimate, low, high = reading.estimate, reading.low, reading.high
        first, last = curve[0].n_features, curve[-1].n_features
        if reading.is_below:
            notes.append(f"The interval may begin below {first:,}, the least n that was simulated.")
        if n_tokens < n_tokens_trained:
            low = min(low, float(stable))
            notes.append(
                f"Simulated dictionaries saw {n_tokens:,} rows and the observed ones "
                f"{n_tokens_trained:,}: they miss more, so that the estimate is too high, and the "
                "interval reaches down to what was found. Raise rows."
            )
        if reading.slope < FLAT:
            reasons.append(
                f"The curve is flat there: a feature more adds {reading.slope:.2f} to the count."
            )
        elif high == math.inf:
            reasons.append(
                f"{stable:,} found is not for certain below the most that dictionaries find in "
                f"layers of {first:,} to {last:,} features."
            )
        again = reading.falls_to
        if again is not None and not differences(observed, curve, again, again):
            reasons.append(
                f"A layer of {again:,.0f} features, past the peak of the curve, would give the "
                "same."
            )
        unlike = differences(observed, curve, low, high)
        if unlike:
            reasons.append(
                "The simulations do not look like the layer: where they find as many features, "
                f"{'; '.join(unlike)}."
            )
            low = min(low, float(stable))
    if reasons:
        estimate, high = low, math.inf
    return CalibratedCount(
        observed=observed,
        estimate=estimate,
        low=low,
        high=high,
        identifiable=not reasons,
        reasons=(*reasons, *notes),
        l0=l0,
        n_tokens=n_tokens,
        n_layers=n_layers,
        curve=tuple(curve),
    )


def why_untrusted(observed: SAECounts) -> list[str]:
    """What is wrong with a count before anything is simulated."""
    coverage, fvu = observed.distinct.coverage, fmean(observed.fvu)
    if coverage is None or observed.distinct.n_stable == 0:
        return ["No feature was found in two seeds."]
    if coverage < LEAST_COVERAGE:
        return [
            f"Coverage {coverage:.2f} is below {LEAST_COVERAGE}: a seed finds much that the others "
            "do not."
        ]
    if fvu >= 1:
        return [f"FVU {fvu:.2f} is not below 1: the dictionaries explain nothing of the layer."]
    return []


def differences(
    observed: SAECounts, curve: Sequence[CurvePoint], low: float, high: float
) -> list[str]:
    """In what the observed differs, beyond the tolerances, from all layers of an interval of n."""
    found = []
    for name, label, value in (
        ("coverage", "coverage", observed.distinct.coverage or 0.0),
        ("effective", "e^H", fmean(observed.effective)),
        ("fvu", "FVU", fmean(observed.fvu)),
    ):
        least, most = range_within(curve, name, low, high)
        share = TOLERANCES[name]
        allowed = {"coverage": share, "fvu": max(share * value, LEAST_FVU)}.get(name, share * value)
        allowed = max(allowed, 3 * spread_of(curve, name))
        if not least - allowed <= value <= most + allowed:
            found.append(f"{label} is {least:.3g} to {most:.3g}, and {value:.3g} was observed")
    return found
