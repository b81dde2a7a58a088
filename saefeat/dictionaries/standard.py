"""Standard sparse autoencoders: ReLU and an L1 penalty (Bricken et al. 2023)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.penalty import Penalised, PenalisedConfig, l1_share
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.codes import Codes, SparsityPattern


@dataclass(frozen=True, kw_only=True, slots=True)
class StandardConfig(PenalisedConfig):
    """ReLU latents under an L1 penalty, weighted by decoder norm (Bricken et al. 2023)."""


class Standard(Penalised):
    """Every latent above 0 is on; an L1 penalty keeps most of them off.

        f = ReLU((x - b_dec) @ W_enc + b_enc)
        loss = sum |x - x_hat|^2 + l1 * sum_i f_i |d_i|,  in the units that `PenalisedConfig` states

    The penalty weighs decoder norms in (Anthropic's April 2024 update), though rows stay at
    length 1 here. A ReLU passes no gradient where it is off, so the step works on the entries
    that are on, as sparse kinds do, without approximation.
    """

    architecture = "standard"
    config_type = StandardConfig
    config: StandardConfig

    def start_above(self, threshold: Float[Tensor, ""]) -> None:
        """Lowers the encoder bias."""
        self.b_enc.sub_(threshold)

    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """Every latent above 0."""
        return Codes.from_dense(torch.relu(self.scores(x)))

    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """Every score above 0."""
        return context.kernels.above(scores, torch.zeros_like(self.b_enc))

    def sparsity_losses(
        self,
        scores: Float[Tensor, " nnz"],
        codes: Codes,
        target: Float[Tensor, "n d_out"],
        context: StepContext,
    ) -> dict[str, Float[Tensor, ""]]:
        """The L1 penalty."""
        coefficient = self.penalty.step(codes, context)
        norms = self.decoder_norms[codes.latents]
        return {"l1": coefficient * l1_share(codes.values * norms, target, context)}
