"""Splitting: one feature of a narrow dictionary that has become several in a wider one."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.superposition.diagnostics.co_activation import CoActivation
from saefeat.superposition.directions import check_cosine, unit_rows
from saefeat.superposition.matching import merge_duplicates


def cluster_sizes(rows: Float[Tensor, "w d"], cosine: float = 0.9) -> Int[Tensor, " n_clusters"]:
    """Sizes of the clusters of near-duplicates in one dictionary, the largest first.

    A latent that is like no other is a cluster of 1, and a row of norm 0 is in none, so the number
    of clusters is the number of latents that are left once `merge_duplicates` has merged the
    others into them.

    Raises:
        ValueError: As for `merge_duplicates`.
    """
    kept = merge_duplicates(rows, cosine)
    _, sizes = kept[kept >= 0].unique(return_counts=True)
    return torch.sort(sizes, descending=True).values


PAIRS_AT_ONCE = 1 << 16
"""Whose directions are gathered: of pairs that are ever on together there may be millions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """What became of each latent of a narrow dictionary in a wider one."""

    n_children: Int[Tensor, " w_narrow"]
    """Wider latents that point its way and fire within its rows."""
    effective_children: Float[Tensor, " w_narrow"]
    """exp of the entropy of the children's shares of its rows: 2 where two fire equally often.
    0 where it has no children."""
    largest_share: Float[Tensor, " w_narrow"]
    """Share of its rows in which the most frequent of them is on; nan where it never fires."""
    covered: Float[Tensor, " w_narrow"]
    """Sum of those shares over the children: 1 where they divide its rows without overlap; nan
    where it never fires."""
    is_split: Bool[Tensor, " w_narrow"]
    """Two children or more, of which none has most of its rows."""
    parents: Int[Tensor, " n_pairs"]
    """The narrow latent of each pair of parent and child, in ascending order."""
    children: Int[Tensor, " n_pairs"]
    """Its child, of one parent the one that is on in most of its rows first."""
    shares: Float[Tensor, " n_pairs"]
    """P(child on | parent on)."""

    @property
    def share(self) -> float:
        """Share of the narrow latents that fire that are split; nan where none fires."""
        fires = ~self.largest_share.isnan()
        return float(self.is_split[fires].double().mean())


def splits(
    counts: CoActivation,
    narrow: Float[Tensor, "w_narrow d"],
    wide: Float[Tensor, "w_wide d"],
    *,
    cosine: float = 0.5,
    within: float = 0.5,
    most: float = 0.9,
) -> Splits:
    """Which latents of a narrow dictionary have their rows divided among several wider ones.

    A child of a narrow latent is a wider latent at a cosine of at least `cosine`, and within
    whose rows the narrow one is on with a probability of at least `within`. A latent that kept its
    meaning has one child that is on in all of its rows, however many more specific children
    there are beside it; a split one has none that is on in `most` of them.

    Args:
        counts: Co-activation of the narrow dictionary with the wider, on the same rows.
        narrow: Its decoder rows.
        wide: Those of the wider dictionary.
        cosine: See above.
        within: See above.
        most: See above.

    Raises:
        ValueError: The counts are not of these dictionaries, or an option is out of range.
    """
    check_cosine(cosine, "cosine")
    if not (0 < within <= 1 and 0 < most <= 1):
        raise ValueError(f"within and most must be in (0, 1], got {within} and {most}.")
    if counts.is_within or counts.counts.shape != (len(narrow), len(wide)):
        raise ValueError(
            f"Splits need co-activation between {len(narrow)} and {len(wide)} latents, got counts "
            f"of {counts.counts.shape}. Make them with CoActivation(d_narrow, d_wide)."
        )
    together = counts.counts.tocoo()
    parent, child = (torch.from_numpy(part.astype("int64")) for part in together.coords)
    n = torch.from_numpy(together.data)
    often = (n > 0) & (n >= within * counts.other_firing[child])
    parent, child, n = parent[often], child[often], n[often].double()
    rows, columns = unit_rows(narrow), unit_rows(wide)
    cosines = [
        torch.einsum("nd,nd->n", rows[some], columns[others])
        for some, others in zip(
            parent.split(PAIRS_AT_ONCE), child.split(PAIRS_AT_ONCE), strict=True
        )
    ]
    near = torch.cat(cosines) >= cosine
    parent, child, n = parent[near], child[near], n[near]
    empty = torch.zeros(len(narrow), dtype=torch.float64)
    n_children = torch.bincount(parent, minlength=len(narrow))
    total = empty.index_add(0, parent, n)
    largest = empty.scatter_reduce(0, parent, n, "amax")
    entropy = empty.index_add(0, parent, torch.special.entr(n / total[parent]))
    firing = counts.firing.double()
    order = torch.from_numpy(np.lexsort((child, -n, parent)))
    return Splits(
        n_children=n_children,
        effective_children=torch.where(n_children > 0, entropy.exp(), 0.0),
        largest_share=largest / firing,
        covered=total / firing,
        is_split=(n_children >= 2) & (largest < most * firing),
        parents=parent[order],
        children=child[order],
        shares=(n / firing[parent])[order],
    )
