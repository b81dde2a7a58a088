"""Low activations: whether a latent means the same where it is weak as where it is strong.

Latents look like one feature where they fire strongest, and like many where they fire weakly
(Bricken et al. 2023, "Towards Monosemanticity", on activation intervals). No labels are
needed to ask what the input held there: take the other latents' parts away from it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels import stock
from saefeat.kernels.codes import Codes


@dataclass(frozen=True, kw_only=True, slots=True)
class LowActivations:
    """The lowest activations of each latent beside its highest."""

    agreement: Float[Tensor, " w"]
    """Cosine between what the input held for the latent in its low activations and in its high
    ones, corrected for noise. 1 where both are one direction; low where others set it off. It
    passes 1 by chance, by a few hundredths where a band is a few dozen noisy rows; nan where
    there are too few rows, or a mean does not stand out of the noise."""
    needed_low: Float[Tensor, " w"]
    """Share of its low activations that the input asked for: 1 where it fires for good reason,
    0 where it had better been silent; nan where there are too few rows."""
    needed_high: Float[Tensor, " w"]
    """The same of its high activations."""
    n_low: Int[Tensor, " w"]
    """Rows in the low band, as many as in the high one."""


def low_activations(
    codes: Codes,
    decoder: Float[Tensor, "w d"],
    residual: Float[Tensor, "n d"],
    *,
    band: float = 0.3,
    least_rows: int = 10,
) -> LowActivations:
    """Compare the input behind each latent's lowest activations with that behind its highest.

    What row n held for latent i is all that other latents leave over, r_n + f_ni d_i. Its mean over
    the latent's lowest `band` of activations is m_low, over its highest m_high, and

        agreement = m_low . m_high / sqrt((m_low . m'_low) (m_high . m'_high))
        needed    = sum_n (r_n + f_ni d_i) . d_i / sum_n f_ni |d_i|^2    over the rows of a band,

    where the products under the root are between means over the first and the second half of
    the rows, so that noise, which is another in each, does not lower the cosine. (The plain
    cosine of two means over few rows is low for every latent.) A latent that weakly answers to
    a second feature, for which there is no other latent, has a low agreement; one that is set
    off by interference, and adds only error, has a low need.

    Args:
        codes: Codes of the rows.
        decoder: Decoder rows of the dictionary.
        residual: What the reconstruction left over, `x - x_hat`.
        band: Share of a latent's activations that are low, and that are high.
        least_rows: Rows of each half, in each band, below which a latent is left out as nan.

    Raises:
        ValueError: The shapes do not belong together, or an option is out of range.
    """
    if codes.d_sae != len(decoder) or codes.n_rows != len(residual):
        raise ValueError(
            f"Codes of {codes.d_sae} latents in {codes.n_rows} rows do not go with a decoder of "
            f"{len(decoder)} latents and {len(residual)} rows of residual."
        )
    if not (0 < band <= 0.5 and least_rows >= 1):
        raise ValueError(
            f"band must be in (0, 0.5] and least_rows at least 1, got {band} and {least_rows}."
        )
    decoder, residual = decoder.detach().double(), residual.detach().double()
    height, n_low = _bands(codes, band)
    first = codes.pattern.rows < codes.n_rows // 2
    low = [_Band(codes, (height < 0) & half, decoder, residual) for half in (first, ~first)]
    high = [_Band(codes, (height > 0) & half, decoder, residual) for half in (first, ~first)]
    enough = torch.stack([one.n_rows for one in (*low, *high)]).min(0).values >= least_rows
    own = (low[0].mean * low[1].mean).sum(1) * (high[0].mean * high[1].mean).sum(1)
    both = [(one.sum + other.sum) for one, other in (low, high)]
    cross = (both[0] * both[1]).sum(1) / n_low.clamp(min=1).double() ** 2
    positive = ((low[0].mean * low[1].mean).sum(1) > 0) & (own > 0) & enough
    missing = torch.full_like(own, torch.nan)
    return LowActivations(
        agreement=torch.where(positive, cross / own.clamp(min=1e-300).sqrt(), missing),
        needed_low=torch.where(enough, _needed(low, decoder), missing),
        needed_high=torch.where(enough, _needed(high, decoder), missing),
        n_low=n_low,
    )


class _Band:
    """Sums over some of the entries of the codes, latent by latent."""

    def __init__(self, codes: Codes, chosen: Tensor, decoder: Tensor, residual: Tensor) -> None:
        pattern, values = codes.pattern.where(chosen), codes.values.detach()[chosen].double()
        zeros = torch.zeros(codes.d_sae, dtype=torch.float64)
        self.n_rows = zeros.index_add(0, pattern.latents, torch.ones_like(values))
        self.activation = zeros.index_add(0, pattern.latents, values)
        left_over = stock.transposed_product(pattern, torch.ones_like(values), residual)
        self.sum = left_over + self.activation[:, None] * decoder
        self.mean = self.sum / self.n_rows.clamp(min=1)[:, None]


def _needed(halves: list[_Band], decoder: Tensor) -> Float[Tensor, " w"]:
    asked = torch.einsum("wd,wd->w", halves[0].sum + halves[1].sum, decoder)
    given = (halves[0].activation + halves[1].activation) * decoder.square().sum(1)
    return asked / given


def _bands(codes: Codes, band: float) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " w"]]:
    """-1 for each latent's lowest activations, 1 for its highest, 0 between; and how many."""
    values, latents = codes.values.detach(), codes.latents
    firing = codes.firing_counts()
    n_band = (firing * band).long()
    # By latent, and within it by value: zeros and below come first and are passed over.
    by_value = values.argsort(stable=True)
    order = by_value[latents[by_value].argsort(stable=True)]
    stored = torch.bincount(latents, minlength=codes.d_sae)
    begin = torch.repeat_interleave(stored.cumsum(0) - stored, stored)
    rank = torch.arange(len(latents)) - begin - (stored - firing)[latents[order]]
    most, all_of_it = n_band[latents[order]], firing[latents[order]]
    height = torch.zeros(len(latents), dtype=torch.int64)
    height[order] = ((rank >= all_of_it - most) & (most > 0)).long() - (
        (rank >= 0) & (rank < most)
    ).long()
    return height, n_band
