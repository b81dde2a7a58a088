"""Matching pursuit row by row in compiled loops; `pursuit` says what is computed."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.kernels import pursuit
from saefeat.kernels.codes import Codes
from saefeat.kernels.compiled import compiled, share_rows

BLOCK = 64
"""Scores among which the largest is found at once."""
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
    for low in range(0, len(x), ROWS_AT_ONCE):
        part = slice(low, low + ROWS_AT_ONCE)
        scores, squares = (x[part] @ atoms.T).numpy(), x[part].square().sum(1).numpy()
        outputs = picked[part].numpy(), values[part].numpy()
        bits = scores.view(f"i{scores.itemsize}")
        share_rows(_pursue, len(squares), scores, bits, squares, inner, share, *outputs)
    return pursuit.as_codes(picked, values, len(atoms))


@compiled
def _pursue(
    low: int,
    high: int,
    scores: Any,
    bits: Any,
    squares: Any,
    gram: Any,
    share: float,
    picked: Any,
    values: Any,
) -> None:
    """`pursuit._pursue` row by row; `scores` is used up, and `bits` are the same memory."""
    d_sae = scores.shape[1]
    k = picked.shape[1]
    along = np.empty((k, d_sae), scores.dtype)
    fresh = np.empty(d_sae, scores.dtype)
    factor = np.empty((k, k), scores.dtype)
    weights = np.empty(k, scores.dtype)
    for row in range(low, high):
        score = scores[row]
        fresh[:] = 1
        left = squares[row]
        enough = share * left
        n_picked = 0
        while left > enough:
            chosen = _largest(bits[row])
            best = score[chosen]
            if not best > 0:  # nor a number
                break
            t = n_picked
            length = math.sqrt(fresh[chosen])
            weight = best / length
            for s in range(t):
                factor[t, s] = along[s, chosen]
            factor[t, t] = length
            weights[t] = weight
            picked[row, t] = chosen
            left -= weight * weight
            n_picked += 1
            if n_picked == k or not left > enough:  # nothing is picked by the scores to come
                break
            direction = along[t]
            direction[:] = gram[chosen]
            # Several earlier directions at a time, so that `direction` is read and written less.
            s = 0
            while s + 8 <= t:
                a, b, c, d = along[s], along[s + 1], along[s + 2], along[s + 3]
                e, f, g, h = along[s + 4], along[s + 5], along[s + 6], along[s + 7]
                wa, wb, wc, wd = factor[t, s], factor[t, s + 1], factor[t, s + 2], factor[t, s + 3]
                we, wf = factor[t, s + 4], factor[t, s + 5]
                wg, wh = factor[t, s + 6], factor[t, s + 7]
                for i in range(d_sae):
                    direction[i] -= (wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]) + (
                        we * e[i] + wf * f[i] + wg * g[i] + wh * h[i]
                    )
                s += 8
            while s + 2 <= t:
                a, b, wa, wb = along[s], along[s + 1], factor[t, s], factor[t, s + 1]
                for i in range(d_sae):
                    direction[i] -= wa * a[i] + wb * b[i]
                s += 2
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
        _refit(factor[:n_picked, :n_picked], weights[:n_picked], values[row])


@compiled
def _largest(bits: Any) -> int:
    """Where the largest score is, given its bits; anywhere if none is positive.

    As integers, positive floats keep their order and stay above all negative ones. Maxima of
    floats would not become vector instructions, since NaN has no order.
    """
    best, start = bits[0], 0
    for low in range(0, len(bits), BLOCK):
        part = bits[low : low + BLOCK]
        largest = part[0]
        for i in range(len(part)):
            largest = max(largest, part[i])
        if largest > best:
            best, start = largest, low
    for i in range(start, min(len(bits), start + BLOCK)):
        if bits[i] == best:
            return i
    return 0


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
