"""The universality score U, and intervals by resampling contexts.

Shape letters: n rows, g blocks of contexts, v kinds of token, p pairs of latents, s resamples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csc_array, csr_array

from saefeat.superposition.assignment import Assignment
from saefeat.superposition.universality.correlation import Correlations

MOST_BLOCKS = 200
LEAST_BLOCKS = 10
TABLE_ELEMENTS = 1 << 22
"""Numbers in a table of pairs by tokens, or by blocks, that is held at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number and its 95 % interval over texts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How universal latents are, against one null."""

    null_name: str
    matched: Estimate
    """r_AB: mean correlation of the latents of A and B, assigned one to one."""
    null: Estimate
    """r_null: that which the null gives."""
    again: Estimate | None
    """r_AA': that of A and A', which differ in the seed alone; None where A' was not given."""
    u: Estimate | None
    """(r_AB - r_null) / (r_AA' - r_null): 1 where another model is as alike as another seed, 0
    where it is as alike as chance. None without A', or where A' is no more alike than chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampled:
    """A mean correlation, and what it is over each resample of the contexts."""

    value: float
    draws: Float[np.ndarray, " s"]

    @property
    def estimate(self) -> Estimate:
        low, high = np.quantile(self.draws, [0.025, 0.975]).tolist()
        return Estimate(value=self.value, low=low, high=high)


def score(
    null_name: str, matched: Resampled, null: Resampled, again: Resampled | None = None
) -> Score:
    """U and what it is made of; all three from the same resamples."""
    u = None
    if again is not None:
        above = again.draws - null.draws
        # A ratio to what may be 0 has no interval.
        if again.value > null.value and np.quantile(above, 0.025) > 0:
            draws = (matched.draws - null.draws) / above
            value = (matched.value - null.value) / (again.value - null.value)
            u = Resampled(value=value, draws=draws).estimate
    return Score(
        null_name=null_name,
        matched=matched.estimate,
        null=null.estimate,
        again=None if again is None else again.estimate,
        u=u,
    )


def context_blocks(contexts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The block of each row: contexts, or, of more than 200, runs of neighbouring ones.

    Tokens of one context depend on each other, and so may neighbours of one document. So a
    resample that drew single rows would make intervals too narrow.

    Raises:
        ValueError: There are fewer than 10 contexts.
    """
    distinct, number = np.unique(contexts, return_inverse=True)
    if len(distinct) < LEAST_BLOCKS:
        raise ValueError(
            f"Intervals come from resampling contexts, at least {LEAST_BLOCKS}, and the rows are "
            f"of {len(distinct)}. Raise n_tokens, hold out more, or make contexts shorter."
        )
    blocks: Int[np.ndarray, " n"] = number * min(len(distinct), MOST_BLOCKS) // len(distinct)
    return blocks


def draw_weights(n_blocks: int, n_resamples: int, seed: int) -> Float[np.ndarray, "s g"]:
    """How often each resample holds each block."""
    if n_resamples < 40:
        raise ValueError(f"A 95 % interval needs at least 40 resamples, got {n_resamples}.")
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), n_resamples)
    return drawn.astype(np.float64)


def resample(
    found: Correlations,
    a: csr_array,
    b: csr_array,
    blocks: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, "s g"],
    *,
    tokens: Int[np.ndarray, " n"] | None = None,
) -> Resampled:
    """The mean correlation over resamples of the blocks of rows, pairs as they were assigned.

    The nonparametric bootstrap of clusters (Efron & Tibshirani 1993, ch. 8). What is resampled are
    contexts and not latents: the question is about these models, whose latents are all there,
    while the text is a sample. How much models vary takes several models.

    Args:
        found: The correlations whose mean it is.
        a: Codes of the first dictionary, `[n, w]`.
        b: Those of the second.
        blocks: The block of each row.
        weights: How often each resample holds each block.
        tokens: The token of each row, whose means are taken off first, as in `found`.
    """
    n = a.shape[0]
    token = np.zeros(n, np.int64) if tokens is None else np.unique(tokens, return_inverse=True)[1]
    n_blocks, n_tokens = weights.shape[1], int(token.max()) + 1
    counts = coo_array((np.ones(n), (blocks, token)), shape=(n_blocks, n_tokens)).tocsr()
    pairs = found.pairs
    n_at_once = max(1, TABLE_ELEMENTS // max(n_tokens, n_blocks, len(weights)))
    by_latent = a.tocsc(), b.tocsc()
    draws = np.zeros(len(weights))
    for start in range(0, len(pairs.rows), n_at_once):
        part = slice(start, start + n_at_once)
        sums = _block_sums(*by_latent, pairs, part, blocks, token, counts)
        n_drawn = weights @ sums.n_rows
        mean_a, mean_b, aa, bb, ab = (
            weights @ one / n_drawn[:, None] for one in (sums.a, sums.b, sums.aa, sums.bb, sums.ab)
        )
        variance = (aa - mean_a**2) * (bb - mean_b**2)
        varies = variance > 1e-18 * aa * bb
        covariance = ab - mean_a * mean_b
        draws += (covariance * varies / np.sqrt(np.where(varies, variance, 1.0))).sum(1)
    return Resampled(value=found.mean, draws=draws / max(1, found.n_pairs))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over the rows of each block: how many, and the sums for each pair of latents."""

    n_rows: Float[np.ndarray, " g"]
    a: Float[np.ndarray, "g p"]
    b: Float[np.ndarray, "g p"]
    aa: Float[np.ndarray, "g p"]
    bb: Float[np.ndarray, "g p"]
    ab: Float[np.ndarray, "g p"]


def _block_sums(
    a: csc_array,
    b: csc_array,
    pairs: Assignment,
    part: slice,
    blocks: Int[np.ndarray, " n"],
    token: Int[np.ndarray, " n"],
    counts: csr_array,
) -> _Sums:
    """Sums of f - m(token) and of its products, with m the mean for each token.

    sum (f - m)(g - m') = sum f g - sum f m' - sum g m + sum_v n_v m_v m'_v, of which only the last
    is over rows in which a latent is off.
    """
    left = a[:, pairs.rows[part].numpy()].tocoo()
    right = b[:, pairs.columns[part].numpy()].tocoo()
    shape = counts.shape[0], left.shape[1]
    n_of_token = np.asarray(counts.sum(0)).ravel()

    def values(one: coo_array) -> Float[np.ndarray, " entries"]:
        return np.asarray(one.data, dtype=np.float64)

    def means(one: coo_array) -> Float[np.ndarray, "v p"]:
        keys = token[one.row] * shape[1] + one.col
        totals = np.bincount(keys, values(one), len(n_of_token) * shape[1])
        table: Float[np.ndarray, "v p"] = totals.reshape(-1, shape[1]) / n_of_token[:, None]
        return table

    def by_block(
        one: coo_array, of_entries: Callable[[coo_array], Float[np.ndarray, " entries"]]
    ) -> Float[np.ndarray, "g p"]:
        keys = blocks[one.row] * shape[1] + one.col
        table: Float[np.ndarray, "g p"] = np.bincount(
            keys, of_entries(one), math.prod(shape)
        ).reshape(shape)
        return table

    def times(table: Float[np.ndarray, "v p"]) -> Callable[[coo_array], Float[np.ndarray, " _"]]:
        return lambda one: values(one) * table[token[one.row], one.col]

    mean_a, mean_b = means(left), means(right)
    both = left.tocsr().astype(np.float64).multiply(right.tocsr()).tocoo()
    return _Sums(
        np.asarray(counts.sum(1)).ravel(),
        by_block(left, values) - counts @ mean_a,
        by_block(right, values) - counts @ mean_b,
        by_block(left, lambda one: values(one) ** 2)
        - 2 * by_block(left, times(mean_a))
        + counts @ mean_a**2,
        by_block(right, lambda one: values(one) ** 2)
        - 2 * by_block(right, times(mean_b))
        + counts @ mean_b**2,
        by_block(both, values)
        - by_block(left, times(mean_b))
        - by_block(right, times(mean_a))
        + counts @ (mean_a * mean_b),
    )
