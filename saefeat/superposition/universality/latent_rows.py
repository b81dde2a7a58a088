"""What a dictionary's latents did on a number of rows: sparse codes, kept.

Shape letters: n rows, w latents, v kinds of token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array, vstack

from saefeat.kernels.codes import Codes

SHIFTED_FROM = 0.5
"""Density from which a latent is held as its difference from its mean."""
LEAST_VARIATION = 1e-9
"""Share of its sum of squares below which the variance of a latent is rounding."""
LEAST_LEFT_OVER = 1e-6
"""And below which nothing is left of it, once the mean for each token is taken off."""


def rows_of_codes(batches: Sequence[Codes]) -> csr_array:
    """Batches of codes as one matrix in float32, `[n, w]`, with no stored zeros.

    It takes 8 bytes for each latent that is on in a row.

    Raises:
        ValueError: There is no batch, or a code is below 0 or not finite.
    """
    if not batches:
        raise ValueError("There are no codes to compare: no batch was given.")
    parts = []
    for codes in batches:
        values = codes.values.detach().cpu().float().numpy()
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(
                "Codes to be correlated must be finite and not negative, and these are not. Did "
                "the training of this dictionary diverge?"
            )
        indices = codes.latents.cpu().to(torch.int32).numpy()
        offsets = codes.offsets.cpu().to(torch.int32).numpy()
        # A copy, since zeros are taken out of it in place.
        shape = (codes.n_rows, codes.d_sae)
        part = csr_array((values, indices, offsets), shape=shape, copy=True)
        part.eliminate_zeros()
        parts.append(part)
    return vstack(parts, format="csr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Centred:
    """Codes made ready to be correlated with others on the same rows.

    The covariance of two latents is a sum over rows of products, less that of their means. A latent
    that is on in more than half of the rows is held as its difference from its mean, on all of
    them; of the others sum f^2 is at least twice n mean^2. So nothing large cancels.

    With token ids, means are those given the token: the residuals of f on the token's
    identity have the covariance sum f g - sum_v F_v G_v / n_v, with F_v the sum over the n_v rows
    of token v. Then codes are held as they are.
    """

    matrix: csr_array
    """`[n, w]` in float64; columns that are not counted are empty."""
    token_sums: csr_array | None
    """F_v / sqrt(n_v), `[v, w]`; None where the means are over all rows."""
    offsets: Float[np.ndarray, " w"]
    """sum f / sqrt(n); 0 where the means are those given the token."""
    scales: Float[np.ndarray, " w"]
    """1 / sqrt(n variance); 0 for latents that are not counted."""

    @property
    def n_counted(self) -> int:
        """Latents that fire often enough and vary."""
        return int((self.scales > 0).sum())


def centred(
    codes: csr_array, *, least_firing: int, tokens: Int[np.ndarray, " n"] | None = None
) -> Centred:
    """Codes ready to be correlated.

    Args:
        codes: `[n, w]`.
        least_firing: Rows in which a latent must be on to be counted.
        tokens: The token of each row, to correlate what is left once its identity is regressed
            out; None correlates the codes themselves.
    """
    n, w = codes.shape
    matrix = codes.astype(np.float64)
    firing = np.bincount(matrix.indices, minlength=w)
    total = np.bincount(matrix.indices, weights=matrix.data, minlength=w)
    dense = (firing > SHIFTED_FROM * n).nonzero()[0]
    if tokens is None and len(dense):
        means = np.broadcast_to(total[dense] / n, (n, len(dense)))
        where = np.repeat(np.arange(n), len(dense)), np.tile(dense, n)
        matrix = (matrix - coo_array((means.ravel(), where), shape=(n, w)).tocsr()).tocsr()
        total[dense] = 0.0
    squares = np.bincount(matrix.indices, weights=matrix.data**2, minlength=w)
    raw_squares = np.bincount(
        codes.indices, weights=codes.data.astype(np.float64) ** 2, minlength=w
    )
    variation = squares - total**2 / n
    varies = (firing >= least_firing) & (variation > LEAST_VARIATION * raw_squares)
    sums, of_tokens = total / np.sqrt(n), None
    if tokens is not None:
        of_tokens = token_sums(matrix, tokens)
        explained = np.bincount(of_tokens.indices, weights=of_tokens.data**2, minlength=w)
        left_over = squares - explained
        varies &= left_over > LEAST_LEFT_OVER * variation
        variation, sums = left_over, np.zeros(w)
    for one in (matrix, of_tokens):
        if one is not None:
            # Entries of latents that are not counted would only cost time.
            one.data *= varies[one.indices]
            one.eliminate_zeros()
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(varies, 1 / np.sqrt(variation), 0.0)
    return Centred(matrix=matrix, token_sums=of_tokens, offsets=sums * varies, scales=scales)


def token_sums(matrix: csr_array, tokens: Int[np.ndarray, " n"]) -> csr_array:
    """F_v / sqrt(n_v): the sum over the rows of each token, `[v, w]`."""
    _, kind, n_of_kind = np.unique(tokens, return_inverse=True, return_counts=True)
    weights = 1 / np.sqrt(n_of_kind[kind])
    shape = (len(n_of_kind), len(tokens))
    picks = coo_array((weights, (kind, np.arange(len(tokens)))), shape=shape).tocsr()
    return (picks @ matrix).tocsr()
