"""Dictionaries whose codes come from matching pursuit (Costa et al. 2025 gave SAEs that form)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.dictionaries.step import StepContext, StepLoss
from saefeat.dictionaries.topk import check_k
from saefeat.kernels.autograd import squared_errors
from saefeat.kernels.codes import Codes
from saefeat.kernels.compiled_pursuit import ROWS_AT_ONCE
from saefeat.kernels.dispatch import choose_kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingPursuitConfig(DictionaryConfig):
    """Picks atoms one by one and refits them all: sparse coding, with no encoder to train.

    Codes are those of non-negative orthogonal matching pursuit (Pati et al. 1993).
    """

    k: int = 32
    """Atoms picked per token at most."""
    tolerance: float = 0.0
    """A token stops picking once what is left is shorter than this share of it."""
    learning_rate: float | None = 1e-2
    """Peak learning rate of Adam, the same at every width: atoms have length 1."""
    decay_fraction: float = 0.4
    """Share of the steps over which the learning rate falls to 0 at the end."""


class MatchingPursuit(Dictionary):
    """Atoms of length 1, and codes by non-negative orthogonal matching pursuit.

        f = argmin |x - b_dec - f @ W_dec|,  f >= 0, over at most k atoms that were picked greedily
        loss = sum |x - b_dec - f @ W_dec|^2, as a share of the variance of x

    The codes are a least-squares fit, so that the gradient of the loss by the atoms is the one
    with codes held constant (the envelope theorem). An encoder infers codes by one linear map,
    which fails near the limit of what a layer can hold ("amortisation gap", O'Neill et al. 2024);
    this does not, and costs more for each token. Not the MP-SAE of Costa et al. (arXiv:2506.03093),
    which has no refit: SAELens reads that one, and refuses this.

    Raises:
        ValueError: `k` or `tolerance` is out of range, or a transcoder is asked for.
    """

    architecture = "matching_pursuit_refit"
    config_type = MatchingPursuitConfig
    config: MatchingPursuitConfig

    def set_up(self) -> None:
        super().set_up()
        self._kept: tuple[Tensor, Tensor] | None = None
        check_k(self.config.k, self.d_sae)
        if not 0 <= self.config.tolerance < 1:
            raise ValueError(
                f"tolerance must be at least 0 and below 1, got {self.config.tolerance}."
            )
        if self.is_transcoder:
            raise ValueError(
                "Matching pursuit decomposes what it reads, so it makes no transcoder. "
                "Use one of the kinds with an encoder."
            )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """The codes of the pursuit, by the fastest kernels that there are.

        Raises:
            ValueError: Also if an activation is not finite, which nothing correlates with.
        """
        x = self._checked(x)
        if not x.isfinite().all():
            raise ValueError(f"The activations of {self.hook_name!r} hold NaN or infinity.")
        _, kernels = choose_kernels("auto", self.W_dec.device)
        # Refits of many picks lose everything in bfloat16.
        dtype = torch.promote_types(x.dtype, torch.float32)
        atoms, gram = self._atoms_and_gram(dtype)
        codes = kernels.matching_pursuit(
            (x - self.b_dec).to(dtype), atoms, self.config.k, self.config.tolerance, gram
        )
        return Codes(codes.pattern, codes.values.to(x.dtype))

    def _atoms_and_gram(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The atoms and their inner products, made again only where the atoms have changed."""
        atoms = self.W_dec.to(dtype)
        kept = self._kept
        # By content: an in-place change through `.data` leaves no other trace.
        if kept is None or kept[0].device != atoms.device or not torch.equal(kept[0], atoms):
            kept = self._kept = (atoms.clone(), atoms @ atoms.T)
        return kept

    def step_flops(self, n: int) -> float:
        """2 n d d_sae + 2 d d_sae^2 + n d_sae (k^2 + 5 k) + 4 nnz d.

        Products with all atoms, the Gram matrix, k updates of all correlations, each beside those
        before it, and the gradients of what was picked.
        """
        k, d = self.config.k, self.d_in
        picks = n * self.d_sae * (k**2 + 5 * k)
        return 2.0 * n * d * self.d_sae + 2 * d * self.d_sae**2 + picks + 4 * n * k * d

    def lasting_bytes(self, n: int) -> int:
        """The Gram matrix, and the correlations of some rows with all atoms."""
        return 4 * self.d_sae * (self.d_sae + min(n, ROWS_AT_ONCE))

    def training_loss(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], context: StepContext
    ) -> StepLoss:
        """The squared error, with gradients for the atoms and b_dec."""
        with torch.no_grad():
            codes = context.kernels.matching_pursuit(
                x - self.b_dec, self.W_dec, self.config.k, self.config.tolerance
            )
        error, residual = squared_errors(
            context.kernels, [codes], [1.0], target, self.W_dec, self.b_dec
        )
        total = error / context.variance
        return StepLoss(total=total, terms={"fvu": total.detach()}, codes=codes, residual=residual)
