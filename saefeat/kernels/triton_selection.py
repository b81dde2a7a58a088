"""Device programs that choose among the scores of a row; see `triton_compiled`.

Scores are ranked by keys: their bits as integers, changed so that integer order is float order.
`infinity` is infinity's key and `largest` the largest integer of the score's size; keys below
`least` are raised to it. A NaN ranks above infinity, as in `torch.topk`, so that a broken run
shows.
"""

import triton.language as tl

from saefeat.kernels.triton_compiled import compiled


@compiled
def load_keys(
    bits,
    columns,
    width,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
):
    """The keys of some columns of a row, those below `least` raised to it."""
    raw = tl.load(bits + columns, mask=columns < width, other=0).to(key_type)
    # Of two negative floats the one with the larger magnitude bits is the smaller.
    key = tl.where(raw < 0, raw ^ largest, raw)
    key = tl.where((raw & largest) > infinity, infinity + 1, key)
    return tl.maximum(key, least)


@compiled
def count_from(
    threshold,
    bits,
    width,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """How many keys of a row are at the threshold or above."""
    counts = tl.zeros((block,), tl.int32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        key = load_keys(bits, columns, width, least, largest, infinity, key_type)
        counts += ((key >= threshold) & (columns < width)).to(tl.int32)
    return tl.sum(counts, axis=0)


@compiled
def write_kept(out, base, columns, kept):
    """Append the kept columns to `out` from `base` on; where the next ones go."""
    flags = kept.to(tl.int32)
    tl.store(out + base + tl.cumsum(flags, axis=0) - 1, columns.to(tl.int64), mask=kept)
    return base + tl.sum(flags, axis=0)


@compiled
def write_from(
    threshold,
    n_tied,
    out,
    base,
    bits,
    width,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """Write the columns whose key is above the threshold, and the first `n_tied` at it."""
    seen = tl.zeros((), tl.int32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        inside = columns < width
        key = load_keys(bits, columns, width, least, largest, infinity, key_type)
        tied = inside & (key == threshold)
        rank = seen + tl.cumsum(tied.to(tl.int32), axis=0)
        base = write_kept(
            out, base, columns, (inside & (key > threshold)) | (tied & (rank <= n_tied))
        )
        seen += tl.sum(tied.to(tl.int32), axis=0)


@compiled
def top_k_of_row(
    out,
    bits,
    width,
    stride,
    k,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """Find the k-th largest key bit by bit, then write the columns from there on."""
    row = tl.program_id(0).to(tl.int64)
    bits += row * stride
    zero = tl.zeros((), key_type)
    count = count_from(zero, bits, width, least, largest, infinity, key_type, block)
    enough = count >= k
    threshold = tl.where(enough, zero, zero + least)
    count = tl.where(enough, count, width)
    step = zero + (largest + 1) // 2
    # Where exactly k are left, the bits below change nothing.
    while (step > 0) & (count != k):
        candidate = threshold + step
        above = count_from(candidate, bits, width, least, largest, infinity, key_type, block)
        enough = above >= k
        threshold = tl.where(enough, candidate, threshold)
        count = tl.where(enough, above, count)
        step = step >> 1
    above = count_from(threshold + 1, bits, width, least, largest, infinity, key_type, block)
    write_from(
        threshold,
        k - above,
        out,
        row * k,
        bits,
        width,
        least,
        largest,
        infinity,
        key_type,
        block,
    )


@compiled
def add_histogram(
    histogram,
    prefix,
    bits,
    width,
    stride,
    shift: tl.constexpr,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """Count the 8 bits at `shift`, over those keys of a row whose bits above are `prefix`.

    Whole numbers are added, so the order in which rows come does not matter.
    """
    bits += tl.program_id(0).to(tl.int64) * stride
    wanted = tl.load(prefix).to(key_type)
    digits = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        key = load_keys(bits, columns, width, least, largest, infinity, key_type) >> shift
        counted = (columns < width) & ((key >> 8) == wanted)
        # The others go to digit 0, and off it again: older Triton has no histogram with a mask.
        digit = tl.where(counted, key & 255, 0).to(tl.int32)
        others = block - tl.sum(counted.to(tl.int32), axis=0)
        counts += tl.histogram(digit, 256) - tl.where(digits == 0, others, 0)
    tl.atomic_add(histogram + digits, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@compiled
def descend(histogram, prefix, needed):
    """Append to `prefix` the digit that the `needed`-th largest key has; take those above off."""
    wanted = tl.load(needed)
    from_here = tl.cumsum(tl.load(histogram + tl.arange(0, 256)), axis=0, reverse=True)
    digit = tl.sum((from_here >= wanted).to(tl.int64), axis=0) - 1
    tl.store(needed, wanted - tl.max(tl.where(from_here < wanted, from_here, 0), axis=0))
    tl.store(prefix, tl.load(prefix) * 256 + digit)


@compiled
def count_row(
    above,
    tied,
    threshold,
    bits,
    width,
    stride,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """How many keys of a row are above the threshold, and how many at it."""
    row = tl.program_id(0).to(tl.int64)
    bits += row * stride
    cut = tl.load(threshold).to(key_type)
    n_above = count_from(cut + 1, bits, width, least, largest, infinity, key_type, block)
    n_from = count_from(cut, bits, width, least, largest, infinity, key_type, block)
    tl.store(above + row, n_above)
    tl.store(tied + row, n_from - n_above)


@compiled
def write_row(
    out,
    offsets,
    n_tied,
    threshold,
    bits,
    width,
    stride,
    least: tl.constexpr,
    largest: tl.constexpr,
    infinity: tl.constexpr,
    key_type: tl.constexpr,
    block: tl.constexpr,
):
    """Write the kept columns of a row from its offset on."""
    row = tl.program_id(0).to(tl.int64)
    write_from(
        tl.load(threshold).to(key_type),
        tl.load(n_tied + row),
        out,
        tl.load(offsets + row),
        bits + row * stride,
        width,
        least,
        largest,
        infinity,
        key_type,
        block,
    )


@compiled
def passes(scores, floor, columns, width, wide: tl.constexpr):
    """Which of some columns of a row are above their floor."""
    inside = columns < width
    score = tl.load(scores + columns, mask=inside, other=0.0).to(wide)
    return inside & (score > tl.load(floor + columns, mask=inside, other=0.0).to(wide))


@compiled
def count_above(counts, scores, floor, width, stride, wide: tl.constexpr, block: tl.constexpr):
    """How many scores of a row are above their floor."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    total = tl.zeros((block,), tl.int32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        total += passes(scores, floor, columns, width, wide).to(tl.int32)
    tl.store(counts + row, tl.sum(total, axis=0))


@compiled
def write_above(
    out, offsets, scores, floor, width, stride, wide: tl.constexpr, block: tl.constexpr
):
    """Write the columns of a row that are above their floor, from its offset on."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    base = tl.load(offsets + row)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        base = write_kept(out, base, columns, passes(scores, floor, columns, width, wide))
