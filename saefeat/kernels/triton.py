"""Triton kernels for CUDA devices, on the programs of `triton_products` and `triton_selection`.

Nothing here waits for the device, except `above`, which has to learn how much to allocate.
Sums are held in float32, in float64 for float64 inputs, and are added in the same order each
time: no float is added atomically, so results are the same to the last bit in each run.

Under the environment variable TRITON_INTERPRET=1 the same programs run on a processor, slowly:
that is how they are tested where there is no GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels import pursuit, triton_products, triton_selection
from saefeat.kernels.codes import SparsityPattern, offsets_of

matching_pursuit = pursuit.matching_pursuit

ENTRIES = 16
"""Stored entries that a program takes at a time."""
COLUMNS = 128
"""Columns of a weight matrix that a program takes at a time, at most."""
SCANNED = 4096
"""Columns of a row of scores that a program takes at a time, at most."""
WINDOW = 256
"""Stored entries of one latent beyond which several programs share them."""
SCAN_WARPS = 8
"""Warps of a program that scans a row of scores."""


class _Format(NamedTuple):
    """How floats of one dtype become integers that rank alike."""

    bits: torch.dtype
    """The integer dtype of the same size."""
    infinity: int
    """The bits of infinity."""
    key_type: Any
    """What a program holds keys in."""

    @property
    def largest(self) -> int:
        return torch.iinfo(self.bits).max


_FORMATS = {
    torch.float16: _Format(torch.int16, 0x7C00, tl.int32),
    torch.bfloat16: _Format(torch.int16, 0x7F80, tl.int32),
    torch.float32: _Format(torch.int32, 0x7F800000, tl.int32),
    torch.float64: _Format(torch.int64, 0x7FF0000000000000, tl.int64),
}


def top_k(scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """See `eager.top_k`. Indices ascend; of equal scores, those at the lowest ones are kept."""
    n, d_sae = scores.shape
    scores = _with_whole_rows(scores)
    form = _FORMATS[scores.dtype]
    out = torch.empty(n, k, dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        triton_selection.top_k_of_row[(n,)](
            out,
            scores.view(form.bits),
            d_sae,
            scores.stride(0),
            k,
            **_scan(form, d_sae, least=-form.largest - 1),
        )
    return out


def batch_top_k(
    scores: Float[Tensor, "n d_sae"], n_kept: int
) -> tuple[SparsityPattern, Float[Tensor, ""]]:
    """See `eager.batch_top_k`. The pattern stores exactly `n_kept` entries, known beforehand.

    So, other than the reference, of scores that equal the least it keeps those first in row-major
    order, and where fewer than `n_kept` are positive it fills up with entries that are not. The
    ReLU of the codes makes those 0, which counts as off.
    """
    n, d_sae = scores.shape
    scores = _with_whole_rows(scores)
    form = _FORMATS[scores.dtype]
    bits, stride = scores.view(form.bits), scores.stride(0)
    scan = _scan(form, d_sae, least=0)  # what is not positive ties at 0
    latents = torch.empty(n_kept, dtype=torch.int64, device=scores.device)
    threshold, needed = latents.new_zeros(()), latents.new_full((), n_kept)
    greater, tied = latents.new_empty(n), latents.new_empty(n)
    with torch.cuda.device_of(scores):
        for shift in range(torch.iinfo(form.bits).bits - 8, -1, -8):
            histogram = latents.new_zeros(256)
            triton_selection.add_histogram[(n,)](
                histogram, threshold, bits, d_sae, stride, shift=shift, **scan
            )
            triton_selection.descend[(1,)](histogram, threshold, needed)
        triton_selection.count_row[(n,)](greater, tied, threshold, bits, d_sae, stride, **scan)
        taken = torch.minimum((needed - tied.cumsum(0) + tied).clamp_min(0), tied)
        offsets = offsets_of(greater + taken)
        triton_selection.write_row[(n,)](
            latents, offsets, taken, threshold, bits, d_sae, stride, **scan
        )
    pattern = SparsityPattern(offsets, latents, d_sae)
    kept = scores[pattern.rows, latents]
    positive = kept > 0
    least = torch.where(positive, kept, torch.inf).amin()
    tiny = torch.finfo(scores.dtype).tiny
    return pattern, torch.where(positive.any(), least, tiny).float()


def above(scores: Float[Tensor, "n d_sae"], floor: Float[Tensor, " d_sae"]) -> SparsityPattern:
    """See `eager.above`. Waits for the device once, to learn how many entries there are."""
    n, d_sae = scores.shape
    scores = _with_whole_rows(scores)
    floor = floor.to(scores.dtype).contiguous()
    counts = torch.zeros(n, dtype=torch.int64, device=scores.device)
    options = {
        "wide": _wide(scores)[1],
        "block": _block(d_sae, SCANNED),
        "num_warps": SCAN_WARPS,
    }
    with torch.cuda.device_of(scores):
        triton_selection.count_above[(n,)](
            counts, scores, floor, d_sae, scores.stride(0), **options
        )
        offsets = offsets_of(counts)
        latents = counts.new_empty(int(offsets[-1]))
        triton_selection.write_above[(n,)](
            latents, offsets, scores, floor, d_sae, scores.stride(0), **options
        )
    return SparsityPattern(offsets, latents, d_sae)


def sampled_product(
    pattern: SparsityPattern, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " nnz"]:
    """See `eager.sampled_product`."""
    left, right = _with_whole_rows(left), _with_whole_rows(right)
    n_entries, width = len(pattern.latents), left.shape[1]
    out = left.new_empty(n_entries)
    with torch.cuda.device_of(left):
        triton_products.dot_rows[(triton.cdiv(n_entries, ENTRIES),)](
            out,
            pattern.rows,
            pattern.latents,
            left,
            right,
            n_entries,
            width,
            left.stride(0),
            right.stride(0),
            many=ENTRIES,
            block=_block(width, COLUMNS),
            wide=_wide(left)[1],
        )
    return out


def product(
    pattern: SparsityPattern, values: Float[Tensor, " nnz"], weight: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """See `eager.product`."""
    return _add_rows(pattern.offsets, pattern.latents, values, weight, None)


def transposed_product(
    pattern: SparsityPattern,
    values: Float[Tensor, " nnz"],
    rows: Float[Tensor, "n d"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """See `eager.transposed_product`. Several programs share a latent that is on often."""
    offsets, order = pattern.by_latent
    sums = _add_rows(
        offsets, pattern.rows[order], values[order], rows, owners=pattern.latents[order]
    )
    return sums if out is None else out.add_(sums)


def latent_sums(pattern: SparsityPattern, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """See `eager.latent_sums`."""
    ones = values.new_ones(1).expand(pattern.n_rows, 1)
    return transposed_product(pattern, values, ones).squeeze(1)


def _add_rows(
    offsets: Int[Tensor, " m_plus_1"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "r d"],
    owners: Int[Tensor, " nnz"] | None,
) -> Float[Tensor, "m d"]:
    """Row i is the sum of `values[e] * matrix[indices[e]]` from `offsets[i]` to the next.

    With `owners`, the i of every entry in ascending order, windows that one i fills are added up
    by programs of their own.
    """
    matrix, values = _with_whole_rows(matrix), values.contiguous()
    width, stride, n_out = matrix.shape[1], matrix.stride(0), len(offsets) - 1
    out = matrix.new_empty(n_out, width)
    dtype, wide = _wide(matrix)
    block = _block(width, COLUMNS)
    n_blocks = triton.cdiv(width, block)
    options = {"many": ENTRIES, "block": block, "wide": wide}
    parts = None
    with torch.cuda.device_of(matrix):
        if owners is not None:
            parts = matrix.new_empty(len(owners) // WINDOW, width, dtype=dtype)
            triton_products.add_windows[(len(parts), n_blocks)](
                parts, owners, indices, values, matrix, width, stride, window=WINDOW, **options
            )
        triton_products.add_rows[(n_out, n_blocks)](
            out,
            offsets,
            indices,
            values,
            matrix,
            parts,
            width,
            stride,
            window=0 if owners is None else WINDOW,
            **options,
        )
    return out


def _with_whole_rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The matrix with the entries of a row side by side; copied only where they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _wide(matrix: Tensor) -> tuple[torch.dtype, Any]:
    """What sums over this matrix are held in, for torch and for Triton."""
    if matrix.dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def _block(width: int, most: int) -> int:
    """The least power of two that holds the width, from 16 to `most`."""
    return min(most, 1 << (max(width, 16) - 1).bit_length())


def _scan(form: _Format, width: int, least: int) -> dict[str, Any]:
    """What the programs that scan a row of keys are compiled for."""
    return {
        "least": least,
        "largest": form.largest,
        "infinity": form.infinity,
        "key_type": form.key_type,
        "block": _block(width, SCANNED),
        "num_warps": SCAN_WARPS,
    }
