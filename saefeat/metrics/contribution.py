"""What each latent is good for: the error that would be added by taking it away."""

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.kernels.codes import Codes
from saefeat.kernels.dispatch import choose_kernels
from saefeat.metrics.fidelity import FidelitySums


def ablation_costs(
    codes: Codes,
    decoder: Float[Tensor, "d_sae d"],
    target: Float[Tensor, "n d"],
    recon: Float[Tensor, "n d"],
) -> Float[Tensor, " d_sae"]:
    """Fraction of variance unexplained that removing each latent alone from the codes would add.

        cost_i = sum_n [ 2 f_ni (r_n . d_i) + f_ni^2 |d_i|^2 ] / sum_n |target_n - mean(target)|^2,

    with r_n = target_n - recon_n: what |r + f d|^2 adds to |r|^2. The other latents stay as they
    are, so that the costs do not sum to anything: two copies of one latent cost much each, once
    the other is away. No unit. 0 for a latent that never fires; below 0 for one that does harm.

    Raises:
        ValueError: The shapes do not belong together, or the target does not vary.
    """
    costs = AblationCosts(decoder)
    costs.update(codes, target, recon)
    return costs.share_of_variance


class AblationCosts:
    """Adds up over batches what the removal of each latent of one dictionary would cost.

    One entry of the codes costs one scalar product with the residual, so all latents together
    cost as much as decoding did.
    """

    def __init__(self, decoder: Float[Tensor, "d_sae d"]) -> None:
        # Kernels for processors know no short floats.
        wide = torch.promote_types(decoder.dtype, torch.float32)
        self._decoder = decoder.detach().to(wide)
        _, self._kernels = choose_kernels("auto", decoder.device)
        self._squared_norms = self._decoder.double().square().sum(1)
        self.fidelity = FidelitySums()
        self.added_error: Float[Tensor, " d_sae"] = torch.zeros_like(self._squared_norms)

    def update(
        self, codes: Codes, target: Float[Tensor, "..."], recon: Float[Tensor, "..."]
    ) -> None:
        """Take in a batch: its codes, its `[n, d]` rows and what the codes were decoded to."""
        d_sae, d = self._decoder.shape
        if codes.d_sae != d_sae or target.shape != (codes.n_rows, d):
            raise ValueError(
                f"Codes of {codes.d_sae} latents in {codes.n_rows} rows do not go with a decoder "
                f"of {d_sae} latents of width {d} and activations of shape {list(target.shape)}."
            )
        self.fidelity.update(target, recon)
        residual = (target.detach() - recon.detach()).to(self._decoder.dtype)
        along = self._kernels.sampled_product(codes.pattern, residual, self._decoder).double()
        values = codes.values.detach().double()
        added = values * (2 * along + values * self._squared_norms[codes.latents])
        self.added_error.index_add_(0, codes.latents, added)

    def add_up(self, ranks: Ranks, d: int) -> None:
        """Take in what the other processes have summed of theirs, in rows of width d."""
        self.fidelity.add_up(ranks, d)
        ranks.sum(self.added_error)

    @property
    def share_of_variance(self) -> Float[Tensor, " d_sae"]:
        """See `ablation_costs`."""
        return self.added_error / self.fidelity.total_variance
