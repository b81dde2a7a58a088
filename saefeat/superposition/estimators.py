"""How many features several seeds of one dictionary add up to, counted in every usual way.

Raw counts mislead in both directions, so none of these is given alone: alive latents grow with
k and width, stable latents miss what training has not found yet, and the estimate of what is
unseen is worth as much as its coverage.

Shape letters used in this file: d width of the activations, n_groups features found in any seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.superposition.matching import features_over_seeds

LEAST_COVERAGE = 0.9
"""`good_turing_coverage` below which what was not found outweighs what was: there is a lower bound
then, and no count."""


def costly_latents(
    ablation_costs: Float[Tensor, " d_sae"], share: float = 0.1
) -> Bool[Tensor, " d_sae"]:
    """Latents whose removal costs at least `share` of what the median latent's removal costs.

    The median is over latents with a cost above 0. Of 181 alive latents that a TopK dictionary
    had learned of 128 planted features of equal density, 127 were features, and the 54 others cost
    a hundredth of what those cost: the default cuts in the middle of that gap. Where densities are
    unequal the costs form a continuum, so that the count depends on `share`, and where most
    alive latents are ghosts the median is one of theirs.

    Args:
        ablation_costs: See `metrics.ablation_costs`.
        share: Least cost, as a share of the median.

    Raises:
        ValueError: A cost is not finite, or `share` is not positive.
    """
    if not ablation_costs.isfinite().all() or share <= 0:
        raise ValueError(
            f"Ablation costs must be finite and their least share positive, got share={share} and "
            f"{int((~ablation_costs.isfinite()).sum())} costs that are not finite."
        )
    useful = ablation_costs > 0
    if not useful.any():
        return useful
    return useful & (ablation_costs >= share * ablation_costs[useful].median())


def chao2(found_in: Int[Tensor, " n_groups"], n_seeds: int) -> float:
    """Lower bound on the number of features, those that no seed found included.

        S_obs + (R - 1) / R * Q_1 (Q_1 - 1) / (2 (Q_2 + 1))

    with R seeds and Q_j features found in exactly j of them: Chao 1987 ("Estimating the population
    size for capture-recapture data with unequal catchability"), in the bias-corrected form of
    Chao and Colwell 2017 (SORT 41). In expectation it is the number of features if a seed finds
    each with the same probability, and below it if some are harder to find than others; above
    it only if what the seeds found is not features, as where a dictionary tiles the space.

    Raises:
        ValueError: There are fewer than 2 seeds, or a feature was found in none or too many.
    """
    observed, once, twice = _frequencies(found_in, n_seeds)
    return observed + _unseen(n_seeds, once, twice)


def chao2_interval(
    found_in: Int[Tensor, " n_groups"], n_seeds: int, z: float = 1.96
) -> tuple[float, float]:
    """Interval of `chao2` for what it bounds; of 95 % by default.

        (S_obs + T / K, S_obs + T K),    T = chao2 - S_obs,    K = exp(z sqrt(ln(1 + var / T^2)))

    since ln T is nearly normal (Chao 1987, sec. 3), with the delta method's variance of T,

        var = A u + A^2 Q_1 (2 Q_1 - 1)^2 / (4 (Q_2 + 1)^2)
                  + A^2 Q_1^2 (Q_1 - 1)^2 Q_2 / (4 (Q_2 + 1)^4),

    A = (R - 1) / R and u = Q_1 (Q_1 - 1) / (2 (Q_2 + 1)). It says nothing of the features that
    are harder to find than those that were found. A point where T is 0.

    Raises:
        ValueError: As for `chao2`.
    """
    observed, once, twice = _frequencies(found_in, n_seeds)
    unseen = _unseen(n_seeds, once, twice)
    if unseen == 0:
        return float(observed), float(observed)
    share = (n_seeds - 1) / n_seeds
    variance = (
        unseen
        + once * (share * (2 * once - 1) / (2 * (twice + 1))) ** 2
        + twice * (share * once * (once - 1) / (2 * (twice + 1) ** 2)) ** 2
    )
    factor = exp(z * sqrt(log(1 + variance / unseen**2)))
    return observed + unseen / factor, observed + unseen * factor


def good_turing_coverage(found_in: Int[Tensor, " n_groups"], n_seeds: int) -> float:
    """Share of what a seed finds that the other seeds have found too.

        C = 1 - Q_1 / sum_j j Q_j

    (Good 1953; for incidence data Chao and Jost 2012, without their last-order term.) Its
    expectation is that of the share of one seed's features that R - 1 others hold, so it is a
    little below the coverage of all R. Low where dictionaries share nothing, whatever the
    variance they explain: see `LEAST_COVERAGE`.

    Raises:
        ValueError: There are fewer than 2 seeds, nothing was found, or a feature was found in
            none or too many.
    """
    observed, once, _ = _frequencies(found_in, n_seeds)
    if observed == 0:
        raise ValueError("Coverage is undefined: no seed found anything. Are all latents dead?")
    return 1 - once / int(found_in.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedCounts:
    """What the latents of several seeds add up to."""

    per_seed: tuple[int, ...]
    """How many latents each seed brought."""
    n_observed: int
    """Features found in any seed."""
    n_stable: int
    """Features found in two seeds at least."""
    chao2: float
    """Estimate that includes those found in none; see `chao2`."""
    chao2_low: float
    chao2_high: float
    """Its interval of 95 %."""
    coverage: float | None
    """Good-Turing coverage; None where nothing was found."""

    @classmethod
    def of(
        cls,
        decoders: Sequence[Float[Tensor, "_ d"]],
        counted: Sequence[Bool[Tensor, " _"]],
        *,
        cosine: float = 0.8,
    ) -> "SeedCounts":
        """Count the latents of `decoders` that are `counted`; see `features_over_seeds`.

        Raises:
            ValueError: There are fewer than 2 seeds, or as for `features_over_seeds`.
        """
        rows = [one.detach() * kept[:, None] for one, kept in zip(decoders, counted, strict=True)]
        features = features_over_seeds(rows, cosine=cosine)
        found_in, n_seeds = features.found_in, features.n_seeds
        low, high = chao2_interval(found_in, n_seeds)
        return cls(
            per_seed=tuple(int(kept.sum()) for kept in counted),
            n_observed=features.n_observed,
            n_stable=features.n_stable,
            chao2=chao2(found_in, n_seeds),
            chao2_low=low,
            chao2_high=high,
            coverage=good_turing_coverage(found_in, n_seeds) if len(found_in) else None,
        )


def _frequencies(found_in: Int[Tensor, " n_groups"], n_seeds: int) -> tuple[int, int, int]:
    """`(S_obs, Q_1, Q_2)`."""
    if n_seeds < 2:
        raise ValueError(
            f"What repeats over seeds cannot be told from {n_seeds}; train at least 2, better 3: "
            "seeds=[0, 1, 2]."
        )
    if len(found_in) and not (int(found_in.min()) >= 1 and int(found_in.max()) <= n_seeds):
        raise ValueError(
            f"Features must be found in 1 to {n_seeds} seeds, got {int(found_in.min())} to "
            f"{int(found_in.max())}. Leave out those that were found in none."
        )
    return len(found_in), int((found_in == 1).sum()), int((found_in == 2).sum())


def _unseen(n_seeds: int, once: int, twice: int) -> float:
    return (n_seeds - 1) / n_seeds * once * (once - 1) / (2 * (twice + 1))
