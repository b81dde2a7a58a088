"""How often features are on, in few numbers, so that a picture can be drawn from a record."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOWEST = -6.0
"""First edge, a log10 of density; the last is 0, a feature that is always on."""
BINS_PER_DECADE = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityHistogram:
    """How many features are on how often, in bins of log10 density, a tenth of a decade each."""

    edges: tuple[float, ...]
    """Ends of the bins, one more than there are bins."""
    counts: tuple[int, ...]
    """Features in each; those rarer than the first edge are in the first bin."""
    n_never: int
    """Features of density 0."""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1 or list(self.edges) != sorted(self.edges):
            raise ValueError(
                f"A histogram has ascending edges, one more than bins: got {len(self.edges)} edges "
                f"and {len(self.counts)} bins."
            )

    @classmethod
    def of(cls, densities: Float[Tensor, " n"]) -> "DensityHistogram":
        """The histogram of the densities of n features."""
        n_bins = round(-LOWEST * BINS_PER_DECADE)
        on = densities[densities > 0].double().log10()
        place = ((on - LOWEST) * BINS_PER_DECADE).long().clamp(0, n_bins - 1)
        return cls(
            edges=tuple(round(LOWEST + i / BINS_PER_DECADE, 9) for i in range(n_bins + 1)),
            counts=tuple(torch.bincount(place, minlength=n_bins).tolist()),
            n_never=len(densities) - len(on),
        )


def summed(histograms: Sequence[DensityHistogram]) -> DensityHistogram:
    """One histogram of the features of several.

    Raises:
        ValueError: They have other bins than each other, or there is none.
    """
    edges = {one.edges for one in histograms}
    if len(edges) != 1:
        raise ValueError(
            f"Only histograms of the same bins can be added, got {len(edges)} kinds of them in "
            f"{len(histograms)}. Were the records made by several versions?"
        )
    return DensityHistogram(
        edges=edges.pop(),
        counts=tuple(map(sum, zip(*(one.counts for one in histograms), strict=True))),
        n_never=sum(one.n_never for one in histograms),
    )
