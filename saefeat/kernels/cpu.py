"""Kernels for processors: `stock`, and compiled loops where a profile shows that they win.

The loops are compiled by numba on first use (seconds, then cached) and release the interpreter's
lock. Threads are this module's own, not numba's, whose pools do not bear forks or two callers.
"""

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.kernels import pursuit, stock
from saefeat.kernels.codes import Codes

top_k = stock.top_k
batch_top_k = stock.batch_top_k
above = stock.above
sampled_product = stock.sampled_product
product = stock.product
transposed_product = stock.transposed_product
latent_sums = stock.latent_sums

ROWS_AT_ONCE = 4096
"""Rows whose correlations with all atoms are in memory at once."""


def matching_pursuit(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "d_sae d"],
    k: int,
    tolerance: float = 0.0,
    gram: Float[Tensor, "d_sae d_sae"] | None = None,
) -> Codes:
    """See `eager.matching_pursuit`."""
    inner = (atoms @ atoms.T if gram is None else gram).numpy()
    picked = torch.zeros(len(x), k, dtype=torch.int64)
    values = x.new_zeros(len(x), k)
    share = pursuit.squared_tolerance(tolerance, x.dtype)
    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        for low in range(0, len(x), ROWS_AT_ONCE):
            part = x[low : low + ROWS_AT_ONCE]
            scores = (part @ atoms.T).numpy()
            squares = part.square().sum(1).numpy()
            outputs = picked[low : low + len(part)].numpy(), values[low : low + len(part)].numpy()
            bounds = np.linspace(0, len(part), n_threads + 1).astype(int)
            tasks = [
                pool.submit(
                    _pursue,
                    scores[start:end],
                    squares[start:end],
                    inner,
                    share,
                    *(output[start:end] for output in outputs),
                )
                for start, end in pairwise(bounds)
            ]
            for task in tasks:
                task.result()
    return pursuit.as_codes(picked, values, len(atoms))


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as machine code, kept on disk between runs."""
    # Tests wrap each function to check shapes; what numba reads is the plain one inside.
    plain = inspect.unwrap(function)
    # No "nnan" and "ninf": latents that are out of the running score minus infinity.
    allowed = {"contract", "reassoc", "arcp"}
    made: Callable[..., None] = numba.njit(
        nogil=True, fastmath=allowed, cache=True, error_model="numpy"
    )(plain)
    return made


@compiled
def _pursue(scores: Any, squares: Any, gram: Any, share: float, picked: Any, values: Any) -> None:
    """`pursuit._pursue` row by row; `scores` is used up."""
    n, d_sae = scores.shape
    k = picked.shape[1]
    along = np.empty((k, d_sae), scores.dtype)
    fresh = np.empty(d_sae, scores.dtype)
    factor = np.empty((k, k), scores.dtype)
    weights = np.empty(k, scores.dtype)
    for row in range(n):
        score = scores[row]
        fresh[:] = 1
        left = squares[row]
        enough = share * left
        n_picked = 0
        while n_picked < k and left > enough:
            best = score[0]
            for latent in range(1, d_sae):
                best = max(best, score[latent])
            if not best > 0:  # nor a number
                break
            chosen = 0
            while chosen < d_sae - 1 and score[chosen] != best:
                chosen += 1
            t = n_picked
            length = math.sqrt(fresh[chosen])
            weight = best / length
            direction = along[t]
            direction[:] = gram[chosen]
            for s in range(t):
                factor[t, s] = along[s, chosen]
            # Four earlier directions at a time, so that `direction` is read and written less.
            s = 0
            while s + 4 <= t:
                a, b, c, d = along[s], along[s + 1], along[s + 2], along[s + 3]
                wa, wb, wc, wd = factor[t, s], factor[t, s + 1], factor[t, s + 2], factor[t, s + 3]
                for i in range(d_sae):
                    direction[i] -= wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]
                s += 4
            while s < t:
                a, wa = along[s], factor[t, s]
                for i in range(d_sae):
                    direction[i] -= wa * a[i]
                s += 1
            for i in range(d_sae):
                direction[i] /= length
                score[i] -= weight * direction[i]
                fresh[i] -= direction[i] * direction[i]
                if fresh[i] < pursuit.DEPENDENT:
                    score[i] = -np.inf
            score[chosen] = -np.inf
            factor[t, t] = length
            weights[t] = weight
            picked[row, t] = chosen
            left -= weight * weight
            n_picked += 1
        _refit(factor[:n_picked, :n_picked], weights[:n_picked], values[row])


@compiled
def _refit(factor: Any, weights: Any, values: Any) -> None:
    """Least squares over the picks, dropping those that come out negative until none is."""
    t = len(weights)
    for i in range(t - 1, -1, -1):
        total = weights[i]
        for j in range(i + 1, t):
            total -= factor[j, i] * values[j]
        values[i] = total / factor[i, i]
    kept = np.ones(t, np.bool_)
    products, inner = factor, weights
    while True:
        dropped = False
        for i in range(t):
            if kept[i] and values[i] <= 0:
                kept[i] = False
                values[i] = 0
                dropped = True
        if not dropped:
            return
        if products is factor:
            lower = np.tril(factor)
            products = lower @ lower.T
            inner = lower @ weights
        support = np.nonzero(kept)[0]
        m = len(support)
        small = np.empty((m, m), factor.dtype)
        right = np.empty(m, factor.dtype)
        for i in range(m):
            right[i] = inner[support[i]]
            for j in range(m):
                small[i, j] = products[support[i], support[j]]
        solved = np.linalg.solve(small, right)
        for i in range(m):
            values[support[i]] = solved[i]
