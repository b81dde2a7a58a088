"""Which latents of a crosscoder are features, each counted once.

Not every latent that fires is one. What the auxiliary loss revives may fire on a row in a thousand
and spread over all hooks, where it explains nothing; and since latents are ranked by value times
summed decoder norm, two that share a feature of many hooks both rank before a whole feature of
one hook. Both make the mean latent lie over more hooks than the mean feature.

Shape letters used in this file: m pairs of latents.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.dictionaries.crosscoder import AcrossHooks
from saefeat.kernels.codes import Codes
from saefeat.metrics.contribution import AblationCosts
from saefeat.superposition.diagnostics.co_activation import firing_pattern
from saefeat.superposition.directions import close_pairs, unit_rows
from saefeat.superposition.estimators import costly_latents

COPY_COSINE = 0.5
"""Least cosine, over all hooks together, between two latents that share a feature. Such pairs had
.59 to .85 on known features: less than copies within one hook, which must be alike to be on."""
COPY_OVERLAP = 0.7
"""Of the rows in which either is on, the least share in which both are. Of 147 such near pairs of
seven crosscoders of known features, 127 had .86 or more and the others .17 or less; a latent that
stands for two features of equal density has half with that of either."""


class JointFeatures:
    """Adds up over batches what tells a crosscoder's features from its other latents.

    A latent is left out if it repeats a costlier one (their directions and the rows that they are
    on in are much the same), or if no hook would miss it: if at every hook its ablation, with
    that of its copies, costs less than a tenth of what the median latent's costs where it costs
    most. Costs are shares of the variance of one hook, so that a feature of one hook counts as
    much as one of all: of twelve, it has a twelfth of the energy.

    Of features that lie over one, two or all of twelve hooks of 32 coordinates, those that training
    had found whole cost .0033 or more, and latents that were none .0007 or less.
    """

    def __init__(self, crosscoder: AcrossHooks) -> None:
        blocks = crosscoder.W_dec.detach().split(crosscoder.widths, dim=1)
        self._costs = {
            hook_name: AblationCosts(block)
            for hook_name, block in zip(crosscoder.hook_widths, blocks, strict=True)
        }
        self._widths = crosscoder.hook_widths
        unit = unit_rows(crosscoder.balanced(crosscoder.W_dec))
        left, right, _ = close_pairs(unit, unit, COPY_COSINE)
        once = left < right
        self._left: Int[Tensor, " m"] = left[once]
        self._right: Int[Tensor, " m"] = right[once]
        self._together: Int[Tensor, " m"] = torch.zeros(len(self._left), dtype=torch.int64)
        self._firing: Int[Tensor, " d_sae"] = torch.zeros(crosscoder.d_sae, dtype=torch.int64)

    def update(
        self, codes: Codes, target: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]
    ) -> None:
        """Take in a batch: its codes, its rows of all hooks and what the codes were decoded to."""
        widths = list(self._widths.values())
        parts = zip(target.split(widths, dim=1), recon.split(widths, dim=1), strict=True)
        for costs, (own, own_recon) in zip(self._costs.values(), parts, strict=True):
            costs.update(codes, own, own_recon)
        self._firing += codes.firing_counts().cpu()
        on = firing_pattern(codes).tocsc()
        both = on[:, self._left.numpy()].multiply(on[:, self._right.numpy()])
        self._together += torch.from_numpy(both.sum(axis=0))

    def add_up(self, ranks: Ranks) -> None:
        """Take in what the other processes have summed of theirs."""
        for hook_name, costs in self._costs.items():
            costs.add_up(ranks, self._widths[hook_name])
        ranks.sum(self._firing)
        ranks.sum(self._together)

    @property
    def fvu_by_hook(self) -> dict[str, float]:
        """FVU at each hook."""
        return {hook_name: costs.fidelity.fvu for hook_name, costs in self._costs.items()}

    @property
    def costs(self) -> Float[Tensor, " d_sae"]:
        """What the ablation of each latent costs where it costs most, as share of that hook's
        variance."""
        by_hook = [costs.share_of_variance.cpu() for costs in self._costs.values()]
        return torch.stack(by_hook).amax(0)

    @property
    def stands_for(self) -> Int[Tensor, " d_sae"]:
        """The latent that stands for each: its own number, or that of the one it repeats.

        Latents are gone through from the costliest on, and only those that were kept attract, as
        in `merge_duplicates`.
        """
        either = self._firing[self._left] + self._firing[self._right] - self._together
        alike = (self._together > 0) & (self._together >= COPY_OVERLAP * either)
        neighbours: dict[int, list[int]] = {}
        pairs = torch.stack([self._left[alike], self._right[alike]], dim=1).tolist()
        for one, other in pairs:
            neighbours.setdefault(one, []).append(other)
            neighbours.setdefault(other, []).append(one)
        rank = self.costs.argsort(descending=True, stable=True).argsort().tolist()
        stands_for = torch.arange(len(self._firing))
        for latent in sorted(neighbours, key=rank.__getitem__):
            kept = [near for near in neighbours[latent] if rank[near] < rank[latent]]
            kept = [near for near in kept if int(stands_for[near]) == near]
            if kept:
                stands_for[latent] = min(kept, key=rank.__getitem__)
        return stands_for

    @property
    def counted(self) -> Bool[Tensor, " d_sae"]:
        """The latents that are features, one for each."""
        stands_for = self.stands_for
        costs = torch.zeros_like(self.costs).index_add_(0, stands_for, self.costs)
        return costly_latents(costs)
