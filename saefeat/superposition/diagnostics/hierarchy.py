"""Hierarchy: latents that fire only where another, more frequent one does."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from saefeat.superposition.diagnostics.co_activation import CoActivation


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """Pairs of a child and a parent, the surest first."""

    children: Int[Tensor, " n_pairs"]
    parents: Int[Tensor, " n_pairs"]
    parent_given_child: Float[Tensor, " n_pairs"]
    """P(parent on | child on)."""
    p_values: Float[Tensor, " n_pairs"]
    """Chance of as many common rows if the two were independent, before correction."""
    n_tested: int
    """Ordered pairs of alive latents, by which p-values are corrected."""


def child_parent_pairs(
    counts: CoActivation, *, given: float = 0.95, significance: float = 0.01
) -> Hierarchy:
    """Pairs in which a latent is on almost only where a more frequent one is.

        P(parent | child) >= given,    P(parent) > P(child),    p <= significance / n_tested

    with p the upper tail of the hypergeometric distribution: n_child rows drawn at random, and the
    chance that so many of them are the parent's (Fisher's exact test, one-sided; Bonferroni's
    correction for all ordered pairs of alive latents). So a latent that is on everywhere is
    nobody's parent, and one that fired five times has none unless its parent is rare.

    Rows that depend on each other, as tokens of one text do, make pairs look surer than they are.

    Args:
        counts: Co-activation within one dictionary.
        given: Least P(parent | child).
        significance: Chance that any pair at all is found among independent latents.

    Raises:
        ValueError: The counts are of two dictionaries, or an option is out of range.
    """
    if not counts.is_within:
        raise ValueError(
            "A hierarchy is within one dictionary, and these counts are between two. Make them "
            "with CoActivation(d_sae)."
        )
    if not (0 < given <= 1 and 0 < significance < 1):
        raise ValueError(
            f"given must be in (0, 1] and significance in (0, 1), got {given} and {significance}."
        )
    together = counts.counts.tocoo()
    child, parent = (torch.from_numpy(part.astype("int64")) for part in together.coords)
    n = torch.from_numpy(together.data)
    firing = counts.firing
    likely = (n > 0) & (n >= given * firing[child]) & (firing[parent] > firing[child])
    child, parent, n = child[likely], parent[likely], n[likely]
    n_alive = int((firing > 0).sum())
    n_tested = n_alive * (n_alive - 1)
    p_values = torch.as_tensor(
        hypergeom.sf((n - 1).numpy(), counts.n_rows, firing[parent].numpy(), firing[child].numpy()),
        dtype=torch.float64,
    )
    sure = p_values <= significance / max(1, n_tested)
    child, parent, n, p_values = child[sure], parent[sure], n[sure], p_values[sure]
    order = p_values.argsort(stable=True)
    return Hierarchy(
        children=child[order],
        parents=parent[order],
        parent_given_child=(n.double() / firing[child])[order],
        p_values=p_values[order],
        n_tested=n_tested,
    )
