"""The weight of a sparsity penalty over a run: it warms up, and can steer for an L0."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saefeat.dictionaries.base import DictionaryConfig
from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.codes import Codes

INITIAL_SCORE_BYTES = 16
"""Of a score from which the first threshold is found: itself, and what sorts it."""
GAIN = 0.03
"""Share by which a step moves the coefficient where L0 is e times its target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PenalisedConfig(DictionaryConfig):
    """The recipe of the kinds whose sparsity comes from a penalty."""

    sparsity_coefficient: float = 2.0
    """Weight of the penalty beside the squared error, both summed over a token, in units in which
    each coordinate has variance 1: a latent pays if it explains that many coordinates. Where
    `target_l0` is given, only the value to start from."""
    target_l0: float | None = None
    """Latents on per token to steer for, by moving the coefficient. None keeps it fixed."""
    penalty_warmup_fraction: float = 0.05
    """Share of the steps over which the penalty rises from 0."""
    initial_l0: float = 128.0
    """Latents on per token at the start, at most half of them. A start at half, as random
    weights without biases give, lets the penalty push everything off before it has learned."""


def initial_threshold(scores: Float[Tensor, "n d_sae"], initial_l0: float) -> Float[Tensor, ""]:
    """The score that `initial_l0` latents of a token pass on average; never below 0."""
    n_above = min(int(initial_l0 * len(scores)), scores.numel() // 2)
    return scores.flatten().kthvalue(scores.numel() - n_above).values.clamp_min(0)


def l1_share(
    contributions: Float[Tensor, " nnz"], target: Float[Tensor, "n d_out"], context: StepContext
) -> Float[Tensor, ""]:
    """Summed contributions over those of as many coordinates of the target's mean variance."""
    n_numbers = context.n_whole(len(target)) * target.shape[1]
    return contributions.sum() / (context.variance * n_numbers).sqrt()


class Penalty(nn.Module):
    """A coefficient that rises from 0, and follows a target L0 where one is given.

    The logarithm of the coefficient moves by `GAIN * ln(L0 / target)` a step, at most by `GAIN`,
    an integral controller: it rests only where L0 is the target. Nothing moves during warm-up,
    when L0 says nothing yet about where it will settle.

    Raises:
        ValueError: A number is out of range.
    """

    coefficient: Float[Tensor, ""]

    def __init__(self, config: PenalisedConfig) -> None:
        super().__init__()
        start, target = config.sparsity_coefficient, config.target_l0
        if not start >= 0 or (target is not None and (not target > 0 or start == 0)):
            raise ValueError(
                f"sparsity_coefficient must not be negative, got {start}; to steer for a "
                f"target_l0 both must be above 0, got target_l0={target}."
            )
        warmup, initial_l0 = config.penalty_warmup_fraction, config.initial_l0
        if not (0 <= warmup <= 1 and initial_l0 >= 0):
            raise ValueError(
                "penalty_warmup_fraction must be from 0 to 1 and initial_l0 at least 0, got "
                f"{warmup} and {initial_l0}."
            )
        self.target_l0 = target
        self.warmup_fraction = warmup
        self.register_buffer("coefficient", torch.tensor(float(start)))

    @torch.no_grad()
    def step(self, codes: Codes, context: StepContext) -> Float[Tensor, ""]:
        """The coefficient to use in this step, having seen its codes."""
        if context.progress < self.warmup_fraction:
            return self.coefficient * (context.progress / self.warmup_fraction)
        if self.target_l0 is not None:
            n_on = context.ranks.sum((codes.values > 0).sum())
            l0 = n_on / context.n_whole(codes.n_rows)
            error = (l0 / self.target_l0).clamp_min(1e-3).log().clamp(-1, 1)
            self.coefficient.mul_((GAIN * error).exp())
        return self.coefficient.clone()


class Penalised(SparseAutoencoder):
    """What the kinds whose sparsity comes from a penalty have in common."""

    config: PenalisedConfig

    def set_up(self) -> None:
        super().set_up()
        self.penalty = Penalty(self.config)

    @torch.no_grad()
    def initialise(
        self,
        generator: torch.Generator,
        centre: Float[Tensor, " d_out"],
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
    ) -> None:
        """Also starts with `initial_l0` latents on."""
        super().initialise(generator, centre, sample, target)
        self.start_above(initial_threshold(self.scores(sample), self.config.initial_l0))

    @abstractmethod
    def start_above(self, threshold: Float[Tensor, ""]) -> None:
        """Have the latents on whose score is above a threshold, at the start of training."""

    @property
    def entries_per_row(self) -> float:
        """It starts from `initial_l0` and moves away from it, to where nobody knows."""
        return min(self.config.initial_l0, self.d_sae / 2)

    def initial_bytes(self, n: int) -> int:
        """Scores are sorted to find the first threshold."""
        scored = INITIAL_SCORE_BYTES * n * self.d_sae + 4 * n * self.d_in
        return max(super().initial_bytes(n), scored)
