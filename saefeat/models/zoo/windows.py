"""Contexts cut out of text, in an order that a seed and a step decide.

Shape letters: n tokens, b contexts of s.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

Batch = tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]


class Windows:
    """What a decoder reads and what it is to predict.

    A context predicts s tokens that follow each other, the first of them from the separator
    alone, as `load_tokens` lays contexts out. Within an epoch every token is predicted once, but
    for those short of a context at the ends; contexts are cut elsewhere in each epoch.

    Args:
        ids: All tokens [n], a separator between documents.
        context_size: s.
        separator: What a context begins with.
        seed: Decides order and cuts.

    Raises:
        ValueError: There are not enough tokens for two contexts.
    """

    def __init__(
        self, ids: npt.NDArray[np.int64], *, context_size: int, separator: int, seed: int = 0
    ) -> None:
        self._ids, self._context_size, self._separator = ids, context_size, separator
        self._seed, self._epoch = seed, -1
        # One less than would fit, so that the cuts can move.
        self.n_contexts = len(ids) // context_size - 1
        if self.n_contexts < 1:
            raise ValueError(
                f"The text holds {len(ids):,} tokens, and two contexts of {context_size} are the "
                "least. Is it empty? Give more text or a smaller context_size."
            )
        self._starts = np.arange(self.n_contexts) * context_size

    def batch(self, number: int, n_contexts: int) -> Batch:
        """Batch `number` of a run whose batches have as many contexts; epochs run on."""
        places = range(number * n_contexts, (number + 1) * n_contexts)
        starts = []
        for place in places:
            epoch, within = divmod(place, self.n_contexts)
            if epoch != self._epoch:
                self._begin(epoch)
            starts.append(self._starts[within])
        return self._cut(np.array(starts))

    def in_order(self, n_contexts: int, *, first: int = 0) -> Batch:
        """Contexts from the `first` on, as they follow each other in the text."""
        return self._cut((first + np.arange(n_contexts)) * self._context_size)

    def _begin(self, epoch: int) -> None:
        random = np.random.default_rng([self._seed, epoch])
        offset = random.integers(self._context_size)
        self._starts = random.permutation(self.n_contexts) * self._context_size + offset
        self._epoch = epoch

    def _cut(self, starts: npt.NDArray[np.int64]) -> Batch:
        targets = self._ids[starts[:, None] + np.arange(self._context_size)]
        ids = np.empty_like(targets)
        ids[:, 0], ids[:, 1:] = self._separator, targets[:, :-1]
        return torch.from_numpy(ids), torch.from_numpy(targets)
