"""The largest scores of a batch that several processes hold parts of.

Shape letters: n rows and d_sae latents of this process, nnz entries.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.kernels.codes import SparsityPattern
from saefeat.kernels.dispatch import Kernels

MARGIN = 1.3
"""How many times its even share of the kept entries each process looks at first."""
DIGIT_BITS = 8
"""Bits of a score that one collective settles."""

_INTEGERS = {2: torch.int16, 4: torch.int32}


def batch_top_k(
    kernels: Kernels, scores: Float[Tensor, "n d_sae"], n_kept: int, ranks: Ranks
) -> tuple[SparsityPattern, Float[Tensor, ""]]:
    """The entries of this process among the `n_kept` largest positive ones of all processes.

    See `eager.batch_top_k`; the same entries, exactly, as one process would keep. Each looks at
    somewhat more than its share of them, and the least kept value is found digit by digit: the
    processes add up how many of their entries have which digit, 2 kB a collective. One that should
    have looked at more says so, and all look again.
    """
    if ranks.size == 1:
        return kernels.batch_top_k(scores, n_kept)
    looked_at = int(MARGIN * n_kept / ranks.size) + DIGIT_BITS
    while True:
        n_here = min(looked_at, scores.numel())
        pattern, least = kernels.batch_top_k(scores, n_here)
        values = scores[pattern.rows, pattern.latents]
        floor = _kth_largest(values, n_kept, ranks)
        is_whole = len(values) < n_here or n_here == scores.numel() or bool(least <= floor)
        if not ranks.maximum(torch.tensor(int(not is_whole))):
            kept = values >= floor
            return pattern.where(kept), floor.float()
        looked_at *= 2


def top_k(
    kernels: Kernels, scores: Float[Tensor, "n d_sae"], k: int, ranks: Ranks
) -> SparsityPattern:
    """The latents of this process among the k largest of each row, of those of all processes.

    Exactly k are kept of a row: of equal ones those of the lower ranks.
    """
    d_sae = scores.shape[1]
    own = kernels.top_k(scores, min(k, d_sae))
    pattern = SparsityPattern.from_top_k(own, d_sae)
    if ranks.size == 1:
        return pattern
    values = _padded(scores.gather(1, own), k)
    everyones = ranks.stacked(values)
    floor = everyones.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    n_above = (everyones > floor).sum((0, 2))
    n_equal = (everyones == floor).sum(2)
    n_free = (k - n_above - n_equal[: ranks.rank].sum(0)).clamp_min(0)
    is_equal = values == floor
    kept = (values > floor) | (is_equal & (is_equal.cumsum(1) <= n_free[:, None]))
    return pattern.where(kept[:, : own.shape[1]].flatten())


def kth_largest_of_rows(scores: Float[Tensor, "n m"], k: int, ranks: Ranks) -> Float[Tensor, "n 1"]:
    """The k-th largest of each row, of the scores that all processes have of it, k at least."""
    m = scores.shape[1]
    if ranks.size == 1:
        return scores.kthvalue(m - k + 1, dim=1, keepdim=True).values
    everyones = ranks.stacked(_padded(scores.topk(min(k, m), dim=1).values, k))
    return everyones.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]


def _padded(values: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n k"]:
    """With columns of minus infinity, up to k."""
    return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)


def _kth_largest(values: Float[Tensor, " nnz"], k: int, ranks: Ranks) -> Float[Tensor, ""]:
    """The k-th largest of the positive values of all processes; the least if they are fewer."""
    integers = _INTEGERS[values.element_size()]
    # The bits of positive floats are in the order of the floats.
    bits = values.view(integers).long()
    found, n_left = 0, k
    n_bits = 8 * values.element_size()
    for shift in range(n_bits - DIGIT_BITS, -1, -DIGIT_BITS):
        is_like = (bits >> (shift + DIGIT_BITS)) == found
        digits = (bits >> shift) & (2**DIGIT_BITS - 1)
        counts = bits.new_zeros(2**DIGIT_BITS).scatter_add_(0, digits, is_like.long())
        counts = ranks.sum(counts).cpu()
        if shift == n_bits - DIGIT_BITS:
            n_left = min(k, int(counts.sum()))
            if n_left == 0:
                return values.new_tensor(torch.finfo(values.dtype).tiny)
        reaching = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a higher one
        digit = int((reaching >= n_left).sum()) - 1
        n_left -= int(reaching[digit] - counts[digit])
        found = found << DIGIT_BITS | digit
    return torch.tensor(found, dtype=integers, device=values.device).view(values.dtype)
