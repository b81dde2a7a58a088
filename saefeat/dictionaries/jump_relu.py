"""JumpReLU sparse autoencoders (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saefeat.dictionaries.penalty import Penalised, PenalisedConfig
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.codes import Codes, SparsityPattern


@dataclass(frozen=True, kw_only=True, slots=True)
class JumpReLUConfig(PenalisedConfig):
    """A learned threshold for each latent, under an L0 penalty (Rajamanoharan et al. 2024)."""

    sparsity_loss: Literal["step", "tanh_quadratic"] = "step"
    """"step" counts the latents that are on. "tanh_quadratic" is a smooth count that also
    weighs down latents that are on often; see `JumpReLU`."""
    bandwidth: float = 1.0
    """Width of the window around a threshold within which its gradient is estimated."""
    tanh_scale: float = 4.0
    """The c of "tanh_quadratic"."""
    frequent: float = 0.1
    """Density at which "tanh_quadratic" counts a latent twice."""


TARGET_GAIN = 30.0
"""Coefficient where L0 is twice `target_l0`, before the next limit. Below the target it is
negative: without a reward for being on, L0 falls on by itself and never comes back."""
MAX_COEFFICIENT = 6.0
"""Largest coefficient while steering. A squared miss, as in Rajamanoharan et al., is so steep at
the start that Adam, which remembers its gradients, hardly moves the thresholds afterwards."""
MIN_INITIAL_THRESHOLD = 0.01
"""Least threshold to start from: the logarithm of one near 0 would hardly move."""


class JumpReLU(Penalised):
    """A latent is on where its score passes its own learned threshold.

        f = scores * [scores > threshold]

    A jump has no gradient, so the threshold's is estimated by a window of `bandwidth` around
    it (the paper's equations 11 and 12, with a rectangular kernel). The penalty, per token:

        step            sum_i [scores_i > threshold_i]
        tanh_quadratic  sum_i t_i (1 + t_i / frequent),  t_i = mean over tokens of tanh(c f_i |d_i|)

    The tanh comes from Anthropic's January 2025 update, the quadratic term, against latents
    that are on all the time, from Smith et al. 2025 ("Negative results for SAEs"). With "step"
    a `target_l0` makes the coefficient proportional to the miss, and negative below the target.

    Raises:
        ValueError: A number is not above 0, or the loss is unknown.
    """

    architecture = "jumprelu"
    config_type = JumpReLUConfig
    # At the rate of the weights, a threshold could not double in a run of a hundred steps.
    rate_factors: ClassVar = {"log_threshold": 10.0}
    config: JumpReLUConfig

    def set_up(self) -> None:
        super().set_up()
        for name in ("bandwidth", "tanh_scale", "frequent"):
            if not getattr(self.config, name) > 0:
                raise ValueError(f"JumpReLU needs {name} > 0, got {getattr(self.config, name)}.")
        loss = self.config.sparsity_loss
        if loss not in ("step", "tanh_quadratic"):
            raise ValueError(f"sparsity_loss must be 'step' or 'tanh_quadratic', got {loss!r}.")
        # Its logarithm is learned, so that a threshold stays above 0.
        self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """The score above which each latent is on."""
        return self.log_threshold.exp()

    def start_above(self, threshold: Float[Tensor, ""]) -> None:
        """Sets all thresholds to this one."""
        self.log_threshold.fill_(threshold.clamp_min(MIN_INITIAL_THRESHOLD).log())

    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """Every score above its threshold."""
        scores = self.scores(x)
        return Codes.from_dense(scores * (scores > self.threshold))

    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """Every score above its threshold, and those in the window below it."""
        lowest = self.threshold - self.config.bandwidth / 2
        return context.kernels.above(scores, lowest)

    def activate(
        self,
        scores: Float[Tensor, " nnz"],
        pattern: SparsityPattern,
        context: StepContext,
    ) -> Float[Tensor, " nnz"]:
        """The scores above their thresholds; 0 for the others in the window."""
        threshold = self.threshold[pattern.latents]
        values: Tensor = _Jump.apply(scores, threshold, self.config.bandwidth)
        return values

    def sparsity_losses(
        self,
        scores: Float[Tensor, " nnz"],
        codes: Codes,
        target: Float[Tensor, "n d_out"],
        context: StepContext,
    ) -> dict[str, Float[Tensor, ""]]:
        """The smooth or the exact count of the latents that are on."""
        n = context.n_whole(codes.n_rows)
        if self.config.sparsity_loss == "step":
            threshold = self.threshold[codes.latents]
            count = _Step.apply(scores, threshold, self.config.bandwidth).sum()
            if self.config.target_l0 is None:
                coefficient = self.penalty.step(codes, context)
            else:
                n_on = context.ranks.sum(count.detach().clone())
                miss = n_on / n / self.config.target_l0 - 1
                coefficient = (TARGET_GAIN * miss).clamp(-MAX_COEFFICIENT, MAX_COEFFICIENT)
        else:
            coefficient = self.penalty.step(codes, context)
            norms = self.W_dec.norm(dim=1)[codes.latents]
            smooth = torch.tanh(self.config.tanh_scale * codes.values * norms)
            often = context.kernels.latent_sums(codes.pattern, smooth) / n
            count = n * (often * (1 + often / self.config.frequent)).sum()
            if context.ranks.size > 1:
                # Of a part: its share of the squared mean of all, and of the gradient of that.
                whole = context.ranks.sum(often.detach().clone())
                squares = whole * (2 * often - often.detach())
                count = n * (often + squares / self.config.frequent).sum()
        return {"sparsity": coefficient * count / (n * target.shape[1])}

    @property
    def entries_per_row(self) -> float:
        """The window of the thresholds adds about twice as many."""
        return min(3 * super().entries_per_row, self.d_sae)

    @torch.no_grad()
    def restart(
        self,
        latents: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_out"],
        x: Float[Tensor, "m d_in"],
    ) -> None:
        """Also brings their thresholds down to the lowest there is."""
        super().restart(latents, directions, x)
        self.log_threshold[latents] = self.log_threshold.min()

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Also multiplies the thresholds."""
        self.log_threshold.add_(self.W_dec.norm(dim=1).log())
        super().fold_decoder_norms()

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float) -> None:
        """Also divides the thresholds."""
        super().fold_scale(scale, target_scale)
        self.log_threshold.sub_(math.log(target_scale))

    def file_tensors(self) -> dict[str, Tensor]:
        """SAELens writes the threshold itself."""
        return {**super().file_tensors(), "threshold": self.threshold}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Thresholds of 0 or less become the least float above 0: nothing lies between."""
        tensors = dict(tensors)
        tiny = torch.finfo(self.log_threshold.dtype).tiny
        self.log_threshold.copy_(tensors.pop("threshold").clamp_min(tiny).log())
        super().fill(tensors)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return scores * (scores > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        scores, threshold = ctx.saved_tensors
        window = _window(scores, threshold, ctx.bandwidth)
        return gradient * (scores > threshold), -gradient * threshold * window, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        scores, threshold = ctx.saved_tensors
        return None, -gradient * _window(scores, threshold, ctx.bandwidth), None


def _window(scores: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 / bandwidth within half a bandwidth of the threshold, else 0."""
    return ((scores - threshold).abs() < bandwidth / 2).to(scores.dtype) / bandwidth
