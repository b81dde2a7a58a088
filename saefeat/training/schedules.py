"""How the learning rate moves over a run."""

MAX_WARMUP_STEPS = 1000
"""Longest warm-up; what the published TopK and BatchTopK recipes use."""


def learning_rate_factor(
    step: int, n_steps: int, *, warmup_fraction: float, decay_fraction: float
) -> float:
    """The share of the peak learning rate at a step: rise from 0, hold, fall linearly to 0.

    Args:
        step: The step about to be made, from 0.
        n_steps: Steps of the whole run.
        warmup_fraction: Share of the steps that rise, cut at `MAX_WARMUP_STEPS`.
        decay_fraction: Share of the steps that fall.

    Returns:
        A number in (0, 1]: the first step and the last are never lost to a rate of 0.
    """
    n_warmup = min(MAX_WARMUP_STEPS, int(warmup_fraction * n_steps))
    n_decay = int(decay_fraction * n_steps)
    rise = (step + 1) / (n_warmup + 1)
    fall = (n_steps - step) / (n_decay + 1)
    return min(1.0, rise, fall)
