"""Device programs that multiply and add rows of weights; see `triton_compiled`."""

import triton.language as tl

from saefeat.kernels.triton_compiled import compiled


@compiled
def dot_rows(
    out,
    rows,
    latents,
    left,
    right,
    n_entries,
    width,
    left_stride,
    right_stride,
    many: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """out[e] = left[rows[e]] . right[latents[e]]"""
    entries = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    there = entries < n_entries
    row = tl.load(rows + entries, mask=there, other=0).to(tl.int64)
    latent = tl.load(latents + entries, mask=there, other=0).to(tl.int64)
    total = tl.zeros((many, block), wide)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        inside = there[:, None] & (columns < width)[None, :]
        a = tl.load(left + row[:, None] * left_stride + columns[None, :], mask=inside, other=0.0)
        b = tl.load(
            right + latent[:, None] * right_stride + columns[None, :], mask=inside, other=0.0
        )
        total += a.to(wide) * b.to(wide)
    tl.store(out + entries, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=there)


@compiled
def add_span(
    total,
    start,
    end,
    columns,
    indices,
    values,
    matrix,
    width,
    stride,
    many: tl.constexpr,
    wide: tl.constexpr,
):
    """`total` and values[e] * matrix[indices[e]] for start <= e < end."""
    inside = columns < width
    for first in range(start, end, many):
        entries = first + tl.arange(0, many)
        there = entries < end
        index = tl.load(indices + entries, mask=there, other=0).to(tl.int64)
        value = tl.load(values + entries, mask=there, other=0.0).to(wide)
        part = tl.load(
            matrix + index[:, None] * stride + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value[:, None] * part.to(wide), axis=0)
    return total


@compiled
def add_rows(
    out,
    offsets,
    indices,
    values,
    matrix,
    parts,
    width,
    stride,
    window: tl.constexpr,
    many: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """out[i] = sum of values[e] * matrix[indices[e]] over offsets[i] <= e < offsets[i + 1]

    Whole windows within the span are taken from `parts`, unless `window` is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    start = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    total = tl.zeros((block,), wide)
    if window > 0:
        first = (start + window - 1) // window
        last = end // window
        for part in range(first, last):
            place = parts + part * width + columns
            total += tl.load(place, mask=columns < width, other=0.0)
        # Without a whole window, everything is before it and nothing after.
        before = tl.where(first < last, first * window, end)
        after = tl.where(first < last, last * window, end)
        total = add_span(
            total, start, before, columns, indices, values, matrix, width, stride, many, wide
        )
        total = add_span(
            total, after, end, columns, indices, values, matrix, width, stride, many, wide
        )
    else:
        total = add_span(
            total, start, end, columns, indices, values, matrix, width, stride, many, wide
        )
    place = out + row * width + columns
    tl.store(place, total.to(out.dtype.element_ty), mask=columns < width)


@compiled
def add_windows(
    parts,
    owners,
    indices,
    values,
    matrix,
    width,
    stride,
    window: tl.constexpr,
    many: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """parts[w] = what `add_rows` adds over window w, where all of it has one owner.

    Without it, a latent that is on for every token would be added up by one program while the
    rest of the device waits.
    """
    number = tl.program_id(0).to(tl.int64)
    start = number * window
    columns = tl.program_id(1) * block + tl.arange(0, block)
    if tl.load(owners + start) == tl.load(owners + start + window - 1):
        total = tl.zeros((block,), wide)
        total = add_span(
            total,
            start,
            start + window,
            columns,
            indices,
            values,
            matrix,
            width,
            stride,
            many,
            wide,
        )
        tl.store(parts + number * width + columns, total, mask=columns < width)
