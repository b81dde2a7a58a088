"""Bertsekas's auction, for assignments that are too large to be made exactly."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saefeat.kernels.compiled import compiled


def auction(
    offsets: Int[np.ndarray, " _"],
    columns: Int[np.ndarray, " nnz"],
    weights: Float[np.ndarray, " nnz"],
    n_columns: int,
    epsilon: float,
) -> tuple[Int[np.ndarray, " n_rows"], float]:
    """An assignment of rows to columns whose sum of weights is nearly the largest.

    Bertsekas 1988 ("The auction algorithm", Annals of Operations Research 14). Each row without
    a partner bids for the column that is worth most to it, weight less price, and raises the price
    by what that is worth more to it than the second best, or than nothing, plus `epsilon`. Prices
    start at 0 and only rise, so that in the end no row loses more than `epsilon`.

    Args:
        offsets: Where each row's pairs begin.
        columns: The column of each pair.
        weights: Its weight, above 0.
        n_columns: Columns in all.
        epsilon: Least bid.

    Returns:
        The index of the pair of each row, -1 for rows without, and by how much the largest sum of
        weights can be above this one, from the prices by duality.
    """
    n_rows = len(offsets) - 1
    prices = np.zeros(n_columns)
    pair = np.full(n_rows, -1, dtype=np.int64)
    owner = np.full(n_columns, -1, dtype=np.int64)
    waiting = np.arange(n_rows, dtype=np.int64)[::-1].copy()
    _bid(offsets, columns, weights, epsilon, prices, pair, owner, waiting)
    values = weights - prices[columns]
    worth = np.zeros(n_rows)
    np.maximum.at(worth, np.repeat(np.arange(n_rows), np.diff(offsets)), values)
    bound = worth.sum() + prices.sum()
    return pair, max(0.0, float(bound - weights[pair[pair >= 0]].sum()))


@compiled
def _bid(
    offsets: Any,
    columns: Any,
    weights: Any,
    epsilon: float,
    prices: Any,
    pair: Any,
    owner: Any,
    waiting: Any,
) -> None:
    n_waiting = len(waiting)
    while n_waiting > 0:
        row = waiting[n_waiting - 1]
        n_waiting -= 1
        best, second, chosen = 0.0, 0.0, -1
        for entry in range(offsets[row], offsets[row + 1]):
            value = weights[entry] - prices[columns[entry]]
            if value > best:
                best, second, chosen = value, best, entry
            elif value > second:
                second = value
        pair[row] = chosen
        if chosen < 0:
            continue
        column = columns[chosen]
        prices[column] += best - second + epsilon
        if owner[column] >= 0:
            waiting[n_waiting] = owner[column]
            n_waiting += 1
        owner[column] = row
