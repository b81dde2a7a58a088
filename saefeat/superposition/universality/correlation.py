"""Pearson correlations between the latents of two dictionaries on the same rows.

Shape letters: n rows, a and b latents of the two dictionaries, m pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from saefeat.kernels.compiled_correlation import large_products
from saefeat.superposition.assignment import EXACT_UP_TO, Assignment, assign_pairs
from saefeat.superposition.universality.latent_rows import Centred

ABOVE = 0.5
"""Correlation from which a latent counts as found in the other dictionary."""
LEAST = 0.1
"""Correlation from which two latents may be paired."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlations:
    """Which latents of two dictionaries go together, and how far."""

    pairs: Assignment
    """The one-to-one assignment of latents with the largest sum of correlations."""
    largest_a: Float[Tensor, " a"]
    """The largest correlation of each latent of the first dictionary with any of the second; 0 if
    none is above 0, nan if the latent is not counted."""
    largest_b: Float[Tensor, " b"]
    """And of each of the second with any of the first."""
    n_counted: tuple[int, int]
    """Latents that are counted, of each."""

    @property
    def n_pairs(self) -> int:
        """Pairs that could be made: the counted latents of the dictionary with fewer."""
        return min(self.n_counted)

    @property
    def mean(self) -> float:
        """Mean correlation of `n_pairs` pairs, those that were not made at 0."""
        return float(self.pairs.weights.sum()) / max(1, self.n_pairs)

    def share_above(self, correlation: float = ABOVE) -> float:
        """Share of `n_pairs` that are pairs with a correlation above this."""
        return int((self.pairs.weights > correlation).sum()) / max(1, self.n_pairs)

    @property
    def mppc(self) -> tuple[float, float]:
        """Mean max pairwise Pearson correlation (Wang et al. 2024, arXiv:2410.06672), both ways.

        The mean over the counted latents of one dictionary of the largest correlation with any of
        the other's. Several may share a partner, so it is no lower than the mean of an assignment.
        """
        counted = [one[~one.isnan()] for one in (self.largest_a, self.largest_b)]
        means = [float(one.mean()) if len(one) else 0.0 for one in counted]
        return means[0], means[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrelatedPairs:
    """All pairs of latents from some correlation on, and the largest correlation of each latent."""

    left: Int[Tensor, " m"]
    right: Int[Tensor, " m"]
    correlations: Float[Tensor, " m"]
    largest_a: Float[Tensor, " a"]
    """See `Correlations`."""
    largest_b: Float[Tensor, " b"]


def correlated_pairs(a: Centred, b: Centred, *, least: float = LEAST) -> CorrelatedPairs:
    """Correlate all latents of two dictionaries, and keep what is large.

    All correlations are exact: a sparse product of the codes gives sum_t f_i g_j for each pair that
    is ever on together, one latent i at a time, so that no table of pairs or of rows is held.
    A pair that never is has a covariance of -mean_i mean_j, at most 0, and is no pair. Where token
    means are taken off, the largest correlation of a latent is told from `least` on, and else 0.

    Args:
        a: Codes of the first dictionary.
        b: Those of the second on the same rows, centred in the same way.
        least: Pairs with at least this correlation, above 0, are kept.

    Raises:
        ValueError: The rows differ in number, or `least` is out of range.
    """
    if not 0 < least <= 1:
        raise ValueError(
            f"least must be above 0 and at most 1, got {least}: it is the least correlation "
            "between latents that are paired."
        )
    n_rows = a.matrix.shape[0], b.matrix.shape[0]
    if n_rows[0] != n_rows[1] or (a.token_sums is None) != (b.token_sums is None):
        raise ValueError(
            f"Latents are correlated over the same rows, got {n_rows[0]} and {n_rows[1]} rows. "
            "Encode the same tokens with both, and regress tokens out of both or of neither."
        )
    taken_off = None
    if a.token_sums is not None and b.token_sums is not None:
        taken_off = _arrays(a.token_sums.T.tocsr()), _arrays(b.token_sums.T.tocsr())
    (left, right, products), largest_a, largest_b = large_products(
        _arrays(a.matrix.T.tocsr()),
        _arrays(b.matrix),
        (a.offsets, b.offsets),
        (a.scales, b.scales),
        least,
        taken_off,
    )
    return CorrelatedPairs(
        left=torch.from_numpy(left).long(),
        right=torch.from_numpy(right).long(),
        correlations=torch.from_numpy(products).clamp_(max=1),
        largest_a=_counted(largest_a, a),
        largest_b=_counted(largest_b, b),
    )


def correlate(
    a: Centred, b: Centred, *, least: float = LEAST, exact_up_to: int | None = EXACT_UP_TO
) -> Correlations:
    """Correlate all latents of two dictionaries, and assign them one to one.

    Args:
        a: Codes of the first dictionary.
        b: Those of the second on the same rows, centred in the same way.
        least: Pairs with at least this correlation, above 0, are assigned.
        exact_up_to: See `assign_pairs`.

    Raises:
        ValueError: As for `correlated_pairs`.
    """
    found = correlated_pairs(a, b, least=least)
    pairs = assign_pairs(
        found.left,
        found.right,
        found.correlations,
        len(a.scales),
        len(b.scales),
        exact_up_to=exact_up_to,
    )
    return Correlations(
        pairs=pairs,
        largest_a=found.largest_a,
        largest_b=found.largest_b,
        n_counted=(a.n_counted, b.n_counted),
    )


def _arrays(matrix: csr_array) -> tuple[Any, Any, Any]:
    return matrix.indptr, matrix.indices, matrix.data


def _counted(largest: Float[np.ndarray, " w"], of: Centred) -> Float[Tensor, " w"]:
    return torch.from_numpy(np.where(of.scales > 0, largest.clip(max=1), np.nan))
