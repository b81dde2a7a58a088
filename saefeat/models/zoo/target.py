"""From which step of a stable phase to decay, for the result to have a given loss."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

LEAST_SLOPE, MOST_SLOPE = 0.02, 0.5
"""Between these lies what a loss falls with, as a power of the steps; measured ones are noisy."""


def slope(losses: Sequence[tuple[int, float]]) -> float:
    """b, where the loss of the stable phase goes as step^-b over its second half.

    Args:
        losses: Steps, and the losses there.
    """
    half = losses[-1][0] / 2
    steps, values = zip(*(row for row in losses if row[0] >= half), strict=True)
    if len(steps) < 2:
        return LEAST_SLOPE
    fitted = -np.polyfit(np.log(steps), np.log(values), 1)[0]
    return float(np.clip(fitted, LEAST_SLOPE, MOST_SLOPE))


def next_step(
    losses: Mapping[int, float], target: float, steepness: float, *, least: int
) -> int | None:
    """The step to decay from next, or None if all that could be tried have been.

    Between a step whose decay ended above the target and a later one that ended below, ln(loss)
    is taken to be linear in ln(step). Where all ended below, the earliest is gone back from by
    the slope of the stable phase.

    Args:
        losses: Losses after decays from steps, at least one of them below the target.
        steepness: What `slope` gives.
        least: The earliest step to try.
    """
    later = min(step for step, loss in losses.items() if loss <= target)
    earlier = max((step for step in losses if step < later), default=None)
    if earlier is None:
        step = round(later * (losses[later] / target) ** (1 / steepness))
        step = min(max(step, least), later - 1)
    else:
        share = math.log(losses[earlier] / target) / math.log(losses[earlier] / losses[later])
        step = round(math.exp((1 - share) * math.log(earlier) + share * math.log(later)))
        step = min(max(step, earlier + 1), later - 1)
    return step if step >= 1 and step not in losses else None
