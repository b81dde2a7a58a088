"""Collects what a report shows of single latents, while it measures.

Shape letters: n rows, c latents that are followed, m of them that are shown.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.sources import POSITIONS, TOKEN_IDS
from saefeat.dictionaries.base import Dictionary
from saefeat.kernels.codes import Codes
from saefeat.metrics.contexts import TopContexts
from saefeat.metrics.sparsity import SparsityCounts
from saefeat.metrics.unembedding import promoted_tokens, reaches_unembedding
from saefeat.report.feature_views import BINS_PER_OCTAVE, LOWEST_LOG2, N_BINS, FeatureViews

MOST_VIEWS = 6000
"""Latents that a report shows of all dictionaries together, so that its page stays below 10 MB."""
FOLLOWED = 4
"""Latents followed for each that is shown, for which ones fire is known only at the end."""
N_NEIGHBOURS = 5


class ViewCollector:
    """Follows latents of one dictionary through a pass over text.

    Those followed are evenly spaced by number, which training gives them at random; those shown
    are at even ranks of density among those followed that fired.

    Args:
        dictionary: Whose latents.
        n_shown: Latents to show; fewer where fewer fired.
        has_tokens: Whether batches bring their tokens.
    """

    def __init__(self, dictionary: Dictionary, n_shown: int, has_tokens: bool) -> None:
        n_followed = min(dictionary.d_sae, FOLLOWED * n_shown)
        self.n_shown = n_shown
        self.followed = torch.arange(n_followed) * dictionary.d_sae // n_followed
        self.histogram = torch.zeros(n_followed * N_BINS, dtype=torch.int64)
        self.highest = torch.zeros(n_followed)
        self.contexts = TopContexts(n_followed) if has_tokens else None
        self._slot = torch.full((dictionary.d_sae,), -1)
        self._slot[self.followed] = torch.arange(n_followed)

    def update(self, codes: Codes, batch: Mapping[str, Tensor]) -> None:
        """Take in the codes of a batch, which brings `token_ids` and `positions` if it has them."""
        slots = self._slot[codes.latents]
        on = (slots >= 0) & (codes.values > 0)
        slots, values, rows = slots[on], codes.values[on].float(), codes.pattern.rows[on]
        octaves = values.log2() - LOWEST_LOG2
        bins = (octaves * BINS_PER_OCTAVE).floor().long().clamp(0, N_BINS - 1)
        self.histogram += torch.bincount(slots * N_BINS + bins, minlength=len(self.histogram))
        dense = torch.zeros(codes.n_rows, len(self.followed))
        dense[rows, slots] = values
        self.highest = self.highest.maximum(dense.amax(0))
        if self.contexts is not None:
            self.contexts.update(dense, batch[TOKEN_IDS], batch[POSITIONS])

    def views(
        self, dictionary: Dictionary, sparsity: SparsityCounts, target: str, model: Any
    ) -> FeatureViews:
        """What to show, after the last batch.

        Args:
            dictionary: The one that the codes were of.
            sparsity: Counts of the same batches.
            target: The hook that it reconstructs.
            model: The language model, for the tokens that latents promote; None for none.
        """
        densities = sparsity.density[self.followed]
        ranked = densities.argsort(descending=True, stable=True)[: int((densities > 0).sum())]
        ranks = torch.linspace(0, len(ranked) - 1, min(self.n_shown, len(ranked)))
        shown = ranked[ranks.round().long()]
        latents = self.followed[shown]
        cosines, neighbours = _neighbours(dictionary.W_dec.detach().float(), latents)
        tokens = torch.zeros(0, len(shown), 0, dtype=torch.int32)
        activations = torch.zeros(0, len(shown), 0)
        if self.contexts is not None:
            self.contexts.finish()
            tokens = self.contexts.tokens[:, shown]
            activations = self.contexts.activations[:, shown]
        promoted = torch.zeros(len(shown), 0, dtype=torch.int32)
        logits = torch.zeros(len(shown), 0)
        if model is not None and reaches_unembedding(model, target, dictionary.d_out):
            promoted, logits = promoted_tokens(model, dictionary.W_dec[latents])
        return FeatureViews(
            latents=latents.int(),
            densities=densities[shown].float(),
            means=(sparsity.activation_sums / sparsity.firing)[latents].float(),
            highest=self.highest[shown],
            histogram=self.histogram.view(-1, N_BINS)[shown].int(),
            tokens=tokens,
            activations=activations,
            neighbours=neighbours.int(),
            cosines=cosines,
            promoted=promoted,
            logits=logits,
        )


def token_texts(views: Mapping[str, FeatureViews], model: Any) -> dict[int, str]:
    """The text of every token that is shown; empty without a model that has a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return {}
    shown = sorted(set().union(*(one.token_ids for one in views.values())))
    return {number: tokenizer.decode([number]) for number in shown}


def _neighbours(
    decoder: Float[Tensor, "d_sae d"], latents: Tensor
) -> tuple[Float[Tensor, "m j"], Tensor]:
    """Highest cosines with the decoder rows of other latents, and which those are."""
    unit = torch.nn.functional.normalize(decoder, dim=1)
    cosines = unit[latents] @ unit.T
    cosines[torch.arange(len(latents)), latents] = -2  # no latent is its own neighbour
    best = cosines.topk(min(N_NEIGHBOURS, len(decoder) - 1), dim=1)
    return best.values, best.indices
