"""What dictionaries from several random starts have found alike, and are therefore features.

An atom that stands for nothing in the data (one that fits a chance mixture of features, or a
residual) lies elsewhere after another random start. So what comes back is counted, once copies
of one feature within a dictionary are merged and sums of two are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.superposition.diagnostics.composition import nearest_sums
from saefeat.superposition.estimators import chao2, good_turing_coverage
from saefeat.superposition.matching import features_over_seeds, merge_duplicates
from saefeat.superposition.pursuit import Fit

DUPLICATE = 0.85
"""Cosine from which two atoms of one dictionary are one feature learned twice."""
SAME = 0.9
"""Cosine from which atoms of two dictionaries are one feature."""
SUM = 0.95
"""Cosine from which an atom is the sum of two others."""
SUM_CANDIDATES = 24
"""Parts of a sum are sought among so many of the nearest directions."""
WEAK = 0.5
"""What one dictionary alone has found is held against the count if it carries at least this share
of the energy that the weakest twentieth of the counted features carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What the dictionaries of one width and number of picks share."""

    d_sae: int
    picks: int
    n_rows: int
    """Rows that each was fitted on."""
    directions: Float[Tensor, "n_features d_in"]
    """The features that two dictionaries at least have found, sums of two left out."""
    energy: Float[Tensor, " n_features"]
    """Mean square of a feature's code."""
    offset: Float[Tensor, " d_in"]
    """What codes are not to explain: mean over the dictionaries."""
    found_in: Int[Tensor, " n_contenders"]
    """In how many dictionaries each feature was found, with those that one alone has found and
    that are strong enough to be features."""
    n_seeds: int
    n_strict: int
    """Features that all dictionaries have found, at a cosine of 0.95."""
    n_sums: int
    """What was left out as the sum of two features."""
    shared_energy: float
    """Share of the energy of all codes that is in what two dictionaries at least have found."""
    fvu: float
    """Mean over the dictionaries."""
    l0: float

    @property
    def n_features(self) -> int:
        return len(self.directions)

    @property
    def coverage(self) -> float:
        """See `good_turing_coverage`; 0 where nothing was found."""
        if len(self.found_in) == 0:
            return 0.0
        return good_turing_coverage(self.found_in, self.n_seeds)

    @property
    def chao2(self) -> float:
        """See `estimators.chao2`."""
        return chao2(self.found_in, self.n_seeds)


def agreement(fits: Sequence[Fit], *, picks: int, n_rows: int) -> Agreement:
    """Compare dictionaries that were fitted from different random starts.

    Raises:
        ValueError: There are fewer than 2.
    """
    if len(fits) < 2:
        raise ValueError(f"Agreement needs at least 2 random starts, better 3, got {len(fits)}.")
    atoms, energies = zip(*(_distinct(fit) for fit in fits), strict=True)
    features = features_over_seeds(atoms, cosine=SAME)
    groups, energy = torch.cat(list(features.groups)), torch.cat(energies)
    of_group = torch.zeros(features.n_observed).index_add_(
        0, groups.clamp_min(0), torch.where(groups >= 0, energy, 0.0)
    )
    of_group /= features.found_in
    shared = features.found_in >= 2
    whole = of_group * features.found_in
    is_sum = torch.zeros_like(shared)
    is_sum[shared] = sums_of_two(features.directions[shared], of_group[shared])
    counted = shared & ~is_sum
    strict = features_over_seeds(atoms, cosine=0.95)
    return Agreement(
        d_sae=len(fits[0].atoms),
        picks=picks,
        n_rows=n_rows,
        directions=features.directions[counted],
        energy=of_group[counted],
        offset=torch.stack([fit.offset for fit in fits]).mean(0),
        found_in=features.found_in[
            counted | _contenders(features.directions, of_group, counted, shared)
        ],
        n_seeds=len(fits),
        n_strict=int((strict.found_in == len(fits)).sum()),
        n_sums=int(is_sum.sum()),
        shared_energy=float(whole[shared].sum() / whole.sum().clamp_min(1e-30)),
        fvu=sum(fit.fvu for fit in fits) / len(fits),
        l0=sum(fit.l0 for fit in fits) / len(fits),
    )


def sums_of_two(
    directions: Float[Tensor, "n d_in"], energy: Float[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Which directions are sums of two others, both with positive weights.

    The weakest are tried first, against those that are still in: a feature that is on with many
    others is near the sum of two of their sums, and must not be taken for one.
    """
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    suspects = _is_sum(unit, unit).nonzero()[:, 0]
    is_sum = torch.zeros(len(unit), dtype=torch.bool)
    for suspect in suspects[energy[suspects].argsort()].tolist():
        is_sum[suspect] = bool(_is_sum(unit[suspect : suspect + 1], unit[~is_sum]))
    return is_sum


def _is_sum(
    queries: Float[Tensor, "n_queries d_in"], parts: Float[Tensor, "n_parts d_in"]
) -> Bool[Tensor, " n_queries"]:
    cosines, _, _ = nearest_sums(
        queries, parts, same=DUPLICATE, least_weight=0.1, candidates=SUM_CANDIDATES
    )
    return cosines > SUM


def _distinct(fit: Fit) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Atoms and their energy, that of duplicates at one of them and the others 0."""
    used = fit.atoms * (fit.energy > 0)[:, None]
    stands_for = merge_duplicates(used, DUPLICATE, weights=fit.energy)
    numbers = torch.arange(len(used))
    known = stands_for >= 0
    energy = torch.zeros_like(fit.energy).index_add_(0, stands_for[known], fit.energy[known])
    return torch.where((stands_for == numbers)[:, None], used, 0.0), energy


def _contenders(
    directions: Float[Tensor, "n d_in"],
    energy: Float[Tensor, " n"],
    counted: Bool[Tensor, " n"],
    shared: Bool[Tensor, " n"],
) -> Bool[Tensor, " n"]:
    """What one dictionary alone has found and may be a feature, going by its energy."""
    if not counted.any():
        return ~shared
    least = WEAK * energy[counted].quantile(0.05)
    alone = ~shared & (energy >= least)
    ours, theirs = directions[alone].double(), directions[counted].double()
    # A poor copy of what is counted is no feature of its own, nor is a sum.
    own = ((ours @ theirs.T).amax(1) < DUPLICATE) & ~_is_sum(ours, theirs)
    contenders = torch.zeros_like(shared)
    contenders[alone] = own
    return contenders
