"""Which latents are on, found in one or two sweeps over the scores.

Scores are compared as integers of the same bits, put in the order of the scores ("keys"): that
needs no conversion from bfloat16, which numba does not know. Few entries of a row are kept, so a
row is taken as a grid, a sweep finds which columns hold one, and only those are looked into. Both
the sweep and the counting run at the width of vector registers, which looking does not.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels.codes import SparsityPattern
from saefeat.kernels.compiled import compiled, share_rows

SAMPLED_ROWS = 64
"""Rows from which the threshold of a batch is guessed, before it is found exactly."""
GUESS_MARGIN = 1.3
"""How many times as many entries as are wanted the guess should let through."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def top_k(scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """See `eager.top_k`. Of equal entries any may be kept, the same ones every time."""
    n, d_sae = scores.shape
    latents = torch.empty(n, k, dtype=torch.int64)
    width = min(d_sae, max(k, _width(d_sae, k)))
    share_rows(_top_k, n, *_bits(scores), k, width, latents.numpy())
    return latents


def above(scores: Float[Tensor, "n d_sae"], floor: Float[Tensor, " d_sae"]) -> SparsityPattern:
    """See `eager.above`."""
    # Zero is added so that -0.0, whose key is another, becomes 0.0.
    return _above(scores, _keys(floor.to(scores.dtype) + 0.0).numpy())


def batch_top_k(
    scores: Float[Tensor, "n d_sae"], n_kept: int
) -> tuple[SparsityPattern, Float[Tensor, ""]]:
    """See `eager.batch_top_k`."""
    n, d_sae = scores.shape
    sample = _keys(scores[:: max(1, n // SAMPLED_ROWS)]).flatten().numpy()
    wanted = min(len(sample), int(GUESS_MARGIN * n_kept * len(sample) / (n * d_sae)) + 8)
    floor = np.full(d_sae, max(0, _kth_largest(sample, wanted) - 1), sample.dtype)
    pattern = _above(scores, floor)
    if len(pattern.latents) < n_kept and floor[0]:
        floor[:] = 0
        pattern = _above(scores, floor)
    kept = scores[pattern.rows, pattern.latents]
    if len(kept) == 0:
        return pattern, torch.tensor(torch.finfo(scores.dtype).tiny)
    if len(kept) > n_kept:
        keys = _keys(kept)
        is_kept = keys >= int(_kth_largest(keys.numpy(), n_kept))
        pattern, kept = pattern.where(is_kept), kept[is_kept]
    return pattern, kept.min().float()


def _above(scores: Float[Tensor, "n d_sae"], floor: Any) -> SparsityPattern:
    n, d_sae = scores.shape
    bits, offsets = _bits(scores), torch.zeros(n + 1, dtype=torch.int64)
    share_rows(_count, n, *bits, floor, offsets.numpy())
    offsets = offsets.cumsum(0)
    latents = torch.empty(int(offsets[-1]), dtype=torch.int64)
    width = _width(d_sae, len(latents) / n)
    share_rows(_fill, n, *bits, floor, width, offsets.numpy(), latents.numpy())
    return SparsityPattern(offsets, latents, d_sae)


def _width(d_sae: int, n_kept: float) -> int:
    """The columns of a row's grid at which sweeping them and looking into some costs least."""
    columns = (d_sae * max(1.0, n_kept)) ** 0.5
    return min(d_sae, -(-int(columns) // 64) * 64)


def _bits(scores: Float[Tensor, "n d_sae"]) -> tuple[Any, int, int]:
    """The bits of all rows in one array, how far apart rows begin in it, and their length.

    Scores may be some columns of a larger matrix. Loops over an array of two dimensions that is
    not contiguous would not be compiled to vector instructions.
    """
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    (n, d_sae), stride = scores.shape, scores.stride(0)
    flat = scores.as_strided(((n - 1) * stride + d_sae,), (1,))
    return flat.view(_INTEGERS[scores.element_size()]).numpy(), stride, d_sae


def _keys(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: those of negative floats are turned around."""
    bits = scores.view(_INTEGERS[scores.element_size()])
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(bits.dtype).max)


@compiled
def _key(bits: Any, like: Any) -> Any:
    """See `_keys`; in a form that compilers make vector instructions of."""
    cast = like.dtype.type
    return bits if bits >= 0 else cast(bits ^ cast(np.iinfo(like.dtype).max))


@compiled
def _kth_largest(keys: Any, k: int) -> Any:
    """The largest number that k of the keys reach, by bisection: no key is moved."""
    cast = keys.dtype.type
    low, high = np.int64(np.iinfo(keys.dtype).min), np.int64(np.iinfo(keys.dtype).max)
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        n_reaching = 0
        for i in range(len(keys)):
            n_reaching += keys[i] >= cast(middle)
        if n_reaching >= k:
            low = middle
        else:
            high = middle
    return cast(low)


@compiled
def _top_k(
    low: int, high: int, bits: Any, stride: int, d_sae: int, k: int, width: int, latents: Any
) -> None:
    columns = np.empty(width, bits.dtype)
    found = np.empty(d_sae, np.int64)
    keys = np.empty(d_sae, bits.dtype)
    for row in range(low, high):
        scores = bits[row * stride : row * stride + d_sae]
        columns[:] = np.iinfo(bits.dtype).min
        for start in range(0, d_sae, width):
            part = scores[start : start + width]
            for i in range(len(part)):
                columns[i] = max(columns[i], _key(part[i], bits))
        # k columns hold an entry of at least this, so that the k-th largest entry is no less.
        floor = _kth_largest(columns, k)
        n_found = 0
        for column in range(width):
            if columns[column] >= floor:
                for i in range(column, d_sae, width):
                    key = _key(scores[i], bits)
                    if key >= floor:
                        found[n_found], keys[n_found] = i, key
                        n_found += 1
        floor = _kth_largest(keys[:n_found], k)
        n_equal = k
        for i in range(n_found):
            n_equal -= keys[i] > floor
        n_kept = 0
        for i in range(n_found):
            is_tie = keys[i] == floor and n_equal > 0
            if n_kept < k and (keys[i] > floor or is_tie):
                latents[row, n_kept] = found[i]
                n_kept += 1
                n_equal -= is_tie


@compiled
def _count(
    low: int, high: int, bits: Any, stride: int, d_sae: int, floor: Any, counts: Any
) -> None:
    """How many entries of each row have a key above their floor, one place further on."""
    for row in range(low, high):
        scores = bits[row * stride : row * stride + d_sae]
        n_above = 0
        for i in range(d_sae):
            n_above += _key(scores[i], bits) > floor[i]
        counts[row + 1] = n_above


@compiled
def _fill(
    low: int,
    high: int,
    bits: Any,
    stride: int,
    d_sae: int,
    floor: Any,
    width: int,
    offsets: Any,
    latents: Any,
) -> None:
    """The latents of the entries that `_count` counted."""
    holds_one = np.empty(width, bits.dtype)
    for row in range(low, high):
        scores = bits[row * stride : row * stride + d_sae]
        holds_one[:] = 0
        for start in range(0, d_sae, width):
            part, floors = scores[start : start + width], floor[start : start + width]
            for i in range(len(part)):
                holds_one[i] |= _key(part[i], bits) > floors[i]
        place = offsets[row]
        for column in range(width):
            if holds_one[column]:
                for i in range(column, d_sae, width):
                    if _key(scores[i], bits) > floor[i]:
                        latents[place] = i
                        place += 1
