"""Which latents have stopped firing during training."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saefeat.dictionaries.base import DictionaryConfig
from saefeat.kernels.codes import Codes

LONGEST_PATIENCE = 10_000_000
"""Tokens without firing that make a latent dead in the published recipe (Gao et al. 2024)."""


def patience_tokens(config: DictionaryConfig, n_tokens: int) -> int:
    """Tokens without firing that make a latent dead in a run of `n_tokens`."""
    if config.dead_after_tokens is not None:
        return config.dead_after_tokens
    return min(LONGEST_PATIENCE, n_tokens // 20)


class DeadLatents:
    """Counts, for each latent, the tokens since it last fired."""

    def __init__(self, d_sae: int, patience: int, device: torch.device) -> None:
        self.patience = patience
        self.tokens_since_fired: Int[Tensor, " d_sae"] = torch.zeros(
            d_sae, dtype=torch.int64, device=device
        )

    def note_firing(self, has_fired: Bool[Tensor, " d_sae"], n_rows: int) -> None:
        """Take in which latents fired in a batch that several processes held parts of."""
        self.tokens_since_fired += n_rows
        self.tokens_since_fired.masked_fill_(has_fired, 0)

    def update(self, codes: Codes) -> None:
        """Take in the codes of a batch."""
        self.tokens_since_fired += codes.n_rows
        # Entries that are off leave their latent's count as it is; no index depends on the data,
        # which a GPU would have to wait for.
        counts = torch.where(codes.values > 0, 0, self.tokens_since_fired[codes.latents])
        self.tokens_since_fired.scatter_reduce_(0, codes.latents, counts, "amin")

    @property
    def latents(self) -> Int[Tensor, " n_dead"]:
        """The latents that are dead now."""
        return (self.tokens_since_fired >= self.patience).nonzero().squeeze(1)
