"""How much of a language model's loss survives when a dictionary stands in for a layer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.activations.replacing import replaced_rows
from saefeat.activations.tokens import Tokens
from saefeat.core.distributed import ALONE, Ranks

Replacement = Callable[[Tensor], Tensor]
"""Gives rows `[n, d]` to put in the place of rows `[n, d]`, float32 and on the processor."""


def ce_loss_recovered(ce_clean: float, ce_spliced: float, ce_ablated: float) -> float:
    """Share of the loss that ablation costs and the dictionary wins back.

        (CE_ablated - CE_spliced) / (CE_ablated - CE_clean)

    1 is as good as the model's own activations, 0 as bad as the ablation.

    Raises:
        ValueError: The ablation costs nothing, so there is nothing to recover.
    """
    if ce_ablated == ce_clean:
        raise ValueError(
            f"CE recovered is undefined: ablation leaves the loss at {ce_clean:.4f}. "
            "Does the model use this hook at all?"
        )
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)


class CrossEntropy:
    """Mean next-token loss of a model on fixed contexts, its activations replaced or not.

    Only positions that count are replaced, and of them only those within `max_norm_ratio` of the
    median norm: what the dictionaries never saw in training (BOS, separators, attention sinks)
    keeps its activation. Every position with a next token counts in the mean.

    Args:
        model: A TransformerLens model whose forward gives logits `[b, s, vocabulary]`.
        tokens: The contexts.
        max_norm_ratio: As in the stream that the dictionaries were trained on; None replaces
            all positions that count.
        contexts_per_forward: How many contexts run at once.
        ranks: Processes that ask for the same losses; each runs a share of the contexts.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        *,
        max_norm_ratio: float | None = 10.0,
        contexts_per_forward: int = 8,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.max_norm_ratio = max_norm_ratio
        self.contexts_per_forward = contexts_per_forward
        self.ranks = ranks

    def clean(self) -> float:
        """The model as it is, in nats per token."""
        return self._mean(lambda counts: nullcontext())

    def replaced(
        self, hook_name: str, replacement: Replacement, source: str | None = None
    ) -> float:
        """The loss with the activations of one hook replaced, in nats per token.

        Args:
            hook_name: The hook whose activations are replaced.
            replacement: Makes the new rows.
            source: The hook whose rows it is given, for a transcoder; None for `hook_name`.
        """

        def splice(counts: Bool[Tensor, "b s"]) -> AbstractContextManager[None]:
            return replaced_rows(
                self.model,
                hook_name,
                lambda _, rows: replacement(rows.cpu().float()),
                source=source,
                positions=counts,
                max_norm_ratio=self.max_norm_ratio,
            )

        return self._mean(splice)

    def _mean(self, splice: Callable[[Tensor], AbstractContextManager[None]]) -> float:
        loss_sum, n_losses = 0.0, 0
        size = self.contexts_per_forward
        own = self.ranks.rank * size
        for start in range(own, self.tokens.n_contexts, size * self.ranks.size):
            batch = slice(start, start + size)
            with splice(self.tokens.counts[batch]):
                batch_sum, n_batch = self._forward(batch)
            loss_sum, n_losses = loss_sum + batch_sum, n_losses + n_batch
        if self.ranks.size > 1:
            sums = self.ranks.sum(torch.tensor([loss_sum, n_losses], dtype=torch.float64))
            loss_sum, n_losses = sums.tolist()
        if n_losses == 0:
            raise ValueError("CE is undefined: no position has a next token.")
        return loss_sum / n_losses

    @torch.no_grad()
    def _forward(self, batch: slice) -> tuple[float, int]:
        device = next(self.model.parameters()).device
        ids = self.tokens.ids[batch].long().to(device)
        mask = None if self.tokens.attention_mask is None else self.tokens.attention_mask[batch]
        options = {} if mask is None else {"attention_mask": mask.long().to(device)}
        logits = self.model(ids, return_type="logits", **options)
        return next_token_loss(logits, ids, mask)


def next_token_loss(
    logits: Float[Tensor, "b s v"],
    ids: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s"] | None = None,
) -> tuple[float, int]:
    """Summed cross-entropy of each next token in nats, in float32, and how many there were."""
    targets = ids[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    if mask is not None:
        losses = losses[(mask[:, 1:] & mask[:, :-1]).flatten().to(losses.device)]
    return float(losses.sum(dtype=torch.float64)), losses.numel()
