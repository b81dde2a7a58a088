"""`count_features`: how many features a layer holds, from what several random starts agree on."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from saefeat.activations.stream import ActivationStream
from saefeat.superposition.counting.agreement import Agreement, agreement
from saefeat.superposition.counting.conclusion import conclude
from saefeat.superposition.counting.feature_count import FeatureCount, Step
from saefeat.superposition.counting.layer_rows import LayerRows
from saefeat.superposition.counting.pursuit import fit_pursuit
from saefeat.superposition.counting.search import choose, wider, with_room
from saefeat.superposition.sae_counts import count_recipe, sae_counts
from saefeat.training.trainer import train

PICKS = (1, 2, 4, 8, 16, 32)
"""Numbers of picks that are tried in turn, until agreement falls."""
EXPANSION_FACTORS = (4, 8, 16, 32)
"""Atoms per neuron of the widths that are tried in turn, until one is wide enough."""
PROBE_ROWS = 150_000
"""Rows of a fit that only compares settings: an eighth of all, and no fewer than these."""
HOPELESS = 0.1
"""Agreement below which no longer fit is tried."""


def count_features(
    stream: ActivationStream,
    *,
    n_tokens: int = 2_000_000,
    hook_name: str | Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    picks: Sequence[int] = PICKS,
    expansion_factors: Sequence[float] = EXPANSION_FACTORS,
    saes: bool = True,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> FeatureCount:
    """Count the features of a layer; nothing about them need be known.

    Dictionaries are fitted from several random starts by matching pursuit, and a feature is what
    comes back: atoms of two starts at least with a cosine of 0.9, copies merged, combinations of
    others left out. What is chosen is chosen by agreement: how many atoms a row may pick by the
    share of the codes' energy in atoms that come back (where a row may pick so many that any
    dictionary explains it, nothing repeats), and the width by how many features come back, until
    they fill no more than 0.8 of it. The last fit is as long as asked for, and one of half the
    length says whether the count still rises.

    Few picks are what lets features be found beyond the load at which codes can be: an atom that is
    drawn to a feature averages over all rows that hold it, whatever else is on in them.

    Args:
        stream: Where rows come from. They are read ten to twenty times: cache those of a
            language model first (`cache_activations`).
        n_tokens: Rows that the last dictionaries are fitted on. The rarest feature should be on
            in a thousand of them.
        hook_name: Which hook of the stream; needed if there are several. Several names count what
            those layers hold jointly, each scaled to mean norm sqrt(d).
        seeds: Of the random starts, at least 2.
        picks: Numbers of picks to choose from, in ascending order.
        expansion_factors: Atoms per neuron to try, in ascending order, until there is room; the
            last is the widest dictionary that is fitted.
        saes: Whether to train BatchTopK SAEs on the same rows, twice and four times as wide as
            there are features, and to give their counts beside. The stream must have one hook.
        device: Where to compute.
        progress: Whether to draw progress bars on standard error.

    Returns:
        The count with its interval, or the word that it is beyond the detection limit.

    Raises:
        KeyError: The stream has no such hook.
        ValueError: An option is out of range, nothing was held out, or as for `train`.
    """
    rows = LayerRows(stream, _named(stream, hook_name))
    _check_options(n_tokens, seeds, picks, expansion_factors, rows.width)
    if saes and len(stream.hooks) > 1:
        raise ValueError(
            f"SAEs would be trained at all {len(stream.hooks)} hooks of the stream. Make one of "
            "a single hook, or pass saes=False."
        )
    n_probe = min(n_tokens, max(n_tokens // 8, PROBE_ROWS))

    def compare(d_sae: int, n_picks: int, n_starts: int, n_rows: int) -> Agreement:
        fits = fit_pursuit(
            rows,
            d_sae=d_sae,
            picks=n_picks,
            seeds=seeds[:n_starts],
            n_rows=n_rows,
            device=device,
            progress=progress,
        )
        return agreement(fits, picks=n_picks, n_rows=n_rows)

    probes, best = choose(
        compare, picks, [round(factor * rows.width) for factor in expansion_factors], n_probe
    )
    steps = [Step.of("width", one) for one in probes]
    half, last = None, best
    if best.shared_energy >= HOPELESS:
        widest = round(expansion_factors[-1] * rows.width)
        halves = with_room(compare, best, widest, len(seeds), n_tokens // 2)
        half = max(halves[-2:], key=lambda one: one.shared_energy)
        steps += [Step.of("half", one) for one in halves]
        d_sae: int | None = half.d_sae
        while d_sae is not None:
            last = compare(d_sae, half.picks, len(seeds), n_tokens)
            steps.append(Step.of("whole", last))
            d_sae = wider(last, widest)
    count = conclude(rows, last, half, tuple(steps), tuple(seeds))
    if not saes:
        return count
    n_features = max(count.estimate, rows.width)
    bank = train(
        stream,
        count_recipe(max(1, round(float(count.densities.sum())))),
        expansion_factors=[math.ceil(factor * n_features / rows.width) for factor in (2, 4)],
        seeds=seeds,
        n_tokens=n_tokens,
        device=device,
        progress=progress,
    )
    return replace(count, saes=sae_counts(bank, stream, progress=progress))


def _named(stream: ActivationStream, hook_name: str | Sequence[str] | None) -> Sequence[str]:
    if hook_name is not None:
        return [hook_name] if isinstance(hook_name, str) else hook_name
    if len(stream.hooks) > 1:
        raise ValueError(
            f"The stream has {len(stream.hooks)} hooks, and a count is of one, or of several "
            f"jointly: name them by hook_name. It has {', '.join(stream.hooks)}."
        )
    return stream.hooks


def _check_options(
    n_tokens: int,
    seeds: Sequence[int],
    picks: Sequence[int],
    expansion_factors: Sequence[float],
    width: int,
) -> None:
    if n_tokens < 1000:
        raise ValueError(f"n_tokens must be at least 1,000 to count features, got {n_tokens}.")
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ValueError(
            f"Features are told by what repeats: seeds must name 2 random starts at least, better "
            f"3, each once, got {list(seeds)}."
        )
    for name, values, least in (
        ("picks", picks, 1),
        ("expansion_factors", expansion_factors, 4 / width),
    ):
        if not values or list(values) != sorted(set(values)) or values[0] < least:
            raise ValueError(
                f"{name} must be in ascending order, each at least {least:.3g}, got {list(values)}."
            )
