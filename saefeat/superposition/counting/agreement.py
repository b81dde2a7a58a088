"""What dictionaries from several random starts have found alike, and are therefore features.

An atom that stands for nothing in the data (one that fits a chance mixture of features, or a
residual) lies elsewhere after another random start. So what comes back is counted, once copies
of one feature within a dictionary are merged and combinations of others left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv
from torch import Tensor

from saefeat.superposition.counting.pursuit import Fit
from saefeat.superposition.estimators import chao2, good_turing_coverage
from saefeat.superposition.matching import features_over_seeds, merge_duplicates

DUPLICATE = 0.85
"""Cosine from which two atoms of one dictionary are one feature learned twice."""
SAME = 0.9
"""Cosine from which atoms of two dictionaries are one feature."""
STRICT = 0.95
"""The same, where doubt counts against a feature."""
COMBINED = 0.95
"""Cosine from which an atom is a combination of others; higher where chance reaches this."""
BY_CHANCE = 0.1
"""Most combinations that are expected by chance among as many random directions."""
PARTS = 3
"""Of a combination."""
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
    """The features that two dictionaries at least have found, combinations left out."""
    offset: Float[Tensor, " d_in"]
    """What codes are not to explain."""
    found_in: Int[Tensor, " n_contenders"]
    """In how many dictionaries each feature was found, with those that one alone has found and
    that are strong enough to be features."""
    n_seeds: int
    n_strict: int
    """Features that all dictionaries have found, at a cosine of 0.95."""
    n_combined: int
    """What was left out as a combination of other features."""
    shared_energy: float
    """Share of the energy of all codes that is in what two dictionaries at least have found."""
    fvu: float
    """Mean over the dictionaries."""

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
    whole = torch.zeros(features.n_observed).index_add_(
        0, groups.clamp_min(0), torch.where(groups >= 0, energy, 0.0)
    )
    of_group = whole / features.found_in
    shared = features.found_in >= 2
    is_combined = torch.zeros_like(shared)
    is_combined[shared] = combinations(features.directions[shared], of_group[shared])
    counted = shared & ~is_combined
    contenders = counted | _contenders(features.directions, of_group, counted, shared)
    strict = features_over_seeds(atoms, cosine=STRICT)
    found_by_all = strict.directions[strict.found_in == len(fits)]
    return Agreement(
        d_sae=len(fits[0].atoms),
        picks=picks,
        n_rows=n_rows,
        directions=features.directions[counted],
        offset=fits[0].offset,
        found_in=features.found_in[contenders],
        n_seeds=len(fits),
        n_strict=_n_near(features.directions[counted], found_by_all),
        n_combined=int(is_combined.sum()),
        shared_energy=float(whole[shared].sum() / whole.sum().clamp_min(1e-30)),
        fvu=sum(fit.fvu for fit in fits) / len(fits),
    )


def combinations(
    directions: Float[Tensor, "n d_in"], energy: Float[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Which directions are combinations of three others at most, with weights of either sign.

    Of features A and B that are on together a dictionary may learn A + B besides, and of a feature
    P with children C and D that never come without it P, P + C, P + D and P + C + D, which are one
    too many: any three of these give the fourth. The weakest are tried first, against those
    that are still in, since a feature that is on with many others is near a combination of its own
    sums, and must not be taken for one.
    """
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    suspects = _are_combinations(unit, unit, torch.arange(len(unit))).nonzero()[:, 0]
    kept = torch.ones(len(unit), dtype=torch.bool)
    for suspect in suspects[energy[suspects].argsort()].tolist():
        kept[suspect] = False
        one = unit[suspect : suspect + 1]
        kept[suspect] = not bool(_are_combinations(one, unit[kept]))
    return ~kept


def _are_combinations(
    queries: Float[Tensor, "m d_in"],
    parts: Float[Tensor, "n d_in"],
    own: Int[Tensor, " m"] | None = None,
) -> Bool[Tensor, " m"]:
    """Which queries three parts at most, picked greedily, explain but for `_unexplained`.

    `own` is where each query is among the parts: it does not explain itself.
    """
    most = _unexplained(len(parts), parts.shape[1])
    if most == 0:
        return torch.zeros(len(queries), dtype=torch.bool)
    found = []
    for start in range(0, len(queries), 1024):
        rows = queries[start : start + 1024]
        residual, picked = rows, torch.empty(len(rows), 0, dtype=torch.int64)
        for _ in range(PARTS):
            near = (residual @ parts.T).abs()
            if own is not None:
                near.scatter_(1, own[start : start + 1024, None], -1.0)
            near.scatter_(1, picked, -1.0)
            picked = torch.cat([picked, near.argmax(1, keepdim=True)], 1)
            chosen = parts[picked].mT
            weights = torch.linalg.lstsq(chosen, rows[:, :, None]).solution
            residual = rows - (chosen @ weights).squeeze(2)
        found.append(residual.square().sum(1) < most)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


def _unexplained(n_parts: int, d_in: int) -> float:
    """Squared length below which what is left of a direction makes it a combination.

    Three directions leave of a random one in d dimensions a share of the Beta((d - 3) / 2, 3 / 2)
    distribution, and there are n (n - 1) (n - 2) / 6 threes among n: from d = 32 on they never
    come near by chance, in 8 dimensions they do.
    """
    if n_parts < PARTS or d_in <= PARTS:
        return 0.0
    share = min(1, BY_CHANCE / (n_parts * comb(n_parts, PARTS)))
    by_chance = betaincinv((d_in - PARTS) / 2, PARTS / 2, share)
    return float(min(1 - COMBINED**2, by_chance))


def _distinct(fit: Fit) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Atoms and their energy, that of duplicates at one of them and the others 0.

    An atom that takes the offset back is left out: rows on which little is on have it, where the
    features' own mean is part of the offset.
    """
    takes_back = fit.atoms @ torch.nn.functional.normalize(-fit.offset, dim=0) >= DUPLICATE
    used = fit.atoms * ((fit.energy > 0) & ~takes_back)[:, None]
    stands_for = merge_duplicates(used, DUPLICATE, weights=fit.energy)
    numbers = torch.arange(len(used))
    known = stands_for >= 0
    energy = torch.zeros_like(fit.energy).index_add_(0, stands_for[known], fit.energy[known])
    return torch.where((stands_for == numbers)[:, None], used, 0.0), energy


def _n_near(directions: Float[Tensor, "n d_in"], others: Float[Tensor, "m d_in"]) -> int:
    """How many of the directions are among the others."""
    if len(others) == 0:
        return 0
    return int(((directions @ others.T).amax(1) >= STRICT).sum())


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
    own = ((ours @ theirs.T).amax(1) < DUPLICATE) & ~_are_combinations(ours, theirs)
    contenders = torch.zeros_like(shared)
    contenders[alone] = own
    return contenders
