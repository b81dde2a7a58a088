"""How often two latents are on in the same row, for all pairs that ever are."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from saefeat.kernels.codes import Codes


class CoActivation:
    """Adds up over batches in how many rows each two latents are on together.

    The counts are a sparse product of the codes' firing patterns, of one dictionary with itself
    or of two dictionaries on the same rows; no `rows x latents` array is made.

    Args:
        d_sae: Latents of the dictionary.
        d_other: Latents of the other dictionary; None counts pairs within the one.
    """

    def __init__(self, d_sae: int, d_other: int | None = None) -> None:
        self.is_within = d_other is None
        self.n_rows = 0
        self.firing: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        self.other_firing: Int[Tensor, " d_other"] = torch.zeros(
            d_sae if d_other is None else d_other, dtype=torch.int64
        )
        self.counts = csr_array((d_sae, len(self.other_firing)), dtype=np.int64)
        """Rows in which both latents are on, `[d_sae, d_other]`. Within one dictionary the
        diagonal is the firing counts."""

    def update(self, codes: Codes, other: Codes | None = None) -> None:
        """Take in a batch: the codes, and those of the other dictionary for the same rows."""
        if (other is None) != self.is_within:
            raise ValueError(
                "Pairs within one dictionary take one batch of codes, pairs between two take two."
            )
        second = codes if other is None else other
        shape = (codes.d_sae, second.d_sae)
        if shape != self.counts.shape or codes.n_rows != second.n_rows:
            raise ValueError(
                f"Counts for {self.counts.shape} latents cannot take codes of {shape} latents in "
                f"{codes.n_rows} and {second.n_rows} rows. Encode the same rows with both."
            )
        left = firing_pattern(codes)
        right = left if other is None else firing_pattern(other)
        self.n_rows += codes.n_rows
        self.firing += codes.firing_counts().cpu()
        self.other_firing += second.firing_counts().cpu()
        self.counts = (self.counts + left.T @ right).tocsr()

    @property
    def exchanged(self) -> "CoActivation":
        """The same counts with the two dictionaries in each other's place."""
        other = CoActivation(len(self.other_firing), None if self.is_within else len(self.firing))
        other.n_rows = self.n_rows
        other.firing, other.other_firing = self.other_firing.clone(), self.firing.clone()
        other.counts = self.counts.T.tocsr()
        return other

    def given(self, latents: Int[Tensor, " n"], others: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """P(other on | latent on) for pairs of latents; nan where the latent never fires."""
        if not len(latents):  # of which scipy makes a sparse array again
            return torch.zeros(0, dtype=torch.float64)
        together = torch.from_numpy(self.counts[latents.tolist(), others.tolist()]).double()
        return together / self.firing[latents]


def firing_pattern(codes: Codes) -> csr_array:
    """1 where a latent is above zero, `[n, d_sae]`."""
    on = (codes.values > 0).cpu()
    rows, latents = codes.pattern.rows.cpu()[on].numpy(), codes.latents.cpu()[on].numpy()
    ones = np.ones(len(rows), dtype=np.int64)
    return csr_array((ones, (rows, latents)), shape=(codes.n_rows, codes.d_sae))
