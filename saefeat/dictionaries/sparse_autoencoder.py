"""The training step that all one-layer sparse autoencoders share."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saefeat.dictionaries.auxiliary import AuxiliaryConfig, auxiliary_bytes, auxiliary_loss
from saefeat.dictionaries.base import Dictionary, random_unit_rows
from saefeat.dictionaries.step import StepContext, StepLoss
from saefeat.kernels.autograd import sparse_encode, squared_errors
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.shared_latents import summed_gradient


class SparseAutoencoder(Dictionary):
    """A dictionary whose codes are chosen entries of one affine map.

        scores = (x - b_dec) @ W_enc + b_enc,    f = activate(scores) where selected, else 0

    A kind says which entries are selected, what becomes of them, and which losses it adds. The
    scores of all latents are computed once, in training in a short dtype, only to select; what was
    selected is computed again in the dtype of `x`, with gradients, at a cost of `nnz * d_in`.

    A transcoder (Dunefsky et al. 2024, arXiv:2406.11944) decodes to another hook than it reads,
    so its scores are `x @ W_enc + b_enc`: b_dec belongs to the other hook.

    The encoder is held latent by latent too; `W_enc` is the transpose that SAELens and the
    papers call by that name.
    """

    def set_up(self) -> None:
        super().set_up()
        self.encoder = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the papers' name
        """The encoder, one column for each latent."""
        return self.encoder.T

    @torch.no_grad()
    def initialise(
        self,
        generator: torch.Generator,
        centre: Float[Tensor, " d_out"],
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
    ) -> None:
        """Tie encoder and decoder, and start from `centre`.

        The encoder starts as the decoder's transpose and the decoder bias at a robust centre of
        the data, after Gao et al. 2024 (arXiv:2406.04093), appendix A. A transcoder's encoder
        starts at random directions around the mean input, and each decoder row at what the
        target does, on average, where its latent is high.
        """
        super().initialise(generator, centre, sample, target)
        self.b_enc.zero_()
        if not self.is_transcoder:
            self.encoder.copy_(self.W_dec)
            return
        self.encoder.copy_(random_unit_rows(self.d_sae, self.d_in, generator))
        scores = torch.relu((sample - sample.mean(0)) @ self.W_enc)
        rows = scores.T @ (target - target.mean(0))
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        self.b_enc.copy_(-sample.mean(0) @ self.W_enc)

    @property
    def input_bias(self) -> Float[Tensor, " d_in"] | None:
        """What is taken from the input before it is encoded; None in a transcoder."""
        return None if self.is_transcoder else self.b_dec

    def centred(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """The input less `input_bias`."""
        return x if self.input_bias is None else x - self.input_bias

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
        target: Float[Tensor, "n d_out"],
        context: StepContext,
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of a kind's own by name, weights and units included; none by default."""
        return {}

    def reconstruct(
        self, codes: Codes, target: Float[Tensor, "n d_out"], context: StepContext
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_out"]]:
        """The reconstruction loss, as a share of the variance, and the detached residual."""
        error, residual = squared_errors(
            context.kernels, [codes], [1.0], target, self.W_dec, self.b_dec
        )
        return error / context.variance, residual

    def training_loss(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], context: StepContext
    ) -> StepLoss:
        """Reconstruction, the kind's own losses, and for kinds that have it `auxiliary_loss`."""
        with torch.no_grad():
            rough = self.scores(x) if context.scores is None else context.scores
            pattern = self.select(rough, context)
        bias = self.input_bias
        if bias is not None:
            bias = summed_gradient(bias, context.feature_ranks)
        scores = sparse_encode(context.kernels, pattern, x, self.encoder, self.b_enc, bias)
        codes = Codes(pattern, self.activate(scores, pattern, context))
        total, residual = self.reconstruct(codes, target, context)
        terms = {"fvu": torch.linalg.vector_norm(residual).square() / context.variance}
        losses = self.sparsity_losses(scores, codes, target, context)
        config = self.config
        if isinstance(config, AuxiliaryConfig) and config.auxiliary_weight and context.n_dead_whole:
            auxiliary = auxiliary_loss(self, config.auxiliary_k, x, residual, context)
            losses["auxiliary"] = config.auxiliary_weight * auxiliary
        for name, loss in losses.items():
            total = total + loss
            terms[name] = loss.detach()
        return StepLoss(
            total=total,
            terms=terms,
            codes=Codes(pattern, codes.values.detach()),
            residual=residual,
        )

    def step_bytes(self, n: int) -> int:
        """Also those of the auxiliary loss."""
        config = self.config
        has_loss = isinstance(config, AuxiliaryConfig) and config.auxiliary_weight
        return super().step_bytes(n) + (auxiliary_bytes(self, n) if has_loss else 0)

    def initial_bytes(self, n: int) -> int:
        """A transcoder also looks at the scores of its first latents."""
        drawn = super().initial_bytes(n)
        return max(drawn, 8 * n * (self.d_sae + self.d_in)) if self.is_transcoder else drawn

    def scores(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n d_sae"]:
        """The pre-activations of all latents, in the dictionary's dtype."""
        return torch.addmm(self.b_enc, self.centred(self._checked(x)), self.W_enc)

    @torch.no_grad()
    def restart(
        self,
        latents: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_out"],
        x: Float[Tensor, "m d_in"],
    ) -> None:
        """Also gives them encoders, weak enough not to disturb.

        Bricken et al. 2023, appendix on neuron resampling: the encoder row gets a fifth of the
        mean length of the others. A transcoder's points at the input, and is off at the others'.
        """
        super().restart(latents, directions, x)
        others = torch.ones(self.d_sae, dtype=torch.bool, device=latents.device)
        others[latents] = False
        length = self.encoder[others].norm(dim=1).mean() if others.any() else 1.0
        inputs = directions
        if self.is_transcoder:
            inputs = x - x.mean(0)
            inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.encoder[latents] = 0.2 * length * inputs
        self.b_enc[latents] = 0.0
        if self.is_transcoder:
            self.b_enc[latents] = -(self.encoder[latents] @ x.mean(0))

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float) -> None:
        """Also changes the scores to those of `x`, `target_scale` times as small.

        Neither ReLU nor a ranking minds the factor.
        """
        super().fold_scale(scale, target_scale)
        self.b_enc.div_(target_scale)
        if scale != target_scale:
            self.encoder.mul_(scale / target_scale)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Also gives the codes the length that the rows lose.

        Kinds that rank latents then rank them by what they add, not by score alone.
        """
        norms = self.W_dec.norm(dim=1)
        self.encoder.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        super().fold_decoder_norms()

    @property
    def sae_lens_architecture(self) -> str:
        """SAELens has transcoders of ReLU and JumpReLU latents alone; it refuses other names."""
        names = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        kind = self.sae_lens_kind
        return names.get(kind, f"{kind}_transcoder") if self.is_transcoder else kind

    @property
    def sae_lens_kind(self) -> str:
        """What SAELens calls the rule by which latents are on."""
        return self.architecture

    @property
    def sae_lens_fields(self) -> dict[str, object]:
        """A transcoder's width, and whether b_dec is taken from the input."""
        applied: dict[str, object] = {"apply_b_dec_to_input": not self.is_transcoder}
        return {**applied, "d_out": self.d_out} if self.is_transcoder else applied

    def file_tensors(self) -> dict[str, Tensor]:
        """Also the encoder's."""
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, **super().file_tensors()}
