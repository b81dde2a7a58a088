"""`calibrate`: how many features a layer has in which SAEs have found so many.

SAEs find fewer features than there are, and the more so the more crowded the layer is. How many
they miss can be measured where the truth is known: in synthetic layers that are like the layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.synthetic import SyntheticActivations
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.superposition.calibration.calibrated_count import (
    CalibratedCount,
    conclude,
    why_untrusted,
)
from saefeat.superposition.calibration.curve import CurvePoint
from saefeat.superposition.sae_counts import SAECounts, sae_counts
from saefeat.superposition.theory import load
from saefeat.training.bank import Bank
from saefeat.training.trainer import train

LEAST, STEP = 0.8, 1.2
"""The first number of features that is simulated, over the stable count, and each over the last."""
RISEN = 1.3
"""No more are simulated where the count is this multiple of the observed one."""
UNCOVERED = 0.85
"""Nor where the coverage is below this: were the layer like those, it would have been refused."""
MOST_LOAD = 0.75
"""Nor above this load: from 2 load = 1.5 on, nothing is found."""
FEWEST_POINTS = 3
"""But so many at least."""
DENSEST = 0.5
"""Largest density of a simulated feature."""
FAINT = 0.01
"""Share of the variance that is not worth simulating as noise."""
FIRST_SEED = 1_000_003
"""Of the simulated layers: far from those that are written by hand."""
VARIANCE_ROWS = 20_000
"""Rows of a layer that its variance is measured on, by which noise is scaled."""


def calibrate(
    counts: SAECounts,
    bank: Bank,
    *,
    batch_size: int,
    rows: int | None = None,
    l0: float | None = None,
    magnitude: str = "uniform",
    points: int = 8,
    layers: int = 3,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> CalibratedCount:
    """The number of features at which SAEs would count what these have counted.

    Layers of ascending n are simulated, `layers` of each, and dictionaries trained and counted on
    them as the observed ones were: same kind, config, width, seeds, batch and rows. It ends where
    the count has passed the observed one, or the coverage fallen below 0.85. A layer has n random
    directions in d_in dimensions, which are on independently of each other.
    Their densities are the observed ones: the quantiles of `counts.densities`, scaled so that
    their sum is the observed L0 whatever n is (none above 1/2). Noise makes up what the observed
    dictionaries leave beyond what simulated ones leave without noise, so that the FVU is the same.

    The headline is `counts.distinct.n_stable`; see `read_off` for the interpolation and the
    interval. Coverage, e^H and FVU are a check on it: where they do not come out as observed, the
    simulations do not look like the layer and there is no estimate.

    How far to trust it. Of 20 layers of 16 to 28 features in 16 dimensions, one of them on in a row
    and k right, all intervals held the truth, and two counts of 28 features were refused as too
    near the peak of the curve. Past the peak a count says nothing: in 24 dimensions, with two
    features on in a row and 1,500 steps, dictionaries found 46, 46 and 45 of 52, 62 and 75
    (2 load = 0.54 to 0.60). So calibration makes up for the last fifth and no more; more rows move
    the peak. With k twice or half of what is on in a row, the three layers that were tried were
    refused for their coverage; but ghosts come back too, and one had 22 "at least" of 20. What
    dictionaries have not found is given the densities of what they have, so that a tail of rare
    features is missed if it is long: two layers with densities as 1, 1/2, 1/3, ... were refused,
    of one with densities over a range of 30 the interval held. All checks pass for a layer that
    differs in what dictionaries do not see.
    `count_features` needs none of this.

    Cost: each layer takes as long as training the seeds at this hook and width took. With the
    defaults there are 9 at least, 12 to 20 mostly, points (layers + 1) = 32 at most; none if the
    coverage of `counts` is below 0.9, or their FVU not below 1.

    Args:
        counts: Of one hook and width, by `sae_counts`.
        bank: The bank that was counted.
        batch_size: Rows of a batch, as in the training of the bank.
        rows: Rows to train each simulated dictionary on; None for as many as the observed ones
            saw. Fewer cost less and bias the estimate up.
        l0: Features on in a row, if that is known better than by the L0 of the dictionaries,
            which for TopK kinds is only the k that they were given.
        magnitude: Law of how strongly features fire; see `SyntheticActivations`.
        points: Most numbers of features to simulate, each 1.2 times the last; the first is 0.8
            times the stable count.
        layers: Layers to simulate of each, at least 2.
        seed: Decides the simulated layers.
        device: Where to train.
        progress: Whether to draw a progress bar on standard error.

    Returns:
        The estimate with its interval and the curve that it was read off; or that it is beyond
        the detection limit of these dictionaries.

    Raises:
        KeyError: The bank has not what was counted.
        ValueError: An option is out of range, or the dictionaries cannot be trained again on
            synthetic layers: crosscoders, transcoders, seeds of unequal recipes.
    """
    family = [bank[counts.hook_name, counts.expansion_factor, one] for one in counts.seeds]
    config = _recipe(family, counts)
    n_tokens_trained = family[0].origin.n_tokens
    n_tokens = n_tokens_trained if rows is None else rows
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("points", points, 3),
        ("layers", layers, 2),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if n_tokens < batch_size:
        raise ValueError(
            f"Simulated dictionaries need a batch of {batch_size} rows at least, got {n_tokens}. "
            + ("" if rows else "The bank does not say how many it saw: give rows.")
        )
    l0 = fmean(counts.l0) if l0 is None else l0
    if not 0 < l0 < counts.d_in:
        raise ValueError(
            f"l0 must be above 0 and below the width {counts.d_in}, got {l0:.3g}. "
            "Features of which so many are on at once cannot be told apart."
        )
    curve: list[CurvePoint] = []
    n_layers = 0
    if not why_untrusted(counts):
        simulation = Simulation(
            observed=counts,
            config=config,
            l0=l0,
            n_tokens=n_tokens,
            batch_size=batch_size,
            magnitude=magnitude,
            device=device,
        )
        with progress_bar(unit="layer", desc="calibrating", shown=progress) as bar:
            for n_features in simulation.numbers(points):
                bar.set_postfix_str(f"{n_features} features")
                first_seed = FIRST_SEED * (seed + 1) + n_layers
                point, n_simulated = simulation.point(n_features, first_seed, layers, bar.update)
                curve.append(point)
                n_layers += n_simulated
                if len(curve) >= FEWEST_POINTS and _is_enough(point, counts):
                    break
    return conclude(
        counts,
        curve,
        l0=l0,
        n_tokens=n_tokens,
        n_tokens_trained=n_tokens_trained,
        n_layers=n_layers,
    )


def simulated_densities(
    observed: Sequence[float], n_features: int, l0: float
) -> Float[Tensor, " n_features"]:
    """Densities of n features that are distributed as the observed ones, with `l0` for a sum.

    Quantiles of the observed at (i + 1/2) / n, times what makes their sum `l0`, those above
    `DENSEST` cut to it.

    Raises:
        ValueError: `l0` is not above 0, or so many features cannot be that dense.
    """
    if not 0 < l0 <= DENSEST * n_features:
        raise ValueError(
            f"{n_features} features of a density of {DENSEST} at most cannot be on {l0:.3g} at a "
            "time."
        )
    levels = (torch.arange(n_features, dtype=torch.float64) + 0.5) / n_features
    shape = torch.tensor(list(observed), dtype=torch.float64).quantile(levels).flip(0)
    low, high = 0.0, 2 * l0 / float(shape.clamp_min(1e-12).min())
    for _ in range(200):  # bisection: the sum grows with the factor
        middle = (low + high) / 2
        if float((middle * shape).clamp(max=DENSEST).sum()) < l0:
            low = middle
        else:
            high = middle
    return (high * shape).clamp(1e-12, DENSEST)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """Layers like the one that was observed, and the pipeline that counts them."""

    observed: SAECounts
    config: DictionaryConfig
    l0: float
    n_tokens: int
    batch_size: int
    magnitude: str
    device: str | torch.device

    def numbers(self, points: int) -> list[int]:
        """The numbers of features to simulate, ascending."""
        least = 2 * self.l0 / DENSEST
        first = max(LEAST * self.observed.distinct.n_stable, least, 4)
        numbers = sorted({round(first * STEP**number) for number in range(points)})
        few = numbers[:FEWEST_POINTS]
        return few + [n for n in numbers[len(few) :] if self._load(n) <= MOST_LOAD]

    def point(
        self, n_features: int, first_seed: int, layers: int, after_layer: Callable[[], object]
    ) -> tuple[CurvePoint, int]:
        """Simulate the layers of one n, with as much noise as the first lacks in FVU.

        Returns:
            What they gave, and how many were simulated.
        """
        seeds = range(first_seed, first_seed + layers)
        wanted = fmean(self.observed.fvu)
        clean = self._count(n_features, seeds[0], 0.0)
        after_layer()
        left = fmean(clean.fvu)
        noise_share = max(0.0, (wanted - left) / (1 - left)) if left < 1 else 0.0
        if noise_share < FAINT:
            noise_share = 0.0
        counted = [] if noise_share else [clean]
        for seed in seeds[len(counted) :]:
            counted.append(self._count(n_features, seed, noise_share))
            after_layer()
        point = CurvePoint(
            n_features=n_features,
            load=self._load(n_features),
            noise_share=noise_share,
            stable=tuple(one.distinct.n_stable for one in counted),
            coverage=tuple(one.distinct.coverage or 0.0 for one in counted),
            effective=tuple(fmean(one.effective) for one in counted),
            fvu=tuple(fmean(one.fvu) for one in counted),
        )
        return point, layers + (noise_share > 0)

    def _densities(self, n_features: int) -> Float[Tensor, " n_features"]:
        return simulated_densities(self.observed.densities, n_features, self.l0)

    def _load(self, n_features: int) -> float:
        return load(self._densities(n_features), self.observed.d_in)

    def _count(self, n_features: int, seed: int, noise_share: float) -> SAECounts:
        """Train and count on one layer as the observed dictionaries were."""
        layer = partial(
            SyntheticActivations,
            n_features=n_features,
            d_in=self.observed.d_in,
            density=self._densities(n_features),
            magnitude=self.magnitude,
            seed=seed,
        )
        noise = 0.0
        if noise_share:
            variance = float(layer().sample(VARIANCE_ROWS)[0].var(0).mean())
            noise = math.sqrt(variance * noise_share / (1 - noise_share))
        stream = layer(noise=noise).stream(
            batch_size=self.batch_size, held_out_rows=max(2, self.observed.n_tokens)
        )
        bank = train(
            stream,
            self.config,
            expansion_factors=[self.observed.expansion_factor],
            seeds=self.observed.seeds,
            n_tokens=self.n_tokens,
            device=self.device,
            progress=False,
        )
        (counts,) = sae_counts(
            bank,
            stream,
            n_tokens=self.observed.n_tokens,
            cosine=self.observed.cosine,
            cost_share=self.observed.cost_share,
            progress=False,
        )
        return counts


def _is_enough(point: CurvePoint, counts: SAECounts) -> bool:
    """Whether layers of more features need not be simulated."""
    has_risen = fmean(point.stable) >= RISEN * counts.distinct.n_stable
    return has_risen or fmean(point.coverage) < UNCOVERED


def _recipe(family: Sequence[Dictionary], counts: SAECounts) -> DictionaryConfig:
    """The config of dictionaries that can be trained again on synthetic layers."""
    first = family[0]
    where = f"{counts.hook_name!r}, expansion factor {counts.expansion_factor:g}"
    if first.is_transcoder or first.reads_several_hooks:
        raise ValueError(
            f"The dictionaries at {where} do not reconstruct what they read at one hook: layers "
            "are simulated one at a time, so that only SAEs of one hook can be calibrated."
        )
    if (first.d_in, first.d_sae) != (counts.d_in, counts.d_sae):
        raise ValueError(
            f"The bank has {first.d_sae} latents of width {first.d_in} at {where}, and "
            f"{counts.d_sae} of width {counts.d_in} were counted. Give the bank that was counted."
        )
    recipes = {(one.config, one.origin.n_tokens) for one in family}
    if len(recipes) > 1:
        raise ValueError(
            f"The seeds at {where} were trained by {len(recipes)} recipes or for unequal numbers "
            "of rows. Only seeds that differ in nothing else can be simulated."
        )
    return first.config
