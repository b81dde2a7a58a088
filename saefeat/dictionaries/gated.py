"""Gated sparse autoencoders (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saefeat.dictionaries.penalty import Penalised, PenalisedConfig, l1_share
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.autograd import squared_errors
from saefeat.kernels.codes import Codes, SparsityPattern


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConfig(PenalisedConfig):
    """Decides which latents are on apart from how strongly (Rajamanoharan et al. 2024)."""


class Gated(Penalised):
    """One map opens gates, another, tied to it, gives magnitudes; only gates are penalised.

        gate = (x - b_dec) @ W_enc + b_enc,    magnitude = (gate - b_enc) * exp(r_mag) + b_mag
        f = [gate > 0] * ReLU(magnitude)
        loss = |x - x_hat(f)|^2 + l1 * sum_i ReLU(gate_i) |d_i| + |x - x_hat(ReLU(gate))|^2

    as a share of the variance of x; in the last term, which trains the gates, the decoder is
    held constant. `b_enc` is the paper's b_gate.
    """

    architecture = "gated"
    config_type = GatedConfig
    config: GatedConfig

    def set_up(self) -> None:
        super().set_up()
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def start_above(self, threshold: Float[Tensor, ""]) -> None:
        """Lowers both encoder biases."""
        self.b_enc.sub_(threshold)
        self.b_mag.sub_(threshold)

    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """The magnitudes above 0 behind open gates."""
        gates = self.scores(x)
        magnitudes = (gates - self.b_enc) * self.r_mag.exp() + self.b_mag
        return Codes.from_dense(torch.relu(magnitudes) * (gates > 0))

    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """Every open gate."""
        return context.kernels.above(scores, torch.zeros_like(self.b_enc))

    def activate(
        self,
        scores: Float[Tensor, " nnz"],
        pattern: SparsityPattern,
        context: StepContext,
    ) -> Float[Tensor, " nnz"]:
        """The magnitudes; that a gate opens passes no gradient."""
        latents = pattern.latents
        magnitudes = (scores - self.b_enc[latents]) * self.r_mag.exp()[latents]
        return torch.relu(magnitudes + self.b_mag[latents]) * (scores > 0)

    def sparsity_losses(
        self,
        scores: Float[Tensor, " nnz"],
        codes: Codes,
        target: Float[Tensor, "n d_out"],
        context: StepContext,
    ) -> dict[str, Float[Tensor, ""]]:
        """The L1 penalty on open gates, and the reconstruction from them that trains them."""
        gates = Codes(codes.pattern, torch.relu(scores))
        coefficient = self.penalty.step(codes, context)
        norms = self.W_dec.norm(dim=1)[codes.latents]
        decoder, b_dec = self.W_dec.detach(), self.b_dec.detach()
        error, _ = squared_errors(context.kernels, [gates], [1.0], target, decoder, b_dec)
        return {
            "l1": coefficient * l1_share(gates.values * norms, target, context),
            "gate_fvu": error / context.variance,
        }

    @property
    def flops_per_entry(self) -> int:
        """Also those of the reconstruction from its gates."""
        return super().flops_per_entry + 4 * self.d_out

    @torch.no_grad()
    def restart(
        self,
        latents: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_out"],
        x: Float[Tensor, "m d_in"],
    ) -> None:
        """Also begins their magnitudes anew, equal to their gates."""
        super().restart(latents, directions, x)
        self.r_mag[latents] = 0.0
        self.b_mag[latents] = self.b_enc[latents]

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Also multiplies the bias of the magnitudes."""
        self.b_mag.mul_(self.W_dec.norm(dim=1))
        super().fold_decoder_norms()

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float) -> None:
        """Also divides the bias of the magnitudes."""
        super().fold_scale(scale, target_scale)
        self.b_mag.div_(target_scale)

    def file_tensors(self) -> dict[str, Tensor]:
        """SAELens's names, in which b_enc is b_gate."""
        tensors = super().file_tensors()
        tensors["b_gate"] = tensors.pop("b_enc")
        return {**tensors, "r_mag": self.r_mag, "b_mag": self.b_mag}
