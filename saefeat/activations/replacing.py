"""Replaces the rows of a hook that count, and leaves the other positions as they are.

Shape letters: b contexts, s positions in a context, n rows that are replaced, d width of the hook,
d_in width of the hook that the replacement is made of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefeat.activations.hooks import replaced_activations


@contextmanager
def replaced_rows(
    model: Any,
    hook_name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    source: str | None = None,
    positions: Bool[Tensor, "b s"] | None = None,
    max_norm_ratio: float | None = 10.0,
) -> Iterator[None]:
    """While it is open, every forward of `model` goes on with other rows at a hook.

    What dictionaries never see in training keeps its activation: positions that do not count
    (BOS, separators, padding), and attention sinks.

    Args:
        model: A TransformerLens model.
        hook_name: The hook whose rows are replaced.
        function: Is given those rows [n, d] and the same rows of `source` [n, d_in], in the
            model's dtype, and returns new ones [n, d], of any dtype and on any device.
        source: A hook that is reached before; None for `hook_name` itself.
        positions: Which positions of a forward are replaced; None for all. A forward of
            another shape is then an error.
        max_norm_ratio: Of them, only those are replaced whose norm at `source` is at most this
            many times the median of the forward; None replaces all.

    Raises:
        ValueError: As in `replaced_activations`, or a forward does not fit `positions`.
    """

    def replace(
        activations: Float[Tensor, "b s d"], read: Float[Tensor, "b s d_in"]
    ) -> Float[Tensor, "b s d"]:
        shape = activations.shape[:2]
        if positions is None:
            chosen = torch.ones(shape, dtype=torch.bool, device=activations.device)
        elif positions.shape == shape:
            chosen = positions.to(activations.device)
        else:
            raise ValueError(
                f"positions has shape {list(positions.shape)}, but this forward has contexts and "
                f"positions {list(shape)}. Give the mask of the token ids that the model reads."
            )
        if max_norm_ratio is not None:
            norms = read.float().norm(dim=-1)
            chosen = chosen & (norms <= max_norm_ratio * norms[chosen].median())
        replaced = activations.clone()
        replaced[chosen] = function(activations[chosen], read[chosen]).to(activations)
        return replaced

    with replaced_activations(model, hook_name, replace, source):
        yield
