"""Matryoshka sparse autoencoders (Bussmann et al. 2025, arXiv:2503.17547)."""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.autograd import squared_errors
from saefeat.kernels.codes import Codes


@dataclass(frozen=True, kw_only=True, slots=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Nested dictionaries: each prefix of the latents has to reconstruct by itself.

    After Bussmann et al. 2025 (arXiv:2503.17547).
    """

    prefix_fractions: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    """Share of the latents in each prefix, rising to 1."""
    prefix_weights: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.625)
    """Weight of each prefix's reconstruction; scaled to sum to 1. Equal weights with untied
    starts leave the first prefix always on."""


class Matryoshka(BatchTopK):
    """BatchTopK latents in nested prefixes, each of which reconstructs the activations.

        loss = sum_m weight_m * |x - b_dec - sum over latents i < prefix_m of f_i d_i|^2

    as a share of the variance of x. Early latents then learn what is general, late ones detail,
    rather than absorbing one another.

    Raises:
        ValueError: The fractions do not rise to 1, or the weights are not as many, or negative.
    """

    architecture = "matryoshka"
    config_type = MatryoshkaConfig
    config: MatryoshkaConfig

    def set_up(self) -> None:
        super().set_up()
        fractions, weights = self.config.prefix_fractions, self.config.prefix_weights
        self.prefixes = [round(fraction * self.d_sae) for fraction in fractions]
        rising = all(low < high for low, high in pairwise([0, *self.prefixes]))
        if not rising or self.prefixes[-1] != self.d_sae or len(weights) != len(fractions):
            raise ValueError(
                f"prefix_fractions must rise to 1 and have as many weights; {fractions} with "
                f"weights {weights} make prefixes of {self.prefixes} of {self.d_sae} latents."
            )
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(f"prefix_weights must not be negative nor all 0, got {weights}.")

    @property
    def n_reconstructions(self) -> int:
        """One for each prefix."""
        return len(self.prefixes)

    def reconstruct(
        self, codes: Codes, target: Float[Tensor, "n d_out"], context: StepContext
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_out"]]:
        """The weighted losses of all prefixes, and the residual of the last."""
        weights = self.config.prefix_weights
        blocks = []
        for low, high in pairwise([0, *self.prefixes]):
            inside = (codes.latents >= low) & (codes.latents < high)
            blocks.append(Codes(codes.pattern.where(inside), codes.values[inside]))
        shares = [weight / sum(weights) for weight in weights]
        error, residual = squared_errors(
            context.kernels, blocks, shares, target, self.W_dec, self.b_dec
        )
        return error / context.variance, residual
