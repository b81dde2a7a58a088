"""How alike two dictionaries are as sets of directions.

Shape letters: k matched pairs of latents, w rows of a dictionary, d and e widths.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import quad
from scipy.special import betainc
from scipy.stats import rankdata
from torch import Tensor

from saefeat.superposition.directions import unit_rows

ROWS_AT_ONCE = 1024
MOST_COMPARED = 2048
"""Pairs of latents whose table of similarities is ranked, drawn at random among more."""


def mmcs(a: Float[Tensor, "_ d"], b: Float[Tensor, "_ e"]) -> float:
    """Mean over the rows of `a` of the largest cosine with a row of `b`.

    The mean max cosine similarity of Sharkey et al. 2022 ("Taking features out of superposition
    with sparse autoencoders"). Rows of norm 0 are left out, of both. It grows with the rows of
    `b` and falls with the width: read it against `mmcs_null`.

    Raises:
        ValueError: Widths differ, a number is not finite, or all rows of one are 0.
    """
    unit_a, unit_b = unit_rows(a).float(), unit_rows(b).float()
    unit_a, unit_b = unit_a[unit_a.any(1)], unit_b[unit_b.any(1)]
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Cosines are between directions of one space, got widths {a.shape[1]} and "
            f"{b.shape[1]}. Compare models of two widths by correlations, SVCCA and RSA."
        )
    if len(unit_a) == 0 or len(unit_b) == 0:
        raise ValueError("The largest cosine is undefined: all rows of a dictionary are 0.")
    largest = [(part @ unit_b.T).amax(1) for part in unit_a.split(ROWS_AT_ONCE)]
    return float(torch.cat(largest).double().mean().clamp(max=1))


def mmcs_null(d: int, w: int) -> float:
    """What `mmcs` is, on average, between unrelated directions: `w` rows of width `d`.

    The cosine of a vector with a direction drawn evenly from the sphere has the distribution
    function F(x) = 1 - I(1 - x^2; (d-1)/2, 1/2) / 2 for x >= 0 and 1 - F(-x) below, with the
    regularised incomplete beta function I; so that the mean of the largest of w is

        1 - integral from -1 to 1 of F(x)^w dx,

    which is about sqrt(2 ln w / d) where that is small. With w = 16,384 it is 0.174 at d = 512
    (the square root says 0.195), and 0.81 at d = 16 (1.10). Rows that fill some directions more
    than others are nearer than this: `mmcs_null_like` draws them with the covariance of the rows.

    Raises:
        ValueError: `d` is below 2, or `w` below 1.
    """
    if d < 2 or w < 1:
        raise ValueError(f"Directions need a width of at least 2 and one row, got d={d}, w={w}.")

    def all_below(x: float) -> float:
        tail = float(betainc((d - 1) / 2, 0.5, 1 - x * x)) / 2
        return float((1 - tail if x >= 0 else tail) ** w)

    # The power rises from 0 to 1 within some standard deviations of the largest.
    middle = min(0.999, math.sqrt(2 * math.log(w) / d)) if w > 1 else 0.0
    area: float = quad(all_below, -1, 1, points=[0.0, middle / 2, middle], limit=400)[0]
    return 1 - area


def mmcs_null_like(
    a: Float[Tensor, "w d"], b: Float[Tensor, "_ d"], *, n_draws: int = 2048, seed: int = 0
) -> float:
    """What `mmcs` is between unrelated directions with the second moments of these.

    `n_draws` directions of normal vectors with the second-moment matrix of the unit rows of `a`,
    against as many as `b` has rows, drawn with that of `b`. Bringing them to length 1 evens them
    out a little: where 4 of 64 coordinates are ten times the others it gives 0.80, not 0.85.

    Raises:
        ValueError: As for `mmcs`.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: Tensor, n: int) -> Tensor:
        unit = unit_rows(rows)
        unit = unit[unit.any(1)]
        strength, axes = torch.linalg.eigh(unit.T @ unit)
        noise = torch.randn(n, len(axes), generator=generator, dtype=unit.dtype)
        directions: Tensor = noise * strength.clamp(min=0).sqrt() @ axes.T
        return directions

    n_b = int(b.any(1).sum())
    return mmcs(drawn(a, n_draws), drawn(b, n_b))


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """How alike two sets of matched directions are, beside what chance pairs of them would be."""

    value: float
    null: float
    """Mean over pairings at random."""
    p_value: float
    """Share of pairings at random that are as alike, these counted among them."""
    n_pairs: int
    """Pairs that it was measured on."""


def svcca(x: Float[Tensor, "k d"], y: Float[Tensor, "_ e"], *, variance: float = 0.99) -> float:
    """Mean canonical correlation of two sets of matched rows (Raghu et al. 2017, SVCCA).

    Both are centred and brought to the principal axes that hold `variance` of their variance, and
    the canonical correlations are the singular values of the product of their whitened rows. 1
    where one is a rotation of the other; but also where k is no larger than the number of axes,
    whatever the rows. So it needs many more pairs than axes, or a null beside it (`matched_svcca`).

    Raises:
        ValueError: Rows are not matched, fewer than 3, or all alike; or `variance` is no share.
    """
    left, right = (_whitened(one, variance) for one in _matched(x, y))
    return float(torch.linalg.svdvals(left.T @ right).clamp(max=1).mean())


def rsa(x: Float[Tensor, "k d"], y: Float[Tensor, "_ e"]) -> float:
    """Spearman correlation of the cosines within one set of rows and those within the other.

    Representational similarity analysis (Kriegeskorte et al. 2008), on cosines. 1 where one is a
    rotation of the other, about 0 where rows are not related.

    Raises:
        ValueError: Rows are not matched, or fewer than 3.
    """
    left, right = (_cosine_ranks(one) for one in _matched(x, y))
    return _rank_correlation(left, right)


def matched_svcca(
    x: Float[Tensor, "k d"],
    y: Float[Tensor, "_ e"],
    *,
    variance: float = 0.99,
    n_permutations: int = 20,
    seed: int = 0,
) -> Similarity:
    """`svcca` beside its value for pairings at random."""
    left, right = (_whitened(one, variance) for one in _matched(x, y))

    def value(order: Tensor) -> float:
        return float(torch.linalg.svdvals(left.T @ right[order]).clamp(max=1).mean())

    return _against_chance(value, len(left), n_permutations, seed)


def matched_rsa(
    x: Float[Tensor, "k d"],
    y: Float[Tensor, "_ e"],
    *,
    n_permutations: int = 20,
    seed: int = 0,
) -> Similarity:
    """`rsa` beside its value for pairings at random, on at most 2,048 pairs drawn at random."""
    x, y = _matched(x, y)
    if len(x) > MOST_COMPARED:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(x), generator=generator)[:MOST_COMPARED]
        x, y = x[drawn], y[drawn]
    left, right = _cosine_ranks(x), _cosine_ranks(y)

    def value(order: Tensor) -> float:
        return _rank_correlation(left, right[order][:, order])

    return _against_chance(value, len(x), n_permutations, seed)


def _against_chance(
    value: Callable[[Tensor], float], k: int, n_permutations: int, seed: int
) -> Similarity:
    if n_permutations < 1:
        raise ValueError(f"The null needs at least one permutation, got {n_permutations}.")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(k, generator=generator) for _ in range(n_permutations)]
    observed = value(torch.arange(k))
    null = [value(order) for order in orders]
    as_alike = sum(one >= observed for one in null)
    return Similarity(
        value=observed,
        null=sum(null) / len(null),
        p_value=(1 + as_alike) / (1 + len(null)),
        n_pairs=k,
    )


def _matched(x: Tensor, y: Tensor) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k e"]]:
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"Sets of directions are compared pair by pair, at least 3 of them, got {len(x)} and "
            f"{len(y)} rows. Were too few latents matched?"
        )
    return x.detach().cpu().double(), y.detach().cpu().double()


def _whitened(rows: Float[Tensor, "k d"], variance: float) -> Float[Tensor, "k axes"]:
    """Rows on the principal axes with this share of the variance, each axis at length 1."""
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be above 0 and at most 1, got {variance}: it is a share.")
    axes, strength, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    held = (strength**2).cumsum(0) / (strength**2).sum()
    if not bool(held.isfinite().all()):
        raise ValueError("SVCCA is undefined: all rows of a dictionary are equal.")
    n_axes = min(
        int((held < variance - 1e-12).sum()) + 1, int((strength > 1e-9 * strength[0]).sum())
    )
    whitened: Tensor = axes[:, :n_axes]
    return whitened


def _cosine_ranks(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """Ranks of the cosines between rows, centred and at length 1; the diagonal is 0."""
    unit = unit_rows(rows)
    k = len(unit)
    upper = np.triu_indices(k, 1)
    ranks = rankdata((unit @ unit.T).numpy()[upper])
    ranks -= ranks.mean()
    length = float(np.linalg.norm(ranks))
    table = torch.zeros(k, k, dtype=torch.float64)
    table[upper] = torch.from_numpy(ranks / (length if length > 0 else 1.0))
    return table + table.T


def _rank_correlation(left: Float[Tensor, "k k"], right: Float[Tensor, "k k"]) -> float:
    return float((left * right).sum() / 2)
