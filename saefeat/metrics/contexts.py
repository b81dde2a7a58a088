"""Where latents are most active in a text: windows of tokens around their highest activations.

Shape letters: n rows, m latents, k contexts kept, w tokens in a window.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_TOKEN = -1
"""Stands where a window reaches over its context, or a position gave no row (BOS, sinks)."""


class TopContexts:
    """Keeps, for each of some latents, the contexts in which it is most active.

    A context counts by its highest activation and comes once for a latent. Rows come in the order
    of the text; a context may go on from one batch to the next.

    Args:
        n_latents: How many latents are followed.
        n_contexts: Contexts to keep for each.
        before: Tokens of a window before the highest activation.
        after: Tokens after it.
    """

    def __init__(
        self, n_latents: int, *, n_contexts: int = 5, before: int = 16, after: int = 8
    ) -> None:
        window = before + 1 + after
        self.tokens: Int[Tensor, "k m w"] = torch.full(
            (n_contexts, n_latents, window), NO_TOKEN, dtype=torch.int32
        )
        self.activations: Float[Tensor, "k m w"] = torch.zeros(n_contexts, n_latents, window)
        self._peaks = torch.zeros(n_contexts, n_latents)
        self._before, self._after = before, after
        self._unfinished: list[Tensor] = []

    def update(
        self,
        activations: Float[Tensor, "n m"],
        token_ids: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
    ) -> None:
        """Take in a batch; its last context waits for the next one, or for `finish`."""
        new = [activations, token_ids, positions]
        rows = new
        if self._unfinished:
            rows = [torch.cat(both) for both in zip(self._unfinished, new, strict=True)]
        starts = (rows[2].diff() <= 0).nonzero().squeeze(1) + 1
        last = int(starts[-1]) if len(starts) else 0
        if last:
            self._take(*(x[:last] for x in rows))
        self._unfinished = [x[last:] for x in rows]

    def finish(self) -> None:
        """Take in the last context."""
        if self._unfinished:
            self._take(*self._unfinished)
        self._unfinished = []

    def _take(self, activations: Tensor, token_ids: Tensor, positions: Tensor) -> None:
        positions = positions.long()
        context = torch.nn.functional.pad((positions.diff() <= 0).cumsum(0), (1, 0))
        n_contexts = int(context[-1]) + 1
        # Laid out by position, with room on both sides, so that no window needs a border case.
        length = self._before + int(positions.max()) + 1 + self._after
        tokens = torch.full((n_contexts, length), NO_TOKEN, dtype=torch.int32)
        tokens[context, positions + self._before] = token_ids.int()
        laid_out = torch.zeros(n_contexts, length, activations.shape[1])
        laid_out[context, positions + self._before] = activations
        peaks, at = laid_out.max(dim=1)
        n_kept = len(self._peaks)
        best, chosen = torch.cat([self._peaks, peaks]).topk(n_kept, dim=0)
        is_new = (chosen >= n_kept)[:, :, None]
        which = (chosen - n_kept).clamp_min(0)
        offsets = torch.arange(-self._before, self._after + 1)
        # Where nothing is on, the highest is anywhere, and no window is taken.
        place = at.gather(0, which)[:, :, None].clamp_min(self._before) + offsets
        latent = torch.arange(activations.shape[1])[None, :, None]
        kept = chosen.clamp_max(n_kept - 1)[:, :, None].expand_as(place)
        self.tokens = torch.where(
            is_new, tokens[which[:, :, None], place], self.tokens.gather(0, kept)
        )
        self.activations = torch.where(
            is_new, laid_out[which[:, :, None], place, latent], self.activations.gather(0, kept)
        )
        self._peaks = best
        self.tokens[best == 0] = NO_TOKEN
        self.activations[best == 0] = 0
