"""`count_features`: how many features a layer holds, from what several random starts agree on."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.stream import ActivationStream
from saefeat.superposition.agreement import Agreement, agreement
from saefeat.superposition.code_densities import code_densities
from saefeat.superposition.feature_count import FeatureCount, Step
from saefeat.superposition.pursuit import fit_pursuit
from saefeat.superposition.sae_counts import count_recipe, sae_counts
from saefeat.superposition.theory import load
from saefeat.training.trainer import train

PICKS = (1, 2, 4, 8, 16, 32)
"""Numbers of picks that are tried in turn, until agreement falls."""
EXPANSION_FACTORS = (4, 8, 16, 32)
"""Atoms per neuron of the widths that are tried in turn, until one is wide enough."""
ROOM = 0.8
"""A width is wide enough if the features fill at most this share of it."""
LAST_WIDTH = 1.5
"""Atoms of the last fits per feature: few, since those to spare are copies, sums and ghosts."""
HELD_OUT_ROWS = 30_000
PROBE_ROWS = 150_000
"""Rows of a fit that only compares settings: an eighth of all, and no fewer than these."""
MARGIN = 0.02
"""Share of a count that its interval allows for what agrees over all starts and is wrong."""
COVERED = 0.9
"""Least coverage of a count: below, what is not found outweighs what is."""
REPEATED = 0.75
"""Least share of the energy of the codes that has to be found again. Copies and codes of noise
keep it below 1."""
HOPELESS = 0.1
"""Agreement below which no longer fit is tried."""


def count_features(
    stream: ActivationStream,
    *,
    n_tokens: int = 2_000_000,
    hook_name: str | None = None,
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
    others left out. What is chosen is chosen by agreement alone, the share of the codes' energy in
    atoms that come back: how many atoms a row may pick (where a row may pick so many that any
    dictionary explains it, nothing repeats), and the width, until the features fill no more than
    0.8 of it. The last fit is as long as asked for, and one of half the length says
    whether the count still rises.

    Few picks are what lets features be found beyond the load at which codes can be: an atom that is
    drawn to a feature averages over all rows that hold it, whatever else is on in them.

    Args:
        stream: Where rows come from. They are read some ten times: cache those of a language
            model first (`cache_activations`).
        n_tokens: Rows that the last dictionaries are fitted on. The rarest feature should be on
            in a thousand of them.
        hook_name: Which hook of the stream; needed if there are several.
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
    hook_name = _checked(stream, n_tokens, hook_name, seeds, picks, expansion_factors)
    if saes and len(stream.hooks) > 1:
        raise ValueError(
            "SAEs would be trained at all hooks of the stream. Make one of this hook alone, "
            f"hooks={hook_name!r}, or pass saes=False."
        )
    held_out = _held_out(stream, hook_name)
    d_in = stream.widths[hook_name]
    n_probe = min(n_tokens, max(n_tokens // 8, PROBE_ROWS))

    def compare(d_sae: int, n_picks: int, n_starts: int, n_rows: int) -> Agreement:
        fits = fit_pursuit(
            stream,
            hook_name,
            held_out,
            d_sae=d_sae,
            picks=n_picks,
            seeds=seeds[:n_starts],
            n_rows=n_rows,
            device=device,
            progress=progress,
        )
        return agreement(fits, picks=n_picks, n_rows=n_rows)

    probes: list[Agreement] = []
    widths: list[Agreement] = []
    for expansion_factor in expansion_factors:
        d_sae = round(expansion_factor * d_in)
        if widths and not _should_grow(widths):
            break
        tried: list[Agreement] = []
        for n_picks in picks:
            tried.append(compare(d_sae, n_picks, 2, n_probe))
            best = max(tried, key=lambda one: one.shared_energy)
            falls = [one.shared_energy / max(best.shared_energy, 1e-9) for one in tried[-2:]]
            if max(falls) < 0.8 or falls[-1] < 0.5:
                break
        probes += tried
        widths.append(best)
    best = max(widths, key=lambda one: one.shared_energy)
    steps = [_step("width", one) for one in probes]
    longer: list[Agreement] = []
    if best.shared_energy >= HOPELESS:
        half = best
        while half is best or half.n_features > ROOM * half.d_sae:
            # Half as many picks again, with which there are fewer sums to leave out, are tried too.
            d_sae = 8 * math.ceil(LAST_WIDTH * half.n_features / 8)
            if d_sae > expansion_factors[-1] * d_in:
                break
            tried = [
                compare(d_sae, n_picks, len(seeds), n_tokens // 2)
                for n_picks in (half.picks, half.picks + math.ceil(half.picks / 2))
            ]
            steps += [_step("half", one) for one in tried]
            half = max(tried, key=lambda one: one.shared_energy)
        whole = compare(half.d_sae, half.picks, len(seeds), n_tokens)
        steps.append(_step("whole", whole))
        longer = [half, whole]
    count = _conclusion(hook_name, held_out, best, longer, tuple(steps), tuple(seeds))
    if not saes:
        return count
    n_features = max(count.estimate, d_in)
    bank = train(
        stream,
        count_recipe(max(1, round(float(count.densities.sum())))),
        expansion_factors=[math.ceil(factor * n_features / d_in) for factor in (2, 4)],
        seeds=seeds,
        n_tokens=n_tokens,
        device=device,
        progress=progress,
    )
    return replace(count, saes=sae_counts(bank, stream, progress=progress))


def _checked(
    stream: ActivationStream,
    n_tokens: int,
    hook_name: str | None,
    seeds: Sequence[int],
    picks: Sequence[int],
    expansion_factors: Sequence[float],
) -> str:
    if hook_name is None:
        if len(stream.hooks) > 1:
            raise ValueError(
                f"The stream has {len(stream.hooks)} hooks, and a count is of one: name it by "
                f"hook_name. It has {', '.join(stream.hooks)}."
            )
        hook_name = stream.hooks[0]
    if hook_name not in stream.hooks:
        raise KeyError(f"The stream has no hook {hook_name!r}; it has {', '.join(stream.hooks)}.")
    if n_tokens < 1000:
        raise ValueError(f"n_tokens must be at least 1,000 to count features, got {n_tokens}.")
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ValueError(
            f"Features are told by what repeats: seeds must name 2 random starts at least, better "
            f"3, each once, got {list(seeds)}."
        )
    for name, values, least in (
        ("picks", picks, 1),
        ("expansion_factors", expansion_factors, 4 / stream.widths[hook_name]),
    ):
        if not values or list(values) != sorted(set(values)) or values[0] < least:
            raise ValueError(
                f"{name} must be in ascending order, each at least {least:.3g}, got {list(values)}."
            )
    return hook_name


def _held_out(stream: ActivationStream, hook_name: str) -> Float[Tensor, "n d_in"]:
    rows = [batch[hook_name].cpu().float() for batch in stream.held_out_batches(HELD_OUT_ROWS)]
    return torch.cat(rows)


def _should_grow(widths: list[Agreement]) -> bool:
    last = widths[-1]
    if last.coverage >= COVERED and last.n_features <= ROOM * last.d_sae:
        return False
    # Two widths more that brought no agreement: a wider dictionary will not either.
    return len(widths) < 3 or last.shared_energy > widths[-3].shared_energy + 0.05


def _step(stage: str, one: Agreement) -> Step:
    return Step(
        stage=stage,
        d_sae=one.d_sae,
        picks=one.picks,
        n_tokens=one.n_rows,
        n_features=one.n_features,
        n_strict=one.n_strict,
        n_combined=one.n_combined,
        shared_energy=one.shared_energy,
        coverage=one.coverage,
        chao2=one.chao2,
        fvu=one.fvu,
    )


def _conclusion(
    hook_name: str,
    held_out: Float[Tensor, "n d_in"],
    best: Agreement,
    longer: list[Agreement],
    steps: tuple[Step, ...],
    seeds: tuple[int, ...],
) -> FeatureCount:
    last = longer[-1] if longer else best
    reasons: list[str] = []
    if last.shared_energy < REPEATED:
        reasons.append(
            f"Only {last.shared_energy:.0%} of the energy of the codes came back after another "
            f"random start ({REPEATED:.0%} is needed)."
        )
    if last.coverage < COVERED:
        reasons.append(
            f"Coverage {last.coverage:.2f} is below {COVERED}: a random start finds much that the "
            "others do not."
        )
    if last.n_features > 0.9 * last.d_sae:
        reasons.append(
            f"{last.n_features} features fill {last.d_sae} atoms: give larger expansion_factors."
        )
    identifiable = not reasons
    densities = code_densities(last.directions, last.offset, held_out, last.picks)
    n_neurons = held_out.shape[1]
    found = float(last.n_features)
    estimate, low, high = found, found, math.inf
    if identifiable:
        estimate, low, high = _interval(longer, reasons)
    return FeatureCount(
        hook_name=hook_name,
        n_neurons=n_neurons,
        estimate=estimate,
        low=low,
        high=high,
        coverage=last.coverage,
        identifiable=identifiable,
        reasons=tuple(reasons),
        load=load(densities, n_neurons) if len(densities) else 0.0,
        n_tokens=last.n_rows,
        seeds=seeds,
        steps=steps,
        directions=last.directions,
        densities=densities,
    )


def _interval(longer: list[Agreement], reasons: list[str]) -> tuple[float, float, float]:
    """Estimate and ends.

    The low end leaves out what only some starts have found or at a cosine below 0.95, the high one
    takes in what none has, as Chao2 has it; both are MARGIN further out. A count that still rises
    has what the last doubling of the rows brought added to its high end.
    """
    half, last = longer
    found = float(last.n_features)
    estimate, low, high = found, min(found, last.n_strict), max(found, last.chao2)
    rise = last.n_features - half.n_features
    if rise > MARGIN * found:
        # If each doubling of the rows brings half of what the last one brought, as much again.
        estimate += min(rise / 2, high - found)
        high = max(high, found + rise)
        reasons.append(
            f"The count still rises ({half.n_features} at half of the rows, {last.n_features} at "
            "all): it is extrapolated, and the interval is wider. Raise n_tokens."
        )
    return estimate, low - MARGIN * found, high + MARGIN * found
