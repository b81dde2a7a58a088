"""The training step that all one-layer sparse autoencoders share."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.auxiliary import AuxiliaryConfig, auxiliary_loss
from saefeat.dictionaries.base import Dictionary, StepContext, StepLoss
from saefeat.kernels.autograd import sparse_decode, sparse_encode
from saefeat.kernels.codes import Codes, SparsityPattern


class SparseAutoencoder(Dictionary):
    """A dictionary whose codes are chosen entries of one affine map.

        scores = (x - b_dec) @ W_enc + b_enc,    f = activate(scores) where selected, else 0

    A kind says which entries are selected, what becomes of them, and which losses it adds. The
    scores of all latents are computed once in `selection_dtype`, only to select; what was
    selected is computed again in the dtype of `x`, with gradients, at a cost of `nnz * d_in`.
    """

    @abstractmethod
    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """The entries that take part in a training step: at least those that are on."""

    def activate(
        self,
        scores: Float[Tensor, " nnz"],
        pattern: SparsityPattern,
        context: StepContext,
    ) -> Float[Tensor, " nnz"]:
        """The values of the selected entries; a ReLU unless a kind says otherwise."""
        return torch.relu(scores)

    def sparsity_losses(
        self,
        scores: Float[Tensor, " nnz"],
        codes: Codes,
        x: Float[Tensor, "n d_in"],
        context: StepContext,
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of a kind's own by name, weights and units included; none by default."""
        return {}

    def reconstruct(
        self, codes: Codes, x: Float[Tensor, "n d_in"], context: StepContext
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_in"]]:
        """The reconstruction loss, as a share of the variance, and the residual."""
        residual = x - sparse_decode(context.kernels, codes, self.W_dec, self.b_dec)
        return residual.square().sum() / context.variance, residual

    def training_loss(self, x: Float[Tensor, "n d_in"], context: StepContext) -> StepLoss:
        """Reconstruction, the kind's own losses, and for kinds that have it `auxiliary_loss`."""
        pattern = self.select(self._scores(x, context), context)
        scores = sparse_encode(context.kernels, pattern, x, self.encoder, self.b_enc, self.b_dec)
        codes = Codes(pattern, self.activate(scores, pattern, context))
        total, residual = self.reconstruct(codes, x, context)
        terms = {"fvu": (residual.detach().square().sum() / context.variance)}
        losses = self.sparsity_losses(scores, codes, x, context)
        config = self.config
        if isinstance(config, AuxiliaryConfig) and config.auxiliary_weight and context.n_dead:
            auxiliary = auxiliary_loss(self, config.auxiliary_k, x, residual, context)
            losses["auxiliary"] = config.auxiliary_weight * auxiliary
        for name, loss in losses.items():
            total = total + loss
            terms[name] = loss.detach()
        return StepLoss(
            total=total,
            terms=terms,
            codes=Codes(pattern, codes.values.detach()),
            residual=residual.detach(),
        )

    def scores(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n d_sae"]:
        """The pre-activations of all latents, in the dictionary's dtype."""
        return torch.addmm(self.b_enc, self._checked(x) - self.b_dec, self.W_enc)

    @torch.no_grad()
    def _scores(self, x: Float[Tensor, "n d_in"], context: StepContext) -> Tensor:
        dtype = context.selection_dtype
        scores = context.scratch(len(x), self.d_sae, dtype)
        torch.addmm(
            self.b_enc.to(dtype), (x - self.b_dec).to(dtype), self.encoder.to(dtype).T, out=scores
        )
        return scores
