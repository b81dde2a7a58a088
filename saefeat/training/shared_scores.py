"""One dense product a step for all dictionaries that read a hook.

Shape letters: n rows, d_in width of the hook, m latents of all dictionaries together.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder

MOST_SCORES = 1 << 29
"""Scores in memory at once, 1 GiB in bfloat16, unless one dictionary alone has more."""


class Scratch:
    """Big matrices, made once: the page faults of a fresh one cost as much as filling it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, purpose: str, n: int, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix; its content lasts until the next call for that purpose."""
        storage = self._storage.get((purpose, dtype))
        if storage is None or storage.numel() < n * width:
            storage = torch.empty(n * width, dtype=dtype, device=self.device)
            self._storage[purpose, dtype] = storage
        return storage[: n * width].view(n, width)


@torch.no_grad()
def shared_scores(
    dictionaries: Sequence[SparseAutoencoder],
    centred: Float[Tensor, "n d_in"],
    mean: Float[Tensor, " d_in"],
    dtype: torch.dtype,
    scratch: Scratch,
) -> list[Float[Tensor, "n _"]]:
    """The pre-activations of every latent, computed in `dtype`: good for selecting, not more.

        (x - b_dec) @ W_enc + b_enc = (x - mean) @ W_enc + [b_enc + (mean - b_dec) @ W_enc]

    The batch's mean is the one centre that all of them share; without any, what is common to all
    rows would use up the digits of a short dtype.

    Args:
        dictionaries: Dictionaries of one hook.
        centred: Rows less `mean`.
        mean: What was taken from the rows.
        dtype: Of the product.
        scratch: Where its operands and its result lie.

    Returns:
        Scores `[n, d_sae]` of each dictionary, views into the scratch.
    """
    widths = [one.d_sae for one in dictionaries]
    encoders = scratch("encoders", sum(widths), centred.shape[1], dtype)
    biases = scratch("biases", 1, sum(widths), dtype)[0]
    parts = zip(dictionaries, encoders.split(widths), biases.split(widths), strict=True)
    for one, encoder, bias in parts:
        encoder.copy_(one.encoder)
        shift = mean if one.input_bias is None else mean - one.input_bias
        bias.copy_(torch.addmv(one.b_enc, one.encoder, shift))
    rows = scratch("rows", len(centred), centred.shape[1], dtype).copy_(centred)
    scores = scratch("scores", len(rows), sum(widths), dtype)
    torch.addmm(biases, rows, encoders.T, out=scores)
    return list(scores.split(widths, dim=1))


def groups(widths: Sequence[int], n_rows: int) -> Iterator[slice]:
    """Runs of dictionaries whose scores fit in memory together, as slices of their list."""
    start = total = 0
    for index, width in enumerate(widths):
        if index > start and (total + width) * n_rows > MOST_SCORES:
            yield slice(start, index)
            start, total = index, 0
        total += width
    if widths:
        yield slice(start, len(widths))
