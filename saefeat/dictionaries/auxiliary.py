"""The auxiliary loss that brings dead latents back (AuxK, Gao et al. 2024, arXiv:2406.04093)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.base import DictionaryConfig
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.autograd import rows_of
from saefeat.kernels.shared_latents import summed_value
from saefeat.kernels.shared_selection import kth_largest_of_rows

if TYPE_CHECKING:
    from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder

SHARE_OF_STEP = 100
"""Entries of the step's dense product for each one of the auxiliary loss's. Its six products in
float32 take about ten times as long for an entry, so this keeps it to a tenth of the step."""
MOST_ROWS = 256
"""Rows that it is estimated from at most: elementwise work on them is most of its cost."""
FEWEST_ROWS = 64
"""Rows that the auxiliary loss is estimated from, however many latents are dead."""
DEAD_SHARE = 0.1
"""Share of the latents that plans take to be dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryConfig(DictionaryConfig):
    """The recipe of the kinds that rank latents, whose dead ones the auxiliary loss revives."""

    auxiliary_weight: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents, beside a main loss of 1."""
    auxiliary_k: int | None = None
    """Dead latents that take part in the auxiliary loss for each token. None: half the
    width of a hook."""


def auxiliary_loss(
    dictionary: "SparseAutoencoder",
    auxiliary_k: int | None,
    x: Float[Tensor, "n d_in"],
    residual: Float[Tensor, "n d_out"],
    context: StepContext,
) -> Float[Tensor, ""]:
    """How badly the dead latents alone predict what the live ones left over.

        aux = sum |e - z @ W_dec|^2 / sum |e - mean(e)|^2,    e = x - x_hat (held constant)

    with `z` the ReLU of the `auxiliary_k` largest pre-activations among the dead latents. Main
    and auxiliary loss are both shares of a variance, so the weight between them means the same
    at every layer. Gradients reach encoder, decoder and encoder bias of the dead latents, as the
    main loss cannot. Callers skip this while nothing is dead.
    """
    # Some of the rows, no more than take a tenth of a step, drawn by the shuffling of the stream:
    # an estimate without bias. FVU and dead share are those of a quarter of 2,048 rows.
    dead, n_dead, features = context.dead, context.n_dead_whole, context.feature_ranks
    n, ranks = context.n_whole(len(x)), context.ranks
    n_affordable = n * dictionary.d_sae * features.size // (SHARE_OF_STEP * n_dead)
    n_rows = min(n, max(2, min(n // 4, MOST_ROWS, max(FEWEST_ROWS, n_affordable))))
    # Of several processes the first few have these rows; each is to do its share of the work.
    x, target = (ranks.rows(rows, slice(n_rows), n) for rows in (x, residual))
    own = ranks.part(n_rows)
    centred = dictionary.centred(x[own]).detach()
    encoder, decoder = (rows_of(one, dead) for one in (dictionary.encoder, dictionary.W_dec))
    scores = centred @ encoder.T + dictionary.b_enc[dead]
    k = max(1, int(dictionary.mean_width) // 2) if auxiliary_k is None else auxiliary_k
    if n_dead > k:
        floor = kth_largest_of_rows(scores.detach(), k, features)
        scores = scores * (scores >= floor)
    prediction = summed_value(torch.relu(scores) @ decoder, features)
    variance = (target - target.mean(0)).square().sum()
    # A residual that does not vary but for rounding, as that of a last batch of one row, leaves
    # nothing to learn from.
    varies = variance > torch.finfo(x.dtype).eps * target.square().sum()
    error = (target[own] - prediction).square().sum()
    return varies * error / torch.where(varies, variance, 1.0)


def auxiliary_bytes(dictionary: "SparseAutoencoder", n: int) -> int:
    """Encoder and decoder of dead latents, their gradients, and some of n rows."""
    copied = int(DEAD_SHARE * dictionary.d_sae) * 2 + min(n // 4, MOST_ROWS)
    return 4 * copied * (dictionary.d_in + dictionary.d_out)
