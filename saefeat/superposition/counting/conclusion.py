"""From what random starts agree on to a number, or to the word that there is none."""

import math

from saefeat.superposition.counting.agreement import Agreement
from saefeat.superposition.counting.code_densities import code_densities
from saefeat.superposition.counting.feature_count import FeatureCount, Step
from saefeat.superposition.counting.layer_rows import LayerRows
from saefeat.superposition.estimators import LEAST_COVERAGE
from saefeat.superposition.theory import load

MARGIN = 0.02
"""Share of a count that its interval allows for what agrees over all starts and is wrong."""
REPEATED = 0.75
"""Least share of the energy of the codes that has to be found again. Copies and codes of noise
keep it below 1."""
SETTLED = 0.8
"""Least share of the features that all starts have found, and closely."""
SPREAD = 0.1
"""Share of a count by which dictionaries of another width may agree on more; else it is none."""
FULL = 0.9
"""Share of the atoms beyond which features fill a dictionary."""
WIDE = 1.5
"""High end of an interval over its low end beyond which it does not say how many there are."""


def conclude(
    rows: LayerRows,
    last: Agreement,
    half: Agreement | None,
    steps: tuple[Step, ...],
    seeds: tuple[int, ...],
) -> FeatureCount:
    """The answer from what the last random starts agreed on, and those with half of the rows."""
    reasons: list[str] = []
    if last.shared_energy < REPEATED:
        reasons.append(
            f"Only {last.shared_energy:.0%} of the energy of the codes came back after another "
            f"random start ({REPEATED:.0%} is needed)."
        )
    if last.coverage < LEAST_COVERAGE:
        reasons.append(
            f"Coverage {last.coverage:.2f} is below {LEAST_COVERAGE}: a random start finds much "
            "that the others do not."
        )
    if last.n_features > FULL * last.d_sae:
        reasons.append(
            f"{last.n_features} features fill {last.d_sae} atoms: give larger expansion_factors."
        )
    if last.n_strict < SETTLED * last.n_features:
        reasons.append(
            f"Only {last.n_strict} of {last.n_features} features are in all starts at a cosine of "
            "0.95: they have not settled. More rows may help."
        )
    # With fewer picks there are more sums among what starts agree on, and one is always by chance.
    most = max(step.n_strict for step in steps if step.picks >= last.picks)
    known = max(last.n_features, last.chao2)
    if most > known + max(1, SPREAD * known):
        reasons.append(
            f"Dictionaries of another width agree on {most} features, these on "
            f"{last.n_features}: the count has not settled."
        )
    identifiable = not reasons
    densities = code_densities(last.directions, last.offset, rows.held_out, last.picks)
    # Where one start finds what others do not, some of what two share is no feature either.
    low = (1 - MARGIN) * last.n_strict
    estimate, high = low, math.inf
    if identifiable and half is not None:
        estimate, low, high = _interval(half, last, most, reasons)
        if high > WIDE * low:
            identifiable = False
            reasons.append(
                f"The interval would be {low:.0f} to {high:.0f}, too wide to say how many."
            )
            estimate, high = low, math.inf
    return FeatureCount(
        hook_name=rows.name,
        n_neurons=rows.width,
        estimate=estimate,
        low=low,
        high=high,
        coverage=last.coverage,
        identifiable=identifiable,
        reasons=tuple(reasons),
        load=load(densities, rows.width) if len(densities) else 0.0,
        n_tokens=last.n_rows,
        seeds=seeds,
        steps=steps,
        directions=last.directions,
        densities=densities,
    )


def _interval(
    half: Agreement, last: Agreement, most: int, reasons: list[str]
) -> tuple[float, float, float]:
    """Estimate and ends.

    What only some starts have found, or not at a cosine of 0.95, may be nothing: the low end leaves
    it out. Or it is the visible part of as much again that none has found: the high end takes that
    in, or what Chao2 says is unseen if that is more, and what another width agrees on. Both are
    MARGIN further out. A count that still rises has what the last doubling of the rows brought
    added to its high end: starts say what they miss of these rows, and not what more would show.
    """
    found = float(last.n_features)
    low = min(found, last.n_strict)
    estimate, high = found, max(found + (found - low), last.chao2)
    rise = last.n_features - half.n_features
    if rise > MARGIN * found:
        # If each doubling of the rows brings half of what the last one brought, as much again.
        estimate += min(rise / 2, max(found, last.chao2) - found)
        high += rise
        reasons.append(
            f"The count still rises ({half.n_features} at half of the rows, {last.n_features} at "
            "all): it is extrapolated, and the interval is wider. Raise n_tokens."
        )
    return estimate, low - MARGIN * found, max(high + MARGIN * found, most)
