"""How high the learning rate is, and how it moves over a run."""

from saefeat.dictionaries.base import DictionaryConfig

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


def peak_learning_rate(
    config: DictionaryConfig, d_sae: int, n_steps: int, batch_size: float
) -> float:
    """The learning rate of `config`, or the default for this width, number of steps and batch.

        long runs   2e-4 / sqrt(d_sae / 2^14)      (Gao et al. 2024, as dictionary_learning has it)
        short runs  rate * sqrt(1000 / n_steps), at most rate,
                    rate = short_run_rate * sqrt(batch_size / 2048), from 4e-3 to short_run_rate

    whichever is larger. Adam moves a weight by about its rate a step, so a run of a thousand
    steps at the long rate ends before its weights have gone anywhere: on SmolLM2 (layer 15,
    1,152 latents, 0.8M tokens) TopK's FVU was .219, .196 and .182 at 1e-3, 2e-3 and 4e-3. What a
    kind bears beyond that it bears in large batches alone: with 512 tokens (2,304 latents, 287
    steps) TopK at 8e-3 lost 43 % of its latents, at 4e-3 12 %, at equal FVU.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    long = 2e-4 / (d_sae / 2**14) ** 0.5
    most = config.short_run_rate
    rate = min(most, max(4e-3, most * (batch_size / 2048) ** 0.5))
    short = rate * min(1.0, (1000 / n_steps) ** 0.5)
    return float(max(long, short))
