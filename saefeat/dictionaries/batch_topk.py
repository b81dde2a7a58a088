"""BatchTopK sparse autoencoders (Bussmann, Leask and Nanda 2024, arXiv:2412.06410)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.dictionaries.step import StepContext
from saefeat.dictionaries.topk import RankedConfig, annealed_k, check_ranked
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.shared_selection import batch_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTopKConfig(RankedConfig):
    """Keeps the `k * n` largest latents of a batch of n tokens (Bussmann et al. 2024)."""

    threshold_decay: float = 0.95
    """Decay of the running mean of the least kept value, which is the threshold at inference."""


class BatchTopK(SparseAutoencoder):
    """Keeps the k * n largest scores of a batch; at inference, all above a fixed threshold.

    Training ranks the whole batch, which a single token cannot do. The threshold is the mean over
    recent batches of the least value that was kept, corrected for having started at 0, so that
    it is right from the first step.

    Raises:
        ValueError: `k` is below 1 or above `d_sae`, or another number is out of range.
    """

    architecture = "batch_topk"
    config_type = BatchTopKConfig
    config: BatchTopKConfig
    restarts_dead_latents = False
    threshold_sum: Float[Tensor, ""]
    threshold_weight: Float[Tensor, ""]

    def set_up(self) -> None:
        super().set_up()
        check_ranked(self.config, self.d_sae)
        decay = self.config.threshold_decay
        if not 0 <= decay < 1:
            raise ValueError(f"threshold_decay must be at least 0 and below 1, got {decay}.")
        self.register_buffer("threshold_sum", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """Latents above it are on at inference; 0 before the first step."""
        return self.threshold_sum / self.threshold_weight.clamp_min(1e-30)

    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """Every latent above `threshold`."""
        scores = self.scores(x)
        pattern = SparsityPattern.from_mask(scores > self.threshold)
        return Codes(pattern, scores[pattern.rows, pattern.latents])

    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """The k * n largest scores above 0."""
        d_sae = self.d_sae * context.feature_ranks.size
        k = annealed_k(self.config, d_sae, context.progress)
        n_kept = k * context.n_whole(len(scores))
        pattern, least = batch_top_k(context.kernels, scores, n_kept, context.scored_by)
        decay = self.config.threshold_decay
        self.threshold_sum.mul_(decay).add_((1 - decay) * least)
        self.threshold_weight.mul_(decay).add_(1 - decay)
        return pattern

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float) -> None:
        """Also divides the threshold."""
        super().fold_scale(scale, target_scale)
        self.threshold_sum.div_(target_scale)

    @property
    def sae_lens_kind(self) -> str:
        """SAELens has no BatchTopK for inference: it is a JumpReLU of one threshold."""
        return "jumprelu"

    def file_tensors(self) -> dict[str, Tensor]:
        """The threshold repeated for every latent."""
        return {**super().file_tensors(), "threshold": self.threshold.expand(self.d_sae)}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """The threshold of the file, as if one batch had set it.

        Raises:
            ValueError: The latents have different thresholds, which makes it a JumpReLU.
        """
        tensors = dict(tensors)
        thresholds = tensors.pop("threshold")
        if (thresholds != thresholds[0]).any():
            raise ValueError(
                f"BatchTopK has one threshold, and its file has from {float(thresholds.min()):g} "
                f"to {float(thresholds.max()):g}. Were the weights replaced, but saefeat.json not?"
            )
        self.threshold_sum.copy_(thresholds[0])
        self.threshold_weight.fill_(1.0)
        super().fill(tensors)
