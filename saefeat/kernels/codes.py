"""Sparse codes: which latents are on for each token, and how strongly.

Shape letters used in this room: n rows (tokens), d_in input width, d_sae latents, nnz stored
entries.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SparsityPattern:
    """The positions of stored entries in an `[n, d_sae]` matrix, row by row.

    Row `i` holds `latents[offsets[i]:offsets[i + 1]]`, in no fixed order and without repeats.
    The transposed order is worked out once, on first use, since both weight gradients of a
    training step read it.
    """

    def __init__(
        self, offsets: Int[Tensor, " n_plus_1"], latents: Int[Tensor, " nnz"], d_sae: int
    ) -> None:
        self.offsets = offsets
        self.latents = latents
        self.d_sae = d_sae

    @classmethod
    def from_top_k(cls, latents: Int[Tensor, "n k"], d_sae: int) -> "SparsityPattern":
        """A pattern with the same number of entries in every row."""
        n, k = latents.shape
        offsets = torch.arange(0, n * k + 1, k, device=latents.device)
        return cls(offsets, latents.reshape(-1), d_sae)

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "n d_sae"]) -> "SparsityPattern":
        """The entries where `mask` holds. On CUDA this waits for the device, to count them."""
        rows, latents = mask.nonzero(as_tuple=True)
        return cls(offsets_of(_counts(rows, len(mask))), latents, mask.shape[1])

    def where(self, kept: Bool[Tensor, " nnz"]) -> "SparsityPattern":
        """The pattern of those entries for which `kept` holds, in the same order.

        On CUDA this waits for the device, to count them.
        """
        counts = _counts(self.rows, self.n_rows, kept)
        return SparsityPattern(offsets_of(counts), self.latents[kept], self.d_sae)

    @property
    def n_rows(self) -> int:
        """Rows, those without entries included."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of every stored entry."""
        counts = self.offsets.diff()
        index = torch.arange(self.n_rows, device=self.latents.device)
        return torch.repeat_interleave(index, counts, output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " d_sae_plus_1"], Int[Tensor, " nnz"]]:
        """`(offsets, order)`: entry numbers sorted by latent, and where each latent's begin."""
        # Stable, so that the order of additions, and with it the last bit, is the same each run.
        # Of 32 bits, because they are sorted in half the time.
        order = torch.sort(self.latents.int(), stable=True).indices
        return offsets_of(_counts(self.latents, self.d_sae)), order


@dataclass(frozen=True, slots=True)
class Codes:
    """A sparse `[n, d_sae]` matrix of latent activations, in compressed rows.

    A stored value of exactly 0 is allowed and counts as off: TopK keeps k entries a row even
    where fewer are positive.
    """

    pattern: SparsityPattern
    values: Float[Tensor, " nnz"]

    @classmethod
    def from_rows(
        cls, latents: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int
    ) -> "Codes":
        """Codes with k entries in every row."""
        return cls(SparsityPattern.from_top_k(latents, d_sae), values.reshape(-1))

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "n d_sae"]) -> "Codes":
        """Codes of the non-zero entries of a dense matrix."""
        pattern = SparsityPattern.from_mask(dense != 0)
        return cls(pattern, dense[pattern.rows, pattern.latents])

    @property
    def offsets(self) -> Int[Tensor, " n_plus_1"]:
        """Where each row's entries begin, and where the last one's end."""
        return self.pattern.offsets

    @property
    def latents(self) -> Int[Tensor, " nnz"]:
        """The latent of each entry."""
        return self.pattern.latents

    @property
    def d_sae(self) -> int:
        """Latents of the dictionary, those that are off included."""
        return self.pattern.d_sae

    @property
    def n_rows(self) -> int:
        """Rows, those with nothing on included."""
        return self.pattern.n_rows

    def to_dense(self) -> Float[Tensor, "n d_sae"]:
        """The same matrix with its zeros written out: `n * d_sae` numbers."""
        dense = self.values.new_zeros(self.n_rows, self.d_sae)
        dense[self.pattern.rows, self.latents] = self.values
        return dense

    def firing_counts(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent is above zero."""
        return _counts(self.latents, self.d_sae, self.values > 0)

    def row_counts(self) -> Int[Tensor, " n"]:
        """How many latents are above zero in each row."""
        return _counts(self.pattern.rows, self.n_rows, self.values > 0)


def offsets_of(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    """Where each row's entries begin, and where the last one's end, given how many each has."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _counts(
    numbers: Int[Tensor, " nnz"], n: int, counted: Bool[Tensor, " nnz"] | None = None
) -> Int[Tensor, " n"]:
    """How many of the entries, or of those `counted`, have each of n numbers."""
    # Not bincount, nor a mask as index: on CUDA those wait for the device.
    ones = torch.ones_like(numbers) if counted is None else counted.to(numbers.dtype)
    return numbers.new_zeros(n).scatter_add_(0, numbers, ones)
