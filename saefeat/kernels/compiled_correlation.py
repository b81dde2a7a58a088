"""Products of the columns of two sparse matrices, each pair of columns judged as it is summed.

Shape letters: a and b columns of the two matrices, m pairs that are kept.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saefeat.kernels.compiled import compiled, share_rows

KEPT_AT_ONCE = 1 << 20
"""Pairs that a thread keeps before they are put aside: 16 MB."""

Compressed = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"], Float[np.ndarray, " _"]]
"""Offsets, indices and values of a matrix in compressed columns or rows."""


def large_products(
    by_column: Compressed,
    by_row: Compressed,
    offsets: tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]],
    scales: tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]],
    least: float,
    taken_off: tuple[Compressed, Compressed] | None = None,
) -> tuple[
    tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]],
    Float[np.ndarray, " a"],
    Float[np.ndarray, " b"],
]:
    """Pairs of columns with a large (sum_t A_ti B_tj - o_i o_j) s_i s_j, and the largest of each.

    Only pairs with a common row are looked at, and the sums of one column of A at a time are held.
    With F and G to be taken off, it is sum_t A_ti B_tj - sum_v F_vi G_vj. Nothing may be negative
    then, so that this is at most sum_t A_ti B_tj: it is worked out for those pairs alone for which
    that is large, and the largest are of these.

    Args:
        by_column: The first matrix in compressed columns.
        by_row: The second in compressed rows.
        offsets: The o of both.
        scales: The s of both.
        least: Pairs from here on are kept.
        taken_off: F and G in compressed columns; None takes nothing off.

    Returns:
        Columns and products of the pairs that are kept, by column of A; then for every column of
        either side the largest product with any of the other, 0 where none is above 0.
    """
    nothing = np.zeros(1, np.int32), np.empty(0, np.int32), np.empty(0)
    subtracted = (nothing, nothing) if taken_off is None else taken_off
    n_kinds = 0 if taken_off is None else 1 + int(subtracted[0][1].max(initial=-1))
    n_a, n_b = len(offsets[0]), len(offsets[1])
    best_a, best_b = np.zeros(n_a), np.zeros(n_b)
    parts: list[tuple[int, Any]] = []
    bests: list[Float[np.ndarray, " b"]] = []

    def share(low: int, high: int) -> None:
        # Each thread has arrays of its own, and other columns of A.
        own_best = np.zeros(n_b)
        room = max(n_b, KEPT_AT_ONCE)
        left, right = np.empty(room, np.int32), np.empty(room, np.int32)
        products = np.empty(room)
        sums, is_on = np.zeros(n_b), np.zeros(n_b, np.bool_)
        touched = np.empty(n_b, np.int32)
        of_kind = np.zeros(n_kinds)
        while low < high:
            start = low
            low, n_kept = _columns(
                low,
                high,
                *by_column,
                *by_row,
                *offsets,
                *scales,
                least,
                best_a,
                own_best,
                left,
                right,
                products,
                sums,
                is_on,
                touched,
                *subtracted[0],
                *subtracted[1],
                of_kind,
            )
            kept = tuple(array[:n_kept].copy() for array in (left, right, products))
            parts.append((start, kept))
        bests.append(own_best)

    share_rows(share, n_a)
    for own_best in bests:
        np.maximum(best_b, own_best, out=best_b)
    parts.sort(key=lambda part: part[0])
    none = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0))
    columns = zip(none, *(kept for _, kept in parts), strict=True)
    left, right, products = (np.concatenate(column) for column in columns)
    return (left, right, products), best_a, best_b


@compiled
def _columns(
    low: int,
    high: int,
    a_offsets: Any,
    a_rows: Any,
    a_values: Any,
    b_offsets: Any,
    b_columns: Any,
    b_values: Any,
    offset_a: Any,
    offset_b: Any,
    scale_a: Any,
    scale_b: Any,
    least: float,
    best_a: Any,
    best_b: Any,
    left: Any,
    right: Any,
    products: Any,
    sums: Any,
    is_on: Any,
    touched: Any,
    f_offsets: Any,
    f_kinds: Any,
    f_values: Any,
    g_offsets: Any,
    g_kinds: Any,
    g_values: Any,
    of_kind: Any,
) -> tuple[int, int]:
    """Go through columns of A until they end or the room for pairs may; the next, and how many."""
    n_kept = 0
    takes_off = len(of_kind) > 0
    for i in range(low, high):
        if n_kept + len(sums) > len(left):
            return i, n_kept
        n_touched = 0
        for entry in range(a_offsets[i], a_offsets[i + 1]):
            row, value = a_rows[entry], a_values[entry]
            for other in range(b_offsets[row], b_offsets[row + 1]):
                j = b_columns[other]
                if not is_on[j]:
                    is_on[j] = True
                    touched[n_touched] = j
                    n_touched += 1
                sums[j] += value * b_values[other]
        if takes_off:
            for entry in range(f_offsets[i], f_offsets[i + 1]):
                of_kind[f_kinds[entry]] = f_values[entry]
        largest = 0.0
        for index in range(n_touched):
            j = touched[index]
            product = (sums[j] - offset_a[i] * offset_b[j]) * (scale_a[i] * scale_b[j])
            sums[j] = 0.0
            is_on[j] = False
            if takes_off:
                if product < least:
                    continue
                off = 0.0
                for entry in range(g_offsets[j], g_offsets[j + 1]):
                    if g_kinds[entry] < len(of_kind):
                        off += of_kind[g_kinds[entry]] * g_values[entry]
                product -= off * (scale_a[i] * scale_b[j])
            largest = max(largest, product)
            best_b[j] = max(best_b[j], product)
            if product >= least:
                left[n_kept], right[n_kept], products[n_kept] = i, j, product
                n_kept += 1
        best_a[i] = largest
        if takes_off:
            for entry in range(f_offsets[i], f_offsets[i + 1]):
                of_kind[f_kinds[entry]] = 0.0
    return high, n_kept
