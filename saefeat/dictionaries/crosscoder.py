"""Crosscoders (Lindsey et al. 2024): one set of latents for several hooks of the same tokens.

Shape letters beyond those of `base`: d_in is the width of all hooks together, side by side.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from saefeat.dictionaries.jump_relu import JumpReLU, JumpReLUConfig
from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.dictionaries.standard import Standard, StandardConfig
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.codes import Codes, SparsityPattern

HELD_SHARE = 0.1
"""A hook holds a latent whose decoder is there at least this share of as long as where it is
longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrosscoderConfig(BatchTopKConfig):
    """One set of BatchTopK latents for several hooks, ranked by value times summed decoder norm.

    A fixed number of latents on, rather than a penalty on their values, keeps a crosscoder from
    inventing latents of one hook alone (Minder et al. 2025, arXiv:2504.02922).
    """

    rank_by: Literal["summed_norm", "length"] = "summed_norm"
    """What a latent's value is multiplied by to rank it: the sum of its decoder's lengths at the
    hooks (Minder et al.), or its length over all hooks together, which is what it adds. A
    feature of L hooks ranks L times as high as one of one hook, or sqrt(L) times."""
    causal: bool = False
    """Whether a latent has a source: a hook up to which it reads and from which on it writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class L1CrosscoderConfig(StandardConfig):
    """One set of ReLU latents for several hooks, under an L1 penalty (Lindsey et al. 2024)."""

    causal: bool = False
    """Whether a latent has a source: a hook up to which it reads and from which on it writes."""


class AcrossHooks(SparseAutoencoder):
    """What every crosscoder is: a sparse autoencoder of several hooks side by side.

        f = activate(sum_l (x^l - b_dec^l) @ W_enc^l + b_enc),    x_hat^l = f @ W_dec^l + b_dec^l

    Each x^l is scaled by itself to mean norm sqrt(d_l), so that every hook weighs alike, and
    the loss is the sum of their squared errors over the sum of their variances. Side by side the
    blocks make one encoder and one decoder, and every kernel of one hook serves.

    The value of a latent and the length of its decoder row can be traded against each other
    without any change. What counts is the value times the summed decoder norm, sum_l |W_dec^l|,
    which selection and penalty use. Rows can then be held at length 1 over all hooks together, the
    share of each hook being free, and need no small start, as they do in recipes that leave their
    length free: with the encoder a tenth of the decoder's transpose, as from a decoder a third as
    long, recall and FVU on known features were the same.

    With `causal` (weakly causal, of Lindsey et al.) the latents are divided evenly among the
    hooks, in order. One of source s reads the hooks up to s and writes to those from s on.

    Raises:
        ValueError: It is to be a transcoder, or the widths of its hooks do not make up d_in.
    """

    reads_several_hooks: ClassVar[bool] = True
    config: CrosscoderConfig | L1CrosscoderConfig
    hook_scales: Float[Tensor, " hooks"]
    """Scales of the hooks in training, over their geometric mean; 1 while it trains."""

    def set_up(self) -> None:
        super().set_up()
        if self.is_transcoder:
            raise ValueError("A crosscoder reconstructs what it reads: it cannot be a transcoder.")
        widths = self.hook_widths
        if min(widths.values()) < 1 or sum(widths.values()) != self.d_in:
            raise ValueError(
                f"The widths of a crosscoder's hooks must be 1 or more and sum to "
                f"d_in={self.d_in}, got {widths}."
            )
        self.register_buffer("hook_scales", torch.ones(len(widths)))

    @property
    def widths(self) -> list[int]:
        """Width of each hook."""
        return list(self.hook_widths.values())

    @property
    def hook_norms(self) -> Float[Tensor, "d_sae hooks"]:
        """Length of each latent's decoder at each hook, where all hooks have mean norm sqrt(d)."""
        blocks = self.W_dec.split(self.widths, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks], dim=1)
        return norms * self.hook_scales

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The summed decoder norm, over hooks of equal weight."""
        return self.hook_norms.sum(1)

    def balanced(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Rows in units in which every hook has mean norm sqrt(d), up to a factor."""
        return rows * self._by_column(self.hook_scales)

    @property
    def sources(self) -> Int[Tensor, " d_sae"] | None:
        """Number of each latent's source among the hooks; None without `causal`."""
        if not self.config.causal:
            return None
        n_latents = [last - first for first, last in self._latents_by_source()]
        return torch.arange(len(n_latents)).repeat_interleave(torch.tensor(n_latents))

    @torch.no_grad()
    def initialise(
        self,
        generator: torch.Generator,
        centre: Float[Tensor, " d_out"],
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
    ) -> None:
        """Also keeps encoder and decoder within what `causal` allows."""
        super().initialise(generator, centre, sample, target)
        if self.config.causal:
            self._keep_causal(self.encoder, self.W_dec)
            self.normalise_decoder()

    @torch.no_grad()
    def restart(
        self,
        latents: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_out"],
        x: Float[Tensor, "m d_in"],
    ) -> None:
        """Also keeps them within what `causal` allows."""
        super().restart(latents, directions, x)
        if self.config.causal:
            self._keep_causal(self.encoder, self.W_dec)
            self.W_dec[latents] /= self.W_dec[latents].norm(dim=1, keepdim=True)

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Also removes the gradient of the weights that `causal` keeps at 0."""
        if self.encoder.grad is not None and self.W_dec.grad is not None:
            self._keep_causal(self.encoder.grad, self.W_dec.grad)
        super().drop_parallel_gradient()

    @torch.no_grad()
    def fold_scales(self, scales: Sequence[float]) -> None:
        """Turn what reads hooks scaled by `scales`, one for each, into what reads them as they are.

        The values of latents are divided by the geometric mean of the scales, as in a dictionary
        of one hook. Which latents are on, and the profile of each over the hooks, stay the same.
        """
        mean = math.exp(sum(map(math.log, scales)) / len(scales))
        relative = torch.tensor([scale / mean for scale in scales]).to(self.hook_scales)
        columns = self._by_column(relative)
        self.encoder.mul_(columns)
        self.W_dec.div_(columns)
        self.b_dec.div_(columns)
        self.hook_scales.mul_(relative)
        self.fold_scale(mean, mean)

    @property
    @abstractmethod
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """The score above which each latent is on at inference."""

    def layer(self, hook_name: str) -> Dictionary:
        """An ordinary dictionary of one hook, of the latents that the hook holds.

        The decoder is exact: its rows are what the crosscoder writes to this hook. So is the
        encoder of a latent that reads this hook alone. Of one that gathers from several hooks,
        the evidence of a single one is less and worth less:

            on where   e + b_enc > threshold,      e = (x^l - b_dec^l) @ W_enc^l
            value      sqrt(g) e + b_enc,          g = sum_m W_dec^m . W_enc^m / W_dec^l . W_enc^l

        A feature along the decoder would have its full value back with g, but several hooks
        cancel interference that one lets through. On known features that persist through four
        layers (d = 32, 72 features a layer) g turned on 10 times as many latents as the
        crosscoder does, with FVU 1.6; this, as many, with FVU .39; the crosscoder had .07.

        Latents that the hook does not hold (a decoder below `HELD_SHARE` of their longest) or that
        do not read it (a `causal` one's later hooks) are 0, so that the others keep their
        numbers. Rows have length 1; `save` writes what SAELens opens.

        Raises:
            KeyError: The crosscoder does not read the hook.
        """
        if hook_name not in self.hook_widths:
            raise KeyError(
                f"This crosscoder has no hook {hook_name!r}; it has {', '.join(self.hook_widths)}."
            )
        return self._layer(list(self.hook_widths).index(hook_name))

    @torch.no_grad()
    def _layer(self, index: int) -> JumpReLU:
        encoders = self.encoder.split(self.widths, dim=1)
        decoders = self.W_dec.split(self.widths, dim=1)
        gathered = torch.stack(
            [(one * other).sum(1) for one, other in zip(encoders, decoders, strict=True)], dim=1
        )
        here, everywhere = gathered[:, index], gathered.sum(1)
        kept = held(self.hook_norms)[:, index] & (here > 0) & (everywhere > 0)
        lengths = torch.where(kept, decoders[index].norm(dim=1), 1.0)
        gains = torch.where(kept, everywhere / here, 0.0).sqrt()
        origin = replace(
            self.origin,
            hook_name=list(self.hook_widths)[index],
            hook_widths=None,
            expansion_factor=self.d_sae / self.widths[index],
        )
        one = JumpReLU(JumpReLUConfig(), self.widths[index], self.d_sae, origin)
        one.encoder.copy_(encoders[index] * (gains * lengths)[:, None])
        one.b_enc.copy_(torch.where(kept, self.b_enc * lengths, 0.0))
        one.W_dec.copy_(decoders[index] * torch.where(kept, 1 / lengths, 0.0)[:, None])
        one.b_dec.copy_(self.b_dec.split(self.widths)[index])
        thresholds = (gains * (self.thresholds - self.b_enc) + self.b_enc) * lengths
        one.log_threshold.copy_(thresholds.clamp_min(torch.finfo(torch.float32).tiny).log())
        return one.to(self.W_dec.dtype).requires_grad_(False)

    def file_tensors(self) -> dict[str, Tensor]:
        """Also the relative scales of the hooks."""
        return {**super().file_tensors(), "hook_scales": self.hook_scales}

    def _by_column(self, numbers: Float[Tensor, " hooks"]) -> Float[Tensor, " d_in"]:
        """A number of each hook, repeated for each of its coordinates."""
        return numbers.repeat_interleave(torch.tensor(self.widths, device=numbers.device))

    def _latents_by_source(self) -> list[tuple[int, int]]:
        """First latent and the one after the last of each source."""
        n_hooks = len(self.widths)
        bounds = [round(self.d_sae * index / n_hooks) for index in range(n_hooks + 1)]
        return list(pairwise(bounds))

    def _keep_causal(
        self, encoder: Float[Tensor, "d_sae d_in"], decoder: Float[Tensor, "d_sae d_in"]
    ) -> None:
        """Set to 0, in place, what reads a hook after its source or writes to one before it."""
        if not self.config.causal:
            return
        for (first, last), enc, dec in zip(
            self._latents_by_source(),
            encoder.split(self.widths, dim=1),
            decoder.split(self.widths, dim=1),
            strict=True,
        ):
            enc[:first] = 0.0
            dec[last:] = 0.0


class Crosscoder(BatchTopK, AcrossHooks):
    """A crosscoder that keeps the k * n largest f_i * sum_l |W_dec,i^l| of a batch of n tokens.

    At inference a latent is on where that product is above a fixed threshold; see `BatchTopK`.

    By the sum, features of one of many hooks rank last: on twelve hooks on which 80 of 96 known
    features persist, the eight of one hook were on in a twentieth of their rows at most, their
    latents died, and 43 ghosts fired. Ranked by length (`rank_by`) all eight were found, and no
    ghost fired.
    """

    architecture = "crosscoder"
    config_type = CrosscoderConfig
    config: CrosscoderConfig

    @property
    def rank_weights(self) -> Float[Tensor, " d_sae"]:
        """What the values of latents are multiplied by before they are ranked."""
        if self.config.rank_by == "summed_norm":
            return self.decoder_norms
        lengths: Tensor = torch.linalg.vector_norm(self.hook_norms, dim=1)
        return lengths

    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """Every latent whose value times `rank_weights` is above `threshold`."""
        scores = self.scores(x)
        pattern = SparsityPattern.from_mask(scores * self.rank_weights > self.threshold)
        return Codes(pattern, scores[pattern.rows, pattern.latents])

    def select(self, scores: Float[Tensor, "n d_sae"], context: StepContext) -> SparsityPattern:
        """The k * n largest products above 0; `scores`, of no more use, are overwritten."""
        return super().select(scores.mul_(self.rank_weights), context)

    @property
    def sae_lens_kind(self) -> str:
        """SAELens has no crosscoders, and refuses the name; `layer` makes what it opens."""
        return self.architecture

    @property
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """`threshold` over what ranks latents."""
        return self.threshold / self.rank_weights


class L1Crosscoder(Standard, AcrossHooks):
    """A crosscoder of ReLU latents, each of which pays for f_i * sum_l |W_dec,i^l|.

    The L1 penalty invents latents of one hook alone: use it to compare with the literature.
    """

    architecture = "l1_crosscoder"
    config_type = L1CrosscoderConfig
    config: L1CrosscoderConfig

    def step_bytes(self, n: int) -> int:
        """Also decoder norms by hook, and their gradients: by block, put together and added."""
        return super().step_bytes(n) + 4 * 4 * self.d_sae * self.d_out

    @property
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """0: every latent above it is on."""
        return torch.zeros_like(self.b_enc)


def held(hook_norms: Float[Tensor, "d_sae hooks"]) -> Bool[Tensor, "d_sae hooks"]:
    """Which hooks hold each latent: those where its decoder is `HELD_SHARE` of its longest."""
    return (hook_norms >= HELD_SHARE * hook_norms.amax(1, keepdim=True)) & (hook_norms > 0)
